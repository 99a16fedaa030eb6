/* request.c - field by field, as a reader of OpenAI's schema would check them. */
#include "server/request.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_PROMPTS = 1024,
    MAX_MESSAGES = 16384,
    MAX_N = 128,
    MAX_LOGPROBS = 20,
    MAX_STOPS = 64,
    MAX_STOP_BYTES = 4096,
    MAX_BIAS = 1024,
};
static const int64_t MAX_COUNT = (int64_t)1 << 53; /* whole numbers JSON carries exactly */

struct api_memory {
    struct api_memory *next;
    max_align_t bytes[];
};

/* Zeroed memory that lives as long as the request. */
static void *keep(struct api_request *r, size_t n, size_t size) {
    struct api_memory *m;
    if (size && n > (SIZE_MAX - sizeof *m) / size) return NULL;
    m = calloc(1, sizeof *m + n * size);
    if (!m) return NULL;
    m->next = r->owned;
    r->owned = m;
    return m->bytes;
}

void api_request_free(struct api_request *r) {
    while (r->owned) {
        struct api_memory *m = r->owned;
        r->owned = m->next;
        free(m);
    }
    json_free(r->document);
    r->document = NULL;
}

/* An array of whole numbers that fit a token id. */
static bool get_ids(struct api_request *r, const struct json *array, const char *name,
                    int32_t **out, size_t *n_out, struct api_error *e) {
    size_t n = 0;
    int32_t *ids = keep(r, (size_t)json_size(array) + 1, sizeof *ids);
    if (!ids) return api_out_of_memory(e);
    for (const struct json *item = json_child(array); item; item = json_next(item)) {
        int64_t id;
        if (json_type(item) != JSON_NUMBER || !json_int(item, &id))
            return api_fail(e, 400, "invalid_type", name,
                            "Invalid type for '%s[%zu]': expected a token id, but got %s instead.",
                            name, n, field_type_name(item));
        if (id < 0 || id > INT32_MAX)
            return api_fail(e, 400, "invalid_value", name, "Invalid token id %lld in '%s[%zu]'.",
                            (long long)id, name, n);
        ids[n++] = (int32_t)id;
    }
    *out = ids;
    *n_out = n;
    return true;
}

/* ---- what completions and chat share ---- */

static bool get_stop(struct api_request *r, const struct json *body, struct api_error *e) {
    const struct json *stop = field_get(body, "stop");
    if (!stop) return true;
    bool single = json_type(stop) == JSON_STRING;
    if (!single && json_type(stop) != JSON_ARRAY)
        return field_wrong_type(e, "stop", "a string or an array of strings", stop);
    int n = single ? 1 : json_size(stop);
    if (n > MAX_STOPS)
        return api_fail(e, 400, "array_above_max_length", "stop",
                        "Invalid 'stop': expected at most %d strings, but got %d.", MAX_STOPS, n);
    const char **texts = keep(r, (size_t)n + 1, sizeof *texts);
    size_t *lens = keep(r, (size_t)n + 1, sizeof *lens);
    if (!texts || !lens) return api_out_of_memory(e);
    const struct json *item = single ? stop : json_child(stop);
    for (int i = 0; i < n; i++, item = json_next(item)) {
        if (json_type(item) != JSON_STRING)
            return field_wrong_type(e, "stop", "a string or an array of strings", item);
        texts[i] = json_string(item);
        lens[i] = strlen(texts[i]);
        if (lens[i] == 0 || lens[i] > MAX_STOP_BYTES)
            return api_fail(e, 400, "invalid_value", "stop",
                            "Invalid 'stop': expected strings of 1 to %d bytes, but one has %zu.",
                            MAX_STOP_BYTES, lens[i]);
    }
    r->generate.stop = texts;
    r->generate.stop_len = lens;
    r->generate.n_stop = n;
    return true;
}

static bool get_stop_tokens(struct api_request *r, const struct json *body, struct api_error *e) {
    const struct json *array = field_get(body, "stop_token_ids");
    int32_t *ids;
    size_t n;
    if (!array) return true;
    if (json_type(array) != JSON_ARRAY)
        return field_wrong_type(e, "stop_token_ids", "an array", array);
    if (!get_ids(r, array, "stop_token_ids", &ids, &n, e)) return false;
    if (n > MAX_STOPS)
        return api_fail(e, 400, "array_above_max_length", "stop_token_ids",
                        "Invalid 'stop_token_ids': expected at most %d ids, but got %zu.",
                        MAX_STOPS, n);
    r->generate.stop_tokens = ids;
    r->generate.n_stop_tokens = (int)n;
    return true;
}

