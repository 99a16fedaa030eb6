/* test_attention_golden.c - one layer of each converted model on the q, k, v of its base, against
 * values computed in PyTorch (fp32) from the same files: which keys the cache holds, block by
 * block, and the outputs.
 *
 * stories260k has its maps after RoPE, so its recorded q and k (after RoPE) are all there is to
 * see: it runs without RoPE. smollm2 has them before RoPE: it runs from q_norope and k_norope, and
 * its recorded q and k check rope.c. */
#include "attention_rig.h"

#include "model/safetensors.h"

#include <stdio.h>

struct golden {
    struct attention *a;
    struct attention_config config;
    struct rope *rope;
    struct team *team;
    float *q, *k, *v, *softmax_y, *hedgehog_y; /* [n][heads][D] */
    float *map_q, *map_k, *mix;
    int32_t *cache; /* [K][blocks][size] */
    int n, blocks;
};

static float *tensor(struct safetensors *st, const char *layer, const char *name,
                     int64_t *first_dim) {
    char full[100];
    snprintf(full, sizeof full, "%s.%s", layer, name);
    const struct st_tensor *t = safetensors_get(st, full);
    if (!t) fail_msg("no tensor %s", full);
    float *x = malloc((size_t)t->n_values * sizeof *x);
    assert_int_equal(st_decode(x, t, 0, t->n_values), OK);
    if (first_dim) *first_dim = t->dims[0];
    return x;
}

static struct safetensors *open_file(const char *pattern, const char *model) {
    char path[200], msg[300];
    snprintf(path, sizeof path, pattern, model);
    struct safetensors *st;
    if (safetensors_open(&st, path, msg, sizeof msg)) fail_msg("%s", msg);
    return st;
}

static void open_golden(struct golden *g, const char *folder, const char *model, int layer,
                        struct attention_config config, double rope_base) {
    *g = (struct golden){.config = config};
    struct safetensors *st = open_file("tests/data/golden/%s.safetensors", model);
    char values[40], weights[40], name[60], path[100];
    snprintf(path, sizeof path, "%s/%%s/hedgehog.safetensors", folder);
    struct safetensors *maps = open_file(path, model);
    snprintf(values, sizeof values, "layer%d", layer);
    snprintf(weights, sizeof weights, "layers.%d.attn", layer);
    int64_t n;
    g->q = tensor(st, values, rope_base > 0 ? "q_norope" : "q", &n);
    g->k = tensor(st, values, rope_base > 0 ? "k_norope" : "k", NULL);
    g->v = tensor(st, values, "v", NULL);
    g->softmax_y = tensor(st, values, "softmax_y", NULL);
    g->hedgehog_y = tensor(st, values, "hedgehog_y", NULL);
    g->map_q = tensor(maps, weights, "feature_map_q", NULL);
    g->map_k = tensor(maps, weights, "feature_map_k", NULL);
    g->mix = tensor(maps, weights, "log_mix", NULL);
    g->n = (int)n;
    snprintf(name, sizeof name, "%s.cache", values);
    const struct st_tensor *t = safetensors_get(st, name);
    g->blocks = (int)t->dims[1];
    g->cache = malloc(t->bytes);
    memcpy(g->cache, t->data, t->bytes);
    assert_int_equal(t->dims[2], config.cache_size);
    assert_int_equal(team_new(&g->team, 2), OK);
    struct rope_config rope = {.head_dim = config.head_dim, .base = rope_base};
    if (rope_base > 0) assert_int_equal(rope_new(&g->rope, &rope, NULL, 0), OK);
    struct attention_weights w = {.map_q = g->map_q, .map_k = g->map_k, .mix = g->mix};
    assert_int_equal(attention_new(&g->a, &g->config, &w, 1, g->rope, g->team, g->n, 1), OK);
    safetensors_close(st);
    safetensors_close(maps);
}

static void close_golden(struct golden *g) {
    attention_free(g->a);
    rope_free(g->rope);
    team_free(g->team);
    free(g->q), free(g->k), free(g->v), free(g->softmax_y), free(g->hedgehog_y);
    free(g->map_q), free(g->map_k), free(g->mix), free(g->cache);
}

static void open_stories(struct golden *g) {
    open_golden(g, "models", "stories260k-hedgehog", 2,
                (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                          .n_heads = 8,
                                          .n_kv_heads = 4,
                                          .head_dim = 8,
                                          .kv_type = KV_FP32,
                                          .map = MAP_EXP,
                                          .features = 8,
                                          .window = WINDOW_TERRACED,
                                          .window_size = 32,
                                          .sinks = 1,
                                          .cache_size = 16,
                                          .mixing = MIXING_UNIFIED},
                0);
}

