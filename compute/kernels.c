/* kernels.c - the vector loops of compute/, built once per instruction family (ISA=generic, avx2, avx512).
 *
 * Every y[m][n] is one lane's sum over ascending k, whatever tile of rows and panels it is computed in, so
 * tile shapes are free to differ between families and row counts. */
#include "compute/kernels.h"

#include "compute/vec.h"
#include <math.h>

/* ---- lanes of int32 ---- */

V_FN v16i v16i_set1(int32_t x) {
    v16i r;
    V_EACH r.p[i] = x - (v_part_i){0};
    return r;
}
V_FN v16i v16i_load(const void *src) {
    v16i r;
    V_EACH r.p[i] = *(const v_part_i_any *)((const int32_t *)src + V_LANES * i);
    return r;
}
V_FN v16 v16i_float(v16i a) {
    v16 r;
    V_EACH r.p[i] = __builtin_convertvector(a.p[i], v_part);
    return r;
}
/* The high nibbles of all bytes moved low: 4 bits down, and what came from the neighbour masked away. */
V_FN v16i v16i_nibbles(v16i a, int high) {
    V_EACH a.p[i] = (v_part_i)((v_part_u)a.p[i] >> 4 * high & 0x0f0f0f0f);
    return a;
}

/* Four bytes x of a row, the same in every lane. */
V_FN v16i load_four(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return v16i_set1(four);
}

/* acc + the four products of unsigned bytes w, at most 15, and signed bytes x, per lane; exact. */
V_FN v16i dot_nibbles(v16i acc, v16i w, v16i x) {
    V_EACH {
#if defined(__AVX512VNNI__)
        acc.p[i] = (v_part_i)_mm512_dpbusd_epi32((__m512i)acc.p[i], (__m512i)w.p[i], (__m512i)x.p[i]);
#elif defined(__AVX2__)
        __m256i pairs = _mm256_maddubs_epi16((__m256i)w.p[i], (__m256i)x.p[i]);
        acc.p[i] += (v_part_i)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
        typedef int16_t half __attribute__((vector_size(64 / V_PARTS)));
        const v_part_u low = 0x00ff00ff - (v_part_u){0};
        half w0 = (half)((v_part_u)w.p[i] & low), w1 = (half)((v_part_u)w.p[i] >> 8 & low);
        half x0 = (half)((v_part_u)x.p[i] << 8) >> 8, x1 = (half)x.p[i] >> 8;
        v_part_i pairs = (v_part_i)(w0 * x0 + w1 * x1); /* at most 2 * 15 * 127 */
        acc.p[i] += (pairs << 16 >> 16) + (pairs >> 16);
#endif
    }
    return acc;
}

/* The same for w in [-127, 127] stored with 128 added, and acc started at int8_start(). */
V_FN v16i dot_bytes(v16i acc, v16i w, v16i x) {
    V_EACH {
#if defined(__AVX512VNNI__)
        acc.p[i] = (v_part_i)_mm512_dpbusd_epi32((__m512i)acc.p[i], (__m512i)w.p[i], (__m512i)x.p[i]);
#elif defined(__AVX2__)
        /* |w| (x with the sign of w): pairs reach 2 * 127 * 127, which 16 bits hold */
        __m256i s = _mm256_xor_si256((__m256i)w.p[i], _mm256_set1_epi8(-128));
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8((__m256i)x.p[i], s));
        acc.p[i] += (v_part_i)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
        typedef int16_t half __attribute__((vector_size(64 / V_PARTS)));
        v_part_u s = (v_part_u)w.p[i] ^ 0x80808080;
        half w0 = (half)(s << 8) >> 8, w1 = (half)s >> 8;
        half x0 = (half)((v_part_u)x.p[i] << 8) >> 8, x1 = (half)x.p[i] >> 8;
        v_part_i pairs = (v_part_i)(w0 * x0 + w1 * x1); /* at most 2 * 127 * 127 */
        acc.p[i] += (pairs << 16 >> 16) + (pairs >> 16);
#endif
    }
    return acc;
}
V_FN v16i int8_start(int32_t offset) {
#if defined(__AVX512VNNI__)
    return v16i_set1(offset); /* the instruction sees q + 128 */
#else
    (void)offset;
    return v16i_set1(0);
#endif
}

/* ---- matmul: tiles of M rows and P panels, both constants once inlined ---- */

enum {
    MAX_M = 4, /* rows of a tile */
    MAX_P = 4, /* panels of a tile */
};
#define TILE V_FN void
#define UNROLL _Pragma("GCC unroll 8")

