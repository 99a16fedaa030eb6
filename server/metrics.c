/* metrics.c - counters of the scheduler, the HTTP server and the process. */
#include "server/metrics.h"

#include "config/version.h"
#include "server/routes.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

/* jemalloc's, when it is linked. */
extern int mallctl(const char *name, void *old, size_t *old_len, void *new, size_t new_len)
    __attribute__((weak));

static void describe(FILE *out, const char *name, const char *type, const char *help) {
    fprintf(out, "# HELP urchin_%s %s\n# TYPE urchin_%s %s\n", name, help, name, type);
}

static void single(FILE *out, const char *name, const char *type, const char *help,
                   const char *labels, double value) {
    describe(out, name, type, help);
    fprintf(out, "urchin_%s%s%s%s %.17g\n", name, *labels ? "{" : "", labels, *labels ? "}" : "",
            value);
}

static void histogram(FILE *out, const char *name, const char *help, const char *labels,
                      const struct histogram *h, const double *bounds) {
    uint64_t total = 0;
    describe(out, name, "histogram", help);
    for (int i = 0; i < SCHED_BUCKETS; i++) {
        total += h->count[i];
        fprintf(out, "urchin_%s_bucket{%s,le=\"%.15g\"} %llu\n", name, labels, bounds[i],
                (unsigned long long)total);
    }
    total += h->count[SCHED_BUCKETS];
    fprintf(out, "urchin_%s_bucket{%s,le=\"+Inf\"} %llu\n", name, labels,
            (unsigned long long)total);
    fprintf(out, "urchin_%s_sum{%s} %.17g\n", name, labels, h->sum);
    fprintf(out, "urchin_%s_count{%s} %llu\n", name, labels, (unsigned long long)total);
}

/* A label's value: backslash, quote and line end are escaped. */
static void label_value(char *out, size_t room, const char *text) {
    size_t n = 0;
    for (; *text && n + 3 < room; text++) {
        if (*text == '\\' || *text == '"' || *text == '\n') out[n++] = '\\';
        out[n++] = *text == '\n' ? 'n' : *text;
    }
    out[n] = 0;
}

static void write_scheduler(FILE *out, struct served *served) {
    struct sched_stats s;
    char name[256], l[320];
    const struct model_info *info = model_info(served->model);
    sched_stats(served->sched, &s);
    label_value(name, sizeof name, served->name);
    snprintf(l, sizeof l, "model_name=\"%s\"", name);

    single(out, "num_requests_running", "gauge", "Requests that hold slots.", l, s.running);
    single(out, "num_requests_waiting", "gauge", "Requests in the queue.", l, s.waiting);
    single(out, "queue_limit", "gauge", "Requests that may wait.", l, s.queue_limit);
    single(out, "slots", "gauge", "Sequences that fit at once.", l, s.slots);
    single(out, "slots_used", "gauge", "Sequences that hold a slot.", l, s.slots_used);
    single(out, "slots_paused", "gauge", "Sequences that wait for a slow reader.", l,
           s.slots_paused);
    single(out, "slot_bytes", "gauge", "Memory of one sequence, whatever its length.", l,
           (double)info->slot_bytes);
    single(out, "generation_tokens_per_second", "gauge",
           "Tokens generated per second, over about ten seconds.", l, s.tokens_per_s);
    single(out, "healthy", "gauge", "1 until a step fails for good.", l, s.healthy);
    single(out, "prompt_tokens_total", "counter", "Prompt tokens read.", l,
           (double)s.prompt_tokens);
    single(out, "generation_tokens_total", "counter", "Tokens generated.", l,
           (double)s.generation_tokens);
    single(out, "prompt_tokens_cached_total", "counter",
           "Prompt tokens that came from a stored state.", l, (double)s.cached_tokens);
    single(out, "steps_total", "counter", "Steps of the model.", l, (double)s.steps);
    single(out, "requests_rejected_total", "counter",
           "Requests turned away because the queue was full.", l, (double)s.rejected);

    static const char *const reasons[] = {[FINISH_STOP] = "stop",
                                          [FINISH_LENGTH] = "length",
                                          [FINISH_CANCELLED] = "abort",
                                          [FINISH_ERROR] = "error"};
    describe(out, "request_success_total", "counter", "Requests ended, by finish reason.");
    for (int r = FINISH_STOP; r <= FINISH_ERROR; r++)
        fprintf(out, "urchin_request_success_total{%s,finished_reason=\"%s\"} %llu\n", l,
                reasons[r], (unsigned long long)s.finished[r]);

    const double *seconds = sched_seconds_bounds, *tokens = sched_tokens_bounds;
    histogram(out, "time_to_first_token_seconds", "From arrival to the first token.", l,
              &s.time_to_first_token, seconds);
    histogram(out, "inter_token_latency_seconds", "Between two tokens of a sequence.", l,
              &s.inter_token, seconds);
    histogram(out, "e2e_request_latency_seconds", "From arrival to the end.", l, &s.e2e, seconds);
    histogram(out, "request_queue_time_seconds", "Waiting for a slot.", l, &s.queue_time, seconds);
    histogram(out, "request_prefill_time_seconds", "From the slot to the first token.", l,
              &s.prefill_time, seconds);
    histogram(out, "request_decode_time_seconds", "From the first token to the end.", l,
              &s.decode_time, seconds);
    histogram(out, "request_prompt_tokens", "Prompt tokens of a request.", l, &s.prompt_len,
              tokens);
    histogram(out, "request_generation_tokens", "Tokens generated for a request.", l,
              &s.generation_len, tokens);
    histogram(out, "iteration_tokens", "Tokens of one step, prompts and generated together.", l,
              &s.step_tokens, tokens);
}

