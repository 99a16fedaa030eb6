/* test_compute_ops.c - norms, activations and 16-bit floats, in every instruction family this
 * machine has. U = 2^-24 is half a unit in the last place, relative. */
#include "compute/cpu.h"
#include "compute/ops.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#define U 0x1p-24
enum { MAX_N = 1000 };
static const int sizes[] = {1, 2, 15, 16, 17, 31, 64, 172, 576, 1000};
enum { N_SIZES = sizeof sizes / sizeof *sizes };
static enum cpu_isa best;

static uint64_t rng_state = 3;
static float uniform(float lo, float hi) {
    rng_state = rng_state * 6364136223846793005u + 1442695040888963407u;
    return lo + (hi - lo) * (float)((double)(rng_state >> 40) * 0x1p-24);
}
static void fill(float *x, int n, float lo, float hi) {
    for (int i = 0; i < n; i++)
        x[i] = uniform(lo, hi);
}
static void fill_nan(float *x, int n) {
    for (int i = 0; i < n; i++)
        x[i] = NAN;
}
static void check(const char *what, int n, int i, float got, double want, double tolerance) {
    if (!(fabs((double)got - want) <= tolerance))
        fail_msg("%s (%s) n = %d, %d: %.9g, not %.9g, tolerance %.3g", what,
                 cpu_isa_name(cpu_isa()), n, i, (double)got, want, tolerance);
}

/* n / 16 additions a lane, 4 in the tree, and about 6 other roundings of which the root halves the
 * sum's. */
static void rms_norm_is_its_formula(void) {
    float x[MAX_N], weight[MAX_N], y[MAX_N + 1];
    for (int s = 0; s < N_SIZES; s++) {
        int n = sizes[s];
        fill(x, n, -3, 3), fill(weight, n, -2, 2), fill_nan(y, MAX_N + 1);
        rms_norm(y, x, weight, n, 1e-5f);
        double squares = 0;
        for (int i = 0; i < n; i++)
            squares += (double)x[i] * (double)x[i];
        double scale = 1 / sqrt(squares / n + (double)1e-5f);
        for (int i = 0; i < n; i++) {
            double want = (double)x[i] * scale * (double)weight[i];
            check("rms_norm", n, i, y[i], want, (n / 32.0 + 10) * U * fabs(want));
        }
        assert_true(isnan(y[n])); /* nothing past the row is written */
    }
}

/* The mean errs by (n / 16 + 5) U times mean |x| <= 4 for x in [2, 4], so (x - mean) errs by as
 * much, and the variance relative to itself (1/3, when n > 1 is not tiny) by its own sum and twice
 * the mean's error.  x is far from 0 on purpose: padding lanes that are not masked show up as 9
 * each. */
static void layer_norm_is_its_formula(void) {
    float x[MAX_N], weight[MAX_N], bias[MAX_N], y[MAX_N + 1];
    for (int s = 0; s < N_SIZES; s++) {
        int n = sizes[s];
        fill(x, n, 2, 4), fill(weight, n, -2, 2), fill(bias, n, -1, 1), fill_nan(y, MAX_N + 1);
        layer_norm(y, x, weight, bias, n, 1e-3f);
        double mean = 0, var = 0;
        for (int i = 0; i < n; i++)
            mean += (double)x[i] / n;
        for (int i = 0; i < n; i++)
            var += ((double)x[i] - mean) * ((double)x[i] - mean) / n;
        double scale = 1 / sqrt(var + (double)1e-3f), x_error = (n / 16 + 8) * U * 4;
        for (int i = 0; i < n; i++) {
            double normed = ((double)x[i] - mean) * scale;
            double tolerance =
                x_error * scale * (1 + normed * normed) + (n / 16 + 10) * U * fabs(normed);
            check("layer_norm", n, i, y[i], normed * (double)weight[i] + (double)bias[i],
                  tolerance * fabs((double)weight[i]) + 4 * U * (2 * fabs(normed) + 1));
        }
        assert_true(isnan(y[n]));
    }
}

