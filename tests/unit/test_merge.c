/* test_merge.c - `urchin convert --merge`: one folder that gives what adapter and base gave, and
 * tokenizers that go from GGUF to tokenizer.json with all their ids. */
#include "checkpoints.h"
#include "convert/tokenizer_files.h"
#include "convert_testing.h"
#include "model/converted.h"
#include "model/model.h"

#include <cjson/cJSON.h>
#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>

#define VOCABS "tests/data/tokenizers/"

static struct model *open_in_bf16(const char *path) {
    struct model_options o;
    model_options_init(&o);
    o.path = path;
    o.weights = WEIGHT_BF16;
    o.n_slots = 1;
    o.max_rows = o.max_logits = 64;
    o.team = team;
    struct model *m = NULL;
    if (model_open(&m, &o, said, sizeof said)) fail_msg("%s", said);
    return m;
}

/* ---- two models are one ---- */
static void assert_same_logits(struct model *a, struct model *b, int n_ids, int n_chunks) {
    struct model *both[] = {a, b};
    size_t vocab = (size_t)model_info(a)->vocab_size;
    assert_int_equal(vocab, model_info(b)->vocab_size);
    float *kept = malloc(64 * vocab * sizeof *kept);
    for (int chunk = 0; chunk < n_chunks; chunk++)
        for (int k = 0; k < 2; k++) {
            int32_t ids[13];
            for (int i = 0; i < 13; i++)
                ids[i] = (chunk * 29 + i * 7 + i * i) % n_ids;
            struct model_run run = {.n_rows = 13, .tokens = ids, .n_logits = 13};
            const float *logits;
            assert_int_equal(model_step(both[k], &run, 1, &logits), OK);
            if (k == 0)
                memcpy(kept, logits, 13 * vocab * sizeof *kept);
            else
                assert_memory_equal(kept, logits, 13 * vocab * sizeof *kept);
        }
    free(kept);
}

static void assert_same_words(const struct model *a, const struct model *b) {
    static const char *const texts[] = {
        "", "abc", "Once upon a time, 12345 cats!\n\n  said <|im_end|> \xC3\xA9\xE2\x82\xAC\xFF."};
    const struct model *both[] = {a, b};
    int32_t *ids[2];
    size_t n[2];
    for (int t = 0; t < 6; t++) {
        const char *text = texts[t % 3];
        struct chat_message message = {"user", text, strlen(text)};
        for (int k = 0; k < 2; k++)
            assert_int_equal(t < 3 ? tokenize(model_tokenizer(both[k]), text, strlen(text),
                                              TOKENIZE_ADD_BOS_EOS, &ids[k], &n[k])
                                   : chat_render(model_chat(both[k]), &message, 1, true, false,
                                                 &ids[k], &n[k], said, sizeof said),
                             OK);
        assert_int_equal(n[0], n[1]);
        assert_memory_equal(ids[0], ids[1], n[0] * sizeof **ids);
        free(ids[0]);
        free(ids[1]);
    }
    const struct model_info *x = model_info(a), *y = model_info(b);
    assert_int_equal(x->n_eos_ids, y->n_eos_ids);
    for (int i = 0; i < x->n_eos_ids; i++) { /* in any order */
        bool found = false;
        for (int k = 0; k < y->n_eos_ids; k++)
            found |= x->eos_ids[i] == y->eos_ids[k];
        assert_true(found);
    }
    assert_int_equal(x->context, y->context);
    assert_int_equal(x->measured_to, y->measured_to);
    assert_int_equal(chat_family(model_chat(a)), chat_family(model_chat(b)));
}

/* No rounding to allow for: a merged matrix is W + scale B A in fp32, rounded to bf16, which is
 * what --weights bf16 does when it loads the adapter. */
static void assert_one_model(const char *adapter, const char *merged, int n_ids, int n_chunks) {
    struct model *a = open_in_bf16(adapter), *b = open_in_bf16(merged);
    assert_same_words(a, b);
    assert_same_logits(a, b, n_ids, n_chunks);
    assert_null(model_info(b)->base_path);
    model_close(a);
    model_close(b);
}

static void write_letters(const char *path) {
    char text[3001];
    uint32_t seed = 1;
    for (int i = 0; i < 3000; i++) {
        seed = seed * 1664525u + 1013904223u;
        text[i] = "abc"[(seed >> 20) % 3];
    }
    text[3000] = 0;
    write_text(path, text);
}

