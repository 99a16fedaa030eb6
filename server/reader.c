/* reader.c - a queue and a thread; see reader.h. */
#include "server/reader.h"

#include "server/exchange.h"

#include <pthread.h>
#include <stdlib.h>

struct reader {
    pthread_t thread;
    pthread_mutex_t mu; /* guards all below, and next_read of the exchanges in the list */
    pthread_cond_t wake;
    struct exchange *first, **end;
    bool stopping;
};

static struct exchange *next(struct reader *r) {
    pthread_mutex_lock(&r->mu);
    while (!r->first && !r->stopping)
        pthread_cond_wait(&r->wake, &r->mu);
    struct exchange *x = r->first;
    if (x) r->first = x->next_read;
    if (!r->first) r->end = &r->first;
    pthread_mutex_unlock(&r->mu);
    return x;
}

static void *run(void *arg) {
    struct reader *r = arg;
    for (struct exchange *x; (x = next(r)) != NULL;)
        exchange_read(x);
    return NULL;
}

enum err reader_new(struct reader **out) {
    struct reader *r = calloc(1, sizeof *r);
    if (!r) return ERR_NOMEM;
    pthread_mutex_init(&r->mu, NULL);
    pthread_cond_init(&r->wake, NULL);
    r->end = &r->first;
    if (pthread_create(&r->thread, NULL, run, r)) {
        free(r);
        return ERR_NOMEM;
    }
    *out = r;
    return OK;
}

void reader_put(struct reader *r, struct exchange *x) {
    pthread_mutex_lock(&r->mu);
    x->next_read = NULL;
    *r->end = x;
    r->end = &x->next_read;
    pthread_cond_signal(&r->wake);
    pthread_mutex_unlock(&r->mu);
}

void reader_free(struct reader *r) {
    if (!r) return;
    pthread_mutex_lock(&r->mu);
    r->stopping = true;
    pthread_cond_signal(&r->wake);
    pthread_mutex_unlock(&r->mu);
    pthread_join(r->thread, NULL);
    pthread_mutex_destroy(&r->mu);
    pthread_cond_destroy(&r->wake);
    free(r);
}
