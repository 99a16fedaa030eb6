/* test_attention.c - attention is the formula of attention.h: recurrent = chunked = quadratic, for
 * every kind, map, mixing, window and position rule; and settings that make no sense are refused.
 */
#include "attention_rig.h"

#include "compute/cpu.h"

#include <stdio.h>

enum { N = 101 };

/* Each exponent is a sum of at most D + 1 terms whose absolute values add to at most `steepness`,
 * so its fp32 error is within (D + 1) 2^-24 steepness; three exponents meet in a linear weight
 * (u_q, u_k, logits).  Weights are positive and |v| <= 1, so relative errors of weights are errors
 * of y, in numerator and denominator: factor 2.  Sums of N keys, E entries and F features add 2^-24
 * for each term; exp and the division a few. */
static double tolerance(const struct rig *g, double steepness) {
    const struct attention_config *c = &g->config;
    double terms = g->n + 2 * c->features + attention_cache_most(c) + 2 * c->window_size + 32;
    return 2 * 0x1p-24 * (3 * (c->head_dim + 1) * steepness + terms);
}

static void compare(const struct rig *g, const float *y, const int64_t *sets, double rope_base,
                    bool linear, const char *what) {
    size_t rows = (size_t)g->n * row_floats(g);
    int w = g->config.window_size, blocks = w ? (g->n + w - 1) / w : 0;
    double *want = malloc(rows * sizeof *want), steepness;
    for (int i = 0; i < RIG_LAYERS; i++) {
        reference_rows(g, i,
                       sets + (size_t)i * g->config.n_kv_heads * blocks *
                                  attention_cache_most(&g->config),
                       rope_base, linear, want, &steepness);
        double worst = 0, most = tolerance(g, steepness);
        for (size_t e = 0; e < rows; e++) {
            double off = fabs(y[i * rows + e] - want[e]);
            if (!(off <= worst)) worst = off; /* NaN is the worst */
        }
        if (!(worst <= most))
            fail_msg("%s, layer %d: off by %g, at most %g allowed", what, i, worst, most);
    }
    free(want);
}

/* Decode, one chunk, and chunks of 7 against the quadratic form.  Maps of queries and of keys are
 * multiplied by steep. */
static void check_steep(struct attention_config config, double rope_base, bool bias, bool linear,
                        float steep) {
    char what[300];
    snprintf(what, sizeof what,
             "kind %d map %d f %d per-query-key-map %d window %d/%d sinks %d cache %d/%d retrieval "
             "%d/%d mixing %d "
             "before-rope %d far %d "
             "horizon %d H %d K %d D %d kv %d base %g bias %d linear %d",
             config.kind, config.map, config.features, config.key_map_per_query_head, config.window,
             config.window_size, config.sinks, config.cache_size, config.cache_recent,
             config.retrieval_size, config.retrieval_recent, config.mixing, config.map_before_rope,
             (int)config.max_distance, (int)config.horizon, config.n_heads, config.n_kv_heads,
             config.head_dim, config.kv_type, rope_base, bias, linear);
    struct rig g;
    rig_open(&g, config, rope_base, N, 1, bias);
    attention_set_linear(g.a, linear);
    size_t map = (size_t)config.head_dim * config.features;
    for (int i = 0; i < RIG_LAYERS && steep != 1; i++) {
        for (size_t e = 0; e < config.n_heads * map; e++)
            ((float *)g.weights[i].map_q)[e] *= steep;
        for (size_t e = 0; e < state_heads(&config) * map; e++)
            ((float *)g.weights[i].map_k)[e] *= steep;
    }
    int blocks = config.window_size ? (N + config.window_size - 1) / config.window_size : 0;
    int64_t *sets =
        calloc((size_t)RIG_LAYERS * config.n_kv_heads * blocks * attention_cache_most(&config) + 1,
               sizeof *sets);
    void *slot = slot_open(&g);
    float *y = rows_open(&g), *chunked = rows_open(&g);
    rig_decode(&g, slot, y, sets);
    compare(&g, y, sets, rope_base, linear, what);
    attention_slot_clear(g.a, slot);
    for (int from = 0; from < N; from += 7)
        rig_read(&g, slot, from, from + 7 < N ? from + 7 : N, chunked);
    if (memcmp(y, chunked, RIG_LAYERS * N * row_floats(&g) * sizeof *y) != 0)
        fail_msg("%s: chunks of 7 differ from decode", what);
    attention_slot_clear(g.a, slot);
    rig_read(&g, slot, 0, N, chunked);
    if (memcmp(y, chunked, RIG_LAYERS * N * row_floats(&g) * sizeof *y) != 0)
        fail_msg("%s: one chunk differs from decode", what);
    free(sets), free(slot), free(y), free(chunked);
    rig_close(&g);
}

