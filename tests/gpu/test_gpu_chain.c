/* test_gpu_chain.c - blocks that begin, by tensor cores: what is folded, how badly candidates are
 * recalled and which of them stay, block by block from the same state as the CPU and the exact
 * kernels. */
#include "tests/gpu/attention_device.h"
#include "tests/gpu/orders.h"

static struct gpu *gpu;

enum { MOST = 256, LAST = RIG_LAYERS - 1 }; /* candidates; the layer whose errors lie there yet */

/* ---- shapes ---- */

/* Sizes are odd where they may be: windows and caches that fill no tile, F = 96 and its last half
 * chunk. */
enum { SHAPES = 6, RETRIEVAL = 3, LARGE = 4, DEFAULT = 5 };
static struct attention_config shape_config(int shape) {
    struct attention_config c = base_config();
    c.n_heads = c.n_kv_heads = 1, c.head_dim = 64, c.features = 64, c.kv_type = KV_BF16;
    c.window_size = 16, c.sinks = 3, c.cache_size = 40, c.cache_recent = 9, c.horizon = 60;
    if (shape == 1) c.head_dim = c.features = 128, c.cache_size = 21, c.cache_recent = 21;
    if (shape == 2) {
        c.n_heads = 4, c.n_kv_heads = 2, c.key_map_per_query_head = true;
        c.features = 48, c.window_size = 24, c.cache_size = 9,
        c.cache_recent = c.cache_fact_age = 0, c.horizon = 0;
    }
    if (shape == RETRIEVAL)
        c.n_heads = 4, c.n_kv_heads = 2, c.cache_size = 13, c.cache_recent = 4,
        c.retrieval_size = 45, c.retrieval_recent = 20;
    if (shape == LARGE) /* more candidates than tensor cores take, of retrieval heads alone */
        c.n_heads = c.n_kv_heads = 2, c.features = 32, c.window_size = 24, c.cache_size = 30,
        c.cache_recent = 8, c.retrieval_size = 170, c.retrieval_recent = 40, c.horizon = 200;
    if (shape == DEFAULT)
        c.window_size = 64, c.cache_size = 128, c.cache_recent = 32, c.cache_age = 512,
        c.cache_fact_age = 8192, c.horizon = 200, c.sinks = 1;
    return c;
}

/* Blocks begin to choose, in all heads, when there have been more keys than places. */
static int first_choice(const struct attention_config *c) {
    return (attention_cache_most(c) + c->sinks) / c->window_size + 2;
}

/* ---- the rule, on the CPU's scores ---- */

struct candidates {
    int n;
    int64_t position[MOST];
    float error[MOST], fact[MOST];
    double aged[MOST];
};

static struct candidates candidates_of(struct rig *g, const void *slot, int layer, int kv) {
    struct candidates c;
    int64_t start = slot_header(slot)->position;
    double age = g->config.cache_age, fact_age = g->config.cache_fact_age;
    c.n = attention_cache_scores(g->a, slot, layer, kv, c.position, c.error);
    for (int j = 0; j < c.n; j++) {
        double distance = (double)(start - c.position[j]);
        c.aged[j] = c.error[j] / (1 + distance / age);
        c.fact[j] = fact_age ? (float)(c.error[j] / (1 + distance / fact_age)) : c.error[j];
    }
    return c;
}

static double nth_largest(const float *x, int n, int nth) { /* nth 0: the largest */
    for (int i = 0; i < n; i++) {
        int before = 0;
        for (int j = 0; j < n; j++)
            before += x[j] > x[i] || (x[j] == x[i] && j < i);
        if (before == nth) return (double)x[i];
    }
    return INFINITY;
}

/* kept [n] could be the choice by errors that are within 1e-4 of these.  A key whose score as a
 * fact is above the last place's stays; one that is near it may have that place; and of the others
 * none may be passed over for one of lower score by age. */
static void assert_chosen(const struct room *room, const struct candidates *of, const bool *kept) {
    const double near = 1e-4;
    int places = room->cache - room->recent, sure = 0, n_kept = 0, n_near = 0;
    double least = places ? nth_largest(of->fact, of->n, places - 1) : INFINITY;
    bool is_sure[MOST], is_near[MOST];
    for (int j = 0; j < of->n; j++) {
        double e = (double)of->fact[j];
        is_sure[j] = e > least * (1 + near);
        is_near[j] = !is_sure[j] && e >= least * (1 - near);
        assert_true(kept[j] || !is_sure[j]);
        sure += is_sure[j];
        n_kept += kept[j];
    }
    assert_int_equal(n_kept, room->cache);
    for (int i = 0; i < of->n; i++) {
        if (!kept[i] || is_sure[i]) continue;
        bool passed_over = !room->recent;
        for (int j = 0; j < of->n; j++)
            passed_over |= !kept[j] && of->aged[i] < of->aged[j] * (1 - near);
        if (!passed_over) continue;
        assert_true(is_near[i]);
        n_near++;
    }
    assert_true(n_near <= places - sure);
}

