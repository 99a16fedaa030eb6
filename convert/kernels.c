/* kernels.c - rows, feature maps and the optimiser's step in 16 lanes, compiled per instruction
 * family.  Sums run lane by lane over ascending keys and are added in v16_sum's tree. */
#include "convert/kernels.h"

#include "compute/vec.h"

#include <math.h>

enum { LANES = 16 };

/* ---- lanes ---- */
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

/* log x of normal positive x to within 3 ulp or 2e-7: x = 2^e m, m in [sqrt(1/2), sqrt 2), z = (m -
 * 1) / (m + 1), log m = 2 z (1 + z^2 / 3 + z^4 / 5 + ...), |z| < 0.172. */
V_FN v16 v16_log(v16 x) {
    V_EACH {
        v_part_u u = (v_part_u)x.p[i] - 0x3f3504f3u; /* bits of sqrt(1/2) */
        v_part_i e = (v_part_i)u >> 23;
        v_part m = (v_part)((u & 0x7fffffu) + 0x3f3504f3u);
        v_part z = (m - 1) / (m + 1), z2 = z * z;
        v_part series = 0x1.c71c72p-4f - (v_part){0};
        series = v_part_fma(series, z2, 0x1.24924ap-3f - (v_part){0});
        series = v_part_fma(series, z2, 0x1.99999ap-3f - (v_part){0});
        series = v_part_fma(series, z2, 0x1.555556p-2f - (v_part){0});
        v_part log_m = v_part_fma(series * z2, z + z, z + z);
        v_part n = __builtin_convertvector(e, v_part);
        x.p[i] = v_part_fma(n, 0x1.62e43p-1f - (v_part){0}, log_m);
    }
    return x;
}
static float log1(float x) { /* as all rows have it, on every machine */
    float lanes[LANES];
    v16_store(lanes, v16_log(v16_set1(x)));
    return lanes[0];
}
static float exp1(float x) {
    float lanes[LANES];
    v16_store(lanes, v16_exp(v16_set1(x)));
    return lanes[0];
}

static const float LEAST = 1e-30f; /* a weight below it counts as that: its log is wanted */

/* ---- rows ---- */
V_FN float largest(const float *x, int from, int to) {
    v16 most = v16_set1(-INFINITY);
    for (int j = from; j < to; j += LANES)
        most = v16_max(load_first(x + j, to - j, -INFINITY), most);
    return v16_hmax(most);
}
V_FN float total(const float *x, int from, int to) {
    v16 sum = v16_zero();
    for (int j = from; j < to; j += LANES)
        sum = v16_add(sum, load_first(x + j, to - j, 0));
    return v16_sum(sum);
}
/* sum of exp(x - most) */
V_FN float total_exp(const float *x, int from, int to, float most) {
    v16 sum = v16_zero();
    for (int j = from; j < to; j += LANES)
        sum = v16_add(sum, v16_exp(v16_sub(load_first(x + j, to - j, -INFINITY), v16_set1(most))));
    return v16_sum(sum);
}

/* a_j = exp(l_j + shift), p_j = exp(l_j - log_z) over exact keys; what p_j (log p_j - log a_j) sums
 * to, and in sums[0..2] the sums of a, p and p l. */
V_FN float exact_keys(struct row_weights *r, const float *pupil, int from, int to, float shift,
                      float log_z, float sums[3]) {
    v16 a_sum = v16_zero(), p_sum = v16_zero(), l_sum = v16_zero(), kl = v16_zero();
    for (int j = from; j < to; j += LANES) {
        int n = to - j;
        v16 l = load_first(r->p + j, n, -INFINITY), own = load_first(pupil + j, n, -INFINITY);
        v16 log_a = v16_add(own, v16_set1(shift)), log_p = v16_sub(l, v16_set1(log_z));
        v16 a = v16_exp(log_a), p = v16_exp(log_p);
        a_sum = v16_add(a_sum, a);
        p_sum = v16_add(p_sum, p);
        v16 floor = v16_set1(-1e30f); /* 0 times it is 0, and not NaN as with -inf */
        l_sum = v16_fma(p, v16_max(l, floor), l_sum);
        kl = v16_fma(p, v16_sub(v16_max(log_p, floor), v16_max(log_a, floor)), kl);
        store_first(r->a + j, a, n);
        store_first(r->p + j, p, n);
    }
    sums[0] += v16_sum(a_sum);
    sums[1] += v16_sum(p_sum);
    sums[2] += v16_sum(l_sum);
    return v16_sum(kl);
}

