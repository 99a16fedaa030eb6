/* gpu_chain.cu - blocks of a terraced window that begin: features of keys, self-recall, the choice
 * of the cache, and S.  (memory.c, begin_block(); gpu_kernels.h says in which order.)
 *
 *   prepare  phi_k of a piece's keys        (tiles of 64 keys x state heads, kv heads, layers x
 *                                           pieces), 256 threads
 *   wave     choose, fold, score the next   (tiles of 16 columns of S x state heads, kv heads,
 *                                           layers x blocks), 256 threads; 61 KB of shared memory
 *                                           with F = 256 and 192 candidates.  gpu_wave.cu has
 *                                           the shapes that matter, where not exact
 *   bound    fp32 arithmetic.  wave: 2 n F D + n_fold F D multiply-adds of a state head with n
 *            candidates; F = 128, D = 64, n = 192: 3.7 M in 4 blocks of threads.  In a chain of
 *            waves latency decides: so each is one launch, and every block of threads of a wave
 *            chooses for itself (gpu_choose.cuh)
 *   twin     memory.c, self_recall(), choose(), fold(); kernels.c
 *
 * Sums run over candidates (and d, f) in ascending order, one fused multiply-add each, as on the
 * CPU; only r_j.norm and the columns of e_j are added in an order of their own. */
#include "attention/gpu_choose.cuh"

enum { F_TILE = 128, STAGED_KEYS = 32, J_TILE = 128, STAGED_F = 32 };
enum { F_PITCH = F_TILE + 4, J_PITCH = STAGED_F + 4 }; /* floats; rows meet different banks */
enum {
    STAGE_FOLD = STAGED_KEYS * (F_PITCH + CHAIN_COLUMNS),
    STAGE_RECALL = J_TILE * J_PITCH,
    STAGE = STAGE_FOLD > STAGE_RECALL ? STAGE_FOLD : STAGE_RECALL, /* floats; there are two */
};

/* ---- prepare ---- */

enum { KEY_TILE = 64, MAP_COLUMNS = 32, D_STEP = 16 };

