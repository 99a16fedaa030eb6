/* checkpoints.h - one random model of each architecture, written as a Hugging Face folder and as a
 * GGUF file of the same values. */
#ifndef URCHIN_TESTS_CHECKPOINTS_H
#define URCHIN_TESTS_CHECKPOINTS_H

#include "compute/quant.h"
#include "tiny_model.h"

#include <stdbool.h>

enum {
    CHECK_E = 32,
    CHECK_HEADS = 4,
    CHECK_KV = 2,
    CHECK_D = 8,
    CHECK_F = 48,
    CHECK_V = 300,
    CHECK_L = 2,
    CHECK_CONTEXT = 40
};

struct checkpoint { /* both written at once */
    struct st_writer folder;
    struct gguf_writer gguf;
    uint32_t seed;
};

/* n_in 0: a vector.  transposed: the folder has it [n_in, n_out].  heads > 0: GGUF stores the rows
 * of each pairwise. */
static inline void check_put(struct checkpoint *c, const char *name, const char *gguf_name,
                             int n_out, int n_in, float size, bool transposed, int heads) {
    int columns = n_in ? n_in : 1, n = n_out * columns;
    float *w = tiny_values(n, size, &c->seed), *other = malloc((size_t)n * sizeof *other);
    if (!n_in && strstr(name, "weight"))
        for (int i = 0; i < n; i++)
            w[i] += 1;
    for (int r = 0; r < n_out; r++)
        for (int i = 0; i < columns; i++) {
            int at = r * columns + i;
            if (heads) { /* row 2 j + s of a head is row s half + j of the folder's */
                int rows = n_out / heads, in_head = r % rows, half = rows / 2;
                other[at] = w[(r - in_head + in_head % 2 * half + in_head / 2) * columns + i];
            } else {
                other[at] = w[at];
            }
        }
    gguf_put_tensor(&c->gguf, gguf_name, QUANT_F32, n_in ? n_in : n_out, n_in ? n_out : 0, other,
                    (size_t)n * sizeof *other);
    if (transposed)
        for (int r = 0; r < n_out; r++)
            for (int i = 0; i < columns; i++)
                other[i * n_out + r] = w[r * columns + i];
    st_put(&c->folder, name, "F32", n_in ? 2 : 1,
           transposed ? (int[]){n_in, n_out} : (int[]){n_out, n_in}, transposed ? other : w,
           (size_t)n * sizeof *w);
    free(w);
    free(other);
}

static inline void check_tokens(struct gguf_writer *w) {
    char names[CHECK_V][16];
    const char *tokens[CHECK_V];
    for (int i = 0; i < CHECK_V; i++) {
        snprintf(names[i], sizeof names[i], i < 26 ? "%c" : "t%d", i < 26 ? 'a' + i : i);
        tokens[i] = names[i];
    }
    gguf_put_string(w, "tokenizer.ggml.model", "gpt2");
    gguf_put_string(w, "tokenizer.ggml.pre", "gpt-2");
    gguf_put_strings(w, "tokenizer.ggml.tokens", tokens, CHECK_V);
    gguf_put_strings(w, "tokenizer.ggml.merges", tokens, 0);
    gguf_put_u32(w, "tokenizer.ggml.eos_token_id", 5);
    gguf_put_u32(w, "tokenizer.ggml.eot_token_id", 9);
}

#define CHECK_TOKENIZER                                                                            \
    "{\"version\":\"1.0\",\"added_tokens\":[],\"normalizer\":null,\"pre_tokenizer\":{\"type\":"    \
    "\"ByteLevel\","                                                                               \
    "\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},\"post_processor\":"     \
    "null,"                                                                                        \
    "\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":true,\"use_"   \
    "regex\":true},"                                                                               \
    "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,\"continuing_subword_"        \
    "prefix\":\"\","                                                                               \
    "\"end_of_word_suffix\":\"\",\"fuse_unk\":false,\"vocab\":{\"a\":0,\"b\":1,\"c\":2},"          \
    "\"merges\":[]}}"

