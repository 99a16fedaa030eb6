/* metrics.h - /metrics: Prometheus' text format 0.0.4, prefix urchin_, names with vLLM's meaning
 * where it has one. */
#ifndef URCHIN_SERVER_METRICS_H
#define URCHIN_SERVER_METRICS_H

#include "server/http.h"

/* malloc'd text; NULL: no memory.  Before the model is there only the process's own numbers are
 * given. */
char *metrics_text(struct http *h, size_t *len);

#endif
