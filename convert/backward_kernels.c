/* backward_kernels.c - rows of the backward pass in 16 lanes, compiled per instruction family. Sums
 * run lane by lane over ascending elements and are added in v16_sum's tree. */
#include "convert/backward_kernels.h"

#include "compute/vec.h"

#include <math.h>

enum { LANES = 16 };

V_FN v16 load_first(const float *x, int n, float rest) { /* lanes from n on are rest */
    if (n >= LANES) return v16_load(x);
    float whole[LANES];
    for (int i = 0; i < LANES; i++)
        whole[i] = i < n ? x[i] : rest;
    return v16_load(whole);
}
V_FN void store_first(float *x, v16 a, int n) {
    if (n >= LANES)
        v16_store(x, a);
    else
        v16_store_part(x, a, n);
}

static float dot(const float *a, const float *b, int n) {
    v16 sum = v16_zero();
    for (int i = 0; i < n; i += LANES)
        sum = v16_fma(load_first(a + i, n - i, 0), load_first(b + i, n - i, 0), sum);
    return v16_sum(sum);
}
static void scale(float *y, const float *x, float factor, int n) {
    for (int i = 0; i < n; i += LANES)
        store_first(y + i, v16_mul(load_first(x + i, n - i, 0), v16_set1(factor)), n - i);
}
static void add(float *y, const float *x, float factor, int n) {
    for (int i = 0; i < n; i += LANES)
        store_first(
            y + i,
            v16_fma(load_first(x + i, n - i, 0), v16_set1(factor), load_first(y + i, n - i, 0)),
            n - i);
}
static double squares(const float *x, size_t n) {
    double sum[4] = {0};
    for (size_t i = 0; i < n; i++)
        sum[i % 4] += (double)x[i] * x[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* ---- norms ---- */
static void rms_norm(float *dx, float *r, const float *dy, const float *x, const float *w, int n,
                     float eps) {
    v16 along = v16_zero();
    for (int i = 0; i < n; i += LANES) {
        v16 g = v16_mul(load_first(dy + i, n - i, 0), load_first(w + i, n - i, 0));
        along = v16_fma(g, load_first(x + i, n - i, 0), along);
    }
    *r = 1 / sqrtf(dot(x, x, n) / (float)n + eps);
    float back = v16_sum(along) * *r * *r * *r / (float)n;
    for (int i = 0; i < n; i += LANES) {
        v16 g = v16_mul(load_first(dy + i, n - i, 0), load_first(w + i, n - i, 0));
        v16 d = v16_fma(g, v16_set1(*r), load_first(dx + i, n - i, 0));
        store_first(dx + i, v16_fma(load_first(x + i, n - i, 0), v16_set1(-back), d), n - i);
    }
}

static void layer_norm(float *dx, float *mean, float *r, const float *dy, const float *x,
                       const float *w, int n, float eps) {
    v16 sum = v16_zero(), var = v16_zero(), along = v16_zero(), whole = v16_zero();
    for (int i = 0; i < n; i += LANES)
        sum = v16_add(sum, load_first(x + i, n - i, 0));
    *mean = v16_sum(sum) / (float)n;
    for (int i = 0; i < n; i += LANES) {
        v16 off = v16_sub(load_first(x + i, n - i, *mean), v16_set1(*mean));
        v16 g = v16_mul(load_first(dy + i, n - i, 0), load_first(w + i, n - i, 0));
        var = v16_fma(off, off, var);
        along = v16_fma(g, off, along);
        whole = v16_add(whole, g);
    }
    *r = 1 / sqrtf(v16_sum(var) / (float)n + eps);
    float back = v16_sum(along) * *r * *r / (float)n, g_mean = v16_sum(whole) / (float)n;
    for (int i = 0; i < n; i += LANES) {
        v16 off = v16_sub(load_first(x + i, n - i, 0), v16_set1(*mean));
        v16 g = v16_mul(load_first(dy + i, n - i, 0), load_first(w + i, n - i, 0));
        g = v16_sub(v16_sub(g, v16_set1(g_mean)), v16_mul(off, v16_set1(back)));
        store_first(dx + i, v16_fma(g, v16_set1(*r), load_first(dx + i, n - i, 0)), n - i);
    }
}

/* ---- activations ---- */
static void silu_mul(float *dgate, float *dup, const float *dy, const float *gate, const float *up,
                     int n) {
    v16 one = v16_set1(1);
    for (int i = 0; i < n; i += LANES) {
        v16 g = load_first(gate + i, n - i, 0), u = load_first(up + i, n - i, 0),
            d = load_first(dy + i, n - i, 0);
        v16 s = v16_div(one, v16_add(one, v16_exp(v16_sub(v16_zero(), g))));
        v16 slope = v16_mul(s, v16_fma(g, v16_sub(one, s), one));
        store_first(dgate + i, v16_mul(v16_mul(d, u), slope), n - i);
        store_first(dup + i, v16_mul(d, v16_mul(g, s)), n - i);
    }
}

static void gelu(float *dx, const float *dy, const float *x, bool erf_form, int n) {
    const float c = 0.7978845608f, a = 0.044715f; /* sqrt(2 / pi) */
    v16 one = v16_set1(1);
    if (erf_form) { /* Phi(x) + x phi(x) */
        for (int i = 0; i < n; i++)
            dx[i] = dy[i] * (0.5f * erfcf(-0.70710678f * x[i]) +
                             x[i] * 0.3989422804f * expf(-0.5f * x[i] * x[i]));
        return;
    }
    for (int i = 0; i < n; i += LANES) {
        v16 v = load_first(x + i, n - i, 0), v2 = v16_mul(v, v);
        v16 t = v16_mul(v16_mul(v, v16_fma(v2, v16_set1(a), one)), v16_set1(c));
        v16 e = v16_exp(v16_min(v16_add(t, t), v16_set1(80))); /* tanh t = 1 - 2 / (1 + e^2t) */
        v16 tanh_t = v16_sub(one, v16_div(v16_set1(2), v16_add(one, e)));
        v16 slope = v16_mul(v16_fma(v2, v16_set1(3 * a), one), v16_set1(c));
        v16 half = v16_set1(0.5f);
        v16 d = v16_mul(half, v16_add(one, tanh_t));
        d = v16_fma(v16_mul(half, v), v16_mul(v16_sub(one, v16_mul(tanh_t, tanh_t)), slope), d);
        store_first(dx + i, v16_mul(d, load_first(dy + i, n - i, 0)), n - i);
    }
}

/* ---- the head ---- */
static float largest(const float *x, int n) {
    v16 most = v16_set1(-INFINITY);
    for (int i = 0; i < n; i += LANES)
        most = v16_max(load_first(x + i, n - i, -INFINITY), most);
    return v16_hmax(most);
}

static float distill(float *z, float *teacher, int n, float factor) {
    float m = largest(z, n), m_t = largest(teacher, n);
    v16 sum = v16_zero(), sum_t = v16_zero(), along = v16_zero();
    for (int i = 0; i < n; i += LANES) {
        v16 x = v16_sub(load_first(z + i, n - i, -INFINITY), v16_set1(m));
        v16 t = v16_sub(load_first(teacher + i, n - i, -INFINITY), v16_set1(m_t));
        v16 e = v16_exp(x), e_t = v16_exp(t), floor = v16_set1(-1e30f); /* 0 times it is 0 */
        sum = v16_add(sum, e);
        sum_t = v16_add(sum_t, e_t);
        along = v16_fma(e_t, v16_sub(v16_max(t, floor), v16_max(x, floor)), along);
        store_first(z + i, e, n - i);
        store_first(teacher + i, e_t, n - i);
    }
    float total = v16_sum(sum), total_t = v16_sum(sum_t);
    v16 p = v16_set1(factor / total), t = v16_set1(-factor / total_t);
    for (int i = 0; i < n; i += LANES) {
        v16 d = v16_mul(load_first(teacher + i, n - i, 0), t);
        store_first(z + i, v16_fma(load_first(z + i, n - i, 0), p, d), n - i);
    }
    return v16_sum(along) / total_t + logf(total / total_t);
}

static float next_token(float *z, int target, int n, float factor) {
    float m = largest(z, n), at = z[target] - m;
    v16 sum = v16_zero();
    for (int i = 0; i < n; i += LANES) {
        v16 e = v16_exp(v16_sub(load_first(z + i, n - i, -INFINITY), v16_set1(m)));
        sum = v16_add(sum, e);
        store_first(z + i, e, n - i);
    }
    float total = v16_sum(sum);
    scale(z, z, factor / total, n);
    z[target] -= factor;
    return logf(total) - at;
}

/* ---- attention ---- */
static float logits(float *s, const float *far, int clamped, int first, int from, int to, int width,
                    float factor) {
    for (int i = 0; i < clamped; i++)
        s[i] = far[i];
    for (int i = first; i < from; i++)
        s[i] = -INFINITY;
    for (int i = to; i < width; i++)
        s[i] = -INFINITY;
    v16 most = v16_set1(-INFINITY);
    for (int i = 0; i < width; i += LANES) {
        v16 l = v16_mul(load_first(s + i, width - i, -INFINITY), v16_set1(factor));
        most = v16_max(l, most);
        store_first(s + i, l, width - i);
    }
    return v16_hmax(most);
}

static float exp_row(float *s, float shift, float factor, int n) {
    v16 sum = v16_zero();
    for (int i = 0; i < n; i += LANES) {
        v16 e = v16_exp(v16_sub(load_first(s + i, n - i, -INFINITY), v16_set1(shift)));
        e = v16_mul(e, v16_set1(factor));
        sum = v16_add(sum, e);
        store_first(s + i, e, n - i);
    }
    return v16_sum(sum);
}

static float grade(float *a, float *t, float factor, int n) {
    v16 sum = v16_zero();
    for (int i = 0; i < n; i += LANES) {
        v16 w = v16_mul(load_first(a + i, n - i, 0), v16_set1(factor));
        v16 d = v16_mul(load_first(t + i, n - i, 0), w);
        sum = v16_add(sum, d);
        store_first(a + i, w, n - i);
        store_first(t + i, d, n - i);
    }
    return v16_sum(sum);
}

#define TABLE_OF(isa) TABLE_NAME(isa)
#define TABLE_NAME(isa) backward_kernels_##isa
const struct backward_kernels TABLE_OF(ISA) = {
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .silu_mul = silu_mul,
    .gelu = gelu,
    .distill = distill,
    .next_token = next_token,
    .logits = logits,
    .exp_row = exp_row,
    .grade = grade,
    .dot = dot,
    .scale = scale,
    .add = add,
    .squares = squares,
};
