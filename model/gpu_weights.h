/* gpu_weights.h - a base model's weights on a GPU: this rank's part of each (ranks.h). */
#ifndef URCHIN_MODEL_GPU_WEIGHTS_H
#define URCHIN_MODEL_GPU_WEIGHTS_H

#include "compute/gpu_matrix.h"
#include "compute/gpu_ops.h"
#include "model/ranks.h"
#include "model/weights.h"

struct gpu_layer_weights { /* biases on the device; NULL: none */
    struct gpu_matrix *qkv, *o, *gate_up, *down;
    struct gpu_norm attn_norm, ffn_norm;
    float *qkv_bias, *o_bias, *gate_up_bias, *down_bias;
};

struct gpu_weights {                            /* owns all it names */
    struct gpu_matrix *embed, *head, *position; /* head may be embed, position NULL */
    struct gpu_norm norm;
    struct gpu_layer_weights *layers; /* [n_layers] */
    int n_layers;
    void **vectors; /* [n_vectors]: norms and biases, on the device */
    int n_vectors;
    size_t bytes; /* on the device */
};

/* Copies and waits; `to` was all zero, the rest is only read meanwhile.  ERR_NOMEM: here or on the
 * device; ERR_DEVICE. Free it either way. */
enum err gpu_weights_copy(struct gpu_weights *to, struct gpu *g, const struct communicator *ranks,
                          const struct base_config *base, const struct weights *from);
void gpu_weights_free(struct gpu_weights *w, struct gpu *g); /* all zero: nothing */

/* Scratch that a product of any of them with so many rows may take. */
size_t gpu_weights_scratch_bytes(const struct gpu_weights *w, int max_rows);

#endif
