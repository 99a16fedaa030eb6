/* attention.c - configuration, and a step: one ragged batch of rows cut into tasks for the team.
 *
 * Terraced windows and softmax work in waves.  Wave i holds the i-th segment of every run, cut
 * where blocks begin; each wave is two phases, because all rows of a segment see the keys that the
 * first phase appends:
 *
 *   append   one task per segment and kv head: a block that begins takes up its state and cache;
 *            keys and values are stored
 *   answer   one task per group of at most MAX_QUERIES (row, head) pairs; and the choice and
 *            fold for the next block, which like them only read what they read
 *
 * A segment whose rows and heads are one group, as one row of many sequences is, needs no second
 * phase.  Sliding windows and pure linear attention change the state at every row: there one task
 * is a whole run of one kv head.
 *
 * Each thread has its share of a phase's tasks, one after the other, so it knows which comes next
 * and asks for that one's memory while it computes; whoever is done takes from the others.  A task
 * owns what it writes, so who does which does not matter. */
#include "attention/internal.h"

#include "compute/cpu.h"
#include "compute/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* ---- configuration ---- */

enum { MOST = 1 << 20 }; /* of any count below: products of them stay far inside size_t */

static bool within(int64_t x, int64_t least, int64_t most) {
    return x >= least && x <= most;
}

static enum err check_hedgehog(const struct attention_config *c, char *msg, size_t msg_len) {
    if (!within(c->map, MAP_EXP, MAP_JOINT_SOFTMAX))
        return err_set(msg, msg_len, ERR_FORMAT, "attention map %d is not known", (int)c->map);
    if (!within(c->features, 1, MOST))
        return err_set(msg, msg_len, ERR_FORMAT, "attention features must be positive, not %d",
                       c->features);
    if (!within(c->mixing, MIXING_UNIFIED, MIXING_LOLCATS))
        return err_set(msg, msg_len, ERR_FORMAT, "attention mixing %d is not known",
                       (int)c->mixing);
    if (!within(c->window, WINDOW_NONE, WINDOW_TERRACED))
        return err_set(msg, msg_len, ERR_FORMAT, "attention window rule %d is not known",
                       (int)c->window);
    if (c->window == WINDOW_NONE && c->window_size != 0)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "attention window size %d makes no sense with window rule none",
                       c->window_size);
    if (c->window != WINDOW_NONE && !within(c->window_size, 1, MOST))
        return err_set(msg, msg_len, ERR_FORMAT, "attention window size must be 1 to %d, not %d",
                       MOST, c->window_size);
    if (c->window == WINDOW_NONE && c->sinks != 0)
        return err_set(msg, msg_len, ERR_FORMAT, "attention sinks (%d) need a window", c->sinks);
    if (!within(c->sinks, 0, c->window_size))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "attention sinks must be 0 to the window size %d, not %d", c->window_size,
                       c->sinks);
    if (!within(c->cache_size, 0, MOST))
        return err_set(msg, msg_len, ERR_FORMAT, "attention cache size must be 0 to %d, not %d",
                       MOST, c->cache_size);
    if (c->cache_size && c->window != WINDOW_TERRACED)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "attention cache (size %d) needs a terraced window", c->cache_size);
    if (!within(c->cache_recent, 0, c->cache_size))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "attention cache recent must be 0 to its size %d, not %d", c->cache_size,
                       c->cache_recent);
    if (!within(c->retrieval_size, 0, MOST))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "attention cache of retrieval heads must be 0 to %d, not %d", MOST,
                       c->retrieval_size);
    if (c->retrieval_size && c->window != WINDOW_TERRACED)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "attention cache of retrieval heads (size %d) needs a terraced window",
                       c->retrieval_size);
    if (!within(c->retrieval_recent, 0, c->retrieval_size))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "attention cache recent of retrieval heads must be 0 to its size %d, not %d",
                       c->retrieval_size, c->retrieval_recent);
    if ((c->cache_recent || c->retrieval_recent) && c->cache_age < 1)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "attention cache age must be positive where recent is, not %d",
                       c->cache_age);
    if (c->cache_fact_age < 0)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "attention cache fact age must not be negative, not %d", c->cache_fact_age);
    if (c->horizon < 0)
        return err_set(msg, msg_len, ERR_FORMAT, "attention horizon must not be negative, not %lld",
                       (long long)c->horizon);
    if (c->max_distance < 0)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "attention max_distance must be positive, not %lld",
                       (long long)c->max_distance);
    if (c->max_distance && !c->map_before_rope)
        return err_set(msg, msg_len, ERR_FORMAT, "attention max_distance needs map_position none");
    return OK;
}

