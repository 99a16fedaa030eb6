/* gemm_kernel.h - the function that compute/gemm_kernel.c exports once per instruction family; gemm.h is for
 * everyone else. */
#ifndef URCHIN_COMPUTE_GEMM_KERNEL_H
#define URCHIN_COMPUTE_GEMM_KERNEL_H

#include "compute/gemm.h"

enum {
    GEMM_ROWS = 144,     /* rows of A copied at once: with GEMM_DEPTH 147 KB, in the second cache */
    GEMM_COLUMNS = 512,  /* columns of B copied at once: 512 KB */
    GEMM_TILE_ROWS = 12, /* a multiple of every family's tile */
    GEMM_TILE_COLUMNS = 32,
};

struct gemm_block { /* c [m][n] in rows of c_row; n <= GEMM_COLUMNS */
    float *c;
    size_t c_row;
    bool add;
    struct gemm_matrix a, b;
    int m, n, k;
    float *a_tiles, *b_tiles; /* [GEMM_ROWS * GEMM_DEPTH], [GEMM_DEPTH * GEMM_COLUMNS] */
};

typedef void gemm_block_fn(const struct gemm_block *block);
gemm_block_fn gemm_block_generic;
#if defined(__x86_64__)
gemm_block_fn gemm_block_avx2, gemm_block_avx512;
gemm_block_fn gemm_block_bf16; /* gemm_bf16.c */
#elif defined(__aarch64__)
gemm_block_fn gemm_block_dotprod;
#endif

#endif
