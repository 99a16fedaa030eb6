/* gpu_attention.c - attention on a device: parameters and slots there, and a step cut into
 * launches.
 *
 * Prompts of a terraced window go by pieces, rows of one run, and blocks of pieces: what begins a
 * block is a chain of one launch each, and all rows are answered at once (gpu_kernels.h, struct
 * gpu_chain).  Generated rows that begin a block do so in all layers before the first. */
#include "attention/gpu_internal.h"

#include "attention/gpu_decode.h"
#include "compute/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { KEYS_MOST = 256 << 20, SNAPSHOTS_MOST = 256 << 20 }; /* bytes, if one is not more */

static size_t align(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

static bool row_by_row(const struct attention *twin) {
    return twin->config.kind == ATTENTION_HEDGEHOG && twin->config.window != WINDOW_TERRACED;
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
        .ring = l->ring,
        .cache_age = c->cache_age,
        .cache_fact_age = c->cache_fact_age,
        .most_cache = l->most_cache,
        .most_entries = l->entries,
        .horizon = c->horizon,
        .max_distance = c->max_distance,
        .max_seq_len = c->max_seq_len,
        .map_before_rope = c->map_before_rope,
        .rope = twin->rope != NULL,
        .turned = l->turned != l->keys,
        .exact = exact,
        .slot_stride = gpu_attention_slot_bytes(twin),
        .S_floats = l->S_floats,
        .state_floats = l->state_floats,
    };
}

static size_t all_heads(const struct attention *twin) {
    return (size_t)twin->n_layers * twin->config.n_kv_heads;
}

size_t gpu_attention_slot_bytes(const struct attention *twin) {
    return align(twin->layout.chosen); /* the choice is not kept */
}

/* As many as are wanted, if they are no more than `most` bytes; but at least `least`. */
static int fitting(size_t want, size_t bytes, size_t most, size_t least) {
    size_t n = most / bytes < want ? most / bytes : want;
    return (int)(n > least ? n : least);
}

static size_t key_bytes(const struct gpu_shape *s) {
    return gpu_chain_phi_bytes(s) + gpu_chain_value_bytes(s);
}

