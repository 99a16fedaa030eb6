/* test_eval.c - scores against naive arithmetic, windows against their definition, readings against
 * one token at a time. */
#include "config/json.h"
#include "config/log.h"
#include "convert/passkey.h"
#include "convert/reading.h"
#include "convert/report.h"
#include "eval_testing.h"

#include <math.h>

#define TEXT "tests/data/text/tinystories-valid-head.txt"

static float uniform(uint32_t *state) { /* in [-1, 1) */
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) * 0x1p-23f - 1;
}

static void fill_logits(float *x, int n, uint32_t seed) {
    for (int i = 0; i < n; i++)
        x[i] = 12 * uniform(&seed);
}

/* ---- scores ---- */

static long double naive_log_sum(const float *x, int n) {
    long double sum = 0;
    for (int i = 0; i < n; i++)
        sum += expl((long double)x[i]);
    return logl(sum);
}

/* Exponentials in single err by 1e-7 relative, so the log of their sum by 1e-7 absolute; in KL the
 * exponent itself is rounded to single as well, |log b| <= 32 times 2^-24 = 2e-6 of a log ratio of
 * at most 48. */
static void test_loss_and_divergence_equal_the_naive_sums(void **state) {
    (void)state;
    enum { N = 977 };
    float x[N], b[N];
    for (uint32_t seed = 1; seed <= 20; seed++) {
        fill_logits(x, N, seed);
        fill_logits(b, N, seed + 100);
        int32_t target = (int32_t)(seed * 47);
        long double log_p = naive_log_sum(x, N), log_b = naive_log_sum(b, N), kl = 0;
        for (int i = 0; i < N; i++)
            kl += expl(b[i] - log_b) * ((b[i] - log_b) - (x[i] - log_p));
        struct score s = score_row(x, b, N, target);
        assert_int_equal(s.n, 1);
        assert_true(fabsl(s.nll - (log_p - x[target])) <= 2e-7);
        assert_true(fabsl(s.kl - kl) <= 48 * 2e-6);
        assert_true(s.kl > 0);
    }
}

static void test_loss_survives_logits_that_overflow_exp(void **state) {
    (void)state;
    float x[3] = {900, 900, -900};
    assert_true(fabs(score_row(x, NULL, 3, 0).nll - log(2)) <= 2e-7);
    assert_true(fabs(score_row(x, NULL, 3, 2).nll - (1800 + log(2))) <= 1e-6);
}

static void test_a_row_against_itself_has_no_divergence_and_agrees(void **state) {
    (void)state;
    float x[101];
    fill_logits(x, 101, 7);
    struct score s = score_row(x, x, 101, 3);
    assert_true(s.kl == 0);
    assert_int_equal(s.n_agree, 1);
}

static void test_uniform_logits_have_the_vocabulary_as_perplexity(void **state) {
    (void)state;
    float x[512] = {0};
    struct score s = {0};
    for (int i = 0; i < 9; i++) {
        struct score one = score_row(x, NULL, 512, i);
        score_add(&s, &one);
    }
    assert_int_equal(s.n, 9);
    assert_true(fabs(score_perplexity(&s) - 512) <= 1e-9);
}

static void test_agreement_compares_most_likely_tokens_ties_to_the_lower_id(void **state) {
    (void)state;
    float a[4] = {1, 5, 5, 0}, b[4] = {0, 9, 1, 1}, c[4] = {0, 1, 9, 1};
    assert_int_equal(score_row(a, b, 4, 0).n_agree, 1);
    assert_int_equal(score_row(a, c, 4, 0).n_agree, 0);
}

