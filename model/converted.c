/* converted.c - urchin.json and hedgehog.safetensors. */
#include "model/converted.h"

#include "config/json.h"
#include "model/mapped.h"
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char *const target_names[N_LOW_RANK_TARGETS] = {"q_proj", "k_proj", "v_proj",
                                                             "o_proj"};

/* ---- urchin.json ---- */
struct reader { /* the first fault stays */
    const char *path;
    char *msg;
    size_t msg_len;
    enum err e;
};

static void fault(struct reader *r, const char *where, const char *key, const char *what) {
    if (!r->e)
        r->e = err_set(r->msg, r->msg_len, ERR_FORMAT, "%s: %s%s %s", r->path, where, key, what);
}

/* Every key must be one of known (NULL-terminated): what is not understood would be served wrongly.
 */
static void refuse_unknown(struct reader *r, const struct json *object, const char *where,
                           const char *const *known) {
    if (json_type(object) != JSON_OBJECT)
        return; /* the caller's fault to name; a list has no keys */
    for (const struct json *m = json_child(object); m && !r->e; m = json_next(m)) {
        const char *const *k = known;
        while (*k && strcmp(*k, json_key(m)))
            k++;
        if (!*k) fault(r, where, json_key(m), "is not known to this version");
        for (const struct json *other = json_next(m); other; other = json_next(other))
            if (!strcmp(json_key(m), json_key(other)))
                fault(r, where, json_key(m), "is there twice");
    }
}

static int64_t read_int(struct reader *r, const struct json *object, const char *where,
                        const char *key, int64_t least, int64_t otherwise) {
    const struct json *node = json_get(object, key);
    int64_t x = otherwise;
    if (json_type(node) == JSON_NULL && otherwise >= 0) return x;
    if (!json_int(node, &x) || x < least || x > INT_MAX)
        fault(r, where, key, least ? "is not a positive whole number" : "is not a whole number");
    return x;
}

/* The index of a string among names; absent: 0 when optional. */
static int read_choice(struct reader *r, const struct json *object, const char *where,
                       const char *key, bool optional, const char *const *names) {
    const char *value = json_string(json_get(object, key));
    if (!value && optional && json_type(json_get(object, key)) == JSON_NULL) return 0;
    char what[160] = "is not one of";
    for (int i = 0; names[i]; i++) {
        if (value && !strcmp(value, names[i])) return i;
        snprintf(what + strlen(what), sizeof what - strlen(what), "%s %s", i ? "," : "", names[i]);
    }
    fault(r, where, key, what);
    return 0;
}

/* Numbers of layers, ascending; how many there are is known with the base. */
static void read_softmax_layers(struct reader *r, struct converted *c, const struct json *list) {
    const char *in = "attention.", *key = "softmax_layers";
    if (json_type(list) == JSON_NULL) return;
    if (json_type(list) != JSON_ARRAY) {
        fault(r, in, key, "is not a list");
        return;
    }
    c->softmax_list = calloc((size_t)json_size(list) + 1, sizeof *c->softmax_list);
    if (!c->softmax_list) {
        if (!r->e) r->e = err_set(r->msg, r->msg_len, ERR_NOMEM, "%s: out of memory", r->path);
        return;
    }
    int64_t last = -1, layer;
    for (const struct json *n = json_child(list); n; n = json_next(n), last = layer) {
        if (!json_int(n, &layer) || layer <= last || layer > INT_MAX) {
            fault(r, in, key, "is not a list of ascending layers");
            return;
        }
        c->softmax_list[c->n_softmax_layers++] = (int)layer;
    }
}

/* Pairs of layer and kv head, ascending; how many there are of each is known with the base. */
static void read_retrieval_heads(struct reader *r, struct converted *c, const struct json *list) {
    const char *in = "attention.cache.retrieval.", *key = "heads";
    size_t n = json_type(list) == JSON_ARRAY ? (size_t)json_size(list) : 0;
    c->retrieval_list = calloc(n + 1, sizeof *c->retrieval_list);
    if (!c->retrieval_list) {
        if (!r->e) r->e = err_set(r->msg, r->msg_len, ERR_NOMEM, "%s: out of memory", r->path);
        return;
    }
    bool good = n > 0;
    int64_t last = -1, pair[2];
    for (const struct json *p = n ? json_child(list) : NULL; p && good; p = json_next(p)) {
        const struct json *head = json_type(p) == JSON_ARRAY ? json_child(p) : NULL;
        good = head && json_size(p) == 2 && json_int(head, &pair[0]) &&
               json_int(json_next(head), &pair[1]) && pair[0] >= 0 && pair[0] <= INT_MAX &&
               pair[1] >= 0 && pair[1] <= INT_MAX && (pair[0] << 31 | pair[1]) > last;
        if (!good) break;
        last = pair[0] << 31 | pair[1];
        c->retrieval_list[c->n_retrieval][0] = (int)pair[0];
        c->retrieval_list[c->n_retrieval++][1] = (int)pair[1];
    }
    if (!good) fault(r, in, key, "is not a list of ascending pairs of layer and kv head");
}

