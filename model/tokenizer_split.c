/* tokenizer_split.c - cutting text into words by regular expressions, one after the other.
 *
 * Each split works on the pieces the one before it left, and a piece is a subject of its own:
 * nothing looks across its ends.  Bytes that are not UTF-8 are words by themselves. */
#include "model/tokenizer_impl.h"

#include <stdlib.h>
#include <string.h>

/* The patterns that the models' own tokenizer.json files hold (GPT-2's is inside ByteLevel). */
const char split_gpt2[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const char split_llama3[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const char split_qwen2[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
                           " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/* A match that backtracks more than this (PCRE2's own default) is given up, and the rest of its
 * piece stays one word.  The families' patterns never come near: each of their repeats is over one
 * character class. */
enum { MATCH_LIMIT = 10000000, JIT_STACK_MIN = 32 << 10, JIT_STACK_MAX = 1 << 20 };

/* PCRE2's \s takes U+180E for a space; Unicode since 6.3, and the engine that the files' patterns
 * were written for, do not.  Appends pattern with \s and \S spelled as the property they stand for.
 */
static bool spell_spaces(struct bytes *out, const char *pattern, size_t len) {
    for (size_t i = 0; i < len; i++) {
        bool escape = pattern[i] == '\\' && i + 1 < len;
        const char *property = !escape                 ? NULL
                               : pattern[i + 1] == 's' ? "\\p{White_Space}"
                               : pattern[i + 1] == 'S' ? "\\P{White_Space}"
                                                       : NULL;
        bool ok = property ? bytes_add(out, property, strlen(property))
                           : bytes_add(out, pattern + i, escape ? 2 : 1);
        if (!ok) return false;
        i += escape;
    }
    return true;
}

enum err pattern_compile(pcre2_code **out, const char *pattern, size_t len, bool literal,
                         const char *name, char *msg, size_t msg_len) {
    int error;
    PCRE2_SIZE at;
    uint32_t options = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP);
    struct bytes spelled = {0};
    if (!(literal ? bytes_add(&spelled, pattern, len) : spell_spaces(&spelled, pattern, len))) {
        free(spelled.data);
        return ERR_NOMEM;
    }
    pcre2_code *code =
        pcre2_compile((PCRE2_SPTR)spelled.data, spelled.len, options, &error, &at, NULL);
    free(spelled.data);
    if (!code && error == PCRE2_ERROR_HEAP_FAILED) return ERR_NOMEM;
    if (!code) {
        char why[128];
        pcre2_get_error_message(error, (PCRE2_UCHAR *)why, sizeof why);
        return err_set(msg, msg_len, ERR_FORMAT, "%s: the pattern \"%.*s\" is wrong: %s", name,
                       len < 200 ? (int)len : 200, pattern, why);
    }
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE); /* where there is no JIT the interpreter matches */
    *out = code;
    return OK;
}

enum err split_add(struct tokenizer *t, const char *pattern, size_t len, bool literal,
                   enum split_behavior behavior, bool invert, const char *name, char *msg,
                   size_t msg_len) {
    struct split *splits = realloc(t->splits, (size_t)(t->n_splits + 1) * sizeof *splits);
    if (!splits) return ERR_NOMEM;
    t->splits = splits;
    splits[t->n_splits] = (struct split){NULL, behavior, invert};
    enum err e =
        pattern_compile(&splits[t->n_splits].pattern, pattern, len, literal, name, msg, msg_len);
    if (e == OK) t->n_splits++;
    return e;
}

enum err split_scratch_new(struct split_scratch *s, const struct tokenizer *t) {
    *s = (struct split_scratch){0};
    if (t->n_splits == 0) return OK;
    s->context = pcre2_match_context_create(NULL);
    s->stack = pcre2_jit_stack_create(JIT_STACK_MIN, JIT_STACK_MAX, NULL); /* NULL: no JIT */
    s->matches = calloc((size_t)t->n_splits, sizeof *s->matches);
    if (!s->context || !s->matches) goto fail;
    pcre2_set_match_limit(s->context, MATCH_LIMIT);
    if (s->stack) pcre2_jit_stack_assign(s->context, NULL, s->stack);
    for (int i = 0; i < t->n_splits; i++) {
        s->matches[i] = pcre2_match_data_create(1, NULL);
        if (!s->matches[i]) goto fail;
    }
    return OK;
fail:
    split_scratch_free(s, t);
    return ERR_NOMEM;
}

void split_scratch_free(struct split_scratch *s, const struct tokenizer *t) {
    for (int i = 0; s->matches && i < t->n_splits; i++)
        pcre2_match_data_free(s->matches[i]);
    free(s->matches);
    pcre2_jit_stack_free(s->stack);
    pcre2_match_context_free(s->context);
    *s = (struct split_scratch){0};
}

bool matches_next(struct matches *m, size_t *begin, size_t *end) {
    const PCRE2_SIZE *match = pcre2_get_ovector_pointer(m->data);
    while (m->at <= m->len) {
        int found = pcre2_match(m->pattern, (PCRE2_SPTR)m->text, m->len, m->at, PCRE2_NO_UTF_CHECK,
                                m->data, m->context);
        /* No match, or given up.  \K can make a match begin behind its end or before the last
         * one's. */
        if (found < 0 || match[0] < m->at || match[1] < match[0]) break;
        if (match[0] == match[1] && match[1] == m->last) { /* an empty match right behind a match */
            size_t n;
            if (m->at == m->len) break;
            utf8_next(m->text + m->at, m->len - m->at, &n);
            m->at += n;
            continue;
        }
        *begin = match[0];
        *end = m->at = m->last = match[1];
        return true;
    }
    return false;
}

struct splitting {
    const struct tokenizer *t;
    struct split_scratch *scratch;
    split_emit *emit;
    void *arg;
};

static bool split_from(const struct splitting *w, int step, const char *text, size_t len);

/* What one split makes of a piece: gaps and matches in order, joined as its behaviour says.  A
 * match may be empty and still parts what stands around it. */
struct joined {
    size_t begin, end; /* not handed on yet */
    bool any, match;   /* match: its last part is one */
};

static bool add_part(const struct splitting *w, int step, const char *text, struct joined *held,
                     size_t begin, size_t end, bool match) {
    const struct split *split = &w->t->splits[step];
    match ^= split->invert;
    if (match && split->behavior == SPLIT_REMOVED) end = begin;
    bool join =
        held->any && ((split->behavior == SPLIT_CONTIGUOUS && match == held->match) ||
                      (split->behavior == SPLIT_MERGED_WITH_PREVIOUS && match && !held->match) ||
                      (split->behavior == SPLIT_MERGED_WITH_NEXT && !match && held->match));
    bool ok = join || split_from(w, step + 1, text + held->begin, held->end - held->begin);
    *held = (struct joined){join ? held->begin : begin, end, true, match};
    return ok;
}

/* text is valid UTF-8. */
static bool split_from(const struct splitting *w, int step, const char *text, size_t len) {
    if (len == 0) return true;
    if (step == w->t->n_splits) return w->emit(w->arg, text, len);
    struct matches m = {w->t->splits[step].pattern,
                        w->scratch->matches[step],
                        w->scratch->context,
                        text,
                        len,
                        0,
                        SIZE_MAX};
    struct joined held = {0};
    size_t done = 0, begin, end;
    while (matches_next(&m, &begin, &end)) {
        if (done < begin && !add_part(w, step, text, &held, done, begin, false)) return false;
        if (!add_part(w, step, text, &held, begin, end, true)) return false;
        done = end;
    }
    return (done == len || add_part(w, step, text, &held, done, len, false)) &&
           split_from(w, step + 1, text + held.begin, held.end - held.begin);
}

bool split_text(const struct tokenizer *t, struct split_scratch *s, const char *text, size_t len,
                split_emit *emit, void *arg) {
    if (t->n_splits == 0) return len == 0 || emit(arg, text, len);
    struct splitting w = {t, s, emit, arg};
    for (size_t i = 0; i < len;) {
        size_t n = utf8_valid_run(text + i, len - i);
        if (!split_from(&w, 0, text + i, n)) return false;
        i += n;
        if (i < len && !emit(arg, text + i++, 1)) return false;
    }
    return true;
}
