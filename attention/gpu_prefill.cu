/* gpu_prefill.cu - y of every row of prompts' segments, with products by mma_bf16.
 *
 * Per query head and row, with m a shift that cancels:
 *
 *   y = (e^(c - m) phi_q S + sum_j e^(q.k_j / sqrt(D) - m) v_j) / (the same with z and 1)
 *
 *   shapes  D = 64 or 128; terraced windows with F a multiple of 32 up to 256, or softmax;
 *           bf16 keys and values; S as its plane of upper halves
 *   launch  (tiles of rows, kv heads x groups of query heads, segments), 128 threads.  A warp
 *           has 16 M rows of one head.  M = 2 where the device holds two blocks of it a
 *           processor and there are enough of them: two heads that share keys, values and S,
 *           or 128 rows of one.  Else M = 1: 64 rows of one head
 *   bound   arithmetic: a row and head takes 6 D f (projections, in halves) + 2 F D + 4 n D
 *           flops of n visible entries; D = 128, F = 256, n = 257: 295,000.  64 rows of two
 *           heads read 2 F D + 4 n D bytes of S, keys and values, 8 D f of maps: 330 KB, of
 *           which the maps are every block's
 *   twin    kernels.c, answer(); gpu_answer.cu without the rounding
 *
 * Rounded to bf16: queries as scores see them, weights and features before they meet values and S.
 * Denominators add what was rounded, so y stays a mean of values.  Not rounded: exponents of
 * features (gpu_prefill_features.cuh), z (in two halves), scales.
 *
 * One scale.  The linear part is first: m = max |u| for exp, 0 for the other maps.  Exact keys then
 * raise m as they come, as in flash attention (arXiv:2307.08691).  Mixing lolcats divides exact
 * terms by e^(their largest logit), so it scores keys twice, first for the largest.
 *
 * Bits.  A row of an operand tile meets the same tiles of features and entries in the same order
 * whatever else is in the block.  Those it does not see add +0 to its sums and leave its maximum
 * alone; so leaving them out, as warps and blocks whose rows all do not see them do, changes
 * nothing.  Kernels of either M do the same sums: no product is left to the compiler to fuse. */
#include "attention/gpu_prefill_features.cuh"

/* A warp's rows on their way; row 16 m + 8 half + lane / 4. */
template <int D, int M> struct answers {
    float y[M][D / 8][4]; /* sums of weights times values, columns as accumulators have them */
    float total[M][4];    /* of weights: columns alike */
    float largest[M][2];  /* exponents of 2 are taken from here; -inf: no term yet */
};

/* ---- the linear part ---- */

/* z of 16 features as a right operand: even columns its upper halves, odd columns the lower. */
DEVICE void z_operand(const float *z, int lane, uint32_t (&b)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float2 x = *(const float2 *)(z + 8 * i + lane % 4 * 2);
        uint32_t high, low;
        split_bf16(x.x, x.y, high, low);
        b[i] = lane / 4 % 2 ? low : high;
    }
}

/* Adds features first ... of S, which are in the stage. */
template <int D, int M>
DEVICE void add_linear(const gpu_shape &s, const prefill_plan &plan, const float *z, int first,
                       char *region, char *stage, int lane, answers<D, M> &to) {
    int end = s.features - first < S_ROWS ? s.features - first : S_ROWS;
    for (int k = 0; k < end; k += 16) {
        uint32_t phi[M][4], b[2];
        z_operand(z + first + k, lane, b);
#pragma unroll
        for (int m = 0; m < M; m++) {
            load_left(phi[m], region, 16 * m, first + k, plan.phi_row, lane);
            mma_bf16(to.total[m], phi[m], b);
        }
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            uint32_t low[2], high[2];
            load_right(low, high, stage, k, 16 * j, D * 2, lane);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(to.y[m][2 * j], phi[m], low);
                mma_bf16(to.y[m][2 * j + 1], phi[m], high);
            }
        }
    }
}

/* ---- exact keys ---- */

template <int M> struct scores { float x[M][KEYS / 8][4]; };

