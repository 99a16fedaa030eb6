/* gpu_wave.cu - a wave of blocks that begin (gpu_chain.cu), with products by mma_bf16 that keep
 * fp32's accuracy.
 *
 *   shapes  not exact; D = 64 or 128, F a multiple of 32 up to 256, bf16 keys and values, windows
 *           up to 64; heads whose caches make up to 192 candidates (the others are gpu_chain.cu's)
 *   launch  (parts x tiles of 16 columns of S x state heads, kv heads, layers x blocks), 256
 *           threads, 154 KB of shared memory: a block of threads a processor
 *   bound   latency.  See below
 *   twin    gpu_chain.cu's wave; memory.c, self_recall(), choose(), fold()
 *
 * Transposed: S^T [16 x f] += v^T [16 x keys] phi [keys x f] with keys as k, then r^T [16 x keys] =
 * S'^T [16 x f] phi^T [f x keys] with f as k, so sums of the first are left operands of the second
 * as they lie in registers.  CHUNK features at a time, of all keys, while the next are on their
 * way: in the first product a warp has 8 of them and all keys, in the second every 8th tile of 8
 * keys and all of them.  phi is read from global memory once.
 *
 * Exact splits.  A float is the sum of three bf16, its significand cut into 8 + 8 + 8 bits.  Values
 * are bf16: phi v^T takes 3 products, all exact.  S' phi takes the 6 of 9 that matter: what is left
 * out is below (2 2^-7 2^-15 + 2^-30) |S' phi| < 2^-20 |S' phi| in the worst case, 2^-24 on
 * average. Large and small products have accumulators of their own, and what is folded is summed
 * from zero before it meets S: hardware may cut off sums, not round them, by 2^-23 of the largest
 * term or so an mma.  Then S and z err by (n_folded / 16 + 1) 2^-23 of what is folded and one
 * rounding, and r by 2^-20 + (F / 16) 2^-23 of |S'|^T phi: with F = 256, 3e-6 of the mean |v| at
 * worst.  A score
 * || r / z.phi - v ||^2 then moves by twice that over the distance |r / z.phi - v|, relatively:
 * below 1e-4 for distances above 0.06 of |v|, while keys that contend for a place are far from
 * being recalled.
 *
 * Bits.  A candidate is a column of the second product: equal keys meet equal numbers in equal
 * order, whichever warp or part has them.  Rows and columns that fill up tiles are zeros.
 *
 * Time of a wave, in cycles of a processor; a product of 16 x 8 x 16 takes it 1.5, and 22
 * operations of 32 lanes to split its right operand from fp32, 4 a cycle:
 *
 *                                   F = 128, D = 64, 3 kv heads       F = 256, D = 128, 8 kv heads
 *   what it is, lists, errors       1,500                             1,500
 *   ranks 192^2 + 96^2              1,200                             1,200
 *   first 64 features from L2       1,600                             1,600
 *   phi v^T, 64 + 192 keys          3 (F/8) 16 = 768 products; 1,900  3,800
 *   S' phi^T, 192 keys, 1 part      6 (F/16) 24 = 1,152; 1,700        3,400
 *   errors, the next launch         1,500 to 3,000                    1,500 to 3,000
 *   together                        4 to 6 us in 12 blocks            7 to 8 us in 64
 *
 * Where processors would idle, the second product is shared by up to 3 parts that each do the
 * first: the small model's wave then takes 36 blocks and 1,100 cycles less.  128 KB (small: 64 KB)
 * of phi a block are less than what 64 bytes a cycle bring in the meantime.
 *
 * Considered: one block of threads a kv head that keeps S and phi of the cache in shared memory and
 * goes from block to block without launches.  It has all columns for itself: 7,000 products, 10,000
 * cycles a block of the small model, 28,000 and 42,000 of the large, so it would be slower than
 * waves by 1.5 and 3; and only many prompts fill a device.  A block for each tile of columns that
 * carries on needs the others' errors each time, so all of them at once on the device. */
#include "attention/gpu_choose.cuh"

