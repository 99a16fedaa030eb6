/* attention_rig.h - for the attention tests: a layer stack with random maps, its inputs, and the
 * formula of attention.h written out again as a plain quadratic sum in double precision
 * (reference_rows), one row and one key at a time.
 *
 * The reference takes from the engine only which keys the cache held; where values are rounded to
 * the stored type is part of the specification, so it rounds there too. */
#ifndef URCHIN_TESTS_ATTENTION_RIG_H
#define URCHIN_TESTS_ATTENTION_RIG_H

#include "attention/attention.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* ---- random numbers ---- */

static inline float uniform(uint64_t *seed, float low, float high) { /* xorshift64* */
    *seed ^= *seed >> 12;
    *seed ^= *seed << 25;
    *seed ^= *seed >> 27;
    uint32_t bits = (uint32_t)((*seed * 0x2545f4914f6cdd1dull) >> 40);
    return low + (high - low) * (float)bits / 0x1p24f;
}
static inline float *random_floats(size_t n, float low, float high, uint64_t seed) {
    float *x = malloc((n ? n : 1) * sizeof *x);
    seed = seed * 0x9e3779b97f4a7c15ull + 88172645463325252ull;
    for (size_t i = 0; i < n; i++)
        x[i] = uniform(&seed, low, high);
    return x;
}
static inline void fill_nan(float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] = NAN;
}

/* ---- a stack of attention layers and its input ---- */

enum { RIG_LAYERS = 3 };

struct rig {
    struct attention_config config;
    struct attention_weights weights[RIG_LAYERS];
    bool *retrieval[RIG_LAYERS]; /* [n_kv_heads], where some heads are */
    struct rope *rope;
    struct team *team;
    struct attention *a;
    int n;     /* tokens */
    int first; /* position 0 of what rig_read reads is this token of the input */
    /* [layer] of [n][heads][D] */
    float *q[RIG_LAYERS], *k[RIG_LAYERS], *v[RIG_LAYERS];
};

static inline int state_heads(const struct attention_config *c) {
    return c->key_map_per_query_head ? c->n_heads : c->n_kv_heads;
}

/* One layer of three has no retrieval head, and of two kv heads never both are. */
static inline bool rig_retrieves(int layer, int kv_head) {
    return (2 * layer + kv_head) % 3 == 1;
}

/* rope_base 0: no RoPE.  Exact and linear terms weigh alike, so that neither hides the other.  Some
 * heads are retrieval heads where those are to have places. */
static inline void rig_open(struct rig *g, struct attention_config config, double rope_base, int n,
                            int threads, bool bias) {
    memset(g, 0, sizeof *g);
    g->config = config;
    g->n = n;
    size_t D = (size_t)config.head_dim, H = (size_t)config.n_heads, K = (size_t)config.n_kv_heads;
    if (rope_base > 0) {
        struct rope_config rope = {.head_dim = config.head_dim, .base = rope_base};
        assert_int_equal(rope_new(&g->rope, &rope, NULL, 0), OK);
    }
    assert_int_equal(team_new(&g->team, threads), OK);
    float balance =
        config.map == MAP_EXP ? -logf(3.0f * (float)config.features) : logf((float)config.features);
    if (config.mixing == MIXING_LOLCATS) balance = config.map == MAP_EXP ? 2 : -1;
    for (int i = 0; i < RIG_LAYERS; i++) {
        uint64_t seed = 1000 * (uint64_t)i + 17;
        float w = 2 / sqrtf((float)D);
        if (config.kind == ATTENTION_HEDGEHOG) {
            size_t f = (size_t)config.features, s = (size_t)state_heads(&config);
            g->weights[i] = (struct attention_weights){
                .map_q = random_floats(H * D * f, -w, w, seed + 1),
                .map_k = random_floats(s * D * f, -w, w, seed + 2),
                .map_q_bias = bias ? random_floats(H * f, -1, 1, seed + 3) : NULL,
                .map_k_bias = bias ? random_floats(s * f, -1, 1, seed + 4) : NULL,
                .mix = random_floats(H, balance - 1, balance + 1, seed + 5),
            };
            if (config.retrieval_size) {
                g->weights[i].retrieval = g->retrieval[i] = malloc(K * sizeof(bool));
                for (int kv = 0; kv < config.n_kv_heads; kv++)
                    g->retrieval[i][kv] = rig_retrieves(i, kv);
            }
        }
        g->q[i] = random_floats((size_t)n * H * D, -2, 2, seed + 6);
        g->k[i] = random_floats((size_t)n * K * D, -2, 2, seed + 7);
        g->v[i] = random_floats((size_t)n * K * D, -1, 1, seed + 8);
    }
    assert_int_equal(attention_new(&g->a, &config,
                                   config.kind == ATTENTION_HEDGEHOG ? g->weights : NULL,
                                   RIG_LAYERS, g->rope, g->team, n, 8),
                     OK);
}

