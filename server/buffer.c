/* buffer.c - growing text and JSON strings. */
#include "server/buffer.h"

#include "model/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void buffer_append(struct buffer *t, const char *bytes, size_t len) {
    if (t->failed || len == 0) return;
    if (len > t->room - t->len) {
        size_t room = t->room ? t->room : 256;
        while (room - t->len < len)
            room *= 2;
        char *more = realloc(t->bytes, room);
        if (!more) {
            t->failed = true;
            return;
        }
        t->bytes = more;
        t->room = room;
    }
    memcpy(t->bytes + t->len, bytes, len);
    t->len += len;
}

void buffer_drop(struct buffer *t, size_t n) {
    t->len -= n;
    if (t->len) memmove(t->bytes, t->bytes + n, t->len);
}

void buffer_free(struct buffer *t) {
    free(t->bytes);
    *t = (struct buffer){0};
}

/* bytes is valid UTF-8 here. */
static void append_escaped(struct buffer *out, const char *bytes, size_t len) {
    static const char special[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
    size_t from = 0;
    buffer_append(out, "\"", 1);
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)bytes[i];
        if (c >= 0x20 && c != '"' && c != '\\') continue;
        char escape[8];
        const char *at = c ? strchr(special, c) : NULL;
        int n = at ? snprintf(escape, sizeof escape, "\\%c", letter[at - special])
                   : snprintf(escape, sizeof escape, "\\u%04x", c);
        buffer_append(out, bytes + from, i - from);
        buffer_append(out, escape, (size_t)n);
        from = i + 1;
    }
    buffer_append(out, bytes + from, len - from);
    buffer_append(out, "\"", 2); /* and the NUL */
}

cJSON *json_text(const char *bytes, size_t len) {
    char *valid;
    size_t valid_len;
    if (utf8_repair(bytes, len, &valid, &valid_len) != OK) return NULL;
    struct buffer escaped = {0};
    append_escaped(&escaped, valid, valid_len);
    cJSON *item = escaped.failed ? NULL : cJSON_CreateRaw(escaped.bytes);
    buffer_free(&escaped);
    free(valid);
    return item;
}

void json_add(cJSON *object, const char *name, cJSON *item) {
    if (!cJSON_AddItemToObjectCS(object, name, item)) cJSON_Delete(item);
}
