/* test_convert.c - `urchin convert` from the command line's words to a folder that opens. */
#include "checkpoints.h"
#include "convert_testing.h"
#include "model/safetensors.h"

#include <signal.h>
#include <sys/resource.h>

#define STORIES_CONVERT                                                                            \
    "convert", STORIES, "--text", TEXT, "--weights", "fp32", "--kv-type", "fp32", "--finetune",    \
        "none", "--window-size", "32", "--cache-size", "16"

/* ---- what it is for ---- */

/* 150 steps on the very text that is read, without the cache, which takes no part in them. */
static void test_training_brings_the_model_nearer_to_its_base(void **state) {
    (void)state;
    CONVERTED(STORIES_CONVERT, "--cache-size", "0", "--out", in("calibrated"), "--steps", "0");
    CONVERTED(STORIES_CONVERT, "--cache-size", "0", "--out", in("trained"), "--steps", "150");
    double before = divergence(in("calibrated")), after = divergence(in("trained"));
    if (!(after < 0.8 * before)) fail_msg("KL of tokens %.4f before, %.4f after", before, after);

    struct json *record;
    assert_int_equal(json_load(&record, in("trained/conversion.json"), said, sizeof said), OK);
    const struct json *a = json_get(record, "before"), *b = json_get(record, "after"),
                      *curve = json_get(record, "curve");
    before = json_number(json_get(a, "kl_of_all_rows"), NAN);
    after = json_number(json_get(b, "kl_of_all_rows"), NAN);
    assert_true(after < before * 2 / 3);
    assert_true(json_number(json_get(b, "attention_error_of_layers"), NAN) <
                json_number(json_get(a, "attention_error_of_layers"), NAN));
    assert_int_equal(json_size(json_get(curve, "kl")), 150);
    assert_int_equal(json_size(json_get(json_get(b, "heads"), "kl")), 5);
    const struct json *heads = json_get(record, "heads"); /* as the finished model runs */
    assert_int_equal(json_size(json_get(heads, "kl")), 5);
    assert_true(json_size(json_get(heads, "pictures")) > 2);
    assert_true(json_number(json_get(heads, "kl_of_all_rows"), NAN) < before);
    struct bytes page = contents(in("trained/conversion.html"));
    assert_non_null(memmem(page.at, page.len, "Attention on a sample", 21));
    free(page.at);
    assert_int_equal(json_size(json_child(json_get(json_get(b, "heads"), "kl"))), 8);
    /* the pupil's mass is shared out whole */
    double mass = 0;
    for (int i = 0; i < 3; i++)
        mass += json_number(
            json_child(json_child(
                json_get(json_get(b, "heads"), (const char *[]){"sink", "window", "linear"}[i]))),
            NAN);
    assert_true(fabs(mass - 1) < 1e-5);
    json_free(record);
}

static void test_any_number_of_threads_makes_the_same_bytes(void **state) {
    (void)state;
    for (int threads = 1; threads <= 3; threads++) {
        struct team *some;
        char out[16];
        snprintf(out, sizeof out, "out%d", threads);
        assert_int_equal(team_new(&some, threads), OK);
        if (convert_on(some, (const char *const[]){STORIES_CONVERT, "--out", in(out), "--steps",
                                                   "4", "--seed", "3", "--loss", "both", "--recall",
                                                   "0.5", NULL}))
            fail_msg("%s", said);
        team_free(some);
    }
    CONVERTED(STORIES_CONVERT, "--out", in("other"), "--steps", "4", "--seed", "4", "--loss",
              "both");
    for (int i = 2; i <= 3; i++) {
        const char *out = i == 2 ? "out2/hedgehog.safetensors" : "out3/hedgehog.safetensors";
        assert_same_file(in("out1/hedgehog.safetensors"), in(out));
    }
    assert_same_file(in("out1/urchin.json"), in("out2/urchin.json"));
    struct bytes a = contents(in("out1/hedgehog.safetensors")),
                 b = contents(in("other/hedgehog.safetensors"));
    assert_true(a.len != b.len || memcmp(a.at, b.at, a.len)); /* another seed, another result */
    free(a.at);
    free(b.at);
}

