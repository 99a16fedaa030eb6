/* answer.c - from tickets to OpenAI's objects and events. */
#include "server/answer.h"

#include "config/log.h"
#include "server/buffer.h"
#include "server/openai.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

/* A stream takes no more events while so much of its output is unread: the rest stays in the
 * ticket, which counts it. */
enum { STREAM_ENOUGH = 8 << 10 };

/* Log-probabilities of prompts in one answer: each takes about 200 bytes until the answer is sent,
 * and without a limit of length a prompt may have millions of tokens. */
enum { MAX_PROMPT_LOGPROBS = 1 << 20 };

struct part {     /* one prompt */
    int32_t *ids; /* owned until submitted */
    size_t n_ids;
    char *echo;            /* owned; the prompt as text when it is to be repeated, valid UTF-8 */
    struct ticket *ticket; /* owned; NULL before submission and after the end */
};

struct choice {
    struct buffer text; /* whole answers: what there is so far */
    cJSON *logprobs;    /* owned; not yet sent, or whole answers: all.  NULL: none */
    int64_t offset;     /* characters of text before the next token */
    bool began;         /* a stream's first chunk is out, with the role or the echo */
    bool finished;
    enum finish_reason finish;
    cJSON
        *stop_reason; /* owned until sent; vLLM's: the stop string or token that fired, else null */
};

struct answer {
    struct served *served;
    struct api_request request;
    void (*notify)(void *arg);
    void *notify_arg;
    char id[40];
    int64_t created;
    struct part *parts; /* [n_prompts] */
    size_t n_parts, n_submitted, n_running, at_once;
    struct choice *choices; /* [n_prompts * n] */
    struct buffer output;   /* streams */
    struct sched_usage usage;
    struct api_error error;
    bool failed, began, done, waits;
};

/* ---- building ---- */

static void make_id(char *out, size_t len, const char *prefix) {
    unsigned char bytes[12];
    if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes) memset(bytes, 0, sizeof bytes);
    int n = snprintf(out, len, "%s", prefix);
    for (size_t i = 0; i < sizeof bytes; i++)
        n += snprintf(out + n, len - (size_t)n, "%02x", bytes[i]);
}

static const char *prompt_field(const struct answer *a) {
    return a->request.chat ? "messages" : "prompt";
}

static bool read_chat(struct answer *a, struct part *p, struct api_error *e) {
    char msg[256];
    struct api_request *r = &a->request;
    enum err err = chat_render(model_chat(a->served->model), r->messages, r->n_messages,
                               r->add_generation_prompt, r->continue_final, &p->ids, &p->n_ids, msg,
                               sizeof msg);
    if (err == ERR_NOMEM) return api_out_of_memory(e);
    if (err != OK) return api_fail(e, 400, "invalid_value", "messages", "%s", msg);
    return true;
}

static bool read_prompt(struct answer *a, struct part *p, const struct api_prompt *prompt,
                        struct api_error *e) {
    const struct tokenizer *t = model_tokenizer(a->served->model);
    char *echo = NULL;
    size_t echo_len;
    if (prompt->text) {
        int flags = TOKENIZE_SPECIAL | (a->request.add_special ? TOKENIZE_ADD_BOS_EOS : 0);
        if (tokenize(t, prompt->text, prompt->text_len, flags, &p->ids, &p->n_ids) != OK)
            return api_out_of_memory(e);
    } else {
        p->ids = malloc(prompt->n_ids * sizeof *p->ids);
        if (!p->ids) return api_out_of_memory(e);
        memcpy(p->ids, prompt->ids, prompt->n_ids * sizeof *p->ids);
        p->n_ids = prompt->n_ids;
    }
    if (!a->request.echo) return true;
    if (!prompt->text && detokenize(t, p->ids, p->n_ids, false, true, &echo, &echo_len) != OK)
        return api_out_of_memory(e);
    enum err err = prompt->text ? utf8_repair(prompt->text, prompt->text_len, &p->echo, &echo_len)
                                : utf8_repair(echo, echo_len, &p->echo, &echo_len);
    free(echo);
    return err == OK || api_out_of_memory(e);
}