/* Gives a converted folder random low-rank parts of all four targets. */
static void give_low_rank(const char *path, int hidden, int q, int kv) {
    char file[PATH_MAX];
    struct safetensors *st;
    struct st_writer w = {0};
    tiny_path(file, path, "hedgehog.safetensors");
    assert_int_equal(safetensors_open(&st, file, said, sizeof said), OK);
    for (int i = 0; i < safetensors_count(st); i++) {
        const struct st_tensor *t = safetensors_at(st, i);
        int dims[8];
        for (int d = 0; d < t->n_dims; d++)
            dims[d] = (int)t->dims[d];
        st_put(&w, t->name, "F32", t->n_dims, dims, t->data, t->bytes);
    }
    static const char *const names[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
    const int n_out[] = {q, kv, kv, hidden}, n_in[] = {hidden, hidden, hidden, q};
    uint32_t seed = 9;
    for (int layer = 0; layer < CHECK_L; layer++)
        for (int t = 0; t < 4; t++) {
            char part[64];
            snprintf(part, sizeof part, "attn.%s.lora_A", names[t]);
            tiny_put(&w, "layers.", layer, part, 2, (int[]){3, n_in[t]}, 0.3f, &seed);
            snprintf(part, sizeof part, "attn.%s.lora_B", names[t]);
            tiny_put(&w, "layers.", layer, part, 2, (int[]){n_out[t], 3}, 0.3f, &seed);
        }
    struct bytes b = st_finish(&w);
    safetensors_close(st);
    write_bytes(file, b.at, b.len), free(b.at);

    tiny_path(file, path, "urchin.json");
    struct bytes text = contents(file);
    cJSON *o = cJSON_Parse((char *)text.at);
    cJSON_ReplaceItemInObject(o, "low_rank",
                              cJSON_Parse("{\"rank\":3,\"scale\":0.7,\"targets\":[\"q_proj\","
                                          "\"k_proj\",\"v_proj\",\"o_proj\"]}"));
    char *edited = cJSON_PrintUnformatted(o);
    write_text(file, edited);
    cJSON_Delete(o);
    free(edited);
    free(text.at);
}

static void test_every_architecture_from_either_container_keeps_its_bits(void **state) {
    (void)state;
    static const char *const types[] = {"llama", "qwen2", "gpt2"};
    write_letters(in("letters.txt"));
    for (int t = 0; t < 3; t++)
        for (int gguf = 0; gguf < 2; gguf++) {
            char base[80], file[100], out[120], merged[140];
            snprintf(base, sizeof base, "%.60s/%.10s", folder, types[t]);
            snprintf(file, sizeof file, "%s/model.gguf", base);
            snprintf(out, sizeof out, "%s-%d", base, gguf);
            snprintf(merged, sizeof merged, "%s-whole/", out);
            if (!is_there(base)) mkdir(base, 0700), check_write(base, types[t]);
            CONVERTED("convert", gguf ? file : base, "--text", in("letters.txt"), "--out", out,
                      "--finetune", "none", "--steps", "2", "--window-size", "8", "--cache-size",
                      "8", "--rows", "11");
            give_low_rank(out, CHECK_E, CHECK_HEADS * CHECK_D,
                          t == 2 ? CHECK_E : CHECK_KV * CHECK_D);
            CONVERTED("convert", "--merge", out, "--out", merged);
            assert_one_model(out, merged, 26, t == 2 ? 3 : 20);

            char config[180];
            tiny_path(config, merged, "config.json");
            struct bytes text = contents(config);
            assert_non_null(strstr((char *)text.at, types[t]));
            assert_non_null(strstr((char *)text.at, "bfloat16"));
            free(text.at);
        }
}

/* With all weights trained, at a rate of 0, so that they are still the base's: what is written is
 * the model that maps alone make of it, in a folder that needs no other file. */
static void test_all_weights_from_either_container_make_a_whole_folder(void **state) {
    (void)state;
    static const char *const types[] = {"llama", "qwen2", "gpt2"};
    write_letters(in("letters.txt"));
    for (int t = 0; t < 3; t++)
        for (int gguf = 0; gguf < 2; gguf++) {
            char base[80], file[100], maps[120], full[120];
            snprintf(base, sizeof base, "%.60s/%.10s", folder, types[t]);
            snprintf(file, sizeof file, "%s/model.gguf", base);
            snprintf(maps, sizeof maps, "%s-maps-%d", base, gguf);
            snprintf(full, sizeof full, "%s-full-%d", base, gguf);
            if (!is_there(base)) mkdir(base, 0700), check_write(base, types[t]);
            const char *from = gguf ? file : base;
            CONVERTED("convert", from, "--text", in("letters.txt"), "--out", maps, "--name", "m",
                      "--steps", "2", "--window-size", "8", "--cache-size", "8", "--rows", "11",
                      "--finetune", "none");
            CONVERTED("convert", from, "--text", in("letters.txt"), "--out", full, "--name", "m",
                      "--steps", "2", "--window-size", "8", "--cache-size", "8", "--rows", "11",
                      "--finetune", "full", "--finetune-steps", "1", "--finetune-lr", "0",
                      "--finetune-lr-maps", "0");
            assert_one_model(maps, full, 26, t == 2 ? 3 : 20);
            if (!gguf) continue;
            char path[180];
            tiny_path(path, full, "model.gguf");
            assert_false(is_there(path));
        }
}

/* What a GGUF base's words are written to cannot take them: nothing of them stays, and nothing was
 * learned before. */
static void test_words_that_cannot_be_written_leave_nothing(void **state) {
    (void)state;
    char file[100];
    struct rlimit was;
    write_letters(in("letters.txt"));
    mkdir(in("llama"), 0700);
    check_write(in("llama"), "llama");
    snprintf(file, sizeof file, "%s", in("llama/model.gguf"));
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    for (rlim_t size = 300; size <= 1000; size += 700) { /* config.json has 500 bytes or so */
        struct rlimit little = {size, was.rlim_max};
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &little), 0);
        int status = CONVERT("convert", file, "--text", in("letters.txt"), "--out", in("out"),
                             "--window-size", "8", "--finetune", "full");
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
        assert_int_equal(status, 1);
        if (!strstr(said, size == 300 ? "config.json" : "tokenizer")) fail_msg("%s", said);
        assert_false(is_there(in("out/config.json")) || is_there(in("out/tokenizer.json")) ||
                     is_there(in("out/checkpoint")));
    }
    signal(SIGXFSZ, handler);
}