static inline void rig_close(struct rig *g) {
    attention_free(g->a);
    team_free(g->team);
    rope_free(g->rope);
    for (int i = 0; i < RIG_LAYERS; i++) {
        free((void *)g->weights[i].map_q);
        free((void *)g->weights[i].map_k);
        free((void *)g->weights[i].map_q_bias);
        free((void *)g->weights[i].map_k_bias);
        free((void *)g->weights[i].mix);
        free(g->retrieval[i]);
        free(g->q[i]);
        free(g->k[i]);
        free(g->v[i]);
    }
}

/* A cleared slot in memory full of NaN: what is not cleared must not be read. */
static inline void *slot_open(const struct rig *g) {
    size_t bytes = attention_slot_bytes(g->a);
    void *slot = aligned_alloc(64, bytes);
    memset(slot, 0xff, bytes);
    attention_slot_clear(g->a, slot);
    return slot;
}

static inline size_t row_floats(const struct rig *g) {
    return (size_t)g->config.n_heads * (size_t)g->config.head_dim;
}
static inline float *rows_open(const struct rig *g) { /* y [RIG_LAYERS][n][H][D] */
    size_t n = RIG_LAYERS * (size_t)g->n * row_floats(g);
    float *y = malloc(n * sizeof *y);
    fill_nan(y, n);
    return y;
}

/* One step that reads tokens from .. to - 1 into a slot, straight from the input and straight into
 * y. */
static inline void rig_read(const struct rig *g, void *slot, int from, int to, float *y) {
    size_t q_row = row_floats(g),
           kv_row = (size_t)g->config.n_kv_heads * (size_t)g->config.head_dim;
    size_t token = (size_t)g->first + from;
    struct attention_run run = {.slot = slot, .first_row = 0, .n_rows = to - from};
    attention_step_begin(g->a, &run, 1);
    for (int i = 0; i < RIG_LAYERS; i++)
        attention_layer(g->a, i, y + ((size_t)i * g->n + from) * q_row, q_row,
                        g->q[i] + token * q_row, q_row, g->k[i] + token * kv_row, kv_row,
                        g->v[i] + token * kv_row, kv_row);
    attention_step_end(g->a);
}

/* All tokens one by one; sets, where not NULL: [RIG_LAYERS][K][blocks][size], -1 for none. */
static inline void rig_decode(const struct rig *g, void *slot, float *y, int64_t *sets) {
    int w = g->config.window_size, size = attention_cache_most(&g->config), blocks = w ? (g->n + w - 1) / w : 0;
    for (int n = 0; n < g->n; n++) {
        rig_read(g, slot, n, n + 1, y);
        if (!sets || !size || n % w) continue;
        for (int i = 0; i < RIG_LAYERS; i++)
            for (int kv = 0; kv < g->config.n_kv_heads; kv++) {
                int64_t *set =
                    sets + (((size_t)i * g->config.n_kv_heads + kv) * blocks + n / w) * size;
                for (int e = attention_cache_positions(g->a, slot, i, kv, set); e < size; e++)
                    set[e] = -1;
            }
    }
}

/* ---- the formula, in double ---- */

