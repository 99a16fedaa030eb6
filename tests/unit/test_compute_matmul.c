/* test_compute_matmul.c - packed matrices and Y = X W^T, in every instruction family this machine
 * has. */
#include "compute/cpu.h"
#include "compute/matrix.h"
#include "compute/ops.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const enum weight_type types[] = {WEIGHT_FP32, WEIGHT_BF16, WEIGHT_INT8, WEIGHT_INT4};
static enum cpu_isa best; /* of this machine */

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

static struct team *team_of(int n_threads) {
    struct team *team = NULL;
    assert_int_equal(team_new(&team, n_threads), OK);
    return team;
}

static struct matmul_scratch *scratch_for(int rows, int n_in) {
    struct matmul_scratch *s = NULL;
    assert_int_equal(matmul_scratch_new(&s, rows, n_in), OK);
    return s;
}

/* x as the kernels see it: int8 and int4 quantise rows in blocks of 32 to absmax / 127. */
static void as_seen(double *seen, const float *x, int n, enum weight_type type) {
    for (int k = 0; k < n; k++)
        seen[k] = x[k];
    if (type != WEIGHT_INT8 && type != WEIGHT_INT4) return;
    for (int first = 0; first < n; first += 32) {
        float absmax = 0;
        int end = first + 32 < n ? first + 32 : n;
        for (int k = first; k < end; k++)
            absmax = fmaxf(absmax, fabsf(x[k]));
        for (int k = first; k < end; k++)
            seen[k] = absmax > 0 ? (double)(absmax / 127) * nearbyintf(x[k] * (127 / absmax)) : 0;
    }
}

/* Sums of fp32 in one order: each of n_in products (n_in / 32 blocks of up to 4 roundings) and each
 * partial sum is rounded once, so |error| <= (n_in + 8) 2^-24 sum |x w|, and twice that covers the
 * bias and second order. */
static void check_against_double(enum weight_type type, int n_rows, int n_out, int n_in,
                                 bool with_bias) {
    float *w = uniforms((size_t)n_out * (size_t)n_in), *x = uniforms((size_t)n_rows * (size_t)n_in);
    float *bias = uniforms((size_t)n_out), *y = nans((size_t)n_rows * (size_t)n_out);
    float *row = malloc((size_t)n_in * sizeof *row);
    double *seen = malloc((size_t)n_in * sizeof *seen);
    struct matrix *m = pack(type, n_out, n_in, w);
    struct team *team = team_of(2);
    struct matmul_scratch *scratch = scratch_for(n_rows, n_in);
    matmul(team, scratch, y, (size_t)n_out, x, (size_t)n_in, n_rows, m, with_bias ? bias : NULL);
    for (int r = 0; r < n_rows; r++) {
        as_seen(seen, x + (size_t)r * (size_t)n_in, n_in, type);
        for (int n = 0; n < n_out; n++) {
            matrix_get_row(m, n, row);
            double sum = with_bias ? (double)bias[n] : 0, size = fabs(sum);
            for (int k = 0; k < n_in; k++) {
                sum += seen[k] * (double)row[k];
                size += fabs(seen[k] * (double)row[k]);
                if (type == WEIGHT_INT4) size += 2 * fabs(seen[k]); /* s q and m are added apart */
            }
            double got = y[(size_t)r * (size_t)n_out + (size_t)n];
            if (!(fabs(got - sum) <= 2 * (n_in + 8) * 0x1p-24 * size))
                fail_msg("%s %s %dx%dx%d row %d column %d: %.9g, not %.9g", weight_type_name(type),
                         cpu_isa_name(cpu_isa()), n_rows, n_out, n_in, r, n, got, sum);
        }
    }
    team_free(team);
    matmul_scratch_free(scratch);
    matrix_free(m);
    free(w), free(x), free(bias), free(y), free(row), free(seen);
}