static void read_cache(struct reader *r, struct converted *c, const struct json *cache) {
    static const char *const scores[] = {"self_recall", NULL};
    struct attention_config *a = &c->attention;
    const char *in = "attention.cache.";
    if (json_type(cache) == JSON_NULL) return;
    if (json_type(cache) != JSON_OBJECT) {
        fault(r, "attention.", "cache", "is neither null nor an object");
        return;
    }
    refuse_unknown(
        r, cache, in,
        (const char *const[]){"size", "score", "recent", "age", "fact_age", "retrieval", NULL});
    read_choice(r, cache, in, "score", false, scores);
    a->cache_size = (int)read_int(r, cache, in, "size", 0, -1);
    a->cache_recent = (int)read_int(r, cache, in, "recent", 0, 0);
    const struct json *retrieval = json_get(cache, "retrieval");
    if (json_type(retrieval) == JSON_OBJECT) {
        in = "attention.cache.retrieval.";
        refuse_unknown(r, retrieval, in, (const char *const[]){"size", "recent", "heads", NULL});
        a->retrieval_size = (int)read_int(r, retrieval, in, "size", 1, -1);
        a->retrieval_recent = (int)read_int(r, retrieval, in, "recent", 0, 0);
        read_retrieval_heads(r, c, json_get(retrieval, "heads"));
    } else if (json_type(retrieval) != JSON_NULL) {
        fault(r, in, "retrieval", "is neither null nor an object");
    }
    bool recent = a->cache_recent || a->retrieval_recent;
    in = "attention.cache.";
    a->cache_age = (int)read_int(r, cache, in, "age", 1, recent ? -1 : 0);
    a->cache_fact_age = (int)read_int(r, cache, in, "fact_age", 1, 0);
}

static void read_attention(struct reader *r, struct converted *c, const struct json *attention) {
    static const char *const keys[] = {
        "kind",    "map",    "features",     "key_map_per",  "window",         "sinks", "cache",
        "horizon", "mixing", "map_position", "max_distance", "softmax_layers", NULL};
    static const char *const kinds[] = {"softmax", "hedgehog", NULL};
    static const char *const maps[] = {"exp", "softmax2", "joint_softmax", NULL};
    static const char *const per[] = {"kv_head", "query_head", NULL};
    static const char *const rules[] = {"none", "sliding", "terraced", NULL};
    static const char *const mixings[] = {"unified", "lolcats", NULL};
    static const char *const positions[] = {"rope", "none", NULL};
    struct attention_config *a = &c->attention;
    const char *in = "attention.";
    if (json_type(attention) != JSON_OBJECT) {
        fault(r, "", "attention", "is not an object");
        return;
    }
    refuse_unknown(r, attention, in, keys);
    a->kind = (enum attention_kind)read_choice(r, attention, in, "kind", false, kinds);
    if (a->kind == ATTENTION_SOFTMAX) {
        if (json_size(attention) > 1) fault(r, in, "kind", "softmax takes no other settings");
        return;
    }
    a->map = (enum feature_map)read_choice(r, attention, in, "map", false, maps);
    a->features = (int)read_int(r, attention, in, "features", 1, -1);
    a->key_map_per_query_head = read_choice(r, attention, in, "key_map_per", false, per);
    a->mixing = (enum mixing)read_choice(r, attention, in, "mixing", false, mixings);
    a->map_before_rope = read_choice(r, attention, in, "map_position", true, positions);
    a->sinks = (int)read_int(r, attention, in, "sinks", 0, 0);
    a->horizon = read_int(r, attention, in, "horizon", 1, 0);
    a->max_distance = read_int(r, attention, in, "max_distance", 1, 0);
    c->has_max_distance = a->max_distance > 0;
    read_softmax_layers(r, c, json_get(attention, "softmax_layers"));

    const struct json *window = json_get(attention, "window");
    if (json_type(window) != JSON_OBJECT) fault(r, in, "window", "is not an object");
    refuse_unknown(r, window, "attention.window.", (const char *const[]){"rule", "size", NULL});
    a->window = (enum window_rule)read_choice(r, window, "attention.window.", "rule", false, rules);
    a->window_size = (int)read_int(r, window, "attention.window.", "size", a->window != WINDOW_NONE,
                                   a->window == WINDOW_NONE ? 0 : -1);
    if (a->window == WINDOW_NONE) a->window_size = 0;

    read_cache(r, c, json_get(attention, "cache"));
}

