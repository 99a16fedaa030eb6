/* gpu_memory.cu - what a sequence remembers: the angles of a step's rows, a block that begins, keys
 * and values that enter.
 *
 * Before the first row of block b >= 2 of a terraced window (memory.c), three kernels:
 *
 *   features  phi_k of the candidates                       blocks: 64 candidates, state head
 *   recall    S' = S + sum phi_k v^T, r_j = S'^T phi_k      blocks: 32 columns of S, state head
 *   begin     choose, fold, move                            blocks: 32 columns of S, state head
 *
 *   launch    (blocks, kv heads, layers x segments), 256 threads; nothing is done for segments
 * within a block
 *   bound     fp32 arithmetic: n (D f + 2 F D) multiply-adds of a state head with n
 * candidates, and n_fold F D
 *
 * Blocks of `begin` share nothing but what the other kernels left in scratch: columns of S, of
 * values and of keys are each moved by the block that owns them.  Sums run over candidates (and d,
 * f) in ascending order, one fused multiply-add each, as on the CPU. */
#include "attention/gpu_device.cuh"

enum { THREADS = 256, ROW_TILE = 64, COLUMNS = 32, STEP = 16 };

/* ---- angles ---- */

static __global__ void __launch_bounds__(THREADS)
    angles_kernel(gpu_shape s, const gpu_segment *segments, float *cosines, float *sines) {
    gpu_segment segment = segments[blockIdx.y];
    int half = s.head_dim / 2;
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (segment.slot < 0 || i >= (size_t)segment.n_rows * half) return;
    int r = (int)(i / half), pair = (int)(i % half);
    double sine, cosine;
    sincos((double)(segment.position + r) * s.theta[pair], &sine, &cosine);
    size_t at = ((size_t)segment.first_row + r) * half + pair;
    cosines[at] = (float)cosine;
    sines[at] = (float)sine;
}

extern "C" void gpu_launch_angles(struct gpu *g, const struct gpu_shape *shape,
                                  const struct gpu_segment *segments, int n_segments, int max_rows,
                                  float *cosines, float *sines) {
    if (!shape->rope || n_segments <= 0) return;
    size_t n = (size_t)max_rows * (shape->head_dim / 2);
    dim3 grid((unsigned)((n + THREADS - 1) / THREADS), (unsigned)n_segments, 1);
    LAUNCH(g, angles_kernel, grid, THREADS, 0, *shape, segments, cosines, sines);
}

/* ---- the product: kernels.h ---- */

struct tiles { /* shared memory of a product */
    float a[STEP][ROW_TILE + 4];
    float b[STEP][COLUMNS];
};

/* start(r, c), then += a(r, i) b(i, c) over ascending i < n, given to done(r, c, sum); rows from
 * first on, ROW_TILE at most. BY_ROWS: a is read with neighbouring threads at neighbouring rows. */
