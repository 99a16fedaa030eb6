/* fuzz_chat_request.c - bodies of /v1/chat/completions: a struct or a 4xx with a message, never a
 * crash or a leak. */
#include "server/request.h"

#include <assert.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct api_error e;
    struct api_request r;
    if (!api_parse_chat(&r, (const char *)data, size, &e)) {
        assert(e.status >= 400 && e.type && e.message[0]);
        return 0;
    }
    assert(r.chat && r.n_messages >= 1);
    for (size_t i = 0; i < r.n_messages; i++)
        assert(r.messages[i].role && strlen(r.messages[i].content) == r.messages[i].content_len);
    assert(r.generate.max_tokens == -1 || r.generate.max_tokens >= 1);
    assert(!(r.continue_final && r.add_generation_prompt));
    api_request_free(&r);
    return 0;
}
