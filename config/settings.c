/* settings.c - the three things that set what settings_rows.c lists: flags, environment and file.
 *
 * Every value, defaults included, passes through set(): one parser, one range check, one sentence.
 */
#include "config/settings_rows.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct settings_text {
    struct settings_text *next;
    char text[];
};

static const char *keep(struct settings *s, const char *text) {
    struct settings_text *t = malloc(sizeof *t + strlen(text) + 1);
    if (!t) return NULL;
    strcpy(t->text, text);
    t->next = s->owned;
    s->owned = t;
    return t->text;
}

/* ---- values ---- */

/* Is `word` one of the |-separated choices? */
static bool is_choice(const char *choices, const char *word) {
    size_t n = strlen(word);
    for (const char *c = choices; n && c; c = strchr(c, '|') ? strchr(c, '|') + 1 : NULL)
        if (!strncmp(c, word, n) && (c[n] == '|' || !c[n])) return true;
    return false;
}

static bool parse_switch(const char *text, bool *out) {
    static const char *const words[2][4] = {{"no", "false", "0", "off"},
                                            {"yes", "true", "1", "on"}};
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < 4; i++)
            if (!strcasecmp(text, words[v][i])) {
                *out = v;
                return true;
            }
    return false;
}

static bool parse_whole(const char *text, const char **end, int64_t *out) {
    if (isspace((unsigned char)*text)) return false; /* which strtoll would skip */
    char *stop;
    errno = 0;
    long long v = strtoll(text, &stop, 10);
    if (stop == text || errno) return false;
    *out = v;
    *end = stop;
    return true;
}

/* 0, or a whole number with K, M, G or T (powers of 1024; KiB and KB mean the same). */
static bool parse_size(const char *text, double *bytes) {
    const char *end;
    int64_t n;
    if (!parse_whole(text, &end, &n)) return false;
    static const char units[] = "KMGT";
    const char *u = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
    if (!u) {
        *bytes = 0;
        return n == 0 && !*end;
    }
    end++;
    if (*end && strcasecmp(end, "B") && strcasecmp(end, "iB")) return false;
    *bytes = ldexp((double)n, 10 * (int)(u - units + 1));
    return true;
}

int settings_list(const char *list, int64_t *out, int room) {
    int n = 0;
    for (const char *p = list;; p++) {
        int64_t v;
        if (!parse_whole(p, &p, &v)) return -1;
        if (n < room) out[n] = v;
        n++;
        if (!*p) return n;
        if (*p != ',') return -1;
    }
}

static bool list_in_range(const struct row *row, const char *list) {
    int64_t values[64];
    int n = settings_list(list, values, 64);
    if (n < 1 || n > 64) return false;
    for (int i = 0; i < n; i++)
        if ((double)values[i] < row->min || (double)values[i] > row->max) return false;
    return true;
}

/* What a right value looks like: "a whole number from 1 to 65535". */
void settings_describe(char *out, size_t len, const struct row *row) {
    static const char *const what[] = {[INT] = "a whole number",
                                       [INT64] = "a whole number",
                                       [DOUBLE] = "a number",
                                       [LIST] = "whole numbers",
                                       [SIZE] = "a size like 512K, 8M or 2G"};
    switch (row->type) {
    case TEXT:
        snprintf(out, len, "some text");
        return;
    case CHOICE:
        snprintf(out, len, "one of %s", row->metavar);
        return;
    case SWITCH:
        snprintf(out, len, "yes or no");
        return;
    case SIZE:
        if (row->min > 0)
            snprintf(out, len, "%s, at least %.0fK", what[row->type], row->min / KIB);
        else
            snprintf(out, len, "0 or %s", what[row->type]);
        return;
    default:
        break;
    }
    const char *comma = row->type == LIST ? ", separated by commas" : "";
    if (row->max >= INT_MAX)
        snprintf(out, len, "%s of at least %.0f%s", what[row->type], row->min, comma);
    else
        snprintf(out, len, "%s from %.0f to %.0f%s", what[row->type], row->min, row->max, comma);
}

