/* eval.c - `urchin eval`: opens the models, runs the tests, prints the report. */
#include "convert/eval.h"

#include "config/log.h"
#include "convert/passkey.h"
#include "convert/report.h"
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
    struct model *against, *model, *uncached; /* owned; uncached: cache_size 0 */
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

/* ---- models ---- */

static void options_of(struct model_options *o, const struct eval *e) {
    model_options_set(o, e->settings);
    o->max_rows = o->max_logits = READING_ROWS;
    o->n_slots = 1;
    o->team = e->team;
}

static void add_reader(struct eval *e, const char *name, struct model *model, int slot,
                       bool linear) {
    e->readers[e->n_readers++] =
        (struct reader){.name = name, .model = model, .slot = slot, .linear = linear};
}

static enum err open_models(struct eval *e) {
    const struct settings *s = e->settings;
    struct model_options o;
    options_of(&o, e);
    o.n_slots = 2; /* with and without the linear branch */
    enum err err = model_open(&e->model, &o, e->msg, e->msg_len);
    if (err) return err;
    const struct model_info *info = model_info(e->model);

    if (s->against) {
        options_of(&o, e);
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
        add_reader(e, other->name, e->against, 0, true);
    }
    add_reader(e, info->name, e->model, 0, true);
    if (info->attention.kind != ATTENTION_HEDGEHOG) return OK;
    if (listed(s->ablate, "linear")) add_reader(e, "exact keys only", e->model, 1, false);
    if (listed(s->ablate, "cache") && info->attention.cache_size) {
        options_of(&o, e);
        o.cache_size = o.cache_recent = 0;
        err = model_open(&e->uncached, &o, e->msg, e->msg_len);
        if (err) return err;
        add_reader(e, "no cache", e->uncached, 0, true);
    }
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
    return OK;
}

static enum err read_texts(struct eval *e) {
    if (!e->settings->text)
        return FAIL(e, ERR_ARG, "--text is missing: name at least one text file to measure on");
    const struct tokenizer *tokenizer = model_tokenizer(e->model);
    e->bos = tokenizer_add_bos(tokenizer) ? tokenizer_bos(tokenizer) : -1;
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

static enum err test_passkey(struct eval *e) {
    struct report *r = &e->report;
    struct text filler = text_of(e, 0);
    r->tries = e->settings->tries;
    r->n_lengths = settings_list(e->settings->lengths, r->lengths, MAX_LENGTHS);
    for (int l = 0; l < r->n_lengths; l++) {
        int64_t length = r->lengths[l];
        int right[MAX_READERS] = {0};
        log_event(LOG_INFO, "eval", "passkey in %lld tokens", (long long)length);
        for (int i = 0; i < r->tries; i++) {
            struct passkey passkey;
            enum err err = passkey_make(&passkey, model_tokenizer(e->model), &filler, length, i,
                                        r->tries, e->msg, e->msg_len);
            if (err) return err;
            for (int j = 0; j < e->n_readers && err == OK; j++) {
                int64_t limit = model_info(e->readers[j].model)->max_seq_len;
                if (limit && length + PASSKEY_DIGITS + 1 > limit) {
                    r->passkey[j][l] = NAN;
                    continue;
                }
                int digits = 0;
                err = passkey_ask(&digits, &e->readers[j], &passkey, e->msg, e->msg_len);
                right[j] += digits;
                r->passkey[j][l] = (double)right[j] / (PASSKEY_DIGITS * r->tries);
            }
            free(passkey.ids);
            if (err) return err;
        }
    }
    return OK;
}

static enum err evaluate(struct eval *e) {
    const char *tests = e->settings->tests;
    static const char *const known_tests[] = {"perplexity", "stream", "passkey", "all", NULL};
    static const char *const known_parts[] = {"linear", "cache", "none", NULL};
    enum err err =
        check_list(e, "--tests", tests, known_tests, "perplexity, stream, passkey and all");
    if (!err)
        err = check_list(e, "--ablate", e->settings->ablate, known_parts, "linear, cache and none");
    if (!err) err = open_models(e);
    if (!err) err = read_texts(e);
    bool all = listed(tests, "all");
    if (!err && (all || listed(tests, "perplexity"))) err = test_perplexity(e);
    if (!err && (all || listed(tests, "stream"))) err = test_stream(e);
    if (!err && (all || listed(tests, "passkey"))) err = test_passkey(e);
    if (err) return err;
    e->report.readers = e->readers;
    e->report.n_readers = e->n_readers;
    e->report.compare = e->against;
    e->report.texts = e->settings->text;
    if (!e->settings->json) {
        report_table(stdout, &e->report);
        return OK;
    }
    err = report_json(stdout, &e->report);
    return err ? FAIL(e, err, "out of memory for the report") : OK;
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
    model_close(e.uncached);
    model_close(e.against);
    model_close(e.model);
    return err ? 1 : 0;
}
