/* kernels.c - the arithmetic of attention, written once in 16 lanes and compiled per instruction
 * family. The order of every sum is stated where the sum is; see kernels.h for why all of it is one
 * product. */
#include "attention/product.h"

#include "compute/ops.h"
#include "compute/vec.h"

#include <math.h>

static void plain_product(float *y, size_t y_row, bool add, const float *a, size_t a_row,
                          size_t a_step, int n_rows, const float *b, size_t b_row, int n,
                          int n_vecs) {
    product(y, y_row, add, (struct operand){a, a_row, a_step}, n_rows,
            (struct panel){b, KV_FP32, b_row, TILE}, n, n_vecs, NULL);
}

/* ---- small helpers over lanes ---- */

static v16 load_first(const float *x, int n, float rest) { /* lanes from n on are rest */
    if (n >= TILE) return v16_load(x);
    float whole[TILE];
    for (int i = 0; i < TILE; i++)
        whole[i] = i < n ? x[i] : rest;
    return v16_load(whole);
}

static void store_first(float *x, v16 a, int n) {
    if (n >= TILE)
        v16_store(x, a);
    else
        v16_store_part(x, a, n);
}

static float exp1(float x) {
    float lanes[TILE];
    v16_store(lanes, v16_exp(v16_set1(x)));
    return lanes[0];
}

static float dot(const float *a, const float *b, int n_lanes) {
    v16 sum = v16_zero();
    for (int i = 0; i < n_lanes; i += TILE)
        sum = v16_fma(v16_load(a + i), v16_load(b + i), sum);
    return v16_sum(sum);
}

static void scale(float *x, size_t n, float factor) {
    for (size_t i = 0; i < n; i += TILE)
        v16_store(x + i, v16_mul(v16_load(x + i), v16_set1(factor)));
}

/* ---- feature maps: u [f_lanes], zeros in pad lanes -> phi [F] ---- */

/* The paper's map (Hedgehog, arXiv:2402.04347):  phi = [exp(u), exp(-u)].
 * A key's u is cut at +-30, so that bad input stays finite; a query's row may be shifted, a key's
 * never. */
static void exp_halves(float *phi, const float *u, int f, float shift, float most) {
    for (int half = 0; half < 2; half++) {
        v16 sign = v16_set1(half ? -1 : 1);
        for (int i = 0; i < f; i += TILE) {
            v16 x = v16_min(v16_fma(sign, v16_load(u + i), v16_set1(shift)), v16_set1(most));
            store_first(phi + half * f + i, v16_exp(x), f - i);
        }
    }
}
static void exp_key(float *phi, const float *u, int f) {
    exp_halves(phi, u, f, 0, 30);
}
static void exp_query(float *phi, const float *u, int f, float log_scale) {
    exp_halves(phi, u, f, log_scale, INFINITY);
}
static float exp_reach(const float *u, int f) { /* the largest exponent: max |u| */
    v16 most = v16_zero();
    for (int i = 0; i < f; i += TILE)
        most = v16_max(v16_abs(v16_load(u + i)), most);
    return v16_hmax(most);
}

/* phi = exp(x - max x), lanes past f zero; returns the sum. */
static float exp_shifted(float *phi, const float *u, int f, float times, float most) {
    v16 sum = v16_zero();
    for (int i = 0; i < f; i += TILE) {
        v16 x = v16_mul(load_first(u + i, f - i, -INFINITY * times), v16_set1(times));
        v16 e = v16_exp(v16_sub(x, v16_set1(most)));
        sum = v16_add(sum, e);
        store_first(phi + i, e, f - i);
    }
    return v16_sum(sum);
}
static float max_times(const float *u, int f, float times) {
    v16 most = v16_set1(-INFINITY);
    for (int i = 0; i < f; i += TILE)
        most = v16_max(v16_mul(load_first(u + i, f - i, -INFINITY * times), v16_set1(times)), most);
    return v16_hmax(most);
}

/* LoLCATs (arXiv:2410.10254, `softmax_dim`):  phi = [softmax(u), softmax(-u)], at least 1e-12 each.
 */