/* u = x W of KEY_TILE keys and all f, MAP_COLUMNS at a time. */
static __global__ void __launch_bounds__(CHAIN_THREADS, 4)
    prepare_kernel(gpu_chain c, gpu_rows rows) {
    __shared__ float keys[D_STEP][KEY_TILE + 4];
    __shared__ float maps[D_STEP][MAP_COLUMNS];
    __shared__ key_source sources[KEY_TILE];
    const gpu_shape &s = c.shape;
    int index = (int)blockIdx.z % c.n_layers, kv_head = (int)blockIdx.y;
    gpu_piece piece = c.pieces[blockIdx.z / c.n_layers];
    int state = (int)blockIdx.x % s.state_heads, first = (int)blockIdx.x / s.state_heads * KEY_TILE;
    gpu_place slot = place_of(s, piece.slot, c.first_layer + index, kv_head);
    int n_keys = piece.n_keys - (s.most_cache - slot.cache); /* of this head */
    int end = first + KEY_TILE < n_keys ? first + KEY_TILE : n_keys;
    if (first >= end) return;
    const gpu_layer &layer = c.layers[c.first_layer + index];
    size_t head = (size_t)kv_head * s.state_heads + state;
    const float *map = layer.map_k + head * s.head_dim * s.f_lanes;
    const float *bias = layer.map_k_bias ? layer.map_k_bias + head * s.f_lanes : NULL;
    float *phi = chain_phi(c, piece, index, kv_head, state);
    for (int j = threadIdx.x; j < end - first; j += CHAIN_THREADS)
        sources[j] = source_of(s, piece, slot, first + j);
    __syncthreads();

    int j0 = (int)threadIdx.x / 16 * 4, c0 = (int)threadIdx.x % 16 * 2;
    for (int f0 = 0; f0 < s.f; f0 += MAP_COLUMNS) {
        float sum[4][2] = {};
        for (int d0 = 0; d0 < s.head_dim; d0 += D_STEP) {
            for (int i = threadIdx.x; i < KEY_TILE * D_STEP; i += CHAIN_THREADS) {
                int j = first + i / D_STEP, d = d0 + i % D_STEP;
                float x = 0;
                if (j < end && d < s.head_dim)
                    x = key_element(s, slot, rows, sources[i / D_STEP], kv_head, d);
                keys[i % D_STEP][i / D_STEP] = x;
            }
            for (int i = threadIdx.x; i < MAP_COLUMNS * D_STEP; i += CHAIN_THREADS) {
                int f = f0 + i % MAP_COLUMNS, d = d0 + i / MAP_COLUMNS;
                maps[i / MAP_COLUMNS][i % MAP_COLUMNS] =
                    f < s.f && d < s.head_dim ? map[(size_t)d * s.f_lanes + f] : 0;
            }
            __syncthreads();
#pragma unroll
            for (int d = 0; d < D_STEP; d++) {
                float4 x = *(const float4 *)&keys[d][j0];
                float2 w = *(const float2 *)&maps[d][c0];
                sum[0][0] = fmaf(x.x, w.x, sum[0][0]), sum[0][1] = fmaf(x.x, w.y, sum[0][1]);
                sum[1][0] = fmaf(x.y, w.x, sum[1][0]), sum[1][1] = fmaf(x.y, w.y, sum[1][1]);
                sum[2][0] = fmaf(x.z, w.x, sum[2][0]), sum[2][1] = fmaf(x.z, w.y, sum[2][1]);
                sum[3][0] = fmaf(x.w, w.x, sum[3][0]), sum[3][1] = fmaf(x.w, w.y, sum[3][1]);
            }
            __syncthreads();
        }
        for (int r = 0; r < 4; r++)
            for (int k = 0; k < 2; k++) {
                int j = first + j0 + r, f = f0 + c0 + k;
                if (j < end && f < s.f)
                    phi[(size_t)j * s.phi_lanes + f] = bias ? sum[r][k] + bias[f] : sum[r][k];
            }
    }
    __syncthreads();
    for (int j = first + (int)threadIdx.x / 32; j < end; j += CHAIN_THREADS / 32) {
        float *row = phi + (size_t)j * s.phi_lanes;
        map_key(s, row, row, threadIdx.x % 32);
    }
    if (state > 0) return;
    float *values = chain_values(c, piece, index, kv_head);
    for (int i = threadIdx.x; i < (end - first) * s.lanes; i += CHAIN_THREADS) {
        int j = i / s.lanes, d = i % s.lanes;
        values[(size_t)(first + j) * s.lanes + d] =
            value_element(s, slot, rows, sources[j], kv_head, d);
    }
}

extern "C" void gpu_launch_prepare(struct gpu *g, const struct gpu_chain *chain, int most_keys,
                                   const struct gpu_rows *rows) {
    int tiles = (most_keys + KEY_TILE - 1) / KEY_TILE;
    if (tiles <= 0) return;
    dim3 grid((unsigned)(tiles * chain->shape.state_heads), (unsigned)chain->shape.n_kv_heads,
              (unsigned)(chain->n_layers * chain->n_pieces));
    LAUNCH(g, prepare_kernel, grid, CHAIN_THREADS, 0, *chain, *rows);
}

/* ---- sizes ---- */

static size_t tiles_of(const gpu_shape *s) {
    return (size_t)s->lanes / CHAIN_COLUMNS;
}
static size_t candidates_of(const gpu_shape *s) {
    return (size_t)s->most_cache + s->window_size;
}

extern "C" size_t gpu_chain_phi_bytes(const struct gpu_shape *s) {
    return (size_t)s->n_kv_heads * s->state_heads * s->phi_lanes * sizeof(float);
}
extern "C" size_t gpu_chain_value_bytes(const struct gpu_shape *s) {
    return (size_t)s->n_kv_heads * s->lanes * sizeof(float);
}
extern "C" size_t gpu_chain_error_bytes(const struct gpu_shape *s) {
    return 2 * (size_t)s->n_kv_heads * s->state_heads * tiles_of(s) * candidates_of(s) *
           sizeof(float);
}
extern "C" size_t gpu_chain_list_bytes(const struct gpu_shape *s) {
    return (size_t)s->n_kv_heads * (s->most_cache + 1) * sizeof(int);
}

/* ---- shared memory of a wave ---- */

struct wave_shared {
    float *stage; /* two of STAGE: features, then values, of keys on their way */
    float *S;     /* [phi_lanes][CHAIN_COLUMNS] as if all candidates were folded */
    float *z;     /* [phi_lanes] */
};

