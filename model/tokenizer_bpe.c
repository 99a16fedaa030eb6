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

static void sift_down(uint64_t *heap, size_t n, uint64_t key) { /* from the root, which is free */
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= key) break;
        heap[i] = heap[child];
    }
    heap[i] = key;
}

static void push(struct bpe_scratch *s, uint64_t key) {
    size_t i = s->n_heap++;
    for (; i > 0 && key < s->heap[(i - 1) / 2]; i = (i - 1) / 2)
        s->heap[i] = s->heap[(i - 1) / 2];
    s->heap[i] = key;
}

/* Finds out how symbol i merges with the next one, and puts it on the heap if it does. */
static void propose(const struct tokenizer *t, struct bpe_scratch *s, int32_t i) {
    struct symbol *left = &s->symbols[i];
    const struct merge *m =
        left->next < 0 ? NULL : merges_find(t, left->id, s->symbols[left->next].id);
    left->result = m ? m->result : -1;
    left->rank = m ? m->rank : 0;
    if (m) push(s, (uint64_t)m->rank << 32 | (uint32_t)i);
}

static void add_symbol(struct bpe_scratch *s, size_t *n, int32_t id) {
    s->symbols[*n] = (struct symbol){id, (int32_t)*n - 1, (int32_t)*n + 1, -1, 0};
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
        uint64_t *p = realloc(s->heap, 2 * n * sizeof *p);
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
        propose(t, s, (int32_t)i);
    while (s->n_heap) {
        uint64_t key = s->heap[0];
        int32_t i = (int32_t)(uint32_t)key;
        if (--s->n_heap) sift_down(s->heap, s->n_heap, s->heap[s->n_heap]);

        struct symbol *left = &s->symbols[i];
        if (left->result < 0 || left->rank != key >> 32) continue; /* stale */
        struct symbol *right = &s->symbols[left->next];
        left->id = left->result;
        left->next = right->next;
        right->result = -1;
        if (left->next >= 0) s->symbols[left->next].prev = i;
        if (left->prev >= 0) propose(t, s, left->prev);
        propose(t, s, i);
    }
    for (int32_t i = 0; i >= 0; i = s->symbols[i].next)
        if (!id_list_add(ids, s->symbols[i].id)) return false;
    return true;
}