static void open_smollm2(struct golden *g) {
    open_golden(g, "tests/data/models", "smollm2-135m-study", 12,
                (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                          .n_heads = 9,
                                          .n_kv_heads = 3,
                                          .head_dim = 64,
                                          .kv_type = KV_FP32,
                                          .map = MAP_EXP,
                                          .features = 64,
                                          .window = WINDOW_TERRACED,
                                          .window_size = 64,
                                          .sinks = 1,
                                          .cache_size = 128,
                                          .cache_recent = 32,
                                          .cache_age = 512,
                                          .horizon = 1024,
                                          .mixing = MIXING_UNIFIED,
                                          .map_before_rope = true,
                                          .max_distance = 4096},
                100000);
}

static void read_rows(struct attention *a, const struct golden *g, void *slot, int from, int to,
                      float *y) {
    size_t q_row = (size_t)g->config.n_heads * g->config.head_dim,
           k_row = (size_t)g->config.n_kv_heads * g->config.head_dim;
    struct attention_run run = {.slot = slot, .n_rows = to - from};
    attention_step_begin(a, &run, 1);
    attention_layer(a, 0, y + from * q_row, q_row, g->q + from * q_row, q_row, g->k + from * k_row,
                    k_row, g->v + from * k_row, k_row);
    attention_step_end(a);
}

/* The golden sets of blocks 0 .. n_blocks - 1 as attention_impose_cache takes them. */
static int64_t *sets_before(const struct golden *g, int n_blocks) {
    int size = g->config.cache_size;
    int64_t *sets = malloc((size_t)g->config.n_kv_heads * n_blocks * size * sizeof *sets + 1);
    for (int kv = 0; kv < g->config.n_kv_heads; kv++)
        for (int i = 0; i < n_blocks * size; i++)
            sets[kv * n_blocks * size + i] = g->cache[kv * g->blocks * size + i];
    return sets;
}

static double score_of(int64_t key, const int64_t *position, const float *error, int n, bool aged,
                       int64_t start, int age) {
    for (int j = 0; j < n; j++)
        if (position[j] == key)
            return aged ? error[j] / (1 + (double)(start - key) / age) : error[j];
    return NAN;
}

/* Keys in one set and not in the other must pair up with scores within 1e-4 of each other, by error
 * or by aged error. */
static void compare_sets(const struct golden *g, int kv, int b, const int64_t *mine, int n_mine,
                         const int64_t *position, const float *error, int n) {
    int size = g->config.cache_size;
    const int32_t *want = g->cache + (kv * g->blocks + b) * size;
    int64_t extra[256], missing[256];
    int n_extra = 0, n_missing = 0, n_want = 0;
    for (int i = 0; i < n_mine; i++) {
        bool found = false;
        for (int j = 0; j < size; j++)
            found |= want[j] == mine[i];
        if (!found) extra[n_extra++] = mine[i];
    }
    for (int j = 0; j < size; j++) {
        bool found = want[j] < 0;
        n_want += want[j] >= 0;
        for (int i = 0; i < n_mine; i++)
            found |= want[j] == mine[i];
        if (!found) missing[n_missing++] = want[j];
    }
    assert_int_equal(n_mine, n_want);
    for (int i = 0; i < n_extra; i++) {
        bool pairs = false;
        for (int j = 0; j < n_missing; j++)
            for (int aged = 0; aged <= (g->config.cache_recent > 0); aged++) {
                double x = score_of(extra[i], position, error, n, aged,
                                    (int64_t)b * g->config.window_size, g->config.cache_age);
                double z = score_of(missing[j], position, error, n, aged,
                                    (int64_t)b * g->config.window_size, g->config.cache_age);
                pairs |= fabs(x - z) <= 1e-4 * fmax(x, z);
            }
        if (!pairs)
            fail_msg("block %d, kv head %d: key %d chosen, golden has another of %d", b, kv,
                     (int)extra[i], n_missing);
    }
}

static void check_choice(struct golden *g) {
    int w = g->config.window_size, size = g->config.cache_size;
    void *slot = aligned_alloc(64, attention_slot_bytes(g->a));
    float *y = malloc((size_t)g->n * g->config.n_heads * g->config.head_dim * sizeof *y);
    int64_t position[512], mine[256];
    float error[512];
    int compared = 0;
    for (int b = 2; b < g->blocks && b * w < g->n; b++) {
        int64_t *sets = sets_before(g, b);
        attention_impose_cache(g->a, sets, b);
        attention_slot_clear(g->a, slot);
        read_rows(g->a, g, slot, 0, b * w, y);
        void *before = aligned_alloc(64, attention_slot_bytes(g->a));
        attention_slot_copy(g->a, before, slot);
        read_rows(g->a, g, slot, b * w, b * w + 1, y);
        for (int kv = 0; kv < g->config.n_kv_heads; kv++) {
            int n = attention_cache_scores(g->a, before, 0, kv, position, error);
            int n_mine = attention_cache_positions(g->a, slot, 0, kv, mine);
            compare_sets(g, kv, b, mine, n_mine, position, error, n);
            compared += n > size;
        }
        attention_impose_cache(g->a, NULL, 0);
        free(sets), free(before);
    }
    assert_true(compared >= 6 * g->config.n_kv_heads); /* the rule had to choose in most blocks */
    free(slot), free(y);
}

