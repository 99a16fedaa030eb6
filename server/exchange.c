/* exchange.c - a request's life: head, body, route, response. */
#include "server/exchange.h"

#include "config/log.h"
#include "server/http.h"
#include "server/openai.h"
#include "server/routes.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>

/* A body that is only dropped may be this many times the limit before the connection is cut. */
enum { DROP_FACTOR = 8 };

/* Bodies larger than this are read aside: about a hundredth of a second's work. */
enum { LARGE_BODY = 64 << 10 };

static const char *header(const struct exchange *x, const char *name) {
    return MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, name);
}

/* ---- the head ---- */

/* The client's own id when it is harmless, else a new one. */
static void choose_id(struct exchange *x) {
    const char *given = header(x, "x-request-id");
    size_t n = given ? strlen(given) : 0;
    bool good = n > 0 && n < sizeof x->id;
    for (size_t i = 0; good && i < n; i++)
        good = isalnum((unsigned char)given[i]) || strchr("-_.:/+=@", given[i]);
    if (good) {
        memcpy(x->id, given, n + 1);
        return;
    }
    unsigned char bytes[16] = {0};
    if (getrandom(bytes, sizeof bytes, 0) < 0) memcpy(bytes, &x->started, sizeof x->started);
    size_t at = (size_t)snprintf(x->id, sizeof x->id, "req_");
    for (size_t i = 0; i < sizeof bytes; i++, at += 2)
        snprintf(x->id + at, sizeof x->id - at, "%02x", bytes[i]);
}

struct framing {
    int lengths, encodings;
    bool odd; /* a transfer encoding other than chunked, or a name no proxy would pass */
};

static enum MHD_Result look_at_header(void *cls, enum MHD_ValueKind kind, const char *name,
                                      const char *value) {
    struct framing *f = cls;
    (void)kind;
    if (strcasecmp(name, "content-length") == 0) f->lengths++;
    if (strcasecmp(name, "transfer-encoding") == 0) {
        f->encodings++;
        f->odd |= !value || strcasecmp(value, "chunked") != 0;
    }
    f->odd |= strpbrk(name, " \t") != NULL;
    return MHD_YES;
}

/* What a proxy and we might read differently must not be read at all (RFC 9112 6.3: request
 * smuggling). */
static bool framing_is_clear(struct exchange *x) {
    struct framing f = {0};
    MHD_get_connection_values(x->connection, MHD_HEADER_KIND, look_at_header, &f);
    return !f.odd && f.lengths + f.encodings <= 1;
}

static void check_head(struct exchange *x) {
    struct http *h = x->http;
    struct api_error *e = &x->error;
    char allow[64];
    const union MHD_ConnectionInfo *size =
        MHD_get_connection_info(x->connection, MHD_CONNECTION_INFO_REQUEST_HEADER_SIZE);
    if (size && size->header_size > (size_t)h->settings->header_limit_kb * 1024) {
        api_fail(e, 431, "headers_too_large", NULL,
                 "The request's headers are larger than %lld KiB.",
                 (long long)h->settings->header_limit_kb);
        return;
    }
    if (strcmp(x->method, "OPTIONS") == 0) return;
    x->route = route_find(x->method, x->path, allow, sizeof allow);
    if (!x->route && allow[0]) {
        api_fail(e, 405, "method_not_allowed", NULL, "%s is not allowed here, only %s.", x->method,
                 allow);
        return;
    }
    if (!x->route) {
        api_fail(e, 404, "not_found", NULL, "There is nothing at %.200s.", x->path);
        return;
    }
    if (!x->route->open &&
        !auth_allows(h->auth, header(x, "Authorization"), header(x, "X-Api-Key"))) {
        bool none = !header(x, "Authorization") && !header(x, "X-Api-Key");
        api_fail(e, 401, "invalid_api_key", NULL,
                 none ? "This server asks for an API key: send it as 'Authorization: Bearer KEY'."
                      : "Incorrect API key provided.");
        return;
    }
    const char *length = header(x, "Content-Length");
    if (length &&
        strtoull(length, NULL, 10) > (unsigned long long)h->settings->body_limit_kb * 1024) {
        api_fail(e, 413, "body_too_large", NULL, "The request's body is larger than %lld KiB.",
                 (long long)h->settings->body_limit_kb);
        return;
    }
    enum phase phase = atomic_load(&h->phase);
    if (x->route->needs_model && phase != PHASE_READY) {
        api_fail(e, 503, "loading", NULL, "The model is being loaded, try again soon.");
        e->retry_after_s = 1;
    } else if (x->route->generates && h->draining) {
        api_fail(e, 503, "shutting_down", NULL, "The server is shutting down.");
        e->retry_after_s = 1;
    }
}

