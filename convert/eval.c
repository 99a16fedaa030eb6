/* eval.c - `urchin eval`: opens the models, runs the tests, prints the report. */
#include "convert/eval.h"

#include "config/log.h"
#include "convert/passkey.h"
#include "convert/report.h"
#include "convert/sheet.h"
#include "model/options.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct tokens { /* one tokenised file */
    char *file;
    int32_t *ids;
    size_t n;
};

struct eval {
    const struct settings *settings;
    struct team *team;
    struct model *against, *model, *uncached; /* owned; uncached: no places */
    struct tasks *tasks;                      /* owned */
    struct reader readers[MAX_READERS];
    int n_readers;
    struct tokens *texts; /* [n_texts], owned */
    int n_texts;
    int32_t bos; /* -1: the tokenizer adds none */
    struct report report;
    char *msg;
    size_t msg_len;
};

#define FAIL(e, code, ...) err_set((e)->msg, (e)->msg_len, code, __VA_ARGS__)

/* Is word one of the comma-separated ones of list? */
static bool listed(const char *list, const char *word) {
    size_t n = strlen(word);
    for (const char *p = list; p; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL)
        if (!strncmp(p, word, n) && (p[n] == ',' || !p[n])) return true;
    return false;
}

/* Are all words of list known?  known ends with NULL. */
static enum err check_list(struct eval *e, const char *flag, const char *list,
                           const char *const *known, const char *sentence) {
    for (const char *p = list; p; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL) {
        size_t n = strcspn(p, ",");
        bool found = false;
        for (int i = 0; known[i]; i++)
            found |= strlen(known[i]) == n && !strncmp(known[i], p, n);
        if (!found)
            return FAIL(e, ERR_ARG, "%s: '%.*s' is not one of %s", flag, (int)n, p, sentence);
    }
    return OK;
}

static bool wanted(const struct eval *e, const char *test) {
    return listed(e->settings->tests, test) || listed(e->settings->tests, "all");
}

/* ---- models ---- */

/* A model's slots: two readers' (with and without the linear branch), and one for copies. */
enum { WHOLE, EXACT_ONLY, SPARE, N_SLOTS };

static void options_of(struct model_options *o, const struct eval *e) {
    model_options_set(o, e->settings);
    o->max_rows = o->max_logits = READING_ROWS;
    o->n_slots = N_SLOTS;
    o->team = e->team;
}

static void add_reader(struct eval *e, const char *name, struct model *model, bool linear,
                       const struct reader *whole) {
    e->readers[e->n_readers++] = (struct reader){.name = name,
                                                 .model = model,
                                                 .slot = linear ? WHOLE : EXACT_ONLY,
                                                 .spare = SPARE,
                                                 .linear = linear,
                                                 .whole = whole};
}

static enum err open_models(struct eval *e) {
    const struct settings *s = e->settings;
    struct model_options o;
    options_of(&o, e);
    enum err err = model_open(&e->model, &o, e->msg, e->msg_len);
    if (err) return err;
    const struct model_info *info = model_info(e->model);

    if (s->against) {
        options_of(&o, e);
        o.cache_size = o.cache_recent = o.cache_age = o.cache_fact_age = o.retrieval_size =
            -1; /* dials of the model that is measured */
        o.max_distance = o.horizon = -1;
        bool base = !strcmp(s->against, "base");
        if (base && !info->base_path)
            return FAIL(e, ERR_ARG, "--against base: %s is not an adapter, so it names no base",
                        s->model);
        o.path = base ? info->base_path : s->against;
        o.base = NULL;
        o.weights = weights_named(s->against_weights);
        if (s->against_kv_type) o.kv_type = kv_type_named(s->against_kv_type);
        if (!strcmp(o.path, s->model)) o.base = s->base;
        err = model_open(&e->against, &o, e->msg, e->msg_len);
        if (err) return err;
        const struct model_info *other = model_info(e->against);
        if (other->vocab_size != info->vocab_size)
            return FAIL(e, ERR_ARG, "--against %s: its vocabulary has %d tokens, that of %s has %d",
                        s->against, other->vocab_size, info->name, info->vocab_size);
        add_reader(e, other->name, e->against, true, NULL);
    }
    add_reader(e, info->name, e->model, true, NULL);
    if (info->attention.kind != ATTENTION_HEDGEHOG) return OK;
    const struct reader *whole = &e->readers[e->n_readers - 1];
    bool cache = attention_cache_most(&info->attention);
    /* where nothing is exact, c_h scales all weights alike: nothing is switched off */
    bool exact = info->attention.window != WINDOW_NONE || info->attention.sinks;
    if (exact && listed(s->ablate, "linear"))
        add_reader(e, "exact keys only", e->model, false, whole);
    if (!cache || !(listed(s->ablate, "cache") || listed(s->ablate, "both"))) return OK;
    options_of(&o, e);
    o.cache_size = o.cache_recent = o.cache_fact_age = o.retrieval_size = 0;
    err = model_open(&e->uncached, &o, e->msg, e->msg_len);
    if (err) return err;
    if (listed(s->ablate, "cache")) add_reader(e, "no cache", e->uncached, true, whole);
    if (listed(s->ablate, "both"))
        add_reader(e, "exact keys only, no cache", e->uncached, false, whole);
    return OK;
}

