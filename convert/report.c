/* report.c - evaluation results as tables for people. */
#include "convert/report.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void report_free(struct report *r) {
    if (!r) return;
    for (int i = 0; i < r->n_streams; i++)
        free(r->streams[i].bins);
    free(r->streams);
    free(r->added);
    for (int i = 0; i < MAX_READERS; i++)
        head_report_free(r->heads[i]);
}

static bool is_base(const struct report *r, int reader) {
    return r->compare && reader == 0;
}

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
    char verdict[256];
    if (report_verdict(r, verdict, sizeof verdict)) fprintf(out, "  %s\n", verdict);
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

static void table_choice(FILE *out, const struct report *r) {
    fprintf(out, "\nmultiple choice: %d questions of %s\n  %-34s %8s %8s %8s %8s\n", r->choice[0].n,
            r->tasks, "", "acc", "+-", "acc_norm", "+-");
    for (int i = 0; i < r->n_readers; i++) {
        const struct choice_sums *s = &r->choice[i];
        print_name(out, r, i);
        fprintf(out, " %8.4f %8.4f %8.4f %8.4f\n", choice_accuracy(s->n, s->right),
                choice_error(s->n, s->right), choice_accuracy(s->n, s->right_norm),
                choice_error(s->n, s->right_norm));
    }
}

/* ---- heads ---- */

static void print_or_dash(FILE *out, int width, int decimals, double x) {
    if (isfinite(x))
        fprintf(out, " %*.*f", width, decimals, x);
    else
        fprintf(out, " %*s", width, "-");
}

static void line_of_heads(FILE *out, const struct head_sums *s) {
    print_or_dash(out, 7, 4, s->kl / s->n_rows);
    print_or_dash(out, 7, 4, s->error / s->energy);
    print_or_dash(out, 7, 4, s->error_exact / s->energy); /* without a window nothing is exact */
    print_or_dash(out, 6, 2, s->entropy / s->n_rows);
    print_or_dash(out, 6, 2, s->entropy_own / s->n_rows);
    print_or_dash(out, 6, 3, s->rank / s->n_rank);
    for (int c = 0; c < N_KEY_CLASSES; c++)
        fprintf(out, "  %.2f/%.2f", s->softmax[c] / s->n_rows, s->own[c] / s->n_rows);
    fputc('\n', out);
}

static void table_heads(FILE *out, const struct report *r, int reader) {
    const struct head_report *h = r->heads[reader];
    fprintf(out,
            "\nheads of %s: %lld tokens in windows of %lld, %d rows of each that have linear keys\n"
            "  %-7s %7s %7s %7s %6s %6s %6s  %9s  %9s  %9s  %9s\n"
            "  %-7s %7s %7s %7s %6s %6s %6s  %9s  %9s  %9s  %9s\n",
            r->readers[reader].name, (long long)h->n_tokens, (long long)h->context, h->n_rows, "",
            "KL", "error", "without", "entropy", "", "rank", "mass on", "", "", "", "layer", "", "",
            "linear", "base", "own", "rho", "sink", "window", "cache", "state");
    for (int i = 0; i < h->n_layers; i++) {
        struct head_sums sum = head_sums_of(h->sums + (size_t)i * (size_t)h->n_heads, h->n_heads);
        fprintf(out, "  %-7d", i);
        if (sum.n_rows > 0)
            line_of_heads(out, &sum);
        else
            fputs(" keeps softmax\n", out);
    }
    struct head_sums sum = head_sums_of(h->sums, h->n_layers * h->n_heads);
    fprintf(out, "  %-7s", "all");
    line_of_heads(out, &sum);
    fprintf(out,
            "  (softmax's mass / the model's; KL of all rows, those without linear keys as 0: "
            "%.4f)\n",
            h->share * sum.kl / sum.n_rows);
}

/* ---- recall ---- */

static void print_share(FILE *out, double share) {
    print_or_dash(out, 8, 3, share);
}

/* Digits right by length; of readers that are no ablation whole answers too, and digits by depth.
 */
