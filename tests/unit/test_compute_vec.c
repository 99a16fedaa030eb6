/* test_compute_vec.c - the sixteen lanes of vec.h, as this file's compiler flags build them.
 * test_compute_vec_avx2.c and test_compute_vec_avx512.c run the same tests in the other families.
 */
#include "compute/cpu.h"
#include "compute/ops.h"
#include "compute/vec.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static float from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}
static uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static uint64_t rng_state = 7;
static uint32_t random_bits(void) {
    rng_state = rng_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(rng_state >> 32);
}

/* Error of y as e^x in units of the last place of the exact result (denormal results: of 2^-149).
 */
static double exp_error(float x, float y) {
    double exact = exp((double)x);
    int exponent;
    frexp(exact, &exponent);
    double ulp = ldexp(1, (exponent < -125 ? -125 : exponent) - 24);
    return fabs((double)y - exact) / ulp;
}

/* The bound that vec.h states; 512 floats in every binade of both signs, 64 k where results are
 * neither 0, 1 nor infinite.  The library's double exp is exact at this scale. */
static void test_exp_is_within_its_bound_at_every_exponent(void **state) {
    (void)state;
    for (uint32_t head = 0; head < 512; head++) { /* sign and exponent */
        uint32_t exponent = head & 255;
        int n = exponent > 100 && exponent < 134 ? 1 << 16 : 512;
        if (exponent == 255) continue;
        for (int i = 0; i < n; i += 16) {
            float x[16], y[16];
            for (int l = 0; l < 16; l++)
                x[l] = from_bits(head << 23 | random_bits() >> 9);
            x[0] = from_bits(head << 23); /* the power of two itself */
            v16_store(y, v16_exp(v16_load(x)));
            for (int l = 0; l < 16; l++) {
                if ((float)exp((double)x[l]) == INFINITY)
                    assert_true(y[l] == INFINITY);
                else if (!(exp_error(x[l], y[l]) <= 1.1))
                    fail_msg("exp(%a) = %a, %.3f ulp off", (double)x[l], (double)y[l],
                             exp_error(x[l], y[l]));
            }
        }
    }
}

static void test_exp_has_the_right_limits(void **state) {
    (void)state;
    const float x[16] = {0,         -0.0f,     -INFINITY,  INFINITY, NAN,      -NAN,
                         88.72283f, 88.72284f, -87.33655f, -103.97f, -103.98f, -1e30f,
                         1e30f,     -88,       0x1p-149f,  -105};
    float y[16];
    v16_store(y, v16_exp(v16_load(x)));
    assert_true(y[0] == 1 && y[1] == 1 && y[14] == 1);
    assert_true(y[2] == 0 && !signbit(y[2]) && y[11] == 0 && y[10] == 0 && y[15] == 0);
    assert_true(y[3] == INFINITY && y[12] == INFINITY && y[7] == INFINITY);
    assert_true(isnan(y[4]) && isnan(y[5]));
    assert_true(isfinite(y[6]) && y[6] > 3.4e38f);
    assert_true(y[9] == 0x1p-149f);              /* the smallest denormal */
    assert_true(y[13] > 0 && y[13] < 0x1p-126f); /* a denormal */
}

static void test_lanes_are_added_in_the_tree_of_the_header(void **state) {
    (void)state;
    for (int round = 0; round < 1000; round++) {
        float l[16];
        for (int i = 0; i < 16; i++)
            l[i] = (float)(int32_t)random_bits() * 0x1p-20f;
        volatile float four[4]; /* volatile: no wider sums, no fusing */
        for (int i = 0; i < 4; i++) {
            volatile float a = l[i] + l[i + 8], b = l[i + 4] + l[i + 12];
            four[i] = a + b;
        }
        volatile float even = four[0] + four[2], odd = four[1] + four[3];
        float want = even + odd;
        assert_int_equal(bits_of(v16_sum(v16_load(l))), bits_of(want));
        float most = l[0];
        for (int i = 1; i < 16; i++)
            most = l[i] > most ? l[i] : most;
        assert_true(v16_hmax(v16_load(l)) == most);
    }
}

