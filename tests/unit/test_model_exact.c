/* test_model_exact.c - "same request, same tokens": a row's logits are the same bits however its
 * prompt was cut, whatever else is in the batch, in whichever slot and with any number of threads,
 * for every weight format.  All comparisons are of bits. */
#include "model_testing.h"
#include "tiny_model.h"

static struct team *teams[4]; /* of 1, 2, 3 threads at their index */
static char tiny[] = "/tmp/urchin-tiny-XXXXXX";

enum { N = 300, ROWS = 512 };
static const char *const formats[] = {"fp32", "bf16", "int8", "int4"};

/* Tokens that repeat and vary, as text does; any would do. */
static void fill_tokens(int32_t *tokens, int n, int vocab, uint32_t seed) {
    for (int i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        tokens[i] = i > 20 && seed >> 30 == 0 ? tokens[i - 17]
                                              : 3 + (int32_t)((seed >> 8) % (uint32_t)(vocab - 3));
    }
}

static struct model_options exact_options(const char *path, int weights, int threads) {
    struct model_options o = options_for(path, weights, teams[threads]);
    o.max_rows = o.max_logits = ROWS;
    return o;
}

static size_t logits_bytes(const struct model *m, int n) {
    return (size_t)n * (size_t)model_info(m)->vocab_size * sizeof(float);
}

/* The saved sequence of a slot; the caller frees. */
static void *saved(const struct model *m, int slot) {
    void *state = calloc(1, model_slot_state_bytes(m, slot));
    model_slot_save(m, slot, state);
    return state;
}

static void check_every_cut(const char *path, int weights) {
    int32_t tokens[N];
    struct model_options o = exact_options(path, weights, 2);
    struct model *m = open_with(&o);
    size_t bytes = logits_bytes(m, N), state_bytes;
    float *whole = malloc(bytes), *cut = malloc(bytes);
    fill_tokens(tokens, N, model_info(m)->vocab_size, 7);
    read_tokens(m, ROWS, 0, tokens, N, NULL, whole);
    void *state = saved(m, 0);
    state_bytes = model_slot_state_bytes(m, 0);
    for (int c = 1; c < N; c++) {
        memset(cut, 0xff, bytes);
        read_tokens(m, ROWS, 1, tokens, N, (int[]){c, 0}, cut);
        void *other = saved(m, 1);
        if (memcmp(whole, cut, bytes))
            fail_msg("%s, %s: logits differ when cut at %d", path, formats[weights], c);
        if (memcmp(state, other, state_bytes))
            fail_msg("%s, %s: states differ when cut at %d", path, formats[weights], c);
        free(other);
    }
    free(state);
    free(whole);
    free(cut);
    model_close(m);
}

static void test_any_cut_of_300_tokens_on_stories(void **state) {
    (void)state;
    for (int weights = WEIGHT_FP32; weights <= WEIGHT_INT4; weights++)
        check_every_cut(STORIES, weights);
}

static void test_any_cut_of_300_tokens_on_a_random_model(void **state) {
    (void)state;
    for (int weights = WEIGHT_FP32; weights <= WEIGHT_INT4; weights++)
        check_every_cut(tiny, weights);
}

static void test_token_by_token_equals_at_once(void **state) {
    (void)state;
    int cuts[N];
    int32_t tokens[N];
    for (int i = 0; i < N; i++)
        cuts[i] = i + 1;
    cuts[N - 1] = 0;
    for (int weights = WEIGHT_FP32; weights <= WEIGHT_INT4; weights++) {
        struct model_options o = exact_options(tiny, weights, 2);
        struct model *m = open_with(&o);
        size_t bytes = logits_bytes(m, N);
        float *whole = malloc(bytes), *single = malloc(bytes);
        fill_tokens(tokens, N, TINY_VOCAB, 8);
        read_tokens(m, ROWS, 0, tokens, N, NULL, whole);
        read_tokens(m, ROWS, 1, tokens, N, cuts, single);
        assert_memory_equal(whole, single, bytes);
        free(whole);
        free(single);
        model_close(m);
    }
}

