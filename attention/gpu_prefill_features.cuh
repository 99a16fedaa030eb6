/* gpu_prefill_features.cuh - queries into shared memory, and phi_q of a warp's rows.
 *
 * Exponents: u = x W as the sum of three products of bf16 halves, x_hi W_lo + x_lo W_hi + x_hi
 * W_hi, within about 2^-16 sum |x w| of fp32.  One product of rounded x and W would be off by 2^-8
 * of it, which exp() makes several percent where |u| is 10. */
#ifndef URCHIN_ATTENTION_GPU_PREFILL_FEATURES_CUH
#define URCHIN_ATTENTION_GPU_PREFILL_FEATURES_CUH

#include "attention/gpu_prefill_tile.cuh"

static const float LOG2E = 1.44269504f; /* exponents below are of 2 */

/* ---- queries ---- */

/* x[d .. d + 3] and the other half's, of one row. */
struct query_piece {
    float4 low, high;
};

DEVICE void rotate(float &low, float &high, float cosine, float sine) {
    float x = low, y = high;
    low = rotated(x, y, false, cosine, sine);
    high = rotated(y, x, true, cosine, sine);
}
DEVICE query_piece rotated_piece(query_piece x, const float *cosines, const float *sines) {
    float4 c = *(const float4 *)cosines, s = *(const float4 *)sines;
    rotate(x.low.x, x.high.x, c.x, s.x);
    rotate(x.low.y, x.high.y, c.y, s.y);
    rotate(x.low.z, x.high.z, c.z, s.z);
    rotate(x.low.w, x.high.w, c.w, s.w);
    return x;
}

/* use(row, d, piece, the same rotated to the row's position or, unless turn, not) for the warp's
 * rows, AT_ONCE under way.  Rows that nobody asked for are copies of others: no row's sums see
 * another's, and they are not written. */
template <int D, int M, int AT_ONCE, class Use>
DEVICE void each_query(const gpu_rows &rows, const prefill_task &t, int head, int index, int lane,
                       bool turn, Use use) {
    enum { PIECES = D / 8, STEP = 32 / PIECES };
    int d = lane % PIECES * 4;
    for (int first = lane / PIECES; first < 16 * M; first += STEP * AT_ONCE) {
        query_piece x[AT_ONCE], turned[AT_ONCE];
        int at[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            int asked = index + first + k * STEP;
            asked = asked < t.first ? t.first : asked > t.last ? t.last : asked;
            at[k] = t.first_row + asked - t.first;
            const float *q = rows.q + (size_t)at[k] * rows.q_row + (size_t)head * D + d;
            x[k].low = *(const float4 *)q;
            x[k].high = *(const float4 *)(q + D / 2);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            size_t angle = (size_t)at[k] * (D / 2) + d;
            turned[k] = turn ? rotated_piece(x[k], rows.cosines + angle, rows.sines + angle) : x[k];
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            use(first + k * STEP, d, x[k], turned[k]);
    }
}

DEVICE void put_bf16(char *to, float4 x) {
    *(uint2 *)to = uint2{pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)};
}
DEVICE void put_halves(char *high, char *low, float4 x) {
    uint2 a, b;
    split_bf16(x.x, x.y, a.x, b.x);
    split_bf16(x.z, x.w, a.y, b.y);
    *(uint2 *)high = a;
    *(uint2 *)low = b;
}

/* What the map sees: high halves at region, low ones after them. */
template <int D, int M>
DEVICE void put_map_inputs(const gpu_shape &s, const gpu_rows &rows, const prefill_task &t,
                           int head, int index, char *region, int lane) {
    each_query<D, M, 4>(rows, t, head, index, lane, s.rope && !s.map_before_rope,
                        [&](int r, int d, const query_piece &, const query_piece &x) {
                            char *a = swizzled_element(region, r, d, D * 2),
                                 *b = swizzled_element(region, r, d + D / 2, D * 2);
                            put_halves(a, a + 16 * M * D * 2, x.low);
                            put_halves(b, b + 16 * M * D * 2, x.high);
                        });
}

