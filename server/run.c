/* run.c - one sequence, read and continued directly: slot 0 of a model nobody else uses. */
#include "server/run.h"

#include "scheduler/sampler.h"
#include "server/buffer.h"
#include "server/open.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <unistd.h>

struct talk {
    const struct settings *settings;
    struct model *model;
    const struct model_info *info;
    struct sampler *sampler;
    struct sampling sampling;
    const float *logits; /* after the last token read; borrowed from the model */
    int64_t n_drawn;     /* numbers the draws */
    int32_t *unread;     /* owned [n_unread of room]: belong to the sequence, not yet read */
    size_t n_unread, room;
    int signal_fd;  /* Ctrl-C in a chat; -1: it ends the program */
    bool stopped;   /* Ctrl-C came during this turn */
    char *question; /* owned; of the last exchange, NULL before the first */
    struct buffer answer;
    char msg[512];
};

/* Was Ctrl-C pressed since the last call? */
static bool interrupted(const struct talk *t) {
    struct signalfd_siginfo info;
    return t->signal_fd >= 0 && read(t->signal_fd, &info, sizeof info) == sizeof info;
}

static enum err fail(struct talk *t, enum err err, const char *why) {
    return err_set(t->msg, sizeof t->msg, err, "%s", why);
}

/* ---- the sequence ---- */

static enum err append(struct talk *t, const int32_t *ids, size_t n) {
    if (n > t->room - t->n_unread) {
        int32_t *more = realloc(t->unread, (t->n_unread + n) * sizeof *more);
        if (!more) return fail(t, ERR_NOMEM, "out of memory");
        t->unread = more;
        t->room = t->n_unread + n;
    }
    memcpy(t->unread + t->n_unread, ids, n * sizeof *ids);
    t->n_unread += n;
    return OK;
}

/* Reads what is unread, or the one token just drawn; Ctrl-C leaves the rest for the next turn. */
static enum err read_on(struct talk *t, bool drawn) {
    int64_t limit = t->info->max_seq_len;
    if (limit && model_slot_position(t->model, 0) + (int64_t)t->n_unread > limit)
        return fail(t, ERR_ARG, "the model's longest sequence is reached (see --max-seq-len)");
    while (t->n_unread && !t->stopped) {
        size_t chunk = (size_t)prefill_chunk(t->settings, t->model);
        int rows = (int)(t->n_unread < chunk ? t->n_unread : chunk);
        struct model_run run = {
            .n_rows = rows, .tokens = t->unread, .n_logits = 1, .generated = drawn};
        enum err err = model_step(t->model, &run, 1, &t->logits);
        if (err) return fail(t, err, "the model's step failed");
        t->n_unread -= (size_t)rows;
        memmove(t->unread, t->unread + rows, t->n_unread * sizeof *t->unread);
        t->stopped = interrupted(t);
    }
    return OK;
}

static bool ends_text(const struct talk *t, int32_t token) {
    for (int i = 0; i < t->info->n_eos_ids; i++)
        if (t->info->eos_ids[i] == token) return true;
    return false;
}

/* Prints what is whole of the answer from *shown on. */
static void show(struct talk *t, size_t *shown, bool all) {
    size_t n = t->answer.len - *shown;
    if (!all) n = utf8_whole(t->answer.bytes + *shown, n);
    if (n) fwrite(t->answer.bytes + *shown, 1, n, stdout);
    fflush(stdout);
    *shown += n;
}

/* Reads on and continues the sequence until it ends, is long enough, or Ctrl-C. */
static enum err generate(struct talk *t) {
    const struct settings *s = t->settings;
    const struct tokenizer *tokenizer = model_tokenizer(t->model);
    size_t shown = 0;
    enum err err = OK;
    for (int64_t i = 0; s->max_tokens < 0 || i < s->max_tokens; i++) {
        err = read_on(t, i > 0);
        if (err || t->stopped) break;
        int32_t token = sample(t->sampler, t->logits, &t->sampling, NULL, NULL, 0, 0, t->n_drawn++);
        if (ends_text(t, token)) break;
        size_t n;
        const char *bytes = token_bytes(tokenizer, token, false, &n);
        buffer_append(&t->answer, bytes, n);
        show(t, &shown, false);
        err = append(t, &token, 1);
        if (err) break;
    }
    show(t, &shown, true);
    return err;
}

/* ---- turns ---- */

static enum err render(struct talk *t, const struct chat_message *messages, size_t n,
                       bool open_last, int32_t **ids, size_t *n_ids) {
    return chat_render(model_chat(t->model), messages, n, !open_last, open_last, ids, n_ids, t->msg,
                       sizeof t->msg);
}

static struct chat_message message(const char *role, const char *text, size_t len) {
    return (struct chat_message){.role = role, .content = text, .content_len = len};
}

/* Tokens of the first turn. */
static enum err first_turn(struct talk *t, const char *text, int32_t **ids, size_t *n_ids) {
    const char *system = t->settings->system;
    struct chat_message messages[2];
    size_t n = 0;
    if (system) messages[n++] = message("system", system, strlen(system));
    messages[n++] = message("user", text, strlen(text));
    return render(t, messages, n, false, ids, n_ids);
}

/* What follows the answer in the state: the end of its turn, and the new question.  Found by
 * rendering the last exchange with its answer left open, and again with the new question: the
 * second goes on where the first ends.  *skip: tokens already in the state. */