/* The same over linear keys: a_j = s_j exp(shift). */
V_FN float linear_keys(struct row_weights *r, float shift, float log_z, float sums[3]) {
    v16 a_sum = v16_zero(), p_sum = v16_zero(), l_sum = v16_zero(), kl = v16_zero();
    v16 factor = v16_set1(exp1(shift));
    for (int j = r->sinks; j < r->from; j += LANES) {
        int n = r->from - j;
        v16 l = load_first(r->p + j, n, -INFINITY), s = load_first(r->s + j, n, 0);
        v16 log_a = v16_add(v16_log(v16_max(s, v16_set1(LEAST))), v16_set1(shift));
        v16 log_p = v16_sub(l, v16_set1(log_z));
        v16 a = v16_mul(s, factor), p = v16_exp(log_p);
        a_sum = v16_add(a_sum, a);
        p_sum = v16_add(p_sum, p);
        v16 floor = v16_set1(-1e30f);
        l_sum = v16_fma(p, v16_max(l, floor), l_sum);
        kl = v16_fma(p, v16_sub(v16_max(log_p, floor), log_a), kl);
        store_first(r->a + j, a, n);
        store_first(r->p + j, p, n);
    }
    sums[0] += v16_sum(a_sum);
    sums[1] += v16_sum(p_sum);
    sums[2] += v16_sum(l_sum);
    return v16_sum(kl);
}

static void weigh(struct row_weights *r) {
    for (int j = 0; j < r->n_keys; j += LANES) {
        v16 l = v16_mul(load_first(r->p + j, r->n_keys - j, 0), v16_set1(r->scale));
        store_first(r->p + j, l, r->n_keys - j);
    }
    const float *sinks = r->sink_logits ? r->sink_logits : r->p;
    float most = largest(r->p, 0, r->n_keys);
    float log_z = most + log1(total_exp(r->p, 0, r->n_keys, most));

    /* log of the sums of exact and of linear weights, then of all */
    bool exact = r->sinks || r->from < r->n_keys;
    float sink_most = largest(sinks, 0, r->sinks), window_most = largest(r->p, r->from, r->n_keys);
    float exact_most = sink_most > window_most ? sink_most : window_most;
    float alpha = 0, delta = r->reach, log_exact = -INFINITY;
    if (r->mixing == MIXING_UNIFIED)
        delta += r->mix;
    else if (exact)
        alpha = -log1(1 + exp1(-r->mix)) - exact_most;
    if (exact)
        log_exact = alpha + exact_most +
                    log1(total_exp(sinks, 0, r->sinks, exact_most) +
                         total_exp(r->p, r->from, r->n_keys, exact_most));
    float s_sum = total(r->s, r->sinks, r->from);
    bool linear = r->from > r->sinks;
    float log_linear = linear ? delta + log1(s_sum > LEAST ? s_sum : LEAST) : -INFINITY;
    float upper = log_exact > log_linear ? log_exact : log_linear,
          lower = log_exact > log_linear ? log_linear : log_exact;
    float log_all = upper + log1(1 + exp1(lower - upper));

    float at_sinks[3] = {0}, at_linear[3] = {0}, at_window[3] = {0};
    float kl = exact_keys(r, sinks, 0, r->sinks, alpha - log_all, log_z, at_sinks);
    kl += linear_keys(r, delta - log_all, log_z, at_linear);
    kl += exact_keys(r, r->p, r->from, r->n_keys, alpha - log_all, log_z, at_window);
    for (int j = r->n_keys; j < r->width; j++)
        r->p[j] = r->a[j] = 0;
    r->kl = kl;
    r->entropy = log_z - (at_sinks[2] + at_linear[2] + at_window[2]);
    r->sink = at_sinks[0];
    r->linear = at_linear[0];
    r->window = at_window[0];
    r->teacher_linear = at_linear[1];
    r->gap = 0;
    if (linear && at_linear[1] > LEAST) r->gap = log_z + log1(at_linear[1]) - log_linear;
}

