/* product.h - the one product that kernels.c consists of, for any family of vec.h.
 *
 *   y[r][16 v ..] (+)= sum_{i < n} a[r][i] b[i][16 v ..]      i ascending, one fused multiply-add each
 *
 * As many rows and vectors are summed side by side as the registers hold.  Beside every i, some of
 * the memory that is needed next is asked for (struct ahead). */
#ifndef URCHIN_ATTENTION_PRODUCT_H
#define URCHIN_ATTENTION_PRODUCT_H

#include "attention/kernels.h"
#include "compute/vec.h"

struct panel { /* b: row i's vector v at element i * row + v * vec */
    const void *at;
    enum kv_type type;
    size_t row, vec;
};

static struct panel panel_fp32(const float *b, int lanes) {
    return (struct panel){b, KV_FP32, (size_t)lanes, TILE};
}

static struct panel panel_from(struct panel b, size_t element) {
    size_t size = b.type == KV_BF16 ? sizeof(uint16_t) : sizeof(float);
    b.at = (const char *)b.at + element * size;
    return b;
}

struct operand { /* a[r][i] at r * row + i * step */
    const float *at;
    size_t row, step;
};

/* How many rows and vectors are summed side by side: as many as fit the registers.  (Instrumented
 * code is slow anyhow, and gcc 12 takes half a minute over the big tiles.) */
#if V_PARTS == 4 || defined(__SANITIZE_ADDRESS__)
enum { ROWS = 2, VECS = 1 };
#elif V_PARTS == 2
enum { ROWS = 4, VECS = 1 };
#else
enum { ROWS = 4, VECS = 4 };
#endif

/* Beside every i, LINES cache lines of what is needed next are asked for; where nothing is, step is
 * 0 and it is one line at hand again and again, which costs nothing. */
enum { LINES = 2 };
struct asked {
    const char *next;
    size_t step;
};

/* How 16-bit elements are loaded two vectors at a time: from two rows of b (a tile of keys), or from
 * one (values). */
enum pairs { FP32, DOWN, ACROSS };

V_FN void load_rows(v16 (*row)[VECS], const int vecs, const enum pairs pairs, struct panel b,
                    size_t i) {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; v++) {
        const size_t at = i * b.row + (size_t)v * b.vec;
        const uint16_t *half = (const uint16_t *)b.at + at;
        if (pairs == FP32)
            row[0][v] = v16_load((const float *)b.at + at);
        else if (pairs == DOWN)
            v16_load_bf16_pair(half, &row[0][v], &row[1][v]);
        else if (v + 1 == vecs && v % 2 == 0)
            row[0][v] = v16_load_bf16(half);
        else if (v % 2 == 0)
            v16_load_bf16_pair(half, &row[0][v], &row[0][v + 1]);
    }
}

V_FN void add_products(v16 (*sum)[VECS], const int rows, const int vecs, struct operand a, size_t i,
                       const v16 *row) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        v16 weight = v16_set1(a.at[(size_t)r * a.row + i * a.step]);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
            sum[r][v] = v16_fma(weight, row[v], sum[r][v]);
    }
}

