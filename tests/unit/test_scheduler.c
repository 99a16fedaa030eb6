/* test_scheduler.c - requests through a real model: the same tokens whatever runs beside them, and
 * every slot given back. */
#include "scheduler/scheduler.h"
#include "scheduler/text.h"

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include <cmocka.h>

enum { N_SLOTS = 8, MAX_ROWS = N_SLOTS + 64, MAX_LOGITS = N_SLOTS + 5 };

static struct team *team;
static struct model *model;
static const struct model_info *info;
static int32_t *story; /* "Once upon a time, ..." */
static size_t n_story;

static struct model *open_model(int n_slots, int64_t max_seq_len) {
    struct model_options options;
    struct model *m = NULL;
    char msg[500] = "";
    model_options_init(&options);
    options.path = "models/stories260k-hedgehog";
    options.n_slots = n_slots;
    options.max_seq_len = max_seq_len;
    options.max_rows = MAX_ROWS;
    options.max_logits = MAX_LOGITS;
    options.team = team;
    if (model_open(&m, &options, msg, sizeof msg)) fail_msg("%s", msg);
    return m;
}

static int open_all(void **state) {
    (void)state;
    static const char text[] =
        "Once upon a time, there was a little girl named Lily. She had a big";
    if (team_new(&team, 1)) return -1;
    model = open_model(N_SLOTS, 0);
    info = model_info(model);
    return tokenize(model_tokenizer(model), text, strlen(text), TOKENIZE_ADD_BOS_EOS, &story,
                    &n_story);
}

static int close_all(void **state) {
    (void)state;
    free(story);
    model_close(model);
    team_free(team);
    return 0;
}

