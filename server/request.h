/* request.h - the bodies clients send, checked: bytes -> struct, or the error OpenAI's clients
 * expect.
 *
 * Unknown fields are ignored, null means absent, and a known field of the wrong type or out of
 * range is a 400 that names it.  Nothing here knows sockets or a model, so the parsers can be
 * fuzzed; what needs the model (names, token ids, lengths) is checked in answer.c. */
#ifndef URCHIN_SERVER_REQUEST_H
#define URCHIN_SERVER_REQUEST_H

#include "model/chat.h"
#include "scheduler/scheduler.h"
#include "server/fields.h"

struct api_prompt {
    const char *text; /* NULL: token ids */
    size_t text_len;
    int32_t *ids; /* owned by the request */
    size_t n_ids;
};

/* A completion or chat completion.  Owned memory: api_request_free. */
struct api_request {
    bool chat;
    const char *model;             /* NULL: not given */
    struct sched_request generate; /* all but the prompt; max_tokens -1: not given (chat) */
    bool has_seed;
    bool stream, include_usage;
    bool token_ids_as_text; /* return_tokens_as_token_ids: logprobs write tokens as "token_id:7" */
    /* completions */
    struct api_prompt *prompts;
    size_t n_prompts;
    bool echo, add_special; /* add_special: texts get BOS as the tokenizer wants it */
    /* chat */
    struct chat_message *messages;
    size_t n_messages;
    bool add_generation_prompt, continue_final;

    struct json *document;    /* most strings above point into it */
    struct api_memory *owned; /* the rest of what they point to */
};

/* true: *out is filled and owned by the caller.  false: *e says why, *out is untouched. */
bool api_parse_completion(struct api_request *out, const char *body, size_t len,
                          struct api_error *e);
bool api_parse_chat(struct api_request *out, const char *body, size_t len, struct api_error *e);
void api_request_free(struct api_request *r); /* a zeroed one is fine */

/* POST /tokenize: llama-server's {content, add_special, parse_special, with_pieces} and vLLM's
 * {prompt or messages, add_special_tokens, add_generation_prompt, return_token_strs}. */
struct api_tokenize {
    struct api_request request; /* messages when chat, else one text prompt */
    bool parse_special, with_pieces, with_strings;
};
bool api_parse_tokenize(struct api_tokenize *out, const char *body, size_t len,
                        struct api_error *e);

/* POST /detokenize: {tokens, skip_special_tokens} */
struct api_detokenize {
    int32_t *ids; /* malloc'd */
    size_t n_ids;
    bool skip_special;
};
bool api_parse_detokenize(struct api_detokenize *out, const char *body, size_t len,
                          struct api_error *e);

#endif
