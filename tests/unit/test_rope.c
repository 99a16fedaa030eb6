/* test_rope.c - angles are exact at any position, rotation turns by position differences, scalings
 * are the published ones. */
#include "attention/rope.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

enum { D = 64, HALF = D / 2 };

static struct rope *open_rope(struct rope_config config) {
    struct rope *rope;
    char msg[200];
    if (rope_new(&rope, &config, msg, sizeof msg)) fail_msg("%s", msg);
    return rope;
}

/* Radians per position, read off the sine at position 1 (theta <= 1 < pi / 2). */
static void thetas(struct rope_config config, double theta[HALF]) {
    struct rope *rope = open_rope(config);
    float c[HALF], s[HALF];
    rope_angles(rope, 1, c, s);
    for (int i = 0; i < HALF; i++)
        theta[i] = atan2((double)s[i], (double)c[i]);
    rope_free(rope);
}

/* fp32 rounds cos and sin by 2^-25; at position 10^9 a double angle is off by 10^9 * 2^-53 twice
 * over, 2.3e-7. */
static void test_angles_are_right_at_any_position(void **state) {
    (void)state;
    struct rope *rope = open_rope((struct rope_config){.head_dim = D, .base = 100000});
    static const int64_t positions[] = {0, 1, 8191, 1000000, 123456789, 1000000000};
    for (size_t p = 0; p < sizeof positions / sizeof *positions; p++) {
        float c[HALF], s[HALF];
        rope_angles(rope, positions[p], c, s);
        for (int i = 0; i < HALF; i++) {
            long double angle = (long double)positions[p] * powl(100000, -(long double)i / HALF);
            double most = 0x1p-25 + 4 * 0x1p-53 * (double)angle;
            assert_true(fabs((double)(c[i] - cosl(angle))) <= most);
            assert_true(fabs((double)(s[i] - sinl(angle))) <= most);
        }
    }
    rope_free(rope);
}

/* |q|, |k| <= 8 and two rotations of fp32: each product of the dot errs by 4 roundings. */
static void test_a_dot_product_sees_the_difference_of_positions(void **state) {
    (void)state;
    struct rope *rope = open_rope((struct rope_config){.head_dim = D, .base = 10000});
    float q[D], k[D], a[D], b[D], c[HALF], s[HALF];
    for (int i = 0; i < D; i++)
        q[i] = sinf((float)i * 1.7f), k[i] = cosf((float)i * 0.9f);
    double first = 0;
    for (int64_t shift = 0; shift < 100000; shift += 7919) {
        rope_angles(rope, 40 + shift, c, s);
        rope_rotate(a, q, c, s, D);
        rope_angles(rope, 13 + shift, c, s);
        memcpy(b, k, sizeof b);
        rope_rotate(b, b, c, s, D); /* in place */
        double dot = 0;
        for (int i = 0; i < D; i++)
            dot += (double)a[i] * b[i];
        if (shift == 0) first = dot;
        assert_true(fabs(dot - first) <= D * 4 * 0x1p-23);
    }
    assert_true(fabs(first) > 0.1);
    rope_free(rope);
}

static void test_element_i_pairs_with_i_plus_half(void **state) {
    (void)state;
    float x[4] = {1, 0, 0, 10}, y[4], c[2] = {0.6f, 0}, s[2] = {0.8f, 1};
    rope_rotate(y, x, c, s, 4);
    assert_true(y[0] == 0.6f && y[1] == -10 && y[2] == 0.8f && y[3] == 0);
}

/* 2^-23: theta read through one fp32 sine and cosine. */
static void expect_theta(const double *theta, int i, double want) {
    assert_true(fabs(theta[i] - want) <= 0x1p-23 * want + 1e-12);
}

static void test_linear_scaling_divides_every_frequency(void **state) {
    (void)state;
    double theta[HALF];
    thetas(
        (struct rope_config){
            .head_dim = D, .base = 10000, .scaling = ROPE_SCALING_LINEAR, .factor = 4},
        theta);
    for (int i = 0; i < HALF; i++)
        expect_theta(theta, i, pow(10000, -(double)i / HALF) / 4);
}

static void test_frequency_factors_divide_each_frequency(void **state) {
    (void)state;
    double theta[HALF];
    float factors[HALF];
    for (int i = 0; i < HALF; i++)
        factors[i] = 1 + (float)i;
    thetas((struct rope_config){.head_dim = D, .base = 10000, .freq_factors = factors}, theta);
    for (int i = 0; i < HALF; i++)
        expect_theta(theta, i, pow(10000, -(double)i / HALF) / (1 + i));
}

/* Written by wavelengths, as in transformers' _compute_llama3_parameters; the numbers of
 * Llama-3.2-1B. */
static void test_llama3_scaling_stretches_long_wavelengths_only(void **state) {
    (void)state;
    double theta[HALF], factor = 32, low = 1, high = 4, context = 8192;
    int kept = 0, stretched = 0;
    thetas((struct rope_config){.head_dim = D,
                                .base = 500000,
                                .scaling = ROPE_SCALING_LLAMA3,
                                .factor = factor,
                                .low_freq_factor = low,
                                .high_freq_factor = high,
                                .original_context = context},
           theta);
    for (int i = 0; i < HALF; i++) {
        double plain = pow(500000, -(double)i / HALF), wavelength = 2 * acos(-1) / plain,
               want = plain;
        if (wavelength > context / low)
            want = plain / factor, stretched++;
        else if (wavelength >= context / high) {
            double smooth = (context / wavelength - low) / (high - low);
            want = (1 - smooth) * plain / factor + smooth * plain;
        } else
            kept++;
        expect_theta(theta, i, want);
    }
    assert_true(kept >= 10 && stretched >= 10 && kept + stretched < HALF);
}

static void test_settings_that_make_no_sense_are_refused(void **state) {
    (void)state;
    float factors[HALF] = {1, 0};
    struct rope_config wrong[] = {
        {.head_dim = 7, .base = 10000},
        {.head_dim = 0, .base = 10000},
        {.head_dim = -2, .base = 10000},
        {.head_dim = 8, .base = 0},
        {.head_dim = 8, .base = NAN},
        {.head_dim = 8, .base = 10000, .scaling = ROPE_SCALING_LINEAR},
        {.head_dim = 8,
         .base = 10000,
         .scaling = ROPE_SCALING_LLAMA3,
         .factor = 8,
         .low_freq_factor = 4,
         .high_freq_factor = 4,
         .original_context = 10},
        {.head_dim = 8,
         .base = 10000,
         .scaling = ROPE_SCALING_LLAMA3,
         .factor = 8,
         .low_freq_factor = 1,
         .high_freq_factor = 4},
        {.head_dim = D, .base = 10000, .freq_factors = factors},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct rope *rope = NULL;
        char msg[200] = "";
        assert_int_equal(rope_new(&rope, &wrong[i], msg, sizeof msg), ERR_FORMAT);
        assert_null(rope);
        assert_non_null(strstr(msg, "RoPE"));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_angles_are_right_at_any_position),
        cmocka_unit_test(test_a_dot_product_sees_the_difference_of_positions),
        cmocka_unit_test(test_element_i_pairs_with_i_plus_half),
        cmocka_unit_test(test_linear_scaling_divides_every_frequency),
        cmocka_unit_test(test_frequency_factors_divide_each_frequency),
        cmocka_unit_test(test_llama3_scaling_stretches_long_wavelengths_only),
        cmocka_unit_test(test_settings_that_make_no_sense_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
