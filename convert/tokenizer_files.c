/* tokenizer_files.c - tokenizer.json and tokenizer_config.json from GGUF's metadata. */
#include "convert/tokenizer_files.h"

#include "convert/files.h"
#include "model/tokenizer_impl.h"

#include <stdlib.h>
#include <string.h>

#define KEY "tokenizer.ggml."
#define MARK "\xE2\x96\x81" /* U+2581, SentencePiece's space */

struct writer {
    const struct gguf *g;
    struct tokenizer *t;            /* as the engine reads it; owned */
    const struct gguf_split *split; /* NULL: SentencePiece */
    struct merge *merges;           /* of SentencePiece, as they are written; owned */
    size_t n_merges;
    bool failed; /* a node could not be made */
    char *msg;
    size_t msg_len;
};

#define FAULT(w, ...) err_set((w)->msg, (w)->msg_len, ERR_FORMAT, __VA_ARGS__)

/* ---- nodes; what runs out of memory is noticed once, at the end ---- */
static cJSON *kept(struct writer *w, cJSON *node) {
    w->failed |= node == NULL;
    return node;
}
static void add_text(struct writer *w, cJSON *o, const char *key, const char *text) {
    kept(w, cJSON_AddStringToObject(o, key, text));
}
static void add_bool(struct writer *w, cJSON *o, const char *key, bool x) {
    kept(w, cJSON_AddBoolToObject(o, key, x));
}
static void add_null(struct writer *w, cJSON *o, const char *key) {
    kept(w, cJSON_AddNullToObject(o, key));
}
static cJSON *add_object(struct writer *w, cJSON *o, const char *key) {
    return kept(w, cJSON_AddObjectToObject(o, key));
}
static cJSON *add_array(struct writer *w, cJSON *o, const char *key) {
    return kept(w, cJSON_AddArrayToObject(o, key));
}
static void append(struct writer *w, cJSON *list, cJSON *node) {
    kept(w, node);
    if (!cJSON_AddItemToArray(list, node)) cJSON_Delete(node);
}
static cJSON *typed(struct writer *w, const char *type) {
    cJSON *o = kept(w, cJSON_CreateObject());
    add_text(w, o, "type", type);
    return o;
}
static cJSON *replace(struct writer *w, const char *from, const char *to) {
    cJSON *o = typed(w, "Replace");
    add_text(w, add_object(w, o, "pattern"), "String", from);
    add_text(w, o, "content", to);
    return o;
}
static void set(struct writer *w, cJSON *o, const char *key, cJSON *node) {
    if (!cJSON_AddItemToObject(o, key, node)) {
        cJSON_Delete(node);
        w->failed = true;
    }
}

/* ---- vocabulary ---- */
static enum err check_pieces(struct writer *w) {
    const struct tokenizer *t = w->t;
    for (int32_t id = 0; id < t->n_tokens; id++) {
        const char *piece = token_piece(t, id);
        size_t len = t->tokens[id].piece_len;
        int32_t first = vocab_find(t, piece, len);
        if (utf8_valid_run(piece, len) != len || memchr(piece, 0, len))
            return FAULT(w, "token %d is no UTF-8 text, so tokenizer.json cannot hold it", id);
        if (first != id)
            return FAULT(w, "tokens %d and %d are both \"%.80s\", which tokenizer.json cannot hold",
                         first, id, piece);
    }
    return OK;
}

static void add_vocab(struct writer *w, cJSON *model) {
    cJSON *vocab = add_object(w, model, "vocab");
    for (int32_t id = 0; id < w->t->n_tokens; id++)
        kept(w, cJSON_AddNumberToObject(vocab, token_piece(w->t, id), id));
}

static void add_added_tokens(struct writer *w, cJSON *root) {
    cJSON *list = add_array(w, root, "added_tokens");
    for (int32_t id = 0; id < w->t->n_tokens; id++) {
        const struct token *token = &w->t->tokens[id];
        if (token->kind != TOKEN_ADDED && token->kind != TOKEN_SPECIAL) continue;
        cJSON *o = kept(w, cJSON_CreateObject());
        kept(w, cJSON_AddNumberToObject(o, "id", id));
        add_text(w, o, "content", token_piece(w->t, id));
        add_bool(w, o, "single_word", false);
        add_bool(w, o, "lstrip", token->take_left_space);
        add_bool(w, o, "rstrip", token->take_right_space);
        add_bool(w, o, "normalized", token->normalized);
        add_bool(w, o, "special", token->kind == TOKEN_SPECIAL);
        append(w, list, o);
    }
}

/* ---- merges ---- */
static const struct tokenizer *sorted; /* qsort has no argument of its own; one merge at a time */

