/* merge_config.c - config.json, generation_config.json and urchin.json of a merged model. */
#include "convert/merge_config.h"

#include "attention/rope.h"
#include "convert/files.h"
#include "model/mapped.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static enum err load(cJSON **out, const char *folder, const char *name, char *msg, size_t msg_len) {
    struct mapped file;
    char *path = path_join(folder, name);
    if (!path) return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    enum err e = mapped_open(&file, path, msg, msg_len);
    if (!e) {
        *out = cJSON_ParseWithLength(file.bytes, file.len);
        mapped_close(&file);
        if (!cJSON_IsObject(*out)) {
            cJSON_Delete(*out);
            *out = NULL;
            e = err_set(msg, msg_len, ERR_FORMAT, "%s: not a JSON object", path);
        }
    }
    free(path);
    return e;
}

/* key becomes node, where it stood or at the end. */
static void put(cJSON *o, const char *key, cJSON *node) {
    if (cJSON_GetObjectItemCaseSensitive(o, key))
        cJSON_ReplaceItemInObjectCaseSensitive(o, key, node);
    else
        cJSON_AddItemToObject(o, key, node);
}

static void add(cJSON *o, const char *key, double x) {
    cJSON_AddNumberToObject(o, key, x);
}

/* ---- a folder's ---- */
static enum err edit_config(const struct base *base, const char *dtype, const char *folder,
                            char *msg, size_t msg_len) {
    cJSON *config = NULL;
    enum err e = load(&config, base_path(base), "config.json", msg, msg_len);
    if (e) return e;
    bool new_word =
        cJSON_GetObjectItemCaseSensitive(config, "dtype") != NULL; /* since transformers 5 */
    put(config, new_word ? "dtype" : "torch_dtype", cJSON_CreateString(dtype));
    e = file_replace_json(folder, "config.json", config, msg, msg_len);
    cJSON_Delete(config);
    return e;
}

/* ---- from GGUF ---- */
/* rope_freqs.weight holds what Llama 3's rule makes of its factor: the largest.  Is it that? */
static bool is_llama3(const struct rope_config *c, double *factor) {
    int half = c->head_dim / 2;
    *factor = 1;
    for (int i = 0; i < half; i++)
        if (c->freq_factors[i] > *factor) *factor = c->freq_factors[i];
    struct rope_config ruled = {.head_dim = c->head_dim,
                                .base = c->base,
                                .scaling = ROPE_SCALING_LLAMA3,
                                .factor = *factor,
                                .low_freq_factor = 1,
                                .high_freq_factor = 4,
                                .original_context = 8192};
    struct rope *a = NULL, *b = NULL;
    bool same = !rope_new(&a, c, NULL, 0) && !rope_new(&b, &ruled, NULL, 0);
    for (int i = 0; same && i < half; i++) { /* the file has the factors in fp32 */
        double x = rope_frequencies(a)[i], y = rope_frequencies(b)[i];
        same = fabs(x - y) <= 1e-5 * y;
    }
    rope_free(a);
    rope_free(b);
    return same;
}

static enum err add_rope(const struct base *base, cJSON *o, char *msg, size_t msg_len) {
    const struct rope_config *c = &base_config(base)->rope;
    double factor = c->factor;
    add(o, "rope_theta", c->base);
    if (c->freq_factors && (c->scaling != ROPE_SCALING_NONE || !is_llama3(c, &factor)))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: its RoPE factors (rope_freqs.weight) are not those of Llama 3, and "
                       "config.json cannot hold others",
                       base_path(base));
    if (!c->freq_factors && c->scaling == ROPE_SCALING_NONE) {
        cJSON_AddNullToObject(o, "rope_scaling");
        return OK;
    }
    cJSON *scaling = cJSON_AddObjectToObject(o, "rope_scaling");
    cJSON_AddStringToObject(scaling, "rope_type", c->freq_factors ? "llama3" : "linear");
    add(scaling, "factor", factor);
    if (c->freq_factors) {
        add(scaling, "low_freq_factor", 1);
        add(scaling, "high_freq_factor", 4);
        add(scaling, "original_max_position_embeddings", 8192);
    }
    return OK;
}

static void add_architecture(cJSON *o, const char *class, const char *type) {
    const char *names[] = {class};
    cJSON_AddItemToObject(o, "architectures", cJSON_CreateStringArray(names, 1));
    cJSON_AddStringToObject(o, "model_type", type);
}