enum err attention_config_check(const struct attention_config *c, char *msg, size_t msg_len) {
    if (!within(c->kind, ATTENTION_SOFTMAX, ATTENTION_HEDGEHOG))
        return err_set(msg, msg_len, ERR_FORMAT, "attention kind %d is not known", (int)c->kind);
    if (!within(c->n_heads, 1, MOST) || !within(c->n_kv_heads, 1, c->n_heads) ||
        c->n_heads % c->n_kv_heads)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "attention has %d query heads for %d kv heads: not a whole number each",
                       c->n_heads, c->n_kv_heads);
    if (!within(c->head_dim, 1, MOST))
        return err_set(msg, msg_len, ERR_FORMAT, "attention head_dim must be positive, not %d",
                       c->head_dim);
    if (!within(c->kv_type, KV_FP32, KV_BF16))
        return err_set(msg, msg_len, ERR_FORMAT, "attention key-value type %d is not known",
                       (int)c->kv_type);
    if (c->kind == ATTENTION_HEDGEHOG) return check_hedgehog(c, msg, msg_len);
    if (!within(c->max_seq_len, 1, INT32_MAX - 2 * TILE))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "softmax attention needs a max_seq_len of 1 or more, not %lld",
                       (long long)c->max_seq_len);
    return OK;
}

static uint64_t mix_in(uint64_t hash, int64_t x) { /* FNV-1a over the bytes of x */
    for (int i = 0; i < 8; i++)
        hash = (hash ^ ((uint64_t)x >> 8 * i & 0xff)) * 0x100000001b3u;
    return hash;
}

static uint64_t fingerprint(const struct attention *a) {
    const struct attention_config *c = &a->config;
    const int64_t fields[] = {c->kind,
                              c->n_heads,
                              c->n_kv_heads,
                              c->head_dim,
                              c->kv_type,
                              c->map,
                              c->features,
                              c->key_map_per_query_head,
                              c->window,
                              c->window_size,
                              c->sinks,
                              c->cache_size,
                              c->cache_recent,
                              c->cache_age,
                              c->horizon,
                              c->mixing,
                              c->map_before_rope,
                              c->max_distance,
                              a->n_layers,
                              a->rope != NULL};
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        hash = mix_in(hash, fields[i]);
    for (int i = 0; i < a->n_layers * c->n_kv_heads; i++)
        if (a->rooms[i].retrieval)
            hash = mix_in(mix_in(mix_in(hash, i), c->retrieval_size), c->retrieval_recent);
    if (c->cache_fact_age) hash = mix_in(hash, c->cache_fact_age);
    return hash;
}

/* What the kind does not use is 0, so that code reads the configuration without asking for the
 * kind. */
static struct attention_config canonical(const struct attention_config *config, bool rope) {
    struct attention_config c = *config;
    if (c.kind == ATTENTION_SOFTMAX)
        return (struct attention_config){.kind = c.kind,
                                         .n_heads = c.n_heads,
                                         .n_kv_heads = c.n_kv_heads,
                                         .head_dim = c.head_dim,
                                         .kv_type = c.kv_type,
                                         .max_seq_len = c.max_seq_len};
    c.max_seq_len = 0;
    if (!c.cache_recent && !c.retrieval_recent) c.cache_age = 0;
    if (!c.cache_size && !c.retrieval_size) c.cache_fact_age = 0;
    if (!rope) c.max_distance = 0;
    return c;
}

/* ---- new and free ---- */

const struct attention_kernels *attention_kernels_chosen(void) {
    switch (cpu_isa()) {
#if defined(__x86_64__)
    case CPU_AMX: /* has nothing for attention */
    case CPU_AVX512:
        return &attention_kernels_avx512;
    case CPU_AVX2:
        return &attention_kernels_avx2;
#elif defined(__aarch64__)
    case CPU_DOTPROD:
        return &attention_kernels_dotprod;
#endif
    default:
        return &attention_kernels_generic;
    }
}

