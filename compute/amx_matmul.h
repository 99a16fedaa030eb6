/* amx_matmul.h - int8 and int4 matmul with AMX tiles.  A part of kernels.c.
 *
 * The sums of a block of 32 k are exact integers in any family, and what is done with them in fp32
 * below is what tile_int8() and tile_int4() do, in the same order: the bits are the same, for any
 * number of rows.
 *
 * One product of tiles is 16 rows of x by 16 columns of W over one block: half the k that the
 * instruction could take, since the next block has other scales.  Of its 256 sums each is used
 * once:
 *
 *   y += (s xs) float(sum)            int4 also  y += min x_sum
 *
 * which is 4 vector instructions for 16 sums (6 for int4; none may be fused, and none is shared:
 * s xs is as many products as there are sums), two a cycle.  Cycles of one core for 16 x 16 sums of
 * a block, from what was measured of AMX and AVX-512 on a machine that has both (a product of tiles
 * in 16 cycles, hardly more with its loads; two vector instructions a cycle; nobody has timed these
 * kernels on such a machine yet):
 *
 *                                   tiles    vectors, sums   vectors, scales
 *   AVX-512 VNNI, int8                           64               32
 *   AMX, int8                         16                          32
 *   AMX, int4                         16                          48
 *
 * So the scales are the bound, at best a third of VNNI's time for int8, and everything here is
 * there to keep the vector units at them alone:
 * - Weights are unpacked to signed bytes once for all rows (TDPBSSD).  As they are stored, with 128
 *   added, every vector of sums would need its correction: a fifth instruction.
 * - Tiles and scales are worked on together.  The sums of CHUNK blocks go to a buffer; between one
 *   block's products and the next, four rows of the sums before are scaled.  Neither waits for
 *   the other: a processor does not look far enough ahead (512 instructions, of which one tile load
 *   is a dozen) to find this out by itself.
 * - y stays in registers for the CHUNK blocks: 4 rows x 2 halves hide the latency of additions, and
 *   16 lanes of sums cost 2 loads and 1 1/4 stores, which fit into their 2 cycles.
 * - L1 (48 KB on every such machine) holds all: 16 KB of sums, 10 KB of weights, 4 KB of x.
 * Products two by two would save loads of tiles, which are not the bound.
 *
 * With less than 16 rows vectors are as fast as memory, and tiles would be half empty. */
#ifndef URCHIN_COMPUTE_AMX_MATMUL_H
#define URCHIN_COMPUTE_AMX_MATMUL_H

#include "compute/amx.h"
#include <stdbool.h>

enum {
    TALL = 16,             /* rows of a tile of x */
    CHUNK = 4,             /* blocks whose sums wait together */
    SCALED = TALL / CHUNK, /* rows of sums that are scaled between two blocks' products */
    TILE_ROW = 64,
};
enum { SUMS_TILE = 0, X_TILE = 4, W_TILE = 6 }; /* 0-3, 4-5 and 6-7 */

static const struct tile_config tile_shapes = {
    .palette = 1,
    .row_bytes = {TILE_ROW, TILE_ROW, TILE_ROW, TILE_ROW, BLOCK, BLOCK, TILE_ROW, TILE_ROW},
    .rows = {TALL, TALL, TALL, TALL, TALL, TALL, BLOCK / 4, BLOCK / 4},
};

/* Up to CHUNK blocks of a panel. */
struct unpacked {
    _Alignas(64) int8_t q[CHUNK][2][BLOCK / 4][TILE_ROW]; /* tiles of W: [k / 4][16 columns][4] */
    float s[CHUNK][PANEL], min[CHUNK][PANEL];
};
struct sums {
    _Alignas(64) int32_t of[CHUNK][TALL][PANEL];
};

/* TALL rows from `row`, over n blocks from `block`.  The last rows of a matmul share some with
 * the rows before, so that tiles are full; what counts begins at `from`. */
