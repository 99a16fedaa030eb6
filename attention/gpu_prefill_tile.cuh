/* gpu_prefill_tile.cuh - how gpu_prefill.cu cuts its work, what its rows see, and how operands of
 * mma_bf16 come out of shared memory.
 *
 * Rows have an index: their place in the block of a terraced window, with softmax their position.
 * Tiles of rows begin at multiples of their size, tiles of entries at multiples of KEYS, whatever
 * part of a block or prompt is asked for. */
#ifndef URCHIN_ATTENTION_GPU_PREFILL_TILE_CUH
#define URCHIN_ATTENTION_GPU_PREFILL_TILE_CUH

#include "attention/gpu_device.cuh"

enum {
    PREFILL_THREADS = 128,
    PREFILL_WARPS = PREFILL_THREADS / 32,
    KEYS = 32,       /* entries of a stage */
    S_ROWS = 64,     /* features of a stage */
    STAGES = 3,      /* one read, two under way */
    MOST_F = 128,    /* projections */
    NEVER = 1 << 30, /* above any row index */
};

/* The same for every block of a launch. */
struct prefill_plan {
    int heads;        /* of a kv head that a block answers: 1 or 2 */
    int head_groups;  /* of a kv head */
    int tile_rows;    /* of one head: 16 M warps / heads, a power of 2 */
    int map_row;      /* bytes of a row of W, of one half */
    int phi_row;      /* bytes of a row of features */
    int region_bytes; /* shared memory of a warp: queries, features */
    int stage_bytes;
};

/* What a block of threads answers. */
struct prefill_task {
    gpu_place place;
    int first_head, n_heads; /* query heads */
    int tile, first, last;   /* index of the tile's first row; of those asked for */
    int first_row;           /* what index `first` is in the step's rows */
    bool linear;
    /* of the block of the window that the rows lie in */
    int sinks, cached, clamped, now; /* as gpu_view; now: the half of the ring that grows */
    bool before;                     /* the other half is full, not empty */
    int entries;                     /* one past the last that the last row sees */
};

/* ---- shared memory ---- */

/* Rows of a multiple of 128 bytes: the 16-byte pieces of 8 neighbouring rows lie in different banks
 * wherever a piece is in its row. */
DEVICE char *swizzled(char *base, int row, int piece, int row_bytes) {
    return base + row * row_bytes + ((piece ^ (row & 7)) << 4);
}
DEVICE char *swizzled_element(char *base, int row, int element, int row_bytes) {
    return swizzled(base, row, element >> 3, row_bytes) + (element & 7) * 2;
}

/* Of a tile of 16 keys, [D][16]: rows of two pieces. */
DEVICE char *key_piece(char *base, int d, int piece) {
    return base + d * 32 + ((piece ^ (d >> 2 & 1)) << 4);
}

/* The lane's place in a matrix of 16 x 16 whose corner is (row, element), both multiples of 16: so
 * that no more than four offsets depend on the lane, whatever is unrolled. */
DEVICE char *matrix_row(char *base, int row, int element, int row_bytes, int lane) {
    int piece = element >> 3, swizzle = ((lane / 16 ^ (lane & 7)) << 4) ^ ((piece & 7) << 4);
    return base + (lane % 16 * row_bytes + swizzle) + (row * row_bytes + (piece >> 3) * 128);
}

/* Rows of 16, k of 16, from [row][k]: the left operand. */
DEVICE void load_left(uint32_t (&a)[4], char *base, int row, int k, int row_bytes, int lane) {
    ldmatrix4(a, matrix_row(base, row, k, row_bytes, lane));
}

/* k of 16, columns of 16, from [k][column]: two right operands, columns 0-7 and 8-15. */
DEVICE void load_right(uint32_t (&low)[2], uint32_t (&high)[2], char *base, int k, int column,
                       int row_bytes, int lane) {
    uint32_t r[4];
    ldmatrix4_t(r, matrix_row(base, k, column, row_bytes, lane));
    low[0] = r[0], low[1] = r[1], high[0] = r[2], high[1] = r[3];
}
DEVICE void load_keys(uint32_t (&low)[2], uint32_t (&high)[2], char *tile, int d, int lane) {
    uint32_t r[4];
    ldmatrix4_t(r, key_piece(tile, lane % 16, lane / 16) + d * 32);
    low[0] = r[0], low[1] = r[1], high[0] = r[2], high[1] = r[3];
}

/* Two numbers as two bf16 each that together are within 2^-17 of them. */
DEVICE void split_bf16(float x, float y, uint32_t &high, uint32_t &low) {
    high = pack_bf16(x, y);
    low = pack_bf16(x - as_float(high << 16), y - as_float(high & 0xffff0000u));
}

