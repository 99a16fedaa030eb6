/* test_settings.c - flags, environment, file and help, all read from one table. */
#include "config/settings.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static char message[1024];
static bool help;

/* Loads from arguments (up to the first NULL); on failure `message` holds the sentence. */
static enum err load(struct settings *s, const char *const *args) {
    char *argv[16];
    int argc = 0;
    while (args[argc]) {
        argv[argc] = (char *)args[argc];
        argc++;
    }
    help = false;
    message[0] = 0;
    return settings_load(s, argc, argv, &help, message, sizeof message);
}
#define ARGS(...) ((const char *const[]){__VA_ARGS__, NULL})
#define assert_contains(text, part)                                                                \
    do {                                                                                           \
        if (!strstr(text, part)) fail_msg("no '%s' in '%.300s'", part, text);                      \
    } while (0)

static char *config_file(const char *text) {
    static char path[] = "/tmp/urchin-test-settings.conf.XXXXXX";
    strcpy(path + sizeof path - 7, "XXXXXX");
    int file = mkstemp(path);
    assert_true(file >= 0);
    assert_int_equal(write(file, text, strlen(text)), (ssize_t)strlen(text));
    close(file);
    return path;
}

static void test_defaults(void **state) {
    (void)state;
    struct settings s;
    assert_int_equal(load(&s, ARGS("serve")), OK);
    assert_int_equal(s.command, COMMAND_SERVE);
    assert_null(s.model);
    assert_null(s.api_key);
    assert_string_equal(s.host, "127.0.0.1");
    assert_int_equal(s.port, 8080);
    assert_int_equal(s.max_queue, 256);
    assert_int_equal(s.prefill_chunk, 0);
    assert_int_equal(s.body_limit_kb, 8192);
    assert_int_equal(s.output_limit_kb, 256);
    assert_int_equal(s.idle_timeout_s, 60);
    assert_true(s.drain_timeout_s == 30);
    assert_int_equal(s.cache_size, -1);
    assert_string_equal(s.log_level, "info");
    settings_free(&s);
    assert_int_equal(load(&s, ARGS("run")), OK);
    assert_string_equal(s.log_level, "warn");
    assert_true(s.temperature == 0.7);
    settings_free(&s);
}

static void test_both_ways_to_write_a_flag(void **state) {
    (void)state;
    struct settings s;
    assert_int_equal(
        load(&s, ARGS("run", "--seed", "-5", "m", "--temperature=0.25", "hello there", "--raw")),
        ERR_ARG);
    assert_contains(message, "--seed: '-5'");
    assert_int_equal(
        load(&s, ARGS("run", "--seed", "-1", "m", "--temperature=0.25", "hello there", "--raw")),
        OK);
    assert_int_equal(s.seed, -1);
    assert_string_equal(s.model, "m");
    assert_string_equal(s.prompt, "hello there");
    assert_true(s.temperature == 0.25 && s.raw);
    settings_free(&s);
    assert_int_equal(load(&s, ARGS("run", "--seed=9223372036854775807", "--raw", "--no-raw",
                                   "--system=--x", "--", "m", "--prompt")),
                     OK);
    assert_int_equal(s.seed, INT64_MAX);
    assert_false(s.raw);
    assert_string_equal(s.system, "--x");
    assert_string_equal(s.prompt, "--prompt");
    settings_free(&s);
}

static void test_flag_beats_environment_beats_file_beats_default(void **state) {
    (void)state;
    struct settings s;
    char *path = config_file(
        "# a comment\nport = 1001\n  max-seqs=2 # two\n\nhost = \"a # b\"\nmax-queue = 7\n");
    setenv("URCHIN_PORT", "1002", 1);
    setenv("URCHIN_MAX_SEQS", "3", 1);
    setenv("URCHIN_CONFIG", path, 1);
    assert_int_equal(load(&s, ARGS("serve", "--port", "1003")), OK);
    assert_int_equal(s.port, 1003);
    assert_int_equal(s.max_seqs, 3);
    assert_int_equal(s.max_queue, 7);
    assert_string_equal(s.host, "a # b");
    assert_int_equal(s.max_connections, 4096);
    settings_free(&s);
    unsetenv("URCHIN_CONFIG");
    unsetenv("URCHIN_PORT");
    unsetenv("URCHIN_MAX_SEQS");
    assert_int_equal(load(&s, ARGS("serve", "--config", path)), OK);
    assert_int_equal(s.port, 1001);
    assert_int_equal(s.max_seqs, 2);
    settings_free(&s);
    unlink(path);
}

