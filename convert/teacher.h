/* teacher.h - the base model reads a pack, and its layers' q, k and v are a lesson.
 *
 * The forward pass is the engine's own (model_step), so whatever the engine loads can teach; it is
 * the only pass there is, and all layers learn from it.  Where the model is on a device the lesson
 * is gathered there. */
#ifndef URCHIN_CONVERT_TEACHER_H
#define URCHIN_CONVERT_TEACHER_H

#include "convert/corpus.h"
#include "convert/lesson.h"
#include "model/model.h"

struct teacher;

/* Tokens that it reads in one step, on the CPU and on a device: max_rows of the model; and documents
 * at a time, there: at most so many of its slots are used. */
enum { TEACHER_ROWS = 256, TEACHER_DEVICE_ROWS = 1024, TEACHER_DEVICE_SLOTS = 4 };

/* model (softmax) is borrowed; its max_seq_len is at least max_tokens.  attention says which rows
 * have linear keys, and is the pupil's.  ERR_NOMEM: of the host, or of the device. */
enum err teacher_new(struct teacher **out, struct model *model,
                     const struct attention_config *attention, int max_tokens, int max_rows);
void teacher_free(struct teacher *t); /* NULL is fine */
size_t teacher_bytes(const struct model_info *info, int max_tokens, int max_rows); /* of the host */

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
