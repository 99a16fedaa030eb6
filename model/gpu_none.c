/* gpu_none.c - stands in for gpu_model.c in a program built without CUDA: there is no device, so
 * nothing else is ever called. */
#include "model/gpu_model.h"

#include <assert.h>

enum err gpu_model_device(struct gpu **out, char *msg, size_t msg_len) {
    (void)out;
    return err_set(msg, msg_len, ERR_NO_CUDA,
                   "this program was built without CUDA (nvcc was not found, or CUDA=0 was given)");
}

void gpu_model_device_close(struct gpu *g) {
    (void)g;
}
void gpu_model_free(struct gpu_model *m) {
    (void)m;
}

enum err gpu_model_new(struct gpu_model **out, const struct gpu_model_options *options, char *msg,
                       size_t msg_len) {
    (void)out, (void)options;
    return gpu_model_device(NULL, msg, msg_len);
}

/* The rest takes a model that cannot exist. */
const char *gpu_model_device_name(const struct gpu *g) {
    (void)g;
    assert(0);
    return NULL;
}
size_t gpu_model_device_free_bytes(struct gpu *g) {
    (void)g;
    assert(0);
    return 0;
}
bool gpu_model_device_has_fp8(const struct gpu *g) {
    (void)g;
    assert(0);
    return false;
}
int gpu_model_n_slots(const struct gpu_model *m) {
    (void)m;
    assert(0);
    return 0;
}
size_t gpu_model_slot_bytes(const struct gpu_model *m) {
    (void)m;
    assert(0);
    return 0;
}
size_t gpu_model_weight_bytes(const struct gpu_model *m) {
    (void)m;
    assert(0);
    return 0;
}
struct gpu *gpu_model_gpu(const struct gpu_model *m) {
    (void)m;
    assert(0);
    return NULL;
}
void gpu_model_set_tap(struct gpu_model *m,
                       void (*fn)(void *arg, int layer, const float *qkv, int n_rows), void *arg) {
    (void)m, (void)fn, (void)arg;
    assert(0);
}
void gpu_model_slot_clear(struct gpu_model *m, int slot) {
    (void)m, (void)slot;
    assert(0);
}
void gpu_model_slot_copy(struct gpu_model *m, int dst, int src) {
    (void)m, (void)dst, (void)src;
    assert(0);
}
int64_t gpu_model_slot_position(const struct gpu_model *m, int slot) {
    (void)m, (void)slot;
    assert(0);
    return 0;
}
enum err gpu_model_slot_save(struct gpu_model *m, int slot, void *out) {
    (void)m, (void)slot, (void)out;
    assert(0);
    return ERR_NO_CUDA;
}
enum err gpu_model_slot_load(struct gpu_model *m, int slot, const void *state, size_t bytes,
                             char *msg, size_t msg_len) {
    (void)m, (void)slot, (void)state, (void)bytes;
    assert(0);
    return err_set(msg, msg_len, ERR_NO_CUDA, "there is no device");
}
void gpu_model_count_prompt(struct gpu_model *m, int slot, const int32_t *tokens, int n) {
    (void)m, (void)slot, (void)tokens, (void)n;
    assert(0);
}
enum err gpu_model_step(struct gpu_model *m, const struct model_run *runs, int n_runs,
                        const struct model_draws *draws, const struct gpu_drawn **drawn,
                        const float **logits) {
    (void)m, (void)runs, (void)n_runs, (void)draws, (void)drawn, (void)logits;
    assert(0);
    return ERR_NO_CUDA;
}