enum {
    WARPS = CHAIN_THREADS / 32,
    FOLD_ROWS = 64,  /* keys that are folded lie in rows 0 ..., */
    NEXT_ROWS = 192, /* candidates of the block after this one in rows FOLD_ROWS ... */
    ROWS = FOLD_ROWS + NEXT_ROWS,
    CHUNK = 64, /* features of a stage */
    /* A stage: [CHUNK / 8][ROWS][8] floats.  Reading, a warp has rows t and features g, or rows g
     * and pairs t of features: different banks.  Writing, 16 pieces of a row: tiles start 8 banks
     * on. */
    TILE_FLOATS = ROWS * 8 + 8,
    STAGE_FLOATS = CHUNK / 8 * TILE_FLOATS,
    VALUE_PITCH = 24, /* 48 bytes: 8 rows' pieces of 16 bytes lie in different banks */
    S_WORDS = CHUNK / 16 * 3 * 32 * 4,
    KEY_TILES = NEXT_ROWS / 8 / WARPS, /* of a warp */
};

struct fast_shared {
    float *stage;     /* two */
    uint32_t *S;      /* [CHUNK / 16][3 parts][32 lanes][4]: left operands of the second product */
    float *z;         /* [CHUNK] */
    uint16_t *values; /* [ROWS][VALUE_PITCH] 16 columns */
    choice_shared keys;
};

static size_t fast_bytes(void) {
    return (2 * STAGE_FLOATS + S_WORDS + CHUNK) * 4 + ROWS * VALUE_PITCH * 2 +
           choice_bytes(NEXT_ROWS);
}

DEVICE fast_shared fast_shared_at(float *at) {
    fast_shared m;
    m.stage = at;
    m.S = (uint32_t *)(at + 2 * STAGE_FLOATS);
    m.z = (float *)(m.S + S_WORDS);
    m.values = (uint16_t *)(m.z + CHUNK);
    m.keys = choice_shared_at(NEXT_ROWS, m.values + ROWS * VALUE_PITCH);
    return m;
}

/* Keys of the rows: numbers, in shared memory. */
struct wave_rows {
    const int *folded, *next;
    int n_folded, n_next;
};

DEVICE int up_to_16(int n) {
    return (n + 15) / 16 * 16;
}

/* Features f0 ... of all rows: 8 or 16 threads a row. */
DEVICE void load_chunk(float *stage, const float *phi, const gpu_shape &s, const wave_rows &rows,
                       int f0) {
    int shift = s.features - f0 < CHUNK ? 3 : 4, piece = (int)threadIdx.x & ((1 << shift) - 1);
    int first = (int)threadIdx.x >> shift, step = CHAIN_THREADS >> shift;
    float *to = stage + piece / 2 * TILE_FLOATS + piece % 2 * 4;
    phi += f0 + piece * 4;
#pragma unroll 4
    for (int r = first; r < rows.n_folded; r += step)
        cp_async16(to + r * 8, phi + (size_t)rows.folded[r] * s.phi_lanes);
    to += FOLD_ROWS * 8;
#pragma unroll 4
    for (int r = first; r < rows.n_next; r += step)
        cp_async16(to + r * 8, phi + (size_t)rows.next[r] * s.phi_lanes);
}

/* Rows of no key, up to a multiple of 16, in both stages. */
DEVICE void zero_rows(float *stage, int first, int end) {
    int n = (end - first) * 8;
    for (int i = threadIdx.x; i < n * 2 * (CHUNK / 8); i += CHAIN_THREADS) {
        int tile = i / n % (CHUNK / 8), which = i / n / (CHUNK / 8);
        stage[which * STAGE_FLOATS + tile * TILE_FLOATS + first * 8 + i % n] = 0;
    }
}

DEVICE void load_values(uint16_t *values, const float *v, const gpu_shape &s,
                        const wave_rows &rows) {
    for (int i = threadIdx.x; i < ROWS * 4; i += CHAIN_THREADS) {
        int row = i / 4, next = row - FOLD_ROWS, d = i % 4 * 4, key = -1;
        float4 x = {0, 0, 0, 0};
        if (next < 0 && row < rows.n_folded) key = rows.folded[row];
        if (next >= 0 && next < rows.n_next) key = rows.next[next];
        if (key >= 0) x = *(const float4 *)(v + (size_t)key * s.lanes + d);
        *(uint2 *)(values + row * VALUE_PITCH + d) =
            uint2{pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)};
    }
}

