/* gpu_decode.cu - y of generated rows: each segment is one row, and a block reads what a kv head
 * remembers once for all its query heads.
 *
 *   shapes  D 64 or 128, F a multiple of 32 up to 256, up to 8 query heads of a kv head, bf16 keys;
 *           terraced windows, and softmax of any length
 *   launch  (groups of segments, kv heads, 1 or shares of a softmax sequence), 256 threads: as many
 *           blocks as the device holds at once, each with up to 16 segments one after the other
 *   bound   bytes: 4 D of every entry in sight (rounded up to tiles of 16), 2 F D of every state
 *           head, 4 F of z.  Default model, 129 + 96 entries, 3 query heads: 58 + 16 + 0.5 KB of a
 *           kv head.  8B with 257 entries in sight and F = 256: 132 + 64 + 1 KB
 *   flight  DEPTH lines of 512 bytes of each of 8 warps: 48 KB of a block with D = 64 (3 blocks a
 *           processor), 64 KB with D = 128 (2); 3.35 TB/s take 18 KB a processor at 700 ns
 *   work    of a line of 512 bytes, which a processor may take 38 clocks (152 instructions) for: 8
 *           products and a load of each query head, 8 conversions, about 30 to queue another
 *   twin    gpu_launch_answer(), of which it differs by the order of fp32 sums
 *
 * A block's warps share the entries of a piece:
 *   keys     a lane has 8 entries at D / 16 of the dimensions; 16 lanes' sums make the logit
 *   weights  a warp for each query head: the largest logit, weights; after the last piece the
 *            features of its query, whose scale depends on it
 *   values   a lane has 8 columns of its rows; S follows, with features for weights
 * and at a unit's end the warps' sums are added.  Which warp has what, and the order of sums,
 * follow from the shape and the row's position: so bits do not depend on other segments or their
 * number. */
#include "attention/gpu_decode.cuh"

#include <stddef.h>

template <int D, int G, bool SOFTMAX> struct decode_sizes {
    enum {
        PITCH = G == 3 ? 4 : G, /* floats of one entry's or feature's weights */
        BLOCKS = SOFTMAX && G > 4                ? 1
                 : D == 64 && G <= 3 && !SOFTMAX ? 3
                                                 : 2, /* of a processor */
        DEPTH = BLOCKS == 3 ? 12 : 16,
        HEADS = G < 4     ? G
                : SOFTMAX ? 2
                          : 4, /* of which logits are computed together */
        LANES = D / 8,         /* that have the columns of a row */
        ROWS = LINE / 2 / D,   /* of a line */
    };
};

struct decode_room {       /* shared memory */
    float *q, *far;        /* [D][PITCH] rotated to the row's position, to max_distance */
    float *x;              /* [group][D] as the map sees it */
    float *phi, *features; /* [group][F] projections, then features; [F][PITCH] the same */
    float *z;              /* [state heads][F] */
    float *work;           /* [entries of a piece][PITCH] logits, then weights; or sums to add */
    float *earlier;        /* [MAX_GROUP] what earlier pieces are multiplied by */
    float *total, *shift;  /* [MAX_GROUP] denominators; what was subtracted from logits */
};

/* An entry that is not in sight has this for a weight, which no other has. */
static constexpr float UNSEEN = -1;

DEVICE float low_half(uint32_t x) {
    return as_float(x << 16);
}
DEVICE float high_half(uint32_t x) {
    return as_float(x & 0xffff0000u);
}

/* `N` neighbouring floats, aligned to as many. */
template <int N> DEVICE void load_floats(float (&to)[N], const float *from) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            float4 x = *(const float4 *)(from + i);
            to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
        }
    } else if constexpr (N == 2) {
        float2 x = *(const float2 *)from;
        to[0] = x.x, to[1] = x.y;
    } else {
        to[0] = from[0];
    }
}

