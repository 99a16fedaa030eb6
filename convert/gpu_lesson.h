/* gpu_lesson.h - a lesson that lies on a device: lesson.h's kv and q, taken from the base's own steps there.
 *
 * All calls but new, free and download queue work on the device's stream, behind the step that is being queued. */
#ifndef URCHIN_CONVERT_GPU_LESSON_H
#define URCHIN_CONVERT_GPU_LESSON_H

#include "compute/gpu.h"
#include "convert/lesson.h"

struct gpu_lesson {
    struct gpu *gpu; /* borrowed for life */
    int n_layers, max_tokens, max_rows;
    size_t q_floats, kv_floats; /* of a token: q, and k with v */

    /* host, of the lesson at hand */
    int n_tokens, n_rows;      /* n_rows: that are learned from */
    int all_rows, part, n_parts; /* as lesson.h has them; n_parts at least 1 */

    /* device */
    float *kv, *q;          /* [n_layers][n_tokens][kv_floats], [n_layers][all_rows][q_floats] */
    float *cosines, *sines; /* [max_tokens][D / 2] of positions; NULL: no RoPE */
    float *far_cosines, *far_sines; /* [D / 2] of max_distance */
    /* what lay_out() has put down, of which plan is the host's copy: */
    int *rows, *first, *position; /* [n_rows]: token, its document's first token, its place in that document */
    int *positions;               /* [n_tokens] places in their documents */
    int *spans;                   /* [row tiles][2]: the keys that a tile's rows see lie in these; whole key tiles */
    int *seen_by;                 /* [row tiles of keys][2]: the rows, in whole tiles, that may see one of these keys */
    int *plan, *plan_at;          /* owned */
};

/* Room for lessons of at most so many tokens and rows.  angles: [max_tokens][D / 2] cosines, and sines, or NULL: no RoPE; far:
 * [D / 2] cosines, and sines of max_distance, or NULL.  ERR_NOMEM: gpu_lesson_bytes() are not free. */
enum err gpu_lesson_new(struct gpu_lesson **out, struct gpu *g, const struct attention_config *c, int n_layers, int max_tokens,
                        int max_rows, const float *const angles[2], const float *const far[2]);
void gpu_lesson_free(struct gpu_lesson *l); /* NULL is fine */
size_t gpu_lesson_bytes(const struct attention_config *c, int n_layers, int max_tokens, int max_rows);

/* A lesson begins, or another part of one: n_tokens, documents and rows of *lesson, which are read before this returns.  Between
 * two of these the host waits for the device.  Tokens are taken while the whole is the part. */
void gpu_lesson_plan(struct gpu_lesson *l, const struct lesson *lesson);

/* What one layer attends with in a step that reads tokens at .. at + n - 1: qkv [n][(n_heads + 2 n_kv_heads) D] on the device.
 * Of the rows, first_row .. first_row + n_taken - 1 are tokens of this step. */
void gpu_lesson_take(struct gpu_lesson *l, int layer, const float *qkv, int at, int n, int first_row, int n_taken);

/* The whole as lesson.h has it, into host memory; waits.  ERR_DEVICE. */
enum err gpu_lesson_download(struct gpu_lesson *l, float *kv, float *q);

#endif
