/* command_testing.h - a command of `urchin` run from the words of its line. */
#ifndef URCHIN_TESTS_COMMAND_TESTING_H
#define URCHIN_TESTS_COMMAND_TESTING_H

#include "compute/team.h"
#include "config/settings.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static struct team *team; /* of the whole program */

/* What it printed on out_fd (1 or 2) lands in text.  Returns its status. */
static inline int run_command(int (*command)(const struct settings *, struct team *), char **flags,
                              int n_flags, int out_fd, char *text, size_t room) {
    struct settings s;
    bool help;
    char msg[512] = "";
    if (settings_load(&s, n_flags, flags, &help, msg, sizeof msg)) fail_msg("%s", msg);
    FILE *file = tmpfile();
    assert_non_null(file);
    fflush(NULL);
    int saved = dup(out_fd);
    dup2(fileno(file), out_fd);
    int status = command(&s, team);
    fflush(NULL);
    dup2(saved, out_fd);
    close(saved);
    rewind(file);
    text[fread(text, 1, room - 1, file)] = 0;
    fclose(file);
    settings_free(&s);
    return status;
}

#endif
