/* scheduler.c - the scheduler thread: admit, build a batch, step, hand out tokens, again.
 *
 * A request is in one of two lists: waiting (under the lock) or running (the thread's own).  All that a running request needs is
 * in struct request, which no other thread touches; what others see passes through its ticket.  When a step would have no
 * rows the thread sleeps until someone pokes it: a submission, a cancellation, a reader that caught up, the end. */
#include "scheduler/scheduler.h"

#include "config/log.h"
#include "scheduler/request.h"
#include "scheduler/stats.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

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
    struct sched_stats own;   /* what publish() copies */
    int n_ended, n_new_tokens; /* requests and tokens since publish() */
    bool busy;                /* the last step had rows, so the next may */
    bool warned_of_length;

    pthread_mutex_t mu;       /* guards all below; never held during a step or while a ticket's lock is taken */
    pthread_cond_t wake;      /* poked became true */
    pthread_cond_t idle;      /* n_active became 0 */
    bool poked, stopping, draining;
    struct request *waiting, **waiting_end;
    int n_waiting, n_slots_wanted; /* by those waiting */
    int n_slots_free;
    int n_active;             /* requests waiting or running */
    int n_turned_away;        /* and not yet made up for by admissions; 0 once the queue was empty */
    uint64_t n_rejected;
    struct rate endings;      /* requests ended per second of work */
    struct rate generated;    /* tokens per second */
    struct sched_stats stats;
    double stats_at;          /* when they were published */
};

static void poke_locked(struct sched *s) {
    s->poked = true;
    pthread_cond_signal(&s->wake);
}

static void poke(struct sched *s) {
    pthread_mutex_lock(&s->mu);
    poke_locked(s);
    pthread_mutex_unlock(&s->mu);
}

static const char device_lost[] = "the device was lost; the server must be restarted";

/* ---- output ---- */

static void finish_choice(struct sched *s, struct request *r, struct choice *c,
                          const struct sched_event *last);

static void deliver(struct request *r, struct choice *c, struct event_node *node) {
    if (r->asked.best_of == r->asked.n) {
        ticket_push(r->ticket, node);
        return;
    }
    if (c->kept)
        c->kept_tail->next = node;
    else
        c->kept = node;
    c->kept_tail = node;
}

/* Moves what may be shown (all, when *event is the choice's last) from the choice to an event.  ERR_NOMEM. */
static enum err emit(struct request *r, struct choice *c, struct sched_event *event) {
    bool last = event->finish != FINISH_NONE;
    size_t n_bytes = last ? c->text.len : text_ready(&c->text, r->asked.n_stop);
    int n_tokens = 0, n_tops = 0;
    while (n_tokens < c->n_held &&
           (last || c->held[n_tokens].end <= c->text.shown + (int64_t)n_bytes))
        n_tops += c->held[n_tokens++].n_top;
    if (!last && !n_bytes && !n_tokens) return OK;

    struct event_node *node = NULL;
    char *text = NULL;
    struct sched_token *tokens = malloc((size_t)n_tokens * sizeof *tokens + 1);
    if (tokens && utf8_repair(c->text.bytes, n_bytes, &text, &event->text_len) == OK) {
        const struct token_logprob *top = c->tops;
        for (int i = 0; i < n_tokens; i++) {
            const struct held_token *h = &c->held[i];
            tokens[i] = (struct sched_token){h->token, h->logprob, h->n_top, top};
            top += h->n_top;
        }
        event->choice = (int)(c - r->choices);
        event->text = text;
        event->tokens = tokens;
        event->n_tokens = n_tokens;
        node = event_node_new(event);
    }
    free(tokens);
    free(text);
    if (!node) return ERR_NOMEM;
    text_take(&c->text, n_bytes);
    c->n_held -= n_tokens;
    c->n_tops -= n_tops;
    memmove(c->held, c->held + n_tokens, (size_t)c->n_held * sizeof *c->held);
    memmove(c->tops, c->tops + n_tops, (size_t)c->n_tops * sizeof *c->tops);
    deliver(r, c, node);
    return OK;
}

static void out_of_memory(struct sched *s, struct request *r, struct choice *c) {
    finish_choice(s, r, c, &(struct sched_event){.finish = FINISH_ERROR,
                                                 .stop_token = -1,
                                                 .error = "out of memory"});
}