/* ---- texts ---- */

static enum err read_file(struct eval *e, const char *path, char **text, size_t *len) {
    FILE *file = fopen(path, "rb");
    if (!file) return FAIL(e, ERR_IO, "--text: cannot open '%s'", path);
    size_t room = 1 << 16, n = 0;
    char *buffer = malloc(room);
    while (buffer) {
        n += fread(buffer + n, 1, room - n, file);
        if (n < room) break;
        char *bigger = realloc(buffer, room *= 2);
        if (!bigger) free(buffer);
        buffer = bigger;
    }
    bool failed = ferror(file);
    fclose(file);
    if (!buffer) return FAIL(e, ERR_NOMEM, "--text: out of memory for '%s'", path);
    if (failed) {
        free(buffer);
        return FAIL(e, ERR_IO, "--text: cannot read '%s'", path);
    }
    *text = buffer;
    *len = n;
    return OK;
}

/* A tokenizer may know more tokens than its model has weights for. */
static enum err check_weights(struct eval *e, const struct tokens *t) {
    const struct model *models[] = {e->model, e->against};
    for (int m = 0; m < 2; m++)
        for (size_t i = 0; models[m] && i < t->n; i++)
            if (t->ids[i] >= model_info(models[m])->vocab_size)
                return FAIL(e, ERR_ARG,
                            "--text: token %zu of '%s' is number %d, and %s has weights for %d", i,
                            t->file, t->ids[i], model_info(models[m])->name,
                            model_info(models[m])->vocab_size);
    return OK;
}

/* Tokens of one file; both models must cut it alike, or their rows would not be comparable. */
static enum err read_tokens(struct eval *e, struct tokens *t) {
    char *text = NULL;
    size_t len = 0;
    enum err err = read_file(e, t->file, &text, &len);
    if (err) return err;
    err = tokenize(model_tokenizer(e->model), text, len, 0, &t->ids, &t->n);
    if (err == OK && e->against) {
        int32_t *other;
        size_t n;
        err = tokenize(model_tokenizer(e->against), text, len, 0, &other, &n);
        if (err == OK) {
            if (n != t->n || memcmp(other, t->ids, n * sizeof *other))
                err = FAIL(e, ERR_ARG, "--against %s: its tokenizer cuts '%s' into other tokens",
                           e->settings->against, t->file);
            free(other);
        }
    }
    free(text);
    if (err == ERR_NOMEM) return FAIL(e, err, "out of memory for the tokens of '%s'", t->file);
    if (err) return err;
    if (e->settings->tokens && t->n > (size_t)e->settings->tokens)
        t->n = (size_t)e->settings->tokens;
    if (t->n < 2) return FAIL(e, ERR_ARG, "--text: '%s' has fewer than two tokens", t->file);
    return check_weights(e, t);
}

static enum err read_texts(struct eval *e) {
    const struct tokenizer *tokenizer = model_tokenizer(e->model);
    e->bos = tokenizer_add_bos(tokenizer) ? tokenizer_bos(tokenizer) : -1;
    if (!e->settings->text && !strcmp(e->settings->tests, "choice")) return OK;
    if (!e->settings->text)
        return FAIL(e, ERR_ARG, "--text is missing: name at least one text file to measure on");
    int n = 1;
    for (const char *p = e->settings->text; *p; p++)
        n += *p == ',';
    e->texts = calloc((size_t)n, sizeof *e->texts);
    if (!e->texts) return FAIL(e, ERR_NOMEM, "out of memory");
    const char *p = e->settings->text;
    for (; e->n_texts < n; p += strcspn(p, ",") + 1) {
        struct tokens *t = &e->texts[e->n_texts++];
        t->file = strndup(p, strcspn(p, ","));
        if (!t->file) return FAIL(e, ERR_NOMEM, "out of memory");
        enum err err = read_tokens(e, t);
        if (err) return err;
    }
    return OK;
}

