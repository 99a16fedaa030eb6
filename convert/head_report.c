/* head_report.c - all heads of a model over some texts. */
#include "convert/head_report.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void head_report_free(struct head_report *h) {
    if (h) free(h->sums);
    free(h);
}

struct head_sums head_sums_of(const struct head_sums *s, int n) {
    struct head_sums sum = {0};
    for (int i = 0; i < n; i++) {
        sum.n_rows += s[i].n_rows;
        sum.kl += s[i].kl;
        sum.entropy += s[i].entropy;
        sum.entropy_own += s[i].entropy_own;
        sum.error += s[i].error;
        sum.error_exact += s[i].error_exact;
        sum.energy += s[i].energy;
        sum.rank += s[i].rank;
        sum.n_rank += s[i].n_rank;
        for (int c = 0; c < N_KEY_CLASSES; c++) {
            sum.softmax[c] += s[i].softmax[c];
            sum.own[c] += s[i].own[c];
        }
    }
    return sum;
}

/* ---- reading ---- */
struct taking {
    struct head_report *h;
    struct heads *heads;
    int slot;
    int32_t *ids; /* [context] */
    char *msg;
    size_t msg_len;
};

/* Tokens from .. from + n - 1 with BOS before them; how many that makes. */
static int window_at(const struct taking *t, const struct text *text, int64_t from, int64_t n) {
    int bos = text->bos >= 0;
    if (n > text->n - from) n = text->n - from;
    t->ids[0] = text->bos;
    memcpy(t->ids + bos, text->ids + from, (size_t)n * sizeof *t->ids);
    return (int)n + bos;
}

static enum err read_windows(const struct taking *t, const struct text *text) {
    int64_t step = t->h->context - (text->bos >= 0);
    for (int64_t k = 0; k < HEAD_WINDOWS && (!k || (k + 1) * step <= text->n); k++) {
        int n = window_at(t, text, k * step, step);
        enum err e = heads_read(t->heads, t->slot, t->ids, n, HEAD_ROWS, false, t->msg, t->msg_len);
        if (e) return e;
        t->h->n_tokens += n;
    }
    return OK;
}

static enum err take_pictures(const struct taking *t, const struct text *text) {
    struct head_report *h = t->h;
    int64_t most = h->context < SAMPLE_TOKENS ? h->context : SAMPLE_TOKENS;
    int n = window_at(t, text, 0, most - (text->bos >= 0));
    if (n < PICTURE_CELLS) return OK;
    h->n_pictures = picture_choose(h->pictures, h->sums, h->n_layers, h->n_heads);
    return picture_take(h->pictures, h->n_pictures, t->heads, t->slot, t->ids, n, t->msg,
                        t->msg_len);
}

enum err head_report_take(struct head_report **out, struct model *model, struct team *team,
                          int slot, const struct text *texts, int n_texts, int64_t context,
                          char *msg, size_t msg_len) {
    enum { MOST_TOKENS = 1 << 20 };
    static_assert((int)HEAD_ROWS <= (int)PICTURE_CELLS, "room for both");
    const struct model_info *info = model_info(model);
    size_t n_heads = (size_t)info->n_layers * (size_t)info->attention.n_heads;
    if (context > MOST_TOKENS)
        return err_set(msg, msg_len, ERR_ARG, "--context %lld: heads read at most %d tokens",
                       (long long)context, MOST_TOKENS);
    struct head_report *h = calloc(1, sizeof *h);
    struct taking t = {.h = h, .slot = slot, .msg = msg, .msg_len = msg_len};
    t.ids = malloc((size_t)context * sizeof *t.ids);
    if (h) h->sums = calloc(n_heads, sizeof *h->sums);
    enum err e = h && h->sums && t.ids
                     ? heads_new(&t.heads, model, team, (int)context, PICTURE_CELLS)
                     : ERR_NOMEM;
    if (e) {
        err_set(msg, msg_len, e, "out of memory for the heads of %s", info->name);
    } else {
        h->n_layers = info->n_layers;
        h->n_heads = info->attention.n_heads;
        h->n_rows = HEAD_ROWS;
        h->context = context;
    }
    for (int i = 0; i < n_texts && !e; i++)
        e = read_windows(&t, &texts[i]);
    if (!e) {
        memcpy(h->sums, heads_sums(t.heads), n_heads * sizeof *h->sums);
        h->share = heads_share(t.heads);
        e = take_pictures(&t, &texts[0]);
    }
    heads_free(t.heads);
    free(t.ids);
    if (e)
        head_report_free(h);
    else
        *out = h;
    return e;
}

