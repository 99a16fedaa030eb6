/* fields.h - reading the fields of a JSON body, and the error when one is wrong.
 *
 * Null means absent.  The readers leave *out alone when a field is absent; at a wrong type or range
 * they return false and *e is a 400 that names the field, with OpenAI's codes. */
#ifndef URCHIN_SERVER_FIELDS_H
#define URCHIN_SERVER_FIELDS_H

#include "config/json.h"

/* OpenAI's error object with its HTTP status.  type and code are literals; code NULL and param ""
 * are null on the wire. */
struct api_error {
    int status;
    const char *type, *code;
    char param[64];
    char message[512];
    double retry_after_s; /* > 0: Retry-After */
};

/* Fills *e and returns false, so that `return api_fail(e, ...)` reads well.  param may be NULL. */
__attribute__((format(printf, 5, 6))) bool api_fail(struct api_error *e, int status,
                                                    const char *code, const char *param,
                                                    const char *format, ...);

bool api_out_of_memory(struct api_error *e); /* a 503; false */

const struct json *field_get(const struct json *object,
                             const char *name); /* NULL: absent or null */
bool field_bool(const struct json *object, const char *name, bool *out, struct api_error *e);
bool field_string(const struct json *object, const char *name, const char **out,
                  struct api_error *e); /* borrowed */
bool field_int(const struct json *object, const char *name, int64_t min, int64_t max, int64_t *out,
               struct api_error *e);
bool field_number(const struct json *object, const char *name, double min, double max, float *out,
                  struct api_error *e);

const char *field_type_name(const struct json *node); /* "a string" */
bool field_wrong_type(struct api_error *e, const char *name, const char *expected,
                      const struct json *got);

#endif