static void test_rows_score_the_same_on_any_number_of_threads(void **state) {
    (void)state;
    enum { ROWS = 13, N = 257 };
    static float x[ROWS * N], b[ROWS * N];
    int32_t targets[ROWS];
    fill_logits(x, ROWS * N, 1);
    fill_logits(b, ROWS * N, 2);
    for (int i = 0; i < ROWS; i++)
        targets[i] = i * 17;
    for (int threads = 1; threads <= 3; threads++) {
        struct team *some;
        assert_int_equal(team_new(&some, threads), OK);
        struct score out[ROWS];
        score_rows(some, out, x, b, ROWS, N, targets);
        for (int i = 0; i < ROWS; i++) {
            struct score one = score_row(x + i * N, b + i * N, N, targets[i]);
            assert_memory_equal(&out[i], &one, sizeof one);
        }
        team_free(some);
    }
}

/* ---- windows ---- */

/* Hugging Face's loop: windows begin every stride tokens, each scores what the one before it did
 * not. */
static void test_windows_are_hugging_faces_where_the_stride_divides_the_context(void **state) {
    (void)state;
    enum { N = 101 };
    for (int stride = 1; stride <= 12; stride++)
        for (int context = stride; context <= 4 * stride; context += stride) {
            int scored_to = 0;
            for (int begin = 0; scored_to < N; begin += stride) {
                int end = begin + context < N ? begin + context : N;
                for (int t = scored_to; t < end; t++) {
                    struct window w = window_of(t, N, context, stride, false);
                    assert_int_equal(w.start, begin);
                    assert_true(w.first <= t && t < w.last);
                }
                scored_to = end;
            }
        }
}

static void test_windows_tile_the_text_and_never_exceed_the_context(void **state) {
    (void)state;
    enum { N = 1000 };
    for (int bos = 0; bos <= 1; bos++)
        for (int context = 2; context < 130; context += 7)
            for (int stride = 1; stride <= context - bos; stride += 3)
                for (int64_t t = 0; t < N;) {
                    struct window w = window_of(t, N, context, stride, bos);
                    assert_int_equal(w.first, t);
                    assert_true(w.last > t && w.last <= N && w.last - w.first <= stride);
                    assert_true(w.start <= w.first && w.start >= 0);
                    assert_true(w.last - w.start + bos <= context);
                    assert_true(w.start == 0 || w.first - w.start == context - bos - stride);
                    t = w.last;
                }
}

/* ---- readings of a real model ---- */

static struct model *open_model(int n_slots, int cache_size) {
    struct model_options o;
    model_options_init(&o);
    o.path = MODEL;
    o.weights = WEIGHT_FP32;
    o.kv_type = KV_FP32;
    o.max_rows = o.max_logits = READING_ROWS;
    o.n_slots = n_slots;
    o.cache_size = cache_size;
    o.team = team;
    struct model *m = NULL;
    char msg[512] = "";
    if (model_open(&m, &o, msg, sizeof msg)) fail_msg("%s", msg);
    return m;
}

static int32_t *text_ids(const struct model *m, int64_t n) {
    static char buffer[32768];
    FILE *file = fopen(TEXT, "rb");
    assert_non_null(file);
    size_t len = fread(buffer, 1, sizeof buffer, file), n_ids;
    fclose(file);
    int32_t *ids;
    assert_int_equal(tokenize(model_tokenizer(m), buffer, len, 0, &ids, &n_ids), OK);
    assert_true((int64_t)n_ids >= n);
    return ids;
}

/* The definition of reading.h, one token a step and one context after another. */
static void read_naively(struct score *bins, int n_bins, int64_t bin_size, struct model *m,
                         int slot, const struct text *text, int64_t context, int64_t stride) {
    int vocab_size = model_info(m)->vocab_size;
    for (int64_t t = 0; t < text->n; t++) {
        struct window w = window_of(t, text->n, context, stride, text->bos >= 0);
        if (t == w.start && text->bos < 0) continue;
        model_slot_clear(m, slot);
        const float *logits = NULL;
        for (int64_t i = w.start - (text->bos >= 0); i < t; i++) {
            int32_t id = i < w.start ? text->bos : text->ids[i];
            struct model_run run = {.slot = slot, .n_rows = 1, .tokens = &id, .n_logits = 1};
            assert_int_equal(model_step(m, &run, 1, &logits), OK);
        }
        struct score s = score_row(logits, NULL, vocab_size, text->ids[t]);
        int64_t bin = t / bin_size < n_bins ? t / bin_size : n_bins - 1;
        score_add(&bins[bin], &s);
    }
}