/* ---- JSON ---- */
static cJSON *number(double x) { /* six digits are enough; what is no number is null */
    char text[32];
    if (!isfinite(x)) return cJSON_CreateNull();
    snprintf(text, sizeof text, "%.6g", x);
    return cJSON_CreateNumber(strtod(text, NULL));
}

enum quantity { KL, ERROR, ERROR_EXACT, ENTROPY, ENTROPY_OWN, RANK, N_QUANTITIES };
static const char *const quantity_names[] = {
    "kl",      "attention_error", "attention_error_exact_only",
    "entropy", "entropy_own",     "rank_correlation"};
static const char *const class_names[] = {"sink", "window", "cache", "linear"};

static double quantity_of(const struct head_sums *s, int q) {
    double rows[] = {s->kl, 0, 0, s->entropy, s->entropy_own};
    if (q == ERROR) return s->energy > 0 ? s->error / s->energy : NAN;
    if (q == ERROR_EXACT) return s->energy > 0 ? s->error_exact / s->energy : NAN;
    if (q == RANK) return s->n_rank > 0 ? s->rank / s->n_rank : NAN;
    return s->n_rows > 0 ? rows[q] / s->n_rows : NAN;
}
static double mass_of(const struct head_sums *s, bool own, int c) {
    return s->n_rows > 0 ? (own ? s->own : s->softmax)[c] / s->n_rows : NAN;
}

static cJSON *grid(const struct head_report *h, double (*of)(const struct head_sums *, int),
                   int q) {
    cJSON *layers = cJSON_CreateArray();
    for (int i = 0; i < h->n_layers; i++) {
        cJSON *row = cJSON_CreateArray();
        for (int k = 0; k < h->n_heads; k++)
            cJSON_AddItemToArray(row, number(of(&h->sums[i * h->n_heads + k], q)));
        cJSON_AddItemToArray(layers, row);
    }
    return layers;
}
static double softmax_mass(const struct head_sums *s, int c) {
    return mass_of(s, false, c);
}
static double own_mass(const struct head_sums *s, int c) {
    return mass_of(s, true, c);
}

cJSON *head_report_json(const struct head_report *h) {
    cJSON *o = cJSON_CreateObject();
    double rows = 0, kl = 0;
    for (int i = 0; i < h->n_layers * h->n_heads; i++) {
        rows += h->sums[i].n_rows;
        kl += h->sums[i].kl;
    }
    cJSON_AddNumberToObject(o, "tokens", (double)h->n_tokens);
    cJSON_AddNumberToObject(o, "context", (double)h->context);
    cJSON_AddNumberToObject(o, "rows_of_a_window", h->n_rows);
    cJSON_AddItemToObject(o, "kl_of_all_rows", number(h->share * kl / rows));
    for (int q = 0; q < N_QUANTITIES; q++)
        cJSON_AddItemToObject(o, quantity_names[q], grid(h, quantity_of, q));
    cJSON *softmax = cJSON_AddObjectToObject(o, "softmax_mass"),
          *own = cJSON_AddObjectToObject(o, "mass");
    for (int c = 0; c < N_KEY_CLASSES; c++) {
        cJSON_AddItemToObject(softmax, class_names[c], grid(h, softmax_mass, c));
        cJSON_AddItemToObject(own, class_names[c], grid(h, own_mass, c));
    }
    cJSON *pictures = cJSON_AddArrayToObject(o, "pictures");
    for (int i = 0; i < h->n_pictures; i++)
        cJSON_AddItemToArray(pictures, picture_json(&h->pictures[i]));
    return o;
}
