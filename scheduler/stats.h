/* stats.h - histograms and smoothed rates.  Private to the scheduler. */
#ifndef URCHIN_SCHEDULER_STATS_H
#define URCHIN_SCHEDULER_STATS_H

#include "scheduler/scheduler.h"

double seconds_now(void); /* monotonic */

void histogram_add(struct histogram *h, const double *bounds, double value);

/* Events per second of the last `span` seconds or so: an exponential average that is right from the
 * first second on. */
struct rate {
    double span, events, seconds; /* the latter two: what is remembered, at most span seconds */
};
void rate_add(struct rate *r, double events, double seconds);

#endif