static const char *label_of(int route) { /* n_routes: paths that are no route */
    return route < n_routes ? routes[route].label : "other";
}

static bool is_first_of_its_label(int route) {
    for (int r = 0; r < route; r++)
        if (strcmp(label_of(r), label_of(route)) == 0) return false;
    return true;
}

static void write_http(FILE *out, struct http *h) {
    static const char *const codes[HTTP_STATUSES] = {
        "200", "204", "400", "401",  "404",   "405",   "413",   "431",
        "429", "500", "503", "none", "other", "other", "other", "other"};
    describe(out, "http_requests_total", "counter",
             "HTTP requests by path and status; none: the client left first.");
    for (int r = 0; r <= n_routes; r++)
        for (int c = 0; c < HTTP_STATUSES && is_first_of_its_label(r); c++) {
            uint64_t n = 0;
            for (int same = r; same <= n_routes; same++)
                if (strcmp(label_of(same), label_of(r)) == 0) n += h->requests[same][c];
            if (n)
                fprintf(out, "urchin_http_requests_total{path=\"%s\",code=\"%s\"} %llu\n",
                        label_of(r), codes[c], (unsigned long long)n);
        }
    single(out, "http_connections", "gauge", "Open client connections.", "", h->n_connections);
}

static long pages_resident(void) {
    long size = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f) return 0;
    if (fscanf(f, "%ld %ld", &size, &resident) != 2) resident = 0;
    fclose(f);
    return resident;
}

static int open_files(void) {
    DIR *dir = opendir("/proc/self/fd");
    int n = -3; /* ".", ".." and this one */
    while (dir && readdir(dir))
        n++;
    if (dir) closedir(dir);
    return n > 0 ? n : 0;
}

static double seconds_of(struct timeval t) {
    return (double)t.tv_sec + (double)t.tv_usec * 1e-6;
}

static void write_process(FILE *out, struct http *h) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    single(out, "build_info", "gauge", "What runs here.", "version=\"" URCHIN_VERSION "\"", 1);
    single(out, "process_start_time_seconds", "gauge", "Start, in unix seconds.", "", h->started);
    single(out, "process_cpu_seconds_total", "counter", "CPU time of user and system.", "",
           seconds_of(u.ru_utime) + seconds_of(u.ru_stime));
    single(out, "process_resident_memory_bytes", "gauge", "Resident memory.", "",
           (double)pages_resident() * (double)sysconf(_SC_PAGESIZE));
    single(out, "process_open_fds", "gauge", "Open file descriptors.", "", open_files());
    if (!mallctl) return;
    static const char *const stats[3] = {"allocated", "active", "resident"};
    uint64_t epoch = 1;
    mallctl("epoch", NULL, NULL, &epoch, sizeof epoch); /* refreshes what follows */
    describe(out, "malloc_bytes", "gauge", "The allocator's own statistics.");
    for (int i = 0; i < 3; i++) {
        char name[32];
        size_t value = 0, size = sizeof value;
        snprintf(name, sizeof name, "stats.%s", stats[i]);
        if (mallctl(name, &value, &size, NULL, 0) == 0)
            fprintf(out, "urchin_malloc_bytes{kind=\"%s\"} %zu\n", stats[i], value);
    }
}

char *metrics_text(struct http *h, size_t *len) {
    char *text = NULL;
    FILE *out = open_memstream(&text, len);
    if (!out) return NULL;
    if (atomic_load(&h->phase) == PHASE_READY) write_scheduler(out, &h->served);
    write_http(out, h);
    write_process(out, h);
    if (fclose(out) == 0) return text;
    free(text);
    return NULL;
}
