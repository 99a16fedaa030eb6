/* tokenizer_gguf.c - the tokenizer in a GGUF file's metadata (tokenizer.ggml.*).
 *
 * GGUF names the pre-tokenizer instead of spelling it out; what the names mean is here.  Where the
 * model's own tokenizer.json normalises to NFC we do, though llama.cpp does not. */
#include "model/tokenizer_impl.h"

#include <stdlib.h>
#include <string.h>

#define KEY "tokenizer.ggml."

/* tokenizer.ggml.token_type */
enum { GGUF_NORMAL = 1, GGUF_UNKNOWN, GGUF_CONTROL, GGUF_USER_DEFINED, GGUF_UNUSED, GGUF_BYTE };

static const struct gguf_split pre_tokenizers[] = {
    {"gpt-2", false, split_gpt2, false, false, false},
    {"mpt", false, split_gpt2, true, false, false},
    {"gpt-neox", false, split_gpt2, true, false, false},
    {"olmo", false, split_gpt2, true, false, false},
    {"starcoder", true, split_gpt2, false, false, false},
    {"smollm", true, split_gpt2, false, false, false},
    {"llama-bpe", false, split_llama3, false, true, true},
    {"llama3", false, split_llama3, false, true, true},
    {"llama-v3", false, split_llama3, false, true, true},
    {"qwen2", false, split_qwen2, true, false, false},
};
enum { N_PRE = sizeof pre_tokenizers / sizeof *pre_tokenizers };

struct reader {
    struct tokenizer *t;
    const struct gguf *g;
    char *msg;
    size_t msg_len;
};

#define FAULT(r, ...) err_set((r)->msg, (r)->msg_len, ERR_FORMAT, __VA_ARGS__)

static bool is(const char *a, const char *b) {
    return a && strcmp(a, b) == 0;
}

static enum err read_tokens(struct reader *r, bool sentencepiece) {
    size_t n = gguf_array_size(r->g, KEY "tokens");
    size_t n_types = gguf_array_size(r->g, KEY "token_type");
    if (n == 0 || n > MAX_TOKEN_ID + 1)
        return FAULT(r, "tokenizer.ggml.tokens has %zu entries, not 1 .. %d", n, MAX_TOKEN_ID + 1);
    if (n_types != 0 && n_types != n)
        return FAULT(r, "tokenizer.ggml.token_type has %zu entries for %zu tokens", n_types, n);
    for (size_t i = 0; i < n; i++) {
        size_t len;
        double type = GGUF_NORMAL;
        const char *piece = gguf_array_string(r->g, KEY "tokens", i, &len);
        if (!piece) return FAULT(r, "tokenizer.ggml.tokens is not an array of strings");
        if (n_types && !gguf_array_double(r->g, KEY "token_type", i, &type))
            return FAULT(r, "tokenizer.ggml.token_type is not an array of numbers");
        enum token_kind kind = TOKEN_TEXT;
        if (type == GGUF_CONTROL || type == GGUF_UNKNOWN) kind = TOKEN_SPECIAL;
        if (type == GGUF_USER_DEFINED) kind = TOKEN_ADDED;
        if (type == GGUF_BYTE && sentencepiece) kind = TOKEN_BYTE;
        if (!vocab_add(r->t, (int32_t)i, piece, len, kind)) return ERR_NOMEM;
    }
    return vocab_index(r->t) ? OK : ERR_NOMEM;
}

static enum err read_id(const struct reader *r, const char *key, int32_t *out) {
    int64_t id;
    if (!gguf_int(r->g, key, &id)) return OK;
    /* Files without such a token have been seen to say 2^32 - 1, which is -1. */
    if (id == -1 || id == UINT32_MAX) return OK;
    if (id < 0 || id >= r->t->n_tokens)
        return FAULT(r, "%s is %lld, outside the vocabulary of %d", key, (long long)id,
                     r->t->n_tokens);
    *out = (int32_t)id;
    return OK;
}

