/* test_small_models.c - three small models trained by others: known texts and known activations.
 *
 * The texts are what llama2.c's run prints for these files at temperature 0; the activations of
 * gpt-nano-sort were recorded from PyTorch (tests/data/models/README.md). */
#include "model/model.h"
#include "model/safetensors.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct team *team;

static struct model *open_model(const char *path, int weights) {
    struct model_options o;
    model_options_init(&o);
    o.path = path;
    o.weights = weights;
    o.kv_type = KV_FP32;
    o.n_slots = 3;
    o.max_logits = 33;
    o.team = team;
    struct model *m = NULL;
    char msg[512] = "";
    if (model_open(&m, &o, msg, sizeof msg)) fail_msg("%s", msg);
    return m;
}

static int32_t argmax(const float *x, int n) {
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

/* Reads the prompt and appends n greedy tokens: ids [n_prompt + n]. */
static void greedy(struct model *m, int slot, int32_t *ids, int n_prompt, int n) {
    int vocab_size = model_info(m)->vocab_size;
    const float *logits;
    model_slot_clear(m, slot);
    struct model_run run = {.slot = slot, .n_rows = n_prompt, .tokens = ids, .n_logits = 1};
    for (int i = 0; i < n; i++) {
        assert_int_equal(model_step(m, &run, 1, &logits), OK);
        ids[n_prompt + i] = argmax(logits, vocab_size);
        run.tokens = &ids[n_prompt + i];
        run.n_rows = 1;
    }
}

/* Greedy from "Once upon a time", until the text is at least as long as the story. */
static void check_story(const char *path, int weights, const char *story) {
    struct model *m = open_model(path, weights);
    const struct tokenizer *t = model_tokenizer(m);
    static const char prompt[] = "Once upon a time";
    enum { MORE = 80 }; /* a token is at least a letter */
    int32_t *begin, ids[256];
    size_t n_begin, len;
    assert_int_equal(tokenize(t, prompt, strlen(prompt), TOKENIZE_ADD_BOS_EOS, &begin, &n_begin),
                     OK);
    assert_true(n_begin + MORE <= 256);
    memcpy(ids, begin, n_begin * sizeof *ids);
    free(begin);
    assert_int_equal(ids[0], 1);
    greedy(m, 0, ids, (int)n_begin, MORE);
    char *text;
    assert_int_equal(detokenize(t, ids, n_begin + MORE, false, true, &text, &len), OK);
    assert_true(len >= strlen(story));
    text[strlen(story)] = 0;
    assert_string_equal(text, story);
    free(text);
    model_close(m);
}

static const char park[] =
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball.";
static const char sunshine[] = "Once upon a time, there was a little girl named Lily. She loved to "
                               "play outside in the sunshine.";

static void test_stories260k_tells_its_story(void **state) {
    (void)state;
    check_story("tests/data/models/stories260k", WEIGHT_FP32, park);
}

static void test_babyllama_tells_its_story_letter_by_letter(void **state) {
    (void)state;
    check_story("tests/data/models/babyllama-105", WEIGHT_FP32, sunshine);
}

/* Rounding weights to 16 or 8 bits must not change stories told with confidence. */
static void test_rounded_weights_tell_the_same_stories(void **state) {
    (void)state;
    check_story("tests/data/models/babyllama-105", WEIGHT_BF16, sunshine);
    check_story("tests/data/models/babyllama-105", WEIGHT_INT8, sunshine);
    check_story("tests/data/models/stories260k", WEIGHT_BF16, park);
    check_story("tests/data/models/stories260k", WEIGHT_INT8, park);
}

/* Logits within 2e-5 of PyTorch's: values up to 5, three blocks of fp32 sums of at most 192 terms,
 * both sides rounding: sqrt(192) * 2^-24 * 5 = 4e-6 a block. */
static void test_gpt_nano_sort_has_pytorchs_logits_and_probabilities(void **state) {
    (void)state;
    enum { BATCH = 3, ROWS = 11, VOCAB = 3 };
    struct safetensors *golden;
    char msg[256] = "";
    if (safetensors_open(&golden, "tests/data/models/gpt-nano-sort/golden.safetensors", msg,
                         sizeof msg))
        fail_msg("%s", msg);
    float idx[BATCH * ROWS], logits[BATCH * ROWS * VOCAB], probs[BATCH * ROWS * VOCAB];
    assert_int_equal(st_decode(idx, safetensors_get(golden, "idx"), 0, BATCH * ROWS), OK);
    assert_int_equal(st_decode(logits, safetensors_get(golden, "lm_head"), 0, BATCH * ROWS * VOCAB),
                     OK);
    assert_int_equal(st_decode(probs, safetensors_get(golden, "probs"), 0, BATCH * ROWS * VOCAB),
                     OK);
    safetensors_close(golden);

    struct model *m = open_model("tests/data/models/gpt-nano-sort", WEIGHT_FP32);
    assert_int_equal(model_info(m)->vocab_size, VOCAB);
    int32_t ids[BATCH * ROWS];
    struct model_run runs[BATCH];
    for (int i = 0; i < BATCH * ROWS; i++)
        ids[i] = (int32_t)idx[i];
    for (int b = 0; b < BATCH; b++)
        runs[b] = (struct model_run){
            .slot = b, .n_rows = ROWS, .tokens = ids + b * ROWS, .n_logits = ROWS};
    const float *out;
    assert_int_equal(model_step(m, runs, BATCH, &out), OK);
    for (int i = 0; i < BATCH * ROWS * VOCAB; i++)
        assert_true(fabsf(out[i] - logits[i]) <= 2e-5f);
    for (int row = 0; row < BATCH * ROWS; row++) {
        const float *x = out + row * VOCAB;
        float top = x[argmax(x, VOCAB)], sum = 0;
        for (int i = 0; i < VOCAB; i++)
            sum += expf(x[i] - top);
        for (int i = 0; i < VOCAB; i++)
            assert_true(fabsf(expf(x[i] - top) / sum - probs[row * VOCAB + i]) <= 2e-5f);
    }
    model_close(m);
}

static void test_gpt_nano_sort_sorts_letters(void **state) {
    (void)state;
    struct model *m = open_model("tests/data/models/gpt-nano-sort", WEIGHT_FP32);
    int wrong = 0;
    for (int n = 0; n < 729; n++) {
        int32_t ids[12], count[3] = {0};
        for (int i = 0, rest = n; i < 6; i++, rest /= 3)
            count[ids[i] = rest % 3]++;
        greedy(m, 0, ids, 6, 6);
        int at = 6;
        bool sorted = true;
        for (int32_t letter = 0; letter < 3; letter++)
            for (int i = 0; i < count[letter]; i++)
                sorted &= ids[at++] == letter;
        wrong += !sorted;
    }
    assert_int_equal(wrong, 0);
    model_close(m);
}

static void test_learned_positions_end_with_the_context(void **state) {
    (void)state;
    struct model *m = open_model("tests/data/models/gpt-nano-sort", WEIGHT_FP32);
    int32_t ids[12] = {0};
    const float *logits;
    struct model_run run = {.slot = 0, .n_rows = 12, .tokens = ids, .n_logits = 1};
    assert_int_equal(model_step(m, &run, 1, &logits), ERR_ARG);
    assert_int_equal(model_slot_position(m, 0), 0); /* nothing done */
    run.n_rows = 11;
    assert_int_equal(model_step(m, &run, 1, &logits), OK);
    run.n_rows = 1;
    assert_int_equal(model_step(m, &run, 1, &logits), ERR_ARG);
    model_close(m);
}

int main(void) {
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stories260k_tells_its_story),
        cmocka_unit_test(test_babyllama_tells_its_story_letter_by_letter),
        cmocka_unit_test(test_rounded_weights_tell_the_same_stories),
        cmocka_unit_test(test_gpt_nano_sort_has_pytorchs_logits_and_probabilities),
        cmocka_unit_test(test_gpt_nano_sort_sorts_letters),
        cmocka_unit_test(test_learned_positions_end_with_the_context),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
