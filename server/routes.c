/* routes.c - one handler a route; those that generate are in answer.c. */
#include "server/routes.h"

#include "config/version.h"
#include "server/http.h"
#include "server/metrics.h"
#include "server/openai.h"
#include "server/page.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct served *served(struct exchange *x) {
    return &x->http->served;
}

static enum MHD_Result no_memory(struct exchange *x) {
    struct api_error e;
    api_out_of_memory(&e);
    return exchange_reply_error(x, &e);
}

/* ---- about the server ---- */

static enum MHD_Result get_page(struct exchange *x) {
    return exchange_reply_static(x, 200, "text/html; charset=utf-8", page_html,
                                 (size_t)(page_html_end - page_html));
}

static enum MHD_Result get_health(struct exchange *x) {
    struct api_error e;
    enum phase phase = atomic_load(&x->http->phase);
    struct sched_stats stats = {0};
    if (phase == PHASE_READY) sched_stats(served(x)->sched, &stats);
    if (phase != PHASE_READY)
        api_fail(&e, 503, "loading", NULL, "The model is being loaded.");
    else if (x->http->draining)
        api_fail(&e, 503, "shutting_down", NULL, "The server is shutting down.");
    else if (!stats.healthy)
        api_fail(&e, 503, "unhealthy", NULL, "The device is lost; the server must be restarted.");
    else
        return exchange_reply_static(x, 200, "application/json", "{\"status\":\"ok\"}", 15);
    return exchange_reply_error(x, &e);
}

static enum MHD_Result get_version(struct exchange *x) {
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "version", URCHIN_VERSION);
    return exchange_reply_json(x, 200, root);
}

static enum MHD_Result get_metrics(struct exchange *x) {
    size_t len;
    char *text = metrics_text(x->http, &len);
    return text ? exchange_reply(x, 200, "text/plain; version=0.0.4; charset=utf-8", text, len)
                : no_memory(x);
}

static enum MHD_Result get_models(struct exchange *x) {
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "object", "list");
    cJSON_AddItemToArray(cJSON_AddArrayToObject(root, "data"), openai_model(served(x)));
    return exchange_reply_json(x, 200, root);
}

static enum MHD_Result get_model(struct exchange *x) {
    const char *name = x->path + strlen("/v1/models/");
    struct api_error e;
    if (strcmp(name, served(x)->name) == 0)
        return exchange_reply_json(x, 200, openai_model(served(x)));
    api_fail(&e, 404, "model_not_found", "model",
             "The model '%.200s' does not exist; this server has '%.200s'.", name, served(x)->name);
    return exchange_reply_error(x, &e);
}

/* ---- tokens ---- */

static cJSON *ids_array(const int32_t *ids, size_t n) {
    cJSON *array = cJSON_CreateArray();
    for (size_t i = 0; i < n; i++)
        cJSON_AddItemToArray(array, cJSON_CreateNumber(ids[i]));
    return array;
}

/* llama-server's: the piece as a string, or as an array of bytes when it is not valid UTF-8. */
static cJSON *piece(const struct tokenizer *t, int32_t id) {
    size_t len, valid_len;
    char *valid;
    const char *bytes = token_bytes(t, id, true, &len);
    if (utf8_repair(bytes, len, &valid, &valid_len) != OK) return NULL;
    bool is_valid = len == valid_len && memcmp(bytes, valid, len) == 0;
    free(valid);
    if (is_valid) return json_text(bytes, len);
    cJSON *array = cJSON_CreateArray();
    for (size_t i = 0; i < len; i++)
        cJSON_AddItemToArray(array, cJSON_CreateNumber((unsigned char)bytes[i]));
    return array;
}