static int kept_flags(struct device *d, int slot, int layer, int kv, const struct candidates *of,
                      bool *kept) {
    int64_t got[MOST];
    int n = gpu_attention_cache_positions(d->a, slot, layer, kv, got), found = 0;
    for (int j = 0; j < of->n; j++) {
        kept[j] = false;
        for (int i = 0; i < n; i++)
            kept[j] |= got[i] == of->position[j];
        found += kept[j];
    }
    assert_int_equal(found, n);
    return n;
}

/* ---- walking along a sequence ---- */

struct walk {
    struct rig g;
    struct device fast, exact;
    void *slot, *other; /* the CPU's */
    char *state;        /* a saved one */
    float *y;
};

static void walk_open(struct walk *w, struct attention_config config, int n) {
    rig_open(&w->g, config, 10000, n, 1, false);
    device_open(&w->fast, gpu, &w->g, false);
    device_open(&w->exact, gpu, &w->g, true);
    w->slot = slot_open(&w->g), w->other = slot_open(&w->g);
    w->state = malloc(attention_state_bytes(w->g.a, n));
    w->y = rows_open(&w->g);
}
static void walk_close(struct walk *w) {
    device_close(&w->fast), device_close(&w->exact);
    rig_close(&w->g);
    free(w->slot), free(w->other), free(w->state), free(w->y);
}

/* What the device has in slot 0, into the CPU's. */
static void fetch_slot(struct walk *w, struct device *d, void *slot) {
    char msg[256] = "";
    size_t bytes = attention_state_bytes(w->g.a, gpu_attention_slot_position(d->a, 0));
    assert_int_equal(gpu_attention_slot_save(d->a, 0, w->state), OK);
    if (attention_state_load(w->g.a, slot, w->state, bytes, msg, sizeof msg)) fail_msg("%s", msg);
}

/* S and z of both kernels, from the same state and keys, by z, since |v| <= 1: each sums n_folded
 * products a few of which are parts of others, every sum rounded (or on some devices cut off,
 * 2^-23) once, on the way to z or less. */
static void assert_same_states(struct walk *w, int layer, int kv, int n_folded, double *used) {
    struct memory a = memory_of(w->g.a, w->slot, layer, kv),
                  b = memory_of(w->g.a, w->other, layer, kv);
    const struct shape *s = &w->g.a->shape;
    double most = (2 * n_folded + 8) * 0x1p-23;
    for (int h = 0; h < w->g.a->state_heads; h++) {
        const float *S = a.state + (size_t)h * w->g.a->layout.state_floats,
                    *T = b.state + (size_t)h * w->g.a->layout.state_floats,
                    *z = S + w->g.a->layout.S_floats, *y = T + w->g.a->layout.S_floats;
        for (int f = 0; f < s->features; f++) {
            assert_true(z[f] > 0);
            double scale = (double)z[f], off = fabs((double)z[f] - (double)y[f]);
            for (int d = 0; d < s->head_dim; d++)
                off = fmax(off, fabs((double)S[f * s->lanes + d] - (double)T[f * s->lanes + d]));
            if (!(off <= most * scale))
                fail_msg("layer %d: S or z is off by %g", layer, off / scale);
            *used = fmax(*used, off / scale / most);
        }
    }
}

/* Errors of the last layer's candidates, [state heads][tiles of columns][candidates]; the caller
 * frees them. */
static float *fetch_errors(struct device *d, int kv, int *n_parts) {
    const struct gpu_shape *s = &d->a->shape;
    size_t n = (size_t)(s->most_cache + s->window_size);
    *n_parts = s->state_heads * s->lanes / 16;
    float *got = malloc((size_t)*n_parts * n * sizeof *got);
    gpu_download(gpu, got, d->a->errors + (size_t)kv * (size_t)*n_parts * n,
                 (size_t)*n_parts * n * sizeof *got);
    must_wait(gpu);
    return got;
}

/* Element d of r / norm is a mean of values, |v| <= 1: F rounded sums, which add as squares do, put
 * it off by sqrt(F) 2^-24, and e = || r / norm - v ||^2 by 2 sqrt(e) times that; four times that is
 * allowed, and 2^-21 e for the sum of squares.  (That is far below the 1e-4 that choices allow.) */
