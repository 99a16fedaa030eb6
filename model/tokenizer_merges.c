/* tokenizer_merges.c - which two tokens become which third, and in what order. */
#include "model/tokenizer_impl.h"

#include <assert.h>
#include <stdlib.h>

enum err merges_reserve(struct tokenizer *t, size_t n) {
    assert(!t->merges);
    if (n > SIZE_MAX / 64) return ERR_NOMEM;
    size_t size = table_size(n);
    t->merges = malloc(size * sizeof *t->merges);
    if (!t->merges) return ERR_NOMEM;
    for (size_t i = 0; i < size; i++)
        t->merges[i].left = -1;
    t->merge_mask = size - 1;
    return OK;
}

static size_t merge_slot(const struct tokenizer *t, int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9E3779B97F4A7C15;
    size_t i = (h >> 32) & t->merge_mask;
    while (t->merges[i].left >= 0 && (t->merges[i].left != left || t->merges[i].right != right))
        i = (i + 1) & t->merge_mask;
    return i;
}

static bool mergeable(const struct tokenizer *t, int32_t id) {
    return t->tokens[id].kind == TOKEN_TEXT || t->tokens[id].kind == TOKEN_ADDED;
}

void merges_add(struct tokenizer *t, int32_t left, int32_t right, int32_t result, uint32_t rank) {
    if (!mergeable(t, left) || !mergeable(t, right) || !mergeable(t, result)) return;
    t->merges[merge_slot(t, left, right)] = (struct merge){left, right, result, rank};
}

const struct merge *merges_find(const struct tokenizer *t, int32_t left, int32_t right) {
    if (t->merge_mask == 0) return NULL;
    const struct merge *m = &t->merges[merge_slot(t, left, right)];
    return m->left < 0 ? NULL : m;
}

/* ---- from scores ---- */

struct scored {
    double score;
    int32_t id;
};

static int higher_first(const void *a, const void *b) {
    const struct scored *x = a, *y = b;
    return x->score != y->score ? (x->score > y->score ? -1 : 1)
                                : (x->id > y->id) - (x->id < y->id);
}

/* SentencePiece looks up the joined text of two neighbours while it merges; finding all pairs first
 * gives the same merges.  Equal scores share a rank, as there the leftmost of equals goes first. */
enum err merges_from_scores(struct tokenizer *t, const double *scores) {
    enum { LONGEST = 512 }; /* bytes of a piece worth cutting in two: real ones have at most 48 */
    enum err e = ERR_NOMEM;
    struct scored *order = malloc(((size_t)t->n_tokens + 1) * sizeof *order);
    struct merge *found = NULL;
    size_t n = 0, n_found = 0, cap = 0;
    if (!order) return ERR_NOMEM;
    for (int32_t id = 0; id < t->n_tokens; id++)
        if (mergeable(t, id) && t->tokens[id].piece_len <= LONGEST)
            order[n++] = (struct scored){scores[id], id};
    qsort(order, n, sizeof *order, higher_first);

    uint32_t rank = 0;
    for (size_t i = 0; i < n; i++) {
        if (i > 0 && order[i].score != order[i - 1].score) rank++;
        const char *piece = token_piece(t, order[i].id);
        size_t len = t->tokens[order[i].id].piece_len;
        for (size_t cut = 1; cut < len; cut++) {
            int32_t left = vocab_find(t, piece, cut);
            if (left < 0) continue;
            int32_t right = vocab_find(t, piece + cut, len - cut);
            if (right < 0) continue;
            if (n_found == cap) {
                cap = cap * 2 + 1024;
                struct merge *more = realloc(found, cap * sizeof *more);
                if (!more) goto done;
                found = more;
            }
            found[n_found++] = (struct merge){left, right, order[i].id, rank};
        }
    }
    e = merges_reserve(t, n_found);
    for (size_t i = 0; i < n_found && e == OK; i++)
        merges_add(t, found[i].left, found[i].right, found[i].result, found[i].rank);
done:
    free(order);
    free(found);
    return e;
}
