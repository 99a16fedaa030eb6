/* info.h - `urchin info MODEL`: architecture, attention, slot size, capacity. */
#ifndef URCHIN_SERVER_INFO_H
#define URCHIN_SERVER_INFO_H

#include "compute/team.h"
#include "config/settings.h"

/* Returns the process's exit status: 0, or 1 after one sentence on stderr. */
int info_main(const struct settings *settings, struct team *team);

#endif