/* Stores text in the row's field.  source: "--port", "URCHIN_PORT" or "urchin.conf:3: port". */
static enum err set(struct settings *s, const struct row *row, const char *text, const char *source,
                    char *msg, size_t msg_len) {
    void *field = (char *)s + row->offset;
    const char *end;
    int64_t whole = 0;
    double number = 0;
    bool good = false;
    switch (row->type) {
    case TEXT:
        good = true;
        break;
    case CHOICE:
        good = is_choice(row->metavar, text);
        break;
    case SWITCH:
        good = parse_switch(text, field);
        break;
    case LIST:
        good = list_in_range(row, text);
        break;
    case INT:
    case INT64:
        good = parse_whole(text, &end, &whole) && !*end;
        number = (double)whole;
        break;
    case DOUBLE: {
        char *stop;
        number = strtod(text, &stop);
        good = stop != text && !*stop && !isspace((unsigned char)*text);
        break;
    }
    case SIZE:
        good = parse_size(text, &number);
        break;
    }
    if (row->type == INT || row->type == INT64 || row->type == DOUBLE || row->type == SIZE)
        good = good && number >= row->min && number <= row->max; /* false for NaN */
    if (!good) {
        char right[256];
        settings_describe(right, sizeof right, row);
        return err_set(msg, msg_len, ERR_ARG, "%s: '%.200s' is not %s", source, text, right);
    }
    switch (row->type) {
    case TEXT:
    case CHOICE:
    case LIST:
        if (!(*(const char **)field = keep(s, text)))
            return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", source);
        break;
    case SWITCH:
        break;
    case INT:
        *(int *)field = (int)whole;
        break;
    case INT64:
        *(int64_t *)field = whole;
        break;
    case DOUBLE:
        *(double *)field = number;
        break;
    case SIZE:
        *(int64_t *)field = ((int64_t)number + row->unit - 1) / row->unit;
        break;
    }
    return OK;
}

/* ---- names ---- */

/* "serve, run" */
void settings_command_list(char *out, size_t len, int commands) {
    size_t n = 0;
    out[0] = 0;
    for (int c = 0; c < N_COMMANDS && n < len; c++)
        if (commands & 1 << c)
            n += (size_t)snprintf(out + n, len - n, "%s%s", n ? ", " : "",
                                  settings_command_names[c]);
}

static const struct row *find(const char *name, size_t len) {
    for (int i = 0; i < settings_n_rows; i++)
        if (!strncmp(settings_rows[i].name, name, len) && !settings_rows[i].name[len])
            return &settings_rows[i];
    return NULL;
}

/* Edits that turn a into b: inserted, dropped, changed or swapped letters (optimal string
 * alignment).  Names are short. */
static int distance(const char *a, size_t n, const char *b) {
    enum { LONGEST = 40 };
    int lines[3][LONGEST + 1], *before = lines[0], *above = lines[1], *row = lines[2];
    size_t m = strlen(b);
    if (m > LONGEST || n > LONGEST) return INT_MAX;
    for (size_t j = 0; j <= m; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int *spare = before;
        before = above;
        above = row;
        row = spare;
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int best = above[j - 1] + (a[i - 1] != b[j - 1]);
            if (above[j] + 1 < best) best = above[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
                before[j - 2] + 1 < best)
                best = before[j - 2] + 1;
            row[j] = best;
        }
    }
    return row[m];
}

/* The known name nearest to a wrong one among those of `command` (COMMAND_NONE: all), or NULL when
 * none is near. */
static const char *nearest(const char *name, size_t len, enum command command) {
    const char *best = NULL;
    int best_distance = (int)len / 3 + 2;
    for (int i = 0; i < settings_n_rows; i++) {
        if (command != COMMAND_NONE && !(settings_rows[i].commands & 1 << command)) continue;
        int d = distance(name, len, settings_rows[i].name);
        if (d < best_distance) {
            best_distance = d;
            best = settings_rows[i].name;
        }
    }
    return best;
}

/* ---- config file ---- */

static char *trim(char *text) {
    while (isspace((unsigned char)*text))
        text++;
    size_t n = strlen(text);
    while (n && isspace((unsigned char)text[n - 1]))
        text[--n] = 0;
    return text;
}

/* Cuts a comment: # at the start or after white space, outside of quotes. */
static void cut_comment(char *line) {
    bool quoted = false;
    for (char *p = line; *p; p++) {
        if (*p == '"') quoted = !quoted;
        if (*p == '#' && !quoted && (p == line || isspace((unsigned char)p[-1]))) {
            *p = 0;
            return;
        }
    }
}

static enum err read_line(struct settings *s, char *line, const char *path, int number, char *msg,
                          size_t msg_len) {
    cut_comment(line);
    line = trim(line);
    if (!*line) return OK;
    char *equals = strchr(line, '=');
    if (!equals)
        return err_set(msg, msg_len, ERR_ARG, "%s:%d: '%.100s' is not of the form name = value",
                       path, number, line);
    *equals = 0;
    char *name = trim(line), *value = trim(equals + 1);
    size_t n = strlen(value);
    if (n >= 2 && value[0] == '"' && value[n - 1] == '"') {
        value[n - 1] = 0;
        value++;
    }
    const struct row *row = find(name, strlen(name));
    if (!row) {
        const char *near = nearest(name, strlen(name), COMMAND_NONE);
        return err_set(msg, msg_len, ERR_ARG, "%s:%d: no setting is named '%.100s'%s%s%s", path,
                       number, name, near ? "; did you mean '" : "", near ? near : "",
                       near ? "'?" : "");
    }
    char source[512];
    snprintf(source, sizeof source, "%.400s:%d: %s", path, number, row->name);
    return set(s, row, value, source, msg, msg_len);
}

