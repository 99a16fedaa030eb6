/* base_config_folder.c - config.json and generation_config.json of a Hugging Face folder. */
#include "config/json.h"
#include "model/base.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define SUPPORTED "supported are llama (Llama, SmolLM, Mistral), qwen2 and gpt2"

/* Reads whole and real numbers of one config.json; the first fault stays. */
struct reader {
    const struct json *root;
    const char *path;
    char *msg;
    size_t msg_len;
    enum err e;
};

enum { REQUIRED = -1 }; /* in place of a default */

static bool is_absent(const struct json *node) {
    return json_type(node) == JSON_NULL;
}

static int64_t read_int(struct reader *r, const char *key, int64_t otherwise) {
    const struct json *node = json_get(r->root, key);
    int64_t x = otherwise;
    if (r->e) return x;
    if (is_absent(node) && otherwise == REQUIRED)
        r->e = err_set(r->msg, r->msg_len, ERR_FORMAT, "%s: %s is missing", r->path, key);
    else if (!is_absent(node) && (!json_int(node, &x) || x < 0 || x > INT_MAX))
        r->e = err_set(r->msg, r->msg_len, ERR_FORMAT,
                       "%s: %s is not a whole number of a usable size", r->path, key);
    return x;
}

static double read_real(struct reader *r, const struct json *object, const char *key,
                        double otherwise) {
    const struct json *node = json_get(object, key);
    double x = json_number(node, NAN);
    if (r->e || is_absent(node)) return otherwise;
    if (isnan(x))
        r->e = err_set(r->msg, r->msg_len, ERR_FORMAT, "%s: %s is not a number", r->path, key);
    return x;
}

/* Settings that change the model's function and are implemented only with one value. */
static void refuse(struct reader *r, bool bad, const char *key) {
    if (bad && !r->e)
        r->e = err_set(r->msg, r->msg_len, ERR_FORMAT, "%s: this value of %s is not supported",
                       r->path, key);
}

static const char *read_string(const struct json *object, const char *key, const char *otherwise) {
    const char *s = json_string(json_get(object, key));
    return s ? s : otherwise;
}

/* rope_scaling {rope_type or type, factor, ...}, and since transformers 5 rope_parameters with
 * rope_theta inside. */
static void read_rope(struct reader *r, struct base_config *c) {
    const struct json *scaling = json_get(r->root, "rope_scaling");
    const struct json *parameters = json_get(r->root, "rope_parameters");
    const char *key = "rope_scaling";
    if (is_absent(scaling) && !is_absent(parameters)) scaling = parameters, key = "rope_parameters";
    c->rope.head_dim = c->head_dim;
    c->rope.base =
        read_real(r, r->root, "rope_theta", read_real(r, parameters, "rope_theta", 10000));
    refuse(r, !(c->rope.base > 0), "rope_theta");
    refuse(r, read_real(r, r->root, "partial_rotary_factor", 1) != 1, "partial_rotary_factor");
    if (is_absent(scaling)) return;
    const char *type = read_string(scaling, "rope_type", read_string(scaling, "type", "default"));
    if (!strcmp(type, "default")) return;
    if (strcmp(type, "linear") && strcmp(type, "llama3")) {
        if (!r->e)
            r->e = err_set(r->msg, r->msg_len, ERR_FORMAT,
                           "%s: %s of type %s is not supported, only linear and llama3 are",
                           r->path, key, type);
        return;
    }
    c->rope.scaling = *type == 'l' && type[1] == 'i' ? ROPE_SCALING_LINEAR : ROPE_SCALING_LLAMA3;
    c->rope.factor = read_real(r, scaling, "factor", 0);
    refuse(r, !(c->rope.factor > 0), "factor");
    if (c->rope.scaling == ROPE_SCALING_LINEAR) return;
    c->rope.low_freq_factor = read_real(r, scaling, "low_freq_factor", 1);
    c->rope.high_freq_factor = read_real(r, scaling, "high_freq_factor", 4);
    c->rope.original_context = read_real(r, scaling, "original_max_position_embeddings", 8192);
    refuse(r, !(c->rope.low_freq_factor > 0 && c->rope.high_freq_factor > c->rope.low_freq_factor),
           "high_freq_factor");
    refuse(r, !(c->rope.original_context > 0), "original_max_position_embeddings");
}

