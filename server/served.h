/* served.h - the model that is being served, as requests see it.  Filled once loading is done,
 * immutable after. */
#ifndef URCHIN_SERVER_SERVED_H
#define URCHIN_SERVER_SERVED_H

#include "config/settings.h"
#include "model/model.h"
#include "scheduler/scheduler.h"

#include <cjson/cJSON.h>

struct served {
    struct model *model; /* info, tokenizer and chat only; the scheduler owns the rest */
    struct sched *sched;
    const char *name;     /* --served-model-name, else the model's own */
    int64_t created;      /* unix seconds */
    char fingerprint[24]; /* system_fingerprint: of name, base, weights and version */
    bool log_prompts;
};

/* Sets name, created and fingerprint; model and sched are there. */
void served_describe(struct served *s, const struct settings *settings);

/* What the model is: for /v1/models and `urchin info --json`. */
cJSON *served_meta(const struct model *model);

#endif
