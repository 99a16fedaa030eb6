/* test_compute_amx.c - the matmuls of amx_matmul.h and amx_bf16.h beside the generic family:
 *   built with AMX_MODEL, its tile instructions in C, on any machine;
 *   as it is shipped, on a CPU with AVX-512; one without AMX has its instructions done by
 * amx_trap.h. */
#include "compute/cpu.h"
#include "compute/kernels.h"

extern const struct compute_kernels compute_kernels_amx_model;
#define AMX_MODEL
#include "compute/amx.h"
#if defined(__x86_64__)
#include "tests/unit/amx_trap.h"
#endif

/* The whole of matrix.c, with a table of kernels that the tests choose. */
static const struct compute_kernels *table = &compute_kernels_generic;
#define compute_kernels() table
#include "compute/matrix.c"
#undef compute_kernels

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include <cmocka.h>

static const struct compute_kernels *tested;

static int test_the_model(void **state) {
    (void)state;
    tested = &compute_kernels_amx_model;
    return 0;
}
static int test_what_is_shipped(void **state) {
    (void)state;
    tested = NULL; /* skip */
#if defined(__x86_64__)
    if (cpu_isa() >= CPU_AVX512) tested = &compute_kernels_amx;
#endif
    return 0;
}

static const enum weight_type types[] = {WEIGHT_INT8, WEIGHT_INT4}; /* same bits everywhere */

static uint64_t rng_state = 1;
static float uniform(void) { /* [-1, 1) */
    rng_state = rng_state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(rng_state >> 32) * 0x1p-31f;
}
static float *uniforms(size_t n) {
    float *x = malloc(n * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++)
        x[i] = uniform();
    return x;
}
static float *nans(size_t n) {
    float *x = malloc(n * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++)
        x[i] = NAN;
    return x;
}

static struct matrix *pack(enum weight_type type, int n_out, int n_in, const float *w) {
    struct matrix *m = NULL;
    assert_int_equal(matrix_new(&m, type, n_out, n_in), OK);
    matrix_set_rows(m, 0, n_out, w);
    return m;
}

#if defined(__x86_64__)
static void unblock_trap(void *arg, int thread, int n_threads) {
    (void)arg, (void)thread, (void)n_threads;
    amx_trap_unblock();
}
#endif

static void multiply_with(const struct compute_kernels *kernels, struct team *team, float *y,
                          int y_stride, const float *x, int n_rows, const struct matrix *w,
                          const float *bias) {
    struct matmul_scratch *scratch = NULL;
    table = kernels;
    assert_int_equal(matmul_scratch_new(&scratch, n_rows, w->n_in), OK);
#if defined(__x86_64__)
    const bool trap = kernels == &compute_kernels_amx && cpu_isa() == CPU_AVX512;
    if (trap) {
        amx_trap_begin();
        team_run(team, unblock_trap, NULL);
    }
#endif
    matmul(team, scratch, y, (size_t)y_stride, x, (size_t)w->n_in, n_rows, w, bias);
#if defined(__x86_64__)
    if (trap) amx_trap_end();
#endif
    table = &compute_kernels_generic;
    matmul_scratch_free(scratch);
}

/* A trapped instruction takes microseconds, so what is shipped is tried with fewer sizes. */
static bool left_out(int rows, size_t size) {
    return tested != &compute_kernels_amx_model &&
           (size % 3 || (rows < 16 ? rows > 1 : rows % 4 > 1));
}

/* Any number of rows, whole and broken panels, chunks and blocks, with and without a bias, for one
 * thread and several: the bits of portable C, and nothing between the rows is touched. */
static void test_tiles_give_the_bits_of_portable_c(void **state) {
    (void)state;
    if (!tested) skip();
    enum { ROWS = 40, MOST_OUT = 100, MOST_IN = 300, GAP = 3 };
    static const int outs[] = {1, 15, 16, 17, 31, 32, 33, 64, MOST_OUT};
    static const int ins[] = {1, 31, 32, 33, 96, 127, 128, 129, 172, 256, MOST_IN};
    float *w = uniforms(MOST_OUT * MOST_IN), *x = uniforms(ROWS * MOST_IN);
    float *bias = uniforms(MOST_OUT), *want = nans(ROWS * MOST_OUT);
    struct team *team = NULL;
    assert_int_equal(team_new(&team, 3), OK);
    for (size_t t = 0; t < sizeof types / sizeof *types; t++)
        for (size_t o = 0; o < sizeof outs / sizeof *outs; o++)
            for (size_t i = 0; i < sizeof ins / sizeof *ins; i++) {
                int n_out = outs[o], n_in = ins[i], stride = n_out + GAP;
                struct matrix *m = pack(types[t], n_out, n_in, w);
                const float *b = (o + i) % 2 ? bias : NULL;
                multiply_with(&compute_kernels_generic, team, want, n_out, x, ROWS, m, b);
                for (int rows = 1; rows <= ROWS; rows++) {
                    if (left_out(rows, t + o + i)) continue;
                    int first = ROWS - rows; /* so that rows change their place */
                    float *y = nans((size_t)rows * (size_t)stride);
                    multiply_with(tested, team, y, stride, x + first * n_in, rows, m, b);
                    for (int r = 0; r < rows; r++) {
                        if (memcmp(y + r * stride, want + (first + r) * n_out,
                                   (size_t)n_out * sizeof *y))
                            fail_msg("%s %dx%dx%d: row %d differs", weight_type_name(types[t]),
                                     rows, n_out, n_in, r);
                        for (int gap = n_out; gap < stride; gap++)
                            assert_true(isnan(y[r * stride + gap]));
                    }
                    free(y);
                }
                matrix_free(m);
            }
    team_free(team);
    free(w), free(x), free(bias), free(want);
}