/* sum[g][c] += weight[g] times the 8 columns of a line that this lane has. */
template <int G, int N>
DEVICE void add_columns(float (&sum)[G][8], const float (&weight)[N], uint4 x) {
    uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int c = 0; c < 4; c++) {
        float low = low_half(words[c]), high = high_half(words[c]);
#pragma unroll
        for (int g = 0; g < G; g++) {
            sum[g][2 * c] = fmaf(weight[g], low, sum[g][2 * c]);
            sum[g][2 * c + 1] = fmaf(weight[g], high, sum[g][2 * c + 1]);
        }
    }
}

/* x[0 .. N) of two lanes that differ in bit `distance` are added: the upper one has the upper half
 * of the sums. */
template <int N> DEVICE void add_halves(float *x, int distance, int lane) {
    bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        float mine = upper ? x[i + N / 2] : x[i], other = upper ? x[i] : x[i + N / 2];
        x[i] = mine + __shfl_xor_sync(0xffffffffu, other, distance);
    }
}

/* ---- a unit begins ---- */

/* How much of the cache is in use, and how many keys count as max_distance behind: a warp's work.
 */
DEVICE void read_positions(const gpu_shape &s, decode_unit &u, int lane) {
    int64_t from = u.position / (s.window_size ? s.window_size : 1) * s.window_size;
    auto is_far = [&](int64_t key) { return s.max_distance && from - key > s.max_distance; };
    int cached = 0, clamped = lane < u.sinks && is_far(lane);
    for (int i = lane + 32; i < u.sinks; i += 32)
        clamped += is_far(i);
    for (int i = lane; i < u.cached; i += 32) {
        int64_t key = u.positions[i];
        cached += key >= 0;
        clamped += key >= 0 && is_far(key);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        cached += __shfl_xor_sync(0xffffffffu, cached, distance);
        clamped += __shfl_xor_sync(0xffffffffu, clamped, distance);
    }
    if (lane == 0) {
        u.cached = cached;
        u.clamped = clamped;
    }
}

/* Queries, normalisers, projections if there are any. */
template <int D, int G, bool SOFTMAX>
DEVICE void load_unit(const decode_job &j, decode_unit &u, const decode_room &m, int i_segment,
                      int kv_head) {
    enum { PITCH = decode_sizes<D, G, SOFTMAX>::PITCH, HALF = D / 2 };
    const gpu_shape &s = j.s;
    const gpu_rows &rows = j.rows;
    size_t row = (size_t)u.row;
    const float *q = rows.q + row * rows.q_row + (size_t)kv_head * s.group * D;
    for (int i = threadIdx.x; i < G * D; i += DECODE_THREADS) {
        int g = i / D, d = i % D, angle = d % HALF;
        float x = 0, turned = 0, far = 0;
        if (g < s.group) {
            float other = q[i ^ HALF];
            turned = x = q[i];
            if (s.rope)
                turned = rotated(x, other, d >= HALF, rows.cosines[row * HALF + angle],
                                 rows.sines[row * HALF + angle]);
            if (s.max_distance)
                far = rotated(x, other, d >= HALF, rows.far_cosines[angle], rows.far_sines[angle]);
        }
        m.q[d * PITCH + g] = turned;
        m.far[d * PITCH + g] = far;
        if (g < s.group) m.x[i] = s.map_before_rope ? x : turned;
    }
    if (!SOFTMAX && u.linear) {
        int F = s.features;
        for (int i = threadIdx.x; i < s.state_heads * F; i += DECODE_THREADS)
            m.z[i] = ((const float *)(u.states + (size_t)(i / F) * s.state_floats * sizeof(float)) +
                      s.S_floats)[i % F];
        const float *from = j.u + ((size_t)i_segment * s.n_heads + (size_t)kv_head * s.group) * s.f;
        for (int i = threadIdx.x; j.u && i < s.group * s.f; i += DECODE_THREADS)
            m.phi[i / s.f * F + i % s.f] = from[i];
    }
    if (!SOFTMAX && threadIdx.x < 32) read_positions(s, u, (int)threadIdx.x);
}