static enum err read_file(struct settings *s, const char *path, const char *source, char *msg,
                          size_t msg_len) {
    FILE *file = fopen(path, "r");
    if (!file)
        return err_set(msg, msg_len, ERR_ARG, "%s: cannot open '%.400s': %s", source, path,
                       strerror(errno));
    char *line = NULL;
    size_t room = 0;
    enum err err = OK;
    for (int number = 1; err == OK && getline(&line, &room, file) >= 0; number++)
        err = read_line(s, line, path, number, msg, msg_len);
    if (err == OK && ferror(file))
        err = err_set(msg, msg_len, ERR_ARG, "%s: cannot read '%.400s': %s", source, path,
                      strerror(errno));
    free(line);
    fclose(file);
    return err;
}

/* ---- environment ---- */

void settings_variable_name(char *out, size_t len, const char *name) {
    size_t n = (size_t)snprintf(out, len, "URCHIN_%s", name);
    for (size_t i = 0; i < n && i < len; i++)
        out[i] = out[i] == '-' ? '_' : (char)toupper((unsigned char)out[i]);
}

static enum err read_environment(struct settings *s, char *msg, size_t msg_len) {
    for (int i = 0; i < settings_n_rows; i++) {
        char name[64];
        settings_variable_name(name, sizeof name, settings_rows[i].name);
        const char *value = getenv(name);
        /* A Kubernetes service named urchin puts URCHIN_PORT=tcp://... into every pod beside it. */
        if (!value || !strncmp(value, "tcp://", 6)) continue;
        enum err err = set(s, &settings_rows[i], value, name, msg, msg_len);
        if (err) return err;
    }
    return OK;
}

/* ---- flags ---- */

static enum err unknown_flag(const char *flag, size_t len, enum command command, char *msg,
                             size_t msg_len) {
    const char *near = nearest(flag, len, command);
    if (!near) near = nearest(flag, len, COMMAND_NONE);
    return err_set(msg, msg_len, ERR_ARG, "there is no flag --%.*s%s%s%s", (int)len, flag,
                   near ? "; did you mean --" : "", near ? near : "", near ? "?" : "");
}

/* argv[*i] begins with "--": sets its row and moves *i past its value. */
static enum err read_flag(struct settings *s, int argc, char **argv, int *i, char *msg,
                          size_t msg_len) {
    const char *flag = argv[*i] + 2;
    const char *equals = strchr(flag, '=');
    size_t len = equals ? (size_t)(equals - flag) : strlen(flag);
    const struct row *row = find(flag, len);
    bool negated = false;
    if (!row && !strncmp(flag, "no-", 3) && (row = find(flag + 3, len - 3))) {
        negated = true;
        if (row->type != SWITCH || equals) row = NULL;
    }
    if (!row) return unknown_flag(flag, len, s->command, msg, msg_len);
    if (s->command != COMMAND_NONE && !(row->commands & 1 << s->command)) {
        char owners[64];
        settings_command_list(owners, sizeof owners, row->commands);
        return err_set(msg, msg_len, ERR_ARG,
                       "--%s is not a flag of 'urchin %s' (it belongs to %s)", row->name,
                       settings_command_names[s->command], owners);
    }
    char source[64];
    snprintf(source, sizeof source, "--%s", row->name);
    const char *value = equals ? equals + 1 : negated ? "no" : "yes";
    if (row->type != SWITCH && !equals) {
        if (*i + 1 >= argc || !strncmp(argv[*i + 1], "--", 2))
            return err_set(msg, msg_len, ERR_ARG,
                           "%s needs a value (one that begins with -- is written %s=--...)", source,
                           source);
        value = argv[++*i];
    }
    return set(s, row, value, source, msg, msg_len);
}

static enum err read_positional(struct settings *s, const char *text, int *n_seen, char *msg,
                                size_t msg_len) {
    int most = s->command == COMMAND_RUN ? 2 : 1;
    if (*n_seen >= most)
        return err_set(msg, msg_len, ERR_ARG,
                       "'%.100s' is one argument too many: urchin %s takes %s", text,
                       settings_command_names[s->command],
                       most == 2 ? "MODEL and PROMPT (put the prompt in quotes)" : "one MODEL");
    const struct row *row = &settings_rows[(*n_seen)++ ? PROMPT_ROW : MODEL_ROW];
    return set(s, row, text, row->metavar, msg, msg_len);
}

