/* json.h - reading JSON files and texts; the one place besides server and convert that knows cJSON.
 * Nodes are borrowed from the document that json_parse/json_load returned, until json_free. */
#ifndef URCHIN_CONFIG_JSON_H
#define URCHIN_CONFIG_JSON_H

#include "config/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct json; /* a node; the root is the document */

/* name is used in messages.  ERR_FORMAT with line and column of the fault; trailing bytes other than white space are a fault;
 * nesting is limited to 128; embedded NUL bytes are a fault. */
enum err json_parse(struct json **out, const char *text, size_t len, const char *name, char *msg,
                    size_t msg_len);
enum err json_load(struct json **out, const char *path, char *msg, size_t msg_len); /* at most 256 MiB */
void json_free(struct json *root); /* NULL is fine */

enum json_type { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT };
enum json_type json_type(const struct json *node); /* NULL counts as JSON_NULL */

const struct json *json_get(const struct json *object, const char *key); /* first of that name, case-sensitive; NULL: none (or not an object) */
const struct json *json_child(const struct json *node); /* first element or member, NULL: none.  Walk with json_next: O(1) a step */
const struct json *json_next(const struct json *node);
const char *json_key(const struct json *member);
int json_size(const struct json *node); /* elements or members; O(n) */

const char *json_string(const struct json *node);                     /* NULL unless a string */
double json_number(const struct json *node, double otherwise);        /* otherwise unless a number */
bool json_int(const struct json *node, int64_t *out);                 /* false unless a whole number within +-2^53 */
bool json_bool(const struct json *node, bool otherwise);

#endif
