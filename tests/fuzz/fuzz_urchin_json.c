/* fuzz_urchin_json.c - any bytes as urchin.json: what is accepted passes or fails attention's own
 * check with a sentence. */
#include "model/converted.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const struct base_config bases[] = {
        {.architecture = BASE_LLAMA,
         .n_layers = 2,
         .hidden_dim = 32,
         .n_heads = 4,
         .n_kv_heads = 2,
         .head_dim = 8,
         .context = 512},
        {.architecture = BASE_GPT2,
         .n_layers = 2,
         .hidden_dim = 32,
         .n_heads = 4,
         .n_kv_heads = 4,
         .head_dim = 8,
         .context = 512},
    };
    for (int i = 0; i < 2; i++) {
        struct converted *c = NULL;
        char msg[300] = "";
        if (converted_open_text(&c, (const char *)data, size, "fuzz", msg, sizeof msg)) {
            if (!*msg) abort(); /* no sentence */
            return 0;
        }
        if (!c->name || (c->is_adapter && !c->base_file)) abort();
        enum err e = converted_lay_over(c, &bases[i], msg, sizeof msg);
        if (!e) e = attention_config_check(&c->attention, msg, sizeof msg);
        if (e && !*msg) abort();
        converted_close(c);
    }
    return 0;
}
