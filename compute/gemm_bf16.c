/* gemm_bf16.c - the block of gemm_kernel.c with both operands rounded to bf16, by the CPU's dot
 * products of bf16 pairs (AVX512_BF16).
 *
 * Tiles hold pairs of k side by side: [k / 2][columns or rows] { low half k, high half k + 1 }.  An
 * instruction adds a(k + 1) b(k + 1) and a(k) b(k) to a sum, in fp32. */
#include "compute/gemm_kernel.h"

#include <immintrin.h>
#include <stdint.h>

enum { LANES = 16, ROWS = 12, VECS = 2, COLUMNS = VECS * LANES, MOST_PAIRS = GEMM_DEPTH / 2 };

static int least(int a, int b) {
    return a < b ? a : b;
}

/* Of two vectors' lanes: pairs (x, y), rounded to nearest even. */
static inline __m512i pairs(__m512 x, __m512 y) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(y));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* One tile of `width` lines (rows of A, columns of B), n of them there, others zeros; a line's
 * element k is at line * to_line + k * to_k. */
static inline __attribute__((always_inline)) void copy_tile(uint32_t *to, const int width,
                                                            const float *from, size_t to_line,
                                                            size_t to_k, int n, int depth) {
    int n_pairs = (depth + 1) / 2;
    if (to_line == 1) { /* lines side by side */
        for (int p = 0; p < n_pairs; p++, to += width, from += 2 * to_k)
            for (int c = 0; c < width; c += LANES) {
                int left = n - c > LANES ? LANES : n - c > 0 ? n - c : 0;
                __mmask16 mask = (__mmask16)((1u << left) - 1);
                __m512 x = _mm512_maskz_loadu_ps(mask, from + c), y = _mm512_setzero_ps();
                if (2 * p + 1 < depth) y = _mm512_maskz_loadu_ps(mask, from + to_k + c);
                __mmask16 all = width - c >= LANES ? 0xffff : (__mmask16)((1u << (width - c)) - 1);
                _mm512_mask_storeu_epi32(to + c, all, pairs(x, y));
            }
        return;
    }
    uint32_t lines[COLUMNS][MOST_PAIRS]; /* each line's pairs, if elements of a line lie together */
    for (int c = 0; c < width; c++) {
        const float *line = from + (size_t)c * to_line;
        uint16_t *out = (uint16_t *)lines[c];
        for (int k = 0; k < 2 * n_pairs; k += LANES) {
            int left = depth - k > LANES ? LANES : depth - k;
            __m512 x = _mm512_setzero_ps();
            if (c < n && to_k == 1) {
                x = _mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), line + k);
            } else if (c < n) {
                float some[LANES] = {0};
                for (int i = 0; i < left; i++)
                    some[i] = line[(size_t)(k + i) * to_k];
                x = _mm512_loadu_ps(some);
            }
            _mm256_storeu_si256((__m256i *)(out + k), (__m256i)_mm512_cvtneps_pbh(x));
        }
    }
    for (int p = 0; p < n_pairs; p++, to += width)
        for (int c = 0; c < width; c++)
            to[c] = lines[c][p];
}

static inline __attribute__((always_inline)) void tile(float *c, size_t c_row, bool add,
                                                       const uint32_t *a, const uint32_t *b,
                                                       int n_pairs, int m, int n) {
    __m512 sum[ROWS][VECS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++)
            sum[r][v] = _mm512_setzero_ps();
    for (int p = 0; p < n_pairs; p++, a += ROWS, b += COLUMNS) {
        __m512bh row[VECS];
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++)
            row[v] = (__m512bh)_mm512_loadu_si512(b + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            __m512bh x = (__m512bh)_mm512_set1_epi32((int)a[r]);
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, row[v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) {
            int width = n - v * LANES;
            if (r >= m || width <= 0) continue;
            __mmask16 mask = width >= LANES ? 0xffff : (__mmask16)((1u << width) - 1);
            float *at = c + (size_t)r * c_row + v * LANES;
            __m512 x = sum[r][v];
            if (add) x = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), x);
            _mm512_mask_storeu_ps(at, mask, x);
        }
}

void gemm_block_bf16(const struct gemm_block *block) {
    const struct gemm_block g = *block;
    uint32_t *a = (uint32_t *)g.a_tiles, *b = (uint32_t *)g.b_tiles;
    for (int k = 0; k < g.k; k += GEMM_DEPTH) {
        int depth = least(GEMM_DEPTH, g.k - k), n_pairs = (depth + 1) / 2;
        bool add = g.add || k > 0;
        for (int j = 0; j < g.n; j += COLUMNS)
            copy_tile(b + (size_t)j * (size_t)n_pairs, COLUMNS,
                      g.b.at + (size_t)k * g.b.row + (size_t)j * g.b.step, g.b.step, g.b.row,
                      least(COLUMNS, g.n - j), depth);
        for (int i = 0; i < g.m; i += GEMM_ROWS) {
            int rows = least(GEMM_ROWS, g.m - i);
            for (int r = 0; r < rows; r += ROWS)
                copy_tile(a + (size_t)r * (size_t)n_pairs, ROWS,
                          g.a.at + (size_t)(i + r) * g.a.row + (size_t)k * g.a.step, g.a.row,
                          g.a.step, least(ROWS, rows - r), depth);
            for (int j = 0; j < g.n; j += COLUMNS)
                for (int r = 0; r < rows; r += ROWS)
                    tile(g.c + (size_t)(i + r) * g.c_row + j, g.c_row, add,
                         a + (size_t)r * (size_t)n_pairs, b + (size_t)j * (size_t)n_pairs, n_pairs,
                         least(ROWS, rows - r), least(COLUMNS, g.n - j));
        }
    }
}
