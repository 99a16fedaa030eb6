/* test_eval_recall.c - facts are where they should be, questions from a copy are those of a text
 * read anew, and a model that can recall is told from one that cannot. */
#include "convert/recall.h"
#include "model_testing.h"

#define TEXT "tests/data/text/doyle-lost-world-head.txt"

static struct team *team;

static struct model *open_model(const char *path, int n_slots, int cache_size) {
    struct model_options o = options_for(path, WEIGHTS_AUTO, team);
    o.max_rows = o.max_logits = READING_ROWS;
    o.n_slots = n_slots;
    o.cache_size = cache_size;
    return open_with(&o);
}

static struct text filler_of(const struct model *m, int64_t most) {
    static char buffer[100000];
    FILE *file = fopen(TEXT, "rb");
    assert_non_null(file);
    size_t len = fread(buffer, 1, sizeof buffer, file), n;
    fclose(file);
    int32_t *ids;
    assert_int_equal(tokenize(model_tokenizer(m), buffer, len, 0, &ids, &n), OK);
    assert_true((int64_t)n >= most);
    return (struct text){
        ids, most, tokenizer_add_bos(model_tokenizer(m)) ? tokenizer_bos(model_tokenizer(m)) : -1};
}

static char *words(const struct model *m, const int32_t *ids, size_t n) {
    char *text;
    size_t len;
    assert_int_equal(detokenize(model_tokenizer(m), ids, n, false, true, &text, &len), OK);
    return text;
}

static void test_texts_have_their_length_and_hold_each_fact_once(void **state) {
    (void)state;
    enum { LENGTH = 900, FACTS = 5, TEXTS = 4 };
    struct model *m = open_model(STORIES, 1, -1);
    struct text filler = filler_of(m, 3000);
    struct recall_options o = {model_tokenizer(m), &filler, 3, LENGTH};
    int asked[DEPTHS] = {0};
    char msg[256];
    for (int t = 0; t < TEXTS; t++) {
        struct recall_text text, again, other;
        assert_int_equal(recall_make(&text, &o, FACTS, t, TEXTS, msg, sizeof msg), OK);
        assert_int_equal(recall_make(&again, &o, FACTS, t, TEXTS, msg, sizeof msg), OK);
        o.seed = 4;
        assert_int_equal(recall_make(&other, &o, FACTS, t, TEXTS, msg, sizeof msg), OK);
        o.seed = 3;
        assert_memory_equal(text.ids, again.ids, LENGTH * sizeof *text.ids);
        assert_memory_not_equal(text.ids, other.ids, LENGTH * sizeof *text.ids);
        assert_int_equal(text.ids[0], filler.bos);
        char *whole = words(m, text.ids, LENGTH), *at = whole;
        for (int k = 0; k < FACTS; k++) {
            struct fact *f = &text.facts[k];
            char *told = words(m, f->told, f->n_told), *question = words(m, f->asked, f->n_asked),
                 *answer = words(m, f->answer, f->n_answer), name[32];
            int number;
            at = strstr(
                at,
                told + 1); /* in this order; the leading line end may be one with what is before */
            assert_non_null(at);
            assert_null(strstr(at + 1, told + 1));
            assert_int_equal(sscanf(told, "\nThe pass key of %31s is %d.", name, &number), 2);
            assert_non_null(strstr(question, name));
            assert_int_equal(atoi(answer), number);
            for (int i = 0; i < k; i++) {
                char *earlier = words(m, text.facts[i].asked, text.facts[i].n_asked);
                assert_string_not_equal(earlier, question); /* a name of its own */
                free(earlier);
            }
            /* its place among the filler, in tokens: a share of what is left without facts */
            size_t before = 1, fill = LENGTH - 1;
            for (int i = 0; i < FACTS; i++)
                fill -= text.facts[i].n_told;
            for (int i = 0; i < k; i++)
                before += text.facts[i].n_told;
            before += (size_t)(text.shares[k] * (double)fill);
            assert_memory_equal(text.ids + before, f->told, f->n_told * sizeof *f->told);
            asked[depth_of(text.shares[k])]++;
            free(told), free(question), free(answer);
        }
        free(whole);
        recall_free(&text), recall_free(&again), recall_free(&other);
    }
    for (int d = 0; d < DEPTHS; d++)
        assert_int_equal(asked[d], FACTS * TEXTS / DEPTHS);
    struct recall_text none;
    o.length = 100;
    assert_int_equal(recall_make(&none, &o, FACTS, 0, 1, msg, sizeof msg), ERR_ARG);
    assert_non_null(strstr(msg, "filler"));
    o.length = 4000;
    assert_int_equal(recall_make(&none, &o, FACTS, 0, 1, msg, sizeof msg), ERR_ARG);
    assert_int_equal(recall_make(&none, &o, MAX_FACTS + 1, 0, 1, msg, sizeof msg), ERR_ARG);
    free((int32_t *)filler.ids);
    model_close(m);
}

