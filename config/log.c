/* log.c - one write(2) a line. */
#include "config/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 8192 };

static enum log_level least_level = LOG_INFO;
static bool as_json;

void log_configure(enum log_level least, bool json) {
    least_level = least;
    as_json = json;
}

static size_t escape(char *out, size_t room, const char *in) {
    size_t n = 0;
    for (; *in && n + 7 < room; in++) {
        unsigned char c = (unsigned char)*in;
        if (as_json && (c == '"' || c == '\\')) {
            out[n++] = '\\';
            out[n++] = (char)c;
        } else if (c < 0x20 || c == 0x7f) {
            n += (size_t)snprintf(out + n, room - n, "\\u%04x", c);
        } else {
            out[n++] = (char)c;
        }
    }
    out[n] = 0;
    return n;
}

void log_event(enum log_level level, const char *event, const char *format, ...) {
    static const char *const names[2][4] = {{"DEBUG", "INFO", "WARN", "ERROR"},
                                            {"debug", "info", "warn", "error"}};
    if (level < least_level) return;
    char detail[LINE_MAX_BYTES / 4], safe[LINE_MAX_BYTES / 2], line[LINE_MAX_BYTES], when[32];
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
    int n = snprintf(line, sizeof line,
                     as_json ? "{\"time\":\"%s.%03ldZ\",\"level\":\"%s\",\"event\":\"%s\",\"detail\":\"%s\"}\n"
                             : "%s.%03ldZ %s %s %s\n",
                     when, now.tv_nsec / 1000000, names[as_json][level], event, safe);
    if (n > 0 && write(STDERR_FILENO, line, (size_t)n) < 0) return; /* nowhere left to complain */
}
