/* test_attention_bits.c - the same request gives the same bits: however a prompt is cut, whatever
 * else is in the step, in whichever slot, with any number of threads, on AVX2 and AVX-512 alike. */
#include "attention_rig.h"

#include "attention/internal.h"
#include "compute/cpu.h"
#include "compute/team.h"

#include <stdio.h>

static struct attention_config tiny_none(enum kv_type kv) {
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .n_heads = 4,
                                     .n_kv_heads = 2,
                                     .head_dim = 16,
                                     .kv_type = kv,
                                     .map = MAP_EXP,
                                     .features = 16,
                                     .window = WINDOW_TERRACED,
                                     .window_size = 16,
                                     .sinks = 1,
                                     .cache_size = 16,
                                     .cache_recent = 4,
                                     .cache_age = 100,
                                     .cache_fact_age = 300,
                                     .horizon = 64,
                                     .mixing = MIXING_UNIFIED,
                                     .map_before_rope = true,
                                     .max_distance = 48};
}
static struct attention_config tiny_rope(enum kv_type kv) {
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .n_heads = 6,
                                     .n_kv_heads = 2,
                                     .head_dim = 12,
                                     .kv_type = kv,
                                     .map = MAP_SOFTMAX2,
                                     .features = 9,
                                     .window = WINDOW_TERRACED,
                                     .window_size = 32,
                                     .sinks = 2,
                                     .cache_size = 16,
                                     .mixing = MIXING_LOLCATS,
                                     .key_map_per_query_head = true};
}
static struct attention_config tiny_sliding(enum kv_type kv) {
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .n_heads = 4,
                                     .n_kv_heads = 2,
                                     .head_dim = 16,
                                     .kv_type = kv,
                                     .map = MAP_EXP,
                                     .features = 16,
                                     .window = WINDOW_SLIDING,
                                     .window_size = 19,
                                     .sinks = 2,
                                     .horizon = 64,
                                     .mixing = MIXING_UNIFIED,
                                     .map_before_rope = true,
                                     .max_distance = 48};
}
static struct attention_config tiny_linear(enum kv_type kv) {
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .n_heads = 4,
                                     .n_kv_heads = 2,
                                     .head_dim = 16,
                                     .kv_type = kv,
                                     .map = MAP_JOINT_SOFTMAX,
                                     .features = 16,
                                     .window = WINDOW_NONE,
                                     .mixing = MIXING_UNIFIED};
}
static struct attention_config tiny_softmax(enum kv_type kv) {
    return (struct attention_config){.kind = ATTENTION_SOFTMAX,
                                     .n_heads = 6,
                                     .n_kv_heads = 2,
                                     .head_dim = 20,
                                     .kv_type = kv,
                                     .max_seq_len = 300};
}
static struct attention_config (*const kinds[])(enum kv_type) = {tiny_none, tiny_rope, tiny_sliding,
                                                                 tiny_linear, tiny_softmax};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

static void expect_same(const struct rig *g, const float *a, const float *b, const char *what,
                        int at) {
    size_t row = row_floats(g), n = RIG_LAYERS * (size_t)g->n * row;
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, sizeof *a) != 0)
            fail_msg("%s %d: layer %d row %d element %d is %.9g, not %.9g", what, at,
                     (int)(i / row / g->n), (int)(i / row % g->n), (int)(i % row), b[i], a[i]);
}

static void check_cuts(struct attention_config config, int step) {
    enum { N = 300 };
    struct rig g;
    rig_open(&g, config, 100, N, 1, false);
    void *slot = slot_open(&g);
    float *whole = rows_open(&g), *cut = rows_open(&g);
    rig_read(&g, slot, 0, N, whole);
    for (int at = 1; at < N; at += step) {
        fill_nan(cut, RIG_LAYERS * N * row_floats(&g));
        attention_slot_clear(g.a, slot);
        rig_read(&g, slot, 0, at, cut);
        rig_read(&g, slot, at, N, cut);
        expect_same(&g, whole, cut, "cut at", at);
    }
    attention_slot_clear(g.a, slot);
    rig_decode(&g, slot, cut, NULL);
    expect_same(&g, whole, cut, "decode", 0);
    free(slot), free(whole), free(cut);
    rig_close(&g);
}

