/* options.c - settings, checked by config, as the model's options. */
#include "model/options.h"

#include <string.h>

int weights_named(const char *name) {
    for (int type = WEIGHT_FP32; type <= WEIGHT_FP8; type++)
        if (strcmp(name, weight_type_name((enum weight_type)type)) == 0) return type;
    return WEIGHTS_AUTO;
}

enum kv_type kv_type_named(const char *name) {
    return strcmp(name, "fp32") == 0 ? KV_FP32 : KV_BF16;
}

void model_options_init(struct model_options *o) {
    *o = (struct model_options){
        .device = DEVICE_CPU,
        .weights = WEIGHTS_AUTO,
        .kv_type = KV_BF16,
        .max_rows = 256,
        .max_logits = 32,
        .cache_size = -1,
        .cache_recent = -1,
        .cache_age = -1,
        .cache_fact_age = -1,
        .retrieval_size = -1,
        .cache_copies = 1,
        .max_distance = -1,
        .horizon = -1,
    };
}

void model_options_set(struct model_options *o, const struct settings *s) {
    model_options_init(o);
    o->path = s->model;
    o->device = !strcmp(s->device, "cuda")  ? DEVICE_CUDA
                : !strcmp(s->device, "cpu") ? DEVICE_CPU
                                            : DEVICE_AUTO;
    o->base = s->base;
    o->weights = weights_named(s->weights);
    o->kv_type = kv_type_named(s->kv_type);
    o->max_seq_len = s->max_seq_len;
    o->memory_budget = (size_t)s->memory_mb << 20;
    o->cache_size = s->cache_size;
    o->cache_recent = s->cache_recent;
    o->retrieval_size = s->retrieval_size;
    o->cache_age = s->cache_age;
    o->cache_fact_age = s->cache_fact_age;
    o->max_distance = s->max_distance;
    o->horizon = s->horizon;
    o->chat_template = s->chat_template;
}