static void check_reading(int64_t n, int32_t bos, int64_t context, int64_t stride,
                          int64_t bin_size) {
    enum { BINS = 4 };
    struct model *m = open_model(2, -1);
    struct text text = {text_ids(m, n), n, bos};
    struct reader reader = {
        .name = "m", .model = m, .slot = 1, .linear = true, .context = context, .stride = stride};
    struct score bins[BINS] = {0}, naive[BINS] = {0};
    char msg[256];
    assert_int_equal(
        read_text(team, &reader, 1, false, &text, bin_size, bins, BINS, msg, sizeof msg), OK);
    read_naively(naive, BINS, bin_size, m, 0, &text, context, stride);
    for (int b = 0; b < BINS; b++) {
        assert_int_equal(bins[b].n, naive[b].n);
        assert_true(bins[b].nll ==
                    naive[b].nll); /* the same rows to the bit, added in the same order */
    }
    free((int32_t *)text.ids);
    model_close(m);
}

static void test_a_stream_scores_every_token_with_all_before_it(void **state) {
    (void)state;
    check_reading(150, -1, 0, 0, 60);
}
static void test_separate_windows_score_each_token_in_its_own(void **state) {
    (void)state;
    check_reading(150, -1, 40, 40, 60);
}
static void test_overlapping_windows_score_each_token_once(void **state) {
    (void)state;
    check_reading(150, -1, 48, 16, 60);
    check_reading(150, -1, 31, 7, 60);
}
static void test_bos_starts_every_window_and_predicts_its_first_token(void **state) {
    (void)state;
    check_reading(150, 1, 40, 39, 60);
    check_reading(150, 1, 33, 10, 60);
    check_reading(150, 1, 0, 0, 60);
}

/* Readers of one model, one of them without its linear branch, and a base with other windows. */
static void test_readers_do_not_disturb_each_other(void **state) {
    (void)state;
    enum { N = 200 };
    struct model *base = open_model(1, 0), *m = open_model(2, -1);
    struct text text = {text_ids(m, N), N, 1};
    struct reader readers[3] = {
        {.name = "base", .model = base, .linear = true, .context = 64, .stride = 32},
        {.name = "m", .model = m, .slot = 0, .linear = true},
        {.name = "exact", .model = m, .slot = 1, .linear = false}};
    struct score together[3] = {0};
    char msg[256];
    assert_int_equal(read_text(team, readers, 3, true, &text, N, together, 1, msg, sizeof msg), OK);
    for (int r = 0; r < 3; r++) {
        struct score alone = {0};
        assert_int_equal(
            read_text(team, &readers[r], 1, false, &text, N, &alone, 1, msg, sizeof msg), OK);
        assert_int_equal(alone.n, N);
        assert_int_equal(together[r].n, N);
        assert_true(alone.nll == together[r].nll);
    }
    assert_true(together[1].nll != together[2].nll); /* the linear branch was off */
    assert_true(together[0].kl == 0 && together[1].kl > 0 && together[2].kl > 0);
    free((int32_t *)text.ids);
    model_close(base);
    model_close(m);
}

static void test_a_model_against_itself_diverges_by_nothing(void **state) {
    (void)state;
    enum { N = 200 };
    struct model *a = open_model(1, -1), *b = open_model(1, -1);
    struct text text = {text_ids(a, N), N, -1};
    struct reader readers[2] = {{.name = "a", .model = a, .linear = true},
                                {.name = "b", .model = b, .linear = true}};
    struct score scores[2] = {0};
    char msg[256];
    assert_int_equal(read_text(team, readers, 2, true, &text, N, scores, 1, msg, sizeof msg), OK);
    assert_int_equal(scores[1].n, N - 1);
    assert_int_equal(scores[1].n_agree, N - 1);
    assert_true(scores[1].kl == 0);
    assert_true(scores[0].nll == scores[1].nll);
    free((int32_t *)text.ids);
    model_close(a);
    model_close(b);
}

