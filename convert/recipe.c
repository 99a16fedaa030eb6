/* recipe.c - from settings to a recipe, and a recipe as JSON. */
#include "convert/recipe.h"

#include "compute/gemm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const map_names[] = {"exp", "softmax2", "joint_softmax", NULL};
static const char *const window_names[] = {"none", "sliding", "terraced", NULL};
static const char *const mixing_names[] = {"unified", "lolcats", NULL};

enum { RECENT = 32 }; /* places of a cache that also keeps facts */
enum { RETRIEVAL_RECENT = 8 }; /* one of so many of a retrieval head's */
enum { FINETUNE_RETRIEVAL = 256 };
enum { MOST_DISTANCE = 4096 }; /* by default; farther was not worth anything */

/* The index of value among names; NULL: otherwise. */
static int choice(const char *value, const char *const *names, int otherwise) {
    for (int i = 0; value && names[i]; i++)
        if (!strcmp(value, names[i])) return i;
    return otherwise;
}

static void start_from(struct recipe *r, const char *name, const struct base_config *base) {
    struct attention_config *a = &r->attention;
    *a = (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                   .n_heads = base->n_heads,
                                   .n_kv_heads = base->n_kv_heads,
                                   .head_dim = base->head_dim,
                                   .features = base->head_dim,
                                   .map = MAP_EXP,
                                   .window = WINDOW_TERRACED,
                                   .window_size = 64,
                                   .mixing = MIXING_UNIFIED};
    r->name = name;
    r->ce = 1;
    r->init_scale = 1; /* SmolLM2, 40 steps: KL 0.128; from 0.5 0.143, 0.25 0.176, 1.5 0.128 */
    if (!strcmp(name, "urchin")) {
        a->sinks = 1;
        a->cache_size = 128;
        a->cache_age = 512;
        a->cache_fact_age = 32768;
        a->horizon = 1024;
        a->map_before_rope = true;
        r->lr = 0.02;
        r->lr_mix = 0.05;
        r->update_rows = 16;
        r->calibrate = true;
        r->one_cycle = true;
        r->finetune = (struct finetune_recipe){.method = FINETUNE_LOW_RANK,
                                               .steps = 220,
                                               .accumulate = 2,
                                               .rank = 16,
                                               .scale = 2,
                                               .lr = 4e-4,
                                               .lr_maps = 1e-4};
        return;
    }
    /* LoLCATs (arXiv:2410.10254): rank 8, alpha 16, maps stay.  Hedgehog (arXiv:2402.04347): all
     * parameters, as its GPT-2. */
    r->finetune = (struct finetune_recipe){.method = FINETUNE_LOW_RANK,
                                           .next_token = true,
                                           .steps = 220,
                                           .accumulate = 8,
                                           .rank = 8,
                                           .scale = 2,
                                           .lr = 1e-4};
    if (!strcmp(name, "paper")) {
        r->finetune.method = FINETUNE_FULL;
        r->finetune.lr = r->finetune.lr_maps = 6e-4;
    }
    r->lr = r->lr_mix = 0.01;
    a->key_map_per_query_head = true;
    if (!strcmp(name, "lolcats")) {
        a->map = MAP_SOFTMAX2;
        a->features = a->head_dim / 2;
        a->mixing = MIXING_LOLCATS;
        r->ce = 0;
        r->mse = 1000;
        r->init_mix = -2.1972246f; /* sigmoid of it is 0.1 */
    } else {
        a->window = WINDOW_NONE;
        a->window_size = 0;
    }
}