/* Over the four lanes that share a row of an accumulator. */
DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* ---- what rows see ---- */

DEVICE int row_index(const gpu_shape &s, int64_t position) {
    return (int)(is_softmax(s) ? position : position % s.window_size);
}

/* Index of the first row that sees an entry. */
DEVICE int first_that_sees(const gpu_shape &s, const prefill_task &t, int entry) {
    int place = entry - s.sinks - t.place.cache;
    if (place < 0)
        return entry < t.sinks || (unsigned)(entry - s.sinks) < (unsigned)t.cached ? 0 : NEVER;
    if (place >= s.ring) return NEVER;
    if (is_softmax(s)) return place;
    int half = place >= s.window_size;
    if (half == t.now) return place - half * s.window_size;
    return t.before ? 0 : NEVER;
}

/* view_of(), by all lanes at once; t.place and t.last are set. */
DEVICE void look_around(const gpu_shape &s, prefill_task &t, int64_t position, int lane) {
    t.sinks = t.cached = t.clamped = t.now = 0;
    t.before = false;
    t.entries = t.last + 1;
    if (is_softmax(s)) return;
    int64_t w = s.window_size, block = position / w;
    int64_t near = s.max_distance ? block * w - s.max_distance : 0; /* not clamped from here on */
    for (int i = lane; i < t.place.cache; i += 32) {
        int64_t key = t.place.positions[i];
        t.cached += key >= 0;
        t.clamped += key >= 0 && key < near;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        t.cached += __shfl_xor_sync(0xffffffffu, t.cached, distance);
        t.clamped += __shfl_xor_sync(0xffffffffu, t.clamped, distance);
    }
    t.sinks = block >= 2 ? s.sinks : 0;
    t.clamped += near < 0 ? 0 : near < t.sinks ? (int)near : t.sinks;
    t.now = (int)(block % 2);
    t.before = block >= 1;
    int ring = s.sinks + t.place.cache;
    int end = ring + t.now * (int)w + t.last + 1; /* of the half that grows */
    t.entries = t.before && !t.now ? ring + 2 * (int)w : end;
}

/* ---- stages: tiles of S, then of keys and values ---- */

/* Each thread copies pieces of 16 bytes; the stage is complete after a wait and a barrier. */
template <int D>
DEVICE void fetch_S(const gpu_shape &s, const uint16_t *S, int first, char *stage) {
    enum { STEP = PREFILL_THREADS / (D / 8) }; /* rows, 8 or 16 */
    int rows = s.features - first < S_ROWS ? s.features - first : S_ROWS;
    char *to = swizzled(stage, (int)threadIdx.x / (D / 8), (int)threadIdx.x % (D / 8), D * 2);
    const uint16_t *from = S + (size_t)first * D + (size_t)threadIdx.x * 8;
#pragma unroll
    for (int k = 0; k < S_ROWS / STEP; k++) {
        int row = (int)threadIdx.x / (D / 8) + k * STEP;
        if (row < rows) cp_async16(to + k * STEP * D * 2, from + k * STEP * D);
    }
}

/* What no row asked for sees may be anything: values are set to zero, because 0 NaN is NaN; scores
 * are masked. */
template <int D>
DEVICE void fetch_keys(const gpu_shape &s, const prefill_task &t, int first, bool values,
                       char *stage) {
    enum { BYTES = KEYS * D * 2, PIECES = BYTES / 16 / PREFILL_THREADS };
    enum { STEP = PREFILL_THREADS / (D / 8) };
    int thread = (int)threadIdx.x;
    size_t corner = (size_t)first * D * 2 + (size_t)thread * 16; /* of keys and of values */
    const char *keys = t.place.turned + corner;
    char *to = key_piece(stage, thread / 2, thread % 2);
#pragma unroll
    for (int k = 0; k < PIECES; k++)
        if (first + k * PREFILL_THREADS / (2 * D) * 16 < t.entries)
            cp_async16(to + k * PREFILL_THREADS * 16, keys + k * PREFILL_THREADS * 16);
    if (!values) return;
    const char *from = t.place.values + corner;
    unsigned seen =
        __ballot_sync(0xffffffffu, first_that_sees(s, t, first + thread % 32) <= t.last);
    to = swizzled(stage + BYTES, thread / (D / 8), thread % (D / 8), D * 2);
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        char *at = to + k * STEP * D * 2;
        if (seen >> (thread / (D / 8) + k * STEP) & 1)
            cp_async16(at, from + k * STEP * D * 2);
        else
            *(uint4 *)at = uint4{0, 0, 0, 0};
    }
}

#endif
