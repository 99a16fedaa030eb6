/* gpu_matrix_device.cuh - how a weight matrix lies in device memory, and how kernels read it.
 *
 * fp32   W[n][k] row by row, as the library's GEMM wants it.
 * bf16   the same, every row padded with zeros to a multiple of 8 (16 bytes).
 * fp8    W[n][k] row by row, n_in bytes each, and one fp32 scale for each row.
 * int8, int4   records of 16 rows n and one block of 32 k, [n_tiles][n_blocks][record], in the
 * order in which the lanes of a warp need them as the A operand of mma m16n8k16: int8 544 bytes
 * lane 4 g + t: uint8 q + 128 of row g, k = 8 t .. 8 t + 7, then of row g + 8 then g = 0 .. 7: fp16
 * s of rows g, g + 8 int4 320 bytes   lane 4 g + t: the same, nibbles, lowest k lowest then g = 0
 * .. 7: fp16 s of rows g, g + 8, fp16 m of rows g, g + 8 so a warp reads whole records, and a
 * tile's records are one ascending stream.
 *
 * A sum over k may take k in any order, as long as both operands do: of the 32 k of a block, lane t
 * of a quad holds 8 t .. 8 t + 7, which are two words of either operand for each of two mmas (k = 8
 * t + 4 i + 2 h + e: mma i, word h, half e).  Rows of x and of bf16 weights are then read as they
 * lie, 16 bytes a lane, without ldmatrix.
 *
 * A weight's value, in every kernel, is fp32 s q (exact: 11 + 7 bits) or s q + m (rounded once),
 * and where a product takes bf16 that value rounded to nearest even.  Of fp8 products take q, which
 * bf16 holds exactly, and sums are multiplied by s. */
#ifndef URCHIN_COMPUTE_GPU_MATRIX_DEVICE_CUH
#define URCHIN_COMPUTE_GPU_MATRIX_DEVICE_CUH

#include "compute/cuda.h"
#include "compute/gpu_matrix.h"
extern "C" {
#include "compute/matrix.h"
}

enum {
    TILE = 16,    /* rows of W in an mma */
    K_BLOCK = 32, /* k of one scale */
    WARP = 32,
    INT8_SCALES = 512,
    INT8_RECORD = INT8_SCALES + 32,
    INT4_SCALES = 256,
    INT4_RECORD = INT4_SCALES + 64,
};

struct gpu_matrix {
    enum weight_type type;
    int n_out, n_in, n_blocks, n_tiles;
    int stride;          /* elements from row to row: fp32, bf16, fp8 */
    int n_processors;    /* of the device */
    int shared_bytes;    /* that a block of threads can have there */
    unsigned char *data; /* owned */
    float *scales;       /* owned: fp8, [n_out]; else NULL */
    void
        *dense; /* owned: rows without padding for the GEMM, where bf16 rows have some; else NULL */
    size_t bytes;
};

/* The bits of 2^23, a float whose last bit is one: an OR puts an integer below it, a subtraction
 * takes it away again. Kernels are given it as an argument: as a constant it would cost an
 * instruction beside the mask at every OR. */
enum { FLOAT_2_23 = 0x4b000000 };

DEVICE float masked(uint32_t bits, uint32_t mask, uint32_t magic) { /* 2^23 + (bits & mask) */
    return as_float((bits & mask) | magic);
}

/* 8 consecutive k of a row as bf16 pairs. */
DEVICE void widen_int8(uint32_t (&out)[4], uint32_t q0, uint32_t q4, float s, uint32_t magic) {
    const uint32_t q[4] = {q0, q0 >> 16, q4, q4 >> 16};
    const float s8 = s * 0x1p-8f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float low = masked(q[i], 0xffu, magic) - 8388736.0f;    /* 2^23 + 128 */
        const float high = masked(q[i], 0xff00u, magic) - 8421376.0f; /* 2^23 + 2^15 */
        out[i] = pack_bf16(s * low, s8 * high);
    }
}

DEVICE void widen_int4(uint32_t (&out)[4], uint32_t q0, float s, float m, uint32_t magic) {
    const float s4 = s * 0x1p-4f, s8 = s * 0x1p-8f, s12 = s * 0x1p-12f, one = 8388608.0f;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t q = q0 >> 8 * i;
        out[i] = pack_bf16(fmaf(s, masked(q, 0xfu, magic) - one, m),
                           fmaf(s4, masked(q, 0xf0u, magic) - one, m));
        out[i + 1] = pack_bf16(fmaf(s8, masked(q, 0xf00u, magic) - one, m),
                               fmaf(s12, masked(q, 0xf000u, magic) - one, m));
    }
}