/* type: "llama" (interleaved q and k in GGUF, untied), "qwen2" (biases, tied) or "gpt2".  Writes
 * FOLDER/... and FOLDER/model.gguf. */
static inline void check_write(const char *folder, const char *type) {
    enum {
        E = CHECK_E,
        Q = CHECK_HEADS * CHECK_D,
        KV = CHECK_KV * CHECK_D,
        F = CHECK_F,
        V = CHECK_V
    };
    struct checkpoint c = {.seed = 5};
    bool gpt2 = !strcmp(type, "gpt2"), qwen2 = !strcmp(type, "qwen2"),
         llama = !strcmp(type, "llama");
    char path[PATH_MAX], config[1024], name[128], gguf_name[128], key[128];
    if (gpt2)
        snprintf(config, sizeof config,
                 "{\"model_type\":\"gpt2\",\"n_embd\":%d,\"n_layer\":%d,\"n_head\":%d,\"n_inner\":%"
                 "d,\"n_positions\":%d,\"vocab_size\":%d,"
                 "\"layer_norm_epsilon\":1e-5,\"eos_token_id\":5}",
                 E, CHECK_L, CHECK_HEADS, F, CHECK_CONTEXT, V);
    else
        snprintf(config, sizeof config,
                 "{\"model_type\":\"%s\",\"hidden_size\":%d,\"num_hidden_layers\":%d,\"num_"
                 "attention_heads\":%d,\"num_key_value_heads\":%d,"
                 "\"intermediate_size\":%d,\"max_position_embeddings\":%d,\"vocab_size\":%d,\"rms_"
                 "norm_eps\":1e-5,\"rope_theta\":500000,"
                 "\"rope_scaling\":%s,\"tie_word_embeddings\":%s,\"eos_token_id\":5}",
                 type, E, CHECK_L, CHECK_HEADS, CHECK_KV, F, CHECK_CONTEXT, V,
                 qwen2 ? "{\"type\":\"linear\",\"factor\":4.0}" : "null", qwen2 ? "true" : "false");
    tiny_path(path, folder, "config.json"), write_text(path, config);
    tiny_path(path, folder, "tokenizer.json"), write_text(path, CHECK_TOKENIZER);
    tiny_path(path, folder, "generation_config.json"), write_text(path, "{\"eos_token_id\":[5,9]}");

    gguf_put_string(&c.gguf, "general.architecture", type);
#define KEY(text) (snprintf(key, sizeof key, "%s." text, type), key)
    gguf_put_u32(&c.gguf, KEY("block_count"), CHECK_L),
        gguf_put_u32(&c.gguf, KEY("embedding_length"), E);
    gguf_put_u32(&c.gguf, KEY("feed_forward_length"), F),
        gguf_put_u32(&c.gguf, KEY("attention.head_count"), CHECK_HEADS);
    gguf_put_u32(&c.gguf, KEY("context_length"), CHECK_CONTEXT);
    if (gpt2) {
        gguf_put_f32(&c.gguf, KEY("attention.layer_norm_epsilon"), 1e-5f);
    } else {
        gguf_put_u32(&c.gguf, KEY("attention.head_count_kv"), CHECK_KV),
            gguf_put_f32(&c.gguf, KEY("rope.freq_base"), 500000);
        gguf_put_f32(&c.gguf, KEY("attention.layer_norm_rms_epsilon"), 1e-5f);
        if (qwen2)
            gguf_put_string(&c.gguf, KEY("rope.scaling.type"), "linear"),
                gguf_put_f32(&c.gguf, KEY("rope.scaling.factor"), 4);
    }
#undef KEY
    check_tokens(&c.gguf);

    if (gpt2) {
        check_put(&c, "transformer.wte.weight", "token_embd.weight", V, E, 1, false, 0);
        check_put(&c, "transformer.wpe.weight", "position_embd.weight", CHECK_CONTEXT, E, 0.5f,
                  false, 0);
        check_put(&c, "transformer.ln_f.weight", "output_norm.weight", E, 0, 0.1f, false, 0);
        check_put(&c, "transformer.ln_f.bias", "output_norm.bias", E, 0, 0.1f, false, 0);
    } else {
        check_put(&c, "model.embed_tokens.weight", "token_embd.weight", V, E, 1, false, 0);
        check_put(&c, "model.norm.weight", "output_norm.weight", E, 0, 0.1f, false, 0);
        if (llama) check_put(&c, "lm_head.weight", "output.weight", V, E, 0.5f, false, 0);
    }
    for (int i = 0; i < CHECK_L; i++) {
#define PUT(part, gguf_part, n_out, n_in, size, heads)                                             \
    (snprintf(name, sizeof name, gpt2 ? "transformer.h.%d." part : "model.layers.%d." part, i),    \
     snprintf(gguf_name, sizeof gguf_name, "blk.%d." gguf_part, i),                                \
     check_put(&c, name, gguf_name, n_out, n_in, size, gpt2 && (n_in), heads))
        if (gpt2) {
            PUT("ln_1.weight", "attn_norm.weight", E, 0, 0.1f, 0),
                PUT("ln_1.bias", "attn_norm.bias", E, 0, 0.1f, 0);
            PUT("attn.c_attn.weight", "attn_qkv.weight", 3 * E, E, 0.5f, 0),
                PUT("attn.c_attn.bias", "attn_qkv.bias", 3 * E, 0, 0.2f, 0);
            PUT("attn.c_proj.weight", "attn_output.weight", E, E, 0.3f, 0),
                PUT("attn.c_proj.bias", "attn_output.bias", E, 0, 0.2f, 0);
            PUT("ln_2.weight", "ffn_norm.weight", E, 0, 0.1f, 0),
                PUT("ln_2.bias", "ffn_norm.bias", E, 0, 0.1f, 0);
            PUT("mlp.c_fc.weight", "ffn_up.weight", F, E, 0.3f, 0),
                PUT("mlp.c_fc.bias", "ffn_up.bias", F, 0, 0.2f, 0);
            PUT("mlp.c_proj.weight", "ffn_down.weight", E, F, 0.3f, 0),
                PUT("mlp.c_proj.bias", "ffn_down.bias", E, 0, 0.2f, 0);
            continue;
        }
        PUT("input_layernorm.weight", "attn_norm.weight", E, 0, 0.1f, 0);
        PUT("self_attn.q_proj.weight", "attn_q.weight", Q, E, 0.6f, llama ? CHECK_HEADS : 0);
        PUT("self_attn.k_proj.weight", "attn_k.weight", KV, E, 0.6f, llama ? CHECK_KV : 0);
        PUT("self_attn.v_proj.weight", "attn_v.weight", KV, E, 0.3f, 0);
        if (qwen2) {
            PUT("self_attn.q_proj.bias", "attn_q.bias", Q, 0, 0.5f, 0),
                PUT("self_attn.k_proj.bias", "attn_k.bias", KV, 0, 0.5f, 0);
            PUT("self_attn.v_proj.bias", "attn_v.bias", KV, 0, 0.5f, 0);
        }
        PUT("self_attn.o_proj.weight", "attn_output.weight", E, Q, 0.3f, 0);
        PUT("post_attention_layernorm.weight", "ffn_norm.weight", E, 0, 0.1f, 0);
        PUT("mlp.gate_proj.weight", "ffn_gate.weight", F, E, 0.3f, 0),
            PUT("mlp.up_proj.weight", "ffn_up.weight", F, E, 0.3f, 0);
        PUT("mlp.down_proj.weight", "ffn_down.weight", E, F, 0.3f, 0);
#undef PUT
    }
    struct bytes b = st_finish(&c.folder);
    tiny_path(path, folder, "model.safetensors"), write_bytes(path, b.at, b.len), free(b.at);
    b = gguf_finish(&c.gguf, 3);
    tiny_path(path, folder, "model.gguf"), write_bytes(path, b.at, b.len), free(b.at);
}

#endif
