/* base.c - matching the tensors of a checkpoint to their parts, and reading them. */
#include "model/base.h"

#include "compute/quant.h"
#include "config/json.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum dim { DIM_ONE, DIM_HIDDEN, DIM_Q, DIM_KV, DIM_QKV, DIM_FFN, DIM_VOCAB, DIM_CONTEXT };

/* A part belongs to an architecture when it has a name there. Layer parts stand after their layer's
 * prefix. */
static const struct part {
    const char *llama, *gpt2, *gguf;
    enum dim n_out, n_in;
} parts[N_PARTS] = {
    [PART_EMBED] = {"embed_tokens.weight", "wte.weight", "token_embd.weight", DIM_VOCAB,
                    DIM_HIDDEN},
    [PART_POSITION] = {NULL, "wpe.weight", "position_embd.weight", DIM_CONTEXT, DIM_HIDDEN},
    [PART_NORM] = {"norm.weight", "ln_f.weight", "output_norm.weight", DIM_HIDDEN, DIM_ONE},
    [PART_NORM_BIAS] = {NULL, "ln_f.bias", "output_norm.bias", DIM_HIDDEN, DIM_ONE},
    [PART_HEAD] = {"lm_head.weight", "lm_head.weight", "output.weight", DIM_VOCAB, DIM_HIDDEN},
    [PART_ATTN_NORM] = {"input_layernorm.weight", "ln_1.weight", "attn_norm.weight", DIM_HIDDEN,
                        DIM_ONE},
    [PART_ATTN_NORM_BIAS] = {NULL, "ln_1.bias", "attn_norm.bias", DIM_HIDDEN, DIM_ONE},
    [PART_Q] = {"self_attn.q_proj.weight", NULL, "attn_q.weight", DIM_Q, DIM_HIDDEN},
    [PART_K] = {"self_attn.k_proj.weight", NULL, "attn_k.weight", DIM_KV, DIM_HIDDEN},
    [PART_V] = {"self_attn.v_proj.weight", NULL, "attn_v.weight", DIM_KV, DIM_HIDDEN},
    [PART_QKV] = {NULL, "attn.c_attn.weight", "attn_qkv.weight", DIM_QKV, DIM_HIDDEN},
    [PART_Q_BIAS] = {"self_attn.q_proj.bias", NULL, "attn_q.bias", DIM_Q, DIM_ONE},
    [PART_K_BIAS] = {"self_attn.k_proj.bias", NULL, "attn_k.bias", DIM_KV, DIM_ONE},
    [PART_V_BIAS] = {"self_attn.v_proj.bias", NULL, "attn_v.bias", DIM_KV, DIM_ONE},
    [PART_QKV_BIAS] = {NULL, "attn.c_attn.bias", "attn_qkv.bias", DIM_QKV, DIM_ONE},
    [PART_O] = {"self_attn.o_proj.weight", "attn.c_proj.weight", "attn_output.weight", DIM_HIDDEN,
                DIM_Q},
    [PART_O_BIAS] = {"self_attn.o_proj.bias", "attn.c_proj.bias", "attn_output.bias", DIM_HIDDEN,
                     DIM_ONE},
    [PART_FFN_NORM] = {"post_attention_layernorm.weight", "ln_2.weight", "ffn_norm.weight",
                       DIM_HIDDEN, DIM_ONE},
    [PART_FFN_NORM_BIAS] = {NULL, "ln_2.bias", "ffn_norm.bias", DIM_HIDDEN, DIM_ONE},
    [PART_GATE] = {"mlp.gate_proj.weight", NULL, "ffn_gate.weight", DIM_FFN, DIM_HIDDEN},
    [PART_UP] = {"mlp.up_proj.weight", "mlp.c_fc.weight", "ffn_up.weight", DIM_FFN, DIM_HIDDEN},
    [PART_DOWN] = {"mlp.down_proj.weight", "mlp.c_proj.weight", "ffn_down.weight", DIM_HIDDEN,
                   DIM_FFN},
    [PART_GATE_BIAS] = {"mlp.gate_proj.bias", NULL, "ffn_gate.bias", DIM_FFN, DIM_ONE},
    [PART_UP_BIAS] = {"mlp.up_proj.bias", "mlp.c_fc.bias", "ffn_up.bias", DIM_FFN, DIM_ONE},
    [PART_DOWN_BIAS] = {"mlp.down_proj.bias", "mlp.c_proj.bias", "ffn_down.bias", DIM_HIDDEN,
                        DIM_ONE},
};

