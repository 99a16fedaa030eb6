/* test_convert_recall.c - recall texts: what is asked was said, once, and nothing contradicts it.
 */
#include "compute/team.h"
#include "convert/corpus.h"
#include "convert/recall_text.h"
#include "convert/teacher.h"
#include "model/model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define STORIES "tests/data/models/stories260k"
#define TEXT "tests/data/text/tinystories-valid-head.txt"
#define GPT2 "tests/data/tokenizers/ggml-vocab-gpt-2.gguf"

static struct team *team;
static char said[1024];

static struct model *open_stories(void) {
    struct model_options o;
    model_options_init(&o);
    o.path = STORIES;
    o.n_slots = 1;
    o.team = team;
    struct model *m = NULL;
    if (model_open(&m, &o, said, sizeof said)) fail_msg("%s", said);
    return m;
}

static struct tokenizer *open_gpt2(void) {
    struct gguf *g;
    struct tokenizer *t = NULL;
    assert_int_equal(gguf_open(&g, GPT2, said, sizeof said), OK);
    assert_int_equal(tokenizer_open_gguf(&t, g, said, sizeof said), OK);
    gguf_close(g);
    return t;
}

static struct corpus *open_corpus(const struct tokenizer *t, const struct chat *chat,
                                  double recall) {
    struct corpus *c = NULL;
    struct corpus_options o = {.sources = TEXT,
                               .tokenizer = t,
                               .chat = chat,
                               .vocab_size = tokenizer_vocab_size(t),
                               .least = 20,
                               .recall = recall};
    if (corpus_open(&c, &o, said, sizeof said)) fail_msg("%s", said);
    return c;
}

static void test_no_two_facts_of_a_text_contradict_each_other(void **state) {
    (void)state;
    int kinds[32] = {0}, asked = 0, many = 0;
    for (uint64_t seed = 0; seed < 3000; seed++) {
        struct recall r;
        recall_draw(&r, seed, 4096, seed % 2, RECALL_FACTS);
        assert_true(r.n_facts >= 1 && r.n_facts <= RECALL_FACTS);
        assert_true(r.n_questions >= 1 && r.n_questions <= RECALL_QUESTIONS);
        assert_true(seed % 2 || !r.chat);
        many += r.n_facts == RECALL_FACTS;
        for (int i = 0; i < r.n_facts; i++) {
            const struct recall_fact *f = &r.facts[i];
            kinds[f->kind]++;
            assert_true(strstr(f->sentence, f->subject) && strstr(f->sentence, f->value));
            assert_non_null(strstr(f->answer, recall_wanted(f)));
            assert_null(strstr(f->question, recall_wanted(f)));
            assert_true(i == 0 || f->depth >= f[-1].depth);
            for (int k = 0; k < i; k++) {
                const struct recall_fact *g = &r.facts[k];
                if (f->kind != g->kind) continue;
                assert_string_not_equal(f->subject, g->subject);
                assert_string_not_equal(f->value, g->value);
                assert_string_not_equal(f->question, g->question);
            }
        }
        for (int q = 0; q < r.n_questions; q++)
            for (int p = 0; p < q; p++)
                assert_int_not_equal(r.asked[p], r.asked[q]);
        asked += r.n_questions;
    }
    for (int k = 0; k < 9; k++)
        assert_true(kinds[k] > 300); /* of some 13,500 facts */
    assert_true(asked > 3000 && many > 200);
}

/* Tokens marked as answers spell what was asked for, in the questions' order; the fact stands
 * before the first question. */