static struct text text_of(const struct eval *e, int i) {
    return (struct text){e->texts[i].ids, (int64_t)e->texts[i].n, e->bos};
}

/* ---- tests ---- */

static enum err test_perplexity(struct eval *e) {
    struct report *r = &e->report;
    bool bos = e->bos >= 0;
    r->context = e->settings->context;
    r->stride = e->settings->stride ? e->settings->stride : r->context - bos;
    if (r->stride < 1 || r->stride > r->context - bos)
        return FAIL(e, ERR_ARG, "--stride %lld: it must be from 1 to %lld, the context%s",
                    (long long)r->stride, (long long)(r->context - bos), bos ? " less BOS" : "");
    for (int i = 0; i < e->n_readers; i++) {
        int64_t limit = model_info(e->readers[i].model)->max_seq_len;
        if (limit && r->context > limit)
            return FAIL(e, ERR_ARG, "--context %lld: %s reads at most %lld tokens",
                        (long long)r->context, e->readers[i].name, (long long)limit);
        e->readers[i].context = r->context;
        e->readers[i].stride = r->stride;
    }
    r->has_perplexity = true;
    for (int i = 0; i < e->n_texts; i++) {
        struct text text = text_of(e, i);
        r->n_tokens += text.n;
        log_event(LOG_INFO, "eval", "perplexity on %s, %lld tokens", e->texts[i].file,
                  (long long)text.n);
        enum err err = read_text(e->team, e->readers, e->n_readers, e->against, &text, INT64_MAX,
                                 r->perplexity, 1, e->msg, e->msg_len);
        if (err) return err;
    }
    return OK;
}

/* A model with a length limit (softmax) reads the stream in overlapping windows. */
static enum err test_stream(struct eval *e) {
    enum { WINDOW = 4096 };
    struct report *r = &e->report;
    for (int i = 0; i < e->n_readers; i++) {
        int64_t limit = model_info(e->readers[i].model)->max_seq_len;
        if (limit > WINDOW) limit = WINDOW;
        if (limit) r->stream_context = limit, r->stream_stride = (limit + 1) / 2;
        e->readers[i].context = limit;
        e->readers[i].stride = (limit + 1) / 2;
    }
    r->streams = calloc((size_t)e->n_texts, sizeof *r->streams);
    if (!r->streams) return FAIL(e, ERR_NOMEM, "out of memory");
    for (int i = 0; i < e->n_texts; i++) {
        struct text text = text_of(e, i);
        int64_t bin_size = e->settings->bin, n_bins = (text.n - 1) / bin_size + 1;
        if (n_bins > 1 << 20)
            return FAIL(e, ERR_ARG, "--bin %lld: '%s' would have more than a million bins",
                        (long long)bin_size, e->texts[i].file);
        struct stream *s = &r->streams[r->n_streams++];
        *s = (struct stream){e->texts[i].file, text.n, bin_size, (int)n_bins,
                             calloc((size_t)(n_bins * e->n_readers), sizeof *s->bins)};
        if (!s->bins) return FAIL(e, ERR_NOMEM, "out of memory");
        log_event(LOG_INFO, "eval", "stream of %s, %lld tokens", s->file, (long long)text.n);
        enum err err = read_text(e->team, e->readers, e->n_readers, e->against, &text, bin_size,
                                 s->bins, s->n_bins, e->msg, e->msg_len);
        if (err) return err;
    }
    return OK;
}

static void take_lengths(struct eval *e) {
    e->report.n_lengths = settings_list(e->settings->lengths, e->report.lengths, MAX_LENGTHS);
}

static enum err test_passkey(struct eval *e) {
    struct report *r = &e->report;
    struct text filler = text_of(e, 0);
    int tries = e->settings->tries;
    r->has_passkey = true;
    for (int l = 0; l < r->n_lengths; l++) {
        int64_t length = r->lengths[l];
        log_event(LOG_INFO, "eval", "passkey in %lld tokens", (long long)length);
        for (int i = 0; i < tries; i++) {
            struct passkey passkey;
            enum err err = passkey_make(&passkey, model_tokenizer(e->model), &filler,
                                        e->settings->seed, length, i, tries, e->msg, e->msg_len);
            if (err) return err;
            for (int j = 0; j < e->n_readers && err == OK; j++) {
                int64_t limit = model_info(e->readers[j].model)->max_seq_len;
                if (limit && length + PASSKEY_DIGITS + 1 > limit) continue;
                struct answer answer;
                err = passkey_ask(&answer, &e->readers[j], &passkey, e->msg, e->msg_len);
                if (!err)
                    recalled_add(&r->passkey[j][l][depth_of((2 * i + 1) / (2.0 * tries))], &answer);
            }
            free(passkey.ids);
            if (err) return err;
        }
    }
    return OK;
}

