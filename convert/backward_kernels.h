/* backward_kernels.h - rows of the backward pass: one table of functions per instruction family, all from
 * backward_kernels.c.  Products are gemm.h's and attention_kernels.product. */
#ifndef URCHIN_CONVERT_BACKWARD_KERNELS_H
#define URCHIN_CONVERT_BACKWARD_KERNELS_H

#include <stdbool.h>
#include <stddef.h>

struct backward_kernels {
    /* y = x r w, r = 1 / sqrt(mean(x^2) + eps):   g = dy w,   dx += r g - x r^3 mean(g x).   *r is kept. */
    void (*rms_norm)(float *dx, float *r, const float *dy, const float *x, const float *w, int n,
                     float eps);
    /* y = x^ w + b, x^ = (x - mean x) r:   dx += r (g - mean g - x^ mean(g x^)). */
    void (*layer_norm)(float *dx, float *mean, float *r, const float *dy, const float *x,
                       const float *w, int n, float eps);

    /* y = silu(gate) up, silu(x) = x s, s = 1 / (1 + e^-x):   dgate = dy up s (1 + gate (1 - s)),  dup = dy silu(gate).
     * dgate may be gate, and dup up. */
    void (*silu_mul)(float *dgate, float *dup, const float *dy, const float *gate, const float *up,
                     int n);
    /* y = gelu(x), tanh form or exact; dx may be x. */
    void (*gelu)(float *dx, const float *dy, const float *x, bool erf, int n);

    /* p = softmax(z), t = softmax(teacher):   KL(t || p) is returned, z becomes factor (p - t); teacher is overwritten. */
    float (*distill)(float *z, float *teacher, int n, float factor);
    /* -log p[target] is returned, z becomes factor (p - 1 at target). */
    float (*next_token)(float *z, int target, int n, float factor);

    /* A row of exact logits.  Entries 0 .. first - 1 and from .. to - 1 are seen; of these, 0 .. clamped - 1 have
     * their scores in far.  s becomes scale times the score, -inf where not seen up to width; the largest is returned. */
    float (*logits)(float *s, const float *far, int clamped, int first, int from, int to, int width,
                    float scale);
    float (*exp_row)(float *s, float shift, float factor, int n); /* s = factor e^(s - shift); returns the sum */
    float (*grade)(float *a, float *t, float factor, int n); /* a *= factor, t *= a; returns the sum of t */

    float (*dot)(const float *a, const float *b, int n);
    void (*scale)(float *y, const float *x, float factor, int n); /* y = factor x; y may be x */
    void (*add)(float *y, const float *x, float factor, int n);   /* y += factor x */
    double (*squares)(const float *x, size_t n);                  /* sum x^2 */
};

const struct backward_kernels *backward_kernels(void); /* the table of cpu_isa() */

extern const struct backward_kernels backward_kernels_generic;
#if defined(__x86_64__)
extern const struct backward_kernels backward_kernels_avx2, backward_kernels_avx512;
#elif defined(__aarch64__)
extern const struct backward_kernels backward_kernels_dotprod;
#endif

#endif
