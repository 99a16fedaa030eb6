/* test_finetune.c - fine-tuning from the command line's words to a folder that serves. */
#include "checkpoints.h"
#include "convert_testing.h"
#include "model/safetensors.h"

#define TRAIN_TEXT "tests/data/text/tinystories-train-head.txt"
#define BASE_CONVERT                                                                               \
    "convert", STORIES, "--text", TRAIN_TEXT, "--weights", "fp32", "--kv-type", "fp32",            \
        "--window-size", "32", "--cache-size", "16"
#define SHORT                                                                                      \
    BASE_CONVERT, "--length", "160", "--long-every", "0", "--steps", "2", "--rows", "20",          \
        "--rank", "3", "--finetune-lr", "0.003", "--finetune-lr-maps", "0.003"

static double number_of(const char *path, const char *object, const char *key) {
    struct json *record;
    assert_int_equal(json_load(&record, path, said, sizeof said), OK);
    double x = json_number(json_get(json_get(record, object), key), NAN);
    json_free(record);
    return x;
}

/* The whole way: held-out text, a window and a cache that are an eleventh of what is read.  What it
 * costs without fine-tuning is 4 % (bench/convert_stories.sh has more steps, and 0.6 %). */
static void test_both_stages_bring_a_model_within_two_percent_of_its_base(void **state) {
    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    const char *steps = "10", *fine_steps = "10"; /* ten times slower: no quality to be had */
    double most = 2;
#else
    const char *steps = "200", *fine_steps = "200";
    double most = 1.02;
#endif
    struct score scores[2];
    CONVERTED(BASE_CONVERT, "--out", in("out"), "--finetune-products", "fp32", "--steps", steps,
              "--finetune-steps", fine_steps, "--finetune-accumulate", "1", "--finetune-lr",
              "0.003", "--finetune-lr-maps", "0.01");
    read_both(in("out"), TEXT, 23000, scores);
    double ratio = score_perplexity(&scores[1]) / score_perplexity(&scores[0]);
    if (!(ratio < most)) fail_msg("perplexity %.4f times the base's", ratio);
    assert_true(number_of(in("out/conversion.json"), "finetune", "loss_after") <
                number_of(in("out/conversion.json"), "finetune", "loss_before"));
}

/* What was trained is what is served: the record's loss on the probe's packs is the folder's own,
 * read by the engine. */
static void test_every_method_and_loss_gets_better_at_its_own_text(void **state) {
    (void)state;
    static const char *const methods[] = {"low-rank", "full"}, *const losses[] = {"distill",
                                                                                  "next-token"};
    for (int m = 0; m < 2; m++)
        for (int l = 0; l < 2; l++) {
            char out[40], record[80];
            snprintf(out, sizeof out, "%s-%s", methods[m], losses[l]);
            snprintf(record, sizeof record, "%s/conversion.json", out);
            CONVERTED(SHORT, "--out", in(out), "--finetune", methods[m], "--finetune-loss",
                      losses[l], "--finetune-steps", "8", "--finetune-lr", m ? "0.0001" : "0.003");
            double before = number_of(in(record), "finetune", "loss_before"),
                   after = number_of(in(record), "finetune", "loss_after");
            if (!(after < before)) fail_msg("%s: loss %.5f before, %.5f after", out, before, after);
            struct score scores[2];
            read_both(in(out), TEXT, 600, scores);
            assert_true(score_perplexity(&scores[1]) < 1.2 * score_perplexity(&scores[0]));
        }
}

/* Layers that keep softmax take part: what is written is served, and is nearer to the base than
 * without fine-tuning. */
static void test_layers_that_keep_softmax_are_fine_tuned_too(void **state) {
    (void)state;
    static const char *const methods[] = {"low-rank", "full"};
    for (int m = 0; m < 2; m++) {
        char record[60];
        snprintf(record, sizeof record, "%s/conversion.json", methods[m]);
        CONVERTED(SHORT, "--out", in(methods[m]), "--softmax-layers", "0,3", "--finetune",
                  methods[m], "--finetune-steps", "8", "--finetune-products", "fp32",
                  "--finetune-lr", m ? "0.0001" : "0.003");
        double before = number_of(in(record), "finetune", "loss_before"),
               after = number_of(in(record), "finetune", "loss_after");
        if (!(after < before)) fail_msg("%s: loss %.5f, then %.5f", methods[m], before, after);
        struct score scores[2];
        read_both(in(methods[m]), TEXT, 600, scores);
        assert_true(score_perplexity(&scores[1]) < 1.2 * score_perplexity(&scores[0]));
    }
    struct safetensors *t;
    assert_int_equal(safetensors_open(&t, in("low-rank/hedgehog.safetensors"), said, sizeof said),
                     OK);
    assert_int_equal(safetensors_count(t), 3 * 3 + 5 * 8);
    assert_non_null(safetensors_get(t, "layers.3.attn.v_proj.lora_B"));
    assert_null(safetensors_get(t, "layers.3.attn.log_mix"));
    safetensors_close(t);
}

