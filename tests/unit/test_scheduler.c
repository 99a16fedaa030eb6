/* test_scheduler.c - requests through a real model: the same tokens whatever runs beside them, and
 * an end where they asked for it. */
#include "scheduler_testing.h"

#include <math.h>

/* ---- the same tokens ---- */

static void test_same_request_same_tokens_whatever_runs_beside_it(void **state) {
    (void)state;
    struct sched_request request = request_for(n_story, 100);
    request.ignore_eos = true;
    request.n_logprobs = 1;
    struct sched *s = start_default();
    struct reader *alone = answered(s, &request), *beside[N_SLOTS - 1];
    assert_int_equal(alone->answers[0].n_tokens, 100);
    assert_int_equal(alone->answers[0].finish, FINISH_LENGTH);
    assert_int_equal(alone->usage.prompt_tokens, n_story);
    assert_int_equal(alone->usage.completion_tokens, 100);
    for (int i = 0; i < N_SLOTS - 1; i++) {
        struct sched_request other = request_for(n_story - (size_t)i, 80 + 10 * i);
        other.sampling.seed = 100 + (uint64_t)i;
        beside[i] = submit(s, &other);
    }
    struct reader *crowded = answered(s, &request);
    assert_same_answer(&alone->answers[0], &crowded->answers[0]);
    for (int i = 0; i < N_SLOTS - 1; i++) {
        read_all(beside[i]);
        reader_free(beside[i]);
    }
    reader_free(crowded);
    sched_free(s);
    static const int chunks[] = {1, 3, 64};
    for (int i = 0; i < 3; i++) {
        struct sched_options options = options_for(model);
        options.prefill_chunk = chunks[i];
        s = start(&options);
        struct reader *again = answered(s, &request);
        assert_same_answer(&alone->answers[0], &again->answers[0]);
        reader_free(again);
        sched_free(s);
    }
    reader_free(alone);
}

/* Greedy tokens, their logprobs and the prompt's are those of the model stepped by hand.  Both
 * round a double of the same sums, so they differ by the exponentials in single of the sampler:
 * 2^-21 absolute, as derived in test_sampler.c. */
static void test_logprobs_are_those_of_the_model(void **state) {
    (void)state;
    enum { N_NEW = 30 };
    int32_t tokens[256];
    double expected[256];
    memcpy(tokens, story, n_story * sizeof *story);
    model_slot_clear(model, 0);
    for (size_t i = 0; i < n_story + N_NEW; i++) {
        const float *logits;
        struct model_run run = {0, 1, &tokens[i], 1, false};
        assert_int_equal(model_step(model, &run, 1, &logits), OK);
        double sum = 0;
        int32_t best = 0;
        for (int32_t v = 0; v < info->vocab_size; v++) {
            sum += exp((double)logits[v]);
            if (logits[v] > logits[best]) best = v;
        }
        if (i + 1 >= n_story) tokens[i + 1] = best;
        expected[i + 1] = (double)logits[tokens[i + 1]] - log(sum);
    }
    struct sched *s = start_default();
    struct sched_request request = request_for(n_story, N_NEW);
    request.sampling.temperature = 0;
    request.ignore_eos = true;
    request.n_logprobs = 2;
    request.prompt_logprobs = true; /* more rows than MAX_LOGITS leaves: read in parts */
    struct reader *r = answered(s, &request);
    assert_int_equal(r->prompt.n_tokens, n_story);
    assert_int_equal(r->prompt.n_events, 1);
    assert_int_equal(r->answers[0].n_tokens, N_NEW);
    assert_true(isnan(r->prompt.tokens[0].logprob));
    for (size_t i = 0; i < n_story + N_NEW; i++) {
        bool is_prompt = i < n_story;
        const struct answer *a = is_prompt ? &r->prompt : &r->answers[0];
        size_t at = is_prompt ? i : i - n_story;
        assert_int_equal(a->tokens[at].token, tokens[i]);
        if (!i) continue;
        assert_true(fabs((double)a->tokens[at].logprob - expected[i]) <=
                    0x1p-21 + fabs(expected[i]) * 0x1p-23);
        assert_int_equal(a->tokens[at].n_top, 2);
        assert_true(a->best[at][0].logprob >= a->best[at][1].logprob);
        if (!is_prompt) assert_int_equal(a->best[at][0].token, tokens[i]);
    }
    reader_free(r);
    request.max_tokens = 0; /* the scoring call: prompt only */
    r = answered(s, &request);
    assert_int_equal(r->prompt.n_tokens, n_story);
    assert_int_equal(r->answers[0].n_tokens, 0);
    assert_int_equal(r->answers[0].finish, FINISH_LENGTH);
    assert_int_equal(r->usage.completion_tokens, 0);
    reader_free(r);
    sched_free(s);
}

