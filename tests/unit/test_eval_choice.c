/* test_eval_choice.c - multiple choice: files refused by line, likelihoods against one token at a
 * time, both rules. */
#include "config/json.h"
#include "config/log.h"
#include "convert/choice.h"
#include "eval_testing.h"

#include <math.h>

#define BASE "tests/data/models/stories260k"

static struct model *open_model(const char *path) {
    struct model_options o;
    char msg[500] = "";
    struct model *m;
    model_options_init(&o);
    o.path = path;
    o.weights = WEIGHT_FP32;
    o.max_rows = o.max_logits = READING_ROWS;
    o.n_slots = 3;
    o.team = team;
    if (model_open(&m, &o, msg, sizeof msg)) fail_msg("%s", msg);
    return m;
}

/* ---- the file ---- */
static void test_questions_are_read_as_they_stand(void **state) {
    (void)state;
    static const char text[] =
        "{\"question\": \"The sky is\", \"choices\": [\"blue\", \"green\"], \"answer\": 0}\n"
        "\n  \t\r\n"
        "{\"answer\": 2, \"context\": \"Caf\\u00e9\\n\", \"choices\": [\"a\", \" b\", "
        "\"\\u2019\"], \"id\": [7]}";
    struct tasks *t;
    char msg[256];
    if (tasks_parse(&t, text, strlen(text), "f.jsonl", msg, sizeof msg)) fail_msg("%s", msg);
    assert_int_equal(t->n, 2);
    assert_int_equal(t->tasks[0].line, 1);
    assert_string_equal(t->tasks[0].context, "The sky is");
    assert_string_equal(t->tasks[0].choices[1], "green");
    assert_int_equal(t->tasks[1].line, 4);
    assert_int_equal(t->tasks[1].n_choices, 3);
    assert_int_equal(t->tasks[1].answer, 2);
    assert_string_equal(t->tasks[1].context, "Caf\303\251\n");
    assert_string_equal(t->tasks[1].choices[1], " b");
    tasks_free(t);
}

static void test_bad_lines_are_refused_by_file_and_number(void **state) {
    (void)state;
#define GOOD "{\"question\":\"q\",\"choices\":[\"a\",\"b\"],\"answer\":1}\n"
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"", "f.jsonl: no questions"},
        {"\n\n", "f.jsonl: no questions"},
        {GOOD "{\"question\":\"q\"", "f.jsonl:2"},
        {GOOD "\n[1]\n", "f.jsonl:3: this is not a JSON object"},
        {GOOD GOOD "{\"choices\":[\"a\",\"b\"],\"answer\":0}", "f.jsonl:3: \"question\""},
        {"{\"question\":\"\",\"choices\":[\"a\",\"b\"],\"answer\":0}", "f.jsonl:1: \"question\""},
        {"{\"question\":7,\"choices\":[\"a\",\"b\"],\"answer\":0}", "f.jsonl:1: \"question\""},
        {"{\"question\":\"q\",\"context\":\"c\",\"choices\":[\"a\",\"b\"],\"answer\":0}",
         "two names"},
        {"{\"question\":\"q\",\"choices\":[\"a\"],\"answer\":0}", "2 to 64 texts"},
        {"{\"question\":\"q\",\"choices\":\"ab\",\"answer\":0}", "2 to 64 texts"},
        {"{\"question\":\"q\",\"choices\":[\"a\",\"\"],\"answer\":0}",
         "choice 1 is not a text, or empty"},
        {"{\"question\":\"q\",\"choices\":[3,\"b\"],\"answer\":0}", "choice 0 is not a text"},
        {"{\"question\":\"q\",\"choices\":[\"a\",\"b\"],\"answer\":2}",
         "index of a choice, 0 to 1"},
        {"{\"question\":\"q\",\"choices\":[\"a\",\"b\"],\"answer\":-1}", "index of a choice"},
        {"{\"question\":\"q\",\"choices\":[\"a\",\"b\"],\"answer\":0.5}", "index of a choice"},
        {"{\"question\":\"q\",\"choices\":[\"a\",\"b\"],\"answer\":\"a\"}", "index of a choice"},
        {"{\"question\":\"q\",\"choices\":[\"a\",\"b\"]}", "index of a choice"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct tasks *t = NULL;
        char msg[256] = "";
        assert_int_equal(
            tasks_parse(&t, cases[i].text, strlen(cases[i].text), "f.jsonl", msg, sizeof msg),
            ERR_FORMAT);
        assert_null(t);
        if (!strstr(msg, cases[i].says) || strncmp(msg, "f.jsonl", 7))
            fail_msg("'%s' is not '%s'", msg, cases[i].says);
    }
    struct tasks *t = NULL;
    char msg[256] = "";
    assert_int_equal(tasks_load(&t, "/no/such/file", msg, sizeof msg), ERR_IO);
    assert_non_null(strstr(msg, "/no/such/file"));
}

