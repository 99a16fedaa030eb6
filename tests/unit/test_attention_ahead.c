/* test_attention_ahead.c - what a block needs is made one block ahead, of the right things: no bit
 * depends on whether it was, and what no longer holds is not taken. */
#include "attention/internal.h"
#include "attention_rig.h"

enum { W = 8, CACHE = 12, N = 88, MOST = 56, BLOCKS = N / W };

static struct attention_config small(void) {
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .n_heads = 4,
                                     .n_kv_heads = 2,
                                     .head_dim = 8,
                                     .kv_type = KV_BF16,
                                     .map = MAP_EXP,
                                     .features = 8,
                                     .window = WINDOW_TERRACED,
                                     .window_size = W,
                                     .sinks = 2,
                                     .cache_size = CACHE,
                                     .cache_recent = 4,
                                     .cache_age = 20,
                                     .cache_fact_age = 50,
                                     .horizon = 24,
                                     .mixing = MIXING_UNIFIED,
                                     .map_before_rope = true,
                                     .max_distance = 20};
}

static int configs(struct attention_config out[5]) {
    for (int i = 0; i < 5; i++)
        out[i] = small();
    out[1].kv_type = KV_FP32, out[1].horizon = 0;
    out[2].map_before_rope = false, out[2].max_distance = 0, out[2].key_map_per_query_head = true;
    out[3].cache_size = out[3].cache_recent = out[3].cache_age = 0; /* all is folded */
    out[4].retrieval_size = 7,
    out[4].retrieval_recent = 2; /* of some heads there is more to choose */
    return 5;
}

static int64_t sets[RIG_LAYERS][2][BLOCKS][CACHE];
static void fill_sets(void) { /* the newest keys that could be there */
    for (int b = 0; b < BLOCKS; b++)
        for (int i = 0; i < RIG_LAYERS * 2; i++)
            for (int e = 0; e < CACHE; e++) {
                int64_t position = (b - 1) * W - CACHE + e;
                sets[i / 2][i % 2][b][e] = position >= 2 ? position : -1;
            }
}

/* What may come between the middle of one block and the next. */
enum change { NOTHING, OTHER_TOKENS, FEWER_PLACES, PLACES_AND_BACK, IMPOSED, FORKED, N_CHANGES };
static const char *const CHANGES[] = {"nothing",         "other tokens", "fewer places",
                                      "places and back", "imposed",      "forked"};

static void go_on(struct rig *g, enum change change, void *slot, int from, int to, float *y) {
    if (change == OTHER_TOKENS) g->first = 9;
    if (change == FEWER_PLACES) attention_set_cache_share(g->a, CACHE - 3, CACHE);
    if (change == IMPOSED) attention_impose_cache(g->a, &sets[0][0][0][0], BLOCKS);
    rig_read(g, slot, from, to, y);
    g->first = 0;
    attention_set_cache_share(g->a, 1, 1);
    attention_impose_cache(g->a, NULL, 0);
}

static void *save(const struct rig *g, const void *slot, size_t *bytes) {
    *bytes = attention_state_bytes(g->a, attention_slot_position(g->a, slot));
    void *state = malloc(*bytes);
    attention_state_save(g->a, state, slot);
    return state;
}

static int n_at_hand(const struct rig *g, const void *slot) { /* next states */
    int n = 0;
    for (int i = 0; i < RIG_LAYERS * 2; i++)
        n += *memory_of(g->a, slot, i / 2, i % 2).next_for != 0;
    return n;
}

/* A loaded state has nothing at hand; the sequence it was saved from has, for some layers. */
static void check_change(struct rig *g, enum change change, int at, int *n_ahead) {
    void *slot = slot_open(g), *bare = slot_open(g), *fork = slot_open(g);
    float *y = rows_open(g), *want = rows_open(g);
    size_t row = row_floats(g), bytes, bytes_after;
    rig_read(g, slot, 0, at, y);
    void *state = save(g, slot, &bytes);
    assert_int_equal(attention_state_load(g->a, bare, state, bytes, NULL, 0), OK);
    assert_int_equal(n_at_hand(g, bare), 0);
    *n_ahead += n_at_hand(g, slot);
    if (change == PLACES_AND_BACK) go_on(g, FEWER_PLACES, slot, at, at + 1, y);
    if (change == PLACES_AND_BACK) go_on(g, FEWER_PLACES, bare, at, at + 1, want);
    if (change == FORKED) {
        attention_slot_copy(g->a, fork, slot);
        go_on(g, OTHER_TOKENS, slot, at, N - 9, y); /* takes nothing from the fork */
    }
    int from = change == PLACES_AND_BACK ? at + 1 : at, to = N - 9;
    void *used = change == FORKED ? fork : slot;
    go_on(g, change, used, from, to, y);
    go_on(g, change, bare, from, to, want);
    for (int i = 0; i < RIG_LAYERS; i++) {
        size_t first = ((size_t)i * g->n + from) * row;
        if (memcmp(y + first, want + first, (size_t)(to - from) * row * sizeof *y) != 0)
            fail_msg("%s at %d: layer %d has other bits", CHANGES[change], at, i);
    }
    void *a = save(g, used, &bytes), *b = save(g, bare, &bytes_after);
    assert_int_equal(bytes, bytes_after);
    assert_memory_equal(a, b, bytes);
    free(slot), free(bare), free(fork), free(y), free(want), free(state), free(a), free(b);
}

