/* tokenizer_vocab.c - the vocabulary: ids, their written form, their bytes. */
#include "model/tokenizer_impl.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

bool bytes_reserve(struct bytes *b, size_t more) {
    if (more >= SIZE_MAX / 2 - b->len) return false;
    if (b->len + more + 1 <= b->cap) return true;
    size_t cap = b->cap + b->cap / 2 + 64;
    if (cap < b->len + more + 1) cap = b->len + more + 1;
    char *data = realloc(b->data, cap);
    if (!data) return false;
    b->data = data;
    b->cap = cap;
    return true;
}

bool bytes_add(struct bytes *b, const char *data, size_t len) {
    if (!bytes_reserve(b, len)) return false;
    if (len) memcpy(b->data + b->len, data, len);
    b->len += len;
    return true;
}

bool id_list_add(struct id_list *list, int32_t id) {
    if (list->n == list->cap) {
        size_t cap = list->cap * 2 + 16;
        int32_t *ids = realloc(list->ids, cap * sizeof *ids);
        if (!ids) return false;
        list->ids = ids;
        list->cap = cap;
    }
    list->ids[list->n++] = id;
    return true;
}

enum err tokenizer_new(struct tokenizer **out) {
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t) return ERR_NOMEM;
    t->unknown = t->bos = t->eos = -1;
    memset(t->byte_ids, -1, sizeof t->byte_ids);
    memset(t->char_ids, -1, sizeof t->char_ids);
    *out = t;
    return OK;
}

/* ---- texts to ids ---- */

static size_t hash_text(const char *text,
                        size_t len) { /* FNV-1a, finished so that low bits depend on all */
    uint64_t h = 0xcbf29ce484222325;
    for (size_t i = 0; i < len; i++)
        h = (h ^ (unsigned char)text[i]) * 0x100000001b3;
    return h ^ h >> 32;
}

static const char *token_text(const struct tokenizer *t, const struct token *token, bool by_bytes,
                              size_t *len) {
    *len = by_bytes ? token->bytes_len : token->piece_len;
    return t->text.data + (by_bytes ? token->bytes : token->piece);
}

/* The slot of this text, or the free slot where it belongs. */
static size_t map_slot(const struct tokenizer *t, const struct id_map *map, bool by_bytes,
                       const char *text, size_t len) {
    size_t i = hash_text(text, len) & map->mask;
    for (; map->slots[i] >= 0; i = (i + 1) & map->mask) {
        size_t n;
        const char *other = token_text(t, &t->tokens[map->slots[i]], by_bytes, &n);
        if (n == len && memcmp(other, text, len) == 0) break;
    }
    return i;
}

static int32_t map_find(const struct tokenizer *t, const struct id_map *map, bool by_bytes,
                        const char *text, size_t len) {
    return map->mask ? map->slots[map_slot(t, map, by_bytes, text, len)] : -1;
}

size_t table_size(size_t n) {
    size_t size = 16;
    while (size < 2 * n)
        size *= 2;
    return size;
}

static bool map_make(const struct tokenizer *t, struct id_map *map, bool by_bytes) {
    size_t size = table_size((size_t)t->n_tokens);
    int32_t *slots = malloc(size * sizeof *slots);
    if (!slots) return false;
    free(map->slots);
    memset(slots, -1, size * sizeof *slots);
    *map = (struct id_map){slots, size - 1};
    for (int32_t id = 0; id < t->n_tokens; id++) {
        const struct token *token = &t->tokens[id];
        if (token->kind == TOKEN_NONE || (by_bytes && token->kind != TOKEN_TEXT)) continue;
        size_t len;
        const char *text = token_text(t, token, by_bytes, &len);
        size_t slot = map_slot(t, map, by_bytes, text, len);
        if (slots[slot] < 0) slots[slot] = id; /* of two alike the first stands */
    }
    return true;
}

bool vocab_index(struct tokenizer *t) {
    return map_make(t, &t->by_piece, false);
}

int32_t vocab_find(const struct tokenizer *t, const char *piece, size_t len) {
    return map_find(t, &t->by_piece, false, piece, len);
}

int32_t vocab_find_bytes(const struct tokenizer *t, const char *bytes, size_t len) {
    return map_find(t, &t->by_bytes, true, bytes, len);
}

bool vocab_add(struct tokenizer *t, int32_t id, const char *piece, size_t len,
               enum token_kind kind) {
    assert(id >= 0 && id <= MAX_TOKEN_ID);
    if (len > UINT32_MAX) return false;
    if (id >= t->tokens_cap) {
        int cap = t->tokens_cap + t->tokens_cap / 2;
        if (cap <= id) cap = id + 1 < 256 ? 256 : id + 1;
        struct token *tokens = realloc(t->tokens, (size_t)cap * sizeof *tokens);
        if (!tokens) return false;
        memset(tokens + t->tokens_cap, 0, (size_t)(cap - t->tokens_cap) * sizeof *tokens);
        t->tokens = tokens;
        t->tokens_cap = cap;
    }
    struct token *token = &t->tokens[id];
    token->kind = (uint8_t)kind;
    token->piece = t->text.len;
    token->piece_len = (uint32_t)len;
    if (!bytes_add(&t->text, piece, len) || !bytes_add(&t->text, "", 1)) return false;
    if (id >= t->n_tokens) t->n_tokens = id + 1;
    return true;
}

