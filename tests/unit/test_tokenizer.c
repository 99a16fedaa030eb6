/* test_tokenizer.c - tokenizers: the reference implementations' ids, exact bytes back, bounded
 * time, and files that are refused by name.  URCHIN_TEST_DATA names a folder with further vectors
 * (tokenizers/llama.cpp). */
#include "model/tokenizer.h"

#include "config/json.h"
#include "model/tokenizer_impl.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define DATA "tests/data/tokenizers/"

/* ---- help ---- */

static char *read_file(const char *path, size_t *len) {
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

static struct tokenizer *open_gguf(const char *path) {
    char msg[512] = "";
    struct gguf *g = NULL;
    struct tokenizer *t = NULL;
    if (gguf_open(&g, path, msg, sizeof msg) != OK ||
        tokenizer_open_gguf(&t, g, msg, sizeof msg) != OK)
        fail_msg("%s: %s", path, msg);
    gguf_close(g); /* the tokenizer keeps nothing of the file */
    return t;
}

static struct tokenizer *open_folder(const char *folder) {
    char msg[512] = "";
    struct tokenizer *t = NULL;
    if (tokenizer_open_json(&t, folder, msg, sizeof msg) != OK) fail_msg("%s", msg);
    return t;
}

static struct tokenizer *open_text(const char *json, const char *config) {
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

static struct ids encode(const struct tokenizer *t, const char *text, size_t len, int flags) {
    struct ids r = {0};
    assert_int_equal(tokenize(t, text, len, flags, &r.ids, &r.n), OK);
    return r;
}

static void assert_ids(const struct tokenizer *t, const char *text, int flags, const int32_t *want,
                       size_t n_want) {
    struct ids r = encode(t, text, strlen(text), flags);
    assert_int_equal(r.n, n_want);
    assert_memory_equal(r.ids, want, n_want * sizeof *want);
    free(r.ids);
}
#define ASSERT_IDS(t, text, flags, ...)                                                            \
    assert_ids(t, text, flags, (const int32_t[]){__VA_ARGS__},                                     \
               sizeof((const int32_t[]){__VA_ARGS__}) / 4)

static void assert_same_bytes(const struct tokenizer *t, const char *text, size_t len) {
    struct ids r = encode(t, text, len, 0);
    char *back;
    size_t back_len;
    assert_int_equal(detokenize(t, r.ids, r.n, false, true, &back, &back_len), OK);
    assert_int_equal(back_len, len);
    assert_memory_equal(back, text, len);
    free(back);
    free(r.ids);
}

static uint64_t random_next(uint64_t *s) { /* splitmix64 */
    uint64_t z = *s += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

/* ---- ids of the reference implementations ---- */

/* Strings with a separator line between, and a line of ids for each. */
static void check_vectors(const struct tokenizer *t, const char *inp, const char *out) {
    static const char separator[] = "\n__ggml_vocab_test__\n";
    size_t len, out_len;
    char *texts = read_file(inp, &len), *lines = read_file(out, &out_len);
    char *line = lines, *text = texts;
    int n = 0;
    for (bool more = true; more; n++) {
        char *end = strstr(text, separator);
        more = end != NULL;
        if (!more) end = texts + len;
        struct ids r = encode(t, text, (size_t)(end - text), 0);
        char *line_end = line + strcspn(line, "\n"), *p = line;
        for (size_t i = 0; i < r.n; i++) {
            char *next;
            long want = strtol(p, &next, 10);
            if (next == p || next > line_end || want != r.ids[i])
                fail_msg("%s: string %d, id %zu is %d, not %ld", out, n, i, r.ids[i], want);
            p = next;
        }
        assert_int_equal(strspn(p, " \n") >= (size_t)(line_end - p), 1);
        free(r.ids);
        text = end + strlen(separator);
        line = *line_end ? line_end + 1 : line_end;
    }
    assert_int_equal(n, 47);
    free(texts);
    free(lines);
}

static void test_llama_cpp_vectors_agree_from_gguf(void **state) {
    (void)state;
    static const char *const names[] = {"gpt-2", "mpt", "phi-3"};
    for (int i = 0; i < 3; i++) {
        char path[128], out[128];
        snprintf(path, sizeof path, DATA "ggml-vocab-%s.gguf", names[i]);
        snprintf(out, sizeof out, DATA "ggml-vocab-%s.gguf.out", names[i]);
        struct tokenizer *t = open_gguf(path);
        check_vectors(t, DATA "ggml-vocab.inp", out);
        tokenizer_free(t);
    }
}

static void test_llama_cpp_vectors_agree_from_tokenizer_json(void **state) {
    (void)state;
    struct tokenizer *t = open_folder(DATA "gpt2");
    check_vectors(t, DATA "ggml-vocab.inp", DATA "ggml-vocab-gpt-2.gguf.out");
    tokenizer_free(t);
    t = open_folder(DATA "gpt-neox-20b");
    check_vectors(t, DATA "ggml-vocab.inp", DATA "ggml-vocab-mpt.gguf.out");
    tokenizer_free(t);
}

static void test_starcoder_vectors_agree_where_they_are_at_hand(void **state) {
    (void)state;
    const char *data = getenv("URCHIN_TEST_DATA");
    if (!data) skip(); /* the vocabulary's licence keeps it out of this repository */
    char path[3][512];
    static const char *const ends[] = {"", ".inp", ".out"};
    for (int i = 0; i < 3; i++)
        snprintf(path[i], sizeof path[i], "%s/tokenizers/llama.cpp/ggml-vocab-starcoder.gguf%s",
                 data, ends[i]);
    struct tokenizer *t = open_gguf(path[0]);
    check_vectors(t, path[1], path[2]);
    tokenizer_free(t);
}

static void test_small_tokenizers_agree_with_hugging_face(void **state) {
    (void)state;
    char msg[512] = "";
    struct json *root = NULL;
    assert_int_equal(json_load(&root, DATA "small.json", msg, sizeof msg), OK);
    int n = 0;
    for (const struct json *c = json_child(root); c; c = json_next(c)) {
        const char *name = json_string(json_get(c, "name"));
        struct tokenizer *t = open_text(json_string(json_get(c, "tokenizer")), NULL);
        for (const struct json *x = json_child(json_get(c, "texts")); x; x = json_next(x), n++) {
            const char *text = json_string(json_get(x, "text"));
            const struct json *want = json_child(json_get(x, "ids"));
            struct ids r = encode(t, text, strlen(text), TOKENIZE_SPECIAL);
            for (size_t i = 0; i < r.n || want; i++) {
                int want_id = want ? (int)json_number(want, -1) : -1;
                if (i >= r.n || r.ids[i] != want_id)
                    fail_msg("%s, \"%s\": id %zu is %d, not %d", name, text, i,
                             i < r.n ? r.ids[i] : -1, want_id);
                want = json_next(want);
            }
            free(r.ids);
        }
        tokenizer_free(t);
    }
    assert_true(n > 200);
    json_free(root);
}

static void test_gguf_and_tokenizer_json_agree_on_any_bytes(void **state) {
    (void)state;
    struct tokenizer *a = open_gguf(DATA "ggml-vocab-gpt-2.gguf"), *b = open_folder(DATA "gpt2");
    size_t len;
    char *source = read_file(DATA "gpt2/tokenizer.json", &len), text[400];
    uint64_t seed = 5;
    for (int i = 0; i < 500;
         i++) { /* pieces of a file with much of Unicode in it, and bytes changed */
        size_t at = random_next(&seed) % (len - sizeof text);
        memcpy(text, source + at, sizeof text);
        for (int k = 0; k < i % 7; k++)
            text[random_next(&seed) % sizeof text] = (char)random_next(&seed);
        struct ids x = encode(a, text, sizeof text, 0), y = encode(b, text, sizeof text, 0);
        assert_int_equal(x.n, y.n);
        assert_memory_equal(x.ids, y.ids, x.n * sizeof *x.ids);
        free(x.ids);
        free(y.ids);
    }
    free(source);
    tokenizer_free(a);
    tokenizer_free(b);
}

/* ---- splitting, by the names that GGUF gives ---- */

static void put(struct bytes *b, const void *data, size_t len) {
    assert_true(bytes_add(b, data, len));
}
static void put_u32(struct bytes *b, uint32_t v) {
    put(b, &v, 4);
}
static void put_string(struct bytes *b, const char *s) {
    uint64_t len = strlen(s);
    put(b, &len, 8);
    put(b, s, len);
}
static void put_string_pair(struct bytes *b, const char *key, const char *value) {
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

static enum err open_gguf_text(struct tokenizer **t, const struct gguf_text *x, char *msg,
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

static bool join_words(void *arg, const char *word, size_t len) {
    struct bytes *b = arg;
    return (b->len == 0 || bytes_add(b, "|", 1)) && bytes_add(b, word, len);
}

/* Expected words by Python's regex module (Unicode 15), read over by hand. */
static void test_words_are_those_of_the_patterns(void **state) {
    (void)state;
    static const char *const cases[][4] = {
        /* text, llama-bpe, qwen2, smollm and starcoder */
        {"Hello  world 12345!", "Hello| | world| |123|45|!", "Hello| | world| |1|2|3|4|5|!",
         "Hello| | world| |1|2|3|4|5|!"},
        {"I'VE said it's 3.14\r\n\r\n  next", "I|'VE| said| it|'s| |3|.|14|\r\n\r\n| | next",
         "I|'VE| said| it|'s| |3|.|1|4|\r\n\r\n| | next",
         "I|'|VE| said| it|'s| |3|.|1|4|\r\n\r\n | next"},
        {"\t\tif (x==10) {\n    y();\n}", "\t|\tif| (|x|==|10|)| {\n|   | y|();\n|}",
         "\t|\tif| (|x|==|1|0|)| {\n|   | y|();\n|}",
         "\t|\t|if| (|x|==|1|0|)| {|\n   | y|();|\n|}"},
        {"\346\227\245\346\234\254\350\252\236\343\201\256\343\203\206\343\202\255\343\202\271\343"
         "\203\210\343\200\201123\357\274\2245",
         "\346\227\245\346\234\254\350\252\236\343\201\256\343\203\206\343\202\255\343\202\271\343"
         "\203\210|\343\200\201|123|\357\274\2245",
         "\346\227\245\346\234\254\350\252\236\343\201\256\343\203\206\343\202\255\343\202\271\343"
         "\203\210|\343\200\201|1|2|3|\357\274\224|5",
         "\346\227\245\346\234\254\350\252\236\343\201\256\343\203\206\343\202\255\343\202\271\343"
         "\203\210|\343\200\201|1|2|3|\357\274\224|5"},
        {"na\303\257ve caf\303\251 \342\200\223 e\314\201 100\342\202\254",
         "na\303\257ve| caf\303\251| \342\200\223| e|\314\201| |100|\342\202\254",
         "na\303\257ve| caf\303\251| \342\200\223| e|\314\201| |1|0|0|\342\202\254",
         "na\303\257ve| caf\303\251| \342\200\223| e|\314\201| |1|0|0|\342\202\254"},
        {"a   \n  b \n", "a|   \n| | b| \n", "a|   \n| | b| \n", "a|   \n | b| \n"},
        {"don't!!!\n\nwe'll  ", "don|'t|!!!\n\n|we|'ll|  ", "don|'t|!!!\n\n|we|'ll|  ",
         "don|'t|!!!|\n|\n|we|'ll|  "},
        {"x\302\262\302\275 \342\205\247\331\243", "x|\302\262\302\275| |\342\205\247\331\243",
         "x|\302\262|\302\275| |\342\205\247|\331\243",
         "x|\302\262|\302\275| |\342\205\247|\331\243"},
        {"a \xE1\xA0\x8E!", "a| \xE1\xA0\x8E!", "a| \xE1\xA0\x8E!",
         "a| \xE1\xA0\x8E!"}, /* U+180E is no space */
    };
    static const char *const names[] = {"llama-bpe", "qwen2", "smollm", "starcoder"};
    static const char *const tokens[] = {"a", NULL};
    for (int i = 0; i < 4; i++) {
        struct tokenizer *t = NULL;
        char msg[256] = "";
        enum err e = open_gguf_text(
            &t, &(struct gguf_text){.model = "gpt2", .pre = names[i], .tokens = tokens}, msg,
            sizeof msg);
        if (e != OK) fail_msg("%s", msg);
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            struct split_scratch scratch;
            struct bytes words = {0};
            assert_int_equal(split_scratch_new(&scratch, t), OK);
            assert_true(
                split_text(t, &scratch, cases[c][0], strlen(cases[c][0]), join_words, &words));
            words.data[words.len] = 0;
            assert_string_equal(words.data, cases[c][i < 3 ? i + 1 : 3]);
            split_scratch_free(&scratch, t);
            free(words.data);
        }
        tokenizer_free(t);
    }
}

static void test_bytes_that_are_not_utf8_are_words_of_their_own(void **state) {
    (void)state;
    struct tokenizer *t = open_gguf(DATA "ggml-vocab-gpt-2.gguf");
    struct split_scratch scratch;
    struct bytes words = {0};
    assert_int_equal(split_scratch_new(&scratch, t), OK);
    const char text[] = "caf\xC3 \xC3\xA9t\xE9!\xED\xA0\x80";
    assert_true(split_text(t, &scratch, text, strlen(text), join_words, &words));
    words.data[words.len] = 0;
    assert_string_equal(words.data, "caf|\xC3| \xC3\xA9t|\xE9|!|\xED|\xA0|\x80");
    split_scratch_free(&scratch, t);
    free(words.data);
    tokenizer_free(t);
}

/* ---- SentencePiece's order of merges ---- */

static void test_sentencepiece_merges_by_score_then_from_the_left(void **state) {
    (void)state;
    static const char *const tokens[] = {"<unk>", "a", "b", "ab", "ba", "aba", NULL};
    static const int32_t types[] = {2, 1, 1, 1, 1, 1};
    struct gguf_text x = {.model = "llama",
                          .tokens = tokens,
                          .types = types,
                          .scores = (const float[]){0, -9, -9, -2, -1, -3}};
    char msg[256] = "";
    struct tokenizer *t = NULL;
    assert_int_equal(open_gguf_text(&t, &x, msg, sizeof msg), OK);
    ASSERT_IDS(t, "abab", 0, 5, 2); /* "ba" before "ab", then "aba"; the prefix has no token */
    tokenizer_free(t);
    x.scores = (const float[]){0, -9, -9, -1, -1, -3};
    assert_int_equal(open_gguf_text(&t, &x, msg, sizeof msg), OK);
    ASSERT_IDS(t, "abab", 0, 3, 3); /* of equals the leftmost */
    ASSERT_IDS(t, "baba", 0, 4, 4);
    ASSERT_IDS(t, "aba", 0, 5);
    tokenizer_free(t);
}

/* ---- special and added tokens ---- */

static void test_user_text_never_becomes_a_special_token(void **state) {
    (void)state;
    struct tokenizer *t = open_gguf(DATA "ggml-vocab-gpt-2.gguf");
    ASSERT_IDS(t, "<|endoftext|>", TOKENIZE_SPECIAL, 50256);
    ASSERT_IDS(t, "<|endoftext|>", 0, 27, 91, 437, 1659, 5239, 91,
               29); /* tiktoken's, with none allowed */
    tokenizer_free(t);

    t = open_gguf(DATA "ggml-vocab-phi-3.gguf");
    static const char all[] = "<s><unk><|user|> <|end|>x<|assistant|><0x0A><|endoftext|>";
    struct ids r = encode(t, all, strlen(all), 0);
    char *back;
    size_t len;
    for (size_t i = 0; i < r.n; i++)
        assert_false(token_is_special(t, r.ids[i]));
    assert_int_equal(detokenize(t, r.ids, r.n, false, true, &back, &len), OK);
    assert_string_equal(back, all); /* <0x0A> was text and is */
    free(back);
    free(r.ids);
    tokenizer_free(t);
}

/* Vocabularies hold special tokens among the others, where merges could reach them. */
static void test_merging_never_makes_a_special_token(void **state) {
    (void)state;
    struct tokenizer *t = open_text("{\"added_tokens\":[{\"id\":3,\"content\":\"<s>\",\"special\":"
                                    "true}],\"model\":{\"vocab\":{\"<\":0,\"s\":1,"
                                    "\">\":2,\"<s>\":3,\"<s\":4},\"merges\":[\"< s\",\"<s >\"]}}",
                                    NULL);
    ASSERT_IDS(t, "<s>", 0, 4, 2);
    ASSERT_IDS(t, "<s>", TOKENIZE_SPECIAL, 3);
    tokenizer_free(t);

    static const char *const tokens[] = {"<", "s",   ">",  "<s>", "<s", "<0x41>", "<0", "x41>",
                                         "0", "x41", "x4", "1",   "x",  "4",      NULL};
    static const int32_t types[] = {1, 1, 1, 3, 1, 6, 1, 1, 1, 1, 1, 1, 1, 1};
    char msg[256] = "";
    struct gguf_text x = {
        .model = "llama", .tokens = tokens, .types = types, .scores = (const float[14]){0}};
    if (open_gguf_text(&t, &x, msg, sizeof msg) != OK) fail_msg("%s", msg);
    ASSERT_IDS(t, "<s>", 0, 4, 2);
    ASSERT_IDS(t, "<0x41>", 0, 6, 7); /* not the byte A */
    ASSERT_IDS(t, "A", 0, 5);
    tokenizer_free(t);
}

static void test_special_tokens_are_found_only_inside_the_ranges(void **state) {
    (void)state;
    struct tokenizer *t = open_gguf(DATA "ggml-vocab-gpt-2.gguf");
    static const char text[] = "<|endoftext|><|endoftext|><|endoftext|>"; /* 13 bytes each */
    const struct text_range ranges[] = {{0, 13}, {14, 39}}; /* the second lacks its first byte */
    int32_t *ids;
    size_t n, special = 0;
    assert_int_equal(tokenize_ranges(t, text, 39, ranges, 2, false, false, &ids, &n), OK);
    for (size_t i = 0; i < n; i++)
        special += ids[i] == 50256;
    assert_int_equal(special, 2);
    assert_int_equal(ids[0], 50256);
    assert_int_equal(ids[n - 1], 50256);
    free(ids);
    tokenizer_free(t);
}

static void test_added_tokens_that_are_not_special_are_found_in_any_text(void **state) {
    (void)state;
    struct tokenizer *t = open_folder(DATA "gpt-neox-20b");
    /* 24 spaces are one token, 2 another; a single one belongs to its word */
    ASSERT_IDS(t, "                         x", 0, 50254, 1269);
    ASSERT_IDS(t, "                          x", 0, 50254, 50276, 89);
    ASSERT_IDS(t, "<|padding|>", TOKENIZE_SPECIAL, 1);
    struct ids r = encode(t, "<|padding|>", 11, 0);
    assert_true(r.n > 1);
    free(r.ids);
    tokenizer_free(t);
}

static void test_phi3_marks_take_the_white_space_behind_them(void **state) {
    (void)state;
    struct tokenizer *t = open_gguf(DATA "ggml-vocab-phi-3.gguf");
    ASSERT_IDS(t, "<|user|>\n \xE3\x80\x80Hello<|end|>\n", TOKENIZE_SPECIAL, 32010, 15043, 32007);
    ASSERT_IDS(t, "<s>\nHello", TOKENIZE_SPECIAL, 1, 29871, 13, 10994);
    tokenizer_free(t);
}

/* ---- BOS, EOS and the config file ---- */

static const char tiny[] =
    "{\"added_tokens\":[{\"id\":2,\"content\":\"<s>\",\"special\":true},"
    "{\"id\":3,\"content\":\"</s>\",\"special\":true}],\"post_processor\":%s,"
    "\"model\":{\"vocab\":{\"a\":0,\"b\":1},\"merges\":[]}}";
static const char bos_only[] =
    "{\"type\":\"Sequence\",\"processors\":[{\"type\":\"ByteLevel\"},{\"type\":"
    "\"TemplateProcessing\","
    "\"single\":[{\"SpecialToken\":{\"id\":\"<s>\"}},{\"Sequence\":{\"id\":\"A\"}}]}]}";

static void test_bos_and_eos_come_as_the_files_say(void **state) {
    (void)state;
    char json[1024];
    snprintf(json, sizeof json, tiny, "null");
    struct tokenizer *t = open_text(json, NULL);
    assert_int_equal(tokenizer_bos(t), -1);
    assert_false(tokenizer_add_bos(t));
    ASSERT_IDS(t, "ab", TOKENIZE_ADD_BOS_EOS, 0, 1);
    tokenizer_free(t);

    t = open_text(json, "{\"bos_token\":{\"content\":\"<s>\",\"lstrip\":false},\"eos_token\":\"</"
                        "s>\",\"add_eos_token\":true}");
    assert_int_equal(tokenizer_bos(t), 2);
    assert_int_equal(tokenizer_eos(t), 3);
    assert_false(tokenizer_add_bos(t));
    ASSERT_IDS(t, "ab", TOKENIZE_ADD_BOS_EOS, 0, 1, 3);
    ASSERT_IDS(t, "ab", 0, 0, 1);
    tokenizer_free(t);

    snprintf(json, sizeof json, tiny, bos_only);
    t = open_text(json, NULL); /* the post-processor alone */
    assert_int_equal(tokenizer_bos(t), 2);
    ASSERT_IDS(t, "ab", TOKENIZE_ADD_BOS_EOS, 2, 0, 1);
    tokenizer_free(t);
    t = open_text(json, "{\"bos_token\":\"<s>\",\"add_bos_token\":false}"); /* the config wins */
    ASSERT_IDS(t, "ab", TOKENIZE_ADD_BOS_EOS, 0, 1);
    tokenizer_free(t);

    t = open_gguf(DATA "ggml-vocab-phi-3.gguf");
    ASSERT_IDS(t, "", TOKENIZE_ADD_BOS_EOS, 1);
    assert_int_equal(tokenizer_eos(t), 32000);
    assert_non_null(strstr(tokenizer_chat_template(t), "<|user|>"));
    tokenizer_free(t);
    t = open_folder("models/stories260k-hedgehog");
    ASSERT_IDS(t, "Once upon a time", TOKENIZE_ADD_BOS_EOS, 1, 403, 407, 261, 378);
    assert_null(tokenizer_chat_template(t));
    tokenizer_free(t);
}

static void test_chat_template_is_the_one_named_default(void **state) {
    (void)state;
    char json[1024];
    snprintf(json, sizeof json, tiny, "null");
    struct tokenizer *t =
        open_text(json, "{\"chat_template\":[{\"name\":\"tool_use\",\"template\":\"T\"},"
                        "{\"name\":\"default\",\"template\":\"D\"}]}");
    assert_string_equal(tokenizer_chat_template(t), "D");
    tokenizer_free(t);
    t = open_text(json, "{\"chat_template\":\"S\"}");
    assert_string_equal(tokenizer_chat_template(t), "S");
    tokenizer_free(t);
}

/* ---- bytes of tokens ---- */

static void test_any_bytes_come_back_exactly(void **state) {
    (void)state;
    struct tokenizer *all[] = {open_gguf(DATA "ggml-vocab-gpt-2.gguf"), open_folder(DATA "gpt2"),
                               open_gguf(DATA "ggml-vocab-phi-3.gguf"),
                               open_folder("models/stories260k-hedgehog")};
    char text[3000];
    uint64_t seed = 11;
    for (int k = 0; k < 4; k++) {
        assert_same_bytes(all[k], "", 0);
        assert_same_bytes(all[k], "a\0b\0", 4);
        assert_same_bytes(all[k], " x", 2);
        for (int i = 0; i < 60; i++) {
            size_t len = random_next(&seed) % sizeof text;
            uint64_t limit = i % 3 == 0   ? 256
                             : i % 3 == 1 ? 128
                                          : 40; /* 40: mostly spaces and controls */
            for (size_t b = 0; b < len; b++)
                text[b] = (char)(random_next(&seed) % limit);
            assert_same_bytes(all[k], text, len);
        }
        tokenizer_free(all[k]);
    }
}

static void test_bytes_of_tokens(void **state) {
    (void)state;
    size_t n;
    struct tokenizer *t = open_gguf(DATA "ggml-vocab-phi-3.gguf");
    assert_memory_equal(token_bytes(t, 13, false, &n), "\n", 1); /* <0x0A> */
    assert_int_equal(n, 1);
    assert_string_equal(token_piece(t, 13), "<0x0A>");
    assert_memory_equal(token_bytes(t, 15043, false, &n), " Hello", 6);
    assert_int_equal(n, 6);
    token_bytes(t, 32007, false, &n);
    assert_int_equal(n, 0);
    assert_memory_equal(token_bytes(t, 32007, true, &n), "<|end|>", 7);
    assert_int_equal(n, 7);
    assert_true(token_is_special(t, 32007));
    assert_false(token_is_special(t, 15043));
    assert_int_equal(token_lookup(t, "<|end|>"), 32007);
    assert_int_equal(token_lookup(t, "no such token"), -1);
    static const int32_t outside[] = {-1, 32064, INT32_MAX, INT32_MIN};
    for (int i = 0; i < 4; i++) {
        token_bytes(t, outside[i], true, &n);
        assert_int_equal(n, 0);
        assert_string_equal(token_piece(t, outside[i]), "");
        assert_false(token_is_special(t, outside[i]));
    }
    assert_int_equal(tokenizer_vocab_size(t), 32064);
    tokenizer_free(t);

    t = open_folder(DATA "gpt2");
    int32_t id = token_lookup(t, "\xC4\xA0"
                                 "caf"); /* GPT-2 writes the space as U+0120 */
    assert_memory_equal(token_bytes(t, id, false, &n), " caf", 4);
    assert_int_equal(n, 4);
    tokenizer_free(t);
}

static void test_leading_space_is_stripped_only_where_it_was_put(void **state) {
    (void)state;
    struct tokenizer *t = open_gguf(DATA "ggml-vocab-phi-3.gguf");
    const int32_t ids[] = {1, 15043, 3186};
    char *text;
    size_t len;
    assert_int_equal(detokenize(t, ids, 3, false, true, &text, &len), OK);
    assert_string_equal(text, "Hello world");
    free(text);
    assert_int_equal(detokenize(t, ids, 3, true, false, &text, &len), OK);
    assert_string_equal(text, "<s> Hello world");
    free(text);
    tokenizer_free(t);
    t = open_gguf(DATA "ggml-vocab-gpt-2.gguf");
    assert_int_equal(detokenize(t, (const int32_t[]){18435}, 1, false, true, &text, &len), OK);
    assert_string_equal(text, " Hello"); /* byte-level: the space is the text's own */
    free(text);
    tokenizer_free(t);
}

/* ---- UTF-8 ---- */

static uint64_t fnv(uint64_t h, const void *data, size_t len) {
    for (size_t i = 0; i < len; i++)
        h = (h ^ ((const unsigned char *)data)[i]) * 0x100000001b3;
    return h;
}

/* All 406,900 strings of 1 to 4 bytes at the edges of UTF-8's ranges, against Python 3.11: the
 * digests are FNV-1a over s.decode('utf8', 'replace').encode() + b'\xfe', and over one byte a
 * string, len(s) minus what codecs.getincrementaldecoder('utf8') keeps in getstate()[0] (but for ED
 * A0..BF, which Python keeps though no character begins so). */
static void test_utf8_repair_and_whole_agree_with_python(void **state) {
    (void)state;
    static const unsigned char edge[25] = {0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF,
                                           0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE,
                                           0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF};
    uint64_t repaired = 0xcbf29ce484222325, whole = repaired;
    for (int len = 1, count = 25; len <= 4; len++, count *= 25) {
        for (int i = 0; i < count; i++) {
            char s[4];
            for (int k = len - 1, rest = i; k >= 0; k--, rest /= 25)
                s[k] = (char)edge[rest % 25];
            char *out;
            size_t out_len;
            assert_int_equal(utf8_repair(s, (size_t)len, &out, &out_len), OK);
            repaired = fnv(fnv(repaired, out, out_len), "\xFE", 1);
            free(out);
            unsigned char n = (unsigned char)utf8_whole(s, (size_t)len);
            whole = fnv(whole, &n, 1);
        }
    }
    assert_true(repaired == 0xccb50381c9f5dfd7);
    assert_true(whole == 0x4143c75b208608c1);
}

/* ---- time ---- */

/* Each takes 0.02 to 0.4 s on one Zen 5 core (optimised).  With anything quadratic a megabyte would
 * take minutes, so 20 s leaves room for sanitizers and a busy machine. */
static void test_a_megabyte_of_anything_takes_bounded_time(void **state) {
    (void)state;
    enum { N = 1 << 20 };
    static const char *const patterns[] = {
        "a",        " ",           "\n", "7",  "!", "   a", "ab", "\xCC\x96\xCC\x81\xCC\x96",
        "\xF0\x9F", "<|im_start|", "'",  " \n"};
    struct tokenizer *all[] = {open_gguf(DATA "ggml-vocab-gpt-2.gguf"),
                               open_gguf(DATA "ggml-vocab-phi-3.gguf"),
                               open_folder(DATA "gpt-neox-20b")};
    char *text = malloc(N);
    uint64_t seed = 3;
    for (int k = 0; k < 3; k++) {
        for (int p = 0; p < 14; p++) {
            for (size_t i = 0; i < N; i++) {
                if (p == 12)
                    text[i] = (char)random_next(&seed);
                else if (p == 13)
                    text[i] = (char)('a' + random_next(&seed) % 26);
                else
                    text[i] = patterns[p][i % strlen(patterns[p])];
            }
            struct timespec begin, end;
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
            struct ids r = encode(all[k], text, N, 0);
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
            free(r.ids);
            assert_true(end.tv_sec - begin.tv_sec < 20);
        }
        tokenizer_free(all[k]);
    }
    free(text);
}

/* A hostile pattern: exponential backtracking is given up, and the text still comes back. */
static void test_a_catastrophic_pattern_is_given_up(void **state) {
    (void)state;
    struct tokenizer *t =
        open_text("{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a+)+b\"},"
                  "\"behavior\":\"Isolated\"},"
                  "\"model\":{\"vocab\":{\"a\":0,\"b\":1,\"c\":2},\"merges\":[]}}",
                  NULL);
    char text[5001];
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 2] = 'c';
    text[0] = 'b'; /* PCRE2 looks ahead for the b it needs */
    text[sizeof text - 1] = 'b';
    assert_same_bytes(t, text, sizeof text);
    tokenizer_free(t);
}

/* ---- files that are refused ---- */

static void test_what_is_not_supported_is_named(void **state) {
    (void)state;
#define MODEL "\"model\":{\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[]}"
    static const struct {
        const char *json, *config, *says;
    } cases[] = {
        {"[]", NULL, "model"},
        {"{}", NULL, "model"},
        {"{\"model\":{\"type\":\"Unigram\",\"vocab\":{}}}", NULL, "Unigram"},
        {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{\"a\":0}}}", NULL, "WordPiece"},
        {"{\"model\":{\"vocab\":{\"a\":0}}}", NULL, "model type"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0}}}", NULL, "merges"},
        {"{\"model\":{\"vocab\":[],\"merges\":[]}}", NULL, "model.vocab"},
        {"{\"model\":{\"vocab\":{\"a\":-1},\"merges\":[]}}", NULL, "\"a\""},
        {"{\"model\":{\"vocab\":{\"a\":1.5},\"merges\":[]}}", NULL, "\"a\""},
        {"{\"model\":{\"vocab\":{\"a\":99999999},\"merges\":[]}}", NULL, "\"a\""},
        {"{\"model\":{\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", NULL, "\"a\" and to \"b\""},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"a b\"]}}", NULL, "model.merges[0]"},
        {"{\"model\":{\"vocab\":{\"a\":0,\"b\":1},\"merges\":[\"a b\"]}}", NULL, "the result"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"aa\"]}}", NULL, "model.merges[0]"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"\"]}}", NULL, "model.merges[0]"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[[\"a\"]]}}", NULL, "model.merges[0]"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[[\"a\",1]]}}", NULL, "model.merges[0]"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"dropout\":0.1}}", NULL, "dropout"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"end_of_word_suffix\":\"</w>\"}}", NULL,
         "</w>"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"unk_token\":\"?\"}}", NULL, "unk_token"},
        {"{\"normalizer\":{\"type\":\"Lowercase\"}," MODEL "}", NULL, "normalizer Lowercase"},
        {"{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Replace\","
         "\"pattern\":{\"String\":\"a\"},\"content\":"
         "\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"},{\"type\":\"Replace\",\"pattern\":{"
         "\"String\":\"a\"},\"content\":"
         "\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"}]}," MODEL "}",
         NULL, "longer"},
        {"{\"normalizer\":{\"type\":\"Replace\",\"content\":\"x\"}," MODEL "}", NULL, "Replace"},
        {"{\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"(\"},\"content\":\"x\"}"
         "," MODEL "}",
         NULL, "pattern \"(\""},
        {"{\"pre_tokenizer\":{\"type\":\"BertPreTokenizer\"}," MODEL "}", NULL, "BertPreTokenizer"},
        {"{\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Whitespace\"}]}"
         "," MODEL "}",
         NULL, "Whitespace"},
        {"{\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\"},{"
         "\"type\":\"Digits\"}]}," MODEL "}",
         NULL, "Digits behind ByteLevel"},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"[\"},\"behavior\":"
         "\"Isolated\"}," MODEL "}",
         NULL, "pattern \"[\""},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},\"behavior\":"
         "\"Odd\"}," MODEL "}",
         NULL, "Odd"},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\"}," MODEL "}", NULL,
         "pattern"},
        {"{\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"_\"}," MODEL "}", NULL,
         "\"_\""},
        {"{\"pre_tokenizer\":{\"type\":\"Metaspace\",\"prepend_scheme\":\"last\"}," MODEL "}", NULL,
         "last"},
        {"{\"pre_tokenizer\":{}," MODEL "}", NULL, "(none)"},
        {"{\"post_processor\":{\"type\":\"RobertaProcessing\"}," MODEL "}", NULL,
         "RobertaProcessing"},
        {"{\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{"
         "\"id\":\"[CLS]\"}}]}," MODEL "}",
         NULL, "[CLS]"},
        {"{\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{"
         "\"id\":\"a\"}},{\"SpecialToken\":{\"id\":\"b\"}}]}," MODEL "}",
         NULL, "more than one"},
        {"{\"added_tokens\":[{\"id\":7}]," MODEL "}", NULL, "added_tokens"},
        {"{\"added_tokens\":[{\"id\":1,\"content\":\"x\"}]," MODEL "}", NULL, "\"x\""},
        {"{\"added_tokens\":[{\"id\":7,\"content\":\"x\",\"single_word\":true}]," MODEL "}", NULL,
         "single_word"},
        {"{" MODEL "}", "{\"bos_token\":\"<s>\"}", "tokenizer_config.json: bos_token \"<s>\""},
        {"{" MODEL "}", "{\"eos_token\":", "tokenizer_config.json"},
        {"{" MODEL, NULL, "tokenizer.json"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char msg[512] = "";
        struct tokenizer *t = NULL;
        const char *config = cases[i].config;
        enum err e = tokenizer_open_text(&t, cases[i].json, strlen(cases[i].json), config,
                                         config ? strlen(config) : 0, msg, sizeof msg);
        if (e != ERR_FORMAT || !strstr(msg, cases[i].says))
            fail_msg("%s: %s \"%s\", which does not say %s", cases[i].json, err_name(e), msg,
                     cases[i].says);
        assert_null(t);
    }
    char msg[256] = "";
    struct tokenizer *t = NULL;
    assert_int_equal(tokenizer_open_json(&t, "tests/data/no-such-folder", msg, sizeof msg), ERR_IO);
    assert_non_null(strstr(msg, "tests/data/no-such-folder/tokenizer.json"));
}

