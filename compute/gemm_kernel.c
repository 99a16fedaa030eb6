/* gemm_kernel.c - one block of a product, compiled per instruction family.
 *
 * B's columns lie in tiles [k][TILE_COLUMNS], A's rows in tiles [k][TILE_ROWS], both padded with
 * zeros; a tile of C is held in registers over a whole piece of K.  (Goto and van de Geijn 2008,
 * "Anatomy of high-performance matrix multiplication".) */
#include "compute/gemm_kernel.h"

#include "compute/vec.h"

enum { LANES = 16 };
#if V_PARTS == 1 && !defined(__SANITIZE_ADDRESS__)
enum { ROWS = 12, VECS = 2 }; /* 24 registers of sums, 2 of B, A from memory: 27 of 32 */
#elif V_PARTS == 2
enum { ROWS = 6, VECS = 1 }; /* 12, 2 and 1 of 16 */
#else
enum { ROWS = 2, VECS = 1 };
#endif
enum { COLUMNS = VECS * LANES };

static int least(int a, int b) {
    return a < b ? a : b;
}

/* rows i0 .. of a, columns k0 ..: [tile][k][ROWS] */
static void copy_rows(float *to, struct gemm_matrix a, int i0, int m, int k0, int depth) {
    for (int i = 0; i < m; i += ROWS, to += (size_t)depth * ROWS) {
        int n = least(ROWS, m - i);
        const float *from = a.at + (size_t)(i0 + i) * a.row + (size_t)k0 * a.step;
        if (n == ROWS)
            for (int k = 0; k < depth; k++)
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++)
                    to[k * ROWS + r] = from[(size_t)k * a.step + (size_t)r * a.row];
        else
            for (int k = 0; k < depth; k++)
                for (int r = 0; r < ROWS; r++)
                    to[k * ROWS + r] = r < n ? from[(size_t)k * a.step + (size_t)r * a.row] : 0;
    }
}

/* rows k0 .. of b, columns 0 .. n - 1: [tile][k][COLUMNS] */
static void copy_columns(float *to, struct gemm_matrix b, int n, int k0, int depth) {
    for (int j = 0; j < n; j += COLUMNS, to += (size_t)depth * COLUMNS) {
        int width = least(COLUMNS, n - j);
        const float *from = b.at + (size_t)k0 * b.row + (size_t)j * b.step;
        for (int k = 0; k < depth; k++, from += b.row) {
            float *out = to + (size_t)k * COLUMNS;
            if (width == COLUMNS && b.step == 1)
                for (int v = 0; v < VECS; v++)
                    v16_store(out + v * LANES, v16_load(from + v * LANES));
            else if (width == COLUMNS)
                for (int c = 0; c < COLUMNS; c++)
                    out[c] = from[(size_t)c * b.step];
            else
                for (int c = 0; c < COLUMNS; c++)
                    out[c] = c < width ? from[(size_t)c * b.step] : 0;
        }
    }
}

/* One tile of C: [m <= ROWS][n <= COLUMNS]. */
V_FN void tile(float *c, size_t c_row, bool add, const float *a, const float *b, int depth, int m,
               int n) {
    v16 sum[ROWS][VECS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++)
            sum[r][v] = v16_zero();
    for (int k = 0; k < depth; k++, a += ROWS, b += COLUMNS) {
        v16 row[VECS];
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++)
            row[v] = v16_load(b + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            v16 x = v16_set1(a[r]);
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++)
                sum[r][v] = v16_fma(x, row[v], sum[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) {
            int width = n - v * LANES;
            if (r >= m || width <= 0) continue;
            float *at = c + (size_t)r * c_row + v * LANES;
            if (width >= LANES)
                v16_store(at, add ? v16_add(v16_load(at), sum[r][v]) : sum[r][v]);
            else
                v16_store_part(at, add ? v16_add(v16_load_part(at, width), sum[r][v]) : sum[r][v],
                               width);
        }
}

#define NAME_OF(isa) NAME(isa)
#define NAME(isa) gemm_block_##isa
void NAME_OF(ISA)(const struct gemm_block *block) {
    const struct gemm_block g = *block;
    for (int k = 0; k < g.k; k += GEMM_DEPTH) {
        int depth = least(GEMM_DEPTH, g.k - k);
        bool add = g.add || k > 0;
        copy_columns(g.b_tiles, g.b, g.n, k, depth);
        for (int i = 0; i < g.m; i += GEMM_ROWS) {
            int rows = least(GEMM_ROWS, g.m - i);
            copy_rows(g.a_tiles, g.a, i, rows, k, depth);
            for (int j = 0; j < g.n; j += COLUMNS)
                for (int r = 0; r < rows; r += ROWS)
                    tile(g.c + (size_t)(i + r) * g.c_row + j, g.c_row, add,
                         g.a_tiles + (size_t)r * (size_t)depth,
                         g.b_tiles + (size_t)j * (size_t)depth, depth, least(ROWS, rows - r),
                         least(COLUMNS, g.n - j));
        }
    }
}
