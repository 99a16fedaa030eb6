/* ops.h - the small dense operations between matmuls, one row at a time.
 * All are pure functions of their row, so callers split rows over threads as they like.
 * Sums run in 16 lanes added in one fixed tree. */
#ifndef URCHIN_COMPUTE_OPS_H
#define URCHIN_COMPUTE_OPS_H

#include <stdint.h>

/* y = x / sqrt(mean(x^2) + eps) * weight          (Zhang and Sennrich 2019, arXiv:1910.07467) */
void rms_norm(float *y, const float *x, const float *weight, int n, float eps);

/* y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, var with 1/n   (Ba et al. 2016, arXiv:1607.06450) */
void layer_norm(float *y, const float *x, const float *weight, const float *bias, int n, float eps);

void silu_mul(float *y, const float *gate, const float *up, int n); /* y = gate / (1 + e^-gate) * up; y may be gate */
void gelu_tanh(float *y, const float *x, int n); /* 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); y may be x */
void gelu_erf(float *y, const float *x, int n);  /* 0.5 x (1 + erf(x / sqrt 2)); y may be x */
void add_to(float *y, const float *x, int n);    /* y += x */

static inline uint16_t bf16_round(float x) { /* nearest even; NaN stays NaN */
    union { float f; uint32_t u; } v = {.f = x};
    if ((v.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(v.u >> 16 | 0x40);
    return (uint16_t)((v.u + 0x7fffu + (v.u >> 16 & 1)) >> 16);
}
static inline float bf16_float(uint16_t h) {
    union { uint32_t u; float f; } v = {.u = (uint32_t)h << 16};
    return v.f;
}
/* E4M3 ("fp8"; Micikevicius et al. 2022, arXiv:2209.05433): sign, 4 bits of exponent with bias 7, 3 of mantissa; 2^-9 .. 448,
 * no infinity, 0x7f and 0xff are NaN.  To the nearest, ties to even; beyond 448: 448. */
uint8_t e4m3_round(float x);
float e4m3_float(uint8_t e);

float fp16_float(uint16_t h);
uint16_t fp16_round(float x); /* nearest even, overflow to infinity */

#endif
