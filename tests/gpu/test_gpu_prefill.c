/* test_gpu_prefill.c - answers to rows of prompts by tensor cores, against the kernel that sums in
 * fp32 (gpu_launch_answer()), on slots of random contents.
 *
 * Queries are bf16 numbers and rotations quarter turns, so that scores are exact but for the order
 * of their sums; what differs is the rounding of weights and features to bf16, half an ulp: each
 * weight of a row is off by 2^-9 of itself at most, and exponents of features, |u| < 20, by less
 * than 2^-12. Values and S / z lie in [-1, 1], y is their mean, so y is off by at most 2 (2^-9 +
 * 2^-12) and some 2^-16.  Logits spread by 3 or so: single entries weigh a tenth of a row and more.
 */
#include "attention/attention.h"
#include "attention/gpu_kernels.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/emu/emu.h"

static const float TOLERANCE = 2 * (0x1p-9f + 0x1p-12f + 0x1p-16f);

static struct gpu *gpu;

/* ---- numbers that follow from where they are ---- */

static float noise(uint64_t what, uint64_t i) { /* [-1, 1) */
    uint64_t x = (what * 0x9e3779b97f4a7c15u) ^ (i + 0x632be59bd9b4e019u);
    for (int k = 0; k < 3; k++) {
        x ^= x >> 32;
        x *= 0xd6e8feb86659fd93u;
    }
    return (float)(int32_t)(x >> 32) * 0x1p-31f;
}
static uint16_t to_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
static float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

enum what { QUERY = 1, COSINE, FAR_COSINE, MAP, BIAS, MIX, KEY, VALUE, S_MEAN, Z };

static void *allocate(size_t bytes) { /* all NaN */
    void *p = malloc(bytes);
    assert_non_null(p);
    memset(p, 0xff, bytes);
    return p;
}
static void *on_device(const void *from, size_t bytes) {
    void *at;
    assert_int_equal(gpu_alloc(gpu, &at, bytes), OK);
    gpu_upload(gpu, at, from, bytes);
    assert_int_equal(gpu_wait(gpu), OK);
    return at;
}

/* ---- a model, and sequences that have read some tokens ---- */

struct model {
    int D, F, kv_heads, group, w, sinks, cache;
    int odd_cache; /* of every other kv head; 0: as the others */
    int map, mixing;
    bool softmax, per_query_head, rope, map_after_rope, bias, y_bf16;
    int64_t max_distance;
    bool rough;      /* queries of 24 bits, and keys too small to matter */
    int max_seq_len; /* softmax */
};

enum { LAYERS = 2, LAYER = 1, MOST_SEGMENTS = 5, MOST_HEADS = LAYERS * 8 };

struct part { /* rows of a sequence */
    int slot;
    int64_t position;
    int n_rows;
    int sequence; /* whose numbers */
    int cached;   /* places of the cache in use, at most: as many as there are */
};

static struct gpu_shape shape_of(const struct model *m, struct gpu_room *rooms) {
    struct gpu_shape s = {
        .n_heads = m->kv_heads * m->group,
        .n_kv_heads = m->kv_heads,
        .group = m->group,
        .state_heads = m->per_query_head ? m->group : 1,
        .head_dim = m->D,
        .lanes = m->D,
        .kind = m->softmax ? ATTENTION_SOFTMAX : ATTENTION_HEDGEHOG,
        .map = m->map,
        .mixing = m->mixing,
        .window = m->softmax ? WINDOW_NONE : WINDOW_TERRACED,
        .kv_bf16 = 1,
        .window_size = m->w,
        .sinks = m->sinks,
        .most_cache = m->odd_cache > m->cache ? m->odd_cache : m->cache,
        .ring = m->softmax ? m->max_seq_len : 2 * m->w,
        .max_seq_len = m->max_seq_len,
        .max_distance = m->max_distance,
        .map_before_rope = !m->map_after_rope,
        .rope = m->rope,
        .turned = 1,
    };
    s.f = s.f_lanes = m->F / 2;
    s.features = s.phi_lanes = m->F;
    s.most_entries = s.sinks + s.most_cache + s.ring;
    s.S_floats = m->softmax ? 0 : (size_t)m->F * m->D;
    s.state_floats = m->softmax ? 0 : s.S_floats + m->F;
    size_t heads = (size_t)LAYERS * s.n_kv_heads;
    assert_true(heads <= MOST_HEADS);
    for (size_t i = 0; i < heads; i++)
        rooms[i] = (struct gpu_room){.cache = i % 2 && m->odd_cache ? m->odd_cache : m->cache};
    s.slot_stride = (gpu_place_rooms(&s, rooms, heads, 64) + 127) / 64 * 64;
    return s;
}