/* ---- likelihoods ---- */

/* The whole text a token at a time; sum of the log-probabilities of the tokens from the n-th on. */
static double naively(struct model *m, int32_t bos, const char *context, const char *both) {
    int vocab_size = model_info(m)->vocab_size;
    int32_t *ids, *head;
    size_t n, n_context;
    double sum = 0;
    assert_int_equal(tokenize(model_tokenizer(m), both, strlen(both), 0, &ids, &n), OK);
    assert_int_equal(tokenize(model_tokenizer(m), context, strlen(context), 0, &head, &n_context),
                     OK);
    model_slot_clear(m, 2);
    int32_t last = bos;
    for (size_t t = 0; t < n; last = ids[t++]) {
        const float *logits;
        struct model_run run = {.slot = 2, .n_rows = 1, .tokens = &last, .n_logits = 1};
        assert_int_equal(model_step(m, &run, 1, &logits), OK);
        if (t < n_context) continue;
        double all = 0;
        for (int v = 0; v < vocab_size; v++)
            all += exp((double)logits[v] - logits[ids[t]]);
        sum -= log(all);
    }
    free(ids);
    free(head);
    return sum;
}

/* exp in single, 1e-7 relative a token; rows are the same bits however a prompt is cut. */
static void test_likelihoods_are_those_of_reading_each_choice_alone(void **state) {
    (void)state;
    static char *choices[] = {"was a little girl named Lily. She loved to play with her toys.",
                              "dog", " a mat\nand a cat", "x"};
    static const char *const joined[] = {
        "Once upon a time, there was a little girl named Lily. She loved to play with her toys.",
        "Once upon a time, there dog", "Once upon a time, there a mat\nand a cat",
        "Once upon a time, there x"};
    struct task t = {
        .line = 3, .context = "Once upon a time, there", .choices = choices, .n_choices = 4};
    struct model *m = open_model(MODEL);
    int32_t bos = tokenizer_bos(model_tokenizer(m));
    struct reader reader = {.name = "m", .model = m, .slot = 0, .spare = 1, .linear = true};
    double got[MAX_CHOICES];
    char msg[256];
    if (choice_ask(got, &reader, "f", &t, bos, msg, sizeof msg)) fail_msg("%s", msg);
    for (int i = 0; i < 4; i++) {
        double want = naively(m, bos, t.context, joined[i]);
        if (!(fabs(got[i] - want) <= 1e-5))
            fail_msg("choice %d: %.9g is not %.9g", i, got[i], want);
    }
    model_close(m);
}

static void test_a_context_longer_than_a_step_and_a_window_is_read_whole(void **state) {
    (void)state;
    char context[2000] = "", both[2100];
    for (int i = 0; i < 30; i++)
        strcat(context, "Tom had a red ball and Sue had a blue hat. ");
    context[strlen(context) - 1] = 0;
    char *choices[] = {"They were friends.", "No"};
    struct task t = {.line = 1, .context = context, .choices = choices, .n_choices = 2};
    struct model *m = open_model(MODEL);
    struct reader reader = {.name = "m", .model = m, .slot = 0, .spare = 1, .linear = true};
    int32_t bos = tokenizer_bos(model_tokenizer(m));
    double got[MAX_CHOICES];
    assert_int_equal(choice_ask(got, &reader, "f", &t, bos, NULL, 0), OK);
    for (int i = 0; i < 2; i++) {
        snprintf(both, sizeof both, "%s %s", context, choices[i]);
        assert_true(fabs(got[i] - naively(m, bos, context, both)) <= 1e-5);
    }
    model_close(m);
}

