/* test_gpu_attention.c - attention on a device is the CPU's, for every kind, map, mixing, window
 * and position rule; in exact mode but for the order of sums. */
#include "tests/gpu/attention_device.h"
#include "tests/gpu/orders.h"

#include <stdio.h>

static struct gpu *gpu;

enum { N = 75, PROMPT = 43 };

static void describe(char *what, size_t len, struct attention_config c) {
    snprintf(what, len,
             "kind %d map %d f %d per-query-key-map %d window %d/%d sinks %d cache %d/%d retrieval "
             "%d/%d mixing %d "
             "before-rope %d far %d horizon %d H %d K %d D %d kv %d",
             c.kind, c.map, c.features, c.key_map_per_query_head, c.window, c.window_size, c.sinks,
             c.cache_size, c.cache_recent, c.retrieval_size, c.retrieval_recent, c.mixing,
             c.map_before_rope, (int)c.max_distance, (int)c.horizon, c.n_heads, c.n_kv_heads,
             c.head_dim, c.kv_type);
}

/* A prompt in two pieces, then generated rows beside padding, against the CPU's. */
static float check_cut(struct attention_config config, double rope_base, bool bias, int n,
                       int prompt, int cut) {
    struct rig g;
    struct device d;
    char what[300];
    describe(what, sizeof what, config);
    rig_open(&g, config, rope_base, n, 1, bias);
    device_open(&d, gpu, &g, true);
    void *slot = slot_open(&g);
    float *want = rows_open(&g), *got = rows_open(&g);
    rig_read(&g, slot, 0, prompt, want);
    for (int at = 0; at < prompt;) {
        int most = at == 0 ? cut : MOST_ROWS - 2;
        struct piece p = {1, 0, at, at + most < prompt ? at + most : prompt, got};
        read_prompts(&d, &p, 1, 1);
        at = p.to;
    }
    assert_same_caches(&d, 1, slot);
    for (int i = prompt; i < n; i++) {
        rig_read(&g, slot, i, i + 1, want);
        struct piece p[] = {{-1, 0, 0, 0, NULL}, {1, 0, i, i + 1, got}};
        read_generated(&d, p, 2, 4);
    }
    assert_same_caches(&d, 1, slot);
    assert_int_equal(gpu_attention_slot_position(d.a, 1), n);
    float off = farthest(&g, want, got, n);
    if (!(off <= device_tolerance(&g)))
        fail_msg("%s: off by %g, at most %g allowed", what, (double)off,
                 (double)device_tolerance(&g));
    free(slot), free(want), free(got);
    device_close(&d);
    rig_close(&g);
    return off / device_tolerance(&g);
}

static float most_used; /* of the tolerance */
static void check(struct attention_config config, double rope_base, bool bias) {
    most_used = fmaxf(most_used, check_cut(config, rope_base, bias, N, PROMPT, 19));
}
static int report(void **state) {
    (void)state;
    print_message("at most %.3f of the tolerance was needed\n", (double)most_used);
    return 0;
}

/* ---- tests ---- */

static void test_every_map_window_and_mixing_is_the_cpus(void **state) {
    (void)state;
    for (int map = MAP_EXP; map <= MAP_JOINT_SOFTMAX; map++)
        for (int window = WINDOW_NONE; window <= WINDOW_TERRACED; window++)
            for (int mixing = MIXING_UNIFIED; mixing <= MIXING_LOLCATS; mixing++)
                for (int per_query = 0; per_query < 2; per_query++) {
                    struct attention_config c = base_config();
                    c.map = map;
                    with_window(&c, window);
                    c.mixing = mixing;
                    c.key_map_per_query_head = per_query;
                    c.map_before_rope = (map + mixing + per_query) % 2;
                    c.kv_type = (map + window + per_query) % 2 ? KV_BF16 : KV_FP32;
                    if (!c.map_before_rope) c.max_distance = 0;
                    check(c, 100, map == MAP_JOINT_SOFTMAX);
                }
}

static void test_every_position_rule_and_key_type_is_the_cpus(void **state) {
    (void)state;
    for (int window = WINDOW_NONE; window <= WINDOW_TERRACED; window++)
        for (int kv = KV_FP32; kv <= KV_BF16; kv++)
            for (int rope = 0; rope < 3; rope++) { /* none at all, before maps, after them */
                struct attention_config c = base_config();
                with_window(&c, window);
                c.kv_type = kv;
                c.map_before_rope = rope < 2;
                if (rope == 2) c.max_distance = 0;
                check(c, rope ? 100 : 0, false);
            }
}

