/* mapped.h - whole files mapped read-only into memory. */
#ifndef URCHIN_MODEL_MAPPED_H
#define URCHIN_MODEL_MAPPED_H

#include "config/err.h"
#include <stddef.h>

struct mapped {
    const void *bytes; /* len bytes; NULL only when len is 0 */
    size_t len;
};

/* ERR_IO: path cannot be opened, or is no regular file. */
enum err mapped_open(struct mapped *out, const char *path, char *msg, size_t msg_len);
void mapped_close(struct mapped *file); /* twice is fine */

#endif
