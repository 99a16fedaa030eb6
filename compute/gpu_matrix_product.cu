/* gpu_matrix_product.cu - y = x W^T + bias for generated rows: every weight is read once per 64
 * rows.
 *
 * bf16, fp8, int8, int4 weights.  W is the A operand of mma m16n8k16 (16 rows n), rows of x are the
 * 8 columns of B, so that one row of x costs no more loads of W than eight.  A block of threads
 * makes 16 M columns n of y for 8 N rows of x.  Its P warps split k: warp p sums blocks b of 32 k,
 *   n_blocks p / P <= b < n_blocks (p + 1) / P,  ascending,
 * in the fp32 accumulators of the mma; the P sums are added as
 *   ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)),  then the bias.
 * For fp8 the whole sum, of products with q alone, is multiplied by the scale of row n before the
 * bias is added.
 * P depends on n_in alone, and a column of an mma on nothing but itself: whatever M, N, the number
 * of rows or the place of a row, its bits are the same.  M and N are free to suit the moment.
 *
 * Loads.  Each warp has its own ring in shared memory, filled by cp.async, of steps of one block of
 * 32 k: M records of W, and of 8 N rows of x 64 bytes each (layouts: gpu_matrix_device.cuh).  A
 * lane reads back the 16 bytes of x and of bf16 W that it copied itself, of records what lanes of
 * its warp copied: __syncwarp is all that orders a ring, and no warp waits for another before the
 * last sums.
 * Bytes in flight: a memory of 3.35 TB/s that answers in 1 us has 3.35 MB on its way, 25 KB for
 * each of 132 processors.  One row of x, bf16, M = 1: a ring has 7 steps of 1 KB in flight, a block
 * of 8 warps 56 KB, and two such blocks live on a processor; int4: 7 x 320 bytes, 18 KB a block,
 * four blocks.  Where x is wide, one step of 4 + 4 KB is ahead in each of 8 warps: 32 KB of W.
 * Small matrices: 576 x 576 is 36 blocks of 16 rows, and 4 warps of 4 or 5 steps each have all of
 * it in flight at once; another split of k could only shorten what is latency already.
 *
 * Which M.  A block reads 16 M rows of W and all of x, the latter from L2, which gives about 1.6
 * times what memory does: x beside W is N / (2 M) for bf16, N / (0.6 M) for int4.  Widening takes
 * 62 instructions for the 512 weights of an int8 record, 68 for int4 and 44 for fp8, each step 60
 * besides; 132 processors issue 4 a clock: at 1.75 GHz and 3.35 TB/s 150 for each int8 record and
 * 88 for each int4 record, so int4 wants 2 or 4 records a step where there are enough rows n.
 * busiest() weighs all this for the shape at hand.  64 rows of int4 are 690 TFLOP/s at full
 * bandwidth: there the tensor cores are the bound.
 *
 * fp32 weights: exact mode.  A warp sums 4 rows n for 8 rows of x; lane l adds k = l, l + 32, ...,
 * ascending, by fused multiply-add; then the lanes are added in warp_sum's order. */
#include "compute/gpu_matrix_device.cuh"

#include <cassert>

struct product {
    float *y;
    const uint16_t *x;
    size_t y_stride, x_stride;
    const float *bias; /* or NULL */
    int n_rows;
    gpu_matrix w;
    uint32_t magic; /* FLOAT_2_23 */
};

/* ---- the four formats: a record of 16 rows and 32 k in shared memory, how far apart they lie in
 * W, and how many instructions make its bf16 words of them ---- */
struct bf16_format { /* lane (g, t): row g, then row g + 8, 16 bytes each */
    enum { RECORD = 1024, APART = 64, WIDEN = 8 };
};
struct int8_format {
    enum { RECORD = INT8_RECORD, APART = INT8_RECORD, WIDEN = 62 };
};
struct int4_format {
    enum { RECORD = INT4_RECORD, APART = INT4_RECORD, WIDEN = 68 };
};

struct fp8_format { /* 16 rows, 32 bytes each */
    enum { RECORD = 512, APART = 32, WIDEN = 44 };
};