/* Delivers the last event and gives the slot back; *last says why it ends. */
static void finish_choice(struct sched *s, struct request *r, struct choice *c,
                          const struct sched_event *last) {
    struct sched_event event = *last;
    if (emit(r, c, &event)) { /* the text is lost with the memory; the reader must not wait for ever */
        struct event_node *node = c->emergency;
        c->emergency = NULL;
        node->event.choice = (int)(c - r->choices);
        node->event.finish = FINISH_ERROR;
        node->event.error = "out of memory";
        deliver(r, c, node);
    }
    c->finished = true;
    if (c->slot >= 0) s->free_slots[s->n_free++] = c->slot;
    c->slot = -1;
    r->n_unfinished--;
    r->finish = event.finish;
}

/* best_of > n: the n of highest mean logprob, in that order, become choices 0 .. n - 1. */
static void deliver_best(struct request *r) {
    for (int rank = 0; rank < r->asked.n; rank++) {
        struct choice *best = NULL;
        double best_mean = 0;
        for (int i = 0; i < r->asked.best_of; i++) {
            struct choice *c = &r->choices[i];
            double mean = c->n_generated ? c->sum_logprob / (double)c->n_generated : -INFINITY;
            if (!c->kept || (best && !(mean > best_mean))) continue;
            best = c;
            best_mean = mean;
        }
        while (best->kept) {
            struct event_node *node = best->kept;
            best->kept = node->next;
            node->event.choice = rank;
            ticket_push(r->ticket, node);
        }
    }
}

/* All choices are finished, r is in no list: it ends here. */
static void end_request(struct sched *s, struct request *r) {
    if (r->asked.best_of > r->asked.n) deliver_best(r);
    double now = seconds_now();
    int64_t n_generated = 0;
    for (int i = 0; i < r->asked.best_of; i++) n_generated += r->choices[i].n_generated;
    histogram_add(&s->own.e2e, sched_seconds_bounds, now - r->submitted_at);
    histogram_add(&s->own.prompt_len, sched_tokens_bounds, (double)r->asked.n_prompt);
    histogram_add(&s->own.generation_len, sched_tokens_bounds, (double)n_generated);
    if (r->first_token_at > 0)
        histogram_add(&s->own.decode_time, sched_seconds_bounds, now - r->first_token_at);
    s->own.finished[r->finish]++;
    s->n_ended += r->finish != FINISH_CANCELLED;
    ticket_release(r->ticket);
    request_free(r);
    pthread_mutex_lock(&s->mu);
    if (--s->n_active == 0) pthread_cond_broadcast(&s->idle);
    pthread_mutex_unlock(&s->mu);
}

static void finish_all_choices(struct sched *s, struct request *r, enum finish_reason why,
                               const char *error) {
    for (int i = 0; i < r->asked.best_of; i++)
        if (!r->choices[i].finished)
            finish_choice(s, r, &r->choices[i],
                          &(struct sched_event){.finish = why, .stop_token = -1, .error = error});
}

/* Ends those of the running whose choices are all finished. */
static void sweep(struct sched *s) {
    struct request **link = &s->running;
    while (*link) {
        struct request *r = *link;
        if (r->n_unfinished) {
            link = &r->next;
            continue;
        }
        *link = r->next;
        s->n_running--;
        end_request(s, r);
    }
    s->running_end = link;
}

/* ---- a token ---- */

static bool hold_token(struct request *r, struct choice *c, int32_t token, float logprob) {
    int n_top = r->asked.n_logprobs > 0 ? r->asked.n_logprobs : 0;
    if (c->n_held == c->room_held) {
        size_t room = 2 * (size_t)c->room_held;
        struct held_token *held = realloc(c->held, room * sizeof *held);
        if (!held) return false;
        c->held = held;
        struct token_logprob *tops = realloc(c->tops, room * (size_t)n_top * sizeof *tops + 1);
        if (!tops) return false;
        c->tops = tops;
        c->room_held = (int)room;
    }
    c->held[c->n_held++] = (struct held_token){token, logprob, c->text.shown + (int64_t)c->text.len, n_top};
    if (n_top) memcpy(c->tops + c->n_tops, r->tops, (size_t)n_top * sizeof *r->tops);
    c->n_tops += n_top;
    return true;
}

static void warn_of_length(struct sched *s, const struct request *r, const struct choice *c) {
    if (s->warned_of_length || s->info->attention.kind != ATTENTION_HEDGEHOG) return;
    if ((int64_t)r->asked.n_prompt + c->n_generated <= s->info->measured_to) return;
    s->warned_of_length = true;
    log_event(LOG_WARN, "past_measured_length",
              "a sequence is longer than the %lld tokens this model was measured to; it goes on, "
              "its quality is not known",
              (long long)s->info->measured_to);
}

