/* tokenizer.c - the way of a text through the tokenizer's stages, and back. */
#include "model/tokenizer_impl.h"

#include <stdlib.h>
#include <string.h>

void tokenizer_free(struct tokenizer *t) {
    if (!t) return;
    free(t->tokens);
    free(t->text.data);
    free(t->by_piece.slots);
    free(t->by_bytes.slots);
    free(t->merges);
    edit_list_free(&t->normalizer);
    edit_list_free(&t->pre_edits);
    for (int i = 0; i < t->n_splits; i++)
        pcre2_code_free(t->splits[i].pattern);
    free(t->splits);
    struct added_set *sets[] = {&t->added, &t->added_normalized};
    for (int s = 0; s < 2; s++) {
        for (int i = 0; i < sets[s]->n; i++)
            free(sets[s]->items[i].text);
        free(sets[s]->items);
    }
    free(t->chat_template);
    free(t);
}

/* ---- added tokens ---- */

struct call { /* one tokenisation's scratch and result */
    const struct tokenizer *t;
    struct split_scratch split;
    struct bpe_scratch bpe;
    struct bytes normalized[2], edited[2];
    struct id_list ids;
};

/* Where special tokens may be found: text positions only grow, so the ranges are walked once. */
struct allowed {
    const struct text_range *ranges;
    size_t n, i;
};

static size_t allowed_end(struct allowed *a,
                          size_t pos) { /* past the range that holds pos; 0: none does */
    while (a->i < a->n && a->ranges[a->i].end <= pos)
        a->i++;
    return a->i < a->n && a->ranges[a->i].begin <= pos ? a->ranges[a->i].end : 0;
}

/* The longest added token that text begins with; special ones only up to special_len bytes; NULL:
 * none. The items that share the bytes read so far are neighbours: each byte narrows them down. */
static const struct added *longest_added(const struct tokenizer *t, const struct added_set *set,
                                         const char *text, size_t len, size_t special_len) {
    int low = set->first[(unsigned char)text[0]], high = set->first[(unsigned char)text[0] + 1];
    const struct added *best = NULL;
    for (size_t depth = 1; low < high; depth++) {
        const struct added *item = &set->items[low];
        if (item->len == depth) { /* the shortest of those left; texts alike differ in id */
            bool special = t->tokens[item->id].kind == TOKEN_SPECIAL;
            if (!special || depth <= special_len) best = item;
            while (low < high && set->items[low].len == depth)
                low++;
        }
        if (depth == len) break;
        unsigned char next = (unsigned char)text[depth];
        int from = low, to = high;
        while (from < to) { /* first with a byte >= next */
            int middle = from + (to - from) / 2;
            if ((unsigned char)set->items[middle].text[depth] < next)
                from = middle + 1;
            else
                to = middle;
        }
        low = from;
        to = high;
        while (from < to) { /* first with a byte > next */
            int middle = from + (to - from) / 2;
            if ((unsigned char)set->items[middle].text[depth] <= next)
                from = middle + 1;
            else
                to = middle;
        }
        high = from;
    }
    return best;
}

typedef enum err text_between(struct call *c, const char *text, size_t len, bool first);

/* Adds the ids of the added tokens in text, leftmost and longest first, and hands on what lies
 * between. */
static enum err cut_added(struct call *c, const struct added_set *set, const char *text, size_t len,
                          bool first, struct allowed allowed, text_between *between) {
    size_t done = 0;
    enum err e = OK;
    for (size_t pos = 0; set->n > 0 && pos < len;) {
        size_t special_end = allowed_end(&allowed, pos);
        const struct added *found = longest_added(c->t, set, text + pos, len - pos,
                                                  special_end > pos ? special_end - pos : 0);
        if (!found) {
            pos++;
            continue;
        }
        const struct token *token = &c->t->tokens[found->id];
        size_t begin = pos, end = pos + found->len, n;
        if (token->take_left_space)
            while ((n = utf8_space_before(text + done, begin - done)))
                begin -= n;
        if (token->take_right_space)
            while ((n = utf8_space_at(text + end, len - end)))
                end += n;
        e = between(c, text + done, begin - done, first && done == 0);
        if (e != OK) return e;
        if (!id_list_add(&c->ids, found->id)) return ERR_NOMEM;
        pos = done = end;
    }
    return between(c, text + done, len - done, first && done == 0);
}

