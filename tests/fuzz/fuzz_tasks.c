/* fuzz_tasks.c - any bytes as a file of multiple-choice questions: what is accepted is whole, what
 * is refused has one sentence with the file's name. */
#include "convert/tasks.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct tasks *tasks = NULL;
    char msg[300] = "";
    if (tasks_parse(&tasks, (const char *)data, size, "fuzz.jsonl", msg, sizeof msg)) {
        if (tasks || strncmp(msg, "fuzz.jsonl:", 11) != 0) abort();
        return 0;
    }
    int line = 0;
    for (int i = 0; i < tasks->n; i++) {
        const struct task *t = &tasks->tasks[i];
        if (t->line <= line || !*t->context || t->n_choices < 2 || t->n_choices > MAX_CHOICES)
            abort();
        if (t->answer < 0 || t->answer >= t->n_choices) abort();
        for (int c = 0; c < t->n_choices; c++)
            if (!*t->choices[c]) abort();
        line = t->line;
    }
    if (!tasks->n) abort();
    tasks_free(tasks);
    return 0;
}