/* q.k of one stage. */
template <int D, int M> DEVICE void score_keys(char *q, char *stage, int lane, scores<M> &to) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                to.x[m][n][i] = 0;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
            load_left(a[m], q, 16 * m, d, D * 2, lane);
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            uint32_t low[2], high[2];
            load_keys(low, high, stage + j * D * 32, d, lane);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(to.x[m][2 * j], a[m], low);
                mma_bf16(to.x[m][2 * j + 1], a[m], high);
            }
        }
    }
}

/* -inf where the row does not see the entry; first: the first row that sees entry `lane`. */
template <int M> DEVICE void mask_scores(int index, int first, int lane, scores<M> &to) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            int from = __shfl_sync(0xffffffffu, first, 8 * n + lane % 4 * 2 + c);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    if (index + 16 * m + 8 * half + lane / 4 < from)
                        to.x[m][n][2 * half + c] = -INFINITY;
        }
}

template <int M> DEVICE float largest_score(const scores<M> &of, int m, int half) {
    float most = of.x[m][0][2 * half];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        most = fmaxf(most, of.x[m][n][2 * half]);
        most = fmaxf(most, of.x[m][n][2 * half + 1]);
    }
    return quad_max(most);
}

/* Raises `largest` to these scores, and scales what was added before. */
template <int D, int M>
DEVICE void raise_scale(const scores<M> &of, float scale, answers<D, M> &to) {
    float by[M][2];
    int raised = 0;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float before = to.largest[m][half];
            float now = fmaxf(before, largest_score(of, m, half) * scale);
            by[m][half] = now > before ? exp2_fast(before - now) : 1;
            raised |= now > before;
            to.largest[m][half] = now;
        }
    if (!__ballot_sync(0xffffffffu, raised)) return;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            to.total[m][i] *= by[m][i / 2];
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                to.y[m][j][i] *= by[m][i / 2];
        }
}

/* Adds weights 2^(scale q.k - largest) times values. */
template <int D, int M>
DEVICE void add_values(const scores<M> &of, float scale, char *values, int lane,
                       answers<D, M> &to) {
    const uint32_t ones[2] = {0x3f803f80u, 0x3f803f80u};
    uint32_t p[M][KEYS / 8][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float from = to.largest[m][half] == -INFINITY ? 0 : -to.largest[m][half];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                p[m][n][half] = pack_bf16(exp2_fast(fmaf(of.x[m][n][2 * half], scale, from)),
                                          exp2_fast(fmaf(of.x[m][n][2 * half + 1], scale, from)));
        }
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            a[m][0] = p[m][2 * k][0], a[m][1] = p[m][2 * k][1];
            a[m][2] = p[m][2 * k + 1][0], a[m][3] = p[m][2 * k + 1][1];
            mma_bf16(to.total[m], a[m], ones);
        }
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            uint32_t low[2], high[2];
            load_right(low, high, values, 16 * k, 16 * j, D * 2, lane);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(to.y[m][2 * j], a[m], low);
                mma_bf16(to.y[m][2 * j + 1], a[m], high);
            }
        }
    }
}

/* ---- a block ---- */

/* pair(j): columns 8 j and 8 j + 1 from `at` on. */
template <int D, class Pair> DEVICE void write_pairs(const gpu_rows &rows, size_t at, Pair pair) {
    if (rows.y_bf16) {
        uint16_t *to = (uint16_t *)rows.y + at;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            float2 x = pair(j);
            *(uint32_t *)(to + 8 * j) = pack_bf16(x.x, x.y);
        }
    } else {
        float *to = (float *)rows.y + at;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            *(float2 *)(to + 8 * j) = pair(j);
    }
}

template <int D, int M>
DEVICE void write_answers(const gpu_rows &rows, const prefill_task &t, int head, int index,
                          int lane, const answers<D, M> &of) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int asked = index + 16 * m + 8 * half + lane / 4;
            if (asked < t.first || asked > t.last) continue;
            float part = 1 / (of.total[m][2 * half] + 1e-30f);
            size_t row = (size_t)t.first_row + asked - t.first;
            write_pairs<D>(rows, row * rows.y_row + (size_t)head * D + lane % 4 * 2, [&](int j) {
                return float2{of.y[m][j][2 * half] * part, of.y[m][j][2 * half + 1] * part};
            });
        }
}

