/* base_config_gguf.c - configuration from a GGUF file's metadata (ggml-org/ggml docs/gguf.md). */
#include "model/base.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* Keys stand under the architecture's name; the first fault stays. */
struct reader {
    const struct gguf *g;
    const char *architecture, *path;
    char *msg;
    size_t msg_len;
    enum err e;
    char key[128]; /* the one last looked at */
};

enum { REQUIRED = -1 };

static const char *full_key(struct reader *r, const char *key) {
    snprintf(r->key, sizeof r->key, "%s.%s", r->architecture, key);
    return r->key;
}

static void fault(struct reader *r, const char *what) {
    if (!r->e)
        r->e = err_set(r->msg, r->msg_len, ERR_FORMAT, "%s: metadata %s %s", r->path, r->key, what);
}

static int64_t read_int(struct reader *r, const char *key, int64_t otherwise) {
    int64_t x = otherwise;
    double ignored;
    full_key(r, key);
    if (gguf_int(r->g, r->key, &x)) {
        if (x < 0 || x > INT_MAX) fault(r, "is not of a usable size");
    } else if (gguf_array_size(r->g, r->key)) {
        fault(r, "differs by layer, which is not supported");
    } else if (gguf_double(r->g, r->key, &ignored) || gguf_string(r->g, r->key, NULL)) {
        fault(r, "is not a whole number");
    } else if (otherwise == REQUIRED) {
        fault(r, "is missing");
    }
    return x;
}

static double read_real(struct reader *r, const char *key, double otherwise) {
    double x = otherwise;
    gguf_double(r->g, full_key(r, key), &x);
    if (!isfinite(x)) fault(r, "is not finite");
    return x;
}

static void read_rope(struct reader *r, struct base_config *c) {
    c->rope.head_dim = c->head_dim;
    if (read_int(r, "rope.dimension_count", c->head_dim) != c->head_dim)
        fault(r, "is not the head size: partial RoPE is not supported");
    c->rope.base = read_real(r, "rope.freq_base", 10000);
    if (!(c->rope.base > 0)) fault(r, "is not positive");
    double factor = read_real(r, "rope.scale_linear", 1); /* the name of old files */
    factor = read_real(r, "rope.scaling.factor", factor);
    if (!(factor > 0)) fault(r, "is not positive");
    const char *type = gguf_string(r->g, full_key(r, "rope.scaling.type"), NULL);
    if (type && strcmp(type, "none") && strcmp(type, "linear"))
        fault(r, "is neither none nor linear");
    if (type ? strcmp(type, "none") : factor != 1) {
        c->rope.scaling = ROPE_SCALING_LINEAR;
        c->rope.factor = factor;
    }
}

static int64_t vocabulary(struct reader *r) {
    const struct gguf_tensor *t = gguf_tensor(r->g, "token_embd.weight");
    if (!t && !r->e)
        r->e = err_set(r->msg, r->msg_len, ERR_FORMAT, "%s: tensor token_embd.weight is missing",
                       r->path);
    return t ? t->dims[1] : 0;
}

enum err base_config_from_gguf(struct base_config *out, const struct gguf *g, const char *path,
                               char *msg, size_t msg_len) {
    static const char *const eos_keys[] = {"tokenizer.ggml.eos_token_id",
                                           "tokenizer.ggml.eot_token_id",
                                           "tokenizer.ggml.eom_token_id"};
    struct base_config c = {0};
    const char *type = gguf_string(g, "general.architecture", NULL);
    if (!type || (strcmp(type, "llama") && strcmp(type, "qwen2") && strcmp(type, "gpt2")))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: architecture \"%s\" is not supported; supported are llama (Llama, "
                       "SmolLM, Mistral), qwen2 and gpt2",
                       path, type ? type : "");
    struct reader r = {.g = g, .architecture = type, .path = path, .msg = msg, .msg_len = msg_len};
    bool gpt2 = !strcmp(type, "gpt2");
    c.architecture = gpt2 ? BASE_GPT2 : BASE_LLAMA;
    c.n_layers = (int)read_int(&r, "block_count", REQUIRED);
    c.hidden_dim = (int)read_int(&r, "embedding_length", REQUIRED);
    c.ffn_dim = (int)read_int(&r, "feed_forward_length", REQUIRED);
    c.n_heads = (int)read_int(&r, "attention.head_count", REQUIRED);
    c.n_kv_heads = (int)read_int(&r, "attention.head_count_kv", c.n_heads);
    c.head_dim =
        (int)read_int(&r, "attention.key_length", c.n_heads > 0 ? c.hidden_dim / c.n_heads : 0);
    if (read_int(&r, "attention.value_length", c.head_dim) != c.head_dim)
        fault(&r, "differs from the size of keys, which is not supported");
    if (read_int(&r, "expert_count", 0) > 0)
        fault(&r, "makes it a mixture of experts, which is not supported");
    c.vocab_size = (int)vocabulary(&r);
    c.context = read_int(&r, "context_length", REQUIRED);
    c.tied = !gguf_tensor(g, "output.weight");
    if (gpt2) {
        c.norm_eps = read_real(&r, "attention.layer_norm_epsilon", 1e-5);
    } else {
        c.norm_eps = read_real(&r, "attention.layer_norm_rms_epsilon", 1e-5);
        c.qkv_bias = !strcmp(type, "qwen2");
        c.interleaved_qk =
            !c.qkv_bias; /* the converter reorders Llama's rows for its own RoPE, not Qwen2's */
        read_rope(&r, &c);
        int64_t window = read_int(&r, "attention.sliding_window", 0);
        if (window > 0 && window < c.context)
            c.context = window; /* up to it full attention is the same */
    }
    for (size_t i = 0; i < sizeof eos_keys / sizeof eos_keys[0]; i++) {
        int64_t id;
        if (gguf_int(g, eos_keys[i], &id)) base_config_add_eos(&c, id);
    }
    if (!r.e) r.e = base_config_check(&c, path, msg, msg_len);
    if (!r.e) *out = c;
    return r.e;
}
