/* html.c - a page in memory. */
#include "convert/html.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool grow(struct html *h, size_t more) {
    if (h->failed) return false;
    if (h->len + more + 1 <= h->room) return true;
    size_t room = h->room ? h->room : 1 << 14;
    while (room < h->len + more + 1)
        room *= 2;
    char *bigger = realloc(h->text, room);
    if (!bigger) {
        h->failed = true;
        return false;
    }
    h->text = bigger;
    h->room = room;
    return true;
}

static void append(struct html *h, const char *text, size_t n) {
    if (!grow(h, n)) return;
    memcpy(h->text + h->len, text, n);
    h->len += n;
    h->text[h->len] = 0;
}

void html_put(struct html *h, const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    if (n >= 0 && grow(h, (size_t)n)) {
        vsnprintf(h->text + h->len, (size_t)n + 1, format, again);
        h->len += (size_t)n;
    }
    va_end(again);
    va_end(args);
}

void html_text(struct html *h, const char *text) {
    for (; text && *text; text++) {
        unsigned char c = (unsigned char)*text;
        const char *entity = c == '&'    ? "&amp;"
                             : c == '<'  ? "&lt;"
                             : c == '>'  ? "&gt;"
                             : c == '"'  ? "&quot;"
                             : c == '\'' ? "&#39;"
                                         : NULL;
        if (entity)
            append(h, entity, strlen(entity));
        else if (c == '\n' || c == '\t' || (c >= 0x20 && c != 0x7f))
            append(h, text, 1);
    }
}

void html_number(struct html *h, double x) {
    char digits[64], out[96];
    if (!isfinite(x)) {
        html_put(h, "&ndash;");
        return;
    }
    double size = fabs(x);
    if (x == 0) {
        html_put(h, "0");
    } else if (size < 1e-3 || size >= 1e15) {
        html_put(h, "%.2g", x);
    } else if (size < 1000) {
        int decimals = x == floor(x) ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : size >= 1 ? 3 : 4;
        html_put(h, "%.*f", decimals, x);
    } else {
        int n = snprintf(digits, sizeof digits, "%.0f", size), at = 0;
        if (x < 0) out[at++] = '-';
        for (int i = 0; i < n; i++) {
            if (i && (n - i) % 3 == 0) out[at++] = ',';
            out[at++] = digits[i];
        }
        append(h, out, (size_t)at);
    }
}