/* name/file in the folder of this test */
static const char *inside(const char *name, const char *file) {
    char path[64];
    snprintf(path, sizeof path, "%s/%s", name, file);
    return in(path);
}
static void check_interrupted(const char *flag, const char *value) {
    char whole[32], cut[32];
    snprintf(whole, sizeof whole, "whole%s", flag);
    snprintf(cut, sizeof cut, "cut%s", flag);
    CONVERTED(STORIES_CONVERT, "--out", in(whole), "--steps", "7", flag, value);
    for (int run = 0; run < 3; run++) { /* 3 + 3 + 1 steps */
        convert_interrupt_after(3);
        int status = CONVERT(STORIES_CONVERT, "--out", in(cut), "--steps", "7", flag, value);
        convert_interrupt_after(0);
        assert_int_equal(status, run < 2 ? 130 : 0);
        assert_int_equal(is_there(inside(cut, "urchin.json")), run == 2);
        assert_int_equal(is_there(inside(cut, "checkpoint")), run < 2);
    }
    assert_same_file(inside(whole, "hedgehog.safetensors"), inside(cut, "hedgehog.safetensors"));
    assert_same_file(inside(whole, "urchin.json"), inside(cut, "urchin.json"));
}
static void test_an_interrupted_conversion_goes_on_to_the_same_bytes(void **state) {
    (void)state;
    check_interrupted("--accumulate", "2"); /* one change of the maps in two sequences */
    check_interrupted("--update-rows", "16"); /* five in one */
}

/* ---- every base, every recipe ---- */
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

static void reads(const char *path) {
    struct model *m = open_model(path);
    int32_t ids[40];
    for (int i = 0; i < 40; i++)
        ids[i] = i * 7 % 3;
    const float *logits;
    struct model_run run = {.n_rows = 40, .tokens = ids, .n_logits = 1};
    assert_int_equal(model_info(m)->attention.kind, ATTENTION_HEDGEHOG);
    assert_int_equal(model_step(m, &run, 1, &logits), OK);
    for (int i = 0; i < model_info(m)->vocab_size; i++)
        assert_true(isfinite(logits[i]));
    model_close(m);
}

static void test_every_recipe_converts_every_architecture(void **state) {
    (void)state;
    static const char *const types[] = {"llama", "qwen2", "gpt2"};
    static const char *const recipes[] = {"urchin", "lolcats", "paper"};
    write_letters(in("letters.txt"));
    for (int t = 0; t < 3; t++)
        for (int r = 0; r < 3; r++)
            for (int gguf = 0; gguf < 2; gguf++) {
                char base[80], file[100], out[120];
                snprintf(base, sizeof base, "%.60s/%.10s", folder, types[t]);
                snprintf(file, sizeof file, "%s/model.gguf", base);
                snprintf(out, sizeof out, "%s-%s-%d", base, recipes[r], gguf);
                if (!is_there(base)) mkdir(base, 0700), check_write(base, types[t]);
                const char *window = r == 2 ? "0" : "8";
                CONVERTED("convert", gguf ? file : base, "--text", in("letters.txt"), "--out", out,
                          "--recipe", recipes[r], "--steps", "3", "--window-size", window,
                          "--cache-size", r ? "0" : "8", "--rows", "11", "--finetune-steps", "2",
                          "--finetune",
                          gguf ? "low-rank"
                          : r  ? "full"
                               : "low-rank");
                reads(out);
            }
}

/* Layers that keep softmax are the base's, and the others learn what they learn without it. */
static void test_layers_may_keep_softmax(void **state) {
    (void)state;
    CONVERTED(STORIES_CONVERT, "--out", in("all"), "--steps", "3");
    CONVERTED(STORIES_CONVERT, "--out", in("some"), "--steps", "3", "--softmax-layers", "3,0,3");
    struct model *m = open_model(in("some"));
    const struct model_info *i = model_info(m);
    assert_int_equal(i->n_softmax_layers, 2);
    assert_true(i->softmax_layers[0] && i->softmax_layers[3]);
    assert_int_equal(i->max_seq_len, i->context);
    model_close(m);
    struct safetensors *a, *b;
    assert_int_equal(safetensors_open(&a, in("all/hedgehog.safetensors"), said, sizeof said), OK);
    assert_int_equal(safetensors_open(&b, in("some/hedgehog.safetensors"), said, sizeof said), OK);
    assert_int_equal(safetensors_count(b), 3 * 3);
    for (int k = 0; k < safetensors_count(b); k++) {
        const struct st_tensor *x = safetensors_at(b, k), *y = safetensors_get(a, x->name);
        assert_int_equal(x->bytes, y->bytes);
        assert_memory_equal(x->data, y->data, x->bytes);
    }
    safetensors_close(a);
    safetensors_close(b);
    double all = divergence(in("all")), some = divergence(in("some"));
    if (!(some < all)) fail_msg("KL of tokens %.4f, with two layers softmax %.4f", all, some);
    REFUSED("has layers 0 to 4", STORIES_CONVERT, "--out", in("out"), "--softmax-layers", "5");
    REFUSED("nothing to convert", STORIES_CONVERT, "--out", in("out"), "--softmax-layers",
            "0,1,2,3,4");
    convert_interrupt_after(1);
    CONVERT(STORIES_CONVERT, "--out", in("out"), "--steps", "3", "--softmax-layers", "1,2");
    convert_interrupt_after(0);
    REFUSED("softmax_layers", STORIES_CONVERT, "--out", in("out"), "--steps", "3",
            "--softmax-layers", "1,3");
}