/* The folder that models/ has: no adapter, but low-rank parts of its own (tiny_model.h). */
static void test_a_whole_folder_with_low_rank_parts_is_merged_too(void **state) {
    (void)state;
    mkdir(in("tiny"), 0700);
    tiny_write(in("tiny"));
    CONVERTED("convert", "--merge", in("tiny"), "--out", in("whole"), "--name", "other");
    assert_one_model(in("tiny"), in("whole"), 512, 20);
    struct model *m = open_in_bf16(in("whole"));
    assert_string_equal(model_info(m)->name, "other");
    model_close(m);
    CONVERTED("convert", "--merge", in("whole"), "--out",
              in("again")); /* nothing left to do, nor changed */
    struct bytes a = contents(in("whole/model.safetensors")),
                 b = contents(in("again/model.safetensors"));
    assert_int_equal(a.len, b.len);
    assert_memory_equal(a.at, b.at, a.len);
    free(a.at);
    free(b.at);
    assert_false(is_there(in("whole.new")));
}

static void test_the_default_model_keeps_its_bits(void **state) {
    (void)state;
    struct converted *c;
    char *base = NULL;
    const char *model = "models/smollm2-135m-hedgehog";
    assert_int_equal(converted_open(&c, model, said, sizeof said), OK);
    enum err e = converted_find_base(c, model, &base, said, sizeof said);
    converted_close(c);
    free(base);
    if (e) skip(); /* its base is not on this machine */
    CONVERTED("convert", "--merge", model, "--out", in("whole"));
    assert_one_model(model, in("whole"), 49152, 2);
}