/* One sequence alone, then again in another slot among two others that come in pieces of other
 * sizes, one forked halfway. */
static void check_neighbours(const char *path, int weights) {
    int32_t tokens[3][N];
    struct model_options o = exact_options(path, weights, 2);
    struct model *m = open_with(&o);
    size_t vocab = (size_t)model_info(m)->vocab_size, bytes = logits_bytes(m, N);
    float *alone = malloc(bytes), *among = malloc(bytes);
    for (int s = 0; s < 3; s++)
        fill_tokens(tokens[s], N, (int)vocab, 10 + (uint32_t)s);
    read_tokens(m, ROWS, 0, tokens[0], N, NULL, alone);
    for (int s = 0; s < 3; s++)
        model_slot_clear(m, s);
    int at = 0, first = 0, last = 0; /* rows read of the sequence and of its neighbours */
    for (int step = 0; at < N; step++) {
        int rows = (step * 7 + 1) % 23 + 1, before = (step * 5) % 11, after = (step * 3 + 2) % 13;
        if (rows > N - at) rows = N - at;
        if (before > N - first) before = N - first;
        if (after > N - last) after = N - last;
        struct model_run runs[3];
        int n = 0, logit_row = 0;
        if (before) {
            runs[n++] =
                (struct model_run){0, before, tokens[1] + first, step % 2 ? before : 0, false};
            logit_row = runs[0].n_logits;
        }
        runs[n++] = (struct model_run){2, rows, tokens[0] + at, rows, false};
        if (after) runs[n++] = (struct model_run){1, after, tokens[2] + last, 1, false};
        const float *logits;
        assert_int_equal(model_step(m, runs, n, &logits), OK);
        memcpy(among + (size_t)at * vocab, logits + (size_t)logit_row * vocab,
               (size_t)rows * vocab * sizeof *among);
        at += rows, first += before, last += after;
    }
    if (memcmp(alone, among, bytes))
        fail_msg("%s, %s: neighbours change logits", path, formats[weights]);
    free(alone);
    free(among);
    model_close(m);
}

static void test_neighbours_and_slot_change_nothing(void **state) {
    (void)state;
    for (int weights = WEIGHT_FP32; weights <= WEIGHT_INT4; weights++) {
        check_neighbours(STORIES, weights);
        check_neighbours(tiny, weights);
    }
}

static void check_threads(const char *path, int weights) {
    int32_t tokens[N];
    float *one = NULL;
    for (int threads = 1; threads <= 3; threads++) {
        struct model_options o = exact_options(path, weights, threads);
        struct model *m = open_with(&o);
        size_t bytes = logits_bytes(m, N);
        float *logits = malloc(bytes);
        fill_tokens(tokens, N, model_info(m)->vocab_size, 9);
        read_tokens(m, ROWS, 0, tokens, N, (int[]){200, 201, 202, 0}, logits);
        if (one && memcmp(one, logits, bytes))
            fail_msg("%s, %s: %d threads change logits", path, formats[weights], threads);
        if (one)
            free(logits);
        else
            one = logits;
        model_close(m);
    }
    free(one);
}

static void test_number_of_threads_changes_nothing(void **state) {
    (void)state;
    for (int weights = WEIGHT_FP32; weights <= WEIGHT_INT4; weights++) {
        check_threads(STORIES, weights);
        check_threads(tiny, weights);
    }
}

