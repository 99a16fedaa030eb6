/* test_gguf.c - reading GGUF: what it says is found, and truncated or lying files give one
 * sentence. */
#include "compute/quant.h"
#include "model/gguf.h"

#include "model_files.h"
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

static const float values[64] = {1, 2, 3, -4};

/* A file with one of everything. */
static struct gguf_writer sample(void) {
    static const char *const words[] = {"a", "", "three"};
    struct gguf_writer w = {0};
    gguf_put_string(&w, "general.architecture", "llama");
    gguf_put_u32(&w, "n", 7);
    gguf_put_f32(&w, "x", 0.5f);
    gguf_put_strings(&w, "words", words, 3);
    put_string(&w.pairs, "yes"), put_u32(&w.pairs, GGUF_BOOL), put(&w.pairs, "\1", 1), w.n_pairs++;
    put_string(&w.pairs, "reals"), put_u32(&w.pairs, GGUF_ARRAY), put_u32(&w.pairs, GGUF_F32),
        put_u64(&w.pairs, 2);
    put(&w.pairs, values, 8), w.n_pairs++;
    gguf_put_tensor(&w, "second", QUANT_F32, 8, 2, values, 64);
    gguf_put_tensor(&w, "first", QUANT_Q8_0, 32, 0, values, 34);
    return w;
}

static enum err open_bytes(struct bytes b, char *msg, size_t msg_len) {
    struct gguf *g = (void *)&b;
    unsigned char *exact = malloc(b.len ? b.len : 1); /* no byte to spare: over-reads show */
    memcpy(exact, b.at, b.len);
    enum err e = gguf_open_bytes(&g, exact, b.len, "lie.gguf", msg, msg_len);
    if (!e)
        gguf_close(g);
    else
        assert_ptr_equal(g, &b); /* untouched */
    free(exact);
    return e;
}

static void test_metadata_and_tensors_are_found(void **state) {
    (void)state;
    for (uint32_t version = 2; version <= 3; version++) {
        struct gguf_writer w = sample();
        struct bytes b = gguf_finish(&w, version);
        struct gguf *g = NULL;
        char msg[200] = "";
        if (gguf_open_bytes(&g, b.at, b.len, "t", msg, sizeof msg)) fail_msg("%s", msg);
        int64_t i = 0;
        double x = 0;
        size_t len = 0;
        assert_true(gguf_int(g, "n", &i) && i == 7);
        assert_true(gguf_int(g, "yes", &i) && i == 1);
        assert_true(gguf_double(g, "x", &x) && x == 0.5);
        assert_true(gguf_double(g, "n", &x) && x == 7);
        assert_false(gguf_int(g, "x", &i));
        assert_false(gguf_int(g, "words", &i));
        assert_false(gguf_double(g, "reals", &x));
        assert_false(gguf_int(g, "absent", &i));
        assert_string_equal(gguf_string(g, "general.architecture", &len), "llama");
        assert_int_equal(len, 5);
        assert_null(gguf_string(g, "n", &len));
        assert_int_equal(gguf_array_size(g, "words"), 3);
        assert_int_equal(gguf_array_size(g, "n"), 0);
        assert_memory_equal(gguf_array_string(g, "words", 2, &len), "three", 5);
        assert_int_equal(len, 5);
        assert_non_null(gguf_array_string(g, "words", 1, &len));
        assert_int_equal(len, 0);
        assert_null(gguf_array_string(g, "words", 3, &len));
        assert_null(gguf_array_string(g, "reals", 0, &len));
        assert_true(gguf_array_double(g, "reals", 1, &x) && x == 2);
        assert_false(gguf_array_double(g, "reals", 2, &x));

        assert_int_equal(gguf_n_tensors(g), 2);
        const struct gguf_tensor *t = gguf_tensor(g, "second");
        assert_non_null(t);
        assert_int_equal(t->type, QUANT_F32);
        assert_true(t->n_dims == 2 && t->dims[0] == 8 && t->dims[1] == 2 && t->dims[2] == 1 &&
                    t->bytes == 64);
        assert_memory_equal(t->data, values, 64);
        t = gguf_tensor(g, "first");
        assert_true(t && t->n_dims == 1 && t->bytes == 34);
        assert_memory_equal(t->data, values, 34);
        assert_null(gguf_tensor(g, "third"));
        gguf_close(g);
        free(b.at);
    }
}

