/* gpu_decode.cu - y of generated rows: each segment is one row, and a block reads what a kv head
 * remembers once for all its query heads.
 *
 *   shapes  D 64 or 128, F a multiple of 32 up to 256, up to 8 query heads of a kv head, bf16 keys;
 *           terraced windows of up to 8,192 entries by query heads of a kv head, and softmax of any length
 *   launch  (groups of segments, kv heads, 1 or shares of a softmax sequence), 256 threads: as many
 *           blocks as the device holds at once, each with up to 16 segments one after the other
 *   bound   bytes: 4 D of every entry in sight (in tiles of 16), 2 F D of every state head, 4 F of
 *           z, 8 of every place of the cache.  Default model, 129 + 96 entries, 3 query heads:
 *           58 + 16 + 0.5 + 1 KB of a kv head.  8B with 257 entries and F = 256: 132 + 64 + 1 + 1
 * KB flight  up to 48 KB of a block and 3 blocks of a processor with D = 64, 64 KB and 2 with 128;
 *           3.35 TB/s take 18 KB of a processor at 700 ns
 *   work    of a tile of 16 keys or values, D = 64 and any group, about 130 instructions of a warp,
 *           in a time (2 KB of 25 GB/s) in which a processor can do 560
 *   twin    gpu_launch_answer(), of which it differs by the order of sums, and by 2^-18 of queries,
 *           weights and features
 *
 * A block's warps share the tiles of a piece.  All products are mma_bf16's, keys, values and hi
 * planes on the right as they are, what is exact in fp32 on the left in two halves:
 *   keys     logits of a tile
 *   weights  a warp for each query head: the largest logit, weights; after the last piece the
 *            features of its query, whose scale depends on it
 *   values   sums of a warp's tiles, of values and then of S
 * and at a unit's end the warps' sums are added.  Which warp has what, and the order of sums,
 * follow from the shape and the row's position: so bits do not depend on other segments or their
 * number. */
#include "attention/gpu_decode.cuh"

#include <stddef.h>

template <int D, bool SOFTMAX> struct decode_sizes {
    enum {
        BLOCKS = (D == 64 ? 3 : 2) - SOFTMAX, /* of a processor: sums live longer with softmax */
        DEPTH = (D == 64 ? 3 : 2) * (1 + SOFTMAX) /* tiles of a warp's queue */
    };
};

/* Left operands of mma_bf16 in shared memory, one for each query head and 16 numbers: 4 lanes have
 * 4 words each, so that lane 4 g + t reads what it needs of head g at once.  Numbers are split in
 * two, x = high + low to 2^-18: row g of the operand has the high halves, row g + 8 the low ones,
 * and the sums of both are added in the end. */
enum { OPERAND_FLOATS = 16 };

struct decode_room { /* shared memory */
    uint16_t *q,
        *far;       /* [group][D / 16] operands: rotated to the row's position, to max_distance */
    float *x;       /* [group][D] as the map sees it */
    float *phi;     /* [group][F] projections, then features, then [F / 16] operands of them */
    float *z;       /* [state heads][F] */
    float *work;    /* [group][pitch] logits, then operands of weights; or sums to add */
    float *earlier; /* [MAX_GROUP] what earlier pieces are multiplied by */
    float *total, *shift; /* [MAX_GROUP] denominators; what was subtracted from logits */
    int pitch;            /* entries of a piece */
};

/* Number k of an operand. */
DEVICE void put_number(uint16_t *operand, int k, float x) {
    uint16_t high = float_to_bf16(x);
    int at = k % 8 / 2 * 8 + k / 8 * 4 + k % 2;
    operand[at] = high;
    operand[at + 2] = float_to_bf16(x - bf16_to_float(high));
}

/* This lane's part of an operand: `tiles` of each head, from head 0's on; lanes of heads there are
 * not read another's, for rows nobody looks at. */
