/* attention_device.h - for the tests of attention on a device: the CPU's rig (tests/unit/attention_rig.h) and the same
 * sequences read on the device, in steps of any shape. */
#ifndef URCHIN_TESTS_ATTENTION_DEVICE_H
#define URCHIN_TESTS_ATTENTION_DEVICE_H

#include "tests/unit/attention_rig.h"

#include "attention/gpu_attention.h"
#include "attention/gpu_internal.h"
#include "tests/emu/emu.h"

enum { DEVICE_SLOTS = 4, MOST_ROWS = 64, MOST_RUNS = 3, Y_PAD = 4 };

struct device {
    struct rig *rig;
    struct gpu *gpu;
    struct gpu_attention *a;
    float *q[RIG_LAYERS], *k[RIG_LAYERS], *v[RIG_LAYERS]; /* the rig's, on the device */
    float *step[RIG_LAYERS];   /* [MOST_ROWS] rows of a step: q, k and v side by side */
    float *step_y[RIG_LAYERS]; /* [MOST_ROWS] rows, Y_PAD elements longer than they need be */
};

/* Tokens from .. to - 1 of the sequence in a slot, whose first token is the rig's token `first`; y as rows_open(). */
struct piece {
    int slot, first, from, to;
    float *y;
};

static inline size_t kv_floats(const struct rig *g) {
    return (size_t)g->config.n_kv_heads * (size_t)g->config.head_dim;
}
static inline size_t step_row(const struct rig *g) { /* q, k and v side by side */
    return row_floats(g) + 2 * kv_floats(g);
}

static inline float *device_floats(struct gpu *gpu, const float *from, size_t n) {
    void *at;
    assert_int_equal(gpu_alloc(gpu, &at, n * sizeof *from), OK);
    if (from)
        gpu_upload(gpu, at, from, n * sizeof *from);
    else
        gpu_fill(gpu, at, 0xff, n * sizeof *from); /* NaN */
    return at;
}

static inline void device_open(struct device *d, struct gpu *gpu, struct rig *rig, bool exact) {
    char msg[256] = "";
    memset(d, 0, sizeof *d);
    d->rig = rig;
    d->gpu = gpu;
    if (gpu_attention_new(&d->a, gpu, rig->a, DEVICE_SLOTS, MOST_ROWS, MOST_RUNS, exact, msg, sizeof msg)) fail_msg("%s", msg);
    for (int i = 0; i < RIG_LAYERS; i++) {
        d->q[i] = device_floats(gpu, rig->q[i], (size_t)rig->n * row_floats(rig));
        d->k[i] = device_floats(gpu, rig->k[i], (size_t)rig->n * kv_floats(rig));
        d->v[i] = device_floats(gpu, rig->v[i], (size_t)rig->n * kv_floats(rig));
        d->step[i] = device_floats(gpu, NULL, MOST_ROWS * step_row(rig));
        d->step_y[i] = device_floats(gpu, NULL, MOST_ROWS * (row_floats(rig) + Y_PAD));
    }
    assert_int_equal(gpu_wait(gpu), OK);
}

static inline void device_close(struct device *d) {
    for (int i = 0; i < RIG_LAYERS; i++) {
        gpu_release(d->gpu, d->q[i]);
        gpu_release(d->gpu, d->k[i]);
        gpu_release(d->gpu, d->v[i]);
        gpu_release(d->gpu, d->step[i]);
        gpu_release(d->gpu, d->step_y[i]);
    }
    gpu_attention_free(d->a);
}

static inline void must_wait(struct gpu *gpu) {
    if (gpu_wait(gpu)) fail_msg("%s", gpu_error(gpu));
}

/* A token's q, k and v become row `row` of the step. */
static inline void gather(struct device *d, int row, int token) {
    size_t q = row_floats(d->rig), kv = kv_floats(d->rig);
    for (int layer = 0; layer < RIG_LAYERS; layer++) {
        float *at = d->step[layer] + (size_t)row * step_row(d->rig);
        gpu_copy(d->gpu, at, d->q[layer] + (size_t)token * q, q * sizeof *at);
        gpu_copy(d->gpu, at + q, d->k[layer] + (size_t)token * kv, kv * sizeof *at);
        gpu_copy(d->gpu, at + q + kv, d->v[layer] + (size_t)token * kv, kv * sizeof *at);
    }
}

