/* gpu_prefill.c - how long a device takes for one layer's attention over a long prompt: all of it, from q, k and v to y, with the
 * choice of the cache and the folds.
 *
 *   build/bench/gpu_prefill TOKENS [HEADS KV_HEADS HEAD_DIM FEATURES [CHUNK]]     (32 8 128 256 8192)
 *
 * The prompt is read in chunks, as a server reads it; layer after layer of random q, k, v, median of several prompts.
 * Prints milliseconds.  An emulated device reads a tiny prompt and shows only that everything runs. */
#include "attention/gpu_attention.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { REPEATS = 5 };

static struct gpu *gpu;

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
static float *uniforms(size_t n, float scale) {
    float *x = malloc(n * sizeof *x);
    if (!x) check(ERR_NOMEM, "memory");
    for (size_t i = 0; i < n; i++) {
        rng_state = rng_state * 6364136223846793005u + 1442695040888963407u;
        x[i] = scale * (float)(int32_t)(rng_state >> 32) * 0x1p-31f;
    }
    return x;
}

static int argument(int argc, char **argv, int i, int otherwise) {
    return argc > i ? atoi(argv[i]) : otherwise;
}

int main(int argc, char **argv) {
    char msg[300] = "";
    if (argc < 2 || atoi(argv[1]) < 1) {
        fprintf(stderr, "usage: gpu_prefill TOKENS [HEADS KV_HEADS HEAD_DIM FEATURES [CHUNK]]\n");
        return 2;
    }
    if (gpu_open(&gpu, msg, sizeof msg)) {
        fprintf(stderr, "%s\n", msg);
        return 1;
    }
    int n_heads = argument(argc, argv, 2, 32), n_kv = argument(argc, argv, 3, 8),
        dim = argument(argc, argv, 4, 128), features = argument(argc, argv, 5, 256),
        chunk = argument(argc, argv, 6, 8192), n = atoi(argv[1]), repeats = REPEATS;
    if (gpu_info(gpu)->emulated) repeats = 1;
    struct attention_config config = {.kind = ATTENTION_HEDGEHOG,
                                      .n_heads = n_heads,
                                      .n_kv_heads = n_kv,
                                      .head_dim = dim,
                                      .kv_type = KV_BF16,
                                      .map = MAP_EXP,
                                      .features = features / 2,
                                      .window = WINDOW_TERRACED,
                                      .window_size = 64,
                                      .sinks = 1,
                                      .cache_size = 128,
                                      .cache_recent = 32,
                                      .cache_age = 1024,
                                      .cache_fact_age = 32768,
                                      .horizon = 1024,
                                      .map_before_rope = true,
                                      .max_distance = 4096};
    size_t map = (size_t)dim * (size_t)(features / 2);
    float scale = 1 / sqrtf((float)dim);
    float *mix = uniforms((size_t)n_heads, 1);
    struct attention_weights weights = {.map_q = uniforms((size_t)n_heads * map, scale),
                                        .map_k = uniforms((size_t)n_kv * map, scale),
                                        .mix = mix};
    struct rope_config angles = {.head_dim = dim, .base = 500000, .factor = 1};
    struct rope *rope;
    struct team *team;
    struct attention *twin;
    struct gpu_attention *a;
    check(attention_config_check(&config, msg, sizeof msg), msg);
    check(rope_new(&rope, &angles, msg, sizeof msg), "RoPE");
    check(team_new(&team, 1), "threads");
    check(attention_new(&twin, &config, &weights, 1, rope, team, 1, 1), "attention");
    if (chunk > n) chunk = n;
    check(gpu_attention_new(&a, gpu, twin, 1, chunk, 1, false, msg, sizeof msg), msg);

    size_t q = (size_t)n_heads * (size_t)dim, kv = (size_t)n_kv * (size_t)dim, row = q + 2 * kv;
    float *host = uniforms((size_t)chunk * row, 1);
    void *qkv, *y;
    check(gpu_alloc(gpu, &qkv, (size_t)chunk * row * sizeof(float)), "memory of the device");
    check(gpu_alloc(gpu, &y, (size_t)chunk * q * 2), "memory of the device");
    gpu_upload(gpu, qkv, host, (size_t)chunk * row * sizeof(float));
    check(gpu_wait(gpu), "upload");
    struct gpu_attention_rows rows = {.q = qkv,
                                      .k = (float *)qkv + q,
                                      .v = (float *)qkv + q + kv,
                                      .q_row = row,
                                      .k_row = row,
                                      .v_row = row,
                                      .y = y,
                                      .y_row = q,
                                      .y_bf16 = true};
    double times[REPEATS];
    for (int r = -1; r < repeats; r++) { /* the first is not counted */
        double start = now();
        gpu_attention_slot_clear(a, 0);
        for (int at = 0; at < n; at += chunk) {
            struct gpu_attention_run run = {0, 0, n - at < chunk ? n - at : chunk};
            gpu_attention_prompt_begin(a, &run, 1);
            gpu_attention_prompt_layer(a, 0, &rows);
            gpu_attention_prompt_end(a);
            check(gpu_wait(gpu), "a chunk");
        }
        if (r >= 0) times[r] = now() - start;
        if (gpu_info(gpu)->emulated) times[0] = now() - start, r = repeats;
    }
    qsort(times, (size_t)repeats, sizeof *times, by_value);
    printf("%.4f\n", 1e3 * times[repeats / 2]);
    gpu_release(gpu, qkv);
    gpu_release(gpu, y);
    gpu_attention_free(a);
    attention_free(twin);
    team_free(team);
    rope_free(rope);
    gpu_close(gpu);
    free(host), free(mix), free((void *)weights.map_q), free((void *)weights.map_k);
    return 0;
}
