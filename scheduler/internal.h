/* internal.h - the scheduler, as its own files see it.
 *
 * scheduler.c is what other threads call, loop.c the thread, draw.c who draws, generate.c what a
 * drawn token becomes.  A request is in one of two lists: waiting (under the lock) or running (the thread's
 * own).  All that a running request needs is in struct request, which no other thread touches; what
 * others see passes through its ticket. */
#ifndef URCHIN_SCHEDULER_INTERNAL_H
#define URCHIN_SCHEDULER_INTERNAL_H

#include "scheduler/request.h"
#include "scheduler/stats.h"

struct run_owner { /* who gets the logits of a run */
    struct request *request;
    struct choice *choice; /* NULL: the prompt is being read */
};

struct sched {
    struct sched_options options; /* fixed */
    const struct model_info *info;
    const struct tokenizer *tokenizer;
    pthread_t thread;

    /* scheduler thread only */
    struct request *running, **running_end; /* in order of admission */
    int n_running, n_paused_slots;
    int *free_slots, n_free;
    struct model_run *runs;   /* [n_slots] */
    struct run_owner *owners; /* [n_slots] */
    struct sampler *sampler;
    struct gpu_draw *draws; /* [n_slots]; NULL: the model does not draw */
    struct gpu_edit *edits; /* [n_slots * GPU_SAMPLER_EDITS] */
    struct sched_stats own;    /* what publish() copies */
    int n_ended, n_new_tokens; /* requests and tokens since publish() */
    bool busy;                 /* the last step had rows, so the next may */
    bool warned_of_length;

    /* mu guards all below; it is not held during a step, nor while a ticket's lock is taken. */
    pthread_mutex_t mu;
    pthread_cond_t wake; /* poked became true */
    pthread_cond_t idle; /* n_active became 0 */
    bool poked, stopping, draining;
    struct request *waiting, **waiting_end;
    int n_waiting, n_at_once; /* of those waiting: whose slots are free already */
    int n_slots_wanted;       /* by those waiting */
    int n_slots_free;
    int n_active;      /* requests waiting or running */
    int n_turned_away; /* and not yet made up for by admissions; 0 once the queue was empty */
    uint64_t n_rejected;
    struct rate endings;   /* requests ended per second of work */
    struct rate generated; /* tokens per second */
    struct sched_stats stats;
    double stats_at; /* when they were published */
};

struct sched_plan { /* of a step of a model that draws */
    struct model_draws draws;
    bool wants_logits; /* someone needs them here */
};

struct sched_rows {                /* what a step gave, from the run being handed out on */
    const float *logits;           /* [n_logits of the run][vocab]; NULL: on the device only */
    const struct gpu_drawn *drawn; /* the next draw; NULL: the model does not draw */
};

extern const char sched_device_lost[]; /* the sentence that goes with ERR_DEVICE */

/* ---- loop.c ---- */
void *sched_run(void *sched); /* the thread */

/* ---- draw.c; scheduler thread ---- */
enum err sched_draws_new(struct sched *s); /* ERR_NOMEM; nothing where the model does not draw */
void sched_draws_free(struct sched *s);
struct sched_plan sched_plan_draws(struct sched *s, int n_runs);
/* The next token of a choice, from the row at from->logits or the draw at from->drawn, which goes on by one.  Its logprob, and
 * the best ones in r->tops, where the request scores. */
int32_t sched_draw(struct sched *s, struct request *r, struct choice *c, struct sched_rows *from,
                   float *logprob);

/* ---- generate.c; scheduler thread ---- */

/* Logits of the n_rows prompt rows just read (their logprobs, where asked for), before r->n_read
 * counts them. */
void sched_score_prompt(struct sched *s, struct request *r, const float *logits, int n_rows);
/* The last prompt row has been read: every choice goes on from it. */
void sched_begin_generation(struct sched *s, struct request *r, struct sched_rows *from);
/* Draws the next token of a choice and does all that follows from it. */
void sched_generate(struct sched *s, struct request *r, struct choice *c, struct sched_rows *from);
/* Ends what is not finished yet; slots are free and last events delivered on return. */
void sched_finish_choices(struct sched *s, struct request *r, enum finish_reason why,
                          const char *error);
/* best_of > n: the n of highest mean logprob, in that order, become choices 0 .. n - 1. */
void sched_deliver_best(struct request *r);

#endif