static void read_low_rank(struct reader *r, struct converted *c, const struct json *low) {
    if (json_type(low) == JSON_NULL) return;
    if (json_type(low) != JSON_OBJECT) fault(r, "", "low_rank", "is neither null nor an object");
    refuse_unknown(r, low, "low_rank.", (const char *const[]){"rank", "scale", "targets", NULL});
    c->rank = (int)read_int(r, low, "low_rank.", "rank", 1, -1);
    double scale = json_number(json_get(low, "scale"), NAN);
    if (!(fabs(scale) < 1e6)) fault(r, "low_rank.", "scale", "is not a number of a usable size");
    c->scale = (float)scale;
    const struct json *targets = json_get(low, "targets");
    if (json_type(targets) != JSON_ARRAY) fault(r, "low_rank.", "targets", "is not a list");
    for (const struct json *t = json_child(targets); t; t = json_next(t)) {
        int i = 0;
        while (i < N_LOW_RANK_TARGETS &&
               (!json_string(t) || strcmp(json_string(t), target_names[i])))
            i++;
        if (i == N_LOW_RANK_TARGETS)
            fault(r, "low_rank.", "targets",
                  "holds something else than q_proj, k_proj, v_proj, o_proj");
        else
            c->targets[i] = true;
    }
}

static void read_base(struct reader *r, struct converted *c, const struct json *base) {
    if (json_type(base) == JSON_NULL) return;
    if (json_type(base) != JSON_OBJECT) fault(r, "", "base", "is neither null nor an object");
    const char *file = json_string(json_get(base, "file")),
               *sha256 = json_string(json_get(base, "sha256"));
    c->is_adapter = true;
    if (!file || !*file || strchr(file, '/') || *file == '.')
        fault(r, "base.", "file", "is not the name of a file");
    if (!sha256 || strlen(sha256) != 64 || strspn(sha256, "0123456789abcdef") != 64)
        fault(r, "base.", "sha256", "is not 64 hexadecimal digits in lower case");
    if (!json_int(json_get(base, "bytes"), &c->base_bytes) || c->base_bytes < 1)
        fault(r, "base.", "bytes", "is not a positive whole number");
    if (r->e) return;
    memcpy(c->base_sha256, sha256, SHA256_HEX);
    if (!(c->base_file = strdup(file)))
        r->e = err_set(r->msg, r->msg_len, ERR_NOMEM, "%s: out of memory", r->path);
}

static enum err read_document(struct converted *c, const struct json *root, const char *path,
                              char *msg, size_t msg_len) {
    static const char *const keys[] = {"format",   "name",     "base",    "attention",
                                       "low_rank", "training", "quality", NULL};
    struct reader r = {.path = path, .msg = msg, .msg_len = msg_len};
    if (json_type(root) != JSON_OBJECT)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: not a JSON object", path);
    int64_t format;
    if (!json_int(json_get(root, "format"), &format) || format != 1)
        fault(&r, "", "format", "is not 1, the only one known here");
    refuse_unknown(&r, root, "", keys);
    const char *name = json_string(json_get(root, "name"));
    if (!name || !*name) fault(&r, "", "name", "is missing");
    if (!json_get(root, "base")) fault(&r, "", "base", "is missing (null for a whole model)");
    read_base(&r, c, json_get(root, "base"));
    read_attention(&r, c, json_get(root, "attention"));
    read_low_rank(&r, c, json_get(root, "low_rank"));
    int64_t measured;
    if (json_int(json_get(json_get(root, "quality"), "measured_to_tokens"), &measured) &&
        measured > 0)
        c->measured_to = measured;
    if (!r.e && !(c->name = strdup(name)))
        r.e = err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", path);
    return r.e;
}

