/* stats.c - see stats.h. */
#include "scheduler/stats.h"

#include <math.h>
#include <time.h>

/* Fine below 10 ms, where vLLM's have nothing: a small model's steps take 1 to 10 ms. */
const double sched_seconds_bounds[SCHED_BUCKETS] = {0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03,
                                                    0.06,   0.12,  0.25,  0.5,   1,     2.5,   5,
                                                    10,     20,    40,    160,   640,   2560};
const double sched_tokens_bounds[SCHED_BUCKETS] = {1,     2,     4,     8,      16,     32,    64,
                                                   128,   256,   512,   1024,   2048,   4096,  8192,
                                                   16384, 32768, 65536, 131072, 262144, 524288};

double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void histogram_add(struct histogram *h, const double *bounds, double value) {
    int i = 0;
    while (i < SCHED_BUCKETS && value > bounds[i])
        i++;
    h->count[i]++;
    h->sum += value;
}

void rate_add(struct rate *r, double events, double seconds) {
    double keep = exp(-seconds / r->span);
    r->events = r->events * keep + events;
    r->seconds = r->seconds * keep + r->span * (1 - keep);
}