static enum err read_heads(struct recipe *r, const char *list, const struct base_config *base,
                           char *msg, size_t msg_len) {
    bool named = strchr(list, '.');
    char *end = NULL;
    long n = named ? 0 : strtol(list, &end, 10), last = -1;
    bool good = named || (end != list && !*end && n >= 0);
    for (const char *p = list; named && good; p = end + 1) {
        int layer, head, used = 0;
        good = sscanf(p, "%d.%d%n", &layer, &head, &used) == 2 && layer >= 0 && head >= 0 &&
               layer < base->n_layers && head < base->n_kv_heads && n < MOST_RETRIEVAL &&
               (long)layer * base->n_kv_heads + head > last && (p[used] == ',' || !p[used]);
        if (!good) break;
        last = (long)layer * base->n_kv_heads + head;
        r->retrieval_heads[n][0] = layer;
        r->retrieval_heads[n++][1] = head;
        end = (char *)p + used;
        if (!*end) break;
    }
    if (!good)
        return err_set(msg, msg_len, ERR_ARG,
                       "--retrieval-heads %.60s: neither a number of heads nor ascending kv heads "
                       "like 17.1,18.2 of layers 0 to %d with %d each (at most %d)",
                       list, base->n_layers - 1, base->n_kv_heads, MOST_RETRIEVAL);
    r->n_retrieval = (int)(n < MOST_RETRIEVAL ? n : MOST_RETRIEVAL);
    r->n_retrieval_heads = named ? r->n_retrieval : 0;
    return OK;
}

/* Facts are the business of a few heads, which have room for them; the other heads' caches are then
 * for what is recent. */
static enum err set_retrieval(struct recipe *r, const struct settings *s,
                              const struct base_config *base, char *msg, size_t msg_len) {
    enum { SIZE = 3072, CONTEXT = 2048, ONE_IN = 12, AGE = 512 };
    struct attention_config *a = &r->attention;
    int n_heads = base->n_layers * base->n_kv_heads;
    enum err e = OK;
    a->retrieval_size = s->retrieval_size >= 0 ? s->retrieval_size : SIZE;
    if (s->retrieval_heads)
        e = read_heads(r, s->retrieval_heads, base, msg, msg_len);
    else if (!strcmp(r->name, "urchin") && a->cache_size && base->context >= CONTEXT)
        r->n_retrieval = (n_heads + ONE_IN - 1) / ONE_IN;
    if (e) return e;
    if (r->n_retrieval > n_heads) r->n_retrieval = n_heads;
    if (r->n_retrieval > MOST_RETRIEVAL) r->n_retrieval = MOST_RETRIEVAL;
    if (!a->retrieval_size) r->n_retrieval = r->n_retrieval_heads = 0;
    if (!r->n_retrieval) a->retrieval_size = 0;
    a->retrieval_recent = a->retrieval_size / RETRIEVAL_RECENT;
    int usual = strcmp(r->name, "urchin") ? 0 : RECENT;
    a->cache_recent = s->cache_recent >= 0 ? s->cache_recent
                      : r->n_retrieval         ? a->cache_size * 3 / 4
                      : a->cache_size < usual ? a->cache_size
                                              : usual;
    if ((a->cache_recent || a->retrieval_recent) && !a->cache_age) a->cache_age = AGE;
    return OK;
}

void recipe_without_retrieval(struct recipe *r, const struct settings *s) {
    struct attention_config *a = &r->attention;
    if (s->cache_recent < 0) a->cache_recent = a->cache_size < RECENT ? a->cache_size : RECENT;
}

struct attention_config recipe_finetune_attention(const struct recipe *r) {
    struct attention_config a = r->attention;
    if (r->finetune.retrieval_size >= a.retrieval_size) return a;
    a.retrieval_size = r->finetune.retrieval_size;
    a.retrieval_recent = a.retrieval_size / RETRIEVAL_RECENT;
    return a;
}

void recipe_mark_retrieval(const struct recipe *r, bool *flags) {
    for (int i = 0; i < r->n_retrieval_heads; i++)
        flags[r->retrieval_heads[i][0] * r->attention.n_kv_heads + r->retrieval_heads[i][1]] = true;
}