static enum err make_llama(const struct base *base, cJSON *o, char *msg, size_t msg_len) {
    const struct base_config *c = base_config(base);
    bool qwen2 = c->qkv_bias;
    add_architecture(o, qwen2 ? "Qwen2ForCausalLM" : "LlamaForCausalLM", qwen2 ? "qwen2" : "llama");
    add(o, "hidden_size", c->hidden_dim);
    add(o, "intermediate_size", c->ffn_dim);
    add(o, "num_hidden_layers", c->n_layers);
    add(o, "num_attention_heads", c->n_heads);
    add(o, "num_key_value_heads", c->n_kv_heads);
    add(o, "head_dim", c->head_dim);
    add(o, "max_position_embeddings", (double)c->context);
    add(o, "rms_norm_eps", c->norm_eps);
    cJSON_AddStringToObject(o, "hidden_act", "silu");
    if (qwen2) {
        cJSON_AddBoolToObject(o, "use_sliding_window", false);
    } else {
        bool qkv = base_tensor(base, PART_Q_BIAS, 0) && base_tensor(base, PART_K_BIAS, 0) &&
                   base_tensor(base, PART_V_BIAS, 0);
        cJSON_AddBoolToObject(o, "attention_bias", qkv);
        cJSON_AddBoolToObject(o, "mlp_bias", base_tensor(base, PART_DOWN_BIAS, 0) != NULL);
    }
    return add_rope(base, o, msg, msg_len);
}

static void make_gpt2(const struct base *base, cJSON *o) {
    const struct base_config *c = base_config(base);
    add_architecture(o, "GPT2LMHeadModel", "gpt2");
    add(o, "n_embd", c->hidden_dim);
    add(o, "n_inner", c->ffn_dim);
    add(o, "n_layer", c->n_layers);
    add(o, "n_head", c->n_heads);
    add(o, "n_positions", (double)c->context);
    add(o, "layer_norm_epsilon", c->norm_eps);
    cJSON_AddStringToObject(o, "activation_function", c->gelu_erf ? "gelu" : "gelu_new");
}

/* Ids that begin and end a text, as transformers looks for them. */
static enum err add_ends(const struct base *base, cJSON *config, cJSON *generation, char *msg,
                         size_t msg_len) {
    const struct base_config *c = base_config(base);
    struct tokenizer *t;
    enum err e = base_tokenizer(base, &t, msg, msg_len);
    if (e) return e;
    int32_t bos = tokenizer_bos(t);
    tokenizer_free(t);
    cJSON *both[] = {config, generation};
    for (int i = 0; i < 2; i++) {
        if (bos >= 0) add(both[i], "bos_token_id", bos);
        if (c->n_eos_ids == 1) add(both[i], "eos_token_id", c->eos_ids[0]);
        if (c->n_eos_ids > 1)
            cJSON_AddItemToObject(both[i], "eos_token_id",
                                  cJSON_CreateIntArray(c->eos_ids, c->n_eos_ids));
    }
    return OK;
}

static enum err make_config(const struct base *base, const char *dtype, const char *folder,
                            char *msg, size_t msg_len) {
    const struct base_config *c = base_config(base);
    cJSON *config = cJSON_CreateObject(), *generation = cJSON_CreateObject();
    enum err e = OK;
    if (c->architecture == BASE_GPT2)
        make_gpt2(base, config);
    else
        e = make_llama(base, config, msg, msg_len);
    add(config, "vocab_size", c->vocab_size);
    cJSON_AddBoolToObject(config, "tie_word_embeddings", c->tied);
    cJSON_AddStringToObject(config, "torch_dtype", dtype);
    if (!e) e = add_ends(base, config, generation, msg, msg_len);
    if (!e) e = file_replace_json(folder, "config.json", config, msg, msg_len);
    if (!e && cJSON_GetArraySize(generation))
        e = file_replace_json(folder, "generation_config.json", generation, msg, msg_len);
    cJSON_Delete(config);
    cJSON_Delete(generation);
    return e;
}

enum err merge_config_write(const struct base *base, const char *dtype, const char *folder,
                            char *msg, size_t msg_len) {
    return (base_gguf(base) ? make_config : edit_config)(base, dtype, folder, msg, msg_len);
}

/* ---- urchin.json ---- */
enum err merge_urchin_write(const char *model, const char *name, const char *folder, char *msg,
                            size_t msg_len) {
    static const char *const moved[] = {"base", "low_rank"};
    cJSON *o = NULL;
    enum err e = load(&o, model, "urchin.json", msg, msg_len);
    if (e) return e;
    if (!cJSON_IsObject(cJSON_GetObjectItemCaseSensitive(o, "training")))
        put(o, "training", cJSON_CreateObject());
    cJSON *merged = cJSON_CreateObject();
    put(cJSON_GetObjectItemCaseSensitive(o, "training"), "merged", merged);
    cJSON_AddItemToObject(merged, "name",
                          cJSON_Duplicate(cJSON_GetObjectItemCaseSensitive(o, "name"), true));
    for (int i = 0; i < 2; i++) {
        cJSON *was = cJSON_DetachItemFromObjectCaseSensitive(o, moved[i]);
        cJSON_AddItemToObject(merged, moved[i], was ? was : cJSON_CreateNull());
        cJSON_AddNullToObject(o, moved[i]);
    }
    if (name) put(o, "name", cJSON_CreateString(name));
    e = file_replace_json(folder, "urchin.json", o, msg, msg_len);
    cJSON_Delete(o);
    return e;
}