/* ---- what it learns from ---- */
static struct corpus *corpus(const char *sources, bool join, struct model *m) {
    struct corpus *c = NULL;
    struct corpus_options o = {.sources = sources,
                               .tokenizer = model_tokenizer(m),
                               .chat = model_chat(m),
                               .vocab_size = 512,
                               .join = join,
                               .least = 20};
    if (corpus_open(&c, &o, said, sizeof said)) return NULL;
    return c;
}

static void test_packs_hold_whole_pieces_of_single_documents(void **state) {
    (void)state;
    struct model *m = open_model(STORIES);
    mkdir(in("texts"), 0700);
    mkdir(in("texts/more"), 0700);
    write_text(in("texts/a.txt"), "Tom had a red ball. Tom had a red ball. Tom had a red ball.");
    write_text(in("texts/.hidden"), "hidden");
    write_bytes(in("texts/picture"), "PNG\0\0", 5);
    write_text(in("texts/more/b.jsonl"),
               "{\"text\": \"Lily saw a cat. Lily saw a cat. Lily saw a cat. Lily saw a cat.\"}\n"
               "\n{\"messages\": [{\"role\": \"user\", \"content\": \"Sam ran and Sam ran and Sam "
               "ran and Sam ran and\"}, {\"role\": \"assistant\", \"content\": \"Sam ran\"}]}\n"
               "{\"text\": \"too short\"}\n");
    struct corpus *c = corpus(in("texts"), false, m);
    if (!c) fail_msg("%s", said);
    cJSON *json = corpus_json(c);
    assert_true(cJSON_GetObjectItem(json, "files")->valuedouble == 2);
    assert_true(cJSON_GetObjectItem(json, "documents")->valuedouble == 4);
    cJSON_Delete(json);
    int seen[3] = {0};
    for (int number = 0; number < 20; number++) {
        struct pack p, again;
        assert_int_equal(corpus_pack(c, 7, PACK_TRAIN, number, 150, &p, said, sizeof said), OK);
        assert_int_equal(corpus_pack(c, 7, PACK_TRAIN, number, 150, &again, said, sizeof said), OK);
        assert_int_equal(p.n, again.n);
        assert_memory_equal(p.tokens, again.tokens, (size_t)p.n * sizeof *p.tokens);
        assert_true(p.n <= 150 && p.n > 150 - 60 && p.n_documents >= 2);
        assert_int_equal(p.first[0], 0);
        assert_int_equal(p.first[p.n_documents], p.n);
        for (int d = 0; d < p.n_documents; d++) {
            char *text;
            size_t len;
            int begin = p.first[d], n = p.first[d + 1] - begin;
            assert_true(n >= 20);
            assert_int_equal(p.tokens[begin], 1); /* BOS, and no other */
            assert_int_equal(detokenize(model_tokenizer(m), p.tokens + begin, (size_t)n, false,
                                        true, &text, &len),
                             OK);
            int names =
                !!strstr(text, "Tom") + 2 * !!strstr(text, "Lily") + 4 * !!strstr(text, "Sam");
            if (names != 1 && names != 2 && names != 4) fail_msg("not of one document: %s", text);
            seen[names / 2]++;
            free(text);
        }
        pack_free(&p);
        pack_free(&again);
    }
    assert_true(seen[0] && seen[1] && seen[2]);
    corpus_close(c);

    c = corpus(in("texts"), true, m);
    struct pack p;
    assert_int_equal(corpus_pack(c, 7, PACK_TRAIN, 0, 150, &p, said, sizeof said), OK);
    assert_int_equal(p.n, 150); /* joined: full to the last token */
    assert_int_equal(p.n_documents, 1);
    pack_free(&p);
    corpus_close(c);
    model_close(m);
}

