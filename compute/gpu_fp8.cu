/* gpu_fp8.cu - rows of X as E4M3 for the library's GEMM of fp8, and the scales of its sums.
 *
 * q[m][k] = E4M3(x[m][k] 448 / a[m]), scales[m] = a[m] / 448 with a[m] = max_k |x[m][k]|: a row's
 * bits are its own.  A row of zeros, or of less than 2^-100, counts as a = 2^-100, so that nothing
 * is divided by zero; one
 * that holds an infinity or NaN has a NaN among its codes, and its sums are NaN.
 *
 * launch: a block of 256 threads a row, which reads it twice, the second time from the first cache.
 *
 * bound: 3 bytes an element, and for the scales 8 bytes a sum.
 *
 * twin: e4m3_round() of compute/ops.h. */
#include "compute/gpu_matrix_device.cuh"

enum { THREADS = 256 };

static __global__ void quantise_rows(uint8_t *q, float *scales, const uint16_t *x, size_t x_stride,
                                     int n_in) {
    __shared__ float shared[THREADS / WARP];
    const int thread = (int)threadIdx.x;
    /* x_stride and n_in are whole 16 bytes */
    const uint4 *row = (const uint4 *)(x + (size_t)blockIdx.x * x_stride);
    uint2 *out = (uint2 *)(q + (size_t)blockIdx.x * (size_t)n_in);
    float most = 0;
    for (int i = thread; i < n_in / 8; i += THREADS) {
        const uint4 v = row[i];
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const float low = as_float(words[w] << 16), high = as_float(words[w] & 0xffff0000u);
            most = fmaxf(most, fmaxf(fabsf(low), fabsf(high)));
        }
    }
    most = warp_max(most);
    if (thread % WARP == 0) shared[thread / WARP] = most;
    __syncthreads();
    most = warp_max(shared[thread % (THREADS / WARP)]);
    most = fmaxf(most, 0x1p-100f);
    if (thread == 0) scales[blockIdx.x] = most / 448.0f;
    const float by = 448.0f / most;
    for (int i = thread; i < n_in / 8; i += THREADS) {
        const uint4 v = row[i];
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
        uint32_t codes[2] = {};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const uint32_t low = float_to_e4m3(as_float(words[w] << 16) * by),
                           high = float_to_e4m3(as_float(words[w] & 0xffff0000u) * by);
            codes[w / 2] |= (low | high << 8) << w % 2 * 16;
        }
        out[i] = uint2{codes[0], codes[1]};
    }
}

static __global__ void scale_rows(float *y, size_t y_stride, const float *x_scales,
                                  const float *w_scales, const float *bias, int n_out) {
    float *row = y + (size_t)blockIdx.x * y_stride;
    const float scale = x_scales[blockIdx.x];
    for (int n = (int)threadIdx.x; n < n_out; n += (int)blockDim.x) {
        const float all = row[n] * scale * w_scales[n];
        row[n] = bias ? all + bias[n] : all;
    }
}

void gpu_quantise_fp8(struct gpu *g, void *q, float *scales, const void *x, size_t x_stride,
                      int n_rows, int n_in) {
    LAUNCH(g, quantise_rows, dim3((unsigned)n_rows), THREADS, 0, (uint8_t *)q, scales,
           (const uint16_t *)x, x_stride, n_in);
}

void gpu_scale_fp8(struct gpu *g, float *y, size_t y_stride, const float *x_scales,
                   const float *w_scales, const float *bias, int n_rows, int n_out) {
    LAUNCH(g, scale_rows, dim3((unsigned)n_rows), 256, 0, y, y_stride, x_scales, w_scales, bias,
           n_out);
}
