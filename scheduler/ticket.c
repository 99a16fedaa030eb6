/* ticket.c - see ticket.h. */
#include "scheduler/ticket.h"

#include <stdlib.h>
#include <string.h>

struct event_node *event_node_new(const struct sched_event *event) {
    size_t n_top = 0;
    for (int i = 0; i < event->n_tokens; i++)
        n_top += (size_t)event->tokens[i].n_top;
    size_t stop_len = event->stop_string ? strlen(event->stop_string) + 1 : 0;
    size_t tokens_at = sizeof(struct event_node);
    size_t tops_at = tokens_at + (size_t)event->n_tokens * sizeof(struct sched_token);
    size_t text_at = tops_at + n_top * sizeof(struct token_logprob);
    size_t stop_at = text_at + event->text_len + 1;
    size_t bytes = stop_at + stop_len;
    char *block = malloc(bytes);
    if (!block) return NULL;
    struct event_node *node = (struct event_node *)block;
    *node = (struct event_node){.bytes = bytes, .event = *event};
    struct sched_token *tokens = (struct sched_token *)(block + tokens_at);
    struct token_logprob *top = (struct token_logprob *)(block + tops_at);
    for (int i = 0; i < event->n_tokens; i++) {
        tokens[i] = event->tokens[i];
        if (!tokens[i].n_top) continue;
        memcpy(top, tokens[i].top, (size_t)tokens[i].n_top * sizeof *top);
        tokens[i].top = top;
        top += tokens[i].n_top;
    }
    char *text = block + text_at;
    if (event->text_len) memcpy(text, event->text, event->text_len);
    text[event->text_len] = 0;
    node->event.tokens = tokens;
    node->event.text = text;
    if (stop_len) node->event.stop_string = memcpy(block + stop_at, event->stop_string, stop_len);
    return node;
}

enum err ticket_new(struct ticket **out, int n_choices, size_t limit, void (*notify)(void *arg),
                    void *arg, void (*wake)(struct sched *s), struct sched *s) {
    struct ticket *t = calloc(1, sizeof *t);
    if (!t) return ERR_NOMEM;
    if (pthread_mutex_init(&t->mu, NULL)) {
        free(t);
        return ERR_NOMEM;
    }
    t->n_holders = 2;
    t->limit = limit;
    t->n_choices = n_choices;
    t->notify = notify;
    t->notify_arg = arg;
    t->wake = wake;
    t->sched = s;
    *out = t;
    return OK;
}

/* Caller holds t->mu, which this releases. */
static void let_go_locked(struct ticket *t) {
    bool last = --t->n_holders == 0;
    pthread_mutex_unlock(&t->mu);
    if (!last) return;
    while (t->head) {
        struct event_node *next = t->head->next;
        free(t->head);
        t->head = next;
    }
    free(t->taken);
    pthread_mutex_destroy(&t->mu);
    free(t);
}

/* ---- scheduler thread ---- */

/* notify is called under the lock, so that it cannot come after ticket_free() has returned. */
void ticket_push(struct ticket *t, struct event_node *node) {
    pthread_mutex_lock(&t->mu);
    node->next = NULL;
    if (t->head)
        t->tail->next = node;
    else
        t->head = node;
    t->tail = node;
    t->unread += node->bytes;
    if (t->notify) t->notify(t->notify_arg);
    pthread_mutex_unlock(&t->mu);
}

void ticket_count_token(struct ticket *t) {
    pthread_mutex_lock(&t->mu);
    t->usage.completion_tokens++;
    pthread_mutex_unlock(&t->mu);
}

bool ticket_paused(struct ticket *t) {
    pthread_mutex_lock(&t->mu);
    if (t->unread > t->limit) t->paused = true;
    bool paused = t->paused;
    pthread_mutex_unlock(&t->mu);
    return paused;
}

void ticket_release(struct ticket *t) {
    pthread_mutex_lock(&t->mu);
    t->notify = NULL;
    t->wake = NULL;
    t->sched = NULL;
    let_go_locked(t);
}

/* ---- owner ---- */

bool ticket_next(struct ticket *t, struct sched_event *event) {
    pthread_mutex_lock(&t->mu);
    struct event_node *node = t->head;
    if (node) {
        free(t->taken);
        t->taken = node;
        t->head = node->next;
        t->unread -= node->bytes;
        t->n_finished += node->event.finish != FINISH_NONE;
        *event = node->event;
        if (t->paused &&
            t->unread <= t->limit / 2) { /* not at once: a step for a few bytes each time */
            t->paused = false;
            if (t->wake) t->wake(t->sched);
        }
    }
    pthread_mutex_unlock(&t->mu);
    return node != NULL;
}

bool ticket_done(struct ticket *t) {
    pthread_mutex_lock(&t->mu);
    bool done = t->n_finished == t->n_choices;
    pthread_mutex_unlock(&t->mu);
    return done;
}

struct sched_usage ticket_usage(struct ticket *t) {
    pthread_mutex_lock(&t->mu);
    struct sched_usage usage = t->usage;
    pthread_mutex_unlock(&t->mu);
    return usage;
}

void ticket_free(struct ticket *t) {
    if (!t) return;
    atomic_store(&t->cancelled, true);
    pthread_mutex_lock(&t->mu);
    t->notify = NULL;
    if (t->wake) t->wake(t->sched);
    let_go_locked(t);
}
