/* teacher.h - the base model reads a pack, and its layers' q, k and v are a lesson.
 *
 * The forward pass is the engine's own (model_step), so whatever the engine loads can teach; it is
 * the only pass there is, and all layers learn from it. */
#ifndef URCHIN_CONVERT_TEACHER_H
#define URCHIN_CONVERT_TEACHER_H

#include "convert/corpus.h"
#include "convert/lesson.h"
#include "model/model.h"

struct teacher;

/* model (softmax, on the CPU) is borrowed; its max_seq_len is at least max_tokens.  attention says
 * which rows have linear keys, and is the pupil's. */
enum err teacher_new(struct teacher **out, struct model *model,
                     const struct attention_config *attention, int max_tokens, int max_rows);
void teacher_free(struct teacher *t); /* NULL is fine */
size_t teacher_bytes(const struct model_info *info, int max_tokens, int max_rows);

/* The query rows that are compared, ascending, at most n_rows, into rows; returns how many.  They
 * are drawn evenly over the rows that have linear keys, by chance(seed, stream, number, .); of a
 * recall text the rows that predict an answer always, as far as n_rows goes.  *share: how many of
 * all rows have linear keys, 0 .. 1.  scratch [2 pack->n]. */
int teacher_rows(const struct attention_config *attention, const struct pack *pack, int n_rows,
                 int64_t seed, int stream, int64_t number, int *rows, int *scratch, double *share);

/* Reads the pack and fills *out (borrowed until the next call) for those rows. */
enum err teacher_read(struct teacher *t, const struct pack *pack, int n_rows, int64_t seed,
                      int stream, int64_t number, struct lesson *out, double *share, char *msg,
                      size_t msg_len);

#endif