static void test_gguf_faults_are_named(void **state) {
    (void)state;
    static const char *const ab[] = {"a", "b", NULL}, *const none[] = {NULL},
                             *const merge[] = {"a b", NULL}, *const odd[] = {"ab", NULL};
    const struct {
        struct gguf_text file;
        const char *says;
    } cases[] = {
        {{.tokens = ab}, "tokenizer.ggml.model"},
        {{.model = "bert", .tokens = ab}, "bert"},
        {{.model = "gpt2", .pre = "gpt-2"}, "tokenizer.ggml.tokens"},
        {{.model = "gpt2", .pre = "gpt-2", .tokens = none}, "tokenizer.ggml.tokens"},
        {{.model = "gpt2", .tokens = ab}, "tokenizer.ggml.pre"},
        {{.model = "gpt2", .pre = "tekken", .tokens = ab}, "tekken"},
        {{.model = "gpt2", .pre = "gpt-2", .tokens = ab, .merges = merge},
         "tokenizer.ggml.merges[0]"},
        {{.model = "gpt2", .pre = "gpt-2", .tokens = ab, .merges = odd},
         "tokenizer.ggml.merges[0]"},
        {{.model = "llama", .tokens = ab}, "tokenizer.ggml.scores"},
        {{.model = "llama", .tokens = ab, .scores = (const float[]){0, 0.0f / 0.0f}},
         "tokenizer.ggml.scores[1]"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char msg[512] = "";
        struct tokenizer *t = NULL;
        enum err e = open_gguf_text(&t, &cases[i].file, msg, sizeof msg);
        if (e != ERR_FORMAT || !strstr(msg, cases[i].says))
            fail_msg("case %zu: %s \"%s\", which does not say %s", i, err_name(e), msg,
                     cases[i].says);
        assert_null(t);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_llama_cpp_vectors_agree_from_gguf),
        cmocka_unit_test(test_llama_cpp_vectors_agree_from_tokenizer_json),
        cmocka_unit_test(test_starcoder_vectors_agree_where_they_are_at_hand),
        cmocka_unit_test(test_small_tokenizers_agree_with_hugging_face),
        cmocka_unit_test(test_gguf_and_tokenizer_json_agree_on_any_bytes),
        cmocka_unit_test(test_words_are_those_of_the_patterns),
        cmocka_unit_test(test_bytes_that_are_not_utf8_are_words_of_their_own),
        cmocka_unit_test(test_sentencepiece_merges_by_score_then_from_the_left),
        cmocka_unit_test(test_user_text_never_becomes_a_special_token),
        cmocka_unit_test(test_merging_never_makes_a_special_token),
        cmocka_unit_test(test_special_tokens_are_found_only_inside_the_ranges),
        cmocka_unit_test(test_added_tokens_that_are_not_special_are_found_in_any_text),
        cmocka_unit_test(test_phi3_marks_take_the_white_space_behind_them),
        cmocka_unit_test(test_bos_and_eos_come_as_the_files_say),
        cmocka_unit_test(test_chat_template_is_the_one_named_default),
        cmocka_unit_test(test_any_bytes_come_back_exactly),
        cmocka_unit_test(test_bytes_of_tokens),
        cmocka_unit_test(test_leading_space_is_stripped_only_where_it_was_put),
        cmocka_unit_test(test_utf8_repair_and_whole_agree_with_python),
        cmocka_unit_test(test_a_megabyte_of_anything_takes_bounded_time),
        cmocka_unit_test(test_a_catastrophic_pattern_is_given_up),
        cmocka_unit_test(test_what_is_not_supported_is_named),
        cmocka_unit_test(test_gguf_faults_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
