/* gpu_model.h - a model's weights, slots and forward pass on a GPU: what model.c hands steps to where there is one.
 *
 * Rows of prompts and generated rows are two passes of a step, each by its own kernels (gpu_matrix.h, gpu_attention.h); the
 * latter is recorded as a graph for each size of batch the second time it is met.  The host waits once a step. */
#ifndef URCHIN_MODEL_GPU_MODEL_H
#define URCHIN_MODEL_GPU_MODEL_H

#include "model/base.h"
#include "model/model.h"
#include "model/weights.h"

struct gpu_model;

struct gpu_model_options {
    const char *name;               /* of the model's file, for sentences */
    struct gpu *gpu;                /* taken, also on error */
    const struct base_config *base; /* borrowed for life */
    const struct weights *weights;  /* copied; may be freed once this returns */
    struct attention *twin;         /* borrowed for life */
    int n_slots;                    /* 0: as many as memory_budget holds, at most 256 */
    size_t memory_budget;           /* 0: nine tenths of what is left after the weights */
    int max_rows, max_logits, max_runs;
};

/* ERR_NO_CUDA: this program, or this machine, has none; msg says which. */
enum err gpu_model_device(struct gpu **out, char *msg, size_t msg_len);
const char *gpu_model_device_name(const struct gpu *g);
size_t gpu_model_device_free_bytes(struct gpu *g);
bool gpu_model_device_has_fp8(const struct gpu *g); /* multiplies WEIGHT_FP8 */
void gpu_model_device_close(struct gpu *g); /* NULL is fine */

enum err gpu_model_new(struct gpu_model **out, const struct gpu_model_options *options, char *msg, size_t msg_len);
void gpu_model_free(struct gpu_model *m); /* NULL is fine */
int gpu_model_n_slots(const struct gpu_model *m);
size_t gpu_model_slot_bytes(const struct gpu_model *m);
size_t gpu_model_weight_bytes(const struct gpu_model *m);

void gpu_model_slot_clear(struct gpu_model *m, int slot);
void gpu_model_slot_copy(struct gpu_model *m, int dst, int src);
int64_t gpu_model_slot_position(const struct gpu_model *m, int slot);
enum err gpu_model_slot_save(struct gpu_model *m, int slot, void *out);
enum err gpu_model_slot_load(struct gpu_model *m, int slot, const void *state, size_t bytes, char *msg, size_t msg_len);
void gpu_model_count_prompt(struct gpu_model *m, int slot, const int32_t *tokens, int n);

struct gpu *gpu_model_gpu(const struct gpu_model *m); /* borrowed */

/* model_set_tap(), for rows of prompts. */
void gpu_model_set_tap(struct gpu_model *m, void (*fn)(void *arg, int layer, const float *qkv, int n_rows), void *arg);

/* Runs whose bounds have been checked.  draws and logits as in model_step_draw; either may be NULL. */
enum err gpu_model_step(struct gpu_model *m, const struct model_run *runs, int n_runs, const struct model_draws *draws,
                        const struct gpu_drawn **drawn, const float **logits);

#endif