static struct recall_options recall_of(const struct eval *e, const struct text *filler,
                                       int64_t length) {
    int64_t seed = e->settings->seed > 0 ? e->settings->seed : 0;
    return (struct recall_options){model_tokenizer(e->model), filler, seed, length};
}

static enum err test_recall(struct eval *e) {
    struct report *r = &e->report;
    struct text filler = text_of(e, 0);
    int facts = r->facts = e->settings->facts, n_texts = (e->settings->tries + facts - 1) / facts;
    r->has_recall = true;
    for (int l = 0; l < r->n_lengths; l++) {
        struct recalled depths[MAX_READERS][DEPTHS] = {0};
        struct recall_options o = recall_of(e, &filler, r->lengths[l]);
        log_event(LOG_INFO, "eval", "recall in %lld tokens", (long long)r->lengths[l]);
        enum err err = recall_measure(depths, e->readers, e->n_readers, &o, facts, n_texts, e->msg,
                                      e->msg_len);
        if (err == ERR_ARG && !listed(e->settings->tests, "recall")) {
            log_event(LOG_WARN, "eval", "recall is left out: %s",
                      e->msg); /* nobody asked for it by name */
            *e->msg = 0;
            continue;
        }
        if (err) return err;
        for (int i = 0; i < e->n_readers; i++)
            memcpy(r->recall[i][l], depths[i], sizeof depths[i]);
    }
    return OK;
}

/* The model once more, with places for the caches of n texts. */
static enum err open_wide(struct eval *e, int n_texts, struct model **out) {
    struct model_options o;
    options_of(&o, e);
    o.n_slots = n_texts + 2;
    o.cache_copies = n_texts;
    return model_open(out, &o, e->msg, e->msg_len);
}

static enum err test_added(struct eval *e) {
    struct report *r = &e->report;
    const struct attention_config *c = &model_info(e->model)->attention;
    struct text filler = text_of(e, 0);
    int64_t numbers[MAX_TEXTS];
    int n_numbers = settings_list(e->settings->memories, numbers, MAX_TEXTS),
        tries = e->settings->tries;
    if (!model_slot(e->model, 0) || c->kind != ATTENTION_HEDGEHOG || c->window != WINDOW_TERRACED ||
        !attention_cache_most(c))
        return FAIL(e, ERR_ARG,
                    "--tests added needs Hedgehog attention with a recall cache, on the CPU");
    r->added = calloc((size_t)n_numbers * (size_t)r->n_lengths, sizeof *r->added);
    if (!r->added) return FAIL(e, ERR_NOMEM, "out of memory");
    for (int k = 0; k < n_numbers; k++) {
        struct model *wide = NULL;
        int n_texts = (int)numbers[k], n_sets = (tries + n_texts - 1) / n_texts;
        if (n_texts < 2 || n_texts > MAX_TEXTS)
            return FAIL(e, ERR_ARG, "--memories %d: 2 to %d texts can be added", n_texts,
                        MAX_TEXTS);
        enum err err = open_wide(e, n_texts, &wide);
        for (int l = 0; l < r->n_lengths && !err; l++) {
            struct added *a = &r->added[r->n_added++];
            struct recall_options o = recall_of(e, &filler, r->lengths[l]);
            *a = (struct added){.n_texts = n_texts, .length = r->lengths[l]};
            log_event(LOG_INFO, "eval", "memories of %d texts of %lld tokens", n_texts,
                      (long long)o.length);
            for (int i = 0; i < n_sets && !err; i++)
                err = added_measure(a, wide, &o, n_texts, i, n_sets, e->msg, e->msg_len);
        }
        model_close(wide);
        if (err) return err;
    }
    return OK;
}

/* Questions are read before anything is measured: a bad line is found at once. */
static enum err read_tasks(struct eval *e) {
    const char *file = e->settings->tasks;
    if (!file && listed(e->settings->tests, "choice"))
        return FAIL(e, ERR_ARG, "--tests choice needs questions: --tasks FILE.jsonl");
    return file && wanted(e, "choice") ? tasks_load(&e->tasks, file, e->msg, e->msg_len) : OK;
}