enum err converted_open_text(struct converted **out, const char *json, size_t len, const char *name,
                             char *msg, size_t msg_len) {
    struct json *root = NULL;
    struct converted *c = calloc(1, sizeof *c);
    if (!c) return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", name);
    enum err e = json_parse(&root, json, len, name, msg, msg_len);
    if (!e) e = read_document(c, root, name, msg, msg_len);
    json_free(root);
    if (e)
        converted_close(c);
    else
        *out = c;
    return e;
}

/* ---- the folder ---- */
bool converted_is(const char *folder) {
    struct stat st;
    char *path = path_join(folder, "urchin.json");
    bool is = path && stat(path, &st) == 0;
    free(path);
    return is;
}

enum err converted_open(struct converted **out, const char *folder, char *msg, size_t msg_len) {
    struct json *root = NULL;
    struct converted *c = calloc(1, sizeof *c);
    char *path = path_join(folder, "urchin.json");
    enum err e = OK;
    if (!c || !path || !(c->tensors_path = path_join(folder, "hedgehog.safetensors")))
        e = err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", folder);
    if (!e) e = json_load(&root, path, msg, msg_len);
    if (!e) e = read_document(c, root, path, msg, msg_len);
    if (!e && (c->attention.kind != ATTENTION_SOFTMAX || c->rank))
        e = safetensors_open(&c->tensors, c->tensors_path, msg, msg_len);
    json_free(root);
    free(path);
    if (e)
        converted_close(c);
    else
        *out = c;
    return e;
}

void converted_drop_files(struct converted *c) {
    for (int i = 0; c->layers && i < c->n_layers; i++) {
        for (int t = 0; t < N_LOW_RANK_TARGETS; t++) {
            free(c->layers[i].low_rank[t].a);
            free(c->layers[i].low_rank[t].b);
            c->layers[i].low_rank[t] = (struct low_rank){0};
        }
    }
    safetensors_close(c->tensors);
    c->tensors = NULL;
}

void converted_close(struct converted *c) {
    if (!c) return;
    converted_drop_files(c);
    for (int i = 0; c->layers && i < c->n_layers; i++) {
        free(c->layers[i].map_q);
        free(c->layers[i].map_k);
        free(c->layers[i].mix);
    }
    free(c->layers);
    free(c->softmax_layers);
    free(c->softmax_list);
    free(c->retrieval_list);
    free(c->retrieval);
    free(c->tensors_path);
    free(c->base_file);
    free(c->name);
    free(c);
}

/* ---- hedgehog.safetensors ---- */
/* layers.<layer>.attn.<part> with exactly these dimensions (a 0 ends them), as fp32. */
static enum err read_tensor(struct converted *c, float **out, int layer, const char *part,
                            const int *dims, int *n_read, char *msg, size_t msg_len) {
    char name[128];
    snprintf(name, sizeof name, "layers.%d.attn.%s", layer, part);
    const struct st_tensor *t = safetensors_get(c->tensors, name);
    if (!t)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s is missing", c->tensors_path, name);
    int n_dims = 0;
    bool right = true;
    for (; dims[n_dims]; n_dims++)
        right &= n_dims < t->n_dims && t->dims[n_dims] == dims[n_dims];
    if (!right || n_dims != t->n_dims) {
        char want[64] = "";
        for (int i = 0; i < n_dims; i++)
            snprintf(want + strlen(want), sizeof want - strlen(want), "%s%d", i ? ", " : "",
                     dims[i]);
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: tensor %s is not of the shape [%s] that base and urchin.json say",
                       c->tensors_path, name, want);
    }
    float *values = malloc((size_t)t->n_values * sizeof *values);
    if (!values) return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", c->tensors_path);
    *out = values; /* converted_close frees it */
    if (st_decode(values, t, 0, t->n_values))
        return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s is not F32, F16, BF16 or F64",
                       c->tensors_path, name);
    for (int64_t i = 0; i < t->n_values; i++)
        if (!isfinite(values[i]))
            return err_set(msg, msg_len, ERR_FORMAT,
                           "%s: tensor %s holds a value that is not finite", c->tensors_path, name);
    ++*n_read;
    return OK;
}

static bool is_softmax(const struct converted *c, int layer) {
    return c->softmax_layers && c->softmax_layers[layer];
}