static cJSON *tokenize_reply(struct exchange *x, const struct api_tokenize *asked,
                             const int32_t *ids, size_t n) {
    const struct tokenizer *t = model_tokenizer(served(x)->model);
    int64_t limit = model_info(served(x)->model)->max_seq_len;
    cJSON *root = cJSON_CreateObject();
    json_add(root, "count", cJSON_CreateNumber((double)n));
    json_add(root, "max_model_len", limit ? cJSON_CreateNumber((double)limit) : cJSON_CreateNull());
    if (asked->with_pieces) {
        cJSON *list = cJSON_AddArrayToObject(root, "tokens");
        for (size_t i = 0; i < n; i++) {
            cJSON *item = cJSON_CreateObject();
            json_add(item, "id", cJSON_CreateNumber(ids[i]));
            json_add(item, "piece", piece(t, ids[i]));
            cJSON_AddItemToArray(list, item);
        }
    } else {
        json_add(root, "tokens", ids_array(ids, n));
    }
    cJSON *strings = asked->with_strings ? cJSON_AddArrayToObject(root, "token_strs") : NULL;
    for (size_t i = 0; strings && i < n; i++) {
        const char *text = token_piece(t, ids[i]);
        cJSON_AddItemToArray(strings, json_text(text, strlen(text)));
    }
    return root;
}

static enum MHD_Result post_tokenize(struct exchange *x) {
    struct api_tokenize asked;
    struct api_error e;
    char msg[256];
    int32_t *ids;
    size_t n;
    if (!api_parse_tokenize(&asked, x->body.bytes, x->body.len, &e))
        return exchange_reply_error(x, &e);
    struct api_request *r = &asked.request;
    int flags =
        (asked.parse_special ? TOKENIZE_SPECIAL : 0) | (r->add_special ? TOKENIZE_ADD_BOS_EOS : 0);
    enum err err = r->chat ? chat_render(model_chat(served(x)->model), r->messages, r->n_messages,
                                         r->add_generation_prompt, r->continue_final, &ids, &n, msg,
                                         sizeof msg)
                           : tokenize(model_tokenizer(served(x)->model), r->prompts[0].text,
                                      r->prompts[0].text_len, flags, &ids, &n);
    api_request_free(r);
    if (err == ERR_NOMEM) return no_memory(x);
    if (err != OK) {
        api_fail(&e, 400, "invalid_value", "messages", "%s", msg);
        return exchange_reply_error(x, &e);
    }
    cJSON *root = tokenize_reply(x, &asked, ids, n);
    free(ids);
    return exchange_reply_json(x, 200, root);
}

static enum MHD_Result post_detokenize(struct exchange *x) {
    struct api_detokenize asked;
    struct api_error e;
    char *text;
    size_t len;
    const struct tokenizer *t = model_tokenizer(served(x)->model);
    if (!api_parse_detokenize(&asked, x->body.bytes, x->body.len, &e))
        return exchange_reply_error(x, &e);
    int vocab = tokenizer_vocab_size(t);
    for (size_t i = 0; i < asked.n_ids; i++)
        if (asked.ids[i] >= vocab) {
            api_fail(&e, 400, "invalid_value", "tokens",
                     "Token id %d is outside the vocabulary of %d tokens.", (int)asked.ids[i],
                     vocab);
            free(asked.ids);
            return exchange_reply_error(x, &e);
        }
    enum err err = detokenize(t, asked.ids, asked.n_ids, !asked.skip_special, true, &text, &len);
    free(asked.ids);
    if (err != OK) return no_memory(x);
    cJSON *root = cJSON_CreateObject();
    json_add(root, "prompt", json_text(text, len));  /* vLLM */
    json_add(root, "content", json_text(text, len)); /* llama-server */
    free(text);
    return exchange_reply_json(x, 200, root);
}

static void add_token(cJSON *root, const char *name, const struct tokenizer *t, int32_t id) {
    const char *text = id >= 0 ? token_piece(t, id) : NULL;
    json_add(root, name, text ? json_text(text, strlen(text)) : cJSON_CreateNull());
}