static void test_a_file_without_anything_is_fine(void **state) {
    (void)state;
    struct gguf_writer w = {0};
    struct bytes b = gguf_finish(&w, 3);
    assert_int_equal(open_bytes(b, NULL, 0), OK);
    free(b.at);
}

static void test_every_truncation_is_refused_by_name(void **state) {
    (void)state;
    struct gguf_writer w = sample();
    struct bytes b = gguf_finish(&w, 3);
    for (size_t len = 0; len < b.len; len++) {
        char msg[300] = "";
        assert_int_equal(open_bytes((struct bytes){b.at, len, len}, msg, sizeof msg), ERR_FORMAT);
        if (strncmp(msg, "lie.gguf: ", 10)) fail_msg("cut at %zu: %s", len, msg);
    }
    free(b.at);
}

/* Any single byte changed: whatever it says, it is read without a fault (sanitizers watch) or
 * refused with a sentence. */
static void test_any_byte_may_lie(void **state) {
    (void)state;
    struct gguf_writer w = sample();
    struct bytes b = gguf_finish(&w, 3);
    static const unsigned char lies[] = {0x00, 0x01, 0x7f, 0x80, 0xff};
    for (size_t i = 0; i < b.len; i++) {
        unsigned char truth = b.at[i];
        for (size_t l = 0; l < sizeof lies; l++) {
            char msg[300] = "";
            b.at[i] = lies[l];
            enum err e = open_bytes(b, msg, sizeof msg);
            assert_true(e == OK || (e == ERR_FORMAT && !strncmp(msg, "lie.gguf: ", 10)));
        }
        b.at[i] = truth;
    }
    free(b.at);
}

/* ---- one lie each: what is written in place of the sample, and what the sentence must say ---- */
static void no_magic(struct bytes *b) {
    memcpy(b->at, "GGML", 4);
}
static void version_1(struct bytes *b) {
    memcpy(b->at + 4, "\1\0\0", 4);
}
static void big_endian(struct bytes *b) {
    memcpy(b->at + 4, "\0\0\0\3", 4);
}
static void many_tensors(struct bytes *b) {
    memset(b->at + 8, 0xff, 7);
}
static void many_keys(struct bytes *b) {
    memset(b->at + 16, 0xff, 8);
}
static void long_key(struct bytes *b) {
    memset(b->at + 24, 0xff, 8);
}