static void test_any_number_of_threads_makes_the_same_bytes(void **state) {
    (void)state;
    static const char *const methods[] = {"low-rank", "full"};
    for (int m = 0; m < 2; m++) {
        char outs[3][20], path[2][60];
        for (int threads = 1; threads <= 3; threads++) {
            struct team *some;
            snprintf(outs[threads - 1], sizeof outs[0], "%s%d", methods[m], threads);
            assert_int_equal(team_new(&some, threads), OK);
            if (convert_on(some, (const char *const[]){SHORT, "--out", in(outs[threads - 1]),
                                                       "--finetune", methods[m], "--finetune-steps",
                                                       "3", "--seed", "3", "--retrieval-heads",
                                                       "0.2,3.1", "--retrieval-size", "40", NULL}))
                fail_msg("%s", said);
            team_free(some);
        }
        for (int i = 1; i < 3; i++) {
            static const char *const files[] = {"hedgehog.safetensors", "urchin.json",
                                                "model.safetensors"}; /* low-rank: the base's */
            for (int f = 0; f < 3; f++) {
                snprintf(path[0], sizeof path[0], "%s/%s", outs[0], files[f]);
                snprintf(path[1], sizeof path[1], "%s/%s", outs[i], files[f]);
                assert_same_file(in(path[0]), in(path[1]));
            }
        }
    }
}

static void test_an_interruption_in_either_stage_goes_on_to_the_same_bytes(void **state) {
    (void)state;
#define FACTS "--retrieval-heads", "1.0,2.3", "--retrieval-size", "40"
    CONVERTED(SHORT, "--out", in("whole"), "--finetune-steps", "4", FACTS);
    for (int run = 0; run < 6; run++) { /* 2 and 4 steps, one a run */
        convert_interrupt_after(1);
        int status = CONVERT(SHORT, "--out", in("cut"), "--finetune-steps", "4", FACTS);
        convert_interrupt_after(0);
        bool last = status == 0;
        if (!last) assert_int_equal(status, 130);
        assert_int_equal(is_there(in("cut/urchin.json")), last);
        assert_int_equal(is_there(in("cut/checkpoint")), !last);
        if (last) break;
    }
    assert_true(is_there(in("cut/urchin.json")));
    assert_same_file(in("whole/hedgehog.safetensors"), in("cut/hedgehog.safetensors"));
    assert_same_file(in("whole/urchin.json"), in("cut/urchin.json"));
}

/* Attention transfer knows nothing of the cache, the horizon and what is fine-tuned: once it is done
 * they may be others, and the bytes are those of a run that began with them. */
static void test_what_transfer_does_not_know_may_change_at_its_end(void **state) {
    (void)state;
    for (int stop = 1; stop < 4; stop++) { /* within transfer, at its end, a step later */
        char out[20];
        snprintf(out, sizeof out, "cut%d", stop);
        convert_interrupt_after(stop);
        int status = CONVERT(SHORT, "--out", in(out), "--finetune-steps", "4");
        convert_interrupt_after(0);
        assert_int_equal(status, 130);
        if (stop == 2) /* and what may change is not blamed */
            REFUSED("rows was 20, now it is 10", SHORT, "--out", in(out), "--finetune-steps", "4",
                    "--rows", "10", "--horizon", "64");
        if (stop == 2)
            CONVERTED(SHORT, "--out", in(out), "--finetune-steps", "3", "--cache-size", "8",
                      "--horizon", "64", "--rank", "2");
        else
            REFUSED(stop < 2 ? "attention.cache" : "attention.horizon was", SHORT, "--out",
                    in(out), "--finetune-steps", "4", stop < 2 ? "--cache-size" : "--horizon", "8");
        REFUSED(stop == 2 ? "already" : "rows was 20, now it is 10", SHORT, "--out", in(out),
                "--finetune-steps", "4", "--rows", "10");
    }
    CONVERTED(SHORT, "--out", in("whole"), "--finetune-steps", "3", "--cache-size", "8",
              "--horizon", "64", "--rank", "2");
    assert_same_file(in("whole/hedgehog.safetensors"), in("cut2/hedgehog.safetensors"));
    assert_same_file(in("whole/urchin.json"), in("cut2/urchin.json"));
}

static void test_a_checkpoint_of_fine_tuning_is_refused_when_damaged_or_anothers(void **state) {
    (void)state;
    convert_interrupt_after(4);
    int status = CONVERT(SHORT, "--out", in("out"), "--finetune-steps", "4");
    convert_interrupt_after(0);
    assert_int_equal(status, 130);
    struct bytes was = contents(in("out/checkpoint"));
    REFUSED("finetune.lr was 0.003, now it is 0.1", SHORT, "--out", in("out"), "--finetune-steps",
            "4", "--finetune-lr", "0.1");
    REFUSED("finetune.rank was 3, now it is 4", SHORT, "--out", in("out"), "--finetune-steps", "4",
            "--rank", "4");
    for (size_t i = 1; i < 8; i++) { /* in every part */
        size_t at = was.len * i / 8;
        was.at[at] ^= 4;
        write_bytes(in("out/checkpoint"), was.at, was.len);
        REFUSED("damaged", SHORT, "--out", in("out"), "--finetune-steps", "4");
        was.at[at] ^= 4;
    }
    write_bytes(in("out/checkpoint"), was.at, was.len);
    free(was.at);
    CONVERTED(SHORT, "--out", in("out"), "--finetune-steps", "4");
}