static size_t wave_bytes(const gpu_shape &s) {
    return (2 * STAGE + (size_t)s.phi_lanes * (CHAIN_COLUMNS + 1)) * sizeof(float) +
           choice_bytes(s.most_cache + s.window_size);
}

extern "C" bool gpu_chain_fits(const struct gpu_info *device, const struct gpu_shape *shape) {
    return wave_bytes(*shape) <= gpu_shared_bytes(device);
}

DEVICE wave_shared wave_shared_at(const gpu_shape &s, float *at) {
    wave_shared m;
    m.stage = at;
    m.S = at + 2 * STAGE;
    m.z = m.S + s.phi_lanes * CHAIN_COLUMNS;
    return m;
}

/* ---- S += sum_j phi_j v_j^T, z += sum_j phi_j ---- */

struct columns { /* CHAIN_COLUMNS of S of one state head, and where its keys' features and values
                    are */
    const float *phi, *v;
    int phi_lanes, lanes;
};

/* A thread has 4 features and 2 columns of the tile. */
struct tile_sum {
    float S[4][2], z[4];
};

DEVICE void stage_keys(float *stage, const columns &t, const int *key, int n, int f0, int floats) {
    float *phi = stage, *v = stage + STAGED_KEYS * F_PITCH;
    if (n > STAGED_KEYS) n = STAGED_KEYS;
    for (int i = threadIdx.x; i < n * (F_TILE / 4); i += CHAIN_THREADS) {
        int j = i / (F_TILE / 4), f = i % (F_TILE / 4) * 4;
        if (f < floats)
            cp_async16(phi + j * F_PITCH + f, t.phi + (size_t)key[j] * t.phi_lanes + f0 + f);
    }
    for (int i = threadIdx.x; i < n * (CHAIN_COLUMNS / 4); i += CHAIN_THREADS) {
        int j = i / (CHAIN_COLUMNS / 4), d = i % (CHAIN_COLUMNS / 4) * 4;
        cp_async16(v + j * CHAIN_COLUMNS + d, t.v + (size_t)key[j] * t.lanes + d);
    }
}

DEVICE void add_keys(const wave_shared &m, const columns &t, const int *key, int n, int f0,
                     tile_sum &sum) {
    int floats = t.phi_lanes - f0 < F_TILE ? t.phi_lanes - f0 : F_TILE;
    int f = (int)threadIdx.x / 8 * 4, d = (int)threadIdx.x % 8 * 2;
    if (n > 0) stage_keys(m.stage, t, key, n, f0, floats);
    cp_async_commit();
    for (int first = 0, now = 0; first < n; first += STAGED_KEYS, now ^= 1) {
        int next = first + STAGED_KEYS, count = n < next ? n - first : STAGED_KEYS;
        if (next < n) stage_keys(m.stage + (now ^ 1) * STAGE, t, key + next, n - next, f0, floats);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const float *phi = m.stage + now * STAGE + f,
                    *v = m.stage + now * STAGE + STAGED_KEYS * F_PITCH + d;
#pragma unroll 4
        for (int j = 0; f < floats && j < count; j++) {
            float4 x = *(const float4 *)(phi + j * F_PITCH);
            float2 y = *(const float2 *)(v + j * CHAIN_COLUMNS);
            sum.S[0][0] = fmaf(x.x, y.x, sum.S[0][0]), sum.S[0][1] = fmaf(x.x, y.y, sum.S[0][1]);
            sum.S[1][0] = fmaf(x.y, y.x, sum.S[1][0]), sum.S[1][1] = fmaf(x.y, y.y, sum.S[1][1]);
            sum.S[2][0] = fmaf(x.z, y.x, sum.S[2][0]), sum.S[2][1] = fmaf(x.z, y.y, sum.S[2][1]);
            sum.S[3][0] = fmaf(x.w, y.x, sum.S[3][0]), sum.S[3][1] = fmaf(x.w, y.y, sum.S[3][1]);
            sum.z[0] += x.x, sum.z[1] += x.y, sum.z[2] += x.z, sum.z[3] += x.w;
        }
        __syncthreads();
    }
}

/* ---- e_j = || (S'^T phi_j) / (z' . phi_j) - v_j ||^2, of these columns ---- */

