/* test_gpu_decode.c - the fast kernels of generated rows against gpu_launch_answer(), the general
 * one, over slots with random contents.
 *
 * Whatever a row does not see is NaN: entries, the lo planes of S, the state of a sequence that has
 * none.  Queries, values and maps lie in [-1, 1), |S_fd| <= z_f, so that y is a mean of numbers up
 * to 1. */
#include "attention/attention.h"
#include "attention/gpu_decode.h"
#include "compute/ops.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/gpu/orders.h"

enum { LAYERS = 2, LAYER = 1, MOST_SEGMENTS = 40, MOST_HEADS = LAYERS * 16 };
enum { ANSWER, DECODE, GENERATED }; /* which kernels */

static struct gpu *gpu;
static float most_used; /* of a tolerance */

static uint64_t rng_state = 1;
static float uniform(float low, float high) {
    rng_state = rng_state * 6364136223846793005u + 1442695040888963407u;
    return low + (high - low) * (float)(rng_state >> 40) * 0x1p-24f;
}
static uint16_t bf16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16); /* towards zero */
}
static void *device(const void *from, size_t bytes) {
    void *at;
    assert_int_equal(gpu_alloc(gpu, &at, bytes), OK);
    if (from)
        gpu_upload(gpu, at, from, bytes);
    else
        gpu_fill(gpu, at, 0xff, bytes);
    if (gpu_wait(gpu)) fail_msg("%s", gpu_error(gpu));
    return at;
}
static float *uniforms(size_t n, float scale) {
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = uniform(-scale, scale);
    return x;
}
static float *device_uniforms(size_t n, float scale) {
    float *x = uniforms(n, scale), *at = device(x, n * sizeof *x);
    free(x);
    return at;
}

/* ---- a model's attention, and slots ---- */

struct setting {
    enum attention_kind kind;
    int D, F, group, n_kv_heads;
    bool state_per_query_head;
    enum feature_map map;
    enum mixing mixing;
    int w, sinks, cache;
    int odd_cache; /* of every other head; 0: as the others */
    int64_t max_distance, max_seq_len;
    bool before_rope, no_rope, bias;
};
static const struct setting base = {
    .kind = ATTENTION_HEDGEHOG,
    .D = 64,
    .F = 64,
    .group = 3,
    .n_kv_heads = 1,
    .map = MAP_EXP,
    .mixing = MIXING_UNIFIED,
    .w = 16,
    .sinks = 2,
    .cache = 21,
    .max_distance = 70,
    .before_rope = true,
};

struct rig {
    struct gpu_shape s;
    struct gpu_room rooms[MOST_HEADS];
    struct gpu_layer layer;
    struct gpu_rows rows; /* of MOST_SEGMENTS rows */
    struct gpu_segment segments[MOST_SEGMENTS];
    int n;
    char *slots; /* the host's copy */
    void *at, *segments_at, *scratch;
    size_t slots_bytes;
};

static size_t up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

