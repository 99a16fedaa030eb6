/* gpu_kernels.h - the kernels of training on a device, and the functions that launch them; each .cu says shapes, launch, bound
 * and twin.  All queue on the device's stream; pointers are device memory. */
#ifndef URCHIN_CONVERT_GPU_KERNELS_H
#define URCHIN_CONVERT_GPU_KERNELS_H

#include "compute/gpu.h"
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- gpu_lesson.cu ---- */

/* to[i][0 .. n_floats - 1] = from[rows ? rows[i] - first : i][same], for i < n; to is dense. */
void gpu_take_rows(struct gpu *g, float *to, size_t n_floats, const float *from, size_t from_row, const int *rows, int first,
                   int n);

/* y = x rotated by RoPE: of every layer n rows of n_heads heads of D floats; row i of them stands at positions[rows ? rows[i] : i],
 * whose angles are cosines, sines [position][D / 2]. */
struct gpu_turn {
    float *y;       /* [n_layers][n][n_heads D] */
    const float *x; /* n_layers times x_layer floats: n rows, x_row apart */
    size_t x_layer, x_row;
    const int *rows, *positions;
    const float *cosines, *sines;
    int n_layers, n, n_heads, head_dim;
};
void gpu_turn_rows(struct gpu *g, const struct gpu_turn *turn);

/* most[layer][head] = largest |x| of that head, over the rows of struct gpu_turn's x. */
void gpu_largest(struct gpu *g, float *most, const float *x, size_t x_layer, size_t x_row, int n_layers, int n, int n_heads,
                 int head_dim);

/* Tiles: a product's rows by 32; its columns, and keys of a row's span, by 64. */
enum { GPU_ROW_TILE = 32, GPU_KEY_TILE = 64 };

#ifdef __cplusplus
}
#endif
#endif
