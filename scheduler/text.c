/* text.c - see text.h. */
#include "scheduler/text.h"

#include "model/tokenizer.h"

#include <stdlib.h>
#include <string.h>

enum err stop_string_init(struct stop_string *s, const char *text, size_t len) {
    *s = (struct stop_string){.text = text, .len = len, .border = calloc(len, sizeof *s->border)};
    if (!s->border) return ERR_NOMEM;
    for (uint32_t i = 1, k = 0; i < len; i++) {
        while (k && text[i] != text[k])
            k = s->border[k - 1];
        k += text[i] == text[k];
        s->border[i] = k;
    }
    return OK;
}

void stop_string_free(struct stop_string *s) {
    free(s->border);
}

enum err text_init(struct text *t, int n_stops) {
    *t = (struct text){.room = 64};
    t->bytes = malloc(t->room);
    t->matched = calloc((size_t)n_stops + 1, sizeof *t->matched);
    if (t->bytes && t->matched) return OK;
    text_free(t);
    return ERR_NOMEM;
}

void text_free(struct text *t) {
    free(t->bytes);
    free(t->matched);
    *t = (struct text){0};
}

/* One byte further; true when s is complete. */
static bool advance(const struct stop_string *s, uint32_t *matched, char byte) {
    while (*matched && s->text[*matched] != byte)
        *matched = s->border[*matched - 1];
    *matched += s->text[*matched] == byte;
    return *matched == s->len;
}

enum err text_append(struct text *t, const struct stop_string *stops, int n_stops,
                     const char *bytes, size_t n, bool armed, bool include_stop, int *fired) {
    *fired = -1;
    if (t->len + n > t->room) {
        size_t room = 2 * (t->len + n);
        char *grown = realloc(t->bytes, room);
        if (!grown) return ERR_NOMEM;
        t->bytes = grown;
        t->room = room;
    }
    for (size_t i = 0; i < n; i++) {
        t->bytes[t->len++] = bytes[i];
        for (int k = 0; k < n_stops; k++) {
            if (!advance(&stops[k], &t->matched[k], bytes[i])) continue;
            if (!armed)
                t->matched[k] = stops[k].border[stops[k].len - 1];
            else if (*fired < 0 || stops[k].len > stops[*fired].len)
                *fired = k;
        }
        if (*fired >= 0) {
            if (!include_stop) t->len -= stops[*fired].len;
            return OK;
        }
    }
    return OK;
}

size_t text_ready(const struct text *t, int n_stops) {
    size_t held = 0;
    for (int k = 0; k < n_stops; k++)
        if (t->matched[k] > held) held = t->matched[k];
    return utf8_whole(t->bytes, t->len - held);
}

void text_take(struct text *t, size_t n) {
    memmove(t->bytes, t->bytes + n, t->len - n);
    t->len -= n;
    t->shown += (int64_t)n;
}
