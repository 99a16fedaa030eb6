/* test_attention_add.c - the memory of one sequence added to another's. */
#include "attention_rig.h"

enum {
    H = 4,
    K = 2,
    D = 8,
    W = 4,
    N = 140,
    READ = 46,
    SRC = 60
};                 /* dst reads tokens 0 .. 45, src 60 .. 105 */
enum { NEXT = 9 }; /* rows asked after the addition */

static struct attention_config small(void) {
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .n_heads = H,
                                     .n_kv_heads = K,
                                     .head_dim = D,
                                     .kv_type = KV_FP32,
                                     .map = MAP_EXP,
                                     .features = 6,
                                     .window = WINDOW_TERRACED,
                                     .window_size = W,
                                     .sinks = 1,
                                     .cache_size = 12,
                                     .cache_recent = 2,
                                     .cache_age = 9,
                                     .mixing = MIXING_UNIFIED,
                                     .map_before_rope = true,
                                     .max_distance = 20};
}

static void read_text(struct rig *g, void *slot, int first, int n, float *y) {
    g->first = first;
    attention_slot_clear(g->a, slot);
    rig_read(g, slot, 0, n, y);
    g->first = 0;
}
/* The rows after READ of the text that dst read. */
static void ask(struct rig *g, void *slot, float *y) {
    rig_read(g, slot, READ, READ + NEXT, y);
}

static float difference(const struct rig *g, const float *a, const float *b) {
    float most = 0;
    for (int i = 0; i < RIG_LAYERS; i++)
        for (size_t k = 0; k < NEXT * row_floats(g); k++) {
            size_t at = ((size_t)i * (size_t)g->n + READ) * row_floats(g) + k;
            float off = fabsf(a[at] - b[at]);
            if (!(off <= most)) most = off; /* NaN counts */
        }
    return most;
}

/* No cache, so state and state are all: twice the state is c_h + log 2.  Sums of 46 products in
 * fp32. */
static void test_a_state_added_to_itself_weighs_twice(void **state) {
    (void)state;
    struct attention_config c = small();
    c.cache_size = c.cache_recent = c.cache_age = 0;
    struct rig g, twice;
    rig_open(&g, c, 10000, N, 1, false);
    rig_open(&twice, c, 10000, N, 1, false);
    for (int i = 0; i < RIG_LAYERS; i++)
        for (int h = 0; h < H; h++)
            ((float *)twice.weights[i].mix)[h] += logf(2);
    float *y = rows_open(&g), *want = rows_open(&g), *alone = rows_open(&g);
    void *a = slot_open(&g), *b = slot_open(&g), *d = slot_open(&twice);
    read_text(&g, a, 0, READ, y);
    attention_slot_copy(g.a, b, a);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){b}, 1), OK);
    ask(&g, a, y);
    ask(&g, b, alone);
    read_text(&twice, d, 0, READ, want);
    ask(&twice, d, want);
    /* blocks folded after the addition weigh once in g and twice in twice: ask within the block's
     * rows only */
    float *cut[] = {y, want, alone};
    for (int i = 0; i < 3; i++)
        for (int l = 0; l < RIG_LAYERS; l++)
            memset(cut[i] + ((size_t)l * N + READ + 2) * row_floats(&g), 0,
                   (NEXT - 2) * row_floats(&g) * sizeof(float));
    assert_true(difference(&g, y, want) <= 1e-4f);
    assert_true(difference(&g, y, alone) > 1e-2f);
    free(a), free(b), free(d), free(y), free(want), free(alone);
    rig_close(&g);
    rig_close(&twice);
}

/* Both hold `horizon` keys: the sum scaled to it is their mean, and of two that are the same it is
 * what it was. */