/* What a sum of row n of W is multiplied by. */
template <class Format> DEVICE float scaled(Format, const gpu_matrix &, int, float sum) {
    return sum;
}
DEVICE float scaled(fp8_format, const gpu_matrix &w, int n, float sum) {
    return sum * w.scales[n];
}

/* Where 16-byte piece `piece` of a tile's first record comes from. */
DEVICE const unsigned char *piece_of(bf16_format, const gpu_matrix &w, int tile, int piece) {
    const int n = tile * TILE + piece / WARP * 8 + piece % WARP / 4;
    return w.data + ((size_t)n * (size_t)w.stride + (size_t)(piece % 4 * 8)) * 2;
}
DEVICE const unsigned char *piece_of(int8_format, const gpu_matrix &w, int tile, int piece) {
    return w.data + (size_t)tile * (size_t)w.n_blocks * INT8_RECORD + 16 * piece;
}
DEVICE const unsigned char *piece_of(int4_format, const gpu_matrix &w, int tile, int piece) {
    return w.data + (size_t)tile * (size_t)w.n_blocks * INT4_RECORD + 16 * piece;
}

DEVICE const unsigned char *piece_of(fp8_format, const gpu_matrix &w, int tile, int piece) {
    const int n = tile * TILE + piece / 2;
    return w.data + (size_t)n * (size_t)w.stride + (size_t)(piece % 2 * 16);
}

/* Whether a lane's pieces of block b lie in their rows. */
DEVICE bool in_row(bf16_format, int b, int lane, int n_in) {
    return b * K_BLOCK + lane % 4 * 8 < n_in;
}
DEVICE bool in_row(fp8_format, int b, int lane, int n_in) {
    return b * K_BLOCK + lane % 2 * 16 < n_in;
}
template <class Format> DEVICE bool in_row(Format, int, int, int) {
    return true;
}

DEVICE void read_record(bf16_format, uint32_t (&out)[2][4], const unsigned char *at, int lane,
                        uint32_t) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 v = ((const uint4 *)at)[half * WARP + lane];
        out[half][0] = v.x, out[half][1] = v.y, out[half][2] = v.z, out[half][3] = v.w;
    }
}
DEVICE void read_record(int8_format, uint32_t (&out)[2][4], const unsigned char *at, int lane,
                        uint32_t magic) {
    read_int8(out, at, lane, magic);
}
DEVICE void read_record(int4_format, uint32_t (&out)[2][4], const unsigned char *at, int lane,
                        uint32_t magic) {
    read_int4(out, at, lane, magic);
}
DEVICE void read_record(fp8_format, uint32_t (&out)[2][4], const unsigned char *at, int lane,
                        uint32_t) {
    read_fp8(out, at, lane);
}

/* ---- the kernel ---- */

/* What a lane copies in each step. */
template <class Format, int M, int N> struct copies {
    enum { PIECES = Format::RECORD / 16, N_W = (M * PIECES + WARP - 1) / WARP };
    const unsigned char *w[N_W]; /* block 0 */
    const uint16_t *x[N];
};

/* Tiles and rows beyond the last read the last again: nothing of theirs is kept, and what is read
 * twice at once costs nothing. */
template <class Format, int M, int N>
DEVICE void set_copies(copies<Format, M, N> &c, const product &p, int first_tile, int first_row,
                       int lane) {
#pragma unroll
    for (int i = 0; i < c.N_W; i++) {
        const int piece = i * WARP + lane, tile = first_tile + piece / c.PIECES;
        c.w[i] =
            piece_of(Format(), p.w, tile < p.w.n_tiles ? tile : p.w.n_tiles - 1, piece % c.PIECES);
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        const int row = first_row + j * 8 + lane / 4;
        c.x[j] = p.x + (size_t)(row < p.n_rows ? row : p.n_rows - 1) * p.x_stride + lane % 4 * 8;
    }
}

/* Block b to shared memory: M records of W, then 8 N rows of x, 64 bytes each.  In the last,
 * partial block, what lies beyond n_in may be anything and becomes zero in both: a NaN would be in
 * the sum. */