static void rig_open(struct rig *r, const struct setting *set, int n_slots) {
    bool softmax = set->kind == ATTENTION_SOFTMAX;
    int D = set->D, F = softmax ? 0 : set->F, n_heads = set->group * set->n_kv_heads;
    size_t heads = (size_t)LAYERS * (size_t)set->n_kv_heads;
    memset(r, 0, sizeof *r);
    struct gpu_shape *s = &r->s;
    s->n_heads = n_heads, s->n_kv_heads = set->n_kv_heads, s->group = set->group;
    s->state_heads = set->state_per_query_head ? set->group : 1;
    s->head_dim = s->lanes = D;
    s->f = s->f_lanes = F / 2, s->features = s->phi_lanes = F;
    s->kind = (int)set->kind, s->map = (int)set->map, s->mixing = (int)set->mixing;
    s->window = softmax ? WINDOW_NONE : WINDOW_TERRACED;
    s->kv_bf16 = 1;
    s->window_size = softmax ? 0 : set->w, s->sinks = softmax ? 0 : set->sinks;
    s->most_cache = set->odd_cache > set->cache ? set->odd_cache : set->cache;
    if (softmax) s->most_cache = 0;
    s->ring = softmax ? (int)set->max_seq_len : 2 * set->w;
    s->most_entries = s->sinks + s->most_cache + s->ring;
    s->max_seq_len = set->max_seq_len, s->max_distance = softmax ? 0 : set->max_distance;
    s->map_before_rope = set->before_rope, s->rope = !set->no_rope;
    s->S_floats = (size_t)F * (size_t)D, s->state_floats = s->S_floats + (size_t)F;
    s->turned = s->rope && s->map_before_rope;
    assert_true(heads <= MOST_HEADS);
    for (size_t i = 0; i < heads && !softmax; i++)
        r->rooms[i].cache = i % 2 && set->odd_cache ? set->odd_cache : set->cache;
    s->slot_stride = up(gpu_place_rooms(s, r->rooms, heads, 64), 64);
    s->rooms = device(r->rooms, sizeof r->rooms);
    r->slots_bytes = (size_t)n_slots * s->slot_stride;
    r->slots = malloc(r->slots_bytes);
    memset(r->slots, 0xff, r->slots_bytes);
    s->slots = r->at = device(r->slots, r->slots_bytes);
    r->segments_at = device(NULL, sizeof r->segments);

    r->layer.layer = LAYER;
    if (!softmax) {
        r->layer.map_q = device_uniforms((size_t)n_heads * (size_t)(D * F / 2), 0.5f);
        r->layer.mix = device_uniforms((size_t)n_heads, 1);
        if (set->bias) r->layer.map_q_bias = device_uniforms((size_t)(n_heads * F / 2), 1);
    }
    /* q, k and v of a row side by side; y with a gap behind */
    size_t row = (size_t)((n_heads + 2 * set->n_kv_heads) * D);
    r->rows.q = device_uniforms(MOST_SEGMENTS * row, 1);
    r->rows.k = r->rows.q + n_heads * D, r->rows.v = r->rows.k + set->n_kv_heads * D;
    r->rows.q_row = r->rows.k_row = r->rows.v_row = row;
    r->rows.y_row = (size_t)(n_heads * D + 8);
    r->rows.y = device(NULL, MOST_SEGMENTS * r->rows.y_row * sizeof(float));
    float *angles = malloc(2 * (MOST_SEGMENTS + 1) * (size_t)D / 2 * sizeof *angles);
    size_t half = (MOST_SEGMENTS + 1) * (size_t)D / 2;
    for (size_t i = 0; i < half; i++) {
        float angle = uniform(0, 6);
        angles[i] = cosf(angle), angles[half + i] = sinf(angle);
    }
    if (s->rope) {
        r->rows.cosines = device(angles, 2 * half * sizeof *angles);
        r->rows.sines = r->rows.cosines + half;
        r->rows.far_cosines = r->rows.cosines + MOST_SEGMENTS * D / 2;
        r->rows.far_sines = r->rows.sines + MOST_SEGMENTS * D / 2;
    }
    free(angles);
    size_t bytes = gpu_generated_scratch_bytes(s, MOST_SEGMENTS);
    r->scratch = device(NULL, bytes + 1);
}

static void rig_close(struct rig *r) {
    gpu_release(gpu, (void *)r->s.rooms);
    gpu_release(gpu, r->at), gpu_release(gpu, r->segments_at), gpu_release(gpu, r->scratch);
    gpu_release(gpu, (void *)r->layer.map_q), gpu_release(gpu, (void *)r->layer.mix);
    gpu_release(gpu, (void *)r->layer.map_q_bias);
    gpu_release(gpu, (void *)r->rows.q), gpu_release(gpu, r->rows.y);
    gpu_release(gpu, (void *)r->rows.cosines);
    free(r->slots);
}

static void fill_entry(struct rig *r, char *slot, int head, int entry, bool key) {
    const struct gpu_shape *s = &r->s;
    uint16_t *keys = (uint16_t *)(slot + r->rooms[head].turned),
             *values = (uint16_t *)(slot + r->rooms[head].values);
    for (int d = 0; d < s->head_dim; d++) {
        if (key) keys[(entry / 16 * s->head_dim + d) * 16 + entry % 16] = bf16_of(uniform(-1, 1));
        values[entry * s->lanes + d] = bf16_of(uniform(-1, 1));
    }
}