/* Padding: zeros; four threads a row, as above. */
template <int D> DEVICE void write_zeros(const gpu_rows &rows, const prefill_task &t) {
    for (int r = threadIdx.x / 4; r <= t.last - t.first; r += PREFILL_THREADS / 4)
        for (int h = t.first_head; h < t.first_head + t.n_heads; h++)
            write_pairs<D>(
                rows, ((size_t)t.first_row + r) * rows.y_row + (size_t)h * D + threadIdx.x % 4 * 2,
                [](int) {
                    return float2{0, 0};
                });
}

/* Which rows and heads are this block's; false: none. */
DEVICE bool find_task(const gpu_shape &s, const prefill_plan &plan, const gpu_segment &segment,
                      prefill_task &t) {
    int begin = row_index(s, segment.position), end = begin + segment.n_rows - 1;
    int tile = end / plan.tile_rows - (int)blockIdx.x; /* later rows see more: they go first */
    if (segment.n_rows < 1 || tile < begin / plan.tile_rows) return false;
    t.tile = tile * plan.tile_rows;
    t.first = begin > t.tile ? begin : t.tile;
    t.last = end < t.tile + plan.tile_rows ? end : t.tile + plan.tile_rows - 1;
    t.first_row = segment.first_row + t.first - begin;
    int kv_head = (int)blockIdx.y / plan.head_groups,
        place = (int)blockIdx.y % plan.head_groups * plan.heads;
    t.first_head = kv_head * s.group + place;
    t.n_heads = s.group - place < plan.heads ? s.group - place : plan.heads;
    return true;
}

