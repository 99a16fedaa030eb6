/* reader.h - the thread that reads large requests.
 *
 * JSON and tokens of a body of megabytes take seconds.  Taken by the server's one thread, all
 * streams would stand still for them; so it hands such exchanges, suspended, to this thread, which
 * takes them one after the other. */
#ifndef URCHIN_SERVER_READER_H
#define URCHIN_SERVER_READER_H

#include "config/err.h"

struct exchange; /* exchange.h */

struct reader;
enum err reader_new(struct reader **out);              /* ERR_NOMEM: no memory, or no thread */
void reader_put(struct reader *r, struct exchange *x); /* exchange_read(x) will be called there */
void reader_free(struct reader *r); /* NULL is fine; nothing it was given may still be unread */

#endif
