/* test_json.c - reading JSON: what is accepted, what is refused and where. */
#include "config/json.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static struct json *parse(const char *text) {
    struct json *root = NULL;
    assert_int_equal(json_parse(&root, text, strlen(text), "t.json", NULL, 0), OK);
    return root;
}

static void test_values_are_read_by_type(void **state) {
    (void)state;
    struct json *j = parse("{\"i\":-7,\"x\":1.5,\"big\":1e999,\"wide\":9007199254740994,\"s\":"
                           "\"a\\u00e9\\n\",\"t\":true,\"n\":null,"
                           "\"a\":[1,[2],\"z\"],\"o\":{\"k\":3}}");
    int64_t i = 99;
    assert_true(json_int(json_get(j, "i"), &i));
    assert_int_equal(i, -7);
    assert_false(json_int(json_get(j, "x"), &i));
    assert_false(json_int(json_get(j, "wide"), &i)); /* past 2^53 a double is not that integer */
    assert_int_equal(i, -7);
    assert_true(json_number(json_get(j, "x"), 0) == 1.5);
    assert_true(json_number(json_get(j, "big"), -1) == -1);
    assert_true(json_number(json_get(j, "s"), -1) == -1);
    assert_string_equal(json_string(json_get(j, "s")), "a\xc3\xa9\n");
    assert_null(json_string(json_get(j, "i")));
    assert_true(json_bool(json_get(j, "t"), false));
    assert_true(json_bool(json_get(j, "n"), true));
    assert_int_equal(json_type(json_get(j, "n")), JSON_NULL);
    assert_int_equal(json_type(json_get(j, "absent")), JSON_NULL);
    assert_int_equal(json_type(json_get(j, "o")), JSON_OBJECT);
    assert_int_equal(json_size(json_get(j, "a")), 3);
    const struct json *second = json_next(json_child(json_get(j, "a")));
    assert_int_equal(json_type(second), JSON_ARRAY);
    assert_string_equal(json_key(json_child(json_get(j, "o"))), "k");
    assert_null(json_get(second, "k"));
    assert_null(json_child(NULL));
    assert_null(json_next(NULL));
    json_free(j);
}

static void test_keys_are_case_sensitive_and_the_first_counts(void **state) {
    (void)state;
    struct json *j = parse("{\"A\":1,\"a\":2,\"a\":3}");
    int64_t i;
    assert_true(json_int(json_get(j, "a"), &i));
    assert_int_equal(i, 2);
    json_free(j);
}

/* Sentence: name, fault, line and column. */
static void test_faults_are_named_with_line_and_column(void **state) {
    (void)state;
    static const struct {
        const char *text;
        size_t len;
        const char *says;
    } cases[] = {
        {"", 0, "too early at line 1, column 1"},
        {"{\"a\":1", 6, "too early"},
        {"{\"a\":1}\n x", 10, "line 2, column 2"},
        {"{\n \"a\": tru}", 12, "line 2, column 7"},
        {"[1,]", 4, "line 1, column 4"},
        {"{\"a\":1}\0", 8, "NUL byte at line 1, column 8"},
        {"\"\\u0000\"", 8, "NUL character"},
        {"\"a\nb\"", 5, "control character"},
        {"\"abc", 4, "does not end at line 1, column 5"},
        {"\"abc\\", 5, "does not end"},
        {"{\"a\"", 4, "t.json"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char msg[200] = "",
             *exact = malloc(cases[i].len + 1); /* no byte to spare: over-reads show */
        struct json *root = (void *)&root;
        memcpy(exact, cases[i].text, cases[i].len);
        exact = realloc(exact, cases[i].len ? cases[i].len : 1);
        assert_int_equal(json_parse(&root, exact, cases[i].len, "t.json", msg, sizeof msg),
                         ERR_FORMAT);
        assert_ptr_equal(root, &root); /* untouched */
        if (!strstr(msg, cases[i].says) || strncmp(msg, "t.json: ", 8))
            fail_msg("case %zu: %s", i, msg);
        free(exact);
    }
}

static void test_nesting_is_limited_to_128(void **state) {
    (void)state;
    for (int depth = 128; depth <= 129; depth++) {
        char text[300] = "", msg[200];
        struct json *root = NULL;
        memset(text, '[', (size_t)depth);
        memset(text + depth, ']', (size_t)depth);
        enum err e = json_parse(&root, text, strlen(text), "deep", msg, sizeof msg);
        assert_int_equal(e, depth == 128 ? OK : ERR_FORMAT);
        if (e) assert_non_null(strstr(msg, "128"));
        json_free(root);
    }
}

static void test_brackets_in_strings_are_no_nesting(void **state) {
    (void)state;
    char text[600] = "\"";
    memset(text + 1, '[', 500);
    strcat(text, "\\\"\"");
    json_free(parse(text));
}

static void test_files_load_and_missing_ones_are_named(void **state) {
    (void)state;
    struct json *root = NULL;
    char msg[200] = "";
    assert_int_equal(json_load(&root, "models/stories260k-hedgehog/urchin.json", msg, sizeof msg),
                     OK);
    assert_string_equal(json_string(json_get(root, "name")), "stories260k-hedgehog");
    json_free(root);
    assert_int_equal(json_load(&root, "no/such.json", msg, sizeof msg), ERR_IO);
    assert_non_null(strstr(msg, "no/such.json"));
    assert_int_equal(json_load(&root, "models", msg, sizeof msg), ERR_IO);
    char fifo[64]; /* is not waited for */
    snprintf(fifo, sizeof fifo, "/tmp/urchin-test-pipe-%d", (int)getpid());
    assert_int_equal(mkfifo(fifo, 0600), 0);
    assert_int_equal(json_load(&root, fifo, msg, sizeof msg), ERR_IO);
    assert_non_null(strstr(msg, "not a regular file"));
    unlink(fifo);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values_are_read_by_type),
        cmocka_unit_test(test_keys_are_case_sensitive_and_the_first_counts),
        cmocka_unit_test(test_faults_are_named_with_line_and_column),
        cmocka_unit_test(test_nesting_is_limited_to_128),
        cmocka_unit_test(test_brackets_in_strings_are_no_nesting),
        cmocka_unit_test(test_files_load_and_missing_ones_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