/* The largest sums, blocks of zeros, activations too small to quantise. */
static void test_extreme_blocks_give_the_bits_of_portable_c(void **state) {
    (void)state;
    if (!tested) skip();
    enum { ROWS = 18, N_OUT = 40, N_IN = 192 };
    float *w = uniforms(N_OUT * N_IN), *x = uniforms(ROWS * N_IN);
    for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < 128; k++) {
            float *at = &x[r * N_IN + k];
            *at = k < 32 ? 0 : k < 64 ? *at * 1e-34f : k < 96 ? 1 : k % 2 ? 1 : -1;
        }
    for (int n = 0; n < N_OUT; n++)
        for (int k = 64; k < 128; k++)
            w[n * N_IN + k] = (n + k / 96) % 2 ? 1 : k < 96 || k % 2 ? -1 : 1;
    for (int n = 0; n < N_OUT; n++)
        for (int k = 128; k < 160; k++)
            w[n * N_IN + k] = n % 3 ? 0 : -0.5f;
    struct team *team = NULL;
    assert_int_equal(team_new(&team, 1), OK);
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        struct matrix *m = pack(types[t], N_OUT, N_IN, w);
        float *want = nans(ROWS * N_OUT), *y = nans(ROWS * N_OUT);
        multiply_with(&compute_kernels_generic, team, want, N_OUT, x, ROWS, m, NULL);
        multiply_with(tested, team, y, N_OUT, x, ROWS, m, NULL);
        assert_memory_equal(y, want, ROWS * N_OUT * sizeof *y);
        matrix_free(m);
        free(want), free(y);
    }
    team_free(team);
    free(w), free(x);
}

/* Of x nothing is lost, so the bound is that of fp32 sums, as in test_compute_matmul.c: with few k
 * it notices that the low part of x is missing. */
static void test_bf16_is_the_sum_of_products(void **state) {
    (void)state;
    if (!tested) skip();
    enum { MOST_ROWS = 16, MOST_OUT = 100, MOST_IN = 300 };
    static const int shapes[][3] = {{1, 1, 1},    {1, 33, 2},   {5, 16, 31},  {6, 17, 32},
                                    {10, 32, 33}, {11, 64, 65}, {16, 31, 96}, {4, 100, 300}};
    float *w = uniforms(MOST_OUT * MOST_IN), *x = uniforms(MOST_ROWS * MOST_IN);
    float *bias = uniforms(MOST_OUT), row[MOST_IN];
    struct team *team = NULL;
    assert_int_equal(team_new(&team, 2), OK);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int n_rows = shapes[i][0], n_out = shapes[i][1], n_in = shapes[i][2];
        struct matrix *m = pack(WEIGHT_BF16, n_out, n_in, w);
        float *y = nans((size_t)n_rows * (size_t)n_out);
        const float *b = i % 2 ? bias : NULL;
        multiply_with(tested, team, y, n_out, x, n_rows, m, b);
        for (int n = 0; n < n_out; n++) {
            matrix_get_row(m, n, row);
            for (int r = 0; r < n_rows; r++) {
                double sum = b ? (double)b[n] : 0, size = fabs(sum), got = y[r * n_out + n];
                for (int k = 0; k < n_in; k++) {
                    sum += (double)x[r * n_in + k] * (double)row[k];
                    size += fabs((double)x[r * n_in + k] * (double)row[k]);
                }
                if (!(fabs(got - sum) <= 2 * (n_in + 8) * 0x1p-24 * size))
                    fail_msg("%dx%dx%d row %d column %d: %.9g, not %.9g", n_rows, n_out, n_in, r, n,
                             got, sum);
            }
        }
        matrix_free(m);
        free(y);
    }
    team_free(team);
    free(w), free(x), free(bias);
}