/* sum of t_j over from .. to - 1; with s, t_j / s_j goes there */
V_FN float grade_keys(const struct row_weights *r, float *s, int from, int to, float ce,
                      const float *ev, float ey) {
    v16 sum = v16_zero();
    for (int j = from; j < to; j += LANES) {
        int n = to - j;
        v16 a = load_first(r->a + j, n, 0), p = load_first(r->p + j, n, 0);
        v16 t = v16_mul(v16_set1(ce), v16_sub(a, p));
        if (ev) t = v16_fma(a, v16_sub(load_first(ev + j, n, 0), v16_set1(ey)), t);
        sum = v16_add(sum, t);
        if (s) store_first(s + j, v16_div(t, v16_max(load_first(s + j, n, 1), v16_set1(LEAST))), n);
    }
    return v16_sum(sum);
}

static float grade(struct row_weights *r, float ce, const float *ev, float ey) {
    float linear = grade_keys(r, r->s, r->sinks, r->from, ce, ev, ey), exact = 0;
    if (r->mixing == MIXING_LOLCATS)
        exact = grade_keys(r, NULL, 0, r->sinks, ce, ev, ey) +
                grade_keys(r, NULL, r->from, r->n_keys, ce, ev, ey);
    for (int j = 0; j < r->sinks; j++)
        r->s[j] = 0;
    for (int j = r->from; j < r->width; j++)
        r->s[j] = 0;
    if (r->mixing == MIXING_UNIFIED) return linear;
    return exact / (1 + exp1(r->mix)); /* d log sigmoid(omega) = 1 - sigmoid(omega) */
}

/* ---- feature maps, forward ---- */
static const float KEY_MOST = 30; /* phi_k is cut here, so bad input stays finite */

static float reach_of(const float *u, int f) {
    v16 most = v16_zero();
    for (int i = 0; i < f; i += LANES)
        most = v16_max(v16_abs(load_first(u + i, f - i, 0)), most);
    return v16_hmax(most);
}

/* exp(times u - shift) in one half, pad lanes 0; returns the sum */
V_FN float exp_half(float *phi, const float *u, int f, float times, float shift, float most) {
    v16 sum = v16_zero();
    for (int i = 0; i < f; i += LANES) {
        v16 x = v16_sub(v16_mul(v16_load(u + i), v16_set1(times)), v16_set1(shift));
        v16 e = v16_exp(v16_min(x, v16_set1(most)));
        if (f - i < LANES) {
            float whole[LANES];
            v16_store(whole, e);
            e = load_first(whole, f - i, 0);
        }
        sum = v16_add(sum, e);
        v16_store(phi + i, e);
    }
    return v16_sum(sum);
}

static float most_of(const float *u, int f, float times) {
    v16 most = v16_set1(-INFINITY);
    for (int i = 0; i < f; i += LANES) {
        v16 x = v16_mul(load_first(u + i, f - i, -INFINITY * times), v16_set1(times));
        most = v16_max(x, most);
    }
    return v16_hmax(most);
}

static void divide(float *phi, int n, float by) {
    for (int i = 0; i < n; i += LANES)
        v16_store(phi + i, v16_div(v16_load(phi + i), v16_set1(by)));
}

static void features(enum feature_map map, float *phi, float *reach, const float *u, int n, int f,
                     int f_lanes) {
    for (int r = 0; r < n; r++, u += f_lanes, phi += 2 * f_lanes) {
        float most = map == MAP_SOFTMAX2 ? 0 : reach_of(u, f);
        switch (map) {
        case MAP_EXP:
            exp_half(phi, u, f, 1, reach ? most : 0, reach ? 0 : KEY_MOST);
            exp_half(phi + f_lanes, u, f, -1, reach ? most : 0, reach ? 0 : KEY_MOST);
            break;
        case MAP_SOFTMAX2:
            for (int half = 0; half < 2; half++) {
                float times = half ? -1 : 1, *out = phi + half * f_lanes;
                float sum = exp_half(out, u, f, times, most_of(u, f, times), 0);
                divide(out, f_lanes, sum);
                for (int i = 0; i < f; i++)
                    out[i] = out[i] > 1e-12f ? out[i] : 1e-12f;
            }
            break;
        case MAP_JOINT_SOFTMAX: {
            float sum = exp_half(phi, u, f, 2, 2 * most, 0);
            sum += exp_half(phi + f_lanes, u, f, -2, 2 * most, 0);
            divide(phi, 2 * f_lanes, sum);
            break;
        }
        }
        if (reach) reach[r] = map == MAP_EXP ? most : 0;
    }
}