/* PLAIN: softmax, or map exp with mixing unified. */
template <int D, int M, bool PLAIN>
static __global__ void __launch_bounds__(PREFILL_THREADS, D == 64 && M == 1 ? 3 : 2)
    prefill_kernel(gpu_shape s, gpu_layer layer, prefill_plan plan, const gpu_segment *segments,
                   gpu_rows rows) {
    DYNAMIC_SHARED(char, shared);
    const gpu_segment segment = segments[blockIdx.z];
    prefill_task t;
    if (!find_task(s, plan, segment, t)) return;
    if (segment.slot < 0) {
        write_zeros<D>(rows, t);
        return;
    }
    int lane = threadIdx.x % 32; /* warp: the compiler cannot see that its lanes agree */
    int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
    int64_t position = segment.position - row_index(s, segment.position) + t.first;
    t.place = place_of(s, segment.slot, layer.layer, t.first_head / s.group);
    t.linear = folded_keys(s, t.place.cache, position) > 0;
    look_around(s, t, position, lane);

    int my_head = warp * 16 * M / plan.tile_rows;
    int index = t.tile + warp * 16 * M % plan.tile_rows; /* of the warp's first row */
    int last = index + 16 * M - 1 < t.last ? index + 16 * M - 1 : t.last;
    bool active = my_head < t.n_heads && index <= t.last && index + 16 * M > t.first;
    int head = t.first_head + my_head, state = s.state_heads > 1 ? t.first_head % s.group : 0;
    const uint16_t *S = plane_hi(s, t.place, state);
    const float *z = normaliser(s, t.place, state);
    char *region = shared + warp * plan.region_bytes;
    char *stages = shared + PREFILL_WARPS * plan.region_bytes;
    float mix = layer.mix && active ? layer.mix[head] : 0;
    bool lolcats = !PLAIN && !is_softmax(s) && s.mixing == MIXING_LOLCATS;

    /* Stage i holds S for i < n_S, then keys and values; lolcats has keys alone in between. */
    int n_S = t.linear ? (s.features + S_ROWS - 1) / S_ROWS : 0;
    int n_keys = (t.entries + KEYS - 1) / KEYS, n_first = n_S + (lolcats ? n_keys : 0);
    auto fetch = [&](int i) {
        char *stage = stages + i % STAGES * plan.stage_bytes;
        if (i < n_S)
            fetch_S<D>(s, S, i * S_ROWS, stage);
        else if (i < n_first)
            fetch_keys<D>(s, t, (i - n_S) * KEYS, false, stage);
        else if (i < n_first + n_keys)
            fetch_keys<D>(s, t, (i - n_first) * KEYS, true, stage);
        cp_async_commit();
    };
    auto arrive = [&](int i) { /* stage i is there; the one read last is filled again */
                               cp_async_wait<STAGES - 2>();
                               __syncthreads();
                               fetch(i + STAGES - 1);
                               return stages + i % STAGES * plan.stage_bytes;
    };

    answers<D, M> to;
#pragma unroll
    for (int m = 0; m < M; m++)
        to.largest[m][0] = to.largest[m][1] = -INFINITY;
    fetch(0);
    if (t.linear) { /* maps lie where later stages will */
        float u[M][MOST_F / 8][4];
        if (active) put_map_inputs<D, M>(s, rows, t, head, index, region, lane);
        project<D, M>(s, layer, plan, t, my_head, active, region, stages + plan.stage_bytes, u);
        if (active)
            put_features<M, PLAIN>(s, plan, lolcats ? 0 : rounded_product(mix, LOG2E), u, region,
                                   lane, to.largest);
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            to.total[m][i] = 0;
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                to.y[m][j][i] = 0;
        }
    for (int i = 1; i < STAGES - 1; i++)
        fetch(i);
    for (int i = 0; i < n_S; i++) {
        char *stage = arrive(i);
        if (active) add_linear(s, plan, z, i * S_ROWS, region, stage, lane, to);
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) /* z's two halves */
            to.total[m][2 * half] = to.total[m][2 * half + 1] =
                to.total[m][2 * half] + to.total[m][2 * half + 1];
    /* Queries take the place of features: ldmatrix is a warp's, all its lanes have read. */
    if (active) put_queries<D, M>(s, rows, t, head, index, region, lane);

    /* A stage with clamped entries and others is two: each has its own version of q. */
    float scale = LOG2E / sqrtf((float)D);
    scores<M> x;
    auto see =
        [&](int j, bool far,
            char *stage) { /* false: no row of the warp sees any */
                           int entry = j * KEYS + lane, first = first_that_sees(s, t, entry);
                           if ((entry < t.clamped) != far) first = NEVER;
                           bool all = __ballot_sync(0xffffffffu, first <= index) == 0xffffffffu;
                           bool any = __ballot_sync(0xffffffffu, first <= last);
                           if (!active || !any) return false;
                           score_keys<D, M>(far ? region + 16 * M * D * 2 : region, stage, lane, x);
                           if (!all) mask_scores<M>(index, first, lane, x);
                           return true;
        };
    if (lolcats) {
        float top[M][2];
#pragma unroll
        for (int m = 0; m < M; m++)
            top[m][0] = top[m][1] = -INFINITY;
        for (int j = 0; j < n_keys; j++) {
            char *stage = arrive(n_S + j);
            for (int near = j * KEYS >= t.clamped; near < 2; near++) {
                if (!see(j, !near, stage)) continue;
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        top[m][half] = fmaxf(top[m][half], largest_score(x, m, half));
            }
        }
        /* exact terms are sigmoid(mix) e^(l - top - shift): all of it in one exponent */
        float log_factor = layer.mix ? log2f(1 + expf(-mix)) : 0;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float shift = t.linear ? to.largest[m][half] : 0;
                to.largest[m][half] = fmaf(top[m][half], scale, shift) + log_factor;
            }
    }
    for (int j = 0; j < n_keys; j++) {
        char *stage = arrive(n_first + j);
        for (int near = j * KEYS >= t.clamped; near < 2; near++) {
            if (!see(j, !near, stage)) continue;
            if (!lolcats) raise_scale<D, M>(x, scale, to);
            add_values<D, M>(x, scale, stage + KEYS * D * 2, lane, to);
        }
    }
    if (active) write_answers(rows, t, head, index, lane, to);
}

/* ---- launch ---- */

