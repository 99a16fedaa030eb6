/* test_gpu_fp8.c - fp8 (E4M3) weights on a device: the conversions, rows as they are quantised,
 * products by both paths, and that a row's bits are its own.  Once with scales that the library
 * applies (as on 9.0) and once with our own. */
#include "compute/gpu_matrix.h"
#include "compute/matrix.h"
#include "compute/ops.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/gpu/orders.h"

static struct gpu *gpu;

/* gpu_matrix_device.cuh, which C cannot read */
void gpu_matrix_product(struct gpu *g, float *y, size_t y_stride, const void *x, size_t x_stride,
                        int n_rows, const struct gpu_matrix *w, const float *bias, int tiles);
void gpu_quantise_fp8(struct gpu *g, void *q, float *scales, const void *x, size_t x_stride,
                      int n_rows, int n_in);
static int tiles; /* 0: gpu_matmul() chooses */

static uint64_t rng_state = 1;
static float uniform(void) { /* [-1, 1) */
    rng_state = rng_state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(rng_state >> 32) * 0x1p-31f;
}
static void *allocate(size_t bytes) {
    void *p = malloc(bytes);
    assert_non_null(p);
    return p;
}
/* Of sizes from 1 down to 2^-12: among a row's E4M3 are subnormal ones and zeros. */
static float *wide(size_t n) {
    float *x = allocate(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = ldexpf(uniform(), (int)(6 * uniform()) - 6);
    return x;
}
static void *to_device(const void *from, size_t bytes) {
    void *at;
    assert_int_equal(gpu_alloc(gpu, &at, bytes), OK);
    gpu_upload(gpu, at, from, bytes);
    assert_int_equal(gpu_wait(gpu), OK);
    return at;
}

/* ---- E4M3 as its paper has it, in doubles ---- */

static double value_of(int e) { /* 0 .. 255 */
    int exponent = e / 8 % 16, mantissa = e % 8;
    double size = exponent ? ldexp(1 + mantissa / 8.0, exponent - 7) : ldexp(mantissa / 8.0, -6);
    if (e % 128 == 127) return NAN;
    return e < 128 ? size : -size;
}

/* The nearest of all; of two as near, the one with an even mantissa.  Sizes ascend with codes. */
static int nearest(double x) {
    int best = 0;
    for (int e = 1; e < 127; e++) {
        double off = fabs(fabs(x) - value_of(e)), least = fabs(fabs(x) - value_of(best));
        if (off < least || (off == least && e % 2 == 0)) best = e;
    }
    return signbit(x) ? best + 128 : best;
}

static void test_every_code_has_its_value(void **state) {
    (void)state;
    for (int e = 0; e < 256; e++) {
        double want = value_of(e), got = (double)e4m3_float((uint8_t)e);
        assert_true(isnan(want) ? isnan(got) : got == want && signbit(got) == signbit(want));
        if (!isnan(want)) assert_int_equal(e4m3_round((float)want), e);
    }
    assert_int_equal(e4m3_round(NAN) & 0x7f, 0x7f);
    assert_int_equal(e4m3_round(INFINITY), 0x7e);
    assert_int_equal(e4m3_round(-1e30f), 0xfe);
}

/* Every value, every middle of two neighbours, and the bf16 just beside each: 2^-10 is a tie with
 * zero. */
static int interesting(float *x) {
    int n = 0;
    for (int e = 0; e < 127; e++) {
        float at[] = {(float)value_of(e),
                      e < 126 ? (float)((value_of(e) + value_of(e + 1)) / 2) : 448};
        for (int i = 0; i < 2; i++)
            for (int beside = -1; beside <= 1; beside++) {
                uint16_t bits = bf16_round(at[i]);
                if ((bits == 0 && beside < 0) || (at[i] == 448 && beside > 0)) continue;
                float v = bf16_float((uint16_t)(bits + beside));
                x[n++] = v;
                x[n++] = -v;
            }
    }
    return n;
}

static void test_rounding_is_to_the_nearest_and_ties_to_even(void **state) {
    (void)state;
    enum { N = 1536, ROWS = 3 };
    static float x[N];
    int n = interesting(x);
    assert_true(n <= N);
    for (int i = 0; i < n; i++)
        assert_int_equal(e4m3_round(x[i]), nearest((double)x[i]));
    /* the device, at scales 1, 8 and 2^-20: 448 is in each row */
    static const float by[ROWS] = {1, 8, 0x1p-20f};
    uint16_t *rows = calloc(ROWS * N, sizeof *rows);
    uint8_t q[ROWS * N];
    float scales[ROWS];
    for (int m = 0; m < ROWS; m++)
        for (int i = 0; i < n; i++)
            rows[m * N + i] = bf16_round(x[i] * by[m]);
    memset(q, 0xff, sizeof q);
    memset(scales, 0xff, sizeof scales);
    void *x_at = to_device(rows, ROWS * N * sizeof *rows), *q_at = to_device(q, sizeof q),
         *s_at = to_device(scales, sizeof scales);
    gpu_quantise_fp8(gpu, q_at, s_at, x_at, N, ROWS, N);
    gpu_download(gpu, q, q_at, sizeof q);
    gpu_download(gpu, scales, s_at, sizeof scales);
    assert_int_equal(gpu_wait(gpu), OK);
    for (int m = 0; m < ROWS; m++) {
        assert_true(scales[m] == by[m]);
        for (int i = 0; i < N; i++)
            assert_int_equal(q[m * N + i], i < n ? nearest((double)x[i]) : 0);
    }
    gpu_release(gpu, x_at), gpu_release(gpu, q_at), gpu_release(gpu, s_at);
    free(rows);
}

/* ---- products ---- */

struct pair {
    int n_out, n_in;
    struct matrix *cpu;
    struct gpu_matrix *gpu;
};

static struct pair pair_of(int n_out, int n_in, const float *w) {
    struct pair p = {.n_out = n_out, .n_in = n_in};
    assert_int_equal(matrix_new(&p.cpu, WEIGHT_FP8, n_out, n_in), OK);
    matrix_set_rows(p.cpu, 0, n_out, w);
    assert_int_equal(gpu_matrix_new(&p.gpu, gpu, p.cpu, NULL), OK);
    assert_true(gpu_matrix_reads_bf16(p.gpu));
    assert_true(gpu_matrix_bytes(p.gpu) == (size_t)n_out * (size_t)(n_in + 4));
    return p;
}
static struct pair random_pair(int n_out, int n_in) {
    float *w = wide((size_t)n_out * (size_t)n_in);
    struct pair p = pair_of(n_out, n_in, w);
    free(w);
    return p;
}
static void free_pair(struct pair *p) {
    gpu_matrix_free(gpu, p->gpu);
    matrix_free(p->cpu);
}

/* y [n_rows][n_out] of x rounded to bf16.  On the device rows of x and y are longer: what lies
 * between rows of x is NaN, and what lies between and behind rows of y must stay as it was. */
static float *product(const struct pair *p, const float *x, int n_rows, const float *bias,
                      enum gpu_path path) {
    size_t n_in = (size_t)p->n_in, n_out = (size_t)p->n_out, rows = (size_t)n_rows;
    size_t x_stride = n_in + 8, y_stride = n_out + 3, y_count = (rows + 2) * y_stride;
    uint16_t *x_host = allocate((rows + 1) * x_stride * 2);
    float *y_host = allocate(y_count * sizeof *y_host),
          *y = allocate((rows * n_out + 1) * sizeof *y);
    void *scratch, *bias_device = NULL;
    memset(x_host, 0xff, (rows + 1) * x_stride * 2);
    memset(y_host, 0xff, y_count * sizeof *y_host);
    for (size_t m = 0; m < rows; m++)
        for (size_t k = 0; k < n_in; k++)
            x_host[m * x_stride + k] = bf16_round(x[m * n_in + k]);
    void *x_device = to_device(x_host, (rows + 1) * x_stride * 2),
         *y_device = to_device(y_host, y_count * sizeof *y_host);
    if (bias) bias_device = to_device(bias, n_out * sizeof *bias);
    assert_int_equal(gpu_alloc(gpu, &scratch, gpu_matmul_scratch_bytes(p->gpu, n_rows)), OK);
    if (tiles)
        gpu_matrix_product(gpu, y_device, y_stride, x_device, x_stride, n_rows, p->gpu, bias_device,
                           tiles);
    else
        gpu_matmul(gpu, scratch, y_device, y_stride, x_device, x_stride, n_rows, p->gpu,
                   bias_device, path);
    gpu_download(gpu, y_host, y_device, y_count * sizeof *y_host);
    assert_int_equal(gpu_wait(gpu), OK);
    for (size_t m = 0; m < rows + 2; m++) {
        for (size_t n = m < rows ? n_out : 0; n < y_stride; n++) {
            uint32_t bits;
            memcpy(&bits, &y_host[m * y_stride + n], 4);
            assert_int_equal(bits, 0xffffffffu);
        }
        if (m < rows) memcpy(y + m * n_out, y_host + m * y_stride, n_out * sizeof *y);
    }
    gpu_release(gpu, x_device), gpu_release(gpu, y_device), gpu_release(gpu, bias_device),
        gpu_release(gpu, scratch);
    free(x_host), free(y_host);
    return y;
}

/* A row as a product sees it: bf16, or E4M3 by absmax / 448. */
static void see(double *seen, const float *x, int n, enum gpu_path path) {
    float most = 0;
    for (int k = 0; k < n; k++)
        most = fmaxf(most, fabsf(bf16_float(bf16_round(x[k]))));
    for (int k = 0; k < n; k++) {
        float v = bf16_float(bf16_round(x[k]));
        seen[k] = path == GPU_GENERATED
                      ? (double)v
                      : value_of(nearest((double)(v * (448 / most)))) * (double)(most / 448);
    }
}

/* Products of bf16 or E4M3 are exact in fp32; each of fewer than n_in + 16 additions errs by at
 * most 2^-23 of the sum of magnitudes, as tensor cores may cut off instead of rounding, and scales
 * and bias take four roundings more. */
static void check_product(int n_rows, int n_out, int n_in, bool with_bias, enum gpu_path path) {
    struct pair p = random_pair(n_out, n_in);
    float *x = wide((size_t)n_rows * (size_t)n_in), *bias = wide((size_t)n_out),
          *w = allocate((size_t)n_in * sizeof *w);
    float *y = product(&p, x, n_rows, with_bias ? bias : NULL, path);
    double *seen = allocate((size_t)n_rows * (size_t)n_in * sizeof *seen);
    for (int m = 0; m < n_rows; m++)
        see(seen + (size_t)m * (size_t)n_in, x + (size_t)m * (size_t)n_in, n_in, path);
    for (int n = 0; n < n_out; n++) {
        float s;
        const uint8_t *q = matrix_get_fp8(p.cpu, n, &s);
        for (int m = 0; m < n_rows; m++) {
            double sum = 0, magnitude = 0;
            for (int k = 0; k < n_in; k++) {
                double term =
                    seen[(size_t)m * (size_t)n_in + (size_t)k] * value_of(q[k]) * (double)s;
                sum += term;
                magnitude += fabs(term);
            }
            if (with_bias) sum += (double)bias[n], magnitude += fabs((double)bias[n]);
            double err = fabs((double)y[(size_t)m * (size_t)n_out + (size_t)n] - sum);
            assert_true(err <= (n_in + 16) * 0x1p-23 * magnitude + 4 * 0x1p-24 * magnitude);
        }
    }
    free(x), free(bias), free(w), free(y), free(seen);
    free_pair(&p);
}

/* GPU_PROMPT where the device can */
static int first_path(void) {
    return gpu_has_fp8(gpu_info(gpu)) ? GPU_PROMPT : GPU_GENERATED;
}

static void test_products_are_double_precision_sums_within_rounding(void **state) {
    (void)state;
    static const int shapes[][3] = {
        /* n_rows, n_out, n_in: 1, 2, 4 and 8 warps; blocks of 32 k that end in the middle */
        {1, 16, 16},   {3, 16, 64},   {1, 512, 64},  {7, 32, 176}, {20, 48, 176}, {64, 32, 576},
        {65, 16, 208}, {5, 16, 1104}, {1, 512, 576}, {9, 80, 272}, {500, 16, 48}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int path = first_path(); path <= GPU_GENERATED; path++)
            check_product(shapes[s][0], shapes[s][1], shapes[s][2], (s + (size_t)path) % 2,
                          (enum gpu_path)path);
}

/* Every code in every place of a record: rows of x that are one at k and else zero pick q s,
 * exactly where rows are generated; as a prompt 448 q s / 448, three roundings. */
static void test_unit_rows_pick_each_weight(void **state) {
    (void)state;
    enum { OUT = 48, IN = 272 };
    float *w = allocate(OUT * IN * sizeof *w), *x = calloc(IN * IN, sizeof *x);
    assert_non_null(x);
    for (int n = 0; n < OUT; n++)
        for (int k = 0; k < IN; k++) {
            float v = (float)value_of((k + 5 * n) % 256);
            w[n * IN + k] = ldexpf(isnan(v) ? 448 : v, n % 9 - 4);
        }
    for (int k = 0; k < IN; k++)
        x[k * IN + k] = 1;
    struct pair p = pair_of(OUT, IN, w);
    for (int path = first_path(); path <= GPU_GENERATED; path++) {
        float *y = product(&p, x, IN, NULL, (enum gpu_path)path);
        for (int k = 0; k < IN; k++)
            for (int n = 0; n < OUT; n++) {
                float want = w[n * IN + k], got = y[k * OUT + n];
                if (path == GPU_GENERATED)
                    assert_true(got == want);
                else
                    assert_true(fabsf(got - want) <= 3 * 0x1p-24f * fabsf(want));
            }
        free(y);
    }
    /* and so does the look-up of rows */
    static const int32_t index[] = {16, 0, -1, 47, 3};
    enum { N = sizeof index / sizeof *index };
    float *rows = allocate(N * IN * sizeof *rows);
    memset(rows, 0xff, N * IN * sizeof *rows);
    void *rows_at = to_device(rows, N * IN * sizeof *rows),
         *index_at = to_device(index, sizeof index);
    gpu_matrix_rows(gpu, rows_at, index_at, N, p.gpu);
    gpu_download(gpu, rows, rows_at, N * IN * sizeof *rows);
    assert_int_equal(gpu_wait(gpu), OK);
    for (int i = 0; i < N; i++)
        for (int k = 0; k < IN; k++)
            assert_true(rows[i * IN + k] == (index[i] < 0 ? 0 : w[index[i] * IN + k]));
    gpu_release(gpu, rows_at), gpu_release(gpu, index_at);
    free(rows), free(w), free(x);
    free_pair(&p);
}

/* Batches of other sizes, in other places; generated rows by every kernel. */
static void test_a_row_has_the_same_bits_in_any_batch(void **state) {
    (void)state;
    static const int counts[] = {1, 7, 12, 30, 64, 65},
                     shapes[][2] = {{16, 176}, {80, 80}, {32, 304}, {16, 1104}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int path = first_path(); path <= GPU_GENERATED; path++) {
            size_t n_out = (size_t)shapes[s][0], n_in = (size_t)shapes[s][1];
            int all = s == 0 ? 500 : 70;
            struct pair p = random_pair(shapes[s][0], shapes[s][1]);
            float *x = wide((size_t)all * n_in), *bias = wide(n_out);
            float *whole = product(&p, x, all, bias, (enum gpu_path)path);
            for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
                for (tiles = 0; tiles <= (path == GPU_GENERATED ? 4 : 0);
                     tiles += tiles ? tiles : 1) {
                    int first = tiles % 2 ? 0 : all - counts[c];
                    float *part =
                        product(&p, x + (size_t)first * n_in, counts[c], bias, (enum gpu_path)path);
                    assert_memory_equal(part, whole + (size_t)first * n_out,
                                        (size_t)counts[c] * n_out * sizeof *part);
                    free(part);
                }
            tiles = 0;
            free(x), free(bias), free(whole);
            free_pair(&p);
        }
}

static void test_nan_infinity_and_zeros_stay_in_their_row_and_column(void **state) {
    (void)state;
    enum { ROWS = 11, OUT = 32, IN = 80 };
    for (int path = first_path(); path <= GPU_GENERATED; path++) {
        float *w = wide(OUT * IN), *x = wide(ROWS * IN);
        w[4 * IN] = NAN;
        w[18 * IN + 70] = INFINITY;
        memset(w + 7 * IN, 0, IN * sizeof *w);
        x[2 * IN + 71] = NAN;
        x[9 * IN] = -INFINITY;
        memset(x + 5 * IN, 0, IN * sizeof *x);
        struct pair p = pair_of(OUT, IN, w);
        float *y = product(&p, x, ROWS, NULL, (enum gpu_path)path);
        for (int m = 0; m < ROWS; m++)
            for (int n = 0; n < OUT; n++) {
                bool finite = m != 2 && m != 9 && n != 4 && n != 18;
                assert_int_equal(!!isfinite(y[m * OUT + n]), finite);
                if (finite && (m == 5 || n == 7)) assert_true(y[m * OUT + n] == 0);
            }
        free(w), free(x), free(y);
        free_pair(&p);
    }
}

static void test_a_part_has_its_rows_columns_and_scales(void **state) {
    (void)state;
    enum { OUT = 64, IN = 176 };
    const struct gpu_matrix_part part = {2, {{3, 18}, {40, 14}}, {48, 80}},
                                 bad[] = {{1, {{0, 16}}, {8, 32}},
                                          {1, {{0, 16}}, {16, 24}},
                                          {1, {{0, 15}}, {0, 32}}};
    struct pair whole = random_pair(OUT, IN), p = {.n_out = 32, .n_in = 80};
    assert_int_equal(gpu_matrix_new(&p.gpu, gpu, whole.cpu, &part), OK);
    float x[80] = {0}, values[IN];
    for (int k = 0; k < 80; k++) {
        memset(x, 0, sizeof x);
        x[k] = 1;
        float *y = product(&p, x, 1, NULL, GPU_GENERATED);
        for (int n = 0; n < 32; n++) {
            matrix_get_row(whole.cpu, n < 18 ? 3 + n : 40 + n - 18, values);
            assert_true(y[n] == values[48 + k]);
        }
        free(y);
    }
    gpu_matrix_free(gpu, p.gpu);
    for (int i = 0; i < 3; i++)
        assert_int_equal(gpu_matrix_new(&p.gpu, gpu, whole.cpu, &bad[i]), ERR_ARG);
    free_pair(&whole);
}

static void test_other_sizes_are_refused(void **state) {
    (void)state;
    struct matrix *w;
    assert_int_equal(matrix_new(&w, WEIGHT_FP8, 16, 24), ERR_ARG);
    assert_int_equal(matrix_new(&w, WEIGHT_FP8, 17, 32), ERR_ARG);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_code_has_its_value),
        cmocka_unit_test(test_rounding_is_to_the_nearest_and_ties_to_even),
        cmocka_unit_test(test_products_are_double_precision_sums_within_rounding),
        cmocka_unit_test(test_unit_rows_pick_each_weight),
        cmocka_unit_test(test_a_row_has_the_same_bits_in_any_batch),
        cmocka_unit_test(test_nan_infinity_and_zeros_stay_in_their_row_and_column),
        cmocka_unit_test(test_a_part_has_its_rows_columns_and_scales),
        cmocka_unit_test(test_other_sizes_are_refused),
    };
    static const char *const capabilities[] = {"90", "89"};
    int failed = 0;
    order_seed = 1;
    for (int i = 0; i < 2; i++) {
        char msg[256];
        setenv("URCHIN_EMULATED_CAPABILITY", capabilities[i], 1);
        if (gpu_open(&gpu, msg, sizeof msg)) return 1;
        failed += i ? cmocka_run_group_tests_name("scales of ours, one warp at a time", tests,
                                                  one_warp_at_a_time, NULL)
                    : cmocka_run_group_tests_name("scales of the library, lock-step", tests,
                                                  lock_step, NULL);
        gpu_close(gpu);
    }
    return failed;
}