/* Two floats, each the sum of its three bf16. */
DEVICE void split_exactly(float x, float y, uint32_t (&parts)[3]) {
#pragma unroll
    for (int p = 0; p < 3; p++) {
        uint32_t of_x = as_bits(x), of_y = as_bits(y) & 0xffff0000u;
        parts[p] = of_x >> 16 | of_y;
        x -= as_float(of_x & 0xffff0000u);
        y -= as_float(of_y);
    }
}

/* ---- sum_j phi_j v_j^T, sum_j phi_j: the warp's 8 features ---- */

struct key_sums {
    float S[3][4]; /* of each part: [0, 1]: column g, features 2 t, 2 t + 1; [2, 3]: column g + 8 */
    float z;       /* feature g, rows t, t + 4, ...; then all */
};

DEVICE float sum_of(const float (&parts)[3][4], int i) {
    return parts[0][i] + (parts[1][i] + parts[2][i]);
}

/* k 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of a product are rows t, t + 4, t + 8, t + 12 of 16. */
DEVICE key_sums add_rows(const float *tile, const uint16_t *values, int n) {
    int lane = (int)threadIdx.x % 32, matrix = lane / 8, k = lane % 8;
    const uint16_t *v =
        values + (matrix / 2 * 8 + k / 2 + k % 2 * 4) * VALUE_PITCH + matrix % 2 * 8;
    const float *phi = tile + lane % 4 * 8 + lane / 4;
    key_sums sum = {};
#pragma unroll 2
    for (int row = 0; row < n; row += 16) {
        uint32_t a[4], low[3], high[3];
        float x[4];
        ldmatrix4_t(a, v + row * VALUE_PITCH);
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[i] = phi[(row + 4 * i) * 8];
        split_exactly(x[0], x[1], low);
        split_exactly(x[2], x[3], high);
#pragma unroll
        for (int p = 0; p < 3; p++) {
            uint32_t b[2] = {low[p], high[p]};
            mma_bf16(sum.S[p], a, b);
        }
        sum.z += (x[0] + x[1]) + (x[2] + x[3]);
    }
    sum.z += __shfl_xor_sync(0xffffffffu, sum.z, 1);
    sum.z += __shfl_xor_sync(0xffffffffu, sum.z, 2);
    return sum;
}

struct state_place { /* of 16 columns */
    const uint16_t *planes;
    const float *z;
    uint16_t *planes_after; /* NULL: not this block's to write */
    float *z_after;         /* NULL alike */
};

/* Folds, and leaves S' and z' of the warp's 8 features, which are f ... of the state. */
DEVICE void fold(const gpu_shape &s, const fast_shared &m, const float *stage,
                 const state_place &state, const wave_rows &rows, float forget, int f) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float S[4], z = state.z[f + g];
    size_t at[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        at[i] = (size_t)(f + 2 * t + i % 2) * s.lanes + g + i / 2 * 8;
        S[i] = whole_S(state.planes, s.S_floats, at[i]);
    }
    const float *tile = stage + warp * TILE_FLOATS;
    key_sums sum = add_rows(tile, m.values, rows.n_folded);
    z = (z + sum.z) * forget;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        S[i] = (S[i] + sum_of(sum.S, i)) * forget;
        if (state.planes_after) write_S(state.planes_after, s.S_floats, at[i], S[i]);
    }
    if (state.z_after && t == 0) state.z_after[f + g] = z;
    if (!rows.n_next) return;

    sum = add_rows(tile + FOLD_ROWS * 8, m.values + FOLD_ROWS * VALUE_PITCH, rows.n_next);
    uint32_t upper[3], lower[3];
    split_exactly(S[0] + sum_of(sum.S, 0), S[1] + sum_of(sum.S, 1), upper);
    split_exactly(S[2] + sum_of(sum.S, 2), S[3] + sum_of(sum.S, 3), lower);
#pragma unroll
    for (int p = 0; p < 3; p++)
        *(uint2 *)(m.S + ((warp / 2 * 3 + p) * 32 + lane) * 4 + warp % 2 * 2) =
            uint2{upper[p], lower[p]};
    if (t == 0) m.z[8 * warp + g] = z + sum.z;
}

/* ---- r_j = S'^T phi_j, z' . phi_j: the warp's tiles of 8 candidates ---- */

