/* gemm.h - products of plain fp32 matrices in any orientation, for who trains:  C (+)= A B.
 *
 *   c[i][j] (+)= sum_k a(i, k) b(k, j)     a(i, k) at a[i a_row + k a_step],  b(k, j) at b[k b_row + j b_step]
 *
 * so A B^T, A B and A^T B are one call with other steps.  K is summed in pieces of GEMM_DEPTH, ascending, one
 * fused multiply-add each, and the pieces are added in ascending order to what c held (add) or to nothing: an element's bits do not depend
 * on the team, nor on how many rows or columns are asked for at once.
 *
 * Cost: 2 m n k flops at 70 to 80 % of the peak of fused multiply-adds, for m and n from 100 up (both operands are
 * copied into tiles first). */
#ifndef URCHIN_COMPUTE_GEMM_H
#define URCHIN_COMPUTE_GEMM_H

#include "compute/team.h"
#include "config/err.h"
#include <stdbool.h>
#include <stddef.h>

enum { GEMM_DEPTH = 256 };

struct gemm_matrix {
    const float *at;
    size_t row, step; /* floats from one row to the next, and from one element of a row to the next */
};

/* Rows of `row` floats; and the same seen as its transpose. */
static inline struct gemm_matrix gemm_plain(const float *at, size_t row) {
    return (struct gemm_matrix){at, row, 1};
}
static inline struct gemm_matrix gemm_transposed(const float *at, size_t row) {
    return (struct gemm_matrix){at, 1, row};
}

/* bf16: operands are rounded to it (nearest even) as they are copied, products and sums stay fp32; K goes in pairs.  Twice as fast,
 * where the CPU has such products. */
bool gemm_has_bf16(void);

struct gemm_scratch; /* tiles of one team's threads: one gemm at a time */
enum err gemm_scratch_new(struct gemm_scratch **out, struct team *team, bool bf16); /* ERR_ARG: it has not */
void gemm_scratch_free(struct gemm_scratch *s); /* NULL is fine */
size_t gemm_scratch_bytes(int n_threads);

/* c [m][n] in rows of c_row floats; c overlaps neither operand.  k 0: zeros, or c as it was.  Allocates nothing. */
void gemm(struct gemm_scratch *s, float *c, size_t c_row, bool add, struct gemm_matrix a,
          struct gemm_matrix b, int m, int n, int k);

#endif