struct base {
    char *path;
    struct base_config config;
    struct gguf *gguf;           /* or else shards */
    struct safetensors **shards; /* owned, as their paths */
    char **shard_paths;
    int n_shards;
    struct base_tensor
        *tensors; /* [n_layers][N_PARTS], parts that are there once in layer 0; name NULL: none */
    float *freq_factors;
    int64_t n_params;
};

char *path_join(const char *folder, const char *name) {
    char *path = NULL;
    return asprintf(&path, "%s/%s", folder, name) < 0 ? NULL : path;
}

static int dim_size(const struct base_config *c, enum dim dim) {
    switch (dim) {
    case DIM_ONE:
        return 1;
    case DIM_HIDDEN:
        return c->hidden_dim;
    case DIM_Q:
        return c->n_heads * c->head_dim;
    case DIM_KV:
        return c->n_kv_heads * c->head_dim;
    case DIM_QKV:
        return (c->n_heads + 2 * c->n_kv_heads) * c->head_dim;
    case DIM_FFN:
        return c->ffn_dim;
    case DIM_VOCAB:
        return c->vocab_size;
    case DIM_CONTEXT:
        return (int)c->context;
    }
    return 0;
}

static bool is_bias(enum base_part part) {
    size_t n = strlen(parts[part].gguf);
    return n > 5 && !strcmp(parts[part].gguf + n - 5, ".bias");
}

/* ---- names ---- */
static const char *part_name(const struct base *b, enum base_part part) {
    const struct part *p = &parts[part];
    const char *name = b->config.architecture == BASE_GPT2 ? p->gpt2 : p->llama;
    return name && b->gguf ? p->gguf : name;
}

static const char *strip(const char *name, const char *prefix) {
    size_t n = strlen(prefix);
    return strncmp(name, prefix, n) ? name : name + n;
}

/* Buffers that older checkpoints carry and no one needs: Llama's frequencies, GPT-2's causal mask.
 */
static bool is_ignored(const struct base *b, const char *name) {
    static const char *const ends[] = {".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"};
    size_t n = strlen(name);
    for (int i = 0; !b->gguf && i < 3; i++)
        if (n > strlen(ends[i]) && !strcmp(name + n - strlen(ends[i]), ends[i])) return true;
    return false;
}

/* The part and layer that a tensor's name stands for. */
static bool identify(const struct base *b, const char *name, enum base_part *part, long *layer) {
    bool gpt2 = b->config.architecture == BASE_GPT2;
    const char *prefix = b->gguf ? "blk." : gpt2 ? "h." : "layers.";
    const char *rest = b->gguf ? name : strip(name, gpt2 ? "transformer." : "model.");
    const char *number = strip(rest, prefix);
    bool in_layer = number != rest;
    *layer = 0;
    if (in_layer) {
        char *end;
        *layer = strtol(number, &end, 10);
        if (*number < '0' || *number > '9' || *end != '.') return false;
        rest = end + 1;
    }
    int first = in_layer ? PART_ATTN_NORM : 0, last = in_layer ? N_PARTS : PART_ATTN_NORM;
    for (int p = first; p < last; p++)
        if (part_name(b, p) && !strcmp(rest, part_name(b, p))) {
            *part = (enum base_part)p;
            return true;
        }
    return false;
}

/* ---- taking one tensor of the files ---- */
static enum err check_shape(const struct base_tensor *t, char *msg, size_t msg_len) {
    bool vector = t->n_in == 1, right;
    char have[128] = "";
    if (t->gguf) { /* contiguous dimension first */
        const int64_t *d = t->gguf->dims;
        right = d[0] == (vector ? t->n_out : t->n_in) && d[1] == (vector ? 1 : t->n_out) &&
                d[2] * d[3] == 1;
        snprintf(have, sizeof have, "%lld, %lld, %lld, %lld", (long long)d[3], (long long)d[2],
                 (long long)d[1], (long long)d[0]);
    } else {
        const int64_t *d = t->st->dims;
        right = t->st->n_dims == (vector ? 1 : 2) && d[t->transposed] == t->n_out &&
                d[!t->transposed] == t->n_in;
        for (int i = 0; i < t->st->n_dims && i < 4; i++)
            snprintf(have + strlen(have), sizeof have - strlen(have), "%s%lld", i ? ", " : "",
                     (long long)d[i]);
    }
    if (right) return OK;
    int rows = t->transposed ? t->n_in : t->n_out, columns = t->transposed ? t->n_out : t->n_in;
    if (vector)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: tensor %s has shape [%s], but the configuration says [%d]", t->file,
                       t->name, have, rows);
    return err_set(msg, msg_len, ERR_FORMAT,
                   "%s: tensor %s has shape [%s], but the configuration says [%d, %d]", t->file,
                   t->name, have, rows, columns);
}