static void test_what_does_not_fit_or_has_no_token_is_refused_by_line(void **state) {
    (void)state;
    static char long_text[4000];
    char *choices[] = {"a", "b"}, *long_choices[] = {long_text, "b"};
    struct task t = {.line = 12, .context = long_text, .choices = choices, .n_choices = 2};
    struct model *m = open_model(BASE);
    struct reader reader = {.name = "base", .model = m, .slot = 0, .spare = 1, .linear = true};
    double got[MAX_CHOICES];
    char msg[256];
    memset(long_text, 'z', sizeof long_text - 1);
    assert_int_equal(choice_ask(got, &reader, "f.jsonl", &t, 1, msg, sizeof msg), ERR_ARG);
    assert_non_null(strstr(msg, "f.jsonl:12: the question has"));
    t = (struct task){.line = 13, .context = "hello", .choices = long_choices, .n_choices = 2};
    assert_int_equal(choice_ask(got, &reader, "f.jsonl", &t, 1, msg, sizeof msg), ERR_ARG);
    assert_non_null(strstr(msg, "f.jsonl:13: the question has"));
    model_close(m);
}

/* ---- rules ---- */
static void test_both_rules_choose_by_their_definition(void **state) {
    (void)state;
    char *choices[] = {"yes", "certainly not", "no"};
    struct task t = {.choices = choices, .n_choices = 3};
    int plain, normalised;
    double a[] = {-6, -7, -6.5}; /* a byte: -2, -0.54, -3.25 */
    choice_pick(a, &t, &plain, &normalised);
    assert_int_equal(plain, 0);
    assert_int_equal(normalised, 1);
    double late[] = {-6, -7, -1.2}; /* a byte: -2, -0.54, -0.6 */
    choice_pick(late, &t, &plain, &normalised);
    assert_int_equal(plain, 2);
    assert_int_equal(normalised, 1);
    double ties[] = {-3, -13, -2}; /* all -1 a byte */
    choice_pick(ties, &t, &plain, &normalised);
    assert_int_equal(plain, 2);
    assert_int_equal(normalised, 0);
    assert_true(choice_accuracy(8, 6) == 0.75);
    assert_true(fabs(choice_error(8, 6) - sqrt(0.75 * 0.25 / 7)) < 1e-15);
    assert_true(isnan(choice_error(1, 1)) && isnan(choice_accuracy(0, 0)));
}

/* ---- the command ---- */
/* Before anything is measured, or a model is looked for. */
static void test_a_page_that_cannot_be_written_is_refused_first(void **state) {
    (void)state;
    char said[2000], *flags[] = {"eval", "no/model", "--html", "page.htm"};
    assert_int_equal(run_eval(flags, 4, 2, said, sizeof said), 1);
    assert_non_null(strstr(said, "must end in .html"));
    flags[3] = "no/folder/page.html";
    assert_int_equal(run_eval(flags, 4, 2, said, sizeof said), 1);
    assert_non_null(strstr(said, "no/folder/page.html"));
}