/* Retrieval heads have more places than the others, fewer, so many that they never fold. */
static void test_retrieval_heads_are_the_cpus(void **state) {
    (void)state;
    static const int sizes[][4] = {{6, 2, 15, 4}, {6, 0, 15, 15}, {12, 5, 2, 0},
                                   {6, 2, 80, 9}, {0, 0, 11, 3},  {80, 2, 5, 1}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int per_query = 0; per_query < 2; per_query++) {
            struct attention_config c = base_config();
            c.cache_size = sizes[i][0], c.cache_recent = sizes[i][1];
            c.retrieval_size = sizes[i][2], c.retrieval_recent = sizes[i][3];
            c.key_map_per_query_head = per_query;
            c.map_before_rope = (i + (size_t)per_query) % 3 > 0;
            c.kv_type = (i + (size_t)per_query) % 2 ? KV_BF16 : KV_FP32;
            c.mixing = i % 2 ? MIXING_LOLCATS : MIXING_UNIFIED;
            if (!c.map_before_rope) c.max_distance = 0;
            check(c, 100, i == 1);
            c.horizon = 0, c.n_kv_heads = 4, c.window_size = 5, c.sinks = 3;
            check(c, 100, false);
        }
}

static void test_softmax_is_the_cpus(void **state) {
    (void)state;
    for (int kv = KV_FP32; kv <= KV_BF16; kv++)
        for (int rope = 0; rope < 2; rope++) {
            struct attention_config c = softmax_config();
            c.kv_type = kv;
            check(c, rope ? 100 : 0, false);
        }
}

static void test_odd_sizes_are_the_cpus(void **state) {
    (void)state;
    struct attention_config c = base_config();
    c.n_heads = 3, c.n_kv_heads = 1, c.head_dim = 10, c.features = 7;
    c.window_size = 5, c.sinks = 3, c.cache_size = 11, c.cache_recent = 11, c.max_distance = 9;
    check(c, 100, true);
    c.key_map_per_query_head = true, c.sinks = 5, c.cache_recent = 0, c.kv_type = KV_BF16;
    check(c, 100, false);
    c.sinks = 0, c.cache_size = c.cache_recent = 0, c.horizon = 0; /* nothing is chosen */
    check(c, 100, false);
    c.cache_size = 200; /* never full: nothing is folded */
    check(c, 100, false);
    c = base_config();
    c.window_size = 1, c.sinks = 1, c.head_dim = 22, c.features = 40;
    check(c, 100, false);
    with_window(&c, WINDOW_SLIDING);
    check(c, 100, true);
    c.window_size = 7, c.sinks = 4, c.head_dim = 10, c.n_heads = 5, c.n_kv_heads = 5;
    check(c, 100, false);
    c = softmax_config();
    c.n_heads = c.n_kv_heads = 1, c.head_dim = 7; /* odd: no RoPE */
    check(c, 0, false);
}

static void test_big_heads_are_the_cpus(void **state) {
    (void)state;
    struct attention_config c = base_config();
    c.n_heads = 2, c.n_kv_heads = 1, c.head_dim = 64, c.features = 64, c.kv_type = KV_BF16;
    c.window_size = 16, c.cache_size = 20;
    most_used = fmaxf(most_used, check_cut(c, 10000, false, 66, 57, 33));
    c.head_dim = 128, c.features = 128, c.key_map_per_query_head = true;
    most_used = fmaxf(most_used, check_cut(c, 10000, false, 60, 50, 16));
    c = softmax_config();
    c.head_dim = 128, c.n_heads = 2, c.n_kv_heads = 1, c.kv_type = KV_BF16;
    most_used = fmaxf(most_used, check_cut(c, 10000, false, 40, 30, 16));
}

/* Prompts may end anywhere, and begin with what was left of a block. */
static void test_any_prompt_and_cut_is_the_cpus(void **state) {
    (void)state;
    static const int prompts[][2] = {{1, 1},   {7, 7},   {8, 8},   {9, 8},   {16, 1}, {17, 16},
                                     {17, 17}, {24, 16}, {25, 23}, {62, 62}, {48, 24}};
    for (size_t i = 0; i < sizeof prompts / sizeof *prompts; i++)
        most_used = fmaxf(most_used, check_cut(base_config(), 100, false, prompts[i][0] + 18,
                                               prompts[i][0], prompts[i][1]));
}

