/* kernels.c - the vector loops of compute/, built once per instruction family (ISA=generic, avx2,
 * avx512, dotprod; ISA=amx is AVX-512 and, with AMX defined, amx_*.h).
 *
 * Every y[m][n] is one lane's sum over ascending k, whatever tile of rows and panels it is computed
 * in, so tile shapes are free to differ between families and row counts. */
#include "compute/kernels.h"

#include "compute/vec.h"
#include <math.h>
#include <stdbool.h>

/* ---- rows whose length is no multiple of 16 ---- */

V_FN v16 load_up_to(const float *x, int n) { /* 16 lanes, or the n that are left and zeros */
    return n >= 16 ? v16_load(x) : v16_load_part(x, n > 0 ? n : 0);
}
V_FN void store_up_to(float *y, v16 v, int n) {
    if (n >= 16)
        v16_store(y, v);
    else
        v16_store_part(y, v, n);
}

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
/* The high nibbles of all bytes moved low: 4 bits down, and what came from the neighbour masked
 * away. */
V_FN v16i v16i_nibbles(v16i a, int high) {
    V_EACH a.p[i] = (v_part_i)((v_part_u)a.p[i] >> 4 * high & 0x0f0f0f0f);
    return a;
}

/* Two bf16 a lane, as fp32. */
V_FN v16 v16i_bf16_low(v16i a) {
    v16 r;
    V_EACH r.p[i] = (v_part)((v_part_u)a.p[i] << 16);
    return r;
}
V_FN v16 v16i_bf16_high(v16i a) {
    v16 r;
    V_EACH r.p[i] = (v_part)((v_part_u)a.p[i] & 0xffff0000);
    return r;
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
        acc.p[i] =
            (v_part_i)_mm512_dpbusd_epi32((__m512i)acc.p[i], (__m512i)w.p[i], (__m512i)x.p[i]);
#elif defined(__AVX2__)
        __m256i pairs = _mm256_maddubs_epi16((__m256i)w.p[i], (__m256i)x.p[i]);
        acc.p[i] += (v_part_i)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
        acc.p[i] = (v_part_i)vdotq_s32((int32x4_t)acc.p[i], (int8x16_t)w.p[i], (int8x16_t)x.p[i]);
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
        acc.p[i] =
            (v_part_i)_mm512_dpbusd_epi32((__m512i)acc.p[i], (__m512i)w.p[i], (__m512i)x.p[i]);
#elif defined(__AVX2__)
        /* |w| (x with the sign of w): pairs reach 2 * 127 * 127, which 16 bits hold */
        __m256i s = _mm256_xor_si256((__m256i)w.p[i], _mm256_set1_epi8(-128));
        __m256i pairs =
            _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8((__m256i)x.p[i], s));
        acc.p[i] += (v_part_i)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
        int8x16_t s = (int8x16_t)((v_part_u)w.p[i] ^ 0x80808080);
        acc.p[i] = (v_part_i)vdotq_s32((int32x4_t)acc.p[i], s, (int8x16_t)x.p[i]);
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

/* ---- matmul: a tile is M rows (a constant once inlined) and the 32 columns of one panel ---- */

/* The panels of a matrix are one ascending stream; asking for it this many bytes early lets one
 * core read as fast as its memory allows, which the hardware's own prefetch does not reach (bf16, 1
 * row: 43 instead of 33 GB/s on Zen 5) but where cpu_streams().  Asking past the last panel is
 * harmless: a prefetch never faults. */
enum { AHEAD = 8192 };

enum { MAX_M = 8 };
/* Portable C has no registers to keep the sums in, and a sanitizer checks every access to them:
 * unrolled, either takes minutes to compile. */
#if defined(__ARM_FEATURE_DOTPROD)
#define UNROLL _Pragma("GCC unroll 8")
#elif V_PARTS == 4 || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define EACH_SUM UNROLL for (int m = 0; m < M; m++) UNROLL for (int h = 0; h < 2; h++)