static int by_rank(const void *a, const void *b) {
    const struct merge *x = a, *y = b;
    if (x->rank != y->rank) return x->rank < y->rank ? -1 : 1;
    if (x->result != y->result) return x->result < y->result ? -1 : 1;
    uint32_t m = sorted->tokens[x->left].piece_len, n = sorted->tokens[y->left].piece_len;
    return m != n ? (m > n ? -1 : 1) : 0;
}

/* As pairs, since a piece may hold a space. */
static enum err add_scored_merges(struct writer *w, cJSON *list) {
    const struct tokenizer *t = w->t;
    size_t n = 0, size = t->merges ? t->merge_mask + 1 : 0;
    struct merge *all = malloc((size + 1) * sizeof *all);
    if (!all) return ERR_NOMEM;
    for (size_t i = 0; i < size; i++)
        if (t->merges[i].left >= 0) all[n++] = t->merges[i];
    sorted = t;
    qsort(all, n, sizeof *all, by_rank);
    for (size_t i = 0; i < n; i++) {
        const struct merge *m = &all[i];
        cJSON *pair = kept(w, cJSON_CreateArray());
        append(w, pair, cJSON_CreateString(token_piece(t, m->left)));
        append(w, pair, cJSON_CreateString(token_piece(t, m->right)));
        append(w, list, pair);
    }
    w->merges = all;
    w->n_merges = n;
    return OK;
}

static enum err add_listed_merges(struct writer *w, cJSON *list) {
    size_t n = gguf_array_size(w->g, KEY "merges"), room = 0;
    char *text = NULL;
    for (size_t i = 0; i < n; i++) {
        size_t len;
        const char *merge = gguf_array_string(w->g, KEY "merges", i, &len);
        if (len + 1 > room) {
            char *more = realloc(text, room = 2 * len + 64);
            if (!more) {
                free(text);
                return ERR_NOMEM;
            }
            text = more;
        }
        memcpy(text, merge, len);
        text[len] = 0;
        append(w, list, cJSON_CreateString(text));
    }
    free(text);
    return OK;
}

static enum err add_model(struct writer *w, cJSON *root) {
    const struct tokenizer *t = w->t;
    cJSON *model = typed(w, "BPE");
    set(w, root, "model", model);
    add_null(w, model, "dropout");
    if (t->unknown >= 0)
        add_text(w, model, "unk_token", token_piece(t, t->unknown));
    else
        add_null(w, model, "unk_token");
    add_null(w, model, "continuing_subword_prefix");
    add_null(w, model, "end_of_word_suffix");
    add_bool(w, model, "fuse_unk", t->fuse_unknown);
    add_bool(w, model, "byte_fallback", t->byte_fallback);
    add_bool(w, model, "ignore_merges", t->ignore_merges);
    add_vocab(w, model);
    cJSON *merges = add_array(w, model, "merges");
    return w->split ? add_listed_merges(w, merges) : add_scored_merges(w, merges);
}

/* ---- how text is cut ---- */
static cJSON *byte_level(struct writer *w, bool use_regex) {
    cJSON *o = typed(w, "ByteLevel");
    add_bool(w, o, "add_prefix_space", false);
    add_bool(w, o, "trim_offsets", true);
    add_bool(w, o, "use_regex", use_regex);
    return o;
}

static cJSON *pre_tokenizer(struct writer *w) {
    cJSON *o = typed(w, "Sequence"), *list = add_array(w, o, "pretokenizers");
    if (w->split->digits) {
        cJSON *digits = typed(w, "Digits");
        add_bool(w, digits, "individual_digits", true);
        append(w, list, digits);
    }
    bool gpt2 = w->split->pattern == split_gpt2; /* which ByteLevel knows by itself */
    if (!gpt2) {
        cJSON *split = typed(w, "Split");
        add_text(w, add_object(w, split, "pattern"), "Regex", w->split->pattern);
        add_text(w, split, "behavior", "Isolated");
        add_bool(w, split, "invert", false);
        append(w, list, split);
    }
    append(w, list, byte_level(w, gpt2));
    return o;
}

static void add_byte_level(struct writer *w, cJSON *root) {
    if (w->split->nfc)
        set(w, root, "normalizer", typed(w, "NFC"));
    else
        add_null(w, root, "normalizer");
    set(w, root, "pre_tokenizer", pre_tokenizer(w));
    set(w, root, "decoder", byte_level(w, true));
}

