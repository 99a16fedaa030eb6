/* ticket.h - what passes from the scheduler thread to the one who asked: a list of events under a
 * lock.
 *
 * Two hold a ticket, the owner (public half in scheduler.h) and the scheduler; the last to let go
 * frees it.  Private to the scheduler.  Lock order: ticket.mu, then the scheduler's mu (taken
 * inside wake). */
#ifndef URCHIN_SCHEDULER_TICKET_H
#define URCHIN_SCHEDULER_TICKET_H

#include "scheduler/scheduler.h"

#include <pthread.h>
#include <stdatomic.h>

struct event_node { /* one block of memory, with all that event points to */
    struct event_node *next;
    size_t bytes;
    struct sched_event event;
};
/* A node with a copy of *event and what it points to, error excepted (it is static).  NULL: out of
 * memory. */
struct event_node *event_node_new(const struct sched_event *event);

struct ticket {
    atomic_bool cancelled;          /* set by the owner, read by the scheduler thread */
    pthread_mutex_t mu;             /* guards all below */
    int n_holders;                  /* 2, 1, 0 */
    struct event_node *head, *tail; /* owned; not taken yet */
    struct event_node *taken;       /* owned; what ticket_next returned last */
    size_t unread;                  /* bytes from head to tail */
    size_t limit;                   /* pause above this */
    bool paused;                    /* the scheduler waits for the owner to read */
    int n_choices, n_finished;      /* last events taken by the owner */
    struct sched_usage usage;
    void (*notify)(void *arg);
    void *notify_arg;
    void (*wake)(struct sched *s); /* NULL once the scheduler has let go */
    struct sched *sched;
};

enum err ticket_new(struct ticket **out, int n_choices, size_t limit, void (*notify)(void *arg),
                    void *arg, void (*wake)(struct sched *s), struct sched *s);

/* ---- scheduler thread ---- */
void ticket_push(struct ticket *t, struct event_node *node); /* node taken */
void ticket_count_token(struct ticket *t);
bool ticket_paused(
    struct ticket *t); /* true: leave its sequences out; wake follows when the owner has read */
void ticket_release(
    struct ticket *t); /* the scheduler's hold; wake and notify are not called any more */

#endif