static int by_token(const void *a, const void *b) {
    const struct logit_bias *x = a, *y = b;
    return (x->token > y->token) - (x->token < y->token);
}

static bool get_bias(struct api_request *r, const struct json *body, struct api_error *e) {
    const struct json *map = field_get(body, "logit_bias");
    if (!map) return true;
    if (json_type(map) != JSON_OBJECT) return field_wrong_type(e, "logit_bias", "an object", map);
    int n = 0, size = json_size(map);
    if (size > MAX_BIAS)
        return api_fail(e, 400, "object_above_max_length", "logit_bias",
                        "Invalid 'logit_bias': expected at most %d tokens, but got %d.", MAX_BIAS,
                        size);
    struct logit_bias *bias = keep(r, (size_t)size + 1, sizeof *bias);
    if (!bias) return api_out_of_memory(e);
    for (const struct json *item = json_child(map); item; item = json_next(item)) {
        const char *key = json_key(item);
        char *end;
        errno = 0;
        long long token = strtoll(key, &end, 10);
        if (*key < '0' || *key > '9' || *end || errno || token > INT32_MAX)
            return api_fail(e, 400, "invalid_value", "logit_bias",
                            "Invalid key in 'logit_bias': '%.32s' is not a token id.", key);
        double value = json_type(item) == JSON_NUMBER ? json_number(item, DBL_MAX) : DBL_MAX;
        if (!(value >= -100 && value <= 100))
            return api_fail(
                e, 400, "invalid_value", "logit_bias",
                "Invalid value in 'logit_bias': token %lld needs a number from -100 to 100.",
                token);
        bias[n++] = (struct logit_bias){(int32_t)token, (float)value};
    }
    qsort(bias, (size_t)n, sizeof *bias, by_token);
    for (int i = 1; i < n; i++)
        if (bias[i].token == bias[i - 1].token)
            return api_fail(e, 400, "invalid_value", "logit_bias",
                            "Invalid 'logit_bias': token %d is given twice.", (int)bias[i].token);
    r->generate.sampling.bias = bias;
    r->generate.sampling.n_bias = n;
    return true;
}

/* Any 64-bit number; those beyond 2^53 are what a double makes of them, the same one every time. */
static bool get_seed(struct api_request *r, const struct json *body, struct api_error *e) {
    const struct json *node = field_get(body, "seed");
    int64_t seed;
    if (!node) return true;
    double value = json_number(node, 0);
    if (json_type(node) == JSON_NUMBER && fabs(value) > 0x1p53 && fabs(value) <= 0x1p63)
        seed = value < 0x1p63 ? (int64_t)value : INT64_MAX;
    else if (!field_int(body, "seed", -MAX_COUNT, MAX_COUNT, &seed, e))
        return false;
    r->generate.sampling.seed = (uint64_t)seed;
    r->has_seed = seed != -1; /* llama-server's -1: any */
    return true;
}

static bool get_sampling(struct api_request *r, const struct json *body, struct api_error *e) {
    struct sampling *s = &r->generate.sampling;
    int64_t top_k = s->top_k;
    if (!field_number(body, "temperature", 0, 2, &s->temperature, e) ||
        !field_number(body, "top_p", 0, 1, &s->top_p, e) ||
        !field_number(body, "min_p", 0, 1, &s->min_p, e) ||
        !field_number(body, "presence_penalty", -2, 2, &s->presence_penalty, e) ||
        !field_number(body, "frequency_penalty", -2, 2, &s->frequency_penalty, e) ||
        !field_number(body, "repeat_penalty", 0, 100, &s->repetition_penalty, e) ||
        !field_number(body, "repetition_penalty", 0, 100, &s->repetition_penalty, e) ||
        !field_int(body, "top_k", -1, INT32_MAX, &top_k, e))
        return false;
    if (s->repetition_penalty <= 0)
        return api_fail(e, 400, "decimal_below_min_value", "repetition_penalty",
                        "Invalid value for 'repetition_penalty': expected more than 0.");
    if (s->top_p == 0) s->top_p = FLT_MIN; /* OpenAI allows 0: the likeliest token alone */
    s->top_k = (int)top_k;
    return get_seed(r, body, e) && get_bias(r, body, e);
}