template <int D, int M, bool PLAIN>
static void launch(struct gpu *g, const gpu_shape &s, const gpu_layer &layer, prefill_plan plan,
                   const gpu_segment *segments, int n_segments, int max_rows,
                   const gpu_rows &rows) {
    int row = M * 16 * D * 4, f = (s.f + 63) / 64 * 64; /* queries, in two versions */
    plan.map_row = f * 2;
    plan.phi_row = (s.features + 63) / 64 * 128;
    plan.region_bytes = row > M * 16 * plan.phi_row ? row : M * 16 * plan.phi_row;
    int maps = plan.heads * 64 * plan.map_row, keys = S_ROWS * D * 2;
    static_assert(2 * KEYS == S_ROWS, "keys and values of a stage are as much as its rows of S");
    plan.stage_bytes = keys > maps / 2 ? keys : maps / 2; /* two buffers of maps, two stages */
    plan.head_groups = (s.group + plan.heads - 1) / plan.heads;
    plan.tile_rows = 16 * M * PREFILL_WARPS / plan.heads;
    int tiles = s.kind == ATTENTION_SOFTMAX ? (max_rows + plan.tile_rows - 2) / plan.tile_rows + 1
                                            : (s.window_size + plan.tile_rows - 1) / plan.tile_rows;
    dim3 grid((unsigned)tiles, (unsigned)(s.n_kv_heads * plan.head_groups), (unsigned)n_segments);
    size_t bytes = (size_t)PREFILL_WARPS * plan.region_bytes + (size_t)STAGES * plan.stage_bytes;
    LAUNCH(g, (prefill_kernel<D, M, PLAIN>), grid, PREFILL_THREADS, bytes, s, layer, plan, segments,
           rows);
}

static bool takes(const gpu_shape &s) {
    if ((s.head_dim != 64 && s.head_dim != 128) || !s.kv_bf16 || s.exact) return false;
    if (s.kind == ATTENTION_SOFTMAX) return true;
    return s.window == WINDOW_TERRACED && s.window_size % 16 == 0 && s.window_size <= 128 &&
           s.features % 32 == 0 && s.features <= 2 * MOST_F;
}

/* Vectors are read as 16 bytes, answers written in pairs. */
static bool aligned(const gpu_rows &rows) {
    size_t pair = rows.y_bf16 ? 4 : 8;
    return (uintptr_t)rows.q % 16 == 0 && rows.q_row % 4 == 0 && (uintptr_t)rows.y % pair == 0 &&
           rows.y_row % 2 == 0;
}

extern "C" bool gpu_launch_prefill(struct gpu *g, const struct gpu_shape *shape,
                                   const struct gpu_layer *layer,
                                   const struct gpu_segment *segments, int n_segments, int max_rows,
                                   const struct gpu_rows *rows) {
    const gpu_shape &s = *shape;
    if (!takes(s) || !aligned(*rows)) return false;
    if (n_segments <= 0 || max_rows <= 0) return true;
    prefill_plan plan = {};
    /* Two blocks of M = 2 need 2 x 113 KB of a processor; of M = 1, 2 x 81 KB (8.0), or 81 KB. */
    int capability = gpu_info(g)->capability;
    bool roomy = capability == 90 || capability == 100 || capability == 103;
    bool plain = s.kind == ATTENTION_SOFTMAX || (s.map == MAP_EXP && s.mixing == MIXING_UNIFIED);
    bool pairs = s.group > 1 && s.state_heads == 1; /* of heads, or of tiles of 64 rows */
    bool tall = s.kind == ATTENTION_SOFTMAX || s.window_size > 64;
    int64_t n_blocks =
        (int64_t)n_segments * s.n_kv_heads *
        (pairs ? (s.group + 1) / 2 * ((max_rows + 63) / 64) : s.group * ((max_rows + 127) / 128));
    auto start = [&](auto launcher, int heads) {
        plan.heads = heads;
        launcher(g, s, *layer, plan, segments, n_segments, max_rows, *rows);
    };
    if (plain && roomy && (pairs || tall) && n_blocks >= gpu_info(g)->n_processors)
        start(s.head_dim == 128 ? launch<128, 2, true> : launch<64, 2, true>, pairs ? 2 : 1);
    else if (plain)
        start(s.head_dim == 128 ? launch<128, 1, true> : launch<64, 1, true>, 1);
    else
        start(s.head_dim == 128 ? launch<128, 1, false> : launch<64, 1, false>, 1);
    return true;
}