V_FN void prefetch(const unsigned char *line) {
    __builtin_prefetch(line + AHEAD);
}
/* Rows are taken `tall` at a time, as many as the registers hold (32 of 16 bytes with NEON: two
 * rows); a panel stays in cache while all rows go by. */
#if defined(__ARM_FEATURE_DOTPROD)
enum { FLOATS_TALL = 2, INTEGERS_TALL = 2 };
#elif V_PARTS == 1
enum { FLOATS_TALL = 8, INTEGERS_TALL = 6 }; /* these also hold the integer sums */
#else
enum { FLOATS_TALL = 8, INTEGERS_TALL = 4 };
#endif

V_FN int rows_at_once(int left, int most) { /* 8, 6, 4, 2 or 1 */
    if (most == 6 && left >= 6 && left != 8) return 6;
    int n = most == 6 ? 4 : most;
    while (n > left)
        n /= 2;
    return n;
}

/* Many rows pass over a panel several times.  Of floats the first pass asks; of integers, where
 * passes outlast the memory, each asks for its share of the next panel, block by block.  Rows that
 * are one pass only read, and where the CPU does that best alone, nothing is asked for. */
V_FN void prefetch_at_first(int row, const unsigned char *line) {
    if (row == 0) prefetch(line);
}
struct asking {
    size_t block, every; /* the next block beside which to ask; SIZE_MAX: none */
    size_t ahead;
};
V_FN struct asking asking(const struct matmul_args *a, int row, int tall) {
    if (a->streams && rows_at_once(a->n_rows, tall) == a->n_rows)
        return (struct asking){SIZE_MAX, 1, AHEAD};
    size_t passes = a->n_rows < 2 * tall ? 1 : (size_t)(a->n_rows / tall),
           pass = (size_t)(row / tall);
    return (struct asking){pass < passes ? pass : SIZE_MAX, passes,
                           passes == 1 ? AHEAD : a->panel_bytes};
}
V_FN void ask(const unsigned char *line, int now, size_t ahead) {
    if (now) __builtin_prefetch(line + ahead);
}

V_FN void store_tile(const struct matmul_args *a, int row, int panel, int M, v16 y[MAX_M][2]) {
    UNROLL for (int h = 0; h < 2; h++) {
        int column = panel * PANEL + h * 16, left = a->n_out - column;
        if (left <= 0) break;
        v16 bias = a->bias ? load_up_to(a->bias + column, left) : v16_zero();
        UNROLL for (int m = 0; m < M; m++) {
            float *out = a->y + (size_t)(row + m) * a->y_stride + column;
            store_up_to(out, a->bias ? v16_add(y[m][h], bias) : y[m][h], left);
        }
    }
}

/* y += x w for one k; x is its first row's. */
V_FN void add_products(v16 y[MAX_M][2], const struct matmul_args *a, const float *x, int M, v16 w0,
                       v16 w1) {
    UNROLL for (int m = 0; m < M; m++) {
        v16 xk = v16_set1(x[(size_t)m * a->x_stride]);
        y[m][0] = v16_fma(xk, w0, y[m][0]);
        y[m][1] = v16_fma(xk, w1, y[m][1]);
    }
}

V_FN void tile_fp32(const struct matmul_args *a, int row, int panel, int M) {
    v16 y[MAX_M][2];
    EACH_SUM y[m][h] = v16_zero();
    const float *x = a->x + (size_t)row * a->x_stride;
    const unsigned char *w = a->w + (size_t)panel * a->panel_bytes;
    for (int k = 0; k < a->n_in; k++, w += PANEL * sizeof(float)) {
        prefetch_at_first(row, w);
        prefetch_at_first(row, w + 64);
        add_products(y, a, x + k, M, v16_load((const float *)w), v16_load((const float *)w + 16));
    }
    store_tile(a, row, panel, M, y);
}