/* Things other servers do and this one does not: better refused than silently left out of the
 * answer. */
static bool refuse_unsupported(const struct json *body, struct api_error *e) {
    static const char *const lists[] = {"tools", "functions"};
    for (int i = 0; i < 2; i++) {
        const struct json *list = field_get(body, lists[i]);
        if (list && json_type(list) != JSON_ARRAY)
            return field_wrong_type(e, lists[i], "an array", list);
        if (json_size(list) > 0)
            return api_fail(e, 400, "unsupported_parameter", lists[i],
                            "'%s' is not supported by this server.", lists[i]);
    }
    const struct json *format = field_get(body, "response_format");
    if (format) {
        const char *type = NULL;
        if (json_type(format) != JSON_OBJECT)
            return field_wrong_type(e, "response_format", "an object", format);
        if (!field_string(format, "type", &type, e)) return false;
        if (!type || strcmp(type, "text") != 0)
            return api_fail(e, 400, "unsupported_value", "response_format",
                            "'response_format' can only be {\"type\":\"text\"} on this server.");
    }
    return true;
}

static bool get_common(struct api_request *r, const struct json *body, struct api_error *e) {
    struct sched_request *g = &r->generate;
    const char *user; /* of no use here */
    bool skip_special = true;
    int64_t n = 1;
    if (!field_string(body, "model", &r->model, e) || !field_string(body, "user", &user, e) ||
        !field_int(body, "n", 1, MAX_N, &n, e) ||
        !field_int(body, "min_tokens", 0, MAX_COUNT, &g->min_tokens, e) ||
        !field_bool(body, "ignore_eos", &g->ignore_eos, e) ||
        !field_bool(body, "include_stop_str_in_output", &g->include_stop, e) ||
        !field_bool(body, "skip_special_tokens", &skip_special, e) ||
        !field_bool(body, "return_tokens_as_token_ids", &r->token_ids_as_text, e) ||
        !field_bool(body, "stream", &r->stream, e) || !get_sampling(r, body, e) ||
        !get_stop(r, body, e) || !get_stop_tokens(r, body, e) || !refuse_unsupported(body, e))
        return false;
    g->special_tokens = !skip_special;
    g->n = g->best_of = (int)n;
    const struct json *options = field_get(body, "stream_options");
    if (!options) return true;
    if (json_type(options) != JSON_OBJECT)
        return field_wrong_type(e, "stream_options", "an object", options);
    if (!r->stream)
        return api_fail(e, 400, "invalid_value", "stream_options",
                        "'stream_options' is only allowed when 'stream' is true.");
    return field_bool(options, "include_usage", &r->include_usage, e);
}

static bool check_lengths(const struct sched_request *g, const char *max_name,
                          struct api_error *e) {
    if (g->max_tokens >= 0 && g->min_tokens > g->max_tokens)
        return api_fail(e, 400, "invalid_value", "min_tokens",
                        "'min_tokens' is %lld, more than '%s', which is %lld.",
                        (long long)g->min_tokens, max_name, (long long)g->max_tokens);
    return true;
}

static bool open_body(struct api_request *r, const char *body, size_t len, struct api_error *e) {
    char msg[256];
    enum err err = json_parse(&r->document, body, len, "the body", msg, sizeof msg);
    if (err == ERR_NOMEM) return api_out_of_memory(e);
    if (err != OK)
        return api_fail(e, 400, "invalid_json", NULL,
                        "We could not parse the JSON body of your request: %s.", msg);
    if (json_type(r->document) != JSON_OBJECT)
        return api_fail(e, 400, "invalid_type", NULL,
                        "The body of your request must be a JSON object, but it is %s.",
                        field_type_name(r->document));
    return true;
}

/* ---- completions ---- */

