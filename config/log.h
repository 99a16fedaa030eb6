/* log.h - one line per event on stderr, as text or JSON.
 *
 *   log_event(LOG_INFO, "model_loaded", "model=%s bytes=%zu", name, bytes);
 *
 * prints   2026-11-24T01:02:03.456Z INFO model_loaded model=x bytes=1
 * or       {"time":"2026-11-24T01:02:03.456Z","level":"info","event":"model_loaded","detail":"model=x bytes=1"}
 *
 * Control characters in the detail are escaped in both forms, so a client's bytes cannot forge a
 * line.  Prompts and answers are never passed here unless the user asked for it (--log-prompts).
 * Safe from any thread: one write(2) a line. */
#ifndef URCHIN_CONFIG_LOG_H
#define URCHIN_CONFIG_LOG_H

#include <stdbool.h>

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

/* Called once at start, before threads exist.  Until then: LOG_INFO, text. */
void log_configure(enum log_level least, bool json);

__attribute__((format(printf, 3, 4))) void log_event(enum log_level level, const char *event,
                                                     const char *format, ...);

#endif
