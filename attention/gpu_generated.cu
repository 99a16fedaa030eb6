/* gpu_generated.cu - what goes before and after the decode kernel (gpu_decode.cu) when there is
 * scratch memory.
 *
 * prepare: rows enter the memory and queries are projected, u = x W, before many segments are
 * answered: the decode kernel alone would read the maps, 4 D f of a head, for every row.
 *   launch  (tiles of 16 segments, query heads and kv heads), 256 threads
 *   bound   fp32 arithmetic: D f multiply-adds of a row and head; the maps come from the second
 *           cache, 4 D f for 16 rows
 *   twin    kernels.c, projection; bits are those of the decode kernel's own projection
 *
 * combine: y of a softmax row from what the blocks that shared its sequence found.
 *   launch  (query heads, segments), 128 threads
 *   bound   latency; 4 (D + 2) bytes of each share */
#include "attention/gpu_decode.cuh"

enum { PREPARE_THREADS = 256, PREPARE_ROWS = 16, COMBINE_THREADS = 128 };
enum { FEW = 8 }; /* segments for which the maps may be read once each */

/* ---- prepare ---- */

struct prepare_task {
    int first, n; /* segments */
    int head;
};

/* x [D][PREPARE_ROWS] as the map sees it. */
DEVICE void load_rows(const decode_job &j, const prepare_task &t, float *x) {
    const gpu_shape &s = j.s;
    int D = s.head_dim, half = D / 2;
    for (int i = threadIdx.x; i < D * PREPARE_ROWS; i += PREPARE_THREADS) {
        int r = i / D, d = i % D, angle = d % half;
        float value = 0;
        if (r < t.n && j.segments[t.first + r].slot >= 0) {
            size_t row = (size_t)j.segments[t.first + r].first_row;
            const float *q = j.rows.q + row * j.rows.q_row + (size_t)t.head * D;
            value = q[d];
            if (s.rope && !s.map_before_rope)
                value = rotated(value, q[d ^ half], d >= half, j.rows.cosines[row * half + angle],
                                j.rows.sines[row * half + angle]);
        }
        x[d * PREPARE_ROWS + r] = value;
    }
}

DEVICE void project_rows(const decode_job &j, const prepare_task &t, float *x, float *parts,
                         float *u) {
    const gpu_shape &s = j.s;
    int D = s.head_dim, part_of_D = D / PROJECTION_PARTS, size = PREPARE_ROWS * s.f;
    load_rows(j, t, x);
    __syncthreads();
    for (int i = threadIdx.x; i < s.f * PROJECTION_PARTS; i += PREPARE_THREADS) {
        int column = i % s.f, part = i / s.f;
        const float *w =
            j.layer.map_q + ((size_t)t.head * D + part * part_of_D) * s.f_lanes + column;
        const float *from = x + part * part_of_D * PREPARE_ROWS;
        float sum[PREPARE_ROWS];
#pragma unroll
        for (int r = 0; r < PREPARE_ROWS; r++)
            sum[r] = 0;
#pragma unroll 8
        for (int d = 0; d < part_of_D; d++) {
            float weight = w[(size_t)d * s.f_lanes];
#pragma unroll
            for (int r = 0; r < PREPARE_ROWS; r += 4) {
                float4 four = *(const float4 *)(from + d * PREPARE_ROWS + r);
                sum[r] = fmaf(four.x, weight, sum[r]);
                sum[r + 1] = fmaf(four.y, weight, sum[r + 1]);
                sum[r + 2] = fmaf(four.z, weight, sum[r + 2]);
                sum[r + 3] = fmaf(four.w, weight, sum[r + 3]);
            }
        }
#pragma unroll
        for (int r = 0; r < PREPARE_ROWS; r++)
            parts[part * size + r * s.f + column] = sum[r];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < t.n * s.f; i += PREPARE_THREADS) {
        const float *part = parts + i;
        float sum = (part[0] + part[size]) + (part[2 * size] + part[3 * size]);
        int r = i / s.f, column = i % s.f;
        if (j.layer.map_q_bias) sum += j.layer.map_q_bias[(size_t)t.head * s.f_lanes + column];
        u[((size_t)(t.first + r) * s.n_heads + t.head) * s.f + column] = sum;
    }
}

DEVICE void store_rows(const decode_job &j, const prepare_task &t, int kv_head) {
    const gpu_shape &s = j.s;
    for (int i = threadIdx.x; i < t.n * s.lanes; i += PREPARE_THREADS) {
        gpu_segment segment = j.segments[t.first + i / s.lanes];
        if (segment.slot < 0 || segment.position < 0) continue;
        gpu_place m = place_of(s, segment.slot, j.layer.layer, kv_head);
        store_element(s, m, j.rows, segment.first_row, kv_head,
                      own_entry(s, m.cache, segment.position), i % s.lanes);
    }
}