static enum err take_tensor(struct base *b, struct base_tensor t, char *msg, size_t msg_len) {
    const struct base_config *c = &b->config;
    enum base_part part;
    long layer;
    if (is_ignored(b, t.name)) return OK;
    if (!identify(b, t.name, &part, &layer))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: tensor %s is no part of a %s model that is known here", t.file, t.name,
                       c->architecture == BASE_GPT2 ? "GPT-2" : "Llama");
    if (layer >= c->n_layers)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: tensor %s is of layer %ld, but the configuration says %d layers",
                       t.file, t.name, layer, c->n_layers);
    struct base_tensor *slot = &b->tensors[layer * N_PARTS + part];
    if (slot->name)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s is there twice, also in %s", t.file,
                       t.name, slot->file);
    t.n_out = dim_size(c, parts[part].n_out);
    t.n_in = dim_size(c, parts[part].n_in);
    t.transposed = c->architecture == BASE_GPT2 && t.st && part >= PART_ATTN_NORM && t.n_in > 1;
    if (c->interleaved_qk && (part == PART_Q || part == PART_Q_BIAS))
        t.interleaved_heads = c->n_heads;
    if (c->interleaved_qk && (part == PART_K || part == PART_K_BIAS))
        t.interleaved_heads = c->n_kv_heads;
    if (t.st && t.st->dtype != ST_F32 && t.st->dtype != ST_F16 && t.st->dtype != ST_BF16 &&
        t.st->dtype != ST_F64)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s is not F32, F16, BF16 or F64",
                       t.file, t.name);
    enum err e = check_shape(&t, msg, msg_len);
    if (e) return e;
    if (t.gguf && t.n_in == 1 && quant_block_size(t.gguf->type) != 1)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: tensor %s is a vector and may not be quantised", t.file, t.name);
    *slot = t;
    b->n_params += (int64_t)t.n_out * t.n_in;
    return OK;
}

static enum err check_complete(const struct base *b, char *msg, size_t msg_len) {
    const struct base_config *c = &b->config;
    for (int layer = 0; layer < c->n_layers; layer++)
        for (int p = layer ? PART_ATTN_NORM : 0; p < N_PARTS; p++) {
            bool is_qkv_bias = p == PART_Q_BIAS || p == PART_K_BIAS || p == PART_V_BIAS;
            bool optional =
                (p == PART_HEAD && c->tied) ||
                (is_bias(p) && c->architecture == BASE_LLAMA && !(is_qkv_bias && c->qkv_bias));
            if (!part_name(b, p) || optional || b->tensors[layer * N_PARTS + p].name) continue;
            if (p < PART_ATTN_NORM)
                return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s is missing", b->path,
                               part_name(b, p));
            return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s of layer %d is missing",
                           b->path, part_name(b, p), layer);
        }
    return OK;
}

/* ---- the two containers ---- */
static enum err read_freq_factors(struct base *b, const struct gguf_tensor *t, char *msg,
                                  size_t msg_len) {
    int n = b->config.head_dim / 2;
    if (t->dims[0] != n || t->n_dims != 1 || t->type != QUANT_F32)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s is not F32 of %d values", b->path,
                       t->name, n);
    b->freq_factors = malloc((size_t)n * sizeof(float));
    if (!b->freq_factors) return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", b->path);
    quant_decode(b->freq_factors, t->type, t->data, (size_t)n);
    for (int i = 0; i < n; i++)
        if (!(b->freq_factors[i] > 0 && b->freq_factors[i] < 1e30f))
            return err_set(msg, msg_len, ERR_FORMAT,
                           "%s: tensor %s holds a factor that is not positive", b->path, t->name);
    b->config.rope.freq_factors = b->freq_factors;
    return OK;
}

