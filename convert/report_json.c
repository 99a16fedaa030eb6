/* report_json.c - evaluation results as one JSON document. */
#include "convert/report.h"

#include <math.h>
#include <stdlib.h>

static cJSON *number(double x) { /* six digits are enough; what is no number is null */
    char text[32];
    if (!isfinite(x)) return cJSON_CreateNull();
    snprintf(text, sizeof text, "%.6g", x);
    return cJSON_CreateNumber(strtod(text, NULL));
}
static void add(cJSON *o, const char *key, double x) {
    cJSON_AddItemToObject(o, key, number(x));
}

static void json_score(cJSON *o, const struct report *r, int reader, const struct score *s) {
    cJSON_AddNumberToObject(o, "tokens_scored", (double)s->n);
    cJSON_AddNumberToObject(o, "perplexity", score_perplexity(s));
    cJSON_AddNumberToObject(o, "nll", score_mean_nll(s));
    if (r->readers[reader].whole) {
        add(o, "nll_less_whole", score_mean_off(s));
        add(o, "standard_error", score_off_error(s));
    }
    if (!r->compare || reader == 0) return;
    cJSON_AddNumberToObject(o, "kl", score_mean_kl(s));
    cJSON_AddNumberToObject(o, "agreement", score_agreement(s));
}

static void add_streams(cJSON *o, const struct report *r, int i) {
    cJSON *streams = cJSON_AddArrayToObject(o, "stream");
    for (int j = 0; j < r->n_streams; j++) {
        const struct stream *s = &r->streams[j];
        cJSON *one = cJSON_CreateObject();
        cJSON_AddItemToArray(streams, one);
        cJSON_AddStringToObject(one, "text", s->file);
        cJSON_AddNumberToObject(one, "context", (double)r->readers[i].context);
        cJSON_AddNumberToObject(one, "stride", (double)r->readers[i].stride);
        cJSON *bins = cJSON_AddArrayToObject(one, "bins");
        for (int b = 0; b < s->n_bins; b++) {
            cJSON *bin = cJSON_CreateObject();
            cJSON_AddItemToArray(bins, bin);
            cJSON_AddNumberToObject(bin, "from", (double)(b * s->bin_size));
            json_score(bin, r, i, &s->bins[(size_t)i * (size_t)s->n_bins + (size_t)b]);
        }
    }
}

static void add_choice(cJSON *o, const struct choice_sums *s) {
    cJSON *c = cJSON_AddObjectToObject(o, "choice");
    cJSON_AddNumberToObject(c, "questions", s->n);
    add(c, "acc", choice_accuracy(s->n, s->right));
    add(c, "acc_standard_error", choice_error(s->n, s->right));
    add(c, "acc_norm", choice_accuracy(s->n, s->right_norm));
    add(c, "acc_norm_standard_error", choice_error(s->n, s->right_norm));
}

/* ---- recall ---- */
static void add_recalled(cJSON *o, const struct recalled *r) {
    cJSON_AddNumberToObject(o, "tries", r->asked);
    add(o, "digits_right", recalled_digits(r));
    add(o, "whole_right", recalled_whole(r));
}

static void add_lengths(cJSON *o, const char *key, const struct report *r,
                        const struct recalled (*told)[DEPTHS]) {
    cJSON *lengths = cJSON_AddArrayToObject(o, key);
    for (int l = 0; l < r->n_lengths; l++) {
        cJSON *one = cJSON_CreateObject(), *depths;
        struct recalled all = recalled_all(told[l]);
        cJSON_AddItemToArray(lengths, one);
        cJSON_AddNumberToObject(one, "tokens", (double)r->lengths[l]);
        add_recalled(one, &all);
        depths = cJSON_AddArrayToObject(one, "by_depth");
        for (int d = 0; d < DEPTHS; d++) {
            cJSON *depth = cJSON_CreateObject();
            cJSON_AddItemToArray(depths, depth);
            add(depth, "from", (double)d / DEPTHS);
            add(depth, "to", (double)(d + 1) / DEPTHS);
            add_recalled(depth, &told[l][d]);
        }
    }
}

