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

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Adding 2^14, whose last bit is worth 2^-9, rounds what lies below 2^-6 to E4M3's multiples of
 * 2^-9. */
uint8_t e4m3_round(float x) {
    uint32_t size = bits_of(x) & 0x7fffffffu, sign = bits_of(x) >> 24 & 0x80u, code;
    if (size > 0x7f800000u)
        code = 0x7f;
    else if (size >= bits_of(448))
        code = 0x7e;
    else if (size < bits_of(0x1p-6f))
        code = bits_of(float_of(size) + 0x1p14f) - bits_of(0x1p14f);
    else /* to 3 bits of mantissa; the exponent's bias is 7, not 127 */
        code = ((size + 0x7ffffu + (size >> 20 & 1)) >> 20) - (120 << 3);
    return (uint8_t)(code | sign);
}

float e4m3_float(uint8_t e) {
    uint32_t size = e & 0x7fu, sign = (uint32_t)(e & 0x80u) << 24;
    if (size == 0x7f) return NAN;
    return float_of(sign | bits_of(float_of(size << 20) * 0x1p120f));
}