/* How much there is of what is not slots. */
static void set_sizes(struct gpu_attention *a, int max_rows, int max_runs) {
    a->n_layers = a->twin->n_layers;
    a->max_rows = max_rows;
    a->max_runs = max_runs;
    for (a->max_bucket = 1; a->max_bucket < max_runs;)
        a->max_bucket *= 2;
    a->max_segments = max_runs;
    if (!gpu_has_blocks(a)) return;
    int w = a->shape.window_size;
    a->max_segments = max_rows / w + 2 * max_runs;
    if (a->max_segments > max_rows) a->max_segments = max_rows;
    a->snapshot = a->shape;
    a->snapshot.slot_stride =
        gpu_rooms_of_snapshots(&a->shape, a->n_layers, a->rooms, a->rooms + all_heads(a->twin));
    /* a step's prompts, or all layers of a few rows that begin a block */
    size_t few = (size_t)a->n_layers * (size_t)(max_runs < 8 ? max_runs : 8),
           cache = a->shape.most_cache;
    size_t blocks = (size_t)a->max_segments, keys = max_rows + max_runs * (cache + 2 * w);
    a->n_snapshots =
        fitting(blocks > few ? blocks : few, a->snapshot.slot_stride, SNAPSHOTS_MOST, 1);
    a->max_keys = fitting(keys > few * (cache + w) ? keys : few * (cache + w), key_bytes(&a->shape),
                          KEYS_MOST, cache + w);
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

/* ---- new and free ---- */

/* Device memory where there is any to have. */
static enum err allocate(struct gpu_attention *a, void *out, size_t bytes) {
    return bytes ? gpu_alloc(a->gpu, (void **)out, bytes) : OK;
}

static enum err new_plan(struct gpu_attention *a, struct gpu_plan *plan, int n_segments,
                         int n_blocks, int n_rows) {
    size_t pieces = (size_t)n_segments * sizeof *plan->segments,
           blocks = pieces + (size_t)n_blocks * sizeof *plan->pieces,
           bytes = blocks + (size_t)n_blocks * sizeof *plan->blocks;
    enum err e = gpu_host_alloc(a->gpu, (void **)&plan->host, bytes);
    if (!e) e = allocate(a, &plan->device, bytes);
    if (!e) e = allocate(a, &plan->cosines, angles_bytes(a, n_rows));
    if (!e) e = allocate(a, &plan->sines, angles_bytes(a, n_rows));
    if (e) return e;
    plan->segments = (struct gpu_segment *)plan->host;
    plan->segments_at = (struct gpu_segment *)plan->device;
    plan->pieces = (struct gpu_piece *)(plan->host + pieces);
    plan->pieces_at = (struct gpu_piece *)(plan->device + pieces);
    plan->blocks = (struct gpu_block *)(plan->host + blocks);
    plan->blocks_at = (struct gpu_block *)(plan->device + blocks);
    return OK;
}

static void free_plan(struct gpu_attention *a, struct gpu_plan *plan) {
    gpu_host_release(a->gpu, plan->host);
    gpu_release(a->gpu, plan->device);
    gpu_release(a->gpu, plan->cosines);
    gpu_release(a->gpu, plan->sines);
}

static void upload(struct gpu_attention *a, void *device, const void *host, size_t n, size_t size) {
    if (n) gpu_upload(a->gpu, device, host, n * size);
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
    size_t half = (size_t)a->shape.head_dim / 2, heads = all_heads(a->twin);
    enum err e = allocate(a, &a->parameters, parameter_bytes(a));
    if (!e) e = allocate(a, &a->rooms_at, 2 * heads * sizeof *a->rooms);
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
    gpu_upload(a->gpu, a->rooms_at, a->rooms, 2 * heads * sizeof *a->rooms);
    a->shape.rooms = a->rooms_at;
    a->snapshot.rooms = a->rooms_at + heads;
    a->shape.theta = a->snapshot.theta = a->theta;
    return OK;
}

static enum err place_all_but_slots(struct gpu_attention *a) {
    const struct layout *l = &a->twin->layout;
    bool hedgehog = a->twin->config.kind == ATTENTION_HEDGEHOG;
    enum err e = place_parameters(a);
    size_t snapshots = (size_t)a->n_snapshots, keys = (size_t)a->max_keys;
    if (!e) e = new_plan(a, &a->generated, a->max_bucket, a->max_runs, a->max_bucket);
    if (!e)
        e = new_plan(a, &a->prompt, a->max_runs + a->max_segments, a->max_segments, a->max_rows);
    if (!e) e = allocate(a, &a->scratch, gpu_generated_scratch_bytes(&a->shape, a->max_bucket));
    if (!e) e = allocate(a, &a->snapshots, snapshots * a->snapshot.slot_stride);
    if (!e) e = allocate(a, &a->phi, keys * gpu_chain_phi_bytes(&a->shape));
    if (!e) e = allocate(a, &a->values, keys * gpu_chain_value_bytes(&a->shape));
    if (!e) e = allocate(a, &a->errors, snapshots * gpu_chain_error_bytes(&a->shape));
    if (!e) e = allocate(a, &a->lists, snapshots * gpu_chain_list_bytes(&a->shape));
    if (!e)
        e = gpu_host_alloc(a->gpu, (void **)&a->host, hedgehog ? l->slot_bytes : GPU_FERRY_BYTES);
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
    struct gpu_room *rooms = calloc(2 * all_heads(twin), sizeof *rooms);
    if (!a || !rooms) {
        free(a);
        free(rooms);
        return err_set(msg, msg_len, ERR_NOMEM, "no memory for attention");
    }
    a->gpu = g;
    a->twin = twin;
    a->n_slots = n_slots;
    a->shape = shape_of(twin, exact);
    a->rooms = rooms;
    gpu_rooms_of_slots(twin, rooms);
    set_sizes(a, max_rows, max_runs);
    a->positions = calloc((size_t)n_slots, sizeof *a->positions);
    a->layers = calloc((size_t)a->n_layers, sizeof *a->layers);
    a->waves = calloc((size_t)a->max_segments, sizeof *a->waves);
    a->groups = calloc((size_t)a->max_segments, sizeof *a->groups);
    enum err e = ERR_NOMEM;
    bool fits = !gpu_has_blocks(a) || gpu_chain_fits(gpu_info(g), &a->shape);
    if (fits && a->positions && a->layers && a->waves && a->groups) e = place_all_but_slots(a);
    if (!fits)
        err_set(msg, msg_len, e,
                "a recall cache of %d places is more than the device can choose in a block of "
                "threads: serve the model with a smaller %s",
                a->shape.most_cache,
                twin->config.retrieval_size > twin->config.cache_size ? "--retrieval-size"
                                                                      : "--cache-size");
    else if (e)
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
    gpu_release(a->gpu, a->rooms_at);
    gpu_release(a->gpu, a->theta);
    gpu_release(a->gpu, a->far_angles);
    gpu_release(a->gpu, a->scratch);
    gpu_release(a->gpu, a->snapshots);
    gpu_release(a->gpu, a->phi);
    gpu_release(a->gpu, a->values);
    gpu_release(a->gpu, a->errors);
    gpu_release(a->gpu, a->lists);
    gpu_release(a->gpu, a->whole);
    gpu_release(a->gpu, a->slots);
    gpu_host_release(a->gpu, a->host);
    free(a->positions);
    free(a->layers);
    free(a->rooms);
    free(a->waves);
    free(a->groups);
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

static struct gpu_chain chain_of(const struct gpu_attention *a, const struct gpu_plan *plan,
                                 int first_layer, int n_layers) {
    const struct gpu_room *rooms = a->rooms + (size_t)first_layer * a->shape.n_kv_heads;
    int least = rooms->cache, most = rooms->cache;
    for (int i = 1; i < n_layers * a->shape.n_kv_heads; i++) {
        if (rooms[i].cache < least) least = rooms[i].cache;
        if (rooms[i].cache > most) most = rooms[i].cache;
    }
    return (struct gpu_chain){
        .first_layer = first_layer,
        .n_layers = n_layers,
        .least_cache = least,
        .most_cache = most,
        .shape = a->shape,
        .snapshot = a->snapshot,
        .layers = a->layers_at,
        .pieces = plan->pieces_at,
        .blocks = plan->blocks_at,
        .phi = a->phi,
        .values = a->values,
        .errors = a->errors,
        .lists = a->lists,
    };
}

/* ---- generated rows ---- */

/* Row i, which is the first of a block, as a piece of its own that begins the block and reads
 * nothing; room for `together` of them at once. */
static void plan_beginning(struct gpu_attention *a, int i, int together, struct gpu_segment row) {
    int w = a->shape.window_size, at = i % together, keys = a->shape.most_cache + w;
    row.n_rows = 0;
    a->generated.pieces[i] = (struct gpu_piece){
        .slot = row.slot,
        .position = row.position,
        .oldest = row.position - 2 * w,
        .first_key = at * keys,
        .n_keys = keys,
        .last_block = at,
    };
    a->generated.blocks[i] =
        (struct gpu_block){.segment = row, .piece = at, .previous = -1, .begins = 1};
}

static void begin_blocks(struct gpu_attention *a, int n, int layers, int together) {
    static const struct gpu_rows none;
    int keys = a->shape.most_cache + a->shape.window_size;
    for (int i = 0; i < n; i += together)
        for (int l = 0; l < a->n_layers; l += layers) {
            int n_layers = a->n_layers - l < layers ? a->n_layers - l : layers;
            struct gpu_chain c = chain_of(a, &a->generated, l, n_layers);
            c.n_pieces = c.n_blocks = n - i < together ? n - i : together;
            c.pieces = a->generated.pieces_at + i;
            c.blocks = a->generated.blocks_at + i;
            c.n_keys = c.n_pieces * keys;
            gpu_launch_prepare(a->gpu, &c, keys, &none);
            gpu_launch_recall(a->gpu, &c, c.n_blocks);
            gpu_launch_wave(a->gpu, &c, 0, 0, c.n_blocks);
            gpu_launch_place(a->gpu, &c, &none);
            gpu_launch_commit(a->gpu, &c);
        }
}

void gpu_attention_generated_begin(struct gpu_attention *a, const int *slots, int n, int bucket) {
    struct gpu_plan *plan = &a->generated;
    assert(n <= bucket && n <= a->max_runs && bucket <= a->max_bucket);
    a->bucket = bucket;
    a->n_generated = n;
    int layers = 0, together = 0, n_begin = 0;
    if (gpu_has_blocks(a)) {
        int room = a->max_keys / (a->shape.most_cache + a->shape.window_size);
        if (room > a->n_snapshots) room = a->n_snapshots;
        layers = room < a->n_layers ? room : a->n_layers;
        together = room / layers;
    }
    for (int i = 0; i < bucket; i++) {
        struct gpu_segment *s = &plan->segments[i];
        *s = (struct gpu_segment){.slot = i < n ? slots[i] : -1, .first_row = i, .n_rows = 1};
        if (s->slot < 0) continue;
        s->position = a->positions[s->slot];
        assert(!a->shape.max_seq_len || s->position < a->shape.max_seq_len);
        if (gpu_begins(a, s->position)) plan_beginning(a, n_begin++, together, *s);
    }
    upload(a, plan->segments_at, plan->segments, (size_t)bucket, sizeof *plan->segments);
    upload(a, plan->pieces_at, plan->pieces, (size_t)n_begin, sizeof *plan->pieces);
    upload(a, plan->blocks_at, plan->blocks, (size_t)n_begin, sizeof *plan->blocks);
    gpu_launch_angles(a->gpu, &a->shape, plan->segments_at, bucket, 1, plan->cosines, plan->sines);
    if (n_begin) begin_blocks(a, n_begin, layers, together);
}

void gpu_attention_generated_layer(struct gpu_attention *a, int layer,
                                   const struct gpu_attention_rows *rows) {
    const struct gpu_segment *segments = a->generated.segments_at;
    const struct gpu_layer *l = &a->layers[layer];
    struct gpu_rows r = rows_with_angles(a, rows, &a->generated);
    if (row_by_row(a->twin)) {
        gpu_launch_row_by_row(a->gpu, &a->shape, l, segments, a->bucket, &r);
        return;
    }
    if (gpu_launch_generated(a->gpu, &a->shape, l, segments, a->bucket, &r, a->scratch)) return;
    gpu_launch_store(a->gpu, &a->shape, layer, segments, a->bucket, 1, &r);
    gpu_launch_answer(a->gpu, &a->shape, l, segments, a->bucket, 1, &r);
}

void gpu_attention_generated_end(struct gpu_attention *a) {
    for (int i = 0; i < a->n_generated; i++)
        if (a->generated.segments[i].slot >= 0) a->positions[a->generated.segments[i].slot]++;
    a->n_generated = 0;
}

/* ---- rows of prompts ---- */

void gpu_attention_prompt_begin(struct gpu_attention *a, const struct gpu_attention_run *runs,
                                int n_runs) {
    struct gpu_plan *plan = &a->prompt;
    int longest = 0;
    assert(n_runs <= a->max_runs);
    a->n_runs = n_runs;
    for (int i = 0; i < n_runs; i++) {
        plan->segments[i] = (struct gpu_segment){
            .slot = runs[i].slot,
            .first_row = runs[i].first_row,
            .n_rows = runs[i].n_rows,
            .position = a->positions[runs[i].slot],
        };
        assert(runs[i].first_row + runs[i].n_rows <= a->max_rows);
        assert(!a->shape.max_seq_len ||
               plan->segments[i].position + runs[i].n_rows <= a->shape.max_seq_len);
        if (runs[i].n_rows > longest) longest = runs[i].n_rows;
    }
    gpu_plan_prompts(a);
    if (!a->n_groups) return;
    struct gpu_group last = a->groups[a->n_groups - 1];
    size_t n_pieces = (size_t)(last.piece + last.n_pieces),
           n_blocks = (size_t)(last.block + last.n_blocks);
    upload(a, plan->segments_at, plan->segments, (size_t)a->max_runs + n_blocks,
           sizeof *plan->segments);
    if (gpu_has_blocks(a)) {
        upload(a, plan->pieces_at, plan->pieces, n_pieces, sizeof *plan->pieces);
        upload(a, plan->blocks_at, plan->blocks, n_blocks, sizeof *plan->blocks);
    }
    gpu_launch_angles(a->gpu, &a->shape, plan->segments_at, n_runs, longest, plan->cosines,
                      plan->sines);
}

static void answer(struct gpu_attention *a, const struct gpu_shape *shape,
                   const struct gpu_layer *layer, const struct gpu_segment *segments, int n,
                   int longest, const struct gpu_rows *rows) {
    if (!gpu_launch_prefill(a->gpu, shape, layer, segments, n, longest, rows))
        gpu_launch_answer(a->gpu, shape, layer, segments, n, longest, rows);
}

/* Blocks begin, and each leaves a snapshot; the slots are as after the last row. */
static void chain_blocks(struct gpu_attention *a, const struct gpu_group *g, int layer,
                         const struct gpu_rows *rows) {
    struct gpu_chain c = chain_of(a, &a->prompt, layer, 1);
    c.pieces += g->piece;
    c.blocks += g->block;
    c.n_pieces = g->n_pieces;
    c.n_blocks = g->n_blocks;
    c.n_keys = g->n_keys;
    gpu_launch_prepare(a->gpu, &c, g->most_keys, rows);
    if (g->begins) gpu_launch_recall(a->gpu, &c, a->waves[g->wave].n);
    for (int i = 0; i < g->n_waves; i++)
        gpu_launch_wave(a->gpu, &c, i, a->waves[g->wave + i].first, a->waves[g->wave + i].n);
    gpu_launch_place(a->gpu, &c, rows);
    gpu_launch_commit(a->gpu, &c);
}

void gpu_attention_prompt_layer(struct gpu_attention *a, int layer,
                                const struct gpu_attention_rows *rows) {
    const struct gpu_segment *runs = a->prompt.segments_at;
    struct gpu_rows r = rows_with_angles(a, rows, &a->prompt);
    const struct gpu_layer *l = &a->layers[layer];
    if (row_by_row(a->twin)) {
        gpu_launch_row_by_row(a->gpu, &a->shape, l, runs, a->n_runs, &r);
        return;
    }
    for (int i = 0; i < a->n_groups; i++) {
        const struct gpu_group *g = &a->groups[i];
        const struct gpu_segment *segments = runs + a->max_runs + g->block;
        if (g->chained) {
            chain_blocks(a, g, layer, &r);
            answer(a, &a->snapshot, l, segments, g->n_blocks, g->longest, &r);
        } else {
            gpu_launch_store(a->gpu, &a->shape, layer, segments, g->n_blocks, g->longest, &r);
            answer(a, &a->shape, l, segments, g->n_blocks, g->longest, &r);
        }
    }
}

void gpu_attention_prompt_end(struct gpu_attention *a) {
    for (int i = 0; i < a->n_runs; i++)
        a->positions[a->prompt.segments[i].slot] += a->prompt.segments[i].n_rows;
    a->n_runs = 0;
}