/* Samples the next token of a choice from its logits and does all that follows from it. */
static void generate(struct sched *s, struct request *r, struct choice *c, const float *logits) {
    const struct sched_request *asked = &r->asked;
    int n_banned = c->n_generated < asked->min_tokens ? r->n_ends : 0;
    int32_t token = sample(s->sampler, logits, &asked->sampling, c->counts, r->ends, n_banned,
                           (int)(c - r->choices), c->n_generated);
    float logprob = NAN;
    if (request_scores(r)) {
        logprob = sampler_logprobs(s->sampler, logits, token, r->tops, asked->n_logprobs);
        c->sum_logprob += (double)logprob;
    }
    if (c->counts) token_counts_add_output(c->counts, token);
    c->next = token;
    c->n_generated++;
    s->n_new_tokens++;
    ticket_count_token(r->ticket);
    warn_of_length(s, r, c);

    double now = seconds_now();
    if (r->first_token_at == 0) {
        r->first_token_at = now;
        histogram_add(&s->own.time_to_first_token, sched_seconds_bounds, now - r->submitted_at);
        histogram_add(&s->own.prefill_time, sched_seconds_bounds, now - r->admitted_at);
    }
    if (c->last_token_at > 0)
        histogram_add(&s->own.inter_token, sched_seconds_bounds, now - c->last_token_at);
    c->last_token_at = now;

    bool is_end = request_is_end(r, token) && c->n_generated > asked->min_tokens;
    size_t n_bytes;
    const char *bytes = token_bytes(s->tokenizer, token, asked->special_tokens, &n_bytes);
    if (is_end && !asked->include_stop) n_bytes = 0;
    int fired;
    if (text_append(&c->text, r->stops, asked->n_stop, bytes, n_bytes,
                    c->n_generated > asked->min_tokens, asked->include_stop, &fired) ||
        !hold_token(r, c, token, logprob)) {
        out_of_memory(s, r, c);
        return;
    }
    struct sched_event event = {.stop_token = is_end ? token : -1,
                                .stop_string = fired >= 0 ? r->stops[fired].text : NULL};
    if (is_end || fired >= 0)
        event.finish = FINISH_STOP;
    else if (r->max_tokens >= 0 && c->n_generated >= r->max_tokens)
        event.finish = FINISH_LENGTH;
    if (event.finish)
        finish_choice(s, r, c, &event);
    else if (emit(r, c, &event))
        out_of_memory(s, r, c);
}

/* ---- a prompt ---- */

/* Logprobs of the prompt tokens that follow the n_rows just read, as far as there are any. */
static void score_prompt(struct sched *s, struct request *r, const float *logits, int n_rows) {
    int n_top = r->asked.n_logprobs > 0 ? r->asked.n_logprobs : 0;
    for (int i = 0; i < n_rows; i++) {
        size_t at = r->n_read + (size_t)i + 1;
        if (at == r->asked.n_prompt) return;
        struct token_logprob *top = r->prompt_tops + at * (size_t)n_top;
        int32_t token = r->asked.prompt[at];
        float logprob = sampler_logprobs(s->sampler, logits + (size_t)i * (size_t)s->info->vocab_size,
                                         token, top, n_top);
        r->prompt_tokens[at] = (struct sched_token){token, logprob, n_top, top};
    }
}

/* The last prompt row has been read: every choice goes on from here. */
static void begin_generation(struct sched *s, struct request *r, const float *logits) {
    if (r->prompt_tokens) {
        struct event_node *node =
            event_node_new(&(struct sched_event){.is_prompt = true,
                                                 .stop_token = -1,
                                                 .tokens = r->prompt_tokens,
                                                 .n_tokens = (int)r->asked.n_prompt});
        if (!node) {
            finish_all_choices(s, r, FINISH_ERROR, "out of memory");
            return;
        }
        ticket_push(r->ticket, node);
    }
    if (r->max_tokens == 0) {
        finish_all_choices(s, r, FINISH_LENGTH, NULL);
        return;
    }
    for (int i = 1; i < r->asked.best_of; i++)
        model_slot_copy(s->options.model, r->choices[i].slot, r->choices[0].slot);
    for (int i = 0; i < r->asked.best_of; i++) generate(s, r, &r->choices[i], logits);
}

/* ---- a step ---- */

