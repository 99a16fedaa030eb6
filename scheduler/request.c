/* request.c - see request.h. */
#include "scheduler/request.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void sched_request_init(struct sched_request *r) {
    *r = (struct sched_request){.max_tokens = 16, .n = 1, .best_of = 1, .n_logprobs = -1};
    sampling_init(&r->sampling);
}

/* ---- checks: what a server has told its client in its own words already ---- */

static enum err check_tokens(const int32_t *tokens, size_t n, int vocab_size, const char *what,
                             char *msg, size_t msg_len) {
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= vocab_size)
            return err_set(msg, msg_len, ERR_ARG, "%s: token %d is not in the vocabulary (0 to %d)",
                           what, tokens[i], vocab_size - 1);
    return OK;
}

static enum err check_sampling(const struct sampling *s, char *msg, size_t msg_len) {
    const char *wrong = !(s->temperature >= 0 && s->temperature < INFINITY) ? "temperature"
                        : !(s->top_p > 0 && s->top_p <= 1)                  ? "top_p"
                        : s->top_k < -1                                     ? "top_k"
                        : !(s->min_p >= 0 && s->min_p <= 1)                 ? "min_p"
                        : !(s->repetition_penalty > 0 && s->repetition_penalty < INFINITY)
                            ? "repetition_penalty"
                        : !isfinite(s->presence_penalty)  ? "presence_penalty"
                        : !isfinite(s->frequency_penalty) ? "frequency_penalty"
                                                          : NULL;
    return wrong ? err_set(msg, msg_len, ERR_ARG, "%s is out of range", wrong) : OK;
}

static enum err check(const struct sched_request *asked, const struct model_info *info, char *msg,
                      size_t msg_len) {
    if (asked->n_prompt < 1) return err_set(msg, msg_len, ERR_ARG, "the prompt is empty");
    if (asked->n < 1 || asked->best_of < asked->n)
        return err_set(msg, msg_len, ERR_ARG, "best_of must be at least n, and n at least 1");
    if (asked->best_of > info->n_slots)
        return err_set(msg, msg_len, ERR_ARG,
                       "%s %d is more than the %d sequences that fit at once (--max-seqs)",
                       asked->best_of > asked->n ? "best_of" : "n", asked->best_of, info->n_slots);
    if (asked->max_tokens < -1 || asked->min_tokens < 0)
        return err_set(msg, msg_len, ERR_ARG, "max_tokens and min_tokens must not be negative");
    if (asked->best_of > asked->n && asked->max_tokens < 0)
        return err_set(msg, msg_len, ERR_ARG, "best_of above n needs max_tokens");
    if (asked->n_logprobs < -1 || asked->n_logprobs > info->vocab_size)
        return err_set(msg, msg_len, ERR_ARG, "logprobs is out of range");
    if (info->max_seq_len &&
        (int64_t)asked->n_prompt + (asked->max_tokens != 0) > info->max_seq_len)
        return err_set(
            msg, msg_len, ERR_ARG,
            "the prompt has %zu tokens, which leaves no room in a sequence of at most %lld tokens",
            asked->n_prompt, (long long)info->max_seq_len);
    for (int i = 0; i < asked->n_stop; i++)
        if (!asked->stop_len[i]) return err_set(msg, msg_len, ERR_ARG, "a stop string is empty");
    for (int i = 0; i < asked->sampling.n_bias; i++) {
        enum err err = check_tokens(&asked->sampling.bias[i].token, 1, info->vocab_size,
                                    "logit_bias", msg, msg_len);
        if (err) return err;
    }
    enum err err =
        check_tokens(asked->prompt, asked->n_prompt, info->vocab_size, "prompt", msg, msg_len);
    if (!err)
        err = check_tokens(asked->stop_tokens, (size_t)asked->n_stop_tokens, info->vocab_size,
                           "stop_token_ids", msg, msg_len);
    if (!err) err = check_sampling(&asked->sampling, msg, msg_len);
    return err;
}

static int64_t token_limit(const struct sched_request *asked, const struct model_info *info,
                           int64_t default_max) {
    int64_t most = asked->max_tokens;
    if (most < 0 && default_max > 0) most = default_max;
    if (info->max_seq_len) {
        int64_t room = info->max_seq_len - (int64_t)asked->n_prompt;
        if (most < 0 || most > room) most = room;
    }
    return most;
}

/* ---- copies ---- */

/* malloc'd copy; never NULL but for want of memory, also of nothing. */
static void *copy(const void *from, size_t n, size_t size) {
    void *to = malloc(n * size + 1);
    if (to && n) memcpy(to, from, n * size);
    return to;
}

static bool copy_stops(struct request *r, const struct sched_request *asked) {
    size_t bytes = 0;
    for (int i = 0; i < asked->n_stop; i++)
        bytes += asked->stop_len[i] + 1;
    char *block = calloc(bytes + 1, 1);
    r->text_block = block;
    r->stops = calloc((size_t)asked->n_stop + 1, sizeof *r->stops);
    if (!block || !r->stops) return false;
    for (int i = 0; i < asked->n_stop; i++) {
        memcpy(block, asked->stop[i], asked->stop_len[i]);
        if (stop_string_init(&r->stops[i], block, asked->stop_len[i])) return false;
        block += asked->stop_len[i] + 1;
    }
    return true;
}

