/* openai.h - the JSON that answers are made of.  Objects are the caller's (cJSON_Delete). */
#ifndef URCHIN_SERVER_OPENAI_H
#define URCHIN_SERVER_OPENAI_H

#include "server/request.h"
#include "server/served.h"

cJSON *openai_error(const struct api_error *e); /* {"error": {message, type, param, code}} */
cJSON *openai_model(const struct served *s);    /* one entry of /v1/models */
cJSON *openai_usage(const struct sched_usage *usage);
const char *openai_finish_reason(enum finish_reason reason); /* "stop", "length" */

/* Log-probabilities.  as_ids: tokens are written "token_id:7".
 * Legacy (completions): *offset is the character position of the first token in the returned text
 * and is moved on; object is made by legacy_logprobs_new and grows by these tokens. */
cJSON *legacy_logprobs_new(void);
void legacy_logprobs_add(cJSON *object, const struct tokenizer *t, const struct sched_token *tokens,
                         int n_tokens, bool as_ids, int64_t *offset);
cJSON *chat_logprobs_new(void); /* {"content": [], "refusal": null} */
void chat_logprobs_add(cJSON *object, const struct tokenizer *t, const struct sched_token *tokens,
                       int n_tokens, bool as_ids);

#endif
