/* text.h - from the bytes of tokens to text that may be shown: whole UTF-8 characters, and nothing
 * that may turn out to be the beginning of a stop string.
 *
 * Bytes are matched one at a time (Knuth, Morris, Pratt 1977), so the result depends on the text
 * alone, never on where one token ends and the next begins: the stop string that is complete first
 * fires, and of those complete at the same byte the longest.  What is held back is the longest
 * suffix that is a prefix of a stop string: the automaton's own state. Private to the scheduler. */
#ifndef URCHIN_SCHEDULER_TEXT_H
#define URCHIN_SCHEDULER_TEXT_H

#include "config/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct stop_string {
    const char *text; /* borrowed */
    size_t len;       /* >= 1 */
    uint32_t *border; /* owned [len]: of the first i + 1 bytes, the longest proper prefix that is a
                         suffix too */
};
enum err stop_string_init(struct stop_string *s, const char *text, size_t len);
void stop_string_free(struct stop_string *s);

struct text {
    char *bytes; /* owned; not shown yet */
    size_t len, room;
    int64_t shown;     /* bytes taken so far */
    uint32_t *matched; /* owned [n_stops] */
};
enum err text_init(struct text *t, int n_stops);
void text_free(struct text *t);

/* Appends bytes; nothing may be appended after a stop string fired.  When armed and a stop string
 * is completed, returns its index in *fired (else -1), and the text ends there: cut off before it,
 * or behind it when include_stop.  ERR_NOMEM. */
enum err text_append(struct text *t, const struct stop_string *stops, int n_stops,
                     const char *bytes, size_t n, bool armed, bool include_stop, int *fired);

/* How many bytes may be shown now; text_take(n) removes them. */
size_t text_ready(const struct text *t, int n_stops);
void text_take(struct text *t, size_t n);

#endif
