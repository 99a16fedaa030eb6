/* recall.c - facts hidden in texts, and questions about each. */
#include "convert/recall.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- counts ---- */
void recalled_add(struct recalled *r, const struct answer *a) {
    r->asked++;
    r->whole += a->whole;
    r->digits += a->digits;
}
double recalled_digits(const struct recalled *r) {
    return r->asked ? (double)r->digits / ((double)r->asked * PASSKEY_DIGITS) : NAN;
}
double recalled_whole(const struct recalled *r) {
    return r->asked ? (double)r->whole / r->asked : NAN;
}
int depth_of(double share) {
    int depth = (int)(share * DEPTHS);
    return depth < 0 ? 0 : depth >= DEPTHS ? DEPTHS - 1 : depth;
}
struct recalled recalled_all(const struct recalled depths[DEPTHS]) {
    struct recalled all = {0};
    for (int d = 0; d < DEPTHS; d++) {
        all.asked += depths[d].asked;
        all.whole += depths[d].whole;
        all.digits += depths[d].digits;
    }
    return all;
}

/* ---- facts ---- */
static const char *const names[MAX_FACTS] = {
    "Anna",   "Boris", "Clara",  "David", "Emma",   "Felix",  "Grace",  "Henry",
    "Irene",  "James", "Karen",  "Lucas", "Maria",  "Nora",   "Oscar",  "Paula",
    "Quinn",  "Ralph", "Sarah",  "Tom",   "Ursula", "Victor", "Wendy",  "Xavier",
    "Yvonne", "Zoe",   "Albert", "Betty", "Carl",   "Diana",  "Edgar",  "Fiona",
    "George", "Helen", "Isaac",  "Julia", "Kevin",  "Laura",  "Martin", "Nancy",
    "Oliver", "Peter", "Rachel", "Simon", "Teresa", "Ulrich", "Vera",   "Walter",
    "Alice",  "Bruno", "Cecil",  "Doris", "Ernest", "Frank",  "Gloria", "Harold",
    "Iris",   "John",  "Kate",   "Leo",   "Mary",   "Nick",   "Olga",   "Paul"};

static void free_facts(struct fact *facts, int n) {
    for (int i = 0; i < n; i++) {
        free(facts[i].told);
        free(facts[i].asked);
        free(facts[i].answer);
    }
}

/* n facts with n names and n numbers, by chance. */
static enum err make_facts(struct fact *facts, int n, const struct tokenizer *tokenizer,
                           uint64_t random) {
    int order[MAX_FACTS];
    memset(facts, 0, (size_t)n * sizeof *facts);
    for (int i = 0; i < MAX_FACTS; i++)
        order[i] = i;
    for (int i = 0; i < n; i++) {
        random = passkey_mix(random);
        int k = i + (int)(random % (uint64_t)(MAX_FACTS - i)), name = order[k], key;
        order[k] = order[i];
        random = passkey_mix(random);
        key = 10000 + (int)(random % 90000);
        char text[200];
        struct fact *f = &facts[i];
        snprintf(text, sizeof text,
                 "\nThe pass key of %s is %d. Remember it. The pass key of %s is %d.\n",
                 names[name], key, names[name], key);
        enum err e = tokenize(tokenizer, text, strlen(text), 0, &f->told, &f->n_told);
        snprintf(text, sizeof text, "\nWhat is the pass key of %s? The pass key of %s is",
                 names[name], names[name]);
        if (!e) e = tokenize(tokenizer, text, strlen(text), 0, &f->asked, &f->n_asked);
        snprintf(text, sizeof text, " %d", key);
        if (!e) e = tokenize(tokenizer, text, strlen(text), 0, &f->answer, &f->n_answer);
        if (e) {
            free_facts(facts, n);
            return e;
        }
    }
    return OK;
}

/* BOS, filler and facts, `length` tokens in all, owned by the caller.  shares [n] ascending: of the
 * filler before each fact, of which the last `tail` tokens stay behind them all. */
