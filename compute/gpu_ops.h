/* gpu_ops.h - row-wise operations of the forward pass on a device: ops.h's twin.  All queue on the device's stream.
 *
 * Every operation works on its row alone, in one fixed order of sums, so a row's bits do not depend on n_rows.
 * `out` is what a product reads next: bf16 (rounded to nearest even) when out_bf16, else fp32. */
#ifndef URCHIN_COMPUTE_GPU_OPS_H
#define URCHIN_COMPUTE_GPU_OPS_H

#include "compute/gpu.h"
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct gpu_norm {             /* RMSNorm: w x / sqrt(mean x^2 + eps); LayerNorm when bias is given */
    const float *weight;      /* [dim], device */
    const float *bias;        /* [dim], device, or NULL: RMSNorm */
    float eps;
};

/* x += delta (NULL: nothing is added), then out = norm(x).  x, delta [n_rows][dim] fp32, out [n_rows][dim]. */
void gpu_add_norm(struct gpu *g, void *out, bool out_bf16, float *x, const float *delta, int n_rows, int dim,
                  const struct gpu_norm *norm);

/* x += y, n elements each. */
void gpu_add(struct gpu *g, float *x, const float *y, size_t n);

enum gpu_activation { GPU_SILU_MUL, GPU_GELU_TANH, GPU_GELU_ERF };
/* SILU_MUL: h [n_rows][2 dim], out = silu(h[:dim]) h[dim:]; GELU: h [n_rows][dim].  out [n_rows] rows of out_stride elements. */
void gpu_activate(struct gpu *g, void *out, bool out_bf16, size_t out_stride, const float *h, int n_rows, int dim,
                  enum gpu_activation activation);

/* to[i][:] = from[index[i]][:], n rows of row_bytes (a multiple of 4; strides too); index on the device, < 0: zeros. */
void gpu_gather_rows(struct gpu *g, void *to, const void *from, size_t row_bytes, const int32_t *index, int n);

#ifdef __cplusplus
}
#endif
#endif
