/* info.c - what a model is, for people and for programs. */
#include "server/info.h"

#include "compute/cpu.h"
#include "server/buffer.h"
#include "server/open.h"
#include "server/served.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const kind_names[] = {
    [ATTENTION_SOFTMAX] = "softmax", [ATTENTION_HEDGEHOG] = "hedgehog"};
static const char *const map_names[] = {
    [MAP_EXP] = "exp", [MAP_SOFTMAX2] = "softmax2", [MAP_JOINT_SOFTMAX] = "joint_softmax"};
static const char *const window_names[] = {
    [WINDOW_NONE] = "none", [WINDOW_SLIDING] = "sliding", [WINDOW_TERRACED] = "terraced"};
static const char *const mixing_names[] = {
    [MIXING_UNIFIED] = "unified", [MIXING_LOLCATS] = "lolcats"};
static const char *const kv_names[] = {[KV_FP32] = "fp32", [KV_BF16] = "bf16"};

static void add_text(cJSON *object, const char *name, const char *text) {
    json_add(object, name, text ? json_text(text, strlen(text)) : cJSON_CreateNull());
}

static void add_number(cJSON *object, const char *name, double value) {
    json_add(object, name, cJSON_CreateNumber(value));
}

static cJSON *attention_meta(const struct attention_config *c) {
    cJSON *a = cJSON_CreateObject();
    add_text(a, "kind", kind_names[c->kind]);
    add_number(a, "n_heads", c->n_heads);
    add_number(a, "n_kv_heads", c->n_kv_heads);
    add_number(a, "head_dim", c->head_dim);
    add_text(a, "exact_keys", kv_names[c->kv_type]);
    if (c->kind == ATTENTION_SOFTMAX) return a;
    add_text(a, "map", map_names[c->map]);
    add_number(a, "feature_dim", 2 * c->features);
    add_text(a, "map_position", c->map_before_rope ? "none" : "rope");
    add_text(a, "window", window_names[c->window]);
    add_number(a, "window_size", c->window_size);
    add_number(a, "sinks", c->sinks);
    add_number(a, "cache_size", c->cache_size);
    add_number(a, "cache_recent", c->cache_recent);
    add_number(a, "cache_age", c->cache_age);
    add_number(a, "cache_fact_age", c->cache_fact_age);
    add_number(a, "retrieval_size", c->retrieval_size);
    add_number(a, "retrieval_recent", c->retrieval_recent);
    add_number(a, "horizon", (double)c->horizon);
    add_text(a, "mixing", mixing_names[c->mixing]);
    add_number(a, "max_distance", (double)c->max_distance);
    return a;
}

static cJSON *retrieval_heads(const struct model_info *i) {
    cJSON *list = cJSON_CreateArray();
    int n_kv = i->attention.n_kv_heads;
    for (int h = 0; h < i->n_layers * n_kv; h++)
        if (i->retrieval[h])
            cJSON_AddItemToArray(list, cJSON_CreateIntArray((int[]){h / n_kv, h % n_kv}, 2));
    return list;
}

static cJSON *softmax_layers(const struct model_info *i) {
    cJSON *list = cJSON_CreateArray();
    for (int layer = 0; layer < i->n_layers; layer++)
        if (i->softmax_layers[layer]) cJSON_AddItemToArray(list, cJSON_CreateNumber(layer));
    return list;
}

cJSON *served_meta(const struct model *model) {
    const struct model_info *i = model_info(model);
    cJSON *m = cJSON_CreateObject();
    add_text(m, "architecture", i->architecture);
    add_number(m, "n_params", (double)i->n_params);
    add_number(m, "n_layers", i->n_layers);
    add_number(m, "n_embd", i->hidden_dim);
    add_number(m, "n_ff", i->ffn_dim);
    add_number(m, "n_vocab", i->vocab_size);
    add_number(m, "n_ctx_train", (double)i->context);
    if (i->retrieval) json_add(m, "retrieval_heads", retrieval_heads(i));
    add_number(m, "measured_to", (double)i->measured_to);
    json_add(m, "max_seq_len",
             i->max_seq_len ? cJSON_CreateNumber((double)i->max_seq_len) : cJSON_CreateNull());
    add_text(m, "device", i->device);
    add_text(m, "weights", weight_type_name(i->weights));
    add_number(m, "size", (double)i->weight_bytes);
    add_number(m, "slot_bytes", (double)i->slot_bytes);
    add_number(m, "state_bytes", (double)i->state_bytes);
    add_number(m, "slots", i->n_slots);
    add_text(m, "chat_template", chat_family_name(chat_family(model_chat(model))));
    add_text(m, "base_sha256", i->base_sha256);
    cJSON *attention = attention_meta(&i->attention);
    if (i->softmax_layers) json_add(attention, "softmax_layers", softmax_layers(i));
    json_add(m, "attention", attention);
    return m;
}

