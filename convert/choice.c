/* choice.c - multiple choice by log-likelihood. */
#include "convert/choice.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

double choice_accuracy(int n, int right) {
    return n ? (double)right / n : NAN;
}
double choice_error(int n, int right) {
    double a = choice_accuracy(n, right);
    return n > 1 ? sqrt(a * (1 - a) / (n - 1)) : NAN;
}

/* The tokens of context and choice together. */
static enum err tokens_of_both(const struct tokenizer *tokenizer, const char *context,
                               const char *choice, int32_t **ids, size_t *n) {
    size_t len = strlen(context), more = strlen(choice);
    bool space = !isspace((unsigned char)*choice) && !isspace((unsigned char)context[len - 1]);
    char *both = malloc(len + space + more);
    if (!both) return ERR_NOMEM;
    memcpy(both, context, len);
    if (space) both[len] = ' ';
    memcpy(both + len + space, choice, more);
    enum err e = tokenize(tokenizer, both, len + space + more, 0, ids, n);
    free(both);
    return e;
}

struct asking {
    struct reader *reader;
    const char *file;
    const struct task *task;
    int vocab_size;
    float *first; /* [vocab_size] logits after the context */
    char *msg;
    size_t msg_len;
};

/* A tokenizer may know more tokens than its model has weights for. */
static enum err check_weights(const struct asking *a, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= a->vocab_size)
            return err_set(a->msg, a->msg_len, ERR_ARG,
                           "%s:%d: one of the tokens is number %d, and %s has weights for %d",
                           a->file, a->task->line, ids[i], a->reader->name, a->vocab_size);
    return OK;
}

/* The context, and the logits after it. */
static enum err read_context(struct asking *a, const int32_t *ids, size_t n, int32_t bos) {
    struct reader *r = a->reader;
    const float *logits = NULL;
    model_slot_clear(r->model, r->slot);
    enum err e = OK;
    if (bos >= 0) e = reader_feed(r, &bos, 1, n ? 0 : 1, &logits, a->msg, a->msg_len);
    if (!e && n) e = reader_feed(r, ids, (int64_t)n, 1, &logits, a->msg, a->msg_len);
    if (!e) memcpy(a->first, logits, (size_t)a->vocab_size * sizeof *a->first);
    return e;
}

/* sum of log p of ids [n], which follow the context. */
static enum err read_choice(struct asking *a, const int32_t *ids, int64_t n, double *likelihood) {
    struct reader spare = *a->reader;
    *likelihood = -score_row(a->first, NULL, a->vocab_size, ids[0]).nll;
    if (n == 1) return OK;
    spare.slot = spare.spare;
    model_slot_copy(spare.model, spare.slot, a->reader->slot);
    for (int64_t at = 0; at < n - 1;) {
        int rows = n - 1 - at < READING_ROWS ? (int)(n - 1 - at) : READING_ROWS;
        const float *logits = NULL;
        enum err e = reader_feed(&spare, ids + at, rows, rows, &logits, a->msg, a->msg_len);
        if (e) return e;
        for (int i = 0; i < rows; i++, at++)
            *likelihood -= score_row(logits + (size_t)i * (size_t)a->vocab_size, NULL,
                                     a->vocab_size, ids[at + 1])
                               .nll;
    }
    return OK;
}

static enum err ask_choice(struct asking *a, size_t n_context, int32_t bos, int i,
                           double *likelihood) {
    const struct task *t = a->task;
    int64_t limit = model_info(a->reader->model)->max_seq_len;
    int32_t *ids;
    size_t n;
    enum err e =
        tokens_of_both(model_tokenizer(a->reader->model), t->context, t->choices[i], &ids, &n);
    if (e) return err_set(a->msg, a->msg_len, e, "out of memory");
    if (n <= n_context)
        e = err_set(a->msg, a->msg_len, ERR_ARG,
                    "%s:%d: choice %d has no token of its own after this question", a->file,
                    t->line, i);
    else if (limit && (int64_t)n - 1 + (bos >= 0) > limit)
        e = err_set(a->msg, a->msg_len, ERR_ARG,
                    "%s:%d: the question has %zu tokens with choice %d, %s reads at most %lld",
                    a->file, t->line, n, i, a->reader->name, (long long)limit);
    if (!e) e = check_weights(a, ids, n);
    if (!e) e = read_choice(a, ids + n_context, (int64_t)(n - n_context), likelihood);
    free(ids);
    return e;
}

enum err choice_ask(double *likelihoods, struct reader *reader, const char *file,
                    const struct task *task, int32_t bos, char *msg, size_t msg_len) {
    struct asking a = {.reader = reader,
                       .file = file,
                       .task = task,
                       .vocab_size = model_info(reader->model)->vocab_size,
                       .msg = msg,
                       .msg_len = msg_len};
    int64_t limit = model_info(reader->model)->max_seq_len;
    int32_t *ids = NULL;
    size_t n = 0;
    enum err e =
        tokenize(model_tokenizer(reader->model), task->context, strlen(task->context), 0, &ids, &n);
    a.first = malloc((size_t)a.vocab_size * sizeof *a.first);
    if (e || !a.first) {
        e = err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    } else if (n + (bos >= 0) == 0) {
        e = err_set(msg, msg_len, ERR_ARG, "%s:%d: the question has no tokens", file, task->line);
    } else if (limit && (int64_t)n + (bos >= 0) > limit) {
        e = err_set(msg, msg_len, ERR_ARG,
                    "%s:%d: the question has %zu tokens, %s reads at most %lld", file, task->line,
                    n, reader->name, (long long)limit);
    } else {
        e = check_weights(&a, ids, n);
        if (!e) e = read_context(&a, ids, n, bos);
    }
    for (int i = 0; i < task->n_choices && !e; i++)
        e = ask_choice(&a, n, bos, i, &likelihoods[i]);
    free(a.first);
    free(ids);
    return e;
}

void choice_pick(const double *likelihoods, const struct task *task, int *plain, int *normalised) {
    *plain = *normalised = 0;
    double bytes = (double)strlen(task->choices[0]);
    for (int i = 1; i < task->n_choices; i++) {
        double len = (double)strlen(task->choices[i]);
        if (likelihoods[i] > likelihoods[*plain]) *plain = i;
        if (likelihoods[i] / len > likelihoods[*normalised] / bytes) *normalised = i, bytes = len;
    }
}

enum err choice_measure(struct choice_sums *sums, struct reader *readers, int n_readers,
                        const struct tasks *tasks, int32_t bos, char *msg, size_t msg_len) {
    for (int t = 0; t < tasks->n; t++)
        for (int r = 0; r < n_readers; r++) {
            const struct task *task = &tasks->tasks[t];
            double likelihoods[MAX_CHOICES];
            int plain, normalised;
            enum err e = choice_ask(likelihoods, &readers[r], tasks->file, task, bos, msg, msg_len);
            if (e) return e;
            choice_pick(likelihoods, task, &plain, &normalised);
            sums[r].n++;
            sums[r].right += plain == task->answer;
            sums[r].right_norm += normalised == task->answer;
        }
    return OK;
}