V_FN void tile_bf16(const struct matmul_args *a, int row, int panel, int M) {
    v16 y[MAX_M][2];
    EACH_SUM y[m][h] = v16_zero();
    const float *x = a->x + (size_t)row * a->x_stride;
    const unsigned char *w = a->w + (size_t)panel * a->panel_bytes;
    for (int k = 0; k < a->n_in; k += 2, w += 2 * PANEL * sizeof(uint16_t)) {
        prefetch_at_first(row, w);
        prefetch_at_first(row, w + 64);
        v16i two0 = v16i_load(w), two1 = v16i_load(w + 64);
        v16 low0 = v16i_bf16_low(two0), low1 = v16i_bf16_low(two1);
        v16 high0 = v16i_bf16_high(two0), high1 = v16i_bf16_high(two1);
        const bool last = k + 1 == a->n_in; /* of an odd number */
        if (M <= 2 || last) {
            add_products(y, a, x + k, M, low0, low1);
            if (last) break;
            add_products(y, a, x + k + 1, M, high0, high1);
            continue;
        }
        /* Both at once: where sums outnumber the registers (AVX2), they come and go half as often.
         */
        UNROLL for (int m = 0; m < M; m++) {
            const float *xk = x + (size_t)m * a->x_stride + k;
            y[m][0] = v16_fma(v16_set1(xk[0]), low0, y[m][0]);
            y[m][1] = v16_fma(v16_set1(xk[0]), low1, y[m][1]);
            y[m][0] = v16_fma(v16_set1(xk[1]), high0, y[m][0]);
            y[m][1] = v16_fma(v16_set1(xk[1]), high1, y[m][1]);
        }
    }
    store_tile(a, row, panel, M, y);
}

/* Products and sums of scales are unfused, so that all families give the same bits. */
V_FN void tile_int8(const struct matmul_args *a, int row, int panel, int M) {
    v16 y[MAX_M][2];
    EACH_SUM y[m][h] = v16_zero();
    const size_t blocks = (size_t)a->n_blocks, first = (size_t)row * blocks;
    const unsigned char *w = a->w + (size_t)panel * a->panel_bytes;
    struct asking asks = asking(a, row, INTEGERS_TALL);
    for (size_t b = 0; b < blocks; b++, w += INT8_BLOCK_BYTES) {
        v16i acc[MAX_M][2];
        const int now = b == asks.block;
        if (now) asks.block += asks.every;
        EACH_SUM acc[m][h] = int8_start(a->xq.offset[first + (size_t)m * blocks + b]);
        UNROLL for (int group = 0; group < 8; group++) {
            const unsigned char *four = w + group * PANEL * 4;
            ask(four, now, asks.ahead);
            ask(four + 64, now, asks.ahead);
            v16i w0 = v16i_load(four), w1 = v16i_load(four + 64);
            UNROLL for (int m = 0; m < M; m++) {
                v16i x = load_four(a->xq.q + (first + (size_t)m * blocks + b) * BLOCK + group * 4);
                acc[m][0] = dot_bytes(acc[m][0], w0, x);
                acc[m][1] = dot_bytes(acc[m][1], w1, x);
            }
        }
        const uint16_t *scales = (const uint16_t *)(w + INT8_BLOCK_SCALES);
        ask(w + INT8_BLOCK_SCALES, now, asks.ahead);
        v16 s[2] = {v16_load_fp16(scales), v16_load_fp16(scales + 16)};
        EACH_SUM {
            v16 scale = v16_mul(s[h], v16_set1(a->xq.scale[first + (size_t)m * blocks + b]));
            y[m][h] = v16_add(y[m][h], v16_mul(scale, v16i_float(acc[m][h])));
        }
    }
    store_tile(a, row, panel, M, y);
}

