/* gpu_matrix_product.cu - y = x W^T + bias for generated rows: every weight is read once per 64
 * rows.
 *
 * bf16, int8, int4 weights.  W is the A operand of mma m16n8k16 (16 rows n), rows of x are the 8
 * columns of B, so that one row of x costs no more loads of W than eight.  A block of threads makes
 * 16 M rows n of y for 8 N rows of x.  Its warps split k: warp p of P sums blocks b of 32 k,
 * n_blocks p / P <= b < n_blocks (p + 1) / P, ascending, in the fp32 accumulators of the mma; the P
 * sums are added as
 * ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), then the bias.  P depends on n_in alone, a column of
 * an mma on nothing but itself: whatever M, N, the number of rows or the place of a row, its bits
 * are the same.  M and N are thus free to suit the moment.
 *
 * Loads.  Each warp has its own ring in shared memory, filled by cp.async, of steps of one block of
 * 32 k: M records of W, and of 8 N rows of x 64 bytes each (layouts: gpu_matrix_device.cuh).  A
 * lane reads back the 16 bytes of x and of bf16 W that it copied itself; only scales cross lanes,
 * so __syncwarp is all that orders a ring, and no warp waits for another before the last sums.
 * Bytes in flight: a memory of 3.35 TB/s that answers in 1 us has 3.35 MB on its way, 25 KB for
 * each of 132 processors.  One row of x, bf16, M = 1: a ring has 7 steps of 1 KB in flight, a block
 * of 8 warps 56 KB, and two such blocks live on a processor; int4: 7 x 320 bytes, 18 KB a block,
 * four blocks.  Where x is wide, 2 steps of 4 + 4 KB in each of 8 warps: 32 KB of W ahead at any
 * time. Small matrices: 576 x 576 is 36 blocks of 16 rows, and 4 warps of 4 or 5 steps each have
 * the whole matrix in flight at once; another split of k could shorten only what is latency
 * already.
 *
 * Which M: a block reads 16 M rows of W and all of x, the latter from L2, which gives about 1.6
 * times what memory does.  M is the one for which the busiest processor reads least (choose()): x
 * beside W is N / (2 M) for bf16, so 16 rows n would be wrong for 64 rows of x, and 64 for one row
 * of a narrow matrix.
 *
 * Arithmetic: widening takes 3.6 instructions a weight; 132 processors of 128 lanes at 1.75 GHz
 * have 9.4 for each int8 and 5.5 for each int4 weight at 3.35 TB/s.  64 rows of int4 are 690
 * TFLOP/s at full bandwidth: there, and only there, the tensor cores are the bound.
 *
 * fp32 weights: exact mode.  A warp sums 4 rows n for 8 rows of x, lane l k = l, l + 32, ...,
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
};

/* ---- the three formats ---- */
struct bf16_format {
    enum { RECORD = 1024 }; /* in shared memory: lane (g, t) row g, then row g + 8, 16 bytes each */
};
struct int8_format {
    enum { RECORD = INT8_RECORD };
};
struct int4_format {
    enum { RECORD = INT4_RECORD };
};

/* Block b of M tiles to shared memory.  Tiles and rows beyond the last read the last again: nothing
 * of theirs is kept. */
template <int M>
DEVICE void stage_weights(bf16_format, unsigned char *to, const gpu_matrix &w, int first_tile,
                          int b, int lane) {
    const int k = b * K_BLOCK + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        const int n = first_tile * TILE + i * 8 + lane / 4;
        const size_t row = (size_t)(n < w.n_out ? n : w.n_out - 1) * (size_t)w.stride;
        uint4 *at = (uint4 *)to + i * WARP + lane;
        if (k < w.n_in)
            cp_async16(at, (const uint16_t *)w.data + row + k);
        else
            *at = uint4{0, 0, 0, 0};
    }
}