/* ---- bytes of tokens ---- */

/* GPT-2's byte alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes, in
 * order, for U+0100 and on. */
static int alphabet_character(int byte) {
    static const int gaps[3][2] = {{0x00, 0x21}, {0x7F, 0xA1}, {0xAD, 0xAE}}; /* [first, past] */
    int moved = 0;
    for (int g = 0; g < 3; g++) {
        if (byte >= gaps[g][0] && byte < gaps[g][1]) return 0x100 + moved + byte - gaps[g][0];
        moved += gaps[g][1] - gaps[g][0];
    }
    return byte;
}

static size_t alphabet_utf8(int byte, char out[2]) {
    int c = alphabet_character(byte);
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    out[0] = (char)(0xC0 | c >> 6);
    out[1] = (char)(0x80 | (c & 0x3F));
    return 2;
}

/* Appends the bytes that piece spells in the alphabet; a piece not written in it is its own bytes.
 */
static bool add_alphabet_bytes(struct bytes *text, size_t piece, size_t len,
                               const unsigned char byte_of[0x144]) {
    if (!bytes_reserve(text, len)) return false;
    const unsigned char *p = (const unsigned char *)text->data + piece;
    size_t start = text->len;
    for (size_t i = 0; i < len; i++) {
        int c = p[i];
        if (c >= 0xC0 && c < 0xE0 && i + 1 < len) c = (c & 0x1F) << 6 | (p[++i] & 0x3F);
        if (c >= 0x144 || alphabet_character(byte_of[c]) != c) {
            text->len = start;
            memcpy(text->data + start, p, len);
            text->len += len;
            return true;
        }
        text->data[text->len++] = (char)byte_of[c];
    }
    return true;
}