static void test_every_cut_of_300_tokens_maps_before_rope(void **state) {
    (void)state;
    check_cuts(tiny_none(KV_FP32), 1);
    check_cuts(tiny_none(KV_BF16), 1);
}
static void test_every_cut_of_300_tokens_maps_after_rope(void **state) {
    (void)state;
    check_cuts(tiny_rope(KV_FP32), 1);
    check_cuts(tiny_rope(KV_BF16), 1);
}
static void test_cuts_of_other_kinds(void **state) {
    (void)state;
    for (int i = 2; i < N_KINDS; i++)
        check_cuts(kinds[i](i % 2 ? KV_FP32 : KV_BF16), 17);
}

/* ---- batches ---- */

enum {
    SEQUENCES = 5,
    LENGTH = 90
}; /* sequence s reads tokens s LENGTH .. of the input, from position 0 */

/* One step in which sequence s reads from[s] .. to[s] - 1, rows in the order given, in one fused
 * buffer of q, k, v. */
static void nothing(void *arg, int thread, int n_threads) {
    (void)arg, (void)thread, (void)n_threads;
}

static void batch_step(const struct rig *g, void *const *slots, const int *order, const int *from,
                       const int *to, float *y) {
    size_t q = row_floats(g), kv = (size_t)g->config.n_kv_heads * g->config.head_dim,
           stride = q + 2 * kv + 5;
    struct attention_run runs[SEQUENCES];
    int n_runs = 0, rows = 0;
    for (int i = 0; i < SEQUENCES; i++) {
        int s = order[i];
        if (from[s] == to[s]) continue;
        runs[n_runs++] = (struct attention_run){slots[s], rows, to[s] - from[s]};
        rows += to[s] - from[s];
    }
    float *in = malloc((size_t)rows * stride * sizeof *in),
          *out = malloc((size_t)rows * (q + 3) * sizeof *out);
    attention_step_begin(g->a, runs, n_runs);
    for (int layer = 0; layer < RIG_LAYERS; layer++) {
        fill_nan(in, (size_t)rows * stride);
        fill_nan(out, (size_t)rows * (q + 3));
        int row = 0;
        for (int i = 0; i < SEQUENCES; i++)
            for (int t = from[order[i]]; t < to[order[i]]; t++, row++) {
                size_t token = (size_t)order[i] * LENGTH + t;
                float *at = in + (size_t)row * stride;
                memcpy(at, g->q[layer] + token * q, q * sizeof *at);
                memcpy(at + q, g->k[layer] + token * kv, kv * sizeof *at);
                memcpy(at + q + kv, g->v[layer] + token * kv, kv * sizeof *at);
            }
        attention_expect(g->a, layer);
        team_run(g->team, nothing, NULL);
        attention_layer(g->a, layer, out, q + 3, in, stride, in + q, stride, in + q + kv, stride);
        row = 0;
        for (int i = 0; i < SEQUENCES; i++)
            for (int t = from[order[i]]; t < to[order[i]]; t++, row++)
                memcpy(y + ((size_t)layer * g->n + (size_t)order[i] * LENGTH + t) * q,
                       out + (size_t)row * (q + 3), q * sizeof *y);
    }
    attention_step_end(g->a);
    free(in), free(out);
}

static void read_alone(const struct rig *g, void *slot, float *y) {
    static const int order[SEQUENCES] = {0, 1, 2, 3, 4};
    for (int s = 0; s < SEQUENCES; s++) {
        int from[SEQUENCES] = {0}, to[SEQUENCES] = {0};
        void *slots[SEQUENCES] = {[0] = NULL};
        slots[s] = slot;
        to[s] = LENGTH;
        attention_slot_clear(g->a, slot);
        batch_step(g, slots, order, from, to, y);
    }
}