static void test_matmul_is_the_sum_of_products(void **state) {
    (void)state;
    static const int shapes[][3] = {{1, 1, 1},     {1, 172, 64}, {3, 64, 172},
                                    {2, 48, 33},   {5, 17, 48},  {7, 100, 31},
                                    {13, 512, 96}, {65, 33, 65}, {1, 576, 1536}};
    for (int isa = 0; isa <= (int)best; isa++) {
        cpu_isa_limit((enum cpu_isa)isa);
        for (size_t t = 0; t < 4; t++)
            for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
                check_against_double(types[t], shapes[s][0], shapes[s][1], shapes[s][2], s % 2);
    }
    cpu_isa_limit(best);
}

/* Row r of a batch of any size, with any number of threads and any stride, has the bits it has
 * alone; also when the matrix was expected. */
static void test_a_row_is_the_same_bits_in_any_batch_and_team(void **state) {
    (void)state;
    enum { ROWS = 65, N_OUT = 200, N_IN = 172, X_STRIDE = 180, Y_STRIDE = 203 };
    float *w = uniforms(N_OUT * N_IN), *x = uniforms(ROWS * X_STRIDE);
    struct matmul_scratch *scratch = scratch_for(ROWS, N_IN);
    static const int batches[] = {1, 2, 3, 4, 5, 7, 64, 65};
    for (int isa = 0; isa <= (int)best; isa++) {
        cpu_isa_limit((enum cpu_isa)isa);
        for (size_t t = 0; t < 4; t++) {
            struct matrix *m = pack(types[t], N_OUT, N_IN, w);
            float *alone = nans(ROWS * N_OUT);
            struct team *one = team_of(1);
            for (int r = 0; r < ROWS; r++)
                matmul(one, scratch, alone + r * N_OUT, N_OUT, x + r * X_STRIDE, X_STRIDE, 1, m,
                       NULL);
            team_free(one);
            for (int n_threads = 1; n_threads <= 4; n_threads++) {
                struct team *team = team_of(n_threads);
                for (size_t b = 0; b < sizeof batches / sizeof *batches; b++) {
                    int n = batches[b], first = ROWS - n; /* so that rows change their place */
                    float *y = nans(ROWS * Y_STRIDE);
                    matrix_expect(team, b % 2 ? m : NULL, n);
                    matmul(team, scratch, y, Y_STRIDE, x + first * X_STRIDE, X_STRIDE, n, m, NULL);
                    for (int r = 0; r < n; r++) {
                        assert_memory_equal(y + r * Y_STRIDE, alone + (first + r) * N_OUT,
                                            N_OUT * sizeof *y);
                        for (int i = N_OUT; i < Y_STRIDE; i++)
                            assert_true(
                                isnan(y[r * Y_STRIDE + i])); /* nothing between rows is touched */
                    }
                    free(y);
                }
                team_free(team);
            }
            free(alone);
            matrix_free(m);
        }
    }
    cpu_isa_limit(best);
    matmul_scratch_free(scratch);
    free(w), free(x);
}

/* Everything but fp32 and bf16 in portable C, which has no fused multiply-add. */
static void test_families_give_the_same_bits(void **state) {
    (void)state;
    enum { ROWS = 37, N_OUT = 100, N_IN = 300 };
    float *w = uniforms(N_OUT * N_IN), *x = uniforms(ROWS * N_IN);
    for (int i = 0; i < 64; i++)
        x[i] = 0; /* blocks of zeros */
    for (int i = 64; i < 96; i++)
        x[i] *= 1e-34f; /* too small to quantise */
    for (int i = 96; i < 128; i++)
        x[i] = i % 2 ? 1 : -1; /* the ends of the byte range */
    for (int i = 96; i < 128; i++)
        w[i] = i % 2 ? 1 : -1;
    struct matmul_scratch *scratch = scratch_for(ROWS, N_IN);
    struct team *team = team_of(1);
    for (size_t t = 0; t < 4; t++) {
        struct matrix *m = pack(types[t], N_OUT, N_IN, w);
        float *reference = nans(ROWS * N_OUT);
        /* AMX has another order of sums for bf16 */
        const enum cpu_isa most = types[t] == WEIGHT_BF16 && best == CPU_AMX ? CPU_AVX512 : best;
        cpu_isa_limit(most);
        matmul(team, scratch, reference, N_OUT, x, N_IN, ROWS, m, NULL);
        for (int isa = types[t] == WEIGHT_FP32 || types[t] == WEIGHT_BF16; isa <= (int)most;
             isa++) {
            float *y = nans(ROWS * N_OUT);
            cpu_isa_limit((enum cpu_isa)isa);
            if (cpu_isa() != (enum cpu_isa)isa) { /* of another architecture */
                assert_int_equal(cpu_isa(), CPU_GENERIC);
                free(y);
                continue;
            }
            matmul(team, scratch, y, N_OUT, x, N_IN, ROWS, m, NULL);
            if (memcmp(y, reference, ROWS * N_OUT * sizeof *y))
                fail_msg("%s differs between %s and %s", weight_type_name(types[t]),
                         cpu_isa_name((enum cpu_isa)isa), cpu_isa_name(most));
            free(y);
        }
        free(reference);
        matrix_free(m);
    }
    cpu_isa_limit(best);
    team_free(team);
    matmul_scratch_free(scratch);
    free(w), free(x);
}

