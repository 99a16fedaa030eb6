/* test_gpu_default_model.c - the default model on a card beside the CPU.  Too long for the emulated device: skipped there, and
 * where the model's base has not been fetched. */
#include "tests/unit/model_testing.h"

#include "model/options.h"

#include <float.h>

static struct team *team;

enum { PROMPT = 1500, GREEDY = 200, VOCAB = 49152, CHUNK = 256 };

static struct model *open_on(enum device device, int weights) {
    struct model_options o = options_for(SMOLLM, weights, team);
    o.base = smollm_base();
    o.device = device;
    o.n_slots = 2;
    o.max_rows = CHUNK;
    o.max_logits = CHUNK;
    return open_with(&o);
}

/* NULL: not here. */
static struct model *open_on_card(int weights) {
    if (!smollm_base()) return NULL;
    struct model *m = open_on(DEVICE_CUDA, weights);
    if (strcmp(model_info(m)->device, "emulated device") != 0) return m;
    model_close(m);
    return NULL;
}

static void read_text(const struct model *m, int32_t *ids) {
    enum { BYTES = 16384 };
    char *text = malloc(BYTES);
    FILE *f = fopen("tests/data/text/doyle-lost-world-head.txt", "r");
    assert_non_null(f);
    size_t len = fread(text, 1, BYTES, f), n;
    fclose(f);
    int32_t *all;
    assert_int_equal(tokenize(model_tokenizer(m), text, len, TOKENIZE_ADD_BOS_EOS, &all, &n), OK);
    assert_true(n >= PROMPT);
    memcpy(ids, all, PROMPT * sizeof *ids);
    free(all), free(text);
}

/* The two highest logits' distance; *token the highest's. */
static float lead(const float *logits, int32_t *token) {
    float best = -FLT_MAX, second = -FLT_MAX;
    for (int i = 0; i < VOCAB; i++)
        if (logits[i] > best)
            second = best, best = logits[i], *token = i;
        else if (logits[i] > second)
            second = logits[i];
    return best - second;
}

static const float *read_one(struct model *m, int32_t token) {
    const float *logits;
    struct model_run run = {.n_rows = 1, .tokens = &token, .n_logits = 1, .generated = true};
    assert_int_equal(model_step(m, &run, 1, &logits), OK);
    return logits;
}

/* fp32 on both sides leaves the order of sums, 1e-3 of logits at most (test_gpu_model.c): the same token wherever the lead
 * is larger than four times that.  Where it is not, the two go apart and the comparison is over. */
static void fp32_gives_the_cpus_greedy_tokens(void **state) {
    (void)state;
    struct model *gpu = open_on_card(WEIGHT_FP32);
    if (!gpu) skip();
    struct model *cpu = open_on(DEVICE_CPU, WEIGHT_FP32);
    int32_t *ids = malloc(PROMPT * sizeof *ids), a = 0, b = 0;
    read_text(cpu, ids);
    read_tokens(cpu, CHUNK, 0, ids, PROMPT - 1, NULL, NULL);
    read_tokens(gpu, CHUNK, 0, ids, PROMPT - 1, NULL, NULL);
    int32_t next = ids[PROMPT - 1];
    int n = 0;
    for (; n < GREEDY; n++) {
        float least = fminf(lead(read_one(cpu, next), &a), lead(read_one(gpu, next), &b));
        if (least < 4e-3f) break;
        assert_int_equal(a, b);
        next = a;
    }
    print_message("%d greedy tokens behind %d read are the CPU's\n", n, PROMPT);
    assert_true(n > 0);
    free(ids);
    model_close(cpu), model_close(gpu);
}

static double kl(const float *p, const float *q) {
    double zp = 0, zq = 0, sum = 0, tp = -DBL_MAX, tq = -DBL_MAX;
    for (int i = 0; i < VOCAB; i++)
        tp = fmax(tp, (double)p[i]), tq = fmax(tq, (double)q[i]);
    for (int i = 0; i < VOCAB; i++)
        zp += exp((double)p[i] - tp), zq += exp((double)q[i] - tq);
    for (int i = 0; i < VOCAB; i++) {
        double lp = (double)p[i] - tp - log(zp), lq = (double)q[i] - tq - log(zq);
        sum += exp(lp) * (lp - lq);
    }
    return sum;
}

