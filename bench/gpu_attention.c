/* gpu_attention.c - how fast a device reads what sequences remember when it answers one row of
 * each, beside what its memory gives.
 *
 *   build/bench/gpu_attention [135m|8b|softmax]
 *
 * One layer's attention, replayed as one graph, each time another layer of the same slots: together
 * at least 160 MB of what is read, so that caches serve nothing.  Median of several replays.
 *
 *   decode     gpu_launch_decode(): the answer alone
 *   generated  gpu_launch_generated(): keys and values enter too; what the share is of
 *
 * Bytes are gpu_decode_bytes() of every row, and the maps once.  Rows of a window stand at
 * different places of a block, so that the ring is three quarters full on average.  An emulated
 * device runs tiny shapes and shows only that everything runs. */
#include "attention/attention.h"
#include "attention/gpu_decode.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { REPLAYS = 7, ROTATED = 160 << 20, LEAST_LAUNCHES = 16, MOST_LAYERS = 1024 };

static struct gpu *gpu;
static bool emulated;

static void check(enum err err, const char *what) {
    if (err == OK) return;
    fprintf(stderr, "%s: error %d %s\n", what, err, gpu ? gpu_error(gpu) : "");
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static uint64_t rng_state = 1;
static float uniform(void) { /* [-1, 1) */
    rng_state = rng_state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(rng_state >> 32) * 0x1p-31f;
}

static void *device_bytes(size_t bytes) {
    void *at;
    check(gpu_alloc(gpu, &at, bytes), "memory of the device");
    return at;
}

static float *device_uniforms(size_t n, float scale) {
    float *x = malloc(n * sizeof *x), *at = device_bytes(n * sizeof *x);
    if (!x) check(ERR_NOMEM, "memory");
    for (size_t i = 0; i < n; i++)
        x[i] = scale * uniform();
    gpu_upload(gpu, at, x, n * sizeof *x);
    check(gpu_wait(gpu), "upload");
    free(x);
    return at;
}

/* ---- a model's attention ---- */

struct model {
    const char *name;
    enum attention_kind kind;
    int D, F, group, n_kv_heads, state_heads;
    int w, sinks, cache; /* softmax: w is the length of a sequence */
};

static const struct model models_135m[] = {
    {"135m: F 128, window 64, cache 128", ATTENTION_HEDGEHOG, 64, 128, 3, 3, 1, 64, 1, 128},
    {"135m: F 128, window 64", ATTENTION_HEDGEHOG, 64, 128, 3, 3, 1, 64, 1, 0},
    {"135m: F 128, window 16", ATTENTION_HEDGEHOG, 64, 128, 3, 3, 1, 16, 1, 0},
};
static const struct model models_8b[] = {
    {"8b: F 128, 8 states, window 64, cache 128", ATTENTION_HEDGEHOG, 128, 128, 4, 8, 1, 64, 1,
     128},
    {"8b: F 256, 8 states, window 64, cache 128", ATTENTION_HEDGEHOG, 128, 256, 4, 8, 1, 64, 1,
     128},
    {"8b: F 256, 8 states, window 16", ATTENTION_HEDGEHOG, 128, 256, 4, 8, 1, 16, 1, 0},
    {"8b: F 128, 32 states, window 64, cache 128", ATTENTION_HEDGEHOG, 128, 128, 4, 8, 4, 64, 1,
     128},
    {"8b: F 256, 32 states, window 64, cache 128", ATTENTION_HEDGEHOG, 128, 256, 4, 8, 4, 64, 1,
     128},
    {"8b: F 256, 32 states, window 16", ATTENTION_HEDGEHOG, 128, 256, 4, 8, 4, 16, 1, 0},
};
static const struct model models_softmax[] = {
    {"135m: softmax, 1024 tokens", ATTENTION_SOFTMAX, 64, 0, 3, 3, 1, 1024, 0, 0},
    {"135m: softmax, 8192 tokens", ATTENTION_SOFTMAX, 64, 0, 3, 3, 1, 8192, 0, 0},
    {"8b: softmax, 1024 tokens", ATTENTION_SOFTMAX, 128, 0, 4, 8, 1, 1024, 0, 0},
    {"8b: softmax, 8192 tokens", ATTENTION_SOFTMAX, 128, 0, 4, 8, 1, 8192, 0, 0},
    {"8b: softmax, 32768 tokens", ATTENTION_SOFTMAX, 128, 0, 4, 8, 1, 32768, 0, 0},
};
static const struct model models_tiny[] = {
    {"tiny: F 32, window 16, cache 5", ATTENTION_HEDGEHOG, 64, 32, 3, 1, 1, 16, 1, 5},
    {"tiny: softmax, 300 tokens", ATTENTION_SOFTMAX, 128, 0, 4, 1, 1, 300, 0, 0},
};

static struct gpu_shape shape_of(const struct model *m) {
    bool softmax = m->kind == ATTENTION_SOFTMAX;
    size_t D = (size_t)m->D, F = (size_t)m->F;
    struct gpu_shape s = {
        .n_heads = m->group * m->n_kv_heads,
        .n_kv_heads = m->n_kv_heads,
        .group = m->group,
        .state_heads = m->state_heads,
        .head_dim = m->D,
        .lanes = m->D,
        .f = m->F / 2,
        .f_lanes = m->F / 2,
        .features = m->F,
        .phi_lanes = m->F,
        .kind = (int)m->kind,
        .map = MAP_EXP,
        .mixing = MIXING_UNIFIED,
        .window = softmax ? WINDOW_NONE : WINDOW_TERRACED,
        .kv_bf16 = 1,
        .window_size = softmax ? 0 : m->w,
        .sinks = m->sinks,
        .most_cache = m->cache,
        .ring = softmax ? m->w : 2 * m->w,
        .max_distance = softmax ? 0 : 1024,
        .max_seq_len = softmax ? m->w : 0,
        .map_before_rope = !softmax,
        .rope = 1,
    };
    s.most_entries = s.sinks + m->cache + s.ring;
    s.turned = 0; /* keys that are not read are left out */
    s.S_floats = D * F;
    s.state_floats = D * F + F;
    return s;
}

/* Rooms of n_layers, here and on the device; the caller frees them. */
static struct gpu_room *place_rooms(struct gpu_shape *s, int n_layers) {
    size_t heads = (size_t)n_layers * (size_t)s->n_kv_heads;
    struct gpu_room *rooms = calloc(heads, sizeof *rooms),
                    *at = device_bytes(heads * sizeof *rooms);
    if (!rooms) check(ERR_NOMEM, "rooms");
    for (size_t i = 0; i < heads; i++)
        rooms[i].cache = s->most_cache;
    s->slot_stride = (gpu_place_rooms(s, rooms, heads, 64) + 63) / 64 * 64;
    gpu_upload(gpu, at, rooms, heads * sizeof *rooms);
    check(gpu_wait(gpu), "rooms");
    s->rooms = at;
    return rooms;
}

/* n slots, all alike: random bf16 numbers, and positions of a cache that spreads over the text. */
static void *fill_slots(struct gpu_shape *s, const struct gpu_room *rooms, int n, int n_layers,
                        int64_t position) {
    int cache = s->most_cache;
    size_t bytes = s->slot_stride, block = (size_t)1 << 20;
    uint16_t *slot = malloc(bytes + block);
    if (!slot) check(ERR_NOMEM, "memory");
    for (size_t i = 0; i < block / 2; i++) {
        float x = uniform();
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        slot[i] = (uint16_t)(bits >> 16);
    }
    for (size_t at = block; at < bytes; at += block)
        memcpy((char *)slot + at, slot, block);
    int64_t *positions = (int64_t *)((char *)slot + rooms[0].positions); /* the others' follow */
    for (int i = 0; i < n_layers * s->n_kv_heads * cache; i++)
        positions[i] = s->sinks + (position - 200) * (i % cache) / cache;
    char *at = device_bytes((size_t)n * bytes);
    gpu_upload(gpu, at, slot, bytes);
    for (int i = 1; i < n; i++)
        gpu_copy(gpu, at + (size_t)i * bytes, at, bytes);
    check(gpu_wait(gpu), "slots");
    free(slot);
    s->slots = at;
    return at;
}

/* ---- what is timed ---- */

struct work {
    void (*queue)(const struct work *w, int i);
    int n_launches, n_layers, n;
    struct gpu_shape shape;
    struct gpu_layer layer;
    struct gpu_rows rows;
    void *segments, *scratch;
    void *to, *from; /* copied */
    size_t bytes;
};

static void queue_copy(const struct work *w, int i) {
    (void)i;
    gpu_copy(gpu, w->to, w->from, w->bytes);
}
static void queue_decode(const struct work *w, int i) {
    struct gpu_layer layer = w->layer;
    layer.layer = i % w->n_layers;
    gpu_launch_decode(gpu, &w->shape, &layer, w->segments, w->n, &w->rows);
}
static void queue_generated(const struct work *w, int i) {
    struct gpu_layer layer = w->layer;
    layer.layer = i % w->n_layers;
    gpu_launch_generated(gpu, &w->shape, &layer, w->segments, w->n, &w->rows, w->scratch);
}

static double seconds_each(struct work *w, void (*queue)(const struct work *w, int i)) {
    struct gpu_graph *graph;
    double times[REPLAYS];
    for (int i = 0; i < w->n_launches; i++)
        queue(w, i);
    check(gpu_wait(gpu), "first run");
    gpu_record_begin(gpu);
    for (int i = 0; i < w->n_launches; i++)
        queue(w, i);
    check(gpu_record_end(gpu, &graph), "graph");
    int n = emulated ? 1 : REPLAYS;
    for (int r = 0; r < n; r++) {
        double start = now();
        gpu_replay(gpu, graph);
        check(gpu_wait(gpu), "replay");
        times[r] = (now() - start) / w->n_launches;
    }
    gpu_graph_free(gpu, graph);
    qsort(times, (size_t)n, sizeof *times, by_value);
    return times[n / 2];
}

static double copy_bandwidth(void) { /* bytes/s, read and written */
    size_t bytes = (size_t)1 << (emulated ? 20 : 30);
    struct work w = {.n_launches = 8, .bytes = bytes};
    w.from = device_bytes(bytes);
    w.to = device_bytes(bytes);
    double each = seconds_each(&w, queue_copy);
    gpu_release(gpu, w.from);
    gpu_release(gpu, w.to);
    return 2 * (double)bytes / each;
}

/* ---- the table ---- */

static void measure(const struct model *m, int n, double bandwidth) {
    bool softmax = m->kind == ATTENTION_SOFTMAX;
    int64_t position = softmax ? m->w - 1 : 64 * m->w; /* of the first; others are up to w off */
    struct gpu_segment *segments = calloc((size_t)n, sizeof *segments);
    struct gpu_shape one = shape_of(m);
    double bytes = 4.0 * m->D * (m->F / 2) * one.n_heads;
    if (!segments) check(ERR_NOMEM, "segments");
    for (int i = 0; i < n; i++) {
        int off = i * 37 % m->w;
        segments[i] = (struct gpu_segment){i, i, 1, softmax ? position - off / 16 : position + off};
        bytes += (double)gpu_decode_bytes(&one, segments[i].position);
    }
    double layers = ceil((emulated ? 1 : ROTATED) / bytes);
    struct work w = {.n = n, .n_layers = layers < MOST_LAYERS ? (int)layers : MOST_LAYERS};
    w.n_launches = w.n_layers;
    if (w.n_launches < LEAST_LAUNCHES && !emulated)
        w.n_launches = LEAST_LAUNCHES / w.n_layers * w.n_layers;
    w.shape = one;
    struct gpu_room *rooms = place_rooms(&w.shape, w.n_layers);
    size_t needed = (size_t)n * w.shape.slot_stride;
    if (needed > gpu_free_bytes(gpu) / 10 * 9) {
        printf("%-44s %4d rows: %.1f GB of slots are too many\n", m->name, n,
               (double)needed * 1e-9);
        gpu_release(gpu, (void *)w.shape.rooms);
        free(segments), free(rooms);
        return;
    }
    fill_slots(&w.shape, rooms, n, w.n_layers, position);
    w.segments = device_bytes((size_t)n * sizeof *segments);
    gpu_upload(gpu, w.segments, segments, (size_t)n * sizeof *segments);
    check(gpu_wait(gpu), "segments");
    free(segments), free(rooms);
    size_t D = (size_t)m->D, heads = (size_t)one.n_heads, kv_heads = (size_t)m->n_kv_heads,
           row = (heads + 2 * kv_heads) * D, rows = (size_t)n;
    w.scratch = device_bytes(gpu_generated_scratch_bytes(&w.shape, n) + 1);
    if (!softmax) {
        w.layer.map_q = device_uniforms(heads * D * (size_t)m->F / 2, 0.3f);
        w.layer.mix = device_uniforms(heads, 1);
    }
    w.rows.q = device_uniforms(rows * row, 1);
    w.rows.k = w.rows.q + heads * D;
    w.rows.v = w.rows.k + kv_heads * D;
    w.rows.q_row = w.rows.k_row = w.rows.v_row = row;
    w.rows.y = device_bytes(rows * heads * D * 2);
    w.rows.y_row = heads * D;
    w.rows.y_bf16 = 1;
    w.rows.cosines = w.rows.sines = device_uniforms(rows * D / 2, 1);
    w.rows.far_cosines = w.rows.far_sines = w.rows.cosines;

    double decode = seconds_each(&w, queue_decode), generated = seconds_each(&w, queue_generated);
    printf("%-44s %4d rows %8.2f MB  decode %8.2f us %5.1f %%  generated %8.2f us %7.1f GB/s %5.1f "
           "%%\n",
           m->name, n, bytes * 1e-6, decode * 1e6, 100 * bytes / decode / bandwidth,
           generated * 1e6, bytes / generated * 1e-9, 100 * bytes / generated / bandwidth);
    fflush(stdout);
    gpu_release(gpu, w.shape.slots), gpu_release(gpu, (void *)w.shape.rooms);
    gpu_release(gpu, w.segments), gpu_release(gpu, w.scratch);
    gpu_release(gpu, (void *)w.layer.map_q), gpu_release(gpu, (void *)w.layer.mix);
    gpu_release(gpu, (void *)w.rows.q), gpu_release(gpu, w.rows.y);
    gpu_release(gpu, (void *)w.rows.cosines);
}

static void measure_all(const struct model *models, size_t n_models, double bandwidth) {
    static const int rows[] = {1, 8, 32, 128, 512}, few_rows[] = {1, 20};
    size_t n = emulated ? sizeof few_rows / sizeof *few_rows : sizeof rows / sizeof *rows;
    for (size_t i = 0; i < n_models; i++)
        for (size_t r = 0; r < n; r++)
            measure(&models[i], emulated ? few_rows[r] : rows[r], bandwidth);
}

int main(int argc, char **argv) {
    char msg[256] = "";
    const char *only = argc > 1 ? argv[1] : "";
    if (*only && strcmp(only, "135m") && strcmp(only, "8b") && strcmp(only, "softmax")) {
        fprintf(stderr, "usage: gpu_attention [135m|8b|softmax]\n");
        return 2;
    }
    if (gpu_open(&gpu, msg, sizeof msg)) {
        fprintf(stderr, "%s\n", msg);
        return 1;
    }
    emulated = gpu_info(gpu)->emulated;
    double bandwidth = copy_bandwidth();
    printf("%s: copies %.1f GB/s\n", gpu_info(gpu)->name, bandwidth * 1e-9);
    if (emulated) {
        measure_all(models_tiny, sizeof models_tiny / sizeof *models_tiny, bandwidth);
    } else {
        if (!*only || !strcmp(only, "135m"))
            measure_all(models_135m, sizeof models_135m / sizeof *models_135m, bandwidth);
        if (!*only || !strcmp(only, "8b"))
            measure_all(models_8b, sizeof models_8b / sizeof *models_8b, bandwidth);
        if (!*only || !strcmp(only, "softmax"))
            measure_all(models_softmax, sizeof models_softmax / sizeof *models_softmax, bandwidth);
    }
    gpu_close(gpu);
    return 0;
}