static enum MHD_Result get_tokenizer_info(struct exchange *x) {
    const struct tokenizer *t = model_tokenizer(served(x)->model);
    const char *jinja = tokenizer_chat_template(t);
    cJSON *root = cJSON_CreateObject();
    add_token(root, "bos_token", t, tokenizer_bos(t));
    add_token(root, "eos_token", t, tokenizer_eos(t));
    add_token(root, "pad_token", t,
              tokenizer_eos(t)); /* batches are ragged here: nothing is padded */
    json_add(root, "add_bos_token", cJSON_CreateBool(tokenizer_add_bos(t)));
    json_add(root, "add_eos_token", cJSON_CreateBool(tokenizer_add_eos(t)));
    json_add(root, "vocab_size", cJSON_CreateNumber(tokenizer_vocab_size(t)));
    json_add(root, "chat_template", jinja ? json_text(jinja, strlen(jinja)) : cJSON_CreateNull());
    return exchange_reply_json(x, 200, root);
}

/* ---- generation ---- */

static enum MHD_Result post_generate(struct exchange *x,
                                     bool (*parse)(struct api_request *, const char *, size_t,
                                                   struct api_error *)) {
    struct api_request request;
    struct api_error e;
    if (!parse(&request, x->body.bytes, x->body.len, &e)) return exchange_reply_error(x, &e);
    buffer_free(&x->body); /* a stream may live long */
    return exchange_generate(x, &request);
}

static enum MHD_Result post_completions(struct exchange *x) {
    return post_generate(x, api_parse_completion);
}

static enum MHD_Result post_chat(struct exchange *x) {
    return post_generate(x, api_parse_chat);
}

/* ---- table ---- */

/* clang-format off */
const struct route routes[] = {
    {"GET",  "/",                    "/",                    true,  false, false, get_page},
    {"GET",  "/health",              "/health",              true,  false, false, get_health},
    {"GET",  "/v1/health",           "/health",              true,  false, false, get_health},
    {"GET",  "/version",             "/version",             true,  false, false, get_version},
    {"GET",  "/metrics",             "/metrics",             false, false, false, get_metrics},
    {"GET",  "/v1/models",           "/v1/models",           false, true,  false, get_models},
    {"GET",  "/v1/models/*",         "/v1/models/{id}",      false, true,  false, get_model},
    {"POST", "/v1/completions",      "/v1/completions",      false, true,  true,  post_completions},
    {"POST", "/v1/chat/completions", "/v1/chat/completions", false, true,  true,  post_chat},
    {"POST", "/tokenize",            "/tokenize",            false, true,  false, post_tokenize},
    {"POST", "/detokenize",          "/detokenize",          false, true,  false, post_detokenize},
    {"GET",  "/tokenizer_info",      "/tokenizer_info",      false, true,  false, get_tokenizer_info},
};
/* clang-format on */
const int n_routes = sizeof routes / sizeof *routes;
static_assert(sizeof routes / sizeof *routes < HTTP_ROUTES,
              "http.h counts requests by route and one more");

static bool matches(const struct route *r, const char *path) {
    size_t n = strlen(r->path);
    if (r->path[n - 1] != '*') return strcmp(r->path, path) == 0;
    return strncmp(r->path, path, n - 1) == 0 && path[n - 1];
}

const struct route *route_find(const char *method, const char *path, char *allow,
                               size_t allow_len) {
    if (strcmp(method, "HEAD") == 0) method = "GET"; /* libmicrohttpd leaves the body out */
    allow[0] = 0;
    for (int i = 0; i < n_routes; i++) {
        if (!matches(&routes[i], path)) continue;
        if (strcmp(routes[i].method, method) == 0) return &routes[i];
        snprintf(allow, allow_len,
                 strcmp(routes[i].method, "GET") == 0 ? "GET, HEAD, OPTIONS" : "POST, OPTIONS");
    }
    return NULL;
}
