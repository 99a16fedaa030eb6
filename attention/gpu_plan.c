/* gpu_plan.c - rows of prompts cut into what is launched together: runs into pieces that the
 * scratch has room for, pieces into blocks, and blocks in the order in which they begin. */
#include "attention/gpu_internal.h"

#include <assert.h>

bool gpu_has_blocks(const struct gpu_attention *a) {
    return a->twin->config.kind == ATTENTION_HEDGEHOG && a->twin->config.window == WINDOW_TERRACED;
}

bool gpu_begins(const struct gpu_attention *a, int64_t position) {
    int64_t w = a->shape.window_size;
    return gpu_has_blocks(a) && position >= 2 * w && position % w == 0;
}

/* The largest piece of a run's rows from position `from` on that there still is room for; its
 * n_keys are those that blocks of it fold. */
static struct gpu_piece next_piece(const struct gpu_attention *a, const struct gpu_group *g,
                                   struct gpu_segment run, int64_t from) {
    int64_t w = gpu_has_blocks(a) ? a->shape.window_size : INT64_MAX;
    int64_t end = run.position + run.n_rows, oldest = from % w ? from / w - 1 : from / w - 2;
    struct gpu_piece piece = {
        .slot = run.slot,
        .first_row = run.first_row + (int)(from - run.position),
        .position = from,
        .oldest = oldest > 0 ? oldest * w : 0,
        .first_key = g->n_keys,
    };
    int n_blocks = g->n_blocks, keys = 0;
    for (int64_t at = from; at < end; n_blocks++) {
        if (gpu_begins(a, at)) keys = a->shape.most_cache + (int)((at / w - 1) * w - piece.oldest);
        bool fits = n_blocks < a->n_snapshots && g->n_keys + keys <= a->max_keys;
        if (gpu_has_blocks(a) && !fits) break;
        int64_t left = w - at % w;
        at += left < end - at ? left : end - at;
        piece.n_rows = (int)(at - from);
        piece.n_keys = keys;
    }
    return piece;
}

/* Wave after wave of the group's pieces' rows up to the end of their block. */
static void plan_blocks(struct gpu_attention *a, struct gpu_group *g) {
    int64_t w = gpu_has_blocks(a) ? a->shape.window_size : INT64_MAX;
    struct gpu_segment *segments = a->prompt.segments + a->max_runs + g->block;
    struct gpu_block *blocks = a->prompt.blocks + g->block;
    for (int i = 0;; i++) {
        struct gpu_wave wave = {.first = g->n_blocks};
        for (int k = 0; k < g->n_pieces; k++) {
            struct gpu_piece *piece = &a->prompt.pieces[g->piece + k];
            int64_t end = piece->position + piece->n_rows,
                    from = i == 0 ? piece->position : (piece->position / w + i) * w;
            if (from >= end) continue;
            int64_t left = w - from % w;
            struct gpu_segment s = {
                .slot = piece->slot,
                .first_row = piece->first_row + (int)(from - piece->position),
                .n_rows = (int)(end - from < left ? end - from : left),
                .position = from,
            };
            bool begin = gpu_begins(a, from);
            blocks[g->n_blocks] = (struct gpu_block){
                .segment = s,
                .piece = k,
                .previous = i ? piece->last_block : -1,
                .begins = begin,
                .more = from + s.n_rows < end && gpu_begins(a, from + s.n_rows),
            };
            segments[g->n_blocks] = s;
            if (s.n_rows > g->longest) g->longest = s.n_rows;
            g->chained |= begin;
            g->begins |= begin && i == 0;
            piece->last_block = g->n_blocks++;
        }
        wave.n = g->n_blocks - wave.first;
        if (!wave.n) break;
        a->waves[g->wave + g->n_waves++] = wave;
        if (!gpu_has_blocks(a)) break;
    }
    for (int k = 0; g->chained && k < g->n_blocks; k++) /* rows see snapshots */
        segments[k].slot = k;
}

static struct gpu_group *new_group(struct gpu_attention *a) {
    struct gpu_group *g = &a->groups[a->n_groups++], *last = a->n_groups > 1 ? g - 1 : NULL;
    *g = (struct gpu_group){0};
    if (last) {
        g->piece = last->piece + last->n_pieces;
        g->block = last->block + last->n_blocks;
        g->wave = last->wave + last->n_waves;
    }
    return g;
}

void gpu_plan_prompts(struct gpu_attention *a) {
    a->n_groups = 0;
    struct gpu_group *g = NULL;
    for (int k = 0; k < a->n_runs; k++) {
        struct gpu_segment run = a->prompt.segments[k];
        int64_t from = run.position, end = from + run.n_rows;
        while (from < end) {
            if (!g) g = new_group(a);
            struct gpu_piece piece = next_piece(a, g, run, from);
            if (!piece.n_rows) { /* full */
                assert(g->n_pieces);
                g->n_blocks = 0;
                plan_blocks(a, g);
                g = NULL;
                continue;
            }
            a->prompt.pieces[g->piece + g->n_pieces++] = piece;
            from += piece.n_rows;
            if (gpu_has_blocks(a)) {
                int64_t w = a->shape.window_size;
                g->n_blocks += (int)((from - 1) / w - piece.position / w) + 1;
            }
            g->n_keys += piece.n_keys;
            if (piece.n_keys > g->most_keys) g->most_keys = piece.n_keys;
        }
    }
    if (!g) return;
    g->n_blocks = 0;
    plan_blocks(a, g);
}
