/* serve.h - `urchin serve`: the model behind OpenAI's API. */
#ifndef URCHIN_SERVER_SERVE_H
#define URCHIN_SERVER_SERVE_H

#include "compute/team.h"
#include "config/settings.h"

/* Listens at once and loads the model meanwhile.  Returns the process's exit status when a signal
 * ends it: 0, or 1 after one sentence on stderr.  SIGTERM, SIGINT and SIGHUP must be blocked in all
 * threads. */
int serve_main(const struct settings *settings, struct team *team);

#endif
