/* openai.c - OpenAI's objects, to the letter (openai-openapi 2.3.0). */
#include "server/openai.h"

#include "server/buffer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

cJSON *openai_error(const struct api_error *e) {
    cJSON *root = cJSON_CreateObject(), *error = cJSON_AddObjectToObject(root, "error");
    json_add(error, "message", json_text(e->message, strlen(e->message)));
    json_add(error, "type", cJSON_CreateString(e->type));
    json_add(error, "param",
             e->param[0] ? json_text(e->param, strlen(e->param)) : cJSON_CreateNull());
    json_add(error, "code", e->code ? cJSON_CreateString(e->code) : cJSON_CreateNull());
    return root;
}

cJSON *openai_model(const struct served *s) {
    const struct model_info *info = model_info(s->model);
    cJSON *m = cJSON_CreateObject();
    json_add(m, "id", json_text(s->name, strlen(s->name)));
    json_add(m, "object", cJSON_CreateString("model"));
    json_add(m, "created", cJSON_CreateNumber((double)s->created));
    json_add(m, "owned_by", cJSON_CreateString("urchin"));
    json_add(m, "root", json_text(info->name, strlen(info->name)));
    json_add(m, "parent", cJSON_CreateNull());
    json_add(m, "max_model_len",
             info->max_seq_len ? cJSON_CreateNumber((double)info->max_seq_len)
                               : cJSON_CreateNull());
    json_add(m, "meta", served_meta(s->model));
    return m;
}

cJSON *openai_usage(const struct sched_usage *usage) {
    cJSON *u = cJSON_CreateObject();
    cJSON_AddNumberToObject(u, "prompt_tokens", (double)usage->prompt_tokens);
    cJSON_AddNumberToObject(u, "completion_tokens", (double)usage->completion_tokens);
    cJSON_AddNumberToObject(u, "total_tokens",
                            (double)(usage->prompt_tokens + usage->completion_tokens));
    cJSON *details = cJSON_AddObjectToObject(u, "prompt_tokens_details");
    cJSON_AddNumberToObject(details, "cached_tokens", (double)usage->cached_tokens);
    return u;
}

const char *openai_finish_reason(enum finish_reason reason) {
    return reason == FINISH_LENGTH ? "length" : "stop";
}

/* JSON has no infinity: vLLM's clamp. */
static cJSON *logprob_number(float logprob) {
    if (isnan(logprob)) return cJSON_CreateNull();
    return cJSON_CreateNumber(logprob < -9999.0f ? -9999.0 : logprob);
}

/* A token as readable text: valid UTF-8 without NUL, malloc'd. */
static char *token_text(const struct tokenizer *t, int32_t token, bool as_ids) {
    char *text = NULL;
    if (as_ids) return asprintf(&text, "token_id:%d", (int)token) < 0 ? NULL : text;
    size_t len, valid_len;
    const char *bytes = token_bytes(t, token, true, &len);
    if (len && memchr(bytes, 0, len)) return strdup(token_piece(t, token));
    return utf8_repair(bytes, len, &text, &valid_len) == OK ? text : NULL;
}

static cJSON *token_string(const struct tokenizer *t, int32_t token, bool as_ids) {
    char *text = token_text(t, token, as_ids);
    cJSON *item = cJSON_CreateString(text ? text : "");
    free(text);
    return item;
}

/* ---- completions ---- */

cJSON *legacy_logprobs_new(void) {
    cJSON *object = cJSON_CreateObject();
    json_add(object, "tokens", cJSON_CreateArray());
    json_add(object, "token_logprobs", cJSON_CreateArray());
    json_add(object, "top_logprobs", cJSON_CreateArray());
    json_add(object, "text_offset", cJSON_CreateArray());
    return object;
}

/* text -> logprob.  Two tokens may read the same: the likelier, which comes first, stays. */
static void add_to_map(cJSON *map, const struct tokenizer *t, int32_t token, float logprob,
                       bool as_ids) {
    char *text = token_text(t, token, as_ids);
    if (text && !cJSON_GetObjectItemCaseSensitive(map, text))
        cJSON_AddItemToObject(map, text, logprob_number(logprob));
    free(text);
}

static int64_t characters(const char *text, size_t len) {
    int64_t n = 0;
    for (size_t i = 0; i < len; i++)
        n += ((unsigned char)text[i] & 0xC0) != 0x80; /* not a continuation byte */
    return n;
}

void legacy_logprobs_add(cJSON *object, const struct tokenizer *t, const struct sched_token *tokens,
                         int n_tokens, bool as_ids, int64_t *offset) {
    cJSON *names = cJSON_GetObjectItemCaseSensitive(object, "tokens");
    cJSON *logprobs = cJSON_GetObjectItemCaseSensitive(object, "token_logprobs");
    cJSON *tops = cJSON_GetObjectItemCaseSensitive(object, "top_logprobs");
    cJSON *offsets = cJSON_GetObjectItemCaseSensitive(object, "text_offset");
    for (int i = 0; i < n_tokens; i++) {
        const struct sched_token *k = &tokens[i];
        size_t len;
        const char *bytes = token_bytes(t, k->token, false, &len);
        cJSON_AddItemToArray(names, token_string(t, k->token, as_ids));
        cJSON_AddItemToArray(logprobs, logprob_number(k->logprob));
        cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)*offset));
        *offset += characters(bytes, len);
        if (isnan(k->logprob)) { /* the first token of a prompt has no past */
            cJSON_AddItemToArray(tops, cJSON_CreateNull());
            continue;
        }
        cJSON *map = cJSON_CreateObject();
        for (int j = 0; j < k->n_top; j++)
            add_to_map(map, t, k->top[j].token, k->top[j].logprob, as_ids);
        add_to_map(map, t, k->token, k->logprob, as_ids);
        cJSON_AddItemToArray(tops, map);
    }
}

/* ---- chat ---- */

cJSON *chat_logprobs_new(void) {
    cJSON *object = cJSON_CreateObject();
    json_add(object, "content", cJSON_CreateArray());
    json_add(object, "refusal", cJSON_CreateNull());
    return object;
}

static cJSON *chat_token(const struct tokenizer *t, int32_t token, float logprob, bool as_ids) {
    size_t len;
    const char *bytes = token_bytes(t, token, true, &len);
    cJSON *item = cJSON_CreateObject(), *list = cJSON_CreateArray();
    json_add(item, "token", token_string(t, token, as_ids));
    json_add(item, "logprob", logprob_number(logprob));
    for (size_t i = 0; i < len; i++)
        cJSON_AddItemToArray(list, cJSON_CreateNumber((unsigned char)bytes[i]));
    json_add(item, "bytes", list);
    return item;
}

void chat_logprobs_add(cJSON *object, const struct tokenizer *t, const struct sched_token *tokens,
                       int n_tokens, bool as_ids) {
    cJSON *content = cJSON_GetObjectItemCaseSensitive(object, "content");
    for (int i = 0; i < n_tokens; i++) {
        cJSON *item = chat_token(t, tokens[i].token, tokens[i].logprob, as_ids);
        cJSON *top = cJSON_CreateArray();
        for (int j = 0; j < tokens[i].n_top; j++)
            cJSON_AddItemToArray(
                top, chat_token(t, tokens[i].top[j].token, tokens[i].top[j].logprob, as_ids));
        json_add(item, "top_logprobs", top);
        cJSON_AddItemToArray(content, item);
    }
}