static void read_llama(struct reader *r, struct base_config *c, const char *type) {
    c->architecture = BASE_LLAMA;
    c->n_layers = (int)read_int(r, "num_hidden_layers", REQUIRED);
    c->hidden_dim = (int)read_int(r, "hidden_size", REQUIRED);
    c->ffn_dim = (int)read_int(r, "intermediate_size", REQUIRED);
    c->n_heads = (int)read_int(r, "num_attention_heads", REQUIRED);
    c->n_kv_heads = (int)read_int(r, "num_key_value_heads", c->n_heads);
    c->head_dim = (int)read_int(r, "head_dim", c->n_heads > 0 ? c->hidden_dim / c->n_heads : 0);
    c->vocab_size = (int)read_int(r, "vocab_size", REQUIRED);
    c->context = read_int(r, "max_position_embeddings", REQUIRED);
    c->norm_eps = read_real(r, r->root, "rms_norm_eps", 1e-6);
    c->tied = json_bool(json_get(r->root, "tie_word_embeddings"), false);
    bool qwen2 = !strcmp(type, "qwen2");
    c->qkv_bias = qwen2 || json_bool(json_get(r->root, "attention_bias"), false);
    refuse(r, strcmp(read_string(r->root, "hidden_act", "silu"), "silu") != 0, "hidden_act");
    read_rope(r, c);
    /* Full attention is what a sliding window computes up to its size; past it the model would be
     * another one. */
    int64_t window = read_int(r, "sliding_window", 0);
    if (json_bool(json_get(r->root, "use_sliding_window"), !qwen2) && window > 0 &&
        window < c->context)
        c->context = window;
}

static void read_gpt2(struct reader *r, struct base_config *c) {
    c->architecture = BASE_GPT2;
    c->n_layers = (int)read_int(r, "n_layer", REQUIRED);
    c->hidden_dim = (int)read_int(r, "n_embd", REQUIRED);
    c->ffn_dim =
        (int)read_int(r, "n_inner", c->hidden_dim < INT_MAX / 4 ? 4 * (int64_t)c->hidden_dim : 0);
    c->n_heads = c->n_kv_heads = (int)read_int(r, "n_head", REQUIRED);
    c->head_dim = c->n_heads > 0 ? c->hidden_dim / c->n_heads : 0;
    c->vocab_size = (int)read_int(r, "vocab_size", REQUIRED);
    c->context = read_int(r, "n_positions", REQUIRED);
    c->norm_eps = read_real(r, r->root, "layer_norm_epsilon", 1e-5);
    c->tied = json_bool(json_get(r->root, "tie_word_embeddings"), true);
    const char *act = read_string(r->root, "activation_function", "gelu_new");
    c->gelu_erf = !strcmp(act, "gelu");
    refuse(r, !c->gelu_erf && strcmp(act, "gelu_new") && strcmp(act, "gelu_pytorch_tanh"),
           "activation_function");
    refuse(r, !json_bool(json_get(r->root, "scale_attn_weights"), true), "scale_attn_weights");
    refuse(r, json_bool(json_get(r->root, "scale_attn_by_inverse_layer_idx"), false),
           "scale_attn_by_inverse_layer_idx");
    refuse(r, json_bool(json_get(r->root, "add_cross_attention"), false), "add_cross_attention");
}

static void add_eos(struct base_config *c,
                    const struct json *node) { /* a token id or a list of them */
    int64_t id;
    if (json_int(node, &id)) base_config_add_eos(c, id);
    if (json_type(node) != JSON_ARRAY) return;
    for (const struct json *n = json_child(node); n; n = json_next(n))
        if (json_int(n, &id)) base_config_add_eos(c, id);
}

static enum err read_generation_config(struct base_config *c, const char *folder, char *msg,
                                       size_t msg_len) {
    struct json *generation = NULL;
    struct stat st;
    enum err e = OK;
    char *path = path_join(folder, "generation_config.json");
    if (!path) return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", folder);
    if (stat(path, &st) == 0) e = json_load(&generation, path, msg, msg_len);
    add_eos(c, json_get(generation, "eos_token_id"));
    json_free(generation);
    free(path);
    return e;
}

enum err base_config_from_folder(struct base_config *out, const char *folder, char *msg,
                                 size_t msg_len) {
    struct json *root = NULL;
    struct base_config c = {0};
    char *path = path_join(folder, "config.json");
    if (!path) return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", folder);
    enum err e = json_load(&root, path, msg, msg_len);
    if (!e) {
        struct reader r = {.root = root, .path = path, .msg = msg, .msg_len = msg_len};
        const char *type = read_string(root, "model_type", "");
        if (!strcmp(type, "llama") || !strcmp(type, "mistral") || !strcmp(type, "qwen2") ||
            !strcmp(type, "smollm"))
            read_llama(&r, &c, type);
        else if (!strcmp(type, "gpt2"))
            read_gpt2(&r, &c);
        else
            r.e = err_set(msg, msg_len, ERR_FORMAT,
                          "%s: model_type \"%s\" is not supported; " SUPPORTED, path, type);
        refuse(&r, !is_absent(json_get(root, "quantization_config")), "quantization_config");
        add_eos(&c, json_get(root, "eos_token_id"));
        e = r.e ? r.e : base_config_check(&c, path, msg, msg_len);
    }
    if (!e) e = read_generation_config(&c, folder, msg, msg_len);
    if (!e) *out = c;
    json_free(root);
    free(path);
    return e;
}