static void assert_same_errors(struct walk *w, const struct candidates *of, int kv, double *used) {
    int n_parts, n = attention_cache_most(&w->g.config) + w->g.config.window_size;
    double heads = w->g.a->state_heads, F = w->g.a->shape.features;
    float *got = fetch_errors(&w->fast, kv, &n_parts);
    for (int j = 0; j < of->n; j++) {
        double e = 0, want = (double)of->error[j];
        for (int part = 0; part < n_parts; part++)
            e += (double)got[part * n + j];
        double off = fabs(e - want), most = 8 * sqrt(heads * want * F) * 0x1p-24 + want * 0x1p-21;
        if (!(off <= most)) fail_msg("candidate %d's error of %g is off by %g", j, want, off);
        *used = fmax(*used, off / most);
    }
    free(got);
}

/* The first row of a block, from the state that the fast device has. */
static void check_block(struct walk *w, int64_t at, double *used_S, double *used_e) {
    const struct attention_config *c = &w->g.config;
    char msg[256] = "";
    struct candidates of[RIG_LAYERS][2];
    fetch_slot(w, &w->fast, w->slot);
    for (int layer = 0; layer < RIG_LAYERS; layer++)
        for (int kv = 0; kv < c->n_kv_heads; kv++)
            of[layer][kv] = candidates_of(&w->g, w->slot, layer, kv);
    if (gpu_attention_slot_load(w->exact.a, 0, w->state, attention_state_bytes(w->g.a, at), msg,
                                sizeof msg))
        fail_msg("%s", msg);
    device_prompt(&w->fast, 0, 0, (int)at, (int)at + 1, 1, w->y);
    for (int kv = 0; kv < c->n_kv_heads; kv++)
        assert_same_errors(w, &of[LAST][kv], kv, used_e);
    device_prompt(&w->exact, 0, 0, (int)at, (int)at + 1, 1, w->y);
    fetch_slot(w, &w->fast, w->slot);
    fetch_slot(w, &w->exact, w->other);
    for (int layer = 0; layer < RIG_LAYERS; layer++)
        for (int kv = 0; kv < c->n_kv_heads; kv++) {
            bool fast[MOST], exact[MOST];
            const struct candidates *o = &of[layer][kv];
            const struct room *room = room_of(w->g.a, layer, kv);
            assert_int_equal(kept_flags(&w->fast, 0, layer, kv, o, fast), room->cache);
            kept_flags(&w->exact, 0, layer, kv, o, exact);
            assert_chosen(room, o, fast);
            assert_chosen(room, o, exact);
            if (memcmp(fast, exact, (size_t)o->n * sizeof *fast) == 0)
                assert_same_states(w, layer, kv, o->n - room->cache, used_S);
        }
}

static void check_shape(int shape, int n_choices) {
    struct attention_config c = shape_config(shape);
    int w = c.window_size, from = first_choice(&c), end = from + n_choices;
    double used_S = 0, used_e = 0;
    struct walk walk;
    walk_open(&walk, c, end * w + 1);
    device_prompt(&walk.fast, 0, 0, 0, from * w, 64 / w * w, walk.y);
    for (int b = from; b < end; b++) {
        check_block(&walk, (int64_t)b * w, &used_S, &used_e);
        device_prompt(&walk.fast, 0, 0, b * w + 1, (b + 1) * w, w, walk.y);
    }
    print_message("shape %d: %.3f of what S may be off by, %.3f of errors\n", shape, used_S,
                  used_e);
    walk_close(&walk);
}

static void test_each_block_folds_recalls_and_chooses_like_the_cpu(void **state) {
    (void)state;
    for (int shape = 0; shape < DEFAULT; shape++)
        check_shape(shape, 3);
}

static void test_the_default_shape_does(void **state) {
    (void)state;
    check_shape(DEFAULT, 2);
}

/* ---- bits ---- */

static void same_saved_state(struct device *a, int slot_a, struct device *b, int slot_b) {
    size_t bytes = attention_state_bytes(a->rig->a, gpu_attention_slot_position(a->a, slot_a));
    char *x = malloc(bytes), *y = malloc(bytes);
    assert_int_equal(gpu_attention_slot_save(a->a, slot_a, x), OK);
    assert_int_equal(gpu_attention_slot_save(b->a, slot_b, y), OK);
    assert_memory_equal(x, y, bytes);
    free(x), free(y);
}

