/* gpu_lesson.c - device memory of a lesson, and the plan of who sees whom. */
#include "convert/gpu_lesson.h"

#include "convert/gpu_kernels.h"

#include <stdlib.h>

static size_t q_floats(const struct attention_config *c) {
    return (size_t)c->n_heads * (size_t)c->head_dim;
}
static size_t kv_floats(const struct attention_config *c) {
    return 2 * (size_t)c->n_kv_heads * (size_t)c->head_dim;
}
static size_t tiles(int n) {
    return ((size_t)n + GPU_ROW_TILE - 1) / GPU_ROW_TILE;
}
static size_t plan_ints(int n_tokens, int n_rows) {
    return (size_t)n_tokens + 3 * (size_t)n_rows + 2 * tiles(n_rows) + 2 * tiles(n_tokens);
}

size_t gpu_lesson_bytes(const struct attention_config *c, int n_layers, int max_tokens,
                        int max_rows) {
    size_t tokens = (size_t)max_tokens,
           floats = (size_t)n_layers * (tokens * kv_floats(c) + (size_t)max_rows * q_floats(c)) +
                    (tokens + 1) * (size_t)c->head_dim;
    return floats * sizeof(float) + plan_ints(max_tokens, max_rows) * sizeof(int);
}

static void copy_angles(struct gpu_lesson *l, float **cosines, float **sines,
                        const float *const from[2], size_t n, enum err *e) {
    if (!from) return;
    float **to[2] = {cosines, sines};
    for (int i = 0; i < 2; i++) {
        if (!*e) *e = gpu_alloc(l->gpu, (void **)to[i], n * sizeof **to[i]);
        if (!*e) gpu_upload(l->gpu, *to[i], from[i], n * sizeof **to[i]);
    }
}

enum err gpu_lesson_new(struct gpu_lesson **out, struct gpu *g, const struct attention_config *c,
                        int n_layers, int max_tokens, int max_rows, const float *const angles[2],
                        const float *const far[2]) {
    struct gpu_lesson *l = calloc(1, sizeof *l);
    if (!l) return ERR_NOMEM;
    size_t layers = (size_t)n_layers, tokens = (size_t)max_tokens, rows = (size_t)max_rows,
           half = (size_t)c->head_dim / 2, ints = plan_ints(max_tokens, max_rows);
    l->gpu = g;
    l->n_layers = n_layers;
    l->max_tokens = max_tokens;
    l->max_rows = max_rows;
    l->q_floats = q_floats(c);
    l->kv_floats = kv_floats(c);
    enum err e = gpu_alloc(g, (void **)&l->kv, layers * tokens * l->kv_floats * sizeof *l->kv);
    if (!e) e = gpu_alloc(g, (void **)&l->q, layers * rows * l->q_floats * sizeof *l->q);
    if (!e) e = gpu_alloc(g, (void **)&l->plan_at, ints * sizeof *l->plan_at);
    if (!e) e = gpu_host_alloc(g, (void **)&l->plan, ints * sizeof *l->plan);
    copy_angles(l, &l->cosines, &l->sines, angles, tokens * half, &e);
    copy_angles(l, &l->far_cosines, &l->far_sines, far, half, &e);
    if (!e) e = gpu_wait(g); /* the angles have been read */
    if (e) {
        gpu_lesson_free(l);
        return e;
    }
    *out = l;
    return OK;
}

void gpu_lesson_free(struct gpu_lesson *l) {
    if (!l) return;
    void *device[] = {l->kv, l->q, l->plan_at, l->cosines, l->sines, l->far_cosines, l->far_sines};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        gpu_release(l->gpu, device[i]);
    gpu_host_release(l->gpu, l->plan);
    free(l);
}

/* The plan's arrays, one behind the other, on the host (at: plan) or the device. */
struct arrays {
    int *rows, *first, *position, *positions, *spans, *seen_by;
};
static struct arrays arrays_in(const struct gpu_lesson *l, int *at) {
    size_t n = (size_t)l->n_rows, tokens = (size_t)l->n_tokens;
    return (struct arrays){.rows = at,
                           .first = at + n,
                           .position = at + 2 * n,
                           .positions = at + 3 * n,
                           .spans = at + 3 * n + tokens,
                           .seen_by = at + 3 * n + tokens + 2 * tiles(l->n_rows)};
}

