/* loop.c - the scheduler thread: end, admit, build a batch, step, hand out, again.
 *
 * When a step would have no rows the thread sleeps until someone pokes it: a submission, a
 * cancellation, a reader that caught up, the end. */
#include "scheduler/internal.h"

#include "config/log.h"

/* ---- the end of a request ---- */

/* All choices are finished, r is in no list: it ends here. */
static void end_request(struct sched *s, struct request *r) {
    if (r->asked.best_of > r->asked.n) sched_deliver_best(r);
    double now = seconds_now();
    int64_t n_generated = 0;
    for (int i = 0; i < r->asked.best_of; i++)
        n_generated += r->choices[i].n_generated;
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

/* ---- a step ---- */

/* One row for every choice that generates, then prompts in order of admission until a bound is met.
 * Returns the number of runs. */
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
            s->runs[n_runs] = (struct model_run){
                .slot = c->slot, .n_rows = 1, .tokens = &c->next, .n_logits = 1, .generated = true};
            s->owners[n_runs++] = (struct run_owner){r, c};
        }
    }
    s->n_paused_slots = n_paused;
    /* Each run may ask for one row of logits, as there are at most as many runs as slots;
     * prompt_logprobs share the rest. */
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
        s->runs[n_runs] = (struct model_run){.slot = slot,
                                             .n_rows = n,
                                             .tokens = r->asked.prompt + r->n_read,
                                             .n_logits = n_logits};
        s->owners[n_runs++] = (struct run_owner){r, NULL};
        rows -= n;
    }
    return n_runs;
}

static void hand_out(struct sched *s, int n_runs, struct sched_rows rows) {
    size_t vocab = (size_t)s->info->vocab_size;
    int n_rows = 0;
    for (int i = 0; i < n_runs; i++) {
        const struct model_run *run = &s->runs[i];
        struct request *r = s->owners[i].request;
        const float *end = rows.logits ? rows.logits + (size_t)run->n_logits * vocab : NULL;
        if (s->owners[i].choice) {
            sched_generate(s, r, s->owners[i].choice, &rows);
        } else {
            if (r->prompt_tokens) sched_score_prompt(s, r, rows.logits, run->n_rows);
            r->n_read += (size_t)run->n_rows;
            s->own.prompt_tokens += (uint64_t)run->n_rows;
            if (r->n_read == r->asked.n_prompt) {
                if (end) rows.logits = end - vocab; /* the prompt's last row */
                sched_begin_generation(s, r, &rows);
            }
        }
        rows.logits = end;
        n_rows += run->n_rows;
    }
    s->own.steps++;
    histogram_add(&s->own.step_tokens, sched_tokens_bounds, n_rows);
}

/* The step failed, and with it the states of all who took part. */
static void fail_running(struct sched *s, enum err err) {
    const char *why = err == ERR_DEVICE  ? sched_device_lost
                      : err == ERR_NOMEM ? "out of memory in the model's step"
                                         : "the model's step failed";
    log_event(LOG_ERROR, "step_failed", "error=%s running=%d", err_name(err), s->n_running);
    for (struct request *r = s->running; r; r = r->next)
        sched_finish_choices(s, r, FINISH_ERROR, why);
}

/* ---- the thread ---- */

/* Copies the numbers for other threads; work: seconds of the step just done, 0 when there was none.
 */
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
        struct sched_rows rows = {0};
        enum err err;
        if (s->draws) {
            struct sched_plan plan = sched_plan_draws(s, n_runs);
            err = model_step_draw(s->options.model, s->runs, n_runs, &plan.draws, &rows.drawn,
                                  plan.wants_logits ? &rows.logits : NULL);
        } else {
            err = model_step(s->options.model, s->runs, n_runs, &rows.logits);
        }
        if (err) {
            fail_running(s, err);
            if (err == ERR_DEVICE) s->own.healthy = false;
        } else {
            hand_out(s, n_runs, rows);
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
        s->n_at_once -= r->at_once;
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
        sched_finish_choices(s, r, lost ? FINISH_ERROR : FINISH_CANCELLED,
                             lost ? sched_device_lost : NULL);
        end_request(s, r);
    }
    for (struct request *r = s->running; r; r = r->next)
        if (all || atomic_load(&r->ticket->cancelled))
            sched_finish_choices(s, r, FINISH_CANCELLED, NULL);
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
        s->n_at_once -= r->at_once;
        s->n_slots_wanted -= r->asked.best_of;
        if (s->n_turned_away) s->n_turned_away--;
        for (int i = 0; i < r->asked.best_of; i++)
            r->choices[i].slot = s->free_slots[--s->n_free];
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
    while (!s->poked && !s->busy)
        pthread_cond_wait(&s->wake, &s->mu);
    s->poked = false;
    bool stopping = s->stopping;
    pthread_mutex_unlock(&s->mu);
    return !stopping;
}

void *sched_run(void *arg) {
    struct sched *s = arg;
    while (wait_for_work(s)) {
        reap(s, false);
        admit(s);
        step(s);
    }
    reap(s, true);
    return NULL;
}
