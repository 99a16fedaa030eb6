/* report.c - evaluation results as tables for people and JSON for scripts. */
#include "convert/report.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>

void report_free(struct report *r) {
    if (!r) return;
    for (int i = 0; i < r->n_streams; i++)
        free(r->streams[i].bins);
    free(r->streams);
}

static const char *kv_name(const struct model_info *info) {
    return info->attention.kv_type == KV_FP32 ? "fp32" : "bf16";
}

static bool is_base(const struct report *r, int reader) {
    return r->compare && reader == 0;
}

/* ---- tables ---- */

static void print_name(FILE *out, const struct report *r, int reader) {
    fprintf(out, "  %-34.34s", r->readers[reader].name);
}

static void table_perplexity(FILE *out, const struct report *r) {
    fprintf(
        out,
        "\nperplexity: windows of %lld tokens, %lld scored in each; %lld of %lld tokens scored\n"
        "  %-34s %10s %10s",
        (long long)r->context, (long long)r->stride, (long long)r->perplexity[0].n,
        (long long)r->n_tokens, "", "perplexity", "nats");
    fprintf(out, r->compare ? " %10s %10s\n" : "\n", "mean KL", "same token");
    for (int i = 0; i < r->n_readers; i++) {
        const struct score *s = &r->perplexity[i];
        print_name(out, r, i);
        fprintf(out, " %10.3f %10.4f", score_perplexity(s), score_mean_nll(s));
        if (r->compare && i > 0)
            fprintf(out, " %10.5f %9.2f%%", score_mean_kl(s), 100 * score_agreement(s));
        fputc('\n', out);
    }
}

static void table_stream(FILE *out, const struct report *r, const struct stream *s) {
    fprintf(out, "\nperplexity by position: %s, %lld tokens in one sequence\n", s->file,
            (long long)s->n_tokens);
    if (r->stream_context)
        fprintf(
            out,
            "(a model with a length limit reads each %lld tokens with up to %lld before them)\n",
            (long long)r->stream_stride, (long long)(r->stream_context - r->stream_stride));
    fprintf(out, "  %12s", "from token");
    for (int i = 0; i < r->n_readers; i++)
        fprintf(out, " %18.18s", r->readers[i].name);
    fputc('\n', out);
    for (int b = 0; b < s->n_bins; b++) {
        fprintf(out, "  %12lld", (long long)(b * s->bin_size));
        for (int i = 0; i < r->n_readers; i++)
            fprintf(out, " %18.3f",
                    score_perplexity(&s->bins[(size_t)i * (size_t)s->n_bins + (size_t)b]));
        fputc('\n', out);
    }
}

static void table_passkey(FILE *out, const struct report *r) {
    fprintf(out, "\npasskey: digits right, %d tries at each length\n  %-34s", r->tries, "");
    for (int l = 0; l < r->n_lengths; l++)
        fprintf(out, " %8lld", (long long)r->lengths[l]);
    fputc('\n', out);
    for (int i = 0; i < r->n_readers; i++) {
        print_name(out, r, i);
        for (int l = 0; l < r->n_lengths; l++)
            if (isnan(r->passkey[i][l]))
                fprintf(out, " %8s", "-");
            else
                fprintf(out, " %8.3f", r->passkey[i][l]);
        fputc('\n', out);
    }
}

void report_table(FILE *out, const struct report *r) {
    for (int i = 0; i < r->n_readers; i++) {
        if (i && r->readers[i].model == r->readers[i - 1].model) continue;
        const struct model_info *info = model_info(r->readers[i].model);
        fprintf(out, "%s: %s, weights %s, exact keys %s, cache %d%s\n", r->readers[i].name,
                info->attention.kind == ATTENTION_SOFTMAX ? "softmax" : "hedgehog",
                weight_type_name(info->weights), kv_name(info), info->attention.cache_size,
                is_base(r, i) ? " (the others are compared with it)" : "");
    }
    fprintf(out, "text: %s\n", r->texts);
    if (r->has_perplexity) table_perplexity(out, r);
    for (int i = 0; i < r->n_streams; i++)
        table_stream(out, r, &r->streams[i]);
    if (r->n_lengths) table_passkey(out, r);
}

/* ---- JSON ---- */

static void json_score(cJSON *o, const struct report *r, int reader, const struct score *s) {
    cJSON_AddNumberToObject(o, "tokens_scored", (double)s->n);
    cJSON_AddNumberToObject(o, "perplexity", score_perplexity(s));
    cJSON_AddNumberToObject(o, "nll", score_mean_nll(s));
    if (!r->compare || reader == 0) return;
    cJSON_AddNumberToObject(o, "kl", score_mean_kl(s));
    cJSON_AddNumberToObject(o, "agreement", score_agreement(s));
}

static cJSON *json_reader(const struct report *r, int i) {
    const struct model_info *info = model_info(r->readers[i].model);
    cJSON *o = cJSON_CreateObject();
    cJSON_AddStringToObject(o, "name", r->readers[i].name);
    cJSON_AddStringToObject(o, "model", info->name);
    cJSON_AddBoolToObject(o, "compared_against", is_base(r, i));
    cJSON_AddStringToObject(o, "attention",
                            info->attention.kind == ATTENTION_SOFTMAX ? "softmax" : "hedgehog");
    cJSON_AddBoolToObject(o, "linear", r->readers[i].linear);
    cJSON_AddNumberToObject(o, "cache_size", info->attention.cache_size);
    cJSON_AddStringToObject(o, "weights", weight_type_name(info->weights));
    cJSON_AddStringToObject(o, "kv_type", kv_name(info));
    if (r->has_perplexity) {
        cJSON *p = cJSON_AddObjectToObject(o, "perplexity");
        cJSON_AddNumberToObject(p, "context", (double)r->context);
        cJSON_AddNumberToObject(p, "stride", (double)r->stride);
        cJSON_AddNumberToObject(p, "tokens", (double)r->n_tokens);
        json_score(p, r, i, &r->perplexity[i]);
    }
    if (r->n_streams) {
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
    if (r->n_lengths) {
        cJSON *lengths = cJSON_AddArrayToObject(o, "passkey");
        for (int l = 0; l < r->n_lengths; l++) {
            cJSON *one = cJSON_CreateObject();
            cJSON_AddItemToArray(lengths, one);
            cJSON_AddNumberToObject(one, "tokens", (double)r->lengths[l]);
            cJSON_AddNumberToObject(one, "tries", r->tries);
            cJSON_AddNumberToObject(one, "digits_right", r->passkey[i][l]);
        }
    }
    return o;
}

enum err report_json(FILE *out, const struct report *r) {
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "texts", r->texts);
    cJSON *readers = cJSON_AddArrayToObject(root, "readers");
    for (int i = 0; i < r->n_readers; i++)
        cJSON_AddItemToArray(readers, json_reader(r, i));
    char *text = cJSON_Print(root);
    cJSON_Delete(root);
    if (!text) return ERR_NOMEM;
    fprintf(out, "%s\n", text);
    cJSON_free(text);
    return OK;
}
