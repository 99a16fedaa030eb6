/* tokenizer_bpe.c - byte-pair merging of one word: always the pair of lowest rank, the leftmost of
 * equals.
 *
 * Symbols are a linked list and candidate merges a binary heap.  A candidate is not withdrawn when
 * one of its symbols merges elsewhere: it is found stale when it comes up.  At most three
 * candidates are made per symbol, so a word of n symbols takes O(n log n), however long it is. */
#include "model/tokenizer_impl.h"

#include <stdlib.h>
#include <string.h>

void bpe_scratch_free(struct bpe_scratch *s) {
    free(s->symbols);
    free(s->heap);
}

static bool before(const struct candidate *a, const struct candidate *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->left < b->left;
}

static void sift_down(struct candidate *heap, size_t n, size_t i) {
    struct candidate moving = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(&heap[child + 1], &heap[child])) child++;
        if (!before(&heap[child], &moving)) break;
        heap[i] = heap[child];
    }
    heap[i] = moving;
}

static void push(struct bpe_scratch *s, struct candidate c) {
    size_t i = s->n_heap++;
    for (; i > 0 && before(&c, &s->heap[(i - 1) / 2]); i = (i - 1) / 2)
        s->heap[i] = s->heap[(i - 1) / 2];
    s->heap[i] = c;
}

/* The candidate at symbol left, if it and the next one merge. */
static bool candidate_at(const struct tokenizer *t, const struct bpe_scratch *s, int32_t left,
                         struct candidate *c) {
    int32_t right = s->symbols[left].next;
    if (right < 0) return false;
    const struct merge *m = merges_find(t, s->symbols[left].id, s->symbols[right].id);
    if (!m) return false;
    *c = (struct candidate){m->rank, (uint32_t)left, m->left, m->right, m->result};
    return true;
}

static void add_symbol(struct bpe_scratch *s, size_t *n, int32_t id) {
    s->symbols[*n] = (struct symbol){id, (int32_t)*n - 1, (int32_t)*n + 1};
    ++*n;
}

/* One symbol per character; those outside the vocabulary become their bytes, or the unknown token.
 */
static size_t symbols_of_characters(const struct tokenizer *t, struct bpe_scratch *s,
                                    const char *word, size_t len) {
    size_t n = 0;
    bool was_unknown = false;
    for (size_t i = 0, size; i < len; i += size) {
        bool valid = utf8_next(word + i, len - i, &size) == UTF8_VALID;
        if (!valid) size = 1;
        int32_t id = -1;
        if (valid) id = size == 1 ? t->char_ids[(int)word[i]] : vocab_find(t, word + i, size);
        if (id >= 0 && t->tokens[id].kind != TOKEN_TEXT && t->tokens[id].kind != TOKEN_ADDED)
            id = -1;
        bool bytes = id < 0 && t->byte_fallback;
        for (size_t b = 0; bytes && b < size; b++)
            bytes = t->byte_ids[(unsigned char)word[i + b]] >= 0;
        bool unknown = id < 0 && !bytes;
        if (bytes) {
            for (size_t b = 0; b < size; b++)
                add_symbol(s, &n, t->byte_ids[(unsigned char)word[i + b]]);
        } else if (!unknown) {
            add_symbol(s, &n, id);
        } else if (t->unknown >= 0 && !(was_unknown && t->fuse_unknown)) {
            add_symbol(s, &n, t->unknown);
        }
        was_unknown = unknown;
    }
    return n;
}

static size_t symbols_of_bytes(const struct tokenizer *t, struct bpe_scratch *s, const char *word,
                               size_t len) {
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        int32_t id = t->byte_ids[(unsigned char)word[i]];
        if (id < 0) id = t->unknown;
        if (id >= 0) add_symbol(s, &n, id);
    }
    return n;
}

static bool reserve(struct bpe_scratch *s, size_t n) {
    if (n > s->symbols_cap) {
        struct symbol *p = realloc(s->symbols, n * sizeof *p);
        if (!p) return false;
        s->symbols = p;
        s->symbols_cap = n;
    }
    /* A merge takes one candidate off and puts at most two on, and there are fewer than n of them.
     */
    if (2 * n > s->heap_cap) {
        struct candidate *p = realloc(s->heap, 2 * n * sizeof *p);
        if (!p) return false;
        s->heap = p;
        s->heap_cap = 2 * n;
    }
    return true;
}

bool bpe_word(const struct tokenizer *t, struct bpe_scratch *s, const char *word, size_t len,
              struct id_list *ids) {
    if (len == 0) return true;
    if (len > INT32_MAX) return false; /* symbols are counted in int32 */
    if (t->ignore_merges) {
        int32_t id = vocab_find_bytes(t, word, len);
        if (id >= 0) return id_list_add(ids, id);
    }
    if (!reserve(s, len)) return false;
    size_t n =
        t->byte_level ? symbols_of_bytes(t, s, word, len) : symbols_of_characters(t, s, word, len);
    if (n == 0) return true;
    s->symbols[n - 1].next = -1;

    s->n_heap = 0;
    for (size_t i = 0; i + 1 < n; i++)
        if (candidate_at(t, s, (int32_t)i, &s->heap[s->n_heap])) s->n_heap++;
    for (size_t i = s->n_heap / 2; i-- > 0;)
        sift_down(s->heap, s->n_heap, i);

    while (s->n_heap) {
        struct candidate c = s->heap[0];
        s->heap[0] = s->heap[--s->n_heap];
        if (s->n_heap) sift_down(s->heap, s->n_heap, 0);

        struct symbol *left = &s->symbols[c.left];
        if (left->id != c.left_id || left->next < 0) continue; /* a symbol merged away has id -1 */
        struct symbol *right = &s->symbols[left->next];
        if (right->id != c.right_id) continue;
        left->id = c.result;
        right->id = -1;
        left->next = right->next;
        if (right->next >= 0) s->symbols[right->next].prev = (int32_t)c.left;
        if (left->prev >= 0 && candidate_at(t, s, left->prev, &c)) push(s, c);
        if (candidate_at(t, s, (int32_t)(left - s->symbols), &c)) push(s, c);
    }
    for (int32_t i = 0; i >= 0; i = s->symbols[i].next)
        if (!id_list_add(ids, s->symbols[i].id)) return false;
    return true;
}