static void test_lying_headers_are_refused(void **state) {
    (void)state;
    static const struct {
        void (*lie)(struct bytes *b);
        const char *says;
    } cases[] = {
        {no_magic, "not a GGUF file"}, {version_1, "version 2 or 3"}, {big_endian, "little-endian"},
        {many_tensors, "shorter"},     {many_keys, "shorter"},        {long_key, "metadata key 1"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct gguf_writer w = sample();
        struct bytes b = gguf_finish(&w, 3);
        char msg[300] = "";
        cases[i].lie(&b);
        assert_int_equal(open_bytes(b, msg, sizeof msg), ERR_FORMAT);
        if (!strstr(msg, cases[i].says)) fail_msg("case %zu: %s", i, msg);
        free(b.at);
    }
}

static void test_lying_metadata_is_refused(void **state) {
    (void)state;
    for (int lie = 0; lie < 6; lie++) {
        static const char *const says[] = {"n is there twice",     "unknown value type 13",
                                           "unknown value type 9", "ends inside metadata liar",
                                           "power of two",         "no name"};
        struct gguf_writer w = sample();
        char msg[300] = "";
        if (lie == 0) gguf_put_u32(&w, "n", 8);
        if (lie == 1)
            put_string(&w.pairs, "liar"), put_u32(&w.pairs, 13), put_u64(&w.pairs, 0), w.n_pairs++;
        if (lie == 2)
            put_string(&w.pairs, "liar"), put_u32(&w.pairs, 9), put_u32(&w.pairs, 9),
                put_u64(&w.pairs, 1), w.n_pairs++;
        if (lie == 3)
            put_string(&w.pairs, "liar"), put_u32(&w.pairs, 9), put_u32(&w.pairs, 0),
                put_u64(&w.pairs, 1ull << 61), w.n_pairs++;
        if (lie == 4) gguf_put_u32(&w, "general.alignment", 33);
        if (lie == 5)
            put_u64(&w.pairs, 3), put(&w.pairs, "a\0b", 3), put_u32(&w.pairs, 0),
                put(&w.pairs, "x", 1), w.n_pairs++;
        struct bytes b = gguf_finish(&w, 3);
        assert_int_equal(open_bytes(b, msg, sizeof msg), ERR_FORMAT);
        if (!strstr(msg, says[lie])) fail_msg("lie %d: %s", lie, msg);
        free(b.at);
    }
}

static void test_lying_tensors_are_refused_by_name(void **state) {
    (void)state;
    static const struct {
        const char *name;
        uint32_t type;
        int n_dims;
        uint64_t dims[5];
        uint64_t offset;
        const char *says;
    } cases[] = {
        {"liar", QUANT_F32, 0, {0}, 0, "tensor liar has 0 dimensions"},
        {"liar", QUANT_F32, 5, {1, 1, 1, 1, 1}, 0, "tensor liar has 5 dimensions"},
        {"liar", QUANT_F32, 2, {4, 0}, 0, "tensor liar has an impossible shape"},
        {"liar", QUANT_F32, 2, {1ull << 31, 1}, 0, "tensor liar has an impossible shape"},
        {"liar",
         QUANT_F32,
         4,
         {1 << 30, 1 << 30, 1 << 30, 1 << 30},
         0,
         "tensor liar has an impossible shape"},
        {"liar", 23, 1, {256}, 0, "tensor liar has type 23"},
        {"liar", 31, 1, {256}, 0, "tensor liar has type 31"},
        {"liar", QUANT_Q4_0, 1, {33}, 0, "tensor liar are not whole Q4_0 blocks"},
        {"liar", QUANT_F32, 1, {4}, 8, "tensor liar is not aligned"},
        {"liar", QUANT_F32, 1, {4}, 1 << 20, "tensor liar lies past the end"},
        {"liar", QUANT_F32, 1, {4}, (1ull << 62), "tensor liar lies past the end"},
        {"liar", QUANT_F32, 1, {64}, 64, "tensor liar lies past the end"},
        {"liar", QUANT_F32, 1, {4}, 32, "overlap"},
        {"first", QUANT_F32, 1, {4}, 128, "tensor first is there twice"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct gguf_writer w = sample();
        char msg[300] = "";
        gguf_put_info(&w, cases[i].name, cases[i].type, cases[i].n_dims, cases[i].dims,
                      cases[i].offset);
        if (cases[i].offset == 128) put_zeros(&w.data, 128 + 16 - w.data.len);
        struct bytes b = gguf_finish(&w, 3);
        assert_int_equal(open_bytes(b, msg, sizeof msg), ERR_FORMAT);
        if (!strstr(msg, cases[i].says)) fail_msg("case %zu: %s", i, msg);
        free(b.at);
    }
}

static void test_files_open_and_missing_ones_are_named(void **state) {
    (void)state;
    struct gguf_writer w = sample();
    struct bytes b = gguf_finish(&w, 3);
    char path[] = "/tmp/urchin-gguf-XXXXXX", msg[300];
    struct gguf *g = NULL;
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    write_bytes(path, b.at, b.len);
    assert_int_equal(gguf_open(&g, path, msg, sizeof msg), OK);
    assert_non_null(gguf_tensor(g, "first"));
    gguf_close(g);
    write_bytes(path, "", 0);
    assert_int_equal(gguf_open(&g, path, msg, sizeof msg), ERR_FORMAT);
    unlink(path);
    assert_int_equal(gguf_open(&g, path, msg, sizeof msg), ERR_IO);
    assert_non_null(strstr(msg, path));
    gguf_close(NULL);
    free(b.at);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_metadata_and_tensors_are_found),
        cmocka_unit_test(test_a_file_without_anything_is_fine),
        cmocka_unit_test(test_every_truncation_is_refused_by_name),
        cmocka_unit_test(test_any_byte_may_lie),
        cmocka_unit_test(test_lying_headers_are_refused),
        cmocka_unit_test(test_lying_metadata_is_refused),
        cmocka_unit_test(test_lying_tensors_are_refused_by_name),
        cmocka_unit_test(test_files_open_and_missing_ones_are_named),
    };
    return cmocka_run_group_tests_name("gguf", tests, NULL, NULL);
}