static bool check_ids(const struct answer *a, const int32_t *ids, size_t n, const char *param,
                      struct api_error *e) {
    int vocab = model_info(a->served->model)->vocab_size;
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab)
            return api_fail(e, 400, "invalid_value", param,
                            "Token id %d in '%s' is outside the vocabulary of %d tokens.",
                            (int)ids[i], param, vocab);
    return true;
}

static bool check_part(const struct answer *a, const struct part *p, struct api_error *e) {
    int64_t limit = model_info(a->served->model)->max_seq_len;
    int64_t max = a->request.generate.max_tokens, n = (int64_t)p->n_ids;
    if (n == 0)
        return api_fail(e, 400, "invalid_value", prompt_field(a),
                        "'%s' is empty: expected at least one token.", prompt_field(a));
    if (limit && (n > limit || (max > 0 && max > limit - n) || (max < 0 && n == limit)))
        return api_fail(e, 400, "context_length_exceeded", prompt_field(a),
                        "This model's maximum context length is %lld tokens, but %lld were asked "
                        "for (%lld in the prompt, %lld to be generated).",
                        (long long)limit, (long long)(n + (max > 0 ? max : 1)), (long long)n,
                        (long long)(max > 0 ? max : 1));
    return check_ids(a, p->ids, p->n_ids, prompt_field(a), e);
}

static bool check_prompt_logprobs(const struct answer *a, struct api_error *e) {
    const struct sched_request *g = &a->request.generate;
    size_t n = 0;
    if (!g->prompt_logprobs) return true;
    for (size_t i = 0; i < a->n_parts; i++)
        n += a->parts[i].n_ids;
    n *= (size_t)g->n * ((size_t)g->n_logprobs + 1);
    if (n <= MAX_PROMPT_LOGPROBS) return true;
    return api_fail(e, 400, "invalid_value", "logprobs",
                    "'echo' with 'logprobs' asks for %zu log-probabilities of prompts, but one "
                    "answer holds at most %d.",
                    n, MAX_PROMPT_LOGPROBS);
}

static bool read_parts(struct answer *a, struct api_error *e) {
    struct api_request *r = &a->request;
    int slots = model_info(a->served->model)->n_slots;
    if (r->generate.best_of > slots) {
        const char *name = r->generate.best_of > r->generate.n ? "best_of" : "n";
        return api_fail(e, 400, "integer_above_max_value", name,
                        "'%s' is %d, but only %d sequences fit on this server.", name,
                        r->generate.best_of, slots);
    }
    const struct sampling *s = &r->generate.sampling;
    for (int i = 0; i < s->n_bias; i++)
        if (!check_ids(a, &s->bias[i].token, 1, "logit_bias", e)) return false;
    if (!check_ids(a, r->generate.stop_tokens, (size_t)r->generate.n_stop_tokens, "stop_token_ids",
                   e))
        return false;
    for (size_t i = 0; i < a->n_parts; i++) {
        struct part *p = &a->parts[i];
        bool good = r->chat ? read_chat(a, p, e) : read_prompt(a, p, &r->prompts[i], e);
        if (!good || !check_part(a, p, e)) return false;
        if (a->served->log_prompts) {
            char *text;
            size_t len;
            if (detokenize(model_tokenizer(a->served->model), p->ids, p->n_ids, true, false, &text,
                           &len) != OK)
                continue;
            log_event(LOG_INFO, "prompt", "id=%s index=%zu text=%s", a->id, i, text);
            free(text);
        }
    }
    return check_prompt_logprobs(a, e);
}

/* Submits prompts while there is room.  false: *e says why the answer fails; a full queue fails
 * only the first prompt. */