static void test_the_sum_is_scaled_to_the_horizon(void **state) {
    (void)state;
    struct attention_config c = small();
    c.cache_size = c.cache_recent = c.cache_age = 0;
    c.horizon = 16;
    struct rig g;
    rig_open(&g, c, 10000, N, 1, false);
    float *y = rows_open(&g), *want = rows_open(&g), *other = rows_open(&g);
    void *a = slot_open(&g), *b = slot_open(&g), *d = slot_open(&g);
    read_text(&g, a, 0, READ, y);
    attention_slot_copy(g.a, b, a);
    attention_slot_copy(g.a, d, a);
    ask(&g, b, want);
    read_text(&g, b, 0, READ, other);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){b, d}, 2), OK);
    ask(&g, a, y);
    assert_true(difference(&g, y, want) <= 1e-4f);
    read_text(&g, b, SRC, READ, other); /* another text does change it */
    assert_int_equal(attention_state_add(g.a, d, (const void *const[]){b}, 1), OK);
    ask(&g, d, other);
    assert_true(difference(&g, other, want) > 1e-2f);
    free(a), free(b), free(d), free(y), free(want), free(other);
    rig_close(&g);
}

static void rotated(double *out, const float *x, int64_t position) {
    for (int i = 0; i < D / 2; i++) {
        double angle = (double)position * pow(10000, -2.0 * i / D);
        out[i] = x[i] * cos(angle) - x[i + D / 2] * sin(angle);
        out[i + D / 2] = x[i + D / 2] * cos(angle) + x[i] * sin(angle);
    }
}

/* One term of row n's exact sum: key token `token` of the input at a position. */
static void add_term(const struct rig *g, int layer, int h, int n, int token, int64_t position,
                     double *sum, double *y) {
    const float *q = g->q[layer] + ((size_t)n * H + (size_t)h) * D,
                *k = g->k[layer] + ((size_t)token * K + (size_t)(h / (H / K))) * D,
                *v = g->v[layer] + ((size_t)token * K + (size_t)(h / (H / K))) * D;
    double turned[D], key[D], dot = 0;
    bool far = n / W * W - position > 20;
    rotated(turned, q, far ? 20 : n);
    rotated(key, k, far ? 0 : position);
    for (int d = 0; d < D; d++)
        dot += turned[d] * key[d];
    double w = exp(dot / sqrt(D));
    *sum += w;
    for (int d = 0; d < D; d++)
        y[d] += w * v[d];
}

/* The linear branch off: the next row is softmax over dst's sink and window and both caches, far
 * keys at max_distance. Its window: block 10 and 11 (positions 40 .. 46). */
static void test_both_caches_are_seen_at_the_positions_they_had(void **state) {
    (void)state;
    struct rig g;
    rig_open(&g, small(), 10000, N, 1, false);
    float *y = rows_open(&g);
    void *a = slot_open(&g), *b = slot_open(&g);
    attention_set_cache_share(g.a, 6, g.config.cache_size);
    read_text(&g, a, 0, READ, y);
    read_text(&g, b, SRC, READ - 3, y);
    int64_t own[RIG_LAYERS][K][12], theirs[RIG_LAYERS][K][12], both[12];
    int n_far = 0, n_twice = 0;
    for (int i = 0; i < RIG_LAYERS; i++)
        for (int kv = 0; kv < K; kv++) {
            assert_int_equal(attention_cache_positions(g.a, a, i, kv, own[i][kv]), 6);
            assert_int_equal(attention_cache_positions(g.a, b, i, kv, theirs[i][kv]), 6);
        }
    attention_set_cache_share(g.a, 12, g.config.cache_size);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){b}, 1), OK);
    attention_set_linear(g.a, false);
    rig_read(&g, a, READ, READ + 1, y);
    attention_set_linear(g.a, true);
    for (int i = 0; i < RIG_LAYERS; i++)
        for (int h = 0; h < H; h++) {
            int kv = h / (H / K);
            double sum = 0, want[D] = {0};
            add_term(&g, i, h, READ, 0, 0, &sum, want); /* the sink */
            for (int j = 40; j <= READ; j++)
                add_term(&g, i, h, READ, j, j, &sum, want);
            assert_int_equal(attention_cache_positions(g.a, a, i, kv, both), 12);
            for (int e = 0; e < 6; e++) {
                add_term(&g, i, h, READ, (int)own[i][kv][e], own[i][kv][e], &sum, want);
                add_term(&g, i, h, READ, SRC + (int)theirs[i][kv][e], theirs[i][kv][e], &sum, want);
                n_far += 44 - theirs[i][kv][e] > 20;
                for (int k = 0; k < 6; k++)
                    n_twice += own[i][kv][e] == theirs[i][kv][k];
            }
            for (int e = 1; e < 12; e++)
                assert_true(both[e] >= both[e - 1]);
            for (int d = 0; d < D; d++) {
                float got = y[(((size_t)i * N + READ) * H + (size_t)h) * D + (size_t)d];
                if (!(fabs(got - want[d] / sum) <= 1e-4))
                    fail_msg("layer %d head %d: %g is not %g", i, h, got, want[d] / sum);
            }
        }
    assert_true(n_far > 0 && n_twice > 0); /* the hard cases are there */
    free(a), free(b), free(y);
    rig_close(&g);
}

