/* ops.c - the small dense operations: vector loops come from the kernels of this machine. */
#include "compute/ops.h"

#include "compute/cpu.h"
#include "compute/kernels.h"
#include <math.h>
#include <string.h>

const struct compute_kernels *compute_kernels(void) {
    switch (cpu_isa()) {
#if defined(__x86_64__)
    case CPU_AMX:
        return &compute_kernels_amx;
    case CPU_AVX512:
        return &compute_kernels_avx512;
    case CPU_AVX2:
        return &compute_kernels_avx2;
#elif defined(__aarch64__)
    case CPU_DOTPROD:
        return &compute_kernels_dotprod;
#endif
    default:
        return &compute_kernels_generic;
    }
}

void rms_norm(float *y, const float *x, const float *weight, int n, float eps) {
    compute_kernels()->rms_norm(y, x, weight, n, eps);
}

void layer_norm(float *y, const float *x, const float *weight, const float *bias, int n,
                float eps) {
    compute_kernels()->layer_norm(y, x, weight, bias, n, eps);
}

void silu_mul(float *y, const float *gate, const float *up, int n) {
    compute_kernels()->silu_mul(y, gate, up, n);
}

void gelu_tanh(float *y, const float *x, int n) {
    compute_kernels()->gelu_tanh(y, x, n);
}

void gelu_erf(float *y, const float *x, int n) {
    for (int i = 0; i < n; i++)
        y[i] = 0.5f * x[i] * erfcf(-0.70710678f * x[i]);
}

void add_to(float *y, const float *x, int n) {
    compute_kernels()->add_to(y, x, n);
}

float fp16_float(uint16_t h) {
    uint32_t magnitude = h & 0x7fff, sign = (uint32_t)(h & 0x8000) << 16;
    union {
        uint32_t u;
        float f;
    } v = {.u = magnitude << 13};
    v.f *= 0x1p112f; /* rebias the exponent; exact, denormals included */
    if (magnitude >= 0x7c00) v.u |= 0x7f800000;
    if (magnitude > 0x7c00) v.u |= 0x400000; /* a quiet NaN */
    v.u |= sign;
    return v.f;
}

uint16_t fp16_round(float x) {
    union {
        float f;
        uint32_t u;
    } v = {.f = x};
    uint16_t sign = (uint16_t)(v.u >> 16 & 0x8000);
    v.u &= 0x7fffffff;
    if (v.u > 0x7f800000) return sign | 0x7e00 | (uint16_t)(v.u >> 13 & 0x3ff);
    if (v.u >= 0x477ff000) return sign | 0x7c00; /* 65520 and more */
    if (v.u < 0x38800000) {                      /* below 2^-14: steps of 2^-24 */
        v.f += 0.5f; /* whose last bit is 2^-24: rounds to nearest even */
        return sign | (uint16_t)(v.u - 0x3f000000);
    }
    v.u += 0xfff + (v.u >> 13 & 1); /* half a step, less one where even is below */
    return sign | (uint16_t)((v.u - 0x38000000) >> 13);
}
