/* gpu_answer.cuh - a block answers rows of one query head: kernels.c's answer() in fp32, for any
 * kind and shape.
 *
 * Two passes over the exact keys: the largest logit first, because it is part of what lolcats
 * computes; then the weights, in chunks of one entry a thread.  An entry's thread and chunk follow
 * from its number alone, products are summed over ascending d, e and f: so a row's bits do not
 * depend on which rows are answered beside it. */
#ifndef URCHIN_ATTENTION_GPU_ANSWER_CUH
#define URCHIN_ATTENTION_GPU_ANSWER_CUH

#include "attention/gpu_device.cuh"

enum { ANSWER_THREADS = 128, ANSWER_WARPS = ANSWER_THREADS / 32 };

/* Shared memory, in floats, of `rows` rows. */
static inline size_t answer_floats(const gpu_shape &s, int rows) {
    size_t row = 3 * (size_t)s.head_dim + s.phi_lanes + s.lanes + ANSWER_THREADS + ANSWER_WARPS + 5;
    return row * rows;
}

struct answer_shared {       /* [rows] of */
    float *q, *turned, *far; /* [D] plain, rotated to its position, to max_distance */
    float *phi;              /* [phi_lanes] projections, then features */
    float *y;                /* [lanes] */
    float *weights;          /* [ANSWER_THREADS] of the present chunk */
    float *partial;          /* [ANSWER_WARPS] of a reduction */
    float *top, *shift, *factor, *total, *linear_total;
};

DEVICE answer_shared place_shared(const gpu_shape &s, float *at, int rows) {
    answer_shared m;
    m.q = at, at += s.head_dim * rows;
    m.turned = at, at += s.head_dim * rows;
    m.far = at, at += s.head_dim * rows;
    m.phi = at, at += s.phi_lanes * rows;
    m.y = at, at += s.lanes * rows;
    m.weights = at, at += ANSWER_THREADS * rows;
    m.partial = at, at += ANSWER_WARPS * rows;
    m.top = at, at += rows;
    m.shift = at, at += rows;
    m.factor = at, at += rows;
    m.total = at, at += rows;
    m.linear_total = at;
    return m;
}

struct answer_question { /* rows of consecutive positions, with a terraced window in one block */
    int head, first_row, n_rows;
    int64_t position; /* of its first row */
    gpu_place place;
    gpu_view view; /* what the first row sees */
    bool linear;   /* the state holds keys */
};

DEVICE void load_queries(const gpu_shape &s, const gpu_rows &rows, const answer_question &ask,
                         const answer_shared &m, int capacity) {
    int D = s.head_dim, half = D / 2;
    for (int i = threadIdx.x; i < capacity * D; i += ANSWER_THREADS) {
        int r = i / D, d = i % D;
        bool second = d >= half;
        int other = second ? d - half : d + half, angle = second ? d - half : d;
        float x = 0, turned = 0, far = 0;
        if (r < ask.n_rows) {
            size_t row = (size_t)ask.first_row + r;
            const float *q = rows.q + row * rows.q_row + (size_t)ask.head * D;
            turned = x = q[d];
            if (s.rope)
                turned = rotated(x, q[other], second, rows.cosines[row * half + angle],
                                 rows.sines[row * half + angle]);
            if (s.max_distance)
                far = rotated(x, q[other], second, rows.far_cosines[angle], rows.far_sines[angle]);
        }
        m.q[i] = x;
        m.turned[i] = turned;
        m.far[i] = far;
    }
}

/* u = x W + bias of every row, into m.phi. */
template <int ROWS>
DEVICE void project_queries(const gpu_shape &s, const gpu_layer &layer, int head,
                            const answer_shared &m) {
    const float *map = layer.map_q + (size_t)head * s.head_dim * s.f_lanes;
    const float *x = s.map_before_rope ? m.q : m.turned;
    for (int i = threadIdx.x; i < s.f; i += ANSWER_THREADS) {
        float u[ROWS];
        for (int r = 0; r < ROWS; r++)
            u[r] = 0;
        for (int d = 0; d < s.head_dim; d++) {
            float w = map[(size_t)d * s.f_lanes + i];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                u[r] = fmaf(x[r * s.head_dim + d], w, u[r]);
        }
        float bias = layer.map_q_bias ? layer.map_q_bias[(size_t)head * s.f_lanes + i] : 0;
        for (int r = 0; r < ROWS; r++)
            m.phi[r * s.phi_lanes + i] = layer.map_q_bias ? u[r] + bias : u[r];
    }
}

