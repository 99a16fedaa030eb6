/* request.h - a request as the scheduler thread works on it: its own copy of what was asked, and
 * one choice per sequence.
 *
 * Built by the thread that submits, then owned by the scheduler thread; memory that generation
 * needs and whose size is known is taken here, so that running out is an answer to the submitter.
 * Private to the scheduler. */
#ifndef URCHIN_SCHEDULER_REQUEST_H
#define URCHIN_SCHEDULER_REQUEST_H

#include "scheduler/text.h"
#include "scheduler/ticket.h"

struct held_token { /* generated, its text not shown yet */
    int32_t token;
    float logprob;
    int64_t end; /* bytes of the choice's text up to and with this token */
    int n_top;   /* its places in choice.tops */
};

struct choice {
    int slot; /* -1: none (waiting, or finished) */
    bool finished;
    int32_t next; /* sampled, to be read by the next step */
    int64_t n_generated;
    double sum_logprob;
    double last_token_at; /* seconds, for inter_token */
    struct text text;
    struct token_counts *counts; /* NULL without penalties */
    struct held_token *held;     /* owned [n_held of room_held] */
    int n_held, room_held;
    struct token_logprob *tops; /* owned [n_tops of room_held * n_top] */
    int n_tops;
    struct event_node *kept, *kept_tail; /* owned; best_of > n: events until the best are known */
    struct event_node *emergency; /* owned; the last event when there is no memory for another */
};

struct request {
    struct request *next;       /* in the queue or among the running */
    struct ticket *ticket;      /* a hold on it until ticket_release */
    struct sched_request asked; /* its arrays are owned copies */
    int64_t max_tokens;         /* asked.max_tokens within every limit; -1: none */
    const char *text_block;     /* owned; the stop strings */
    struct stop_string *stops;  /* owned [asked.n_stop] */
    int32_t *ends; /* owned [n_ends]: tokens that end the text, stop tokens among them */
    int n_ends;
    struct choice *choices; /* owned [asked.best_of] */
    int n_unfinished;
    enum finish_reason finish; /* of the choice that finished last */
    bool at_once;  /* it found its slots free: while it waits it takes no place in the queue */
    size_t n_read; /* prompt tokens read */
    struct sched_token *prompt_tokens; /* owned [n_prompt] or NULL: prompt_logprobs */
    struct token_logprob *prompt_tops; /* owned [n_prompt * n_logprobs] */
    struct token_logprob *tops;        /* owned [n_logprobs]: scratch for one token */
    double submitted_at, admitted_at, first_token_at; /* seconds, monotonic; 0: not yet */
};

/* ERR_ARG with a sentence, ERR_NOMEM.  ticket is left NULL. */
enum err request_new(struct request **out, const struct sched_request *asked,
                     const struct model_info *info, int64_t default_max, char *msg, size_t msg_len);
void request_free(struct request *r); /* not its ticket */

bool request_is_end(const struct request *r, int32_t token);
/* Logprobs of every token are needed: asked for, or to choose the best. */
static inline bool request_scores(const struct request *r) {
    return r->asked.n_logprobs >= 0 || r->asked.best_of > r->asked.n;
}

#endif