static void softmax2_key(float *phi, const float *u, int f) {
    for (int half = 0; half < 2; half++) {
        float times = half ? -1 : 1, *out = phi + half * f;
        float sum = exp_shifted(out, u, f, times, max_times(u, f, times));
        for (int i = 0; i < f; i++)
            out[i] = fmaxf(out[i] / sum, 1e-12f);
    }
}

/* fla:  phi = softmax over all of [2u, -2u]. */
static void joint_softmax_key(float *phi, const float *u, int f) {
    float most = 2 * exp_reach(u, f);
    float plus = exp_shifted(phi, u, f, 2, most);
    float sum = plus + exp_shifted(phi + f, u, f, -2, most);
    for (int i = 0; i < 2 * f; i++)
        phi[i] /= sum;
}

/* The table of maps.  A map whose features are bounded is its key function alone; one that is not
 * says how far a query's exponents reach, and takes the shift into them. */
static const struct map {
    void (*key)(float *phi, const float *u, int f);
    float (*reach)(const float *u, int f); /* NULL: bounded */
    void (*query)(float *phi, const float *u, int f,
                  float log_scale); /* NULL: key, times exp(log_scale) */
} maps[] = {
    [MAP_EXP] = {exp_key, exp_reach, exp_query},
    [MAP_SOFTMAX2] = {softmax2_key, NULL, NULL},
    [MAP_JOINT_SOFTMAX] = {joint_softmax_key, NULL, NULL},
};

static void query_features(const struct shape *s, float *phi, const float *u, float log_scale) {
    const struct map *map = &maps[s->map];
    for (int i = s->features; i < s->phi_lanes; i++)
        phi[i] = 0;
    if (map->query) {
        map->query(phi, u, s->f, log_scale);
        return;
    }
    map->key(phi, u, s->f);
    scale(phi, (size_t)s->phi_lanes, exp1(log_scale));
}

/* u[r] = x[r] W + bias */
static void project(const struct shape *s, float *u, const float *x, size_t x_row, int n_rows,
                    const float *w, const float *bias, struct ahead *ahead) {
    product(u, (size_t)s->f_lanes, false, (struct operand){x, x_row, 1}, n_rows,
            panel_fp32(w, s->f_lanes), s->head_dim, s->f_lanes / TILE, ahead);
    for (int r = 0; bias && r < n_rows; r++)
        for (int i = 0; i < s->f_lanes; i += TILE) {
            float *at = u + (size_t)r * s->f_lanes + i;
            v16_store(at, v16_add(v16_load(at), v16_load(bias + i)));
        }
}

static void key_features(const struct shape *s, float *phi, const float *x, int n, const float *map,
                         const float *bias, float *u) {
    project(s, u, x, (size_t)s->head_dim, n, map, bias, NULL);
    for (int j = 0; j < n; j++) {
        float *out = phi + (size_t)j * s->phi_lanes;
        for (int i = s->features; i < s->phi_lanes; i++)
            out[i] = 0;
        maps[s->map].key(out, u + (size_t)j * s->f_lanes, s->f);
    }
}

/* ---- the state ---- */

static void fold(const struct shape *s, float *S, float *z, const float *phi, const float *v,
                 int n) {
    struct operand transposed = {phi, 1, (size_t)s->phi_lanes};
    product(S, (size_t)s->lanes, true, transposed, s->features, panel_fp32(v, s->lanes), n,
            s->lanes / TILE, NULL);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < s->phi_lanes; i += TILE)
            v16_store(z + i,
                      v16_add(v16_load(z + i), v16_load(phi + (size_t)j * s->phi_lanes + i)));
}

