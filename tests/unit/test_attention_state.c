/* test_attention_state.c - a state is a value: saved, loaded, forked at any position it goes on
 * with the same bits; a slot remembers nothing of its last owner; and bytes from outside are
 * believed in nothing. */
#include "attention_rig.h"

#include <stdio.h>

static struct attention_config small(void) {
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .n_heads = 4,
                                     .n_kv_heads = 2,
                                     .head_dim = 8,
                                     .kv_type = KV_BF16,
                                     .map = MAP_EXP,
                                     .features = 8,
                                     .window = WINDOW_TERRACED,
                                     .window_size = 8,
                                     .sinks = 2,
                                     .cache_size = 12,
                                     .cache_recent = 4,
                                     .cache_age = 20,
                                     .cache_fact_age = 50,
                                     .horizon = 24,
                                     .mixing = MIXING_UNIFIED,
                                     .map_before_rope = true,
                                     .max_distance = 20};
}

static int configs(struct attention_config out[7]) {
    int n = 0;
    out[n++] = small();
    out[n] = small();
    out[n++].kv_type = KV_FP32;
    out[n] = small();
    out[n].map_before_rope = false, out[n].max_distance = 0, out[n++].key_map_per_query_head = true;
    out[n] = small();
    out[n].retrieval_size = 29, out[n++].retrieval_recent = 3;
    out[n] = small();
    out[n].window = WINDOW_SLIDING, out[n].cache_size = out[n].cache_recent = out[n].cache_age = 0,
    n++;
    out[n] = out[n - 1];
    out[n].window = WINDOW_NONE, out[n].window_size = out[n].sinks = 0, n++;
    out[n++] = (struct attention_config){.kind = ATTENTION_SOFTMAX,
                                         .n_heads = 4,
                                         .n_kv_heads = 2,
                                         .head_dim = 8,
                                         .kv_type = KV_BF16,
                                         .max_seq_len = 100};
    return n;
}

static void *save(const struct rig *g, const void *slot, size_t *bytes) {
    *bytes = attention_state_bytes(g->a, attention_slot_position(g->a, slot));
    void *state = malloc(*bytes);
    attention_state_save(g->a, state, slot);
    return state;
}

static void expect_rows(const struct rig *g, const float *want, const float *got, int from,
                        const char *what, int kind) {
    size_t row = row_floats(g);
    for (int i = 0; i < RIG_LAYERS; i++) {
        size_t at = ((size_t)i * g->n + from) * row;
        if (memcmp(want + at, got + at, (size_t)(g->n - from) * row * sizeof *want) != 0)
            fail_msg("%s at %d, kind %d, layer %d: other bits", what, from, kind, i);
    }
}

static void test_saved_and_loaded_or_forked_anywhere_goes_on_with_the_same_bits(void **state) {
    (void)state;
    enum { N = 60 };
    struct attention_config kinds[7];
    for (int kind = 0, n_kinds = configs(kinds); kind < n_kinds; kind++) {
        struct rig g;
        rig_open(&g, kinds[kind], 100, N, 1, false);
        void *slot = slot_open(&g), *other = slot_open(&g);
        float *whole = rows_open(&g), *y = rows_open(&g);
        rig_read(&g, slot, 0, N, whole);
        for (int at = 0; at < N; at++) {
            attention_slot_clear(g.a, slot);
            if (at) rig_read(&g, slot, 0, at, y);
            size_t bytes;
            void *saved = save(&g, slot, &bytes);

            memset(other, 0xff, attention_slot_bytes(g.a));
            attention_slot_copy(g.a, other, slot);
            assert_int_equal(attention_slot_position(g.a, other), at);
            rig_read(&g, other, at, N, y);
            expect_rows(&g, whole, y, at, "forked", kind);
            fill_nan(y, RIG_LAYERS * N * row_floats(&g));
            rig_read(&g, slot, at, N, y); /* the fork took nothing from it */
            expect_rows(&g, whole, y, at, "gone on", kind);

            char *anywhere = malloc(bytes + 1); /* a state may lie at any address */
            memcpy(anywhere + 1, saved, bytes);
            memset(other, 0xff, attention_slot_bytes(g.a));
            fill_nan(y, RIG_LAYERS * N * row_floats(&g));
            char msg[200];
            if (attention_state_load(g.a, other, anywhere + 1, bytes, msg, sizeof msg))
                fail_msg("%s", msg);
            assert_int_equal(attention_slot_position(g.a, other), at);
            size_t again_bytes;
            void *again = save(&g, other, &again_bytes);
            assert_int_equal(bytes, again_bytes);
            assert_memory_equal(saved, again, bytes);
            for (int n = at; n < N; n++)
                rig_read(&g, other, n, n + 1, y);
            expect_rows(&g, whole, y, at, "loaded", kind);
            free(saved), free(again), free(anywhere);
        }
        free(slot), free(other), free(whole), free(y);
        rig_close(&g);
    }
}

