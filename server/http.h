/* http.h - the HTTP server: one thread, one epoll, libmicrohttpd run from our own loop.
 *
 * The loop waits on libmicrohttpd's epoll, a wake-up descriptor (the scheduler thread and the
 * loader), signals, and the sockets of suspended connections, whose clients may leave.  Every call
 * into libmicrohttpd comes from this thread. Deadlines: a connection has idle_timeout seconds to
 * send the whole head of a request, then as long again (and one second for every 16 KiB received)
 * for its body; one whose reader takes nothing for idle_timeout is closed. */
#ifndef URCHIN_SERVER_HTTP_H
#define URCHIN_SERVER_HTTP_H

#include "config/settings.h"
#include "server/auth.h"
#include "server/exchange.h"
#include "server/reader.h"
#include "server/served.h"

#include <pthread.h>
#include <stdatomic.h>

enum phase { PHASE_LOADING, PHASE_READY, PHASE_FAILED };

enum { HTTP_ROUTES = 16, HTTP_STATUSES = 16 };

struct connection; /* one socket: its deadline */

struct http {
    const struct settings *settings; /* borrowed */
    struct auth *auth;               /* borrowed */
    _Atomic(enum phase) phase;       /* set by the loader, after served */
    struct served served;            /* when PHASE_READY */
    bool draining;                   /* server's thread only, as is all that follows */
    struct MHD_Daemon *daemon;
    int epoll_fd, wake_fd, signal_fd;
    struct exchange *exchanges;
    struct reader *reader;
    int n_answering; /* exchanges that hold an answer or are with the reader */
    struct connection *connections;
    int n_connections;
    uint64_t requests[HTTP_ROUTES][HTTP_STATUSES]; /* by route and status: metrics.c */
    double started;                                /* unix seconds */

    pthread_mutex_t ready_mu; /* guards the list and the exchanges' ready, read, next_ready */
    struct exchange *ready;
};

/* listen_fd is taken. */
enum err http_open(struct http *h, const struct settings *settings, struct auth *auth,
                   int listen_fd, char *msg, size_t msg_len);

/* Serves until a signal ends it: SIGTERM or SIGINT drains (--drain-timeout), a second one or SIGHUP
 * ends at once; or until the phase is PHASE_FAILED.  on_ready is called once, when the phase is
 * PHASE_READY. */
void http_run(struct http *h, void (*on_ready)(void *arg), void *arg);

/* Ends what is still there.  After it, nothing calls the scheduler. */
void http_close(struct http *h);

void http_wake(struct http *h);   /* any thread */
void http_notify(void *exchange); /* sched_submit's notify */
/* The reader gives x back: not to be touched by it from then on. */
void http_notify_read(struct exchange *x);
bool http_was_read(struct exchange *x);
double http_now(void); /* seconds, monotonic */

/* For exchanges. */
void http_exchange_begins(struct http *h, struct exchange *x);
void http_exchange_ends(struct http *h, struct exchange *x);
enum err http_watch(struct http *h,
                    struct exchange *x); /* tells exchange_abandon when the client leaves */
void http_unwatch(struct http *h, struct exchange *x);
void http_request_bytes(struct MHD_Connection *c, size_t n); /* n more of a body */
void http_request_whole(struct MHD_Connection *c); /* no deadline until the response is out */

#endif
