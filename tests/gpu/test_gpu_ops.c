/* test_gpu_ops.c - row-wise operations on a device, against sums in double precision and the CPU's.
 */
#include "compute/gpu_ops.h"
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
static float *uniforms(size_t n, float scale) {
    float *x = allocate((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = scale * uniform();
    return x;
}
static void *to_device(const void *from, size_t bytes) {
    void *at;
    assert_int_equal(gpu_alloc(gpu, &at, bytes), OK);
    gpu_upload(gpu, at, from, bytes);
    assert_int_equal(gpu_wait(gpu), OK);
    return at;
}
static void from_device(void *to, const void *at, size_t bytes) {
    gpu_download(gpu, to, at, bytes);
    assert_int_equal(gpu_wait(gpu), OK);
}
/* Results start as NaN. */
static void *nans_on_device(size_t bytes) {
    void *p = allocate(bytes);
    memset(p, 0xff, bytes);
    void *at = to_device(p, bytes);
    free(p);
    return at;
}
static float element(const void *p, bool bf16, size_t i) {
    return bf16 ? bf16_float(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* ---- norms ---- */

/* out of the device for rows of x (delta NULL or rows too); x becomes the sum. */
static void *norm_rows(float *x, const float *delta, size_t n_rows, size_t dim, const float *weight,
                       const float *bias, bool out_bf16) {
    size_t bytes = n_rows * dim * sizeof(float), out_bytes = n_rows * dim * (out_bf16 ? 2 : 4);
    void *x_at = to_device(x, bytes), *delta_at = delta ? to_device(delta, bytes) : NULL;
    void *weight_at = to_device(weight, dim * sizeof *weight),
         *bias_at = bias ? to_device(bias, dim * sizeof *bias) : NULL;
    void *out_at = nans_on_device(out_bytes), *out = allocate(out_bytes);
    struct gpu_norm norm = {weight_at, bias_at, 1e-5f};
    gpu_add_norm(gpu, out_at, out_bf16, x_at, delta_at, (int)n_rows, (int)dim, &norm);
    from_device(out, out_at, out_bytes);
    from_device(x, x_at, bytes);
    gpu_release(gpu, x_at);
    gpu_release(gpu, delta_at);
    gpu_release(gpu, weight_at);
    gpu_release(gpu, bias_at);
    gpu_release(gpu, out_at);
    return out;
}

/* Sums of dim terms err by at most dim 2^-24 of their magnitudes, so the mean by dim 2^-24 mean
 * |x|, and the variance (relative: dim 2^-24, of which the root takes half) by that of x - mean; a
 * few roundings more; bf16 has 2^-9. */
static void check_norm(size_t dim, bool layer_norm_, bool with_delta, bool out_bf16) {
    enum { ROWS = 3 };
    float *x = uniforms(ROWS * dim, 1), *delta = uniforms(ROWS * dim, 0.5f),
          *sum = allocate(ROWS * dim * sizeof *sum);
    float *weight = uniforms(dim, 2), *bias = uniforms(dim, 1), *cpu = allocate(dim * sizeof *cpu);
    for (size_t i = 0; i < ROWS * dim; i++) {
        x[i] += 0.75f; /* a mean to take away */
        sum[i] = with_delta ? x[i] + delta[i] : x[i];
    }
    void *out = norm_rows(x, with_delta ? delta : NULL, ROWS, dim, weight,
                          layer_norm_ ? bias : NULL, out_bf16);
    assert_memory_equal(x, sum, ROWS * dim * sizeof *sum);
    for (size_t m = 0; m < ROWS; m++) {
        const float *row = sum + m * dim;
        double mean = 0, magnitude = 0, variance = 0;
        for (size_t k = 0; k < dim; k++)
            mean += (double)row[k] / (double)dim, magnitude += fabs((double)row[k]) / (double)dim;
        if (!layer_norm_) mean = 0;
        for (size_t k = 0; k < dim; k++)
            variance += ((double)row[k] - mean) * ((double)row[k] - mean) / (double)dim;
        double scale = 1 / sqrt(variance + (double)1e-5f);
        if (layer_norm_)
            layer_norm(cpu, row, weight, bias, (int)dim, 1e-5f);
        else
            rms_norm(cpu, row, weight, (int)dim, 1e-5f);
        for (size_t k = 0; k < dim; k++) {
            double y = ((double)row[k] - mean) * scale * (double)weight[k] +
                       (layer_norm_ ? (double)bias[k] : 0);
            double tolerance =
                ((double)dim + 16) * 0x1p-24 *
                    (fabs((double)weight[k]) * scale * (fabs((double)row[k]) + magnitude) * 2 +
                     fabs(y)) *
                    (1 + scale * scale * magnitude * magnitude * (double)dim * 0x1p-24) +
                (out_bf16 ? 0x1p-8 * fabs(y) : 0);
            double got = (double)element(out, out_bf16, m * dim + k);
            assert_true(fabs(got - y) <= tolerance);
            assert_true(fabs(got - (double)cpu[k]) <= 2 * tolerance);
        }
        float *alone = allocate(dim * sizeof *alone); /* the row's bits are its own */
        memcpy(alone, row, dim * sizeof *alone);
        void *out_alone =
            norm_rows(alone, NULL, 1, dim, weight, layer_norm_ ? bias : NULL, out_bf16);
        size_t size = out_bf16 ? 2 : 4;
        assert_memory_equal((char *)out + m * dim * size, out_alone, dim * size);
        free(alone);
        free(out_alone);
    }
    free(x);
    free(delta);
    free(sum);
    free(weight);
    free(bias);
    free(cpu);
    free(out);
}

static void test_norms_are_those_of_the_sum_and_rows_are_their_own(void **state) {
    (void)state;
    static const size_t dims[] = {2,    3,    64,  172, 576,
                                  1026, 8300, 9001}; /* the last two beyond what threads hold */
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
        for (int kind = 0; kind < 8; kind++)
            check_norm(dims[i], kind & 1, kind & 2, kind & 4);
}

static void test_a_norm_of_nan_is_nan_in_its_row_only(void **state) {
    (void)state;
    enum { DIM = 70 };
    for (int kind = 0; kind < 2; kind++) {
        float *x = uniforms(3 * DIM, 1), *weight = uniforms(DIM, 1), *bias = uniforms(DIM, 1);
        x[DIM + 69] = NAN;
        float *out = norm_rows(x, NULL, 3, DIM, weight, kind ? bias : NULL, false);
        for (int i = 0; i < 3 * DIM; i++)
            assert_int_equal(!!isnan(out[i]), i / DIM == 1);
        free(x);
        free(weight);
        free(bias);
        free(out);
    }
}

/* ---- sums ---- */

static void test_sums_of_any_length_and_alignment(void **state) {
    (void)state;
    static const size_t lengths[] = {0, 1, 3, 4, 515, 2048};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (size_t shift = 0; shift < 2; shift++) {
            size_t n = lengths[i], bytes = (n + shift + 1) * sizeof(float);
            float *x = uniforms(n + shift + 1, 1), *y = uniforms(n + shift + 1, 1),
                  *got = allocate(bytes);
            float *x_at = to_device(x, bytes), *y_at = to_device(y, bytes);
            gpu_add(gpu, x_at + shift, y_at + shift, n);
            from_device(got, x_at, bytes);
            for (size_t k = 0; k < n + shift + 1; k++)
                assert_true(got[k] == (k < shift || k == n + shift ? x[k] : x[k] + y[k]));
            gpu_release(gpu, x_at);
            gpu_release(gpu, y_at);
            free(x);
            free(y);
            free(got);
        }
}

/* ---- activations ---- */

static double activation(enum gpu_activation a, double x, double up) {
    switch (a) {
    case GPU_SILU_MUL:
        return x / (1 + exp(-x)) * up;
    case GPU_GELU_TANH:
        return 0.5 * x * (1 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
    default:
        return 0.5 * x * erfc(-x * 0.70710678118654752440);
    }
}

/* exp, tanh and erfc err by a few 2^-24 of values of at most 2, and their arguments (below 30 where
 * the result counts) by 2^-23 of themselves, which slopes of at most 1 carry over: 64 2^-24 |x| in
 * all. */
static void test_activations_are_their_formulas(void **state) {
    (void)state;
    enum { ROWS = 3 };
    static const size_t dims[] = {1, 64, 172, 515};
    for (int kind = 0; kind < 6; kind++)
        for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
            for (size_t pad = 0; pad < 6; pad += 5) {
                enum gpu_activation a = (enum gpu_activation)(kind / 2);
                bool bf16 = kind % 2;
                size_t dim = dims[i], in = a == GPU_SILU_MUL ? 2 * dim : dim, stride = dim + pad;
                size_t size = bf16 ? 2 : 4, out_bytes = ROWS * stride * size;
                float *h = uniforms(ROWS * in, 12);
                void *h_at = to_device(h, ROWS * in * sizeof *h),
                     *out_at = nans_on_device(out_bytes);
                void *out = allocate(out_bytes);
                gpu_activate(gpu, out_at, bf16, stride, h_at, ROWS, (int)dim, a);
                from_device(out, out_at, out_bytes);
                for (size_t m = 0; m < ROWS; m++)
                    for (size_t k = 0; k < stride; k++) {
                        float got = element(out, bf16, m * stride + k);
                        if (k >= dim) {
                            assert_true(isnan(got)); /* not written */
                            continue;
                        }
                        double x = (double)h[m * in + k],
                               up = a == GPU_SILU_MUL ? (double)h[m * in + dim + k] : 1;
                        double y = activation(a, x, up);
                        double tolerance =
                            64 * 0x1p-24 * fabs(x * up) + (bf16 ? 0x1p-8 * fabs(y) : 0);
                        assert_true(fabs((double)got - y) <= tolerance);
                    }
                gpu_release(gpu, h_at);
                gpu_release(gpu, out_at);
                free(h);
                free(out);
            }
}

/* ---- gathering ---- */

static void test_gathered_rows_are_copies_or_zeros(void **state) {
    (void)state;
    static const int32_t index[] = {4, -1, 0, 4, 3, -5, 1};
    enum { N = sizeof index / sizeof *index, FROM = 5 };
    static const size_t row_bytes[] = {4, 12, 64, 172 * 2, 576 * 4};
    for (size_t i = 0; i < sizeof row_bytes / sizeof *row_bytes; i++) {
        size_t bytes = row_bytes[i];
        unsigned char *from = allocate(FROM * bytes), *got = allocate(N * bytes);
        for (size_t k = 0; k < FROM * bytes; k++)
            from[k] = (unsigned char)(128 * (uniform() + 1));
        void *from_at = to_device(from, FROM * bytes), *to_at = nans_on_device(N * bytes);
        void *index_at = to_device(index, sizeof index);
        gpu_gather_rows(gpu, to_at, from_at, bytes, index_at, N);
        gpu_gather_rows(gpu, to_at, from_at, bytes, index_at, 0);
        from_device(got, to_at, N * bytes);
        for (size_t r = 0; r < N; r++)
            for (size_t k = 0; k < bytes; k++)
                assert_int_equal(got[r * bytes + k],
                                 index[r] < 0 ? 0 : from[(size_t)index[r] * bytes + k]);
        gpu_release(gpu, from_at);
        gpu_release(gpu, to_at);
        gpu_release(gpu, index_at);
        free(from);
        free(got);
    }
}

int main(void) {
    char msg[256];
    if (gpu_open(&gpu, msg, sizeof msg)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_norms_are_those_of_the_sum_and_rows_are_their_own),
        cmocka_unit_test(test_a_norm_of_nan_is_nan_in_its_row_only),
        cmocka_unit_test(test_sums_of_any_length_and_alignment),
        cmocka_unit_test(test_activations_are_their_formulas),
        cmocka_unit_test(test_gathered_rows_are_copies_or_zeros),
    };
    int failed = run_in_both_orders(tests, sizeof tests / sizeof *tests, 1, NULL);
    gpu_close(gpu);
    return failed;
}
