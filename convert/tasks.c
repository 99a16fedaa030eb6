/* tasks.c - multiple-choice questions from a JSONL file. */
#include "convert/tasks.h"

#include "config/json.h"
#include "model/mapped.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void free_task(struct task *t) {
    for (int i = 0; t->choices && i < t->n_choices; i++)
        free(t->choices[i]);
    free(t->choices);
    free(t->context);
}

void tasks_free(struct tasks *t) {
    if (!t) return;
    for (int i = 0; i < t->n; i++)
        free_task(&t->tasks[i]);
    free(t->tasks);
    free(t);
}

struct line { /* where messages point */
    const char *file;
    int number;
    char *msg;
    size_t msg_len;
};

__attribute__((format(printf, 2, 3))) static enum err fail(const struct line *l, const char *format,
                                                           ...) {
    char what[256];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    return err_set(l->msg, l->msg_len, ERR_FORMAT, "%s:%d: %s", l->file, l->number, what);
}

static enum err read_choices(struct task *t, const struct json *choices, const struct line *l) {
    int n = json_type(choices) == JSON_ARRAY ? json_size(choices) : 0;
    if (n < 2 || n > MAX_CHOICES)
        return fail(l, "\"choices\" must be an array of 2 to %d texts", MAX_CHOICES);
    t->choices = calloc((size_t)n, sizeof *t->choices);
    if (!t->choices) return err_set(l->msg, l->msg_len, ERR_NOMEM, "out of memory");
    for (const struct json *c = json_child(choices); c; c = json_next(c)) {
        const char *text = json_string(c);
        if (!text || !*text) return fail(l, "choice %d is not a text, or empty", t->n_choices);
        if (!(t->choices[t->n_choices] = strdup(text)))
            return err_set(l->msg, l->msg_len, ERR_NOMEM, "out of memory");
        t->n_choices++;
    }
    return OK;
}

static enum err read_task(struct task *t, const struct json *root, const struct line *l) {
    const struct json *question = json_get(root, "question"), *context = json_get(root, "context");
    if (json_type(root) != JSON_OBJECT) return fail(l, "this is not a JSON object");
    if (question && context)
        return fail(l, "\"question\" and \"context\" are two names for one thing: give one");
    const char *text = json_string(question ? question : context);
    if (!text || !*text)
        return fail(l, "\"question\" (or \"context\") must be a text that is not empty");
    if (!(t->context = strdup(text)))
        return err_set(l->msg, l->msg_len, ERR_NOMEM, "out of memory");
    enum err e = read_choices(t, json_get(root, "choices"), l);
    if (e) return e;
    int64_t answer;
    if (!json_int(json_get(root, "answer"), &answer) || answer < 0 || answer >= t->n_choices)
        return fail(l, "\"answer\" must be the index of a choice, 0 to %d", t->n_choices - 1);
    t->answer = (int)answer;
    return OK;
}

static enum err add_line(struct tasks *t, int *room, const char *text, size_t len,
                         const struct line *l) {
    if (t->n == *room) {
        int more = *room ? 2 * *room : 64;
        struct task *bigger = realloc(t->tasks, (size_t)more * sizeof *bigger);
        if (!bigger) return err_set(l->msg, l->msg_len, ERR_NOMEM, "out of memory");
        t->tasks = bigger;
        *room = more;
    }
    char name[300];
    snprintf(name, sizeof name, "%.250s:%d", l->file, l->number);
    struct json *root;
    enum err e = json_parse(&root, text, len, name, l->msg, l->msg_len);
    if (e) return e;
    struct task *task = &t->tasks[t->n++];
    *task = (struct task){.line = l->number};
    e = read_task(task, root, l);
    json_free(root);
    return e;
}

static size_t without_space(const char *text, size_t len) {
    while (len && strchr(" \t\r", text[len - 1]) && text[len - 1])
        len--;
    return len;
}

enum err tasks_parse(struct tasks **out, const char *text, size_t len, const char *file, char *msg,
                     size_t msg_len) {
    struct tasks *t = calloc(1, sizeof *t);
    if (!t) return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    struct line l = {file, 1, msg, msg_len};
    enum err e = OK;
    int room = 0;
    t->file = file;
    for (size_t at = 0; at < len && !e; l.number++) {
        const char *end = memchr(text + at, '\n', len - at);
        size_t n = end ? (size_t)(end - text) - at : len - at;
        if (without_space(text + at, n)) e = add_line(t, &room, text + at, n, &l);
        at += n + 1;
    }
    if (!e && !t->n) e = err_set(msg, msg_len, ERR_FORMAT, "%s: no questions are in it", file);
    if (e) {
        tasks_free(t);
        return e;
    }
    *out = t;
    return OK;
}

enum err tasks_load(struct tasks **out, const char *path, char *msg, size_t msg_len) {
    struct mapped file;
    enum err e = mapped_open(&file, path, msg, msg_len);
    if (e) return e;
    e = tasks_parse(out, file.len ? (const char *)file.bytes : "", file.len, path, msg, msg_len);
    mapped_close(&file);
    return e;
}
