/* test_safetensors.c - reading safetensors: what it says is found, and truncated or lying files
 * give one sentence. */
#include "compute/ops.h"
#include "model/safetensors.h"

#include "model_files.h"
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

static enum err open_bytes(struct bytes b, char *msg, size_t msg_len) {
    struct safetensors *st = (void *)&b;
    unsigned char *exact = malloc(b.len ? b.len : 1); /* no byte to spare: over-reads show */
    memcpy(exact, b.at, b.len);
    enum err e = safetensors_open_bytes(&st, exact, b.len, "lie.safetensors", msg, msg_len);
    if (!e)
        safetensors_close(st);
    else
        assert_ptr_equal(st, &b); /* untouched */
    free(exact);
    return e;
}

static const float reals[6] = {1, -2.5f, 3e10f, 0, 1e-40f, -0.125f};

static struct bytes sample(void) {
    const uint16_t bf16[3] = {bf16_round(1), bf16_round(-2.5f), bf16_round(3e10f)};
    const uint16_t fp16[2] = {fp16_round(1), fp16_round(-2.5f)};
    const double f64[1] = {0.1};
    struct st_writer w = {0};
    st_put(&w, "z.wide", "F64", 0, NULL, f64, 8);
    st_put(&w, "matrix", "F32", 2, (int[]){2, 3}, reals, 24);
    st_put(&w, "none", "F32", 2, (int[]){0, 3}, reals, 0);
    st_put(&w, "half", "BF16", 1, (int[]){3}, bf16, 6);
    st_put(&w, "a", "F16", 1, (int[]){2}, fp16, 4);
    st_put(&w, "flags", "U8", 1, (int[]){2}, "ab", 2);
    return st_finish(&w);
}

static void test_tensors_are_found_and_decoded(void **state) {
    (void)state;
    struct bytes b = sample();
    struct safetensors *st = NULL;
    char msg[300] = "";
    float out[6];
    if (safetensors_open_bytes(&st, b.at, b.len, "t", msg, sizeof msg)) fail_msg("%s", msg);
    assert_int_equal(safetensors_count(st), 6);
    for (int i = 1; i < 6; i++)
        assert_true(strcmp(safetensors_at(st, i - 1)->name, safetensors_at(st, i)->name) < 0);
    const struct st_tensor *t = safetensors_get(st, "matrix");
    assert_true(t && t->dtype == ST_F32 && t->n_dims == 2 && t->dims[0] == 2 && t->dims[1] == 3 &&
                t->dims[2] == 1 && t->n_values == 6 && t->bytes == 24);
    assert_int_equal(st_decode(out, t, 1, 5), OK);
    assert_memory_equal(out, reals + 1, 20);
    t = safetensors_get(st, "half");
    assert_int_equal(st_decode(out, t, 0, 3), OK);
    assert_true(out[0] == 1 && out[1] == -2.5f && out[2] == bf16_float(bf16_round(3e10f)));
    t = safetensors_get(st, "a");
    assert_int_equal(st_decode(out, t, 1, 1), OK);
    assert_true(out[0] == -2.5f);
    t = safetensors_get(st, "z.wide");
    assert_true(t && t->n_dims == 0 && t->n_values == 1);
    assert_int_equal(st_decode(out, t, 0, 1), OK);
    assert_true(out[0] == 0.1f);
    t = safetensors_get(st, "none");
    assert_true(t && t->n_values == 0 && t->bytes == 0);
    t = safetensors_get(st, "flags");
    assert_true(t && t->dtype == ST_OTHER && t->bytes == 2);
    assert_int_equal(st_decode(out, t, 0, 1), ERR_FORMAT);
    assert_null(safetensors_get(st, "matri"));
    safetensors_close(st);
    free(b.at);
}

static void test_every_truncation_is_refused_by_name(void **state) {
    (void)state;
    struct bytes b = sample();
    for (size_t len = 0; len < b.len; len++) {
        char msg[300] = "";
        assert_int_equal(open_bytes((struct bytes){b.at, len, len}, msg, sizeof msg), ERR_FORMAT);
        if (strncmp(msg, "lie.safetensors: ", 17)) fail_msg("cut at %zu: %s", len, msg);
    }
    free(b.at);
}

static void test_any_byte_may_lie(void **state) {
    (void)state;
    struct bytes b = sample();
    static const unsigned char lies[] = {0x00, '0', '9', '"', '{', ']', 0x80, 0xff};
    for (size_t i = 0; i < b.len; i++) {
        unsigned char truth = b.at[i];
        for (size_t l = 0; l < sizeof lies; l++) {
            char msg[300] = "";
            b.at[i] = lies[l];
            enum err e = open_bytes(b, msg, sizeof msg);
            assert_true(e == OK || (e == ERR_FORMAT && !strncmp(msg, "lie.safetensors: ", 17)));
        }
        b.at[i] = truth;
    }
    free(b.at);
}