/* A state saved, loaded into another slot, and a fork go on as the original does. */
static void check_saved(const char *path, int weights) {
    enum { CUT = 137 };
    int32_t tokens[N];
    struct model_options o = exact_options(path, weights, 2);
    struct model *m = open_with(&o);
    size_t vocab = (size_t)model_info(m)->vocab_size, rest = logits_bytes(m, N - CUT);
    float *whole = malloc(logits_bytes(m, N));
    const float *logits;
    char msg[200];
    fill_tokens(tokens, N, (int)vocab, 11);
    read_tokens(m, ROWS, 0, tokens, N, NULL, whole);
    read_tokens(m, ROWS, 1, tokens, CUT, NULL, NULL);
    size_t bytes = model_slot_state_bytes(m, 1);
    void *state = saved(m, 1);
    read_tokens(m, ROWS, 0, tokens + 50, 99, NULL, NULL); /* something else was there */
    model_slot_copy(m, 2, 1);
    read_tokens(m, ROWS, 1, tokens + 70, 20, NULL, NULL);
    if (model_slot_load(m, 0, state, bytes, msg, sizeof msg)) fail_msg("%s", msg);
    assert_true(model_slot_position(m, 0) == CUT && model_slot_position(m, 2) == CUT);
    for (int slot = 0; slot <= 2; slot += 2) {
        assert_int_equal(
            model_step(m, &(struct model_run){slot, N - CUT, tokens + CUT, N - CUT, false}, 1,
                       &logits),
            OK);
        if (memcmp(whole + CUT * vocab, logits, rest))
            fail_msg("%s, %s: slot %d goes on otherwise", path, formats[weights], slot);
    }
    assert_int_equal(model_slot_load(m, 0, state, bytes - 1, msg, sizeof msg), ERR_FORMAT);
    assert_true(model_slot_position(m, 0) == 0 || model_slot_position(m, 0) == N);
    free(state);
    free(whole);
    model_close(m);
}

static void test_saved_and_forked_sequences_go_on_identically(void **state) {
    (void)state;
    for (int weights = WEIGHT_FP32; weights <= WEIGHT_INT4; weights++) {
        check_saved(STORIES, weights);
        check_saved(tiny, weights);
    }
}

/* The default model, with max_distance 128 so that keys turn clamped within the text; every cut of
 * the lists alone is in their union. */
static void test_cuts_on_the_default_model(void **state) {
    (void)state;
    enum { LONG = 400 };
    static const int lists[][8] = {
        {1, 64, 192, 256, 320, 384, 0}, {63, 191, 255, 319, 383, 0}, {65, 193, 257, 321, 385, 0}};
    int32_t tokens[LONG];
    if (!smollm_base()) skip();
    for (int weights = WEIGHT_FP32; weights <= WEIGHT_INT4; weights++) {
        struct model_options o = exact_options(SMOLLM, weights, 2);
        o.max_distance = 128;
        struct model *m = open_with(&o);
        size_t bytes = logits_bytes(m, LONG);
        float *whole = malloc(bytes), *cut = malloc(bytes);
        fill_tokens(tokens, LONG, 40000, 12);
        read_tokens(m, ROWS, 0, tokens, LONG, NULL, whole);
        for (int i = 0; i < 3; i++) {
            read_tokens(m, ROWS, 1 + i % 2, tokens, LONG, lists[i], cut);
            if (memcmp(whole, cut, bytes))
                fail_msg("%s: logits differ when cut at %d, ...", formats[weights], lists[i][0]);
        }
        free(whole);
        free(cut);
        model_close(m);
    }
}

static int set_up(void **state) {
    (void)state;
    if (!mkdtemp(tiny)) return -1;
    tiny_write(tiny);
    for (int n = 1; n <= 3; n++)
        teams[n] = new_team(n);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    for (int n = 1; n <= 3; n++)
        team_free(teams[n]);
    tiny_remove(tiny);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_any_cut_of_300_tokens_on_stories),
        cmocka_unit_test(test_any_cut_of_300_tokens_on_a_random_model),
        cmocka_unit_test(test_token_by_token_equals_at_once),
        cmocka_unit_test(test_neighbours_and_slot_change_nothing),
        cmocka_unit_test(test_number_of_threads_changes_nothing),
        cmocka_unit_test(test_saved_and_forked_sequences_go_on_identically),
        cmocka_unit_test(test_cuts_on_the_default_model),
    };
    return cmocka_run_group_tests_name("model_exact", tests, set_up, tear_down);
}
