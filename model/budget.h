/* budget.h - how much memory this process may still take. */
#ifndef URCHIN_MODEL_BUDGET_H
#define URCHIN_MODEL_BUDGET_H

#include <stddef.h>

/* Bytes: MemAvailable of /proc/meminfo, or less where a cgroup (v2 or v1) allows less. 1 GiB where
 * neither can be read. */
size_t budget_available(void);

#endif
