/* settings_rows.h - the table of settings, for what reads it (settings.c) and what tells of it (settings_help.c). */
#ifndef URCHIN_CONFIG_SETTINGS_ROWS_H
#define URCHIN_CONFIG_SETTINGS_ROWS_H

#include "config/settings.h"

enum type { TEXT, CHOICE, SWITCH, INT, INT64, DOUBLE, SIZE, LIST };

enum { /* which commands know a setting */
       SERVE = 1 << COMMAND_SERVE,
       RUN = 1 << COMMAND_RUN,
       INFO = 1 << COMMAND_INFO,
       EVAL = 1 << COMMAND_EVAL,
       BENCH = 1 << COMMAND_BENCH,
       CONVERT = 1 << COMMAND_CONVERT,
       ALL = SERVE | RUN | INFO | EVAL | BENCH | CONVERT,
};

struct row {
    const char *name;
    enum type type;
    size_t offset; /* of the field in struct settings */
    int commands;
    const char *value;   /* the default as a user would write it, NULL: none */
    double min, max;     /* numbers; SIZE: in bytes */
    int64_t unit;        /* SIZE: bytes in one of the field */
    const char *metavar; /* what --help calls the value; CHOICE: the words, separated by | */
    const char *help;
};

#define KIB 1024.0

enum { MODEL_ROW, PROMPT_ROW }; /* the two that may be given without a flag */
extern const struct row settings_rows[];
extern const int settings_n_rows;

enum { N_COMMANDS = 6 };
extern const char *const settings_command_names[N_COMMANDS], *const settings_command_help[N_COMMANDS];

void settings_command_list(char *out, size_t len, int commands);        /* "serve, run and bench" */
void settings_variable_name(char *out, size_t len, const char *name);   /* URCHIN_MAX_SEQ_LEN of max-seq-len */
void settings_describe(char *out, size_t len, const struct row *row);   /* what values are right */

#endif