/* What is shipped and the model give the same bits as well: both have the model's sums. */
static void test_a_bf16_row_has_its_bits_in_any_batch(void **state) {
    (void)state;
    if (!tested) skip();
    enum { ROWS = 23, N_OUT = 150, N_IN = 140, STRIDE = N_OUT + 3 };
    float *w = uniforms(N_OUT * N_IN), *x = uniforms(ROWS * N_IN), *bias = uniforms(N_OUT);
    float *alone = nans(ROWS * N_OUT);
    struct matrix *m = pack(WEIGHT_BF16, N_OUT, N_IN, w);
    struct team *team = NULL;
    assert_int_equal(team_new(&team, 3), OK);
    for (int r = 0; r < ROWS; r++)
        multiply_with(&compute_kernels_amx_model, team, alone + r * N_OUT, N_OUT, x + r * N_IN, 1,
                      m, bias);
    for (int rows = 1; rows <= ROWS; rows++) {
        int first = ROWS - rows; /* so that rows change their place */
        float *y = nans((size_t)rows * STRIDE);
        multiply_with(tested, team, y, STRIDE, x + first * N_IN, rows, m, bias);
        for (int r = 0; r < rows; r++) {
            assert_memory_equal(y + r * STRIDE, alone + (first + r) * N_OUT, N_OUT * sizeof *y);
            for (int gap = N_OUT; gap < STRIDE; gap++)
                assert_true(isnan(y[r * STRIDE + gap]));
        }
        free(y);
    }
    matrix_free(m);
    team_free(team);
    free(w), free(x), free(bias), free(alone);
}

/* The order of sums of a tile of bf16, where it shows: even and odd k apart, each from 0, and
 * numbers below the normal ones are 0. */
static void test_the_model_sums_bf16_in_the_order_of_the_manual(void **state) {
    (void)state;
    static const struct tile_config config = {
        .palette = 1, .row_bytes = {4, 8, 4}, .rows = {1, 1, 2}};
    const float w[4] = {0x1p24f, 1, 1, -1}, small[4] = {0x1p-126f, 0x1p-127f, 0, 0};
    uint16_t a[4], b[4];
    float sum = 0;
    tiles_configure(&config);
    for (int k = 0; k < 4; k++)
        a[k] = bf16_round(1), b[k] = bf16_round(w[k]);
    tile_load(1, a, 8), tile_load(2, b, 4), tile_zero(0);
    tile_dot_bf16(0, 1, 2);
    tile_store(0, &sum, 4);
    assert_true(sum == 0x1p24f); /* (2^24 + 1) + (1 - 1), not ((2^24 + 1) + 1) - 1 */
    sum = -0x1p24f;
    tile_load(0, &sum, 4);
    tile_dot_bf16(0, 1, 2);
    tile_store(0, &sum, 4);
    assert_true(sum == 0);
    for (int k = 0; k < 4; k++)
        b[k] = bf16_round(small[k]);
    tile_load(2, b, 4), tile_zero(0);
    tile_dot_bf16(0, 1, 2);
    tile_store(0, &sum, 4);
    assert_true(sum == 0x1p-126f);
    tiles_release();
}

/* A NaN or infinity in a row of x reaches that row's outputs and no other row's, nor those of the
 * row before, right behind whose last block it lies; of W, that column. */
static void test_not_a_number_stays_in_its_row_and_column(void **state) {
    (void)state;
    if (!tested) skip();
    enum { ROWS = 21, N_OUT = 40, N_IN = 170, ROW = 17, COLUMN = 35 };
    float *w = uniforms(N_OUT * N_IN), *x = uniforms(ROWS * N_IN), *y = nans(ROWS * N_OUT);
    struct team *team = NULL;
    assert_int_equal(team_new(&team, 1), OK);
    static const enum weight_type all[] = {WEIGHT_BF16, WEIGHT_INT8, WEIGHT_INT4};
    for (size_t t = 0; t < sizeof all / sizeof *all; t++)
        for (int bad = 0; bad < 2; bad++) {
            x[ROW * N_IN + 5] = w[COLUMN * N_IN + 3] = bad ? INFINITY : NAN;
            struct matrix *m = pack(all[t], N_OUT, N_IN, w);
            multiply_with(tested, team, y, N_OUT, x, ROWS, m, NULL);
            for (int r = 0; r < ROWS; r++)
                for (int n = 0; n < N_OUT; n++)
                    assert_int_equal(isfinite(y[r * N_OUT + n]), r != ROW && n != COLUMN);
            matrix_free(m);
        }
    team_free(team);
    free(w), free(x), free(y);
}

int main(void) {
#define OF(test, what)                                                                             \
    { #test ", " #what, test, test_##what, NULL, NULL }
    const struct CMUnitTest tests[] = {
        OF(test_tiles_give_the_bits_of_portable_c, the_model),
        OF(test_extreme_blocks_give_the_bits_of_portable_c, the_model),
        OF(test_bf16_is_the_sum_of_products, the_model),
        OF(test_a_bf16_row_has_its_bits_in_any_batch, the_model),
        OF(test_not_a_number_stays_in_its_row_and_column, the_model),
        cmocka_unit_test(test_the_model_sums_bf16_in_the_order_of_the_manual),
        OF(test_tiles_give_the_bits_of_portable_c, what_is_shipped),
        OF(test_extreme_blocks_give_the_bits_of_portable_c, what_is_shipped),
        OF(test_bf16_is_the_sum_of_products, what_is_shipped),
        OF(test_a_bf16_row_has_its_bits_in_any_batch, what_is_shipped),
        OF(test_not_a_number_stays_in_its_row_and_column, what_is_shipped),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