static bool flag(const struct reader *r, const char *key, bool otherwise) {
    int64_t value;
    return gguf_int(r->g, key, &value) ? value != 0 : otherwise;
}

static enum err read_merges(struct reader *r) {
    struct tokenizer *t = r->t;
    size_t n = gguf_array_size(r->g, KEY "merges");
    enum err e = merges_reserve(t, n);
    struct bytes joined = {0};
    for (size_t i = 0; i < n && e == OK; i++) {
        size_t len;
        const char *merge = gguf_array_string(r->g, KEY "merges", i, &len);
        const char *space = merge && len > 2 ? memchr(merge + 1, ' ', len - 1) : NULL;
        if (!space) {
            e = FAULT(r, "tokenizer.ggml.merges[%zu] is not two tokens with a space between", i);
            break;
        }
        size_t left_len = (size_t)(space - merge), right_len = len - left_len - 1;
        joined.len = 0;
        if (!bytes_add(&joined, merge, left_len) || !bytes_add(&joined, space + 1, right_len)) {
            e = ERR_NOMEM;
            break;
        }
        int32_t a = vocab_find(t, merge, left_len), b = vocab_find(t, space + 1, right_len);
        int32_t result = vocab_find(t, joined.data, joined.len);
        if (a < 0 || b < 0 || result < 0)
            e = FAULT(r,
                      "tokenizer.ggml.merges[%zu] \"%.*s\" joins or makes a token that is not in "
                      "the vocabulary",
                      i, (int)(len < 80 ? len : 80), merge);
        else
            merges_add(t, a, b, result, (uint32_t)i);
    }
    free(joined.data);
    return e;
}

/* NULL: the file does not say. */
static const char *pre_name(const struct gguf *g) {
    const char *name = gguf_string(g, KEY "pre", NULL);
    /* Files made before the key existed: this architecture had but one pattern. */
    bool gpt2 = is(gguf_string(g, "general.architecture", NULL), "gpt2");
    return name ? name : gpt2 ? "gpt-2" : NULL;
}

const struct gguf_split *gguf_split(const struct gguf *g) {
    const char *name = is(gguf_string(g, KEY "model", NULL), "gpt2") ? pre_name(g) : NULL;
    for (int i = 0; i < N_PRE; i++)
        if (is(name, pre_tokenizers[i].name)) return &pre_tokenizers[i];
    return NULL;
}

static enum err read_byte_level(struct reader *r) {
    struct tokenizer *t = r->t;
    const char *name = pre_name(r->g);
    if (!name) return FAULT(r, "tokenizer.ggml.pre is missing, so how text is split is not known");
    const struct gguf_split *pre = gguf_split(r->g);
    if (!pre)
        return FAULT(r,
                     "tokenizer.ggml.pre \"%.40s\" is not supported (gpt-2, mpt, gpt-neox, olmo, "
                     "starcoder, smollm, llama-bpe and qwen2 are)",
                     name);
    t->byte_level = true;
    t->ignore_merges = pre->ignore_merges;
    t->add_bos = flag(r, KEY "add_bos_token", pre->add_bos);
    if (pre->nfc) {
        struct edit *edit = edit_add(&t->normalizer, EDIT_NORMALIZE, "", 0);
        if (!edit) return ERR_NOMEM;
        edit->compose = true;
    }
    enum err e = OK;
    if (pre->digits)
        e = split_add(t, "\\p{N}", 5, false, SPLIT_ISOLATED, false, "digits", r->msg, r->msg_len);
    if (e == OK)
        e = split_add(t, pre->pattern, strlen(pre->pattern), false, SPLIT_ISOLATED, false, name,
                      r->msg, r->msg_len);
    if (e == OK) e = vocab_finish(t);
    return e == OK ? read_merges(r) : e;
}