/* All sequences together, each with rows of its own number in each step, in shuffled order. */
static void read_together(const struct rig *g, void *const *slots, uint64_t seed, float *y) {
    int from[SEQUENCES] = {0}, to[SEQUENCES], order[SEQUENCES] = {0, 1, 2, 3, 4},
        left = SEQUENCES * LENGTH;
    while (left > 0) {
        for (int s = 0; s < SEQUENCES; s++) {
            int other = (int)uniform(&seed, 0, SEQUENCES), swap = order[s],
                most = (int)uniform(&seed, 0, 4) * (int)uniform(&seed, 0, 14);
            order[s] = order[other];
            order[other] = swap;
            to[s] = from[s] + (most ? most : 1) < LENGTH ? from[s] + (most ? most : 1) : LENGTH;
            left -= to[s] - from[s];
        }
        batch_step(g, slots, order, from, to, y);
        memcpy(from, to, sizeof from);
    }
}

static void test_neighbours_slots_and_threads_change_no_bit(void **state) {
    (void)state;
    for (int kind = 0; kind < N_KINDS; kind++) {
        struct rig g;
        rig_open(&g, kinds[kind](KV_BF16), 100, SEQUENCES * LENGTH, 1, false);
        void *slot = slot_open(&g);
        float *alone = rows_open(&g);
        read_alone(&g, slot, alone);
        rig_close(&g);
        static const int team[] = {1, 2, 3, 12}; /* 12: also one question a head */
        for (size_t t = 0; t < sizeof team / sizeof *team; t++) {
            int threads = team[t];
            rig_open(&g, kinds[kind](KV_BF16), 100, SEQUENCES * LENGTH, threads, false);
            float *together = rows_open(&g);
            void *slots[SEQUENCES];
            for (int s = 0; s < SEQUENCES; s++)
                slots[s] = slot_open(&g);
            for (int round = 0; round < 2;
                 round++) { /* the second in slots that others have used */
                for (int s = 0; s < SEQUENCES; s++)
                    attention_slot_clear(g.a, slots[s]);
                void *first = slots[0];
                memmove(slots, slots + 1, (SEQUENCES - 1) * sizeof *slots);
                slots[SEQUENCES - 1] = first;
                read_together(&g, slots, (uint64_t)(threads * 7 + round), together);
                expect_same(&g, alone, together, "kind and threads", kind * 10 + threads);
            }
            for (int s = 0; s < SEQUENCES; s++)
                free(slots[s]);
            free(together);
            rig_close(&g);
        }
        free(slot), free(alone);
    }
}

/* ---- what is loaded ahead ---- */

static bool holds(const struct ahead *ahead, const void *at, size_t bytes) {
    for (int i = 0; i < ahead->n; i++)
        if ((const char *)at >= ahead->range[i].at &&
            (const char *)at + bytes <= ahead->range[i].end)
            return true;
    return bytes == 0;
}

static bool lies_in(struct range r, const void *at, size_t bytes) {
    return r.at >= (const char *)at && r.at <= r.end && r.end <= (const char *)at + bytes;
}

/* Ranges are loaded, so they must lie inside: all of them in the slot, where other kv heads are,
 * but for the maps.  And they hold what the row's answer reads. */