static inline float reference_round(enum kv_type type, float x) {
    if (type == KV_FP32) return x;
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* RoPE to one position in fp32 with angles in double, as values that are then stored are. */
static inline void reference_rotate(float *y, const float *x, int D, double base,
                                    int64_t position) {
    for (int i = 0; i < D / 2; i++) {
        double angle = (double)position * pow(base, -2.0 * i / D);
        float c = (float)cos(angle), s = (float)sin(angle), a = x[i], b = x[i + D / 2];
        float ac = a * c, bs = b * s, bc = b * c, as = a * s;
        y[i] = ac - bs;
        y[i + D / 2] = bc + as;
    }
}

static inline void reference_map(double *phi, enum feature_map map, const float *x, const float *w,
                                 const float *bias, int D, int f, double shift, bool key) {
    double u[512], plus = 0, minus = 0;
    for (int i = 0; i < f; i++) {
        u[i] = bias ? bias[i] : 0;
        for (int d = 0; d < D; d++)
            u[i] += (double)x[d] * w[(size_t)d * f + i];
        double times = map == MAP_JOINT_SOFTMAX ? 2 : 1;
        plus += exp(times * u[i]);
        minus += exp(-times * u[i]);
    }
    for (int i = 0; i < f; i++) {
        if (map == MAP_EXP) {
            phi[i] = exp(key ? fmin(u[i], 30) : u[i] - shift);
            phi[i + f] = exp(key ? fmin(-u[i], 30) : -u[i] - shift);
        } else if (map == MAP_SOFTMAX2) {
            phi[i] = fmax(exp(u[i]) / plus, 1e-12);
            phi[i + f] = fmax(exp(-u[i]) / minus, 1e-12);
        } else {
            phi[i] = exp(2 * u[i]) / (plus + minus);
            phi[i + f] = exp(-2 * u[i]) / (plus + minus);
        }
    }
}

/* In which block (sliding, none: at which row) key j enters the state of a kv head, INT64_MAX: not
 * within n rows. */
static inline int64_t reference_folds_at(const struct attention_config *c, int64_t j, int n,
                                         const int64_t *sets) {
    int64_t w = c->window_size;
    if (c->kind == ATTENTION_SOFTMAX || j < c->sinks) return INT64_MAX;
    if (c->window == WINDOW_NONE) return j;
    if (c->window == WINDOW_SLIDING) return j + w;
    for (int64_t b = j / w + 2; b * w < n; b++) {
        bool cached = false;
        for (int e = 0, size = attention_cache_most(c); e < size; e++)
            cached |= sets[b * size + e] == j;
        if (!cached) return b;
    }
    return INT64_MAX;
}

/* What the state is multiplied by in block (row) b: N keys in all, `horizon` of them at most. */
static inline double reference_forget(const struct attention_config *c, int64_t b,
                                      const int64_t *folds_at, int n, int64_t *held) {
    if (!c->horizon) return 1;
    for (int j = 0; j < n; j++)
        *held += folds_at[j] == b;
    if (*held <= c->horizon) return 1;
    double factor = (double)c->horizon / (double)*held;
    *held = c->horizon;
    return factor;
}

/* y [n][H][D] of one layer; sets [K][blocks][size].  *steepness: the largest sum of |terms| in any
 * exponent, from which the fp32 engine's error in it follows. */
static inline void reference_rows(const struct rig *g, int layer, const int64_t *sets,
                                  double rope_base, bool linear, double *y, double *steepness) {
    const struct attention_config *c = &g->config;
    const struct attention_weights *wt = &g->weights[layer];
    int n = g->n, D = c->head_dim, H = c->n_heads, K = c->n_kv_heads, G = H / K, f = c->features,
        F = 2 * f;
    int w = c->window_size, blocks = w ? (n + w - 1) / w : 0;
    bool hedgehog = c->kind == ATTENTION_HEDGEHOG, before = c->map_before_rope || rope_base == 0;
    float *k = malloc((size_t)n * D * sizeof *k), *turned = malloc((size_t)n * D * sizeof *k),
          *v = malloc((size_t)n * D * sizeof *k);
    double *phi = malloc((size_t)n * (F + 1) * sizeof *phi), phi_q[1024],
           *lost = malloc((size_t)(n + 1) * sizeof *lost);
    int64_t *folds_at = malloc((size_t)n * sizeof *folds_at);
    *steepness = 0;

    for (int h = 0; h < H; h++) {
        int kv = h / G;
        const int64_t *set = sets ? sets + (size_t)kv * blocks * attention_cache_most(c) : NULL;
        size_t map = c->key_map_per_query_head ? (size_t)h : (size_t)kv;
        for (int j = 0; j < n; j++) {
            float *kj = k + (size_t)j * D, *tj = turned + (size_t)j * D;
            const float *from = g->k[layer] + ((size_t)j * K + kv) * D;
            memcpy(kj, from, (size_t)D * sizeof *kj);
            if (rope_base > 0 && !before) reference_rotate(kj, from, D, rope_base, j);
            for (int d = 0; d < D; d++)
                kj[d] = reference_round(c->kv_type, kj[d]);
            memcpy(tj, kj, (size_t)D * sizeof *kj);
            if (rope_base > 0 && before) reference_rotate(tj, kj, D, rope_base, j);
            for (int d = 0; d < D; d++)
                tj[d] = reference_round(c->kv_type, tj[d]);
            for (int d = 0; d < D; d++)
                v[(size_t)j * D + d] =
                    reference_round(c->kv_type, g->v[layer][((size_t)j * K + kv) * D + d]);
            if (!hedgehog) continue;
            reference_map(phi + (size_t)j * F, c->map, kj, wt->map_k + map * D * f,
                          wt->map_k_bias ? wt->map_k_bias + map * f : NULL, D, f, 0, true);
            folds_at[j] = reference_folds_at(c, j, n, set);
        }
        int64_t held = 0, unit = hedgehog && c->window == WINDOW_TERRACED ? w : 1;
        double kept = 1; /* lost[b]: the product of all factors up to and including b */
        for (int64_t b = 0; hedgehog && b * unit < n; b++)
            lost[b] = kept *= reference_forget(c, b, folds_at, n, &held);

        for (int i = 0; i < n; i++) {
            const float *q = g->q[layer] + ((size_t)i * H + h) * D;
            float qi[512], q_far[512];
            memcpy(qi, q, (size_t)D * sizeof *qi);
            memcpy(q_far, q, (size_t)D * sizeof *qi);
            if (rope_base > 0) reference_rotate(qi, q, D, rope_base, i);
            if (c->max_distance) reference_rotate(q_far, q, D, rope_base, c->max_distance);
            int64_t now = i / unit, start = now * unit;
            double logit[2048], top = -INFINITY, reach = -INFINITY;
            for (int j = 0; j <= i; j++) {
                bool exact = !hedgehog || folds_at[j] > now;
                bool alone = hedgehog && c->window == WINDOW_TERRACED
                                 ? j / w < now - 1
                                 : j <= i - w; /* an entry outside the window */
                bool clamped = c->max_distance && alone && start - j > c->max_distance;
                logit[j] = -INFINITY;
                if (!exact) continue;
                double sum = 0, size = 0;
                for (int d = 0; d < D; d++) {
                    double term = clamped ? (double)q_far[d] * k[(size_t)j * D + d]
                                          : (double)qi[d] * turned[(size_t)j * D + d];
                    sum += term;
                    size += fabs(term);
                }
                logit[j] = sum / sqrt(D);
                top = fmax(top, logit[j]);
                *steepness = fmax(*steepness, size / sqrt(D));
            }
            const float *x = before ? q : qi;
            const float *wq = hedgehog ? wt->map_q + (size_t)h * D * f : NULL,
                        *bias = hedgehog && wt->map_q_bias ? wt->map_q_bias + (size_t)h * f : NULL;
            for (int p = 0; hedgehog && p < f; p++) {
                double u = bias ? bias[p] : 0, size = fabs(u);
                for (int d = 0; d < D; d++)
                    u += (double)x[d] * wq[(size_t)d * f + p],
                        size += fabs((double)x[d] * wq[(size_t)d * f + p]);
                reach = fmax(reach, fabs(u));
                *steepness = fmax(*steepness, size);
            }
            /* one scale for both kinds of terms, by logarithms: exact e^(l - m + exact_log), linear
             * e^(linear_log - m) phi.phi */
            double m = hedgehog && c->map == MAP_EXP ? fmax(top, reach)
                       : top == -INFINITY            ? 0
                                                     : top,
                   exact_log = 0, linear_log = 0;
            if (hedgehog && c->mixing == MIXING_UNIFIED) linear_log = linear ? wt->mix[h] : -60;
            if (hedgehog && c->mixing == MIXING_LOLCATS) {
                exact_log = -log(1 + exp(-(double)wt->mix[h])) - top;
                linear_log = linear ? 0 : -60;
                m = 0;
            }
            if (hedgehog) reference_map(phi_q, c->map, x, wq, bias, D, f, 0, false);
            double total = 1e-30 * 0, sum[512] = {0};
            for (int j = 0; j <= i; j++) {
                double weight = 0;
                if (logit[j] > -INFINITY) {
                    weight = exp(logit[j] + exact_log - m);
                } else {
                    for (int p = 0; p < F; p++)
                        weight += phi_q[p] * phi[(size_t)j * F + p];
                    double since = lost[now] / (folds_at[j] > 0 ? lost[folds_at[j] - 1] : 1);
                    weight *= exp(linear_log - m) * since;
                }
                total += weight;
                for (int d = 0; d < D; d++)
                    sum[d] += weight * v[(size_t)j * D + d];
            }
            for (int d = 0; d < D; d++)
                y[((size_t)i * H + h) * D + d] = sum[d] / total;
        }
    }
    free(k), free(turned), free(v), free(phi), free(lost), free(folds_at);
}

#endif
