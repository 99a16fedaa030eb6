/* generate.c - what a drawn token becomes: text, events, the end. */
#include "scheduler/internal.h"

#include "config/log.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

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

/* Moves what may be shown (all, when *event is the choice's last) from the choice to an event.
 * ERR_NOMEM. */
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
    finish_choice(
        s, r, c,
        &(struct sched_event){.finish = FINISH_ERROR, .stop_token = -1, .error = "out of memory"});
}

/* Delivers the last event and gives the slot back; *last says why it ends. */
static void finish_choice(struct sched *s, struct request *r, struct choice *c,
                          const struct sched_event *last) {
    struct sched_event event = *last;
    if (emit(r, c,
             &event)) { /* the text is lost with the memory; the reader must not wait for ever */
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

void sched_finish_choices(struct sched *s, struct request *r, enum finish_reason why,
                          const char *error) {
    for (int i = 0; i < r->asked.best_of; i++)
        if (!r->choices[i].finished)
            finish_choice(s, r, &r->choices[i],
                          &(struct sched_event){.finish = why, .stop_token = -1, .error = error});
}

void sched_deliver_best(struct request *r) {
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
    c->held[c->n_held++] =
        (struct held_token){token, logprob, c->text.shown + (int64_t)c->text.len, n_top};
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

/* Draws the next token of a choice and does all that follows from it. */
void sched_generate(struct sched *s, struct request *r, struct choice *c, struct sched_rows *from) {
    const struct sched_request *asked = &r->asked;
    float logprob;
    int32_t token = sched_draw(s, r, c, from, &logprob);
    if (request_scores(r)) c->sum_logprob += (double)logprob;
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
void sched_score_prompt(struct sched *s, struct request *r, const float *logits, int n_rows) {
    int n_top = r->asked.n_logprobs > 0 ? r->asked.n_logprobs : 0;
    for (int i = 0; i < n_rows; i++) {
        size_t at = r->n_read + (size_t)i + 1;
        if (at == r->asked.n_prompt) return;
        struct token_logprob *top = r->prompt_tops + at * (size_t)n_top;
        int32_t token = r->asked.prompt[at];
        float logprob = sampler_logprobs(
            s->sampler, logits + (size_t)i * (size_t)s->info->vocab_size, token, top, n_top);
        r->prompt_tokens[at] = (struct sched_token){token, logprob, n_top, top};
    }
}

/* The last prompt row has been read: every choice goes on from here. */
void sched_begin_generation(struct sched *s, struct request *r, struct sched_rows *from) {
    if (r->prompt_tokens) {
        struct event_node *node =
            event_node_new(&(struct sched_event){.is_prompt = true,
                                                 .stop_token = -1,
                                                 .tokens = r->prompt_tokens,
                                                 .n_tokens = (int)r->asked.n_prompt});
        if (!node) {
            sched_finish_choices(s, r, FINISH_ERROR, "out of memory");
            return;
        }
        ticket_push(r->ticket, node);
    }
    if (r->max_tokens == 0) {
        sched_finish_choices(s, r, FINISH_LENGTH, NULL);
        return;
    }
    for (int i = 1; i < r->asked.best_of; i++)
        model_slot_copy(s->options.model, r->choices[i].slot, r->choices[0].slot);
    for (int i = 0; i < r->asked.best_of; i++)
        sched_generate(s, r, &r->choices[i], from);
}