/* u = x W + bias of every query head, 4 columns and a part of the dimensions at a time. */
template <int D> DEVICE void project(const decode_job &j, const decode_room &m, int kv_head) {
    enum { PART = D / PROJECTION_PARTS };
    const gpu_shape &s = j.s;
    int quads = s.f / 4, columns = s.group * s.f;
    size_t first_head = (size_t)kv_head * s.group;
    for (int i = threadIdx.x; i < s.group * quads * PROJECTION_PARTS; i += DECODE_THREADS) {
        int g = i / quads % s.group, quad = i % quads, part = i / quads / s.group;
        const float *w =
            j.layer.map_q + ((first_head + g) * D + part * PART) * s.f_lanes + quad * 4;
        const float *x = m.x + g * D + part * PART;
        float4 u = {0, 0, 0, 0};
#pragma unroll 8
        for (int d = 0; d < PART; d++) {
            float4 column = *(const float4 *)(w + (size_t)d * s.f_lanes);
            u.x = fmaf(x[d], column.x, u.x), u.y = fmaf(x[d], column.y, u.y);
            u.z = fmaf(x[d], column.z, u.z), u.w = fmaf(x[d], column.w, u.w);
        }
        *(float4 *)(m.work + part * columns + g * s.f + quad * 4) = u;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < columns; i += DECODE_THREADS) {
        const float *part = m.work + i;
        float u = (part[0] + part[columns]) + (part[2 * columns] + part[3 * columns]);
        if (j.layer.map_q_bias) u += j.layer.map_q_bias[first_head * s.f_lanes + i];
        m.phi[i / s.f * s.features + i % s.f] = u;
    }
    __syncthreads();
}

/* ---- keys ---- */

/* Logits of one entry of the oldest tile, under the heads from g0 on: that of bits 1, 16, 8, 4 of
 * the lane. */
template <int D, int G, bool SOFTMAX, class Queue>
DEVICE void tile_logits(const Queue &queue, const float *q, int g0, int lane,
                        float (&logit)[decode_sizes<D, G, SOFTMAX>::HEADS]) {
    enum { PITCH = decode_sizes<D, G, SOFTMAX>::PITCH, HEADS = decode_sizes<D, G, SOFTMAX>::HEADS };
    enum { LOAD = HEADS == 3 ? 4 : HEADS };
    float sum[HEADS][8];
#pragma unroll
    for (int g = 0; g < HEADS; g++)
#pragma unroll
        for (int e = 0; e < 8; e++)
            sum[g][e] = 0;
#pragma unroll(D == 64 && !SOFTMAX ? 2 : 4) /* more take more registers than there are */
    for (int i = 0; i < D / 16; i++) {
        float weight[LOAD];
        load_floats(weight, q + (i * 16 + lane / 2) * PITCH + g0);
        add_columns<HEADS>(sum, weight, peek(queue, i));
    }
#pragma unroll
    for (int g = 0; g < HEADS; g++) {
        add_halves<8>(sum[g], 16, lane);
        add_halves<4>(sum[g], 8, lane);
        add_halves<2>(sum[g], 4, lane);
        logit[g] = sum[g][0] + __shfl_xor_sync(0xffffffffu, sum[g][0], 2);
    }
}

/* The logits of a piece's entries into m.work, -inf of those not in sight. */
template <int D, int G, bool SOFTMAX, class Queue>
DEVICE void score_keys(const decode_job &j, const decode_unit &u, const decode_room &m,
                       Queue &queue, int piece) {
    typedef decode_sizes<D, G, SOFTMAX> sizes;
    enum { PITCH = sizes::PITCH, HEADS = sizes::HEADS };
    int lane = queue.lane, tiles = tiles_of_piece(j, u, piece);
    int own = lane % 2 * 8 + lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2;
    float factor = 1 / sqrtf((float)D);
#pragma unroll 1
    for (int i = queue.warp; i < tiles; i += DECODE_WARPS) {
        int first = tile_of(u, piece * j.piece_tiles + i) * 16, entry = first + own;
        bool seen = is_seen(j.s, u, entry), mixed = first < u.clamped && u.clamped < first + 16;
        cp_async_wait<sizes::DEPTH - D / 16>();
#pragma unroll
        for (int g0 = 0; g0 < G; g0 += HEADS) {
            float logit[HEADS], far[HEADS];
            tile_logits<D, G, SOFTMAX>(queue, first < u.clamped && !mixed ? m.far : m.q, g0, lane,
                                       logit);
            if (mixed) {
                tile_logits<D, G, SOFTMAX>(queue, m.far, g0, lane, far);
#pragma unroll
                for (int g = 0; g < HEADS; g++)
                    if (entry < u.clamped) logit[g] = far[g];
            }
#pragma unroll
            for (int g = 0; g < HEADS; g++)
                if (!(lane & 2))
                    m.work[(i * 16 + own) * PITCH + g0 + g] = seen ? logit[g] * factor : -INFINITY;
        }
#pragma unroll 1
        for (int k = 0; k < D / 16; k++)
            ask(j, queue);
    }
}