/* With 6 of 12 places in use a text is read as with a cache of 6, whatever lies behind. */
static void test_fewer_places_are_a_smaller_cache(void **state) {
    (void)state;
    struct attention_config c = small();
    struct rig wide, narrow;
    c.horizon = 16;
    rig_open(&wide, c, 10000, N, 2, false);
    c.cache_size = 6;
    rig_open(&narrow, c, 10000, N, 2, false);
    float *y = rows_open(&wide), *want = rows_open(&narrow);
    void *a = slot_open(&wide), *b = slot_open(&narrow);
    attention_set_cache_share(wide.a, 6, wide.config.cache_size);
    rig_read(&wide, a, 0, 50, y), rig_read(&wide, a, 50, N, y);
    rig_read(&narrow, b, 0, 50, want), rig_read(&narrow, b, 50, N, want);
    for (size_t i = 0; i < RIG_LAYERS * N * row_floats(&wide);
         i++) /* spans lie elsewhere: sums in another order */
        assert_true(fabsf(y[i] - want[i]) <= 1e-4f);
    for (int i = 0; i < RIG_LAYERS; i++) {
        int64_t p[12], q[12];
        assert_int_equal(attention_cache_positions(wide.a, a, i, 1, p), 6);
        assert_int_equal(attention_cache_positions(narrow.a, b, i, 1, q), 6);
        assert_memory_equal(p, q, 6 * sizeof *p);
    }
    free(a), free(b), free(y), free(want);
    rig_close(&wide);
    rig_close(&narrow);
}

static void test_what_cannot_be_added_is_refused_and_changes_nothing(void **state) {
    (void)state;
    struct rig g;
    rig_open(&g, small(), 10000, N, 1, false);
    size_t bytes = attention_slot_bytes(g.a);
    float *y = rows_open(&g);
    void *a = slot_open(&g), *b = slot_open(&g), *before = malloc(bytes);
    attention_set_cache_share(g.a, 6, g.config.cache_size);
    read_text(&g, a, 0, READ, y);
    read_text(&g, b, SRC, READ, y);
    memcpy(before, a, bytes);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){b}, 1),
                     ERR_ARG); /* 12 keys in 6 places */
    attention_set_cache_share(g.a, 12, g.config.cache_size);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){a}, 1), ERR_ARG);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){b, b}, 2),
                     ERR_ARG); /* 18 in 12 */
    read_text(&g, b, SRC, READ + 1, y);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){b}, 1),
                     ERR_ARG); /* farther than dst */
    assert_memory_equal(before, a, bytes);
    read_text(&g, a, 0, 16, y); /* 12 places: nothing is linear yet */
    attention_slot_clear(g.a, b);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){b}, 1), ERR_ARG);
    free(a), free(b), free(y), free(before);
    rig_close(&g);
    struct attention_config c = small();
    c.window = WINDOW_SLIDING;
    c.cache_size = c.cache_recent = c.cache_age = 0;
    rig_open(&g, c, 10000, N, 1, false);
    y = rows_open(&g), a = slot_open(&g), b = slot_open(&g);
    read_text(&g, a, 0, READ, y);
    attention_slot_copy(g.a, b, a);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){b}, 1), ERR_ARG);
    free(a), free(b), free(y);
    rig_close(&g);
}