static void check(struct attention_config config, double rope_base, bool bias, bool linear) {
    check_steep(config, rope_base, bias, linear, 1);
}

static struct attention_config base_config(void) {
    return (struct attention_config){
        .kind = ATTENTION_HEDGEHOG,
        .n_heads = 4,
        .n_kv_heads = 2,
        .head_dim = 16,
        .kv_type = KV_FP32,
        .map = MAP_EXP,
        .features = 16,
        .window = WINDOW_TERRACED,
        .window_size = 8,
        .sinks = 1,
        .cache_size = 6,
        .cache_recent = 2,
        .cache_age = 20,
        .horizon = 32,
        .mixing = MIXING_UNIFIED,
        .map_before_rope = true,
        .max_distance = 24,
    };
}

static void with_window(struct attention_config *c, enum window_rule rule) {
    c->window = rule;
    if (rule != WINDOW_TERRACED) c->cache_size = c->cache_recent = c->cache_age = 0;
    if (rule == WINDOW_NONE) c->window_size = c->sinks = 0;
}

static void test_every_map_window_mixing_and_position_is_the_quadratic_form(void **state) {
    (void)state;
    for (int map = MAP_EXP; map <= MAP_JOINT_SOFTMAX; map++)
        for (int window = WINDOW_NONE; window <= WINDOW_TERRACED; window++)
            for (int mixing = MIXING_UNIFIED; mixing <= MIXING_LOLCATS; mixing++)
                for (int before = 0; before < 2; before++)
                    for (int per_query = 0; per_query < 2; per_query++)
                        for (int kv = KV_FP32; kv <= KV_BF16; kv++) {
                            struct attention_config c = base_config();
                            c.map = map;
                            with_window(&c, window);
                            c.mixing = mixing;
                            c.map_before_rope = before;
                            if (!before) c.max_distance = 0;
                            c.key_map_per_query_head = per_query;
                            c.kv_type = kv;
                            check(c, 100, map == MAP_JOINT_SOFTMAX, true);
                        }
}

static void test_odd_sizes_are_the_quadratic_form(void **state) {
    (void)state;
    static const struct {
        int H, K, D, f, w, sinks, cache, recent;
    } sizes[] = {
        {8, 4, 8, 8, 32, 1, 16, 0}, {9, 3, 64, 64, 16, 1, 20, 5}, {5, 5, 12, 9, 7, 3, 11, 11},
        {6, 1, 80, 21, 5, 5, 3, 1}, {20, 1, 4, 3, 9, 0, 0, 0},    {2, 1, 128, 40, 16, 16, 17, 4},
        {3, 3, 24, 1, 1, 1, 5, 2},  {4, 2, 6, 16, 3, 2, 40, 7},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int window = WINDOW_NONE; window <= WINDOW_TERRACED; window++)
            for (int kv = KV_FP32; kv <= KV_BF16; kv++) {
                struct attention_config c = base_config();
                c.n_heads = sizes[i].H, c.n_kv_heads = sizes[i].K, c.head_dim = sizes[i].D,
                c.features = sizes[i].f;
                c.window_size = sizes[i].w, c.sinks = sizes[i].sinks, c.cache_size = sizes[i].cache,
                c.cache_recent = sizes[i].recent;
                c.kv_type = kv;
                c.map = (enum feature_map)(i % 3);
                with_window(&c, window);
                check(c, 1000, i % 2, true);
            }
}