/* ---- what can go wrong ---- */
static void test_what_is_missing_or_malformed_is_named(void **state) {
    (void)state;
    REFUSED("--text is missing", "convert", STORIES, "--out", in("out"));
    REFUSED("--out is missing", "convert", STORIES, "--text", TEXT);
    REFUSED("name the base", "convert", "--text", TEXT, "--out", in("out"));
    REFUSED("no/such", "convert", "no/such", "--text", TEXT, "--out", in("out"));
    REFUSED("no/text", "convert", STORIES, "--text", TEXT ",no/text", "--out", in("out"));
    REFUSED("no/out", "convert", STORIES, "--text", TEXT, "--out", in("no/out"));
    REFUSED("converted model already", "convert", "models/stories260k-hedgehog", "--text", TEXT,
            "--out", in("out"));
    REFUSED("--length 1024", "convert", STORIES, "--text", TEXT, "--out", in("out"), "--length",
            "1024");
    REFUSED("there is nothing to learn", "convert", STORIES, "--text", TEXT, "--out", in("out"),
            "--length", "128");
    REFUSED("--max-distance", "convert", STORIES, "--text", TEXT, "--out", in("out"),
            "--map-position", "rope", "--max-distance", "9");
    REFUSED("do not go together", "convert", STORIES, "--text", TEXT, "--out", in("out"), "--sinks",
            "65");
    REFUSED("--update-rows 8", "convert", STORIES, "--text", TEXT, "--out", in("out"),
            "--update-rows", "8", "--accumulate", "2");
    REFUSED("--memory", "convert", STORIES, "--text", TEXT, "--out", in("out"), "--memory", "1M");
    REFUSED("without CUDA", "convert", STORIES, "--text", TEXT, "--out", in("out"), "--device", "cuda");
    write_text(in("bad.jsonl"), "{\"text\": \"a\"}\n{\"texts\": \"a\"}\n");
    REFUSED("bad.jsonl:2", "convert", STORIES, "--text", in("bad.jsonl"), "--out", in("out"));
    write_text(in("bad.jsonl"), "{\"text\": \"a\"}\n\n{\"text\": \n");
    REFUSED("bad.jsonl:3", "convert", STORIES, "--text", in("bad.jsonl"), "--out", in("out"));
    write_text(in("bad.jsonl"),
               "\xEF\xBB\xBF{\"text\": \"a mark in front is none of the text\"}\r\n"
               "{\"messages\": [{\"role\": \"bot\", \"content\": \"a\"}]}\r\n");
    REFUSED("bad.jsonl:2: messages[0].role \"bot\"", "convert", STORIES, "--text", in("bad.jsonl"),
            "--out", in("out"));
    write_text(in("bad.jsonl"), "{\"messages\": []}\n");
    REFUSED("bad.jsonl:1: messages is empty", "convert", STORIES, "--text", in("bad.jsonl"),
            "--out", in("out"));
    write_text(in("bad.jsonl"), "{\"messages\": [{\"role\": \"user\", \"content\": null}]}\n");
    REFUSED("bad.jsonl:1", "convert", STORIES, "--text", in("bad.jsonl"), "--out", in("out"));
    write_bytes(in("zeros"), "a\0b", 3);
    REFUSED("zero bytes", "convert", STORIES, "--text", in("zeros"), "--out", in("out"));
    write_text(in("short.txt"), "Too short to learn from.");
    REFUSED("--join-documents", "convert", STORIES, "--text", in("short.txt"), "--out", in("out"));
    assert_false(is_there(in("out/urchin.json")) || is_there(in("out/checkpoint")));
    CONVERTED(STORIES_CONVERT, "--out", in("done"), "--steps", "0");
    REFUSED("holds a converted model already", STORIES_CONVERT, "--out", in("done"));
}