V_FN void tile_int4(const struct matmul_args *a, int row, int panel, int M) {
    v16 y[MAX_M][2];
    EACH_SUM y[m][h] = v16_zero();
    const size_t blocks = (size_t)a->n_blocks, first = (size_t)row * blocks;
    const unsigned char *w = a->w + (size_t)panel * a->panel_bytes;
    struct asking asks = asking(a, row, INTEGERS_TALL);
    for (size_t b = 0; b < blocks; b++, w += INT4_BLOCK_BYTES) {
        v16i acc[MAX_M][2];
        const int now = b == asks.block;
        if (now) asks.block += asks.every;
        EACH_SUM acc[m][h] = v16i_set1(0);
        UNROLL for (int group = 0; group < 4; group++) {
            const unsigned char *four = w + group * PANEL * 4;
            ask(four, now, asks.ahead);
            ask(four + 64, now, asks.ahead);
            v16i both0 = v16i_load(four), both1 = v16i_load(four + 64);
            v16i lo0 = v16i_nibbles(both0, 0), hi0 = v16i_nibbles(both0, 1);
            v16i lo1 = v16i_nibbles(both1, 0), hi1 = v16i_nibbles(both1, 1);
            UNROLL for (int m = 0; m < M; m++) {
                const int8_t *x = a->xq.q + (first + (size_t)m * blocks + b) * BLOCK + group * 4;
                v16i x_lo = load_four(x), x_hi = load_four(x + 16);
                acc[m][0] = dot_nibbles(dot_nibbles(acc[m][0], lo0, x_lo), hi0, x_hi);
                acc[m][1] = dot_nibbles(dot_nibbles(acc[m][1], lo1, x_lo), hi1, x_hi);
            }
        }
        const uint16_t *scales = (const uint16_t *)(w + INT4_BLOCK_SCALES);
        ask(w + INT4_BLOCK_SCALES, now, asks.ahead);
        ask(w + INT4_BLOCK_SCALES + 64, now, asks.ahead);
        v16 s[2] = {v16_load_fp16(scales), v16_load_fp16(scales + 16)};
        v16 min[2] = {v16_load_fp16(scales + PANEL), v16_load_fp16(scales + PANEL + 16)};
        EACH_SUM {
            size_t at = first + (size_t)m * blocks + b;
            v16 scale = v16_mul(s[h], v16_set1(a->xq.scale[at]));
            y[m][h] = v16_add(y[m][h], v16_mul(scale, v16i_float(acc[m][h])));
            y[m][h] = v16_add(y[m][h], v16_mul(min[h], v16_set1(a->xq.scaled_sum[at])));
        }
    }
    store_tile(a, row, panel, M, y);
}

/* One function a tile: gcc spills accumulators when several are inlined into one. */
#define SHAPE(name, M)                                                                             \
    static __attribute__((noinline, unused)) void name##_##M(const struct matmul_args *a, int row, \
                                                             int panel) {                          \
        tile_##name(a, row, panel, M);                                                             \
    }

#define MATMUL(name, tall)                                                                         \
    SHAPE(name, 1)                                                                                 \
    SHAPE(name, 2)                                                                                 \
    SHAPE(name, 4)                                                                                 \
    SHAPE(name, 6)                                                                                 \
    SHAPE(name, 8)                                                                                 \
    static void matmul_##name(const struct matmul_args *a, int first_panel, int end_panel) {       \
        for (int panel = first_panel; panel < end_panel; panel++)                                  \
            for (int row = 0, n; row < a->n_rows; row += n) {                                      \
                n = rows_at_once(a->n_rows - row, tall);                                           \
                if (tall >= 8 && n == 8)                                                           \
                    name##_8(a, row, panel);                                                       \
                else if (tall == 6 && n == 6)                                                      \
                    name##_6(a, row, panel);                                                       \
                else if (tall >= 4 && n == 4)                                                      \
                    name##_4(a, row, panel);                                                       \
                else if (n == 2)                                                                   \
                    name##_2(a, row, panel);                                                       \
                else                                                                               \
                    name##_1(a, row, panel);                                                       \
            }                                                                                      \
    }
