/* eval_testing.h - `urchin eval` run from the words of its command line, and copies of a model in
 * which one file is another. */
#ifndef URCHIN_TESTS_EVAL_TESTING_H
#define URCHIN_TESTS_EVAL_TESTING_H

#include "command_testing.h"
#include "convert/eval.h"

#include <limits.h>

#define MODEL "models/stories260k-hedgehog"

static inline int run_eval(char **flags, int n_flags, int out_fd, char *text, size_t room) {
    return run_command(eval_main, flags, n_flags, out_fd, text, room);
}

static inline void write_text(const char *path, const char *text) {
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

/* A file's text with one piece of it replaced by another; free(). */
static inline char *edited(const char *path, const char *piece, const char *by) {
    enum { ROOM = 1 << 16 };
    char *text = calloc(1, ROOM), *out = calloc(1, ROOM + strlen(by));
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    assert_in_range(fread(text, 1, ROOM - 1, file), 1, ROOM - 2);
    fclose(file);
    char *at = strstr(text, piece);
    assert_non_null(at);
    sprintf(out, "%.*s%s%s", (int)(at - text), text, by, at + strlen(piece));
    free(text);
    return out;
}

static const char *const model_files[] = {"config.json",           "model.safetensors",
                                          "hedgehog.safetensors",  "tokenizer.json",
                                          "tokenizer_config.json", "urchin.json"};
enum { N_MODEL_FILES = sizeof model_files / sizeof *model_files };

/* folder: a template of mkdtemp's.  Links to MODEL's files, but one holds this text. */
static inline void copy_model(char *folder, const char *other, const char *text) {
    char path[PATH_MAX], target[PATH_MAX];
    assert_non_null(mkdtemp(folder));
    for (int i = 0; i < N_MODEL_FILES; i++) {
        snprintf(path, sizeof path, MODEL "/%s", model_files[i]);
        assert_non_null(realpath(path, target));
        snprintf(path, sizeof path, "%s/%s", folder, model_files[i]);
        if (strcmp(model_files[i], other))
            assert_int_equal(symlink(target, path), 0);
        else
            write_text(path, text);
    }
}

static inline void remove_copy(const char *folder) {
    char path[PATH_MAX];
    for (int i = 0; i < N_MODEL_FILES; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, model_files[i]);
        unlink(path);
    }
    assert_int_equal(rmdir(folder), 0);
}

#endif