V_FN void store_tile(const struct matmul_args *a, int row, int panel, int M, int P,
                     v16 y[MAX_M][MAX_P]) {
    UNROLL for (int p = 0; p < P; p++) {
        int column = (panel + p) * PANEL, left = a->n_out - column;
        v16 bias = v16_zero();
        if (a->bias)
            bias = left < PANEL ? v16_load_part(a->bias + column, left) : v16_load(a->bias + column);
        UNROLL for (int m = 0; m < M; m++) {
            float *out = a->y + (size_t)(row + m) * a->y_stride + column;
            v16 sum = a->bias ? v16_add(y[m][p], bias) : y[m][p];
            if (left < PANEL)
                v16_store_part(out, sum, left);
            else
                v16_store(out, sum);
        }
    }
}

TILE tile_floats(const struct matmul_args *a, int row, int panel, int M, int P, int bf16) {
    v16 y[MAX_M][MAX_P];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int p = 0; p < P; p++) y[m][p] = v16_zero();
    const float *x = a->x + (size_t)row * a->x_stride;
    const unsigned char *w = a->w + (size_t)panel * a->panel_bytes;
    for (int k = 0; k < a->n_in; k++) {
        v16 wk[MAX_P];
        UNROLL for (int p = 0; p < P; p++) {
            const unsigned char *at = w + (size_t)p * a->panel_bytes;
            wk[p] = bf16 ? v16_load_bf16((const uint16_t *)at + (size_t)k * PANEL)
                         : v16_load((const float *)at + (size_t)k * PANEL);
        }
        UNROLL for (int m = 0; m < M; m++) {
            v16 xk = v16_set1(x[(size_t)m * a->x_stride + (size_t)k]);
            UNROLL for (int p = 0; p < P; p++) y[m][p] = v16_fma(xk, wk[p], y[m][p]);
        }
    }
    store_tile(a, row, panel, M, P, y);
}
TILE tile_fp32(const struct matmul_args *a, int row, int panel, int M, int P) {
    tile_floats(a, row, panel, M, P, 0);
}
TILE tile_bf16(const struct matmul_args *a, int row, int panel, int M, int P) {
    tile_floats(a, row, panel, M, P, 1);
}

/* Products and sums of scales are unfused, so that all families give the same bits. */
TILE tile_int8(const struct matmul_args *a, int row, int panel, int M, int P) {
    v16 y[MAX_M][MAX_P];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int p = 0; p < P; p++) y[m][p] = v16_zero();
    const size_t blocks = (size_t)a->n_blocks, first = (size_t)row * blocks;
    const unsigned char *w = a->w + (size_t)panel * a->panel_bytes;
    for (size_t b = 0; b < blocks; b++, w += INT8_BLOCK_BYTES) {
        v16i acc[MAX_M][MAX_P];
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int p = 0; p < P; p++)
                acc[m][p] = int8_start(a->xq.offset[first + (size_t)m * blocks + b]);
        UNROLL for (int group = 0; group < 8; group++) {
            v16i wg[MAX_P];
            UNROLL for (int p = 0; p < P; p++)
                wg[p] = v16i_load(w + (size_t)p * a->panel_bytes + group * 64);
            UNROLL for (int m = 0; m < M; m++) {
                v16i x = load_four(a->xq.q + (first + (size_t)m * blocks + b) * BLOCK + group * 4);
                UNROLL for (int p = 0; p < P; p++) acc[m][p] = dot_bytes(acc[m][p], wg[p], x);
            }
        }
        UNROLL for (int p = 0; p < P; p++) {
            v16 s = v16_load_fp16((const uint16_t *)(w + (size_t)p * a->panel_bytes + 512));
            UNROLL for (int m = 0; m < M; m++) {
                v16 scale = v16_mul(s, v16_set1(a->xq.scale[first + (size_t)m * blocks + b]));
                y[m][p] = v16_add(y[m][p], v16_mul(scale, v16i_float(acc[m][p])));
            }
        }
    }
    store_tile(a, row, panel, M, P, y);
}