/* One row for every choice that generates, then prompts in order of admission until a bound is met.  Returns the number of runs. */
static int build_batch(struct sched *s) {
    int n_runs = 0, n_paused = 0;
    for (struct request *r = s->running; r; r = r->next) {
        if (r->n_read < r->asked.n_prompt) continue;
        bool paused = ticket_paused(r->ticket);
        for (int i = 0; i < r->asked.best_of; i++) {
            struct choice *c = &r->choices[i];
            if (c->finished) continue;
            n_paused += paused;
            if (paused) continue;
            s->runs[n_runs] = (struct model_run){c->slot, 1, &c->next, 1};
            s->owners[n_runs++] = (struct run_owner){r, c};
        }
    }
    s->n_paused_slots = n_paused;
    /* Each run may ask for one row of logits, as there are at most as many runs as slots; prompt_logprobs share the rest. */
    int spare_logits = s->options.max_logits - s->info->n_slots;
    int rows = s->options.max_rows - n_runs;
    if (rows > s->options.prefill_chunk) rows = s->options.prefill_chunk;
    for (struct request *r = s->running; r && rows > 0; r = r->next) {
        size_t left = r->asked.n_prompt - r->n_read;
        if (!left) continue;
        int n = left < (size_t)rows ? (int)left : rows;
        int n_logits = (size_t)n == left;
        if (r->prompt_tokens) {
            if (n > spare_logits + 1) n = spare_logits + 1;
            spare_logits -= n - 1;
            n_logits = n;
        }
        int slot = r->choices[0].slot;
        if (!r->n_read) model_slot_clear(s->options.model, slot);
        s->runs[n_runs] = (struct model_run){slot, n, r->asked.prompt + r->n_read, n_logits};
        s->owners[n_runs++] = (struct run_owner){r, NULL};
        rows -= n;
    }
    return n_runs;
}

static void hand_out(struct sched *s, int n_runs, const float *logits) {
    int n_rows = 0;
    for (int i = 0; i < n_runs; i++) {
        const struct model_run *run = &s->runs[i];
        struct request *r = s->owners[i].request;
        if (s->owners[i].choice) {
            generate(s, r, s->owners[i].choice, logits);
        } else {
            if (r->prompt_tokens) score_prompt(s, r, logits, run->n_rows);
            r->n_read += (size_t)run->n_rows;
            s->own.prompt_tokens += (uint64_t)run->n_rows;
            if (r->n_read == r->asked.n_prompt)
                begin_generation(s, r, logits + (size_t)(run->n_logits - 1) * (size_t)s->info->vocab_size);
        }
        logits += (size_t)run->n_logits * (size_t)s->info->vocab_size;
        n_rows += run->n_rows;
    }
    s->own.steps++;
    histogram_add(&s->own.step_tokens, sched_tokens_bounds, n_rows);
}

/* The step failed, and with it the states of all who took part. */
static void fail_running(struct sched *s, enum err err) {
    const char *why = err == ERR_DEVICE  ? device_lost
                      : err == ERR_NOMEM ? "out of memory in the model's step"
                                         : "the model's step failed";
    log_event(LOG_ERROR, "step_failed", "error=%s running=%d", err_name(err), s->n_running);
    for (struct request *r = s->running; r; r = r->next) finish_all_choices(s, r, FINISH_ERROR, why);
}

/* ---- the thread ---- */

/* Copies the numbers for other threads; work: seconds of the step just done, 0 when there was none. */
static void publish(struct sched *s, double work) {
    double now = seconds_now();
    s->own.generation_tokens += (uint64_t)s->n_new_tokens;
    s->own.running = s->n_running;
    s->own.slots_used = s->own.slots - s->n_free;
    s->own.slots_paused = s->n_paused_slots;
    pthread_mutex_lock(&s->mu);
    s->stats = s->own;
    s->n_slots_free = s->n_free;
    rate_add(&s->endings, s->n_ended, work);
    rate_add(&s->generated, s->n_new_tokens, now - s->stats_at);
    s->stats_at = now;
    pthread_mutex_unlock(&s->mu);
    s->n_ended = s->n_new_tokens = 0;
}

static void step(struct sched *s) {
    int n_runs = build_batch(s);
    double started = seconds_now();
    if (n_runs) {
        const float *logits;
        enum err err = model_step(s->options.model, s->runs, n_runs, &logits);
        if (err) {
            fail_running(s, err);
            if (err == ERR_DEVICE) s->own.healthy = false;
        } else {
            hand_out(s, n_runs, logits);
        }
        sweep(s);
    }
    s->busy = n_runs > 0;
    publish(s, n_runs ? seconds_now() - started : 0);
}