static __global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(decode_job j, float *u) {
    DYNAMIC_SHARED(float, shared);
    prepare_task t;
    t.first = (int)blockIdx.x * PREPARE_ROWS;
    t.n = j.n_segments - t.first < PREPARE_ROWS ? j.n_segments - t.first : PREPARE_ROWS;
    t.head = (int)blockIdx.y;
    if (t.head < j.s.n_heads)
        project_rows(j, t, shared, shared + j.s.head_dim * PREPARE_ROWS, u);
    else
        store_rows(j, t, t.head - j.s.n_heads);
}

/* ---- combine ---- */

static __global__ void __launch_bounds__(COMBINE_THREADS) combine_kernel(decode_job j) {
    int D = j.s.head_dim, head = (int)blockIdx.x, d = (int)threadIdx.x;
    gpu_segment segment = j.segments[blockIdx.y];
    if (d >= D) return;
    float y = 0, total = 0, top = -INFINITY;
    if (segment.slot >= 0 && segment.position >= 0) {
        int64_t pieces = softmax_pieces(segment.position);
        int n = pieces < j.splits ? (int)pieces : j.splits;
        const float *from =
            j.partial + ((size_t)blockIdx.y * j.s.n_heads + head) * j.splits * (D + 2);
        for (int i = 0; i < n; i++)
            top = fmaxf(top, from[i * (D + 2) + D + 1]);
        for (int i = 0; i < n; i++) {
            const float *share = from + i * (D + 2);
            float weight = expf(share[D + 1] - top);
            y = fmaf(weight, share[d], y);
            total = fmaf(weight, share[D], total);
        }
    }
    y = (y + 0.0f) / (total + 1e-30f);
    size_t at = (size_t)segment.first_row * j.rows.y_row + (size_t)head * D + d;
    if (j.rows.y_bf16)
        ((uint16_t *)j.rows.y)[at] = float_to_bf16(y);
    else
        ((float *)j.rows.y)[at] = y;
}

/* ---- launch ---- */

/* Blocks that share a softmax sequence: no more than it can have pieces. */
static int shares(const gpu_shape &s) {
    int pieces = (most_tiles(s) + SOFTMAX_TILES - 1) / SOFTMAX_TILES;
    return s.kind != ATTENTION_SOFTMAX ? 1 : pieces < MAX_SPLITS ? pieces : MAX_SPLITS;
}

extern "C" size_t gpu_generated_scratch_bytes(const struct gpu_shape *shape, int n_segments) {
    size_t rows = (size_t)n_segments * shape->n_heads, D = shape->head_dim;
    if (!decode_takes(*shape)) return 0;
    return rows * sizeof(float) *
           (shape->kind == ATTENTION_SOFTMAX ? shares(*shape) * (D + 2) : (size_t)shape->f);
}

extern "C" bool gpu_launch_generated(struct gpu *g, const struct gpu_shape *shape,
                                     const struct gpu_layer *layer,
                                     const struct gpu_segment *segments, int n_segments,
                                     const struct gpu_rows *rows, void *scratch) {
    const gpu_shape &s = *shape;
    if (!decode_takes(s)) return false;
    if (n_segments <= 0) return true;
    decode_job j = {};
    j.s = s;
    j.layer = *layer;
    j.segments = segments;
    j.n_segments = n_segments;
    j.rows = *rows;
    j.splits = shares(s);
    j.store = 1;
    if (j.splits > 1) j.partial = (float *)scratch;
    if (s.kind != ATTENTION_SOFTMAX && n_segments > FEW) {
        size_t floats = (size_t)PREPARE_ROWS * (s.head_dim + PROJECTION_PARTS * s.f);
        dim3 grid((unsigned)((n_segments + PREPARE_ROWS - 1) / PREPARE_ROWS),
                  (unsigned)(s.n_heads + s.n_kv_heads), 1);
        LAUNCH(g, prepare_kernel, grid, PREPARE_THREADS, floats * sizeof(float), j,
               (float *)scratch);
        j.store = 0;
        j.u = (const float *)scratch;
    }
    decode_launch(g, j);
    if (j.partial)
        LAUNCH(g, combine_kernel, dim3((unsigned)s.n_heads, (unsigned)n_segments, 1),
               COMBINE_THREADS, 0, j);
    return true;
}

extern "C" size_t gpu_decode_bytes(const struct gpu_shape *shape, int64_t position) {
    const gpu_shape &s = *shape;
    if (!decode_takes(s)) return 0;
    size_t D = s.head_dim, entries = (size_t)position + 1, states = 0;
    int64_t cache = s.most_cache;
    if (s.kind != ATTENTION_SOFTMAX) {
        int64_t w = s.window_size, block = position / w, left = (block - 1) * w - s.sinks;
        entries = (size_t)(position - (block >= 1 ? block - 1 : 0) * w + 1);
        if (block >= 2) entries += s.sinks + (left < cache ? (left > 0 ? left : 0) : cache);
        if (left > cache) states = (size_t)s.state_heads * (2 * s.S_floats + 4 * s.phi_lanes);
    }
    return s.n_kv_heads * (4 * D * entries + states + 8 * cache);
}
