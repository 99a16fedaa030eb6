/* http.c - the loop. */
#include "server/http.h"

#include "config/log.h"
#include "server/routes.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct connection {
    struct connection *prev, *next;
    int fd;
    double deadline; /* for the rest of the request; 0: none */
};

enum { MAX_EVENTS = 64, SWEEP_MS = 1000, RETRY_MS = 50 };
static const double LAST_WORDS_S = 0.5;
static const double BYTES_PER_SECOND = 16 << 10; /* the slowest body that is waited for */

double http_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void http_wake(struct http *h) {
    uint64_t one = 1;
    while (write(h->wake_fd, &one, sizeof one) < 0 && errno == EINTR) {
    }
}

/* ---- connections and their deadlines ---- */

static void on_connection(void *cls, struct MHD_Connection *mhd, void **state,
                          enum MHD_ConnectionNotificationCode code) {
    struct http *h = cls;
    struct connection *c = *state;
    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        c = calloc(1, sizeof *c);
        if (!c) return; /* goes without a deadline; libmicrohttpd's own idle timeout remains */
        c->fd = MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
        c->deadline = http_now() + h->settings->idle_timeout_s;
        c->next = h->connections;
        if (c->next) c->next->prev = c;
        h->connections = c;
        h->n_connections++;
        *state = c;
    } else if (c) {
        if (c->next) c->next->prev = c->prev;
        *(c->prev ? &c->prev->next : &h->connections) = c->next;
        h->n_connections--;
        free(c);
        *state = NULL;
    }
}

static struct connection *connection_of(struct MHD_Connection *mhd) {
    return MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT)->socket_context;
}

static void set_deadline(struct MHD_Connection *mhd, double deadline) {
    struct connection *c = connection_of(mhd);
    if (c) c->deadline = deadline;
}

void http_request_bytes(struct MHD_Connection *mhd, size_t n) {
    struct connection *c = connection_of(mhd);
    if (c && c->deadline > 0) c->deadline += (double)n / BYTES_PER_SECOND;
}

void http_request_whole(struct MHD_Connection *mhd) {
    set_deadline(mhd, 0);
}

/* libmicrohttpd 0.9.75 misses the end of a stream that comes together with the last bytes:
 * edge-triggered, it stops at a short read. */
static bool has_ended(int fd) {
    char byte;
    return recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
}

/* Cuts those who owe the rest of a request and are too slow or gone; libmicrohttpd then sees a
 * hang-up and cleans up. */
static void sweep(struct http *h) {
    double now = http_now();
    for (struct connection *c = h->connections; c; c = c->next)
        if (c->deadline > 0 && (c->deadline < now || has_ended(c->fd))) shutdown(c->fd, SHUT_RDWR);
}

/* ---- exchanges ---- */

void http_exchange_begins(struct http *h, struct exchange *x) {
    x->next = h->exchanges;
    if (x->next) x->next->prev = x;
    h->exchanges = x;
    set_deadline(x->connection, http_now() + h->settings->idle_timeout_s);
}

static void count(struct http *h, const struct exchange *x) {
    /* clang-format off */
    static const int statuses[HTTP_STATUSES - 1] = {200, 204, 400, 401, 404, 405, 413, 431, 429, 500, 503, 0};
    /* clang-format on */
    int route = x->route ? (int)(x->route - routes) : n_routes, status = 0;
    while (status < HTTP_STATUSES - 1 && statuses[status] != x->status)
        status++;
    h->requests[route][status]++;
}

void http_exchange_ends(struct http *h, struct exchange *x) {
    if (x->next) x->next->prev = x->prev;
    *(x->prev ? &x->prev->next : &h->exchanges) = x->next;
    count(h, x);
    set_deadline(x->connection, http_now() + h->settings->idle_timeout_s);
    pthread_mutex_lock(&h->ready_mu);
    for (struct exchange **p = &h->ready; x->ready && *p; p = &(*p)->next_ready)
        if (*p == x) {
            *p = x->next_ready;
            break;
        }
    pthread_mutex_unlock(&h->ready_mu);
}

static void notify(struct exchange *x, bool read) {
    struct http *h = x->http;
    pthread_mutex_lock(&h->ready_mu);
    bool first = !h->ready, news = !x->ready;
    x->read |= read;
    if (news) {
        x->ready = true;
        x->next_ready = h->ready;
        h->ready = x;
    }
    pthread_mutex_unlock(&h->ready_mu);
    if (first) http_wake(h);
}