/* e^-g errs by 1.1 ulp = 2.2 U, then a sum, a quotient and a product. */
static void silu_mul_is_its_formula(void) {
    float gate[MAX_N], up[MAX_N], y[MAX_N + 1];
    for (int s = 0; s < N_SIZES; s++) {
        int n = sizes[s];
        fill(gate, n, -30, 30), fill(up, n, -5, 5), fill_nan(y, MAX_N + 1);
        silu_mul(y, gate, up, n);
        for (int i = 0; i < n; i++) {
            double want = (double)gate[i] / (1 + exp(-(double)gate[i])) * (double)up[i];
            check("silu_mul", n, i, y[i], want, 7 * U * fabs(want));
        }
        assert_true(isnan(y[n]));
        silu_mul(gate, gate, up, n); /* in place */
        assert_memory_equal(gate, y, (size_t)n * sizeof *y);
    }
}

/* gelu_tanh: the exponent u errs by 5 roundings relative, so e^u by |u| 5 U.  gelu_erf: erfc(t), t
 * = -x / sqrt 2, changes by 2 t^2 + 1 times a relative change of t (2 roundings); the C library's
 * erfcf is good to 3 ulp. */
static void gelus_are_their_formulas(void) {
    float x[MAX_N], y[MAX_N + 1];
    for (int s = 0; s < N_SIZES; s++) {
        int n = sizes[s];
        fill(x, n, -6, 6), fill_nan(y, MAX_N + 1);
        gelu_tanh(y, x, n);
        for (int i = 0; i < n; i++) {
            double v = (double)x[i], u = 2 * sqrt(2 / M_PI) * (v + 0.044715 * v * v * v);
            check("gelu_tanh", n, i, y[i], v / (1 + exp(-u)),
                  (7 + 5 * fabs(u)) * U * fabs(v / (1 + exp(-u))));
        }
        assert_true(isnan(y[n]));
        fill_nan(y, n);
        gelu_erf(y, x, n);
        for (int i = 0; i < n; i++) {
            double v = (double)x[i], want = 0.5 * v * erfc(-v / sqrt(2));
            check("gelu_erf", n, i, y[i], want, (10 + 2 * (v * v + 1)) * U * fabs(want));
        }
        assert_true(isnan(y[n]));
        float in_place[MAX_N];
        memcpy(in_place, x, sizeof in_place);
        gelu_erf(in_place, in_place, n);
        assert_memory_equal(in_place, y, (size_t)n * sizeof *y);
        gelu_tanh(y, x, n), gelu_tanh(x, x, n);
        assert_memory_equal(x, y, (size_t)n * sizeof *y);
    }
}

static void add_to_adds(void) {
    float x[MAX_N], y[MAX_N + 1], before[MAX_N];
    for (int s = 0; s < N_SIZES; s++) {
        int n = sizes[s];
        fill(x, n, -1, 1), fill(before, n, -1, 1), fill_nan(y, MAX_N + 1);
        memcpy(y, before, (size_t)n * sizeof *y);
        add_to(y, x, n);
        for (int i = 0; i < n; i++)
            assert_true(y[i] == before[i] + x[i]);
        assert_true(isnan(y[n]));
    }
}

static void in_every_family(void (*property)(void)) {
    for (int isa = 0; isa <= (int)best; isa++) {
        cpu_isa_limit((enum cpu_isa)isa);
        property();
    }
    cpu_isa_limit(best);
}
static void test_rms_norm_is_its_formula(void **state) {
    (void)state;
    in_every_family(rms_norm_is_its_formula);
}
static void test_layer_norm_is_its_formula(void **state) {
    (void)state;
    in_every_family(layer_norm_is_its_formula);
}
static void test_silu_mul_is_its_formula(void **state) {
    (void)state;
    in_every_family(silu_mul_is_its_formula);
}
static void test_gelus_are_their_formulas(void **state) {
    (void)state;
    in_every_family(gelus_are_their_formulas);
}
static void test_add_to_adds(void **state) {
    (void)state;
    in_every_family(add_to_adds);
}