static bool submit_more(struct answer *a, struct api_error *e) {
    a->waits = false;
    while (a->n_submitted < a->n_parts && a->n_running < a->at_once) {
        struct part *p = &a->parts[a->n_submitted];
        struct sched_request *g = &a->request.generate;
        char msg[256] = "";
        double retry_after = 0;
        g->prompt = p->ids;
        g->n_prompt = p->n_ids;
        enum err err = sched_submit(a->served->sched, g, a->notify, a->notify_arg, &p->ticket,
                                    &retry_after, msg, sizeof msg);
        if (err == ERR_BUSY && a->n_submitted > 0) {
            a->waits = true;
            return true;
        }
        if (err == ERR_BUSY && retry_after < 0)
            return api_fail(e, 503, "shutting_down", NULL, "The server is shutting down.");
        if (err == ERR_BUSY) {
            api_fail(e, 429, "overloaded", NULL, "The server is busy: %s. Try again later.", msg);
            e->retry_after_s = retry_after;
            return false;
        }
        if (err == ERR_NOMEM) return api_out_of_memory(e);
        if (err == ERR_ARG) return api_fail(e, 400, "invalid_value", NULL, "%s", msg);
        if (err != OK) return api_fail(e, 500, "generation_failed", NULL, "%s", msg);
        free(p->ids);
        p->ids = NULL;
        a->n_submitted++;
        a->n_running++;
    }
    return true;
}

bool answer_new(struct answer **out, struct served *served, struct api_request *request,
                void (*notify)(void *arg), void *arg, struct api_error *e) {
    if (request->model && strcmp(request->model, served->name) != 0)
        return api_fail(e, 404, "model_not_found", "model",
                        "The model '%.200s' does not exist; this server has '%.200s'.",
                        request->model, served->name);
    struct answer *a = calloc(1, sizeof *a);
    if (!a) return api_out_of_memory(e);
    a->served = served;
    a->request = *request;
    a->notify = notify;
    a->notify_arg = arg;
    a->created = time(NULL);
    make_id(a->id, sizeof a->id, request->chat ? "chatcmpl-" : "cmpl-");
    a->n_parts = request->chat ? 1 : request->n_prompts;
    a->at_once = (size_t)(model_info(served->model)->n_slots / request->generate.best_of);
    a->parts = calloc(a->n_parts, sizeof *a->parts);
    a->choices = calloc(a->n_parts * (size_t)request->generate.n, sizeof *a->choices);
    if (!request->has_seed) {
        uint64_t seed;
        if (getrandom(&seed, sizeof seed, 0) == sizeof seed)
            a->request.generate.sampling.seed = seed;
    }
    bool good =
        a->parts && a->choices ? read_parts(a, e) && submit_more(a, e) : api_out_of_memory(e);
    if (good) {
        *out = a;
        *request = (struct api_request){0};
    } else {
        a->request = (struct api_request){0}; /* still the caller's */
        answer_free(a);
    }
    return good;
}

static void close_ticket(struct answer *a, struct part *p) {
    struct sched_usage u = ticket_usage(p->ticket);
    a->usage.prompt_tokens += u.prompt_tokens;
    a->usage.completion_tokens += u.completion_tokens;
    a->usage.cached_tokens += u.cached_tokens;
    ticket_free(p->ticket);
    p->ticket = NULL;
}

void answer_cancel(struct answer *a) {
    for (size_t i = 0; i < a->n_submitted; i++)
        if (a->parts[i].ticket) close_ticket(a, &a->parts[i]);
    a->n_running = 0;
    a->n_submitted = a->n_parts;
    a->waits = false;
    a->done = true;
}

void answer_free(struct answer *a) {
    if (!a) return;
    for (size_t i = 0; a->parts && i < a->n_parts; i++) {
        ticket_free(a->parts[i].ticket);
        free(a->parts[i].ids);
        free(a->parts[i].echo);
    }
    for (size_t i = 0; a->choices && i < a->n_parts * (size_t)a->request.generate.n; i++) {
        buffer_free(&a->choices[i].text);
        cJSON_Delete(a->choices[i].logprobs);
        cJSON_Delete(a->choices[i].stop_reason);
    }
    free(a->parts);
    free(a->choices);
    buffer_free(&a->output);
    api_request_free(&a->request);
    free(a);
}

/* ---- JSON ---- */

