/* fine_reference.h - the converted model and its losses in double, as their definitions have them:
 * row by row, the state summed key by key.  What the passes of convert/pupil.c are compared with.
 * Cache sets are given. */
#ifndef URCHIN_TESTS_FINE_REFERENCE_H
#define URCHIN_TESTS_FINE_REFERENCE_H

#include "convert/attention_back.h"
#include "convert/pupil.h"
#include "convert/student.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct fine_reference {
    const struct network *shape;              /* where parts lie among values */
    const struct attention_config *attention; /* NULL: softmax */
    const bool *softmax;                      /* [n_layers] that keep it, or NULL */
    double *values, *maps, *low;              /* low NULL: none */
    int rank;
    double scale, rope_base, rope_factor; /* rope_base 0: none */
    const struct pack *pack;
    const int64_t *const *sets; /* [n_layers]: of each document [n_kv_heads][blocks][attention_cache_most] */
};

static inline double ref_dot(const double *a, const double *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}
static inline double *ref_new(size_t n) {
    double *x = calloc(n + 1, sizeof *x);
    if (!x) abort();
    return x;
}
static inline const double *ref_at(const struct fine_reference *r, const float *part) {
    return part ? r->values + (part - r->shape->values) : NULL;
}

static inline void ref_norm(const struct fine_reference *r, double *y, const double *x,
                            const double *w, const double *b) {
    const struct base_config *c = &r->shape->config;
    int n = c->hidden_dim;
    double mean = 0, square = 0;
    for (int i = 0; b && i < n; i++)
        mean += x[i] / n;
    for (int i = 0; i < n; i++)
        square += (x[i] - mean) * (x[i] - mean) / n;
    for (int i = 0; i < n; i++)
        y[i] = (x[i] - mean) / sqrt(square + c->norm_eps) * w[i] + (b ? b[i] : 0);
}
static inline void ref_linear(double *y, const double *x, const double *w, const double *b,
                              int n_out, int n_in) {
    for (int o = 0; o < n_out; o++)
        y[o] = ref_dot(x, w + (size_t)o * (size_t)n_in, n_in) + (b ? b[o] : 0);
}
static inline void ref_turn(const struct fine_reference *r, double *y, const double *x,
                            double position) {
    int D = r->shape->config.head_dim;
    memcpy(y, x, (size_t)D * sizeof *y);
    for (int i = 0; r->rope_base > 0 && i < D / 2; i++) {
        double a = position * pow(r->rope_base, -2.0 * i / D) / r->rope_factor;
        y[i] = x[i] * cos(a) - x[i + D / 2] * sin(a);
        y[i + D / 2] = x[i + D / 2] * cos(a) + x[i] * sin(a);
    }
}
static inline void ref_phi(enum feature_map map, double *phi, const double *x, const double *w,
                           int D, int f) {
    double sums[2] = {0};
    for (int i = 0; i < f; i++) {
        double u = 0;
        for (int d = 0; d < D; d++)
            u += x[d] * w[d * f + i];
        phi[i] = exp(map == MAP_JOINT_SOFTMAX ? 2 * u : u);
        phi[f + i] = 1 / phi[i];
        sums[0] += phi[i];
        sums[1] += phi[f + i];
    }
    for (int i = 0; map != MAP_EXP && i < 2 * f; i++)
        phi[i] /= map == MAP_SOFTMAX2 ? sums[i / f] : sums[0] + sums[1];
}

static inline bool ref_in(const int64_t *set, int n, int64_t x) {
    for (int i = 0; i < n && set[i] >= 0; i++)
        if (set[i] == x) return true;
    return false;
}

enum { REF_D = 16, REF_F = 64, REF_T = 64 };