/* Takes from the queue those that are to end now (all, or those cancelled), as a list. */
static struct request *take_ended_locked(struct sched *s, bool all) {
    struct request *ended = NULL, **ended_end = &ended, **link = &s->waiting;
    while (*link) {
        struct request *r = *link;
        if (!all && !atomic_load(&r->ticket->cancelled)) {
            link = &r->next;
            continue;
        }
        *link = r->next;
        r->next = NULL;
        *ended_end = r;
        ended_end = &r->next;
        s->n_waiting--;
        s->n_slots_wanted -= r->asked.best_of;
    }
    s->waiting_end = link;
    return ended;
}

/* Ends, among waiting and running, those whose owners have left; all when the end has come. */
static void reap(struct sched *s, bool all) {
    bool lost = !s->own.healthy;
    pthread_mutex_lock(&s->mu);
    struct request *ended = take_ended_locked(s, all || lost);
    pthread_mutex_unlock(&s->mu);
    while (ended) {
        struct request *r = ended;
        ended = r->next;
        finish_all_choices(s, r, lost ? FINISH_ERROR : FINISH_CANCELLED, lost ? device_lost : NULL);
        end_request(s, r);
    }
    for (struct request *r = s->running; r; r = r->next)
        if (all || atomic_load(&r->ticket->cancelled))
            finish_all_choices(s, r, FINISH_CANCELLED, NULL);
    sweep(s);
}

/* First come, first served, as long as there are slots. */
static void admit(struct sched *s) {
    double now = seconds_now();
    pthread_mutex_lock(&s->mu);
    while (s->waiting && s->waiting->asked.best_of <= s->n_free) {
        struct request *r = s->waiting;
        s->waiting = r->next;
        if (!s->waiting) s->waiting_end = &s->waiting;
        s->n_waiting--;
        s->n_slots_wanted -= r->asked.best_of;
        if (s->n_turned_away) s->n_turned_away--;
        for (int i = 0; i < r->asked.best_of; i++) r->choices[i].slot = s->free_slots[--s->n_free];
        r->admitted_at = now;
        histogram_add(&s->own.queue_time, sched_seconds_bounds, now - r->submitted_at);
        r->next = NULL;
        *s->running_end = r;
        s->running_end = &r->next;
        s->n_running++;
    }
    s->n_slots_free = s->n_free;
    pthread_mutex_unlock(&s->mu);
}

/* Sleeps until there may be something to do; false when it is time to stop. */
static bool wait_for_work(struct sched *s) {
    pthread_mutex_lock(&s->mu);
    while (!s->poked && !s->busy) pthread_cond_wait(&s->wake, &s->mu);
    s->poked = false;
    bool stopping = s->stopping;
    pthread_mutex_unlock(&s->mu);
    return !stopping;
}

static void *run(void *arg) {
    struct sched *s = arg;
    while (wait_for_work(s)) {
        reap(s, false);
        admit(s);
        step(s);
    }
    reap(s, true);
    return NULL;
}

/* ---- any thread ---- */

enum err sched_new(struct sched **out, const struct sched_options *options, char *msg, size_t msg_len) {
    const struct model_info *info = model_info(options->model);
    if (options->max_rows <= info->n_slots || options->max_logits <= info->n_slots)
        return err_set(msg, msg_len, ERR_ARG,
                       "%d sequences need a model opened with more than %d rows and %d logits a step",
                       info->n_slots, options->max_rows, options->max_logits);
    struct sched *s = calloc(1, sizeof *s);
    if (!s) return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    s->options = *options;
    s->info = info;
    s->tokenizer = model_tokenizer(options->model);
    s->stats_at = seconds_now();
    s->running_end = &s->running;
    s->waiting_end = &s->waiting;
    s->endings.span = 60; /* long enough to see requests of a minute */
    s->generated.span = 10;
    s->own.slots = info->n_slots;
    s->own.queue_limit = options->max_queue;
    s->own.healthy = true;
    s->stats = s->own;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&s->mu, NULL);
    pthread_cond_init(&s->wake, NULL);
    pthread_cond_init(&s->idle, &attr);
    pthread_condattr_destroy(&attr);
    size_t n_slots = (size_t)info->n_slots;
    s->free_slots = malloc(n_slots * sizeof *s->free_slots);
    s->runs = malloc(n_slots * sizeof *s->runs);
    s->owners = malloc(n_slots * sizeof *s->owners);
    if (!s->free_slots || !s->runs || !s->owners || sampler_new(&s->sampler, info->vocab_size))
        goto fail;
    while (s->n_free < info->n_slots) { /* so that slot 0 goes first */
        s->free_slots[s->n_free] = info->n_slots - 1 - s->n_free;
        s->n_free++;
    }
    s->n_slots_free = s->n_free;
    if (pthread_create(&s->thread, NULL, run, s)) goto fail;
    *out = s;
    return OK;