void http_notify(void *exchange) {
    notify(exchange, false);
}

void http_notify_read(struct exchange *x) {
    notify(x, true);
}

bool http_was_read(struct exchange *x) {
    pthread_mutex_lock(&x->http->ready_mu);
    bool read = x->read;
    pthread_mutex_unlock(&x->http->ready_mu);
    return read;
}

static struct exchange *pop_ready(struct http *h) {
    pthread_mutex_lock(&h->ready_mu);
    struct exchange *x = h->ready;
    if (x) {
        h->ready = x->next_ready;
        x->ready = false;
    }
    pthread_mutex_unlock(&h->ready_mu);
    return x;
}

/* Answers with many prompts whose next one found the queue full try again. */
static bool retry_waiting(struct http *h) {
    bool any = false;
    for (struct exchange *x = h->exchanges; x; x = x->next)
        if (!x->reading && x->answer && answer_waits(x->answer)) {
            exchange_advance(x);
            any = true;
        }
    return any;
}

/* A peer that ends its half of the connection is taken for gone: HTTP clients do not shut down one
 * half and wait. */
enum err http_watch(struct http *h, struct exchange *x) {
    int fd = MHD_get_connection_info(x->connection, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
    struct epoll_event ev = {.events = EPOLLRDHUP | EPOLLET, .data.ptr = x};
    if (epoll_ctl(h->epoll_fd, EPOLL_CTL_ADD, fd, &ev) != 0) return ERR_IO;
    x->watched_fd = fd;
    return OK;
}

void http_unwatch(struct http *h, struct exchange *x) {
    if (x->watched_fd >= 0) epoll_ctl(h->epoll_fd, EPOLL_CTL_DEL, x->watched_fd, NULL);
    x->watched_fd = -1;
}

/* ---- the daemon ---- */

static void log_daemon(void *cls, const char *format, va_list args) {
    char line[512];
    (void)cls;
    vsnprintf(line, sizeof line, format, args);
    size_t n = strlen(line);
    while (n && line[n - 1] == '\n')
        line[--n] = 0;
    log_event(LOG_DEBUG, "http", "%s", line);
}

static enum err open_descriptors(struct http *h) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGHUP);
    h->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    h->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    h->signal_fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (h->epoll_fd < 0 || h->wake_fd < 0 || h->signal_fd < 0) return ERR_IO;
    int fds[3] = {h->wake_fd, h->signal_fd,
                  MHD_get_daemon_info(h->daemon, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd};
    void *tags[3] = {&h->wake_fd, &h->signal_fd, NULL};
    for (int i = 0; i < 3; i++) {
        struct epoll_event ev = {.events = EPOLLIN, .data.ptr = tags[i]};
        if (epoll_ctl(h->epoll_fd, EPOLL_CTL_ADD, fds[i], &ev) != 0) return ERR_IO;
    }
    return OK;
}