static float *pad_rows(const float *x, size_t n_rows, int n, int padded, float **at) {
    float *out = *at;
    for (size_t r = 0; r < n_rows; r++)
        memcpy(out + r * padded, x + r * n, (size_t)n * sizeof *x);
    *at += n_rows * padded;
    return out;
}

/* Copies maps whose rows are no whole vectors into rows that are. */
static enum err pad_maps(struct attention *a) {
    const struct shape *s = &a->shape;
    size_t q = (size_t)a->config.n_heads, k = (size_t)a->config.n_kv_heads * a->state_heads,
           rows = (q + k) * (s->head_dim + 1);
    if (s->f == s->f_lanes) return OK;
    a->padded = calloc((size_t)a->n_layers * rows * s->f_lanes, sizeof *a->padded);
    if (!a->padded) return ERR_NOMEM;
    float *at = a->padded;
    for (int i = 0; i < a->n_layers; i++) {
        struct attention_weights *w = &a->weights[i];
        w->map_q = pad_rows(w->map_q, q * s->head_dim, s->f, s->f_lanes, &at);
        w->map_k = pad_rows(w->map_k, k * s->head_dim, s->f, s->f_lanes, &at);
        if (w->map_q_bias) w->map_q_bias = pad_rows(w->map_q_bias, q, s->f, s->f_lanes, &at);
        if (w->map_k_bias) w->map_k_bias = pad_rows(w->map_k_bias, k, s->f, s->f_lanes, &at);
    }
    return OK;
}

/* Hands out the next bytes of one block, 64-byte aligned; with a NULL block it only counts. */
static void *take(char *block, size_t *used, size_t n, size_t size) {
    void *at = block ? block + *used : NULL;
    *used += (n * size + 63) / 64 * 64;
    return at;
}

static size_t place_scratch(const struct attention *a, struct scratch *t, char *block,
                            size_t used) {
    const struct shape *s = &a->shape;
    size_t D = (size_t)s->head_dim,
           n = (size_t)a->layout.most_cache + (size_t)a->config.window_size + 1;
    *t = (struct scratch){
        .answer =
            {
                .turned = take(block, &used, MAX_QUERIES * D, sizeof(float)),
                .far = take(block, &used, MAX_QUERIES * D, sizeof(float)),
                .scores =
                    take(block, &used, (size_t)MAX_QUERIES * a->layout.tiles * TILE, sizeof(float)),
                .u = take(block, &used, (size_t)MAX_QUERIES * s->f_lanes, sizeof(float)),
                .phi = take(block, &used, (size_t)MAX_QUERIES * s->phi_lanes, sizeof(float)),
                .y = take(block, &used, (size_t)MAX_QUERIES * s->lanes, sizeof(float)),
            },
        .x = take(block, &used, n * D, sizeof(float)),
        .v = take(block, &used, n * s->lanes, sizeof(float)),
        .u = take(block, &used, n * s->f_lanes, sizeof(float)),
        .phi = take(block, &used, n * s->phi_lanes, sizeof(float)),
        .recalled = take(block, &used, n * s->lanes, sizeof(float)),
        .entry = take(block, &used, n, sizeof(int)),
        .position = take(block, &used, n, sizeof(int64_t)),
        .error = take(block, &used, n, sizeof(float)),
        .rank = take(block, &used, n, sizeof(double)),
        .keep = take(block, &used, n, sizeof(bool)),
        .state = take(block, &used, a->layout.state_floats, sizeof(float)),
    };
    return used;
}

static enum err new_scratch(struct attention *a) {
    a->n_threads = team_size(a->team);
    a->scratch = calloc((size_t)a->n_threads, sizeof *a->scratch);
    a->deals = aligned_alloc(_Alignof(struct deal), (size_t)a->n_threads * sizeof *a->deals);
    if (!a->scratch || !a->deals) return ERR_NOMEM;
    for (int t = 0; t < a->n_threads; t++)
        a->scratch_bytes = place_scratch(a, &a->scratch[t], NULL, a->scratch_bytes);
    a->scratch_block = memory_map(a->scratch_bytes);
    if (!a->scratch_block) return ERR_NOMEM;
    size_t used = 0;
    for (int t = 0; t < a->n_threads; t++)
        used = place_scratch(a, &a->scratch[t], a->scratch_block, used);
    return OK;
}

