/* test_log.c - what a line of the log may look like, whatever bytes went in. */
#include "config/json.h"
#include "config/log.h"

#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

/* stderr goes to a file while body runs; returns what was written (malloc'd). */
static char *captured(void (*body)(const char *), const char *arg) {
    char path[] = "/tmp/urchin-test-log-XXXXXX";
    int file = mkstemp(path), saved = dup(STDERR_FILENO);
    assert_true(file >= 0 && saved >= 0);
    dup2(file, STDERR_FILENO);
    body(arg);
    dup2(saved, STDERR_FILENO);
    close(saved);
    off_t n = lseek(file, 0, SEEK_END);
    char *text = calloc((size_t)n + 1, 1);
    assert_non_null(text);
    assert_int_equal(pread(file, text, (size_t)n, 0), n);
    close(file);
    unlink(path);
    return text;
}

static void log_detail(const char *detail) {
    log_event(LOG_INFO, "event", "%s", detail);
}

static int count_lines(const char *text) {
    int n = 0;
    for (; *text; text++)
        n += *text == '\n';
    return n;
}

static void test_a_line_has_time_level_event_and_detail(void **state) {
    (void)state;
    log_configure(LOG_INFO, false);
    char *line = captured(log_detail, "model=x");
    int y, mo, d, h, mi, s, ms, end = 0;
    assert_int_equal(
        sscanf(line, "%4d-%2d-%2dT%2d:%2d:%2d.%3dZ%n", &y, &mo, &d, &h, &mi, &s, &ms, &end), 7);
    assert_int_equal(end, 24);
    assert_string_equal(line + end, " INFO event model=x\n");
    free(line);
}

static const char *const hostile[] = {
    "two\nlines",
    "\r\x1b[2J\x7f",
    "quote\" and back\\slash",
    "\xc2\x9b"
    "31m",
    "\xe2\x80\xa8separator",
    "broken \xff\xc3 utf8 \xe2\x82",
    "\xed\xa0\x80",
    "\xf4\x90\x80\x80",
    "h\xc3\xa9 \xf0\x9f\xa6\x94",
};

static void test_client_bytes_cannot_forge_a_line(void **state) {
    (void)state;
    for (int json = 0; json < 2; json++)
        for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
            log_configure(LOG_INFO, json);
            char *line = captured(log_detail, hostile[i]);
            assert_int_equal(count_lines(line), 1);
            for (const char *p = line; p[1]; p++)
                assert_true((unsigned char)*p >= 0x20 && *p != 0x7f);
            assert_null(strstr(line, "\xc2\x9b"));
            assert_null(strstr(line, "\xe2\x80\xa8"));
            free(line);
        }
}

/* What is not a control character or broken comes back byte for byte. */
static void test_json_lines_parse_and_keep_the_detail(void **state) {
    (void)state;
    log_configure(LOG_INFO, true);
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        char *line = captured(log_detail, hostile[i]), msg[200];
        struct json *root = NULL;
        assert_int_equal(json_parse(&root, line, strlen(line), "line", msg, sizeof msg), OK);
        assert_string_equal(json_string(json_get(root, "level")), "info");
        assert_string_equal(json_string(json_get(root, "event")), "event");
        const char *detail = json_string(json_get(root, "detail"));
        assert_non_null(detail);
        if (!strchr(hostile[i], '\xff') && !strstr(hostile[i], "\xed") &&
            !strstr(hostile[i], "\xf4"))
            assert_string_equal(detail, hostile[i]);
        json_free(root);
        free(line);
    }
}

static void test_long_details_are_cut_not_split_over_lines(void **state) {
    (void)state;
    static char text[60000];
    for (int json = 0; json < 2; json++)
        for (int control = 0; control < 2; control++) {
            log_configure(LOG_INFO, json);
            memset(text, control ? '\x01' : 'x', sizeof text - 1);
            char *line = captured(log_detail, text);
            assert_int_equal(count_lines(line), 1);
            assert_int_equal(line[strlen(line) - 1], '\n');
            free(line);
        }
}

static void test_levels_below_the_least_are_silent(void **state) {
    (void)state;
    log_configure(LOG_WARN, false);
    char *line = captured(log_detail, "x");
    assert_string_equal(line, "");
    free(line);
}

enum { N_THREADS = 4, N_LINES = 500 };
static void *log_many(void *arg) {
    for (int i = 0; i < N_LINES; i++)
        log_event(LOG_INFO, "event", "%s", (const char *)arg);
    return NULL;
}
static void from_threads(const char *detail) {
    pthread_t threads[N_THREADS];
    for (int i = 0; i < N_THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, log_many, (void *)detail), 0);
    for (int i = 0; i < N_THREADS; i++)
        pthread_join(threads[i], NULL);
}

static void test_lines_of_many_threads_do_not_mix(void **state) {
    (void)state;
    log_configure(LOG_INFO, false);
    char *text = captured(from_threads, "abcdefghijklmnopqrstuvwxyz");
    int n = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"), n++)
        assert_string_equal(line + 24, " INFO event abcdefghijklmnopqrstuvwxyz");
    assert_int_equal(n, N_THREADS * N_LINES);
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_line_has_time_level_event_and_detail),
        cmocka_unit_test(test_client_bytes_cannot_forge_a_line),
        cmocka_unit_test(test_json_lines_parse_and_keep_the_detail),
        cmocka_unit_test(test_long_details_are_cut_not_split_over_lines),
        cmocka_unit_test(test_levels_below_the_least_are_silent),
        cmocka_unit_test(test_lines_of_many_threads_do_not_mix),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