/* The first row of the question that sees an entry; n_rows: none does. */
DEVICE int first_that_sees(const gpu_shape &s, const answer_question &ask, int entry) {
    if (sees(s, ask.view, entry)) return 0;
    int later = entry - own_entry(s, ask.place.cache, ask.position);
    return later > 0 && later < ask.n_rows ? later : ask.n_rows;
}

/* q.k / sqrt(D) of one entry under every row. */
template <int ROWS>
DEVICE void entry_logits(const gpu_shape &s, const answer_question &ask, const answer_shared &m,
                         int entry, float factor, float (&logit)[ROWS]) {
    const float *q = entry < ask.view.clamped ? m.far : m.turned;
    for (int r = 0; r < ROWS; r++)
        logit[r] = 0;
    for (int d = 0; d < s.head_dim; d++) {
        float k = read_kv(s, ask.place.turned, key_at(s, entry, d));
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            logit[r] = fmaf(q[r * s.head_dim + d], k, logit[r]);
    }
    for (int r = 0; r < ROWS; r++)
        logit[r] *= factor;
}

/* m.y += sum over `count` terms of a row's weights times rows of values: `weight(r, i)` times
 * `value(i, d)`, i ascending. Short rows of values leave room for several groups of threads, each
 * with its share of the rows. */
template <int ROWS, class Weight, class Value>
DEVICE void add_weighted(const gpu_shape &s, const answer_shared &m, int count, Weight weight,
                         Value value) {
    int groups = s.lanes < ANSWER_THREADS ? ANSWER_THREADS / s.lanes : 1;
    int group = s.lanes < ANSWER_THREADS ? (int)threadIdx.x / s.lanes : 0;
    if (group >= groups) return;
    int first = s.lanes < ANSWER_THREADS ? (int)threadIdx.x % s.lanes : (int)threadIdx.x;
    for (int d = first; d < s.lanes; d += ANSWER_THREADS) {
        float sum[ROWS];
        for (int k = 0; k < ROWS; k++)
            sum[k] = group + k * groups < ROWS ? m.y[(group + k * groups) * s.lanes + d] : 0;
        for (int i = 0; i < count; i++) {
            float x;
            if (!value(i, d, x)) continue;
#pragma unroll
            for (int k = 0; k < ROWS; k++)
                if (group + k * groups < ROWS)
                    sum[k] = fmaf(weight(group + k * groups, i), x, sum[k]);
        }
        for (int k = 0; k < ROWS; k++)
            if (group + k * groups < ROWS) m.y[(group + k * groups) * s.lanes + d] = sum[k];
    }
}

/* partial[r][warp] of a row's reduction -> the row's value, in a fixed order. */
DEVICE float over_warps(const float *partial, bool largest) {
    float x = partial[0];
    for (int i = 1; i < ANSWER_WARPS; i++)
        x = largest ? fmaxf(x, partial[i]) : x + partial[i];
    return x;
}

/* Scales and features of every row, a warp each; the denominators' linear terms. */
DEVICE void query_features(const gpu_shape &s, const gpu_layer &layer, const answer_question &ask,
                           const answer_shared &m, int capacity, const float *z) {
    int lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < capacity; r += ANSWER_WARPS) {
        float *phi = m.phi + r * s.phi_lanes;
        float reach = ask.linear ? map_reach(s, phi, lane) : -INFINITY;
        gpu_scales to = mix_scales(s, over_warps(m.partial + r * ANSWER_WARPS, true), reach,
                                   layer.mix ? layer.mix + ask.head : NULL);
        float sum = 0;
        if (ask.linear) {
            map_query(s, phi, phi, to.log_scale, lane);
            __syncwarp();
            for (int i = lane; i < s.features; i += 32)
                sum = fmaf(phi[i], z[i], sum);
            sum = warp_sum(sum);
        }
        if (lane == 0) {
            m.shift[r] = to.shift;
            m.factor[r] = to.factor;
            m.linear_total[r] = sum;
        }
    }
}

DEVICE void write_y(const gpu_rows &rows, size_t at, float y) {
    if (rows.y_bf16)
        ((uint16_t *)rows.y)[at] = float_to_bf16(y);
    else
        ((float *)rows.y)[at] = y;
}

DEVICE void write_zeros(const gpu_shape &s, const gpu_rows &rows, int first_row, int n_rows,
                        int head) {
    for (int i = threadIdx.x; i < n_rows * s.head_dim; i += ANSWER_THREADS)
        write_y(rows,
                ((size_t)first_row + i / s.head_dim) * rows.y_row + (size_t)head * s.head_dim +
                    i % s.head_dim,
                0);
}

