/* test_gpu_matrix.c - weight matrices on a device: their values, products by both paths, and that a
 * row's bits are its own. */
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

#include "tests/emu/emu.h"

static const enum weight_type types[] = {WEIGHT_FP32, WEIGHT_BF16, WEIGHT_INT8, WEIGHT_INT4};
static struct gpu *gpu;

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
static float *uniforms(size_t n) {
    float *x = allocate(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = uniform();
    return x;
}

static void *to_device(const void *from, size_t bytes) {
    void *at;
    assert_int_equal(gpu_alloc(gpu, &at, bytes), OK);
    gpu_upload(gpu, at, from, bytes);
    assert_int_equal(gpu_wait(gpu), OK);
    return at;
}

/* A matrix on the CPU, its copy on the device, and every value. */
struct pair {
    enum weight_type type;
    int n_out, n_in;
    struct matrix *cpu;
    struct gpu_matrix *gpu;
    float *values; /* [n_out][n_in], as packed */
};

static struct pair pair_of(enum weight_type type, int n_out, int n_in, const float *w) {
    struct pair p = {.type = type, .n_out = n_out, .n_in = n_in};
    assert_int_equal(matrix_new(&p.cpu, type, n_out, n_in), OK);
    matrix_set_rows(p.cpu, 0, n_out, w);
    assert_int_equal(gpu_matrix_new(&p.gpu, gpu, p.cpu), OK);
    assert_int_equal(gpu_matrix_n_out(p.gpu), n_out);
    assert_int_equal(gpu_matrix_n_in(p.gpu), n_in);
    assert_int_equal(gpu_matrix_reads_bf16(p.gpu), type != WEIGHT_FP32);
    p.values = allocate((size_t)n_out * (size_t)n_in * sizeof *p.values);
    for (int n = 0; n < n_out; n++)
        matrix_get_row(p.cpu, n, p.values + (size_t)n * (size_t)n_in);
    return p;
}
static struct pair random_pair(enum weight_type type, int n_out, int n_in) {
    float *w = uniforms((size_t)n_out * (size_t)n_in);
    struct pair p = pair_of(type, n_out, n_in, w);
    free(w);
    return p;
}
static void free_pair(struct pair *p) {
    gpu_matrix_free(gpu, p->gpu);
    matrix_free(p->cpu);
    free(p->values);
}

/* What a product sees of x, and of a weight. */
static float seen(enum weight_type type, float v) {
    return type == WEIGHT_FP32 ? v : bf16_float(bf16_round(v));
}

/* y [n_rows][n_out] for x [n_rows][n_in].  On the device rows of x and y are longer: what lies
 * between rows of x is NaN, and what lies between and behind rows of y must stay as it was. */
static float *product(const struct pair *p, const float *x, int n_rows, const float *bias,
                      enum gpu_path path) {
    size_t n_in = (size_t)p->n_in, n_out = (size_t)p->n_out, rows = (size_t)n_rows;
    size_t x_stride = (n_in + 7) / 8 * 8 + 8, y_stride = n_out + 3, y_count = (rows + 2) * y_stride;
    size_t element = p->type == WEIGHT_FP32 ? 4 : 2, x_bytes = (rows + 1) * x_stride * element;
    void *x_host = allocate(x_bytes), *scratch, *bias_device = NULL;
    memset(x_host, 0xff, x_bytes);
    for (size_t m = 0; m < rows; m++)
        for (size_t k = 0; k < n_in; k++) {
            if (p->type == WEIGHT_FP32)
                ((float *)x_host)[m * x_stride + k] = x[m * n_in + k];
            else
                ((uint16_t *)x_host)[m * x_stride + k] = bf16_round(x[m * n_in + k]);
        }
    float *y_host = allocate(y_count * sizeof *y_host),
          *y = allocate((rows * n_out + 1) * sizeof *y);
    memset(y_host, 0xff, y_count * sizeof *y_host);
    void *x_device = to_device(x_host, x_bytes),
         *y_device = to_device(y_host, y_count * sizeof *y_host);
    if (bias) bias_device = to_device(bias, n_out * sizeof *bias);
    assert_int_equal(gpu_alloc(gpu, &scratch, gpu_matmul_scratch_bytes(p->gpu) + 256), OK);
    gpu_matmul(gpu, scratch, y_device, y_stride, x_device, x_stride, n_rows, p->gpu, bias_device,
               path);
    gpu_download(gpu, y_host, y_device, y_count * sizeof *y_host);
    assert_int_equal(gpu_wait(gpu), OK);
    for (size_t m = 0; m < rows + 2; m++) {
        size_t first = m < rows ? n_out : 0;
        for (size_t n = first; n < y_stride; n++) {
            uint32_t bits;
            memcpy(&bits, &y_host[m * y_stride + n], 4);
            assert_int_equal(bits, 0xffffffffu);
        }
        if (m < rows) memcpy(y + m * n_out, y_host + m * y_stride, n_out * sizeof *y);
    }
    gpu_release(gpu, x_device);
    gpu_release(gpu, y_device);
    gpu_release(gpu, bias_device);
    gpu_release(gpu, scratch);
    free(x_host);
    free(y_host);
    return y;
}

/* Products of bf16 are exact in fp32 (those of fp32 are fused); each of fewer than n_in + 16
 * additions errs by at most 2^-23 of the sum of magnitudes, as tensor cores may cut off instead of
 * rounding. */
static void check_product(enum weight_type type, int n_rows, int n_out, int n_in, bool with_bias,
                          enum gpu_path path) {
    struct pair p = random_pair(type, n_out, n_in);
    float *x = uniforms((size_t)n_rows * (size_t)n_in), *bias = uniforms((size_t)n_out);
    float *y = product(&p, x, n_rows, with_bias ? bias : NULL, path);
    for (int m = 0; m < n_rows; m++)
        for (int n = 0; n < n_out; n++) {
            double sum = with_bias ? (double)bias[n] : 0, magnitude = fabs(sum);
            for (int k = 0; k < n_in; k++) {
                double term = (double)seen(type, x[(size_t)m * (size_t)n_in + (size_t)k]) *
                              (double)seen(type, p.values[(size_t)n * (size_t)n_in + (size_t)k]);
                sum += term;
                magnitude += fabs(term);
            }
            double err = fabs((double)y[(size_t)m * (size_t)n_out + (size_t)n] - sum);
            assert_true(err <= (n_in + 16) * 0x1p-23 * magnitude);
        }
    free(x);
    free(bias);
    free(y);
    free_pair(&p);
}

static void test_products_are_double_precision_sums_within_rounding(void **state) {
    (void)state;
    static const int shapes[][3] = {
        /* n_rows, n_out, n_in: 1, 2, 4 and 8 warps; tiles that end inside */
        {1, 1, 1},     {3, 17, 64},   {2, 512, 64},  {9, 17, 172}, {20, 40, 172},
        {40, 33, 576}, {70, 17, 200}, {5, 16, 1100}, {1, 512, 576}};
    for (int t = 0; t < 4; t++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (int path = GPU_PROMPT; path <= GPU_GENERATED; path++)
                check_product(types[t], shapes[s][0], shapes[s][1], shapes[s][2],
                              (s + (size_t)path) % 2, (enum gpu_path)path);
}

/* A row of x that is one at k and else zero picks W[n][k]: no weight has another's place, scale or
 * minimum. */
static void test_unit_rows_pick_each_weight_exactly(void **state) {
    (void)state;
    static const int shapes[][2] = {{17, 172}, {35, 72}};
    for (int t = 0; t < 4; t++)
        for (int s = 0; s < 2; s++)
            for (int path = GPU_PROMPT; path <= GPU_GENERATED; path++) {
                int n_out = shapes[s][0], n_in = shapes[s][1];
                size_t in = (size_t)n_in, outs = (size_t)n_out;
                struct pair p = random_pair(types[t], n_out, n_in);
                float *x = calloc(in * in, sizeof *x);
                assert_non_null(x);
                for (size_t k = 0; k < in; k++)
                    x[k * in + k] = 1;
                float *y = product(&p, x, n_in, NULL, (enum gpu_path)path);
                for (size_t k = 0; k < in; k++)
                    for (size_t n = 0; n < outs; n++)
                        assert_true(y[k * outs + n] == seen(types[t], p.values[n * in + k]));
                free(x);
                free(y);
                free_pair(&p);
            }
}

/* ... and so for other row counts (other tiles of the kernel), other places, and other neighbours.
 */
static void test_a_row_has_the_same_bits_in_any_batch(void **state) {
    (void)state;
    enum { ALL = 500 };
    static const int counts[] = {1, 7, 12, 30, 64, 65},
                     shapes[][2] = {{17, 172}, {150, 72}, {24, 300}, {17, 1100}};
    for (int t = 0; t < 4; t++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            size_t n_out = (size_t)shapes[s][0], n_in = (size_t)shapes[s][1];
            int all = n_in > 200 ? 70 : ALL;
            struct pair p = random_pair(types[t], shapes[s][0], shapes[s][1]);
            float *x = uniforms((size_t)all * n_in), *bias = uniforms(n_out);
            float *whole = product(&p, x, all, bias, GPU_GENERATED);
            for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
                for (int first = 0; first + counts[c] <= all;
                     first += all - counts[c] > 0 ? all - counts[c] : 1) {
                    float *part =
                        product(&p, x + (size_t)first * n_in, counts[c], bias, GPU_GENERATED);
                    assert_memory_equal(part, whole + (size_t)first * n_out,
                                        (size_t)counts[c] * n_out * sizeof *part);
                    free(part);
                }
            free(x);
            free(bias);
            free(whole);
            free_pair(&p);
        }
}

static void test_nan_and_infinity_stay_in_their_row_and_column(void **state) {
    (void)state;
    enum { ROWS = 11, OUT = 19, IN = 72 };
    for (int t = 0; t < 4; t++)
        for (int path = GPU_PROMPT; path <= GPU_GENERATED; path++) {
            float *w = uniforms(OUT * IN), *x = uniforms(ROWS * IN);
            w[4 * IN] = NAN; /* the first weight behind row 3's last block */
            w[18 * IN + 70] = INFINITY;
            x[2 * IN + 71] = NAN;
            x[9 * IN] = -INFINITY;
            struct pair p = pair_of(types[t], OUT, IN, w);
            float *y = product(&p, x, ROWS, NULL, (enum gpu_path)path);
            for (int m = 0; m < ROWS; m++)
                for (int n = 0; n < OUT; n++) {
                    bool finite = m != 2 && m != 9 && n != 4 && n != 18;
                    assert_int_equal(!!isfinite(y[m * OUT + n]), finite);
                }
            free(w);
            free(x);
            free(y);
            free_pair(&p);
        }
}

static void test_no_rows_write_nothing(void **state) {
    (void)state;
    for (int t = 0; t < 4; t++)
        for (int path = GPU_PROMPT; path <= GPU_GENERATED; path++) {
            struct pair p = random_pair(types[t], 5, 40);
            float x = 0;
            free(product(&p, &x, 0, NULL, (enum gpu_path)path));
            free_pair(&p);
        }
}

static void test_rows_are_those_of_the_packed_matrix(void **state) {
    (void)state;
    static const int32_t index[] = {16, 0, -1, 18, 3, 3};
    enum { OUT = 19, N = sizeof index / sizeof *index };
    static const int n_ins[] = {1, 64, 172};
    for (int t = 0; t < 4; t++)
        for (int s = 0; s < 3; s++) {
            size_t n_in = (size_t)n_ins[s];
            struct pair p = random_pair(types[t], OUT, n_ins[s]);
            float *x = uniforms(N * n_in);
            void *at = to_device(x, N * n_in * sizeof *x),
                 *index_at = to_device(index, sizeof index);
            gpu_matrix_rows(gpu, at, index_at, N, p.gpu);
            gpu_matrix_rows(gpu, at, index_at, 0, p.gpu);
            gpu_download(gpu, x, at, N * n_in * sizeof *x);
            assert_int_equal(gpu_wait(gpu), OK);
            for (size_t i = 0; i < N; i++)
                for (size_t k = 0; k < n_in; k++)
                    assert_true(x[i * n_in + k] ==
                                (index[i] < 0 ? 0 : p.values[(size_t)index[i] * n_in + k]));
            gpu_release(gpu, at);
            gpu_release(gpu, index_at);
            free(x);
            free_pair(&p);
        }
}

/* ---- both orders in which the emulator runs threads ---- */

static int lock_step(void **state) {
    (void)state;
    emu_set_order(0, 0);
    return 0;
}
static int one_warp_at_a_time(void **state) {
    (void)state;
    emu_set_order(2, 1);
    return 0;
}

int main(void) {
    char msg[256];
    if (gpu_open(&gpu, msg, sizeof msg)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products_are_double_precision_sums_within_rounding),
        cmocka_unit_test(test_unit_rows_pick_each_weight_exactly),
        cmocka_unit_test(test_a_row_has_the_same_bits_in_any_batch),
        cmocka_unit_test(test_nan_and_infinity_stay_in_their_row_and_column),
        cmocka_unit_test(test_no_rows_write_nothing),
        cmocka_unit_test(test_rows_are_those_of_the_packed_matrix),
    };
    int failed = cmocka_run_group_tests_name("lock-step", tests, lock_step, NULL);
    failed += cmocka_run_group_tests_name("one warp at a time", tests, one_warp_at_a_time, NULL);
    gpu_close(gpu);
    return failed;
}