static bool get_one_prompt(struct api_request *r, const struct json *node, struct api_prompt *out,
                           struct api_error *e) {
    if (json_type(node) == JSON_STRING) {
        out->text = json_string(node);
        out->text_len = strlen(out->text);
        return true;
    }
    if (json_type(node) != JSON_ARRAY)
        return field_wrong_type(
            e, "prompt",
            "a string, an array of strings, an array of token ids, or an array of those", node);
    if (!get_ids(r, node, "prompt", &out->ids, &out->n_ids, e)) return false;
    if (out->n_ids == 0)
        return api_fail(e, 400, "invalid_value", "prompt",
                        "'prompt' holds an empty array of token ids.");
    return true;
}

static bool get_prompts(struct api_request *r, const struct json *body, struct api_error *e) {
    const struct json *prompt = field_get(body, "prompt");
    if (!prompt)
        return api_fail(e, 400, "missing_required_parameter", "prompt",
                        "Missing required parameter: 'prompt'.");
    const struct json *first = json_child(prompt);
    bool many = json_type(prompt) == JSON_ARRAY &&
                (json_type(first) == JSON_STRING || json_type(first) == JSON_ARRAY);
    size_t n = many ? (size_t)json_size(prompt) : 1;
    if (n > MAX_PROMPTS)
        return api_fail(e, 400, "array_above_max_length", "prompt",
                        "Invalid 'prompt': expected at most %d prompts, but got %zu.", MAX_PROMPTS,
                        n);
    r->prompts = keep(r, n, sizeof *r->prompts);
    if (!r->prompts) return api_out_of_memory(e);
    r->n_prompts = n;
    if (!many) return get_one_prompt(r, prompt, &r->prompts[0], e);
    for (size_t i = 0; i < n; i++, first = json_next(first))
        if (!get_one_prompt(r, first, &r->prompts[i], e)) return false;
    return true;
}

static bool parse_completion(struct api_request *r, const char *text, size_t len,
                             struct api_error *e) {
    struct sched_request *g = &r->generate;
    if (!open_body(r, text, len, e)) return false;
    const struct json *body = r->document;
    const char *suffix = NULL;
    int64_t logprobs = -1, best_of;
    g->max_tokens = 16;
    r->add_special = true;
    if (!get_prompts(r, body, e) || !get_common(r, body, e) ||
        !field_string(body, "suffix", &suffix, e) || !field_bool(body, "echo", &r->echo, e) ||
        !field_bool(body, "add_special_tokens", &r->add_special, e) ||
        !field_int(body, "max_tokens", 0, MAX_COUNT, &g->max_tokens, e) ||
        !field_int(body, "logprobs", 0, MAX_LOGPROBS, &logprobs, e))
        return false;
    if (suffix && *suffix)
        return api_fail(e, 400, "unsupported_parameter", "suffix",
                        "'suffix' is not supported by this server.");
    if (g->max_tokens == 0 && !r->echo)
        return api_fail(e, 400, "integer_below_min_value", "max_tokens",
                        "Invalid value for 'max_tokens': 0 is only allowed with 'echo'.");
    best_of = g->n;
    if (!field_int(body, "best_of", 1, MAX_N, &best_of, e)) return false;
    if (best_of < g->n)
        return api_fail(e, 400, "invalid_value", "best_of",
                        "'best_of' is %lld, less than 'n', which is %d.", (long long)best_of, g->n);
    if (best_of > g->n && r->stream)
        return api_fail(e, 400, "invalid_value", "best_of",
                        "Results cannot be streamed when 'best_of' is greater than 'n'.");
    g->best_of = (int)best_of;
    g->n_logprobs = (int)logprobs;
    g->prompt_logprobs = r->echo && logprobs >= 0;
    return check_lengths(g, "max_tokens", e);
}

/* ---- chat ---- */