template <class Format, int M, int N>
DEVICE void stage(unsigned char *to, const copies<Format, M, N> &c, int b, int n_in, int lane) {
    const bool whole = (b + 1) * K_BLOCK <= n_in;
    const int k = b * K_BLOCK + lane % 4 * 8;
    uint4 *at = (uint4 *)to + lane;
#pragma unroll
    for (int i = 0; i < c.N_W; i++) {
        if (M * c.PIECES - i * WARP < WARP && lane >= M * c.PIECES - i * WARP) continue;
        if (whole || in_row(Format(), b, lane, n_in))
            cp_async16(at + i * WARP, c.w[i] + b * Format::APART);
        else
            at[i * WARP] = uint4{0, 0, 0, 0};
    }
    at = (uint4 *)(to + M * Format::RECORD) + lane;
    if (whole) {
#pragma unroll
        for (int j = 0; j < N; j++)
            cp_async16(at + j * WARP, c.x[j] + b * K_BLOCK);
        return;
    }
#pragma unroll 1
    for (int j = 0; j < N; j++) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint16_t *from = c.x[j] + b * K_BLOCK + 2 * i;
            const uint32_t low = k + 2 * i < n_in ? from[0] : 0,
                           high = k + 2 * i + 1 < n_in ? from[1] : 0;
            words[i] = low | high << 16;
        }
        at[j * WARP] = uint4{words[0], words[1], words[2], words[3]};
    }
}

/* Steps of a ring: 8 while they fit 12 KB, so that two blocks live on a processor (sm_80: one),
 * else 3, or 2 where 3 need more than 20 KB: 8 rings are at most 160 KB, as sm_80 has for a block.
 */
constexpr int steps_of(int step_bytes) {
    const int fit = 12288 / step_bytes;
    return fit >= 8 ? 8 : fit >= 3 ? fit : step_bytes * 3 <= 20480 ? 3 : 2;
}

template <class Format, int M, int N> struct ring {
    enum {
        STEP = M * Format::RECORD + N * 512,
        STEPS = steps_of(STEP),
        SUMS = M * N * 512, /* take the ring's place in the end */
        BYTES = STEP * STEPS > SUMS ? STEP *STEPS : SUMS,
    };
    static_assert((int)BYTES <= 20480, "8 rings are the shared memory of one block on sm_80");
};