static void self_recall(const struct shape *s, float *error, float *recalled, const float *S,
                        const float *z, const float *phi, const float *v, int n) {
    struct operand a = {phi, (size_t)s->phi_lanes, 1};
    product(recalled, (size_t)s->lanes, false, a, n, panel_fp32(S, s->lanes), s->features,
            s->lanes / TILE, NULL);
    for (int j = 0; j < n; j++) {
        v16 norm = v16_set1(dot(phi + (size_t)j * s->phi_lanes, z, s->phi_lanes) + 1e-30f);
        v16 sum = v16_zero();
        for (int i = 0; i < s->lanes; i += TILE) {
            size_t at = (size_t)j * s->lanes + i;
            v16 off = v16_sub(v16_div(v16_load(recalled + at), norm), v16_load(v + at));
            sum = v16_fma(off, off, sum);
        }
        error[j] += v16_sum(sum);
    }
}

static int count_from(const double *score, int n, int64_t least) {
    int count = 0;
    for (int j = 0; j < n; j++) {
        int64_t bits;
        memcpy(&bits, score + j, sizeof bits);
        count += bits >= least;
    }
    return count;
}

/* Doubles that are not negative order as their bits do: halving finds those of the last that is
 * kept. */
static void keep_largest(bool *keep, double *score, int n, int count) {
    int64_t last = 0, beyond = INT64_MAX; /* at least count scores from last on, fewer from beyond */
    for (int j = 0; j < n; j++)
        if (keep[j]) score[j] = -1; /* before nobody */
    while (beyond - last > 1) {
        int64_t middle = last + (beyond - last) / 2;
        if (count_from(score, n, middle) >= count)
            last = middle;
        else
            beyond = middle;
    }
    int equals = count - count_from(score, n, beyond);
    for (int j = 0; j < n; j++) {
        int64_t bits;
        memcpy(&bits, score + j, sizeof bits);
        if (bits >= beyond || (bits == last && equals-- > 0)) keep[j] = true;
    }
}

/* ---- rows ---- */

static void rotate(float *y, const float *x, const float *cosines, const float *sines,
                   int head_dim) {
    rope_rotate(y, x, cosines, sines, head_dim);
}

/* Entries no row may see weigh nothing: exp(-inf) is 0. */
static void hide(float *scores, int from, int to) {
    for (int e = from; e < to; e++)
        scores[e] = -INFINITY;
}

struct stretch {              /* the tiles that hold all spans of a question */
    int first, count, stride; /* stride: floats from one query's scores to the next */
};

/* scores[i][e - 16 first] = q_i . k_e, unscaled: clamped entries against q at max_distance. */
static void score(const struct shape *s, const struct question *ask,
                  const struct answer_scratch *tmp, struct stretch tiles, struct ahead *ahead) {
    int n = ask->n_rows * ask->n_heads, D = s->head_dim, clamped_tiles = ask->n_clamped / TILE;
    struct operand turned = {tmp->turned, (size_t)D, 1}, far = {tmp->far, (size_t)D, 1};
    struct panel keys = {ask->keys, s->kv_type, TILE, (size_t)D * TILE};
    int clamped = clamped_tiles - tiles.first;
    if (clamped < 0) clamped = 0;
    product(tmp->scores, (size_t)tiles.stride, false, far, n,
            panel_from(keys, (size_t)tiles.first * keys.vec), D, clamped, ahead);
    product(tmp->scores + clamped * TILE, (size_t)tiles.stride, false, turned, n,
            panel_from(keys, (size_t)(tiles.first + clamped) * keys.vec), D,
            tiles.count - clamped, ahead);
    int mixed = ask->n_clamped % TILE; /* clamped lanes of the tile where they end */
    if (!mixed) return;
    float lanes[MAX_QUERIES * TILE];
    product(lanes, TILE, false, far, n, panel_from(keys, (size_t)clamped_tiles * keys.vec), D, 1,
            NULL);
    for (int i = 0; i < n; i++)
        memcpy(tmp->scores + (size_t)i * tiles.stride + clamped * TILE, lanes + i * TILE,
               (size_t)mixed * sizeof *lanes);
}