static cJSON *envelope(const struct answer *a, cJSON *choices) {
    const struct api_request *r = &a->request;
    const char *object = !r->chat    ? "text_completion"
                         : r->stream ? "chat.completion.chunk"
                                     : "chat.completion";
    cJSON *root = cJSON_CreateObject();
    json_add(root, "id", cJSON_CreateString(a->id));
    json_add(root, "object", cJSON_CreateString(object));
    json_add(root, "created", cJSON_CreateNumber((double)a->created));
    json_add(root, "model", json_text(a->served->name, strlen(a->served->name)));
    json_add(root, "system_fingerprint", cJSON_CreateString(a->served->fingerprint));
    json_add(root, "choices", choices);
    return root;
}

static cJSON *or_null(cJSON *item) {
    return item ? item : cJSON_CreateNull();
}

/* Takes the choice's logprobs. */
static void add_logprobs(cJSON *item, struct choice *c) {
    json_add(item, "logprobs", or_null(c->logprobs));
    c->logprobs = NULL;
}

static void add_finish(cJSON *item, struct choice *c) {
    json_add(item, "finish_reason",
             c->finished ? cJSON_CreateString(openai_finish_reason(c->finish))
                         : cJSON_CreateNull());
    if (!c->finished) return;
    json_add(item, "stop_reason", or_null(c->stop_reason));
    c->stop_reason = NULL;
}

static void send_event(struct answer *a, cJSON *root) {
    char *json = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    buffer_append(&a->output, "data: ", 6);
    if (json)
        buffer_append(&a->output, json, strlen(json));
    else
        a->output.failed = true;
    buffer_append(&a->output, "\n\n", 2);
    cJSON_free(json);
}

static void send_choice(struct answer *a, cJSON *choice) {
    cJSON *choices = cJSON_CreateArray();
    cJSON_AddItemToArray(choices, choice);
    cJSON *root = envelope(a, choices);
    if (a->request.include_usage) json_add(root, "usage", cJSON_CreateNull());
    send_event(a, root);
}

static void send_delta(struct answer *a, size_t index, const char *role, const char *text,
                       size_t len, bool last) {
    struct choice *c = &a->choices[index];
    cJSON *item = cJSON_CreateObject(), *delta = cJSON_AddObjectToObject(item, "delta");
    json_add(item, "index", cJSON_CreateNumber((double)index));
    if (role) json_add(delta, "role", cJSON_CreateString(role));
    if (!last) json_add(delta, "content", json_text(text, len));
    if (role || last)
        json_add(item, "logprobs", cJSON_CreateNull());
    else
        add_logprobs(item, c);
    if (last)
        add_finish(item, c);
    else
        json_add(item, "finish_reason", cJSON_CreateNull());
    send_choice(a, item);
}

/* The role comes with the first token, not before: clients take the first chunk for the time to
 * first token. */
static void stream_chat(struct answer *a, size_t index, const char *text, size_t len) {
    struct choice *c = &a->choices[index];
    if (!c->began) send_delta(a, index, "assistant", "", 0, false);
    c->began = true;
    if (len || c->logprobs) send_delta(a, index, NULL, text, len, false);
    if (c->finished) send_delta(a, index, NULL, "", 0, true);
}

/* The text as JSON, after the prompt when that is to be repeated. */
static cJSON *text_after_echo(const struct answer *a, size_t index, const char *text, size_t len) {
    const char *echo = a->parts[index / (size_t)a->request.generate.n].echo;
    struct buffer whole = {0};
    if (!echo) return json_text(text, len);
    buffer_append(&whole, echo, strlen(echo));
    buffer_append(&whole, text, len);
    cJSON *item = whole.failed ? NULL : json_text(whole.bytes ? whole.bytes : "", whole.len);
    buffer_free(&whole);
    return item;
}

static void stream_completion(struct answer *a, size_t index, const char *text, size_t len) {
    struct choice *c = &a->choices[index];
    bool echo = a->request.echo && !c->began;
    if (!len && !echo && !c->logprobs && !c->finished) return;
    cJSON *item = cJSON_CreateObject();
    json_add(item, "index", cJSON_CreateNumber((double)index));
    json_add(item, "text", echo ? text_after_echo(a, index, text, len) : json_text(text, len));
    add_logprobs(item, c);
    add_finish(item, c);
    send_choice(a, item);
    c->began = true;
}

