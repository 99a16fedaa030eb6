/* base_config.c - what both kinds of configuration must satisfy. */
#include "model/base.h"

#include <limits.h>

/* Bounds that any real model keeps and that make every product below fit an int. */
enum {
    MAX_LAYERS = 4096,
    MAX_DIM = 1 << 20,
    MAX_VOCAB = 1 << 24,
    MAX_CONTEXT = 1 << 30,
    MAX_HEAD_DIM = 4096
};

enum err base_config_check(const struct base_config *c, const char *path, char *msg,
                           size_t msg_len) {
    const struct {
        const char *what;
        int64_t value, least, most;
    } bounds[] = {
        {"number of layers", c->n_layers, 1, MAX_LAYERS},
        {"hidden size", c->hidden_dim, 2, MAX_DIM},
        {"feed-forward size", c->ffn_dim, 2, MAX_DIM},
        {"number of heads", c->n_heads, 1, MAX_DIM},
        {"number of key-value heads", c->n_kv_heads, 1, c->n_heads},
        {"head size", c->head_dim, 2, MAX_HEAD_DIM},
        {"vocabulary size", c->vocab_size, 1, MAX_VOCAB},
        {"context length", c->context, 1, MAX_CONTEXT},
    };
    for (size_t i = 0; i < sizeof bounds / sizeof bounds[0]; i++)
        if (bounds[i].value < bounds[i].least || bounds[i].value > bounds[i].most)
            return err_set(msg, msg_len, ERR_FORMAT, "%s: the %s is %lld, not %lld to %lld", path,
                           bounds[i].what, (long long)bounds[i].value, (long long)bounds[i].least,
                           (long long)bounds[i].most);
    if (c->n_heads % c->n_kv_heads)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: %d heads cannot share %d key-value heads evenly", path, c->n_heads,
                       c->n_kv_heads);
    if ((int64_t)c->n_heads * c->head_dim > MAX_DIM)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: %d heads of %d values are too many", path,
                       c->n_heads, c->head_dim);
    if (c->architecture == BASE_LLAMA && c->head_dim % 2)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: the head size %d is odd, RoPE needs pairs",
                       path, c->head_dim);
    if (c->architecture == BASE_GPT2 &&
        (c->n_heads * c->head_dim != c->hidden_dim || c->n_kv_heads != c->n_heads))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: GPT-2's %d heads do not divide its hidden size %d", path, c->n_heads,
                       c->hidden_dim);
    if (!(c->norm_eps >= 0 && c->norm_eps < 1))
        return err_set(msg, msg_len, ERR_FORMAT, "%s: the norm's epsilon is not in [0, 1)", path);
    return OK;
}

void base_config_add_eos(struct base_config *c, int64_t id) {
    if (id < 0 || id > INT_MAX || c->n_eos_ids == (int)(sizeof c->eos_ids / sizeof c->eos_ids[0]))
        return;
    for (int i = 0; i < c->n_eos_ids; i++)
        if (c->eos_ids[i] == id) return;
    c->eos_ids[c->n_eos_ids++] = (int32_t)id;
}