/* ---- passkey ---- */

static void test_passkey_prompts_have_the_length_asked_for_and_hold_the_key(void **state) {
    (void)state;
    struct model *m = open_model(1, -1);
    struct text filler = {text_ids(m, 1000), 1000, 1};
    char msg[256];
    size_t places[5];
    for (int i = 0; i < 5; i++) {
        struct passkey p, again;
        assert_int_equal(
            passkey_make(&p, model_tokenizer(m), &filler, 0, 700, i, 5, msg, sizeof msg), OK);
        assert_int_equal(
            passkey_make(&again, model_tokenizer(m), &filler, 0, 700, i, 5, msg, sizeof msg), OK);
        assert_int_equal(p.n, 700);
        assert_int_equal(p.ids[0], 1);
        assert_memory_equal(p.ids, again.ids, 700 * sizeof *p.ids);
        assert_string_equal(p.key, again.key);
        char *text, fact[128];
        size_t len;
        assert_int_equal(detokenize(model_tokenizer(m), p.ids, 700, false, true, &text, &len), OK);
        snprintf(fact, sizeof fact, "The pass key is %s. Remember it. The pass key is %s.\n", p.key,
                 p.key);
        const char *at = strstr(text, fact);
        assert_non_null(at);
        places[i] = (size_t)(at - text);
        if (i) assert_true(places[i] > places[i - 1]); /* deeper with every try */
        static const char question[] = "\nWhat is the pass key? The pass key is";
        assert_string_equal(text + len - strlen(question), question);
        free(text);
        free(p.ids);
        free(again.ids);
    }
    struct passkey none;
    assert_int_equal(passkey_make(&none, model_tokenizer(m), &filler, 0, 20, 0, 1, msg, sizeof msg),
                     ERR_ARG);
    assert_int_equal(
        passkey_make(&none, model_tokenizer(m), &filler, 0, 5000, 0, 1, msg, sizeof msg), ERR_ARG);
    free((int32_t *)filler.ids);
    model_close(m);
}

/* How many of the answer's digits are most likely, a token a step. */
static int ask_naively(struct model *m, int slot, const struct passkey *p, bool *whole) {
    int vocab_size = model_info(m)->vocab_size, right = 0;
    *whole = true;
    model_slot_clear(m, slot);
    for (int64_t at = 0; at + 1 < p->n + p->n_answer; at++) {
        const float *logits;
        struct model_run run = {.slot = slot, .n_rows = 1, .tokens = &p->ids[at], .n_logits = 1};
        assert_int_equal(model_step(m, &run, 1, &logits), OK);
        if (at + 1 < p->n) continue;
        bool best = true;
        for (int v = 0; v < vocab_size; v++)
            best &= logits[v] <= logits[p->ids[at + 1]];
        *whole &= best;
        char *text;
        size_t len;
        assert_int_equal(
            detokenize(model_tokenizer(m), &p->ids[at + 1], 1, true, false, &text, &len), OK);
        if (best && strspn(text, "0123456789")) right++;
        free(text);
    }
    return right;
}

/* This model cannot recall numbers; but after zeros it expects more zeros, which gives right digits
 * to count: in "0 x 8, 1, 0 x 4" some of the first and not the 1. */