DEVICE void get_operand(uint32_t (&a)[4], const void *operands, int tile, int tiles, int group,
                        int lane) {
    int g = lane / 4 < group ? lane / 4 : group - 1;
    uint4 x = ((const uint4 *)operands)[(g * tiles + tile) * 4 + lane % 4];
    a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
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
template <int D, bool SOFTMAX>
DEVICE void load_unit(const decode_job &j, decode_unit &u, const decode_room &m, int kv_head) {
    enum { HALF = D / 2 };
    const gpu_shape &s = j.s;
    const gpu_rows &rows = j.rows;
    size_t row = (size_t)u.row;
    const float *q = rows.q + row * rows.q_row + (size_t)kv_head * s.group * D;
    for (int i = threadIdx.x; i < s.group * D; i += DECODE_THREADS) {
        int d = i % D, angle = d % HALF;
        float x = q[i], other = q[i ^ HALF], turned = x;
        if (s.rope)
            turned = rotated(x, other, d >= HALF, rows.cosines[row * HALF + angle],
                             rows.sines[row * HALF + angle]);
        put_number(m.q + i / 16 * (2 * OPERAND_FLOATS), i % 16, turned);
        if (s.max_distance)
            put_number(
                m.far + i / 16 * (2 * OPERAND_FLOATS), i % 16,
                rotated(x, other, d >= HALF, rows.far_cosines[angle], rows.far_sines[angle]));
        m.x[i] = s.map_before_rope ? x : turned;
    }
    if (!SOFTMAX && u.linear) {
        int F = s.features;
        for (int i = threadIdx.x; i < s.state_heads * F; i += DECODE_THREADS)
            m.z[i] = ((const float *)(u.states + (size_t)(i / F) * s.state_floats * sizeof(float)) +
                      s.S_floats)[i % F];
        const float *from = j.u + ((size_t)u.segment * s.n_heads + (size_t)kv_head * s.group) * s.f;
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

/* Logits of a tile: lane 4 g + t has those of head g at entries 2 t, 2 t + 1, 2 t + 8, 2 t + 9. */
template <int D>
DEVICE void tile_logits(const char *tile, const uint16_t *q, int group, int lane,
                        float (&logit)[4]) {
    float sum[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t a[4], b[4];
        get_operand(a, q, i, D / 16, group, lane);
        key_operands<D>(b, tile, i, lane);
        uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        mma_bf16(sum[0], a, first);
        mma_bf16(sum[1], a, second);
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        logit[2 * n] = sum[n][0] + sum[n][2];
        logit[2 * n + 1] = sum[n][1] + sum[n][3];
    }
}

/* The logits of a piece's entries into m.work, -inf of those not in sight: where this warp has read
 * the weights of the piece before, it and no other. */
template <int D, class Queue>
DEVICE void score_keys(const decode_job &j, const decode_unit &u, const decode_room &m,
                       Queue &queue, int piece) {
    int lane = queue.lane, group = j.s.group, tiles = tiles_of_piece(j, u, piece);
    float factor = 1 / sqrtf((float)D);
#pragma unroll 1
    for (int i = queue.warp; i < tiles; i += DECODE_WARPS) {
        int first = tile_of(u, piece * j.piece_tiles + i) * 16;
        const char *tile = oldest(queue);
        float logit[4], far[4];
        tile_logits<D>(tile, first + 16 <= u.clamped ? m.far : m.q, group, lane, logit);
        if (first < u.clamped && u.clamped < first + 16) { /* some of the tile */
            tile_logits<D>(tile, m.far, group, lane, far);
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (first + lane % 4 * 2 + k / 2 * 8 + k % 2 < u.clamped) logit[k] = far[k];
        }
        ask(j, queue);
        if (lane / 4 < group) {
            float *to = m.work + lane / 4 * m.pitch + i * 16;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int e = lane % 4 * 2 + k / 2 * 8 + k % 2;
                to[e] = is_seen(j.s, u, first + e) ? logit[k] * factor : -INFINITY;
            }
        }
    }
}

/* ---- weights ---- */

/* n numbers of a head, a multiple of 16, become operands where they are: by(x) of each. */
template <class By> DEVICE void make_operands(float *numbers, int n, int lane, By by) {
    for (int first = 0; first < n; first += 32) {
        int i = first + lane;
        float x = i < n ? by(numbers[i]) : 0;
        __syncwarp(); /* both tiles have been read */
        if (i < n) put_number((uint16_t *)numbers + i / 16 * (2 * OPERAND_FLOATS), i % 16, x);
    }
}

/* A warp's query head: logits become weights, and in the end features are made.  top and sum: so
 * far, the same in every lane. */
template <bool SOFTMAX>
DEVICE void weigh(const decode_job &j, const decode_unit &u, const decode_room &m, int piece,
                  int head, int g, int lane, float &top, float &sum) {
    const gpu_shape &s = j.s;
    int entries = tiles_of_piece(j, u, piece) * 16;
    bool last = !SOFTMAX || piece == u.n_pieces - 1, linear_part = !SOFTMAX && u.linear;
    float before = top, *phi = m.phi + g * s.features, *logits = m.work + g * m.pitch;
    for (int i = lane; i < entries; i += 32)
        top = fmaxf(top, logits[i]);
    top = warp_max(top);
    gpu_scales to = {top, 1, 0};
    if (last)
        to = mix_scales(s, top, linear_part ? map_reach(s, phi, lane) : -INFINITY,
                        j.layer.mix ? j.layer.mix + head : NULL);
    float base = to.shift == -INFINITY ? 0 : to.shift, more = 0;
    make_operands(logits, entries, lane, [&](float logit) {
        float p = expf(logit - base) * to.factor;
        more += p;
        return p;
    });
    float earlier = SOFTMAX ? expf(before - base) * to.factor : 0;
    sum = SOFTMAX ? sum * earlier + warp_sum(more) : warp_sum(more);
    float linear = 0;
    if (linear_part) {
        map_query(s, phi, phi, to.log_scale, lane);
        __syncwarp();
        const float *z = m.z + (s.state_heads > 1 ? g * s.features : 0);
        for (int i = lane; i < s.features; i += 32)
            linear = fmaf(phi[i], z[i], linear);
        linear = warp_sum(linear);
        make_operands(phi, s.features, lane, [](float x) { return x; });
    }
    if (lane == 0) {
        m.earlier[g] = earlier;
        m.total[g] = sum + linear;
        m.shift[g] = base;
    }
}

/* ---- values and S ---- */

/* sum[n]: lane 4 g + t has columns 8 n + 2 t, + 1 of head g, of high halves and of low ones. */
template <int D>
DEVICE void add_tile(float (&sum)[D / 8][4], const uint32_t (&a)[4], const char *tile, int lane,
                     uint32_t seen) {
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t b[4];
        row_operands<D>(b, tile, i, lane);
        if (seen != 0xffff) { /* what nobody sees may be anything, and 0 NaN is NaN */
            uint32_t low = seen >> (lane % 4 * 2), high = low >> 8;
            low = (low & 1 ? 0xffffu : 0) | (low & 2 ? 0xffff0000u : 0);
            high = (high & 1 ? 0xffffu : 0) | (high & 2 ? 0xffff0000u : 0);
            b[0] &= low, b[1] &= high, b[2] &= low, b[3] &= high;
        }
        uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        mma_bf16(sum[2 * i], a, first);
        mma_bf16(sum[2 * i + 1], a, second);
    }
}

template <int D, bool SOFTMAX, class Queue>
DEVICE void add_values(const decode_job &j, const decode_unit &u, const decode_room &m,
                       Queue &queue, int piece, float (&sum)[D / 8][4]) {
    int lane = queue.lane, group = j.s.group, tiles = tiles_of_piece(j, u, piece);
    float earlier = 0;
    if (SOFTMAX && piece > 0) earlier = m.earlier[lane / 4 < group ? lane / 4 : 0];
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            sum[n][k] = SOFTMAX && piece > 0 ? sum[n][k] * earlier : 0;
#pragma unroll 1
    for (int i = queue.warp; i < tiles; i += DECODE_WARPS) {
        int first = tile_of(u, piece * j.piece_tiles + i) * 16;
        uint32_t a[4], seen = __ballot_sync(0xffffffffu, is_seen(j.s, u, first + lane % 16));
        const char *tile = oldest(queue);
        get_operand(a, m.work, i, m.pitch / 16, group, lane);
        add_tile<D>(sum, a, tile, lane, seen & 0xffff);
        ask(j, queue);
    }
}

template <int D, class Queue>
DEVICE void add_states(const decode_job &j, const decode_room &m, Queue &queue,
                       float (&sum)[D / 8][4]) {
    int lane = queue.lane, group = j.s.group, tiles = j.s.features / 16;
#pragma unroll 1
    for (int h = 0; h < j.s.state_heads; h++)
#pragma unroll 1
        for (int i = queue.warp; i < tiles; i += DECODE_WARPS) {
            uint32_t a[4];
            const char *tile = oldest(queue);
            get_operand(a, m.phi, i, tiles, group, lane);
            if (j.s.state_heads > 1 && h != lane / 4) a[0] = a[1] = a[2] = a[3] = 0;
            add_tile<D>(sum, a, tile, lane, 0xffff);
            ask(j, queue);
        }
}

/* ---- a unit ends ---- */

/* Sums over warps: 4 + 0, 5 + 1, 6 + 2, 7 + 3, and those in order.  m.work [4][group][D]. */
template <int D>
DEVICE void add_warps(const decode_room &m, const float (&sum)[D / 8][4], int group, int warp,
                      int lane) {
    float *to = m.work + (warp % 4 * group + lane / 4) * D + lane % 4 * 2;
    __syncthreads(); /* weights have been read */
    if (warp >= 4 && lane / 4 < group)
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            to[8 * n] = sum[n][0] + sum[n][2];
            to[8 * n + 1] = sum[n][1] + sum[n][3];
        }
    __syncthreads();
    if (warp < 4 && lane / 4 < group)
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            to[8 * n] += sum[n][0] + sum[n][2];
            to[8 * n + 1] += sum[n][1] + sum[n][3];
        }
    __syncthreads();
}