fail:
    s->stopping = true; /* no thread to wait for */
    sched_free(s);
    return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
}

void sched_free(struct sched *s) {
    if (!s) return;
    if (!s->stopping) {
        pthread_mutex_lock(&s->mu);
        s->stopping = true;
        poke_locked(s);
        pthread_mutex_unlock(&s->mu);
        pthread_join(s->thread, NULL);
    }
    sampler_free(s->sampler);
    free(s->free_slots);
    free(s->runs);
    free(s->owners);
    pthread_cond_destroy(&s->wake);
    pthread_cond_destroy(&s->idle);
    pthread_mutex_destroy(&s->mu);
    free(s);
}

/* A place is free when a request has ended.  One ending in one second is assumed beside what was seen, which counts only
 * before much was; those turned away before come first, so that they do not all come back at once. */
static double retry_after_locked(struct sched *s) {
    double rate = (s->endings.events + 1) / (s->endings.seconds + 1);
    double wait = ++s->n_turned_away / rate;
    return fmin(fmax(wait, 0.05), 120); /* clients give up when told to wait longer */
}

enum err sched_submit(struct sched *s, const struct sched_request *asked, void (*notify)(void *arg),
                      void *arg, struct ticket **out, double *retry_after_s, char *msg,
                      size_t msg_len) {
    struct request *r;
    struct ticket *t;
    enum err err = request_new(&r, asked, s->info, s->options.default_max, msg, msg_len);
    if (err) return err;
    if (ticket_new(&t, asked->n, s->options.output_limit, notify, arg, poke, s)) {
        request_free(r);
        return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    }
    t->usage.prompt_tokens = (int64_t)asked->n_prompt;
    r->ticket = t;
    r->submitted_at = seconds_now();

    pthread_mutex_lock(&s->mu);
    bool at_once = s->n_slots_wanted + asked->best_of <= s->n_slots_free;
    if (s->stopping || s->draining) {
        *retry_after_s = -1;
        err = err_set(msg, msg_len, ERR_BUSY, "the server is shutting down");
    } else if (!s->stats.healthy) {
        err = err_set(msg, msg_len, ERR_DEVICE, "%s", device_lost);
    } else if (!at_once && s->n_waiting >= s->options.max_queue) {
        *retry_after_s = retry_after_locked(s);
        s->n_rejected++;
        err = err_set(msg, msg_len, ERR_BUSY, "all %d sequences are in use and %d requests wait",
                      s->info->n_slots, s->n_waiting);
    } else {
        if (!s->n_waiting) s->n_turned_away = 0;
        *s->waiting_end = r;
        s->waiting_end = &r->next;
        s->n_waiting++;
        s->n_slots_wanted += asked->best_of;
        s->n_active++;
        poke_locked(s);
    }
    pthread_mutex_unlock(&s->mu);
    if (err) {
        request_free(r);
        ticket_release(t);
        ticket_free(t);
        return err;
    }
    *out = t;
    return OK;
}

bool sched_drain(struct sched *s, double timeout_s) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    double whole = floor(timeout_s);
    until.tv_sec += (time_t)whole;
    until.tv_nsec += (long)((timeout_s - whole) * 1e9);
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    pthread_mutex_lock(&s->mu);
    s->draining = true;
    while (s->n_active && pthread_cond_timedwait(&s->idle, &s->mu, &until) != ETIMEDOUT) {}
    bool finished = s->n_active == 0;
    pthread_mutex_unlock(&s->mu);
    return finished;
}

void sched_stats(struct sched *s, struct sched_stats *out) {
    pthread_mutex_lock(&s->mu);
    *out = s->stats;
    out->waiting = s->n_waiting;
    out->rejected = s->n_rejected;
    struct rate generated = s->generated;
    double published_at = s->stats_at;
    pthread_mutex_unlock(&s->mu);
    rate_add(&generated, 0, seconds_now() - published_at);
    out->tokens_per_s = generated.seconds > 0 ? generated.events / generated.seconds : 0;
}