/* What no row's inputs are gathered into may not be read, and y starts as NaN. */
static inline void forget_step(struct device *d) {
    for (int layer = 0; layer < RIG_LAYERS; layer++) {
        gpu_fill(d->gpu, d->step[layer], 0xff, MOST_ROWS * step_row(d->rig) * sizeof(float));
        gpu_fill(d->gpu, d->step_y[layer], 0xff, MOST_ROWS * (row_floats(d->rig) + Y_PAD) * sizeof(float));
    }
}

static inline struct gpu_attention_rows step_rows(const struct device *d, int layer) {
    const float *q = d->step[layer];
    return (struct gpu_attention_rows){
        .q = q,
        .k = q + row_floats(d->rig),
        .v = q + row_floats(d->rig) + kv_floats(d->rig),
        .q_row = step_row(d->rig),
        .k_row = step_row(d->rig),
        .v_row = step_row(d->rig),
        .y = d->step_y[layer],
        .y_row = row_floats(d->rig) + Y_PAD,
    };
}

static inline void fetch(struct device *d, int row, const struct piece *p, int token) {
    size_t y = row_floats(d->rig);
    for (int layer = 0; layer < RIG_LAYERS; layer++)
        gpu_download(d->gpu, p->y + ((size_t)layer * d->rig->n + token) * y, d->step_y[layer] + (size_t)row * (y + Y_PAD),
                     y * sizeof(float));
}

/* One step of prompts: a run for each piece.  Rows of the step before `gap` and between runs belong to nobody. */
static inline void read_prompts(struct device *d, const struct piece *pieces, int n, int gap) {
    struct gpu_attention_run runs[MOST_RUNS];
    for (int i = 0, row = gap; i < n; i++) {
        runs[i] = (struct gpu_attention_run){pieces[i].slot, row, pieces[i].to - pieces[i].from};
        row += runs[i].n_rows + gap;
        assert_true(row <= MOST_ROWS);
    }
    forget_step(d);
    for (int i = 0; i < n; i++)
        for (int r = 0; r < runs[i].n_rows; r++)
            gather(d, runs[i].first_row + r, pieces[i].first + pieces[i].from + r);
    gpu_attention_prompt_begin(d->a, runs, n);
    for (int layer = 0; layer < RIG_LAYERS; layer++) {
        struct gpu_attention_rows rows = step_rows(d, layer);
        gpu_attention_prompt_layer(d->a, layer, &rows);
    }
    gpu_attention_prompt_end(d->a);
    for (int i = 0; i < n; i++)
        for (int r = 0; r < runs[i].n_rows; r++)
            fetch(d, runs[i].first_row + r, &pieces[i], pieces[i].from + r);
    must_wait(d->gpu);
}

static inline void queue_generated(struct device *d) {
    for (int layer = 0; layer < RIG_LAYERS; layer++) {
        struct gpu_attention_rows rows = step_rows(d, layer);
        gpu_attention_generated_layer(d->a, layer, &rows);
    }
}

/* One step of generated rows: row i is token `from` of piece i; slot < 0 and rows from n on are padding.  Its layers are queued,
 * or with graph replayed from there, where they are recorded first. */
static inline void read_generated_by(struct device *d, const struct piece *pieces, int n, int bucket,
                                     struct gpu_graph **graph) {
    int slots[MOST_RUNS];
    forget_step(d);
    for (int i = 0; i < n; i++) {
        slots[i] = pieces[i].slot;
        if (slots[i] >= 0) gather(d, i, pieces[i].first + pieces[i].from);
    }
    gpu_attention_generated_begin(d->a, slots, n, bucket);
    if (graph && !*graph) {
        gpu_record_begin(d->gpu);
        queue_generated(d);
        assert_int_equal(gpu_record_end(d->gpu, graph), OK);
    }
    if (graph)
        gpu_replay(d->gpu, *graph);
    else
        queue_generated(d);
    gpu_attention_generated_end(d->a);
    for (int i = 0; i < n; i++)
        if (slots[i] >= 0) fetch(d, i, &pieces[i], pieces[i].from);
    must_wait(d->gpu);
}
static inline void read_generated(struct device *d, const struct piece *pieces, int n, int bucket) {
    read_generated_by(d, pieces, n, bucket, NULL);
}

/* A sequence alone: tokens from .. end - 1 as a prompt, in pieces of `cut`. */
static inline void device_prompt(struct device *d, int slot, int first, int from, int end, int cut, float *y) {
    for (; from < end; from += cut) {
        struct piece p = {slot, first, from, from + cut < end ? from + cut : end, y};
        read_prompts(d, &p, 1, 0);
    }
}
static inline void device_generate(struct device *d, int slot, int first, int from, int end, float *y) {
    for (; from < end; from++) {
        struct piece p = {slot, first, from, from + 1, y};
        read_generated(d, &p, 1, 1);
    }
}