/* ---- weights ---- */

/* A warp's row: logits become weights, and in the end its features are made.  top and sum: so far,
 * the same in every lane. */
template <int D, int G, bool SOFTMAX>
DEVICE void weigh(const decode_job &j, const decode_unit &u, const decode_room &m, int piece,
                  int head, int g, int lane, float &top, float &sum) {
    enum { PITCH = decode_sizes<D, G, SOFTMAX>::PITCH };
    const gpu_shape &s = j.s;
    int entries = tiles_of_piece(j, u, piece) * 16;
    bool last = !SOFTMAX || piece == u.n_pieces - 1, linear_part = !SOFTMAX && u.linear;
    float before = top, *phi = m.phi + g * s.features;
    for (int i = lane; i < entries; i += 32)
        top = fmaxf(top, m.work[i * PITCH + g]);
    top = warp_max(top);
    gpu_scales to = {top, 1, 0};
    if (last)
        to = mix_scales(s, top, linear_part ? map_reach(s, phi, lane) : -INFINITY,
                        j.layer.mix ? j.layer.mix + head : NULL);
    float base = to.shift == -INFINITY ? 0 : to.shift, more = 0;
    for (int i = lane; i < entries; i += 32) {
        float logit = m.work[i * PITCH + g], p = UNSEEN;
        if (logit != -INFINITY) more += p = expf(logit - base) * to.factor;
        m.work[i * PITCH + g] = p;
    }
    float earlier = expf(before - base) * to.factor;
    sum = sum * earlier + warp_sum(more);
    float linear = 0;
    if (linear_part) {
        map_query(s, phi, phi, to.log_scale, lane);
        __syncwarp();
        const float *z = m.z + (s.state_heads > 1 ? g * s.features : 0);
        for (int i = lane; i < s.features; i += 32) {
            m.features[i * PITCH + g] = phi[i];
            linear = fmaf(phi[i], z[i], linear);
        }
        linear = warp_sum(linear);
    }
    if (lane == 0) {
        m.earlier[g] = earlier;
        m.total[g] = sum + linear;
        m.shift[g] = base;
    }
}

/* ---- values and S ---- */

template <int D, int G, bool SOFTMAX, class Queue>
DEVICE void add_values(const decode_job &j, const decode_unit &u, const decode_room &m,
                       Queue &queue, int piece, float (&sum)[G][8]) {
    enum { PITCH = decode_sizes<D, G, SOFTMAX>::PITCH, ROWS = decode_sizes<D, G, SOFTMAX>::ROWS };
#pragma unroll
    for (int g = 0; g < G; g++)
#pragma unroll
        for (int c = 0; c < 8; c++)
            sum[g][c] = SOFTMAX && piece > 0 ? sum[g][c] * m.earlier[g] : 0;
    int lines = tiles_of_piece(j, u, piece) * (D / 16);
    const float *weights = m.work + queue.lane / (D / 8) * PITCH;
#pragma unroll 1
    for (int i = queue.warp; i < lines; i += DECODE_WARPS) {
        float weight[PITCH];
        uint4 x = take(j, queue);
        load_floats(weight, weights + i * ROWS * PITCH);
        /* what nobody sees may be anything, and 0 NaN is NaN */
        if (weight[0] == UNSEEN) x.x = x.y = x.z = x.w = 0;
        add_columns<G>(sum, weight, x);
    }
}

