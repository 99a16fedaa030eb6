/* scheduler.c - what other threads call; see internal.h. */
#include "scheduler/internal.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

const char sched_device_lost[] = "the device was lost; the server must be restarted";

static void poke_locked(struct sched *s) {
    s->poked = true;
    pthread_cond_signal(&s->wake);
}

static void poke(struct sched *s) {
    pthread_mutex_lock(&s->mu);
    poke_locked(s);
    pthread_mutex_unlock(&s->mu);
}

enum err sched_new(struct sched **out, const struct sched_options *options, char *msg,
                   size_t msg_len) {
    const struct model_info *info = model_info(options->model);
    if (options->max_rows <= info->n_slots || options->max_logits <= info->n_slots)
        return err_set(
            msg, msg_len, ERR_ARG,
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
    if (!s->free_slots || !s->runs || !s->owners || sampler_new(&s->sampler, info->vocab_size) ||
        sched_draws_new(s))
        goto fail;
    while (s->n_free < info->n_slots) { /* so that slot 0 goes first */
        s->free_slots[s->n_free] = info->n_slots - 1 - s->n_free;
        s->n_free++;
    }
    s->n_slots_free = s->n_free;
    if (pthread_create(&s->thread, NULL, sched_run, s)) goto fail;
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
    sched_draws_free(s);
    free(s->free_slots);
    free(s->runs);
    free(s->owners);
    pthread_cond_destroy(&s->wake);
    pthread_cond_destroy(&s->idle);
    pthread_mutex_destroy(&s->mu);
    free(s);
}

/* A place is free when a request has ended.  One ending in one second is assumed beside what was
 * seen, which counts only before much was; those turned away before come first, so that they do not
 * all come back at once. */
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
    int n_queued = s->n_waiting - s->n_at_once;
    r->at_once = s->n_slots_wanted + asked->best_of <= s->n_slots_free;
    if (s->stopping || s->draining) {
        *retry_after_s = -1;
        err = err_set(msg, msg_len, ERR_BUSY, "the server is shutting down");
    } else if (!s->stats.healthy) {
        err = err_set(msg, msg_len, ERR_DEVICE, "%s", sched_device_lost);
    } else if (!r->at_once && n_queued >= s->options.max_queue) {
        *retry_after_s = retry_after_locked(s);
        s->n_rejected++;
        err = err_set(msg, msg_len, ERR_BUSY, "all %d sequences are in use and %d requests wait",
                      s->info->n_slots, n_queued);
    } else {
        if (!s->n_waiting) s->n_turned_away = 0;
        *s->waiting_end = r;
        s->waiting_end = &r->next;
        s->n_waiting++;
        s->n_at_once += r->at_once;
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
    while (s->n_active && pthread_cond_timedwait(&s->idle, &s->mu, &until) != ETIMEDOUT) {
    }
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