/* y of query head h for all rows of a document of n tokens whose qkv begin at qkv. */
static inline void ref_attend(const struct fine_reference *r, int layer, int h, const double *qkv,
                              int n_tokens, const int64_t *sets, double *y) {
    const struct base_config *b = &r->shape->config;
    const struct attention_config *c = r->softmax && r->softmax[layer] ? NULL : r->attention;
    int D = b->head_dim, H = b->n_heads, g = h / (H / b->n_kv_heads),
        row = (H + 2 * b->n_kv_heads) * D;
    int w = c ? c->window_size : 0, size = c ? attention_cache_most(c) : 0,
        f = c ? c->features : 0;
    int blocks = size ? (n_tokens + w - 1) / w : 0;
    double S[REF_F][REF_D + 1] = {{0}}, held = 0;
    const double *map_q = NULL, *map_k = NULL, *mix = NULL;
    if (c) {
        const double *params = r->maps + (size_t)layer * student_params(c);
        map_q = params + h * D * f;
        map_k = params + student_map_k(c) + (size_t)((c->key_map_per_query_head ? h : g) * D * f);
        mix = params + student_mix(c) + h;
    }
    for (int n = 0; n < n_tokens; n++) {
        const double *q = qkv + (size_t)n * (size_t)row + h * D;
        const int64_t *now = size ? sets + ((size_t)(g * blocks + n / w)) * (size_t)size : NULL,
                      *before = now - size;
        double qt[REF_D], q_far[REF_D], kt[REF_D], phi[REF_F], logit[REF_T],
            top = -INFINITY, total = 0, out[REF_D] = {0};
        bool exact[REF_T];
        ref_turn(r, qt, q, n);
        if (c) ref_turn(r, q_far, q, (double)c->max_distance);
        for (int j = 0; j <= n; j++) {
            const double *k = qkv + (size_t)j * (size_t)row + (H + g) * D,
                         *v = k + b->n_kv_heads * D;
            bool window = !c || (c->window == WINDOW_SLIDING && j > n - w) ||
                          (c->window == WINDOW_TERRACED && j / w >= n / w - 1);
            exact[j] = window || (c && j < c->sinks) || (size && ref_in(now, size, j));
            int from = c && c->window == WINDOW_TERRACED ? n / w * w : n;
            ref_turn(r, kt, k, j);
            logit[j] = ref_dot(qt, kt, D) / sqrt(D);
            if (exact[j] && !window && c->max_distance && r->rope_base > 0 &&
                from - j > c->max_distance)
                logit[j] = ref_dot(q_far, k, D) / sqrt(D);
            if (exact[j]) top = fmax(top, logit[j]);
            if (!c) continue;
            bool leaves =
                (c->window == WINDOW_NONE && j == n) || (c->window == WINDOW_SLIDING && j == n - w);
            if (c->window == WINDOW_TERRACED && n % w == 0 && n / w >= 2)
                leaves = j / w == n / w - 2 || (size && ref_in(before, size, j));
            if (!leaves || exact[j]) continue;
            ref_phi(c->map, phi, c->map_before_rope ? k : kt, map_k, D, f);
            for (int i = 0; i < 2 * f; i++)
                for (int d = 0; d <= D; d++)
                    S[i][d] += phi[i] * (d < D ? v[d] : 1);
            held++;
        }
        if (c && c->horizon && held > (double)c->horizon) {
            for (int i = 0; i < 2 * f; i++)
                for (int d = 0; d <= D; d++)
                    S[i][d] *= (double)c->horizon / held;
            held = (double)c->horizon;
        }
        bool lolcats = c && c->mixing == MIXING_LOLCATS;
        for (int j = 0; j <= n; j++) {
            if (!exact[j]) continue;
            const double *v = qkv + (size_t)j * (size_t)row + (H + b->n_kv_heads + g) * D;
            double a = lolcats ? exp(logit[j] - top) / (1 + exp(-*mix)) : exp(logit[j]);
            total += a;
            for (int d = 0; d < D; d++)
                out[d] += a * v[d];
        }
        if (held > 0) {
            ref_phi(c->map, phi, c->map_before_rope ? q : qt, map_q, D, f);
            for (int i = 0; i < 2 * f; i++) {
                double a = phi[i] * (lolcats ? 1 : exp(*mix));
                total += a * S[i][D];
                for (int d = 0; d < D; d++)
                    out[d] += a * S[i][d];
            }
        }
        for (int d = 0; d < D; d++)
            y[(size_t)n * (size_t)(H * D) + (size_t)(h * D + d)] = out[d] / total;
    }
}