struct recalled {
    float r[KEY_TILES][3][4]; /* large, smaller and smallest products: [0, 1]: column g, keys 2 t,
                                 2 t + 1; [2, 3]: column g + 8 */
    float norm[KEY_TILES];    /* key g, features 2 t, 2 t + 1 of 8 */
};

/* A warp has every (8 parts)-th tile of candidates, from this one on. */
struct key_tiles {
    int first, step, n;
};

DEVICE key_tiles tiles_of_warp(int candidates, int part, int parts) {
    key_tiles mine = {(int)threadIdx.x / 32 + WARPS * part, WARPS * parts, 0};
    mine.n = ((candidates + 7) / 8 - mine.first + mine.step - 1) / mine.step;
    return mine;
}

/* Adds a stage's features for N tiles. */
template <int N>
DEVICE void recall(const fast_shared &m, const float *stage, int features, const key_tiles &mine,
                   recalled &to) {
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int f = 0; f < features; f += 16) {
        uint32_t S[3][4], b[N][3][2];
#pragma unroll
        for (int p = 0; p < 3; p++) {
            uint4 x = *(const uint4 *)(m.S + ((f / 16 * 3 + p) * 32 + lane) * 4);
            S[p][0] = x.x, S[p][1] = x.y, S[p][2] = x.z, S[p][3] = x.w;
        }
        float2 z0 = *(const float2 *)(m.z + f + 2 * t), z1 = *(const float2 *)(m.z + f + 8 + 2 * t);
        const float *phi =
            stage + f / 8 * TILE_FLOATS + (FOLD_ROWS + 8 * mine.first + g) * 8 + 2 * t;
#pragma unroll
        for (int i = 0; i < N; i++) {
            float2 x = *(const float2 *)(phi + i * mine.step * 64),
                   y = *(const float2 *)(phi + i * mine.step * 64 + TILE_FLOATS);
            uint32_t low[3], high[3];
            split_exactly(x.x, x.y, low);
            split_exactly(y.x, y.y, high);
#pragma unroll
            for (int p = 0; p < 3; p++)
                b[i][p][0] = low[p], b[i][p][1] = high[p];
            float norm = to.norm[i];
            norm = fmaf(x.x, z0.x, norm), norm = fmaf(x.y, z0.y, norm);
            norm = fmaf(y.x, z1.x, norm), norm = fmaf(y.y, z1.y, norm);
            to.norm[i] = norm;
        }
#pragma unroll
        for (int p = 0; p < 3; p++) /* parts p of S' with 0 ... 2 - p of phi */
#pragma unroll
            for (int i = 0; i < N; i++)
#pragma unroll
                for (int q = 0; p + q < 3; q++)
                    mma_bf16(to.r[i][p + q], S[p], b[i][q]);
    }
}

/* || r_j / (z' . phi_j) - v_j ||^2 of these columns. */
DEVICE void put_errors(const fast_shared &m, const recalled &of, const key_tiles &mine, int n,
                       float *error) {
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < KEY_TILES; i++) {
        if (i >= mine.n) break;
        float norm = of.norm[i];
        norm += __shfl_xor_sync(0xffffffffu, norm, 1);
        norm += __shfl_xor_sync(0xffffffffu, norm, 2);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            int key = (mine.first + i * mine.step) * 8 + 2 * t + k;
            float by = __shfl_sync(0xffffffffu, norm, 8 * t + 4 * k) + 1e-30f;
            const uint16_t *v = m.values + (FOLD_ROWS + key) * VALUE_PITCH + g;
            float a = sum_of(of.r[i], k) / by - bf16_to_float(v[0]),
                  b = sum_of(of.r[i], 2 + k) / by - bf16_to_float(v[8]);
            float e = fmaf(b, b, rounded_product(a, a));
            for (int lanes = 4; lanes < 32; lanes *= 2)
                e += __shfl_xor_sync(0xffffffffu, e, lanes);
            if (g == 0 && key < n) error[key] = e;
        }
    }
}

/* ---- a wave ---- */