static enum err make_text(int32_t **out, const struct fact *facts, const double *shares, int n,
                          int64_t tail, const struct recall_options *o, uint64_t random, char *msg,
                          size_t msg_len) {
    bool bos = o->filler->bos >= 0;
    int64_t n_fill = o->length - bos;
    for (int i = 0; i < n; i++)
        n_fill -= (int64_t)facts[i].n_told;
    if (n_fill < tail || n_fill < 1 || n_fill > o->filler->n)
        return err_set(
            msg, msg_len, ERR_ARG,
            "a text of %lld tokens with %d facts needs %lld tokens of filler, there are %lld",
            (long long)o->length, n, (long long)n_fill, (long long)o->filler->n);
    int32_t *ids = malloc((size_t)o->length * sizeof *ids), *to = ids;
    if (!ids) return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    const int32_t *fill = o->filler->ids + random % (uint64_t)(o->filler->n - n_fill + 1);
    int64_t at = 0;
    if (bos) *to++ = o->filler->bos;
    for (int i = 0; i <= n; i++) {
        int64_t until = i < n ? (int64_t)(shares[i] * (double)(n_fill - tail)) : n_fill;
        memcpy(to, fill + at, (size_t)(until - at) * sizeof *to);
        to += until - at;
        at = until;
        if (i == n) break;
        memcpy(to, facts[i].told, facts[i].n_told * sizeof *to);
        to += facts[i].n_told;
    }
    *out = ids;
    return OK;
}

/* The question and its answer, from a copy of slot `from`. */
static enum err ask(struct answer *out, const struct reader *reader, int from, const struct fact *f,
                    char *msg, size_t msg_len) {
    struct reader spare = *reader;
    spare.slot = reader->spare;
    int32_t *ids = malloc((f->n_asked + f->n_answer) * sizeof *ids);
    if (!ids) return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    memcpy(ids, f->asked, f->n_asked * sizeof *ids);
    memcpy(ids + f->n_asked, f->answer, f->n_answer * sizeof *ids);
    model_slot_copy(spare.model, spare.slot, from);
    enum err e =
        passkey_answer(out, &spare, ids, (int64_t)f->n_asked, (int)f->n_answer, msg, msg_len);
    free(ids);
    return e;
}

static uint64_t chance_of(const struct recall_options *o, int text, int number) {
    return passkey_mix(passkey_mix(passkey_mix((uint64_t)o->seed + 0x5eed) + (uint64_t)o->length) +
                       (uint64_t)text * 1000003u + (uint64_t)number);
}

/* ---- many facts in one text ---- */
void recall_free(struct recall_text *t) {
    free(t->ids);
    free_facts(t->facts, t->n_facts);
}

enum err recall_make(struct recall_text *out, const struct recall_options *o, int n_facts, int t,
                     int n_texts, char *msg, size_t msg_len) {
    if (n_facts < 1 || n_facts > MAX_FACTS)
        return err_set(msg, msg_len, ERR_ARG, "--facts %d: 1 to %d are possible", n_facts,
                       MAX_FACTS);
    uint64_t random = chance_of(o, t, n_facts);
    *out = (struct recall_text){.n_facts = n_facts};
    for (int k = 0; k < n_facts; k++)
        out->shares[k] = (k + (2 * t + 1) / (2.0 * n_texts)) / n_facts;
    if (make_facts(out->facts, n_facts, o->tokenizer, random))
        return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    enum err e = make_text(&out->ids, out->facts, out->shares, n_facts, 0, o, passkey_mix(random),
                           msg, msg_len);
    if (e) free_facts(out->facts, n_facts);
    return e;
}

static enum err ask_reader(struct recalled depths[DEPTHS], struct reader *r,
                           const struct recall_text *t, int64_t length, char *msg, size_t msg_len) {
    int64_t limit = model_info(r->model)->max_seq_len;
    for (int i = 0; i < t->n_facts; i++)
        if (limit && length + (int64_t)(t->facts[i].n_asked + t->facts[i].n_answer) > limit)
            return OK;
    const float *none;
    model_slot_clear(r->model, r->slot);
    enum err e = reader_feed(r, t->ids, length, 0, &none, msg, msg_len);
    for (int i = 0; i < t->n_facts && !e; i++) {
        struct answer answer;
        e = ask(&answer, r, r->slot, &t->facts[i], msg, msg_len);
        if (!e) recalled_add(&depths[depth_of(t->shares[i])], &answer);
    }
    return e;
}

enum err recall_measure(struct recalled (*depths)[DEPTHS], struct reader *readers, int n_readers,
                        const struct recall_options *o, int n_facts, int n_texts, char *msg,
                        size_t msg_len) {
    for (int t = 0; t < n_texts; t++) {
        struct recall_text text;
        enum err e = recall_make(&text, o, n_facts, t, n_texts, msg, msg_len);
        if (e) return e;
        for (int r = 0; r < n_readers && !e; r++)
            e = ask_reader(depths[r], &readers[r], &text, o->length, msg, msg_len);
        recall_free(&text);
        if (e) return e;
    }
    return OK;
}