void recipe_take_retrieval(struct recipe *r, const bool *flags, int n_layers) {
    int n_kv = r->attention.n_kv_heads;
    r->n_retrieval_heads = 0;
    for (int i = 0; i < n_layers * n_kv && r->n_retrieval_heads < MOST_RETRIEVAL; i++) {
        if (!flags[i]) continue;
        r->retrieval_heads[r->n_retrieval_heads][0] = i / n_kv;
        r->retrieval_heads[r->n_retrieval_heads++][1] = i % n_kv;
    }
}

static enum err set_attention(struct recipe *r, const struct settings *s,
                              const struct base_config *base, char *msg, size_t msg_len) {
    static const char *const per[] = {"kv_head", "query_head", NULL}, *const positions[] = {
                                                                          "rope", "none", NULL};
    struct attention_config *a = &r->attention;
    a->map = (enum feature_map)choice(s->map, map_names, a->map);
    a->key_map_per_query_head = choice(s->key_map, per, a->key_map_per_query_head);
    a->map_before_rope = choice(s->map_position, positions, a->map_before_rope);
    a->mixing = (enum mixing)choice(s->mixing, mixing_names, a->mixing);
    a->window = (enum window_rule)choice(s->window, window_names, a->window);
    if (a->window == WINDOW_NONE) a->window_size = a->sinks = 0;
    if (a->window != WINDOW_NONE && !a->window_size) a->window_size = 64;
    if (a->window != WINDOW_TERRACED) a->cache_size = a->cache_age = a->cache_fact_age = 0;
    if (s->features) a->features = s->features;
    if (s->window_size >= 0) a->window_size = s->window_size;
    if (s->sinks >= 0) a->sinks = s->sinks;
    if (s->cache_size >= 0) a->cache_size = s->cache_size;
    enum err e = set_retrieval(r, s, base, msg, msg_len);
    if (e) return e;
    if (s->cache_age >= 0) a->cache_age = s->cache_age;
    if (!a->cache_recent && !a->retrieval_recent) a->cache_age = 0;
    if (s->cache_fact_age >= 0) a->cache_fact_age = s->cache_fact_age;
    if (s->horizon >= 0) a->horizon = s->horizon;
    if (a->map_before_rope && r->rope)
        a->max_distance = s->max_distance >= 0            ? s->max_distance
                          : base->context < MOST_DISTANCE ? base->context
                                                          : MOST_DISTANCE;
    return OK;
}

static int ascending(const void *a, const void *b) {
    return *(const int *)a - *(const int *)b;
}

static enum err set_softmax_layers(struct recipe *r, const char *list,
                                   const struct base_config *base, char *msg, size_t msg_len) {
    enum { MOST = sizeof r->softmax_layers / sizeof *r->softmax_layers };
    int64_t layers[MOST]; /* a list has no more */
    int n = list ? settings_list(list, layers, MOST) : 0;
    for (int i = 0; i < n; i++) {
        if (layers[i] >= base->n_layers)
            return err_set(msg, msg_len, ERR_ARG,
                           "--softmax-layers %lld: the base has layers 0 to %d",
                           (long long)layers[i], base->n_layers - 1);
        if (!recipe_keeps_softmax(r, (int)layers[i])) /* once each */
            r->softmax_layers[r->n_softmax_layers++] = (int)layers[i];
    }
    for (int i = 0; i < r->n_retrieval_heads; i++)
        if (recipe_keeps_softmax(r, r->retrieval_heads[i][0]))
            return err_set(msg, msg_len, ERR_ARG,
                           "--retrieval-heads names a head of layer %d, which --softmax-layers "
                           "leaves as it is",
                           r->retrieval_heads[i][0]);
    qsort(r->softmax_layers, (size_t)r->n_softmax_layers, sizeof *r->softmax_layers, ascending);
    if (r->n_softmax_layers < base->n_layers) return OK;
    return err_set(msg, msg_len, ERR_ARG,
                   "--softmax-layers names all layers, so there is nothing to convert");
}

bool recipe_keeps_softmax(const struct recipe *r, int layer) {
    for (int i = 0; i < r->n_softmax_layers; i++)
        if (r->softmax_layers[i] == layer) return true;
    return false;
}

