/* attention.c - how fast the attention of one model's layers is on the CPU, beside what the memory
 * gives.
 *
 *   build/bench/attention [n_threads [generic|avx2|avx512]]
 *
 * The default model's shape: 9 heads, 3 kv heads, head_dim 64, 128 features, window 64, cache 128.
 * decode: one row each of so many sequences at position 1,000; a whole block, so that the choice
 * of the cache is in it. prompt: 256 rows of one sequence from position 1,024 on.  Values are
 * noise: time does not depend on them.  Best of several rounds. */
#include "attention/attention.h"
#include "attention/rope.h"
#include "compute/cpu.h"
#include "compute/memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LAYERS = 30, HEADS = 9, KV = 3, D = 64, F = 64, W = 64, ROWS = 256, MOST = 32, ROUNDS = 3 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static float *noise(size_t n, float scale) {
    static uint64_t state = 1;
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; x && i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)(int32_t)(state >> 32) * 0x1p-31f * scale;
    }
    return x;
}

static float *q, *k, *v, *y;

/* One step of n sequences with the given rows each; seconds. */
static double step(struct attention *a, char *slots, size_t slot, int n, int rows) {
    struct attention_run runs[MOST];
    for (int i = 0; i < n; i++)
        runs[i] = (struct attention_run){slots + (size_t)i * slot, i * rows, rows};
    double start = now();
    attention_step_begin(a, runs, n);
    for (int layer = 0; layer < LAYERS; layer++)
        attention_layer(a, layer, y, HEADS * D, q, HEADS * D, k, KV * D, v, KV * D);
    attention_step_end(a);
    return now() - start;
}

int main(int argc, char **argv) {
    struct team *team;
    if (team_new(&team, argc > 1 ? atoi(argv[1]) : 0)) return 1;
    for (int isa = 0; argc > 2 && isa <= CPU_AMX; isa++)
        if (!strcmp(argv[2], cpu_isa_name((enum cpu_isa)isa))) cpu_isa_limit((enum cpu_isa)isa);
    struct attention_config config = {.kind = ATTENTION_HEDGEHOG,
                                      .n_heads = HEADS,
                                      .n_kv_heads = KV,
                                      .head_dim = D,
                                      .kv_type = KV_BF16,
                                      .map = MAP_EXP,
                                      .features = F,
                                      .window = WINDOW_TERRACED,
                                      .window_size = W,
                                      .sinks = 1,
                                      .cache_size = 128,
                                      .cache_recent = 32,
                                      .cache_age = 512,
                                      .cache_fact_age = 32768,
                                      .horizon = 1024,
                                      .mixing = MIXING_UNIFIED,
                                      .map_before_rope = true,
                                      .max_distance = 1536};
    struct rope *rope;
    struct attention *a;
    struct attention_weights weights[LAYERS];
    for (int i = 0; i < LAYERS; i++)
        weights[i] = (struct attention_weights){.map_q = noise((size_t)HEADS * D * F, 0.1f),
                                                .map_k = noise((size_t)KV * D * F, 0.1f),
                                                .mix = noise(HEADS, 1)};
    if (rope_new(&rope, &(struct rope_config){.head_dim = D, .base = 1e5}, NULL, 0) ||
        attention_new(&a, &config, weights, LAYERS, rope, team, ROWS, MOST))
        return 1;
    q = noise((size_t)ROWS * HEADS * D, 3), k = noise((size_t)ROWS * KV * D, 1);
    v = noise((size_t)ROWS * KV * D, 1), y = noise((size_t)ROWS * HEADS * D, 0);
    size_t slot = (attention_slot_bytes(a) + 63) / 64 * 64;
    char *slots = memory_map(slot * MOST);
    if (!slots || !q || !k || !v || !y) return 1;
    printf("%s, %d threads\n", cpu_isa_name(cpu_isa()), team_size(team));
    printf("%-8s %9s %14s %14s %14s\n", "", "sequences", "us a layer", "a row and head", "slowest step");
    for (int i = 0; i < MOST; i++) {
        attention_slot_clear(a, slots + (size_t)i * slot);
        for (int r = 0; r < 1024 / ROWS; r++)
            step(a, slots + (size_t)i * slot, slot, 1, ROWS);
    }
    double best = 1e9;
    for (int round = 0; round < 2 * ROUNDS; round++) {
        double t = step(a, slots, slot, 1, ROWS);
        if (t < best) best = t;
    }
    printf("%-8s %9d %14.1f %14.3f\n", "prompt", 1, 1e6 * best / LAYERS, 1e6 * best / LAYERS / KV / ROWS);
    for (int n = 1; n <= MOST; n *= 8 - 4 * (n > 1)) {
        double at[W], sum = 0, most = 0; /* by place in a block */
        for (int i = 0; i < W; i++)
            at[i] = 1e9;
        for (int i = 0; i < ROUNDS * W; i++) {
            double t = step(a, slots, slot, n, 1);
            if (t < at[i % W]) at[i % W] = t;
        }
        for (int i = 0; i < W; i++) {
            sum += at[i] / W;
            if (at[i] > most) most = at[i];
        }
        printf("%-8s %9d %14.1f %14.3f %14.1f\n", "decode", n, 1e6 * sum / LAYERS,
               1e6 * sum / LAYERS / KV / n, 1e6 * most / LAYERS);
    }
    for (int i = 0; i < LAYERS; i++)
        free((float *)weights[i].map_q), free((float *)weights[i].map_k), free((float *)weights[i].mix);
    free(q), free(k), free(v), free(y);
    memory_unmap(slots, slot * MOST);
    attention_free(a);
    rope_free(rope);
    team_free(team);
}
