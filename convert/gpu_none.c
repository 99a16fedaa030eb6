/* gpu_none.c - stands in for training on a device in a program built without CUDA: no model lies on
 * one, so nothing of this is ever called. */
#include "convert/gpu_lesson.h"

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
void gpu_lesson_begin(struct gpu_lesson *l, const struct lesson *lesson) {
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
