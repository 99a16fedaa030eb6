/* fuzz_state.c - attention_state_load on hostile bytes.  The first byte picks a configuration; the
 * header's magic, version and fingerprint are put right, so that what follows is reached.  What
 * loads must go on for some rows, and save to what loads again. */
#include "attention/attention.h"

#include <stdlib.h>
#include <string.h>

enum { HEADS = 2, DIM = 4, F = 3, ROWS = 11 };

static const struct attention_config configs[] = {
    {.kind = ATTENTION_HEDGEHOG,
     .n_heads = HEADS,
     .n_kv_heads = 1,
     .head_dim = DIM,
     .kv_type = KV_BF16,
     .map = MAP_EXP,
     .features = F,
     .window = WINDOW_TERRACED,
     .window_size = 4,
     .sinks = 1,
     .cache_size = 5,
     .cache_recent = 2,
     .cache_age = 9,
     .cache_fact_age = 30,
     .horizon = 20,
     .map_before_rope = true,
     .max_distance = 10},
    {.kind = ATTENTION_HEDGEHOG,
     .n_heads = HEADS,
     .n_kv_heads = 1,
     .head_dim = DIM,
     .kv_type = KV_FP32,
     .map = MAP_SOFTMAX2,
     .features = F,
     .key_map_per_query_head = true,
     .window = WINDOW_SLIDING,
     .window_size = 5,
     .sinks = 2,
     .mixing = MIXING_LOLCATS},
    {.kind = ATTENTION_SOFTMAX,
     .n_heads = HEADS,
     .n_kv_heads = 1,
     .head_dim = DIM,
     .kv_type = KV_BF16,
     .max_seq_len = 40},
};
enum { N_CONFIGS = sizeof configs / sizeof *configs };

static struct attention *engines[N_CONFIGS];
static void *slots[N_CONFIGS];

static void open_engines(void) {
    static float ones[HEADS * DIM * F];
    for (int i = 0; i < HEADS * DIM * F; i++)
        ones[i] = 0.1f * (float)(i % 7 - 3);
    const struct attention_weights weights = {.map_q = ones, .map_k = ones, .mix = ones};
    struct rope_config rope_config = {.head_dim = DIM, .base = 100};
    struct rope *rope;
    struct team *team;
    if (rope_new(&rope, &rope_config, NULL, 0) || team_new(&team, 1)) abort();
    for (int i = 0; i < N_CONFIGS; i++) {
        if (attention_new(&engines[i], &configs[i], &weights, 1, rope, team, ROWS, 1)) abort();
        slots[i] = aligned_alloc(64, attention_slot_bytes(engines[i]));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!engines[0]) open_engines();
    if (size < 1) return 0;
    int i = data[0] % N_CONFIGS;
    struct attention *a = engines[i];
    size_t bytes = size - 1, header = 24; /* magic, version, fingerprint */
    uint8_t *state = malloc(bytes + 1), *fresh = malloc(attention_state_bytes(a, 0));
    memcpy(state, data + 1, bytes);
    attention_slot_clear(a, slots[i]);
    attention_state_save(a, fresh, slots[i]);
    memcpy(state, fresh, bytes < header ? bytes : header);
    char msg[200] = "";
    enum err e = attention_state_load(a, slots[i], state, bytes, msg, sizeof msg);
    if (e != OK && (e != ERR_FORMAT || !*msg)) abort();
    if (e == OK) {
        static const float qkv[ROWS * (HEADS + 2) * DIM] = {1, -1, 0.5f, 2};
        float y[ROWS * HEADS * DIM];
        int64_t position = attention_slot_position(a, slots[i]);
        struct attention_run run = {.slot = slots[i], .n_rows = ROWS};
        int64_t most =
            configs[i].kind == ATTENTION_SOFTMAX ? configs[i].max_seq_len : INT64_MAX / 2;
        if (position + ROWS <= most) {
            size_t stride = (HEADS + 2) * DIM;
            attention_step_begin(a, &run, 1);
            attention_layer(a, 0, y, HEADS * DIM, qkv, stride, qkv + HEADS * DIM, stride,
                            qkv + (HEADS + 1) * DIM, stride);
            attention_step_end(a);
        }
        bytes = attention_state_bytes(a, attention_slot_position(a, slots[i]));
        state = realloc(state, bytes);
        attention_state_save(a, state, slots[i]);
        e = attention_state_load(a, slots[i], state, bytes, msg, sizeof msg);
        if (e != OK && !strstr(msg, "finite") && !strstr(msg, "negative"))
            abort(); /* finite numbers may add to infinity */
    }
    free(state), free(fresh);
    return 0;
}
