/* log.c - one write(2) a line. */
#include "config/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 16384 };

static enum log_level least_level = LOG_INFO;
static bool as_json;

void log_configure(enum log_level least, bool json) {
    least_level = least;
    as_json = json;
}

/* Length of the UTF-8 character at s, 0: none begins here (RFC 3629: shortest form, no surrogates,
 * up to U+10FFFF). */
static int utf8_length(const unsigned char *s) {
    int n = s[0] < 0x80   ? 1
            : s[0] < 0xc2 ? 0
            : s[0] < 0xe0 ? 2
            : s[0] < 0xf0 ? 3
            : s[0] < 0xf5 ? 4
                          : 0;
    for (int i = 1; i < n; i++)
        if (s[i] >> 6 != 2) return 0; /* the terminating NUL among them */
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f)) return 0;
    if ((s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f)) return 0;
    return n;
}

/* Whatever a client sent becomes one line of valid UTF-8 without control characters (C0, DEL, C1,
 * and the line ends U+2028 and U+2029), and inside a JSON string stays inside. */
static void escape(char *out, size_t room, const char *in) {
    const unsigned char *s = (const unsigned char *)in;
    size_t n = 0;
    while (*s && n + 7 < room) { /* the longest is \uXXXX */
        int len = utf8_length(s);
        unsigned code = len == 2   ? (s[0] & 0x1fu) << 6 | (s[1] & 0x3fu)
                        : len == 3 ? (s[0] & 0xfu) << 12 | (s[1] & 0x3fu) << 6 | (s[2] & 0x3fu)
                                   : s[0];
        if (!len) code = 0xfffd;
        if (as_json && (code == '"' || code == '\\')) out[n++] = '\\';
        if (!len || code < 0x20 || (code >= 0x7f && code < 0xa0) || (code | 1) == 0x2029) {
            n += (size_t)snprintf(out + n, room - n, "\\u%04x", code);
        } else {
            memcpy(out + n, s, (size_t)len);
            n += (size_t)len;
        }
        s += len ? len : 1;
    }
    out[n] = 0;
}

void log_event(enum log_level level, const char *event, const char *format, ...) {
    static const char *const names[2][4] = {{"DEBUG", "INFO", "WARN", "ERROR"},
                                            {"debug", "info", "warn", "error"}};
    if (level < least_level) return;
    char detail[LINE_MAX_BYTES / 4], safe[LINE_MAX_BYTES / 2], line[LINE_MAX_BYTES],
        when[32]; /* longer ones are cut */
    va_list args;
    va_start(args, format);
    vsnprintf(detail, sizeof detail, format, args);
    va_end(args);
    escape(safe, sizeof safe, detail);
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &utc);
    int n = snprintf(
        line, sizeof line,
        as_json ? "{\"time\":\"%s.%03ldZ\",\"level\":\"%s\",\"event\":\"%s\",\"detail\":\"%s\"}\n"
                : "%s.%03ldZ %s %s %s\n",
        when, now.tv_nsec / 1000000, names[as_json][level], event, safe);
    if (n > 0 && write(STDERR_FILENO, line, (size_t)n) < 0) return; /* nowhere left to complain */
}
