/* fuzz_chat.c - any text as chat template and as messages: a byte that picks family and flags,
 * template, NUL, then messages of a role letter and a text up to the next NUL.  Special tokens are
 * as many as with harmless texts. */
#include "model/chat.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static const char vocabulary[] =
    "{\"pre_tokenizer\":{\"type\":\"Metaspace\"},\"model\":{\"byte_fallback\":true,\"vocab\":{"
    "\"a\":0,\"<\":1,\"s\":2,\"<s\":3},"
    "\"merges\":[\"< "
    "s\"]},\"added_tokens\":[{\"id\":4,\"content\":\"<s>\",\"special\":true},{\"id\":5,\"content\":"
    "\"</s>\",\"special\":true},"
    "{\"id\":6,\"content\":\"<|im_start|>\",\"special\":true},{\"id\":7,\"content\":\"<|im_end|>\","
    "\"special\":true},"
    "{\"id\":8,\"content\":\"<|user|>\",\"special\":true,\"rstrip\":true},{\"id\":9,\"content\":\"<"
    "|end|>\",\"special\":true},"
    "{\"id\":10,\"content\":\"[INST]\",\"special\":true,\"lstrip\":true}]}";
static const char config[] = "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\"}";

enum { MAX_MESSAGES = 16 };

static size_t count_special(const struct tokenizer *t, const struct chat *chat,
                            const struct chat_message *messages, size_t n, int flags, enum err *e) {
    char msg[256];
    int32_t *ids;
    size_t n_ids, count = 0;
    *e = chat_render(chat, messages, n, flags & 1, flags & 2, &ids, &n_ids, msg, sizeof msg);
    if (*e != OK) return 0;
    for (size_t i = 0; i < n_ids; i++)
        count += token_is_special(t, ids[i]);
    free(ids);
    return count;
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
    static const char *const roles[] = {"system", "user",      "assistant",
                                        "tool",   "developer", "other"};
    static struct tokenizer *t;
    char msg[512];
    if (!t && tokenizer_open_text(&t, vocabulary, strlen(vocabulary), config, strlen(config), msg,
                                  sizeof msg) != OK)
        abort();

    if (size == 0) return 0;
    int family = *data % 9 - 1, flags = *data / 9 % 4; /* -1: as the template says */
    data++;
    size--;

    char *text = malloc(size + 1), *end = text + size;
    memcpy(text, data, size);
    *end = 0;
    struct chat_message messages[MAX_MESSAGES], harmless[MAX_MESSAGES];
    size_t n = 0;
    for (char *p = text + strlen(text); p < end && n < MAX_MESSAGES; n++) {
        const char *role = roles[(unsigned char)*++p % 6];
        if (p < end) p++;
        messages[n] = (struct chat_message){role, p, strlen(p)};
        harmless[n] = (struct chat_message){role, "a", 1};
        p += strlen(p);
    }
    struct chat *chat = NULL;
    if (chat_new(&chat, t, text, family < 0 ? NULL : chat_family_name((enum chat_family)family),
                 msg, sizeof msg) == OK) {
        enum err e, other;
        size_t count = count_special(t, chat, messages, n, flags, &e);
        assert(count == count_special(t, chat, harmless, n, flags, &other));
        assert(e == other);
        chat_free(chat);
    }
    free(text);
    return 0;
}
