/* test_quant.c - GGUF blocks to fp32, against what the reference Python package decodes. */
#include "compute/quant.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/data/quant_golden.h"

struct golden {
    uint32_t type;
    const char *name;
    int block_size;
    const uint8_t *bytes;
    size_t n_bytes;
    const uint32_t *floats;
    size_t n_floats;
};
#define GOLDEN(NAME, name, block_size)                                                             \
    {                                                                                              \
        QUANT_##NAME, #NAME, block_size, name##_bytes, sizeof name##_bytes, name##_floats,         \
            sizeof name##_floats / sizeof *name##_floats                                           \
    }
static const struct golden goldens[] = {
    GOLDEN(Q4_0, q4_0, 32),  GOLDEN(Q4_1, q4_1, 32),  GOLDEN(Q5_0, q5_0, 32),
    GOLDEN(Q5_1, q5_1, 32),  GOLDEN(Q8_0, q8_0, 32),  GOLDEN(Q4_K, q4_k, 256),
    GOLDEN(Q5_K, q5_k, 256), GOLDEN(Q6_K, q6_k, 256), GOLDEN(F16, f16, 1),
    GOLDEN(BF16, bf16, 1),
};
enum { N_GOLDENS = sizeof goldens / sizeof *goldens };

static void test_blocks_decode_to_the_bits_of_the_reference(void **state) {
    (void)state;
    for (int g = 0; g < N_GOLDENS; g++) {
        const struct golden *want = &goldens[g];
        for (size_t misaligned = 0; misaligned < 2; misaligned++) {
            /* exactly as long as the data, so that a sanitizer sees a read past it */
            uint8_t *src = malloc(want->n_bytes + misaligned);
            float *out = malloc(want->n_floats * sizeof *out);
            assert_non_null(src);
            assert_non_null(out);
            memset(out, 0xff, want->n_floats * sizeof *out);
            memcpy(src + misaligned, want->bytes, want->n_bytes);
            quant_decode(out, want->type, src + misaligned, want->n_floats);
            for (size_t i = 0; i < want->n_floats; i++) {
                uint32_t bits;
                memcpy(&bits, &out[i], sizeof bits);
                if (bits != want->floats[i])
                    fail_msg("%s value %zu: %08x, not %08x", want->name, i, bits, want->floats[i]);
            }
            free(src), free(out);
        }
    }
}

static void test_sizes_fit_the_data(void **state) {
    (void)state;
    for (int g = 0; g < N_GOLDENS; g++) {
        const struct golden *want = &goldens[g];
        assert_string_equal(quant_name(want->type), want->name);
        assert_int_equal(quant_block_size(want->type), want->block_size);
        assert_int_equal(want->n_floats / (size_t)want->block_size * quant_block_bytes(want->type),
                         want->n_bytes);
    }
    assert_string_equal(quant_name(QUANT_F32), "F32");
}

static void test_fp32_is_copied_bit_by_bit(void **state) {
    (void)state;
    const uint32_t bits[] = {0, 0x80000000, 0x3f800000, 0x00000001, 0x7f800000, 0x7fc12345};
    uint32_t out[6];
    quant_decode((float *)out, QUANT_F32, bits, 6);
    assert_memory_equal(out, bits, sizeof bits);
}

static void test_unknown_types_have_no_name_and_no_size(void **state) {
    (void)state;
    static const uint32_t unknown[] = {4, 5, 9, 10, 11, 15, 16, 29, 31, 1000, UINT32_MAX};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        assert_null(quant_name(unknown[i]));
        assert_int_equal(quant_block_size(unknown[i]), 0);
        assert_int_equal(quant_block_bytes(unknown[i]), 0);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_blocks_decode_to_the_bits_of_the_reference),
        cmocka_unit_test(test_sizes_fit_the_data),
        cmocka_unit_test(test_fp32_is_copied_bit_by_bit),
        cmocka_unit_test(test_unknown_types_have_no_name_and_no_size),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