/* What transformers makes of the base part: tests/tools/merged.py, where it is installed. */
static void test_transformers_reads_the_folder_to_the_same_tokens(void **state) {
    (void)state;
    const char *python = getenv("URCHIN_TRANSFORMERS"); /* a python that has them */
    char command[PATH_MAX];
    snprintf(command, sizeof command, "%.200s -c 'import torch, transformers' 2>/dev/null",
             python ? python : "python3");
    if (system(command)) skip();
    static const char *const types[] = {"llama", "qwen2", "gpt2", "stories"};
    write_letters(in("letters.txt"));
    for (int t = 0; t < 4; t++) {
        char base[80], file[100], out[120], merged[140];
        bool stories = t == 3;
        snprintf(base, sizeof base, "%.60s/%.10s", folder, types[t]);
        snprintf(file, sizeof file, "%s/model.gguf", base);
        snprintf(out, sizeof out, "%s-adapter", base);
        snprintf(merged, sizeof merged, "%s-whole", base);
        if (!stories) mkdir(base, 0700), check_write(base, types[t]);
        CONVERTED("convert", stories ? "tests/data/models/stories260k" : file, "--text",
                  stories ? "tests/data/text/tinystories-valid-head.txt" : in("letters.txt"),
                  "--out", out, "--finetune", "none", "--steps", "0", "--window-size", "8",
                  "--cache-size", "0");
        CONVERTED("convert", "--merge", out, "--out", merged);
        tiny_path(file, merged, "urchin.json");
        unlink(file); /* the base part alone: softmax */
        struct model_options o;
        model_options_init(&o);
        o.path = merged;
        o.weights = WEIGHT_FP32;
        o.kv_type = KV_FP32;
        o.n_slots = 1;
        o.team = team;
        struct model *m = NULL;
        if (model_open(&m, &o, said, sizeof said)) fail_msg("%s", said);
        const char *text = stories ? "Once upon a time, there was a girl." : "abcabbacab";
        int32_t *ids;
        size_t n;
        const float *logits;
        assert_int_equal(
            tokenize(model_tokenizer(m), text, strlen(text), TOKENIZE_ADD_BOS_EOS, &ids, &n), OK);
        struct model_run run = {.n_rows = (int)n, .tokens = ids, .n_logits = (int)n};
        assert_int_equal(model_step(m, &run, 1, &logits), OK);
        write_bytes(in("logits"), logits, n * (size_t)model_info(m)->vocab_size * sizeof *logits);
        write_bytes(in("ids"), ids, n * sizeof *ids);
        write_text(in("text"), text);
        free(ids);
        model_close(m);
        snprintf(command, sizeof command, "%.200s tests/tools/merged.py %s %s >%s 2>&1",
                 python ? python : "python3", merged, folder, in("said"));
        if (system(command)) {
            struct bytes b = contents(in("said"));
            fail_msg("%s: %s", types[t], (char *)b.at);
        }
    }
}

/* ---- tokenizers ---- */
static struct tokenizer *open_gguf(const struct gguf *g) {
    struct tokenizer *t = NULL;
    if (tokenizer_open_gguf(&t, g, said, sizeof said)) fail_msg("%s", said);
    return t;
}

static void assert_same_ids(const struct tokenizer *a, const struct tokenizer *b, const char *text,
                            size_t len) {
    for (int flags = 0; flags < 4; flags++) {
        int32_t *x, *y;
        size_t n, m;
        assert_int_equal(tokenize(a, text, len, flags, &x, &n), OK);
        assert_int_equal(tokenize(b, text, len, flags, &y, &m), OK);
        assert_int_equal(n, m);
        assert_memory_equal(x, y, n * sizeof *x);
        free(x);
        free(y);
    }
}

/* The test strings of llama.cpp, for which GGUF's ids are known to be right (test_tokenizer.c), and
 * pieces of a file with much of Unicode in it. */
static void assert_round_trip(const struct gguf *g, const char *what) {
    static const char separator[] = "\n__ggml_vocab_test__\n";
    if (tokenizer_files_write(g, folder, said, sizeof said)) fail_msg("%s: %s", what, said);
    struct tokenizer *a = open_gguf(g), *b = NULL;
    if (tokenizer_open_json(&b, folder, said, sizeof said)) fail_msg("%s: %s", what, said);
    struct bytes texts = contents(VOCABS "ggml-vocab.inp");
    for (char *text = (char *)texts.at, *end; text; text = end ? end + strlen(separator) : NULL) {
        end = strstr(text, separator);
        assert_same_ids(a, b, text, end ? (size_t)(end - text) : strlen(text));
    }
    free(texts.at);
    texts = contents(VOCABS "gpt2/tokenizer.json");
    uint32_t seed = 3;
    for (int i = 0; i < 300; i++) {
        char text[300];
        seed = seed * 1664525u + 1013904223u;
        memcpy(text, texts.at + seed % (texts.len - sizeof text), sizeof text);
        for (int k = 0; k < i % 5; k++) /* and bytes that are no UTF-8 */
            text[(seed >> k) % sizeof text] = (char)(seed >> (3 * k));
        assert_same_ids(a, b, text, sizeof text);
    }
    free(texts.at);
    tokenizer_free(a);
    tokenizer_free(b);
}