static void test_another_conversions_checkpoint_is_refused_and_kept(void **state) {
    (void)state;
    convert_interrupt_after(1);
    int status = CONVERT(STORIES_CONVERT, "--out", in("out"), "--steps", "3");
    convert_interrupt_after(0);
    assert_int_equal(status, 130);
    struct bytes was = contents(in("out/checkpoint"));
    REFUSED("attention_transfer.lr was 0.01, now it is 0.02", STORIES_CONVERT, "--out", in("out"),
            "--steps", "3", "--lr", "0.02");
    REFUSED("attention_transfer.update_rows was 16, now it is 0", STORIES_CONVERT, "--out",
            in("out"), "--steps", "3", "--update-rows", "0", "--lr", "0.01", "--lr-mix", "0.025");
    REFUSED("attention.sinks was 1, now it is 2", STORIES_CONVERT, "--out", in("out"), "--steps",
            "3", "--sinks", "2");
    REFUSED("attention.cache.fact_age was 32768, now it is 5", STORIES_CONVERT, "--out", in("out"),
            "--steps", "3", "--cache-fact-age", "5");
    for (size_t cut = 0; cut < was.len; cut += was.len / 5) {
        write_bytes(in("out/checkpoint"), was.at, cut);
        REFUSED("damaged", STORIES_CONVERT, "--out", in("out"), "--steps", "3");
    }
    was.at[was.len / 2] ^= 1;
    write_bytes(in("out/checkpoint"), was.at, was.len);
    REFUSED("damaged", STORIES_CONVERT, "--out", in("out"), "--steps", "3");
    was.at[was.len / 2] ^= 1;
    enum {
        N_HEADS = 104,
        HEADS = 112
    }; /* behind the magic, eight counts, three doubles and one count */
    static const unsigned char bad[][2] = {{N_HEADS, 2}, {N_HEADS + 7, 0x80}, {N_HEADS + 1, 2}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad;
         i++) { /* two heads 0.0; fewer than none; 512 */
        was.at[bad[i][0]] ^= bad[i][1];
        write_bytes(in("out/checkpoint"), was.at, was.len);
        REFUSED("damaged", STORIES_CONVERT, "--out", in("out"), "--steps", "3");
        was.at[bad[i][0]] ^= bad[i][1];
    }
    was.at[N_HEADS] = 1, was.at[HEADS] = 5; /* one, of layer 5 of 5 */
    write_bytes(in("out/checkpoint"), was.at, was.len);
    REFUSED("damaged", STORIES_CONVERT, "--out", in("out"), "--steps", "3");
    was.at[N_HEADS] = was.at[HEADS] = 0;
    write_bytes(in("out/checkpoint"), was.at, was.len);
    free(was.at);
    CONVERTED(STORIES_CONVERT, "--out", in("out"), "--steps", "3");
}

/* What was set and is not any more, too. */
static void test_a_setting_that_is_dropped_is_named(void **state) {
    (void)state;
    convert_interrupt_after(1);
    int status = CONVERT(STORIES_CONVERT, "--out", in("out"), "--steps", "3", "--recall", "0.25");
    convert_interrupt_after(0);
    assert_int_equal(status, 130);
    REFUSED("recall was 0.25, now it is not set", STORIES_CONVERT, "--out", in("out"), "--steps",
            "3");
}

static void test_a_folder_of_other_things_is_left_alone(void **state) {
    (void)state;
    assert_int_equal(mkdir(in("out"), 0755), 0);
    write_bytes(in("out/config.json"), (unsigned char *)"{}", 2);
    REFUSED("holds other things", STORIES_CONVERT, "--out", in("out"), "--steps", "3");
    struct bytes is = contents(in("out/config.json"));
    assert_int_equal(is.len, 2);
    free(is.at);
    assert_int_equal(unlink(in("out/config.json")), 0);
    CONVERTED(STORIES_CONVERT, "--out", in("out"), "--steps", "3"); /* an empty one is taken */
}

static void test_training_that_diverges_stops_and_keeps_what_was_good(void **state) {
    (void)state;
    REFUSED("training was stopped", STORIES_CONVERT, "--out", in("out"), "--steps", "60", "--lr",
            "10", "--lr-mix", "10");
    assert_true(is_there(in("out/checkpoint")));
    assert_false(is_there(in("out/urchin.json")));
}

/* A limit on the size of files stands in for a full disk: writes fail the same way. */
static void test_a_full_disk_leaves_nothing_half_written(void **state) {
    (void)state;
    struct rlimit was, little = {4096, RLIM_INFINITY};
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    little.rlim_max = was.rlim_max;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &little), 0);
    int status = CONVERT(STORIES_CONVERT, "--out", in("out"), "--steps", "1");
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
    signal(SIGXFSZ, handler);
    assert_int_equal(status, 1);
    if (!strstr(said, "cannot write")) fail_msg("%s", said);
    assert_int_equal(rmdir(in("out")), 0); /* nothing in it */
}

int main(void) {
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_training_brings_the_model_nearer_to_its_base),
        IN_FOLDER(test_any_number_of_threads_makes_the_same_bytes),
        IN_FOLDER(test_an_interrupted_conversion_goes_on_to_the_same_bytes),
        IN_FOLDER(test_every_recipe_converts_every_architecture),
        IN_FOLDER(test_layers_may_keep_softmax),
        IN_FOLDER(test_packs_hold_whole_pieces_of_single_documents),
        IN_FOLDER(test_what_is_missing_or_malformed_is_named),
        IN_FOLDER(test_another_conversions_checkpoint_is_refused_and_kept),
        IN_FOLDER(test_a_setting_that_is_dropped_is_named),
        IN_FOLDER(test_a_folder_of_other_things_is_left_alone),
        IN_FOLDER(test_training_that_diverges_stops_and_keeps_what_was_good),
        IN_FOLDER(test_a_full_disk_leaves_nothing_half_written),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
