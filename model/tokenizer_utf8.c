/* tokenizer_utf8.c - UTF-8 that may be broken or unfinished. */
#include "model/tokenizer_impl.h"

#include <stdlib.h>
#include <string.h>

/* Unicode 15, table 3-7: after some lead bytes the second byte is bounded more tightly, which keeps
 * out overlong forms, surrogates and everything past U+10FFFF. */
enum utf8_state utf8_next(const char *text, size_t len, size_t *n_bytes) {
    const unsigned char *p = (const unsigned char *)text;
    *n_bytes = 1;
    if (p[0] < 0x80) return UTF8_VALID;
    if (p[0] < 0xC2 || p[0] > 0xF4) return UTF8_INVALID;
    size_t need = p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
    for (; *n_bytes < need; ++*n_bytes) {
        if (*n_bytes == len) return UTF8_CUT;
        unsigned char low = 0x80, high = 0xBF;
        if (*n_bytes == 1) {
            if (p[0] == 0xE0) low = 0xA0;
            if (p[0] == 0xED) high = 0x9F;
            if (p[0] == 0xF0) low = 0x90;
            if (p[0] == 0xF4) high = 0x8F;
        }
        if (p[*n_bytes] < low || p[*n_bytes] > high) return UTF8_INVALID;
    }
    return UTF8_VALID;
}

size_t utf8_valid_run(const char *text, size_t len) {
    size_t i = 0, n;
    while (i < len && utf8_next(text + i, len - i, &n) == UTF8_VALID)
        i += n;
    return i;
}

size_t utf8_whole(const char *text, size_t len) {
    /* Continuation bytes are never lead bytes, so only the last lead byte can begin an unfinished
     * character. */
    for (size_t back = 1; back <= 3 && back <= len; back++) {
        const char *p = text + len - back;
        if ((*p & 0xC0) == 0x80) continue;
        size_t n;
        return utf8_next(p, back, &n) == UTF8_CUT ? len - back : len;
    }
    return len;
}

enum err utf8_repair(const char *text, size_t len, char **out, size_t *out_len) {
    struct bytes b = {0};
    if (!bytes_reserve(&b, len)) return ERR_NOMEM;
    for (size_t i = 0; i < len;) {
        size_t n = utf8_valid_run(text + i, len - i);
        bool ok = bytes_add(&b, text + i, n);
        i += n;
        if (ok && i < len) {
            utf8_next(text + i, len - i, &n);
            ok = bytes_add(&b, "\xEF\xBF\xBD", 3);
            i += n;
        }
        if (!ok) {
            free(b.data);
            return ERR_NOMEM;
        }
    }
    b.data[b.len] = 0;
    *out = b.data;
    *out_len = b.len;
    return OK;
}

/* White_Space of PropList.txt, as UTF-8. */
size_t utf8_space_at(const char *text, size_t len) {
    const unsigned char *p = (const unsigned char *)text;
    if (len >= 1 && (p[0] == ' ' || (p[0] >= 0x09 && p[0] <= 0x0D))) return 1;
    if (len >= 2 && p[0] == 0xC2 && (p[1] == 0x85 || p[1] == 0xA0)) return 2;
    if (len < 3) return 0;
    bool space = (p[0] == 0xE1 && p[1] == 0x9A && p[2] == 0x80) ||                 /* 1680 */
                 (p[0] == 0xE2 && p[1] == 0x80 && p[2] >= 0x80 && p[2] <= 0x8A) || /* 2000-200A */
                 (p[0] == 0xE2 && p[1] == 0x80 && (p[2] == 0xA8 || p[2] == 0xA9 || p[2] == 0xAF)) ||
                 (p[0] == 0xE2 && p[1] == 0x81 && p[2] == 0x9F) || /* 205F */
                 (p[0] == 0xE3 && p[1] == 0x80 && p[2] == 0x80);   /* 3000 */
    return space ? 3 : 0;
}

size_t utf8_space_before(const char *text, size_t len) {
    for (size_t n = 1; n <= 3 && n <= len; n++)
        if (utf8_space_at(text + len - n, n) == n) return n;
    return 0;
}