/* Phi-3's own tokenizer takes white space behind its marks into them; GGUF cannot say so. */
static void set_phi3_marks(struct reader *r) {
    const char *model = gguf_string(r->g, "general.name", NULL);
    const char *architecture = gguf_string(r->g, "general.architecture", NULL);
    bool phi3 = is(architecture, "phi3") ||
                (model && (strcasestr(model, "phi-3") || strcasestr(model, "phi3")));
    if (!phi3) return;
    for (int32_t id = 0; id < r->t->n_tokens; id++) {
        const char *piece = token_piece(r->t, id);
        bool plain = is(piece, "<unk>") || is(piece, "<s>") || is(piece, "<|endoftext|>");
        if (r->t->tokens[id].kind >= TOKEN_ADDED) r->t->tokens[id].take_right_space = !plain;
    }
}

static enum err read_sentencepiece(struct reader *r) {
    struct tokenizer *t = r->t;
    t->byte_fallback = t->fuse_unknown = t->space_mark = true;
    t->add_bos = flag(r, KEY "add_bos_token", true);
    t->prefix_space = flag(r, KEY "add_space_prefix", true);
    if (t->prefix_space && !edit_add(&t->normalizer, EDIT_PREPEND, " ", 1)) return ERR_NOMEM;
    struct edit *mark = edit_add(&t->normalizer, EDIT_REPLACE, "\xE2\x96\x81", 3);
    if (!mark) return ERR_NOMEM;
    enum err e = pattern_compile(&mark->pattern, " ", 1, true, "space", r->msg, r->msg_len);
    if (e == OK) e = read_id(r, KEY "unknown_token_id", &t->unknown);
    if (e != OK) return e;
    set_phi3_marks(r);
    e = vocab_finish(t);
    if (e != OK) return e;

    size_t n_scores = gguf_array_size(r->g, KEY "scores");
    if (n_scores != (size_t)t->n_tokens)
        return FAULT(r, "tokenizer.ggml.scores has %zu entries for %d tokens", n_scores,
                     t->n_tokens);
    double *scores = malloc(n_scores * sizeof *scores);
    if (!scores) return ERR_NOMEM;
    for (size_t i = 0; i < n_scores && e == OK; i++)
        if (!gguf_array_double(r->g, KEY "scores", i, &scores[i]) || scores[i] != scores[i])
            e = FAULT(r, "tokenizer.ggml.scores[%zu] is not a number", i);
    if (e == OK) e = merges_from_scores(t, scores);
    free(scores);
    return e;
}

enum err tokenizer_open_gguf(struct tokenizer **out, const struct gguf *g, char *msg,
                             size_t msg_len) {
    struct reader r = {NULL, g, msg, msg_len};
    const char *model = gguf_string(g, KEY "model", NULL);
    bool sentencepiece = is(model, "llama");
    if (!model) return FAULT(&r, "tokenizer.ggml.model is missing: the file holds no tokenizer");
    if (!sentencepiece && !is(model, "gpt2"))
        return FAULT(&r, "tokenizer.ggml.model \"%.40s\" is not supported (gpt2 and llama are)",
                     model);
    enum err e = tokenizer_new(&r.t);
    if (e == OK) e = read_tokens(&r, sentencepiece);
    if (e == OK) e = read_id(&r, KEY "bos_token_id", &r.t->bos);
    if (e == OK) e = read_id(&r, KEY "eos_token_id", &r.t->eos);
    if (e == OK) e = sentencepiece ? read_sentencepiece(&r) : read_byte_level(&r);
    if (e == OK) {
        r.t->add_eos = flag(&r, KEY "add_eos_token", false);
        const char *chat_template = gguf_string(g, "tokenizer.chat_template", NULL);
        if (chat_template && !(r.t->chat_template = strdup(chat_template))) e = ERR_NOMEM;
    }
    if (e == ERR_NOMEM) err_set(msg, msg_len, e, "out of memory while reading the tokenizer");
    if (e != OK)
        tokenizer_free(r.t);
    else
        *out = r.t;
    return e;
}
