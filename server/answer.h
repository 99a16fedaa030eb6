/* answer.h - one completion or chat completion: a checked request in, OpenAI's objects or
 * server-sent events out.
 *
 * An answer holds a ticket for each prompt being generated (at most as many at once as there are
 * slots; the others wait in the answer) and turns their events into JSON.  A stream serialises
 * events only while its output is short: a reader that is slow leaves them in the ticket, whose
 * limit then pauses the sequence. One thread (the server's) uses an answer; notify comes from the
 * scheduler thread. */
#ifndef URCHIN_SERVER_ANSWER_H
#define URCHIN_SERVER_ANSWER_H

#include "server/request.h"
#include "server/served.h"

#include <sys/types.h>

struct answer;

/* Tokenises, checks what only the model can tell, and submits.  On success *request is taken
 * (zeroed).  false: *e says why (400, 404, 429 with retry_after_s, 503). */
bool answer_new(struct answer **out, struct served *served, struct api_request *request,
                void (*notify)(void *arg), void *arg, struct api_error *e);
void answer_free(struct answer *a); /* cancels what still runs; NULL is fine */

void answer_pull(struct answer *a); /* takes what the scheduler has delivered */
void answer_fail(struct answer *a,
                 const struct api_error *e); /* ends it so that the client sees e */
void answer_cancel(struct answer *a);        /* the client is gone: frees the slots now */
bool answer_done(const struct answer *a);    /* nothing will follow what answer_read still has */
bool answer_began(const struct answer *a);   /* something was delivered: the status is known */
bool answer_waits(const struct answer *a);   /* prompts found the queue full: pull again soon */
bool answer_streams(const struct answer *a);
const struct api_error *
answer_error(const struct answer *a); /* NULL: none; what a response not yet begun should say */
struct sched_usage answer_usage(const struct answer *a);

/* Done and no stream: the body, malloc'd.  NULL: no memory. */
char *answer_body(struct answer *a);

/* A stream: copies up to room bytes of output and drops them; 0: none now, -1: no memory, the
 * stream is broken. */
ssize_t answer_read(struct answer *a, char *out, size_t room);

#endif