template <int D, int G, bool SOFTMAX, class Queue>
DEVICE void add_states(const decode_job &j, const decode_room &m, Queue &queue,
                       float (&sum)[G][8]) {
    enum { PITCH = decode_sizes<D, G, SOFTMAX>::PITCH, ROWS = decode_sizes<D, G, SOFTMAX>::ROWS };
    int lines = j.s.features / ROWS;
    const float *features = m.features + queue.lane / (D / 8) * PITCH;
    if (j.s.state_heads == 1) {
#pragma unroll 1
        for (int i = queue.warp; i < lines; i += DECODE_WARPS) {
            float weight[PITCH];
            uint4 x = take(j, queue);
            load_floats(weight, features + i * ROWS * PITCH);
            add_columns<G>(sum, weight, x);
        }
        return;
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
        float one[1][8], weight[1];
#pragma unroll
        for (int c = 0; c < 8; c++)
            one[0][c] = sum[g][c];
#pragma unroll 1
        for (int i = queue.warp; g < j.s.group && i < lines; i += DECODE_WARPS) {
            uint4 x = take(j, queue);
            weight[0] = features[i * ROWS * PITCH + g];
            add_columns<1>(one, weight, x);
        }
#pragma unroll
        for (int c = 0; c < 8; c++)
            sum[g][c] = one[0][c];
    }
}

/* ---- a unit ends ---- */

/* Sums over lanes, then over warps: 4 + 0, 5 + 1, 6 + 2, 7 + 3, and those in order.  m.work
 * [4][G][D]. */
template <int D, int G, bool SOFTMAX>
DEVICE void add_warps(const decode_room &m, float (&sum)[G][8], int warp, int lane) {
    enum { LEFT = D == 64 ? 2 : 4 }; /* columns of a lane after its fellows' are added */
    int column = lane % (D / 8) * 8 + lane / 16 * 4 + (D == 64 ? lane / 8 % 2 * 2 : 0);
#pragma unroll
    for (int g = 0; g < G; g++) {
        add_halves<8>(sum[g], 16, lane);
        if (D == 64) add_halves<4>(sum[g], 8, lane);
    }
    float *to = m.work + warp % 4 * G * D + column;
    __syncthreads(); /* weights have been read */
    if (warp >= 4)
#pragma unroll
        for (int g = 0; g < G; g++)
#pragma unroll
            for (int c = 0; c < LEFT; c++)
                to[g * D + c] = sum[g][c];
    __syncthreads();
    if (warp < 4)
#pragma unroll
        for (int g = 0; g < G; g++)
#pragma unroll
            for (int c = 0; c < LEFT; c++)
                to[g * D + c] += sum[g][c];
    __syncthreads();
}

DEVICE void write_y(const gpu_rows &rows, size_t at, float y) {
    if (rows.y_bf16)
        ((uint16_t *)rows.y)[at] = float_to_bf16(y);
    else
        ((float *)rows.y)[at] = y;
}

template <int D, int G, bool SOFTMAX>
DEVICE void write_unit(const decode_job &j, const decode_unit &u, const decode_room &m, int i,
                       int kv_head, int split) {
    for (int k = threadIdx.x; k < j.s.group * D; k += DECODE_THREADS) {
        int g = k / D, d = k % D;
        const float *sums = m.work + k;
        float y = ((sums[0] + sums[G * D]) + sums[2 * G * D]) + sums[3 * G * D];
        size_t head = (size_t)kv_head * j.s.group + g;
        if (j.partial) {
            float *to = j.partial + (((size_t)i * j.s.n_heads + head) * j.splits + split) * (D + 2);
            to[d] = y;
            if (d == 0) to[D] = m.total[g], to[D + 1] = m.shift[g];
        } else
            write_y(j.rows, (size_t)u.row * j.rows.y_row + head * D + d,
                    (y + 0.0f) / (m.total[g] + 1e-30f));
    }
}