static void finish_stream(struct answer *a) {
    if (a->failed) {
        send_event(a, openai_error(&a->error));
    } else if (a->request.include_usage) {
        cJSON *root = envelope(a, cJSON_CreateArray());
        json_add(root, "usage", openai_usage(&a->usage));
        send_event(a, root);
    }
    buffer_append(&a->output, "data: [DONE]\n\n", 14);
}

/* ---- events ---- */

static int64_t count_characters(const char *text) {
    int64_t n = 0;
    for (; *text; text++)
        n += ((unsigned char)*text & 0xC0) != 0x80;
    return n;
}

/* The prompt's log-probabilities, for each of its choices.  A tokenizer may put a space in front of
 * a text (SentencePiece): the tokens then hold one character more than the text, and it is the
 * first one's. */
static void take_prompt_logprobs(struct answer *a, size_t part, const struct sched_event *ev) {
    const struct tokenizer *t = model_tokenizer(a->served->model);
    int n = a->request.generate.n;
    int64_t echo_len = count_characters(a->parts[part].echo);
    for (int k = 0; k < n; k++) {
        struct choice *c = &a->choices[part * (size_t)n + (size_t)k];
        c->logprobs = legacy_logprobs_new();
        legacy_logprobs_add(c->logprobs, t, ev->tokens, ev->n_tokens, a->request.token_ids_as_text,
                            &c->offset);
        int64_t extra = c->offset - echo_len;
        cJSON *offset = cJSON_GetObjectItemCaseSensitive(c->logprobs, "text_offset");
        for (offset = offset ? offset->child : NULL; extra > 0 && offset; offset = offset->next)
            cJSON_SetNumberValue(offset, offset->valuedouble > (double)extra
                                             ? offset->valuedouble - (double)extra
                                             : 0);
        c->offset = echo_len;
    }
}

static void take_logprobs(struct answer *a, struct choice *c, const struct sched_event *ev) {
    const struct tokenizer *t = model_tokenizer(a->served->model);
    bool as_ids = a->request.token_ids_as_text;
    if (a->request.generate.n_logprobs < 0 || ev->n_tokens == 0) return;
    if (a->request.chat) {
        if (!c->logprobs) c->logprobs = chat_logprobs_new();
        chat_logprobs_add(c->logprobs, t, ev->tokens, ev->n_tokens, as_ids);
    } else {
        if (!c->logprobs) c->logprobs = legacy_logprobs_new();
        legacy_logprobs_add(c->logprobs, t, ev->tokens, ev->n_tokens, as_ids, &c->offset);
    }
}

static void take_finish(struct answer *a, size_t index, const struct sched_event *ev) {
    const struct sched_request *g = &a->request.generate;
    struct choice *c = &a->choices[index];
    if (a->served->log_prompts)
        log_event(LOG_INFO, "answer", "id=%s index=%zu text=%.*s", a->id, index, (int)c->text.len,
                  c->text.bytes ? c->text.bytes : "");
    c->finished = true;
    c->finish = ev->finish;
    if (ev->stop_string) c->stop_reason = json_text(ev->stop_string, strlen(ev->stop_string));
    for (int i = 0; i < g->n_stop_tokens; i++)
        if (ev->stop_token == g->stop_tokens[i])
            c->stop_reason = cJSON_CreateNumber(ev->stop_token);
}