static enum err new_tensors(struct base *b, char *msg, size_t msg_len) {
    b->tensors = calloc((size_t)b->config.n_layers * N_PARTS, sizeof *b->tensors);
    return b->tensors ? OK : err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", b->path);
}

static enum err open_gguf(struct base *b, char *msg, size_t msg_len) {
    enum err e = gguf_open(&b->gguf, b->path, msg, msg_len);
    if (!e) e = base_config_from_gguf(&b->config, b->gguf, b->path, msg, msg_len);
    if (!e) e = new_tensors(b, msg, msg_len);
    for (int i = 0; !e && i < gguf_n_tensors(b->gguf); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(b->gguf, i);
        if (b->config.architecture == BASE_LLAMA && !strcmp(t->name, "rope_freqs.weight"))
            e = read_freq_factors(b, t, msg, msg_len);
        else
            e = take_tensor(b, (struct base_tensor){.file = b->path, .name = t->name, .gguf = t},
                            msg, msg_len);
    }
    return e;
}

static enum err open_shard(struct base *b, const char *name, char *msg, size_t msg_len) {
    char *path = path_join(b->path, name);
    char **paths = realloc(b->shard_paths, (size_t)(b->n_shards + 1) * sizeof *paths);
    if (paths) b->shard_paths = paths;
    struct safetensors **shards = realloc(b->shards, (size_t)(b->n_shards + 1) * sizeof *shards);
    if (shards) b->shards = shards;
    if (!path || !paths || !shards) {
        free(path);
        return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", b->path);
    }
    b->shards[b->n_shards] = NULL;
    b->shard_paths[b->n_shards] = path;
    struct safetensors **st = &b->shards[b->n_shards++];
    enum err e = safetensors_open(st, path, msg, msg_len);
    for (int i = 0; !e && i < safetensors_count(*st); i++) {
        const struct st_tensor *t = safetensors_at(*st, i);
        e = take_tensor(b, (struct base_tensor){.file = path, .name = t->name, .st = t}, msg,
                        msg_len);
    }
    return e;
}

/* weight_map: tensor name -> file in the same folder. */
static enum err open_shards(struct base *b, const char *index_path, char *msg, size_t msg_len) {
    struct json *index = NULL;
    enum err e = json_load(&index, index_path, msg, msg_len);
    const struct json *map = json_get(index, "weight_map");
    if (!e && (json_type(map) != JSON_OBJECT || !json_child(map)))
        e = err_set(msg, msg_len, ERR_FORMAT, "%s: has no weight_map", index_path);
    for (const struct json *m = json_child(map); !e && m; m = json_next(m)) {
        const char *name = json_string(m);
        bool known = false;
        if (!name || !*name || strchr(name, '/')) {
            e = err_set(msg, msg_len, ERR_FORMAT, "%s: weight_map.%s is not a file of this folder",
                        index_path, json_key(m));
            break;
        }
        for (int i = 0; i < b->n_shards && !known; i++)
            known = !strcmp(strrchr(b->shard_paths[i], '/') + 1, name);
        if (!known) e = open_shard(b, name, msg, msg_len);
    }
    json_free(index);
    return e;
}

static enum err open_folder(struct base *b, char *msg, size_t msg_len) {
    enum err e = base_config_from_folder(&b->config, b->path, msg, msg_len);
    if (!e) e = new_tensors(b, msg, msg_len);
    if (e) return e;
    char *index = path_join(b->path, "model.safetensors.index.json");
    if (!index) return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", b->path);
    struct stat st;
    e = stat(index, &st) == 0 ? open_shards(b, index, msg, msg_len)
                              : open_shard(b, "model.safetensors", msg, msg_len);
    free(index);
    return e;
}

enum err base_open(struct base **out, const char *path, char *msg, size_t msg_len) {
    struct stat st;
    if (stat(path, &st) != 0) return err_set(msg, msg_len, ERR_IO, "%s: %m", path);
    struct base *b = calloc(1, sizeof *b);
    if (!b || !(b->path = strdup(path))) {
        free(b);
        return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", path);
    }
    enum err e = S_ISDIR(st.st_mode) ? open_folder(b, msg, msg_len) : open_gguf(b, msg, msg_len);
    if (!e) e = check_complete(b, msg, msg_len);
    if (e)
        base_close(b);
    else
        *out = b;
    return e;
}