/* ---- what lies between ---- */

static bool emit_word(void *arg, const char *word, size_t len) {
    struct call *c = arg;
    return bpe_word(c->t, &c->bpe, word, len, &c->ids);
}

static enum err tokenize_words(struct call *c, const char *text, size_t len, bool first) {
    if (len == 0) return OK;
    enum err e = edit_text(&c->t->pre_edits, text, len, first, c->edited, &text, &len);
    if (e != OK) return e;
    return split_text(c->t, &c->split, text, len, emit_word, c) ? OK : ERR_NOMEM;
}

static enum err tokenize_raw(struct call *c, const char *text, size_t len, bool first) {
    if (len == 0) return OK;
    enum err e = edit_text(&c->t->normalizer, text, len, first, c->normalized, &text, &len);
    if (e != OK) return e;
    return cut_added(c, &c->t->added_normalized, text, len, first, (struct allowed){0},
                     tokenize_words);
}

/* ---- public ---- */

enum err tokenize_ranges(const struct tokenizer *t, const char *text, size_t len,
                         const struct text_range *special, size_t n_special, bool add_bos,
                         bool add_eos, int32_t **ids, size_t *n_ids) {
    struct call c = {.t = t};
    enum err e = split_scratch_new(&c.split, t);
    if (e == OK && add_bos && t->bos >= 0 && !id_list_add(&c.ids, t->bos)) e = ERR_NOMEM;
    if (e == OK) {
        struct allowed allowed = {special, n_special, 0};
        e = cut_added(&c, &t->added, text, len, true, allowed, tokenize_raw);
    }
    if (e == OK && add_eos && t->eos >= 0 && !id_list_add(&c.ids, t->eos)) e = ERR_NOMEM;
    if (e == OK && !c.ids.ids) { /* no ids: still a pointer to free */
        c.ids.ids = malloc(sizeof *c.ids.ids);
        if (!c.ids.ids) e = ERR_NOMEM;
    }
    split_scratch_free(&c.split, t);
    bpe_scratch_free(&c.bpe);
    for (int i = 0; i < 2; i++) {
        free(c.normalized[i].data);
        free(c.edited[i].data);
    }
    if (e != OK) {
        free(c.ids.ids);
        return e;
    }
    *ids = c.ids.ids;
    *n_ids = c.ids.n;
    return OK;
}

enum err tokenize(const struct tokenizer *t, const char *text, size_t len, int flags, int32_t **ids,
                  size_t *n_ids) {
    struct text_range all = {0, len};
    bool ends = flags & TOKENIZE_ADD_BOS_EOS;
    return tokenize_ranges(t, text, len, &all, flags & TOKENIZE_SPECIAL ? 1 : 0, ends && t->add_bos,
                           ends && t->add_eos, ids, n_ids);
}

enum err detokenize(const struct tokenizer *t, const int32_t *ids, size_t n_ids, bool with_special,
                    bool strip_leading_space, char **text, size_t *len) {
    struct bytes b = {0};
    bool ok = bytes_reserve(&b, 0);
    for (size_t i = 0; ok && i < n_ids; i++) {
        size_t n;
        const char *bytes = token_bytes(t, ids[i], with_special, &n);
        ok = bytes_add(&b, bytes, n);
    }
    if (!ok) {
        free(b.data);
        return ERR_NOMEM;
    }
    if (strip_leading_space && t->prefix_space && b.len && b.data[0] == ' ')
        memmove(b.data, b.data + 1, --b.len);
    b.data[b.len] = 0;
    *text = b.data;
    *len = b.len;
    return OK;
}