template <int D> DEVICE void write_nothing(const decode_job &j, const decode_unit &u, int kv_head) {
    size_t head = (size_t)kv_head * j.s.group;
    for (int k = threadIdx.x; k < j.s.group * D && !j.partial; k += DECODE_THREADS)
        write_y(j.rows, (size_t)u.row * j.rows.y_row + head * D + k, 0);
}

template <int D, int G, bool SOFTMAX>
static __global__ void __launch_bounds__(DECODE_THREADS, (decode_sizes<D, G, SOFTMAX>::BLOCKS))
    decode_kernel(decode_job j) {
    typedef decode_sizes<D, G, SOFTMAX> sizes;
    DYNAMIC_SHARED(char, shared);
    int kv_head = (int)blockIdx.y, split = (int)blockIdx.z, first = (int)blockIdx.x * j.units;
    int n = j.n_segments - first < j.units ? j.n_segments - first : j.units;
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    decode_unit *units = (decode_unit *)(shared + j.at.units);
    decode_room m;
    m.q = (float *)(shared + j.at.q);
    m.far = (float *)(shared + j.at.far);
    m.x = (float *)(shared + j.at.x);
    m.phi = (float *)(shared + j.at.phi);
    m.features = (float *)(shared + j.at.features);
    m.z = (float *)(shared + j.at.z);
    m.work = (float *)(shared + j.at.work);
    m.earlier = (float *)(shared + j.at.heads);
    m.total = m.earlier + MAX_GROUP;
    m.shift = m.total + MAX_GROUP;

    for (int i = threadIdx.x; j.store && i < n * D; i += DECODE_THREADS) {
        gpu_segment segment = j.segments[first + i / D];
        if (segment.slot >= 0 && has_own_key(j, segment.position, split))
            store_element(j.s, place_of(j.s, segment.slot, j.layer.layer, kv_head), j.rows,
                          segment.first_row, kv_head, own_entry(j.s, segment.position), i % D);
    }
    if ((int)threadIdx.x < n)
        open_unit(j, first + (int)threadIdx.x, kv_head, split, units[threadIdx.x]);
    __syncthreads();
    decode_stream<D, sizes::DEPTH> queue;
    start(j, queue, units, n, (uint4 *)shared);

#pragma unroll 1
    for (int i = 0; i < n; i++) {
        decode_unit &u = units[i];
        if (u.n_pieces == 0) {
            write_nothing<D>(j, u, kv_head);
            continue;
        }
        load_unit<D, G, SOFTMAX>(j, u, m, first + i, kv_head);
        __syncthreads();
        if (!SOFTMAX && u.linear && !j.u) project<D>(j, m, kv_head);
        float sum[G][8], top = -INFINITY, total = 0;
        int pieces = SOFTMAX ? u.n_pieces : 1;
#pragma unroll 1
        for (int piece = 0; piece < pieces; piece++) {
            if (piece > 0) __syncthreads(); /* weights have been read */
            score_keys<D, G, SOFTMAX>(j, u, m, queue, piece);
            __syncthreads();
            if (warp < j.s.group)
                weigh<D, G, SOFTMAX>(j, u, m, piece, kv_head * j.s.group + warp, warp, lane, top,
                                     total);
            __syncthreads();
            add_values<D, G, SOFTMAX>(j, u, m, queue, piece, sum);
        }
        if (!SOFTMAX && u.linear) add_states<D, G, SOFTMAX>(j, m, queue, sum);
        add_warps<D, G, SOFTMAX>(m, sum, warp, lane);
        write_unit<D, G, SOFTMAX>(j, u, m, first + i, kv_head, split);
    }
}

/* ---- launch ---- */