static void test_a_digit_is_right_when_it_is_the_most_likely_next_token(void **state) {
    (void)state;
    struct model *m = open_model(2, -1);
    struct reader reader = {.name = "m", .model = m, .slot = 1, .linear = true};
    int total = 0, digits = 0, n_whole = 0;
    for (int n_answer = 1; n_answer <= 6; n_answer++)
        for (int zeros = 2; zeros < 12; zeros++) {
            static const char text[] = "0000000010000";
            struct passkey p = {.n_answer = n_answer};
            size_t n;
            assert_int_equal(
                tokenize(model_tokenizer(m), text, (size_t)zeros, TOKENIZE_ADD_BOS_EOS, &p.ids, &n),
                OK);
            p.n = (int64_t)n - n_answer;
            struct answer right = {-1, false};
            char msg[256];
            if (p.n >= 1) {
                assert_int_equal(passkey_ask(&right, &reader, &p, msg, sizeof msg), OK);
                bool whole;
                assert_int_equal(right.digits, ask_naively(m, 0, &p, &whole));
                assert_int_equal(right.whole, whole);
                n_whole += whole;
                total += right.digits;
                digits += n_answer;
            }
            free(p.ids);
        }
    assert_true(total > 0 && total < digits && n_whole > 0);
    model_close(m);
}

/* ---- the command ---- */

static void test_the_report_holds_all_tests_of_all_readers(void **state) {
    (void)state;
    static char text[1 << 20];
    char *flags[] = {"eval",      MODEL,       "--text",
                     TEXT,        "--against", "tests/data/models/stories260k",
                     "--weights", "fp32",      "--against-weights",
                     "fp32",      "--tokens",  "600",
                     "--context", "200",       "--bin",
                     "250",       "--lengths", "150,510",
                     "--tries",   "2",         "--cache-fact-age",
                     "700",       "--json"}; /* for MODEL: the other has no cache */
    assert_int_equal(run_eval(flags, sizeof flags / sizeof *flags, 1, text, sizeof text), 0);
    struct json *root;
    char msg[256];
    if (json_parse(&root, text, strlen(text), "report", msg, sizeof msg)) fail_msg("%s", msg);
    const struct json *readers = json_get(root, "readers");
    assert_int_equal(json_size(readers), 5);
    int i = 0;
    double exact = 0, whole = 0;
    for (const struct json *r = json_child(readers); r; r = json_next(r), i++) {
        const struct json *p = json_get(r, "perplexity"),
                          *bins = json_get(json_child(json_get(r, "stream")), "bins");
        assert_int_equal((int)json_number(json_get(p, "tokens_scored"), 0),
                         600); /* BOS predicts each first token */
        double perplexity = json_number(json_get(p, "perplexity"), 0);
        assert_true(perplexity > 2 && perplexity < 6); /* its own texts; uniform would be 512 */
        assert_int_equal(json_get(p, "kl") != NULL, i > 0);
        assert_int_equal(json_size(bins), 3);
        assert_int_equal((int)json_number(json_get(json_child(bins), "tokens_scored"), 0), 250);
        const struct json *lengths = json_get(r, "passkey");
        assert_int_equal(json_size(lengths), 2);
        double share = json_number(json_get(json_next(json_child(lengths)), "digits_right"), NAN);
        assert_int_equal(isnan(share), i == 0); /* the softmax base ends at 512 */
        assert_int_equal(json_size(json_get(json_child(lengths), "by_depth")), DEPTHS);
        assert_true(json_number(json_get(json_child(lengths), "tries"), 0) == 2);
        int cache_size = (int)json_number(json_get(r, "cache_size"), -1);
        assert_int_equal(cache_size, i == 1 || i == 2 ? 16 : 0); /* base and "no cache" have none */
        assert_true(json_number(json_get(r, "cache_fact_age"), -1) == (cache_size ? 700 : 0));
        assert_int_equal(json_get(r, "heads") != NULL,
                         i == 1 || i == 3); /* who has a linear branch at work */
        assert_int_equal(json_bool(json_get(r, "ablation"), false), i > 1);
        if (i == 4)
            assert_true(json_number(json_get(p, "nll_less_whole"), 0) >
                        json_number(json_get(json_get(json_next(json_next(json_child(readers))),
                                                      "perplexity"),
                                             "nll_less_whole"),
                                    9)); /* both cost more than one */
        if (i == 1) whole = perplexity;
        if (i == 2) exact = perplexity;
    }
    assert_true(whole < exact); /* the linear branch is worth something */
    json_free(root);
}