MATMUL(fp32, FLOATS_TALL)
#if !defined(AMX)
MATMUL(bf16, FLOATS_TALL)
#endif
MATMUL(int8, INTEGERS_TALL)
MATMUL(int4, INTEGERS_TALL)

#if defined(AMX)
#include "compute/amx_bf16.h"
#include "compute/amx_matmul.h"
#endif

/* ---- quantised activations ---- */

/* The low bytes of 16 lanes. */
V_FN void store_low_bytes(int8_t *dst, v16 bits) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)dst, _mm512_cvtepi32_epi8((__m512i)bits.p[0]));
#else
    typedef int8_t bytes __attribute__((vector_size(16 / V_PARTS)));
    V_EACH {
        bytes low = __builtin_convertvector((v_part_i)bits.p[i], bytes);
        memcpy(dst + i * V_LANES, &low, sizeof low);
    }
#endif
}

static void quantise_row(const struct quantised_rows *out, int row, const float *x, int n_in) {
    int n_blocks = (n_in + BLOCK - 1) / BLOCK;
    size_t at = (size_t)row * (size_t)n_blocks;
    const v16 magic = v16_set1(0x1.8p23f); /* adding it rounds to nearest even in the low bits */
    for (int b = 0; b < n_blocks; b++, at++) {
        const float *block = x + b * BLOCK;
        int n = n_in - b * BLOCK;
        v16 lo = load_up_to(block, n), hi = n > 16 ? load_up_to(block + 16, n - 16) : v16_zero();
        float absmax = v16_hmax(v16_max(v16_abs(lo), v16_abs(hi)));
        float scale = absmax < 1e-30f ? 0 : absmax / 127;
        v16 inverse = v16_set1(absmax < 1e-30f ? 0 : 127 / absmax);
        v16 q_lo = v16_add(v16_mul(lo, inverse), magic),
            q_hi = v16_add(v16_mul(hi, inverse), magic);
        /* exact, or NaN when something was NaN or infinite (then inverse is 0) */
        float sum = v16_sum(v16_add(v16_sub(q_lo, magic), v16_sub(q_hi, magic)));
        if (sum != sum) {
            q_lo = q_hi = magic;
            scale = sum;
            sum = 0;
        }
        store_low_bytes(out->q + at * BLOCK, q_lo);
        store_low_bytes(out->q + at * BLOCK + 16, q_hi);
        out->scale[at] = scale;
        out->offset[at] = -128 * (int32_t)sum;
        out->scaled_sum[at] = scale * sum;
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
    for (int i = 0; i < n; i += 16)
        sum = v16_add(sum, load_up_to(x + i, n - i));
    v16 mean = v16_set1(v16_sum(sum) / (float)n);
    for (int i = 0; i < n; i += 16) {
        v16 v = first_lanes(v16_sub(load_up_to(x + i, n - i), mean), n - i);
        squares = v16_fma(v, v, squares);
    }
    v16 scale = v16_set1(1 / sqrtf(v16_sum(squares) / (float)n + eps));
    for (int i = 0; i < n; i += 16) {
        v16 v = v16_mul(v16_sub(load_up_to(x + i, n - i), mean), scale);
        store_up_to(y + i,
                    v16_add(v16_mul(v, load_up_to(weight + i, n - i)), load_up_to(bias + i, n - i)),
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
#if defined(AMX)
    .matmul = {matmul_fp32, matmul_bf16_amx, matmul_int8_amx, matmul_int4_amx},
    .split_row = split_row,
#else
    .matmul = {matmul_fp32, matmul_bf16, matmul_int8, matmul_int4},
#endif
    .quantise_row = quantise_row,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .silu_mul = silu_mul,
    .gelu_tanh = gelu_tanh,
    .add_to = add_to,
};
