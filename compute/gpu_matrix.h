/* gpu_matrix.h - weight matrices on a device, and  Y = X W^T (+ bias)  over them: matrix.h's twin.
 *
 *   y[m][n] = bias[n] + sum_k x[m][k] W[n][k]
 *
 * A matrix holds the very values of the packed matrix it was made from (same scales, same integers).  Rows of X are fp32
 * where weights are fp32, bf16 otherwise (int8 and int4 weights are widened to bf16 products, fp32 sums: activations are not
 * quantised).  fp8 weights (devices with gpu_has_fp8()) are widened for generated rows, which is exact; rows of a prompt are
 * themselves quantised, each to E4M3 by its own absmax / 448, and fp8 products are summed.
 *
 * Promise: y[m][:] depends on x[m][:], W and the path alone - not on n_rows, m or the other rows.  The two paths may
 * differ in their last bits (fp8: by what rounding a row to E4M3 does): rows of a prompt always take GPU_PROMPT (the
 * library's GEMM, one algorithm per shape; int8 and int4 are widened to a bf16 matrix first), generated rows always
 * GPU_GENERATED (our kernel, which reads the weights once per 64 rows, summing k in one fixed order). */
#ifndef URCHIN_COMPUTE_GPU_MATRIX_H
#define URCHIN_COMPUTE_GPU_MATRIX_H

#include "compute/gpu.h"
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct matrix; /* matrix.h */
struct gpu_matrix;
enum gpu_path { GPU_PROMPT, GPU_GENERATED };

/* Some of a matrix: rows of up to three ranges one behind the other, each cut to the same columns. */
struct gpu_matrix_range {
    int first, n;
};
struct gpu_matrix_part {
    int n_ranges;
    struct gpu_matrix_range rows[3], columns;
};

/* Queues the copy of `from`, or a part of it (NULL: all), which may be freed once this returns.  ERR_NOMEM.  ERR_ARG: a part that
 * `from` does not have, or whose columns begin inside a block (int8, int4: 32) or, fp8, whose sizes are no multiples of 16. */
enum err gpu_matrix_new(struct gpu_matrix **out, struct gpu *g, const struct matrix *from, const struct gpu_matrix_part *part);
void gpu_matrix_free(struct gpu *g, struct gpu_matrix *w); /* NULL is fine */
int gpu_matrix_n_out(const struct gpu_matrix *w);
int gpu_matrix_n_in(const struct gpu_matrix *w);
size_t gpu_matrix_bytes(const struct gpu_matrix *w);
bool gpu_matrix_reads_bf16(const struct gpu_matrix *w); /* rows of X are bf16, not fp32 */

/* Room for GPU_PROMPT with up to n_rows rows: int8 and int4 the matrix in bf16, 2 n_out n_in bytes; fp8 the rows,
 * n_rows (n_in + 4); 0 for the others. */
size_t gpu_matmul_scratch_bytes(const struct gpu_matrix *w, int n_rows);

/* Everything on the device; strides in elements of x and y.  bias [n_out] fp32 or NULL.  n_rows 0 does nothing.  x_stride and its
 * row starts are multiples of 16 bytes. */
void gpu_matmul(struct gpu *g, void *scratch, float *y, size_t y_stride, const void *x, size_t x_stride, int n_rows,
                const struct gpu_matrix *w, const float *bias, enum gpu_path path);

/* Rows of W as fp32: x[i][:] = W[index[i]][:], or zeros where index[i] < 0; index on the device. */
void gpu_matrix_rows(struct gpu *g, float *x, const int32_t *index, int n, const struct gpu_matrix *w);

#ifdef __cplusplus
}
#endif
#endif
