/* gpu_student.h - all layers as pupils at once, on a device: student.h's losses and gradients, of which student.c is the
 * specification.
 *
 * Layers, heads and rows are elements of a few big launches (gpu_kernels.h); of layers so many go together as there is memory for,
 * which changes no bit: every sum belongs to one layer and head, and has one order.  Sums are fp32 where the CPU's are. */
#ifndef URCHIN_CONVERT_GPU_STUDENT_H
#define URCHIN_CONVERT_GPU_STUDENT_H

#include "convert/gpu_lesson.h"
#include "convert/student.h"

struct gpu_student;

/* softmax_layers [n_layers]: layers that have nothing to learn, or NULL; copied.  memory: device bytes for what layers need while
 * they learn; 0: half of what is free, as much as there is use for.  ERR_NOMEM: not enough for one layer. */
enum err gpu_student_new(struct gpu_student **out, struct gpu *g, const struct attention_config *c, int n_layers,
                         const bool *softmax_layers, int max_tokens, int max_rows, size_t memory);
void gpu_student_free(struct gpu_student *s); /* NULL is fine */
size_t gpu_student_layer_bytes(const struct attention_config *c, int n_tokens, int n_rows); /* of memory, for one layer */

/* student_learn() for every layer and kv head: params, grads (added to; NULL: none) [n_layers][student_params] and sums
 * [n_layers][n_heads] (added to) are the host's.  Waits.  ERR_DEVICE: nothing was added. */
enum err gpu_student_learn(struct gpu_student *s, const struct gpu_lesson *lesson, const float *params, float *grads,
                           const struct student_loss *loss, bool outputs, struct student_sums *sums);

/* The largest |q| and |k| of each layer and head, before RoPE: [n_layers][n_heads], [n_layers][n_kv_heads].  Waits. */
enum err gpu_student_largest(struct gpu_student *s, const struct gpu_lesson *lesson, float *queries, float *keys);

#endif