/* A NaN or infinity in a row of x reaches that row's outputs and no other row's. */
static void test_not_a_number_stays_in_its_row(void **state) {
    (void)state;
    enum { ROWS = 5, N_OUT = 40, N_IN = 70 };
    float *w = uniforms(N_OUT * N_IN), *x = uniforms(ROWS * N_IN);
    struct matmul_scratch *scratch = scratch_for(ROWS, N_IN);
    struct team *team = team_of(1);
    for (int isa = 0; isa <= (int)best; isa++) {
        cpu_isa_limit((enum cpu_isa)isa);
        for (size_t t = 0; t < 4; t++) {
            for (int bad = 0; bad < 2; bad++) {
                struct matrix *m = pack(types[t], N_OUT, N_IN, w);
                float *y = nans(ROWS * N_OUT), kept = x[2 * N_IN + 67];
                x[2 * N_IN + 67] = bad ? INFINITY : NAN;
                matmul(team, scratch, y, N_OUT, x, N_IN, ROWS, m, NULL);
                x[2 * N_IN + 67] = kept;
                for (int r = 0; r < ROWS; r++)
                    for (int n = 0; n < N_OUT; n++)
                        assert_int_equal(isfinite(y[r * N_OUT + n]), r != 2);
                free(y);
                matrix_free(m);
            }
        }
    }
    cpu_isa_limit(best);
    team_free(team);
    matmul_scratch_free(scratch);
    free(w), free(x);
}

/* fp32 exactly; bf16 to nearest even; int8 within half a step of absmax / 127 plus the rounding of
 * s to 11 bits (127 steps each off by 2^-11 relative: 0.07 of a step); int4 likewise with 15 steps
 * and m (2^-11 of |m| <= 1). */
static void test_rows_come_back_as_the_format_holds_them(void **state) {
    (void)state;
    enum { N_OUT = 37, N_IN = 75 };
    float *w = uniforms(N_OUT * N_IN), row[N_IN];
    for (size_t t = 0; t < 4; t++) {
        struct matrix *m = NULL;
        assert_int_equal(matrix_new(&m, types[t], N_OUT, N_IN), OK);
        assert_int_equal(matrix_n_out(m), N_OUT);
        assert_int_equal(matrix_n_in(m), N_IN);
        assert_int_equal(matrix_type(m), types[t]);
        matrix_set_rows(m, 20, 17, w + 20 * N_IN); /* in two parts that meet inside a panel */
        matrix_set_rows(m, 0, 20, w);
        for (int n = 0; n < N_OUT; n++) {
            const float *want = w + n * N_IN;
            memset(row, 0xff, sizeof row);
            matrix_get_row(m, n, row);
            for (int k = 0; k < N_IN; k++) {
                float lo = 1, hi = -1;
                for (int i = k / 32 * 32; i < k / 32 * 32 + 32 && i < N_IN; i++)
                    lo = fminf(lo, want[i]), hi = fmaxf(hi, want[i]);
                float step = fmaxf(-lo, hi) / 127, step4 = (hi - lo) / 15,
                      error = fabsf(row[k] - want[k]);
                switch (types[t]) {
                case WEIGHT_FP32:
                    assert_true(row[k] == want[k]);
                    break;
                case WEIGHT_BF16:
                    assert_true(row[k] == bf16_float(bf16_round(want[k])));
                    break;
                case WEIGHT_INT8:
                    assert_true(error <= 0.57f * step);
                    break;
                case WEIGHT_INT4:
                    assert_true(error <= 0.51f * step4 + 0x1p-11f);
                    break;
                }
            }
        }
        matrix_free(m);
    }
    free(w);
}