static void test_an_empty_memory_adds_nothing(void **state) {
    (void)state;
    struct rig g;
    rig_open(&g, small(), 10000, N, 1, false);
    float *y = rows_open(&g), *want = rows_open(&g);
    void *a = slot_open(&g), *b = slot_open(&g), *d = slot_open(&g);
    read_text(&g, a, 0, READ, y);
    attention_slot_copy(g.a, d, a);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){b}, 1), OK);
    ask(&g, a, y);
    ask(&g, d, want);
    assert_true(difference(&g, y, want) == 0);
    free(a), free(b), free(d), free(y), free(want);
    rig_close(&g);
}

/* dst stands in the middle of a block, with some layers' candidates scored already: of fewer than
 * there are now.  A loaded state has no scores, so both must choose alike, to the bit. */
static void test_what_was_scored_before_is_scored_again(void **state) {
    (void)state;
    struct rig g;
    rig_open(&g, small(), 10000, N, 1, false);
    size_t bytes = attention_state_bytes(g.a, READ);
    float *y = rows_open(&g), *want = rows_open(&g);
    void *a = slot_open(&g), *b = slot_open(&g), *d = slot_open(&g), *saved = malloc(bytes);
    attention_set_cache_share(g.a, 6, g.config.cache_size);
    read_text(&g, a, 0, READ, y);
    read_text(&g, b, SRC, READ, y);
    attention_state_save(g.a, saved, a);
    assert_int_equal(attention_state_load(g.a, d, saved, bytes, NULL, 0), OK);
    attention_set_cache_share(g.a, 12, g.config.cache_size);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){b}, 1), OK);
    assert_int_equal(attention_state_add(g.a, d, (const void *const[]){b}, 1), OK);
    ask(&g, a, y);
    ask(&g, d, want);
    assert_true(difference(&g, y, want) == 0);
    free(a), free(b), free(d), free(y), free(want), free(saved);
    rig_close(&g);
}

/* The same where as many places are in use before as after: a layer has folded for the next block
 * by then, as many keys of other candidates, from the state alone. */
static void test_what_was_folded_ahead_is_folded_again(void **state) {
    (void)state;
    struct rig g;
    rig_open(&g, small(), 10000, N, 1, false);
    size_t bytes = attention_state_bytes(g.a, READ);
    float *y = rows_open(&g), *want = rows_open(&g), *alone = rows_open(&g);
    void *a = slot_open(&g), *b = slot_open(&g), *d = slot_open(&g), *saved = malloc(bytes);
    attention_set_cache_share(g.a, 2, g.config.cache_size);
    read_text(&g, b, SRC, READ, y);
    attention_set_cache_share(g.a, 6, g.config.cache_size);
    read_text(&g, a, 0, READ - 1, y);
    attention_set_cache_share(g.a, 8, g.config.cache_size);
    rig_read(&g, a, READ - 1, READ, y);
    attention_state_save(g.a, saved, a);
    assert_int_equal(attention_state_load(g.a, d, saved, bytes, NULL, 0), OK);
    assert_int_equal(attention_state_add(g.a, a, (const void *const[]){b}, 1), OK);
    assert_int_equal(attention_state_add(g.a, d, (const void *const[]){b}, 1), OK);
    ask(&g, a, y);
    ask(&g, d, want);
    assert_true(difference(&g, y, want) == 0);
    assert_int_equal(attention_state_load(g.a, d, saved, bytes, NULL, 0), OK);
    ask(&g, d, alone);
    assert_true(difference(&g, y, alone) > 1e-2f);
    free(a), free(b), free(d), free(y), free(want), free(alone), free(saved);
    rig_close(&g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_state_added_to_itself_weighs_twice),
        cmocka_unit_test(test_the_sum_is_scaled_to_the_horizon),
        cmocka_unit_test(test_both_caches_are_seen_at_the_positions_they_had),
        cmocka_unit_test(test_fewer_places_are_a_smaller_cache),
        cmocka_unit_test(test_what_cannot_be_added_is_refused_and_changes_nothing),
        cmocka_unit_test(test_an_empty_memory_adds_nothing),
        cmocka_unit_test(test_what_was_scored_before_is_scored_again),
        cmocka_unit_test(test_what_was_folded_ahead_is_folded_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