/* c_h of -60 and the linear branch off are one: the sentence must come, and not for the model as it
 * is. */
static void test_a_dead_linear_branch_is_told(void **state) {
    (void)state;
    struct model *m = open_model(2, -1);
    struct reader readers[2] = {
        {.name = "whole", .model = m, .linear = true},
        {.name = "exact", .model = m, .slot = 1, .linear = false, .whole = readers}};
    struct report r = {.readers = readers, .n_readers = 2, .has_perplexity = true, .context = 512};
    struct text text = {text_ids(m, 8000), 8000, 1};
    char msg[256], verdict[256];
    for (int i = 0; i < 2; i++)
        readers[i].context = 400, readers[i].stride = 399;
    assert_int_equal(
        read_text(team, readers, 2, false, &text, 8000, r.perplexity, 1, msg, sizeof msg), OK);
    assert_false(report_verdict(&r, verdict, sizeof verdict));
    double off = score_mean_off(&r.perplexity[1]);
    assert_true(off > 2 * score_off_error(&r.perplexity[1]));
    assert_true(fabs(off - (score_mean_nll(&r.perplexity[1]) - score_mean_nll(&r.perplexity[0]))) <
                1e-9);
    r.perplexity[1].off /= 1000; /* as if it had cost next to nothing */
    assert_true(report_verdict(&r, verdict, sizeof verdict));
    assert_non_null(strstr(verdict, "The linear branch of whole is dead"));
    r.context = 64; /* a window of 32: block 2 begins at 64 */
    assert_true(report_verdict(&r, verdict, sizeof verdict));
    assert_non_null(strstr(verdict, "No key is linear in 64 tokens"));
    free((int32_t *)text.ids);
    model_close(m);
}

/* Without a window and sinks c_h scales all weights alike, so there is nothing to switch off. */
static void test_a_model_without_exact_keys_has_no_ablation(void **state) {
    (void)state;
    static char text[1 << 16];
    char folder[] = "/tmp/urchin-pure-XXXXXX", msg[256];
    char *json = edited(MODEL "/urchin.json",
                        "\"window\": {\n   \"rule\": \"terraced\",\n   \"size\": 32\n  },\n"
                        "  \"sinks\": 1,\n  \"cache\": {\n   \"size\": 16,\n"
                        "   \"score\": \"self_recall\"\n  },",
                        "\"window\": {\"rule\": \"none\"}, \"sinks\": 0, \"cache\": null,");
    copy_model(folder, "urchin.json", json);
    free(json);
    char *flags[] = {"eval", folder,    "--text",     TEXT,    "--tokens",
                     "300",  "--tests", "perplexity", "--json"};
    int status = run_eval(flags, sizeof flags / sizeof *flags, 1, text, sizeof text);
    remove_copy(folder);
    assert_int_equal(status, 0);
    struct json *root;
    if (json_parse(&root, text, strlen(text), "report", msg, sizeof msg)) fail_msg("%s", msg);
    assert_int_equal(json_size(json_get(root, "readers")), 1);
    assert_null(json_get(root, "linear_branch"));
    json_free(root);
}

static void test_the_error_of_a_difference_is_that_of_a_mean(void **state) {
    (void)state;
    struct score sum = {0};
    const double off[] = {1, 2, 3, 6};
    for (int i = 0; i < 4; i++) {
        struct score whole = {.n = 1, .nll = 5}, one = {.n = 1, .nll = 5 + off[i]};
        score_compare(&one, &whole);
        score_add(&sum, &one);
    }
    assert_true(fabs(score_mean_off(&sum) - 3) < 1e-12);
    assert_true(fabs(score_off_error(&sum) - sqrt(14.0 / 3 / 4)) < 1e-12);
}