static void init_shape(struct attention *a) {
    const struct attention_config *c = &a->config;
    bool softmax = c->kind == ATTENTION_SOFTMAX;
    int f = softmax ? 0 : c->features, features = softmax ? 0 : feature_dim(c->map, f);
    a->group = c->n_heads / c->n_kv_heads;
    a->state_heads = softmax ? 0 : c->key_map_per_query_head ? a->group : 1;
    a->shape = (struct shape){
        .head_dim = c->head_dim,
        .lanes = round_up(c->head_dim, TILE),
        .f = f,
        .f_lanes = round_up(f, TILE),
        .features = features,
        .phi_lanes = round_up(features, TILE),
        .map = c->map,
        .mixing = c->mixing,
        .kv_type = c->kv_type,
        .map_before_rope = c->map_before_rope,
    };
}

enum err attention_new(struct attention **out, const struct attention_config *config,
                       const struct attention_weights *weights, int n_layers,
                       const struct rope *rope, struct team *team, int max_rows, int max_runs) {
    if (attention_config_check(config, NULL, 0) || n_layers < 1 || max_rows < 1 || max_runs < 1)
        return ERR_ARG;
    struct attention *a = calloc(1, sizeof *a);
    if (!a) return ERR_NOMEM;
    a->config = canonical(config, rope != NULL);
    a->n_layers = n_layers;
    a->rope = rope;
    a->team = team;
    a->kernels = attention_kernels_chosen();
    a->max_rows = max_rows;
    a->max_runs = max_runs;
    init_shape(a);

    size_t half = (size_t)config->head_dim / 2 + 1;
    a->weights = calloc((size_t)n_layers, sizeof *a->weights);
    a->runs = calloc((size_t)max_runs, sizeof *a->runs);
    a->positions = calloc((size_t)max_runs, sizeof *a->positions);
    a->segments = calloc((size_t)max_runs, sizeof *a->segments);
    a->cosines = calloc((size_t)max_rows * half, sizeof *a->cosines);
    a->sines = calloc((size_t)max_rows * half, sizeof *a->sines);
    a->far_cosines = calloc(half, sizeof *a->far_cosines);
    a->far_sines = calloc(half, sizeof *a->far_sines);
    if (!a->weights || !a->runs || !a->positions || !a->segments || !a->cosines || !a->sines ||
        !a->far_cosines || !a->far_sines)
        goto fail;
    if (weights) memcpy(a->weights, weights, (size_t)n_layers * sizeof *weights);
    if (layout_init(a)) goto fail;
    a->fingerprint = fingerprint(a);
    if (pad_maps(a) || new_scratch(a)) goto fail;
    if (a->config.max_distance)
        rope_angles(rope, a->config.max_distance, a->far_cosines, a->far_sines);
    *out = a;
    return OK;
fail:
    attention_free(a);
    return ERR_NOMEM;
}

void attention_free(struct attention *a) {
    if (!a) return;
    memory_unmap(a->scratch_block, a->scratch_bytes);
    free(a->scratch);
    free(a->deals);
    free(a->padded);
    free(a->weights);
    free(a->rooms);
    free(a->runs);
    free(a->positions);
    free(a->segments);
    free(a->cosines);
    free(a->sines);
    free(a->far_cosines);
    free(a->far_sines);
    free(a);
}

/* ---- a step ---- */

void attention_step_begin(struct attention *a, const struct attention_run *runs, int n_runs) {
    assert(n_runs <= a->max_runs);
    a->n_runs = n_runs;
    for (int i = 0; i < n_runs; i++) {
        a->runs[i] = runs[i];
        a->positions[i] = slot_header(runs[i].slot)->position;
        assert(runs[i].first_row + runs[i].n_rows <= a->max_rows);
        assert(a->config.kind == ATTENTION_HEDGEHOG ||
               a->positions[i] + runs[i].n_rows <= a->config.max_seq_len);
        size_t half = (size_t)a->config.head_dim / 2;
        for (int r = 0; a->rope && r < runs[i].n_rows; r++) {
            size_t row = (size_t)runs[i].first_row + r;
            rope_angles(a->rope, a->positions[i] + r, a->cosines + row * half,
                        a->sines + row * half);
        }
    }
}

void attention_step_end(struct attention *a) {
    for (int i = 0; i < a->n_runs; i++)
        slot_header(a->runs[i].slot)->position = a->positions[i] + a->runs[i].n_rows;
    a->n_runs = 0;
}

static bool row_by_row(const struct attention *a) {
    return a->config.kind == ATTENTION_HEDGEHOG && a->config.window != WINDOW_TERRACED;
}