static void test_choices_differ_and_repeat(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = request_for(n_story, 40);
    request.n = request.best_of = 4;
    request.n_logprobs = 0;
    request.sampling.repetition_penalty = 1.1f; /* counts are per choice */
    struct reader *four = answered(s, &request), *again = answered(s, &request);
    for (int i = 0; i < 4; i++) {
        assert_same_answer(&four->answers[i], &again->answers[i]);
        for (int j = 0; j < i; j++)
            assert_string_not_equal(four->answers[i].text, four->answers[j].text);
    }
    request.n = request.best_of = 1;
    struct reader *one = answered(s, &request);
    assert_same_answer(&four->answers[0], &one->answers[0]);
    assert_int_equal(four->usage.prompt_tokens, n_story);
    reader_free(one);
    reader_free(four);
    reader_free(again);
    sched_free(s);
}

static double mean_logprob(const struct answer *a) {
    double sum = 0;
    for (int i = 0; i < a->n_tokens; i++)
        sum += (double)a->tokens[i].logprob;
    return sum / a->n_tokens;
}

static void test_best_of_delivers_the_likeliest(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = request_for(n_story, 25);
    request.n = request.best_of = 6;
    request.n_logprobs = 1;
    struct reader *six = answered(s, &request);
    request.n = 2;
    struct reader *two = answered(s, &request);
    int first = 0, second = -1;
    for (int i = 1; i < 6; i++)
        if (mean_logprob(&six->answers[i]) > mean_logprob(&six->answers[first])) first = i;
    for (int i = 0; i < 6; i++)
        if (i != first &&
            (second < 0 || mean_logprob(&six->answers[i]) > mean_logprob(&six->answers[second])))
            second = i;
    assert_same_answer(&two->answers[0], &six->answers[first]);
    assert_same_answer(&two->answers[1], &six->answers[second]);
    assert_int_equal(two->usage.completion_tokens, six->usage.completion_tokens);
    reader_free(six);
    reader_free(two);
    sched_free(s);
}

/* ---- where it ends ---- */

static void test_every_stop_string_of_a_text_ends_it_there(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = request_for(n_story, 40);
    request.sampling.temperature = 0;
    struct reader *whole = answered(s, &request);
    const char *text = whole->answers[0].text;
    size_t len = whole->answers[0].len;
    assert_true(len > 60);
    for (size_t at = 0; at < len; at++)
        for (size_t n = 1; n <= 11 && at + n <= len; n += 5)
            for (int include = 0; include < 2; include++) {
                char stop[16], right[16384];
                const char *stops[] = {"\x01never", stop};
                size_t lens[] = {6, n};
                snprintf(stop, sizeof stop, "%.*s", (int)n, text + at);
                request.stop = stops;
                request.stop_len = lens;
                request.n_stop = 2;
                request.include_stop = include;
                struct reader *r = answered(s, &request);
                const char *found = strstr(text, stop);
                snprintf(right, sizeof right, "%.*s", (int)(found - text + (include ? (int)n : 0)),
                         text);
                assert_string_equal(r->answers[0].text, right);
                assert_int_equal(r->answers[0].finish, FINISH_STOP);
                assert_string_equal(r->answers[0].stop_string, stop);
                assert_int_equal(r->answers[0].n_tokens, r->usage.completion_tokens);
                reader_free(r);
            }
    reader_free(whole);
    sched_free(s);
}

static void test_end_of_text_min_tokens_and_ignore_eos(void **state) {
    (void)state;
    struct sched *s = start_default();
    assert_true(info->n_eos_ids > 0);
    int32_t eos = info->eos_ids[0];
    struct logit_bias to_eos = {eos, 1000};
    struct sched_request request = request_for(n_story, 20);
    request.sampling.bias = &to_eos;
    request.sampling.n_bias = 1;
    request.n_logprobs = 0;
    struct reader *r = answered(s, &request);
    assert_int_equal(r->answers[0].finish, FINISH_STOP);
    assert_int_equal(r->answers[0].stop_token, eos);
    assert_int_equal(r->answers[0].n_tokens, 1);
    assert_int_equal(r->answers[0].len, 0);
    reader_free(r);

    request.min_tokens = 7;
    r = answered(s, &request);
    assert_int_equal(r->answers[0].finish, FINISH_STOP);
    assert_int_equal(r->answers[0].n_tokens, 8);
    for (int i = 0; i < 7; i++)
        assert_int_not_equal(r->answers[0].tokens[i].token, eos);
    assert_int_equal(r->answers[0].tokens[7].token, eos);
    reader_free(r);

    request.min_tokens = 0;
    request.ignore_eos = true;
    r = answered(s, &request);
    assert_int_equal(r->answers[0].finish, FINISH_LENGTH);
    assert_int_equal(r->answers[0].n_tokens, 20);
    for (int i = 0; i < 20; i++)
        assert_int_equal(r->answers[0].tokens[i].token, eos);
    reader_free(r);

    /* a stop token that is text: not shown, unless include_stop */
    request = request_for(n_story, 40);
    request.sampling.temperature = 0;
    request.n_logprobs = 0;
    struct reader *whole = answered(s, &request);
    int32_t third = whole->answers[0].tokens[2].token;
    request.stop_tokens = &third;
    request.n_stop_tokens = 1;
    int at = 0;
    while (whole->answers[0].tokens[at].token != third)
        at++;
    for (int include = 0; include < 2; include++) {
        request.include_stop = include;
        r = answered(s, &request);
        assert_int_equal(r->answers[0].n_tokens, at + 1);
        assert_int_equal(r->answers[0].stop_token, third);
        size_t n;
        char right[256] = "";
        for (int i = 0; i < at + include; i++) {
            const char *bytes =
                token_bytes(model_tokenizer(model), whole->answers[0].tokens[i].token, false, &n);
            strncat(right, bytes, n);
        }
        assert_string_equal(r->answers[0].text, right);
        reader_free(r);
    }
    reader_free(whole);
    sched_free(s);
}