template <class Format, int M, int N>
static __global__ void __launch_bounds__(8 * WARP) generated(const product p) {
    using R = ring<Format, M, N>;
    DYNAMIC_SHARED(unsigned char, shared);
    const int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    const int n_warps = (int)blockDim.x / WARP;
    const int first_row = (int)blockIdx.x * 8 * N, first_tile = (int)blockIdx.y * M;
    const int first = (int)((int64_t)p.w.n_blocks * warp / n_warps);
    const int end = (int)((int64_t)p.w.n_blocks * (warp + 1) / n_warps);
    unsigned char *mine = shared + warp * R::BYTES;
    copies<Format, M, N> from;
    set_copies(from, p, first_tile, first_row, lane);

#pragma unroll 1
    for (int step = 0; step < R::STEPS - 1; step++) {
        if (first + step < end) stage(mine + step * R::STEP, from, first + step, p.w.n_in, lane);
        cp_async_commit();
    }
    float sum[M][N][4] = {};
    int slot = 0, free_slot = R::STEPS - 1;
    for (int b = first; b < end; b++) {
        cp_async_wait<R::STEPS - 2>();
        __syncwarp(); /* every lane's copies have come; and all have read the slot that is filled
                         next */
        if (b + R::STEPS - 1 < end)
            stage(mine + free_slot * R::STEP, from, b + R::STEPS - 1, p.w.n_in, lane);
        cp_async_commit();

        const unsigned char *at = mine + slot * R::STEP;
        uint4 x[N];
#pragma unroll
        for (int j = 0; j < N; j++) {
            x[j] = ((const uint4 *)(at + M * Format::RECORD))[j * WARP + lane];
        }
#pragma unroll
        for (int i = 0; i < M; i++) {
            uint32_t w[2][4];
            read_record(Format(), w, at + i * Format::RECORD, lane, p.magic);
            const uint32_t a0[4] = {w[0][0], w[1][0], w[0][1], w[1][1]};
            const uint32_t a1[4] = {w[0][2], w[1][2], w[0][3], w[1][3]};
#pragma unroll
            for (int j = 0; j < N; j++) {
                const uint32_t b0[2] = {x[j].x, x[j].y}, b1[2] = {x[j].z, x[j].w};
                mma_bf16(sum[i][j], a0, b0);
                mma_bf16(sum[i][j], a1, b1);
            }
        }
        if (++slot == R::STEPS) slot = 0;
        if (++free_slot == R::STEPS) free_slot = 0;
    }

    /* The ring may be overwritten: every lane's last reads went into an mma that all lanes made. */
    float *out = (float *)mine;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                out[((i * N + j) * 4 + c) * WARP + lane] = sum[i][j][c];
    __syncthreads();

    /* sum[i][j][c] of lane (g, t) is y of row 8 j + 2 t + c % 2, column 16 i + g + 8 (c / 2). */
    for (int e = (int)threadIdx.x; e < M * N * 128; e += (int)blockDim.x) {
        float s[8];
#pragma unroll
        for (int q = 0; q < 8; q++)
            s[q] = q < n_warps ? ((const float *)(shared + q * R::BYTES))[e] : 0.0f;
        const int l = e % WARP, c = e / WARP % 4, j = e / 128 % N, i = e / (128 * N);
        const int row = first_row + 8 * j + 2 * (l % 4) + c % 2;
        const int n = (first_tile + i) * TILE + l / 4 + c / 2 * 8;
        if (row >= p.n_rows || n >= p.w.n_out) continue;
        const float all = scaled(Format(), p.w, n,
                                 ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
        p.y[(size_t)row * p.y_stride + n] = p.bias ? all + p.bias[n] : all;
    }
}

enum { FP32_OUT = 4, FP32_ROWS = 8, FP32_WARPS = 4 };
static_assert(FP32_OUT * FP32_WARPS == TILE, "a block of threads takes one tile of rows of W");

static __global__ void __launch_bounds__(FP32_WARPS *WARP) generated_fp32(const product p) {
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    const int first_row = (int)blockIdx.x * FP32_ROWS;
    const int first_n = ((int)blockIdx.y * FP32_WARPS + warp) * FP32_OUT;
    const float *w[FP32_OUT], *x[FP32_ROWS];
#pragma unroll
    for (int i = 0; i < FP32_OUT; i++) {
        /* the last tile is whole in memory */
        w[i] = (const float *)p.w.data + (size_t)(first_n + i) * (size_t)p.w.stride;
    }
#pragma unroll
    for (int j = 0; j < FP32_ROWS; j++) {
        const int row = first_row + j < p.n_rows ? first_row + j : p.n_rows - 1;
        x[j] = (const float *)p.x + (size_t)row * p.x_stride;
    }
    float sum[FP32_OUT][FP32_ROWS] = {};
    for (int k = lane; k < p.w.n_in; k += WARP) {
        float a[FP32_OUT];
#pragma unroll
        for (int i = 0; i < FP32_OUT; i++)
            a[i] = w[i][k];
#pragma unroll
        for (int j = 0; j < FP32_ROWS; j++) {
            const float b = x[j][k];
#pragma unroll
            for (int i = 0; i < FP32_OUT; i++)
                sum[i][j] = fmaf(a[i], b, sum[i][j]);
        }
    }
#pragma unroll
    for (int j = 0; j < FP32_ROWS; j++) {
        const int row = first_row + j;
        if (row >= p.n_rows) break;
#pragma unroll
        for (int i = 0; i < FP32_OUT; i++) {
            const float all = warp_sum(sum[i][j]);
            const int n = first_n + i;
            if (lane == 0 && n < p.w.n_out)
                p.y[(size_t)row * p.y_stride + n] = p.bias ? all + p.bias[n] : all;
        }
    }
}

/* ---- choosing and launching ---- */

/* Warps that split k, by n_in alone: at least 2 blocks of 32 each. */
static int warps_for(int n_blocks) {
    return n_blocks >= 32 ? 8 : n_blocks >= 8 ? 4 : n_blocks >= 4 ? 2 : 1;
}

/* Clocks per block of 32 k of the processor with most blocks of threads: the longer of its loads,
 * at its share of 3.35 TB/s (14.5 bytes a clock), and its instructions, counted in the compiled
 * loop for sm_90, at 3 a clock. */
static double busiest(const product &p, int m, int n, int record, int widen) {
    const int passes = (p.n_rows + 8 * n - 1) / (8 * n), groups = (p.w.n_tiles + m - 1) / m;
    const int n_processors = p.w.n_processors > 0 ? p.w.n_processors : 1;
    const double waves = (double)(((int64_t)passes * groups + n_processors - 1) / n_processors);
    const double bytes = m * record + (p.n_rows < 8 * n ? p.n_rows : 8 * n) * 64;
    const double instructions = 60 + m * widen + 4 * n + 2 * m * n;
    return waves * (bytes / 14.5 > instructions / 3 ? bytes / 14.5 : instructions / 3);
}

template <class Format, int M, int N> static void launch(struct gpu *g, const product &p) {
    const unsigned passes = (unsigned)(p.n_rows + 8 * N - 1) / (8 * N),
                   groups = (unsigned)(p.w.n_tiles + M - 1) / M;
    const int warps = warps_for(p.w.n_blocks);
    assert(groups <= 65535); /* 1,048,560 rows of W */
    /* Passes beside each other: the second finds W in L2. */
    LAUNCH(g, (generated<Format, M, N>), dim3(passes, groups), warps * WARP,
           ((size_t)warps * ring<Format, M, N>::BYTES), p);
}

template <class Format, int M, int N> static bool fits(const product &p) {
    return warps_for(p.w.n_blocks) * ring<Format, M, N>::BYTES <= p.w.shared_bytes;
}

/* The smallest M, but where a larger one is a tenth better; or the first that is at least `tiles`.
 */
template <class Format, int N, int M, int... LARGER>
static void choose(struct gpu *g, const product &p, int tiles) {
    if constexpr (sizeof...(LARGER) > 0) {
        const double most = 0.9 * busiest(p, M, N, Format::RECORD, Format::WIDEN);
        auto better = [&](int m) {
            return tiles ? tiles > M : busiest(p, m, N, Format::RECORD, Format::WIDEN) < most;
        };
        if (((fits<Format, LARGER, N>(p) && better(LARGER)) || ...)) {
            choose<Format, N, LARGER...>(g, p, tiles);
            return;
        }
    }
    launch<Format, M, N>(g, p);
}

template <class Format> static void launch_format(struct gpu *g, const product &p, int tiles) {
    if (p.n_rows <= 8)
        choose<Format, 1, 1, 2, 4>(g, p, tiles);
    else if (p.n_rows <= 16)
        choose<Format, 2, 1, 2, 4>(g, p, tiles);
    else if (p.n_rows <= 32 || !fits<Format, 2, 8>(p))
        choose<Format, 4, 2, 4>(g, p, tiles);
    else
        choose<Format, 8, 2, 4>(g, p, tiles);
}

void gpu_matrix_product(struct gpu *g, float *y, size_t y_stride, const void *x, size_t x_stride,
                        int n_rows, const struct gpu_matrix *w, const float *bias, int tiles) {
    const product p = {y, (const uint16_t *)x, y_stride, x_stride, bias, n_rows, *w, FLOAT_2_23};
    switch (w->type) {
    case WEIGHT_FP32: {
        const dim3 grid((unsigned)(n_rows + FP32_ROWS - 1) / FP32_ROWS, (unsigned)w->n_tiles);
        assert(grid.y <= 65535);
        LAUNCH(g, generated_fp32, grid, FP32_WARPS * WARP, 0, p);
        break;
    }
    case WEIGHT_BF16:
        launch_format<bf16_format>(g, p, tiles);
        break;
    case WEIGHT_INT8:
        launch_format<int8_format>(g, p, tiles);
        break;
    case WEIGHT_INT4:
        launch_format<int4_format>(g, p, tiles);
        break;
    case WEIGHT_FP8:
        launch_format<fp8_format>(g, p, tiles);
        break;
    }
}
