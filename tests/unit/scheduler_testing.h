/* scheduler_testing.h - a scheduler over a small real model, and readers of what it answers. */
#ifndef URCHIN_TESTS_SCHEDULER_TESTING_H
#define URCHIN_TESTS_SCHEDULER_TESTING_H

#include "scheduler/scheduler.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

enum { N_SLOTS = 8, MAX_ROWS = N_SLOTS + 64, MAX_LOGITS = N_SLOTS + 5 };

static struct team *team;
static struct model *model;
static const struct model_info *info;
static int32_t *story; /* "Once upon a time, ..." */
static size_t n_story;

static inline struct model *open_model(int n_slots, int64_t max_seq_len) {
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

static inline int open_all(void **state) {
    (void)state;
    static const char text[] =
        "Once upon a time, there was a little girl named Lily. She had a big";
    if (team_new(&team, 1)) return -1;
    model = open_model(N_SLOTS, 0);
    info = model_info(model);
    return tokenize(model_tokenizer(model), text, strlen(text), TOKENIZE_ADD_BOS_EOS, &story,
                    &n_story);
}

static inline int close_all(void **state) {
    (void)state;
    free(story);
    model_close(model);
    team_free(team);
    return 0;
}

static inline struct sched_options options_for(struct model *m) {
    return (struct sched_options){.model = m,
                                  .max_rows = MAX_ROWS,
                                  .max_logits = MAX_LOGITS,
                                  .max_queue = 64,
                                  .prefill_chunk = 16,
                                  .output_limit = 1 << 20};
}
static inline struct sched *start(const struct sched_options *options) {
    struct sched *s = NULL;
    char msg[300] = "";
    if (sched_new(&s, options, msg, sizeof msg)) fail_msg("%s", msg);
    return s;
}
static inline struct sched *start_default(void) {
    struct sched_options options = options_for(model);
    return start(&options);
}

static inline double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static inline void nap(void) {
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

static inline void on_news(void *arg) {
    struct reader *r = arg;
    pthread_mutex_lock(&r->mu);
    r->n_news++;
    pthread_cond_signal(&r->news);
    pthread_mutex_unlock(&r->mu);
}

static inline struct reader *submit(struct sched *s, const struct sched_request *request) {
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

static inline void take(struct answer *a, const struct sched_event *e) {
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
static inline bool read_some(struct reader *r) {
    struct sched_event e;
    while (ticket_next(r->ticket, &e)) {
        assert_in_range(e.choice, 0, r->n_choices - 1);
        take(e.is_prompt ? &r->prompt : &r->answers[e.choice], &e);
    }
    return ticket_done(r->ticket);
}

static inline void read_all(struct reader *r) {
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

static inline void reader_free(struct reader *r) {
    ticket_free(r->ticket);
    pthread_mutex_destroy(&r->mu);
    pthread_cond_destroy(&r->news);
    free(r->answers);
    free(r);
}

static inline struct reader *answered(struct sched *s, const struct sched_request *request) {
    struct reader *r = submit(s, request);
    read_all(r);
    return r;
}

static inline struct sched_request request_for(size_t n_prompt, int64_t max_tokens) {
    struct sched_request r;
    sched_request_init(&r);
    r.prompt = story;
    r.n_prompt = n_prompt;
    r.max_tokens = max_tokens;
    r.sampling.seed = 5;
    return r;
}

static inline void assert_same_answer(const struct answer *a, const struct answer *b) {
    assert_string_equal(a->text, b->text);
    assert_int_equal(a->n_tokens, b->n_tokens);
    for (int i = 0; i < a->n_tokens; i++) {
        assert_int_equal(a->tokens[i].token, b->tokens[i].token);
        assert_memory_equal(&a->tokens[i].logprob, &b->tokens[i].logprob,
                            sizeof(float)); /* to the bit */
    }
    assert_int_equal(a->finish, b->finish);
}

static inline struct sched_request endless(void) {
    struct sched_request r = request_for(8, -1);
    r.ignore_eos = true;
    return r;
}

#endif
