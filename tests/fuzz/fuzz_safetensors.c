/* fuzz_safetensors.c - any bytes as a safetensors file: whatever is accepted can be looked up and
 * decoded to the last value. */
#include "model/safetensors.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct safetensors *st = NULL;
    char msg[300] = "";
    if (safetensors_open_bytes(&st, data, size, "fuzz", msg, sizeof msg)) {
        if (!*msg) abort(); /* no sentence */
        return 0;
    }
    for (int i = 0; i < safetensors_count(st); i++) {
        const struct st_tensor *t = safetensors_at(st, i);
        float part[64];
        if (safetensors_get(st, t->name) != t) abort();
        for (int64_t at = 0; at < t->n_values; at += 64)
            if (st_decode(part, t, at, t->n_values - at < 64 ? t->n_values - at : 64)) break;
    }
    safetensors_close(st);
    return 0;
}
