/* settings_help.c - the table of settings as --help and as docs/settings.md. */
#include "config/settings_rows.h"

#include "config/version.h"

#include <string.h>

/* text from column `indent` on, broken at spaces before column 100. */
static void print_wrapped(FILE *out, const char *text, int indent) {
    enum { WIDTH = 100 };
    int column = indent;
    while (*text) {
        int n = (int)strcspn(text, " ");
        if (column > indent && column + 1 + n > WIDTH) {
            fprintf(out, "\n%*s", indent, "");
            column = indent;
        }
        column += fprintf(out, "%s%.*s", column > indent ? " " : "", n, text);
        text += n;
        while (*text == ' ')
            text++;
    }
}

static void flag_usage(char *out, size_t len, const struct row *row) {
    if (row->type == SWITCH)
        snprintf(out, len, "--[no-]%s", row->name);
    else if (row->type == CHOICE)
        snprintf(out, len, "--%s NAME", row->name);
    else
        snprintf(out, len, "--%s %s", row->name, row->metavar);
}

/* Help sentence with choices and default. */
static void explain(char *out, size_t len, const struct row *row) {
    int n = snprintf(out, len, "%s", row->help);
    if (row->type == CHOICE) n += snprintf(out + n, len - (size_t)n, ": %s", row->metavar);
    if (row->value && row->type != SWITCH)
        snprintf(out + n, len - (size_t)n, " (default %s)", row->value);
}

static void help_row(FILE *out, const struct row *row) {
    enum { INDENT = 32 };
    char usage[96], text[512];
    flag_usage(usage, sizeof usage, row);
    explain(text, sizeof text, row);
    int n = fprintf(out, "  %s", usage);
    if (n > INDENT - 2)
        fprintf(out, "\n%*s", INDENT, "");
    else
        fprintf(out, "%*s", INDENT - n, "");
    print_wrapped(out, text, INDENT);
    fputc('\n', out);
}

void settings_help(FILE *out, enum command command) {
    fprintf(out, "urchin %s [MODEL]%s [flags]: %s\n", settings_command_names[command],
            command == COMMAND_RUN ? " [PROMPT]" : "", settings_command_help[command]);
    fprintf(out, "\n  %-30s", "MODEL");
    print_wrapped(out, settings_rows[MODEL_ROW].help, 32);
    if (command == COMMAND_RUN) {
        fprintf(out, "\n  %-30s", "PROMPT");
        print_wrapped(out, settings_rows[PROMPT_ROW].help, 32);
    }
    fprintf(out, "\n\nFlags of %s:\n", settings_command_names[command]);
    for (int i = PROMPT_ROW + 1; i < settings_n_rows; i++)
        if (settings_rows[i].commands & 1 << command && settings_rows[i].commands != ALL)
            help_row(out, &settings_rows[i]);
    fprintf(out, "\nFlags of every command:\n");
    for (int i = PROMPT_ROW + 1; i < settings_n_rows; i++)
        if (settings_rows[i].commands == ALL) help_row(out, &settings_rows[i]);
    fprintf(out, "  --config FILE                 lines of the form name = value\n"
                 "  --version                     print the version\n"
                 "\nEach is also a variable (--max-seq-len is URCHIN_MAX_SEQ_LEN) and a line of "
                 "the config file.\n"
                 "A flag wins over a variable, that over the file.\n");
}

void settings_usage(FILE *out) {
    fprintf(out, "urchin " URCHIN_VERSION
                 ": serves Transformers converted to Hedgehog linear attention\n\n");
    for (int c = 0; c < N_COMMANDS; c++)
        fprintf(out, "  urchin %-7s [MODEL]%-10s%s\n", settings_command_names[c],
                c == COMMAND_RUN ? " [PROMPT]" : "", settings_command_help[c]);
    fprintf(out, "\n  urchin COMMAND --help lists its flags.  urchin --version\n");
}

static void markdown_escaped(FILE *out, const char *text) {
    for (; *text; text++)
        fprintf(out, *text == '|' ? "\\|" : "%c", *text);
}

static void markdown_rows(FILE *out, int commands) {
    char title[64] = "Every command";
    if (commands != ALL) settings_command_list(title, sizeof title, commands);
    fprintf(out, "\n## %s\n\n| flag | variable | default | meaning |\n| --- | --- | --- | --- |\n",
            title);
    for (int i = 0; i < settings_n_rows; i++) {
        const struct row *row = &settings_rows[i];
        if (row->commands != commands) continue;
        char usage[96], variable[64], right[256];
        flag_usage(usage, sizeof usage, row);
        settings_variable_name(variable, sizeof variable, row->name);
        fprintf(out, "| `");
        markdown_escaped(out, i <= PROMPT_ROW ? row->metavar : usage);
        fprintf(out, "` | `%s` | %s%s%s | ", variable, row->value ? "`" : "",
                row->value ? row->value : "", row->value ? "`" : "");
        markdown_escaped(out, row->help);
        if (row->type != TEXT && row->type != SWITCH) {
            settings_describe(right, sizeof right, row);
            fprintf(out, "; ");
            markdown_escaped(out, right);
        }
        fprintf(out, " |\n");
    }
}

void settings_markdown(FILE *out) {
    fprintf(out,
            "# Settings\n\n"
            "Every setting is a flag, a variable of the environment and a line `name = value` "
            "of the file given\n"
            "by `--config FILE` or `URCHIN_CONFIG` (`#` begins a comment; quotes keep spaces "
            "and `#`). A flag\n"
            "wins over a variable, that over the file. Sizes are written `512K`, `8M`, `2G`. "
            "A switch is given\n"
            "as `--name` or `--no-name`, elsewhere as yes or no. This page is written by the "
            "program.\n\n"
            "Two more variables say where files lie: `URCHIN_CACHE` (else "
            "`$XDG_CACHE_HOME/urchin`, else\n"
            "`~/.cache/urchin`) holds the bases of adapters, `URCHIN_MODELS` the default model "
            "where none lies\n"
            "beside the program.\n");
    for (int i = 0; i < settings_n_rows;
         i++) { /* one section for each set of commands, where it first occurs */
        int j = 0;
        while (settings_rows[j].commands != settings_rows[i].commands)
            j++;
        if (j == i) markdown_rows(out, settings_rows[i].commands);
    }
}