/* What a sequence's memory holds for its row at `last`; what that row does not see stays NaN. */
static void fill_slot(const struct model *m, const struct gpu_shape *s,
                      const struct gpu_room *rooms, char *slot, const struct part *p,
                      int64_t last) {
    int64_t block = m->w ? last / m->w : 0;
    for (int kv = 0; kv < s->n_kv_heads; kv++) {
        const struct gpu_room *room = &rooms[LAYER * s->n_kv_heads + kv];
        int cache = room->cache, cached = p->cached < cache ? p->cached : cache;
        uint64_t owner = ((uint64_t)p->sequence * 64 + (uint64_t)kv) << 32;
        uint16_t *keys = (uint16_t *)(slot + room->turned);
        uint16_t *values = (uint16_t *)(slot + room->values);
        int64_t *positions = (int64_t *)(slot + room->positions);
        for (int i = 0; i < cache; i++)
            positions[i] = i < cached ? s->sinks + 3 * i : -1;
        for (int e = 0; e < s->sinks + cache + s->ring; e++) {
            int ring = e - s->sinks - cache, half = m->w ? ring / m->w : 0;
            bool sees = false;
            if (m->softmax)
                sees = e <= last;
            else if (e < s->sinks)
                sees = block >= 2;
            else if (ring < 0)
                sees = e - s->sinks < cached;
            else if (half == block % 2)
                sees = ring % m->w <= last % m->w;
            else
                sees = block >= 1;
            for (int d = 0; sees && d < m->D; d++) {
                uint64_t at = owner + (uint64_t)e * 256 + (uint64_t)d;
                keys[((size_t)(e / 16) * (size_t)m->D + (size_t)d) * 16 + (size_t)(e % 16)] =
                    to_bf16(noise(KEY, at) * (m->rough ? 0x1p-8f : 1));
                values[(size_t)e * (size_t)m->D + (size_t)d] = to_bf16(noise(VALUE, at));
            }
        }
        if (m->softmax || block < 2) continue;
        for (int h = 0; h < s->state_heads; h++) {
            float *state = (float *)(slot + room->states) + (size_t)h * s->state_floats;
            uint16_t *hi = (uint16_t *)state;
            float *z = state + s->S_floats;
            for (int f = 0; f < m->F; f++) {
                uint64_t at = owner + (uint64_t)(h * 256 + f) * 256;
                z[f] = 2 + 1.9f * noise(Z, at);
                for (int d = 0; d < m->D; d++)
                    hi[(size_t)f * (size_t)m->D + (size_t)d] =
                        to_bf16(z[f] * noise(S_MEAN, at + (uint64_t)d));
            }
        }
    }
}

/* ---- answers ---- */

struct answers {
    float *y; /* [rows][heads D] */
    int n_rows, row;
};

