/* kernels.h - the functions that compute/kernels.c exports once per instruction family.
 *
 * Only compute/ calls them; everyone else uses matrix.h and ops.h.  They trust their arguments.
 *
 * Packed matrices are panels of 32 rows n of W (2 x 16 lanes), padded with zeros; a panel holds, in
 * ascending k,
 *   fp32  [n_in] { float w[32] }
 *   bf16  [n_blocks][16] { uint16 w[32][2] }                two k of a column together
 *   int8  [n_blocks] { uint8 q[8][32][4], fp16 s[32] }        q + 128 of k = 4 group + i
 *   int4  [n_blocks] { uint8 q[4][32][4], fp16 s[32], m[32] } low nibbles groups 0-3, high 4-7
 * all whole cache lines, read in one ascending stream. Blocks are 32 k; the last is padded.  In
 * int8 and int4 they are 8 groups of 4, which is what one byte dot product instruction takes.
 * int8 weights are stored with 128 added because that instruction multiplies unsigned by signed
 * bytes. */
#ifndef URCHIN_COMPUTE_KERNELS_H
#define URCHIN_COMPUTE_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    PANEL = 32,
    BLOCK = 32,
    INT8_BLOCK_SCALES = PANEL * BLOCK, /* where the scales begin */
    INT8_BLOCK_BYTES = INT8_BLOCK_SCALES + PANEL * 2,
    INT4_BLOCK_SCALES = PANEL * BLOCK / 2,
    INT4_BLOCK_BYTES = INT4_BLOCK_SCALES + PANEL * 4,
};

/* Rows of activations in blocks of 32: x ~= scale q, q in [-127, 127].  Of a block that holds an
 * infinity or NaN the scale is NaN; one below 1e-30 counts as zeros. */
struct quantised_rows {
    int8_t *q;         /* [rows][n_blocks][32] */
    float *scale;      /* [rows][n_blocks] */
    int32_t *offset;   /* [rows][n_blocks]: -128 sum(q), what adding 128 to the weights cost */
    float *scaled_sum; /* [rows][n_blocks]: scale sum(q), for the minima of int4 */
};

/* Where a family has split_row, it multiplies bf16 weights by three bf16 parts of x whose sum is x
 * (amx_bf16.h), and takes rows five at a time. */
enum { SPLIT_PARTS = 3, SPLIT_GROUP = 5 };

struct matmul_args {
    float *y;
    size_t y_stride;
    const float *x; /* fp32, bf16 */
    size_t x_stride;
    struct quantised_rows xq; /* int8, int4 */
    const uint16_t *x_parts;  /* bf16 of split_row: [n_rows, up to whole groups][3][n_blocks][32] */
    int n_rows, n_in, n_out, n_blocks;
    const unsigned char *w;
    size_t panel_bytes;
    const float *bias; /* [n_out] or NULL */
    bool streams;      /* cpu_streams() */
};

/* Columns PANEL first .. min(PANEL end, n_out) - 1 of all rows of y. */
typedef void matmul_kernel(const struct matmul_args *args, int first_panel, int end_panel);

struct compute_kernels {
    matmul_kernel *matmul[4]; /* by enum weight_type */
    void (*quantise_row)(const struct quantised_rows *out, int row, const float *x, int n_in);
    void (*split_row)(uint16_t *parts, int row, const float *x, int n_in); /* or NULL */
    /* ops.h */
    void (*rms_norm)(float *y, const float *x, const float *weight, int n, float eps);
    void (*layer_norm)(float *y, const float *x, const float *weight, const float *bias, int n,
                       float eps);
    void (*silu_mul)(float *y, const float *gate, const float *up, int n);
    void (*gelu_tanh)(float *y, const float *x, int n);
    void (*add_to)(float *y, const float *x, int n);
};

/* The table of cpu_isa(). */
const struct compute_kernels *compute_kernels(void);

extern const struct compute_kernels compute_kernels_generic;
#if defined(__x86_64__)
extern const struct compute_kernels compute_kernels_avx2, compute_kernels_avx512,
    compute_kernels_amx;
#elif defined(__aarch64__)
extern const struct compute_kernels compute_kernels_dotprod;
#endif

#endif