/* l = score / sqrt(D) where row r sees the entry, -inf elsewhere; returns the largest. */
static float logits(const struct shape *s, const struct question *ask, float *scores,
                    struct stretch tiles, int r) {
    int seen = tiles.first * TILE; /* entries before it are done */
    for (int k = 0; k < ask->n_spans; k++) {
        struct span span = ask->spans[k];
        hide(scores - tiles.first * TILE, seen, span.first);
        seen = span.first + span.count + (k == ask->growing ? r : 0);
    }
    hide(scores - tiles.first * TILE, seen, (tiles.first + tiles.count) * TILE);
    v16 factor = v16_set1(1 / sqrtf((float)s->head_dim)), most = v16_set1(-INFINITY);
    for (int e = 0; e < tiles.count * TILE; e += TILE) {
        v16 l = v16_mul(v16_load(scores + e), factor);
        v16_store(scores + e, l);
        most = v16_max(l, most);
    }
    return v16_hmax(most);
}

/* p = factor exp(l - shift); returns the sum, lane by lane. */
static v16 weights(float *scores, struct stretch tiles, float shift, float factor) {
    v16 sum = v16_zero();
    for (int e = 0; e < tiles.count * TILE; e += TILE) {
        v16 p = v16_exp(v16_sub(v16_load(scores + e), v16_set1(shift)));
        p = v16_mul(p, v16_set1(factor));
        v16_store(scores + e, p);
        sum = v16_add(sum, p);
    }
    return sum;
}

/* How a row's exact and linear terms are brought on one scale: exact terms are factor exp(l -
 * shift), linear ones exp(log_scale) phi_q.phi_k.
 *
 * unified   exp(l - m) and exp(c_h - m) phi_q.phi_k; m cancels, and keeps both finite
 * lolcats   sigmoid(omega_h) exp(l - max l) and phi_q.phi_k; the same factor exp(-reach) on both
 * keeps exp maps finite */
struct scales {
    float shift, factor, log_scale;
};
static struct scales mix(const struct shape *s, const struct question *ask, int h, float top,
                         const float *u) {
    float reach = ask->linear && maps[s->map].reach ? maps[s->map].reach(u, s->f) : -INFINITY;
    if (s->mixing == MIXING_LOLCATS) {
        float shift = reach > 0 ? reach : 0;
        float gamma = ask->mix ? 1 / (1 + exp1(-ask->mix[h])) : 1;
        return (struct scales){top + shift, gamma, ask->linear_off - shift};
    }
    float m = top > reach ? top : reach;
    if (m == -INFINITY) m = 0;
    float c = ask->linear_off ? ask->linear_off : ask->mix ? ask->mix[h] : 0;
    return (struct scales){m, 1, c - m};
}

