/* amx_bf16.h - bf16 matmul with AMX tiles.  A part of kernels.c.
 *
 * TDPBF16PS multiplies bf16 by bf16, and x is fp32.  Its 24 bits are three times the 8 of a bf16:
 *
 *   x = high + middle + low,     high = x cut to 8 bits, middle = x - high cut, low = the rest
 *
 * exactly (parts below 2^-126 count as 0), so products are exact as before and sums are fp32:
 *
 *   y = (sum of high w + sum of middle w) + sum of low w
 *
 * No more is lost than by one fp32 sum; x rounded to bf16 would lose 2^-9 of each product.  The
 * parts are rows of one tile, 15 for 5 rows of x.  What a row gives is its own sums over ascending
 * blocks of 32 k, each added by the instruction's fixed order, however many rows there are: one row
 * goes the same way as a thousand.  The order is not that of the other families, nor are the bits.
 *
 * Cycles of one core for a block of a panel (2 KB of weights), from measurements on a machine with
 * AMX (a product of tiles in 16 cycles; L2 gives 40 to 50 bytes a cycle, L3 9; nobody has timed
 * this kernel there yet):
 *
 *   10 rows   64 for 4 products; 80 to 100 for 62 lines of W and x where all come from L2;
 *             320 would be AVX-512's, for 640 fused sums of 16 lanes
 *   1 row     32 for 2 products; more than 200 for the weights from L3 */
#ifndef URCHIN_COMPUTE_AMX_BF16_H
#define URCHIN_COMPUTE_AMX_BF16_H

#include "compute/amx.h"

enum {
    SPLIT_TILE = SPLIT_GROUP * SPLIT_PARTS, /* rows of a tile of x */
    BF16_BLOCK_BYTES = BLOCK * PANEL * 2,
    LINE = 64, /* of W: 2 k of 16 columns; of x: 32 k of one part */
};
enum { BF16_SUMS = 0, BF16_X = 4, BF16_W = 6 }; /* 0-3, 4-5 and 6-7 */

static const struct tile_config bf16_shapes = {
    .palette = 1,
    .row_bytes = {LINE, LINE, LINE, LINE, LINE, LINE, LINE, LINE},
    .rows = {SPLIT_TILE, SPLIT_TILE, SPLIT_TILE, SPLIT_TILE, SPLIT_TILE, SPLIT_TILE, BLOCK / 2,
             BLOCK / 2},
};

static void split_row(uint16_t *parts, int row, const float *x, int n_in) {
    const size_t n = (size_t)(n_in + BLOCK - 1) / BLOCK * BLOCK;
    uint16_t *out = parts + (size_t)row * SPLIT_PARTS * n;
    for (size_t k = 0; k < n; k += 16) {
        v16 rest = load_up_to(x + k, n_in - (int)k);
        for (int part = 0; part < SPLIT_PARTS; part++) {
            v16 cut = rest;
            V_EACH cut.p[i] = (v_part)((v_part_u)cut.p[i] & 0xffff0000);
            v16_store_bf16(out + (size_t)part * n + k, cut);
            rest = v16_sub(rest, cut);
        }
    }
}

/* The sums of one panel and the parts of 5 rows of x, or 10 (`two`). */
V_FN void sum_parts(float (*sums)[PANEL], const uint16_t *x, const unsigned char *w, int n_blocks,
                    int two, int first_time) {
    const size_t stride = (size_t)n_blocks * LINE;
    tile_zero(BF16_SUMS);
    tile_zero(BF16_SUMS + 1);
    tile_zero(BF16_SUMS + 2);
    tile_zero(BF16_SUMS + 3);
    for (int b = 0; b < n_blocks; b++, w += BF16_BLOCK_BYTES, x += BLOCK) {
        for (int line = 0; first_time && line < BF16_BLOCK_BYTES; line += LINE)
            prefetch(w + line);
        tile_load(BF16_W, w, 2 * LINE);
        tile_load(BF16_W + 1, w + LINE, 2 * LINE);
        tile_load(BF16_X, x, stride);
        tile_dot_bf16(BF16_SUMS, BF16_X, BF16_W);
        tile_dot_bf16(BF16_SUMS + 1, BF16_X, BF16_W + 1);
        if (!two) continue;
        tile_load(BF16_X + 1, x + SPLIT_TILE * (stride / sizeof *x), stride);
        tile_dot_bf16(BF16_SUMS + 2, BF16_X + 1, BF16_W);
        tile_dot_bf16(BF16_SUMS + 3, BF16_X + 1, BF16_W + 1);
    }
    tile_store(BF16_SUMS, sums[0], PANEL * sizeof(float));
    tile_store(BF16_SUMS + 1, sums[0] + 16, PANEL * sizeof(float));
    tile_store(BF16_SUMS + 2, sums[SPLIT_TILE], PANEL * sizeof(float));
    tile_store(BF16_SUMS + 3, sums[SPLIT_TILE] + 16, PANEL * sizeof(float));
}

/* Groups of rows that are not full go on into rows of x that are not of this call. */
static void matmul_bf16_amx(const struct matmul_args *a, int first_panel, int end_panel) {
    _Alignas(64) float sums[2 * SPLIT_TILE][PANEL];
    const size_t row_parts = (size_t)a->n_blocks * BLOCK * SPLIT_PARTS;
    tiles_configure(&bf16_shapes);
    for (int panel = first_panel; panel < end_panel; panel++)
        for (int row = 0; row < a->n_rows; row += 2 * SPLIT_GROUP) {
            const int left = a->n_rows - row, n = left < 2 * SPLIT_GROUP ? left : 2 * SPLIT_GROUP;
            sum_parts(sums, a->x_parts + (size_t)row * row_parts,
                      a->w + (size_t)panel * a->panel_bytes, a->n_blocks, n > SPLIT_GROUP, !row);
            for (int h = 0; h < 2; h++) {
                const int column = panel * PANEL + 16 * h, columns = a->n_out - column;
                if (columns <= 0) break;
                v16 bias = a->bias ? load_up_to(a->bias + column, columns) : v16_zero();
                for (int m = 0; m < n; m++) {
                    float(*part)[PANEL] = &sums[m * SPLIT_PARTS];
                    v16 y = v16_add(v16_load(part[0] + 16 * h), v16_load(part[1] + 16 * h));
                    y = v16_add(y, v16_load(part[2] + 16 * h));
                    store_up_to(a->y + (size_t)(row + m) * a->y_stride + column,
                                a->bias ? v16_add(y, bias) : y, columns);
                }
            }
        }
    tiles_release();
}

#endif