static void test_lanes_stay_in_their_places(void **state) {
    (void)state;
    float a[17], b[17], got[17];
    for (int i = 0; i < 17; i++)
        a[i] = (float)i + 0.5f, b[i] = (float)(i % 5) - 2;
    v16 va = v16_load(a + 1), vb = v16_load(b + 1); /* not aligned */
    struct {
        v16 got;
        float want[16];
    } cases[8];
    cases[0].got = v16_add(va, vb), cases[1].got = v16_sub(va, vb), cases[2].got = v16_mul(va, vb);
    cases[3].got = v16_div(vb, va), cases[4].got = v16_max(vb, v16_zero());
    cases[5].got = v16_min(vb, v16_zero()), cases[6].got = v16_abs(vb);
    cases[7].got = v16_fma(va, vb, v16_set1(3)); /* exact here, fused or not */
    for (int l = 0; l < 16; l++) {
        float x = a[l + 1], y = b[l + 1];
        const float want[8] = {x + y,         x - y,         x * y,    y / x,
                               y > 0 ? y : 0, y < 0 ? y : 0, fabsf(y), x * y + 3};
        for (int c = 0; c < 8; c++)
            cases[c].want[l] = want[c];
    }
    for (int c = 0; c < 8; c++) {
        v16_store(got + 1, cases[c].got);
        for (int l = 0; l < 16; l++)
            assert_true(got[l + 1] == cases[c].want[l]);
    }
    for (int n = 0; n <= 16; n++) {
        for (int i = 0; i < 17; i++)
            got[i] = NAN;
        v16_store_part(got, v16_load_part(a, n), n);
        for (int i = 0; i < 17; i++)
            assert_true(i < n ? got[i] == a[i] : isnan(got[i]));
        v16_store(got, v16_load_part(a, n));
        for (int i = 0; i < 16; i++)
            assert_true(got[i] == (i < n ? a[i] : 0));
    }
}

static void test_a_nan_stays_when_it_is_the_second_operand(void **state) {
    (void)state;
    assert_true(isnan(v16_sum(v16_max(v16_zero(), v16_set1(NAN)))));
    assert_true(isnan(v16_sum(v16_min(v16_zero(), v16_set1(NAN)))));
    assert_true(v16_sum(v16_max(v16_set1(NAN), v16_set1(1))) == 16);
    assert_true(v16_sum(v16_min(v16_set1(NAN), v16_set1(1))) == 16);
}

static void test_all_half_floats_widen_as_the_scalar_functions_do(void **state) {
    (void)state;
    for (uint32_t first = 0; first < 1 << 16; first += 16) {
        uint16_t h[16];
        float got[16];
        for (uint32_t l = 0; l < 16; l++)
            h[l] = (uint16_t)(first + l);
        v16_store(got, v16_load_bf16(h));
        for (int l = 0; l < 16; l++)
            assert_int_equal(bits_of(got[l]), bits_of(bf16_float(h[l])));
        v16_store(got, v16_load_fp16(h));
        for (int l = 0; l < 16; l++)
            assert_int_equal(bits_of(got[l]), bits_of(fp16_float(h[l])));
    }
}

/* Around every bf16: it itself, both sides of the half way to the next, and the half way. */
static void test_bf16_is_rounded_as_the_scalar_function_does(void **state) {
    (void)state;
    static const uint32_t offsets[16] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1234, 0xabcd};
    for (uint32_t h = 0; h < 1 << 16; h++) {
        float x[16];
        uint16_t got[16];
        for (int l = 0; l < 16; l++)
            x[l] = from_bits(h << 16 | offsets[l]);
        v16_store_bf16(got, v16_load(x));
        for (int l = 0; l < 16; l++)
            assert_int_equal(got[l], bf16_round(x[l]));
    }
}

static enum cpu_isa built_for(void) {
#if defined(__AVX512F__)
    return CPU_AVX512;
#elif defined(__AVX2__)
    return CPU_AVX2;
#else
    return CPU_GENERIC;
#endif
}

int main(void) {
    if (cpu_isa() < built_for()) {
        print_message("skipped: this CPU has no %s\n", cpu_isa_name(built_for()));
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp_is_within_its_bound_at_every_exponent),
        cmocka_unit_test(test_exp_has_the_right_limits),
        cmocka_unit_test(test_lanes_are_added_in_the_tree_of_the_header),
        cmocka_unit_test(test_lanes_stay_in_their_places),
        cmocka_unit_test(test_a_nan_stays_when_it_is_the_second_operand),
        cmocka_unit_test(test_all_half_floats_widen_as_the_scalar_functions_do),
        cmocka_unit_test(test_bf16_is_rounded_as_the_scalar_function_does),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