static void answer(const struct shape *s, const struct question *ask,
                   const struct answer_scratch *tmp) {
    int D = s->head_dim, half = D / 2, R = ask->n_rows,
        n = R * ask->n_heads; /* query i = h R + r */
    struct stretch tiles = {0};
    struct ahead ahead = ask->ahead;
    if (ask->n_spans) {
        struct span last = ask->spans[ask->n_spans - 1];
        int grown = ask->growing == ask->n_spans - 1 ? R - 1 : 0;
        tiles.first = ask->spans[0].first / TILE;
        tiles.count = (last.first + last.count + grown + TILE - 1) / TILE - tiles.first;
        tiles.stride = tiles.count * TILE;
    }

    for (int i = 0; i < n; i++) {
        const float *q = ask->q + (size_t)(i % R) * ask->q_row + (size_t)(i / R) * D;
        float *turned = tmp->turned + (size_t)i * D;
        if (ask->cosines) {
            size_t at = (size_t)(i % R) * half;
            rope_rotate(turned, q, ask->cosines + at, ask->sines + at, D);
        } else {
            memcpy(turned, q, (size_t)D * sizeof *q);
        }
        if (ask->n_clamped)
            rope_rotate(tmp->far + (size_t)i * D, q, ask->far_cosines, ask->far_sines, D);
    }
    if (ask->n_spans) score(s, ask, tmp, tiles, &ahead);
    for (int h = 0; ask->linear && h < ask->n_heads; h++) {
        bool plain = s->map_before_rope;
        project(s, tmp->u + (size_t)h * R * s->f_lanes,
                plain ? ask->q + (size_t)h * D : tmp->turned + (size_t)h * R * D,
                plain ? ask->q_row : (size_t)D, R, ask->map + (size_t)h * D * s->f_lanes,
                ask->bias ? ask->bias + (size_t)h * s->f_lanes : NULL, &ahead);
    }

    float total[MAX_QUERIES]; /* denominators */
    for (int i = 0; i < n; i++) {
        int h = i / R;
        float *scores = tmp->scores + (size_t)i * tiles.stride;
        float *u = tmp->u + (size_t)i * s->f_lanes, *phi = tmp->phi + (size_t)i * s->phi_lanes;
        float top = ask->n_spans ? logits(s, ask, scores, tiles, i % R) : -INFINITY;
        struct scales to = mix(s, ask, h, top, u);
        total[i] = v16_sum(weights(scores, tiles, to.shift, to.factor));
        if (!ask->linear) continue;
        query_features(s, phi, u, to.log_scale);
        total[i] += dot(phi, ask->z + (size_t)h * ask->state_stride, s->phi_lanes);
    }

    size_t lanes = (size_t)s->lanes;
    memset(tmp->y, 0, (size_t)n * lanes * sizeof *tmp->y);
    for (int k = 0; k < ask->n_spans; k++) {
        struct span span = ask->spans[k];
        struct operand p = {tmp->scores + span.first - tiles.first * TILE, (size_t)tiles.stride, 1};
        struct panel values = {ask->values, s->kv_type, lanes, TILE};
        product(tmp->y, lanes, true, p, n, panel_from(values, (size_t)span.first * lanes),
                span.count + (k == ask->growing ? R - 1 : 0), s->lanes / TILE, &ahead);
    }
    for (int h = 0; ask->linear && h < ask->n_heads; h++) {
        int rows = ask->state_stride ? R : n; /* one state for all heads: all queries at once */
        size_t i = (size_t)h * R;
        struct operand phi = {tmp->phi + i * s->phi_lanes, (size_t)s->phi_lanes, 1};
        product(tmp->y + i * lanes, lanes, true, phi, rows,
                panel_fp32(ask->S + (size_t)h * ask->state_stride, s->lanes), s->features,
                s->lanes / TILE, &ahead);
        if (!ask->state_stride) break;
    }
    for (int i = 0; i < n; i++) {
        float *y = ask->y + (size_t)(i % R) * ask->y_row + (size_t)(i / R) * D;
        v16 norm = v16_set1(total[i] + 1e-30f);
        for (int d = 0; d < D; d += TILE) {
            /* + 0: a row that passed over entries of weight 0 may hold -0 where one that did not
             * holds +0 */
            v16 sum = v16_add(v16_load(tmp->y + (size_t)i * lanes + d), v16_zero());
            store_first(y + d, v16_div(sum, norm), D - d);
        }
    }
}

/* ---- entries ---- */

static size_t column(const struct shape *s, int entry) {
    return (size_t)(entry / TILE) * s->head_dim * TILE + (size_t)(entry % TILE);
}

static void write_key(const struct shape *s, void *keys, int entry, const float *x) {
    size_t at = column(s, entry);
    for (int d = 0; d < s->head_dim; d++, at += TILE)
        if (s->kv_type == KV_BF16)
            ((uint16_t *)keys)[at] = bf16_round(x[d]);
        else
            ((float *)keys)[at] = x[d];
}

static void read_key(const struct shape *s, float *x, const void *keys, int entry) {
    size_t at = column(s, entry);
    for (int d = 0; d < s->head_dim; d++, at += TILE)
        x[d] = s->kv_type == KV_BF16 ? bf16_float(((const uint16_t *)keys)[at])
                                     : ((const float *)keys)[at];
}

static void write_value(const struct shape *s, void *values, int entry, const float *v) {
    size_t at = (size_t)entry * s->lanes;
    for (int d = 0; d < s->lanes; d += TILE) {
        v16 x = load_first(v + d, s->head_dim - d, 0);
        if (s->kv_type == KV_BF16)
            v16_store_bf16((uint16_t *)values + at + d, x);
        else
            v16_store((float *)values + at + d, x);
    }
}

