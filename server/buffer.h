/* buffer.h - a growing piece of text, and texts as JSON. */
#ifndef URCHIN_SERVER_BUFFER_H
#define URCHIN_SERVER_BUFFER_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>

struct buffer {
    char *bytes; /* owned, len of them */
    size_t len, room;
    bool failed; /* an append found no memory: the text is incomplete */
};

void buffer_append(struct buffer *t, const char *bytes, size_t len);
void buffer_drop(struct buffer *t, size_t n); /* the first n bytes */
void buffer_free(struct buffer *t);

/* A JSON string of any bytes: invalid UTF-8 becomes U+FFFD, NUL is kept (cJSON's own strings would
 * end there). NULL: no memory. */
cJSON *json_text(const char *bytes, size_t len);

/* Adds item to object under a name that lives for ever (a literal); an item that is NULL for lack
 * of memory is skipped. */
void json_add(cJSON *object, const char *name, cJSON *item);

#endif
