/* run.h - `urchin run MODEL [PROMPT]`: a streamed answer without a server.
 *
 * No prompt: on a terminal a chat, else the prompt is read from standard input.  The chat keeps the
 * sequence's state and reads only what is new: turn 1,000 costs what turn 1 did. */
#ifndef URCHIN_SERVER_RUN_H
#define URCHIN_SERVER_RUN_H

#include "compute/team.h"
#include "config/settings.h"

bool run_is_chat(const struct settings *settings); /* no prompt, and a terminal to ask for one */

/* SIGINT must be blocked in all threads before a chat.  Returns the process's exit status: 0, or 1
 * after one sentence on stderr. */
int run_main(const struct settings *settings, struct team *team);

#endif