static void check_ahead(const struct rig *g, const void *slot, int layer, int kv_head,
                        int64_t position) {
    const struct attention *a = g->a;
    struct segment s = {.run = 0, .n_rows = 1, .position = position};
    struct ahead ahead = memory_ahead(a, &s, layer, kv_head);
    struct memory m = memory_of(a, slot, layer, kv_head);
    size_t map = (size_t)a->group * a->shape.head_dim * a->shape.f_lanes,
           element = a->config.kv_type == KV_BF16 ? 2 : 4, row = a->shape.lanes * element,
           tile = (size_t)TILE * a->shape.head_dim * element;
    const float *maps = a->weights[layer].map_q + kv_head * map;
    assert_in_range(ahead.n, 1, MAX_AHEAD);
    for (int i = 0; i < ahead.n; i++)
        assert_true(lies_in(ahead.range[i], slot, attention_slot_bytes(a)) ||
                    lies_in(ahead.range[i], maps, map * sizeof *maps));
    if (memory_folded(a, m.room, position) > 0) {
        size_t states = (size_t)a->state_heads * a->layout.state_floats * sizeof *m.state;
        /* where a block begins the one made ahead takes the state's place, if there is one */
        assert_true(holds(&ahead, m.state, states) ||
                    (position % a->config.window_size == 0 && holds(&ahead, m.next, states)));
        assert_true(holds(&ahead, maps, map * sizeof *maps));
    }
    if (position % a->config.window_size == 0) return; /* places are about to change */
    struct span spans[MAX_SPANS];
    int growing, n = answer_spans(a, &m, position, spans, &growing);
    for (int k = 0; k < n; k++) {
        size_t first = (size_t)spans[k].first, end = first + (size_t)spans[k].count;
        assert_true(holds(&ahead, (char *)m.values + first * row, (end - first) * row));
        for (size_t t = first / TILE; t < (end + TILE - 1) / TILE; t++)
            assert_true(holds(&ahead, (char *)m.turned + t * tile, tile));
    }
}

static void test_what_is_loaded_ahead_lies_inside_and_holds_what_is_read(void **state) {
    (void)state;
    enum { N = 150 };
    for (int kind = 0; kind < N_KINDS; kind++) {
        struct rig g;
        rig_open(&g, kinds[kind](kind % 2 ? KV_FP32 : KV_BF16), 100, N, 1, false);
        void *slot = slot_open(&g);
        float *y = rows_open(&g);
        for (int n = 0; g.config.window == WINDOW_TERRACED && n < N; n++) {
            rig_read(&g, slot, n, n + 1, y);
            attention_step_begin(g.a, &(struct attention_run){.slot = slot, .n_rows = 1}, 1);
            for (int layer = 0; layer < RIG_LAYERS; layer++)
                for (int kv_head = 0; kv_head < g.config.n_kv_heads; kv_head++)
                    check_ahead(&g, slot, layer, kv_head, n + 1);
        }
        free(slot), free(y);
        rig_close(&g);
    }
}

static void test_avx2_and_avx512_give_the_same_bits(void **state) {
    (void)state;
    if (cpu_isa() != CPU_AVX512 && cpu_isa() != CPU_AMX) skip();
    for (int kind = 0; kind < N_KINDS; kind++) {
        float *y[2];
        struct rig g;
        for (int i = 0; i < 2; i++) {
            cpu_isa_limit(i ? CPU_AVX512 : CPU_AVX2);
            rig_open(&g, kinds[kind](KV_BF16), 100, 200, 2, false);
            void *slot = slot_open(&g);
            y[i] = rows_open(&g);
            rig_read(&g, slot, 0, 200, y[i]);
            free(slot);
            if (i) expect_same(&g, y[0], y[1], "kind", kind);
            rig_close(&g);
        }
        free(y[0]), free(y[1]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_cut_of_300_tokens_maps_before_rope),
        cmocka_unit_test(test_every_cut_of_300_tokens_maps_after_rope),
        cmocka_unit_test(test_cuts_of_other_kinds),
        cmocka_unit_test(test_neighbours_slots_and_threads_change_no_bit),
        cmocka_unit_test(test_what_is_loaded_ahead_lies_inside_and_holds_what_is_read),
        cmocka_unit_test(test_avx2_and_avx512_give_the_same_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