struct piece {
    const struct unpacked *w;
    struct sums *sums;
    int block, n, row, from;
};

V_FN v16i v16i_xor(v16i a, uint32_t bits) {
    V_EACH a.p[i] = (v_part_i)((v_part_u)a.p[i] ^ bits);
    return a;
}
V_FN void v16i_store(void *dst, v16i a) {
    V_EACH *(v_part_i_any *)((int32_t *)dst + V_LANES * i) = a.p[i];
}

V_FN void unpack(struct unpacked *out, const unsigned char *w, int n, bool int4) {
    for (int b = 0; b < n; b++, w += int4 ? INT4_BLOCK_BYTES : INT8_BLOCK_BYTES) {
        for (int group = 0; group < (int4 ? 4 : 8); group++)
            for (int h = 0; h < 2; h++) {
                const unsigned char *line = w + group * PANEL * 4 + h * TILE_ROW;
                prefetch(line);
                v16i q = v16i_load(line);
                v16i_store(out->q[b][h][group],
                           int4 ? v16i_nibbles(q, 0) : v16i_xor(q, 0x80808080));
                if (int4) v16i_store(out->q[b][h][group + 4], v16i_nibbles(q, 1));
            }
        const unsigned char *end = w + (int4 ? INT4_BLOCK_SCALES : INT8_BLOCK_SCALES);
        const uint16_t *scales = (const uint16_t *)end;
        prefetch(end);
        if (int4) prefetch(end + 64);
        for (int column = 0; column < PANEL; column += 16) {
            v16_store(out->s[b] + column, v16_load_fp16(scales + column));
            if (int4) v16_store(out->min[b] + column, v16_load_fp16(scales + PANEL + column));
        }
    }
}

/* Block b of a piece.  Consecutive blocks take other tiles (`other` 0 or 1). */
V_FN void multiply_block(const struct matmul_args *a, const struct piece *p, int b, int other) {
    const int sums = SUMS_TILE + 2 * other, x = X_TILE + other;
    const size_t blocks = (size_t)a->n_blocks;
    tile_load(x, a->xq.q + ((size_t)p->row * blocks + (size_t)(p->block + b)) * BLOCK,
              blocks * BLOCK);
    tile_load(W_TILE, p->w->q[b][0], TILE_ROW);
    tile_load(W_TILE + 1, p->w->q[b][1], TILE_ROW);
    tile_zero(sums);
    tile_zero(sums + 1);
    tile_dot(sums, x, W_TILE);
    tile_dot(sums + 1, x, W_TILE + 1);
    tile_store(sums, p->sums->of[b][0], PANEL * sizeof(int32_t));
    tile_store(sums + 1, p->sums->of[b][0] + 16, PANEL * sizeof(int32_t));
}

/* Adds the sums of rows first .. first + SCALED - 1 of a piece to y, which begins with its first
 * block and gets the bias after its last. */