static enum err read_layer(struct converted *c, int i, const struct base_config *base, int *n_read,
                           char *msg, size_t msg_len) {
    const struct attention_config *a = &c->attention;
    struct converted_layer *l = &c->layers[i];
    enum err e = OK;
    int state_heads = a->key_map_per_query_head ? a->n_heads : a->n_kv_heads;
    if (a->kind == ATTENTION_HEDGEHOG && !is_softmax(c, i)) {
        const char *mix = a->mixing == MIXING_UNIFIED ? "log_mix" : "window_factor";
        e = read_tensor(c, &l->map_q, i, "feature_map_q",
                        (int[]){a->n_heads, a->head_dim, a->features, 0}, n_read, msg, msg_len);
        if (!e)
            e = read_tensor(c, &l->map_k, i, "feature_map_k",
                            (int[]){state_heads, a->head_dim, a->features, 0}, n_read, msg,
                            msg_len);
        if (!e) e = read_tensor(c, &l->mix, i, mix, (int[]){a->n_heads, 0}, n_read, msg, msg_len);
    }
    if (l->mix)
        c->n_map_params +=
            (int64_t)(a->n_heads + state_heads) * a->head_dim * a->features + a->n_heads;
    int q = a->n_heads * a->head_dim, kv = a->n_kv_heads * a->head_dim;
    const int n_out[] = {q, kv, kv, base->hidden_dim},
              n_in[] = {base->hidden_dim, base->hidden_dim, base->hidden_dim, q};
    for (int t = 0; !e && t < N_LOW_RANK_TARGETS; t++) {
        if (!c->targets[t]) continue;
        char part[32];
        snprintf(part, sizeof part, "%s.lora_A", target_names[t]);
        e = read_tensor(c, &l->low_rank[t].a, i, part, (int[]){c->rank, n_in[t], 0}, n_read, msg,
                        msg_len);
        snprintf(part, sizeof part, "%s.lora_B", target_names[t]);
        if (!e)
            e = read_tensor(c, &l->low_rank[t].b, i, part, (int[]){n_out[t], c->rank, 0}, n_read,
                            msg, msg_len);
    }
    return e;
}

/* All tensors asked for were read: if there are more, one of them is unknown. */
static enum err refuse_others(const struct converted *c, char *msg, size_t msg_len) {
    static const char *const maps[] = {"feature_map_q", "feature_map_k"};
    for (int i = 0; i < safetensors_count(c->tensors); i++) {
        const char *name = safetensors_at(c->tensors, i)->name, *part = NULL;
        int layer, at = 0;
        bool known = false;
        if (sscanf(name, "layers.%d.attn.%n", &layer, &at) == 1 && at && layer >= 0 &&
            layer < c->n_layers)
            part = name + at;
        if (part && c->attention.kind == ATTENTION_HEDGEHOG && !is_softmax(c, layer))
            known =
                !strcmp(part, maps[0]) || !strcmp(part, maps[1]) ||
                !strcmp(part, c->attention.mixing == MIXING_UNIFIED ? "log_mix" : "window_factor");
        for (int t = 0; part && t < N_LOW_RANK_TARGETS; t++) {
            size_t n = strlen(target_names[t]);
            if (c->targets[t] && !strncmp(part, target_names[t], n))
                known |= !strcmp(part + n, ".lora_A") || !strcmp(part + n, ".lora_B");
        }
        if (!known)
            return err_set(msg, msg_len, ERR_FORMAT,
                           "%s: tensor %s is not what urchin.json asks for", c->tensors_path, name);
    }
    return OK;
}

static enum err take_retrieval_heads(struct converted *c, char *msg, size_t msg_len) {
    int n_kv = c->attention.n_kv_heads;
    if (!c->n_retrieval) return OK;
    c->retrieval = calloc((size_t)c->n_layers * (size_t)n_kv, sizeof *c->retrieval);
    if (!c->retrieval) return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", c->name);
    for (int i = 0; i < c->n_retrieval; i++) {
        int layer = c->retrieval_list[i][0], head = c->retrieval_list[i][1];
        if (layer >= c->n_layers || head >= n_kv)
            return err_set(msg, msg_len, ERR_FORMAT,
                           "%s: attention.cache.retrieval.heads names kv head %d of layer %d, but "
                           "the base has %d layers of %d kv heads",
                           c->name, head, layer, c->n_layers, n_kv);
        if (c->softmax_layers && c->softmax_layers[layer])
            return err_set(msg, msg_len, ERR_FORMAT,
                           "%s: attention.cache.retrieval.heads names a head of layer %d, which "
                           "attention.softmax_layers has keep softmax",
                           c->name, layer);
        c->retrieval[(size_t)layer * (size_t)n_kv + (size_t)head] = true;
    }
    return OK;
}