int recipe_least_tokens(const struct attention_config *a) {
    if (a->window == WINDOW_NONE) return 2;
    if (a->window == WINDOW_SLIDING) return a->window_size + a->sinks + 1;
    return (2 + a->sinks / a->window_size) * a->window_size + 1;
}

static void set_finetune(struct recipe *r, const struct settings *s) {
    static const char *const methods[] = {"none", "low-rank", "full", NULL}, *const losses[] = {
                                                                                 "distill",
                                                                                 "next-token",
                                                                                 NULL};
    struct finetune_recipe *f = &r->finetune;
    enum finetune_method was = f->method;
    f->method = (enum finetune_method)choice(s->finetune, methods, (int)f->method);
    f->next_token = choice(s->finetune_loss, losses, f->next_token);
    if (f->method != was) /* the rate that goes with the method, not with the recipe */
        f->lr = f->method == FINETUNE_FULL ? 1e-4 : 4e-4;
    f->bf16 = strcmp(s->finetune_products, "fp32") && gemm_has_bf16();
    if (s->finetune_steps >= 0) f->steps = s->finetune_steps;
    if (s->finetune_accumulate) f->accumulate = s->finetune_accumulate;
    if (s->rank) f->rank = s->rank;
    f->retrieval_size =
        s->finetune_retrieval_size ? s->finetune_retrieval_size : FINETUNE_RETRIEVAL;
    if (f->retrieval_size > r->attention.retrieval_size)
        f->retrieval_size = r->attention.retrieval_size;
    if (s->finetune_lr >= 0) f->lr = s->finetune_lr;
    if (s->finetune_lr_maps >= 0) f->lr_maps = s->finetune_lr_maps;
}

static enum err set_lengths(struct recipe *r, const struct settings *s,
                            const struct base_config *base, char *msg, size_t msg_len) {
    int context = base->context < 1 << 24 ? (int)base->context : 1 << 24;
    r->length = s->length ? s->length : context < 1024 ? context : 1024;
    r->long_length = s->long_length ? s->long_length : context < 4096 ? context : 4096;
    r->long_every = s->long_every;
    r->rows = s->rows;
    r->long_rows = s->long_rows;
    if (r->long_length <= r->length && !s->long_length) r->long_every = 0;
    int longest = r->long_every && r->long_length > r->length ? r->long_length : r->length;
    if (longest > context)
        return err_set(msg, msg_len, ERR_ARG,
                       "%s %d: the base was trained to read %d tokens, and a teacher teaches no "
                       "more than it can",
                       longest == r->length ? "--length" : "--long-length", longest, context);
    const struct attention_config *a = &r->attention;
    int least = recipe_least_tokens(a);
    int shortest = r->long_every && r->long_length < r->length ? r->long_length : r->length;
    if (shortest < least)
        return err_set(msg, msg_len, ERR_ARG,
                       "--length %d: with a window of %d all keys of so few tokens are exact, and "
                       "there is nothing to learn; take at least %d, or a smaller --window-size",
                       shortest, a->window_size, least);
    return OK;
}