/* What a sequence remembers when the row at `position` is answered, its own key stored. */
static void fill_slot(struct rig *r, int slot_, int64_t position) {
    const struct gpu_shape *s = &r->s;
    char *slot = r->slots + (size_t)slot_ * s->slot_stride;
    memset(slot, 0xff, s->slot_stride);
    for (int g = 0; g < s->n_kv_heads; g++) {
        int head = LAYER * s->n_kv_heads + g;
        if (s->kind == ATTENTION_SOFTMAX) {
            for (int e = 0; e <= position; e++)
                fill_entry(r, slot, head, e, true);
            continue;
        }
        int w = s->window_size, block = position < 0 ? 0 : (int)(position / w);
        int left = (block - 1) * w - s->sinks, cache = r->rooms[head].cache,
            cached = left < cache ? left : cache;
        for (int e = 0; e < s->sinks && block >= 2; e++)
            fill_entry(r, slot, head, e, true);
        int64_t *positions = (int64_t *)(slot + r->rooms[head].positions);
        for (int e = 0; e < cached; e++) { /* every left-th key or so */
            positions[e] = s->sinks + (int64_t)left * e / cached;
            fill_entry(r, slot, head, s->sinks + e, true);
        }
        for (int64_t p = (block ? block - 1 : 0) * w; p <= position; p++)
            fill_entry(r, slot, head, s->sinks + cache + (int)(p % s->ring), true);
        for (int h = 0; h < s->state_heads && left > cache; h++) {
            float *state = (float *)(slot + r->rooms[head].states) + (size_t)h * s->state_floats;
            uint16_t *hi = (uint16_t *)state;
            for (int f = 0; f < s->features; f++) {
                float z = uniform(0, 4);
                state[s->S_floats + (size_t)f] = z;
                for (int d = 0; d < s->head_dim; d++)
                    hi[f * s->lanes + d] = bf16_of(uniform(-z, z));
            }
        }
    }
}

static void rig_set(struct rig *r, int n, const int *slots, const int64_t *positions) {
    r->n = n;
    for (int i = 0; i < n; i++)
        r->segments[i] =
            (struct gpu_segment){slots[i], (i * 7 + 3) % MOST_SEGMENTS, 1, positions[i]};
}

/* y [n] rows of n_heads * D, those of bf16 as floats. */
static float *answers(struct rig *r, int which) {
    const struct gpu_shape *s = &r->s;
    size_t y_bytes = MOST_SEGMENTS * r->rows.y_row * (r->rows.y_bf16 ? 2 : 4),
           width = (size_t)(s->n_heads * s->head_dim);
    gpu_upload(gpu, r->at, r->slots, r->slots_bytes);
    gpu_upload(gpu, r->segments_at, r->segments, (size_t)r->n * sizeof *r->segments);
    gpu_fill(gpu, r->rows.y, 0xff, y_bytes);
    if (which == GENERATED)
        assert_true(
            gpu_launch_generated(gpu, s, &r->layer, r->segments_at, r->n, &r->rows, r->scratch));
    else
        gpu_launch_store(gpu, s, LAYER, r->segments_at, r->n, 1, &r->rows);
    if (which == DECODE)
        assert_true(gpu_launch_decode(gpu, s, &r->layer, r->segments_at, r->n, &r->rows));
    if (which == ANSWER) gpu_launch_answer(gpu, s, &r->layer, r->segments_at, r->n, 1, &r->rows);
    char *all = malloc(y_bytes);
    gpu_download(gpu, all, r->rows.y, y_bytes);
    if (gpu_wait(gpu)) fail_msg("%s", gpu_error(gpu));
    float *y = malloc((size_t)r->n * width * sizeof *y);
    for (int i = 0; i < r->n; i++)
        for (size_t k = 0; k < width; k++) {
            size_t at = (size_t)r->segments[i].first_row * r->rows.y_row + k;
            y[(size_t)i * width + k] =
                r->rows.y_bf16 ? bf16_float(((uint16_t *)all)[at]) : ((float *)all)[at];
        }
    free(all);
    return y;
}