enum err http_open(struct http *h, const struct settings *settings, struct auth *auth,
                   int listen_fd, char *msg, size_t msg_len) {
    *h = (struct http){
        .settings = settings, .auth = auth, .epoll_fd = -1, .wake_fd = -1, .signal_fd = -1};
    pthread_mutex_init(&h->ready_mu, NULL);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    h->started = (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
    /* Room beyond the limit, so that slightly too large headers get our own answer. */
    size_t pool = (size_t)settings->header_limit_kb * 1024 + 4096;
    h->daemon = MHD_start_daemon(
        MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0, NULL, NULL,
        exchange_handle, h, MHD_OPTION_EXTERNAL_LOGGER, log_daemon, NULL, MHD_OPTION_LISTEN_SOCKET,
        listen_fd, MHD_OPTION_NOTIFY_COMPLETED, exchange_completed, h, MHD_OPTION_NOTIFY_CONNECTION,
        on_connection, h, MHD_OPTION_CONNECTION_MEMORY_LIMIT, pool, MHD_OPTION_CONNECTION_LIMIT,
        (unsigned)settings->max_connections, MHD_OPTION_CONNECTION_TIMEOUT,
        (unsigned)settings->idle_timeout_s, MHD_OPTION_STRICT_FOR_CLIENT, 1,
        MHD_OPTION_SIGPIPE_HANDLED_BY_APP, 1, MHD_OPTION_END);
    if (!h->daemon) {
        close(listen_fd);
        return err_set(msg, msg_len, ERR_IO, "the HTTP server could not be started");
    }
    if (open_descriptors(h) == OK && reader_new(&h->reader) == OK) return OK;
    err_set(msg, msg_len, ERR_IO, "the HTTP server could not be started: %m");
    http_close(h);
    return ERR_IO;
}

static int milliseconds_to_wait(struct http *h, bool waiting) {
    MHD_UNSIGNED_LONG_LONG theirs;
    int ours = waiting ? RETRY_MS : SWEEP_MS;
    if (MHD_get_timeout(h->daemon, &theirs) == MHD_YES && theirs < (unsigned)ours)
        return (int)theirs;
    return ours;
}

static void stop_accepting(struct http *h) {
    int fd = MHD_quiesce_daemon(h->daemon);
    if (fd >= 0) close(fd);
    h->draining = true;
}

/* true: end at once. */
static bool take_signal(struct http *h, double *drain_until) {
    struct signalfd_siginfo info;
    if (read(h->signal_fd, &info, sizeof info) != sizeof info) return false;
    if (info.ssi_signo == SIGHUP || h->draining) {
        log_event(LOG_INFO, "stopping", "at once");
        return true;
    }
    stop_accepting(h);
    *drain_until = http_now() + h->settings->drain_timeout_s;
    log_event(LOG_INFO, "draining", "%d requests are running, for at most %g s", h->n_answering,
              h->settings->drain_timeout_s);
    return false;
}

void http_run(struct http *h, void (*on_ready)(void *arg), void *arg) {
    double drain_until = 0, next_sweep = 0;
    bool announced = false, waiting = false;
    for (;;) {
        struct epoll_event events[MAX_EVENTS];
        int n = epoll_wait(h->epoll_fd, events, MAX_EVENTS, milliseconds_to_wait(h, waiting));
        for (int i = 0; i < n; i++) {
            void *tag = events[i].data.ptr;
            uint64_t drop;
            if (tag == &h->wake_fd) {
                if (read(h->wake_fd, &drop, sizeof drop) < 0) continue; /* already drained */
            } else if (tag == &h->signal_fd) {
                if (take_signal(h, &drain_until)) return;
            } else if (tag) {
                exchange_abandon(tag); /* frees nothing: all tags of this round stay valid */
            }
        }
        enum phase phase = atomic_load(&h->phase);
        if (phase == PHASE_FAILED) return;
        if (phase == PHASE_READY && !announced) {
            announced = true;
            on_ready(arg);
        }
        for (struct exchange *x; (x = pop_ready(h)) != NULL;)
            exchange_advance(x);
        waiting = retry_waiting(h);
        MHD_run(h->daemon);
        double now = http_now();
        if (now >= next_sweep) {
            sweep(h);
            next_sweep = now + SWEEP_MS * 1e-3;
        }
        if (!h->draining || (h->n_answering > 0 && now < drain_until)) continue;
        if (h->n_answering > 0)
            log_event(LOG_WARN, "drain_timeout", "%d requests are cut off", h->n_answering);
        return;
    }
}

static bool any_suspended(const struct http *h) {
    for (const struct exchange *x = h->exchanges; x; x = x->next)
        if (x->suspended) return true;
    return false;
}

/* Tells those who still wait that nothing more comes, and gives them a moment to hear it. */
static void break_off(struct http *h) {
    int fd = MHD_get_daemon_info(h->daemon, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd;
    double until = http_now() + LAST_WORDS_S;
    for (struct exchange *x = h->exchanges; x; x = x->next)
        exchange_break_off(x);
    MHD_run(h->daemon);
    while (h->n_answering > 0 && http_now() < until) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        poll(&p, 1, 10);
        MHD_run(h->daemon);
    }
}

void http_close(struct http *h) {
    if (h->daemon) {
        if (!h->draining) stop_accepting(h);
        break_off(h);
        /* None may be suspended when the daemon stops; a request just being read may become so, and
         * one with the reader is so until it comes back. */
        for (;; usleep(1000)) {
            for (struct exchange *x = h->exchanges; x; x = x->next)
                exchange_abandon(x);
            MHD_run(h->daemon);
            if (!any_suspended(h)) break;
        }
        MHD_stop_daemon(h->daemon);
    }
    reader_free(h->reader);
    h->reader = NULL;
    if (h->signal_fd >= 0) close(h->signal_fd);
    if (h->wake_fd >= 0) close(h->wake_fd);
    if (h->epoll_fd >= 0) close(h->epoll_fd);
    pthread_mutex_destroy(&h->ready_mu);
    h->daemon = NULL;
}