enum err recipe_from_settings(struct recipe *out, const struct settings *s,
                              const struct base_config *base, char *msg, size_t msg_len) {
    struct recipe r = {.rope = base->architecture == BASE_LLAMA};
    start_from(&r, s->recipe, base);
    enum err wrong = set_attention(&r, s, base, msg, msg_len);
    if (!wrong) wrong = set_softmax_layers(&r, s->softmax_layers, base, msg, msg_len);
    if (wrong) return wrong;
    r.recall = s->recall;
    if (s->max_distance >= 0 && !r.attention.max_distance)
        return err_set(msg, msg_len, ERR_ARG,
                       "--max-distance goes with --map-position none and a base with RoPE only");
    if (!strcmp(s->finetune_products, "bf16") && !gemm_has_bf16())
        return err_set(
            msg, msg_len, ERR_ARG,
            "--finetune-products bf16: this CPU has no products of bf16 pairs (AVX512_BF16)");
    char reason[300] = "";
    if (attention_config_check(&r.attention, reason, sizeof reason))
        return err_set(msg, msg_len, ERR_ARG, "these settings do not go together: %s", reason);
    if (s->loss) {
        r.ce = strcmp(s->loss, "mse") ? 1 : 0;
        r.mse = strcmp(s->loss, "cross-entropy") ? (float)s->mse_factor : 0;
    } else if (r.mse > 0) {
        r.mse = (float)s->mse_factor;
    }
    if (r.ce + r.mse <= 0)
        return err_set(msg, msg_len, ERR_ARG, "--mse-factor 0 leaves no loss to learn from");
    if (s->schedule) r.one_cycle = !strcmp(s->schedule, "one-cycle");
    if (s->init_scale > 0) r.init_scale = s->init_scale;
    r.warmup = s->warmup;
    r.steps = s->steps;
    r.accumulate = s->accumulate;
    if (s->update_rows >= 0)
        r.update_rows = s->update_rows;
    else if (r.accumulate > 1)
        r.update_rows = 0;
    if (r.update_rows && r.accumulate > 1)
        return err_set(msg, msg_len, ERR_ARG,
                       "--update-rows %d changes the maps several times in a sequence, --accumulate "
                       "%d once in several: one of them",
                       r.update_rows, r.accumulate);
    if (r.update_rows &&
        r.update_rows <
            s->rows) { /* SmolLM2, 200 sequences: KL 0.098 with half, 0.100 with a third */
        r.lr /= 2;
        r.lr_mix /= 2;
    }
    if (s->lr > 0) r.lr = s->lr;
    if (s->lr_mix > 0) r.lr_mix = s->lr_mix;
    r.seed = s->seed < 0 ? 0 : s->seed;
    r.join_documents = s->join_documents;
    set_finetune(&r, s);
    enum err e = set_lengths(&r, s, base, msg, msg_len);
    if (!e) *out = r;
    return e;
}

double recipe_rate_of(const struct recipe *r, int steps, double step) {
    const double from = 1.0 / 25, to = from / 1e4;
    double warm = r->warmup * steps;
    if (step < warm) return from + (1 - from) * (1 - cos(M_PI * step / warm)) / 2;
    if (!r->one_cycle || steps <= warm) return 1;
    return to + (1 - to) * (1 + cos(M_PI * (step - warm) / (steps - warm))) / 2;
}
double recipe_rate(const struct recipe *r, double step) {
    return recipe_rate_of(r, r->steps, step);
}

/* ---- JSON ---- */
static void add_number(cJSON *o, const char *key, double x) {
    cJSON_AddNumberToObject(o, key, x);
}
static void add_text(cJSON *o, const char *key, const char *text) {
    cJSON_AddStringToObject(o, key, text);
}

/* Before they are found `heads` says how many there are to be. */
static cJSON *retrieval_json(const struct recipe *r) {
    const struct attention_config *a = &r->attention;
    cJSON *o = cJSON_CreateObject();
    add_number(o, "size", a->retrieval_size);
    add_number(o, "recent", a->retrieval_recent);
    if (!r->n_retrieval_heads) {
        add_number(o, "heads", r->n_retrieval);
        return o;
    }
    cJSON *heads = cJSON_AddArrayToObject(o, "heads");
    for (int i = 0; i < r->n_retrieval_heads; i++)
        cJSON_AddItemToArray(heads, cJSON_CreateIntArray(r->retrieval_heads[i], 2));
    return o;
}