/* In waves or block by block, from a slot or a snapshot, alone or beside another. */
static void test_any_cut_and_neighbour_leaves_the_same_bits(void **state) {
    (void)state;
    for (int shape = 0; shape < DEFAULT; shape++) {
        struct attention_config c = shape_config(shape);
        struct rig g;
        struct device d;
        int w = c.window_size, n = (first_choice(&c) + 3) * w + 5;
        rig_open(&g, c, 10000, n + 7, 1, false);
        device_open(&d, gpu, &g, false);
        float *y[3];
        for (int i = 0; i < 3; i++)
            y[i] = rows_open(&g);
        device_prompt(&d, 0, 0, 0, n, 64, y[0]);
        device_prompt(&d, 1, 0, 0, n, w - 3, y[1]);
        assert_true(same_bits(&g, y[0], y[1]));
        same_saved_state(&d, 0, &d, 1);
        for (int at = 0, step = w + 1; at < n; at += step) {
            int to = at + step < n ? at + step : n;
            struct piece p[] = {{3, 7, at, to, y[1]}, {2, 0, at, to, y[2]}};
            read_prompts(&d, p, 2, 0);
        }
        assert_true(same_bits(&g, y[0], y[2]));
        same_saved_state(&d, 0, &d, 2);
        for (int i = 0; i < 3; i++)
            free(y[i]);
        device_close(&d);
        rig_close(&g);
    }
}

/* Where there are more processors, several share a wave's second product. */
static void test_any_number_of_processors_leaves_the_same_bits(void **state) {
    (void)state;
    static const char *const processors[] = {"1", "8", "100"}; /* 1, 2 and 3 parts */
    struct attention_config c = shape_config(0);
    c.cache_size = 150;
    int n = (first_choice(&c) + 1) * c.window_size + 1;
    struct rig g;
    struct device d[3];
    struct gpu *on[3];
    rig_open(&g, c, 10000, n, 1, false);
    float *y = rows_open(&g);
    for (int i = 0; i < 3; i++) {
        setenv("URCHIN_EMULATED_PROCESSORS", processors[i], 1);
        assert_int_equal(gpu_open(&on[i], NULL, 0), OK);
        device_open(&d[i], on[i], &g, false);
        device_prompt(&d[i], 0, 0, 0, n, 64, y);
        same_saved_state(&d[0], 0, &d[i], 0);
    }
    unsetenv("URCHIN_EMULATED_PROCESSORS");
    for (int i = 0; i < 3; i++) {
        device_close(&d[i]);
        gpu_close(on[i]);
    }
    free(y);
    rig_close(&g);
}

/* A text that repeats itself, to maps that see no positions: whatever tile or warp has them, equal
 * keys are recalled to the same bits.  (Of equal scores the earlier stays.) */
static void test_equal_keys_have_equal_errors(void **state) {
    (void)state;
    enum { PERIOD = 11 };
    struct attention_config c = shape_config(0);
    struct rig g;
    struct device d;
    int w = c.window_size, from = first_choice(&c), n = (from + 3) * w + 1, n_equal = 0;
    rig_open(&g, c, 10000, n, 1, false);
    for (int i = 0; i < RIG_LAYERS; i++)
        for (size_t e = PERIOD * kv_floats(&g); e < (size_t)n * kv_floats(&g); e++) {
            g.k[i][e] = g.k[i][e - PERIOD * kv_floats(&g)];
            g.v[i][e] = g.v[i][e - PERIOD * kv_floats(&g)];
        }
    device_open(&d, gpu, &g, false);
    float *y = rows_open(&g);
    device_prompt(&d, 0, 0, 0, from * w, 64, y);
    for (int b = from; b * w < n; b++) {
        int64_t position[MOST];
        int m = gpu_attention_cache_positions(d.a, 0, LAST, 0, position), n_parts;
        for (int i = 0; i < w; i++)
            position[m++] = (b - 2) * w + i;
        device_prompt(&d, 0, 0, b * w, b * w + 1, 1, y);
        float *errors = fetch_errors(&d, 0, &n_parts);
        for (int part = 0; part < n_parts; part++)
            for (int j = 0; j < m; j++)
                for (int i = 0; i < j; i++) {
                    if ((position[j] - position[i]) % PERIOD) continue;
                    assert_true(errors[part * (c.cache_size + w) + i] ==
                                errors[part * (c.cache_size + w) + j]);
                    n_equal++;
                }
        free(errors);
        if (b * w + w < n) device_prompt(&d, 0, 0, b * w + 1, b * w + w, w, y);
    }
    assert_true(n_equal > 0);
    free(y);
    device_close(&d);
    rig_close(&g);
}

int main(void) {
    char msg[256];
    if (gpu_open(&gpu, msg, sizeof msg)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_block_folds_recalls_and_chooses_like_the_cpu),
        cmocka_unit_test(test_any_cut_and_neighbour_leaves_the_same_bits),
        cmocka_unit_test(test_equal_keys_have_equal_errors),
        cmocka_unit_test(test_any_number_of_processors_leaves_the_same_bits),
        cmocka_unit_test(test_the_default_shape_does),
    };
    int failed = run_in_both_orders(tests, sizeof tests / sizeof *tests, 5, NULL);
    gpu_close(gpu);
    return failed;
}