static void test_what_was_made_ahead_changes_no_bit_and_is_dropped_when_stale(void **state) {
    (void)state;
    struct attention_config kinds[5];
    fill_sets();
    for (int kind = 0, n = configs(kinds); kind < n; kind++) {
        struct rig g;
        int n_ahead = 0;
        rig_open(&g, kinds[kind], 100, N, 2, false);
        for (int change = 0; change < N_CHANGES; change++)
            for (int at = W; at < MOST; at++)
                if (g.config.cache_size || (change != FEWER_PLACES && change != PLACES_AND_BACK))
                    check_change(&g, (enum change)change, at, &n_ahead);
        assert_true(n_ahead > 1000);
        rig_close(&g);
    }
}

/* A mark on the states made ahead: it is in what the next block reads and in what is saved then,
 * and nowhere before. */
static void test_a_block_takes_up_the_state_made_ahead(void **state) {
    (void)state;
    struct rig g;
    size_t bytes, row;
    rig_open(&g, small(), 100, N, 1, false);
    void *slot = slot_open(&g), *marked = slot_open(&g);
    float *y = rows_open(&g), *z = rows_open(&g);
    row = row_floats(&g);
    rig_read(&g, slot, 0, 5 * W, y);
    assert_int_equal(n_at_hand(&g, slot), RIG_LAYERS * 2);
    attention_slot_copy(g.a, marked, slot);
    for (int i = 0; i < RIG_LAYERS * 2; i++)
        memory_of(g.a, marked, i / 2, i % 2).next[0] += 64;
    void *a = save(&g, slot, &bytes), *b = save(&g, marked, &bytes);
    assert_memory_equal(a, b, bytes);
    free(a), free(b);
    rig_read(&g, slot, 5 * W, 5 * W + 1, y), rig_read(&g, marked, 5 * W, 5 * W + 1, z);
    for (int i = 0; i < RIG_LAYERS; i++) {
        size_t first = ((size_t)i * N + 5 * W) * row;
        assert_true(memcmp(y + first, z + first, row * sizeof *y) != 0);
    }
    a = save(&g, slot, &bytes), b = save(&g, marked, &bytes);
    size_t at = sizeof(struct slot_header), each = g.a->layout.state_floats * sizeof(float);
    for (int i = 0; i < RIG_LAYERS * 2; i++, at += each) {
        float x, m;
        memcpy(&x, (char *)a + at, sizeof x), memcpy(&m, (char *)b + at, sizeof m);
        assert_true(m == x + 64);
        assert_memory_equal((char *)a + at + sizeof x, (char *)b + at + sizeof x, each - sizeof x);
    }
    free(a), free(b), free(slot), free(marked), free(y), free(z);
    rig_close(&g);
}

/* Not in the step that begins a block, and of three layers never two in one step. */
static void test_layers_work_ahead_in_different_steps(void **state) {
    (void)state;
    struct rig g;
    rig_open(&g, small(), 100, N, 1, false);
    void *slot = slot_open(&g);
    float *y = rows_open(&g);
    int64_t before[RIG_LAYERS];
    rig_read(&g, slot, 0, 5 * W, y);
    for (int i = 0; i < RIG_LAYERS; i++)
        before[i] = *memory_of(g.a, slot, i, 0).next_for;
    for (int r = 0, n_before = 0; r < W; r++) {
        rig_read(&g, slot, 5 * W + r, 5 * W + r + 1, y);
        int n = 0;
        for (int i = 0; i < RIG_LAYERS; i++)
            n += *memory_of(g.a, slot, i, 0).next_for != before[i];
        assert_in_range(n - n_before, 0, r > 0);
        if (r == W - 1) assert_int_equal(n, RIG_LAYERS);
        n_before = n;
    }
    free(slot), free(y);
    rig_close(&g);
}

/* Sequences whose blocks begin together, in slots side by side: each works ahead once for each
 * layer, never in a block's first row, and no row has many more than its share.  (Of multiples of
 * the golden ratio an interval of a seventh holds a seventh, and at most two more.) */
static void test_sequences_work_ahead_in_different_steps(void **state) {
    (void)state;
    enum { MOST_SLOTS = 21 };
    struct rig g;
    rig_open(&g, small(), 100, N, 1, false);
    size_t bytes = attention_slot_bytes(g.a);
    char *slots = malloc(bytes * MOST_SLOTS);
    for (int n_slots = 1; n_slots <= MOST_SLOTS; n_slots++) {
        int n[W] = {0}, all = 0;
        for (int s = 0; s < n_slots; s++)
            for (int r = 0; r < W; r++)
                for (int layer = 0; layer < RIG_LAYERS; layer++) {
                    g.a->runs[0].slot = slots + bytes * (size_t)s;
                    n[r] += memory_prepares_in(
                        g.a, layer, &(struct segment){.n_rows = 1, .position = 5 * W + r});
                }
        for (int r = 0; r < W; all += n[r++])
            assert_true(n[r] <= (r > 0) * RIG_LAYERS * (n_slots / (W - 1) + 3));
        assert_int_equal(all, n_slots * RIG_LAYERS);
    }
    free(slots);
    rig_close(&g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_was_made_ahead_changes_no_bit_and_is_dropped_when_stale),
        cmocka_unit_test(test_a_block_takes_up_the_state_made_ahead),
        cmocka_unit_test(test_layers_work_ahead_in_different_steps),
        cmocka_unit_test(test_sequences_work_ahead_in_different_steps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