static struct sched_options options_for(struct model *m) {
    return (struct sched_options){.model = m,
                                  .max_rows = MAX_ROWS,
                                  .max_logits = MAX_LOGITS,
                                  .max_queue = 64,
                                  .prefill_chunk = 16,
                                  .output_limit = 1 << 20};
}
static struct sched *start(const struct sched_options *options) {
    struct sched *s = NULL;
    char msg[300] = "";
    if (sched_new(&s, options, msg, sizeof msg)) fail_msg("%s", msg);
    return s;
}
static struct sched *start_default(void) {
    struct sched_options options = options_for(model);
    return start(&options);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static void nap(void) {
    nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
}

/* Waits until a number of sched_stats() has a value, at most 20 s. */
#define wait_for_stat(sched, field, value)                                                         \
    do {                                                                                           \
        struct sched_stats stats_;                                                                 \
        double until_ = seconds() + 20;                                                            \
        for (;;) {                                                                                 \
            sched_stats(sched, &stats_);                                                           \
            if (stats_.field == (value)) break;                                                    \
            if (seconds() > until_)                                                                \
                fail_msg(#field " is %d, not %d", (int)stats_.field, (int)(value));                \
            nap();                                                                                 \
        }                                                                                          \
    } while (0)

/* ---- a reader: everything a request gave, choice by choice ---- */

enum { MOST_CHOICES = 8, MOST_TOKENS = 16384 };
struct answer {
    char text[65536];
    size_t len;
    int n_tokens, n_events;
    struct sched_token tokens[MOST_TOKENS]; /* top is NULL: see best */
    struct token_logprob best[MOST_TOKENS][2];
    enum finish_reason finish;
    char stop_string[64];
    int32_t stop_token;
    char error[128];
};
struct reader {
    pthread_mutex_t mu;
    pthread_cond_t news;
    int n_news;
    struct ticket *ticket;
    int n_choices;
    struct answer *answers; /* [n_choices] */
    struct answer prompt;
    struct sched_usage usage;
};

static void on_news(void *arg) {
    struct reader *r = arg;
    pthread_mutex_lock(&r->mu);
    r->n_news++;
    pthread_cond_signal(&r->news);
    pthread_mutex_unlock(&r->mu);
}

static struct reader *submit(struct sched *s, const struct sched_request *request) {
    struct reader *r = calloc(1, sizeof *r);
    double retry;
    char msg[300] = "";
    assert_non_null(r);
    pthread_mutex_init(&r->mu, NULL);
    pthread_cond_init(&r->news, NULL);
    r->n_choices = request->n;
    r->answers = calloc((size_t)request->n, sizeof *r->answers);
    assert_non_null(r->answers);
    if (sched_submit(s, request, on_news, r, &r->ticket, &retry, msg, sizeof msg))
        fail_msg("%s", msg);
    return r;
}

static void take(struct answer *a, const struct sched_event *e) {
    assert_int_equal(a->finish, FINISH_NONE); /* nothing comes after the last */
    assert_true(a->len + e->text_len < sizeof a->text);
    assert_int_equal(strlen(e->text), e->text_len);
    memcpy(a->text + a->len, e->text, e->text_len + 1);
    a->len += e->text_len;
    a->n_events++;
    for (int i = 0; i < e->n_tokens; i++) {
        assert_true(a->n_tokens < MOST_TOKENS);
        struct sched_token *t = &a->tokens[a->n_tokens];
        *t = e->tokens[i];
        for (int k = 0; k < t->n_top && k < 2; k++)
            a->best[a->n_tokens][k] = t->top[k];
        t->top = NULL;
        a->n_tokens++;
    }
    a->finish = e->finish;
    a->stop_token = e->stop_token;
    if (e->stop_string) snprintf(a->stop_string, sizeof a->stop_string, "%s", e->stop_string);
    if (e->error) snprintf(a->error, sizeof a->error, "%s", e->error);
}

/* Takes what is there; true when the request is done. */
static bool read_some(struct reader *r) {
    struct sched_event e;
    while (ticket_next(r->ticket, &e)) {
        assert_in_range(e.choice, 0, r->n_choices - 1);
        take(e.is_prompt ? &r->prompt : &r->answers[e.choice], &e);
    }
    return ticket_done(r->ticket);
}

static void read_all(struct reader *r) {
    int seen = 0;
    while (!read_some(r)) {
        pthread_mutex_lock(&r->mu);
        while (r->n_news == seen)
            pthread_cond_wait(&r->news, &r->mu);
        seen = r->n_news;
        pthread_mutex_unlock(&r->mu);
    }
    r->usage = ticket_usage(r->ticket);
}

static void reader_free(struct reader *r) {
    ticket_free(r->ticket);
    pthread_mutex_destroy(&r->mu);
    pthread_cond_destroy(&r->news);
    free(r->answers);
    free(r);
}

static struct reader *answered(struct sched *s, const struct sched_request *request) {
    struct reader *r = submit(s, request);
    read_all(r);
    return r;
}

static struct sched_request request_for(size_t n_prompt, int64_t max_tokens) {
    struct sched_request r;
    sched_request_init(&r);
    r.prompt = story;
    r.n_prompt = n_prompt;
    r.max_tokens = max_tokens;
    r.sampling.seed = 5;
    return r;
}

static void assert_same_answer(const struct answer *a, const struct answer *b) {
    assert_string_equal(a->text, b->text);
    assert_int_equal(a->n_tokens, b->n_tokens);
    for (int i = 0; i < a->n_tokens; i++) {
        assert_int_equal(a->tokens[i].token, b->tokens[i].token);
        assert_memory_equal(&a->tokens[i].logprob, &b->tokens[i].logprob,
                            sizeof(float)); /* to the bit */
    }
    assert_int_equal(a->finish, b->finish);
}

/* ---- text held back ---- */

/* The stop string that is complete first, the longest of those: where the text ends. -1: none. */
static int naive_stop(const char *text, size_t len, const char *const *stops, int n_stops,
                      size_t *begin, size_t *end) {
    for (size_t e = 1; e <= len; e++) {
        int best = -1;
        for (int k = 0; k < n_stops; k++) {
            size_t n = strlen(stops[k]);
            if (n <= e && !memcmp(text + e - n, stops[k], n) &&
                (best < 0 || n > strlen(stops[best])))
                best = k;
        }
        if (best >= 0) {
            *begin = e - strlen(stops[best]);
            *end = e;
            return best;
        }
    }
    return -1;
}

/* Feeds text cut at the set bits of `cuts`; what was shown goes to out.  Returns the stop string
 * that fired. */
static int feed(char *out, const char *text, size_t len, unsigned cuts,
                const struct stop_string *stops, int n_stops, bool include) {
    struct text t;
    int fired = -1;
    size_t shown = 0;
    assert_int_equal(text_init(&t, n_stops), OK);
    for (size_t at = 0; at < len && fired < 0;) {
        size_t n = 1;
        while (at + n < len && !(cuts >> (at + n - 1) & 1))
            n++;
        assert_int_equal(text_append(&t, stops, n_stops, text + at, n, true, include, &fired), OK);
        at += n;
        size_t ready = fired < 0 ? text_ready(&t, n_stops) : t.len;
        memcpy(out + shown, t.bytes, ready);
        shown += ready;
        text_take(&t, ready);
        assert_int_equal(t.shown, shown);
    }
    memcpy(out + shown, t.bytes, t.len);
    out[shown + t.len] = 0;
    text_free(&t);
    return fired;
}

static void test_stop_strings_fire_alike_at_every_split(void **state) {
    (void)state;
    static const char *const texts[] = {"aabaabaaab", "abcabcabcd", "aaaaaaaaaa", "abababcaba",
                                        "aabaaabaaac"};
    static const char *const sets[][3] = {{"aaab", "", ""},
                                          {"abd", "bc", ""},
                                          {"c", "bc", "abc"},
                                          {"abababc", "baba", "cab"},
                                          {"aabaaac", "abcx", "aaaaaaaaaaa"}};
    for (size_t i = 0; i < 5; i++)
        for (size_t j = 0; j < 5; j++) {
            struct stop_string stops[3];
            int n_stops = 0;
            for (int k = 0; k < 3 && *sets[j][k]; k++)
                assert_int_equal(
                    stop_string_init(&stops[n_stops++], sets[j][k], strlen(sets[j][k])), OK);
            size_t begin = 0, end = 0, len = strlen(texts[i]);
            int expected = naive_stop(texts[i], len, sets[j], n_stops, &begin, &end);
            for (unsigned cuts = 0; cuts < 1u << (len - 1); cuts++)
                for (int include = 0; include < 2; include++) {
                    char out[32], right[32];
                    size_t n = expected < 0 ? len : include ? end : begin;
                    snprintf(right, sizeof right, "%.*s", (int)n, texts[i]);
                    assert_int_equal(feed(out, texts[i], len, cuts, stops, n_stops, include),
                                     expected);
                    assert_string_equal(out, right);
                }
            for (int k = 0; k < n_stops; k++)
                stop_string_free(&stops[k]);
        }
}

static void test_unarmed_stop_strings_pass_and_half_of_one_may_still_fire(void **state) {
    (void)state;
    struct stop_string stop;
    struct text t;
    int fired;
    assert_int_equal(stop_string_init(&stop, "abab", 4), OK);
    assert_int_equal(text_init(&t, 1), OK);
    assert_int_equal(text_append(&t, &stop, 1, "xabab", 5, false, false, &fired), OK);
    assert_int_equal(fired, -1);
    assert_int_equal(text_ready(&t, 1), 3); /* the last "ab" may be the beginning of another */
    text_take(&t, 3);
    assert_int_equal(text_append(&t, &stop, 1, "abz", 3, true, false, &fired), OK);
    assert_int_equal(fired, 0);
    assert_int_equal(t.len, 0);
    text_free(&t);
    stop_string_free(&stop);
}

static void test_halves_of_characters_wait(void **state) {
    (void)state;
    static const char text[] = "h\xc3\xa9 \xf0\x9f\xa6\x94!";
    for (size_t cut = 0; cut < sizeof text - 1; cut++) {
        struct text t;
        int fired;
        assert_int_equal(text_init(&t, 0), OK);
        assert_int_equal(text_append(&t, NULL, 0, text, cut, true, false, &fired), OK);
        size_t ready = text_ready(&t, 0);
        assert_true(ready <= cut && (ready == cut || cut - ready < 4));
        assert_true(((unsigned char)text[ready] & 0xc0) !=
                    0x80); /* the next byte begins a character */
        text_take(&t, ready);
        assert_int_equal(
            text_append(&t, NULL, 0, text + cut, sizeof text - 1 - cut, true, false, &fired), OK);
        assert_int_equal(text_ready(&t, 0), sizeof text - 1 - ready);
        text_free(&t);
    }
}

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

/* ---- slots and the queue ---- */

static struct sched_request endless(void) {
    struct sched_request r = request_for(8, -1);
    r.ignore_eos = true;
    return r;
}

static void test_leaving_frees_the_slot_within_a_step(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = endless();
    struct reader *readers[N_SLOTS];
    for (int i = 0; i < N_SLOTS; i++)
        readers[i] = submit(s, &request);
    wait_for_stat(s, slots_used, N_SLOTS);
    for (int i = 1; i < N_SLOTS; i++)
        reader_free(readers[i]);
    wait_for_stat(s, slots_used, 1);
    struct sched_stats before, after;
    reader_free(readers[0]);
    sched_stats(s, &before);
    wait_for_stat(s, slots_used, 0);
    sched_stats(s, &after);
    assert_in_range(after.steps - before.steps, 0, 1); /* the one under way */
    assert_int_equal(after.finished[FINISH_CANCELLED], N_SLOTS);
    assert_int_equal(after.running, 0);
    request = request_for(n_story, 10);
    request.n = request.best_of = N_SLOTS; /* all slots serve again */
    reader_free(answered(s, &request));
    sched_free(s);
}

static void test_a_full_queue_says_when_to_come_back(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    options.max_queue = 2;
    struct sched *s = start(&options);
    struct sched_request request = endless();
    struct reader *readers[N_SLOTS], *waiting[2];
    for (int i = 0; i < N_SLOTS; i++)
        readers[i] = submit(s, &request);
    wait_for_stat(s, slots_used, N_SLOTS);
    struct sched_request short_one = request_for(n_story, 5);
    waiting[0] = submit(s, &short_one);
    waiting[1] = submit(s, &short_one);
    struct ticket *t = NULL;
    double retry = 0, before = 0;
    char msg[300] = "";
    for (int i = 0; i < 3; i++) { /* those turned away earlier come back earlier */
        assert_int_equal(sched_submit(s, &short_one, NULL, NULL, &t, &retry, msg, sizeof msg),
                         ERR_BUSY);
        assert_true(retry > before && retry <= 120);
        before = retry;
    }
    assert_string_equal(msg, "all 8 sequences are in use and 2 requests wait");
    struct sched_stats stats;
    sched_stats(s, &stats);
    assert_int_equal(stats.rejected, 3);
    assert_int_equal(stats.waiting, 2);
    reader_free(readers[0]); /* its slot serves both, one after the other */
    read_all(waiting[0]);
    read_all(waiting[1]);
    assert_same_answer(&waiting[0]->answers[0], &waiting[1]->answers[0]);
    reader_free(waiting[0]);
    reader_free(waiting[1]);
    reader_free(answered(s, &short_one)); /* and the queue takes again */
    waiting[0] = submit(s, &request);     /* one that leaves while it waits gives its place back */
    for (int i = 1; i < N_SLOTS; i++)
        reader_free(readers[i]);
    reader_free(waiting[0]);
    wait_for_stat(s, slots_used, 0);
    sched_stats(s, &stats);
    assert_int_equal(stats.waiting, 0);
    sched_free(s);
}

static void test_no_queue_still_takes_what_can_start_at_once(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    options.max_queue = 0;
    struct sched *s = start(&options);
    struct sched_request request = endless();
    struct reader *readers[N_SLOTS];
    struct ticket *t = NULL;
    double retry;
    for (int i = 0; i < N_SLOTS; i++)
        readers[i] = submit(s, &request);
    assert_int_equal(sched_submit(s, &request, NULL, NULL, &t, &retry, NULL, 0), ERR_BUSY);
    for (int i = 0; i < N_SLOTS; i++)
        reader_free(readers[i]);
    sched_free(s);
}

/* A reader whose news hold the scheduler thread up until it is let go. */
struct gate {
    pthread_mutex_t mu;
    pthread_cond_t moved;
    bool reached, open;
};

static void stand_at_gate(void *arg) {
    struct gate *g = arg;
    pthread_mutex_lock(&g->mu);
    g->reached = true;
    pthread_cond_broadcast(&g->moved);
    while (!g->open)
        pthread_cond_wait(&g->moved, &g->mu);
    pthread_mutex_unlock(&g->mu);
}

/* All come while the scheduler thread is busy, so that none has been given its slot yet. */
static void test_a_burst_finds_every_slot_and_every_place_of_the_queue(void **state) {
    (void)state;
    struct gate gate = {.mu = PTHREAD_MUTEX_INITIALIZER, .moved = PTHREAD_COND_INITIALIZER};
    struct sched_options options = options_for(model);
    options.max_queue = 2;
    struct sched *s = start(&options);
    struct sched_request request = request_for(n_story, 5);
    struct reader *readers[N_SLOTS - 1 + 2];
    struct ticket *first = NULL, *t = NULL;
    double retry;
    char msg[300] = "";
    assert_int_equal(
        sched_submit(s, &request, stand_at_gate, &gate, &first, &retry, msg, sizeof msg), OK);
    pthread_mutex_lock(&gate.mu);
    while (!gate.reached)
        pthread_cond_wait(&gate.moved, &gate.mu);
    pthread_mutex_unlock(&gate.mu);
    for (int i = 0; i < N_SLOTS - 1 + 2; i++)
        readers[i] = submit(s, &request);
    assert_int_equal(sched_submit(s, &request, NULL, NULL, &t, &retry, msg, sizeof msg), ERR_BUSY);
    assert_string_equal(msg, "all 8 sequences are in use and 2 requests wait");
    pthread_mutex_lock(&gate.mu);
    gate.open = true;
    pthread_cond_broadcast(&gate.moved);
    pthread_mutex_unlock(&gate.mu);
    for (int i = 0; i < N_SLOTS - 1 + 2; i++) {
        read_all(readers[i]);
        reader_free(readers[i]);
    }
    ticket_free(first);
    sched_free(s);
}

static void test_a_request_for_many_slots_is_not_overtaken(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = endless(), wide = request_for(n_story, 5), narrow = wide;
    wide.n = wide.best_of = N_SLOTS;
    struct reader *running = submit(s, &request);
    wait_for_stat(s, slots_used, 1);
    struct reader *first = submit(s, &wide), *second = submit(s, &narrow);
    wait_for_stat(s, waiting, 2);
    for (int i = 0; i < 20; i++)
        nap();
    struct sched_stats stats;
    sched_stats(s, &stats);
    assert_int_equal(stats.waiting, 2); /* although slots are free for the second */
    assert_int_equal(stats.slots_used, 1);
    reader_free(running);
    read_all(first);
    read_all(second);
    reader_free(first);
    reader_free(second);
    sched_free(s);
}

/* Every step that reads a part of the long prompt also generates a token of the running sequence.
 */
static void test_reading_a_long_prompt_delays_nobody_by_more_than_a_step(void **state) {
    (void)state;
    enum { LENGTH = 3000, CHUNK = 16 };
    static int32_t prompt[LENGTH];
    for (int i = 0; i < LENGTH; i++)
        prompt[i] = story[1 + (size_t)i % (n_story - 1)];
    struct sched_options options = options_for(model);
    options.prefill_chunk = CHUNK;
    options.output_limit = (size_t)1 << 30;
    struct sched *s = start(&options);
    struct sched_request request = endless(), reading = request_for(1, 0);
    reading.prompt = prompt;
    reading.n_prompt = LENGTH;
    struct reader *running = submit(s, &request);
    wait_for_stat(s, slots_used, 1);
    struct sched_stats before, after;
    do
        sched_stats(s, &before);
    while (!before.generation_tokens);
    reader_free(answered(s, &reading));
    sched_stats(s, &after);
    uint64_t n_steps = after.steps - before.steps;
    assert_true(n_steps >= LENGTH / CHUNK);
    assert_int_equal(after.generation_tokens - before.generation_tokens, n_steps);
    assert_int_equal(after.step_tokens.count[SCHED_BUCKETS], 0);
    for (int i = 0; i < SCHED_BUCKETS;
         i++) /* no step was larger than the chunk and one row: in the bucket up to 32 */
        if (sched_tokens_bounds[i] > 32) assert_int_equal(after.step_tokens.count[i], 0);
    reader_free(running);
    sched_free(s);
}

static void test_a_slow_reader_pauses_alone_and_misses_nothing(void **state) {
    (void)state;
    struct sched_request request = request_for(n_story, 400), other = request_for(n_story, 300);
    request.ignore_eos = other.ignore_eos = true;
    struct sched *s = start_default();
    struct reader *expected = answered(s, &request);
    sched_free(s);
    struct sched_options options = options_for(model);
    options.output_limit = 4096;
    s = start(&options);
    struct reader *slow = submit(s, &request);
    wait_for_stat(s, slots_paused, 1);
    assert_true(ticket_usage(slow->ticket).completion_tokens < 400);
    int64_t stuck = ticket_usage(slow->ticket).completion_tokens;
    reader_free(answered(s, &other)); /* while the slow one stands still */
    assert_int_equal(ticket_usage(slow->ticket).completion_tokens, stuck);
    read_all(slow);
    assert_same_answer(&slow->answers[0], &expected->answers[0]);
    assert_int_equal(slow->usage.completion_tokens, 400);
    reader_free(slow);
    reader_free(expected);
    sched_free(s);
}

/* ---- the end, and trouble ---- */

static void test_drain_finishes_what_runs_and_takes_nothing_new(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = request_for(n_story, 200);
    request.ignore_eos = true;
    struct reader *readers[12];
    for (int i = 0; i < 12; i++)
        readers[i] = submit(s, &request); /* more than there are slots */
    assert_true(sched_drain(s, 60));
    for (int i = 0; i < 12; i++) {
        assert_true(read_some(readers[i])); /* all of it is there */
        assert_int_equal(readers[i]->answers[0].n_tokens, 200);
        reader_free(readers[i]);
    }
    struct ticket *t = NULL;
    double retry = 0;
    assert_int_equal(sched_submit(s, &request, NULL, NULL, &t, &retry, NULL, 0), ERR_BUSY);
    assert_true(retry == -1);
    sched_free(s);
}

static void test_drain_gives_up_after_its_time_and_free_cancels_the_rest(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = endless();
    struct reader *r = submit(s, &request);
    double started = seconds();
    assert_false(sched_drain(s, 0.02)); /* short: what it wrote by then has to fit an answer */
    assert_true(seconds() - started >= 0.02);
    sched_free(s);
    read_some(r); /* a ticket outlives the scheduler */
    assert_true(ticket_done(r->ticket));
    assert_int_equal(r->answers[0].finish, FINISH_CANCELLED);
    reader_free(r);
}

/* The scheduler is told of more rows a step than the model takes, so that the model refuses the
 * step. */
static void test_a_failed_step_ends_its_requests_with_a_sentence(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    options.max_rows = 4096;
    options.prefill_chunk = 4000;
    struct sched *s = start(&options);
    int32_t prompt[MAX_ROWS + 1];
    for (int i = 0; i <= MAX_ROWS; i++)
        prompt[i] = story[1];
    struct sched_request request = request_for(1, 5);
    request.prompt = prompt;
    request.n_prompt = MAX_ROWS + 1;
    struct reader *r = answered(s, &request);
    assert_int_equal(r->answers[0].finish, FINISH_ERROR);
    assert_string_equal(r->answers[0].error, "the model's step failed");
    reader_free(r);
    struct sched_stats stats;
    wait_for_stat(s, slots_used, 0);
    sched_stats(s, &stats);
    assert_true(stats.healthy); /* only a lost device is for good */
    request = request_for(n_story, 5);
    r = answered(s, &request);
    assert_int_equal(r->answers[0].n_tokens, 5);
    reader_free(r);
    sched_free(s);
}

static void test_steps_that_cannot_hold_all_slots_are_refused(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    struct sched *s = NULL;
    char msg[300];
    options.max_logits = N_SLOTS;
    assert_int_equal(sched_new(&s, &options, msg, sizeof msg), ERR_ARG);
    options.max_logits = MAX_LOGITS;
    options.max_rows = N_SLOTS;
    assert_int_equal(sched_new(&s, &options, msg, sizeof msg), ERR_ARG);
    assert_null(s);
}

static double cpu_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* Neither with nothing to do nor with a reader that does not read: 0.3 s asleep cost less than a
 * tenth of that. */
static void test_an_idle_scheduler_uses_no_cpu(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    options.output_limit = 1024;
    struct sched *s = start(&options);
    struct sched_request request = endless();
    for (int paused = 0; paused < 2; paused++) {
        struct reader *r = paused ? submit(s, &request) : NULL;
        if (paused) wait_for_stat(s, slots_paused, 1);
        double before = cpu_seconds();
        nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
        assert_true(cpu_seconds() - before < 0.03);
        if (r) reader_free(r);
    }
    sched_free(s);
}

static void test_numbers_add_up(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = request_for(n_story, 30);
    request.ignore_eos = true;
    for (int i = 0; i < 3; i++)
        reader_free(answered(s, &request));
    assert_true(sched_drain(s, 10));
    wait_for_stat(s, running, 0);
    struct sched_stats st;
    sched_stats(s, &st);
    assert_int_equal(st.slots, N_SLOTS);
    assert_int_equal(st.prompt_tokens, 3 * n_story);
    assert_int_equal(st.generation_tokens, 90);
    assert_int_equal(st.finished[FINISH_LENGTH], 3);
    const struct {
        const struct histogram *h;
        uint64_t count;
        double sum;
    } expected[] = {{&st.time_to_first_token, 3, -1},
                    {&st.inter_token, 3 * 29, -1},
                    {&st.e2e, 3, -1},
                    {&st.queue_time, 3, -1},
                    {&st.prefill_time, 3, -1},
                    {&st.decode_time, 3, -1},
                    {&st.prompt_len, 3, 3.0 * (double)n_story},
                    {&st.generation_len, 3, 90},
                    {&st.step_tokens, st.steps, 3.0 * (double)n_story + 3 * 29}};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        uint64_t n = 0;
        for (int b = 0; b <= SCHED_BUCKETS; b++)
            n += expected[i].h->count[b];
        assert_int_equal(n, expected[i].count);
        if (expected[i].sum >= 0) assert_true(expected[i].h->sum == expected[i].sum);
    }
    assert_true(st.tokens_per_s > 0);
    for (int b = 1; b < SCHED_BUCKETS; b++) {
        assert_true(sched_seconds_bounds[b] > sched_seconds_bounds[b - 1]);
        assert_true(sched_tokens_bounds[b] > sched_tokens_bounds[b - 1]);
    }
    sched_free(s);
}

/* ---- many at once ---- */

enum { N_CLIENTS = 8, N_EACH = 25 };
static struct sched *shared;

static uint32_t next_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

static void *client(void *arg) {
    uint64_t random = (uint64_t)(uintptr_t)arg;
    for (int i = 0; i < N_EACH; i++) {
        struct sched_request request =
            request_for(1 + next_random(&random) % n_story, next_random(&random) % 60);
        static const char *const stops[] = {" the", "a"};
        static const size_t lens[] = {4, 1};
        request.sampling.seed = next_random(&random);
        request.sampling.top_k = (int)(next_random(&random) % 3) * 20;
        request.sampling.presence_penalty = (float)(next_random(&random) % 2);
        request.best_of = 1 + (int)(next_random(&random) % 4);
        request.n = 1 + (int)(next_random(&random) % (uint32_t)request.best_of);
        request.n_logprobs = (int)(next_random(&random) % 4) - 1;
        request.prompt_logprobs = next_random(&random) % 4 == 0;
        request.stop = stops;
        request.stop_len = lens;
        request.n_stop = (int)(next_random(&random) % 3);
        struct reader *r = submit(shared, &request);
        uint32_t fate = next_random(&random) % 4;
        if (fate == 0) { /* leaves at once or after a few events */
            for (uint32_t naps = next_random(&random) % 4; naps; naps--)
                nap();
            read_some(r);
        } else {
            read_all(r);
            for (int c = 0; c < request.n; c++)
                assert_true(r->answers[c].finish == FINISH_STOP ||
                            r->answers[c].finish == FINISH_LENGTH);
        }
        reader_free(r);
    }
    return NULL;
}

static void test_many_clients_that_come_and_go_leave_nothing_behind(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    options.max_queue = N_CLIENTS * N_EACH; /* who leaves keeps a place until the next step */
    options.output_limit = 2000;
    shared = start(&options);
    pthread_t threads[N_CLIENTS];
    for (uintptr_t i = 0; i < N_CLIENTS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, client, (void *)(i + 1)), 0);
    for (int i = 0; i < N_CLIENTS; i++)
        pthread_join(threads[i], NULL);
    assert_true(sched_drain(shared, 30));
    wait_for_stat(shared, slots_used, 0);
    struct sched_stats stats;
    sched_stats(shared, &stats);
    assert_int_equal(stats.running, 0);
    assert_int_equal(stats.waiting, 0);
    uint64_t n = 0;
    for (int i = 0; i < 5; i++)
        n += stats.finished[i];
    assert_int_equal(n, N_CLIENTS * N_EACH);
    assert_int_equal(stats.finished[FINISH_ERROR], 0);
    sched_free(shared);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stop_strings_fire_alike_at_every_split),
        cmocka_unit_test(test_unarmed_stop_strings_pass_and_half_of_one_may_still_fire),
        cmocka_unit_test(test_halves_of_characters_wait),
        cmocka_unit_test(test_same_request_same_tokens_whatever_runs_beside_it),
        cmocka_unit_test(test_logprobs_are_those_of_the_model),
        cmocka_unit_test(test_choices_differ_and_repeat),
        cmocka_unit_test(test_best_of_delivers_the_likeliest),
        cmocka_unit_test(test_every_stop_string_of_a_text_ends_it_there),
        cmocka_unit_test(test_end_of_text_min_tokens_and_ignore_eos),
        cmocka_unit_test(test_a_length_limit_cuts_generation_and_refuses_prompts),
        cmocka_unit_test(test_bad_requests_get_a_sentence),
        cmocka_unit_test(test_leaving_frees_the_slot_within_a_step),
        cmocka_unit_test(test_a_full_queue_says_when_to_come_back),
        cmocka_unit_test(test_no_queue_still_takes_what_can_start_at_once),
        cmocka_unit_test(test_a_burst_finds_every_slot_and_every_place_of_the_queue),
        cmocka_unit_test(test_a_request_for_many_slots_is_not_overtaken),
        cmocka_unit_test(test_reading_a_long_prompt_delays_nobody_by_more_than_a_step),
        cmocka_unit_test(test_a_slow_reader_pauses_alone_and_misses_nothing),
        cmocka_unit_test(test_drain_finishes_what_runs_and_takes_nothing_new),
        cmocka_unit_test(test_drain_gives_up_after_its_time_and_free_cancels_the_rest),
        cmocka_unit_test(test_a_failed_step_ends_its_requests_with_a_sentence),
        cmocka_unit_test(test_steps_that_cannot_hold_all_slots_are_refused),
        cmocka_unit_test(test_an_idle_scheduler_uses_no_cpu),
        cmocka_unit_test(test_numbers_add_up),
        cmocka_unit_test(test_many_clients_that_come_and_go_leave_nothing_behind),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