V_FN void block(const int rows, const int vecs, const enum pairs pairs, float *y, size_t y_row,
                bool add, struct operand a, struct panel b, int n, struct asked ask) {
    const int at_once = pairs == DOWN ? 2 : 1;
    v16 sum[ROWS][VECS], row[2][VECS];
    int i = 0;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
            sum[r][v] = add ? v16_load(y + (size_t)r * y_row + v * TILE) : v16_zero();
    for (; i + at_once <= n; i += at_once) {
        load_rows(row, vecs, pairs, b, (size_t)i);
        if (pairs == DOWN) /* the next tiles: the hardware sees four short streams, and starts late */
            for (int v = 0; v < vecs; v++)
                ask_for_line((const uint16_t *)b.at + (size_t)i * b.row + (size_t)(v + VECS) * b.vec);
        for (int k = 0; k < at_once * LINES; k++)
            ask_for_line(ask.next + k * CACHE_LINE);
        ask.next += ask.step * at_once;
        add_products(sum, rows, vecs, a, (size_t)i, row[0]);
        if (pairs == DOWN) add_products(sum, rows, vecs, a, (size_t)i + 1, row[1]);
    }
    if (pairs == DOWN && i < n) {
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
            row[0][v] = v16_load_bf16((const uint16_t *)b.at + (size_t)i * b.row + (size_t)v * b.vec);
        add_products(sum, rows, vecs, a, (size_t)i, row[0]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
            v16_store(y + (size_t)r * y_row + v * TILE, sum[r][v]);
}

V_FN void block_rows(int rows, const int vecs, const enum pairs pairs, float *y, size_t y_row,
                     bool add, struct operand a, struct panel b, int n, struct asked ask) {
    if (ROWS == 4 && rows == 4)
        block(4, vecs, pairs, y, y_row, add, a, b, n, ask);
    else if (ROWS == 4 && rows == 3)
        block(3, vecs, pairs, y, y_row, add, a, b, n, ask);
    else if (rows == 2)
        block(2, vecs, pairs, y, y_row, add, a, b, n, ask);
    else
        block(1, vecs, pairs, y, y_row, add, a, b, n, ask);
}

V_FN void block_vecs(int rows, int vecs, const enum pairs pairs, float *y, size_t y_row, bool add,
                     struct operand a, struct panel b, int n, struct asked ask) {
    if (VECS == 4 && vecs == 4)
        block_rows(rows, 4, pairs, y, y_row, add, a, b, n, ask);
    else if (VECS == 4 && vecs == 3)
        block_rows(rows, 3, pairs, y, y_row, add, a, b, n, ask);
    else if (VECS == 4 && vecs == 2)
        block_rows(rows, 2, pairs, y, y_row, add, a, b, n, ask);
    else
        block_rows(rows, 1, pairs, y, y_row, add, a, b, n, ask);
}

/* The next n * LINES lines of what is to be read soon. */
static struct asked ask_some(struct ahead *ahead, int n, const void *hot) {
    while (ahead && ahead->n && ahead->range[ahead->n - 1].at >= ahead->range[ahead->n - 1].end)
        ahead->n--;
    if (!ahead || !ahead->n) return (struct asked){hot, 0};
    struct asked ask = {ahead->range[ahead->n - 1].at, LINES * CACHE_LINE};
    ahead->range[ahead->n - 1].at += (size_t)n * LINES * CACHE_LINE;
    return ask;
}

/* y[r][16 v ..] (+)= sum_{i < n} a[r][i] b[i][16 v ..], i ascending; ahead may be NULL. */
static void product(float *y, size_t y_row, bool add, struct operand a, int n_rows, struct panel b,
                    int n, int n_vecs, struct ahead *ahead) {
    for (int v = 0; v < n_vecs; v += VECS) {
        int vecs = n_vecs - v < VECS ? n_vecs - v : VECS;
        struct panel part = panel_from(b, (size_t)v * b.vec);
        for (int r = 0; r < n_rows; r += ROWS) {
            int rows = n_rows - r < ROWS ? n_rows - r : ROWS;
            float *out = y + (size_t)r * y_row + (size_t)v * TILE;
            struct operand from = {a.at + (size_t)r * a.row, a.row, a.step};
            struct asked ask = ask_some(ahead, n, out);
            if (b.type == KV_FP32)
                block_vecs(rows, vecs, FP32, out, y_row, add, from, part, n, ask);
            else if (b.row == TILE)
                block_vecs(rows, vecs, DOWN, out, y_row, add, from, part, n, ask);
            else
                block_vecs(rows, vecs, ACROSS, out, y_row, add, from, part, n, ask);
        }
    }
}

#endif
