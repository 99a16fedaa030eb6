/* fields.c - null means absent, a wrong type or range is a 400 that names the field. */
#include "server/fields.h"

#include <float.h>
#include <stdarg.h>
#include <stdio.h>

static const char *type_of_status(int status) {
    switch (status) {
    case 401:
        return "authentication_error";
    case 429:
        return "rate_limit_error";
    case 503:
        return "unavailable_error";
    default:
        return status >= 500 ? "server_error" : "invalid_request_error";
    }
}

bool api_fail(struct api_error *e, int status, const char *code, const char *param,
              const char *format, ...) {
    *e = (struct api_error){.status = status, .type = type_of_status(status), .code = code};
    snprintf(e->param, sizeof e->param, "%s", param ? param : "");
    va_list args;
    va_start(args, format);
    vsnprintf(e->message, sizeof e->message, format, args);
    va_end(args);
    return false;
}

bool api_out_of_memory(struct api_error *e) {
    return api_fail(e, 503, "out_of_memory", NULL, "The server is out of memory, try again.");
}

const char *field_type_name(const struct json *node) {
    static const char *const names[] = {"null",     "a boolean", "a number",
                                        "a string", "an array",  "an object"};
    return names[json_type(node)];
}

bool field_wrong_type(struct api_error *e, const char *name, const char *expected,
                      const struct json *got) {
    return api_fail(e, 400, "invalid_type", name,
                    "Invalid type for '%s': expected %s, but got %s instead.", name, expected,
                    field_type_name(got));
}

const struct json *field_get(const struct json *object, const char *name) {
    const struct json *node = json_get(object, name);
    return json_type(node) == JSON_NULL ? NULL : node;
}

bool field_bool(const struct json *object, const char *name, bool *out, struct api_error *e) {
    const struct json *node = field_get(object, name);
    if (!node) return true;
    if (json_type(node) != JSON_BOOL) return field_wrong_type(e, name, "a boolean", node);
    *out = json_bool(node, false);
    return true;
}

bool field_string(const struct json *object, const char *name, const char **out,
                  struct api_error *e) {
    const struct json *node = field_get(object, name);
    if (!node) return true;
    if (json_type(node) != JSON_STRING) return field_wrong_type(e, name, "a string", node);
    *out = json_string(node);
    return true;
}

bool field_int(const struct json *object, const char *name, int64_t min, int64_t max, int64_t *out,
               struct api_error *e) {
    const struct json *node = field_get(object, name);
    int64_t value;
    if (!node) return true;
    if (json_type(node) != JSON_NUMBER) return field_wrong_type(e, name, "an integer", node);
    if (!json_int(node, &value))
        return api_fail(e, 400, "invalid_type", name,
                        "Invalid type for '%s': expected an integer within 2^53, but got another "
                        "number instead.",
                        name);
    if (value < min)
        return api_fail(e, 400, "integer_below_min_value", name,
                        "Invalid value for '%s': expected at least %lld, but got %lld instead.",
                        name, (long long)min, (long long)value);
    if (value > max)
        return api_fail(e, 400, "integer_above_max_value", name,
                        "Invalid value for '%s': expected at most %lld, but got %lld instead.",
                        name, (long long)max, (long long)value);
    *out = value;
    return true;
}

bool field_number(const struct json *object, const char *name, double min, double max, float *out,
                  struct api_error *e) {
    const struct json *node = field_get(object, name);
    if (!node) return true;
    if (json_type(node) != JSON_NUMBER) return field_wrong_type(e, name, "a number", node);
    double value = json_number(node, DBL_MAX); /* DBL_MAX: 1e999 and its like */
    if (value < min)
        return api_fail(e, 400, "decimal_below_min_value", name,
                        "Invalid value for '%s': expected at least %g, but got %g instead.", name,
                        min, value);
    if (value > max)
        return api_fail(e, 400, "decimal_above_max_value", name,
                        "Invalid value for '%s': expected at most %g, but got %g instead.", name,
                        max, value);
    *out = (float)value;
    return true;
}