static void add_sentencepiece(struct writer *w, cJSON *root) {
    cJSON *normalizer = typed(w, "Sequence"), *steps = add_array(w, normalizer, "normalizers");
    if (w->t->prefix_space) {
        cJSON *prepend = typed(w, "Prepend");
        add_text(w, prepend, "prepend", MARK);
        append(w, steps, prepend);
    }
    append(w, steps, replace(w, " ", MARK));
    set(w, root, "normalizer", normalizer);
    add_null(w, root, "pre_tokenizer");

    cJSON *decoder = typed(w, "Sequence");
    steps = add_array(w, decoder, "decoders");
    append(w, steps, replace(w, MARK, " "));
    append(w, steps, typed(w, "ByteFallback"));
    append(w, steps, typed(w, "Fuse"));
    if (w->t->prefix_space) {
        cJSON *strip = typed(w, "Strip");
        add_text(w, strip, "content", " ");
        kept(w, cJSON_AddNumberToObject(strip, "start", 1));
        kept(w, cJSON_AddNumberToObject(strip, "stop", 0));
        append(w, steps, strip);
    }
    set(w, root, "decoder", decoder);
}

/* ---- what stands around a text ---- */
static void append_special(struct writer *w, cJSON *list, int32_t id) {
    cJSON *o = kept(w, cJSON_CreateObject()), *token = add_object(w, o, "SpecialToken");
    add_text(w, token, "id", token_piece(w->t, id));
    kept(w, cJSON_AddNumberToObject(token, "type_id", 0));
    append(w, list, o);
}

static void append_sequence(struct writer *w, cJSON *list, const char *name, int type_id) {
    cJSON *o = kept(w, cJSON_CreateObject()), *sequence = add_object(w, o, "Sequence");
    add_text(w, sequence, "id", name);
    kept(w, cJSON_AddNumberToObject(sequence, "type_id", type_id));
    append(w, list, o);
}

static void describe_special(struct writer *w, cJSON *tokens, int32_t id) {
    const char *piece = token_piece(w->t, id);
    if (cJSON_GetObjectItemCaseSensitive(tokens, piece)) return;
    cJSON *o = add_object(w, tokens, piece), *ids = NULL, *texts = NULL;
    add_text(w, o, "id", piece);
    ids = add_array(w, o, "ids");
    append(w, ids, cJSON_CreateNumber(id));
    texts = add_array(w, o, "tokens");
    append(w, texts, cJSON_CreateString(piece));
}

static void add_post_processor(struct writer *w, cJSON *root) {
    const struct tokenizer *t = w->t;
    bool bos = t->add_bos && t->bos >= 0, eos = t->add_eos && t->eos >= 0;
    if (!bos && !eos) {
        add_null(w, root, "post_processor");
        return;
    }
    cJSON *o = typed(w, "TemplateProcessing");
    for (int pair = 0; pair < 2; pair++) {
        cJSON *list = add_array(w, o, pair ? "pair" : "single");
        for (int i = 0; i <= pair; i++) {
            if (bos) append_special(w, list, t->bos);
            append_sequence(w, list, i ? "B" : "A", i);
            if (eos) append_special(w, list, t->eos);
        }
    }
    cJSON *tokens = add_object(w, o, "special_tokens");
    if (bos) describe_special(w, tokens, t->bos);
    if (eos) describe_special(w, tokens, t->eos);
    set(w, root, "post_processor", o);
}

/* ---- the two files ---- */
static enum err make_tokenizer(struct writer *w, cJSON *root) {
    add_text(w, root, "version", "1.0");
    add_null(w, root, "truncation");
    add_null(w, root, "padding");
    add_added_tokens(w, root);
    if (w->split)
        add_byte_level(w, root);
    else
        add_sentencepiece(w, root);
    add_post_processor(w, root);
    return add_model(w, root);
}

static void make_config(struct writer *w, cJSON *root) {
    const struct tokenizer *t = w->t;
    add_text(w, root, "tokenizer_class", "PreTrainedTokenizerFast");
    add_bool(w, root, "add_bos_token", t->add_bos);
    add_bool(w, root, "add_eos_token", t->add_eos);
    if (t->bos >= 0) add_text(w, root, "bos_token", token_piece(t, t->bos));
    if (t->eos >= 0) add_text(w, root, "eos_token", token_piece(t, t->eos));
    if (t->unknown >= 0) add_text(w, root, "unk_token", token_piece(t, t->unknown));
    add_bool(w, root, "clean_up_tokenization_spaces", false);
    if (t->chat_template) add_text(w, root, "chat_template", t->chat_template);
}

/* ---- read again ---- */
static bool same_ids(const struct tokenizer *a, const struct tokenizer *b, const char *text,
                     size_t len) {
    int32_t *x = NULL, *y = NULL;
    size_t n = 0, m = 0;
    int flags = TOKENIZE_SPECIAL | TOKENIZE_ADD_BOS_EOS;
    bool same = !tokenize(a, text, len, flags, &x, &n) && !tokenize(b, text, len, flags, &y, &m) &&
                n == m && !memcmp(x, y, n * sizeof *x);
    free(x);
    free(y);
    return same;
}

/* The same kinds and bytes, and the same ids for every token's own text, for all texts after one
 * another in an order that jumps about, and for runs of one character. */