TILE tile_int4(const struct matmul_args *a, int row, int panel, int M, int P) {
    v16 y[MAX_M][MAX_P];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int p = 0; p < P; p++) y[m][p] = v16_zero();
    const size_t blocks = (size_t)a->n_blocks, first = (size_t)row * blocks;
    const unsigned char *w = a->w + (size_t)panel * a->panel_bytes;
    for (size_t b = 0; b < blocks; b++, w += INT4_BLOCK_BYTES) {
        v16i acc[MAX_M][MAX_P];
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int p = 0; p < P; p++) acc[m][p] = v16i_set1(0);
        UNROLL for (int group = 0; group < 4; group++) {
            v16i lo[MAX_P], hi[MAX_P];
            UNROLL for (int p = 0; p < P; p++) {
                v16i both = v16i_load(w + (size_t)p * a->panel_bytes + group * 64);
                lo[p] = v16i_nibbles(both, 0);
                hi[p] = v16i_nibbles(both, 1);
            }
            UNROLL for (int m = 0; m < M; m++) {
                const int8_t *x = a->xq.q + (first + (size_t)m * blocks + b) * BLOCK + group * 4;
                v16i x_lo = load_four(x), x_hi = load_four(x + 16);
                UNROLL for (int p = 0; p < P; p++) {
                    acc[m][p] = dot_nibbles(acc[m][p], lo[p], x_lo);
                    acc[m][p] = dot_nibbles(acc[m][p], hi[p], x_hi);
                }
            }
        }
        UNROLL for (int p = 0; p < P; p++) {
            const unsigned char *scales = w + (size_t)p * a->panel_bytes + 256;
            v16 s = v16_load_fp16((const uint16_t *)scales);
            v16 min = v16_load_fp16((const uint16_t *)(scales + 32));
            UNROLL for (int m = 0; m < M; m++) {
                size_t at = first + (size_t)m * blocks + b;
                v16 scale = v16_mul(s, v16_set1(a->xq.scale[at]));
                y[m][p] = v16_add(y[m][p], v16_mul(scale, v16i_float(acc[m][p])));
                y[m][p] = v16_add(y[m][p], v16_mul(min, v16_set1(a->xq.scaled_sum[at])));
            }
        }
    }
    store_tile(a, row, panel, M, P, y);
}

/* A tile of 4 rows fills the registers with 2 panels; fewer rows take 4 panels, so that a single row has
 * four sums in flight and reads four streams of memory. */
#define MATMUL(name)                                                                               \
    static void matmul_##name(const struct matmul_args *a, int first_panel, int end_panel) {       \
        int step = a->n_rows < 4 ? 4 : 2, panel = first_panel;                                     \
        for (; panel + step <= end_panel; panel += step) {                                         \
            int row = 0;                                                                           \
            for (; row + 4 <= a->n_rows; row += 4) tile_##name(a, row, panel, 4, 2);               \
            if (step == 4) {                                                                       \
                if (row + 2 <= a->n_rows) tile_##name(a, row, panel, 2, 4), row += 2;              \
                if (row < a->n_rows) tile_##name(a, row, panel, 1, 4);                             \
            } else {                                                                               \
                if (row + 2 <= a->n_rows) tile_##name(a, row, panel, 2, 2), row += 2;              \
                if (row < a->n_rows) tile_##name(a, row, panel, 1, 2);                             \
            }                                                                                      \
        }                                                                                          \
        for (; panel < end_panel; panel++) {                                                       \
            int row = 0;                                                                           \
            for (; row + 4 <= a->n_rows; row += 4) tile_##name(a, row, panel, 4, 1);               \
            for (; row < a->n_rows; row++) tile_##name(a, row, panel, 1, 1);                       \
        }                                                                                          \
    }
MATMUL(fp32)
MATMUL(bf16)
MATMUL(int8)
MATMUL(int4)

/* ---- quantised activations ---- */

V_FN v16 load_up_to(const float *x, int n) { /* 16 lanes, or the n < 16 that are left and zeros */
    return n >= 16 ? v16_load(x) : v16_load_part(x, n > 0 ? n : 0);
}
V_FN void store_up_to(float *y, v16 v, int n) {
    if (n >= 16)
        v16_store(y, v);
    else
        v16_store_part(y, v, n);
}

/* The integers nearest to v (even in a tie) as bytes; |v| <= 127. */
V_FN void store_bytes(int8_t *q, v16 v) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.p[0])));
#else
    V_EACH {
        const v_part magic = 0x1.8p23f - (v_part){0}; /* adding it rounds into the low bits */
        v_part_i r = (v_part_i)(v.p[i] + magic);
        for (int l = 0; l < V_LANES; l++) q[i * V_LANES + l] = (int8_t)r[l];
    }
#endif
}