/* ---- against the general kernel ---- */

/* A sum of D products of numbers in [-1, 1) wanders as far as sqrt(D) / 3, and so do its D
 * roundings of 2^-25 of that: by six times their deviation, a dot product errs by D 2^-24, a logit
 * (over sqrt(D)) by sqrt(D) 2^-24, a projection (maps up to 1/2) by D / 2 2^-24, the logarithm of a
 * joint softmax's feature by D 2^-24.  Sums of N + F positive weights add sqrt(N + F) roundings,
 * exp and division a few.  All that in two kernels, in numerator and denominator.  In the fast one
 * queries and weights also err by 2^-18 of themselves, which a logit's sum over D averages to as
 * much. */
static float tolerance(const struct gpu_shape *s) {
    float D = (float)s->head_dim, n = (float)(s->most_entries + s->features);
    return 4 * 0x1p-24f * (sqrtf(D) + D + sqrtf(n) + 16) + 2 * 0x1p-18f;
}

static void compare(struct rig *r, int which) {
    size_t n = (size_t)(r->n * r->s.n_heads * r->s.head_dim);
    float *y = answers(r, ANSWER), *fast = answers(r, which), most = tolerance(&r->s);
    for (size_t i = 0; i < n; i++) {
        float off = fabsf(y[i] - fast[i]), allowed = most;
        if (r->rows.y_bf16) allowed += 0x1p-7f * fabsf(y[i]); /* a neighbour */
        if (!(off <= allowed)) {
            int row = (int)(i / (size_t)(r->s.n_heads * r->s.head_dim));
            fail_msg("segment %d at %d, element %d: %g, not %g", row,
                     (int)r->segments[row].position, (int)i % (r->s.n_heads * r->s.head_dim),
                     (double)fast[i], (double)y[i]);
        }
        if (!r->rows.y_bf16) most_used = fmaxf(most_used, off / allowed);
    }
    free(y), free(fast);
}

/* Rows at positions that see nothing, less than a half, the first of two halves, sinks and part of
 * the cache, all of it, some of it clamped, the ring half filled either way; and padding. */
static void check(const struct setting *set, bool y_bf16) {
    int64_t w = set->w, m = set->max_distance;
    int64_t positions[] = {-1,        0,         w - 1,         w,     2 * w - 2,       2 * w,
                           3 * w + 1, 4 * w + 5, m + 4 * w - 1, 8 * w, 0 /* padding */, 60 * w + 7};
    enum { N = sizeof positions / sizeof *positions };
    int slots[N];
    struct rig r;
    rig_open(&r, set, N);
    r.rows.y_bf16 = y_bf16;
    for (int i = 0; i < N; i++) {
        slots[i] = i == N - 2 ? -1 : N - 1 - i;
        fill_slot(&r, N - 1 - i, positions[i]);
    }
    rig_set(&r, N - 1, slots + 1, positions + 1);
    compare(&r, GENERATED);
    rig_set(&r, N, slots, positions); /* nothing can be stored at -1: not by the general kernel */
    r.segments[0].slot = -1;
    compare(&r, DECODE);
    rig_close(&r);
}

static void test_every_map_and_mixing_is_the_general_kernels(void **state) {
    (void)state;
    for (int map = 0; map < 3; map++)
        for (int mixing = 0; mixing < 2; mixing++) {
            struct setting set = base;
            set.map = (enum feature_map)map, set.mixing = (enum mixing)mixing;
            set.state_per_query_head = mixing != map % 2;
            set.bias = map == 1;
            check(&set, false);
        }
}

static void test_every_shape_is_the_general_kernels(void **state) {
    (void)state;
    static const int shapes[][4] = {
        /* D, F, group, kv heads */
        {64, 32, 1, 2},   {64, 96, 2, 1},   {64, 128, 3, 2}, {64, 256, 8, 1}, {128, 64, 1, 1},
        {128, 128, 4, 1}, {128, 256, 3, 1}, {128, 32, 8, 1}, {64, 64, 4, 1},  {128, 96, 7, 1}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct setting set = base;
        set.D = shapes[i][0], set.F = shapes[i][1], set.group = shapes[i][2];
        set.n_kv_heads = shapes[i][3];
        set.state_per_query_head = i % 2;
        set.mixing = i % 3 ? MIXING_UNIFIED : MIXING_LOLCATS;
        check(&set, i % 4 == 1);
    }
}

