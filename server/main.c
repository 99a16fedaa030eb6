/* main.c - the commands of urchin. */
#include "compute/cpu.h"
#include "compute/team.h"
#include "config/log.h"
#include "config/settings.h"
#include "config/version.h"
#include "convert/convert.h"
#include "convert/eval.h"
#include "server/bench.h"
#include "server/info.h"
#include "server/open.h"
#include "server/run.h"
#include "server/serve.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>

static void configure_log(const struct settings *s) {
    static const char *const levels[] = {
        [LOG_DEBUG] = "debug", [LOG_INFO] = "info", [LOG_WARN] = "warn", [LOG_ERROR] = "error"};
    enum log_level level = s->command == COMMAND_SERVE ? LOG_INFO : LOG_WARN; /* "auto" */
    for (int i = LOG_DEBUG; i <= LOG_ERROR; i++)
        if (strcmp(s->log_level, levels[i]) == 0) level = (enum log_level)i;
    log_configure(level, strcmp(s->log_format, "json") == 0);
}

/* AMX only where it is named: it has been tested over its instructions in C, and not timed. */
static void limit_isa(const struct settings *s) {
    if (cpu_isa() == CPU_AMX) cpu_isa_limit(CPU_AVX512);
    for (int isa = CPU_GENERIC; isa <= CPU_DOTPROD; isa++)
        if (strcmp(s->isa, cpu_isa_name((enum cpu_isa)isa)) == 0) cpu_isa_limit((enum cpu_isa)isa);
}

/* The server and the chat take signals from a descriptor: they are blocked before the first thread
 * exists.  A client that has left is an error of write(), not a signal. */
static void prepare_signals(const struct settings *s) {
    sigset_t set;
    sigemptyset(&set);
    if (s->command == COMMAND_SERVE) {
        signal(SIGPIPE, SIG_IGN);
        sigaddset(&set, SIGTERM);
        sigaddset(&set, SIGHUP);
    }
    if (s->command == COMMAND_SERVE || (s->command == COMMAND_RUN && run_is_chat(s)))
        sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
}

static int run_command(struct settings *s) {
    static struct team *team;
    char path[MAX_PATH], msg[1024];
    prepare_signals(s);
    bool opens_it_itself = s->command == COMMAND_EVAL || s->command == COMMAND_BENCH;
    if (!s->model && opens_it_itself) {
        if (default_model(path, sizeof path, s, msg, sizeof msg) != OK) {
            fprintf(stderr, "urchin: %s\n", msg);
            return 1;
        }
        s->model = path;
    }
    if (team_new(&team, s->threads) != OK) {
        fprintf(stderr, "urchin: the threads of the model could not be started\n");
        return 1;
    }
    switch (s->command) {
    case COMMAND_SERVE:
        return serve_main(s, team);
    case COMMAND_RUN:
        return run_main(s, team);
    case COMMAND_INFO:
        return info_main(s, team);
    case COMMAND_EVAL:
        return eval_main(s, team);
    case COMMAND_BENCH:
        return bench_main(s, team);
    case COMMAND_CONVERT:
        return convert_main(s, team);
    default:
        return 1;
    }
}

int main(int argc, char **argv) {
    /* Settings and team are not freed: a signal may end the server while a thread loads its model.
     */
    static struct settings settings;
    bool help;
    char msg[1024];
    if (settings_load(&settings, argc - 1, argv + 1, &help, msg, sizeof msg) != OK) {
        fprintf(stderr, "urchin: %s\n", msg);
        return 1;
    }
    int status = 0;
    if (help && settings.command == COMMAND_NONE) {
        settings_usage(stdout);
    } else if (help) {
        settings_help(stdout, settings.command);
    } else if (settings.version) {
        puts("urchin " URCHIN_VERSION);
    } else {
        configure_log(&settings);
        limit_isa(&settings);
        status = run_command(&settings);
    }
    return status;
}
