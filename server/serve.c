/* serve.c - socket, loader thread, HTTP server, and the lines that tell a person where to go. */
#include "server/serve.h"

#include "config/log.h"
#include "config/version.h"
#include "server/http.h"
#include "server/open.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct server {
    const struct settings *settings;
    struct team *team;
    struct http http;
    char address[160]; /* "127.0.0.1:8080" */
    char msg[512];     /* why loading failed: the loader's until phase says so */
    pthread_t loader;
};

/* ---- the socket ---- */

static enum err listen_on(const struct settings *s, int *out, char *address, size_t address_len,
                          char *msg, size_t msg_len) {
    struct addrinfo hints = {.ai_family = AF_UNSPEC,
                             .ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_PASSIVE | AI_NUMERICSERV},
                    *list;
    char port[8];
    snprintf(port, sizeof port, "%d", s->port);
    int failed = getaddrinfo(s->host, port, &hints, &list);
    if (failed)
        return err_set(msg, msg_len, ERR_ARG, "--host %s: %s", s->host, gai_strerror(failed));
    int fd = -1, on = 1, unsent = 128 << 10; /* what the kernel keeps for a slow reader */
    for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, a->ai_protocol);
        if (fd < 0) continue;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &unsent,
                   sizeof unsent); /* inherited by connections */
        if (bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, SOMAXCONN) == 0) break;
        int saved = errno;
        close(fd);
        fd = -1;
        errno = saved;
    }
    freeaddrinfo(list);
    if (fd < 0)
        return err_set(msg, msg_len, ERR_IO, "cannot listen on %s port %d: %m", s->host, s->port);
    struct sockaddr_storage bound;
    socklen_t len = sizeof bound;
    char name[NI_MAXHOST], number[NI_MAXSERV];
    getsockname(fd, (struct sockaddr *)&bound, &len);
    getnameinfo((struct sockaddr *)&bound, len, name, sizeof name, number, sizeof number,
                NI_NUMERICHOST | NI_NUMERICSERV);
    if (strcmp(name, "0.0.0.0") == 0 || strcmp(name, "::") == 0) strcpy(name, "127.0.0.1");
    bool v6 = strchr(name, ':') != NULL;
    snprintf(address, address_len, v6 ? "[%.100s]:%s" : "%.100s:%s", name, number);
    *out = fd;
    return OK;
}

/* A connection is a descriptor: as many as --max-connections asks for, and some. */
static void raise_file_limit(int connections) {
    struct rlimit limit;
    rlim_t want = (rlim_t)connections + 64;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= want) return;
    limit.rlim_cur =
        limit.rlim_max == RLIM_INFINITY || want <= limit.rlim_max ? want : limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_cur < want)
        log_event(LOG_WARN, "file_limit", "max_connections=%d but only %llu files may be open",
                  connections, (unsigned long long)limit.rlim_cur);
}

/* ---- the loader thread ---- */

static uint64_t mix(uint64_t hash, const char *text) { /* FNV-1a */
    for (; text && *text; text++)
        hash = (hash ^ (unsigned char)*text) * 0x100000001b3ull;
    return (hash ^ 0xff) * 0x100000001b3ull;
}

void served_describe(struct served *s, const struct settings *settings) {
    const struct model_info *info = model_info(s->model);
    s->name = settings->served_model_name ? settings->served_model_name : info->name;
    s->created = time(NULL);
    s->log_prompts = settings->log_prompts;
    uint64_t hash = mix(0xcbf29ce484222325ull, info->name);
    hash = mix(mix(hash, info->base_sha256), weight_type_name(info->weights));
    snprintf(s->fingerprint, sizeof s->fingerprint, "fp_%010llx",
             (unsigned long long)(mix(hash, URCHIN_VERSION) & 0xffffffffffull));
}

static enum err load(struct server *server) {
    const struct settings *s = server->settings;
    struct served *served = &server->http.served;
    enum err err = open_model(&served->model, s, s->max_seqs, server->team, show_progress,
                              server->msg, sizeof server->msg);
    if (err) return err;
    const struct model_info *info = model_info(served->model);
    struct step_bounds bounds = step_bounds(s, s->max_seqs);
    struct sched_options o = {.model = served->model,
                              .max_queue = s->max_queue,
                              .prefill_chunk = prefill_chunk(s, served->model),
                              .max_rows = bounds.rows,
                              .max_logits = bounds.logits,
                              .output_limit = (size_t)s->output_limit_kb * 1024,
                              .default_max = info->measured_to};
    err = sched_new(&served->sched, &o, server->msg, sizeof server->msg);
    if (err == OK) served_describe(served, s);
    return err;
}