static cJSON *json_added(const struct added *a) {
    const struct recalled *parts[] = {&a->own_alone,    &a->own_joined,    &a->own_added,
                                      &a->others_alone, &a->others_joined, &a->others_added};
    static const char *const keys[] = {"own_alone",    "own_joined",    "own_added",
                                       "others_alone", "others_joined", "others_added"};
    cJSON *o = cJSON_CreateObject();
    cJSON_AddNumberToObject(o, "texts", a->n_texts);
    cJSON_AddNumberToObject(o, "tokens", (double)a->length);
    for (int i = 0; i < 6; i++)
        add_recalled(cJSON_AddObjectToObject(o, keys[i]), parts[i]);
    return o;
}

/* ---- a reader, and all ---- */
static cJSON *json_reader(const struct report *r, int i) {
    const struct model_info *info = model_info(r->readers[i].model);
    cJSON *o = cJSON_CreateObject();
    cJSON_AddStringToObject(o, "name", r->readers[i].name);
    cJSON_AddStringToObject(o, "model", info->name);
    cJSON_AddBoolToObject(o, "compared_against", r->compare && i == 0);
    cJSON_AddBoolToObject(o, "ablation", r->readers[i].whole != NULL);
    cJSON_AddStringToObject(o, "attention",
                            info->attention.kind == ATTENTION_SOFTMAX ? "softmax" : "hedgehog");
    cJSON_AddBoolToObject(o, "linear", r->readers[i].linear);
    cJSON_AddNumberToObject(o, "cache_size", info->attention.cache_size);
    cJSON_AddNumberToObject(o, "retrieval_size", info->attention.retrieval_size);
    cJSON_AddNumberToObject(o, "cache_fact_age", info->attention.cache_fact_age);
    cJSON_AddStringToObject(o, "weights", weight_type_name(info->weights));
    cJSON_AddStringToObject(o, "kv_type", info->attention.kv_type == KV_FP32 ? "fp32" : "bf16");
    if (r->has_perplexity) {
        cJSON *p = cJSON_AddObjectToObject(o, "perplexity");
        cJSON_AddNumberToObject(p, "context", (double)r->context);
        cJSON_AddNumberToObject(p, "stride", (double)r->stride);
        cJSON_AddNumberToObject(p, "tokens", (double)r->n_tokens);
        json_score(p, r, i, &r->perplexity[i]);
    }
    if (r->n_streams) add_streams(o, r, i);
    if (r->tasks) add_choice(o, &r->choice[i]);
    if (r->heads[i]) cJSON_AddItemToObject(o, "heads", head_report_json(r->heads[i]));
    if (r->has_passkey) add_lengths(o, "passkey", r, r->passkey[i]);
    if (r->has_recall) add_lengths(o, "recall", r, r->recall[i]);
    return o;
}

cJSON *report_json(const struct report *r) {
    cJSON *root = cJSON_CreateObject();
    char verdict[256];
    cJSON_AddNumberToObject(root, "format", 1);
    if (r->texts) cJSON_AddStringToObject(root, "texts", r->texts);
    if (r->tasks) cJSON_AddStringToObject(root, "tasks", r->tasks);
    if (report_verdict(r, verdict, sizeof verdict))
        cJSON_AddStringToObject(root, "linear_branch", verdict);
    cJSON *readers = cJSON_AddArrayToObject(root, "readers");
    for (int i = 0; i < r->n_readers; i++)
        cJSON_AddItemToArray(readers, json_reader(r, i));
    if (r->has_recall) cJSON_AddNumberToObject(root, "facts", r->facts);
    cJSON *added = r->n_added ? cJSON_AddArrayToObject(root, "added") : NULL;
    for (int i = 0; i < r->n_added; i++)
        cJSON_AddItemToArray(added, json_added(&r->added[i]));
    if (!root || !readers) {
        cJSON_Delete(root);
        return NULL;
    }
    return root;
}