DEVICE void write_y(const gpu_rows &rows, size_t at, float y) {
    if (rows.y_bf16)
        ((uint16_t *)rows.y)[at] = float_to_bf16(y);
    else
        ((float *)rows.y)[at] = y;
}

template <int D, bool SOFTMAX>
DEVICE void write_unit(const decode_job &j, const decode_unit &u, const decode_room &m, int kv_head,
                       int split) {
#pragma unroll 1
    for (int k = threadIdx.x; k < j.s.group * D; k += DECODE_THREADS) {
        int g = k / D, d = k % D;
        const float *sums = m.work + k;
        int next = j.s.group * D;
        float y = ((sums[0] + sums[next]) + sums[2 * next]) + sums[3 * next];
        size_t head = (size_t)kv_head * j.s.group + g;
        if (SOFTMAX && j.partial) {
            float *to =
                j.partial + (((size_t)u.segment * j.s.n_heads + head) * j.splits + split) * (D + 2);
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

template <int D, bool SOFTMAX>
static __global__ void __launch_bounds__(DECODE_THREADS, (decode_sizes<D, SOFTMAX>::BLOCKS))
    decode_kernel(decode_job j) {
    DYNAMIC_SHARED(char, shared);
    int kv_head = (int)blockIdx.y, split = (int)blockIdx.z, first = (int)blockIdx.x * j.units;
    int n = j.n_segments - first < j.units ? j.n_segments - first : j.units;
    decode_unit *units = (decode_unit *)(shared + j.at.units);
    decode_room m;
    m.q = (uint16_t *)(shared + j.at.q);
    m.far = (uint16_t *)(shared + j.at.far);
    m.x = (float *)(shared + j.at.x);
    m.phi = (float *)(shared + j.at.phi);
    m.pitch = j.pitch;
    m.z = (float *)(shared + j.at.z);
    m.work = (float *)(shared + j.at.work);
    m.earlier = (float *)(shared + j.at.heads);
    m.total = m.earlier + MAX_GROUP;
    m.shift = m.total + MAX_GROUP;

    for (int i = threadIdx.x; j.store && i < n * D; i += DECODE_THREADS) {
        gpu_segment segment = j.segments[first + i / D];
        if (segment.slot < 0 || !has_own_key(j, segment.position, split)) continue;
        gpu_place place = place_of(j.s, segment.slot, j.layer.layer, kv_head);
        store_element(j.s, place, j.rows, segment.first_row, kv_head,
                      own_entry(j.s, place.cache, segment.position), i % D);
    }
    if ((int)threadIdx.x < n)
        open_unit(j, first + (int)threadIdx.x, kv_head, split, units[threadIdx.x]);
    __syncthreads();
    decode_stream<D, decode_sizes<D, SOFTMAX>::DEPTH> queue;
    start(j, queue, units, n, shared);

#pragma unroll 1
    for (int i = 0; i < queue.n_units; i++) {
        decode_unit &u = units[i];
        if (u.n_pieces == 0) {
            write_nothing<D>(j, u, kv_head);
            continue;
        }
        load_unit<D, SOFTMAX>(j, u, m, kv_head);
        __syncthreads();
        if (!SOFTMAX && u.linear && !j.u) project<D>(j, m, kv_head);
        float sum[D / 8][4], top = -INFINITY, total = 0;
        int pieces = SOFTMAX ? u.n_pieces : 1;
#pragma unroll 1
        for (int piece = 0; piece < pieces; piece++) {
            score_keys<D>(j, u, m, queue, piece);
            __syncthreads();
            if (queue.warp < j.s.group)
                weigh<SOFTMAX>(j, u, m, piece, kv_head * j.s.group + queue.warp, queue.warp,
                               queue.lane, top, total);
            __syncthreads();
            add_values<D, SOFTMAX>(j, u, m, queue, piece, sum);
        }
        if (!SOFTMAX && u.linear) add_states<D>(j, m, queue, sum);
        add_warps<D>(m, sum, j.s.group, queue.warp, queue.lane);
        write_unit<D, SOFTMAX>(j, u, m, kv_head, split);
    }
}

/* ---- launch ---- */

int most_tiles(const gpu_shape &s) {
    return (s.most_entries + 15) / 16;
}

bool decode_takes(const gpu_shape &s) {
    bool hedgehog = s.kind == ATTENTION_HEDGEHOG && s.window == WINDOW_TERRACED &&
                    s.features % 32 == 0 && s.features <= 256 && s.features == 2 * s.f &&
                    s.f == s.f_lanes && 16 * most_tiles(s) * s.group <= TERRACED_LOGITS;
    return (hedgehog || (s.kind == ATTENTION_SOFTMAX)) && (s.head_dim == 64 || s.head_dim == 128) &&
           s.kv_bf16 && !s.exact && s.group <= MAX_GROUP &&
           (s.state_heads == 1 || s.state_heads == s.group);
}

template <int D, bool SOFTMAX> static void launch(struct gpu *g, decode_job &j) {
    typedef decode_sizes<D, SOFTMAX> sizes;
    const gpu_shape &s = j.s;
    int at = 0;
    auto take = [&at](size_t bytes) {
        int here = at;
        at += (int)((bytes + 15) / 16 * 16);
        return here;
    };
    size_t F = SOFTMAX ? 0 : (size_t)s.features, group = (size_t)s.group;
    j.piece_tiles = SOFTMAX ? SOFTMAX_TILES : most_tiles(s);
    j.pitch = 16 * (most_tiles(s) < j.piece_tiles ? most_tiles(s) : j.piece_tiles);
    size_t work = group * j.pitch; /* floats */
    if (work < 4 * group * D) work = 4 * group * D;
    if (work < PROJECTION_PARTS * group * F / 2) work = PROJECTION_PARTS * group * F / 2;
    take((size_t)DECODE_WARPS * sizes::DEPTH * 32 * D);
    j.at.q = take(group * D * sizeof(float));
    j.at.far = take(group * D * sizeof(float));
    j.at.x = take(group * D * sizeof(float));
    j.at.phi = take(group * F * sizeof(float));
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
    LAUNCH(g, (decode_kernel<D, SOFTMAX>), grid, DECODE_THREADS, (size_t)at, j);
}

void decode_launch(struct gpu *g, decode_job j) {
    bool softmax = j.s.kind == ATTENTION_SOFTMAX;
    if (j.n_segments <= 0) return;
    if (j.s.head_dim == 64)
        softmax ? launch<64, true>(g, j) : launch<64, false>(g, j);
    else
        softmax ? launch<128, true>(g, j) : launch<128, false>(g, j);
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
