/* test_sched_text.c - text that is held back: it may be a stop string's beginning, or half a
 * character. */
#include "scheduler/text.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* The stop string that is complete first, the longest of those: where the text ends. -1: none. */
static int naive_stop(const char *text, size_t len, const char *const *stops, int n_stops,
                      size_t *begin, size_t *end) {
    for (size_t e = 1; e <= len; e++) {
        int best = -1;
        for (int k = 0; k < n_stops; k++) {
            size_t n = strlen(stops[k]);
            if (n <= e && !memcmp(text + e - n, stops[k], n) &&
                (best < 0 || n > strlen(stops[best])))
                best = k;
        }
        if (best >= 0) {
            *begin = e - strlen(stops[best]);
            *end = e;
            return best;
        }
    }
    return -1;
}

/* Feeds text cut at the set bits of `cuts`; what was shown goes to out.  Returns the stop string
 * that fired. */
static int feed(char *out, const char *text, size_t len, unsigned cuts,
                const struct stop_string *stops, int n_stops, bool include) {
    struct text t;
    int fired = -1;
    size_t shown = 0;
    assert_int_equal(text_init(&t, n_stops), OK);
    for (size_t at = 0; at < len && fired < 0;) {
        size_t n = 1;
        while (at + n < len && !(cuts >> (at + n - 1) & 1))
            n++;
        assert_int_equal(text_append(&t, stops, n_stops, text + at, n, true, include, &fired), OK);
        at += n;
        size_t ready = fired < 0 ? text_ready(&t, n_stops) : t.len;
        memcpy(out + shown, t.bytes, ready);
        shown += ready;
        text_take(&t, ready);
        assert_int_equal(t.shown, shown);
    }
    memcpy(out + shown, t.bytes, t.len);
    out[shown + t.len] = 0;
    text_free(&t);
    return fired;
}

static void test_stop_strings_fire_alike_at_every_split(void **state) {
    (void)state;
    static const char *const texts[] = {"aabaabaaab", "abcabcabcd", "aaaaaaaaaa", "abababcaba",
                                        "aabaaabaaac"};
    static const char *const sets[][3] = {{"aaab", "", ""},
                                          {"abd", "bc", ""},
                                          {"c", "bc", "abc"},
                                          {"abababc", "baba", "cab"},
                                          {"aabaaac", "abcx", "aaaaaaaaaaa"}};
    for (size_t i = 0; i < 5; i++)
        for (size_t j = 0; j < 5; j++) {
            struct stop_string stops[3];
            int n_stops = 0;
            for (int k = 0; k < 3 && *sets[j][k]; k++)
                assert_int_equal(
                    stop_string_init(&stops[n_stops++], sets[j][k], strlen(sets[j][k])), OK);
            size_t begin = 0, end = 0, len = strlen(texts[i]);
            int expected = naive_stop(texts[i], len, sets[j], n_stops, &begin, &end);
            for (unsigned cuts = 0; cuts < 1u << (len - 1); cuts++)
                for (int include = 0; include < 2; include++) {
                    char out[32], right[32];
                    size_t n = expected < 0 ? len : include ? end : begin;
                    snprintf(right, sizeof right, "%.*s", (int)n, texts[i]);
                    assert_int_equal(feed(out, texts[i], len, cuts, stops, n_stops, include),
                                     expected);
                    assert_string_equal(out, right);
                }
            for (int k = 0; k < n_stops; k++)
                stop_string_free(&stops[k]);
        }
}

static void test_unarmed_stop_strings_pass_and_half_of_one_may_still_fire(void **state) {
    (void)state;
    struct stop_string stop;
    struct text t;
    int fired;
    assert_int_equal(stop_string_init(&stop, "abab", 4), OK);
    assert_int_equal(text_init(&t, 1), OK);
    assert_int_equal(text_append(&t, &stop, 1, "xabab", 5, false, false, &fired), OK);
    assert_int_equal(fired, -1);
    assert_int_equal(text_ready(&t, 1), 3); /* the last "ab" may be the beginning of another */
    text_take(&t, 3);
    assert_int_equal(text_append(&t, &stop, 1, "abz", 3, true, false, &fired), OK);
    assert_int_equal(fired, 0);
    assert_int_equal(t.len, 0);
    text_free(&t);
    stop_string_free(&stop);
}

static void test_halves_of_characters_wait(void **state) {
    (void)state;
    static const char text[] = "h\xc3\xa9 \xf0\x9f\xa6\x94!";
    for (size_t cut = 0; cut < sizeof text - 1; cut++) {
        struct text t;
        int fired;
        assert_int_equal(text_init(&t, 0), OK);
        assert_int_equal(text_append(&t, NULL, 0, text, cut, true, false, &fired), OK);
        size_t ready = text_ready(&t, 0);
        assert_true(ready <= cut && (ready == cut || cut - ready < 4));
        assert_true(((unsigned char)text[ready] & 0xc0) !=
                    0x80); /* the next byte begins a character */
        text_take(&t, ready);
        assert_int_equal(
            text_append(&t, NULL, 0, text + cut, sizeof text - 1 - cut, true, false, &fired), OK);
        assert_int_equal(text_ready(&t, 0), sizeof text - 1 - ready);
        text_free(&t);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stop_strings_fire_alike_at_every_split),
        cmocka_unit_test(test_unarmed_stop_strings_pass_and_half_of_one_may_still_fire),
        cmocka_unit_test(test_halves_of_characters_wait),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