/* What scores see: rotated to the row's position at region, to max_distance after it. */
template <int D, int M>
DEVICE void put_queries(const gpu_shape &s, const gpu_rows &rows, const prefill_task &t, int head,
                        int index, char *region, int lane) {
    each_query<D, M, 2>(rows, t, head, index, lane, s.rope,
                        [&](int r, int d, const query_piece &x, const query_piece &turned) {
                            char *a = swizzled_element(region, r, d, D * 2),
                                 *b = swizzled_element(region, r, d + D / 2, D * 2);
                            put_bf16(a, turned.low);
                            put_bf16(b, turned.high);
                            if (!t.clamped) return;
                            query_piece far =
                                rotated_piece(x, rows.far_cosines + d, rows.far_sines + d);
                            put_bf16(a + 16 * M * D * 2, far.low);
                            put_bf16(b + 16 * M * D * 2, far.high);
                        });
}

/* ---- projections ---- */

/* 16 rows of the W of each head: fp32 from global memory, halves to shared memory.  Row k of a warp
 * is row warp + 4 k of them all, a lane has four columns. */
struct map_rows {
    float4 w[8];
};

/* from: the first head's W at the warp's first row and the lane's columns. */
template <int D>
DEVICE map_rows fetch_map(const gpu_shape &s, const prefill_task &t, const float *from) {
    bool mine = threadIdx.x % 32 * 4 < (unsigned)s.f, both = mine && t.n_heads > 1;
    map_rows m;
#pragma unroll
    for (int k = 0; k < 8; k++)
        m.w[k] = (k < 4 ? mine : both)
                     ? *(const float4 *)(from + (k / 4 * D + k % 4 * PREFILL_WARPS) * s.f_lanes)
                     : float4{0, 0, 0, 0};
    return m;
}

DEVICE void put_map(const gpu_shape &s, const prefill_plan &plan, const map_rows &m, char *to) {
    int column = threadIdx.x % 32 * 4, warp = threadIdx.x / 32;
    if (column >= s.f) return;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        if (k / 4 >= plan.heads) break;
        char *at = swizzled_element(to, warp + k % 2 * 4, column, plan.map_row) +
                   (k / 4 * 32 + k / 2 % 2 * 8) * plan.map_row;
        uint2 high, low;
        split_bf16(m.w[k].x, m.w[k].y, high.x, low.x);
        split_bf16(m.w[k].z, m.w[k].w, high.y, low.y);
        *(uint2 *)at = high;
        *(uint2 *)(at + 16 * plan.map_row) = low;
    }
}

/* u of the warp's rows, as accumulators: u[m][j] columns 8 j ... of rows 16 m ....  All threads;
 * maps: two buffers of 32 map_row bytes a head.  Region: put_map_inputs(). */
template <int D, int M>
DEVICE void project(const gpu_shape &s, const gpu_layer &layer, const prefill_plan &plan,
                    const prefill_task &t, int my_head, bool active, char *region, char *maps,
                    float (&u)[M][MOST_F / 8][4]) {
    int lane = threadIdx.x % 32, buffer = plan.heads * 32 * plan.map_row;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < MOST_F / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                u[m][j][i] = 0;
    const float *from =
        layer.map_q + ((size_t)t.first_head * D + threadIdx.x / 32) * s.f_lanes + lane * 4;
    put_map(s, plan, fetch_map<D>(s, t, from), maps);
    __syncthreads();
    for (int d = 0; d < D; d += 16) {
        char *now = maps + (d / 16 % 2) * buffer + my_head * 32 * plan.map_row;
        map_rows next = fetch_map<D>(s, t, from + (d + 16 < D ? d + 16 : d) * s.f_lanes);
        if (active) {
            uint32_t high[M][4], low[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
                load_left(high[m], region, 16 * m, d, D * 2, lane);
                load_left(low[m], region + 16 * M * D * 2, 16 * m, d, D * 2, lane);
            }
#pragma unroll
            for (int j = 0; j < MOST_F / 16; j++) {
                if (16 * j >= s.f) break;
                uint32_t w_high[2][2], w_low[2][2];
                load_right(w_high[0], w_high[1], now, 0, 16 * j, plan.map_row, lane);
                load_right(w_low[0], w_low[1], now, 16, 16 * j, plan.map_row, lane);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        mma_bf16(u[m][2 * j + n], high[m], w_low[n]);
                        mma_bf16(u[m][2 * j + n], low[m], w_high[n]);
                        mma_bf16(u[m][2 * j + n], high[m], w_high[n]);
                    }
            }
        }
        put_map(s, plan, next, maps + (1 - d / 16 % 2) * buffer);
        __syncthreads();
    }
    if (!layer.map_q_bias) return;
    const float *bias =
        layer.map_q_bias + (size_t)(t.first_head + (active ? my_head : 0)) * s.f_lanes;