static void take_event(struct answer *a, size_t part, const struct sched_event *ev) {
    if (ev->finish == FINISH_ERROR || ev->finish == FINISH_CANCELLED) {
        a->failed = true;
        if (ev->finish == FINISH_ERROR)
            api_fail(&a->error, 500, "generation_failed", NULL, "%s",
                     ev->error ? ev->error : "The model failed.");
        else
            api_fail(&a->error, 503, "shutting_down", NULL, "The server is shutting down.");
        return;
    }
    a->began = true;
    if (ev->is_prompt) {
        take_prompt_logprobs(a, part, ev);
        return;
    }
    size_t index = part * (size_t)a->request.generate.n + (size_t)ev->choice;
    struct choice *c = &a->choices[index];
    take_logprobs(a, c, ev);
    if (!a->request.stream || a->served->log_prompts)
        buffer_append(&c->text, ev->text, ev->text_len);
    if (ev->finish != FINISH_NONE) take_finish(a, index, ev);
    if (a->request.stream && a->request.chat)
        stream_chat(a, index, ev->text, ev->text_len);
    else if (a->request.stream)
        stream_completion(a, index, ev->text, ev->text_len);
}

static void end_part(struct answer *a, struct part *p) {
    close_ticket(a, p);
    a->n_running--;
}

static bool enough(const struct answer *a) {
    return a->request.stream && a->output.len >= STREAM_ENOUGH;
}

void answer_fail(struct answer *a, const struct api_error *e) {
    if (a->done) return;
    a->failed = true;
    a->error = *e;
    if (a->request.stream) finish_stream(a);
    answer_cancel(a);
}

void answer_pull(struct answer *a) {
    if (a->done) return;
    for (size_t i = 0; i < a->n_submitted && !a->failed; i++) {
        struct part *p = &a->parts[i];
        struct sched_event ev;
        while (p->ticket && !a->failed && !enough(a)) {
            if (ticket_next(p->ticket, &ev)) {
                take_event(a, i, &ev);
            } else {
                if (ticket_done(p->ticket)) end_part(a, p);
                break;
            }
        }
        if (p->ticket && !a->failed && !enough(a) && ticket_done(p->ticket)) end_part(a, p);
    }
    struct api_error e;
    if (a->failed) {
        e = a->error;
        answer_fail(a, &e);
    } else if (!submit_more(a, &e)) {
        answer_fail(a, &e);
    } else if (a->n_running == 0 && a->n_submitted == a->n_parts) {
        if (a->request.stream) finish_stream(a);
        a->done = true;
    }
}

bool answer_done(const struct answer *a) {
    return a->done;
}

bool answer_began(const struct answer *a) {
    return a->began;
}

bool answer_waits(const struct answer *a) {
    return a->waits;
}

bool answer_streams(const struct answer *a) {
    return a->request.stream;
}

const struct api_error *answer_error(const struct answer *a) {
    return a->failed ? &a->error : NULL;
}

struct sched_usage answer_usage(const struct answer *a) {
    return a->usage;
}

char *answer_body(struct answer *a) {
    cJSON *choices = cJSON_CreateArray();
    size_t n = a->n_parts * (size_t)a->request.generate.n;
    bool failed = false;
    for (size_t i = 0; i < n; i++) {
        struct choice *c = &a->choices[i];
        const char *bytes = c->text.bytes ? c->text.bytes : "";
        cJSON *item = cJSON_CreateObject(), *text = text_after_echo(a, i, bytes, c->text.len);
        failed = failed || c->text.failed || !text;
        json_add(item, "index", cJSON_CreateNumber((double)i));
        if (a->request.chat) {
            cJSON *message = cJSON_AddObjectToObject(item, "message");
            json_add(message, "role", cJSON_CreateString("assistant"));
            json_add(message, "content", text);
            json_add(message, "refusal", cJSON_CreateNull());
        } else {
            json_add(item, "text", text);
        }
        add_logprobs(item, c);
        add_finish(item, c);
        cJSON_AddItemToArray(choices, item);
    }
    cJSON *root = envelope(a, choices);
    json_add(root, "usage", openai_usage(&a->usage));
    char *body = failed ? NULL : cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    return body;
}

ssize_t answer_read(struct answer *a, char *out, size_t room) {
    if (a->output.failed) return -1;
    size_t n = a->output.len < room ? a->output.len : room;
    if (n) memcpy(out, a->output.bytes, n);
    buffer_drop(&a->output, n);
    return (ssize_t)n;
}
