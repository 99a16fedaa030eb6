/* gpu_features.cu - feature maps of projected rows, and the way back.
 *
 *   shapes  u, du [n][f]   phi, dphi [n][2 f]: the half of u, then the half of -u
 *   launch  a warp a row, 4 rows a block; f any
 *   bound   12 n f bytes forward, 24 n f backward: bandwidth.  SmolLM2's keys of 1,024 tokens, 90
 *           states: 71 and 142 MB
 *   twin    convert_kernels.features and features_back (kernels.c), without pad lanes */
#include "convert/gpu_kernels.h"

#include "compute/cuda.h"

extern "C" {
#include "attention/attention.h"
}

enum { WARPS = 4 };

static const float KEY_MOST = 30; /* phi_k is cut there: kernels.c */

DEVICE size_t warp_row() {
    return (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
}

/* phi+ = exp(times u - shift), phi- = exp(-times u - shift), at most exp(most); both sums.
 */
DEVICE void exp_halves(float *phi, const float *u, int f, float times, const float (&shift)[2],
                       float most, float (&sums)[2], int lane) {
    sums[0] = sums[1] = 0;
    for (int i = lane; i < f; i += 32) {
        const float x = times * u[i], up = expf(fminf(x - shift[0], most)),
                    down = expf(fminf(-x - shift[1], most));
        phi[i] = up;
        phi[f + i] = down;
        sums[0] += up;
        sums[1] += down;
    }
    sums[0] = warp_sum(sums[0]);
    sums[1] = warp_sum(sums[1]);
}

static __global__ void features(int map, float *phi, float *reach, const float *u, size_t n,
                                int f) {
    const size_t row = warp_row();
    const int lane = (int)threadIdx.x % 32;
    if (row >= n) return; /* a whole warp */
    u += row * (size_t)f;
    phi += row * 2 * (size_t)f;
    float top = -INFINITY, bottom = -INFINITY, sums[2];
    for (int i = lane; i < f; i += 32) {
        top = fmaxf(top, u[i]);
        bottom = fmaxf(bottom, -u[i]);
    }
    top = warp_max(top);
    bottom = warp_max(bottom);
    const float most = fmaxf(top, bottom); /* of |u| */
    if (map == MAP_EXP) {
        const float shift = reach ? most : 0;
        exp_halves(phi, u, f, 1, {shift, shift}, reach ? 0 : KEY_MOST, sums, lane);
    } else if (map == MAP_SOFTMAX2) {
        exp_halves(phi, u, f, 1, {top, bottom}, 0, sums, lane);
        for (int i = lane; i < f; i += 32) { /* what this lane wrote */
            phi[i] = fmaxf(phi[i] / sums[0], 1e-12f);
            phi[f + i] = fmaxf(phi[f + i] / sums[1], 1e-12f);
        }
    } else {
        exp_halves(phi, u, f, 2, {2 * most, 2 * most}, 0, sums, lane);
        const float sum = sums[0] + sums[1];
        for (int i = lane; i < f; i += 32) {
            phi[i] /= sum;
            phi[f + i] /= sum;
        }
    }
    if (reach && lane == 0) reach[row] = map == MAP_EXP ? most : 0;
}

static __global__ void features_back(int map, float *du, const float *dphi, const float *phi,
                                     const float *u, int key, size_t n, int f) {
    const size_t row = warp_row();
    const int lane = (int)threadIdx.x % 32;
    if (row >= n) return;
    u += row * (size_t)f;
    du += row * (size_t)f;
    phi += row * 2 * (size_t)f;
    dphi += row * 2 * (size_t)f;
    float plus = 0, minus = 0, factor = 1;
    if (map != MAP_EXP) { /* phi . dphi of each half */
        for (int i = lane; i < f; i += 32) {
            plus = fmaf(dphi[i], phi[i], plus);
            minus = fmaf(dphi[f + i], phi[f + i], minus);
        }
        plus = warp_sum(plus);
        minus = warp_sum(minus);
    }
    if (map == MAP_JOINT_SOFTMAX) {
        plus = minus = plus + minus;
        factor = 2;
    }
    const bool cut = map == MAP_EXP && key; /* a cut passes no gradient */
    for (int i = lane; i < f; i += 32) {
        const float x = u[i], up = cut && x > KEY_MOST ? 0 : phi[i] * (dphi[i] - plus),
                    down = cut && x < -KEY_MOST ? 0 : phi[f + i] * (dphi[f + i] - minus);
        du[i] = (up - down) * factor;
    }
}

void gpu_features(struct gpu *g, int map, float *phi, float *reach, const float *u, size_t n,
                  int f) {
    if (n == 0) return;
    LAUNCH(g, features, dim3((unsigned)((n + WARPS - 1) / WARPS)), 32 * WARPS, 0, map, phi, reach,
           u, n, f);
}

void gpu_features_back(struct gpu *g, int map, float *du, const float *dphi, const float *phi,
                       const float *u, int key, size_t n, int f) {
    if (n == 0) return;
    LAUNCH(g, features_back, dim3((unsigned)((n + WARPS - 1) / WARPS)), 32 * WARPS, 0, map, du,
           dphi, phi, u, key, n, f);
}