DEVICE void stage_features(float *stage, const columns &t, const int *key, int n, int f0) {
    int floats = t.phi_lanes - f0 < STAGED_F ? t.phi_lanes - f0 : STAGED_F;
    if (n > J_TILE) n = J_TILE;
    for (int i = threadIdx.x; i < n * (STAGED_F / 4); i += CHAIN_THREADS) {
        int j = i / (STAGED_F / 4), f = i % (STAGED_F / 4) * 4;
        if (f < floats)
            cp_async16(stage + j * J_PITCH + f, t.phi + (size_t)key[j] * t.phi_lanes + f0 + f);
    }
}

/* A thread has keys j, j + 32, j + 64, j + 96 of J_TILE, and 2 columns. */
DEVICE void recall(const wave_shared &m, const columns &t, const int *key, int n, float *error) {
    int j0 = (int)threadIdx.x / 8, d = (int)threadIdx.x % 8 * 2;
    for (int first = 0; first < n; first += J_TILE) {
        float sum[4][2] = {}, norm[4] = {};
        stage_features(m.stage, t, key + first, n - first, 0);
        cp_async_commit();
        for (int f0 = 0, now = 0; f0 < t.phi_lanes; f0 += STAGED_F, now ^= 1) {
            if (f0 + STAGED_F < t.phi_lanes)
                stage_features(m.stage + (now ^ 1) * STAGE, t, key + first, n - first,
                               f0 + STAGED_F);
            cp_async_commit();
            cp_async_wait<1>();
            __syncthreads();
            int floats = t.phi_lanes - f0 < STAGED_F ? t.phi_lanes - f0 : STAGED_F;
            const float *S = m.S + f0 * CHAIN_COLUMNS + d, *z = m.z + f0,
                        *phi = m.stage + now * STAGE + j0 * J_PITCH;
#pragma unroll 2
            for (int f = 0; f < floats; f += 4) {
                float2 y[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    y[i] = *(const float2 *)(S + (f + i) * CHAIN_COLUMNS);
                float4 w = *(const float4 *)(z + f);
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    float4 x = *(const float4 *)(phi + 32 * r * J_PITCH + f);
                    sum[r][0] = fmaf(x.x, y[0].x, sum[r][0]);
                    sum[r][1] = fmaf(x.x, y[0].y, sum[r][1]);
                    norm[r] = fmaf(x.x, w.x, norm[r]);
                    sum[r][0] = fmaf(x.y, y[1].x, sum[r][0]);
                    sum[r][1] = fmaf(x.y, y[1].y, sum[r][1]);
                    norm[r] = fmaf(x.y, w.y, norm[r]);
                    sum[r][0] = fmaf(x.z, y[2].x, sum[r][0]);
                    sum[r][1] = fmaf(x.z, y[2].y, sum[r][1]);
                    norm[r] = fmaf(x.z, w.z, norm[r]);
                    sum[r][0] = fmaf(x.w, y[3].x, sum[r][0]);
                    sum[r][1] = fmaf(x.w, y[3].y, sum[r][1]);
                    norm[r] = fmaf(x.w, w.w, norm[r]);
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            int j = first + j0 + 32 * r;
            float e = 0;
            if (j < n) {
                const float *v = t.v + (size_t)key[j] * t.lanes + d;
                float a = sum[r][0] / (norm[r] + 1e-30f) - v[0],
                      b = sum[r][1] / (norm[r] + 1e-30f) - v[1];
                e = fmaf(b, b, a * a);
            }
            for (int lane = 4; lane > 0; lane /= 2)
                e += __shfl_xor_sync(0xffffffffu, e, lane);
            if (j < n && d == 0) error[j] = e;
        }
    }
}

/* ---- a wave ---- */

/* before: recall alone, of the candidates of the block itself.  Heads with up to `others` places
 * are another kernel's. */
static __global__ void __launch_bounds__(CHAIN_THREADS, 2)
    wave_kernel(gpu_chain c, int first_block, int turn, bool before, int others) {
    DYNAMIC_SHARED(float, shared);
    const gpu_shape &s = c.shape;
    chain_unit u = chain_unit_at(c, first_block + (int)blockIdx.z / c.n_layers,
                                 (int)blockIdx.z % c.n_layers, (int)blockIdx.y);
    if ((before && !u.block.begins) || u.slot.cache <= others) return;
    wave_shared m = wave_shared_at(s, shared);
    choice_shared keys = choice_shared_at(s.most_cache + s.window_size, m.z + s.phi_lanes);
    int tiles = s.lanes / CHAIN_COLUMNS, tile = (int)blockIdx.x % tiles,
        state = (int)blockIdx.x / tiles, c0 = tile * CHAIN_COLUMNS;
    bool writes = !before && tile == 0 && state == 0;
    chosen to = choose_keys(c, u, turn, before, writes, keys);

    columns t;
    t.phi = chain_phi(c, u.piece, u.index, u.kv_head, state);
    t.v = chain_values(c, u.piece, u.index, u.kv_head) + c0;
    t.phi_lanes = s.phi_lanes;
    t.lanes = s.lanes;
    gpu_place from = u.slot;
    if (u.block.previous >= 0)
        from = place_of(c.snapshot, u.index * c.n_blocks + u.block.previous,
                        c.first_layer + u.index, u.kv_head);
    const uint16_t *planes = plane_hi(s, from, state);
    const float *z_before = normaliser(s, from, state);
    uint16_t *planes_after = plane_hi(s, u.here, state);
    float *z_after = normaliser(s, u.here, state);
    int d = (int)threadIdx.x % 8 * 2;
    for (int f0 = 0; f0 < s.phi_lanes; f0 += F_TILE) {
        tile_sum sum;
        int f = f0 + (int)threadIdx.x / 8 * 4;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            size_t at = (size_t)(f + r) * s.lanes + c0 + d;
            bool is = f + r < s.features;
            sum.S[r][0] = is ? whole_S(planes, s.S_floats, at) : 0;
            sum.S[r][1] = is ? whole_S(planes, s.S_floats, at + 1) : 0;
            sum.z[r] = f + r < s.phi_lanes ? z_before[f + r] : 0;
        }
        if (to.n_folded) add_keys(m, t, keys.folded, to.n_folded, f0, sum);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            size_t at = (size_t)(f + r) * s.lanes + c0 + d;
            sum.S[r][0] *= to.forget, sum.S[r][1] *= to.forget, sum.z[r] *= to.forget;
            if (before) continue;
            if (f + r < s.features) {
                write_S(planes_after, s.S_floats, at, sum.S[r][0]);
                write_S(planes_after, s.S_floats, at + 1, sum.S[r][1]);
            }
            if (tile == 0 && d == 0 && f + r < s.phi_lanes) z_after[f + r] = sum.z[r];
        }
        if (!to.scoring) continue;
        add_keys(m, t, keys.next, to.n_next, f0, sum);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            if (f + r >= s.phi_lanes) continue;
            m.S[(f + r) * CHAIN_COLUMNS + d] = sum.S[r][0];
            m.S[(f + r) * CHAIN_COLUMNS + d + 1] = sum.S[r][1];
            if (d == 0) m.z[f + r] = sum.z[r];
        }
    }
    if (to.scoring) {
        int next = before ? turn : turn ^ 1;
        recall(m, t, keys.next, to.n_next,
               chain_errors(c, next, u.block.piece, u.index, u.kv_head, state, tile));
    }
}

static void launch_wave(struct gpu *g, const gpu_chain *c, int first, int n, int turn,
                        bool before) {
    if (n <= 0) return;
    int fast = launch_fast_wave(g, c, first, n, turn, before);
    if (c->most_cache <= fast) return;
    dim3 grid((unsigned)(c->shape.lanes / CHAIN_COLUMNS * c->shape.state_heads),
              (unsigned)c->shape.n_kv_heads, (unsigned)(c->n_layers * n));
    LAUNCH(g, wave_kernel, grid, CHAIN_THREADS, wave_bytes(c->shape), *c, first, turn, before,
           fast);
}

extern "C" void gpu_launch_recall(struct gpu *g, const struct gpu_chain *chain, int n_blocks) {
    if (chain->most_cache) launch_wave(g, chain, 0, n_blocks, 0, true);
}

extern "C" void gpu_launch_wave(struct gpu *g, const struct gpu_chain *chain, int wave,
                                int first_block, int n_blocks) {
    launch_wave(g, chain, first_block, n_blocks, wave % 2, false);
}