static enum err take_softmax_layers(struct converted *c, char *msg, size_t msg_len) {
    int n = c->n_softmax_layers;
    if (!n) return OK;
    if (c->softmax_list[n - 1] >= c->n_layers)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: attention.softmax_layers names layer %d, but the base has %d layers",
                       c->name, c->softmax_list[n - 1], c->n_layers);
    c->softmax_layers = calloc((size_t)c->n_layers, sizeof *c->softmax_layers);
    if (!c->softmax_layers) return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", c->name);
    for (int i = 0; i < n; i++)
        c->softmax_layers[c->softmax_list[i]] = true;
    if (n < c->n_layers) return OK;
    c->attention = (struct attention_config){.kind = ATTENTION_SOFTMAX,
                                             .n_heads = c->attention.n_heads,
                                             .n_kv_heads = c->attention.n_kv_heads,
                                             .head_dim = c->attention.head_dim};
    c->n_softmax_layers = 0;
    return OK;
}

enum err converted_lay_over(struct converted *c, const struct base_config *base, char *msg,
                            size_t msg_len) {
    struct attention_config *a = &c->attention;
    int n_read = 0;
    enum err e = OK;
    a->n_heads = base->n_heads;
    a->n_kv_heads = base->n_kv_heads;
    a->head_dim = base->head_dim;
    bool rope = base->architecture == BASE_LLAMA;
    if (c->has_max_distance && !a->map_before_rope)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: attention.max_distance goes with map_position none only", c->name);
    if (!rope)
        a->max_distance = 0; /* no angles: nothing is clamped */
    else if (a->map_before_rope && !a->max_distance)
        a->max_distance = base->context;
    c->n_layers = base->n_layers;
    c->layers = calloc((size_t)base->n_layers, sizeof *c->layers);
    if (!c->layers) return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", c->name);
    if ((e = take_softmax_layers(c, msg, msg_len))) return e;
    if ((e = take_retrieval_heads(c, msg, msg_len))) return e;
    if (!c->tensors) return OK;
    for (int i = 0; !e && i < c->n_layers; i++)
        e = read_layer(c, i, base, &n_read, msg, msg_len);
    if (!e && n_read != safetensors_count(c->tensors)) e = refuse_others(c, msg, msg_len);
    return e;
}

/* ---- the base of an adapter ---- */
enum err converted_find_base(const struct converted *c, const char *folder, char **out, char *msg,
                             size_t msg_len) {
    const char *cache = getenv("URCHIN_CACHE"), *xdg = getenv("XDG_CACHE_HOME"),
               *home = getenv("HOME");
    char *folders[4] = {strdup(folder), cache && *cache ? strdup(cache) : NULL,
                        xdg && *xdg ? path_join(xdg, "urchin") : NULL,
                        home && *home ? path_join(home, ".cache/urchin") : NULL};
    char wrong[PATH_MAX + 200] = "";
    char *found = NULL;
    for (int i = 0; i < 4 && !found; i++) {
        struct stat st;
        struct mapped file;
        char digest[SHA256_HEX];
        char *path = folders[i] ? path_join(folders[i], c->base_file) : NULL;
        if (path && stat(path, &st) == 0) {
            snprintf(wrong, sizeof wrong, " (%s has another size)", path);
            if (st.st_size == c->base_bytes && !mapped_open(&file, path, NULL, 0)) {
                sha256_hex(file.bytes, file.len, digest);
                mapped_close(&file);
                if (!strcmp(digest, c->base_sha256)) {
                    found = path;
                    continue;
                }
                snprintf(wrong, sizeof wrong, " (%s has another digest, %s)", path, digest);
            }
        }
        free(path);
    }
    for (int i = 0; i < 4; i++)
        free(folders[i]);
    if (!found)
        return err_set(msg, msg_len, ERR_IO,
                       "%s is an adapter over %s (%lld bytes, sha256 %s), which is not in its "
                       "folder or the cache%s: fetch it with `make model`, "
                       "or name another base with --base",
                       c->name, c->base_file, (long long)c->base_bytes, c->base_sha256, wrong);
    *out = found;
    return OK;
}