static void test_retrieval_heads_are_the_quadratic_form(void **state) {
    (void)state;
    static const struct {
        int cache, recent, retrieval, retrieval_recent, horizon;
    } sizes[] = {
        {6, 2, 20, 3, 32},  {20, 7, 3, 1, 32}, {6, 6, 200, 0, 0},
        {0, 0, 11, 11, 16}, {9, 0, 10, 0, 64},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int kv = KV_FP32; kv <= KV_BF16; kv++) {
            struct attention_config c = base_config();
            c.cache_size = sizes[i].cache, c.cache_recent = sizes[i].recent;
            c.retrieval_size = sizes[i].retrieval, c.retrieval_recent = sizes[i].retrieval_recent;
            c.horizon = sizes[i].horizon;
            c.kv_type = kv;
            c.key_map_per_query_head = i % 2;
            check(c, 100, false, true);
        }
}

static void test_distance_limits_of_every_size_are_the_quadratic_form(void **state) {
    (void)state;
    static const int far[] = {1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 90, 1000};
    for (size_t i = 0; i < sizeof far / sizeof *far; i++)
        for (int window = WINDOW_SLIDING; window <= WINDOW_TERRACED; window++) {
            struct attention_config c = base_config();
            c.max_distance = far[i];
            c.sinks = 3;
            with_window(&c, window);
            check(c, 50, false, true);
        }
}

static void test_horizons_of_every_size_are_the_quadratic_form(void **state) {
    (void)state;
    static const int horizon[] = {0, 1, 5, 8, 64, 80, 1000};
    for (size_t i = 0; i < sizeof horizon / sizeof *horizon; i++)
        for (int window = WINDOW_NONE; window <= WINDOW_TERRACED; window++) {
            struct attention_config c = base_config();
            c.horizon = horizon[i];
            with_window(&c, window);
            check(c, 100, false, true);
        }
}

static void test_no_rope_and_linear_off_are_the_quadratic_form(void **state) {
    (void)state;
    for (int mixing = MIXING_UNIFIED; mixing <= MIXING_LOLCATS; mixing++)
        for (int window = WINDOW_SLIDING; window <= WINDOW_TERRACED; window++)
            for (int kv = KV_FP32; kv <= KV_BF16; kv++) {
                struct attention_config c = base_config();
                c.mixing = mixing;
                c.kv_type = kv;
                with_window(&c, window);
                check(c, 100, false, false);
                c.max_distance = 0;
                check(c, 0, false, true);
            }
}

/* u up to some hundreds: e^u is no float, and keys are cut at 30. */
static void test_steep_maps_stay_finite_and_are_the_quadratic_form(void **state) {
    (void)state;
    for (int window = WINDOW_NONE; window <= WINDOW_TERRACED; window++)
        for (int mixing = MIXING_UNIFIED; mixing <= MIXING_LOLCATS; mixing++) {
            struct attention_config c = base_config();
            with_window(&c, window);
            c.mixing = mixing;
            check_steep(c, 100, false, true, 20);
        }
}

static void test_every_instruction_family_is_the_quadratic_form(void **state) {
    (void)state;
    enum cpu_isa best = cpu_isa();
    for (int isa = CPU_GENERIC; isa <= (int)best; isa++) {
        cpu_isa_limit((enum cpu_isa)isa);
        for (int kv = KV_FP32; kv <= KV_BF16; kv++)
            for (int map = MAP_EXP; map <= MAP_JOINT_SOFTMAX; map++) {
                struct attention_config c = base_config();
                c.n_heads = 6, c.head_dim = 36, c.features = 21;
                c.kv_type = (enum kv_type)kv;
                c.map = (enum feature_map)map;
                check(c, 100, true, true);
            }
    }
    cpu_isa_limit(best);
}

static void test_softmax_is_the_quadratic_form(void **state) {
    (void)state;
    static const struct {
        int H, K, D;
    } sizes[] = {{8, 4, 8}, {9, 3, 64}, {4, 4, 12}, {6, 1, 80}, {20, 1, 6}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int kv = KV_FP32; kv <= KV_BF16; kv++)
            for (int rope = 0; rope < 2; rope++) {
                struct attention_config c = {.kind = ATTENTION_SOFTMAX,
                                             .n_heads = sizes[i].H,
                                             .n_kv_heads = sizes[i].K,
                                             .head_dim = sizes[i].D,
                                             .kv_type = kv,
                                             .max_seq_len = N};
                check(c, rope ? 10000 : 0, false, true);
            }
}