cJSON *recipe_attention_json(const struct recipe *r) {
    const struct attention_config *a = &r->attention;
    cJSON *o = cJSON_CreateObject();
    add_text(o, "kind", "hedgehog");
    add_text(o, "map", map_names[a->map]);
    add_number(o, "features", a->features);
    add_text(o, "key_map_per", a->key_map_per_query_head ? "query_head" : "kv_head");
    add_text(o, "map_position", a->map_before_rope ? "none" : "rope");
    if (a->max_distance) add_number(o, "max_distance", (double)a->max_distance);
    cJSON *window = cJSON_AddObjectToObject(o, "window");
    add_text(window, "rule", window_names[a->window]);
    if (a->window != WINDOW_NONE) add_number(window, "size", a->window_size);
    add_number(o, "sinks", a->sinks);
    if (a->cache_size || a->retrieval_size) {
        cJSON *cache = cJSON_AddObjectToObject(o, "cache");
        add_number(cache, "size", a->cache_size);
        add_text(cache, "score", "self_recall");
        add_number(cache, "recent", a->cache_recent);
        if (a->cache_age) add_number(cache, "age", a->cache_age);
        if (a->cache_fact_age) add_number(cache, "fact_age", a->cache_fact_age);
        if (a->retrieval_size) cJSON_AddItemToObject(cache, "retrieval", retrieval_json(r));
    } else {
        cJSON_AddNullToObject(o, "cache");
    }
    if (a->horizon)
        add_number(o, "horizon", (double)a->horizon);
    else
        cJSON_AddNullToObject(o, "horizon");
    add_text(o, "mixing", mixing_names[a->mixing]);
    if (r->n_softmax_layers)
        cJSON_AddItemToObject(o, "softmax_layers",
                              cJSON_CreateIntArray(r->softmax_layers, r->n_softmax_layers));
    return o;
}

cJSON *recipe_training_json(const struct recipe *r) {
    cJSON *o = cJSON_CreateObject();
    add_text(o, "recipe", r->name);
    add_text(o, "loss", r->mse > 0 ? r->ce > 0 ? "both" : "mse" : "cross_entropy");
    if (r->mse > 0) add_number(o, "mse_factor", r->mse);
    add_number(o, "steps", r->steps);
    add_number(o, "accumulate", r->accumulate);
    add_number(o, "length", r->length);
    add_number(o, "rows", r->rows);
    add_number(o, "update_rows", r->update_rows);
    if (r->long_every) {
        add_number(o, "long_length", r->long_length);
        add_number(o, "long_every", r->long_every);
        add_number(o, "long_rows", r->long_rows);
    }
    cJSON_AddBoolToObject(o, "join_documents", r->join_documents);
    if (r->recall > 0) add_number(o, "recall", r->recall);
    add_text(o, "optimiser",
             "AdamW, betas 0.9 and 0.99, no decay, gradient norm of a layer at most 1");
    add_number(o, "lr", r->lr);
    add_number(o, "lr_mix", r->lr_mix);
    add_text(o, "schedule", r->one_cycle ? "one_cycle" : "constant");
    add_number(o, "warmup", r->warmup);
    add_number(o, "init_scale", r->init_scale);
    cJSON_AddBoolToObject(o, "calibrated", r->calibrate);
    add_number(o, "seed", (double)r->seed);
    return o;
}

cJSON *recipe_finetune_json(const struct recipe *r) {
    const struct finetune_recipe *f = &r->finetune;
    if (f->method == FINETUNE_NONE) return cJSON_CreateNull();
    cJSON *o = cJSON_CreateObject();
    add_text(o, "method", f->method == FINETUNE_FULL ? "full" : "low_rank");
    add_text(o, "loss", f->next_token ? "next_token" : "distill");
    if (f->method == FINETUNE_LOW_RANK) {
        add_number(o, "rank", f->rank);
        add_number(o, "scale", f->scale);
    }
    add_text(o, "products", f->bf16 ? "bf16" : "fp32");
    add_number(o, "steps", f->steps);
    add_number(o, "accumulate", f->accumulate);
    if (f->retrieval_size) add_number(o, "retrieval_size", f->retrieval_size);
    add_text(o, "optimiser", "AdamW, betas 0.9 and 0.99, no decay, gradient norm at most 1");
    add_number(o, "lr", f->lr);
    add_number(o, "lr_maps", f->lr_maps);
    return o;
}