static int hex_digit(char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static int byte_of_piece(const char *piece, size_t len) { /* <0xNN>, or -1 */
    if (len != 6 || memcmp(piece, "<0x", 3) != 0 || piece[5] != '>') return -1;
    int high = hex_digit(piece[3]), low = hex_digit(piece[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

static bool add_spaced_bytes(struct bytes *text, size_t piece, size_t len) {
    if (!bytes_reserve(text, len)) return false;
    const char *p = text->data + piece;
    for (size_t i = 0; i < len;) {
        bool mark = len - i >= 3 && memcmp(p + i, "\xE2\x96\x81", 3) == 0;
        text->data[text->len++] = mark ? ' ' : p[i];
        i += mark ? 3 : 1;
    }
    return true;
}

static bool make_bytes(struct tokenizer *t, struct token *token,
                       const unsigned char byte_of[0x144]) {
    size_t start = t->text.len;
    bool ok = true;
    bool added = token->kind == TOKEN_SPECIAL || (token->kind == TOKEN_ADDED && !token->normalized);
    if (token->kind == TOKEN_BYTE) {
        char byte = (char)byte_of_piece(t->text.data + token->piece, token->piece_len);
        ok = bytes_add(&t->text, &byte, 1);
    } else if (token->kind == TOKEN_TEXT && t->byte_level) {
        ok = add_alphabet_bytes(&t->text, token->piece, token->piece_len, byte_of);
    } else if (t->space_mark && !added) {
        ok = add_spaced_bytes(&t->text, token->piece, token->piece_len);
    } else {
        token->bytes = token->piece;
        token->bytes_len = token->piece_len;
        return true;
    }
    token->bytes = start;
    token->bytes_len = (uint32_t)(t->text.len - start);
    return ok;
}

/* ---- added tokens ---- */

static int compare_added(const void *a, const void *b) {
    const struct added *x = a, *y = b;
    int order = memcmp(x->text, y->text, x->len < y->len ? x->len : y->len);
    if (order) return order;
    if (x->len != y->len) return x->len < y->len ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

static enum err make_added(struct tokenizer *t, struct added_set *set, bool normalized) {
    int n = 0;
    for (int32_t id = 0; id < t->n_tokens; id++)
        n += t->tokens[id].kind >= TOKEN_ADDED;
    set->items = calloc((size_t)n + 1, sizeof *set->items);
    if (!set->items) return ERR_NOMEM;
    struct bytes buffers[2] = {0};
    enum err e = OK;
    for (int32_t id = 0; id < t->n_tokens && e == OK; id++) {
        const struct token *token = &t->tokens[id];
        /* Special tokens are looked for in the text as it came whatever their flag, because that is
         * where the caller's ranges are. */
        bool behind = token->kind == TOKEN_ADDED && token->normalized;
        if (token->kind < TOKEN_ADDED || behind != normalized) continue;
        const char *text = t->text.data + token->piece;
        size_t len = token->piece_len;
        if (behind) e = edit_text(&t->normalizer, text, len, true, buffers, &text, &len);
        if (e != OK || len == 0) continue;
        struct added *item = &set->items[set->n];
        item->text = malloc(len);
        if (!item->text) {
            e = ERR_NOMEM;
            continue;
        }
        memcpy(item->text, text, len);
        item->len = len;
        item->id = id;
        set->n++;
    }
    free(buffers[0].data);
    free(buffers[1].data);
    if (e != OK) return e;
    qsort(set->items, (size_t)set->n, sizeof *set->items, compare_added);
    for (int b = 0, i = 0; b <= 256; b++) {
        while (i < set->n && (unsigned char)set->items[i].text[0] < b)
            i++;
        set->first[b] = i;
    }
    return OK;
}

enum err vocab_finish(struct tokenizer *t) {
    unsigned char byte_of[0x144] = {0}; /* alphabet_character's inverse */
    for (int b = 0; b < 256; b++)
        byte_of[alphabet_character(b)] = (unsigned char)b;

    if (t->bos >= 0 && t->tokens[t->bos].kind != TOKEN_NONE) t->tokens[t->bos].kind = TOKEN_SPECIAL;
    if (t->eos >= 0 && t->tokens[t->eos].kind != TOKEN_NONE) t->tokens[t->eos].kind = TOKEN_SPECIAL;
    for (int b = 0; b < 256 && t->byte_level; b++) {
        char utf8[2];
        int32_t id = vocab_find(t, utf8, alphabet_utf8(b, utf8));
        t->byte_ids[b] = id;
        /* Some files call "!" their padding; without it a text with "!" could not be encoded. */
        if (id >= 0 && t->tokens[id].kind == TOKEN_SPECIAL) t->tokens[id].kind = TOKEN_TEXT;
    }
    for (int c = 0; c < 128 && !t->byte_level; c++) {
        char text = (char)c;
        t->char_ids[c] = vocab_find(t, &text, 1);
    }
    for (int32_t id = 0; id < t->n_tokens; id++) {
        struct token *token = &t->tokens[id];
        int byte = byte_of_piece(t->text.data + token->piece, token->piece_len);
        if (t->byte_fallback && token->kind == TOKEN_TEXT && byte >= 0) token->kind = TOKEN_BYTE;
        if (token->kind == TOKEN_BYTE && byte < 0) token->kind = TOKEN_TEXT;
        if (token->kind == TOKEN_BYTE) t->byte_ids[byte] = id;
        if (!make_bytes(t, token, byte_of)) return ERR_NOMEM;
    }
    if (t->ignore_merges && !map_make(t, &t->by_bytes, true)) return ERR_NOMEM;
    enum err e = make_added(t, &t->added, false);
    return e == OK ? make_added(t, &t->added_normalized, true) : e;
}

/* ---- public ---- */

int tokenizer_vocab_size(const struct tokenizer *t) {
    return t->n_tokens;
}
int32_t tokenizer_bos(const struct tokenizer *t) {
    return t->bos;
}
int32_t tokenizer_eos(const struct tokenizer *t) {
    return t->eos;
}
bool tokenizer_add_bos(const struct tokenizer *t) {
    return t->add_bos;
}
bool tokenizer_add_eos(const struct tokenizer *t) {
    return t->add_eos;
}
const char *tokenizer_chat_template(const struct tokenizer *t) {
    return t->chat_template;
}

static const struct token *token_at(const struct tokenizer *t, int32_t id) {
    bool known = id >= 0 && id < t->n_tokens && t->tokens[id].kind != TOKEN_NONE;
    return known ? &t->tokens[id] : NULL;
}

const char *token_bytes(const struct tokenizer *t, int32_t id, bool with_special, size_t *len) {
    const struct token *token = token_at(t, id);
    *len = 0;
    if (!token || (token->kind == TOKEN_SPECIAL && !with_special)) return "";
    *len = token->bytes_len;
    return t->text.data + token->bytes;
}

bool token_is_special(const struct tokenizer *t, int32_t id) {
    const struct token *token = token_at(t, id);
    return token && token->kind == TOKEN_SPECIAL;
}

const char *token_piece(const struct tokenizer *t, int32_t id) {
    const struct token *token = token_at(t, id);
    return token ? t->text.data + token->piece : "";
}

int32_t token_lookup(const struct tokenizer *t, const char *piece) {
    return vocab_find(t, piece, strlen(piece));
}