/* content: a string, an array of text parts (joined by line ends), or null for an assistant. */
static bool get_content(struct api_request *r, const struct json *message, const char *where,
                        struct chat_message *out, struct api_error *e) {
    const struct json *content = field_get(message, "content");
    out->content = "";
    if (!content) {
        if (strcmp(out->role, "assistant") == 0) return true;
        return api_fail(e, 400, "missing_required_parameter", where,
                        "Missing required parameter: '%s'.", where);
    }
    if (json_type(content) == JSON_STRING) {
        out->content = json_string(content);
        out->content_len = strlen(out->content);
        return true;
    }
    if (json_type(content) != JSON_ARRAY)
        return field_wrong_type(e, where, "a string or an array of parts", content);
    size_t len = 0;
    for (const struct json *part = json_child(content); part; part = json_next(part)) {
        const char *type = json_string(json_get(part, "type"));
        const char *text = json_string(json_get(part, "text"));
        if (!type || strcmp(type, "text") != 0)
            return api_fail(e, 400, "unsupported_value", where,
                            "Invalid part in '%s': only parts of type 'text' are supported.",
                            where);
        if (!text)
            return api_fail(e, 400, "invalid_type", where,
                            "Invalid part in '%s': expected a string named 'text'.", where);
        len += strlen(text) + 1;
    }
    char *joined = keep(r, len + 1, 1), *p = joined;
    if (!joined) return api_out_of_memory(e);
    for (const struct json *part = json_child(content); part; part = json_next(part)) {
        if (p > joined) *p++ = '\n';
        p = stpcpy(p, json_string(json_get(part, "text")));
    }
    out->content = joined;
    out->content_len = (size_t)(p - joined);
    return true;
}

static bool get_messages(struct api_request *r, const struct json *body, struct api_error *e) {
    const struct json *list = field_get(body, "messages");
    if (!list)
        return api_fail(e, 400, "missing_required_parameter", "messages",
                        "Missing required parameter: 'messages'.");
    if (json_type(list) != JSON_ARRAY) return field_wrong_type(e, "messages", "an array", list);
    int n = json_size(list), i = 0;
    if (n == 0)
        return api_fail(e, 400, "empty_array", "messages",
                        "Invalid 'messages': expected at least one message.");
    if (n > MAX_MESSAGES)
        return api_fail(e, 400, "array_above_max_length", "messages",
                        "Invalid 'messages': expected at most %d messages, but got %d.",
                        MAX_MESSAGES, n);
    r->messages = keep(r, (size_t)n, sizeof *r->messages);
    if (!r->messages) return api_out_of_memory(e);
    r->n_messages = (size_t)n;
    for (const struct json *item = json_child(list); item; item = json_next(item), i++) {
        static const char *const roles[] = {"system", "developer", "user", "assistant", "tool"};
        struct chat_message *m = &r->messages[i];
        char where[48];
        snprintf(where, sizeof where, "messages[%d]", i);
        if (json_type(item) != JSON_OBJECT) return field_wrong_type(e, where, "an object", item);
        const struct json *role = field_get(item, "role");
        snprintf(where, sizeof where, "messages[%d].role", i);
        if (!role)
            return api_fail(e, 400, "missing_required_parameter", where,
                            "Missing required parameter: '%s'.", where);
        if (json_type(role) != JSON_STRING) return field_wrong_type(e, where, "a string", role);
        for (size_t k = 0; k < sizeof roles / sizeof *roles; k++)
            if (strcmp(json_string(role), roles[k]) == 0) m->role = roles[k];
        if (!m->role)
            return api_fail(e, 400, "invalid_value", where,
                            "Invalid value '%.40s' for '%s': expected system, developer, user, "
                            "assistant or tool.",
                            json_string(role), where);
        snprintf(where, sizeof where, "messages[%d].content", i);
        if (!get_content(r, item, where, m, e)) return false;
    }
    return true;
}

static bool get_template_options(struct api_request *r, const struct json *body,
                                 struct api_error *e) {
    r->add_generation_prompt = true;
    if (!field_bool(body, "continue_final_message", &r->continue_final, e)) return false;
    if (r->continue_final) r->add_generation_prompt = false;
    if (!field_bool(body, "add_generation_prompt", &r->add_generation_prompt, e)) return false;
    if (r->continue_final && r->add_generation_prompt)
        return api_fail(
            e, 400, "invalid_value", "continue_final_message",
            "'continue_final_message' and 'add_generation_prompt' cannot both be true.");
    return true;
}

