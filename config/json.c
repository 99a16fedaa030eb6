/* json.c - cJSON behind a narrow door: it is lenient about NUL bytes, control characters and depth,
 * so one pass over the text checks those first. */
#include "config/json.h"

#include <cjson/cJSON.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_DEPTH = 128, MAX_FILE_BYTES = 256 << 20 };

static const cJSON *inner(const struct json *node) {
    return (const cJSON *)node;
}
static const struct json *outer(const cJSON *node) {
    return (const struct json *)node;
}

static enum err fault(const char *text, size_t at, const char *name, const char *what, char *msg,
                      size_t msg_len) {
    size_t line = 1, column = 1;
    for (size_t i = 0; i < at; i++) {
        column++;
        if (text[i] == '\n') line++, column = 1;
    }
    return err_set(msg, msg_len, ERR_FORMAT, "%s: %s at line %zu, column %zu", name, what, line,
                   column);
}

/* What cJSON would let pass: NUL bytes (raw or escaped, they would cut a string short), raw control
 * characters in strings, and nesting deep enough to exhaust the stack.  NULL: none found. */
static const char *find_fault(const char *text, size_t len, size_t *at) {
    bool in_string = false;
    int depth = 0;
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)text[i];
        *at = i;
        if (c == 0) return "a NUL byte";
        if (in_string) {
            if (c == '"') in_string = false;
            if (c < 0x20) return "a control character in a string";
            if (c == '\\') {
                if (len - i >= 6 && memcmp(text + i, "\\u0000", 6) == 0) return "a NUL character";
                if (i + 1 < len && text[i + 1] != 0) i++;
            }
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            if (++depth > MAX_DEPTH) return "nesting deeper than 128";
        } else if (c == '}' || c == ']') {
            depth--;
        }
    }
    *at = len;
    return in_string ? "a string that does not end" : NULL;
}

/* text[len] is NUL: cJSON before 1.7.18 reads one byte past an unterminated text. */
static enum err parse_terminated(struct json **out, const char *text, size_t len, const char *name,
                                 char *msg, size_t msg_len) {
    size_t at = 0;
    const char *what = find_fault(text, len, &at);
    if (what) return fault(text, at, name, what, msg, msg_len);
    const char *end = text;
    cJSON *root = cJSON_ParseWithLengthOpts(text, len + 1, &end, true);
    if (!root) {
        at = end >= text && end <= text + len ? (size_t)(end - text) : len;
        return fault(text, at, name, at == len ? "the JSON text ends too early" : "not valid JSON",
                     msg, msg_len);
    }
    *out = (struct json *)root;
    return OK;
}

enum err json_parse(struct json **out, const char *text, size_t len, const char *name, char *msg,
                    size_t msg_len) {
    char *copy = malloc(len + 1);
    if (!copy) return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", name);
    if (len) memcpy(copy, text, len);
    copy[len] = 0;
    enum err e = parse_terminated(out, copy, len, name, msg, msg_len);
    free(copy);
    return e;
}

enum err json_load(struct json **out, const char *path, char *msg, size_t msg_len) {
    char *text = NULL;
    enum err e;
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe is refused, not waited for */
    FILE *file = fd < 0 ? NULL : fdopen(fd, "rb");
    if (!file) return err_set(msg, msg_len, ERR_IO, "%s: %m", path);
    if (fstat(fileno(file), &st) != 0 || !S_ISREG(st.st_mode)) {
        e = err_set(msg, msg_len, ERR_IO, "%s: not a regular file", path);
    } else if (st.st_size > MAX_FILE_BYTES) {
        e = err_set(msg, msg_len, ERR_FORMAT, "%s: larger than 256 MiB", path);
    } else if (!(text = malloc((size_t)st.st_size + 1))) {
        e = err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", path);
    } else {
        size_t len = fread(text, 1, (size_t)st.st_size, file);
        text[len] = 0;
        e = ferror(file) ? err_set(msg, msg_len, ERR_IO, "%s: %m", path)
                         : parse_terminated(out, text, len, path, msg, msg_len);
    }
    free(text);
    fclose(file);
    return e;
}

void json_free(struct json *root) {
    cJSON_Delete((cJSON *)root);
}

enum json_type json_type(const struct json *node) {
    if (cJSON_IsBool(inner(node))) return JSON_BOOL;
    if (cJSON_IsNumber(inner(node))) return JSON_NUMBER;
    if (cJSON_IsString(inner(node))) return JSON_STRING;
    if (cJSON_IsArray(inner(node))) return JSON_ARRAY;
    if (cJSON_IsObject(inner(node))) return JSON_OBJECT;
    return JSON_NULL;
}

const struct json *json_get(const struct json *object, const char *key) {
    if (!cJSON_IsObject(inner(object))) return NULL;
    return outer(cJSON_GetObjectItemCaseSensitive(inner(object), key));
}

const struct json *json_child(const struct json *node) {
    return node ? outer(inner(node)->child) : NULL;
}

const struct json *json_next(const struct json *node) {
    return node ? outer(inner(node)->next) : NULL;
}

const char *json_key(const struct json *member) {
    return member ? inner(member)->string : NULL;
}

int json_size(const struct json *node) {
    int n = 0;
    for (const struct json *c = json_child(node); c; c = json_next(c))
        n++;
    return n;
}

const char *json_string(const struct json *node) {
    return cJSON_IsString(inner(node)) ? inner(node)->valuestring : NULL;
}

double json_number(const struct json *node, double otherwise) {
    if (!cJSON_IsNumber(inner(node)) || !isfinite(inner(node)->valuedouble)) return otherwise;
    return inner(node)->valuedouble; /* 1e999 is no number one can use */
}

bool json_int(const struct json *node, int64_t *out) {
    double x = json_number(node, NAN);
    if (!(fabs(x) <= 0x1p53) || x != floor(x)) return false;
    *out = (int64_t)x;
    return true;
}

bool json_bool(const struct json *node, bool otherwise) {
    return cJSON_IsBool(inner(node)) ? cJSON_IsTrue(inner(node)) : otherwise;
}