static void test_wrong_requests_earn_one_sentence(void **state) {
    (void)state;
    static const struct {
        char *flags[8];
        int n;
        const char *sentence;
    } cases[] = {
        {{"eval", MODEL}, 2, "--text is missing"},
        {{"eval", MODEL, "--text", "/no/such/file"}, 4, "/no/such/file"},
        {{"eval", MODEL, "--text", TEXT, "--tests", "speed"}, 6, "'speed'"},
        {{"eval", MODEL, "--text", TEXT, "--tests", "choice"}, 6, "--tasks"},
        {{"eval", MODEL, "--text", TEXT, "--tests", "heads", "--context", "64"}, 8, "exact"},
        {{"eval", "tests/data/models/stories260k", "--text", TEXT, "--tests", "heads"},
         6,
         "its attention is softmax"},
        {{"eval", MODEL, "--text", TEXT, "--ablate", "window"}, 6, "'window'"},
        {{"eval", MODEL, "--text", TEXT, "--against", "base"}, 6, "not an adapter"},
        {{"eval", MODEL, "--text", TEXT, "--against", "tests/data/models/babyllama-105"},
         6,
         "vocabulary"},
        {{"eval", MODEL, "--text", TEXT, "--context", "64", "--stride", "64"}, 8, "--stride 64"},
        {{"eval", MODEL, "--text", TEXT, "--tests", "passkey", "--lengths", "9"}, 8, "passkey"},
        {{"eval", "tests/data/models/stories260k", "--text", TEXT, "--context", "513"},
         6,
         "--context 513"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[1024];
        assert_int_equal(run_eval((char **)cases[i].flags, cases[i].n, 2, text, sizeof text), 1);
        if (!strstr(text, cases[i].sentence)) fail_msg("no '%s' in: %s", cases[i].sentence, text);
        assert_ptr_equal(strchr(text, '\n'), text + strlen(text) - 1);
    }
}

int main(void) {
    log_configure(LOG_WARN, false);
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loss_and_divergence_equal_the_naive_sums),
        cmocka_unit_test(test_loss_survives_logits_that_overflow_exp),
        cmocka_unit_test(test_a_row_against_itself_has_no_divergence_and_agrees),
        cmocka_unit_test(test_uniform_logits_have_the_vocabulary_as_perplexity),
        cmocka_unit_test(test_agreement_compares_most_likely_tokens_ties_to_the_lower_id),
        cmocka_unit_test(test_rows_score_the_same_on_any_number_of_threads),
        cmocka_unit_test(test_windows_are_hugging_faces_where_the_stride_divides_the_context),
        cmocka_unit_test(test_windows_tile_the_text_and_never_exceed_the_context),
        cmocka_unit_test(test_a_stream_scores_every_token_with_all_before_it),
        cmocka_unit_test(test_separate_windows_score_each_token_in_its_own),
        cmocka_unit_test(test_overlapping_windows_score_each_token_once),
        cmocka_unit_test(test_bos_starts_every_window_and_predicts_its_first_token),
        cmocka_unit_test(test_readers_do_not_disturb_each_other),
        cmocka_unit_test(test_a_model_against_itself_diverges_by_nothing),
        cmocka_unit_test(test_passkey_prompts_have_the_length_asked_for_and_hold_the_key),
        cmocka_unit_test(test_a_digit_is_right_when_it_is_the_most_likely_next_token),
        cmocka_unit_test(test_the_report_holds_all_tests_of_all_readers),
        cmocka_unit_test(test_a_dead_linear_branch_is_told),
        cmocka_unit_test(test_a_model_without_exact_keys_has_no_ablation),
        cmocka_unit_test(test_the_error_of_a_difference_is_that_of_a_mean),
        cmocka_unit_test(test_wrong_requests_earn_one_sentence),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