/* How the rows and heads of one kv head are cut into questions. */
static void cut(const struct attention *a, struct segment *s, int most_heads) {
    s->part_rows = s->n_rows < MAX_QUERIES ? s->n_rows : MAX_QUERIES;
    s->part_heads = MAX_QUERIES / s->part_rows;
    if (s->part_heads > most_heads) s->part_heads = most_heads;
    int row_parts = (s->n_rows + s->part_rows - 1) / s->part_rows;
    s->n_parts = row_parts * ((a->group + s->part_heads - 1) / s->part_heads);
}

/* The segments of a wave: each run's rows from `done` on, up to the end of its block.  Returns the
 * number of questions in all; 0: no run has any rows left. */
static int plan_wave(struct attention *a, int wave, int most_heads) {
    int64_t w = a->config.kind == ATTENTION_SOFTMAX ? a->config.max_seq_len : a->config.window_size;
    int n = 0, questions = 0;
    for (int i = 0; i < a->n_runs; i++) {
        int64_t first = a->positions[i], end = first + a->runs[i].n_rows;
        int64_t from = wave == 0 ? first : (first / w + wave) * w;
        if (from >= end) continue;
        int64_t to = (from / w + 1) * w < end ? (from / w + 1) * w : end;
        struct segment *s = &a->segments[n++];
        *s = (struct segment){.run = i,
                              .first_row = a->runs[i].first_row + (int)(from - first),
                              .n_rows = (int)(to - from),
                              .position = from};
        cut(a, s, most_heads);
        questions += s->n_parts * a->config.n_kv_heads;
    }
    a->n_segments = n;
    return questions;
}

/* The second phase's tasks: of each segment that is not whole, the next block, which takes longest,
 * and questions.  Returns how many. */
static int plan_answers(struct attention *a, int layer) {
    int n = 0;
    for (int i = 0; i < a->n_segments; i++) {
        struct segment *s = &a->segments[i];
        s->first_task = n;
        s->prepares = memory_prepares_in(a, layer, s);
        if (s->n_parts > 1) n += (s->n_parts + s->prepares) * a->config.n_kv_heads;
    }
    return n;
}

/* ---- tasks ---- */

static void run_tasks(struct layer_job *job, void (*tasks)(void *, int, int), int n_tasks) {
    struct attention *a = job->a;
    for (int t = 0; t < a->n_threads; t++) {
        atomic_store(&a->deals[t].next, (int)((int64_t)n_tasks * t / a->n_threads));
        a->deals[t].end = (int)((int64_t)n_tasks * (t + 1) / a->n_threads);
    }
    job->n_tasks = n_tasks;
    if (n_tasks) team_run(a->team, tasks, job);
}

/* The thread's next task: of its own share, so that what comes after it is known, then of others'.
 * -1: there is none. */
static int next_task(struct attention *a, int thread) {
    for (int i = 0; i < a->n_threads; i++) {
        struct deal *d = &a->deals[(thread + i) % a->n_threads];
        if (atomic_load_explicit(&d->next, memory_order_relaxed) >= d->end) continue;
        int task = atomic_fetch_add(&d->next, 1);
        if (task < d->end) return task;
    }
    return -1;
}

static struct ahead ahead_of(const struct layer_job *job, const struct segment *s, int kv_head) {
    return memory_ahead(job->a, s, job->layer, kv_head);
}

/* What a thread's first task in a->next_layer reads: run_tasks() will give it its share. */
static struct ahead first_task(const void *arg, int thread, int n_threads) {
    const struct attention *a = arg;
    int n_kv = a->config.n_kv_heads;
    int task = (int)((int64_t)a->n_runs * n_kv * thread / n_threads), run = task / n_kv;
    struct segment s = {.run = run, .n_rows = 1, .position = a->positions[run]};
    return memory_ahead(a, &s, a->next_layer, task % n_kv);
}

void attention_expect(struct attention *a, int layer) {
    a->next_layer = layer;
    team_expect(a->team, row_by_row(a) ? NULL : first_task, a);
}

