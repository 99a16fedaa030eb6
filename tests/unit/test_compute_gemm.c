/* test_compute_gemm.c - products in every orientation against their definition in double. */
#include "compute/cpu.h"
#include "compute/gemm.h"
#include "compute/ops.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static float *values(size_t n, uint32_t seed) {
    float *x = malloc(n * sizeof *x);
    if (!x) abort();
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(seed >> 8) * 0x1p-23f - 1;
    }
    return x;
}

struct form { /* rows of an operand have pad floats behind them */
    bool a_turned, b_turned, add;
    int m, n, k, pad;
};

/* C as gemm has it, with NaN wherever it must not read, in c [m][n + pad]. */
static float *product(struct team *team, const struct form *f, const float *a, const float *b,
                      bool bf16) {
    struct gemm_scratch *s;
    size_t row = (size_t)(f->n + f->pad);
    float *c = malloc((size_t)f->m * row * sizeof *c);
    assert_int_equal(gemm_scratch_new(&s, team, bf16), OK);
    for (size_t i = 0; i < (size_t)f->m * row; i++)
        c[i] = f->add ? 0.5f : NAN;
    size_t a_row = (size_t)((f->a_turned ? f->m : f->k) + f->pad),
           b_row = (size_t)((f->b_turned ? f->k : f->n) + f->pad);
    gemm(s, c, row, f->add, f->a_turned ? gemm_transposed(a, a_row) : gemm_plain(a, a_row),
         f->b_turned ? gemm_transposed(b, b_row) : gemm_plain(b, b_row), f->m, f->n, f->k);
    gemm_scratch_free(s);
    return c;
}

static float rounded(float x, bool bf16) {
    return bf16 ? bf16_float(bf16_round(x)) : x;
}

/* Sums of k products of numbers within 1: partial sums are about sqrt(k) / 3, k of them are
 * rounded, and products where they are not fused.  A wrong operand is off by 0.1 or so. */
static void check(struct team *team, struct form f, bool bf16) {
    /* exactly as many as there are: reading past the end shows under AddressSanitizer */
    size_t a_rows = (size_t)(f.a_turned ? f.k : f.m),
           a_row = (size_t)((f.a_turned ? f.m : f.k) + f.pad),
           b_rows = (size_t)(f.b_turned ? f.n : f.k),
           b_row = (size_t)((f.b_turned ? f.k : f.n) + f.pad);
    float *a = values(a_rows * a_row - (size_t)f.pad, 1),
          *b = values(b_rows * b_row - (size_t)f.pad, 2);
    float *c = product(team, &f, a, b, bf16);
    for (int i = 0; i < f.m; i++)
        for (int j = 0; j < f.n + f.pad; j++) {
            double want = f.add ? 0.5 : 0;
            float got = c[(size_t)i * (size_t)(f.n + f.pad) + (size_t)j];
            if (j >= f.n) { /* not ours */
                assert_true(f.add ? got == 0.5f : isnan(got));
                continue;
            }
            for (int k = 0; k < f.k; k++)
                want += (double)rounded(f.a_turned ? a[(size_t)k * a_row + (size_t)i]
                                                   : a[(size_t)i * a_row + (size_t)k],
                                        bf16) *
                        (double)rounded(f.b_turned ? b[(size_t)j * b_row + (size_t)k]
                                                   : b[(size_t)k * b_row + (size_t)j],
                                        bf16);
            if (!(fabs(got - want) <= 0x1p-24 * f.k * (2 + sqrt(f.k) / 2) + 0x1p-24))
                fail_msg("%d x %d x %d, turned %d %d: [%d][%d] is %.9g, not %.9g", f.m, f.n, f.k,
                         f.a_turned, f.b_turned, i, j, (double)got, want);
        }
    free(a), free(b), free(c);
}

static void check_all(bool bf16) {
    static const int sizes[][3] = {{1, 1, 1},      {13, 33, 7},   {12, 32, 256}, {29, 70, 257},
                                   {150, 37, 300}, {3, 1100, 19}, {16, 16, 515}};
    for (int threads = 1; threads <= 3; threads += 2) {
        struct team *team;
        assert_int_equal(team_new(&team, threads), OK);
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
            for (int form = 0; form < 8; form++)
                check(team,
                      (struct form){form & 1, form & 2, form & 4, sizes[s][0], sizes[s][1],
                                    sizes[s][2], form % 3},
                      bf16);
        team_free(team);
    }
}

static void test_products_are_those_of_the_definition(void **state) {
    (void)state;
    check_all(false);
}

static void test_products_of_bf16_are_those_of_rounded_operands(void **state) {
    (void)state;
    if (gemm_has_bf16())
        check_all(true);
    else
        print_message("skipped: this CPU has no products of bf16 pairs\n");
}

/* The same bits for any team, and for rows asked for by themselves. */
static void test_an_element_does_not_depend_on_the_others(void **state) {
    (void)state;
    struct form f = {.b_turned = true, .m = 90, .n = 600, .k = 300};
    float *a = values(90 * 300, 1), *b = values(600 * 300, 2), *whole = NULL;
    for (int bf16 = 0; bf16 <= gemm_has_bf16(); bf16++) {
        for (int threads = 1; threads <= 3; threads++) {
            struct team *team;
            assert_int_equal(team_new(&team, threads), OK);
            float *c = product(team, &f, a, b, bf16);
            if (whole) assert_memory_equal(c, whole, 90 * 600 * sizeof *c);
            free(whole);
            whole = c;
            struct form one = f;
            one.m = 5;
            one.n = 17;
            float *some = product(team, &one, a + 40 * 300, b + 100 * 300, bf16);
            for (int i = 0; i < 5; i++)
                assert_memory_equal(some + i * 17, whole + (40 + i) * 600 + 100, 17 * sizeof *some);
            free(some);
            team_free(team);
        }
        free(whole);
        whole = NULL;
    }
    free(a), free(b);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products_are_those_of_the_definition),
        cmocka_unit_test(test_products_of_bf16_are_those_of_rounded_operands),
        cmocka_unit_test(test_an_element_does_not_depend_on_the_others),
    };
    int failed = 0;
    (void)argc, (void)argv;
    static const enum cpu_isa families[] = {CPU_AMX, CPU_AVX2, CPU_GENERIC};
    for (int i = 0; i < 3; i++) {
        cpu_isa_limit(families[i]);
        failed += cmocka_run_group_tests_name(cpu_isa_name(cpu_isa()), tests, NULL, NULL);
    }
    return failed;
}