/* ---- the response ---- */

static void add_header(struct MHD_Response *r, const char *name, const char *value) {
    MHD_add_response_header(r, name, value);
}

static void add_cors(struct exchange *x, struct MHD_Response *r) {
    const char *origin = x->http->settings->cors_origin;
    if (!origin || !*origin) return;
    add_header(r, "Access-Control-Allow-Origin", origin);
    if (strcmp(origin, "*") != 0) add_header(r, "Vary", "Origin");
    if (strcmp(x->method, "OPTIONS") != 0) {
        add_header(r, "Access-Control-Expose-Headers",
                   "x-request-id, openai-processing-ms, retry-after");
        return;
    }
    const char *asked = header(x, "Access-Control-Request-Headers");
    bool plain = asked && strlen(asked) < 1024;
    for (const char *p = asked; plain && *p; p++)
        plain = isalnum((unsigned char)*p) || strchr("-_, ", *p);
    add_header(r, "Access-Control-Allow-Methods", "GET, POST, OPTIONS");
    add_header(r, "Access-Control-Allow-Headers",
               plain ? asked : "authorization, content-type, x-api-key, x-request-id");
    add_header(r, "Access-Control-Max-Age", "86400");
}

/* r is taken. */
static enum MHD_Result queue(struct exchange *x, int status, const char *type,
                             struct MHD_Response *r) {
    char ms[32];
    if (!r) return MHD_NO;
    x->status = status;
    if (x->reading) { /* not the server's thread: it will queue the response */
        x->response = r;
        x->type = type;
        return MHD_YES;
    }
    snprintf(ms, sizeof ms, "%.0f", (http_now() - x->started) * 1e3);
    if (type) add_header(r, "Content-Type", type);
    add_header(r, "x-request-id", x->id);
    add_header(r, "openai-processing-ms", ms);
    add_header(r, "X-Content-Type-Options", "nosniff");
    add_cors(x, r);
    if (x->http->draining) add_header(r, "Connection", "close");
    enum MHD_Result result = MHD_queue_response(x->connection, (unsigned)status, r);
    MHD_destroy_response(r);
    return result;
}

enum MHD_Result exchange_reply(struct exchange *x, int status, const char *type, char *body,
                               size_t len) {
    struct MHD_Response *r = MHD_create_response_from_buffer(len, body, MHD_RESPMEM_MUST_FREE);
    if (!r) free(body);
    return queue(x, status, type, r);
}

enum MHD_Result exchange_reply_static(struct exchange *x, int status, const char *type,
                                      const char *body, size_t len) {
    return queue(x, status, type,
                 MHD_create_response_from_buffer(len, (void *)body, MHD_RESPMEM_PERSISTENT));
}

enum MHD_Result exchange_reply_json(struct exchange *x, int status, cJSON *root) {
    char *body = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    return body ? exchange_reply(x, status, "application/json", body, strlen(body)) : MHD_NO;
}

enum MHD_Result exchange_reply_error(struct exchange *x, const struct api_error *e) {
    cJSON *root = openai_error(e);
    char *body = cJSON_PrintUnformatted(root), allow[64], seconds[32];
    cJSON_Delete(root);
    if (!body) return MHD_NO;
    struct MHD_Response *r =
        MHD_create_response_from_buffer(strlen(body), body, MHD_RESPMEM_MUST_FREE);
    if (!r) {
        free(body);
        return MHD_NO;
    }
    if (e->retry_after_s > 0) {
        snprintf(seconds, sizeof seconds, "%.0f", ceil(e->retry_after_s));
        add_header(r, "Retry-After", seconds);
    }
    if (e->status == 401) add_header(r, "WWW-Authenticate", "Bearer");
    if (e->status == 405) {
        route_find(x->method, x->path, allow, sizeof allow);
        add_header(r, "Allow", allow);
    }
    return queue(x, e->status, "application/json", r);
}

