/* fuzz_tokenizer_json.c - any text as tokenizer.json; what opens also tokenises.  A NUL byte parts
 * it from a tokenizer_config.json. */
#include "model/tokenizer.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
    static const char text[] = "Hello  world, it's 12\n<s> <|x|> \xC3\xA9\xE2\x96\x81\xFF a";
    const char *json = (const char *)data, *config = memchr(data, 0, size);
    size_t len = config ? (size_t)(config - json) : size;
    size_t config_len = config ? size - len - 1 : 0;
    char msg[512];
    struct tokenizer *t = NULL;
    enum err e =
        tokenizer_open_text(&t, json, len, config ? config + 1 : NULL, config_len, msg, sizeof msg);
    if (e != OK) {
        assert(!t && strlen(msg) > 0);
        return 0;
    }
    for (int flags = 0; flags < 4; flags++) {
        int32_t *ids;
        size_t n, text_len;
        char *back;
        if (tokenize(t, text, sizeof text - 1, flags, &ids, &n) != OK) continue;
        for (size_t i = 0; i < n; i++)
            assert(ids[i] >= 0 && ids[i] < tokenizer_vocab_size(t));
        if (detokenize(t, ids, n, true, true, &back, &text_len) == OK) free(back);
        free(ids);
    }
    tokenizer_free(t);
    return 0;
}