static enum err compare(struct writer *w, const struct tokenizer *b) {
    const struct tokenizer *a = w->t;
    int32_t n = a->n_tokens;
    struct bytes all = {0};
    bool same = n == b->n_tokens && a->bos == b->bos && a->eos == b->eos &&
                a->add_bos == b->add_bos && a->add_eos == b->add_eos &&
                a->prefix_space == b->prefix_space;
    const char *where = "its marks";
    for (int32_t id = 0; same && id < n; id++) {
        size_t k, m;
        const char *x = token_bytes(a, id, true, &k), *y = token_bytes(b, id, true, &m);
        where = token_piece(a, id);
        same = a->tokens[id].kind == b->tokens[id].kind && k == m && !memcmp(x, y, k) &&
               same_ids(a, b, x, k);
    }
    for (int64_t i = 0; same && i < n; i++) {
        size_t k;
        const char *x = token_bytes(a, (int32_t)(i * 40503 % n), true, &k);
        if (!bytes_add(&all, x, k)) {
            free(all.data);
            return ERR_NOMEM;
        }
        bool last = i + 1 == n;
        if (!last && all.len < 1 << 16) continue;
        where = "a run of pieces";
        same = same_ids(a, b, all.data, all.len);
        all.len = 0;
    }
    free(all.data);
    for (int c = 1; same && c < 128; c++) {
        char run[66];
        memset(run, c, sizeof run);
        where = "a run of one character";
        for (size_t len = 1; same && len <= sizeof run; len++)
            same = same_ids(a, b, run, len);
    }
    if (same) return OK;
    return FAULT(w, "written as tokenizer.json it would give other ids (at %.80s)", where);
}

/* Different results with one score merge from the left, whichever comes; written one after the
 * other, the first everywhere before the second.  Mostly that is the same (Llama's runs of spaces):
 * texts put together by chance from what such merges join must tell. */
static enum err compare_ties(struct writer *w, const struct tokenizer *b) {
    enum { TEXTS = 400, MOST = 16 };
    struct bytes text = {0};
    uint64_t seed = 1;
    for (size_t i = 0, n; i < w->n_merges; i += n) {
        const struct merge *m = &w->merges[i];
        for (n = 1; i + n < w->n_merges && m[n].rank == m->rank;)
            n++;
        if (m[n - 1].result == m->result) continue;
        for (int k = 0; k < TEXTS; k++) {
            text.len = 0;
            for (int p = k % MOST; p >= 0; p--) {
                size_t len;
                seed = seed * 6364136223846793005u + 1442695040888963407u;
                const struct merge *one = &m[(seed >> 33) % n];
                const char *part =
                    token_bytes(w->t, seed >> 63 ? one->left : one->right, true, &len);
                if (!bytes_add(&text, part, len)) {
                    free(text.data);
                    return ERR_NOMEM;
                }
            }
            if (same_ids(w->t, b, text.data, text.len)) continue;
            free(text.data);
            return FAULT(w,
                         "tokens \"%.80s\" and \"%.80s\" have one score, and tokenizer.json cannot "
                         "say that the leftmost of them merges first",
                         token_piece(w->t, m->result), token_piece(w->t, m[n - 1].result));
        }
    }
    free(text.data);
    return OK;
}

static enum err read_again(struct writer *w, const char *folder) {
    struct tokenizer *b = NULL;
    enum err e = tokenizer_open_json(&b, folder, w->msg, w->msg_len);
    if (!e) e = compare(w, b);
    if (!e) e = compare_ties(w, b);
    tokenizer_free(b);
    return e;
}

enum err tokenizer_files_write(const struct gguf *g, const char *folder, char *msg,
                               size_t msg_len) {
    char why[400] = "";
    struct writer w = {.g = g, .split = gguf_split(g), .msg = why, .msg_len = sizeof why};
    cJSON *root = kept(&w, cJSON_CreateObject()), *config = kept(&w, cJSON_CreateObject());
    enum err e = tokenizer_open_gguf(&w.t, g, why, sizeof why);
    if (!e) e = check_pieces(&w);
    if (!e) e = make_tokenizer(&w, root);
    if (!e) make_config(&w, config);
    if (!e && w.failed) e = ERR_NOMEM;
    if (!e) e = file_replace_json(folder, "tokenizer.json", root, why, sizeof why);
    if (!e) e = file_replace_json(folder, "tokenizer_config.json", config, why, sizeof why);
    if (!e) e = read_again(&w, folder);
    cJSON_Delete(root);
    cJSON_Delete(config);
    tokenizer_free(w.t);
    free(w.merges);
    if (e == ERR_NOMEM) return err_set(msg, msg_len, e, "out of memory for the tokenizer");
    if (e == ERR_FORMAT) return err_set(msg, msg_len, e, "the tokenizer: %s", why);
    return e ? err_set(msg, msg_len, e, "%s", why) : OK;
}
