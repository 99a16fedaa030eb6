/* test_tokenizer.c - tokenizers: the reference implementations' ids, exact bytes back, bounded
 * time.  URCHIN_TEST_DATA names a folder with further vectors (tokenizers/llama.cpp). */
#include "tokenizer_testing.h"

#include <time.h>

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
        cmocka_unit_test(test_any_bytes_come_back_exactly),
        cmocka_unit_test(test_bytes_of_tokens),
        cmocka_unit_test(test_leading_space_is_stripped_only_where_it_was_put),
        cmocka_unit_test(test_utf8_repair_and_whole_agree_with_python),
        cmocka_unit_test(test_a_megabyte_of_anything_takes_bounded_time),
        cmocka_unit_test(test_a_catastrophic_pattern_is_given_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