/* Each question by reading the whole text again: copies of a slot give the same rows to the bit. */
static void test_questions_from_a_copy_are_those_of_a_text_read_anew(void **state) {
    (void)state;
    enum { LENGTH = 500, FACTS = 3, TEXTS = 8 };
    struct model *m = open_model(STORIES, 3, -1),
                 *base = open_model("tests/data/models/stories260k", 3, -1);
    struct text filler = filler_of(m, 3000);
    struct recall_options o = {model_tokenizer(m), &filler, 0, LENGTH};
    struct reader readers[] = {
        {.name = "m", .model = m, .slot = 0, .spare = 1, .linear = true},
        {.name = "base", .model = base, .slot = 0, .spare = 1, .linear = true}};
    struct recalled got[2][DEPTHS] = {0}, want[DEPTHS] = {0};
    char msg[256];
    assert_int_equal(recall_measure(got, readers, 2, &o, FACTS, TEXTS, msg, sizeof msg), OK);
    for (int t = 0; t < TEXTS; t++) {
        struct recall_text text;
        assert_int_equal(recall_make(&text, &o, FACTS, t, TEXTS, msg, sizeof msg), OK);
        for (int k = 0; k < FACTS; k++) {
            const struct fact *f = &text.facts[k];
            int32_t ids[1000];
            size_t n = LENGTH + f->n_asked;
            struct answer answer;
            memcpy(ids, text.ids, LENGTH * sizeof *ids);
            memcpy(ids + LENGTH, f->asked, f->n_asked * sizeof *ids);
            memcpy(ids + n, f->answer, f->n_answer * sizeof *ids);
            struct passkey p = {.ids = ids, .n = (int64_t)n, .n_answer = (int)f->n_answer};
            struct reader fresh = {.name = "m", .model = m, .slot = 2, .linear = true};
            assert_int_equal(passkey_ask(&answer, &fresh, &p, msg, sizeof msg), OK);
            recalled_add(&want[depth_of(text.shares[k])], &answer);
        }
        recall_free(&text);
    }
    assert_memory_equal(got[0], want, sizeof want);
    struct recalled all = recalled_all(got[0]), none = recalled_all(got[1]);
    assert_int_equal(all.asked, FACTS * TEXTS);
    assert_true(all.digits > 0);     /* by chance */
    assert_int_equal(none.asked, 0); /* text and question are past the base's 512 */
    assert_true(isnan(recalled_digits(&none)) && recalled_digits(&all) > 0);
    free((int32_t *)filler.ids);
    model_close(m);
    model_close(base);
}

static void test_texts_too_short_to_add_are_refused(void **state) {
    (void)state;
    struct model *m = open_model(STORIES, 4, 96);
    struct text filler = filler_of(m, 3000);
    struct recall_options o = {model_tokenizer(m), &filler, 0, 150}; /* a fact has 76 tokens here */
    struct added sums = {0};
    char msg[256];
    /* window 32, 96 places, a sink: linear from block 5 on, 160 tokens */
    assert_int_equal(added_measure(&sums, m, &o, 2, 0, 1, msg, sizeof msg), ERR_ARG);
    o.length = 300;
    if (added_measure(&sums, m, &o, 2, 0, 1, msg, sizeof msg)) fail_msg("%s", msg);
    assert_int_equal(sums.own_alone.asked, 2);
    assert_int_equal(sums.others_alone.asked, 2);
    assert_int_equal(sums.own_joined.asked, 1);
    assert_int_equal(sums.others_joined.asked, 1);
    assert_int_equal(sums.own_added.asked, 2);
    assert_int_equal(sums.others_added.asked, 2);
    assert_int_equal(added_measure(&sums, m, &o, 1, 0, 1, msg, sizeof msg), ERR_ARG);
    free((int32_t *)filler.ids);
    model_close(m);
}

/* The default model: what it read it repeats, what was added it repeats too, what it never read it
 * cannot. */
static void test_the_default_model_recalls_what_was_added(void **state) {
    (void)state;
    if (!smollm_base()) skip();
    struct model *m = open_model(SMOLLM, 4, 256);
    struct text filler = filler_of(m, 5000);
    struct recall_options o = {model_tokenizer(m), &filler, 0, 520};
    struct added sums = {0};
    char msg[256];
    for (int set = 0; set < 2; set++)
        if (added_measure(&sums, m, &o, 2, set, 2, msg, sizeof msg)) fail_msg("%s", msg);
    print_message(
        "own: alone %.2f, joined %.2f, added %.2f; others': unread %.2f, joined %.2f, added %.2f\n",
        recalled_digits(&sums.own_alone), recalled_digits(&sums.own_joined),
        recalled_digits(&sums.own_added), recalled_digits(&sums.others_alone),
        recalled_digits(&sums.others_joined), recalled_digits(&sums.others_added));
    assert_true(recalled_digits(&sums.own_alone) >= 0.8);
    assert_true(recalled_digits(&sums.own_added) >= 0.8);
    assert_true(recalled_digits(&sums.others_added) >= 0.7);
    assert_true(recalled_digits(&sums.others_alone) <= 0.5);
    free((int32_t *)filler.ids);
    model_close(m);
}

int main(void) {
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_texts_have_their_length_and_hold_each_fact_once),
        cmocka_unit_test(test_questions_from_a_copy_are_those_of_a_text_read_anew),
        cmocka_unit_test(test_texts_too_short_to_add_are_refused),
        cmocka_unit_test(test_the_default_model_recalls_what_was_added),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
