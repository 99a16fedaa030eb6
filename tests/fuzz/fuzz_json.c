/* fuzz_json.c - any bytes as a JSON text: parsed or refused, and the tree walks. */
#include "config/json.h"

#include <stdlib.h>
#include <string.h>

static int64_t walk(const struct json *node) {
    int64_t sum = json_type(node), i;
    if (json_int(node, &i)) sum += i & 1;
    sum += json_number(node, 0) > 0;
    if (json_string(node)) sum += (int64_t)strlen(json_string(node));
    for (const struct json *c = json_child(node); c; c = json_next(c)) {
        if (json_type(node) == JSON_OBJECT && !json_get(node, json_key(c)))
            abort(); /* every member is found by its key */
        sum += walk(c);
    }
    return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct json *root = NULL;
    char msg[200] = "";
    if (json_parse(&root, (const char *)data, size, "fuzz", msg, sizeof msg)) {
        if (!*msg) abort(); /* no sentence */
        return 0;
    }
    volatile int64_t sum = walk(root);
    (void)sum;
    json_free(root);
    return 0;
}