static void test_real_vocabularies_go_from_gguf_to_json_with_all_ids(void **state) {
    (void)state;
    static const char *const names[] = {"gpt-2", "mpt", "phi-3"};
    for (int i = 0; i < 3; i++) {
        struct gguf *g;
        char path[128];
        snprintf(path, sizeof path, VOCABS "ggml-vocab-%s.gguf", names[i]);
        assert_int_equal(gguf_open(&g, path, said, sizeof said), OK);
        assert_round_trip(g, names[i]);
        gguf_close(g);
    }
}

static void put_array(struct gguf_writer *w, const char *key, uint32_t type, const void *values,
                      size_t n) {
    put_string(&w->pairs, key), put_u32(&w->pairs, GGUF_ARRAY), put_u32(&w->pairs, type);
    put_u64(&w->pairs, n), put(&w->pairs, values, 4 * n), w->n_pairs++;
}

/* GPT-2's vocabulary under each name of tokenizer.ggml.pre, with BOS and EOS or without, and a
 * token that is added but not special. */
static void test_every_pre_tokenizer_of_gguf_can_be_said_in_json(void **state) {
    (void)state;
    static const char *const names[] = {"gpt-2",  "mpt",       "gpt-neox", "olmo",     "starcoder",
                                        "smollm", "llama-bpe", "llama3",   "llama-v3", "qwen2"};
    static const char *const keys[] = {"tokenizer.ggml.tokens", "tokenizer.ggml.merges"};
    struct gguf *from;
    assert_int_equal(gguf_open(&from, VOCABS "ggml-vocab-gpt-2.gguf", said, sizeof said), OK);
    char **lists[2];
    size_t sizes[2];
    for (int k = 0; k < 2; k++) {
        sizes[k] = gguf_array_size(from, keys[k]);
        lists[k] = calloc(sizes[k] + 1, sizeof **lists);
        for (size_t i = 0; i < sizes[k]; i++) {
            size_t len;
            const char *text = gguf_array_string(from, keys[k], i, &len);
            lists[k][i] = strndup(text, len);
        }
    }
    gguf_close(from);
    lists[0][sizes[0]++] = strdup("<|added|>");
    uint32_t *types = malloc(sizes[0] * sizeof *types);
    for (size_t i = 0; i < sizes[0]; i++)
        types[i] = i == 50256 ? 3 : i == 50257 ? 4 : 1;
    for (int i = 0; i < 10; i++) {
        struct gguf_writer w = {0};
        gguf_put_string(&w, "tokenizer.ggml.model", "gpt2");
        gguf_put_string(&w, "tokenizer.ggml.pre", names[i]);
        for (int k = 0; k < 2; k++)
            gguf_put_strings(&w, keys[k], (const char *const *)lists[k], sizes[k]);
        put_array(&w, "tokenizer.ggml.token_type", GGUF_U32, types, sizes[0]);
        gguf_put_u32(&w, "tokenizer.ggml.bos_token_id", 50256);
        gguf_put_u32(&w, "tokenizer.ggml.eos_token_id", i % 2 ? 50256 : 7);
        gguf_put_u32(&w, "tokenizer.ggml.add_eos_token", i % 3 == 0);
        struct bytes b = gguf_finish(&w, 3);
        struct gguf *g;
        assert_int_equal(gguf_open_bytes(&g, b.at, b.len, "vocab", said, sizeof said), OK);
        assert_round_trip(g, names[i]);
        gguf_close(g);
        free(b.at);
    }
    for (int k = 0; k < 2; k++) {
        for (size_t i = 0; i < sizes[k]; i++)
            free(lists[k][i]);
        free(lists[k]);
    }
    free(types);
}

