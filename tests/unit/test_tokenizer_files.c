/* test_tokenizer_files.c - what tokenizer files say of special tokens and of ends, and files that
 * are refused by name. */
#include "tokenizer_testing.h"

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
        cmocka_unit_test(test_user_text_never_becomes_a_special_token),
        cmocka_unit_test(test_merging_never_makes_a_special_token),
        cmocka_unit_test(test_special_tokens_are_found_only_inside_the_ranges),
        cmocka_unit_test(test_added_tokens_that_are_not_special_are_found_in_any_text),
        cmocka_unit_test(test_phi3_marks_take_the_white_space_behind_them),
        cmocka_unit_test(test_bos_and_eos_come_as_the_files_say),
        cmocka_unit_test(test_chat_template_is_the_one_named_default),
        cmocka_unit_test(test_what_is_not_supported_is_named),
        cmocka_unit_test(test_gguf_faults_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