V_FN void scale_rows(const struct matmul_args *a, const struct piece *p, int panel, int first,
                     bool int4) {
    if (p->row + first + SCALED <= p->from) return;
    const bool begins = p->block == 0, ends = p->block + p->n == a->n_blocks;
    const size_t row = (size_t)(p->row + first), blocks = (size_t)a->n_blocks;
    const int column = panel * PANEL, left = a->n_out - column;
    float *out = a->y + row * a->y_stride + column;
    v16 y[SCALED][2];
    UNROLL for (int m = 0; m < SCALED; m++) UNROLL for (int h = 0; h < 2; h++) y[m][h] =
        begins ? v16_zero() : load_up_to(out + (size_t)m * a->y_stride + 16 * h, left - 16 * h);
    for (int b = 0; b < p->n; b++) {
        v16 s[2] = {v16_load(p->w->s[b]), v16_load(p->w->s[b] + 16)};
        UNROLL for (int m = 0; m < SCALED; m++) UNROLL for (int h = 0; h < 2; h++) {
            size_t at = (row + (size_t)m) * blocks + (size_t)(p->block + b);
            v16 scale = v16_mul(s[h], v16_set1(a->xq.scale[at]));
            v16i sums = v16i_load(&p->sums->of[b][first + m][16 * h]);
            y[m][h] = v16_add(y[m][h], v16_mul(scale, v16i_float(sums)));
            if (int4)
                y[m][h] = v16_add(y[m][h], v16_mul(v16_load(p->w->min[b] + 16 * h),
                                                   v16_set1(a->xq.scaled_sum[at])));
        }
    }
    UNROLL for (int h = 0; h < 2; h++) {
        if (left <= 16 * h) break;
        v16 bias = a->bias ? load_up_to(a->bias + column + 16 * h, left - 16 * h) : v16_zero();
        UNROLL for (int m = 0; m < SCALED; m++) if (p->row + first + m >= p->from)
            store_up_to(out + (size_t)m * a->y_stride + 16 * h,
                        a->bias && ends ? v16_add(y[m][h], bias) : y[m][h], left - 16 * h);
    }
}
static __attribute__((noinline)) void scale_rows_int8(const struct matmul_args *a,
                                                      const struct piece *p, int panel, int first) {
    scale_rows(a, p, panel, first, false);
}
static __attribute__((noinline)) void scale_rows_int4(const struct matmul_args *a,
                                                      const struct piece *p, int panel, int first) {
    scale_rows(a, p, panel, first, true);
}

/* A thread configures its tiles for every call and releases them after it: next to the thousands of
 * cycles of a call that is nothing, and a thread that waits has no 8 KB of tiles to be saved. */
V_FN void matmul_tiles(const struct matmul_args *a, int first_panel, int end_panel, bool int4) {
    struct unpacked w[2];
    struct sums sums[2];
    const size_t block_bytes = int4 ? INT4_BLOCK_BYTES : INT8_BLOCK_BYTES;
    tiles_configure(&tile_shapes);
    for (int panel = first_panel; panel < end_panel; panel++) {
        const unsigned char *src = a->w + (size_t)panel * a->panel_bytes;
        struct piece before = {.from = TALL}; /* no rows */
        for (int block = 0, pieces = 0; block < a->n_blocks; block += CHUNK) {
            struct unpacked *chunk = &w[block / CHUNK % 2];
            int left = a->n_blocks - block, n = left < CHUNK ? left : CHUNK;
            unpack(chunk, src + (size_t)block * block_bytes, n, int4);
            for (int from = 0; from < a->n_rows; from += TALL, pieces++) {
                struct piece now = {.w = chunk, .sums = &sums[pieces % 2], .block = block, .n = n};
                now.row = from < a->n_rows - TALL ? from : a->n_rows - TALL;
                now.from = from;
                for (int i = 0; i < CHUNK; i++) {
                    if (i < n && i % 2 == 0) multiply_block(a, &now, i, 0);
                    if (i < n && i % 2 == 1) multiply_block(a, &now, i, 1);
                    (int4 ? scale_rows_int4 : scale_rows_int8)(a, &before, panel, i * SCALED);
                }
                before = now;
            }
        }
        for (int i = 0; i < CHUNK; i++)
            (int4 ? scale_rows_int4 : scale_rows_int8)(a, &before, panel, i * SCALED);
    }
    tiles_release();
}

static void matmul_int8_amx(const struct matmul_args *a, int first_panel, int end_panel) {
    if (a->n_rows < TALL)
        matmul_int8(a, first_panel, end_panel);
    else
        matmul_tiles(a, first_panel, end_panel, false);
}
static void matmul_int4_amx(const struct matmul_args *a, int first_panel, int end_panel) {
    if (a->n_rows < TALL)
        matmul_int4(a, first_panel, end_panel);
    else
        matmul_tiles(a, first_panel, end_panel, true);
}

#endif
