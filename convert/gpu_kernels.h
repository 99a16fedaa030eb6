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

/* y = x rotated by RoPE: of every layer n rows of n_heads heads of D floats; row i of them stands at
 * positions[rows ? rows[i] : i], whose angles are cosines, sines [position][D / 2]. */
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

/* ---- gpu_product.cu ---- */

/* Tiles: a product's rows by 32; its columns, and keys of a row's span, by 64. */
enum { GPU_ROW_TILE = 32, GPU_KEY_TILE = 64 };

/* A matrix of every layer and head: element (i, j) of layer l and head h is at[l layer + h / per head + i row + j column]. */
struct gpu_operand {
    float *at;
    size_t layer, head; /* floats */
    int per;            /* heads that share one */
    size_t row, column; /* one of them is 1 */
};

/* Where the query rows' keys lie.  Rows of a tile see keys of its span alone; spans are whole key tiles, and both ends ascend. */
enum gpu_limit {
    GPU_WHOLE,
    GPU_COLUMNS, /* C's columns are keys: tiles outside the span are not written */
    GPU_TERMS,   /* the sum is over keys: over those of the span */
    GPU_ROWS     /* C's rows are keys, the sum is over query rows: over those that see the tile */
};

/* C_h = (C_h +) sum over i < n_terms of A_{h n_terms + i} B_{h n_terms + i},  C [m][n], A [m][k], B [k][n], for h < n_heads and
 * all layers.  Each element is one sum in the order of terms, then k. */
struct gpu_product {
    struct gpu_operand c, a, b;
    int m, n, k, n_layers, n_heads, n_terms;
    int add; /* to what is there */
    enum gpu_limit limit;
    const int *spans; /* GPU_COLUMNS, GPU_TERMS: [row tiles][2] first key, end;  GPU_ROWS: [row tiles of keys][2] first row,
                       * end */
};
void gpu_products(struct gpu *g, const struct gpu_product *product);

/* ---- gpu_features.cu ---- */

/* phi [n][2 f] of projections u [n][f], as convert_kernels.features without pad lanes; map: enum feature_map.  reach [n]:
 * queries; NULL: keys. */
void gpu_features(struct gpu *g, int map, float *phi, float *reach, const float *u, size_t n, int f);

/* du [n][f] from dphi [n][2 f], as convert_kernels.features_back; du may be u. */
void gpu_features_back(struct gpu *g, int map, float *du, const float *dphi, const float *phi, const float *u, int key, size_t n,
                       int f);

/* ---- gpu_rows.cu ---- */

/* What a row leaves, floats in the order of struct student_sums, then dL/dmix. */
enum { GPU_SUMS = 11, GPU_RESULTS = 12 };

struct gpu_rows_args { /* of all layers, query heads and rows; row (l, h, r) is number (l n_heads + h) n_rows + r */
    int n_layers, n_heads, n_kv_heads, n_rows, head_dim, n_tokens;
    size_t columns;  /* floats from row to row of p, s, a, ev: a key's column is its token */
    float *p;        /* q . k; weigh: the teacher's weights */
    float *s;        /* phi_q . phi_k; grade: t / s over linear keys, else 0 */
    float *a;        /* weigh: the pupil's weights */
    const float *ev; /* grade: e . v, or NULL: outputs are no part of the loss */
    const float *ey; /* grade: [rows] e . y */
    const float *reach; /* [rows] */
    float *results;     /* [rows][GPU_RESULTS] */
    const int *first, *position; /* [n_rows] of a row's document: its first token; the row's place in it */
    const int *spans;            /* [row tiles][2] */
    const float *mix;            /* [n_layers] of n_heads, mix_layer apart */
    size_t mix_layer;
    float ce;
    int window, window_size, sinks, mixing; /* as attention.h has them */
    int max_distance; /* 0: the pupil's sinks are the teacher's; else beyond it they count as that far, for which: */
    const float *q, *k; /* before RoPE: [n_layers] of n_rows of [n_heads D], q_row apart, and of n_tokens keys, k_row apart */
    size_t q_layer, q_row, k_layer, k_row;
    const float *far_cosines, *far_sines; /* [D / 2] */
};
void gpu_weigh(struct gpu *g, const struct gpu_rows_args *args); /* p, s -> p, a, results */
void gpu_grade(struct gpu *g, const struct gpu_rows_args *args); /* p, s, a, ev -> s, dL/dmix among the results */

/* y, teacher [rows][D]: y becomes e = mse (y - teacher), ey [rows] = e . y before that, and results get both squared norms. */
void gpu_errors(struct gpu *g, const struct gpu_rows_args *args, float *y, const float *teacher, float *ey, float mse);

/* sums [layers][heads][GPU_SUMS] += results, mix_grads (NULL: none) += dL/dmix, each over its rows in their order. */
void gpu_count(struct gpu *g, const struct gpu_rows_args *args, double *sums, float *mix_grads);

/* ---- gpu_adam.cu ---- */

/* norms [n_layers] of grads [n_layers][n]. */
void gpu_norms(struct gpu *g, double *norms, const float *grads, size_t n, int n_layers);

struct gpu_step { /* convert_kernels.adam's, for a layer of n parameters: n_maps of the maps, then mixing */
    size_t n, n_maps;
    float rate, rate_mix, correct_m, correct_v, beta_m, beta_v;
    double most; /* longer gradients are cut to it */
};
/* w, m, v take the step of each layer's gradient, which becomes 0. */
void gpu_adam(struct gpu *g, float *w, float *m, float *v, float *grads, const double *norms, const struct gpu_step *step,
              int n_layers);

#ifdef __cplusplus
}
#endif
#endif