static void quantise_row(const struct quantised_rows *out, int row, const float *x, int n_in) {
    int n_blocks = (n_in + BLOCK - 1) / BLOCK;
    size_t at = (size_t)row * (size_t)n_blocks;
    for (int b = 0; b < n_blocks; b++, at++) {
        int n = n_in - b * BLOCK;
        v16 lo = load_up_to(x + b * BLOCK, n), hi = load_up_to(x + b * BLOCK + 16, n - 16);
        float absmax = v16_hmax(v16_max(v16_abs(lo), v16_abs(hi)));
        float nothing = v16_sum(v16_add(v16_sub(lo, lo), v16_sub(hi, hi))); /* NaN, or 0 if all are finite */
        float scale = 0, inverse = 0;
        if (nothing != 0) {
            scale = NAN;
            lo = hi = v16_zero();
        } else if (absmax >= 1e-30f) {
            scale = absmax / 127;
            inverse = 127 / absmax;
        }
        int8_t *q = out->q + at * BLOCK;
        store_bytes(q, v16_mul(lo, v16_set1(inverse)));
        store_bytes(q + 16, v16_mul(hi, v16_set1(inverse)));
        int sum = 0;
        for (int k = 0; k < BLOCK; k++) sum += q[k];
        out->scale[at] = scale;
        out->offset[at] = -128 * sum;
        out->scaled_sum[at] = scale * (float)sum;
    }
}

/* ---- ops.h ---- */

V_FN v16 first_lanes(v16 v, int n) { /* the others as 0 */
    float lanes[16];
    if (n >= 16) return v;
    v16_store(lanes, v);
    return v16_load_part(lanes, n);
}

static void rms_norm(float *y, const float *x, const float *weight, int n, float eps) {
    v16 squares = v16_zero();
    for (int i = 0; i < n; i += 16) {
        v16 v = load_up_to(x + i, n - i);
        squares = v16_fma(v, v, squares);
    }
    v16 scale = v16_set1(1 / sqrtf(v16_sum(squares) / (float)n + eps));
    for (int i = 0; i < n; i += 16) {
        v16 v = v16_mul(load_up_to(x + i, n - i), scale);
        store_up_to(y + i, v16_mul(v, load_up_to(weight + i, n - i)), n - i);
    }
}

static void layer_norm(float *y, const float *x, const float *weight, const float *bias, int n,
                       float eps) {
    v16 sum = v16_zero(), squares = v16_zero();
    for (int i = 0; i < n; i += 16) sum = v16_add(sum, load_up_to(x + i, n - i));
    v16 mean = v16_set1(v16_sum(sum) / (float)n);
    for (int i = 0; i < n; i += 16) {
        v16 v = first_lanes(v16_sub(load_up_to(x + i, n - i), mean), n - i);
        squares = v16_fma(v, v, squares);
    }
    v16 scale = v16_set1(1 / sqrtf(v16_sum(squares) / (float)n + eps));
    for (int i = 0; i < n; i += 16) {
        v16 v = v16_mul(v16_sub(load_up_to(x + i, n - i), mean), scale);
        store_up_to(y + i,
                    v16_add(v16_mul(v, load_up_to(weight + i, n - i)),
                            load_up_to(bias + i, n - i)),
                    n - i);
    }
}

/* x / (1 + e^-x2) */
V_FN v16 times_sigmoid(v16 x, v16 x2) {
    v16 one = v16_set1(1);
    return v16_div(x, v16_add(one, v16_exp(v16_sub(v16_zero(), x2))));
}

static void silu_mul(float *y, const float *gate, const float *up, int n) {
    for (int i = 0; i < n; i += 16) {
        v16 g = load_up_to(gate + i, n - i);
        store_up_to(y + i, v16_mul(times_sigmoid(g, g), load_up_to(up + i, n - i)), n - i);
    }
}

/* 0.5 (1 + tanh u) is the sigmoid of 2 u, which cancels nothing where tanh is near -1. */
static void gelu_tanh(float *y, const float *x, int n) {
    v16 c1 = v16_set1(1.5957691216057308f), c3 = v16_set1(0.044715f), one = v16_set1(1);
    for (int i = 0; i < n; i += 16) {
        v16 v = load_up_to(x + i, n - i);
        v16 u2 = v16_mul(v16_mul(c1, v), v16_fma(v16_mul(c3, v), v, one));
        store_up_to(y + i, times_sigmoid(v, u2), n - i);
    }
}

static void add_to(float *y, const float *x, int n) {
    for (int i = 0; i < n; i += 16)
        store_up_to(y + i, v16_add(load_up_to(y + i, n - i), load_up_to(x + i, n - i)), n - i);
}

#define NAME_OF(isa) compute_kernels_##isa
#define NAME(isa) NAME_OF(isa)
const struct compute_kernels NAME(ISA) = {
    .matmul = {matmul_fp32, matmul_bf16, matmul_int8, matmul_int4},
    .quantise_row = quantise_row,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .silu_mul = silu_mul,
    .gelu_tanh = gelu_tanh,
    .add_to = add_to,
};