/* A copy of MODEL whose tokenizer knows one token more, "zebra", than there are weights for. */
static void test_tokens_without_weights_are_refused(void **state) {
    (void)state;
    static const char *const questions[] = {
        "{\"question\":\"There was a\",\"choices\":[\"zebra\",\"cat\"],\"answer\":1}\n",
        "{\"question\":\"The zebra was\",\"choices\":[\"big\",\"red\"],\"answer\":1}\n"};
    char folder[] = "/tmp/urchin-zebra-XXXXXX", path[100], said[2000];
    char *text =
        edited(MODEL "/tokenizer.json", "\"added_tokens\": [",
               "\"added_tokens\":[{\"id\":512,\"content\":\"zebra\",\"single_word\":false,"
               "\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":false},");
    copy_model(folder, "tokenizer.json", text);
    free(text);
    snprintf(path, sizeof path, "%s/text", folder);
    char *asked[] = {"eval", folder, "--tests", "choice", "--tasks", path},
         *read[] = {"eval", folder, "--tests", "perplexity", "--text", path};
    for (int i = 0; i < 2; i++) {
        write_text(path, questions[i]);
        assert_int_equal(run_eval(asked, 6, 2, said, sizeof said), 1);
        assert_non_null(strstr(said, "text:1: one of the tokens is number 512"));
    }
    write_text(path, "There was a zebra and a cat.");
    assert_int_equal(run_eval(read, 6, 2, said, sizeof said), 1);
    assert_non_null(strstr(said, "/text' is number 512, and"));
    unlink(path);
    remove_copy(folder);
}

static void test_the_command_scores_base_model_and_ablations(void **state) {
    (void)state;
    char path[] = "/tmp/urchin-tasks-XXXXXX";
    FILE *file = fdopen(mkstemp(path), "w");
    /* what its stories say, against what no child would: then an answer marked wrong on purpose,
     * and one whose right choice is longer than the likely one */
    fputs(
        "{\"question\":\"Once upon a time, there was a little girl "
        "named\",\"choices\":[\"Lily\",\"Zqxj\"],\"answer\":0}\n"
        "{\"context\":\"Lily wanted to play in the\",\"choices\":[\"tax\",\"park\"],\"answer\":1}\n"
        "{\"question\":\"Once upon a\",\"choices\":[\"time\",\"fax\"],\"answer\":1}\n",
        file);
    fclose(file);
    char *flags[] = {"eval",      MODEL, "--tests",   "choice", "--tasks", path,
                     "--against", BASE,  "--weights", "fp32",   "--json"};
    char msg[256], *text = calloc(1, 1 << 16);
    int status = run_eval(flags, sizeof flags / sizeof *flags, 1, text, 1 << 16);
    unlink(path);
    assert_int_equal(status, 0);
    struct json *root;
    if (json_parse(&root, text, strlen(text), "report", msg, sizeof msg)) fail_msg("%s", msg);
    int n = 0;
    for (const struct json *r = json_child(json_get(root, "readers")); r; r = json_next(r), n++) {
        const struct json *c = json_get(r, "choice");
        assert_true(json_number(json_get(c, "questions"), 0) == 3);
        assert_true(fabs(json_number(json_get(c, "acc"), 0) - 2 / 3.) < 1e-5);
        assert_true(fabs(json_number(json_get(c, "acc_standard_error"), 0) - sqrt(2 / 9. / 2)) <
                    1e-5);
        assert_true(fabs(json_number(json_get(c, "acc_norm"), 0) - 2 / 3.) < 1e-5);
        assert_null(json_get(r, "perplexity"));
    }
    assert_int_equal(n, 5);
    json_free(root);
    free(text);
}

int main(void) {
    log_configure(LOG_WARN, false);
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_questions_are_read_as_they_stand),
        cmocka_unit_test(test_bad_lines_are_refused_by_file_and_number),
        cmocka_unit_test(test_likelihoods_are_those_of_reading_each_choice_alone),
        cmocka_unit_test(test_a_context_longer_than_a_step_and_a_window_is_read_whole),
        cmocka_unit_test(test_what_does_not_fit_or_has_no_token_is_refused_by_line),
        cmocka_unit_test(test_both_rules_choose_by_their_definition),
        cmocka_unit_test(test_the_command_scores_base_model_and_ablations),
        cmocka_unit_test(test_a_page_that_cannot_be_written_is_refused_first),
        cmocka_unit_test(test_tokens_without_weights_are_refused),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
