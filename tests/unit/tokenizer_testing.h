/* tokenizer_testing.h - tokenizers from files and from small ones that are written here. */
#ifndef URCHIN_TESTS_TOKENIZER_TESTING_H
#define URCHIN_TESTS_TOKENIZER_TESTING_H

#include "config/json.h"
#include "model/tokenizer.h"
#include "model/tokenizer_impl.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define DATA "tests/data/tokenizers/"

static inline char *read_file(const char *path, size_t *len) {
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("%s cannot be opened", path);
    fseek(f, 0, SEEK_END);
    *len = (size_t)ftell(f);
    rewind(f);
    char *text = malloc(*len + 1);
    assert_int_equal(fread(text, 1, *len, f), *len);
    text[*len] = 0;
    fclose(f);
    return text;
}

static inline struct tokenizer *open_gguf(const char *path) {
    char msg[512] = "";
    struct gguf *g = NULL;
    struct tokenizer *t = NULL;
    if (gguf_open(&g, path, msg, sizeof msg) != OK ||
        tokenizer_open_gguf(&t, g, msg, sizeof msg) != OK)
        fail_msg("%s: %s", path, msg);
    gguf_close(g); /* the tokenizer keeps nothing of the file */
    return t;
}

static inline struct tokenizer *open_folder(const char *folder) {
    char msg[512] = "";
    struct tokenizer *t = NULL;
    if (tokenizer_open_json(&t, folder, msg, sizeof msg) != OK) fail_msg("%s", msg);
    return t;
}

static inline struct tokenizer *open_text(const char *json, const char *config) {
    char msg[512] = "";
    struct tokenizer *t = NULL;
    if (tokenizer_open_text(&t, json, strlen(json), config, config ? strlen(config) : 0, msg,
                            sizeof msg) != OK)
        fail_msg("%s", msg);
    return t;
}

struct ids {
    int32_t *ids;
    size_t n;
};

static inline struct ids encode(const struct tokenizer *t, const char *text, size_t len,
                                int flags) {
    struct ids r = {0};
    assert_int_equal(tokenize(t, text, len, flags, &r.ids, &r.n), OK);
    return r;
}

static inline void assert_ids(const struct tokenizer *t, const char *text, int flags,
                              const int32_t *want, size_t n_want) {
    struct ids r = encode(t, text, strlen(text), flags);
    assert_int_equal(r.n, n_want);
    assert_memory_equal(r.ids, want, n_want * sizeof *want);
    free(r.ids);
}
#define ASSERT_IDS(t, text, flags, ...)                                                            \
    assert_ids(t, text, flags, (const int32_t[]){__VA_ARGS__},                                     \
               sizeof((const int32_t[]){__VA_ARGS__}) / 4)

static inline void assert_same_bytes(const struct tokenizer *t, const char *text, size_t len) {
    struct ids r = encode(t, text, len, 0);
    char *back;
    size_t back_len;
    assert_int_equal(detokenize(t, r.ids, r.n, false, true, &back, &back_len), OK);
    assert_int_equal(back_len, len);
    assert_memory_equal(back, text, len);
    free(back);
    free(r.ids);
}

static inline uint64_t random_next(uint64_t *s) { /* splitmix64 */
    uint64_t z = *s += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

/* ---- a GGUF file with a tokenizer and nothing else ---- */

static inline void put(struct bytes *b, const void *data, size_t len) {
    assert_true(bytes_add(b, data, len));
}
static inline void put_u32(struct bytes *b, uint32_t v) {
    put(b, &v, 4);
}
static inline void put_string(struct bytes *b, const char *s) {
    uint64_t len = strlen(s);
    put(b, &len, 8);
    put(b, s, len);
}
static inline void put_string_pair(struct bytes *b, const char *key, const char *value) {
    put_string(b, key);
    put_u32(b, 8);
    put_string(b, value);
}

/* A GGUF file of metadata only; values NULL-terminated; scores for each token when not NULL. */
struct gguf_text {
    const char *model, *pre, *const *tokens, *const *merges;
    const int32_t *types;
    const float *scores;
};

static inline enum err open_gguf_text(struct tokenizer **t, const struct gguf_text *x, char *msg,
                                      size_t msg_len) {
    struct bytes b = {0};
    uint64_t n_tensors = 0, n_pairs = 0, n = 0;
    put(&b, "GGUF\3\0\0\0", 8);
    put(&b, &n_tensors, 8);
    put(&b, &n_pairs, 8);
    if (x->model) put_string_pair(&b, "tokenizer.ggml.model", x->model), n_pairs++;
    if (x->pre) put_string_pair(&b, "tokenizer.ggml.pre", x->pre), n_pairs++;
    const char *const *lists[] = {x->tokens, x->merges};
    static const char *const names[] = {"tokenizer.ggml.tokens", "tokenizer.ggml.merges"};
    for (int i = 1; i >= 0; i--) {
        if (!lists[i]) continue;
        for (n = 0; lists[i][n];)
            n++;
        put_string(&b, names[i]);
        put_u32(&b, 9);
        put_u32(&b, 8);
        put(&b, &n, 8);
        for (uint64_t k = 0; k < n; k++)
            put_string(&b, lists[i][k]);
        n_pairs++;
    }
    if (x->types) {
        put_string(&b, "tokenizer.ggml.token_type");
        put_u32(&b, 9);
        put_u32(&b, 5);
        put(&b, &n, 8);
        put(&b, x->types, n * 4);
        n_pairs++;
    }
    if (x->scores) {
        put_string(&b, "tokenizer.ggml.scores");
        put_u32(&b, 9);
        put_u32(&b, 6);
        put(&b, &n, 8);
        put(&b, x->scores, n * 4);
        n_pairs++;
    }
    memcpy(b.data + 16, &n_pairs, 8);
    struct gguf *g = NULL;
    enum err e = gguf_open_bytes(&g, b.data, b.len, "t.gguf", msg, msg_len);
    if (e == OK) e = tokenizer_open_gguf(t, g, msg, msg_len);
    gguf_close(g);
    free(b.data);
    return e;
}

#endif