static void test_avx2_and_avx512_give_the_same_bits(void **state) {
    (void)state;
    if (best != CPU_AVX512 && best != CPU_AMX) skip();
    enum { N = 172 };
    float x[N], w[N], b[N], y[2][5][N];
    fill(x, N, -5, 5), fill(w, N, -1, 1), fill(b, N, -1, 1);
    for (int i = 0; i < 2; i++) {
        cpu_isa_limit(i ? CPU_AVX512 : CPU_AVX2);
        rms_norm(y[i][0], x, w, N, 1e-5f);
        layer_norm(y[i][1], x, w, b, N, 1e-5f);
        silu_mul(y[i][2], x, w, N);
        gelu_tanh(y[i][3], x, N);
        gelu_erf(y[i][4], x, N);
    }
    cpu_isa_limit(best);
    assert_memory_equal(y[0], y[1], sizeof y[0]);
}

/* ---- 16-bit floats ---- */

static float from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* The value of an fp16 by its definition. */
static double fp16_value(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                      : ldexp(fraction, -24);
    return h & 0x8000 ? -magnitude : magnitude;
}

static void test_every_fp16_survives_the_way_through_fp32(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 1 << 16; h++) {
        float f = fp16_float((uint16_t)h);
        if (isnan(fp16_value((uint16_t)h))) {
            assert_true(isnan(f));
            assert_true(isnan(fp16_value(fp16_round(f))));
        } else {
            assert_true((double)f == fp16_value((uint16_t)h));
            assert_int_equal(signbit(f) != 0, h >> 15);
            assert_int_equal(fp16_round(f), h);
        }
    }
}

/* Half way between neighbours goes to the even one, and a hair beside it to the nearer one. */
static void test_fp16_rounds_to_nearest_even(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 0x7c00; h++) {
        double next = h == 0x7bff ? 65536 : fp16_value((uint16_t)(h + 1));
        float half_way = (float)((fp16_value((uint16_t)h) + next) / 2); /* exact: one more bit */
        uint16_t even = (uint16_t)(h + (h & 1));
        for (uint16_t sign = 0; sign < 2; sign++) {
            float s = sign ? -1.0f : 1.0f;
            uint16_t bit = (uint16_t)(sign << 15);
            assert_int_equal(fp16_round(s * half_way), even | bit);
            assert_int_equal(fp16_round(s * nextafterf(half_way, 0)), h | bit);
            assert_int_equal(fp16_round(s * nextafterf(half_way, INFINITY)), (h + 1) | bit);
        }
    }
    assert_int_equal(fp16_round(INFINITY), 0x7c00);
    assert_int_equal(fp16_round(-1e30f), 0xfc00);
    assert_int_equal(fp16_round(0x1p-149f), 0);
}

static void test_bf16_rounds_to_nearest_even(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 1 << 16; h++) {
        uint32_t bits = h << 16;
        if ((h & 0x7fff) > 0x7f80) {
            assert_true(isnan(bf16_float(bf16_round(from_bits(bits)))));
            assert_true(isnan(bf16_float(bf16_round(from_bits(bits | 1)))));
            continue;
        }
        assert_int_equal(bf16_round(from_bits(bits)), h);
        if ((h & 0x7fff) ==
            0x7f80) { /* past infinity there are only NaNs, one of whose payloads is all low bits */
            assert_true(isnan(bf16_float(bf16_round(from_bits(bits | 1)))));
            continue;
        }
        assert_int_equal(bf16_round(from_bits(bits | 0x7fff)), h);
        assert_int_equal(bf16_round(from_bits(bits | 0x8000)), h + (h & 1));
        assert_int_equal(bf16_round(from_bits(bits | 0x8001)), h + 1);
    }
}

int main(void) {
    best = cpu_isa();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rms_norm_is_its_formula),
        cmocka_unit_test(test_layer_norm_is_its_formula),
        cmocka_unit_test(test_silu_mul_is_its_formula),
        cmocka_unit_test(test_gelus_are_their_formulas),
        cmocka_unit_test(test_add_to_adds),
        cmocka_unit_test(test_avx2_and_avx512_give_the_same_bits),
        cmocka_unit_test(test_every_fp16_survives_the_way_through_fp32),
        cmocka_unit_test(test_fp16_rounds_to_nearest_even),
        cmocka_unit_test(test_bf16_rounds_to_nearest_even),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