static void check_tokens(const struct tokenizer *t, const struct chat *chat, uint64_t seed,
                         int length, int *n_chat) {
    static char filler[40000];
    memset(filler, 0, sizeof filler);
    for (size_t i = 0; i + 40 < sizeof filler; i += strlen(filler + i))
        strcpy(filler + i, i / 40 % 3 ? "The rain went on, caf\xC3\xA9 and all. " : "So it was.\n");
    struct recall r;
    int32_t *ids;
    float *answer;
    int n;
    recall_draw(&r, seed, length, chat_family(chat) != CHAT_NONE, RECALL_FACTS);
    if (recall_tokens(&r, t, chat, filler, strlen(filler), length, &ids, &answer, &n, said,
                      sizeof said))
        fail_msg("%s", said);
    assert_true(n > length - 40 && n <= length);
    *n_chat += r.chat;
    char *text;
    size_t len, at = 0;
    assert_int_equal(detokenize(t, ids, (size_t)n, true, false, &text, &len), OK);
    char *first = strstr(text, r.facts[r.asked[0]].question);
    assert_non_null(first);
    for (int i = 0; i < r.n_facts; i++) {
        char *sentence = strstr(text, r.facts[i].sentence);
        if (!sentence) fail_msg("'%s' is not in '%s'", r.facts[i].sentence, text);
        assert_true(sentence < first);
    }
    for (int q = 0; q < r.n_questions; q++) {
        char marked[400] = "";
        while (at < (size_t)n && answer[at] == 0)
            at++;
        for (; at < (size_t)n && answer[at] == 1; at++) {
            size_t bytes;
            const char *piece = token_bytes(t, ids[at], true, &bytes);
            strncat(marked, piece, bytes);
        }
        const char *wanted = recall_wanted(&r.facts[r.asked[q]]);
        if (!strstr(marked, wanted) || strlen(marked) > strlen(wanted) + 8)
            fail_msg("marked is '%s', wanted '%s' of '%s'", marked, wanted,
                     r.facts[r.asked[q]].answer);
    }
    while (at < (size_t)n)
        assert_true(answer[at++] == 0);
    free(text);
    free(ids);
    free(answer);
}

static void test_what_is_asked_for_is_in_the_text_and_marked(void **state) {
    (void)state;
    static const char *const families[] = {"none", "llama2", "zephyr"};
    struct model *m = open_stories();
    struct tokenizer *gpt2 = open_gpt2();
    for (int f = 0; f < 3; f++) {
        struct chat *chat;
        int n_chat = 0;
        if (chat_new(&chat, gpt2, NULL, families[f], said, sizeof said)) fail_msg("%s", said);
        for (uint64_t seed = 0; seed < 60; seed++)
            check_tokens(gpt2, chat, seed, 300 + (int)seed * 30, &n_chat);
        assert_true(f ? n_chat > 30 && n_chat < 60 : n_chat == 0);
        chat_free(chat);
    }
    for (uint64_t seed = 0; seed < 60; seed++) { /* SentencePiece, small pieces */
        int n_chat = 0;
        check_tokens(model_tokenizer(m), model_chat(m), seed, 500 + (int)seed * 10, &n_chat);
    }
    tokenizer_free(gpt2);
    model_close(m);
}

static void test_where_nothing_fits_the_pack_is_an_ordinary_one(void **state) {
    (void)state;
    struct model *m = open_stories();
    struct corpus *c = open_corpus(model_tokenizer(m), model_chat(m), 1);
    struct pack p;
    for (int i = 0; i < 10; i++) {
        assert_int_equal(corpus_pack(c, 1, PACK_TRAIN, i, 30, &p, said, sizeof said), OK);
        assert_true(p.n > 0 && p.n <= 30 && !p.weight);
        pack_free(&p);
        assert_int_equal(corpus_pack(c, 1, PACK_TRAIN, i, 400, &p, said, sizeof said), OK);
        assert_true(p.n > 0 && p.n <= 400 && p.weight);
        pack_free(&p);
    }
    corpus_close(c);
    model_close(m);
}