/* Not only its rows: the bytes it saves, too, are those of a slot that was never used. */
static void test_a_reused_slot_remembers_nothing(void **state) {
    (void)state;
    enum { N = 90 };
    struct attention_config kinds[7];
    for (int kind = 0, n_kinds = configs(kinds); kind < n_kinds; kind++) {
        struct rig g;
        rig_open(&g, kinds[kind], 100, N, 1, false);
        void *fresh = slot_open(&g), *used = slot_open(&g);
        float *want = rows_open(&g), *y = rows_open(&g);
        rig_read(&g, used, 0, N, y);
        for (int n = 0; n < 45; n += 3) {
            attention_slot_clear(g.a, used);
            free(fresh);
            fresh = slot_open(&g);
            if (n) rig_read(&g, used, 0, n, y);
            if (n) rig_read(&g, fresh, 0, n, want);
            size_t bytes;
            void *a = save(&g, fresh, &bytes), *b = save(&g, used, &bytes);
            assert_memory_equal(a, b, bytes);
            free(a), free(b);
        }
        free(fresh), free(used), free(want), free(y);
        rig_close(&g);
    }
}

/* Scores of the next choice that an earlier sequence left in the slot are not taken for the loaded
 * one's. */
static void test_a_state_loaded_over_another_sequence_goes_on_as_its_own(void **state) {
    (void)state;
    enum { N = 80, LENGTH = 60 };
    struct rig g;
    rig_open(&g, small(), 100, N, 2, false);
    void *slot = slot_open(&g), *other = slot_open(&g);
    float *whole = rows_open(&g), *y = rows_open(&g);
    rig_read(&g, slot, 0, LENGTH, whole);
    for (int at = 0; at < LENGTH; at++) {
        attention_slot_clear(g.a, slot);
        attention_slot_clear(g.a, other);
        g.first = 17;
        if (at) rig_read(&g, other, 0, at, y);
        g.first = 0;
        if (at) rig_read(&g, slot, 0, at, y);
        size_t bytes;
        void *saved = save(&g, slot, &bytes);
        assert_int_equal(attention_state_load(g.a, other, saved, bytes, NULL, 0), OK);
        rig_read(&g, other, at, LENGTH, y);
        size_t row = row_floats(&g), n = (size_t)(LENGTH - at) * row * sizeof *y;
        for (int i = 0; i < RIG_LAYERS; i++)
            assert_memory_equal(whole + ((size_t)i * N + at) * row, y + ((size_t)i * N + at) * row,
                                n);
        free(saved);
    }
    free(slot), free(other), free(whole), free(y);
    rig_close(&g);
}

static void expect_refused(const struct rig *g, void *slot, const void *state, size_t bytes,
                           const char *word) {
    char msg[200] = "";
    assert_int_equal(attention_state_load(g->a, slot, state, bytes, msg, sizeof msg), ERR_FORMAT);
    if (!strstr(msg, word)) fail_msg("'%s' does not say '%s'", msg, word);
    assert_int_equal(attention_slot_position(g->a, slot), 0);
}