static enum err find_command(const char *name, enum command *out, char *msg, size_t msg_len) {
    int best = -1, best_distance = 3;
    for (int c = 0; c < N_COMMANDS; c++) {
        int d = distance(name, strlen(name), settings_command_names[c]);
        if (d == 0) {
            *out = (enum command)c;
            return OK;
        }
        if (d < best_distance) {
            best_distance = d;
            best = c;
        }
    }
    if (best >= 0)
        return err_set(msg, msg_len, ERR_ARG, "there is no command '%.100s'; did you mean '%s'?",
                       name, settings_command_names[best]);
    return err_set(
        msg, msg_len, ERR_ARG,
        "there is no command '%.100s'; there are serve, run, info, eval, bench and convert", name);
}

/* The config file is named by the last --config, else by URCHIN_CONFIG. It is read before either,
 * so that they win. */
static enum err read_config(struct settings *s, int argc, char **argv, char *msg, size_t msg_len) {
    const char *path = getenv("URCHIN_CONFIG"), *source = "URCHIN_CONFIG";
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++) {
        if (strncmp(argv[i], "--config", 8)) continue;
        if (argv[i][8] == '=') {
            path = argv[i] + 9;
        } else if (!argv[i][8]) {
            if (i + 1 >= argc) return err_set(msg, msg_len, ERR_ARG, "--config needs a file");
            path = argv[++i];
        } else {
            continue;
        }
        source = "--config";
    }
    return path && *path ? read_file(s, path, source, msg, msg_len) : OK;
}

static enum err read_flags(struct settings *s, int argc, char **argv, bool *help, char *msg,
                           size_t msg_len) {
    int n_positional = 0;
    bool flags = true;
    enum err err = OK;
    for (int i = s->command == COMMAND_NONE ? 0 : 1; err == OK && i < argc; i++) {
        const char *arg = argv[i];
        if (!flags || arg[0] != '-' || !arg[1]) {
            err = read_positional(s, arg, &n_positional, msg, msg_len);
        } else if (!strcmp(arg, "--")) {
            flags = false;
        } else if (!strcmp(arg, "--help") || !strcmp(arg, "-h")) {
            *help = true;
            return OK; /* what else is on the line no longer matters */
        } else if (!strcmp(arg, "--version")) {
            s->version = true;
        } else if (!strcmp(arg, "--config")) {
            i++;
        } else if (!strncmp(arg, "--config=", 9)) {
            continue;
        } else if (arg[1] != '-') {
            err =
                err_set(msg, msg_len, ERR_ARG, "there is no flag %.100s; flags begin with --", arg);
        } else {
            err = read_flag(s, argc, argv, &i, msg, msg_len);
        }
    }
    return err;
}

enum err settings_load(struct settings *out, int argc, char **argv, bool *help, char *msg,
                       size_t msg_len) {
    struct settings loaded = {.command = COMMAND_NONE}, *s = &loaded;
    bool asked = argc == 0 || (argc == 1 && !strcmp(argv[0], "help"));
    enum err err = OK;
    if (!asked && argv[0][0] != '-') {
        err = find_command(argv[0], &s->command, msg, msg_len);
        if (err) return err;
    }
    for (int i = 0; err == OK && i < settings_n_rows; i++)
        if (settings_rows[i].value)
            err = set(s, &settings_rows[i], settings_rows[i].value, settings_rows[i].name, msg,
                      msg_len);
    if (err == OK && s->command != COMMAND_NONE) err = read_config(s, argc, argv, msg, msg_len);
    if (err == OK && s->command != COMMAND_NONE) err = read_environment(s, msg, msg_len);
    if (err == OK && !asked) err = read_flags(s, argc, argv, &asked, msg, msg_len);
    if (err == OK && s->command == COMMAND_NONE && !asked && !s->version)
        err = err_set(msg, msg_len, ERR_ARG,
                      "a command comes first: urchin serve, run, info, eval, bench or convert");
    if (err) {
        settings_free(s);
        return err;
    }
    if (!strcmp(s->log_level, "auto")) s->log_level = s->command == COMMAND_SERVE ? "info" : "warn";
    *out = loaded;
    *help = asked;
    return OK;
}

void settings_free(struct settings *s) {
    while (s->owned) {
        struct settings_text *next = s->owned->next;
        free(s->owned);
        s->owned = next;
    }
    *s = (struct settings){.command = COMMAND_NONE};
}
