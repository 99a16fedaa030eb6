/* memory.h - big zeroed blocks in huge pages where the system offers them. */
#ifndef URCHIN_COMPUTE_MEMORY_H
#define URCHIN_COMPUTE_MEMORY_H

#include <stddef.h>

/* bytes of zeroed anonymous memory, 64-byte aligned (2 MiB aligned and madvise(MADV_HUGEPAGE) from
 * 2 MiB up).  NULL when there is none.  Release with memory_unmap(p, bytes), the same bytes. */
void *memory_map(size_t bytes);
void memory_unmap(void *p, size_t bytes); /* NULL is fine */

#endif
