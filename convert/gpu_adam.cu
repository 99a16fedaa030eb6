/* gpu_adam.cu - the step of the maps: each layer's gradient norm, then AdamW.
 *
 *   shapes  w, m, v, g [layers][n]; norms [layers] double
 *   launch  norms: a block of 256 threads a layer; adam: 256 threads, an element each, a row of
 *           blocks a layer
 *   bound   bytes: 4 and 32 an element (28 read and written, 4 that zero g).  SmolLM2, 1.5 million
 * parameters: 50 MB twin    norm_layers() of training.c, convert_kernels.adam
 *
 * A thread sums squares of elements thread, thread + 256, ... in double; threads are added as a
 * tree, so a layer's norm has one order whatever else there is. */
#include "convert/gpu_kernels.h"

#include "compute/cuda.h"

enum { THREADS = 256 };

static __global__ void __launch_bounds__(THREADS) norms(double *out, const float *g, size_t n) {
    DYNAMIC_SHARED(double, sums);
    g += (size_t)blockIdx.x * n;
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += THREADS)
        sum += (double)g[i] * (double)g[i];
    sums[threadIdx.x] = sum;
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = sqrt(sums[0]);
}

static __global__ void __launch_bounds__(THREADS)
    adam(float *w, float *m, float *v, float *g, const double *norms, const gpu_step s) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, layer = blockIdx.y,
                 at = layer * s.n + i;
    if (i >= s.n) return;
    const double norm = norms[layer];
    const float clip = norm > s.most ? (float)(s.most / norm) : 1, x = g[at] * clip,
                rate = i < s.n_maps ? s.rate : s.rate_mix;
    const float mean = s.beta_m * m[at] + (1 - s.beta_m) * x,
                square = s.beta_v * v[at] + (1 - s.beta_v) * x * x;
    m[at] = mean;
    v[at] = square;
    w[at] -= rate * (mean * s.correct_m) / (sqrtf(square * s.correct_v) + 1e-8f);
    g[at] = 0;
}

void gpu_norms(struct gpu *g, double *out, const float *grads, size_t n, int n_layers) {
    LAUNCH(g, norms, dim3((unsigned)n_layers), THREADS, THREADS * sizeof(double), out, grads, n);
}

void gpu_adam(struct gpu *g, float *w, float *m, float *v, float *grads, const double *norms,
              const struct gpu_step *s, int n_layers) {
    const dim3 grid((unsigned)((s->n + THREADS - 1) / THREADS), (unsigned)n_layers);
    LAUNCH(g, adam, grid, THREADS, 0, w, m, v, grads, norms, *s);
}