/* Rows of a prompt, then the same rows generated one by one, against fp32. */
static void bf16_stays_within_0_003_nats_of_fp32(void **state) {
    (void)state;
    struct model *exact = open_on_card(WEIGHT_FP32);
    if (!exact) skip();
    struct model *bf16 = open_on(DEVICE_CUDA, WEIGHT_BF16);
    int32_t *ids = malloc(PROMPT * sizeof *ids);
    read_text(exact, ids);
    double prompt = 0, generated = 0;
    int n_prompt = PROMPT / 2, n_generated = 0;
    model_slot_clear(exact, 0), model_slot_clear(bf16, 0);
    for (int at = 0; at < n_prompt; at += CHUNK) {
        int n = n_prompt - at < CHUNK ? n_prompt - at : CHUNK;
        const float *p, *q;
        struct model_run run = {.n_rows = n, .tokens = ids + at, .n_logits = n};
        assert_int_equal(model_step(exact, &run, 1, &p), OK);
        assert_int_equal(model_step(bf16, &run, 1, &q), OK);
        for (int r = 0; r < n; r++)
            prompt += kl(p + (size_t)r * VOCAB, q + (size_t)r * VOCAB) / n_prompt;
    }
    for (int at = n_prompt; at < PROMPT; at++, n_generated++)
        generated += kl(read_one(exact, ids[at]), read_one(bf16, ids[at]));
    generated /= n_generated;
    print_message("bf16 against fp32: mean KL %.5f nats of a prompt, %.5f generated\n", prompt,
                  generated);
    assert_true(prompt <= 0.003 && generated <= 0.003);
    free(ids);
    model_close(exact), model_close(bf16);
}

/* What a request reads and generates is its own, to the bit, among others and alone, wherever its prompt is cut. */
static void bits_are_the_requests_own(void **state) {
    (void)state;
    struct model *m = open_on_card(WEIGHT_BF16);
    if (!m) skip();
    enum { SOME = 300, MORE = 70 };
    int32_t *ids = malloc(PROMPT * sizeof *ids);
    float *want = malloc((size_t)(1 + MORE) * VOCAB * sizeof *want);
    read_text(m, ids);
    for (int pass = 0; pass < 4; pass++) { /* whole; cut; cut elsewhere among others; again */
        static const int cuts[4][4] = {{0}, {1, 64, 191, 0}, {63, 257, 0}, {0}};
        const float *logits;
        int at = 0;
        model_slot_clear(m, 0), model_slot_clear(m, 1);
        for (int c = 0; at < SOME; c++) {
            int end = cuts[pass][c] ? cuts[pass][c] : SOME < at + CHUNK / 2 ? SOME : at + CHUNK / 2;
            if (!cuts[pass][c]) c--;
            struct model_run runs[] = {
                {.slot = 1, .n_rows = 5, .tokens = ids + at + 7},
                {.slot = 0, .n_rows = end - at, .tokens = ids + at, .n_logits = 1}};
            assert_int_equal(model_step(m, runs + (pass < 2), pass < 2 ? 1 : 2, &logits), OK);
            at = end;
        }
        if (!pass)
            memcpy(want, logits, VOCAB * sizeof *want);
        else
            assert_memory_equal(want, logits, VOCAB * sizeof *want);
        for (int i = 0; i < MORE; i++) {
            struct model_run runs[] = {
                {.n_rows = 1, .tokens = ids + SOME + i, .n_logits = 1, .generated = true},
                {.slot = 1, .n_rows = 1, .tokens = ids + i, .n_logits = 1, .generated = true}};
            assert_int_equal(model_step(m, runs, pass < 2 ? 1 : 2, &logits), OK);
            float *at_i = want + (size_t)(1 + i) * VOCAB;
            if (!pass)
                memcpy(at_i, logits, VOCAB * sizeof *want);
            else
                assert_memory_equal(at_i, logits, VOCAB * sizeof *want);
        }
    }
    free(want), free(ids);
    model_close(m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fp32_gives_the_cpus_greedy_tokens),
        cmocka_unit_test(bf16_stays_within_0_003_nats_of_fp32),
        cmocka_unit_test(bits_are_the_requests_own),
    };
    team = new_team(0);
    int failed = cmocka_run_group_tests_name("gpu_default_model", tests, NULL, NULL);
    team_free(team);
    return failed;
}