#pragma unroll
    for (int j = 0; j < MOST_F / 8; j++) {
        if (8 * j >= s.f) break;
        float2 b = *(const float2 *)(bias + 8 * j + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < M; m++) {
            u[m][j][0] += b.x, u[m][j][1] += b.y;
            u[m][j][2] += b.x, u[m][j][3] += b.y;
        }
    }
}

/* ---- feature maps ---- */

/* plus = max(exp2(k u + a) b, floor) factor, minus likewise of -u. */
struct map_terms {
    float a[2], b[2];
};

/* use(u of a column) for every projection of a row; half 1: rows 8 further down. */
template <class Use>
DEVICE void each_projection(const gpu_shape &s, const float (&u)[MOST_F / 8][4], int half,
                            Use use) {
#pragma unroll
    for (int j = 0; j < MOST_F / 8; j++) {
        if (8 * j >= s.f) break;
        use(u[j][2 * half]);
        use(u[j][2 * half + 1]);
    }
}

/* The row's terms, without factor; reach: exp's max |u|, else 0. */
template <bool PLAIN>
DEVICE map_terms row_terms(const gpu_shape &s, const float (&u)[MOST_F / 8][4], int half,
                           float &reach) {
    map_terms x = {{0, 0}, {1, 1}};
    float top = -INFINITY, bottom = -INFINITY;
    each_projection(s, u, half, [&](float v) {
        top = fmaxf(top, v);
        bottom = fmaxf(bottom, -v);
    });
    top = quad_max(top);
    bottom = quad_max(bottom);
    float most = fmaxf(top, bottom);
    reach = 0;
    if (PLAIN || s.map == MAP_EXP) {
        reach = most;
        return x;
    }
    float k = s.map == MAP_SOFTMAX2 ? LOG2E : 2 * LOG2E;
    x.a[0] = -k * (s.map == MAP_SOFTMAX2 ? top : most);
    x.a[1] = -k * (s.map == MAP_SOFTMAX2 ? bottom : most);
    float plus = 0, minus = 0;
    each_projection(s, u, half, [&](float v) {
        plus += exp2_fast(fmaf(v, k, x.a[0]));
        minus += exp2_fast(fmaf(-v, k, x.a[1]));
    });
    plus = quad_sum(plus);
    minus = quad_sum(minus);
    x.b[0] = 1 / (s.map == MAP_SOFTMAX2 ? plus : plus + minus);
    x.b[1] = 1 / (s.map == MAP_SOFTMAX2 ? minus : plus + minus);
    return x;
}

/* phi, rounded to bf16, into the region: rows of phi_row bytes.  shift[m][half]: what the row's
 * linear terms were divided by, a power of 2: exp's reach, else 0. */
template <int M, bool PLAIN>
DEVICE void put_features(const gpu_shape &s, const prefill_plan &plan, float log_scale,
                         const float (&u)[M][MOST_F / 8][4], char *region, int lane,
                         float (&shift)[M][2]) {
    bool bounded = !PLAIN && s.map != MAP_EXP;
    float k = s.map == MAP_JOINT_SOFTMAX ? 2 * LOG2E : LOG2E;
    float least = s.map == MAP_SOFTMAX2 ? 1e-12f : 0, factor = exp2_fast(log_scale);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float reach;
            map_terms x = row_terms<PLAIN>(s, u[m], half, reach);
            int row = 16 * m + 8 * half + lane / 4;
            shift[m][half] = rounded_product(reach, LOG2E);
            if (!bounded) x.a[0] = x.a[1] = log_scale - shift[m][half];
#pragma unroll
            for (int j = 0; j < MOST_F / 8; j++) {
                if (8 * j >= s.f) break;
                float p[2], q[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float v = u[m][j][2 * half + i];
                    p[i] = exp2_fast(fmaf(v, k, x.a[0]));
                    q[i] = exp2_fast(fmaf(-v, k, x.a[1]));
                    if (bounded) {
                        p[i] = fmaxf(p[i] * x.b[0], least) * factor;
                        q[i] = fmaxf(q[i] * x.b[1], least) * factor;
                    }
                }
                int f = 8 * j + lane % 4 * 2;
                *(uint32_t *)swizzled_element(region, row, f, plan.phi_row) = pack_bf16(p[0], p[1]);
                *(uint32_t *)swizzled_element(region, row, s.f + f, plan.phi_row) =
                    pack_bf16(q[0], q[1]);
            }
        }
}

#endif