static void test_every_rule_of_positions_is_the_general_kernels(void **state) {
    (void)state;
    struct setting set = base;
    set.before_rope = false, set.max_distance = 0; /* maps after RoPE */
    check(&set, false);
    set.no_rope = true;
    check(&set, true);
    set = base;
    set.cache = 0, set.sinks = 0;
    check(&set, false);
    set = base;
    set.w = 64, set.sinks = 1, set.cache = 128, set.max_distance = 1024; /* the default model's */
    check(&set, false);
    set = base;
    set.w = 37, set.sinks = 37, set.cache = 5;
    check(&set, false);
}

/* More places in the second of two heads than in the first, and fewer: views, linear parts and
 * tiles are a head's own. */
static void test_heads_with_places_of_their_own_are_the_general_kernels(void **state) {
    (void)state;
    struct setting set = base;
    set.n_kv_heads = 2, set.odd_cache = 75;
    check(&set, false);
    set.D = 128, set.group = 1, set.n_kv_heads = 3, set.odd_cache = 4;
    check(&set, true);
    set = base; /* the default model's retrieval heads */
    set.n_kv_heads = 2, set.w = 64, set.sinks = 1, set.cache = 128, set.odd_cache = 1024, set.max_distance = 1024;
    check(&set, false);
}

/* Rows at the last of n positions, the longest in the last slot, which ends with its values. */
static void check_softmax(int D, int group, int64_t max_seq_len, const int64_t *positions, int n) {
    struct setting set = {.kind = ATTENTION_SOFTMAX, .max_seq_len = max_seq_len, .n_kv_heads = 1};
    int slots[MOST_SEGMENTS];
    int64_t at[MOST_SEGMENTS];
    struct rig r;
    set.D = D, set.group = group;
    rig_open(&r, &set, n);
    for (int k = 0; k < n; k++)
        fill_slot(&r, slots[k] = k, at[k] = positions[k]);
    slots[n] = -1, at[n] = 3;
    rig_set(&r, n + 1, slots, at);
    compare(&r, DECODE);
    compare(&r, GENERATED);
    rig_close(&r);
}

static void test_softmax_of_any_length_is_the_general_kernels(void **state) {
    (void)state;
    static const int shapes[][2] = {{64, 3}, {128, 4}, {64, 1}, {128, 8}};
    static const int64_t positions[] = {0, 15, 16, 254, 255, 256, 700, 1299};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        check_softmax(shapes[i][0], shapes[i][1], 1300, positions, 8);
    static const int64_t far[] = {4095, 4096, 8903}; /* more pieces than blocks that share them */
    check_softmax(64, 1, 8904, far, 3);
}

/* ---- bits ---- */

/* Row `at` of what `which` gives when it is answered among n segments. */
static void answer_among(struct rig *r, int which, int n, int at, int slot, int64_t position,
                         float *y) {
    size_t width = (size_t)(r->s.n_heads * r->s.head_dim);
    int slots[MOST_SEGMENTS];
    int64_t positions[MOST_SEGMENTS];
    for (int i = 0; i < n; i++) { /* neighbours: some padding, others with sequences of their own */
        slots[i] = i % 3 == 0 ? -1 : 2 + i % 3;
        positions[i] = i % 3 == 1 ? 5 : 6 * r->s.window_size + 3;
    }
    slots[at] = slot, positions[at] = position;
    rig_set(r, n, slots, positions);
    r->segments[at].first_row = 1; /* the same q, k and v */
    for (int i = 0; i < n; i++)
        if (i != at) r->segments[i].first_row = 2 + i;
    float *all = answers(r, which);
    memcpy(y, all + (size_t)at * width, width * sizeof *y);
    for (int i = 0; i < n; i++)
        if (slots[i] < 0)
            for (size_t k = 0; k < width; k++)
                assert_true(all[(size_t)i * width + k] == 0);
    free(all);
}