static bool parse_chat(struct api_request *r, const char *text, size_t len, struct api_error *e) {
    struct sched_request *g = &r->generate;
    if (!open_body(r, text, len, e)) return false;
    const struct json *body = r->document;
    int64_t max = -1, top = -1;
    bool logprobs = false;
    r->chat = true;
    if (!get_messages(r, body, e) || !get_template_options(r, body, e) || !get_common(r, body, e) ||
        !field_int(body, "max_tokens", 1, MAX_COUNT, &max, e) ||
        !field_int(body, "max_completion_tokens", 1, MAX_COUNT, &max, e) ||
        !field_bool(body, "logprobs", &logprobs, e) ||
        !field_int(body, "top_logprobs", 0, MAX_LOGPROBS, &top, e))
        return false;
    if (top > 0 && !logprobs)
        return api_fail(e, 400, "invalid_value", "top_logprobs",
                        "'top_logprobs' needs 'logprobs' to be true.");
    g->max_tokens = max;
    g->n_logprobs = !logprobs ? -1 : top < 0 ? 0 : (int)top;
    return check_lengths(
        g, field_get(body, "max_completion_tokens") ? "max_completion_tokens" : "max_tokens", e);
}

/* ---- public ---- */

static bool parse(struct api_request *out,
                  bool (*fill)(struct api_request *, const char *, size_t, struct api_error *),
                  const char *body, size_t len, struct api_error *e) {
    struct api_request r = {0};
    sched_request_init(&r.generate);
    if (!fill(&r, body, len, e)) {
        api_request_free(&r);
        return false;
    }
    *out = r;
    return true;
}

bool api_parse_completion(struct api_request *out, const char *body, size_t len,
                          struct api_error *e) {
    return parse(out, parse_completion, body, len, e);
}

bool api_parse_chat(struct api_request *out, const char *body, size_t len, struct api_error *e) {
    return parse(out, parse_chat, body, len, e);
}

static bool fill_tokenize(struct api_tokenize *t, const char *text, size_t len,
                          struct api_error *e) {
    struct api_request *r = &t->request;
    if (!open_body(r, text, len, e)) return false;
    const struct json *body = r->document;
    const char *content = NULL;
    r->chat = field_get(body, "messages") != NULL;
    r->add_special = true;
    t->parse_special = true;
    if (!field_string(body, "content", &content, e) || !field_string(body, "prompt", &content, e) ||
        !field_bool(body, "add_special", &r->add_special, e) ||
        !field_bool(body, "add_special_tokens", &r->add_special, e) ||
        !field_bool(body, "parse_special", &t->parse_special, e) ||
        !field_bool(body, "with_pieces", &t->with_pieces, e) ||
        !field_bool(body, "return_token_strs", &t->with_strings, e))
        return false;
    if (r->chat) return get_messages(r, body, e) && get_template_options(r, body, e);
    if (!content)
        return api_fail(e, 400, "missing_required_parameter", "prompt",
                        "Missing required parameter: 'prompt', 'content' or 'messages'.");
    r->prompts = keep(r, 1, sizeof *r->prompts);
    if (!r->prompts) return api_out_of_memory(e);
    r->n_prompts = 1;
    r->prompts[0].text = content;
    r->prompts[0].text_len = strlen(content);
    return true;
}

bool api_parse_tokenize(struct api_tokenize *out, const char *body, size_t len,
                        struct api_error *e) {
    struct api_tokenize t = {0};
    if (!fill_tokenize(&t, body, len, e)) {
        api_request_free(&t.request);
        return false;
    }
    *out = t;
    return true;
}

bool api_parse_detokenize(struct api_detokenize *out, const char *body, size_t len,
                          struct api_error *e) {
    struct api_request r = {0};
    struct api_detokenize d = {0};
    int32_t *ids = NULL;
    bool good = open_body(&r, body, len, e) &&
                field_bool(r.document, "skip_special_tokens", &d.skip_special, e);
    if (good) {
        const struct json *tokens = field_get(r.document, "tokens");
        if (!tokens)
            good = api_fail(e, 400, "missing_required_parameter", "tokens",
                            "Missing required parameter: 'tokens'.");
        else if (json_type(tokens) != JSON_ARRAY)
            good = field_wrong_type(e, "tokens", "an array of token ids", tokens);
        else
            good = get_ids(&r, tokens, "tokens", &ids, &d.n_ids, e);
    }
    if (good) {
        d.ids = malloc((d.n_ids + 1) * sizeof *d.ids);
        if (d.ids)
            memcpy(d.ids, ids, d.n_ids * sizeof *d.ids);
        else
            good = api_out_of_memory(e);
    }
    api_request_free(&r);
    if (good) *out = d;
    return good;
}
