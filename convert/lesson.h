/* lesson.h - what a teacher's layers attended with while it read: q of sampled rows, all k and v.
 *
 * A lesson is a pack of documents (or pieces of documents), each read from position 0 by itself: no
 * row sees a key of another document. */
#ifndef URCHIN_CONVERT_LESSON_H
#define URCHIN_CONVERT_LESSON_H

#include "attention/attention.h"

struct lesson {
    int n_tokens, n_documents, n_rows;
    const int *first; /* [n_documents + 1]: document d is tokens first[d] .. first[d + 1] - 1 */
    const int *rows;  /* [n_rows] tokens, ascending: the query rows */
    const float *kv;  /* [n_layers][n_tokens][2 n_kv_heads D]: k, then v, before RoPE */
    const float *q;   /* [n_layers][n_rows][n_heads D] before RoPE */
    const float *cosines, *sines; /* [longest document][D / 2] of positions; NULL: no RoPE */
    const float *far_cosines, *far_sines; /* [D / 2] of max_distance, where it is set */
    struct gpu_lesson *device; /* borrowed: where kv and q lie, which are NULL here; NULL: they are the host's */
    int part, n_parts; /* only the rows part, part + n_parts, ... are learned from; n_parts 0: all */
};

static inline int lesson_row_step(const struct lesson *l) {
    return l->n_parts ? l->n_parts : 1;
}
static inline int lesson_n_rows(const struct lesson *l) { /* that are learned from */
    return (l->n_rows - l->part + lesson_row_step(l) - 1) / lesson_row_step(l);
}

/* Keys of the row at this position: sinks 0 .. *sinks - 1 and *from .. position are exact, *sinks
 * .. *from - 1 linear.  (The recall cache takes no part in attention transfer, nor does the
 * horizon.)  Returns the number of linear keys. */
int64_t lesson_linear_keys(const struct attention_config *c, int64_t position, int *sinks,
                           int64_t *from);

#endif
