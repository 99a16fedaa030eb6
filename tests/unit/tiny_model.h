/* tiny_model.h - a random converted model on disk, small enough to try every cut of a prompt:
 * map_position none, terraced window 16, cache 16 (4 recent), max_distance 48, horizon 64.  Borrows
 * the tokenizer of stories260k. */
#ifndef URCHIN_TESTS_TINY_MODEL_H
#define URCHIN_TESTS_TINY_MODEL_H

#include "model_files.h"

#include <limits.h>
#include <math.h>
#include <unistd.h>

enum {
    TINY_LAYERS = 2,
    TINY_HIDDEN = 32,
    TINY_HEADS = 4,
    TINY_KV_HEADS = 2,
    TINY_HEAD_DIM = 8,
    TINY_FFN = 48,
    TINY_VOCAB = 512
};

#define TINY_CONFIG                                                                                \
    "{\"model_type\":\"llama\",\"hidden_size\":32,\"intermediate_size\":48,\"num_hidden_layers\":" \
    "2,"                                                                                           \
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"vocab_size\":512,\"max_position_"       \
    "embeddings\":512,"                                                                            \
    "\"rms_norm_eps\":1e-5,\"tie_word_embeddings\":false,\"eos_token_id\":[2,7]}"

#define TINY_ATTENTION                                                                             \
    "{\"kind\":\"hedgehog\",\"map\":\"exp\",\"features\":8,\"key_map_per\":\"kv_head\",\"map_"     \
    "position\":\"none\","                                                                         \
    "\"max_distance\":48,\"window\":{\"rule\":\"terraced\",\"size\":16},\"sinks\":1,"              \
    "\"cache\":{\"size\":16,\"score\":\"self_recall\",\"recent\":4,\"age\":32},\"horizon\":64,"    \
    "\"mixing\":\"unified\"}"
#define TINY_LOW_RANK "{\"rank\":2,\"scale\":0.5,\"targets\":[\"q_proj\",\"o_proj\"]}"
#define TINY_URCHIN                                                                                \
    "{\"format\":1,\"name\":\"tiny\",\"base\":null,\"attention\":" TINY_ATTENTION                  \
    ",\"low_rank\":" TINY_LOW_RANK "}"

/* Uniform in [-size, size], the same for the same seed. */
static inline float *tiny_values(int n, float size, uint32_t *seed) {
    float *out = malloc((size_t)n * sizeof *out);
    if (!out) abort();
    for (int i = 0; i < n; i++) {
        *seed = *seed * 1664525u + 1013904223u;
        out[i] = ((float)(*seed >> 8) * 0x1p-23f - 1) * size;
    }
    return out;
}

static inline void tiny_put(struct st_writer *w, const char *prefix, int layer, const char *name,
                            int n_dims, const int *dims, float size, uint32_t *seed) {
    char full[128];
    int n = 1;
    if (layer < 0)
        snprintf(full, sizeof full, "%s%s", prefix, name);
    else
        snprintf(full, sizeof full, "%s%d.%s", prefix, layer, name);
    for (int i = 0; i < n_dims; i++)
        n *= dims[i];
    float *values = tiny_values(n, size, seed);
    for (int i = 0; n_dims == 1 && i < n; i++)
        values[i] += 1; /* norms lie around 1 */
    st_put(w, full, "F32", n_dims, dims, values, (size_t)n * sizeof *values);
    free(values);
}

static inline void tiny_path(char *out, const char *folder, const char *name) {
    snprintf(out, PATH_MAX, "%s/%s", folder, name);
}