static float *noises(enum what what, size_t n, float scale) {
    float *x = allocate((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = scale * noise(what, i);
    return x;
}

/* Quarter turns. */
static void turn(enum what what, uint64_t i, float *cosine, float *sine) {
    float x = noise(what, i);
    *cosine = x < -0.5f ? 1.0f : x < 0 ? -1.0f : 0.0f;
    *sine = x < 0 ? 0.0f : x < 0.5f ? 1.0f : -1.0f;
}

/* y of the parts, one segment each, rows in order of the parts; a row's query follows from its
 * sequence and position.  fast: by gpu_launch_prefill(). */
static struct answers answer(const struct model *m, const struct part *parts, int n_parts,
                             bool fast) {
    struct gpu_room rooms[MOST_HEADS];
    struct gpu_shape s = shape_of(m, rooms);
    int D = m->D, half = D / 2, heads = s.n_heads, row = heads * D, max_rows = 0, n_rows = 0;
    struct gpu_segment segments[MOST_SEGMENTS];
    int n_slots = 1;
    for (int i = 0; i < n_parts; i++) {
        segments[i] =
            (struct gpu_segment){parts[i].slot, n_rows, parts[i].n_rows, parts[i].position};
        n_rows += parts[i].n_rows;
        if (parts[i].n_rows > max_rows) max_rows = parts[i].n_rows;
        if (parts[i].slot >= n_slots) n_slots = parts[i].slot + 1;
    }
    char *slots = allocate((size_t)n_slots * s.slot_stride);
    size_t q_row = (size_t)row + 8, n_q = (size_t)n_rows * q_row;
    float *q = allocate(n_q * 4), *cosines = allocate((size_t)n_rows * (size_t)half * 4),
          *sines = allocate((size_t)n_rows * (size_t)half * 4), far[2][64];
    int r = 0;
    for (int i = 0; i < n_parts; i++) {
        const struct part *p = &parts[i];
        if (p->slot >= 0)
            fill_slot(m, &s, rooms, slots + (size_t)p->slot * s.slot_stride, p,
                      p->position + p->n_rows - 1);
        for (int k = 0; k < p->n_rows; k++, r++) {
            uint64_t at = ((uint64_t)p->sequence << 40) + (uint64_t)(p->position + k) * 8192;
            for (int x = 0; x < row; x++) {
                float v = (m->rough ? 2 : 3) * noise(QUERY, at + (uint64_t)x);
                q[(size_t)r * q_row + (size_t)x] = m->rough ? v : from_bf16(to_bf16(v));
            }
            for (int x = 0; x < half; x++)
                turn(COSINE, at + (uint64_t)x, &cosines[r * half + x], &sines[r * half + x]);
        }
    }
    for (int x = 0; x < half; x++)
        turn(FAR_COSINE, (uint64_t)x, &far[0][x], &far[1][x]);

    size_t n_map = (size_t)heads * (size_t)D * (size_t)s.f, y_row = (size_t)row + 2;
    float *map = noises(MAP, n_map, m->rough ? 0.3f : 0.16f),
          *bias = noises(BIAS, (size_t)heads * (size_t)s.f, 1),
          *mix = noises(MIX, (size_t)heads, 1);
    if (m->rough) /* few terms: what rounding of a factor does is not averaged away */
        for (size_t i = 0; i < n_map; i++)
            map[i] = i / (size_t)s.f % 16 == i % 16 ? 8 * map[i] : 0;
    void *map_at = on_device(map, n_map * 4),
         *bias_at = on_device(bias, (size_t)heads * (size_t)s.f * 4),
         *mix_at = on_device(mix, (size_t)heads * 4), *q_at = on_device(q, n_q * 4),
         *cosines_at = on_device(cosines, (size_t)n_rows * (size_t)half * 4),
         *sines_at = on_device(sines, (size_t)n_rows * (size_t)half * 4),
         *far_at = on_device(far, sizeof far),
         *slots_at = on_device(slots, (size_t)n_slots * s.slot_stride),
         *segments_at = on_device(segments, sizeof segments),
         *rooms_at = on_device(rooms, sizeof rooms);
    size_t n_y = (size_t)n_rows * y_row, y_bytes = n_y * (m->y_bf16 ? 2 : 4);
    void *y = allocate(y_bytes), *y_at = on_device(y, y_bytes);

    struct gpu_layer layer = {.layer = LAYER};
    if (!m->softmax) {
        layer.map_q = map_at;
        layer.mix = mix_at;
        if (m->bias) layer.map_q_bias = bias_at;
    }
    s.slots = slots_at, s.rooms = rooms_at;
    struct gpu_rows rows = {.q = q_at,
                            .q_row = q_row,
                            .y = y_at,
                            .y_row = y_row,
                            .y_bf16 = m->y_bf16,
                            .cosines = cosines_at,
                            .sines = sines_at,
                            .far_cosines = far_at,
                            .far_sines = (float *)far_at + 64};
    if (fast)
        assert_true(gpu_launch_prefill(gpu, &s, &layer, segments_at, n_parts, max_rows, &rows));
    else
        gpu_launch_answer(gpu, &s, &layer, segments_at, n_parts, max_rows, &rows);
    gpu_download(gpu, y, y_at, y_bytes);
    assert_int_equal(gpu_wait(gpu), OK);

    struct answers a = {allocate((size_t)n_rows * (size_t)row * 4), n_rows, row};
    for (int i = 0; i < n_rows; i++)
        for (size_t x = 0; x < y_row; x++) {
            size_t at = (size_t)i * y_row + x;
            float v = m->y_bf16 ? from_bf16(((uint16_t *)y)[at]) : ((float *)y)[at];
            if (x < (size_t)row)
                a.y[(size_t)i * (size_t)row + x] = v;
            else
                assert_true(isnan(v)); /* nothing beside the answers is written */
        }
    void *device[] = {map_at, bias_at,  mix_at,      q_at, cosines_at, sines_at,
                      far_at, slots_at, segments_at, y_at, rooms_at};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        gpu_release(gpu, device[i]);
    void *host[] = {map, bias, mix, q, cosines, sines, slots, y};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++)
        free(host[i]);
    return a;
}

static float largest_difference(struct answers a, struct answers b) { /* NaN: inf */
    float most = 0;
    for (int i = 0; i < a.n_rows * a.row; i++) {
        float off = fabsf(a.y[i] - b.y[i]);
        if (!(off <= most)) most = isnan(off) ? INFINITY : off;
    }
    return most;
}

/* Prefill's answers, the same in both orders of threads. */
static struct answers fast_answer(const struct model *m, const struct part *parts, int n_parts) {
    emu_set_order(0, 0);
    struct answers a = answer(m, parts, n_parts, true);
    emu_set_order(2, 12345);
    struct answers b = answer(m, parts, n_parts, true);
    emu_set_order(0, 0);
    assert_memory_equal(a.y, b.y, (size_t)a.n_rows * (size_t)a.row * 4);
    free(b.y);
    return a;
}

static void agrees(const struct model *m, struct part part, const char *what) {
    struct answers fast = fast_answer(m, &part, 1), plain = answer(m, &part, 1, false);
    float off = largest_difference(fast, plain), most = TOLERANCE + (m->y_bf16 ? 0x1p-8f : 0);

    if (!(off <= most)) fail_msg("%s: off by %g, more than %g", what, (double)off, (double)most);
    free(fast.y);
    free(plain.y);
}

/* ---- tests ---- */

static const struct model HEDGEHOG = {.D = 64,
                                      .F = 128,
                                      .kv_heads = 1,
                                      .group = 1,
                                      .w = 64,
                                      .sinks = 1,
                                      .cache = 40,
                                      .rope = true,
                                      .max_distance = 150};

static void test_agrees_with_fp32_for_every_shape(void **state) {
    (void)state;
    struct model m = HEDGEHOG;
    agrees(&m, (struct part){0, 64 * 5 + 3, 61, 1, 33}, "D 64, F 128");
    m.F = 32;
    agrees(&m, (struct part){0, 64 * 4, 17, 2, 40}, "D 64, F 32");
    m.F = 96, m.y_bf16 = true, m.bias = true;
    agrees(&m, (struct part){0, 64 * 4 + 17, 30, 2, 40}, "D 64, F 96, bias, bf16 answers");
    m.F = 256, m.group = 3, m.y_bf16 = false;
    agrees(&m, (struct part){0, 64 * 7 + 20, 44, 3, 40}, "D 64, F 256, group 3");
    m.D = 128, m.group = 1, m.cache = 7, m.sinks = 0;
    agrees(&m, (struct part){0, 64 * 6 + 1, 31, 3, 7}, "D 128, F 256");
    m.group = 4, m.F = 64, m.kv_heads = 2;
    agrees(&m, (struct part){0, 64 * 6 + 50, 14, 3, 7}, "D 128, F 64, group 4, two kv heads");
    m.per_query_head = true, m.F = 32, m.kv_heads = 1, m.group = 2;
    agrees(&m, (struct part){0, 64 * 6 + 40, 9, 3, 7}, "D 128, F 32, a state for each query head");
    m = HEDGEHOG, m.w = 128, m.F = 32;
    agrees(&m, (struct part){0, 128 * 3 + 60, 66, 3, 40}, "window 128");
    m.kv_heads = 4;
    agrees(&m, (struct part){0, 128 * 4, 70, 3, 40}, "window 128, four heads");
    m.w = 48;
    agrees(&m, (struct part){0, 48 * 3 + 30, 18, 3, 40}, "window 48");
}

/* What the second of two heads sees is its own: more places than the first has, and fewer. */
static void test_agrees_with_fp32_where_heads_have_places_of_their_own(void **state) {
    (void)state;
    struct model m = HEDGEHOG;
    m.kv_heads = 2, m.F = 32, m.odd_cache = 90;
    agrees(&m, (struct part){0, 64 * 5 + 3, 61, 1, 90}, "90 places beside 40");
    agrees(&m, (struct part){0, 64 * 3, 20, 1, 90}, "90 places beside 40, nothing folded");
    m.group = 2, m.odd_cache = 5;
    agrees(&m, (struct part){0, 64 * 4 + 3, 61, 1, 40}, "5 places beside 40");
}

static void test_agrees_with_fp32_for_every_map_and_mixing(void **state) {
    (void)state;
    struct model m = HEDGEHOG;
    for (m.map = MAP_EXP; m.map <= MAP_JOINT_SOFTMAX; m.map++)
        for (m.mixing = MIXING_UNIFIED; m.mixing <= MIXING_LOLCATS; m.mixing++) {
            char what[64];
            snprintf(what, sizeof what, "map %d, mixing %d", m.map, m.mixing);
            m.F = m.map ? 64 : 32;
            agrees(&m, (struct part){0, 64 * 5 + 33, 20, 1, 33}, what);
            agrees(&m, (struct part){0, 64 + 12, 20, 1, 0}, what); /* nothing folded yet */
        }
    m = HEDGEHOG, m.map_after_rope = true, m.max_distance = 0;
    agrees(&m, (struct part){0, 64 * 5 + 33, 20, 1, 33}, "map after RoPE");
    m.rope = false;
    agrees(&m, (struct part){0, 64 * 5 + 33, 20, 1, 33}, "no RoPE");
}

/* One product of rounded factors would be off by 2^-9 |u|, up to 5 percent of a feature. */
static void test_features_are_not_rounded_before_their_exponential(void **state) {
    (void)state;
    struct model m = HEDGEHOG;
    m.rough = true;
    m.cache = 0;
    agrees(&m, (struct part){0, 64 * 4 + 3, 61, 1, 0}, "queries of 24 bits");
}

/* The first block sees part of half a ring, the second more, later ones sinks, cache and state. */
static void test_agrees_with_fp32_from_block_to_block(void **state) {
    (void)state;
    struct model m = HEDGEHOG;
    m.F = 32, m.sinks = 5, m.cache = 64;
    const struct {
        int64_t start;
        int rows, cached;
    } cases[] = {{0, 1, 0},    {5, 59, 0},    {63, 1, 0},           {64, 64, 0},
                 {100, 28, 0}, {128, 13, 17}, {64 * 3 + 7, 20, 64}, {64 * 4 + 1, 50, 64}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int64_t from = cases[i].start / 64 * 64;
        /* cached keys are at 5, 8, ...: clamped are none, two sinks, some keys, a stage and more,
         * all */
        const int64_t distances[] = {0, from - 2, from - 40, from - 120, 1};
        for (size_t k = 0; k < sizeof distances / sizeof *distances; k++) {
            m.max_distance = distances[k];
            if (m.max_distance < 0 || (k && from < 128)) continue;
            char what[80];
            snprintf(what, sizeof what, "%d rows from %d on, max_distance %d", cases[i].rows,
                     (int)cases[i].start, (int)m.max_distance);
            agrees(&m, (struct part){0, cases[i].start, cases[i].rows, 1, cases[i].cached}, what);
        }
    }
}

static void test_softmax_agrees_with_fp32(void **state) {
    (void)state;
    struct model m = {.D = 64,
                      .kv_heads = 1,
                      .group = 1,
                      .softmax = true,
                      .rope = true,
                      .max_seq_len = 401,
                      .map_after_rope = true};
    agrees(&m, (struct part){0, 0, 1, 1, 0}, "one row");
    agrees(&m, (struct part){0, 0, 200, 1, 0}, "200 rows");
    agrees(&m, (struct part){0, 31, 130, 1, 0}, "130 rows from 31 on");
    agrees(&m, (struct part){0, 400, 1, 1, 0}, "the last row");
    m.D = 128, m.group = 3, m.kv_heads = 2;
    agrees(&m, (struct part){0, 77, 66, 1, 0}, "D 128, group 3");
    m.group = 1, m.kv_heads = 4;
    agrees(&m, (struct part){0, 90, 50, 1, 0}, "D 128, four heads");
}

/* Pieces of a prompt: each with the memory as it was then, NaN for what comes later. */
static void pieces_agree(const struct model *m, struct part whole, const int *cuts) {
    struct answers all = fast_answer(m, &whole, 1);
    int done = 0;
    for (int i = 0; done < whole.n_rows; i++) {
        struct part piece = whole;
        piece.position += done;
        piece.n_rows = cuts[i] < whole.n_rows - done ? cuts[i] : whole.n_rows - done;
        struct answers a = answer(m, &piece, 1, true);
        assert_memory_equal(a.y, all.y + done * all.row, (size_t)(a.n_rows * a.row) * 4);
        free(a.y);
        done += piece.n_rows;
    }
    free(all.y);
}

static void test_any_cut_gives_the_same_bits(void **state) {
    (void)state;
    struct model m = HEDGEHOG;
    m.F = 64;
    pieces_agree(&m, (struct part){0, 64 * 5, 64, 1, 33}, (int[]){1, 14, 2, 16, 30, 64});
    m.map = MAP_SOFTMAX2, m.mixing = MIXING_LOLCATS;
    pieces_agree(&m, (struct part){0, 64 * 5 + 7, 50, 1, 33}, (int[]){5, 40, 64});
    m = HEDGEHOG, m.D = 128, m.F = 32, m.group = 2, m.kv_heads = 4; /* blocks of two heads */
    pieces_agree(&m, (struct part){0, 64 * 3, 63, 1, 12}, (int[]){33, 1, 64});
    m = (struct model){.D = 64,
                       .kv_heads = 2,
                       .group = 1,
                       .softmax = true,
                       .rope = true,
                       .max_seq_len = 300,
                       .map_after_rope = true};
    /* the whole by tiles of 128 rows of a head, its pieces by tiles of 64 */
    pieces_agree(&m, (struct part){0, 3, 260, 1, 0}, (int[]){1, 62, 70, 100, 300});
}

/* Alone a sequence is answered by blocks of one head, in company by blocks of two. */
static void test_neighbours_and_slots_change_no_bit(void **state) {
    (void)state;
    for (int kind = 0; kind < 2; kind++) {
        struct model m = HEDGEHOG;
        m.F = 64, m.group = 3;
        if (kind)
            m = (struct model){
                .D = 128, .kv_heads = 1, .group = 3, .softmax = true, .max_seq_len = 130};
        struct part part = {0, 64 + (kind ? 0 : 64 * 3) + 5, 40, 7, kind ? 0 : 29};
        struct part parts[5] = {
            {2, 3, 21, 1, 0}, {-1, 0, 9, 2, 0}, {0, 64 + 60, 4, 3, 0}, {1, 0, 1, 4, 0}};
        parts[4] = part;
        parts[4].slot = 4;
        struct answers alone = fast_answer(&m, &part, 1), beside = fast_answer(&m, parts, 5);
        int first = 21 + 9 + 4 + 1;
        assert_memory_equal(alone.y, beside.y + first * beside.row, (size_t)(40 * alone.row) * 4);
        for (int i = 21 * beside.row; i < 30 * beside.row; i++) /* padding */
            assert_true(beside.y[i] == 0);
        for (int i = 0; i < beside.n_rows * beside.row; i++)
            assert_true(isfinite(beside.y[i]));
        free(alone.y);
        free(beside.y);
    }
}

static void test_other_shapes_are_left_to_others(void **state) {
    (void)state;
    struct model m = HEDGEHOG;
    struct gpu_room rooms[MOST_HEADS];
    struct gpu_shape right = shape_of(&m, rooms), s;
    struct gpu_layer layer = {0};
    struct gpu_rows rows = {.q_row = 4, .y_row = 2};
    struct gpu_segment segment = {0, 0, 1, 0};
    assert_true(gpu_launch_prefill(gpu, &right, &layer, &segment, 0, 1, &rows));
#define REFUSED(change)                                                                            \
    do {                                                                                           \
        s = right;                                                                                 \
        change;                                                                                    \
        assert_false(gpu_launch_prefill(gpu, &s, &layer, &segment, 1, 1, &rows));                  \
    } while (0)
    REFUSED(s.head_dim = 80);
    REFUSED(s.kv_bf16 = 0);
    REFUSED(s.exact = 1);
    REFUSED(s.window = WINDOW_SLIDING);
    REFUSED(s.window_size = 40);
    REFUSED(s.features = 48);
    REFUSED(s.features = 288);
    REFUSED(rows.q_row = 6);
    assert_int_equal(gpu_wait(gpu), OK); /* nothing was queued */
}

int main(void) {
    char msg[128] = "";
    if (gpu_open(&gpu, msg, sizeof msg)) {
        fprintf(stderr, "%s\n", msg);
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_agrees_with_fp32_for_every_shape),
        cmocka_unit_test(test_agrees_with_fp32_where_heads_have_places_of_their_own),
        cmocka_unit_test(test_agrees_with_fp32_for_every_map_and_mixing),
        cmocka_unit_test(test_features_are_not_rounded_before_their_exponential),
        cmocka_unit_test(test_agrees_with_fp32_from_block_to_block),
        cmocka_unit_test(test_softmax_agrees_with_fp32),
        cmocka_unit_test(test_any_cut_gives_the_same_bits),
        cmocka_unit_test(test_neighbours_and_slots_change_no_bit),
        cmocka_unit_test(test_other_shapes_are_left_to_others),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    gpu_close(gpu);
    return failed;
}