/* Logits [n][vocab] of the pack; the caller frees them. */
static inline double *ref_logits(const struct fine_reference *r) {
    const struct network *s = r->shape;
    const struct base_config *c = &s->config;
    int E = c->hidden_dim, q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim,
        row = q + 2 * kv, gate_up = c->architecture == BASE_LLAMA ? 2 * c->ffn_dim : c->ffn_dim,
        T = r->pack->n;
    double *x = ref_new((size_t)(T * E)), *qkv = ref_new((size_t)(T * row)),
           *y = ref_new((size_t)(T * q)), *n = ref_new((size_t)E), *up = ref_new((size_t)gate_up),
           *d = ref_new((size_t)E), *w = ref_new((size_t)(row * E)),
           *w_o = ref_new((size_t)(E * q)), *z = ref_new((size_t)T * (size_t)c->vocab_size);
    for (int doc = 0; doc < r->pack->n_documents; doc++)
        for (int t = r->pack->first[doc]; t < r->pack->first[doc + 1]; t++)
            for (int i = 0; i < E; i++)
                x[t * E + i] =
                    ref_at(r, s->embed)[r->pack->tokens[t] * E + i] +
                    (s->position ? ref_at(r, s->position)[(t - r->pack->first[doc]) * E + i] : 0);
    for (int layer = 0; layer < c->n_layers; layer++) {
        const struct network_layer *l = &s->layers[layer];
        memcpy(w, ref_at(r, l->qkv), (size_t)(row * E) * sizeof *w);
        memcpy(w_o, ref_at(r, l->o), (size_t)(E * q) * sizeof *w);
        for (int target = 0; r->low && target < N_LOW_RANK_TARGETS; target++) {
            struct low_rank_part p = low_rank_part(c, r->rank, (enum low_rank_target)target);
            const double *low = r->low + (size_t)layer * low_rank_floats(c, r->rank);
            double *to = target == LOW_RANK_O ? w_o : w + p.row * p.n_in;
            for (int o = 0; o < p.n_out; o++)
                for (int i = 0; i < p.n_in; i++)
                    for (int k = 0; k < r->rank; k++)
                        to[o * p.n_in + i] += r->scale * low[p.b + (size_t)(o * r->rank + k)] *
                                              low[p.a + (size_t)(k * p.n_in + i)];
        }
        for (int t = 0; t < T; t++) {
            ref_norm(r, n, x + t * E, ref_at(r, l->attn_norm), ref_at(r, l->attn_norm_bias));
            ref_linear(qkv + t * row, n, w, ref_at(r, l->qkv_bias), row, E);
        }
        const int64_t *sets = r->attention ? r->sets[layer] : NULL;
        for (int doc = 0; doc < r->pack->n_documents; doc++) {
            int first = r->pack->first[doc], len = r->pack->first[doc + 1] - first;
            for (int h = 0; h < c->n_heads; h++)
                ref_attend(r, layer, h, qkv + first * row, len, sets, y + first * q);
            if (r->attention)
                sets += (size_t)attention_back_blocks(r->attention, len) * (size_t)c->n_kv_heads *
                        (size_t)attention_cache_most(r->attention);
        }
        for (int t = 0; t < T; t++) {
            double *xt = x + t * E;
            ref_linear(d, y + t * q, w_o, ref_at(r, l->o_bias), E, q);
            for (int i = 0; i < E; i++)
                xt[i] += d[i];
            ref_norm(r, n, xt, ref_at(r, l->ffn_norm), ref_at(r, l->ffn_norm_bias));
            ref_linear(up, n, ref_at(r, l->gate_up), ref_at(r, l->gate_up_bias), gate_up, E);
            for (int i = 0; i < c->ffn_dim; i++) {
                double a = up[i];
                if (c->architecture == BASE_LLAMA)
                    up[i] = a / (1 + exp(-a)) * up[c->ffn_dim + i];
                else if (c->gelu_erf)
                    up[i] = 0.5 * a * (1 + erf(a / sqrt(2)));
                else
                    up[i] = 0.5 * a * (1 + tanh(sqrt(2 / M_PI) * (a + 0.044715 * a * a * a)));
            }
            ref_linear(d, up, ref_at(r, l->down), ref_at(r, l->down_bias), E, c->ffn_dim);
            for (int i = 0; i < E; i++)
                xt[i] += d[i];
        }
    }
    for (int t = 0; t < T; t++) {
        ref_norm(r, n, x + t * E, ref_at(r, s->norm), ref_at(r, s->norm_bias));
        ref_linear(z + (size_t)t * (size_t)c->vocab_size, n, ref_at(r, s->head), NULL,
                   c->vocab_size, E);
    }
    free(x), free(qkv), free(y), free(n), free(up), free(d), free(w), free(w_o);
    return z;
}

static inline double ref_log_sum(const double *z, int n) {
    double most = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++)
        most = fmax(most, z[i]);
    for (int i = 0; i < n; i++)
        sum += exp(z[i] - most);
    return most + log(sum);
}

/* Loss over the rows, weighed as pupil.h says; base [n][vocab]: teacher's logits, NULL: next token.
 */
static inline double ref_loss(const struct fine_reference *r, const double *base) {
    int V = r->shape->config.vocab_size;
    double *z = ref_logits(r), sum = 0, weights = 0;
    for (int doc = 0; doc < r->pack->n_documents; doc++)
        for (int t = r->pack->first[doc]; t < r->pack->first[doc + 1]; t++) {
            const double *mine = z + (size_t)t * (size_t)V,
                         *theirs = base ? base + (size_t)t * (size_t)V : NULL;
            double log_z = ref_log_sum(mine, V), log_base = base ? ref_log_sum(theirs, V) : 0;
            bool last = t + 1 == r->pack->first[doc + 1];
            if (!base && last) continue;
            double w = r->pack->weight && !last ? 1 + 4 * (double)r->pack->weight[t + 1] : 1;
            weights += w;
            if (!base) sum += w * (log_z - mine[r->pack->tokens[t + 1]]);
            for (int i = 0; base && i < V; i++)
                sum += w * exp(theirs[i] - log_base) * ((theirs[i] - log_base) - (mine[i] - log_z));
        }
    free(z);
    return sum / weights;
}

#endif
