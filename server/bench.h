/* bench.h - `urchin bench`: the engine's speed without HTTP or sampling, in llama-bench's terms.
 *
 *   urchin bench MODEL [--n-prompt 512] [--n-gen 128] [--depth 0,1024] [--batch 1,8,32] [--json]
 *
 * Opens MODEL itself and prints a table (or one JSON object) on stdout.  Returns the process's exit
 * status: 0, or 1 after one sentence on stderr. */
#ifndef URCHIN_SERVER_BENCH_H
#define URCHIN_SERVER_BENCH_H

#include "compute/team.h"
#include "config/settings.h"

int bench_main(const struct settings *settings, struct team *team);

#endif
