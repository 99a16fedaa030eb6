/* gpu_attention.c - attention on a device: parameters and slots there, and a step cut into
 * launches.
 *
 * Prompts of a terraced window go in waves as on the CPU: wave i holds the i-th block of every run,
 * because what block b folds and keeps follows from what block b - 1 did.  Only that chain is
 * serial; rows are answered apart from it.  Each wave leaves a snapshot of what its rows see, and
 * one launch answers the rows of as many waves as there is room for snapshots. */
#include "attention/gpu_internal.h"

#include "compute/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { SCRATCH_MOST = 128 << 20, SNAPSHOTS_MOST = 256 << 20 }; /* bytes, if one unit is not more */

static size_t align(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

static bool row_by_row(const struct attention *twin) {
    return twin->config.kind == ATTENTION_HEDGEHOG && twin->config.window != WINDOW_TERRACED;
}
static bool has_blocks(const struct attention *twin) {
    return twin->config.kind == ATTENTION_HEDGEHOG && twin->config.window == WINDOW_TERRACED;
}

/* ---- sizes ---- */

static struct gpu_shape shape_of(const struct attention *twin, bool exact) {
    const struct attention_config *c = &twin->config;
    const struct shape *s = &twin->shape;
    const struct layout *l = &twin->layout;
    return (struct gpu_shape){
        .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads,
        .group = twin->group,
        .state_heads = twin->state_heads,
        .head_dim = s->head_dim,
        .lanes = s->lanes,
        .f = s->f,
        .f_lanes = s->f_lanes,
        .features = s->features,
        .phi_lanes = s->phi_lanes,
        .kind = c->kind,
        .map = c->map,
        .mixing = c->mixing,
        .window = c->window,
        .kv_bf16 = c->kv_type == KV_BF16,
        .window_size = c->window_size,
        .sinks = c->sinks,
        .cache = c->cache_size,
        .ring = l->ring,
        .entries = l->entries,
        .tiles = l->tiles,
        .cache_recent = c->cache_recent,
        .cache_age = c->cache_age,
        .horizon = c->horizon,
        .max_distance = c->max_distance,
        .max_seq_len = c->max_seq_len,
        .map_before_rope = c->map_before_rope,
        .rope = twin->rope != NULL,
        .exact = exact,
        .slot_stride = gpu_attention_slot_bytes(twin),
        .states = l->states,
        .keys = l->keys,
        .values = l->values,
        .positions = l->positions,
        .turned = l->turned,
        .S_floats = l->S_floats,
        .state_floats = l->state_floats,
        .keys_bytes = l->keys_bytes,
        .values_bytes = l->values_bytes,
    };
}

/* A slot of one layer, its keys only as rows score them. */
static struct gpu_shape snapshot_of(const struct gpu_shape *slot) {
    struct gpu_shape s = *slot;
    size_t heads = (size_t)s.n_kv_heads;
    s.states = 0;
    s.keys = s.turned = heads * s.state_heads * s.state_floats * sizeof(float);
    s.values = s.keys + heads * s.keys_bytes;
    s.positions = s.values + heads * s.values_bytes;
    s.slot_stride = align(s.positions + heads * s.cache * sizeof(int64_t));
    return s;
}

size_t gpu_attention_slot_bytes(const struct attention *twin) {
    return align(twin->layout.scores); /* scores are not kept */
}

static size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

/* How much there is of what is not slots. */
static void set_sizes(struct gpu_attention *a, int max_rows, int max_runs) {
    const struct attention *twin = a->twin;
    a->n_layers = twin->n_layers;
    a->max_rows = max_rows;
    a->max_runs = max_runs;
    for (a->max_bucket = 1; a->max_bucket < max_runs;)
        a->max_bucket *= 2;
    if (!has_blocks(twin)) {
        a->max_segments = max_runs;
        return;
    }
    a->max_segments = max_rows / a->shape.window_size + 2 * max_runs;
    if (a->max_segments > max_rows) a->max_segments = max_rows;
    a->snapshot = snapshot_of(&a->shape);
    size_t room = SNAPSHOTS_MOST / a->snapshot.slot_stride, wave = (size_t)max_runs;
    a->n_snapshots = (int)smaller((size_t)a->max_segments, room > wave ? room : wave);
    size_t unit = gpu_memory_scratch_bytes(&a->shape) * (size_t)a->shape.n_kv_heads;
    room = SCRATCH_MOST / unit;
    a->units = (int)smaller((size_t)a->n_layers * max_runs, room ? room : 1);
}

/* Parameters of one layer that the kind has, in floats. */
struct counts {
    size_t map_q, map_k, map_q_bias, map_k_bias, mix;
};
static struct counts counts_of(const struct gpu_shape *s, const struct attention_weights *w) {
    size_t states = (size_t)s->n_kv_heads * s->state_heads, heads = (size_t)s->n_heads;
    size_t f = (size_t)s->f_lanes, D = (size_t)s->head_dim;
    return (struct counts){
        .map_q = w->map_q ? heads * D * f : 0,
        .map_k = w->map_k ? states * D * f : 0,
        .map_q_bias = w->map_q_bias ? heads * f : 0,
        .map_k_bias = w->map_k_bias ? states * f : 0,
        .mix = w->mix ? heads : 0,
    };
}

static size_t parameter_bytes(const struct gpu_attention *a) {
    size_t bytes = 0;
    for (int i = 0; i < a->n_layers; i++) {
        struct counts n = counts_of(&a->shape, &a->twin->weights[i]);
        bytes += align(n.map_q * sizeof(float)) + align(n.map_k * sizeof(float)) +
                 align(n.map_q_bias * sizeof(float)) + align(n.map_k_bias * sizeof(float)) +
                 align(n.mix * sizeof(float));
    }
    return bytes;
}

static size_t angles_bytes(const struct gpu_attention *a, int n_rows) {
    return a->shape.rope ? (size_t)n_rows * (a->shape.head_dim / 2) * sizeof(float) : 0;
}

static int generated_segments(const struct gpu_attention *a) {
    return a->max_bucket + a->max_runs;
}
static int prompt_segments(const struct gpu_attention *a) {
    return a->max_runs + 2 * a->max_segments;
}

/* ---- new and free ---- */

/* Device memory where there is any to have. */
static enum err allocate(struct gpu_attention *a, void *out, size_t bytes) {
    return bytes ? gpu_alloc(a->gpu, (void **)out, bytes) : OK;
}

static enum err new_plan(struct gpu_attention *a, struct gpu_plan *plan, int n_segments,
                         int n_rows) {
    size_t bytes = (size_t)n_segments * sizeof *plan->host;
    enum err e = gpu_host_alloc(a->gpu, (void **)&plan->host, bytes);
    if (!e) e = allocate(a, &plan->device, bytes);
    if (!e) e = allocate(a, &plan->cosines, angles_bytes(a, n_rows));
    if (!e) e = allocate(a, &plan->sines, angles_bytes(a, n_rows));
    return e;
}

static void free_plan(struct gpu_attention *a, struct gpu_plan *plan) {
    gpu_host_release(a->gpu, plan->host);
    gpu_release(a->gpu, plan->device);
    gpu_release(a->gpu, plan->cosines);
    gpu_release(a->gpu, plan->sines);
}

static const float *place_parameter(struct gpu_attention *a, char **at, const float *from,
                                    size_t n) {
    char *to = *at;
    if (!n) return NULL;
    gpu_upload(a->gpu, to, from, n * sizeof *from);
    *at += align(n * sizeof *from);
    return (const float *)to;
}

static enum err place_parameters(struct gpu_attention *a) {
    size_t half = (size_t)a->shape.head_dim / 2;
    enum err e = allocate(a, &a->parameters, parameter_bytes(a));
    if (!e) e = allocate(a, &a->layers_at, (size_t)a->n_layers * sizeof *a->layers);
    if (!e && a->shape.rope) e = allocate(a, &a->theta, half * sizeof *a->theta);
    if (!e && a->shape.max_distance)
        e = allocate(a, &a->far_angles, 2 * half * sizeof *a->far_angles);
    if (e) return e;
    char *at = (char *)a->parameters;
    for (int i = 0; i < a->n_layers; i++) {
        const struct attention_weights *w = &a->twin->weights[i];
        struct counts n = counts_of(&a->shape, w);
        a->layers[i] = (struct gpu_layer){
            .layer = i,
            .map_q = place_parameter(a, &at, w->map_q, n.map_q),
            .map_k = place_parameter(a, &at, w->map_k, n.map_k),
            .map_q_bias = place_parameter(a, &at, w->map_q_bias, n.map_q_bias),
            .map_k_bias = place_parameter(a, &at, w->map_k_bias, n.map_k_bias),
            .mix = place_parameter(a, &at, w->mix, n.mix),
        };
    }
    gpu_upload(a->gpu, a->layers_at, a->layers, (size_t)a->n_layers * sizeof *a->layers);
    if (a->theta)
        gpu_upload(a->gpu, a->theta, rope_frequencies(a->twin->rope), half * sizeof *a->theta);
    if (a->far_angles) {
        gpu_upload(a->gpu, a->far_angles, a->twin->far_cosines, half * sizeof(float));
        gpu_upload(a->gpu, a->far_angles + half, a->twin->far_sines, half * sizeof(float));
    }
    a->shape.theta = a->snapshot.theta = a->theta;
    return OK;
}

static enum err place_all_but_slots(struct gpu_attention *a) {
    const struct layout *l = &a->twin->layout;
    bool hedgehog = a->twin->config.kind == ATTENTION_HEDGEHOG;
    enum err e = place_parameters(a);
    if (!e) e = new_plan(a, &a->generated, generated_segments(a), a->max_bucket);
    if (!e) e = new_plan(a, &a->prompt, prompt_segments(a), a->max_rows);
    if (!e)
        e = allocate(a, &a->scratch,
                     gpu_memory_scratch_bytes(&a->shape) * (size_t)a->shape.n_kv_heads * a->units);
    if (!e) e = allocate(a, &a->snapshots, (size_t)a->n_snapshots * a->snapshot.slot_stride);
    if (!e && hedgehog) e = gpu_host_alloc(a->gpu, (void **)&a->host, l->slot_bytes);
    if (!e && hedgehog) e = allocate(a, &a->whole, l->keys);
    if (e) return e;
    a->snapshot.slots = a->snapshots;
    char *cleared = hedgehog ? a->host : memory_map(l->slot_bytes);
    if (!cleared) return ERR_NOMEM;
    attention_slot_clear(a->twin, cleared);
    memcpy(&a->header, cleared, sizeof a->header);
    if (!hedgehog) memory_unmap(cleared, l->slot_bytes);
    return OK;
}

static enum err place_slots(struct gpu_attention *a, char *msg, size_t msg_len) {
    size_t bytes = a->shape.slot_stride;
    enum err e = allocate(a, &a->slots, (size_t)a->n_slots * bytes);
    a->shape.slots = a->slots;
    if (!e) return OK;
    return err_set(msg, msg_len, e,
                   "the device has no memory for %d sequences of %zu bytes, it has for %zu",
                   a->n_slots, bytes, gpu_free_bytes(a->gpu) / bytes);
}

enum err gpu_attention_new(struct gpu_attention **out, struct gpu *g, struct attention *twin,
                           int n_slots, int max_rows, int max_runs, bool exact, char *msg,
                           size_t msg_len) {
    if (n_slots < 1 || max_rows < 1 || max_runs < 1) return ERR_ARG;
    struct gpu_attention *a = calloc(1, sizeof *a);
    if (!a) return err_set(msg, msg_len, ERR_NOMEM, "no memory for attention");
    a->gpu = g;
    a->twin = twin;
    a->n_slots = n_slots;
    a->shape = shape_of(twin, exact);
    set_sizes(a, max_rows, max_runs);
    a->positions = calloc((size_t)n_slots, sizeof *a->positions);
    a->layers = calloc((size_t)a->n_layers, sizeof *a->layers);
    a->waves = calloc((size_t)a->max_segments, sizeof *a->waves);
    enum err e = ERR_NOMEM;
    if (a->positions && a->layers && a->waves) e = place_all_but_slots(a);
    if (e)
        err_set(msg, msg_len, e, "no memory for attention beside its sequences");
    else
        e = place_slots(a, msg, msg_len);
    if (!e) {
        for (int slot = 0; slot < n_slots; slot++)
            gpu_attention_slot_clear(a, slot);
        e = gpu_wait(g);
        if (e) err_set(msg, msg_len, e, "%s", gpu_error(g));
    }
    if (e) {
        gpu_attention_free(a);
        return e;
    }
    *out = a;
    return OK;
}

void gpu_attention_free(struct gpu_attention *a) {
    if (!a) return;
    free_plan(a, &a->generated);
    free_plan(a, &a->prompt);
    gpu_release(a->gpu, a->parameters);
    gpu_release(a->gpu, a->layers_at);
    gpu_release(a->gpu, a->theta);
    gpu_release(a->gpu, a->far_angles);
    gpu_release(a->gpu, a->scratch);
    gpu_release(a->gpu, a->snapshots);
    gpu_release(a->gpu, a->whole);
    gpu_release(a->gpu, a->slots);
    gpu_host_release(a->gpu, a->host);
    free(a->positions);
    free(a->layers);
    free(a->waves);
    free(a);
}

/* ---- what both sorts of rows share ---- */

static struct gpu_rows rows_with_angles(const struct gpu_attention *a,
                                        const struct gpu_attention_rows *rows,
                                        const struct gpu_plan *plan) {
    return (struct gpu_rows){
        .q = rows->q,
        .k = rows->k,
        .v = rows->v,
        .q_row = rows->q_row,
        .k_row = rows->k_row,
        .v_row = rows->v_row,
        .y = rows->y,
        .y_row = rows->y_row,
        .y_bf16 = rows->y_bf16,
        .cosines = plan->cosines,
        .sines = plan->sines,
        .far_cosines = a->far_angles,
        .far_sines = a->far_angles ? a->far_angles + a->shape.head_dim / 2 : NULL,
    };
}

/* Does the row at this position begin a block that folds another? */
static bool begins(const struct gpu_attention *a, int64_t position) {
    int64_t w = a->shape.window_size;
    return has_blocks(a->twin) && position >= 2 * w && position % w == 0;
}

/* gpu_launch_begin() in as many pieces as the scratch asks for. */
static void begin_blocks(struct gpu_attention *a, int first_layer, int n_layers,
                         const struct gpu_segment *segments, int n_segments) {
    int layers = a->units < n_layers ? a->units : n_layers, most = a->units / layers;
    for (int s = 0; s < n_segments; s += most)
        for (int l = 0; l < n_layers; l += layers)
            gpu_launch_begin(a->gpu, &a->shape, a->layers_at, first_layer + l,
                             n_layers - l < layers ? n_layers - l : layers, segments + s,
                             n_segments - s < most ? n_segments - s : most, a->scratch);
}

/* ---- generated rows ---- */

void gpu_attention_generated_begin(struct gpu_attention *a, const int *slots, int n, int bucket) {
    struct gpu_plan *plan = &a->generated;
    assert(n <= bucket && n <= a->max_runs && bucket <= a->max_bucket);
    a->bucket = bucket;
    a->n_generated = n;
    int n_begin = 0;
    for (int i = 0; i < bucket; i++) {
        struct gpu_segment *s = &plan->host[i];
        *s = (struct gpu_segment){.slot = i < n ? slots[i] : -1, .first_row = i, .n_rows = 1};
        if (s->slot < 0) continue;
        s->position = a->positions[s->slot];
        assert(!a->shape.max_seq_len || s->position < a->shape.max_seq_len);
        if (begins(a, s->position)) plan->host[bucket + n_begin++] = *s;
    }
    gpu_upload(a->gpu, plan->device, plan->host, (size_t)(bucket + n_begin) * sizeof *plan->host);
    gpu_launch_angles(a->gpu, &a->shape, plan->device, bucket, 1, plan->cosines, plan->sines);
    if (n_begin) begin_blocks(a, 0, a->n_layers, plan->device + bucket, n_begin);
}

void gpu_attention_generated_layer(struct gpu_attention *a, int layer,
                                   const struct gpu_attention_rows *rows) {
    const struct gpu_segment *segments = a->generated.device;
    const struct gpu_layer *l = &a->layers[layer];
    struct gpu_rows r = rows_with_angles(a, rows, &a->generated);
    if (row_by_row(a->twin)) {
        gpu_launch_row_by_row(a->gpu, &a->shape, l, segments, a->bucket, &r);
        return;
    }
    gpu_launch_store(a->gpu, &a->shape, layer, segments, a->bucket, 1, &r);
    if (!gpu_launch_decode(a->gpu, &a->shape, l, segments, a->bucket, &r))
        gpu_launch_answer(a->gpu, &a->shape, l, segments, a->bucket, 1, &r);
}

void gpu_attention_generated_end(struct gpu_attention *a) {
    for (int i = 0; i < a->n_generated; i++)
        if (a->generated.host[i].slot >= 0) a->positions[a->generated.host[i].slot]++;
    a->n_generated = 0;
}

/* ---- rows of prompts ---- */

/* Wave after wave of each run's rows up to the end of their block, into segments. */
static void plan_waves(struct gpu_attention *a, struct gpu_segment *segments) {
    int64_t w = has_blocks(a->twin) ? a->shape.window_size : INT64_MAX;
    a->n_segments = a->n_waves = 0;
    for (int64_t i = 0;; i++) {
        struct gpu_wave wave = {.first = a->n_segments};
        for (int k = 0; k < a->n_runs; k++) {
            struct gpu_segment run = a->prompt.host[k];
            int64_t end = run.position + run.n_rows,
                    from = i == 0 ? run.position : (run.position / w + i) * w;
            if (from >= end) continue;
            int64_t left = w - from % w;
            int n = end - from < left ? (int)(end - from) : (int)left;
            assert(a->n_segments < a->max_segments);
            segments[a->n_segments++] = (struct gpu_segment){
                .slot = run.slot,
                .first_row = run.first_row + (int)(from - run.position),
                .n_rows = n,
                .position = from,
            };
            if (n > wave.longest) wave.longest = n;
            wave.begins |= begins(a, from);
        }
        wave.n = a->n_segments - wave.first;
        if (!wave.n) return;
        a->waves[a->n_waves++] = wave;
        if (!has_blocks(a->twin)) return;
    }
}

/* One past the last wave from `wave` on whose snapshots fit together. */
static int waves_end(const struct gpu_attention *a, int wave) {
    int end = wave, n = 0;
    while (end < a->n_waves && n + a->waves[end].n <= a->n_snapshots)
        n += a->waves[end++].n;
    return end;
}

void gpu_attention_prompt_begin(struct gpu_attention *a, const struct gpu_attention_run *runs,
                                int n_runs) {
    struct gpu_plan *plan = &a->prompt;
    assert(n_runs <= a->max_runs);
    a->n_runs = n_runs;
    a->longest_run = 0;
    for (int i = 0; i < n_runs; i++) {
        plan->host[i] = (struct gpu_segment){
            .slot = runs[i].slot,
            .first_row = runs[i].first_row,
            .n_rows = runs[i].n_rows,
            .position = a->positions[runs[i].slot],
        };
        assert(runs[i].first_row + runs[i].n_rows <= a->max_rows);
        assert(!a->shape.max_seq_len ||
               plan->host[i].position + runs[i].n_rows <= a->shape.max_seq_len);
        if (runs[i].n_rows > a->longest_run) a->longest_run = runs[i].n_rows;
    }
    struct gpu_segment *segments = plan->host + n_runs;
    plan_waves(a, segments);
    int n = n_runs + a->n_segments;
    for (int wave = 0; a->n_waves > 1 && wave < a->n_waves;) {
        int end = waves_end(a, wave), first = a->waves[wave].first;
        for (int k = first; k < a->waves[end - 1].first + a->waves[end - 1].n; k++, n++) {
            plan->host[n] = segments[k];
            plan->host[n].slot = k - first;
        }
        wave = end;
    }
    gpu_upload(a->gpu, plan->device, plan->host, (size_t)n * sizeof *plan->host);
    gpu_launch_angles(a->gpu, &a->shape, plan->device, n_runs, a->longest_run, plan->cosines,
                      plan->sines);
}

static void answer(struct gpu_attention *a, const struct gpu_shape *shape, struct gpu_layer layer,
                   const struct gpu_segment *segments, int n, int longest,
                   const struct gpu_rows *rows) {
    if (!gpu_launch_prefill(a->gpu, shape, &layer, segments, n, longest, rows))
        gpu_launch_answer(a->gpu, shape, &layer, segments, n, longest, rows);
}

void gpu_attention_prompt_layer(struct gpu_attention *a, int layer,
                                const struct gpu_attention_rows *rows) {
    const struct gpu_segment *runs = a->prompt.device, *segments = runs + a->n_runs,
                             *views = segments + a->n_segments;
    struct gpu_rows r = rows_with_angles(a, rows, &a->prompt);
    if (row_by_row(a->twin)) {
        gpu_launch_row_by_row(a->gpu, &a->shape, &a->layers[layer], runs, a->n_runs, &r);
        return;
    }
    struct gpu_layer only = a->layers[layer]; /* of a snapshot */
    only.layer = 0;
    for (int wave = 0; wave < a->n_waves;) {
        int first = a->waves[wave].first, n = 0, longest = 0;
        int end = a->n_waves > 1 ? waves_end(a, wave) : 1;
        for (; wave < end; wave++) {
            struct gpu_wave now = a->waves[wave];
            if (now.begins) begin_blocks(a, layer, 1, segments + now.first, now.n);
            gpu_launch_store(a->gpu, &a->shape, layer, segments + now.first, now.n, now.longest,
                             &r);
            if (a->n_waves > 1) {
                struct gpu_shape to = a->snapshot;
                to.slots += (size_t)n * to.slot_stride;
                gpu_launch_snapshot(a->gpu, &a->shape, layer, segments + now.first, now.n, &to);
            }
            n += now.n;
            if (now.longest > longest) longest = now.longest;
        }
        if (a->n_waves > 1)
            answer(a, &a->snapshot, only, views + first, n, longest, &r);
        else
            answer(a, &a->shape, a->layers[layer], segments, n, longest, &r);
    }
}

void gpu_attention_prompt_end(struct gpu_attention *a) {
    for (int i = 0; i < a->n_runs; i++)
        a->positions[a->prompt.host[i].slot] += a->prompt.host[i].n_rows;
    a->n_runs = 0;
}