/* Sentence of a bad value names the setting, the value, its source, and what would be right. */
static void test_a_bad_value_names_its_source(void **state) {
    (void)state;
    struct settings s;
    assert_int_equal(load(&s, ARGS("serve", "--port", "99999")), ERR_ARG);
    assert_string_equal(message, "--port: '99999' is not a whole number from 0 to 65535");
    setenv("URCHIN_WEIGHTS", "int2", 1);
    assert_int_equal(load(&s, ARGS("info")), ERR_ARG);
    assert_string_equal(message, "URCHIN_WEIGHTS: 'int2' is not one of auto|fp32|bf16|int8|int4|fp8");
    unsetenv("URCHIN_WEIGHTS");
    char *path = config_file("\nmax-seqs = many\n"), expected[300];
    assert_int_equal(load(&s, ARGS("serve", "--config", path)), ERR_ARG);
    snprintf(expected, sizeof expected,
             "%s:2: max-seqs: 'many' is not a whole number from 0 to 65536", path);
    assert_string_equal(message, expected);
    unlink(path);
    path = config_file("prot = 1\n");
    assert_int_equal(load(&s, ARGS("serve", "--config", path)), ERR_ARG);
    assert_contains(message, ":1: no setting is named 'prot'; did you mean 'port'?");
    unlink(path);
    path = config_file("port 1\n");
    assert_int_equal(load(&s, ARGS("serve", "--config", path)), ERR_ARG);
    assert_contains(message, "name = value");
    unlink(path);
    assert_int_equal(load(&s, ARGS("serve", "--config", "/nowhere/x")), ERR_ARG);
    assert_contains(message, "--config: cannot open '/nowhere/x'");
}

