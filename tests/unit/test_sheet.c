/* test_sheet.c - the report as a page: numbers where they belong, foreign text as text, nothing
 * from elsewhere. */
#include "config/json.h"
#include "config/log.h"
#include "convert/eval.h"
#include "convert/picture.h"
#include "convert/plot.h"
#include "convert/sheet.h"
#include "convert/sheet_parts.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static struct team *team;
static char folder[64];

static int new_folder(void **state) {
    (void)state;
    strcpy(folder, "/tmp/urchin-sheet-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}
static int remove_folder(void **state) {
    char command[128];
    (void)state;
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command);
}
static const char *in(const char *name) {
    static char paths[4][PATH_MAX];
    static int turn;
    char *path = paths[turn++ % 4];
    snprintf(path, PATH_MAX, "%s/%s", folder, name);
    return path;
}
static char *contents(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail_msg("%s is not there", path);
    char *text = calloc(1, 1 << 22);
    assert_true(fread(text, 1, (1 << 22) - 1, file) > 0);
    fclose(file);
    return text;
}
static int count_of(const char *text, const char *what) {
    int n = 0;
    for (const char *p = text; (p = strstr(p, what)); p += strlen(what))
        n++;
    return n;
}

/* ---- text and numbers ---- */
static void test_foreign_text_is_escaped(void **state) {
    (void)state;
    struct html h = {0};
    html_text(&h, "a<b>&\"'\x01\x7f\tcaf\303\251\n");
    assert_string_equal(h.text, "a&lt;b&gt;&amp;&quot;&#39;\tcaf\303\251\n");
    free(h.text);
    h = (struct html){0};
    html_text(&h, NULL);
    assert_int_equal(h.len, 0);
    free(h.text);
}

static void test_numbers_are_written_as_people_read_them(void **state) {
    (void)state;
    static const struct {
        double x;
        const char *says;
    } cases[] = {{0, "0"},
                 {7, "7"},
                 {0.0716, "0.0716"},
                 {1.5, "1.500"},
                 {12.345, "12.35"},
                 {123.456, "123.5"},
                 {1000, "1,000"},
                 {1234567.8, "1,234,568"},
                 {-1234, "-1,234"},
                 {-0.25, "-0.2500"},
                 {0.000032, "3.2e-05"},
                 {NAN, "&ndash;"},
                 {INFINITY, "&ndash;"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct html h = {0};
        html_number(&h, cases[i].x);
        assert_string_equal(h.text, cases[i].says);
        free(h.text);
    }
}

/* ---- figures ---- */
static void test_shades_run_from_low_to_high(void **state) {
    (void)state;
    struct scale even = {0, 2, false, NULL}, decades = {1e-4, 1, true, NULL},
                 found = {NAN, NAN, false, NULL}, within = {0, 1, false, NULL};
    assert_int_equal(scale_shade(&even, 0), 0);
    assert_int_equal(scale_shade(&even, 1), 12);
    assert_int_equal(scale_shade(&even, 2), 24);
    assert_int_equal(scale_shade(&even, 9), 24);
    assert_int_equal(scale_shade(&even, -9), 0);
    assert_int_equal(scale_shade(&even, NAN), -1);
    assert_int_equal(scale_shade(&decades, 0.01), 12);
    assert_int_equal(scale_shade(&decades, 0), 0);
    double values[] = {0.5, NAN, 30};
    scale_cover(&found, values, 3);
    assert_true(found.low == 0.5 && found.high == 30 && found.log);
    scale_cover(&within, values, 1);
    assert_true(within.low == 0 && within.high == 1 && !within.log);
}

/* 0..10 over 0..100: ticks at 0, 2 .. 10 and 0, 20 .. 100; the line's ends are the frame's corners.
 */
static void test_lines_reach_from_corner_to_corner(void **state) {
    (void)state;
    struct html h = {0};
    double x[] = {0, 50, 75, 100}, y[] = {0, 5, NAN, 10};
    struct series s = {"<s>", x, y, 4, false, 1, false};
    plot_lines(&h, "T<", "N", "X", "Y", &s, 1);
    const char *line = strstr(h.text, "class=\"line s1\"");
    double x0, y0, x1, y1, x2, y2;
    assert_non_null(line);
    assert_int_equal(sscanf(line, "class=\"line s1\" d=\"M%lf %lfL%lf %lfM%lf %lf\"", &x0, &y0, &x1,
                            &y1, &x2, &y2),
                     6);
    assert_true(fabs(x1 - (x0 + x2) / 2) <= 0.11 &&
                fabs(y1 - (y0 + y2) / 2) <= 0.11); /* printed in tenths */
    assert_true(x0 < 100 && x2 > PLOT_WIDTH - 20 && y0 > y2 + 150);
    char axis[64];
    snprintf(axis, sizeof axis, "M64 %.1fH", y0);
    assert_non_null(strstr(h.text, axis)); /* the value 0 lies on the axis */
    assert_non_null(strstr(h.text, ">100</text>"));
    assert_null(strstr(h.text, "-0"));
    assert_null(strstr(h.text, "<s>"));
    free(h.text);

    h = (struct html){0}; /* two decades: a log axis, so equal factors are equal steps */
    double power[] = {1, 10, 100, 100};
    s = (struct series){"s", x, power, 3, false, 0, false};
    plot_lines(&h, "T", NULL, "X", "Y", &s, 1);
    line = strstr(h.text, "class=\"line s0\"");
    assert_int_equal(sscanf(line, "class=\"line s0\" d=\"M%lf %lfL%lf %lfL%lf %lf\"", &x0, &y0, &x1,
                            &y1, &x2, &y2),
                     6);
    assert_true(fabs(y1 - (y0 + y2) / 2) <= 0.11);
    free(h.text);

    h = (struct html){0}; /* unless it is told not to */
    s.linear = true;
    plot_lines(&h, "T", NULL, "X", "Y", &s, 1);
    line = strstr(h.text, "class=\"line s0\"");
    assert_int_equal(sscanf(line, "class=\"line s0\" d=\"M%lf %lfL%lf %lfL%lf %lf\"", &x0, &y0, &x1,
                            &y1, &x2, &y2),
                     6);
    assert_true(fabs((y0 - y1) / (y0 - y2) - 9 / 99.) <= 0.002);
    free(h.text);

    h = (struct html){0};
    double none[] = {NAN, NAN};
    s = (struct series){"s", x, none, 2, false, 0, false};
    plot_lines(&h, "T", NULL, "X", "Y", &s, 1);
    assert_int_equal(h.len, 0);
}

static void test_a_grid_has_a_cell_for_every_value(void **state) {
    (void)state;
    struct html h = {0};
    double values[] = {0, 0.5, 1, NAN, 0.25, 1};
    struct scale scale = {0, 1, false, "share"};
    plot_grid(&h, "T", NULL, values, 2, 3, "layer", "head", &scale);
    assert_int_equal(count_of(h.text, "<rect"), 6 + SHADES);
    assert_int_equal(count_of(h.text, "<rect class=\"v24\""), 2 + 1);
    assert_int_equal(count_of(h.text, "<rect class=\"x0\""), 1);
    assert_non_null(strstr(h.text, "<title>layer 1 head 1: 0.2500</title>"));
    free(h.text);
}

static void test_shares_fill_their_bars(void **state) {
    (void)state;
    struct html h = {0};
    double shares[] = {0.25, 0.75, 1, 0};
    static const char *const panels[] = {"a", "b"}, *const parts[] = {"p", "q"};
    plot_shares(&h, "T", NULL, "layer", panels, (const double *const[2]){shares, shares}, 2, parts,
                2);
    assert_int_equal(count_of(h.text, "height=\"29.50\""),
                     2); /* a quarter of 118, in both panels */
    assert_int_equal(count_of(h.text, "height=\"88.50\""), 2);
    assert_int_equal(count_of(h.text, "height=\"118.00\""), 2);
    assert_non_null(strstr(h.text, "<title>b, layer 0, q: 75.0 %</title>"));
    free(h.text);
}

static void test_pictures_are_drawn_cell_by_cell(void **state) {
    (void)state;
    struct html h = {0};
    static const char *const panels[] = {"a", "b"};
    const char *rows[] = {"Y", "AY", "AAB"};
    plot_pictures(&h, "T", NULL, panels, (const char *const *const[2]){rows, rows}, 3, 30);
    assert_int_equal(count_of(h.text, "<path class=\"w0\" d=\"M0 1.5h1M0 2.5h2\"/>"), 2);
    assert_int_equal(count_of(h.text, "<path class=\"w1\" d=\"M2 2.5h1\"/>"), 2);
    assert_int_equal(count_of(h.text, "<path class=\"w24\" d=\"M0 0.5h1M1 1.5h1\"/>"), 2);
    free(h.text);
}

/* ---- whole pages ---- */

/* Every tag is closed in its turn, every attribute quoted. */
static void check_well_formed(const char *page) {
    static const char *const empty[] = {"!DOCTYPE", "meta", "br", NULL};
    char open[64][16];
    int depth = 0;
    for (const char *p = page; (p = strchr(p, '<'));) {
        char name[16];
        size_t n = 0;
        bool closing = *++p == '/';
        for (p += closing; *p && !strchr(" />", *p) && n < 15;)
            name[n++] = *p++;
        name[n] = 0;
        while (*p && *p != '>') {
            if (*p == '"') {
                const char *end = strchr(p + 1, '"');
                assert_non_null(end);
                for (const char *q = p + 1; q < end; q++)
                    assert_true(*q != '<');
                p = end;
            }
            assert_true(*p != '<');
            p++;
        }
        bool alone = p[-1] == '/';
        for (int i = 0; empty[i]; i++)
            alone |= !strcmp(name, empty[i]);
        if (closing) {
            if (!depth || strcmp(open[depth - 1], name))
                fail_msg("</%s> closes <%s>", name, depth ? open[depth - 1] : "");
            depth--;
        } else if (!alone) {
            assert_true(depth < 64);
            strcpy(open[depth++], name);
        }
    }
    assert_int_equal(depth, 0);
}

static void check_self_contained(const char *page) {
    static const char *const never[] = {
        "<script", "http:", "https:", "url(", "src=", "href=", "@import", "<link", "nan", "inf\""};
    for (size_t i = 0; i < sizeof never / sizeof *never; i++)
        if (strstr(page, never[i]))
            fail_msg("the page has '%s': %.60s", never[i], strstr(page, never[i]) - 20);
    assert_non_null(strstr(page, "prefers-color-scheme:dark"));
    assert_non_null(strstr(page, "width=device-width"));
}

static int run_eval(char **flags, int n) {
    struct settings s;
    bool help;
    char msg[512] = "";
    if (settings_load(&s, n, flags, &help, msg, sizeof msg)) fail_msg("%s", msg);
    fflush(NULL);
    int saved = dup(1), err = dup(2);
    assert_non_null(freopen("/dev/null", "w", stdout));
    FILE *said = freopen(in("said"), "w", stderr);
    assert_non_null(said);
    int status = eval_main(&s, team);
    fflush(NULL);
    dup2(saved, 1);
    dup2(err, 2);
    close(saved);
    close(err);
    settings_free(&s);
    return status;
}

#define MODEL "models/stories260k-hedgehog"
#define BASE "tests/data/models/stories260k"
#define TEXT "tests/data/text/tinystories-valid-head.txt"

static cJSON *evaluate(void) {
    char *html = (char *)in("quality.html");
    char *flags[] = {"eval",      MODEL,       "--text", TEXT,       "--against",
                     BASE,        "--weights", "fp32",   "--tokens", "1200",
                     "--context", "300",       "--bin",  "300",      "--lengths",
                     "150,600",   "--tries",   "5",      "--html",   html};
    assert_int_equal(run_eval(flags, sizeof flags / sizeof *flags), 0);
    char *text = contents(in("quality.json"));
    cJSON *json = cJSON_Parse(text);
    assert_non_null(json);
    free(text);
    return json;
}

static void replace_strings(cJSON *o, const char *with) {
    cJSON *item;
    cJSON_ArrayForEach(item, o) {
        if (cJSON_IsString(item)) cJSON_SetValuestring(item, with);
        replace_strings(item, with);
    }
}
static void replace_numbers(cJSON *o, double with) {
    cJSON *item;
    cJSON_ArrayForEach(item, o) {
        if (cJSON_IsNumber(item)) cJSON_SetNumberValue(item, with);
        replace_numbers(item, with);
    }
}

static void test_the_page_says_what_the_json_says(void **state) {
    (void)state;
    cJSON *json = evaluate();
    char *page = contents(in("quality.html")), value[64], *again = sheet_html(json);
    assert_string_equal(page, again); /* from the document alone */
    check_well_formed(page);
    check_self_contained(page);
    const cJSON *readers = sheet_at(json, "quality.readers"), *r;
    assert_int_equal(cJSON_GetArraySize(readers), 5);
    cJSON_ArrayForEach(r, readers) {
        snprintf(value, sizeof value, "<td class=\"n\">%.3f</td>",
                 sheet_number(r, "perplexity.perplexity"));
        assert_non_null(strstr(page, value));
    }
    assert_non_null(strstr(page, "<h1>stories260k-hedgehog</h1>"));
    assert_non_null(strstr(page, "Perplexity by position"));
    assert_non_null(strstr(page, "Where the weight lies"));
    assert_int_equal(count_of(page, "key token"), MAX_PICTURES);
    const cJSON *kl = sheet_at(cJSON_GetArrayItem(readers, 1), "heads.kl");
    snprintf(value, sizeof value, "layer 2 head 3: %.4f",
             cJSON_GetArrayItem(cJSON_GetArrayItem(kl, 2), 3)->valuedouble);
    assert_non_null(strstr(page, value));
    cJSON_Delete(json);
    free(page);
    free(again);
}

static void test_names_and_texts_cannot_bring_markup(void **state) {
    (void)state;
    cJSON *json = evaluate();
    static const char evil[] = "</title><script>x</script><img src=a onerror=\"b\">'&";
    replace_strings(json, evil);
    char *page = sheet_html(json);
    assert_null(strstr(page, "<img"));
    assert_null(strstr(page, "<script"));
    assert_true(count_of(page, "&lt;img") > 10);
    check_well_formed(page);
    free(page);
    for (int i = 0; i < 4; i++) { /* numbers that no scale likes */
        replace_numbers(json, (const double[]){0, -1, 1e300, -1e300}[i]);
        page = sheet_html(json);
        check_well_formed(page);
        if (strstr(page, "nan")) fail_msg("%d: %.200s", i, strstr(page, "nan") - 120);
        free(page);
    }
    cJSON_Delete(json);
}

static void test_any_document_makes_a_page(void **state) {
    (void)state;
    static const char *const documents[] = {
        "{}",
        "[]",
        "7",
        "{\"quality\":7,\"conversion\":[],\"model\":\"m\"}",
        "{\"quality\":{\"readers\":[7,[],{\"perplexity\":{},\"stream\":[{\"bins\":[{},{}]}],"
        "\"passkey\":[{}],\"heads\":{}}]}}",
        "{\"quality\":{\"readers\":[{\"name\":7,\"passkey\":7,\"stream\":7,\"choice\":7,\"recall\":"
        "[7]}],\"added\":[7]}}",
        "{\"conversion\":{\"curve\":{\"kl\":[null,\"x\",1],\"lr\":[]},\"before\":{\"heads\":{"
        "\"kl\":[[1,2],[3]]}}}}",
        "{\"conversion\":{\"after\":{\"heads\":{\"kl\":[[1,2],[3,null]],\"linear\":[[0,0]]}},\"log_"
        "mix\":[[]]}}",
        "{\"conversion\":{\"heads\":{\"mass\":{\"sink\":[[1]],\"window\":[[1],[2]]},\"pictures\":["
        "7,{},{\"softmax\":[\"YZ~\"],"
        "\"hedgehog\":[7]},{\"softmax\":[\"A\"],\"hedgehog\":[\"A\",\"B\"]}]}}}",
        "{\"model\":{\"attention\":{\"map\":7,\"window\":{\"rule\":[]},\"x\":{\"a\":{\"b\":{\"c\":{"
        "\"d\":{\"e\":1}}}}}}}}",
    };
    for (size_t i = 0; i < sizeof documents / sizeof *documents; i++) {
        cJSON *json = cJSON_Parse(documents[i]);
        char *page = sheet_html(json);
        assert_non_null(page);
        check_well_formed(page);
        check_self_contained(page);
        free(page);
        cJSON_Delete(json);
    }
}

static void test_both_files_are_written_or_a_sentence(void **state) {
    (void)state;
    cJSON *json = cJSON_Parse("{\"quality\":{\"readers\":[]}}"), *plain = cJSON_Parse("{}");
    char msg[512] = "";
    assert_int_equal(sheet_write(in("page.txt"), json, msg, sizeof msg), ERR_ARG);
    assert_non_null(strstr(msg, "must end in .html"));
    assert_int_equal(sheet_write(in("conversion.html"), json, msg, sizeof msg), ERR_ARG);
    assert_non_null(strstr(msg, "written over conversion.json"));
    assert_int_not_equal(access(in("conversion.html"), F_OK), 0);
    assert_int_equal(sheet_write(in("no/page.html"), json, msg, sizeof msg), ERR_IO);
    assert_non_null(strstr(msg, "no/page.html"));
    assert_int_equal(sheet_write(in("page.html"), json, msg, sizeof msg), OK);
    assert_int_equal(access(in("page.json"), F_OK), 0);
    assert_int_equal(sheet_write(in("page.html"), json, msg, sizeof msg),
                     OK); /* a report's again */
    static const char *const others[] = {"{\"quality\":{\"perplexity\":1}}", "{", ""};
    for (int i = 0; i < 3; i++) {
        FILE *file = fopen(in("urchin.json"), "w");
        fputs(others[i], file);
        fclose(file);
        assert_int_equal(sheet_write(in("urchin.html"), json, msg, sizeof msg), ERR_ARG);
        assert_non_null(strstr(msg, "written over urchin.json"));
        assert_int_not_equal(access(in("urchin.html"), F_OK), 0);
    }
    assert_int_equal(sheet_write(in("conversion.html"), plain, msg, sizeof msg), OK);
    assert_int_not_equal(access(in("conversion.json"), F_OK), 0); /* it is not this function's */
    cJSON_Delete(json);
    cJSON_Delete(plain);
}

int main(void) {
    log_configure(LOG_WARN, false);
    if (team_new(&team, 2)) return 1;
#define IN_FOLDER(name) cmocka_unit_test_setup_teardown(name, new_folder, remove_folder)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_foreign_text_is_escaped),
        cmocka_unit_test(test_numbers_are_written_as_people_read_them),
        cmocka_unit_test(test_shades_run_from_low_to_high),
        cmocka_unit_test(test_lines_reach_from_corner_to_corner),
        cmocka_unit_test(test_a_grid_has_a_cell_for_every_value),
        cmocka_unit_test(test_shares_fill_their_bars),
        cmocka_unit_test(test_pictures_are_drawn_cell_by_cell),
        IN_FOLDER(test_the_page_says_what_the_json_says),
        IN_FOLDER(test_names_and_texts_cannot_bring_markup),
        cmocka_unit_test(test_any_document_makes_a_page),
        IN_FOLDER(test_both_files_are_written_or_a_sentence),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