DEVICE float fp16_of_pair(uint32_t pair, int high) {
    return half_to_float((uint16_t)(high ? pair >> 16 : pair));
}

/* What a lane holds of record `at`: [row g, row g + 8][4 words of 8 k]. */
DEVICE void read_int8(uint32_t (&out)[2][4], const unsigned char *at, int lane, uint32_t magic) {
    const uint4 q = *(const uint4 *)(at + 16 * lane);
    const uint32_t s = *(const uint32_t *)(at + INT8_SCALES + lane / 4 * 4);
    widen_int8(out[0], q.x, q.y, fp16_of_pair(s, 0), magic);
    widen_int8(out[1], q.z, q.w, fp16_of_pair(s, 1), magic);
}

DEVICE void read_int4(uint32_t (&out)[2][4], const unsigned char *at, int lane, uint32_t magic) {
    const uint2 q = *(const uint2 *)(at + 8 * lane);
    const uint2 sm = *(const uint2 *)(at + INT4_SCALES + lane / 4 * 8);
    widen_int4(out[0], q.x, fp16_of_pair(sm.x, 0), fp16_of_pair(sm.y, 0), magic);
    widen_int4(out[1], q.y, fp16_of_pair(sm.x, 1), fp16_of_pair(sm.y, 1), magic);
}

/* Of fp8 record `at`, 16 rows of 32 bytes: q alone, not s q. */
DEVICE void read_fp8(uint32_t (&out)[2][4], const unsigned char *at, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint2 q = ((const uint2 *)at)[half * WARP + lane];
        out[half][0] = e4m3_pair_to_bf16(q.x, 0), out[half][1] = e4m3_pair_to_bf16(q.x, 1);
        out[half][2] = e4m3_pair_to_bf16(q.y, 0), out[half][3] = e4m3_pair_to_bf16(q.y, 1);
    }
}

/* W[n][k] */
DEVICE float matrix_value(const gpu_matrix &w, int n, int k) {
    const size_t record = (size_t)(n / TILE) * (size_t)w.n_blocks + (size_t)(k / K_BLOCK);
    const int half = n % TILE / 8, g = n % 8, lane = 4 * g + k % K_BLOCK / 8, i = k % 8;
    switch (w.type) {
    case WEIGHT_FP32:
        return ((const float *)w.data)[(size_t)n * (size_t)w.stride + (size_t)k];
    case WEIGHT_BF16:
        return bf16_to_float(((const uint16_t *)w.data)[(size_t)n * (size_t)w.stride + (size_t)k]);
    case WEIGHT_INT8: {
        const unsigned char *at = w.data + record * INT8_RECORD;
        const uint16_t *s = (const uint16_t *)(at + INT8_SCALES);
        return half_to_float(s[2 * g + half]) * (float)((int)at[16 * lane + 8 * half + i] - 128);
    }
    case WEIGHT_FP8:
        return w.scales[n] * e4m3_to_float(w.data[(size_t)n * (size_t)w.stride + (size_t)k]);
    default: {
        const unsigned char *at = w.data + record * INT4_RECORD;
        const uint16_t *sm = (const uint16_t *)(at + INT4_SCALES) + 4 * g + half;
        const uint32_t q = ((const uint32_t *)at)[2 * lane + half] >> 4 * i & 15u;
        return fmaf(half_to_float(sm[0]), (float)q, half_to_float(sm[2]));
    }
    }
}

/* gpu_matrix_product.cu: y = x W^T + bias by our kernels.  tiles: 16 rows of W that a block of
 * threads takes, 1, 2 or 4 as far as there is such a kernel (tests); 0: what is fastest. */
extern "C" void gpu_matrix_product(struct gpu *g, float *y, size_t y_stride, const void *x,
                                   size_t x_stride, int n_rows, const struct gpu_matrix *w,
                                   const float *bias, int tiles);

/* gpu_fp8.cu: rows of bf16 as E4M3, and what multiplies sums of them. */
extern "C" void gpu_quantise_fp8(struct gpu *g, void *q, float *scales, const void *x,
                                 size_t x_stride, int n_rows, int n_in);
extern "C" void gpu_scale_fp8(struct gpu *g, float *y, size_t y_stride, const float *x_scales,
                              const float *w_scales, const float *bias, int n_rows, int n_out);

#endif
