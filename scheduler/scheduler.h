/* scheduler.h - continuous batching over a fixed number of constant-size slots.
 *
 * Any thread submits; one scheduler thread owns the model, its slots and the batch.  A submitted request waits in a bounded
 * FIFO queue (full: ERR_BUSY and the seconds after which, at the measured drain rate, a place will be free), gets its slots
 * (best_of of them at once), has its prompt read in chunks of at most prefill_chunk rows a step beside the decode rows of the others,
 * and generates until it is finished or cancelled.  Nothing that runs is ever evicted.  Fairness: admission is strictly FIFO, so a
 * request that needs many slots holds back those behind it until it has them; prompts being read share the chunk in order of admission.
 *
 * Output goes through the ticket: the scheduler appends events under the ticket's lock and calls notify; the owner
 * takes them with ticket_next.  A ticket whose unread events pass output_limit bytes pauses its sequences (they keep their
 * slots, others go on) until the owner has read. */
#ifndef URCHIN_SCHEDULER_SCHEDULER_H
#define URCHIN_SCHEDULER_SCHEDULER_H

#include "model/model.h"
#include "scheduler/sampler.h"

enum finish_reason { FINISH_NONE, FINISH_STOP, FINISH_LENGTH, FINISH_CANCELLED, FINISH_ERROR };

struct sched_request { /* everything is copied by sched_submit */
    const int32_t *prompt; /* [n_prompt], n_prompt >= 1, ids valid */
    size_t n_prompt;
    struct sampling sampling;
    int64_t max_tokens;     /* >= 0; 0 only with prompt_logprobs or echo: reads the prompt, generates nothing; -1: no limit */
    int64_t min_tokens;     /* no end of text and no stop before so many */
    bool ignore_eos;
    const char *const *stop; /* [n_stop] strings, not empty */
    const size_t *stop_len;
    int n_stop;
    const int32_t *stop_tokens; /* [n_stop_tokens] */
    int n_stop_tokens;
    bool include_stop; /* leave the stop string in the text */
    int n, best_of;    /* best_of >= n >= 1; best_of > n returns the n of highest mean logprob, no streaming order */
    int n_logprobs;        /* -1: none; 0: the sampled token's; k: and the k best */
    bool prompt_logprobs;  /* also of every prompt token (first: none) with n_logprobs best */
    bool special_tokens;   /* show special tokens' text (skip_special_tokens false) */
};
void sched_request_init(struct sched_request *r); /* max_tokens 16, n = best_of = 1, n_logprobs -1, sampling_init */

struct sched_token {
    int32_t token;
    float logprob;        /* NaN: not asked for, or the first prompt token */
    int n_top;
    const struct token_logprob *top; /* [n_top] */
};

/* One step of one choice's output.  Text is whole UTF-8 (invalid bytes became U+FFFD), with what might be the beginning of a stop string held
 * back; tokens are those whose text is complete with this event, so concatenating all events gives everything once: every generated
 * token is in one event, those of a stop string and the one that ended the text too (in the last). */
struct sched_event {
    int choice;            /* 0 .. n - 1 */
    bool is_prompt;        /* tokens are the prompt's, with logprobs (prompt_logprobs), text empty; come once, before all else, as choice 0 */
    const char *text;      /* NUL-terminated */
    size_t text_len;
    const struct sched_token *tokens;
    int n_tokens;
    enum finish_reason finish; /* FINISH_NONE until the choice's last event */
    const char *stop_string;   /* the stop string that fired, or NULL */
    int32_t stop_token;        /* the end-of-text or stop token that ended the choice, or -1.  Its text is shown with include_stop only */
    const char *error;         /* FINISH_ERROR: one sentence */
};

struct sched_usage { int64_t prompt_tokens, completion_tokens, cached_tokens; };

struct ticket;
/* The next unread event, valid until the next call on this ticket; false: none now.  ticket_done: all choices have
 * delivered their last event and it has been taken. Any thread, one at a time. */
bool ticket_next(struct ticket *t, struct sched_event *event);
bool ticket_done(struct ticket *t);
struct sched_usage ticket_usage(struct ticket *t); /* so far; final when done */
void ticket_free(struct ticket *t); /* cancels what still runs; slots are free within a step; notify is not called after return */

struct sched_options {
    struct model *model;     /* borrowed; the scheduler thread's from sched_new to sched_free */
    int max_rows, max_logits; /* what the model was opened with; at least slots + 1 each, more lets prompts read as fast as prefill_chunk
                                 allows (rows: slots + prefill_chunk) and prompt_logprobs with them (logits) */
    int max_queue;           /* requests that may wait: those that could not start at once */
    int prefill_chunk;       /* prompt rows a step */
    size_t output_limit;     /* unread bytes a ticket */
    int64_t default_max;     /* cap of max_tokens -1; 0: none */
};
struct sched;
/* ERR_ARG: max_rows or max_logits too small for the model's slots. */
enum err sched_new(struct sched **out, const struct sched_options *options, char *msg, size_t msg_len);
/* Waits for the thread; requests still there end with FINISH_CANCELLED. */
void sched_free(struct sched *s);

/* ERR_ARG (with a sentence: best_of beyond the slots, a prompt that fills max_seq_len, ...; a max_tokens beyond it is cut),
 * ERR_NOMEM, ERR_DEVICE when unhealthy, or ERR_BUSY with *retry_after_s (0.05 to 120 s, later for each who is turned away before a
 * place is free; -1 when draining).  notify(arg) is called from the scheduler thread whenever events appear; it must not block and must not
 * call into the scheduler or ticket. */
enum err sched_submit(struct sched *s, const struct sched_request *request, void (*notify)(void *arg),
                      void *arg, struct ticket **out, double *retry_after_s, char *msg, size_t msg_len);

/* Stop taking requests (sched_submit then gives ERR_BUSY, retry_after_s -1) and wait until all are finished or timeout_s is over; true: all finished. */
bool sched_drain(struct sched *s, double timeout_s);

/* ---- numbers for /metrics, /health and logs; any thread ---- */
enum { SCHED_BUCKETS = 20 };
struct histogram { uint64_t count[SCHED_BUCKETS + 1]; double sum; }; /* last: +Inf; not cumulative */
extern const double sched_seconds_bounds[SCHED_BUCKETS]; /* 0.0005 .. 2560 s */
extern const double sched_tokens_bounds[SCHED_BUCKETS];  /* 1, 2, 4, ... */
struct sched_stats {
    int running, waiting, slots, slots_used, slots_paused, queue_limit;
    uint64_t prompt_tokens, generation_tokens, cached_tokens, steps, rejected;
    uint64_t finished[5]; /* requests, by the finish_reason of the choice that ended last */
    struct histogram time_to_first_token, inter_token, e2e, queue_time, prefill_time, decode_time, prompt_len, generation_len, step_tokens;
    double tokens_per_s; /* generated, smoothed over about 10 s */
    bool healthy;        /* false: a step failed for good (ERR_DEVICE) */
};
void sched_stats(struct sched *s, struct sched_stats *out);

#endif