static enum err test_choice(struct eval *e) {
    struct report *r = &e->report;
    log_event(LOG_INFO, "eval", "%d questions of %s", e->tasks->n, e->tasks->file);
    r->tasks = e->tasks->file;
    return choice_measure(r->choice, e->readers, e->n_readers, e->tasks, e->bos, e->msg,
                          e->msg_len);
}

/* Heads of all readers that have linear keys at work. */
static enum err test_heads(struct eval *e) {
    const struct model_info *info = model_info(e->model);
    bool named = listed(e->settings->tests, "heads");
    const char *why = info->attention.kind != ATTENTION_HEDGEHOG ? "its attention is softmax"
                      : !model_slot(e->model, 0)                 ? "it runs on a GPU: --device cpu"
                                                                 : NULL;
    if (why && named)
        return FAIL(e, ERR_ARG, "--tests heads: %s has none to look at, %s", info->name, why);
    if (why) return OK;
    struct text *texts = calloc((size_t)e->n_texts, sizeof *texts);
    enum err err = texts ? OK : FAIL(e, ERR_NOMEM, "out of memory");
    for (int i = 0; !err && i < e->n_texts; i++)
        texts[i] = text_of(e, i);
    for (int i = 0; !err && i < e->n_readers; i++) {
        const struct reader *r = &e->readers[i];
        if (!r->linear || model_info(r->model)->attention.kind != ATTENTION_HEDGEHOG) continue;
        log_event(LOG_INFO, "eval", "heads of %s", r->name);
        err = head_report_take(&e->report.heads[i], r->model, e->team, r->slot, texts, e->n_texts,
                               e->settings->context, e->msg, e->msg_len);
    }
    free(texts);
    return err;
}

static enum err print_report(struct eval *e) {
    cJSON *json = report_json(&e->report);
    char *text = json && e->settings->json ? cJSON_Print(json) : NULL;
    enum err err = OK;
    if (!json || (e->settings->json && !text))
        err = FAIL(e, ERR_NOMEM, "out of memory for the report");
    if (!err && text) printf("%s\n", text);
    if (!err && !text) report_table(stdout, &e->report);
    if (!err && e->settings->html) {
        cJSON *document = sheet_document(e->settings->model, json);
        err = sheet_write(e->settings->html, document, e->msg, e->msg_len);
        cJSON_Delete(document);
    }
    cJSON_free(text);
    cJSON_Delete(json);
    return err;
}

static enum err evaluate(struct eval *e) {
    static const char *const known_tests[] = {"perplexity", "stream", "choice", "heads", "passkey",
                                              "recall",     "added",  "all",    NULL};
    static const char *const known_parts[] = {"linear", "cache", "both", "none", NULL};
    enum err err = check_list(e, "--tests", e->settings->tests, known_tests,
                              "perplexity, stream, choice, heads, passkey, recall, added and all");
    if (!err)
        err = check_list(e, "--ablate", e->settings->ablate, known_parts,
                         "linear, cache, both and none");
    if (!err && e->settings->html) err = sheet_check(e->settings->html, e->msg, e->msg_len);
    if (!err) err = read_tasks(e);
    if (!err) err = open_models(e);
    if (!err) err = read_texts(e);
    e->report.readers = e->readers;
    e->report.n_readers = e->n_readers;
    e->report.compare = e->against;
    e->report.texts = e->settings->text;
    take_lengths(e);
    if (!err && wanted(e, "perplexity")) err = test_perplexity(e);
    if (!err && wanted(e, "stream")) err = test_stream(e);
    if (!err && e->tasks) err = test_choice(e);
    if (!err && wanted(e, "heads")) err = test_heads(e);
    if (!err && wanted(e, "passkey")) err = test_passkey(e);
    if (!err && wanted(e, "recall")) err = test_recall(e);
    if (!err && listed(e->settings->tests, "added")) err = test_added(e);
    return err ? err : print_report(e);
}

int eval_main(const struct settings *settings, struct team *team) {
    char msg[512] = "";
    struct eval e = {.settings = settings, .team = team, .msg = msg, .msg_len = sizeof msg};
    enum err err = evaluate(&e);
    if (err) fprintf(stderr, "urchin eval: %s\n", *msg ? msg : err_name(err));
    report_free(&e.report);
    for (int i = 0; i < e.n_texts; i++) {
        free(e.texts[i].file);
        free(e.texts[i].ids);
    }
    free(e.texts);
    tasks_free(e.tasks);
    model_close(e.uncached);
    model_close(e.against);
    model_close(e.model);
    return err ? 1 : 0;
}