template <int M, int RECORD>
DEVICE void stage_records(unsigned char *to, const gpu_matrix &w, int first_tile, int b, int lane) {
    enum { PIECES = RECORD / 16 };
#pragma unroll
    for (int i = 0; i < (M * PIECES + WARP - 1) / WARP; i++) {
        const int piece = i * WARP + lane;
        int tile = first_tile + piece / PIECES;
        if (tile >= w.n_tiles) tile = w.n_tiles - 1;
        const size_t record = (size_t)tile * (size_t)w.n_blocks + (size_t)b;
        if (piece < M * PIECES)
            cp_async16(to + 16 * piece, w.data + record * RECORD + piece % PIECES * 16);
    }
}
template <int M>
DEVICE void stage_weights(int8_format, unsigned char *to, const gpu_matrix &w, int first_tile,
                          int b, int lane) {
    stage_records<M, INT8_RECORD>(to, w, first_tile, b, lane);
}
template <int M>
DEVICE void stage_weights(int4_format, unsigned char *to, const gpu_matrix &w, int first_tile,
                          int b, int lane) {
    stage_records<M, INT4_RECORD>(to, w, first_tile, b, lane);
}

DEVICE void read_record(bf16_format, uint32_t (&out)[2][4], const unsigned char *at, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 v = ((const uint4 *)at)[half * WARP + lane];
        out[half][0] = v.x, out[half][1] = v.y, out[half][2] = v.z, out[half][3] = v.w;
    }
}
DEVICE void read_record(int8_format, uint32_t (&out)[2][4], const unsigned char *at, int lane) {
    read_int8(out, at, lane);
}
DEVICE void read_record(int4_format, uint32_t (&out)[2][4], const unsigned char *at, int lane) {
    read_int4(out, at, lane);
}

/* ---- the kernel ---- */

/* Block b of 8 N rows of x.  What lies beyond n_in may be anything and must meet the zeros of W as
 * zero: a NaN there would be in the sum. */