/* A segment that is one question does everything at once; of the others keys enter. */
static void append_tasks(void *arg, int thread, int n_threads) {
    struct layer_job *job = arg;
    struct attention *a = job->a;
    struct scratch *tmp = &a->scratch[thread];
    int n_kv = a->config.n_kv_heads;
    (void)n_threads;
    for (int task; (task = next_task(a, thread)) >= 0;) {
        const struct segment *s = &a->segments[task / n_kv];
        int kv_head = task % n_kv, next = task + 1;
        struct ahead ahead = {0};
        memory_append(job, s, kv_head, tmp);
        if (s->n_parts > 1) continue;
        if (next < job->n_tasks && a->segments[next / n_kv].n_parts == 1)
            ahead = ahead_of(job, &a->segments[next / n_kv], next % n_kv);
        answer_part(job, s, kv_head, 0, &ahead, tmp);
        if (s->prepares) memory_prepare_next(a, job->layer, s, kv_head, tmp);
    }
}

struct answer_task { /* part -1: the next block */
    const struct segment *segment;
    int kv_head, part;
};

static struct answer_task answer_task(const struct attention *a, int task) {
    const struct segment *s = a->segments + a->n_segments - 1;
    while (s->first_task > task || s->n_parts == 1)
        s--;
    int n_kv = a->config.n_kv_heads, preparing = s->prepares ? n_kv : 0;
    task -= s->first_task;
    if (task < preparing) return (struct answer_task){s, task, -1};
    task -= preparing;
    return (struct answer_task){s, task / s->n_parts, task % s->n_parts};
}

static void answer_tasks(void *arg, int thread, int n_threads) {
    struct layer_job *job = arg;
    struct attention *a = job->a;
    struct scratch *tmp = &a->scratch[thread];
    (void)n_threads;
    for (int task; (task = next_task(a, thread)) >= 0;) {
        struct answer_task t = answer_task(a, task), next = t;
        if (t.part < 0) {
            memory_prepare_next(a, job->layer, t.segment, t.kv_head, tmp);
            continue;
        }
        if (task + 1 < job->n_tasks) next = answer_task(a, task + 1);
        struct ahead ahead = {0};
        if (next.segment != t.segment || next.kv_head != t.kv_head)
            ahead = ahead_of(job, next.segment, next.kv_head);
        answer_part(job, t.segment, t.kv_head, t.part, &ahead, tmp);
    }
}

static void row_tasks(void *arg, int thread, int n_threads) {
    struct layer_job *job = arg;
    struct attention *a = job->a;
    struct scratch *tmp = &a->scratch[thread];
    (void)n_threads;
    for (int task; (task = next_task(a, thread)) >= 0;) {
        int i = task / a->config.n_kv_heads, kv_head = task % a->config.n_kv_heads;
        for (int r = 0; r < a->runs[i].n_rows; r++) {
            struct segment s = {.run = i,
                                .first_row = a->runs[i].first_row + r,
                                .n_rows = 1,
                                .position = a->positions[i] + r};
            cut(a, &s, a->group);
            memory_append(job, &s, kv_head, tmp);
            for (int part = 0; part < s.n_parts; part++)
                answer_part(job, &s, kv_head, part, &(struct ahead){.n = 0}, tmp);
        }
    }
}

/* Few questions leave threads idle.  One a head occupies more, but needs a second phase, which
 * costs about as much as a head. */
static bool worth_splitting(const struct attention *a, int n_questions) {
    int threads = a->n_threads, whole = (n_questions + threads - 1) / threads * a->group;
    return (n_questions * a->group + threads - 1) / threads + 1 < whole;
}

void attention_layer(struct attention *a, int layer, float *y, size_t y_stride, const float *q,
                     size_t q_stride, const float *k, size_t k_stride, const float *v,
                     size_t v_stride) {
    struct layer_job job = {.a = a,
                            .layer = layer,
                            .y = y,
                            .q = q,
                            .k = k,
                            .v = v,
                            .y_row = y_stride,
                            .q_row = q_stride,
                            .k_row = k_stride,
                            .v_row = v_stride};
    int n_kv = a->config.n_kv_heads;
    if (row_by_row(a)) {
        run_tasks(&job, row_tasks, a->n_runs * n_kv);
        return;
    }
    for (int wave = 0, n; (n = plan_wave(a, wave, a->group)); wave++) {
        if (worth_splitting(a, n)) plan_wave(a, wave, 1);
        int n_answers = plan_answers(a, layer);
        run_tasks(&job, append_tasks, a->n_segments * n_kv);
        run_tasks(&job, answer_tasks, n_answers);
    }
}