DEVICE void write_answers(const gpu_shape &s, const gpu_rows &rows, const answer_question &ask,
                          const answer_shared &m) {
    int D = s.head_dim;
    for (int i = threadIdx.x; i < ask.n_rows * D; i += ANSWER_THREADS) {
        int r = i / D, d = i % D;
        float total = over_warps(m.partial + r * ANSWER_WARPS, false) + m.linear_total[r];
        float y = (m.y[r * s.lanes + d] + 0.0f) / (total + 1e-30f);
        write_y(rows, ((size_t)ask.first_row + r) * rows.y_row + (size_t)ask.head * D + d, y);
    }
}

/* Up to ROWS rows of one query head; all ANSWER_THREADS threads, shared memory of answer_floats().
 */
template <int ROWS>
DEVICE void answer_rows(const gpu_shape &s, const gpu_layer &layer, const gpu_rows &rows,
                        const answer_question &ask, float *shared) {
    answer_shared m = place_shared(s, shared, ROWS);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int state = s.state_heads > 1 ? ask.head % s.group : 0;
    const uint16_t *S = plane_hi(s, ask.place, state);
    const float *z = normaliser(s, ask.place, state);
    float factor = 1 / sqrtf((float)s.head_dim);
    gpu_view last = view_of(s, ask.place, ask.position + ask.n_rows - 1);
    int end = entries_end(s, last);

    load_queries(s, rows, ask, m, ROWS);
    for (int i = threadIdx.x; i < ROWS * s.lanes; i += ANSWER_THREADS)
        m.y[i] = 0;
    __syncthreads();
    if (ask.linear) project_queries<ROWS>(s, layer, ask.head, m);

    float logit[ROWS], most[ROWS], sum[ROWS];
    for (int r = 0; r < ROWS; r++)
        most[r] = -INFINITY, sum[r] = 0;
    for (int e = threadIdx.x; e < end; e += ANSWER_THREADS) {
        int from = first_that_sees(s, ask, e);
        if (from == ask.n_rows) continue;
        entry_logits<ROWS>(s, ask, m, e, factor, logit);
        for (int r = 0; r < ROWS; r++)
            if (r >= from) most[r] = fmaxf(most[r], logit[r]);
    }
    for (int r = 0; r < ROWS; r++) {
        float top = warp_max(most[r]);
        if (lane == 0) m.partial[r * ANSWER_WARPS + warp] = top;
    }
    __syncthreads();
    query_features(s, layer, ask, m, ROWS, z);
    __syncthreads();

    for (int base = 0; base < end; base += ANSWER_THREADS) {
        int e = base + (int)threadIdx.x, from = e < end ? first_that_sees(s, ask, e) : ask.n_rows;
        if (from < ask.n_rows) entry_logits<ROWS>(s, ask, m, e, factor, logit);
        for (int r = 0; r < ROWS; r++) {
            float p =
                r >= from && from < ask.n_rows ? expf(logit[r] - m.shift[r]) * m.factor[r] : 0;
            m.weights[r * ANSWER_THREADS + threadIdx.x] = p;
            sum[r] += p;
        }
        __syncthreads();
        int count = end - base < ANSWER_THREADS ? end - base : ANSWER_THREADS;
        add_weighted<ROWS>(
            s, m, count, [&](int r, int i) { return m.weights[r * ANSWER_THREADS + i]; },
            [&](int i, int d, float &x) { /* what nobody sees may be anything, and 0 NaN is NaN */
                                          if (!sees(s, last, base + i)) return false;
                                          x = read_kv(s, ask.place.values,
                                                      value_at(s, base + i, d));
                                          return true;
            });
        __syncthreads();
    }
    for (int r = 0; r < ROWS; r++) {
        float total = warp_sum(sum[r]);
        if (lane == 0) m.partial[r * ANSWER_WARPS + warp] = total;
    }
    if (ask.linear)
        add_weighted<ROWS>(
            s, m, s.features, [&](int r, int i) { return m.phi[r * s.phi_lanes + i]; },
            [&](int i, int d, float &x) {
                x = read_S(s, S, (size_t)i * s.lanes + d);
                return true;
            });
    __syncthreads();
    write_answers(s, rows, ask, m); /* a thread reads the y that it zeroes in the next answer */
}

#endif