static void test_hostile_states_are_refused_with_a_sentence(void **state) {
    (void)state;
    enum { N = 60 };
    struct rig g, other, older;
    rig_open(&g, small(), 100, N, 1, false);
    struct attention_config c = small();
    c.horizon = 25;
    rig_open(&other, c, 100, N, 1, false);
    c = small();
    c.cache_fact_age++;
    rig_open(&older, c, 100, N, 1, false);
    void *slot = slot_open(&g), *victim = slot_open(&g);
    float *y = rows_open(&g);
    rig_read(&g, slot, 0, N - 3, y);
    size_t bytes;
    char *good = save(&g, slot, &bytes), *bad = malloc(bytes + 64);
    for (size_t n = 0; n < bytes; n += n < 80 ? 1 : 97)
        expect_refused(&g, victim, good, n, "bytes");
    memcpy(bad, good, bytes);
    expect_refused(&g, victim, bad, bytes + 64, "bytes");
    expect_refused(&other, victim, good, bytes, "other attention settings");
    expect_refused(&older, victim, good, bytes, "other attention settings");
    bad[0] ^= 1;
    expect_refused(&g, victim, bad, bytes, "not a saved sequence state");
    memcpy(bad, good, bytes);
    bad[8] ^= 1;
    expect_refused(&g, victim, bad, bytes, "version");
    static const int64_t position[] = {-1, INT64_MIN, INT64_MAX};
    for (int i = 0; i < 3; i++) {
        memcpy(bad, good, bytes);
        memcpy(bad + 24, &position[i], sizeof *position);
        expect_refused(&g, victim, bad, bytes, "position");
    }
    memcpy(bad, good, bytes);
    memset(bad + 24, 0, 8); /* position 0 with a cache */
    expect_refused(&g, victim, bad, bytes, "cache");

    /* Cache positions are the last part: of every head 12 numbers. */
    size_t first = bytes - RIG_LAYERS * 2 * 12 * sizeof(int64_t);
    static const int64_t wrong[] = {-2, 0, 1, 56, 1000, INT64_MAX}; /* sinks, the window, beyond */
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        for (int place = 0; place < 12; place += 11) {
            memcpy(bad, good, bytes);
            memcpy(bad + first + (size_t)place * 8, &wrong[i], 8);
            expect_refused(&g, victim, bad, bytes, "cache");
        }
    memcpy(bad, good, bytes); /* twice the same */
    memcpy(bad + first + 8, bad + first, 8);
    expect_refused(&g, victim, bad, bytes, "cache");

    /* Every number of S, z, keys and values: not a number, or infinite. */
    static const unsigned char nan_bytes[4] = {0xff, 0x7f, 0xff,
                                               0x7f}; /* NaN as fp32 and twice as bf16 */
    for (size_t i = 64; i + 4 <= first; i += 4 * 31) {
        memcpy(bad, good, bytes);
        memcpy(bad + i, nan_bytes, 4);
        expect_refused(&g, victim, bad, bytes, "not finite");
    }
    memcpy(bad, good, bytes);
    float negative = -1;
    memcpy(bad + 64 + 16 * 16 * sizeof(float), &negative,
           sizeof negative); /* z of the first head, after S [16][16] */
    expect_refused(&g, victim, bad, bytes, "negative");
    assert_int_equal(attention_state_load(g.a, victim, good, bytes, NULL, 0), OK);
    free(slot), free(victim), free(y), free(good), free(bad);
    rig_close(&g);
    rig_close(&other);
    rig_close(&older);
}

static void test_a_softmax_state_is_as_long_as_its_text(void **state) {
    (void)state;
    struct attention_config kinds[7];
    int n = configs(kinds);
    struct rig g;
    rig_open(&g, kinds[n - 1], 100, 60, 1, false);
    void *slot = slot_open(&g);
    float *y = rows_open(&g);
    rig_read(&g, slot, 0, 33, y);
    size_t bytes;
    char *good = save(&g, slot, &bytes);
    assert_true(bytes < attention_state_bytes(g.a, 100) / 2);
    expect_refused(&g, slot, good, bytes - 1, "bytes");
    int64_t position = 34; /* says it is longer than it is, then longer than fits */
    memcpy(good + 24, &position, sizeof position);
    expect_refused(&g, slot, good, bytes, "bytes");
    position = 101;
    memcpy(good + 24, &position, sizeof position);
    expect_refused(&g, slot, good, bytes, "position");
    free(slot), free(y), free(good);
    rig_close(&g);
}

static void test_a_hedgehog_state_is_as_long_at_every_position(void **state) {
    (void)state;
    struct rig g;
    rig_open(&g, small(), 100, 10, 1, false);
    assert_int_equal(attention_state_bytes(g.a, 0), attention_state_bytes(g.a, 1000000000000));
    rig_close(&g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_saved_and_loaded_or_forked_anywhere_goes_on_with_the_same_bits),
        cmocka_unit_test(test_a_reused_slot_remembers_nothing),
        cmocka_unit_test(test_a_state_loaded_over_another_sequence_goes_on_as_its_own),
        cmocka_unit_test(test_hostile_states_are_refused_with_a_sentence),
        cmocka_unit_test(test_a_softmax_state_is_as_long_as_its_text),
        cmocka_unit_test(test_a_hedgehog_state_is_as_long_at_every_position),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