static void table_recall(FILE *out, const struct report *r, const char *title,
                         const struct recalled (*told)[MAX_LENGTHS][DEPTHS]) {
    int most = 0;
    for (int i = 0; i < r->n_readers; i++)
        for (int l = 0; l < r->n_lengths; l++) {
            struct recalled all = recalled_all(told[i][l]);
            if (all.asked > most) most = all.asked;
        }
    fprintf(out, "\n%s: digits right, %d tries at each length\n  %-34s", title, most, "");
    for (int l = 0; l < r->n_lengths; l++)
        fprintf(out, " %8lld", (long long)r->lengths[l]);
    fputc('\n', out);
    for (int i = 0; i < r->n_readers; i++) {
        print_name(out, r, i);
        for (int l = 0; l < r->n_lengths; l++) {
            struct recalled all = recalled_all(told[i][l]);
            print_share(out, recalled_digits(&all));
        }
        fputc('\n', out);
        if (r->readers[i].whole) continue;
        fprintf(out, "  %-34s", "  whole answers");
        for (int l = 0; l < r->n_lengths; l++) {
            struct recalled all = recalled_all(told[i][l]);
            print_share(out, recalled_whole(&all));
        }
        fputc('\n', out);
        for (int d = 0; d < DEPTHS; d++) {
            fprintf(out, "    at %3d to %3d %% of the text%*s", 100 * d / DEPTHS,
                    100 * (d + 1) / DEPTHS, 5, "");
            for (int l = 0; l < r->n_lengths; l++)
                print_share(out, recalled_digits(&told[i][l][d]));
            fputc('\n', out);
        }
    }
}

static void table_added(FILE *out, const struct report *r) {
    fprintf(out,
            "\ntexts read apart, memories added: digits right of one pass key in each text\n"
            "  %5s %8s %6s   %-26s   %-26s\n  %5s %8s %6s %8s %8s %8s   %8s %8s %8s\n",
            "", "tokens", "", "the text's own", "the others'", "texts", "each", "tries", "alone",
            "joined", "added", "unread", "joined", "added");
    for (int i = 0; i < r->n_added; i++) {
        const struct added *a = &r->added[i];
        fprintf(out, "  %5d %8lld %6d", a->n_texts, (long long)a->length, a->own_added.asked);
        print_share(out, recalled_digits(&a->own_alone));
        print_share(out, recalled_digits(&a->own_joined));
        print_share(out, recalled_digits(&a->own_added));
        fputs("  ", out);
        print_share(out, recalled_digits(&a->others_alone));
        print_share(out, recalled_digits(&a->others_joined));
        print_share(out, recalled_digits(&a->others_added));
        fputc('\n', out);
    }
}

/* ---- all ---- */

bool report_verdict(const struct report *r, char *out, size_t len) {
    for (int i = 0; r->has_perplexity && i < r->n_readers; i++) {
        const struct reader *reader = &r->readers[i];
        if (reader->linear || !reader->whole || reader->whole->model != reader->model) continue;
        const struct score *s = &r->perplexity[i];
        double off = score_mean_off(s), error = score_off_error(s);
        if (!attention_linear_keys(model_attention(reader->model), -1, 0, r->context - 1)) {
            snprintf(out, len,
                     "No key is linear in %lld tokens of %s, so this says nothing about its linear "
                     "branch: take a longer --context.",
                     (long long)r->context, reader->whole->name);
            return true;
        }
        if (!(fabs(off) <= 2 * error)) return false;
        snprintf(out, len,
                 "The linear branch of %s is dead: without it the loss changes by %.5f nats a "
                 "token, less than twice the standard error %.5f of that difference.",
                 reader->whole->name, off, error);
        return true;
    }
    return false;
}

void report_table(FILE *out, const struct report *r) {
    for (int i = 0; i < r->n_readers; i++) {
        if (i && r->readers[i].model == r->readers[i - 1].model) continue;
        const struct model_info *info = model_info(r->readers[i].model);
        fprintf(out, "%s: %s, weights %s, exact keys %s, cache %d", r->readers[i].name,
                info->attention.kind == ATTENTION_SOFTMAX ? "softmax" : "hedgehog",
                weight_type_name(info->weights),
                info->attention.kv_type == KV_FP32 ? "fp32" : "bf16", info->attention.cache_size);
        if (info->attention.retrieval_size)
            fprintf(out, ", %d in retrieval heads", info->attention.retrieval_size);
        if (info->attention.cache_fact_age)
            fprintf(out, ", facts' age %d", info->attention.cache_fact_age);
        fprintf(out, "%s\n", is_base(r, i) ? " (the others are compared with it)" : "");
    }
    if (r->texts) fprintf(out, "text: %s\n", r->texts);
    if (r->has_perplexity) table_perplexity(out, r);
    for (int i = 0; i < r->n_streams; i++)
        table_stream(out, r, &r->streams[i]);
    if (r->tasks) table_choice(out, r);
    for (int i = 0; i < r->n_readers; i++)
        if (r->heads[i]) table_heads(out, r, i);
    if (r->has_passkey) table_recall(out, r, "passkey", r->passkey);
    if (r->has_recall) {
        char title[64];
        snprintf(title, sizeof title, "recall, %d facts in a text", r->facts);
        table_recall(out, r, title, r->recall);
    }
    if (r->n_added) table_added(out, r);
}