static inline struct bytes tiny_base(void) {
    enum {
        E = TINY_HIDDEN,
        Q = TINY_HEADS * TINY_HEAD_DIM,
        KV = TINY_KV_HEADS * TINY_HEAD_DIM,
        F = TINY_FFN,
        V = TINY_VOCAB
    };
    struct st_writer w = {0};
    uint32_t seed = 1;
    tiny_put(&w, "model.", -1, "embed_tokens.weight", 2, (int[]){V, E}, 1, &seed);
    tiny_put(&w, "", -1, "lm_head.weight", 2, (int[]){V, E}, 0.5f, &seed);
    tiny_put(&w, "model.", -1, "norm.weight", 1, (int[]){E}, 0.1f, &seed);
    for (int i = 0; i < TINY_LAYERS; i++) {
        const char *p = "model.layers.";
        tiny_put(&w, p, i, "input_layernorm.weight", 1, (int[]){E}, 0.1f, &seed);
        tiny_put(&w, p, i, "post_attention_layernorm.weight", 1, (int[]){E}, 0.1f, &seed);
        tiny_put(&w, p, i, "self_attn.q_proj.weight", 2, (int[]){Q, E}, 0.6f, &seed);
        tiny_put(&w, p, i, "self_attn.k_proj.weight", 2, (int[]){KV, E}, 0.6f, &seed);
        tiny_put(&w, p, i, "self_attn.v_proj.weight", 2, (int[]){KV, E}, 0.3f, &seed);
        tiny_put(&w, p, i, "self_attn.o_proj.weight", 2, (int[]){E, Q}, 0.3f, &seed);
        tiny_put(&w, p, i, "mlp.gate_proj.weight", 2, (int[]){F, E}, 0.3f, &seed);
        tiny_put(&w, p, i, "mlp.up_proj.weight", 2, (int[]){F, E}, 0.3f, &seed);
        tiny_put(&w, p, i, "mlp.down_proj.weight", 2, (int[]){E, F}, 0.3f, &seed);
    }
    return st_finish(&w);
}

static inline struct bytes tiny_maps(void) {
    enum { E = TINY_HIDDEN, Q = TINY_HEADS * TINY_HEAD_DIM, D = TINY_HEAD_DIM, f = 8, R = 2 };
    struct st_writer w = {0};
    uint32_t seed = 2;
    for (int i = 0; i < TINY_LAYERS; i++) {
        const char *p = "layers.";
        tiny_put(&w, p, i, "attn.feature_map_q", 3, (int[]){TINY_HEADS, D, f}, 0.4f, &seed);
        tiny_put(&w, p, i, "attn.feature_map_k", 3, (int[]){TINY_KV_HEADS, D, f}, 0.4f, &seed);
        tiny_put(&w, p, i, "attn.log_mix", 1, (int[]){TINY_HEADS}, 0.5f, &seed);
        tiny_put(&w, p, i, "attn.q_proj.lora_A", 2, (int[]){R, E}, 0.3f, &seed);
        tiny_put(&w, p, i, "attn.q_proj.lora_B", 2, (int[]){Q, R}, 0.3f, &seed);
        tiny_put(&w, p, i, "attn.o_proj.lora_A", 2, (int[]){R, Q}, 0.3f, &seed);
        tiny_put(&w, p, i, "attn.o_proj.lora_B", 2, (int[]){E, R}, 0.3f, &seed);
    }
    return st_finish(&w);
}

/* Into an empty folder. */
static inline void tiny_write(const char *folder) {
    static const char *const files[] = {"tokenizer.json", "tokenizer_config.json"};
    char path[PATH_MAX], from[PATH_MAX], whole[PATH_MAX];
    tiny_path(path, folder, "config.json"), write_text(path, TINY_CONFIG);
    tiny_path(path, folder, "urchin.json"), write_text(path, TINY_URCHIN);
    struct bytes b = tiny_base();
    tiny_path(path, folder, "model.safetensors"), write_bytes(path, b.at, b.len), free(b.at);
    b = tiny_maps();
    tiny_path(path, folder, "hedgehog.safetensors"), write_bytes(path, b.at, b.len), free(b.at);
    for (int i = 0; i < 2; i++) {
        tiny_path(from, "models/stories260k-hedgehog", files[i]);
        tiny_path(path, folder, files[i]);
        if (!realpath(from, whole) || symlink(whole, path)) abort();
    }
}

static inline void tiny_remove(const char *folder) {
    static const char *const files[] = {"config.json",
                                        "urchin.json",
                                        "model.safetensors",
                                        "hedgehog.safetensors",
                                        "tokenizer.json",
                                        "tokenizer_config.json",
                                        "model.safetensors.index.json",
                                        "generation_config.json",
                                        "a.safetensors",
                                        "b.safetensors"};
    char path[PATH_MAX];
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++)
        tiny_path(path, folder, files[i]), unlink(path);
    rmdir(folder);
}

#endif
