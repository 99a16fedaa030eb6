/* eval.h - `urchin eval`: what a conversion, a weight format or a code change costs.
 *
 *   urchin eval MODEL --text FILE[,FILE...] [--against BASE] [--tests perplexity,stream,passkey] [--json]
 *
 * Opens MODEL (and BASE) itself, reads the texts, prints a table (or one JSON object) on stdout and
 * progress on stderr.  Returns the process's exit status: 0, or 1 after one sentence on stderr. */
#ifndef URCHIN_CONVERT_EVAL_H
#define URCHIN_CONVERT_EVAL_H

#include "compute/team.h"
#include "config/settings.h"

int eval_main(const struct settings *settings, struct team *team);

#endif
