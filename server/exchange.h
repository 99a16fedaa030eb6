/* exchange.h - one HTTP request and its response, from the first header to the last byte.
 *
 * All exchanges live on the server's one thread.  One that waits for tokens is suspended
 * (libmicrohttpd then forgets its socket) and watched for a client that leaves; the scheduler
 * thread's only touch is http_notify(), which puts the exchange on the ready list.  One whose body
 * is large is suspended too while its route handles it on the reader's thread (reader.h), which
 * owns it until http_notify_read(); what the route replies is kept till then. A request that
 * is refused for its head (path, key, size) still has its body read and dropped, up to a bound, so
 * that clients which send before they read see the answer. */
#ifndef URCHIN_SERVER_EXCHANGE_H
#define URCHIN_SERVER_EXCHANGE_H

#include "server/answer.h"
#include "server/buffer.h"

#include <microhttpd.h>
#include <stdatomic.h>

struct http;  /* http.h */
struct route; /* routes.h */

struct exchange {
    struct http *http;
    struct MHD_Connection *connection;
    struct exchange *prev, *next; /* all of the server's */
    struct exchange *next_ready;  /* guarded by the http's ready_mu, as are the next two */
    bool ready, read;
    struct exchange *next_read; /* the reader's list */
    const struct route *route;  /* NULL: none of that path */
    char *path;                 /* owned; decoded, without the query */
    const char *method;         /* libmicrohttpd's, as long as the request */
    char id[65];                /* x-request-id */
    double started;             /* seconds, monotonic */
    struct buffer body;
    size_t body_bytes;      /* received, dropped ones included */
    struct api_error error; /* status 0: none; what the response will say once the body is in */
    struct answer *answer;  /* owned; NULL: replied at once */
    int watched_fd;         /* -1: not watched */
    bool suspended;
    atomic_bool gone;              /* the client has left; the reader looks too */
    bool aside;                    /* it was given to the reader */
    bool reading;                  /* and is still there */
    struct MHD_Response *response; /* owned; what the reader's thread replied, not yet queued */
    const char *type;              /* of that response, or NULL */
    int status;                    /* of the response; 0: none yet */
};

/* libmicrohttpd's callbacks; cls is the struct http. */
enum MHD_Result exchange_handle(void *cls, struct MHD_Connection *connection, const char *url,
                                const char *method, const char *version, const char *upload_data,
                                size_t *upload_data_size, void **state);
void exchange_completed(void *cls, struct MHD_Connection *connection, void **state,
                        enum MHD_RequestTerminationCode code);

void exchange_advance(struct exchange *x);   /* the scheduler has delivered something */
void exchange_break_off(struct exchange *x); /* the server stops: the client is told */
void exchange_abandon(struct exchange *x);   /* the client has left: frees the slots now */

void exchange_read(struct exchange *x); /* the reader's thread: handles the request */

/* ---- for routes: each queues the response; to be called once ---- */
enum MHD_Result exchange_reply(struct exchange *x, int status, const char *type, char *body,
                               size_t len); /* body malloc'd, taken */
enum MHD_Result exchange_reply_static(struct exchange *x, int status, const char *type,
                                      const char *body, size_t len); /* body lives for ever */
enum MHD_Result exchange_reply_json(struct exchange *x, int status, cJSON *root); /* root taken */
enum MHD_Result exchange_reply_error(struct exchange *x, const struct api_error *e);
enum MHD_Result exchange_generate(struct exchange *x,
                                  struct api_request *request); /* *request taken */

#endif