static void test_lies_are_refused_by_name(void **state) {
    (void)state;
    static const struct {
        const char *header, *says;
    } cases[] = {
        /* over 16 bytes of data */
        {"[]", "not a JSON object"},
        {"{", "too early"},
        {"{\"t\":3}", "tensor t has the unknown dtype (none)"},
        {"{\"t\":{\"dtype\":\"Q4\",\"shape\":[4],\"data_offsets\":[0,16]}}",
         "tensor t has the unknown dtype Q4"},
        {"{\"t\":{\"dtype\":\"F32\",\"data_offsets\":[0,16]}}", "tensor t has no shape"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,4],\"data_offsets\":[0,16]}}",
         "tensor t has no shape"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[-4],\"data_offsets\":[0,16]}}",
         "tensor t has an impossible shape"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4.5],\"data_offsets\":[0,16]}}",
         "tensor t has an impossible shape"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,16]}}",
         "tensor t has an impossible shape"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[9007199254740992,9007199254740992],\"data_offsets\":"
         "[0,16]}}",
         "tensor t has an impossible shape"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4]}}", "tensor t has no two ascending data_offsets"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,0]}}",
         "tensor t has no two ascending data_offsets"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16,32]}}",
         "tensor t has no two ascending data_offsets"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[-16,0]}}",
         "tensor t has no two ascending data_offsets"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,20]}}",
         "tensor t lies past the end"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[9007199254740000,"
         "9007199254740016]}}",
         "tensor t lies past the end"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,16]}}",
         "tensor t has 16 bytes of data, but its shape needs 12"},
        {"{\"s\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"t\":{\"dtype\":\"F32\","
         "\"shape\":[3],\"data_offsets\":[2,14]},"
         "\"u\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[14,16]}}",
         "tensor t is not aligned"},
        {"{\"s\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]},\"t\":{\"dtype\":"
         "\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}",
         "tensors s and t overlap"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}",
         "hole in front of tensor t"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "8 bytes at its end"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"t\":{\"dtype\":\"F32\","
         "\"shape\":[2],\"data_offsets\":[8,16]}}",
         "tensor t is there twice"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char msg[300] = "";
        struct bytes b = safetensors_raw(cases[i].header, reals, 16);
        assert_int_equal(open_bytes(b, msg, sizeof msg), ERR_FORMAT);
        if (!strstr(msg, cases[i].says) || strncmp(msg, "lie.safetensors: ", 17))
            fail_msg("case %zu: %s", i, msg);
        free(b.at);
    }
}

static void test_metadata_is_skipped_and_padding_is_optional(void **state) {
    (void)state;
    struct bytes b = safetensors_raw("{\"__metadata__\":{\"format\":\"pt\"},\"t\":{\"dtype\":"
                                     "\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}",
                                     reals, 16);
    struct safetensors *st = NULL;
    float out[4];
    assert_true(b.len % 4 != 0); /* data off its alignment, as old files have it */
    assert_int_equal(safetensors_open_bytes(&st, b.at, b.len, "t", NULL, 0), OK);
    assert_int_equal(safetensors_count(st), 1);
    assert_int_equal(st_decode(out, safetensors_get(st, "t"), 0, 4), OK);
    assert_memory_equal(out, reals, 16);
    safetensors_close(st);
    free(b.at);
}

static void test_files_open_and_missing_ones_are_named(void **state) {
    (void)state;
    struct safetensors *st = NULL;
    char msg[300] = "";
    assert_int_equal(
        safetensors_open(&st, "models/stories260k-hedgehog/hedgehog.safetensors", msg, sizeof msg),
        OK);
    assert_non_null(safetensors_get(st, "layers.4.attn.log_mix"));
    safetensors_close(st);
    assert_int_equal(safetensors_open(&st, "no/such.safetensors", msg, sizeof msg), ERR_IO);
    assert_non_null(strstr(msg, "no/such.safetensors"));
    safetensors_close(NULL);
    char fifo[64]; /* is not waited for */
    snprintf(fifo, sizeof fifo, "/tmp/urchin-test-pipe-%d", (int)getpid());
    assert_int_equal(mkfifo(fifo, 0600), 0);
    assert_int_equal(safetensors_open(&st, fifo, msg, sizeof msg), ERR_IO);
    assert_non_null(strstr(msg, "not a regular file"));
    unlink(fifo);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tensors_are_found_and_decoded),
        cmocka_unit_test(test_every_truncation_is_refused_by_name),
        cmocka_unit_test(test_any_byte_may_lie),
        cmocka_unit_test(test_lies_are_refused_by_name),
        cmocka_unit_test(test_metadata_is_skipped_and_padding_is_optional),
        cmocka_unit_test(test_files_open_and_missing_ones_are_named),
    };
    return cmocka_run_group_tests_name("safetensors", tests, NULL, NULL);
}