/* ---- and backward ---- */
static float dot(const float *a, const float *b, int n) {
    v16 sum = v16_zero();
    for (int i = 0; i < n; i += LANES)
        sum = v16_fma(v16_load(a + i), v16_load(b + i), sum);
    return v16_sum(sum);
}

/* phi+ (g+ - c+) - phi- (g- - c-), times factor */
V_FN void halves_back(float *du, const float *g, const float *phi, const float *u, int f_lanes,
                      float plus, float minus, float factor, float most) {
    for (int i = 0; i < f_lanes; i += LANES) {
        v16 up = v16_mul(v16_load(phi + i), v16_sub(v16_load(g + i), v16_set1(plus)));
        v16 down = v16_mul(v16_load(phi + f_lanes + i),
                           v16_sub(v16_load(g + f_lanes + i), v16_set1(minus)));
        float x[LANES], ups[LANES], downs[LANES];
        if (most > 0) { /* a cut passes no gradient */
            v16_store(x, v16_load(u + i));
            v16_store(ups, up);
            v16_store(downs, down);
            for (int l = 0; l < LANES; l++) {
                if (x[l] > most) ups[l] = 0;
                if (x[l] < -most) downs[l] = 0;
            }
            up = v16_load(ups);
            down = v16_load(downs);
        }
        v16_store(du + i, v16_mul(v16_sub(up, down), v16_set1(factor)));
    }
}

static void features_back(enum feature_map map, float *du, const float *dphi, const float *phi,
                          const float *u, bool key, int n, int f_lanes) {
    for (int r = 0; r < n; r++) {
        const float *g = dphi + (size_t)r * 2 * f_lanes, *at = phi + (size_t)r * 2 * f_lanes,
                    *x = u + (size_t)r * f_lanes;
        float *out = du + (size_t)r * f_lanes, plus, minus;
        switch (map) {
        case MAP_EXP:
            halves_back(out, g, at, x, f_lanes, 0, 0, 1, key ? KEY_MOST : 0);
            break;
        case MAP_SOFTMAX2:
            plus = dot(g, at, f_lanes);
            minus = dot(g + f_lanes, at + f_lanes, f_lanes);
            halves_back(out, g, at, x, f_lanes, plus, minus, 1, 0);
            break;
        case MAP_JOINT_SOFTMAX:
            plus = dot(g, at, 2 * f_lanes);
            halves_back(out, g, at, x, f_lanes, plus, plus, 2, 0);
            break;
        }
    }
}

/* ---- the rest ---- */
static void transpose(float *y, size_t y_row, const float *x, size_t x_row, int n_rows,
                      int n_columns) {
    for (int r0 = 0; r0 < n_rows; r0 += LANES)
        for (int c0 = 0; c0 < n_columns; c0 += LANES) {
            int r1 = r0 + LANES < n_rows ? r0 + LANES : n_rows,
                c1 = c0 + LANES < n_columns ? c0 + LANES : n_columns;
            for (int c = c0; c < c1; c++)
                for (int r = r0; r < r1; r++)
                    y[(size_t)c * y_row + r] = x[(size_t)r * x_row + c];
        }
}

static void adam(float *w, float *m, float *v, const float *g, size_t n, float clip, float rate,
                 float correct_m, float correct_v) {
    for (size_t i = 0; i < n; i++) {
        float x = g[i] * clip;
        m[i] = ADAM_BETA1 * m[i] + (1 - ADAM_BETA1) * x;
        v[i] = ADAM_BETA2 * v[i] + (1 - ADAM_BETA2) * x * x;
        w[i] -= rate * (m[i] * correct_m) / (sqrtf(v[i] * correct_v) + 1e-8f);
    }
}

#define TABLE_OF(isa) TABLE_NAME(isa)
#define TABLE_NAME(isa) convert_kernels_##isa
const struct convert_kernels TABLE_OF(ISA) = {
    .weigh = weigh,
    .grade = grade,
    .features = features,
    .features_back = features_back,
    .transpose = transpose,
    .adam = adam,
};