/* Ends of text (unless ignored) and stop tokens. */
static bool copy_ends(struct request *r, const struct sched_request *asked,
                      const struct model_info *info) {
    int n_eos = asked->ignore_eos ? 0 : info->n_eos_ids;
    r->ends = malloc(((size_t)n_eos + (size_t)asked->n_stop_tokens + 1) * sizeof *r->ends);
    if (!r->ends) return false;
    for (int i = 0; i < n_eos; i++)
        r->ends[r->n_ends++] = info->eos_ids[i];
    for (int i = 0; i < asked->n_stop_tokens; i++)
        r->ends[r->n_ends++] = asked->stop_tokens[i];
    return true;
}

static bool choice_init(struct choice *c, const struct request *r, const struct choice *first,
                        int vocab_size) {
    const struct sampling *s = &r->asked.sampling;
    int n_top = r->asked.n_logprobs > 0 ? r->asked.n_logprobs : 0;
    c->slot = -1;
    c->room_held = 8;
    c->held = malloc((size_t)c->room_held * sizeof *c->held);
    c->tops = malloc((size_t)c->room_held * (size_t)n_top * sizeof *c->tops + 1);
    c->emergency = event_node_new(&(struct sched_event){.stop_token = -1});
    if (text_init(&c->text, r->asked.n_stop) || !c->held || !c->tops || !c->emergency) return false;
    if (s->repetition_penalty == 1 && s->presence_penalty == 0 && s->frequency_penalty == 0)
        return true;
    if (token_counts_new(&c->counts, vocab_size)) return false;
    if (first)
        token_counts_copy(c->counts, first->counts);
    else
        for (size_t i = 0; i < r->asked.n_prompt; i++)
            token_counts_add_prompt(c->counts, r->asked.prompt[i]);
    return true;
}

enum err request_new(struct request **out, const struct sched_request *asked,
                     const struct model_info *info, int64_t default_max, char *msg,
                     size_t msg_len) {
    enum err err = check(asked, info, msg, msg_len);
    if (err) return err;
    struct request *r = calloc(1, sizeof *r);
    if (!r) goto fail;
    r->asked = *asked;
    r->asked.prompt = copy(asked->prompt, asked->n_prompt, sizeof *asked->prompt);
    r->asked.sampling.bias =
        copy(asked->sampling.bias, (size_t)asked->sampling.n_bias, sizeof *asked->sampling.bias);
    r->asked.stop = NULL; /* text_block and ends are the copies */
    r->asked.stop_len = NULL;
    r->asked.stop_tokens = NULL;
    if (!r->asked.prompt || !r->asked.sampling.bias) goto fail;
    if (!copy_stops(r, asked) || !copy_ends(r, asked, info)) goto fail;
    r->max_tokens = token_limit(asked, info, default_max);
    r->n_unfinished = asked->best_of;
    size_t n_top = asked->n_logprobs > 0 ? (size_t)asked->n_logprobs : 0;
    if (!(r->tops = malloc(n_top * sizeof *r->tops + 1))) goto fail;
    if (asked->prompt_logprobs) {
        r->prompt_tokens = calloc(asked->n_prompt, sizeof *r->prompt_tokens);
        r->prompt_tops = malloc(asked->n_prompt * n_top * sizeof *r->prompt_tops + 1);
        if (!r->prompt_tokens || !r->prompt_tops) goto fail;
        r->prompt_tokens[0] = (struct sched_token){.token = asked->prompt[0], .logprob = NAN};
    }
    r->choices = calloc((size_t)asked->best_of, sizeof *r->choices);
    if (!r->choices) goto fail;
    for (int i = 0; i < asked->best_of; i++)
        if (!choice_init(&r->choices[i], r, i ? &r->choices[0] : NULL, info->vocab_size)) goto fail;
    *out = r;
    return OK;
fail:
    request_free(r);
    return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
}

static void free_events(struct event_node *node) {
    while (node) {
        struct event_node *next = node->next;
        free(node);
        node = next;
    }
}

void request_free(struct request *r) {
    if (!r) return;
    for (int i = 0; r->choices && i < r->asked.best_of; i++) {
        struct choice *c = &r->choices[i];
        text_free(&c->text);
        token_counts_free(c->counts);
        free(c->held);
        free(c->tops);
        free_events(c->kept);
        free(c->emergency);
    }
    for (int i = 0; r->stops && i < r->asked.n_stop; i++)
        stop_string_free(&r->stops[i]);
    free(r->choices);
    free(r->stops);
    free((void *)r->text_block);
    free((void *)r->asked.prompt);
    free((void *)r->asked.sampling.bias);
    free(r->ends);
    free(r->tops);
    free(r->prompt_tokens);
    free(r->prompt_tops);
    free(r);
}

bool request_is_end(const struct request *r, int32_t token) {
    for (int i = 0; i < r->n_ends; i++)
        if (r->ends[i] == token) return true;
    return false;
}