/* Planes of 16 bits read alone: |S - hi| <= 2^-9 |S|, and |S_fd| <= z_f because |v| <= 1, so y, a
 * weighted mean, moves by at most 2^-9. */
static void test_without_exact_only_the_state_is_rounded(void **state) {
    (void)state;
    struct attention_config c = base_config();
    struct rig g;
    struct device d;
    rig_open(&g, c, 100, N, 1, false);
    float *y[2];
    for (int exact = 0; exact < 2; exact++) {
        y[exact] = rows_open(&g);
        device_open(&d, gpu, &g, exact);
        device_prompt(&d, 0, 0, 0, PROMPT, 30, y[exact]);
        device_generate(&d, 0, 0, PROMPT, N, y[exact]);
        device_close(&d);
    }
    float off = farthest(&g, y[0], y[1], N);
    print_message("planes of 16 bits: off by %.1e\n", (double)off);
    assert_true(off > 0 && off <= 0x1p-9f + device_tolerance(&g));
    free(y[0]), free(y[1]);
    rig_close(&g);
}

/* The shapes that have kernels of their own: queries, weights and features are rounded to bf16, by
 * 2^-9 at most, S likewise.  A logit is a sum of D terms of |q| |k| <= 4 over sqrt(D), rounded with
 * either sign: by 2^-9 4 or so; a feature's exponent is not rounded.  Weights are off by that, and
 * y by twice that at most, for numerator and denominator; 2^-9 three times for what is rounded
 * after. (A wrong key is off by ten times as much.) */
static void test_fast_shapes_are_the_cpus_but_for_rounding(void **state) {
    (void)state;
    for (int sort = 0; sort < 6; sort++) {
        struct attention_config c = base_config();
        c.n_heads = 6, c.n_kv_heads = 2, c.head_dim = 64, c.features = 64, c.kv_type = KV_BF16;
        c.window_size = 16, c.cache_size = 20, c.max_distance = 40;
        if (sort == 1) c.mixing = MIXING_LOLCATS, c.map = MAP_SOFTMAX2;
        if (sort == 2)
            c.key_map_per_query_head = true, c.map_before_rope = false, c.max_distance = 0;
        if (sort == 3) {
            c = softmax_config();
            c.head_dim = 128, c.n_heads = 4, c.kv_type = KV_BF16;
        }
        if (sort == 4) c.retrieval_size = 33, c.retrieval_recent = 7;
        if (sort == 5) c.retrieval_size = 3, c.mixing = MIXING_LOLCATS;
        struct rig g;
        struct device d;
        rig_open(&g, c, 100, N, 1, false);
        device_open(&d, gpu, &g, false);
        void *slot = slot_open(&g);
        float *want = rows_open(&g), *got = rows_open(&g), *again = rows_open(&g);
        rig_read(&g, slot, 0, N, want);
        device_prompt(&d, 2, 0, 0, PROMPT, PROMPT, got);
        device_generate(&d, 2, 0, PROMPT, N, got);
        assert_same_caches(&d, 2, slot);
        float off = farthest(&g, want, got, N), most = 2 * 4 * 0x1p-9f + 3 * 0x1p-9f;
        print_message("fast shape %d: off by %.1e of %.1e\n", sort, (double)off, (double)most);
        assert_true(off <= most);
        device_prompt(&d, 1, 0, 0, PROMPT, 9, again);
        device_generate(&d, 1, 0, PROMPT, N, again);
        assert_true(same_bits(&g, got, again)); /* however it was cut */
        free(slot), free(want), free(got), free(again);
        device_close(&d);
        rig_close(&g);
    }
}

int main(void) {
    char msg[256];
    if (gpu_open(&gpu, msg, sizeof msg)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_map_window_and_mixing_is_the_cpus),
        cmocka_unit_test(test_every_position_rule_and_key_type_is_the_cpus),
        cmocka_unit_test(test_retrieval_heads_are_the_cpus),
        cmocka_unit_test(test_softmax_is_the_cpus),
        cmocka_unit_test(test_odd_sizes_are_the_cpus),
        cmocka_unit_test(test_big_heads_are_the_cpus),
        cmocka_unit_test(test_any_prompt_and_cut_is_the_cpus),
        cmocka_unit_test(test_without_exact_only_the_state_is_rounded),
        cmocka_unit_test(test_fast_shapes_are_the_cpus_but_for_rounding),
    };
    int failed = run_in_both_orders(tests, sizeof tests / sizeof *tests, 1, report);
    gpu_close(gpu);
    return failed;
}
