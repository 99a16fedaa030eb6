/* gpu_none.c - stands in for training on a device in a program built without CUDA: no model lies on
 * one, so nothing of this is ever called. */
#include "convert/gpu_student.h"

#include <assert.h>

enum err gpu_lesson_new(struct gpu_lesson **out, struct gpu *g, const struct attention_config *c,
                        int n_layers, int max_tokens, int max_rows, const float *const angles[2],
                        const float *const far[2]) {
    (void)out, (void)g, (void)c, (void)n_layers, (void)max_tokens, (void)max_rows;
    (void)angles, (void)far;
    assert(0);
    return ERR_NO_CUDA;
}
void gpu_lesson_free(struct gpu_lesson *l) {
    (void)l;
}
size_t gpu_lesson_bytes(const struct attention_config *c, int n_layers, int max_tokens,
                        int max_rows) {
    (void)c, (void)n_layers, (void)max_tokens, (void)max_rows;
    assert(0);
    return 0;
}
void gpu_lesson_plan(struct gpu_lesson *l, const struct lesson *lesson) {
    (void)l, (void)lesson;
    assert(0);
}
void gpu_lesson_take(struct gpu_lesson *l, int layer, const float *qkv, int at, int n,
                     int first_row, int n_taken) {
    (void)l, (void)layer, (void)qkv, (void)at, (void)n, (void)first_row, (void)n_taken;
    assert(0);
}
enum err gpu_lesson_download(struct gpu_lesson *l, float *kv, float *q) {
    (void)l, (void)kv, (void)q;
    assert(0);
    return ERR_NO_CUDA;
}

enum err gpu_student_new(struct gpu_student **out, struct gpu *g, const struct attention_config *c,
                         int n_layers, const bool *softmax_layers, int max_tokens, int max_rows,
                         size_t memory) {
    (void)out, (void)g, (void)c, (void)n_layers, (void)softmax_layers, (void)max_tokens;
    (void)max_rows, (void)memory;
    assert(0);
    return ERR_NO_CUDA;
}
void gpu_student_free(struct gpu_student *s) {
    (void)s;
}
size_t gpu_student_layer_bytes(const struct attention_config *c, int n_tokens, int n_rows) {
    (void)c, (void)n_tokens, (void)n_rows;
    assert(0);
    return 0;
}
const char *gpu_student_error(const struct gpu_student *s) {
    (void)s;
    assert(0);
    return "";
}
enum err gpu_student_put(struct gpu_student *s, const float *w, const float *m, const float *v) {
    (void)s, (void)w, (void)m, (void)v;
    assert(0);
    return ERR_NO_CUDA;
}
enum err gpu_student_get(struct gpu_student *s, float *w, float *m, float *v) {
    (void)s, (void)w, (void)m, (void)v;
    assert(0);
    return ERR_NO_CUDA;
}
enum err gpu_student_learn(struct gpu_student *s, const struct gpu_lesson *lesson, bool gradients,
                           const struct student_loss *loss, bool outputs,
                           struct student_sums *sums) {
    (void)s, (void)lesson, (void)gradients, (void)loss, (void)outputs, (void)sums;
    assert(0);
    return ERR_NO_CUDA;
}
enum err gpu_student_norms(struct gpu_student *s, double *norms) {
    (void)s, (void)norms;
    assert(0);
    return ERR_NO_CUDA;
}
void gpu_student_step(struct gpu_student *s, float rate, float rate_mix, float correct_m,
                      float correct_v, double most) {
    (void)s, (void)rate, (void)rate_mix, (void)correct_m, (void)correct_v, (void)most;
    assert(0);
}
enum err gpu_student_largest(struct gpu_student *s, const struct gpu_lesson *lesson, float *queries,
                             float *keys) {
    (void)s, (void)lesson, (void)queries, (void)keys;
    assert(0);
    return ERR_NO_CUDA;
}