/* ---- generation ---- */

static void suspend(struct exchange *x) {
    x->suspended = true;
    MHD_suspend_connection(x->connection);
}

static void resume(struct exchange *x) {
    if (!x->suspended) return;
    x->suspended = false;
    MHD_resume_connection(x->connection);
}

static ssize_t read_stream(void *cls, uint64_t position, char *out, size_t room) {
    struct exchange *x = cls;
    (void)position;
    if (x->gone) return MHD_CONTENT_READER_END_WITH_ERROR;
    ssize_t n = answer_read(x->answer, out, room);
    if (n == 0) {
        answer_pull(x->answer);
        n = answer_read(x->answer, out, room);
    }
    if (n < 0) return MHD_CONTENT_READER_END_WITH_ERROR;
    if (n == 0 && answer_done(x->answer)) return MHD_CONTENT_READER_END_OF_STREAM;
    if (n == 0) suspend(x);
    return n;
}

/* The status of a stream waits for its first token, so that an error can still be one. */
static bool status_is_known(const struct exchange *x) {
    return answer_done(x->answer) || (answer_streams(x->answer) && answer_began(x->answer));
}

static enum MHD_Result reply_answer(struct exchange *x) {
    if (x->gone) return MHD_NO;
    if (!status_is_known(x)) {
        suspend(x);
        return MHD_YES;
    }
    const struct api_error *error = answer_error(x->answer);
    if (error && !(answer_streams(x->answer) && answer_began(x->answer)))
        return exchange_reply_error(x, error);
    if (!answer_streams(x->answer)) {
        char *body = answer_body(x->answer);
        return body ? exchange_reply(x, 200, "application/json", body, strlen(body)) : MHD_NO;
    }
    struct MHD_Response *r =
        MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 1024, read_stream, x, NULL);
    if (!r) return MHD_NO;
    add_header(r, "Cache-Control", "no-cache");
    add_header(r, "X-Accel-Buffering", "no");
    return queue(x, 200, "text/event-stream; charset=utf-8", r);
}

enum MHD_Result exchange_generate(struct exchange *x, struct api_request *request) {
    struct api_error e;
    bool good = answer_new(&x->answer, &x->http->served, request, http_notify, x, &e);
    api_request_free(request); /* what was not taken */
    if (!good) return exchange_reply_error(x, &e);
    if (x->reading) return MHD_YES;
    x->http->n_answering++;
    if (http_watch(x->http, x) != OK) return MHD_NO;
    return reply_answer(x);
}

static enum MHD_Result read_aside(struct exchange *x) {
    if (http_watch(x->http, x) != OK) return MHD_NO;
    x->http->n_answering++;
    x->aside = x->reading = true;
    suspend(x);
    reader_put(x->http->reader, x);
    return MHD_YES;
}

void exchange_read(struct exchange *x) {
    if (!x->gone) x->route->handle(x); /* MHD_NO leaves neither response nor answer */
    http_notify_read(x);
}

/* Takes x back from the reader, if it is there and has been read; false: it is still there. */
static bool take_back(struct exchange *x) {
    if (x->reading && http_was_read(x)) x->reading = false;
    return !x->reading;
}

void exchange_advance(struct exchange *x) {
    if (!take_back(x)) return;
    if (x->gone && x->answer) answer_cancel(x->answer);
    if (x->gone || !x->answer) {
        resume(x);
        return;
    }
    answer_pull(x->answer);
    if (status_is_known(x)) resume(x);
}

void exchange_break_off(struct exchange *x) {
    struct api_error e;
    if (!take_back(x) || !x->answer || x->gone) return;
    api_fail(&e, 503, "shutting_down", NULL, "The server is shutting down.");
    answer_fail(x->answer, &e);
    resume(x);
}

void exchange_abandon(struct exchange *x) {
    x->gone = true;
    if (!take_back(x)) return; /* exchange_advance() goes on with it */
    if (x->answer) answer_cancel(x->answer);
    resume(x);
}

/* ---- libmicrohttpd's callbacks ---- */