static void test_numbers_are_read_to_their_last_character(void **state) {
    (void)state;
    struct settings s;
    static const char *const bad[] = {
        "", " 1", "1 ", "1x", "0x10", "1e3", "99999999999999999999", "nan", "-1", "1.5"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(load(&s, ARGS("serve", "--port", bad[i])), ERR_ARG);
    static const char *const bad_double[] = {"", "nan", "inf", "-0.1", "1,5", "0.5x", " 1", "1e9"};
    for (size_t i = 0; i < sizeof bad_double / sizeof *bad_double; i++)
        assert_int_equal(load(&s, ARGS("run", "--temperature", bad_double[i])), ERR_ARG);
    static const char *const bad_list[] = {"", ",", "1,", "1,,2", "1;2", "0,1", "-1", "1 ,2"};
    for (size_t i = 0; i < sizeof bad_list / sizeof *bad_list; i++)
        assert_int_equal(load(&s, ARGS("eval", "--lengths", bad_list[i])), ERR_ARG);
}

static void test_sizes_need_a_unit_and_round_up(void **state) {
    (void)state;
    struct settings s;
    static const struct {
        const char *text;
        int64_t kb;
    } good[] = {{"4K", 4}, {"8M", 8192}, {"1g", 1 << 20}, {"2MiB", 2048}, {"2MB", 2048}};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_int_equal(load(&s, ARGS("serve", "--body-limit", good[i].text)), OK);
        assert_int_equal(s.body_limit_kb, good[i].kb);
        settings_free(&s);
    }
    assert_int_equal(load(&s, ARGS("serve", "--memory", "1500K")), OK);
    assert_int_equal(s.memory_mb, 2);
    settings_free(&s);
    static const char *const bad[] = {"4096", "0",   "8X",   "8MBs",
                                      "M",    "-1M", "1.5M", "99999999999T"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(load(&s, ARGS("serve", "--body-limit", bad[i])), ERR_ARG);
}

static void test_switches(void **state) {
    (void)state;
    struct settings s;
    static const struct {
        const char *text;
        bool value;
    } words[] = {{"yes", 1}, {"TRUE", 1},  {"1", 1}, {"on", 1},
                 {"no", 0},  {"false", 0}, {"0", 0}, {"off", 0}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        setenv("URCHIN_JSON", words[i].text, 1);
        assert_int_equal(load(&s, ARGS("info")), OK);
        assert_int_equal(s.json, words[i].value);
        settings_free(&s);
    }
    setenv("URCHIN_JSON", "maybe", 1);
    assert_int_equal(load(&s, ARGS("info")), ERR_ARG);
    assert_string_equal(message, "URCHIN_JSON: 'maybe' is not yes or no");
    assert_int_equal(load(&s, ARGS("info", "--no-port")), ERR_ARG);
    unsetenv("URCHIN_JSON");
}

static void test_unknown_names_suggest_the_nearest(void **state) {
    (void)state;
    struct settings s;
    assert_int_equal(load(&s, ARGS("serve", "--max-seq", "4")), ERR_ARG);
    assert_string_equal(message, "there is no flag --max-seq; did you mean --max-seqs?");
    assert_int_equal(load(&s, ARGS("serve", "--xyzzyplugh")), ERR_ARG);
    assert_string_equal(message, "there is no flag --xyzzyplugh");
    assert_int_equal(load(&s, ARGS("serv")), ERR_ARG);
    assert_string_equal(message, "there is no command 'serv'; did you mean 'serve'?");
    assert_int_equal(load(&s, ARGS("serve", "--temperature", "1")), ERR_ARG);
    assert_string_equal(message,
                        "--temperature is not a flag of 'urchin serve' (it belongs to run)");
    assert_int_equal(load(&s, ARGS("serve", "a", "b")), ERR_ARG);
    assert_contains(message, "'b' is one argument too many");
    assert_int_equal(load(&s, ARGS("serve", "--port")), ERR_ARG);
    assert_contains(message, "--port needs a value");
    assert_int_equal(load(&s, ARGS("serve", "--host", "--port")), ERR_ARG);
    assert_contains(message, "--host needs a value");
}

/* One file and one environment serve all commands. */
static void test_file_and_environment_may_hold_other_commands_settings(void **state) {
    (void)state;
    struct settings s;
    setenv("URCHIN_TEMPERATURE", "0.5", 1);
    char *path = config_file("lengths = 10,20\n");
    assert_int_equal(load(&s, ARGS("serve", "--config", path)), OK);
    settings_free(&s);
    unsetenv("URCHIN_TEMPERATURE");
    unlink(path);
}

static void test_a_kubernetes_service_link_is_not_a_port(void **state) {
    (void)state;
    struct settings s;
    setenv("URCHIN_PORT", "tcp://10.0.0.1:8080", 1);
    assert_int_equal(load(&s, ARGS("serve")), OK);
    assert_int_equal(s.port, 8080);
    settings_free(&s);
    unsetenv("URCHIN_PORT");
}

static void test_help_and_version_need_nothing_else(void **state) {
    (void)state;
    struct settings s;
    char *none[] = {NULL};
    assert_int_equal(settings_load(&s, 0, none, &help, message, sizeof message), OK);
    assert_true(help && s.command == COMMAND_NONE);
    settings_free(&s);
    assert_int_equal(load(&s, ARGS("--help")), OK);
    assert_true(help && s.command == COMMAND_NONE);
    settings_free(&s);
    assert_int_equal(load(&s, ARGS("run", "-h")), OK);
    assert_true(help && s.command == COMMAND_RUN);
    settings_free(&s);
    assert_int_equal(load(&s, ARGS("--version")), OK);
    assert_true(s.version && !help);
    settings_free(&s);
    assert_int_equal(load(&s, ARGS("--port", "1")), ERR_ARG);
    assert_contains(message, "a command comes first");
}

static void test_lists(void **state) {
    (void)state;
    int64_t out[3] = {-7, -7, -7};
    assert_int_equal(settings_list("0,1000,64000", out, 2), 3);
    assert_true(out[0] == 0 && out[1] == 1000 && out[2] == -7);
    assert_int_equal(settings_list("5", out, 3), 1);
}

static char *printed(void (*print)(FILE *out)) {
    char *text;
    size_t len;
    FILE *out = open_memstream(&text, &len);
    assert_non_null(out);
    print(out);
    fclose(out);
    return text;
}
static void all_help(FILE *out) {
    for (int c = COMMAND_SERVE; c <= COMMAND_CONVERT; c++)
        settings_help(out, (enum command)c);
}

/* Every flag that help shows is on the page and is a known variable, and the other way round; help
 * fits a terminal of 100 columns. */
static void test_help_and_page_show_every_setting(void **state) {
    (void)state;
    char *text = printed(all_help), *page = printed(settings_markdown);
    int n_flags = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        char name[64], flag[80];
        if (strlen(line) > 100) fail_msg("too wide: %s", line);
        if (strncmp(line, "  --", 4)) continue;
        if (sscanf(line, "  --[no-]%60s", name) != 1 && sscanf(line, "  --%60s", name) != 1)
            continue;
        if (!strcmp(name, "config") || !strcmp(name, "version")) continue;
        n_flags++;
        snprintf(flag, sizeof flag, "--%s", name);
        if (!strstr(page, flag)) {
            snprintf(flag, sizeof flag, "--[no-]%s", name);
            assert_contains(page, flag);
        }
    }
    assert_true(n_flags > 40);
    int n_rows = 0;
    for (char *p = page; (p = strstr(p, "| `URCHIN_")); p++)
        n_rows++;
    char *all = printed(all_help);
    for (char *p = page; (p = strstr(p, "| `--")); p++) {
        char name[80];
        assert_int_equal(sscanf(p, "| `%70[^ `]", name), 1);
        assert_contains(all, name);
        n_rows--;
    }
    assert_int_equal(n_rows, 2); /* MODEL and PROMPT are no flags */
    free(all);
    free(text);
    free(page);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_both_ways_to_write_a_flag),
        cmocka_unit_test(test_flag_beats_environment_beats_file_beats_default),
        cmocka_unit_test(test_a_bad_value_names_its_source),
        cmocka_unit_test(test_numbers_are_read_to_their_last_character),
        cmocka_unit_test(test_sizes_need_a_unit_and_round_up),
        cmocka_unit_test(test_switches),
        cmocka_unit_test(test_unknown_names_suggest_the_nearest),
        cmocka_unit_test(test_file_and_environment_may_hold_other_commands_settings),
        cmocka_unit_test(test_a_kubernetes_service_link_is_not_a_port),
        cmocka_unit_test(test_help_and_version_need_nothing_else),
        cmocka_unit_test(test_lists),
        cmocka_unit_test(test_help_and_page_show_every_setting),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
