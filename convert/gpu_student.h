/* gpu_student.h - all layers as pupils at once, on a device: student.h's losses and gradients, of which student.c is the
 * specification.
 *
 * Layers, heads and rows are elements of a few big launches (gpu_kernels.h); as many layers go together as there is memory
 * for, which changes no bit: every sum belongs to one layer and head, and has one order.  Sums are fp32 where the CPU's are. */
#ifndef URCHIN_CONVERT_GPU_STUDENT_H
#define URCHIN_CONVERT_GPU_STUDENT_H

#include "convert/gpu_lesson.h"
#include "convert/student.h"

struct gpu_student; /* parameters, Adam's moments and gradients of all layers, and memory to learn in */

/* softmax_layers [n_layers]: layers that have nothing to learn, or NULL; copied.  memory: device bytes for what layers need while
 * they learn; 0: half of what is free, as much as there is use for.  Everything begins as 0.  ERR_NOMEM: not enough for one
 * layer. */
enum err gpu_student_new(struct gpu_student **out, struct gpu *g, const struct attention_config *c, int n_layers,
                         const bool *softmax_layers, int max_tokens, int max_rows, size_t memory);
void gpu_student_free(struct gpu_student *s); /* NULL is fine */
size_t gpu_student_layer_bytes(const struct attention_config *c, int n_tokens, int n_rows); /* of memory, for one layer */
const char *gpu_student_error(const struct gpu_student *s); /* what the device said last */

/* Parameters and moments [n_layers][student_params] from the host, and to it; waits.  ERR_DEVICE. */
enum err gpu_student_put(struct gpu_student *s, const float *w, const float *m, const float *v);
enum err gpu_student_get(struct gpu_student *s, float *w, float *m, float *v);
enum err gpu_student_grads(struct gpu_student *s, float *grads); /* tests */

/* student_learn() for every layer and kv head; gradients are added to those here, sums to [n_layers][n_heads] of the host's.
 * Waits.  ERR_DEVICE: no sum was added. */
enum err gpu_student_learn(struct gpu_student *s, const struct gpu_lesson *lesson, bool gradients,
                           const struct student_loss *loss, bool outputs, struct student_sums *sums);

/* The norm of each layer's gradient into norms [n_layers]; waits.  Then the step: AdamW, after which gradients are 0; queued. */
enum err gpu_student_norms(struct gpu_student *s, double *norms);
void gpu_student_step(struct gpu_student *s, float rate, float rate_mix, float correct_m, float correct_v, double most);

/* The largest |q| and |k| of each layer and head, before RoPE: [n_layers][n_heads], [n_layers][n_kv_heads].  Waits. */
enum err gpu_student_largest(struct gpu_student *s, const struct gpu_lesson *lesson, float *queries, float *keys);

#endif