static struct exchange *begin(struct http *h, struct MHD_Connection *connection, const char *url,
                              const char *method) {
    struct exchange *x = calloc(1, sizeof *x);
    if (!x) return NULL;
    x->http = h;
    x->connection = connection;
    x->method = method;
    x->path = strdup(url);
    x->started = http_now();
    x->watched_fd = -1;
    if (!x->path) {
        free(x);
        return NULL;
    }
    choose_id(x);
    http_exchange_begins(h, x);
    return x;
}

static enum MHD_Result take_head(struct exchange *x) {
    if (!framing_is_clear(x)) { /* where the body ends is unknown: answer and close */
        struct api_error e;
        api_fail(
            &e, 400, "invalid_request", NULL,
            "The request must carry one Content-Length or 'Transfer-Encoding: chunked', not both.");
        return exchange_reply_error(x, &e);
    }
    check_head(x);
    bool asks_first = header(x, "Expect") != NULL;
    return x->error.status && asks_first ? exchange_reply_error(x, &x->error) : MHD_YES;
}

static enum MHD_Result take_body(struct exchange *x, const char *bytes, size_t n) {
    size_t limit = (size_t)x->http->settings->body_limit_kb * 1024;
    http_request_bytes(x->connection, n);
    x->body_bytes += n;
    if (x->body_bytes > limit && !x->error.status)
        api_fail(&x->error, 413, "body_too_large", NULL,
                 "The request's body is larger than %lld KiB.",
                 (long long)x->http->settings->body_limit_kb);
    if (x->body_bytes / DROP_FACTOR > limit) return MHD_NO;
    if (x->error.status)
        buffer_free(&x->body);
    else
        buffer_append(&x->body, bytes, n);
    return MHD_YES;
}

enum MHD_Result exchange_handle(void *cls, struct MHD_Connection *connection, const char *url,
                                const char *method, const char *version, const char *upload_data,
                                size_t *upload_data_size, void **state) {
    struct http *h = cls;
    struct exchange *x = *state;
    (void)version;
    if (!x) {
        x = begin(h, connection, url, method);
        if (!x) return MHD_NO;
        *state = x;
        return take_head(x);
    }
    if (*upload_data_size) {
        size_t n = *upload_data_size;
        *upload_data_size = 0;
        return take_body(x, upload_data, n);
    }
    if (x->answer) return reply_answer(x);
    if (x->aside) {
        struct MHD_Response *r = x->response;
        x->response = NULL;
        return queue(x, x->status, x->type, r);
    }
    http_request_whole(connection);
    if (x->body.failed) api_out_of_memory(&x->error);
    if (x->error.status) return exchange_reply_error(x, &x->error);
    if (!x->route) /* OPTIONS */
        return exchange_reply_static(x, 204, NULL, "", 0);
    /* What is got has no use for its body, and touches what is the server's thread's alone. */
    bool large = x->body.len > LARGE_BODY && strcmp(x->route->method, "POST") == 0;
    return large ? read_aside(x) : x->route->handle(x);
}

void exchange_completed(void *cls, struct MHD_Connection *connection, void **state,
                        enum MHD_RequestTerminationCode code) {
    struct http *h = cls;
    struct exchange *x = *state;
    (void)connection;
    if (!x) return;
    *state = NULL;
    h->n_answering -= x->answer || x->aside;
    if (x->answer) {
        bool whole = code == MHD_REQUEST_TERMINATED_COMPLETED_OK && !x->gone;
        answer_cancel(x->answer);
        struct sched_usage u = answer_usage(x->answer);
        log_event(
            LOG_INFO, "request",
            "id=%s method=%s path=%s status=%d ms=%.1f prompt_tokens=%lld completion_tokens=%lld%s",
            x->id, x->method, x->path, x->status, (http_now() - x->started) * 1e3,
            (long long)u.prompt_tokens, (long long)u.completion_tokens,
            whole ? "" : " client_left=true");
        answer_free(x->answer); /* from here on nothing notifies x */
    } else {
        bool routine = x->route && x->route->open;
        log_event(routine ? LOG_DEBUG : LOG_INFO, "request",
                  "id=%s method=%s path=%s status=%d ms=%.1f", x->id, x->method, x->path, x->status,
                  (http_now() - x->started) * 1e3);
    }
    if (x->response) MHD_destroy_response(x->response);
    http_unwatch(h, x);
    http_exchange_ends(h, x);
    buffer_free(&x->body);
    free(x->path);
    free(x);
}