static void lay_out(const struct gpu_lesson *l, const struct lesson *from, struct arrays a) {
    int document = 0, n_tiles = (int)tiles(l->n_rows);
    for (int d = 0; d < from->n_documents; d++)
        for (int i = from->first[d]; i < from->first[d + 1]; i++)
            a.positions[i] = i - from->first[d];
    for (int r = 0; r < l->n_rows; r++) {
        int token = from->rows[l->part + r * l->n_parts];
        while (token >= from->first[document + 1])
            document++;
        a.rows[r] = token;
        a.first[r] = from->first[document];
        a.position[r] = token - from->first[document];
    }
    for (int t = 0; t < n_tiles; t++) {
        int last = (t + 1) * GPU_ROW_TILE < l->n_rows ? (t + 1) * GPU_ROW_TILE : l->n_rows;
        a.spans[2 * t] = a.first[t * GPU_ROW_TILE] / GPU_KEY_TILE * GPU_KEY_TILE;
        a.spans[2 * t + 1] = (a.rows[last - 1] / GPU_KEY_TILE + 1) * GPU_KEY_TILE;
    }
    for (int k = 0; k < (int)tiles(l->n_tokens); k++) {
        int key = k * GPU_ROW_TILE, from_tile = 0, end = 0; /* spans ascend at both ends */
        while (from_tile < n_tiles && a.spans[2 * from_tile + 1] <= key)
            from_tile++;
        for (end = from_tile; end < n_tiles && a.spans[2 * end] <= key;)
            end++;
        a.seen_by[2 * k] = from_tile * GPU_ROW_TILE;
        a.seen_by[2 * k + 1] = end * GPU_ROW_TILE;
    }
}

void gpu_lesson_plan(struct gpu_lesson *l, const struct lesson *lesson) {
    l->n_tokens = lesson->n_tokens;
    l->n_rows = lesson_n_rows(lesson);
    l->all_rows = lesson->n_rows;
    l->part = lesson->part;
    l->n_parts = lesson_row_step(lesson);
    lay_out(l, lesson, arrays_in(l, l->plan));
    struct arrays a = arrays_in(l, l->plan_at);
    l->rows = a.rows;
    l->first = a.first;
    l->position = a.position;
    l->positions = a.positions;
    l->spans = a.spans;
    l->seen_by = a.seen_by;
    gpu_upload(l->gpu, l->plan_at, l->plan, plan_ints(l->n_tokens, l->n_rows) * sizeof *l->plan);
}

void gpu_lesson_take(struct gpu_lesson *l, int layer, const float *qkv, int at, int n,
                     int first_row, int n_taken) {
    size_t row = l->q_floats + l->kv_floats, tokens = (size_t)l->n_tokens,
           rows = (size_t)l->all_rows;
    float *kv = l->kv + ((size_t)layer * tokens + (size_t)at) * l->kv_floats,
          *q = l->q + ((size_t)layer * rows + (size_t)first_row) * l->q_floats;
    gpu_take_rows(l->gpu, kv, l->kv_floats, qkv + l->q_floats, row, NULL, 0, n);
    gpu_take_rows(l->gpu, q, l->q_floats, qkv, row, l->rows + first_row, at, n_taken);
}

enum err gpu_lesson_download(struct gpu_lesson *l, float *kv, float *q) {
    size_t layers = (size_t)l->n_layers, n_kv = layers * (size_t)l->n_tokens * l->kv_floats,
           n_q = layers * (size_t)l->all_rows * l->q_floats;
    gpu_download(l->gpu, kv, l->kv, n_kv * sizeof *kv);
    gpu_download(l->gpu, q, l->q, n_q * sizeof *q);
    return gpu_wait(l->gpu);
}
