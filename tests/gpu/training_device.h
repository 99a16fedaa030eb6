/* training_device.h - numbers here and on the device, for the tests of training there. */
#ifndef URCHIN_TESTS_TRAINING_DEVICE_H
#define URCHIN_TESTS_TRAINING_DEVICE_H

#include "convert/gpu_kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/emu/emu.h"

static struct gpu *gpu;

static inline float uniform(uint32_t *state) { /* in [-1, 1) */
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) * 0x1p-23f - 1;
}
static inline float *uniforms(size_t n, float size, uint32_t seed) {
    float *x = malloc((n + 1) * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++)
        x[i] = size * uniform(&seed);
    return x;
}
static inline void *on_device(const void *from, size_t bytes) {
    void *at;
    assert_int_equal(gpu_alloc(gpu, &at, bytes), OK);
    gpu_upload(gpu, at, from, bytes);
    assert_int_equal(gpu_wait(gpu), OK);
    return at;
}
static inline float *nans(size_t n) {
    float *x = malloc(n * sizeof *x);
    assert_non_null(x);
    memset(x, 0xff, n * sizeof *x);
    return x;
}
static inline float *nans_on_device(size_t n) {
    float *x = nans(n), *at = on_device(x, n * sizeof *x);
    free(x);
    return at;
}

static inline int run_on_device(const struct CMUnitTest *tests, size_t n) {
    char msg[200];
    if (gpu_open(&gpu, msg, sizeof msg)) return 1;
    int failed = _cmocka_run_group_tests("training", tests, n, NULL, NULL);
    gpu_close(gpu);
    return failed;
}

#endif