static void test_the_share_is_kept_and_packs_are_the_same_again(void **state) {
    (void)state;
    struct model *m = open_stories();
    static const double shares[] = {0.125, 0.2, 0.37, 1};
    for (int s = 0; s < 4; s++) {
        struct corpus *c = open_corpus(model_tokenizer(m), model_chat(m), shares[s]),
                      *d = open_corpus(model_tokenizer(m), model_chat(m), shares[s]);
        int n = 0, at[5] = {0};
        for (int i = 0; i < 200; i++) {
            struct pack p, q;
            assert_int_equal(corpus_pack(c, 5, PACK_TRAIN, i, 256, &p, said, sizeof said), OK);
            n += p.weight != NULL;
            at[i % 5] += p.weight != NULL;
            assert_true(n > (i + 1) * shares[s] - 1.01 && n < (i + 1) * shares[s] + 1.01);
            if (i % 10 == 0) {
                assert_int_equal(corpus_pack(d, 5, PACK_TRAIN, i, 256, &q, said, sizeof said), OK);
                assert_int_equal(p.n, q.n);
                assert_memory_equal(p.tokens, q.tokens, (size_t)p.n * sizeof *p.tokens);
                assert_true(!p.weight == !q.weight);
                if (p.weight)
                    assert_memory_equal(p.weight, q.weight, (size_t)p.n * sizeof *p.weight);
                pack_free(&q);
            }
            assert_int_equal(p.first[p.n_documents], p.n);
            pack_free(&p);
        }
        for (int i = 0; i < 5; i++)
            assert_true(at[i] > 0); /* not always, nor never, the long ones */
        for (int stream = PACK_CALIBRATE; stream <= PACK_PROBE; stream++) {
            struct pack p;
            if (stream == PACK_TRAIN) continue;
            assert_int_equal(corpus_pack(c, 5, stream, 0, 256, &p, said, sizeof said), OK);
            assert_null(p.weight);
            pack_free(&p);
        }
        corpus_close(c);
        corpus_close(d);
    }
    model_close(m);
}

static void test_rows_that_predict_answers_are_always_drawn(void **state) {
    (void)state;
    struct model *m = open_stories();
    struct corpus *c = open_corpus(model_tokenizer(m), model_chat(m), 1);
    struct attention_config a = model_info(m)->attention;
    a.kind = ATTENTION_HEDGEHOG;
    a.window = WINDOW_TERRACED;
    a.window_size = 32;
    struct teacher *t;
    assert_int_equal(teacher_new(&t, m, &a, 512, 60), OK);
    int seen = 0;
    for (int i = 0; i < 12; i++) {
        struct pack p;
        struct lesson l;
        double share;
        int n_rows = i % 3 ? 60 : 3; /* also fewer than there are answers */
        assert_int_equal(corpus_pack(c, 2, PACK_TRAIN, i, 480, &p, said, sizeof said), OK);
        assert_int_equal(
            teacher_read(t, &p, n_rows, 2, PACK_TRAIN, i, &l, &share, said, sizeof said), OK);
        assert_int_equal(l.n_rows, n_rows);
        int answers = 0, drawn = 0;
        for (int k = 1; k < p.n; k++)
            answers += p.weight[k] > 0; /* behind position 64 all of them */
        for (int r = 0; r < l.n_rows; r++) {
            assert_true(r == 0 || l.rows[r] > l.rows[r - 1]);
            drawn += l.rows[r] + 1 < p.n && p.weight[l.rows[r] + 1] > 0;
        }
        assert_true(answers > 0);
        assert_int_equal(drawn, answers < n_rows ? answers : n_rows);
        seen += answers;
        pack_free(&p);
    }
    assert_true(seen > 12);
    teacher_free(t);
    corpus_close(c);
    model_close(m);
}

int main(void) {
    if (team_new(&team, 1)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_two_facts_of_a_text_contradict_each_other),
        cmocka_unit_test(test_what_is_asked_for_is_in_the_text_and_marked),
        cmocka_unit_test(test_where_nothing_fits_the_pack_is_an_ordinary_one),
        cmocka_unit_test(test_the_share_is_kept_and_packs_are_the_same_again),
        cmocka_unit_test(test_rows_that_predict_answers_are_always_drawn),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