template <int N>
DEVICE void stage_rows(unsigned char *to, const product &p, int first_row, int b, int lane) {
    const int k = b * K_BLOCK + lane % 4 * 8;
#pragma unroll
    for (int j = 0; j < N; j++) {
        const int row = first_row + j * 8 + lane / 4;
        uint4 *at = (uint4 *)to + j * WARP + lane;
        if (row >= p.n_rows)
            continue; /* a column of its own in the product, of any value: it is not kept */
        const uint16_t *from = p.x + (size_t)row * p.x_stride + k;
        if (k + 8 <= p.w.n_in) {
            cp_async16(at, from);
        } else {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t low = k + 2 * i < p.w.n_in ? from[2 * i] : 0;
                uint32_t high = k + 2 * i + 1 < p.w.n_in ? from[2 * i + 1] : 0;
                words[i] = low | high << 16;
            }
            *at = uint4{words[0], words[1], words[2], words[3]};
        }
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

#pragma unroll
    for (int s = 0; s < R::STEPS - 1; s++) {
        if (first + s < end) {
            stage_weights<M>(Format(), mine + s * R::STEP, p.w, first_tile, first + s, lane);
            stage_rows<N>(mine + s * R::STEP + M * Format::RECORD, p, first_row, first + s, lane);
        }
        cp_async_commit();
    }
    float sum[M][N][4] = {};
    int slot = 0, free_slot = R::STEPS - 1;
    for (int b = first; b < end; b++) {
        cp_async_wait<R::STEPS - 2>();
        __syncwarp(); /* every lane's copies have come; and all have read the slot that is filled
                         next */
        if (b + R::STEPS - 1 < end) {
            unsigned char *to = mine + free_slot * R::STEP;
            stage_weights<M>(Format(), to, p.w, first_tile, b + R::STEPS - 1, lane);
            stage_rows<N>(to + M * Format::RECORD, p, first_row, b + R::STEPS - 1, lane);
        }
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
            read_record(Format(), w, at + i * Format::RECORD, lane);
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

    __syncwarp(); /* all lanes have read the last scales */
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
        float all = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
        if (row < p.n_rows && n < p.w.n_out)
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
    for (int i = 0; i < FP32_OUT; i++)
#pragma unroll
        for (int j = 0; j < FP32_ROWS; j++) {
            const float all = warp_sum(sum[i][j]);
            const int row = first_row + j, n = first_n + i;
            if (lane == 0 && row < p.n_rows && n < p.w.n_out)
                p.y[(size_t)row * p.y_stride + n] = p.bias ? all + p.bias[n] : all;
        }
}

/* ---- choosing and launching ---- */

/* Warps that split k, by n_in alone: at least 2 blocks of 32 each. */
static int warps_for(int n_blocks) {
    return n_blocks >= 32 ? 8 : n_blocks >= 8 ? 4 : n_blocks >= 4 ? 2 : 1;
}

/* Bytes per block of 32 k that the processor with most blocks of threads reads. */
static double busiest(const product &p, int m, int n, int record) {
    const int passes = (p.n_rows + 8 * n - 1) / (8 * n), groups = (p.w.n_tiles + m - 1) / m;
    const int n_processors = p.w.n_processors > 0 ? p.w.n_processors : 1;
    const double waves = (double)(((int64_t)passes * groups + n_processors - 1) / n_processors);
    return waves * (m * record + (p.n_rows < 8 * n ? p.n_rows : 8 * n) * 64);
}

template <class Format, int M, int N> static void launch(struct gpu *g, const product &p) {
    const unsigned passes = (unsigned)(p.n_rows + 8 * N - 1) / (8 * N),
                   groups = (unsigned)(p.w.n_tiles + M - 1) / M;
    const int warps = warps_for(p.w.n_blocks);
    assert(groups <= 65535); /* 1,048,560 rows of W */
    /* Passes beside each other: the second finds W in L2. */
    LAUNCH(g, (generated<Format, M, N>), dim3(passes, groups), warps * WARP,
           (size_t)warps * ring<Format, M, N>::BYTES, p);
}

template <class Format, int SMALL, int LARGE, int N>
static void choose(struct gpu *g, const product &p) {
    const int record = p.w.type == WEIGHT_BF16   ? 1024
                       : p.w.type == WEIGHT_INT8 ? INT8_RECORD
                                                 : INT4_RECORD;
    if (busiest(p, LARGE, N, record) < busiest(p, SMALL, N, record))
        launch<Format, LARGE, N>(g, p);
    else
        launch<Format, SMALL, N>(g, p);
}

template <class Format> static void launch_format(struct gpu *g, const product &p) {
    if (p.n_rows <= 8)
        choose<Format, 1, 2, 1>(g, p);
    else if (p.n_rows <= 16)
        choose<Format, 1, 2, 2>(g, p);
    else if (p.n_rows <= 32)
        choose<Format, 2, 4, 4>(g, p);
    else
        choose<Format, 2, 4, 8>(g, p);
}

void gpu_matrix_product(struct gpu *g, float *y, size_t y_stride, const void *x, size_t x_stride,
                        int n_rows, const struct gpu_matrix *w, const float *bias) {
    const product p = {y, (const uint16_t *)x, y_stride, x_stride, bias, n_rows, *w};
    switch (w->type) {
    case WEIGHT_FP32: {
        const dim3 grid((unsigned)(n_rows + FP32_ROWS - 1) / FP32_ROWS, (unsigned)w->n_tiles);
        assert(grid.y <= 65535);
        LAUNCH(g, generated_fp32, grid, FP32_WARPS * WARP, 0, p);
        break;
    }
    case WEIGHT_BF16:
        launch_format<bf16_format>(g, p);
        break;
    case WEIGHT_INT8:
        launch_format<int8_format>(g, p);
        break;
    case WEIGHT_INT4:
        launch_format<int4_format>(g, p);
        break;
    }
}
