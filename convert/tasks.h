/* tasks.h - multiple-choice questions from a JSONL file, one object a line:
 *
 *   {"question": "The sky is", "choices": ["blue", "green"], "answer": 0}
 *
 * `context` is another name for `question`: the text before the answer, taken as it is.  `choices`
 * are 2 to MAX_CHOICES texts that are not empty; `answer` is the right one's index, from 0.  Other
 * keys are passed over, and so are empty lines.  A line that is anything else refuses the file, by
 * name and line. */
#ifndef URCHIN_CONVERT_TASKS_H
#define URCHIN_CONVERT_TASKS_H

#include "config/err.h"
#include <stddef.h>

enum { MAX_CHOICES = 64 };

struct task {
    int line; /* of the file, from 1 */
    char *context;
    char **choices; /* [n_choices] */
    int n_choices, answer;
};

struct tasks {
    const char *file; /* borrowed */
    struct task *tasks;
    int n;
};

/* text [len] is a file's bytes, `file` its name for messages (borrowed by *out).  ERR_FORMAT: the
 * sentence names file and line; a file without questions is refused too. */
enum err tasks_parse(struct tasks **out, const char *text, size_t len, const char *file, char *msg,
                     size_t msg_len);
enum err tasks_load(struct tasks **out, const char *path, char *msg,
                    size_t msg_len); /* ERR_IO too */
void tasks_free(struct tasks *t);    /* NULL is fine */

#endif