static inline bool same_bits(const struct rig *g, const float *a, const float *b) {
    return memcmp(a, b, RIG_LAYERS * (size_t)g->n * row_floats(g) * sizeof *a) == 0;
}

/* The farthest two results are apart over tokens 0 .. n - 1; NaN where one is. */
static inline float farthest(const struct rig *g, const float *a, const float *b, int n) {
    float most = 0;
    for (int i = 0; i < RIG_LAYERS; i++)
        for (size_t e = 0; e < (size_t)n * row_floats(g); e++) {
            size_t at = (size_t)i * (size_t)g->n * row_floats(g) + e;
            float off = fabsf(a[at] - b[at]);
            if (isnan(off)) return NAN;
            if (off > most) most = off;
        }
    return most;
}

/* Both sides are fp32.  An exponent is a sum of D + 1 terms whose absolute values add to at most |q| |k| / sqrt(D) <=
 * 4 sqrt(D), or with maps 2 (2 / sqrt(D)) D and a bias of 1, and each of its roundings errs by at most 2^-24 of that; three such
 * meet in a linear weight.  Weights are positive and |v| <= 1, so this is the error of y in numerator and denominator, besides
 * 2^-24 for each term of their sums.  Roundings have either sign and add as squares do; four times that is allowed. */
static inline float device_tolerance(const struct rig *g) {
    const struct attention_config *c = &g->config;
    float D = (float)c->head_dim, steepness = 4 * sqrtf(D) + 1;
    float terms =
        (float)(g->n + 2 * c->features + attention_cache_most(c) + 2 * c->window_size + 32);
    return 4 * 0x1p-24f * (sqrtf(3 * (D + 1)) * steepness + sqrtf(terms));
}

/* ---- configurations ---- */

static inline struct attention_config base_config(void) {
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
        .cache_fact_age = 60,
        .horizon = 32,
        .mixing = MIXING_UNIFIED,
        .map_before_rope = true,
        .max_distance = 24,
    };
}

static inline void with_window(struct attention_config *c, enum window_rule rule) {
    c->window = rule;
    if (rule != WINDOW_TERRACED) c->cache_size = c->cache_recent = c->cache_age = 0;
    if (rule != WINDOW_TERRACED) c->retrieval_size = c->retrieval_recent = 0;
    if (rule == WINDOW_NONE) c->window_size = c->sinks = 0;
}

static inline struct attention_config softmax_config(void) {
    return (struct attention_config){
        .kind = ATTENTION_SOFTMAX,
        .n_heads = 6,
        .n_kv_heads = 2,
        .head_dim = 16,
        .kv_type = KV_FP32,
        .max_seq_len = 80,
    };
}

/* One of each sort; two with retrieval heads, which have more places and fewer; the last has kernels of its own where it is not
 * exact. */
enum { SORTS = 7, FAST = SORTS - 1 };
static inline struct attention_config sort_config(int sort) {
    struct attention_config c = base_config();
    if (sort == 0) return softmax_config();
    if (sort <= 2) with_window(&c, sort == 1 ? WINDOW_NONE : WINDOW_SLIDING);
    if (sort == 3) c.map_before_rope = false, c.max_distance = 0, c.key_map_per_query_head = true;
    if (sort % 2 == 0) c.kv_type = KV_BF16;
    if (sort == FAST - 1) c.retrieval_size = 15, c.retrieval_recent = 4;
    if (sort == FAST) c.retrieval_size = 3, c.retrieval_recent = 1;
    if (sort == FAST) c.n_heads = 2, c.n_kv_heads = 1, c.head_dim = 64, c.kv_type = KV_BF16;
    return c;
}

/* ---- comparing ---- */

static inline void assert_same_caches(struct device *d, int slot, const void *cpu) {
    int64_t want[256], got[256];
    for (int i = 0; i < RIG_LAYERS; i++)
        for (int kv = 0; kv < d->rig->config.n_kv_heads; kv++) {
            int n = attention_cache_positions(d->rig->a, cpu, i, kv, want);
            assert_int_equal(gpu_attention_cache_positions(d->a, slot, i, kv, got), n);
            assert_memory_equal(got, want, (size_t)n * sizeof *want);
        }
}

#endif