/* Q8_0, Q4_0 and Q4_1 files lose nothing when they are packed again, even where a block leaves out
 * the ends of the range of q or its scale is negative, as Q4_0's are. */
static void test_values_from_a_quantised_file_come_back_exactly(void **state) {
    (void)state;
    enum { N_OUT = 64, N_IN = 96 };
    float *w = malloc(N_OUT * N_IN * sizeof *w), row[N_IN];
    for (int kind = 0; kind < 3; kind++) {
        for (int first = 0; first < N_OUT * N_IN; first += 32) {
            float s = fp16_float(fp16_round(uniform())), m = fp16_float(fp16_round(uniform()));
            for (int i = 0; i < 32; i++) {
                int r = (int)(uniform() * 1e6f),
                    q = (r < 0 ? -r : r) % 14; /* 14 and 15 are never used */
                if (kind == 0) w[first + i] = s * (float)(i == 5 ? -127 : r % 128);
                if (kind == 1) w[first + i] = s * (float)(i == 5 ? -8 : q - 8);
                if (kind == 2) w[first + i] = fabsf(s) * (float)(i == 5 ? 0 : i == 9 ? 15 : q) + m;
            }
        }
        struct matrix *packed = pack(kind ? WEIGHT_INT4 : WEIGHT_INT8, N_OUT, N_IN, w);
        for (int n = 0; n < N_OUT; n++) {
            matrix_get_row(packed, n, row);
            for (int k = 0; k < N_IN; k++)
                if (row[k] != w[n * N_IN + k])
                    fail_msg("kind %d row %d, %d: %.9g, not %.9g", kind, n, k, (double)row[k],
                             (double)w[n * N_IN + k]);
        }
        matrix_free(packed);
    }
    free(w);
}

/* Padding to whole panels and blocks is the only overhead; sizes of nothing are refused. */
static void test_sizes_are_checked_and_counted(void **state) {
    (void)state;
    struct matrix *m = NULL;
    assert_int_equal(matrix_new(&m, WEIGHT_INT8, 0, 32), ERR_ARG);
    assert_int_equal(matrix_new(&m, WEIGHT_INT8, 32, -1), ERR_ARG);
    assert_null(m);
    struct matmul_scratch *s = NULL;
    assert_int_equal(matmul_scratch_new(&s, 0, 32), ERR_ARG);
    assert_null(s);
    static const size_t bytes[] = {100 * 64, 128 * 32, 4 * 544, 4 * 320};
    for (size_t t = 0; t < 4; t++) {
        assert_int_equal(matrix_new(&m, types[t], 17, 100), OK);
        assert_int_equal(matrix_bytes(m), 2 * bytes[t]);
        matrix_free(m);
    }
    matrix_free(NULL);
    matmul_scratch_free(NULL);
}

int main(void) {
    best = cpu_isa();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_matmul_is_the_sum_of_products),
        cmocka_unit_test(test_a_row_is_the_same_bits_in_any_batch_and_team),
        cmocka_unit_test(test_families_give_the_same_bits),
        cmocka_unit_test(test_not_a_number_stays_in_its_row),
        cmocka_unit_test(test_rows_come_back_as_the_format_holds_them),
        cmocka_unit_test(test_values_from_a_quantised_file_come_back_exactly),
        cmocka_unit_test(test_sizes_are_checked_and_counted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