static void test_a_length_limit_cuts_generation_and_refuses_prompts(void **state) {
    (void)state;
    struct model *limited = open_model(2, 20);
    struct sched_options options = options_for(limited);
    struct sched *s = start(&options);
    struct ticket *t;
    double retry;
    char msg[300];
    struct sched_request request = request_for(12, 100);
    request.ignore_eos = true;
    for (int unlimited = 0; unlimited < 2; unlimited++) {
        request.max_tokens = unlimited ? -1 : 100;
        struct reader *r = answered(s, &request);
        assert_int_equal(r->answers[0].finish, FINISH_LENGTH);
        assert_int_equal(r->answers[0].n_tokens, 8);
        reader_free(r);
    }
    request.n_prompt = 20;
    assert_int_equal(sched_submit(s, &request, NULL, NULL, &t, &retry, msg, sizeof msg), ERR_ARG);
    assert_string_equal(
        msg, "the prompt has 20 tokens, which leaves no room in a sequence of at most 20 tokens");
    request.max_tokens = 0;
    reader_free(answered(s, &request));
    request.n = request.best_of = 3;
    assert_int_equal(sched_submit(s, &request, NULL, NULL, &t, &retry, msg, sizeof msg), ERR_ARG);
    assert_string_equal(msg, "n 3 is more than the 2 sequences that fit at once (--max-seqs)");
    sched_free(s);
    model_close(limited);
}

static void test_bad_requests_get_a_sentence(void **state) {
    (void)state;
    struct sched *s = start_default();
    int32_t bad_token = info->vocab_size;
    struct logit_bias bad_bias = {-1, 0};
    struct sched_request bad[12];
    int n = 0;
    for (int i = 0; i < 12; i++)
        bad[i] = request_for(n_story, 5);
    bad[n++].n_prompt = 0;
    bad[n].prompt = &bad_token, bad[n++].n_prompt = 1;
    bad[n++].n = 2;
    bad[n++].n = 0;
    bad[n++].max_tokens = -2;
    bad[n].stop_tokens = &bad_token, bad[n++].n_stop_tokens = 1;
    bad[n].sampling.bias = &bad_bias, bad[n++].sampling.n_bias = 1;
    bad[n++].sampling.temperature = NAN;
    bad[n++].sampling.top_p = 0;
    bad[n++].sampling.repetition_penalty = 0;
    bad[n++].n_logprobs = info->vocab_size + 1;
    bad[n].best_of = 2, bad[n++].max_tokens = -1;
    for (int i = 0; i < n; i++) {
        struct ticket *t = NULL;
        double retry;
        char msg[300] = "";
        assert_int_equal(sched_submit(s, &bad[i], NULL, NULL, &t, &retry, msg, sizeof msg),
                         ERR_ARG);
        assert_true(strlen(msg) > 10);
        assert_null(t);
    }
    sched_free(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_request_same_tokens_whatever_runs_beside_it),
        cmocka_unit_test(test_logprobs_are_those_of_the_model),
        cmocka_unit_test(test_choices_differ_and_repeat),
        cmocka_unit_test(test_best_of_delivers_the_likeliest),
        cmocka_unit_test(test_every_stop_string_of_a_text_ends_it_there),
        cmocka_unit_test(test_end_of_text_min_tokens_and_ignore_eos),
        cmocka_unit_test(test_a_length_limit_cuts_generation_and_refuses_prompts),
        cmocka_unit_test(test_bad_requests_get_a_sentence),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
