/* fuzz_gguf.c - any bytes as a GGUF file: whatever is accepted can be looked up, decoded to the
 * last byte, and asked for a configuration. */
#include "compute/quant.h"
#include "model/base.h"
#include "model/gguf.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const keys[] = {"general.architecture", "tokenizer.ggml.tokens", "a"};
    struct gguf *g = NULL;
    struct base_config config;
    char msg[300] = "";
    if (gguf_open_bytes(&g, data, size, "fuzz", msg, sizeof msg)) {
        if (!*msg) abort(); /* no sentence */
        return 0;
    }
    for (size_t k = 0; k < sizeof keys / sizeof keys[0]; k++) {
        size_t n = gguf_array_size(g, keys[k]), len = 0;
        double x;
        int64_t i;
        if (gguf_string(g, keys[k], &len) && strlen(gguf_string(g, keys[k], NULL)) > len) abort();
        gguf_int(g, keys[k], &i);
        gguf_double(g, keys[k], &x);
        for (size_t e = 0; e <= n; e++) {
            const char *s = gguf_array_string(g, keys[k], e, &len);
            if (s && len && (s[0] ^ s[len - 1]) == 0x7f) continue; /* reads both ends */
            gguf_array_double(g, keys[k], e, &x);
        }
    }
    for (int i = 0; i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(g, i);
        float block[256];
        if (gguf_tensor(g, t->name) != t) abort();
        size_t n = t->bytes / quant_block_bytes(t->type);
        const char *at = t->data;
        for (size_t b = 0; b < n; b++)
            quant_decode(block, t->type, at + b * quant_block_bytes(t->type),
                         (size_t)quant_block_size(t->type));
    }
    if (base_config_from_gguf(&config, g, "fuzz", msg, sizeof msg) && !*msg) abort();
    gguf_close(g);
    return 0;
}
