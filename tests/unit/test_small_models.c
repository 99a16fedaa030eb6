/* test_small_models.c - three small models trained by others: known texts and known activations.
 *
 * The texts are what llama2.c's run prints for these files at temperature 0; the activations of
 * gpt-nano-sort were recorded from PyTorch (tests/data/models/README.md). */
#include "compute/memory.h"
#include "compute/ops.h"
#include "model/model.h"
#include "model/safetensors.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
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

/* ---- the first block of gpt-nano-sort, each operation fed what PyTorch fed its own ---- */

enum {
    NANO_BATCH = 3,
    NANO_LEN = 11,
    NANO_ROWS = NANO_BATCH * NANO_LEN,
    NANO_DIM = 48,
    NANO_FFN = 192
};

static struct safetensors *open_tensors(const char *path) {
    struct safetensors *st;
    char msg[256] = "";
    if (safetensors_open(&st, path, msg, sizeof msg)) fail_msg("%s", msg);
    return st;
}

static float *read_tensor(const struct safetensors *st, const char *name) {
    const struct st_tensor *t = safetensors_get(st, name);
    if (!t) fail_msg("no tensor %s", name);
    float *x = malloc((size_t)t->n_values * sizeof *x);
    assert_non_null(x);
    assert_int_equal(st_decode(x, t, 0, t->n_values), OK);
    return x;
}

static void assert_recorded(const float *x, const struct safetensors *golden, const char *name) {
    float *y = read_tensor(golden, name);
    int64_t n = safetensors_get(golden, name)->n_values;
    for (int64_t i = 0; i < n; i++)
        if (!(fabsf(x[i] - y[i]) <= 1e-5f))
            fail_msg("%s[%lld]: %g, recorded %g", name, (long long)i, x[i], y[i]);
    free(y);
}

/* y = x W + b, W [n_in][n_out] as GPT-2 stores it, must be the recorded tensor. */
static void assert_projection(const struct safetensors *weights, const char *name,
                              const struct safetensors *golden, const char *from, const char *to,
                              int n_in, int n_out) {
    char path[64];
    snprintf(path, sizeof path, "transformer.h.0.%s.weight", name);
    float *stored = read_tensor(weights, path), *rows = malloc(sizeof(float) * n_in * n_out);
    snprintf(path, sizeof path, "transformer.h.0.%s.bias", name);
    float *bias = read_tensor(weights, path), *x = read_tensor(golden, from),
          *y = malloc(sizeof(float) * NANO_ROWS * n_out);
    struct matrix *w;
    struct matmul_scratch *scratch;
    assert_non_null(rows);
    assert_non_null(y);
    for (int o = 0; o < n_out; o++)
        for (int i = 0; i < n_in; i++)
            rows[o * n_in + i] = stored[i * n_out + o];
    assert_int_equal(matrix_new(&w, WEIGHT_FP32, n_out, n_in), OK);
    assert_int_equal(matmul_scratch_new(&scratch, NANO_ROWS, n_in), OK);
    matrix_set_rows(w, 0, n_out, rows);
    matmul(team, scratch, y, n_out, x, n_in, NANO_ROWS, w, bias);
    assert_recorded(y, golden, to);
    matmul_scratch_free(scratch);
    matrix_free(w);
    free(stored);
    free(rows);
    free(bias);
    free(x);
    free(y);
}

static void assert_norm(const struct safetensors *weights, const char *name,
                        const struct safetensors *golden, const char *from, const char *to) {
    char path[64];
    float y[NANO_ROWS * NANO_DIM];
    snprintf(path, sizeof path, "transformer.h.0.%s.weight", name);
    float *weight = read_tensor(weights, path), *x = read_tensor(golden, from);
    snprintf(path, sizeof path, "transformer.h.0.%s.bias", name);
    float *bias = read_tensor(weights, path);
    for (int row = 0; row < NANO_ROWS; row++)
        layer_norm(y + row * NANO_DIM, x + row * NANO_DIM, weight, bias, NANO_DIM, 1e-5f);
    assert_recorded(y, golden, to);
    free(weight);
    free(bias);
    free(x);
}

static void assert_attention(const struct safetensors *golden) {
    struct attention_config config = {.kind = ATTENTION_SOFTMAX,
                                      .n_heads = 3,
                                      .n_kv_heads = 3,
                                      .head_dim = 16,
                                      .kv_type = KV_FP32,
                                      .max_seq_len = NANO_LEN};
    struct attention_weights none = {0};
    struct attention_run runs[NANO_BATCH];
    struct attention *a;
    float *qkv = read_tensor(golden, "qkv"), y[NANO_ROWS * NANO_DIM];
    assert_int_equal(attention_new(&a, &config, &none, 1, NULL, team, NANO_ROWS, NANO_BATCH), OK);
    size_t bytes = attention_slot_bytes(a);
    char *slots = memory_map(NANO_BATCH * bytes);
    assert_non_null(slots);
    for (int b = 0; b < NANO_BATCH; b++) {
        runs[b] = (struct attention_run){slots + b * bytes, b * NANO_LEN, NANO_LEN};
        attention_slot_clear(a, runs[b].slot);
    }
    attention_step_begin(a, runs, NANO_BATCH);
    attention_layer(a, 0, y, NANO_DIM, qkv, 3 * NANO_DIM, qkv + NANO_DIM, 3 * NANO_DIM,
                    qkv + 2 * NANO_DIM, 3 * NANO_DIM);
    attention_step_end(a);
    assert_recorded(y, golden, "y");
    memory_unmap(slots, NANO_BATCH * bytes);
    attention_free(a);
    free(qkv);
}

/* Within 1e-5: values up to 10, sums of at most 192 terms, both sides rounding: sqrt(192) * 2^-24 *
 * 10 = 8e-6. */
static void test_gpt_nano_sort_has_pytorchs_first_block_operation_by_operation(void **state) {
    (void)state;
    struct safetensors *golden = open_tensors("tests/data/models/gpt-nano-sort/golden.safetensors"),
                       *weights = open_tensors("tests/data/models/gpt-nano-sort/model.safetensors");
    assert_norm(weights, "ln_1", golden, "x", "ln1");
    assert_projection(weights, "attn.c_attn", golden, "ln1", "qkv", NANO_DIM, 3 * NANO_DIM);
    assert_attention(golden);
    assert_projection(weights, "attn.c_proj", golden, "y", "yProj", NANO_DIM, NANO_DIM);
    assert_norm(weights, "ln_2", golden, "attnResid", "ln2");
    assert_projection(weights, "mlp.c_fc", golden, "ln2", "fc", NANO_DIM, NANO_FFN);
    float *fc = read_tensor(golden, "fc");
    for (int row = 0; row < NANO_ROWS; row++)
        gelu_tanh(fc + row * NANO_FFN, fc + row * NANO_FFN, NANO_FFN);
    assert_recorded(fc, golden, "gelu");
    free(fc);
    assert_projection(weights, "mlp.c_proj", golden, "gelu", "mlp", NANO_FFN, NANO_DIM);
    safetensors_close(weights);
    safetensors_close(golden);
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
        cmocka_unit_test(test_gpt_nano_sort_has_pytorchs_first_block_operation_by_operation),
        cmocka_unit_test(test_gpt_nano_sort_sorts_letters),
        cmocka_unit_test(test_learned_positions_end_with_the_context),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
