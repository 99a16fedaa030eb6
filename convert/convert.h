/* convert.h - `urchin convert`: a softmax model learns Hedgehog attention.
 *
 *   urchin convert BASE --text FILES --out FOLDER [--recipe urchin|lolcats|paper] [...]
 *
 * Attention transfer: the base reads packs of text (corpus.h, teacher.h); the
 * maps of all layers learn to give its attention rows, or its outputs (student.h, training.h).
 * --device cuda, or auto where there is one: on the GPU (gpu_lesson.h, gpu_student.h).
 * Progress goes to stderr: one line that is written over on a terminal, else a line every ten
 * seconds.
 *
 * FOLDER/checkpoint holds an unfinished conversion, never older than a minute of work; the same
 * command goes on from it, to the same bytes.  SIGINT and SIGTERM save and end (status 130); a
 * second one ends at once.  A loss that is no number, or that has grown past all it began with,
 * ends it with a sentence, and the checkpoint stays as it was.
 *
 * At the end FOLDER is a model (docs/models.md) with conversion.json beside it (docs/convert.md);
 * urchin.json is written last, so a folder that has one is whole. */
#ifndef URCHIN_CONVERT_CONVERT_H
#define URCHIN_CONVERT_CONVERT_H

#include "compute/team.h"
#include "config/settings.h"

/* The process's exit status: 0; 1 after one sentence on stderr; 130 when a signal ended it. */
int convert_main(const struct settings *settings, struct team *team);

/* Tests: asks for the end after so many steps of this run, as SIGINT does.  0: never. */
void convert_interrupt_after(int64_t steps);

#endif