static void test_what_json_cannot_say_is_refused(void **state) {
    (void)state;
    static const struct {
        const char *says, *tokens[6];
        float scores[6];
    } cases[] = {
        {"one score", {"<unk>", "a", "b", "ab", "ba", "aba"}, {0, -9, -9, -1, -1, -3}},
        {"are both \"ab\"", {"<unk>", "a", "b", "ab", "ba", "ab"}, {0, -9, -9, -1, -2, -3}},
        {"no UTF-8", {"<unk>", "a", "b", "a\xFF", "ba", "aba"}, {0, -9, -9, -1, -2, -3}},
        {NULL, {"<unk>", "a", "b", "ab", "ba", "aba"}, {0, -9, -9, -2, -1, -3}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct gguf_writer w = {0};
        gguf_put_string(&w, "tokenizer.ggml.model", "llama");
        gguf_put_strings(&w, "tokenizer.ggml.tokens", cases[i].tokens, 6);
        put_array(&w, "tokenizer.ggml.scores", GGUF_F32, cases[i].scores, 6);
        put_array(&w, "tokenizer.ggml.token_type", GGUF_U32, (uint32_t[]){2, 1, 1, 1, 1, 1}, 6);
        struct bytes b = gguf_finish(&w, 3);
        struct gguf *g;
        assert_int_equal(gguf_open_bytes(&g, b.at, b.len, "vocab", said, sizeof said), OK);
        enum err e = tokenizer_files_write(g, folder, said, sizeof said);
        assert_int_equal(e, cases[i].says ? ERR_FORMAT : OK);
        if (e && !strstr(said, cases[i].says)) fail_msg("'%s': %s", said, cases[i].says);
        gguf_close(g);
        free(b.at);
    }
}

/* ---- what can go wrong ---- */
static void test_what_cannot_be_merged_is_named_and_leaves_nothing(void **state) {
    (void)state;
    mkdir(in("tiny"), 0700);
    tiny_write(in("tiny"));
    mkdir(in("full"), 0700);
    write_text(in("full/letter"), "dear");
    REFUSED("name the converted model", "convert", "--merge", "--out", in("out"));
    REFUSED("--out is missing", "convert", "--merge", in("tiny"));
    REFUSED("leave --text out", "convert", "--merge", in("tiny"), "--out", in("out"), "--text",
            "x");
    REFUSED("no converted model", "convert", "--merge", "tests/data/models/stories260k", "--out",
            in("out"));
    REFUSED("not empty", "convert", "--merge", in("tiny"), "--out", in("full"));
    REFUSED("is no folder", "convert", "--merge", in("tiny"), "--out", in("full/letter"));
    REFUSED("no adapter", "convert", "--merge", in("tiny"), "--out", in("out"), "--base", "x");
    REFUSED("cannot make", "convert", "--merge", in("tiny"), "--out", in("no/out"));
    mkdir(in("out.new"), 0700);
    REFUSED("remove it", "convert", "--merge", in("tiny"), "--out", in("out"));
    assert_int_equal(rmdir(in("out.new")), 0);
    assert_false(is_there(in("out")));
    mkdir(in("out"), 0700); /* an empty folder is as good as none */
    CONVERTED("convert", "--merge", in("tiny"), "--out", in("out"));
    assert_true(is_there(in("out/urchin.json")));
}

/* A limit on the size of files stands in for a full disk: writes fail the same way. */
static void test_a_full_disk_is_a_sentence_and_leaves_nothing(void **state) {
    (void)state;
    mkdir(in("tiny"), 0700);
    tiny_write(in("tiny"));
    struct rlimit was, little;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    static const rlim_t sizes[] = {100, 5000, 30000, 60000}; /* of the last file */
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    for (int i = 0; i < 4; i++) {
        little = (struct rlimit){sizes[i], was.rlim_max};
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &little), 0);
        int status = CONVERT("convert", "--merge", in("tiny"), "--out", in("out"));
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
        assert_int_equal(status, 1);
        if (i && !strstr(said, "cannot write")) fail_msg("%s", said); /* 100: said is cut too */
        assert_false(is_there(in("out")) || is_there(in("out.new")));
    }
    signal(SIGXFSZ, handler);
}

#define IN_FOLDER(name) cmocka_unit_test_setup_teardown(name, new_folder, remove_folder)

int main(void) {
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_every_architecture_from_either_container_keeps_its_bits),
        IN_FOLDER(test_all_weights_from_either_container_make_a_whole_folder),
        IN_FOLDER(test_words_that_cannot_be_written_leave_nothing),
        IN_FOLDER(test_a_whole_folder_with_low_rank_parts_is_merged_too),
        IN_FOLDER(test_the_default_model_keeps_its_bits),
        IN_FOLDER(test_transformers_reads_the_folder_to_the_same_tokens),
        IN_FOLDER(test_real_vocabularies_go_from_gguf_to_json_with_all_ids),
        IN_FOLDER(test_every_pre_tokenizer_of_gguf_can_be_said_in_json),
        IN_FOLDER(test_what_json_cannot_say_is_refused),
        IN_FOLDER(test_what_cannot_be_merged_is_named_and_leaves_nothing),
        IN_FOLDER(test_a_full_disk_is_a_sentence_and_leaves_nothing),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