static void test_settings_that_make_no_sense_are_refused_by_name(void **state) {
    (void)state;
    static const struct {
        size_t offset;
        int value;
        const char *name;
    } wrong[] = {
#define WRONG(field, value, name) {offsetof(struct attention_config, field), value, name}
        WRONG(kind, 7, "kind"),
        WRONG(n_heads, 0, "heads"),
        WRONG(n_heads, 5, "heads"),
        WRONG(n_kv_heads, 0, "heads"),
        WRONG(head_dim, 0, "head_dim"),
        WRONG(kv_type, 9, "type"),
        WRONG(map, 3, "map"),
        WRONG(features, 0, "features"),
        WRONG(window, 5, "window"),
        WRONG(window_size, 0, "window size"),
        WRONG(window_size, -3, "window size"),
        WRONG(sinks, 9, "sinks"),
        WRONG(sinks, -1, "sinks"),
        WRONG(cache_size, -1, "cache"),
        WRONG(retrieval_size, -1, "retrieval"),
        WRONG(retrieval_recent, 1, "retrieval"),
        WRONG(cache_recent, 7, "recent"),
        WRONG(cache_recent, -1, "recent"),
        WRONG(cache_age, 0, "age"),
        WRONG(cache_fact_age, -1, "fact age"),
        WRONG(mixing, 2, "mixing"),
    };
    char msg[200];
    struct attention_config c = base_config();
    assert_int_equal(attention_config_check(&c, msg, sizeof msg), OK);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        c = base_config();
        memcpy((char *)&c + wrong[i].offset, &wrong[i].value, sizeof wrong[i].value);
        assert_int_equal(attention_config_check(&c, msg, sizeof msg), ERR_FORMAT);
        if (!strstr(msg, wrong[i].name)) fail_msg("'%s' does not name %s", msg, wrong[i].name);
    }
    c = base_config();
    c.max_distance = -1;
    assert_int_equal(attention_config_check(&c, msg, sizeof msg), ERR_FORMAT);
    c = base_config();
    c.map_before_rope = false;
    assert_int_equal(attention_config_check(&c, msg, sizeof msg), ERR_FORMAT);
    assert_non_null(strstr(msg, "max_distance"));
    c = base_config();
    c.horizon = -1;
    assert_int_equal(attention_config_check(&c, msg, sizeof msg), ERR_FORMAT);
    c = base_config();
    c.window = WINDOW_SLIDING;
    assert_int_equal(attention_config_check(&c, msg, sizeof msg), ERR_FORMAT);
    assert_non_null(strstr(msg, "cache"));
    c = base_config();
    with_window(&c, WINDOW_NONE);
    c.sinks = 1;
    assert_int_equal(attention_config_check(&c, msg, sizeof msg), ERR_FORMAT);
    assert_non_null(strstr(msg, "sinks"));
    c = (struct attention_config){
        .kind = ATTENTION_SOFTMAX, .n_heads = 2, .n_kv_heads = 1, .head_dim = 8};
    assert_int_equal(attention_config_check(&c, msg, sizeof msg), ERR_FORMAT);
    assert_non_null(strstr(msg, "max_seq_len"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_map_window_mixing_and_position_is_the_quadratic_form),
        cmocka_unit_test(test_odd_sizes_are_the_quadratic_form),
        cmocka_unit_test(test_retrieval_heads_are_the_quadratic_form),
        cmocka_unit_test(test_distance_limits_of_every_size_are_the_quadratic_form),
        cmocka_unit_test(test_horizons_of_every_size_are_the_quadratic_form),
        cmocka_unit_test(test_no_rope_and_linear_off_are_the_quadratic_form),
        cmocka_unit_test(test_steep_maps_stay_finite_and_are_the_quadratic_form),
        cmocka_unit_test(test_every_instruction_family_is_the_quadratic_form),
        cmocka_unit_test(test_softmax_is_the_quadratic_form),
        cmocka_unit_test(test_settings_that_make_no_sense_are_refused_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