static enum err next_turn(struct talk *t, const char *text, int32_t **ids, size_t *n_ids,
                          size_t *skip) {
    struct chat_message messages[3] = {
        message("user", t->question, strlen(t->question)),
        message("assistant", t->answer.bytes ? t->answer.bytes : "", t->answer.len),
        message("user", text, strlen(text))};
    int32_t *open;
    size_t n_open;
    enum err err = render(t, messages, 2, true, &open, &n_open);
    if (err) return err;
    err = render(t, messages, 3, false, ids, n_ids);
    if (err == OK) *skip = n_open;
    if (err == OK && (*n_ids < n_open || memcmp(open, *ids, n_open * sizeof *open) != 0))
        err = fail(t, ERR_ARG, "this chat format cannot be continued turn by turn");
    free(open);
    return err;
}

static bool is_raw(const struct talk *t) {
    return t->settings->raw || chat_family(model_chat(t->model)) == CHAT_NONE;
}

static enum err turn(struct talk *t, const char *text) {
    int32_t *ids = NULL;
    size_t n = 0, skip = 0;
    enum err err;
    bool first = !t->question;
    if (is_raw(t)) {
        int flags = TOKENIZE_SPECIAL | (first ? TOKENIZE_ADD_BOS_EOS : 0);
        err = tokenize(model_tokenizer(t->model), text, strlen(text), flags, &ids, &n);
        if (err) fail(t, err, "out of memory");
        if (err == OK && n == 0) err = fail(t, ERR_ARG, "the prompt is empty");
    } else if (first) {
        err = first_turn(t, text, &ids, &n);
    } else {
        err = next_turn(t, text, &ids, &n, &skip);
    }
    if (err == OK) err = append(t, ids + skip, n - skip);
    free(ids);
    if (err) return err;
    free(t->question);
    t->question = strdup(text);
    if (!t->question) return fail(t, ERR_NOMEM, "out of memory");
    t->answer.len = 0;
    t->stopped = false;
    return generate(t);
}

/* ---- the two ways to use it ---- */

/* Waits for a line; false: Ctrl-C instead.  A terminal hands out whole lines, so stdio holds
 * nothing back. */
static bool line_comes(const struct talk *t) {
    struct pollfd p[2] = {{.fd = STDIN_FILENO, .events = POLLIN},
                          {.fd = t->signal_fd, .events = POLLIN}};
    poll(p, 2, -1);
    return !interrupted(t);
}

static enum err chat_loop(struct talk *t) {
    char *line = NULL;
    size_t room = 0;
    enum err err = OK;
    fprintf(stderr, "%s. Ctrl-C stops an answer, Ctrl-D leaves.\n", t->info->name);
    while (err == OK) {
        fputs("\n> ", stdout);
        fflush(stdout);
        if (!line_comes(t)) continue;
        ssize_t n = getline(&line, &room, stdin);
        if (n < 0) break;
        if (n && line[n - 1] == '\n') line[--n] = 0;
        if (n == 0) continue;
        err = turn(t, line);
        putchar('\n');
    }
    free(line);
    putchar('\n');
    return err;
}

static enum err answer_once(struct talk *t) {
    struct buffer input = {0};
    if (!t->settings->prompt) {
        char block[4096];
        for (size_t n; (n = fread(block, 1, sizeof block, stdin)) > 0;)
            buffer_append(&input, block, n);
        while (input.len && input.bytes[input.len - 1] == '\n')
            input.len--;
        buffer_append(&input, "", 1);
    }
    enum err err = input.failed ? fail(t, ERR_NOMEM, "out of memory")
                                : turn(t, t->settings->prompt ? t->settings->prompt : input.bytes);
    buffer_free(&input);
    putchar('\n');
    return err;
}

static enum err open_talk(struct talk *t, struct team *team) {
    const struct settings *s = t->settings;
    enum err err = open_model(&t->model, s, 1, team, show_progress, t->msg, sizeof t->msg);
    if (err) return err;
    t->info = model_info(t->model);
    if (sampler_new(&t->sampler, t->info->vocab_size)) return fail(t, ERR_NOMEM, "out of memory");
    model_slot_clear(t->model, 0);
    sampling_init(&t->sampling);
    t->sampling.temperature = (float)s->temperature;
    t->sampling.top_p = (float)s->top_p;
    t->sampling.top_k = s->top_k;
    t->sampling.min_p = (float)s->min_p;
    t->sampling.seed = (uint64_t)s->seed;
    if (s->seed < 0 && getrandom(&t->sampling.seed, sizeof t->sampling.seed, 0) < 0)
        t->sampling.seed = 0;
    return OK;
}

bool run_is_chat(const struct settings *settings) {
    return !settings->prompt && isatty(STDIN_FILENO);
}

int run_main(const struct settings *settings, struct team *team) {
    struct talk t = {.settings = settings, .signal_fd = -1};
    enum err err = open_talk(&t, team);
    if (err == OK && run_is_chat(settings)) {
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGINT);
        t.signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
        err = t.signal_fd >= 0 ? chat_loop(&t) : fail(&t, ERR_IO, "Ctrl-C cannot be caught");
    } else if (err == OK) {
        err = answer_once(&t);
    }
    if (err) fprintf(stderr, "urchin: %s\n", t.msg);
    if (t.signal_fd >= 0) close(t.signal_fd);
    free(t.unread);
    free(t.question);
    buffer_free(&t.answer);
    sampler_free(t.sampler);
    model_close(t.model);
    return err ? 1 : 0;
}