static void check_bits(const struct setting *set, int64_t position) {
    bool softmax = set->kind == ATTENTION_SOFTMAX;
    struct rig r;
    rig_open(&r, set, 5);
    fill_slot(&r, 0, position);
    memcpy(r.slots + r.s.slot_stride, r.slots, r.s.slot_stride);
    fill_slot(&r, 3, 5);
    fill_slot(&r, 4, 6 * r.s.window_size + 3);
    size_t bytes = (size_t)(r.s.n_heads * r.s.head_dim) * sizeof(float);
    float *alone = malloc(bytes), *y = malloc(bytes);
    for (int which = DECODE; which <= GENERATED; which++) {
        if (!softmax || which == DECODE) /* terraced: the same bits from both */
            answer_among(&r, DECODE, 1, 0, 0, position, alone);
        else
            answer_among(&r, which, 1, 0, 0, position, alone);
        static const int batches[][2] = {{1, 0}, {2, 1}, {9, 8}, {29, 1}, {38, 22}};
        for (size_t i = 0; i < sizeof batches / sizeof *batches; i++) {
            answer_among(&r, which, batches[i][0], batches[i][1], (int)i % 2, position, y);
            assert_memory_equal(y, alone, bytes);
        }
    }
    free(alone), free(y);
    rig_close(&r);
}

static void test_bits_are_a_rows_own(void **state) {
    (void)state;
    struct setting set = base;
    set.n_kv_heads = 2;
    check_bits(&set, 9 * set.w + 4);
    set.odd_cache = 60;
    check_bits(&set, 9 * set.w + 4);
    set.odd_cache = 0;
    set.D = 128, set.group = 1, set.n_kv_heads = 1, set.F = 32, set.map = MAP_SOFTMAX2;
    set.before_rope = false, set.max_distance = 0, set.bias = true;
    check_bits(&set, 4 * set.w);
    struct setting softmax = {
        .kind = ATTENTION_SOFTMAX, .max_seq_len = 600, .n_kv_heads = 1, .D = 64, .group = 1};
    check_bits(&softmax, 530);
}

/* ---- what it does not take ---- */

static void test_other_shapes_are_left_alone(void **state) {
    (void)state;
    struct rig r;
    rig_open(&r, &base, 1);
    for (int i = 0; i < 8; i++) {
        struct gpu_shape s = r.s;
        if (i == 0) s.kv_bf16 = 0;
        if (i == 1) s.exact = 1;
        if (i == 2) s.head_dim = s.lanes = 80;
        if (i == 3) s.f = s.f_lanes = 24, s.features = s.phi_lanes = 48;
        if (i == 4) s.window = WINDOW_SLIDING;
        if (i == 5) s.group = 9;
        if (i == 6) s.f = s.f_lanes = 144, s.features = s.phi_lanes = 288;
        if (i == 7) s.most_entries = 8192 / 3 + 16;
        assert_false(gpu_launch_decode(gpu, &s, &r.layer, r.segments_at, 1, &r.rows));
        assert_false(gpu_launch_generated(gpu, &s, &r.layer, r.segments_at, 1, &r.rows, r.scratch));
        assert_int_equal(gpu_generated_scratch_bytes(&s, 3), 0);
    }
    rig_close(&r);
}

static int report(void **state) {
    (void)state;
    print_message("at most %.2g of the tolerance used\n", (double)most_used);
    return 0;
}

int main(void) {
    char msg[256];
    if (gpu_open(&gpu, msg, sizeof msg)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_map_and_mixing_is_the_general_kernels),
        cmocka_unit_test(test_every_shape_is_the_general_kernels),
        cmocka_unit_test(test_every_rule_of_positions_is_the_general_kernels),
        cmocka_unit_test(test_heads_with_places_of_their_own_are_the_general_kernels),
        cmocka_unit_test(test_softmax_of_any_length_is_the_general_kernels),
        cmocka_unit_test(test_bits_are_a_rows_own),
        cmocka_unit_test(test_other_shapes_are_left_alone),
    };
    int failed = run_in_both_orders(tests, sizeof tests / sizeof *tests, 1, report);
    gpu_close(gpu);
    return failed;
}