void base_close(struct base *b) {
    if (!b) return;
    for (int i = 0; i < b->n_shards; i++) {
        safetensors_close(b->shards[i]);
        free(b->shard_paths[i]);
    }
    free(b->shards);
    free(b->shard_paths);
    gguf_close(b->gguf);
    free(b->tensors);
    free(b->freq_factors);
    free(b->path);
    free(b);
}

const struct base_config *base_config(const struct base *b) {
    return &b->config;
}
const char *base_path(const struct base *b) {
    return b->path;
}
int64_t base_n_params(const struct base *b) {
    return b->n_params;
}

enum weight_type base_natural_weights(const struct base *b) {
    bool sixteen = false;
    for (int i = 0; i < b->config.n_layers * N_PARTS; i++) {
        const struct base_tensor *t = &b->tensors[i];
        if (!t->name || t->n_in == 1) continue;
        if (t->gguf && quant_block_size(t->gguf->type) > 1) return WEIGHT_INT8;
        sixteen |= t->gguf ? t->gguf->type != QUANT_F32
                           : t->st->dtype == ST_F16 || t->st->dtype == ST_BF16;
    }
    return sixteen ? WEIGHT_BF16 : WEIGHT_FP32;
}

const struct base_tensor *base_tensor(const struct base *b, enum base_part part, int layer) {
    const struct base_tensor *t = &b->tensors[layer * N_PARTS + part];
    return t->name ? t : NULL;
}

void base_part_name(const struct base *b, enum base_part part, int layer, char *out, size_t len) {
    bool gpt2 = b->config.architecture == BASE_GPT2;
    const char *name = gpt2 ? parts[part].gpt2 : parts[part].llama;
    const char *prefix = part == PART_HEAD ? "" : gpt2 ? "transformer." : "model.";
    if (part < PART_ATTN_NORM)
        snprintf(out, len, "%s%s", prefix, name);
    else
        snprintf(out, len, "%s%s.%d.%s", prefix, gpt2 ? "h" : "layers", layer, name);
}

const struct gguf *base_gguf(const struct base *b) {
    return b->gguf;
}

/* ---- reading ---- */
static void read_transposed(const struct base_tensor *t, int first, int n_rows, float *out) {
    enum { COLUMNS = 64 };
    float part[COLUMNS];
    for (int r = 0; r < n_rows; r += COLUMNS) {
        int n = n_rows - r < COLUMNS ? n_rows - r : COLUMNS;
        for (int i = 0; i < t->n_in; i++) {
            st_decode(part, t->st, (int64_t)i * t->n_out + first + r, n);
            for (int j = 0; j < n; j++)
                out[(size_t)(r + j) * t->n_in + i] = part[j];
        }
    }
}

void base_read(const struct base_tensor *t, int first, int n_rows, float *out) {
    if (t->transposed) {
        read_transposed(t, first, n_rows, out);
    } else if (t->st) {
        st_decode(out, t->st, (int64_t)first * t->n_in, (int64_t)n_rows * t->n_in);
    } else {
        size_t row_bytes = t->gguf->bytes / (size_t)t->n_out;
        const char *data = t->gguf->data;
        if (!t->interleaved_heads) {
            quant_decode(out, t->gguf->type, data + (size_t)first * row_bytes,
                         (size_t)n_rows * (size_t)t->n_in);
            return;
        }
        /* Row s * half + j of a head (s = 0, 1) is stored as its row 2 j + s. */
        int head_rows = t->n_out / t->interleaved_heads, half = head_rows / 2;
        for (int r = first; r < first + n_rows; r++) {
            int in_head = r % head_rows;
            int stored = r - in_head + 2 * (in_head % half) + in_head / half;
            quant_decode(out + (size_t)(r - first) * t->n_in, t->gguf->type,
                         data + (size_t)stored * row_bytes, (size_t)t->n_in);
        }
    }
}

enum err base_tokenizer(const struct base *b, struct tokenizer **out, char *msg, size_t msg_len) {
    char reason[400] = "";
    if (!b->gguf) return tokenizer_open_json(out, b->path, msg, msg_len);
    enum err e = tokenizer_open_gguf(out, b->gguf, reason, sizeof reason);
    return e ? err_set(msg, msg_len, e, "%s: %s", b->path, reason)
             : OK; /* metadata does not know its file */
}