static __global__ void __launch_bounds__(CHAIN_THREADS, 1)
    fast_wave_kernel(gpu_chain c, int first_block, int turn, bool before, int parts) {
    DYNAMIC_SHARED(float, shared);
    const gpu_shape &s = c.shape;
    chain_unit u = chain_unit_at(c, first_block + (int)blockIdx.z / c.n_layers,
                                 (int)blockIdx.z % c.n_layers, (int)blockIdx.y);
    if ((before && !u.block.begins) || u.slot.cache + s.window_size > NEXT_ROWS) return;
    fast_shared m = fast_shared_at(shared);
    int tiles = s.lanes / CHAIN_COLUMNS, part = (int)blockIdx.x % parts,
        tile = (int)blockIdx.x / parts % tiles, state = (int)blockIdx.x / parts / tiles;
    bool writes = !before && part == 0, writes_z = writes && tile == 0;
    chosen to = choose_keys(c, u, turn, before, writes_z && state == 0, m.keys);
    if (part && !to.scoring) return;

    const float *phi = chain_phi(c, u.piece, u.index, u.kv_head, state);
    wave_rows rows = {m.keys.folded, m.keys.next, to.n_folded, to.scoring ? to.n_next : 0};
    load_chunk(m.stage, phi, s, rows, 0);
    cp_async_commit();
    zero_rows(m.stage, rows.n_folded, up_to_16(rows.n_folded));
    zero_rows(m.stage, FOLD_ROWS + rows.n_next, FOLD_ROWS + up_to_16(rows.n_next));
    int c0 = tile * CHAIN_COLUMNS;
    load_values(m.values, chain_values(c, u.piece, u.index, u.kv_head) + c0, s, rows);

    gpu_place from = u.slot;
    if (u.block.previous >= 0)
        from = place_of(c.snapshot, u.index * c.n_blocks + u.block.previous,
                        c.first_layer + u.index, u.kv_head);
    state_place S = {plane_hi(s, from, state) + c0, normaliser(s, from, state), NULL, NULL};
    if (writes) S.planes_after = plane_hi(s, u.here, state) + c0;
    if (writes_z) S.z_after = normaliser(s, u.here, state);
    key_tiles mine = tiles_of_warp(rows.n_next, part, parts);
    recalled sums = {};
    for (int f0 = 0, now = 0; f0 < s.features; f0 += CHUNK, now ^= 1) {
        float *stage = m.stage + now * STAGE_FLOATS;
        int features = s.features - f0 < CHUNK ? s.features - f0 : CHUNK, warp = threadIdx.x / 32;
        cp_async_wait<0>();
        __syncthreads(); /* these features are there; nobody recalls by those before them */
        if (f0 + CHUNK < s.features)
            load_chunk(m.stage + (now ^ 1) * STAGE_FLOATS, phi, s, rows, f0 + CHUNK);
        cp_async_commit();
        if (8 * warp < features) fold(s, m, stage, S, rows, to.forget, f0 + 8 * warp);
        __syncthreads();
        if (mine.n == 3) recall<3>(m, stage, features, mine, sums);
        if (mine.n == 2) recall<2>(m, stage, features, mine, sums);
        if (mine.n == 1) recall<1>(m, stage, features, mine, sums);
    }
    if (to.scoring)
        put_errors(m, sums, mine, rows.n_next,
                   chain_errors(c, before ? turn : turn ^ 1, u.block.piece, u.index, u.kv_head,
                                state, tile));
}

int launch_fast_wave(struct gpu *g, const gpu_chain *c, int first_block, int n_blocks, int turn,
                     bool before) {
    const gpu_shape &s = c->shape;
    const struct gpu_info *device = gpu_info(g);
    if (s.exact || !s.kv_bf16 || (s.head_dim != 64 && s.head_dim != 128)) return -1;
    if (s.features % 32 || s.features > 256 || s.window_size > FOLD_ROWS) return -1;
    if (fast_bytes() > gpu_shared_bytes(device)) return -1;
    int most = NEXT_ROWS - s.window_size; /* places */
    if (c->least_cache > most) return -1;
    int tiles = s.lanes / CHAIN_COLUMNS * s.state_heads, parts = KEY_TILES;
    size_t blocks = (size_t)tiles * s.n_kv_heads * c->n_layers * n_blocks;
    while (parts > 1 && blocks * parts > (size_t)device->n_processors)
        parts--;
    dim3 grid((unsigned)(parts * tiles), (unsigned)s.n_kv_heads,
              (unsigned)(c->n_layers * n_blocks));
    LAUNCH(g, fast_wave_kernel, grid, CHAIN_THREADS, fast_bytes(), *c, first_block, turn, before,
           parts);
    return most;
}