bool decode_takes(const gpu_shape &s) {
    bool hedgehog = s.kind == ATTENTION_HEDGEHOG && s.window == WINDOW_TERRACED &&
                    s.features % 32 == 0 && s.features <= 256 && s.features == 2 * s.f &&
                    s.f == s.f_lanes && s.tiles <= TERRACED_TILES;
    return (hedgehog || (s.kind == ATTENTION_SOFTMAX)) && (s.head_dim == 64 || s.head_dim == 128) &&
           s.kv_bf16 && !s.exact && s.group <= MAX_GROUP &&
           (s.state_heads == 1 || s.state_heads == s.group);
}

template <int D, int G, bool SOFTMAX> static void launch(struct gpu *g, decode_job &j) {
    typedef decode_sizes<D, G, SOFTMAX> sizes;
    const gpu_shape &s = j.s;
    int piece = s.tiles < j.piece_tiles ? s.tiles : j.piece_tiles, at = 0;
    auto take = [&at](size_t bytes) {
        int here = at;
        at += (int)((bytes + 15) / 16 * 16);
        return here;
    };
    size_t F = (s.kind == ATTENTION_SOFTMAX) ? 0 : (size_t)s.features,
           work = (size_t)piece * 16 * sizes::PITCH;
    if (work < 4 * G * D) work = 4 * G * D;
    if (work < PROJECTION_PARTS * (size_t)s.group * F / 2)
        work = PROJECTION_PARTS * (size_t)s.group * F / 2;
    take((size_t)sizes::DEPTH * DECODE_THREADS * 16);
    j.at.q = take(D * sizes::PITCH * sizeof(float));
    j.at.far = take(D * sizes::PITCH * sizeof(float));
    j.at.x = take(G * D * sizeof(float));
    j.at.phi = take(s.group * F * sizeof(float));
    j.at.features = take(F * sizes::PITCH * sizeof(float));
    j.at.z = take(s.state_heads * F * sizeof(float));
    j.at.work = take(work * sizeof(float));
    j.at.heads = take(3 * MAX_GROUP * sizeof(float));
    int blocks = gpu_info(g)->n_processors * sizes::BLOCKS / (s.n_kv_heads * j.splits);
    if (blocks < 1) blocks = 1;
    j.units = (j.n_segments + blocks - 1) / blocks;
    if (j.units > MAX_UNITS) j.units = MAX_UNITS;
    j.at.units = take((size_t)j.units * sizeof(decode_unit));
    dim3 grid((unsigned)((j.n_segments + j.units - 1) / j.units), (unsigned)s.n_kv_heads,
              (unsigned)j.splits);
    LAUNCH(g, (decode_kernel<D, G, SOFTMAX>), grid, DECODE_THREADS, (size_t)at, j);
}

template <int D, bool SOFTMAX> static void launch_group(struct gpu *g, decode_job &j) {
    if (j.s.group == 1)
        launch<D, 1, SOFTMAX>(g, j);
    else if (j.s.group <= 3)
        launch<D, 3, SOFTMAX>(g, j);
    else if (j.s.group == 4)
        launch<D, 4, SOFTMAX>(g, j);
    else
        launch<D, 8, SOFTMAX>(g, j);
}

void decode_launch(struct gpu *g, decode_job j) {
    j.piece_tiles = (j.s.kind == ATTENTION_SOFTMAX) ? SOFTMAX_TILES : TERRACED_TILES;
    if (j.n_segments <= 0) return;
    if (j.s.head_dim == 64)
        j.s.kind == ATTENTION_SOFTMAX ? launch_group<64, true>(g, j)
                                      : launch_group<64, false>(g, j);
    else
        j.s.kind == ATTENTION_SOFTMAX ? launch_group<128, true>(g, j)
                                      : launch_group<128, false>(g, j);
}

extern "C" bool gpu_launch_decode(struct gpu *g, const struct gpu_shape *shape,
                                  const struct gpu_layer *layer, const struct gpu_segment *segments,
                                  int n_segments, const struct gpu_rows *rows) {
    if (!decode_takes(*shape)) return false;
    decode_job j = {};
    j.s = *shape;
    j.layer = *layer;
    j.segments = segments;
    j.n_segments = n_segments;
    j.rows = *rows;
    j.splits = 1;
    decode_launch(g, j);
    return true;
}