static double largest_difference(const float *a, const float *b, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double off = fabs((double)a[i] - b[i]);
        if (!(off <= worst)) worst = off;
    }
    return worst;
}

/* Both sides are fp32.  A logit of size up to 20 (before the shift) that is a sum of 64 products
 * errs by a few 2^-24 * 20 in each, rounding errors being independent: 4e-6 relative in a weight,
 * and in y as |v| is about 1.  2.6e-6 is seen. */
static const double TOLERANCE = 1e-5;

static void check_outputs(struct golden *g) {
    size_t n = (size_t)g->n * g->config.n_heads * g->config.head_dim;
    void *slot = aligned_alloc(64, attention_slot_bytes(g->a));
    float *y = malloc(n * sizeof *y);
    fill_nan(y, n);
    int64_t *sets = sets_before(g, g->blocks);
    attention_impose_cache(g->a, sets, g->blocks);
    attention_slot_clear(g->a, slot);
    read_rows(g->a, g, slot, 0, g->n, y);
    double off = largest_difference(y, g->hedgehog_y, n);
    print_message("hedgehog_y: largest difference %.2g\n", off);
    if (!(off <= TOLERANCE)) fail_msg("hedgehog_y: off by %g", off);
    free(sets), free(slot);

    struct attention_config c = {.kind = ATTENTION_SOFTMAX,
                                 .n_heads = g->config.n_heads,
                                 .n_kv_heads = g->config.n_kv_heads,
                                 .head_dim = g->config.head_dim,
                                 .kv_type = KV_FP32,
                                 .max_seq_len = g->n};
    struct attention *softmax;
    assert_int_equal(attention_new(&softmax, &c, NULL, 1, g->rope, g->team, g->n, 1), OK);
    slot = aligned_alloc(64, attention_slot_bytes(softmax));
    attention_slot_clear(softmax, slot);
    fill_nan(y, n);
    read_rows(softmax, g, slot, 0, g->n, y);
    off = largest_difference(y, g->softmax_y, n);
    print_message("softmax_y: largest difference %.2g\n", off);
    if (!(off <= TOLERANCE)) fail_msg("softmax_y: off by %g", off);
    attention_free(softmax);
    free(slot), free(y);
}

static void test_stories_cache_holds_the_golden_keys(void **state) {
    (void)state;
    struct golden g;
    open_stories(&g);
    check_choice(&g);
    close_golden(&g);
}
static void test_stories_outputs_are_the_golden_ones(void **state) {
    (void)state;
    struct golden g;
    open_stories(&g);
    check_outputs(&g);
    close_golden(&g);
}
static void test_smollm2_cache_holds_the_golden_keys(void **state) {
    (void)state;
    struct golden g;
    open_smollm2(&g);
    check_choice(&g);
    close_golden(&g);
}
static void test_smollm2_outputs_are_the_golden_ones(void **state) {
    (void)state;
    struct golden g;
    open_smollm2(&g);
    check_outputs(&g);
    close_golden(&g);
}

/* PyTorch's angles are fp32: at position 639 off by 639 * 2^-24 rad = 4e-5, times |k| up to
 * about 30. */
static void test_smollm2_keys_rotate_to_the_golden_ones(void **state) {
    (void)state;
    struct golden g;
    open_smollm2(&g);
    struct safetensors *st = open_file("tests/data/golden/%s.safetensors", "smollm2-135m-study");
    float *turned = tensor(st, "layer12", "k", NULL), cosines[32], sines[32], x[64];
    for (int n = 0; n < g.n; n++)
        for (int kv = 0; kv < 3; kv++) {
            rope_angles(g.rope, n, cosines, sines);
            rope_rotate(x, g.k + (n * 3 + kv) * 64, cosines, sines, 64);
            assert_true(largest_difference(x, turned + (n * 3 + kv) * 64, 64) <= 1.2e-3);
        }
    free(turned);
    safetensors_close(st);
    close_golden(&g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stories_cache_holds_the_golden_keys),
        cmocka_unit_test(test_stories_outputs_are_the_golden_ones),
        cmocka_unit_test(test_smollm2_cache_holds_the_golden_keys),
        cmocka_unit_test(test_smollm2_outputs_are_the_golden_ones),
        cmocka_unit_test(test_smollm2_keys_rotate_to_the_golden_ones),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