static void test_fine_tuning_that_diverges_stops_and_keeps_what_was_good(void **state) {
    (void)state;
    REFUSED("training was stopped", SHORT, "--out", in("out"), "--finetune-steps", "60",
            "--finetune-lr", "10", "--finetune-lr-maps", "10");
    assert_true(strstr(said, "--finetune-lr"));
    assert_true(is_there(in("out/checkpoint")));
    assert_false(is_there(in("out/urchin.json")));
}

static void test_what_does_not_go_together_is_refused(void **state) {
    (void)state;
    REFUSED("--memory", BASE_CONVERT, "--out", in("out"), "--memory", "12M", "--finetune", "full",
            "--long-every", "0");
    CONVERTED(SHORT, "--out", in("none"), "--finetune", "none");
    struct bytes text = contents(in("none/urchin.json"));
    put(&text, "", 1);
    assert_non_null(strstr((char *)text.at, "\"low_rank\":\tnull"));
    free(text.at);
}

/* Fine-tuning has --finetune-retrieval-size places in the loop, so it learns what a model with so few
 * learns; served is --retrieval-size. */
static void test_fine_tuning_may_have_fewer_places_than_are_served(void **state) {
    (void)state;
    CONVERTED(SHORT, "--out", in("few"), "--finetune-steps", "2", "--retrieval-heads", "1.0,2.3",
              "--retrieval-size", "4", "--cache-fact-age", "100");
    CONVERTED(SHORT, "--out", in("fewer"), "--finetune-steps", "2", "--retrieval-heads", "1.0,2.3",
              "--retrieval-size", "40", "--finetune-retrieval-size", "4", "--cache-fact-age",
              "100");
    CONVERTED(SHORT, "--out", in("all"), "--finetune-steps", "2", "--retrieval-heads", "1.0,2.3",
              "--retrieval-size", "40");
    assert_same_file(in("few/hedgehog.safetensors"), in("fewer/hedgehog.safetensors"));
    struct bytes few = contents(in("few/hedgehog.safetensors")),
                 all = contents(in("all/hedgehog.safetensors"));
    assert_true(few.len == all.len && memcmp(few.at, all.at, few.len));
    free(few.at);
    free(all.at);
    struct json *record;
    assert_int_equal(json_load(&record, in("fewer/urchin.json"), said, sizeof said), OK);
    const struct json *cache = json_get(json_get(record, "attention"), "cache"),
                      *stage = json_get(json_get(record, "training"), "finetune");
    assert_true(json_number(json_get(json_get(cache, "retrieval"), "size"), 0) == 40);
    assert_true(json_number(json_get(cache, "fact_age"), 0) == 100);
    assert_true(json_number(json_get(stage, "retrieval_size"), 0) == 4);
    json_free(record);
}

/* What is served is what was recorded, unless the dials say otherwise; fewer places, fewer recent.
 */
static void test_the_caches_dials_change_what_was_recorded(void **state) {
    (void)state;
    CONVERTED(SHORT, "--out", in("made"), "--finetune", "none", "--retrieval-heads", "1.0,2.3",
              "--retrieval-size", "40");
    struct model_options o;
    model_options_init(&o);
    o.path = in("made");
    o.team = team;
    o.n_slots = 1;
    for (int dials = 0; dials < 2; dials++) {
        struct model *m;
        if (dials) o.retrieval_size = 16, o.cache_fact_age = 7;
        if (model_open(&m, &o, said, sizeof said)) fail_msg("%s", said);
        const struct attention_config *c = &model_info(m)->attention;
        assert_int_equal(c->retrieval_size, dials ? 16 : 40);
        assert_int_equal(c->retrieval_recent, dials ? 2 : 5);
        assert_int_equal(c->cache_fact_age, dials ? 7 : 32768);
        model_close(m);
    }
}

int main(void) {
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_both_stages_bring_a_model_within_two_percent_of_its_base),
        IN_FOLDER(test_every_method_and_loss_gets_better_at_its_own_text),
        IN_FOLDER(test_layers_that_keep_softmax_are_fine_tuned_too),
        IN_FOLDER(test_any_number_of_threads_makes_the_same_bytes),
        IN_FOLDER(test_an_interruption_in_either_stage_goes_on_to_the_same_bytes),
        IN_FOLDER(test_what_transfer_does_not_know_may_change_at_its_end),
        IN_FOLDER(test_fine_tuning_may_have_fewer_places_than_are_served),
        IN_FOLDER(test_the_caches_dials_change_what_was_recorded),
        IN_FOLDER(test_a_checkpoint_of_fine_tuning_is_refused_when_damaged_or_anothers),
        IN_FOLDER(test_fine_tuning_that_diverges_stops_and_keeps_what_was_good),
        IN_FOLDER(test_what_does_not_go_together_is_refused),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
