/* matrix.h - weight matrices packed for the CPU, and  Y = X W^T  over them.
 *
 *   y[m][n] = sum_k x[m][k] W[n][k]        X [n_rows, n_in]  W [n_out, n_in]  Y [n_rows, n_out]
 *
 * Formats (blocks of 32 consecutive k of one row n share a scale; a short last block is padded):
 *   fp32   as given
 *   bf16   rounded to nearest even; x stays fp32, products and sums are fp32 (with AMX x is taken in three
 *          bf16 parts that add up to it, and sums have another order)
 *   int8   W = s q, q in [-127, 127], s fp16 = absmax / 127; x is quantised the same way per row and block
 *          (scale fp32), block sums are exact integers, blocks are added in fp32 in ascending k
 *   int4   W = s q + m, q in [0, 15], s and m fp16 (GGUF's Q4_1; Q4_0 is the case m = -8 s); x as for int8
 *   fp8    W = s q, q in E4M3 (ops.h), s fp32 = absmax / 448 of the whole row; n_out and n_in multiples of 16.  For a GPU
 *          (gpu_matrix.h): it is packed here, and matmul() does not take it
 *
 * Promise: y[m][:] depends on x[m][:] and W alone - not on n_rows, the other rows, the team's size or
 * m.  K is summed in one order; threads split N.  int8 and int4 give the same bits on every instruction family. */
#ifndef URCHIN_COMPUTE_MATRIX_H
#define URCHIN_COMPUTE_MATRIX_H

#include "compute/team.h"
#include "config/err.h"
#include <stddef.h>
#include <stdint.h>

enum weight_type { WEIGHT_FP32, WEIGHT_BF16, WEIGHT_INT8, WEIGHT_INT4, WEIGHT_FP8 };

const char *weight_type_name(enum weight_type type); /* "fp32", "bf16", "int8", "int4", "fp8" */

struct matrix;

/* A zeroed matrix in huge pages; matrix_free() releases it. ERR_ARG: n_out or n_in < 1, or fp8 and
 * not a multiple of 16. */
enum err matrix_new(struct matrix **out, enum weight_type type, int n_out, int n_in);
void matrix_free(struct matrix *matrix); /* NULL is fine */

/* Packs rows first .. first + n_rows - 1 from w [n_rows, n_in] fp32 row-major (borrowed).  Any first
 * and n_rows inside the matrix.  Different rows may be packed by different threads at once
 * when they lie in different groups of 16 rows. */
void matrix_set_rows(struct matrix *matrix, int first, int n_rows, const float *w);

/* Row n as fp32 [n_in], as the packed format holds it: embedding look-up. */
void matrix_get_row(const struct matrix *matrix, int n, float *out);

/* Block b of row n of an int8 or int4 matrix, k = 32 b .. 32 b + 31:  W = s q + m  with fp16 s and m (m
 * is 0 for int8).  Beyond n_in q has no meaning. */
enum { MATRIX_BLOCK = 32 };
struct matrix_block {
    int8_t q[MATRIX_BLOCK];
    uint16_t s, m; /* bits of fp16 */
};
void matrix_get_block(const struct matrix *matrix, int n, int b, struct matrix_block *out);

/* Row n of an fp8 matrix: q [n_in], borrowed from it, and s. */
const uint8_t *matrix_get_fp8(const struct matrix *matrix, int n, float *s);

int matrix_n_out(const struct matrix *matrix);
int matrix_n_in(const struct matrix *matrix);
enum weight_type matrix_type(const struct matrix *matrix);
size_t matrix_bytes(const struct matrix *matrix);

/* Scratch for quantised activations; one per model. */
struct matmul_scratch;
enum err matmul_scratch_new(struct matmul_scratch **out, int max_rows, int max_n_in);
void matmul_scratch_free(struct matmul_scratch *scratch);

/* Y = X W^T (+ bias).  x row i starts at x + i * x_stride, y row i at y + i * y_stride (floats).
 * bias [n_out] or NULL.  n_rows <= scratch's max_rows; n_rows 0 does nothing.  Allocates nothing. */
void matmul(struct team *team, struct matmul_scratch *scratch, float *y, size_t y_stride,
            const float *x, size_t x_stride, int n_rows, const struct matrix *w,
            const float *bias);

/* The product after the next is by w (borrowed until it is made or another is expected), of so many
 * rows: with few, where reading w is what takes the time, threads that wait meanwhile load their first
 * panels (team.h).  NULL: nothing is expected. */
void matrix_expect(struct team *team, const struct matrix *w, int n_rows);

#endif