static void read_value(const struct shape *s, float *v, const void *values, int entry) {
    size_t at = (size_t)entry * s->lanes;
    for (int d = 0; d < s->lanes; d += TILE)
        v16_store(v + d, s->kv_type == KV_BF16 ? v16_load_bf16((const uint16_t *)values + at + d)
                                               : v16_load((const float *)values + at + d));
}

typedef uint16_t halves __attribute__((vector_size(2 * TILE))); /* a row of a tile, in 16 bits */
typedef uint32_t wholes __attribute__((vector_size(4 * TILE)));

/* Lane l of the result is lane from[l] of x.  Clang has no shuffle by a variable. */
#ifdef __clang__
#define SHUFFLED(x, from)                                                                          \
    ({                                                                                             \
        __typeof__(x) y_;                                                                          \
        for (int l_ = 0; l_ < TILE; l_++)                                                          \
            y_[l_] = (x)[(from)[l_]];                                                              \
        y_;                                                                                        \
    })
#else
#define SHUFFLED(x, from) __builtin_shuffle(x, from)
#endif

/* Row by row of a tile: lane l becomes lane from[l] of src where take[l] is all ones. */
V_FN void move_halves(uint16_t *dst, const uint16_t *src, int n_rows, halves from, halves take) {
    for (size_t d = 0; d < (size_t)n_rows * TILE; d += TILE) {
        halves x, y;
        memcpy(&x, src + d, sizeof x);
        memcpy(&y, dst + d, sizeof y);
        y = (SHUFFLED(x, from) & take) | (y & ~take);
        memcpy(dst + d, &y, sizeof y);
    }
}
V_FN void move_wholes(uint32_t *dst, const uint32_t *src, int n_rows, wholes from, wholes take) {
    for (size_t d = 0; d < (size_t)n_rows * TILE; d += TILE) {
        wholes x, y;
        memcpy(&x, src + d, sizeof x);
        memcpy(&y, dst + d, sizeof y);
        y = (SHUFFLED(x, from) & take) | (y & ~take);
        memcpy(dst + d, &y, sizeof y);
    }
}

/* What comes from one tile and goes to one moves at once.  Downwards, in ascending order: what is
 * overwritten has moved. */
static void move_keys(const struct shape *s, void *keys, int first, const int *from, int n) {
    for (int i = 0; i < n;) {
        int src = from[i] / TILE, dst = (first + i) / TILE;
        bool moves = false;
        halves lane = {0}, take = {0};
        for (; i < n && from[i] / TILE == src && (first + i) / TILE == dst; i++) {
            lane[(first + i) % TILE] = (uint16_t)(from[i] % TILE);
            take[(first + i) % TILE] = 0xffff;
            moves |= from[i] != first + i;
        }
        size_t tile = (size_t)s->head_dim * TILE;
        if (moves && s->kv_type == KV_BF16)
            move_halves((uint16_t *)keys + (size_t)dst * tile,
                        (const uint16_t *)keys + (size_t)src * tile, s->head_dim, lane, take);
        else if (moves)
            move_wholes((uint32_t *)keys + (size_t)dst * tile,
                        (const uint32_t *)keys + (size_t)src * tile, s->head_dim,
                        __builtin_convertvector(lane, wholes),
                        -__builtin_convertvector(take & 1, wholes));
    }
}

#define TABLE_OF(isa) TABLE_NAME(isa)
#define TABLE_NAME(isa) attention_kernels_##isa
const struct attention_kernels TABLE_OF(ISA) = {
    .answer = answer,
    .key_features = key_features,
    .fold = fold,
    .scale = scale,
    .self_recall = self_recall,
    .keep_largest = keep_largest,
    .product = plain_product,
    .rotate = rotate,
    .write_key = write_key,
    .read_key = read_key,
    .write_value = write_value,
    .read_value = read_value,
    .move_keys = move_keys,
};