static void *load_and_tell(void *arg) {
    struct server *server = arg;
    enum err err = load(server);
    atomic_store(&server->http.phase, err ? PHASE_FAILED : PHASE_READY);
    http_wake(&server->http);
    return NULL;
}

/* ---- telling ---- */

static void announce(void *arg) {
    struct server *server = arg;
    const struct served *served = &server->http.served;
    const struct model_info *info = model_info(served->model);
    bool chat = chat_family(model_chat(served->model)) != CHAT_NONE;
    printf("model     %s: %.1f M parameters as %s, %s attention\n", served->name,
           (double)info->n_params / 1e6, weight_type_name(info->weights),
           info->attention.kind == ATTENTION_SOFTMAX ? "softmax"
           : info->softmax_layers                    ? "hedgehog and softmax"
                                                     : "hedgehog");
    if (model_draws(served->model)) printf("device    %s\n", info->device);
    printf("slots     %d sequences of %.2f MiB each%s\n", info->n_slots,
           (double)info->slot_bytes / (1 << 20),
           info->attention.kind == ATTENTION_SOFTMAX || info->softmax_layers
               ? ""
               : ", whatever their length");
    printf("web       http://%s\n", server->address);
    printf("try       curl -N http://%s/v1/%s -H 'Content-Type: application/json' %s-d '%s'\n",
           server->address, chat ? "chat/completions" : "completions",
           server->settings->api_key ? "-H \"Authorization: Bearer $URCHIN_API_KEY\" " : "",
           chat ? "{\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"Why is the sky "
                  "blue?\"}]}"
                : "{\"stream\":true,\"max_tokens\":100,\"prompt\":\"Once upon a time\"}");
    fflush(stdout);
    if (!chat)
        log_event(LOG_WARN, "no_chat_template",
                  "chat messages are joined by line ends (see --chat-template)");
    log_event(LOG_INFO, "ready", "model=%s device=%s weights=%s slots=%d slot_bytes=%zu address=%s",
              served->name, info->device, weight_type_name(info->weights), info->n_slots,
              info->slot_bytes, server->address);
}

int serve_main(const struct settings *settings, struct team *team) {
    static struct server server; /* outlives a loader thread that a signal leaves behind */
    struct auth *auth = NULL;
    int listen_fd = -1, status = 1;
    char msg[512];
    server.settings = settings;
    server.team = team;
    raise_file_limit(settings->max_connections);
    if (auth_new(&auth, settings->api_key, msg, sizeof msg) != OK ||
        listen_on(settings, &listen_fd, server.address, sizeof server.address, msg, sizeof msg) !=
            OK ||
        http_open(&server.http, settings, auth, listen_fd, msg, sizeof msg) != OK) {
        fprintf(stderr, "urchin: %s\n", msg);
        auth_free(auth);
        return 1;
    }
    log_event(LOG_INFO, "listening", "address=%s model=%s", server.address,
              settings->model ? settings->model : "(default)");
    if (pthread_create(&server.loader, NULL, load_and_tell, &server) != 0) {
        fprintf(stderr, "urchin: no thread could be started to load the model\n");
        http_close(&server.http);
        auth_free(auth);
        return 1;
    }
    http_run(&server.http, announce, &server);
    enum phase phase = atomic_load(&server.http.phase);
    if (phase == PHASE_LOADING) { /* the loader still uses all of it, and ends with the process */
        log_event(LOG_INFO, "stopped", "before the model was loaded");
        return 0;
    }
    http_close(&server.http);
    pthread_join(server.loader, NULL);
    sched_free(server.http.served.sched);
    model_close(server.http.served.model);
    auth_free(auth);
    if (phase == PHASE_FAILED) {
        fprintf(stderr, "urchin: %s\n", server.msg);
    } else {
        log_event(LOG_INFO, "stopped", "all requests have ended");
        status = 0;
    }
    return status;
}