template <bool BY_ROWS, class A, class B, class Start, class Done>
DEVICE void row_tile(tiles &t, int first, int n_rows, int n_columns, int n, A a, B b, Start start,
                     Done done) {
    int r0 = first + (int)threadIdx.x / 16 * 4, c0 = (int)threadIdx.x % 16 * 2;
    float sum[4][2];
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 2; c++)
            sum[r][c] = r0 + r < n_rows && c0 + c < n_columns ? start(r0 + r, c0 + c) : 0;
    for (int from = 0; from < n; from += STEP) {
#pragma unroll
        for (int k = 0; k < ROW_TILE * STEP / THREADS; k++) {
            int at = (int)threadIdx.x + k * THREADS;
            int r = BY_ROWS ? at % ROW_TILE : at / STEP, i = BY_ROWS ? at / ROW_TILE : at % STEP;
            t.a[i][r] = first + r < n_rows && from + i < n ? a(first + r, from + i) : 0;
        }
#pragma unroll
        for (int k = 0; k < COLUMNS * STEP / THREADS; k++) {
            int at = (int)threadIdx.x + k * THREADS, c = at % COLUMNS, i = at / COLUMNS;
            t.b[i][c] = c < n_columns && from + i < n ? b(from + i, c) : 0;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            float4 x = *(const float4 *)&t.a[i][threadIdx.x / 16 * 4];
            float2 y = *(const float2 *)&t.b[i][c0];
            sum[0][0] = fmaf(x.x, y.x, sum[0][0]), sum[0][1] = fmaf(x.x, y.y, sum[0][1]);
            sum[1][0] = fmaf(x.y, y.x, sum[1][0]), sum[1][1] = fmaf(x.y, y.y, sum[1][1]);
            sum[2][0] = fmaf(x.z, y.x, sum[2][0]), sum[2][1] = fmaf(x.z, y.y, sum[2][1]);
            sum[3][0] = fmaf(x.w, y.x, sum[3][0]), sum[3][1] = fmaf(x.w, y.y, sum[3][1]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 2; c++)
            if (r0 + r < n_rows && c0 + c < n_columns) done(r0 + r, c0 + c, sum[r][c]);
}

/* ---- scratch of one layer, kv head and segment ---- */

struct work { /* how the kernels cut it, and where they keep what they share */
    int candidates, row_tiles,
        column_tiles; /* at most so many candidates; tiles of them, tiles of columns */
    size_t bytes;     /* of scratch for one layer, kv head and segment */
    char *scratch;
};

struct choice {
    int64_t *position; /* [n] of the candidates */
    float *phi;        /* [state heads][n][phi_lanes] */
    float *v;          /* [n][lanes] */
    float *S;          /* [state heads][F][lanes] as if all candidates were folded */
    float *z;          /* [state heads][column blocks][phi_lanes], each block's own */
    float *recalled;   /* [state heads][n][lanes] */
    float *error;      /* [state heads][column blocks][n] */
};

/* Hands out the next floats of the scratch, 16-byte aligned. */
DEVICE float *take(char *&at, size_t floats) {
    float *piece = (float *)at;
    at += (floats + 3) / 4 * 16;
    return piece;
}

DEVICE choice choice_at(const gpu_shape &s, const work &k, size_t unit) {
    char *at = k.scratch + unit * k.bytes;
    size_t n = k.candidates, heads = s.state_heads;
    choice c;
    c.position = (int64_t *)take(at, 2 * n);
    c.phi = take(at, heads * n * s.phi_lanes);
    c.v = take(at, n * s.lanes);
    c.S = take(at, heads * s.S_floats);
    c.z = take(at, heads * k.column_tiles * s.phi_lanes);
    c.recalled = take(at, heads * n * s.lanes);
    c.error = take(at, heads * k.column_tiles * n);
    return c;
}

static work work_of(const gpu_shape &s, void *scratch) {
    work k;
    k.candidates = s.cache + s.window_size;
    k.row_tiles = (k.candidates + ROW_TILE - 1) / ROW_TILE;
    k.column_tiles = (s.lanes + COLUMNS - 1) / COLUMNS;
    size_t n = k.candidates, heads = s.state_heads, tiles = k.column_tiles;
    size_t floats = 2 * n + heads * n * s.phi_lanes + n * s.lanes + heads * s.S_floats +
                    heads * tiles * s.phi_lanes + heads * n * s.lanes + heads * tiles * n;
    k.bytes = (floats * sizeof(float) + 8 * 16 + 255) / 256 * 256;
    k.scratch = (char *)scratch;
    return k;
}

static bool has_blocks(const gpu_shape &s) {
    return s.kind != ATTENTION_SOFTMAX && s.window == WINDOW_TERRACED;
}

extern "C" size_t gpu_memory_scratch_bytes(const struct gpu_shape *shape) {
    return has_blocks(*shape) ? work_of(*shape, NULL).bytes : 0;
}

/* ---- which block begins, and its candidates ---- */

struct beginning {
    int64_t block;
    int layer, kv_head,
        state; /* state: the state head of this thread block, piece: its candidates or columns */
    int piece, cached, n;
    gpu_place place;
    choice scratch;
};

struct layers { /* of a model: first .. first + n - 1 */
    const gpu_layer *all;
    int first, n;
};

/* False: nothing begins here.  The cache is counted by the first kernel, before the last one
 * changes it: hence `cached` comes from the positions of the candidates. */
DEVICE bool begins(const gpu_shape &s, const layers &l, const gpu_segment *segments, const work &k,
                   int pieces, beginning &it) {
    gpu_segment segment = segments[blockIdx.z / l.n];
    int64_t w = s.window_size;
    if (segment.slot < 0 || segment.n_rows < 1 || segment.position % w != 0 ||
        segment.position < 2 * w)
        return false;
    it.block = segment.position / w;
    it.layer = l.first + (int)blockIdx.z % l.n;
    it.kv_head = (int)blockIdx.y;
    it.state = (int)blockIdx.x / pieces;
    it.piece = (int)blockIdx.x % pieces;
    it.place = place_of(s, segment.slot, it.layer, it.kv_head);
    it.scratch = choice_at(s, k, (size_t)blockIdx.z * gridDim.y + blockIdx.y);
    return true;
}

/* The candidates: the cache, then block b - 2 less the sinks. */
DEVICE int count_candidates(const gpu_shape &s, int64_t b, int cached) {
    return cached + s.window_size - (b == 2 ? s.sinks : 0);
}
DEVICE int candidate_place(const gpu_shape &s, int64_t b, int cached, int j) { /* in its block */
    return j - cached + (b == 2 ? s.sinks : 0);
}
DEVICE int candidate_entry(const gpu_shape &s, int64_t b, int cached, int j) {
    if (j < cached) return s.sinks + j;
    return s.sinks + s.cache + (int)(b % 2) * s.window_size + candidate_place(s, b, cached, j);
}

/* ---- features ---- */

static __global__ void __launch_bounds__(THREADS)
    features_kernel(gpu_shape s, layers l, const gpu_segment *segments, work k) {
    __shared__ tiles t;
    beginning it;
    if (!begins(s, l, segments, k, k.row_tiles, it)) return;
    const gpu_layer layer = l.all[it.layer];
    int cached = cached_entries(s, it.place.positions), n = count_candidates(s, it.block, cached);
    int first = it.piece * ROW_TILE, end = first + ROW_TILE < n ? first + ROW_TILE : n;
    if (it.piece == 0 && it.state == 0) /* those past n: what the other kernels count by */
        for (int j = threadIdx.x; j < k.candidates; j += THREADS) {
            int64_t position = -1;
            if (j < cached)
                position = it.place.positions[j];
            else if (j < n)
                position = (it.block - 2) * s.window_size + candidate_place(s, it.block, cached, j);
            it.scratch.position[j] = position;
        }
    if (first >= n) return;

    size_t head = (size_t)it.kv_head * s.state_heads + it.state;
    const float *map = layer.map_k + head * s.head_dim * s.f_lanes;
    const float *bias = layer.map_k_bias ? layer.map_k_bias + head * s.f_lanes : NULL;
    float *phi = it.scratch.phi + (size_t)it.state * k.candidates * s.phi_lanes;
    for (int c = 0; c < s.f; c += COLUMNS)
        row_tile<true>(
            t, first, n, s.f - c, s.head_dim,
            [&](int j, int d) {
                int entry = candidate_entry(s, it.block, cached, j);
                return read_kv(s, it.place.keys, key_at(s, entry, d));
            },
            [&](int d, int i) { return map[(size_t)d * s.f_lanes + c + i]; },
            [&](int, int) { return 0.0f; },
            [&](int j, int i, float u) {
                phi[(size_t)j * s.phi_lanes + c + i] = bias ? u + bias[c + i] : u;
            });
    __syncthreads();
    for (int j = first + (int)threadIdx.x / 32; j < end; j += THREADS / 32) {
        float *row = phi + (size_t)j * s.phi_lanes;
        map_key(s, row, row, threadIdx.x % 32);
    }
    if (it.state == 0)
        for (int i = threadIdx.x; i < (end - first) * s.lanes; i += THREADS) {
            int j = first + i / s.lanes, d = i % s.lanes;
            int entry = candidate_entry(s, it.block, cached, j);
            it.scratch.v[(size_t)j * s.lanes + d] =
                read_kv(s, it.place.values, value_at(s, entry, d));
        }
}

/* How many candidates features_kernel found; how many of them are cached is what is left of the
 * block. */
DEVICE int counted(const work &k, const choice &c) {
    int low = 0, high = k.candidates;
    while (low < high) {
        int middle = (low + high) / 2;
        if (c.position[middle] >= 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* ---- recall ---- */

/* Half a warp adds as the CPU's 16 lanes do (vec.h, v16_sum). */
DEVICE float sum16(float x) {
    for (int step = 8; step > 0; step /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

static __global__ void __launch_bounds__(THREADS)
    recall_kernel(gpu_shape s, layers l, const gpu_segment *segments, work k) {
    __shared__ tiles t;
    beginning it;
    if (!begins(s, l, segments, k, k.column_tiles, it)) return;
    int n = counted(k, it.scratch), c0 = it.piece * COLUMNS;
    if (n <= s.cache) return; /* nothing to choose */
    int columns = s.lanes - c0 < COLUMNS ? s.lanes - c0 : COLUMNS;
    size_t most = k.candidates;
    const float *phi = it.scratch.phi + (size_t)it.state * most * s.phi_lanes;
    const float *v = it.scratch.v + c0;
    float *S = it.scratch.S + (size_t)it.state * s.S_floats + c0;
    float *recalled = it.scratch.recalled + (size_t)it.state * most * s.lanes + c0;
    float *z = it.scratch.z + ((size_t)it.state * k.column_tiles + it.piece) * s.phi_lanes;
    float *error = it.scratch.error + ((size_t)it.state * k.column_tiles + it.piece) * most;
    const uint16_t *planes = plane_hi(s, it.place, it.state);
    const float *z_before = normaliser(s, it.place, it.state);

    for (int first = 0; first < s.features; first += ROW_TILE)
        row_tile<true>(
            t, first, s.features, columns, n,
            [&](int f, int j) { return phi[(size_t)j * s.phi_lanes + f]; },
            [&](int j, int d) { return v[(size_t)j * s.lanes + d]; },
            [&](int f, int d) { return whole_S(planes, s.S_floats, (size_t)f * s.lanes + c0 + d); },
            [&](int f, int d, float x) { S[(size_t)f * s.lanes + d] = x; });
    for (int f = threadIdx.x; f < s.phi_lanes; f += THREADS) {
        float sum = z_before[f];
        for (int j = 0; j < n; j++)
            sum += phi[(size_t)j * s.phi_lanes + f];
        z[f] = sum;
    }
    __syncthreads();
    for (int first = 0; first < n; first += ROW_TILE)
        row_tile<false>(
            t, first, n, columns, s.features,
            [&](int j, int f) { return phi[(size_t)j * s.phi_lanes + f]; },
            [&](int f, int d) { return S[(size_t)f * s.lanes + d]; },
            [&](int, int) { return 0.0f; },
            [&](int j, int d, float x) { recalled[(size_t)j * s.lanes + d] = x; });
    __syncthreads();
    int lane = threadIdx.x % 16;
    for (int j = threadIdx.x / 32; j < n; j += THREADS / 32) {
        float norm = 0, sum = 0;
        for (int f = lane; f < s.phi_lanes; f += 16)
            norm = fmaf(phi[(size_t)j * s.phi_lanes + f], z[f], norm);
        norm = sum16(norm) + 1e-30f;
        for (int d = lane; d < columns; d += 16) {
            size_t at = (size_t)j * s.lanes + d;
            float off = recalled[at] / norm - v[at];
            sum = fmaf(off, off, sum);
        }
        sum = sum16(sum);
        if (threadIdx.x % 32 == 0) error[j] = sum;
    }
}

/* ---- begin ---- */

struct chosen {         /* shared memory */
    double *score;      /* [candidates] */
    int *keep;          /* [candidates] */
    int *kept, *folded; /* [candidates] ascending */
    int n_kept, n_folded;
};

static size_t chosen_bytes(const work &k) {
    return (size_t)k.candidates * (sizeof(double) + 3 * sizeof(int));
}

/* Keeps `count` more: the largest scores of those not kept yet, of equals the earlier. */
DEVICE void keep_largest(const chosen &m, int n, int count) {
    for (int j = threadIdx.x; j < n; j += THREADS)
        if (m.keep[j]) m.score[j] = -1; /* before nobody */
    __syncthreads();
    for (int j = threadIdx.x; j < n; j += THREADS) {
        if (m.keep[j]) continue;
        int before = 0;
        for (int i = 0; i < j; i++)
            before += m.score[i] >= m.score[j];
        for (int i = j + 1; i < n; i++)
            before += m.score[i] > m.score[j];
        m.keep[j] = before < count;
    }
    __syncthreads();
}

/* Most places by error alone; then some by error and age. */
DEVICE void choose(const gpu_shape &s, const work &k, const beginning &it, int n, chosen &m) {
    size_t most = k.candidates;
    bool all = n <= s.cache, none = s.cache == 0;
    for (int j = threadIdx.x; j < n; j += THREADS) {
        m.keep[j] = all;
        if (all || none) continue;
        float error = 0;
        for (int h = 0; h < s.state_heads; h++) {
            float head = 0;
            for (int p = 0; p < k.column_tiles; p++)
                head += it.scratch.error[((size_t)h * k.column_tiles + p) * most + j];
            error += head;
        }
        m.score[j] = isnan(error) ? INFINITY : error; /* what overflows is not recalled at all */
    }
    __syncthreads();
    if (!all && !none) {
        keep_largest(m, n, s.cache - s.cache_recent);
        if (s.cache_recent) {
            int64_t start = it.block * s.window_size;
            for (int j = threadIdx.x; j < n; j += THREADS)
                m.score[j] /= 1 + (double)(start - it.scratch.position[j]) / s.cache_age;
            __syncthreads();
            keep_largest(m, n, s.cache_recent);
        }
    }
    int n_kept = 0;
    for (int j = 0; j < n; j++)
        n_kept += m.keep[j];
    m.n_kept = n_kept;
    m.n_folded = n - n_kept;
    for (int j = threadIdx.x; j < n; j += THREADS) {
        int before = 0;
        for (int i = 0; i < j; i++)
            before += m.keep[i];
        if (m.keep[j])
            m.kept[before] = j;
        else
            m.folded[j - before] = j;
    }
    __syncthreads();
}

/* Folds what is not kept into this block's columns of S; the first columns' block does z. */
DEVICE void fold(const gpu_shape &s, const work &k, const beginning &it, const chosen &m,
                 tiles &t) {
    int c0 = it.piece * COLUMNS, columns = s.lanes - c0 < COLUMNS ? s.lanes - c0 : COLUMNS;
    int64_t start = it.block * s.window_size;
    float forget = forgetting(s, folded_keys(s, start - 1), folded_keys(s, start));
    const float *phi = it.scratch.phi + (size_t)it.state * k.candidates * s.phi_lanes;
    const float *v = it.scratch.v + c0;
    uint16_t *planes = plane_hi(s, it.place, it.state);
    for (int first = 0; first < s.features; first += ROW_TILE)
        row_tile<true>(
            t, first, s.features, columns, m.n_folded,
            [&](int f, int i) { return phi[(size_t)m.folded[i] * s.phi_lanes + f]; },
            [&](int i, int d) { return v[(size_t)m.folded[i] * s.lanes + d]; },
            [&](int f, int d) { return whole_S(planes, s.S_floats, (size_t)f * s.lanes + c0 + d); },
            [&](int f, int d, float x) {
                write_S(planes, s.S_floats, (size_t)f * s.lanes + c0 + d, x * forget);
            });
    if (it.piece > 0) return;
    float *z = normaliser(s, it.place, it.state);
    for (int f = threadIdx.x; f < s.phi_lanes; f += THREADS) {
        float sum = z[f];
        for (int i = 0; i < m.n_folded; i++)
            sum += phi[(size_t)m.folded[i] * s.phi_lanes + f];
        z[f] = sum * forget;
    }
}

/* Moves n entries downwards, columns c0 .. c0 + columns - 1 of an array: to(i) is never above
 * from(i), both ascend, and what a move overwrites has moved or is folded.  As many as the threads
 * hold are read before any is written. */
template <class T, class At, class From, class To>
DEVICE void move(T *array, int n, int columns, At at, From from, To to) {
    enum { HELD = 8 };
    int held_entries = HELD * THREADS / COLUMNS;
    for (int first = 0; first < n; first += held_entries) {
        T held[HELD];
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int x = (int)threadIdx.x + k * THREADS, i = first + x % held_entries,
                d = x / held_entries;
            if (i < n && d < columns) held[k] = array[at(from(i), d)];
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int x = (int)threadIdx.x + k * THREADS, i = first + x % held_entries,
                d = x / held_entries;
            if (i < n && d < columns) array[at(to(i), d)] = held[k];
        }
        __syncthreads();
    }
}

/* This block's columns of the entries that stay: sinks become entries of their own in block 2, the
 * cache closes up; keys that are now too far are clamped. */
template <class T>
DEVICE void move_entries(const gpu_shape &s, const beginning &it, const chosen &m, int cached) {
    int c0 = it.piece * COLUMNS;
    int values = s.lanes - c0 < COLUMNS ? s.lanes - c0 : COLUMNS;
    int keys = s.head_dim - c0 < COLUMNS ? s.head_dim - c0 : COLUMNS;
    bool turned = s.turned != s.keys;
    auto key = [&](int entry, int d) { return key_at(s, entry, c0 + d); };
    auto value = [&](int entry, int d) { return value_at(s, entry, c0 + d); };
    auto same = [](int i) { return i; };
    auto sink = [&](int i) { return s.sinks + s.cache + i; };
    auto kept = [&](int i) { return candidate_entry(s, it.block, cached, m.kept[i]); };
    auto cache = [&](int i) { return s.sinks + i; };
    int n_sinks = it.block == 2 ? s.sinks : 0;
    move((T *)it.place.keys, n_sinks, keys, key, sink, same);
    move((T *)it.place.values, n_sinks, values, value, sink, same);
    if (turned) move((T *)it.place.turned, n_sinks, keys, key, sink, same);
    move((T *)it.place.keys, m.n_kept, keys, key, kept, cache);
    move((T *)it.place.values, m.n_kept, values, value, kept, cache);
    if (turned) move((T *)it.place.turned, m.n_kept, keys, key, kept, cache);
    if (!turned || !s.max_distance) return;

    int64_t w = s.window_size, start = it.block * w;
    int n = s.sinks + m.n_kept;
    for (int x = threadIdx.x; x < n * keys; x += THREADS) {
        int e = x % n, d = x / n;
        int64_t position = e < s.sinks ? e : it.scratch.position[m.kept[e - s.sinks]];
        bool was = position < start - 2 * w && is_clamped(s, position, start - w);
        if (is_clamped(s, position, start) && !was)
            ((T *)it.place.turned)[key(e, d)] = ((const T *)it.place.keys)[key(e, d)];
    }
}

static __global__ void __launch_bounds__(THREADS)
    begin_kernel(gpu_shape s, layers l, const gpu_segment *segments, work k) {
    __shared__ tiles t;
    DYNAMIC_SHARED(double, shared);
    beginning it;
    if (!begins(s, l, segments, k, k.column_tiles, it)) return;
    int n = counted(k, it.scratch), most = k.candidates;
    int cached = n - count_candidates(s, it.block, 0);
    chosen m;
    m.score = shared;
    m.keep = (int *)(shared + most);
    m.kept = m.keep + most;
    m.folded = m.kept + most;
    choose(s, k, it, n, m);
    if (m.n_folded) fold(s, k, it, m, t);
    if (it.state > 0) return;
    if (s.kv_bf16)
        move_entries<uint16_t>(s, it, m, cached);
    else
        move_entries<float>(s, it, m, cached);
    if (it.piece > 0) return;
    for (int i = threadIdx.x; i < s.cache; i += THREADS)
        it.place.positions[i] = i < m.n_kept ? it.scratch.position[m.kept[i]] : -1;
}

extern "C" void gpu_launch_begin(struct gpu *g, const struct gpu_shape *shape,
                                 const struct gpu_layer *all, int first_layer, int n_layers,
                                 const struct gpu_segment *segments, int n_segments,
                                 void *scratch) {
    if (!has_blocks(*shape) || n_segments <= 0) return;
    layers l = {all, first_layer, n_layers};
    work k = work_of(*shape, scratch);
    unsigned kv_heads = (unsigned)shape->n_kv_heads, many = (unsigned)(n_layers * n_segments),
             rows = (unsigned)(shape->state_heads * k.row_tiles),
             columns = (unsigned)(shape->state_heads * k.column_tiles);
    LAUNCH(g, features_kernel, dim3(rows, kv_heads, many), THREADS, 0, *shape, l, segments, k);
    if (shape->cache)
        LAUNCH(g, recall_kernel, dim3(columns, kv_heads, many), THREADS, 0, *shape, l, segments, k);
    LAUNCH(g, begin_kernel, dim3(columns, kv_heads, many), THREADS, chosen_bytes(k), *shape, l,
           segments, k);
}

/* ---- keys and values enter ---- */

enum { STORE_THREADS = 128, STORE_ROWS = 4 };

static __global__ void __launch_bounds__(STORE_THREADS)
    store_kernel(gpu_shape s, int layer, const gpu_segment *segments, gpu_rows rows) {
    gpu_segment segment = segments[blockIdx.z];
    if (segment.slot < 0) return;
    gpu_place m = place_of(s, segment.slot, layer, (int)blockIdx.y);
    for (int i = threadIdx.x; i < STORE_ROWS * s.lanes; i += STORE_THREADS) {
        int r = (int)blockIdx.x * STORE_ROWS + i / s.lanes, d = i % s.lanes;
        if (r < segment.n_rows)
            store_element(s, m, rows, segment.first_row + r, (int)blockIdx.y,
                          own_entry(s, segment.position + r), d);
    }
}

extern "C" void gpu_launch_store(struct gpu *g, const struct gpu_shape *shape, int layer,
                                 const struct gpu_segment *segments, int n_segments, int max_rows,
                                 const struct gpu_rows *rows) {
    dim3 grid((unsigned)((max_rows + STORE_ROWS - 1) / STORE_ROWS), (unsigned)shape->n_kv_heads,
              (unsigned)n_segments);
    LAUNCH(g, store_kernel, grid, STORE_THREADS, 0, *shape, layer, segments, *rows);
}
