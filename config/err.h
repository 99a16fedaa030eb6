/* err.h - error codes of every fallible function, and the one sentence that goes with them.
 *
 * Results go through an out pointer that is written only on OK.  Where a user can be at fault
 * (settings, file, request) the function also takes msg, msg_len and writes one sentence that
 * names the file, tensor, field or flag; msg may be NULL. */
#ifndef URCHIN_CONFIG_ERR_H
#define URCHIN_CONFIG_ERR_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum err {
    OK = 0,
    ERR_ARG = -1,     /* a value is unusable: the caller broke the contract, or a user's setting */
    ERR_NOMEM = -2,   /* host or device memory; nothing changed, the request may be retried */
    ERR_FORMAT = -3,  /* a file or request is malformed */
    ERR_BUSY = -4,    /* the queue is full: HTTP 429 */
    ERR_NO_CUDA = -5, /* built or running without a GPU */
    ERR_DEVICE = -6,  /* the CUDA context is lost, every later call fails: go unhealthy, restart */
    ERR_IO = -7,      /* a file or socket could not be opened, read or written */
};

/* Writes the formatted sentence into msg (cut at msg_len, always terminated; msg may be NULL) and
 * returns code, so that `return err_set(msg, msg_len, ERR_FORMAT, "...")` reads well. */
__attribute__((format(printf, 4, 5))) enum err err_set(char *msg, size_t msg_len, enum err code,
                                                       const char *format, ...);

const char *err_name(enum err e); /* "ERR_ARG"; static */

#ifdef __cplusplus
}
#endif

#endif