/* "3.1 MiB" */
static const char *size_text(char *out, size_t len, double bytes) {
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB"};
    int u = 0;
    while (bytes >= 1024 && u < 3)
        bytes /= 1024, u++;
    snprintf(out, len, u ? "%.1f %s" : "%.0f %s", bytes, units[u]);
    return out;
}

static void print_attention(const struct attention_config *c) {
    printf("attention     %s, %d heads of %d, %d kv heads\n", kind_names[c->kind], c->n_heads,
           c->head_dim, c->n_kv_heads);
    if (c->kind == ATTENTION_SOFTMAX) return;
    printf("  map         %s of %d features, %s RoPE\n", map_names[c->map], 2 * c->features,
           c->map_before_rope ? "before" : "after");
    printf("  exact keys  window %s of %d, %d sinks, recall cache %d (%d recent), in %s\n",
           window_names[c->window], c->window_size, c->sinks, c->cache_size, c->cache_recent,
           kv_names[c->kv_type]);
    if (c->cache_age)
        printf("  age         scores halve after %d tokens in recent places", c->cache_age);
    if (c->cache_age && c->cache_fact_age) printf(", %d in others", c->cache_fact_age);
    if (c->cache_age) printf("\n");
    printf("  mixing      %s", mixing_names[c->mixing]);
    if (c->horizon) printf(", horizon %lld keys", (long long)c->horizon);
    if (c->max_distance) printf(", farthest distance %lld", (long long)c->max_distance);
    printf("\n");
}

static void print_info(const struct model *model) {
    const struct model_info *i = model_info(model);
    char weights[32], slot[32], state[32];
    bool grows = i->attention.kind == ATTENTION_SOFTMAX || i->softmax_layers;
    printf("model         %s\n", i->name);
    printf(
        "architecture  %s, %d layers of %d (feed-forward %d), vocabulary %d, %.1f M parameters\n",
        i->architecture, i->n_layers, i->hidden_dim, i->ffn_dim, i->vocab_size,
        (double)i->n_params / 1e6);
    if (i->base_path)
        printf("base          %s\n              sha256 %s\n", i->base_path, i->base_sha256);
    print_attention(&i->attention);
    if (i->retrieval) {
        int n_kv = i->attention.n_kv_heads;
        printf("  retrieval   cache %d (%d recent) in layer.head", i->attention.retrieval_size,
               i->attention.retrieval_recent);
        for (int h = 0; h < i->n_layers * n_kv; h++)
            if (i->retrieval[h]) printf(" %d.%d", h / n_kv, h % n_kv);
        printf("\n");
    }
    if (i->softmax_layers) {
        printf("  softmax     in %d of %d layers:", i->n_softmax_layers, i->n_layers);
        for (int layer = 0; layer < i->n_layers; layer++)
            if (i->softmax_layers[layer]) printf(" %d", layer);
        printf("\n");
    }
    printf("chat format   %s\n", chat_family_name(chat_family(model_chat(model))));
    printf("weights       %s, %s\n", weight_type_name(i->weights),
           size_text(weights, sizeof weights, (double)i->weight_bytes));
    if (model_draws(model))
        printf("device        %s\n", i->device);
    else
        printf("device        cpu; kernels %s\n", cpu_isa_name(cpu_isa()));
    printf("a sequence    %s in a slot, %s saved%s\n",
           size_text(slot, sizeof slot, (double)i->slot_bytes),
           size_text(state, sizeof state, (double)i->state_bytes),
           grows ? " at full length" : ", whatever its length");
    printf("capacity      %d sequences\n", i->n_slots);
    printf("length        trained to %lld tokens", (long long)i->context);
    if (i->measured_to != i->context) printf(", measured to %lld", (long long)i->measured_to);
    if (i->max_seq_len)
        printf(", at most %lld\n", (long long)i->max_seq_len);
    else
        printf(", no limit\n");
}

int info_main(const struct settings *settings, struct team *team) {
    struct model *model;
    char msg[512];
    if (open_model(&model, settings, settings->max_seqs, team, show_progress, msg, sizeof msg) !=
        OK) {
        fprintf(stderr, "urchin: %s\n", msg);
        return 1;
    }
    if (settings->json) {
        cJSON *meta = served_meta(model);
        add_text(meta, "name", model_info(model)->name);
        char *text = cJSON_Print(meta);
        if (text) puts(text);
        cJSON_free(text);
        cJSON_Delete(meta);
    } else {
        print_info(model);
    }
    model_close(model);
    return 0;
}