/* ---- texts read apart ---- */
struct set {              /* of texts, with where they are read */
    struct reader reader; /* slot: the sequence asked; spare: for its questions */
    const struct recall_options *o;
    struct fact facts[MAX_TEXTS];
    int32_t *ids[MAX_TEXTS];
    int n;
    char *msg;
    size_t msg_len;
};

/* All facts, as of a slot whose own text is `own_text`. */
static enum err ask_all(struct set *s, int slot, int own_text, struct recalled *own,
                        struct recalled *others) {
    for (int i = 0; i < s->n; i++) {
        struct answer answer;
        enum err e = ask(&answer, &s->reader, slot, &s->facts[i], s->msg, s->msg_len);
        if (e) return e;
        recalled_add(i == own_text ? own : others, &answer);
    }
    return OK;
}

static enum err read_into(struct set *s, int slot, int text, bool go_on) {
    struct reader r = s->reader;
    const float *none;
    int skip = go_on && s->o->filler->bos >= 0;
    r.slot = slot;
    if (!go_on) model_slot_clear(r.model, slot);
    return reader_feed(&r, s->ids[text] + skip, s->o->length - skip, 0, &none, s->msg, s->msg_len);
}

/* Text `own` goes on with the memories of all others. */
static enum err ask_added(struct set *s, struct added *sums, int own, int slot) {
    struct model *model = s->reader.model;
    const void *srcs[MAX_TEXTS];
    int n = 0;
    for (int i = 0; i < s->n; i++)
        if (i != own) srcs[n++] = model_slot(model, i);
    model_slot_copy(model, slot, own);
    if (attention_state_add(model_attention(model), model_slot(model, slot), srcs, n))
        return err_set(
            s->msg, s->msg_len, ERR_ARG,
            "texts of %lld tokens are too short to add the memories of %d: with all their "
            "caches no key is linear",
            (long long)s->o->length, s->n);
    return ask_all(s, slot, own, &sums->own_added, &sums->others_added);
}

static enum err ask_set(struct set *s, struct added *sums) {
    struct attention *a = model_attention(s->reader.model);
    enum err e = OK;
    if (attention_linear_keys(a, -1, 0, s->o->length - 1) <= 0) /* with all places in use */
        return err_set(s->msg, s->msg_len, ERR_ARG,
                       "texts of %lld tokens are too short to add the memories of %d: with all "
                       "their caches no key is linear",
                       (long long)s->o->length, s->n);
    attention_set_cache_share(a, 1, s->n);
    for (int i = 0; i < s->n && !e; i++)
        e = read_into(s, i, i, false);
    for (int i = 0; i < s->n && !e; i++)
        e = ask_all(s, i, i, &sums->own_alone, &sums->others_alone);
    for (int i = 0; i < s->n && !e; i++)
        e = read_into(s, s->n, i, i > 0);
    if (!e) e = ask_all(s, s->n, s->n - 1, &sums->own_joined, &sums->others_joined);
    attention_set_cache_share(a, 1, 1);
    for (int i = 0; i < s->n && !e; i++)
        e = ask_added(s, sums, i, s->n);
    return e;
}

enum err added_measure(struct added *sums, struct model *model, const struct recall_options *o,
                       int n_texts, int set, int n_sets, char *msg, size_t msg_len) {
    const struct attention_config *c = &model_info(model)->attention;
    struct set s = {.reader = {.name = model_info(model)->name,
                               .model = model,
                               .spare = n_texts + 1,
                               .linear = true},
                    .o = o,
                    .n = n_texts,
                    .msg = msg,
                    .msg_len = msg_len};
    uint64_t random = chance_of(o, set, -n_texts);
    if (n_texts < 2 || n_texts > MAX_TEXTS || make_facts(s.facts, n_texts, o->tokenizer, random))
        return err_set(msg, msg_len, n_texts < 2 || n_texts > MAX_TEXTS ? ERR_ARG : ERR_NOMEM,
                       "memories of 2 to %d texts can be added, not of %d", MAX_TEXTS, n_texts);
    enum err e = OK;
    for (int i = 0; i < n_texts && !e; i++) {
        double share = (2 * (set * n_texts + i) + 1) / (2.0 * n_sets * n_texts);
        random = passkey_mix(random);
        e = make_text(&s.ids[i], &s.facts[i], &share, 1, 2 * c->window_size, o, random, msg,
                      msg_len);
    }
    if (!e) e = ask_set(&s, sums);
    for (int i = 0; i < n_texts; i++)
        free(s.ids[i]);
    free_facts(s.facts, n_texts);
    return e;
}
