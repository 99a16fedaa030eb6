/* test_gpu_model.c - whole models on the device against the same models on the CPU.
 *
 * Exact weights (fp32) leave only the order of fp32 sums between the two: a few ulp of each sum
 * through a handful of layers, 1e-5 of logits about 10 in size; 1e-3 is allowed, which a wrong key,
 * mask or position exceeds a thousandfold. Rounded weights (bf16, int8, int4) differ by the
 * rounding of activations, and are held to a mean KL of 0.003 nats. */
#include "tests/unit/model_testing.h"
#include "tests/unit/tiny_model.h"

#include "attention/gpu_attention.h"
#include "model/options.h"
#include "tests/unit/tiny_model.h"

#include <float.h>

static struct team *team;

enum { N = 150, VOCAB = 512 };

static struct model *open_on(enum device device, const char *path, int weights, int n_slots) {
    struct model_options o = options_for(path, weights, team);
    o.device = device;
    o.n_slots = n_slots;
    o.max_rows = 96;
    o.max_logits = 96;
    return open_with(&o);
}

/* The first N tokens of a story. */
static void read_text(const struct model *m, int32_t *ids) {
    static char text[4096];
    FILE *f = fopen("tests/data/text/tinystories-valid-head.txt", "r");
    assert_non_null(f);
    size_t len = fread(text, 1, sizeof text, f), n;
    fclose(f);
    int32_t *all;
    assert_int_equal(tokenize(model_tokenizer(m), text, len, TOKENIZE_ADD_BOS_EOS, &all, &n), OK);
    assert_true(n >= N);
    memcpy(ids, all, N * sizeof *ids);
    free(all);
}

/* Prompt [0, n_prompt) cut at cuts, then the rest one by one as generated rows; logits of every row
 * into out [N][vocab]. */
static void read_both(struct model *m, int slot, const int32_t *ids, int n_prompt, const int *cuts,
                      int n, float *out) {
    size_t vocab = (size_t)model_info(m)->vocab_size;
    read_tokens(m, 96, slot, ids, n_prompt, cuts, out);
    for (int at = n_prompt; at < n; at++) {
        const float *logits;
        struct model_run run = {
            .slot = slot, .n_rows = 1, .tokens = ids + at, .n_logits = 1, .generated = true};
        assert_int_equal(model_step(m, &run, 1, &logits), OK);
        memcpy(out + (size_t)at * vocab, logits, vocab * sizeof *out);
    }
}

static float farthest(const float *a, const float *b, size_t n) {
    float most = 0;
    for (size_t i = 0; i < n; i++) {
        float off = fabsf(a[i] - b[i]);
        if (!(off <= most)) most = off; /* NaN stays */
        if (isnan(off)) return NAN;
    }
    return most;
}

static double mean_kl(const float *p, const float *q, int n_rows, int vocab) {
    double sum = 0;
    for (int r = 0; r < n_rows; r++, p += vocab, q += vocab) {
        double zp = 0, zq = 0, kl = 0, tp = -DBL_MAX, tq = -DBL_MAX;
        for (int i = 0; i < vocab; i++)
            tp = fmax(tp, (double)p[i]), tq = fmax(tq, (double)q[i]);
        for (int i = 0; i < vocab; i++)
            zp += exp((double)p[i] - tp), zq += exp((double)q[i] - tq);
        for (int i = 0; i < vocab; i++) {
            double lp = (double)p[i] - tp - log(zp), lq = (double)q[i] - tq - log(zq);
            kl += exp(lp) * (lp - lq);
        }
        sum += kl;
    }
    return sum / n_rows;
}

/* ---- the same numbers as the CPU ---- */

static void check_exact(const char *path, int n_prompt, int n) {
    struct model *cpu = open_on(DEVICE_CPU, path, WEIGHT_FP32, 2),
                 *gpu = open_on(DEVICE_CUDA, path, WEIGHT_FP32, 2);
    size_t vocab = (size_t)model_info(cpu)->vocab_size;
    int32_t ids[N];
    read_text(cpu, ids);
    float *want = malloc((size_t)n * vocab * sizeof *want),
          *got = malloc((size_t)n * vocab * sizeof *got);
    const int cuts[] = {7, 64, 0};
    read_both(cpu, 0, ids, n_prompt, NULL, n, want);
    read_both(gpu, 1, ids, n_prompt, cuts, n, got);
    float off = farthest(want, got, (size_t)n * vocab);
    print_message("%s: logits within %.1e\n", path, (double)off);
    assert_true(off <= 1e-3f);
    free(want), free(got);
    model_close(cpu), model_close(gpu);
}

static void exact_weights_give_the_cpus_logits(void **state) {
    (void)state;
    check_exact(STORIES, 100, N);
}

static void softmax_models_run_too(void **state) {
    (void)state;
    check_exact("tests/data/models/stories260k", 40, 60);
}

static void gpt2_runs_too(void **state) {
    (void)state;
    struct model *cpu = open_on(DEVICE_CPU, "tests/data/models/gpt-nano-sort", WEIGHT_FP32, 2),
                 *gpu = open_on(DEVICE_CUDA, "tests/data/models/gpt-nano-sort", WEIGHT_FP32, 2);
    int vocab = model_info(cpu)->vocab_size;
    int32_t ids[] = {2, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1};
    enum { LONG = sizeof ids / sizeof *ids };
    float want[LONG * 16], got[LONG * 16];
    assert_true(vocab <= 16);
    read_both(cpu, 0, ids, 6, NULL, LONG, want);
    read_both(gpu, 0, ids, 6, NULL, LONG, got);
    assert_true(farthest(want, got, (size_t)(LONG * vocab)) <= 1e-4f);
    model_close(cpu), model_close(gpu);
}

static void rounded_weights_stay_close(void **state) {
    (void)state;
    const int types[] = {WEIGHT_BF16, WEIGHT_INT8, WEIGHT_INT4};
    for (int t = 0; t < 3; t++) {
        struct model *cpu = open_on(DEVICE_CPU, STORIES, types[t], 1),
                     *gpu = open_on(DEVICE_CUDA, STORIES, types[t], 1);
        int32_t ids[N];
        read_text(cpu, ids);
        float *want = malloc(N * VOCAB * sizeof *want), *got = malloc(N * VOCAB * sizeof *got);
        read_both(cpu, 0, ids, 80, NULL, N, want);
        read_both(gpu, 0, ids, 80, NULL, N, got);
        double kl = mean_kl(want, got, N, VOCAB);
        print_message("%s: mean KL %.5f nats\n", weight_type_name((enum weight_type)types[t]), kl);
        assert_true(kl <= 0.003);
        free(want), free(got);
        model_close(cpu), model_close(gpu);
    }
}

/* Mean KL of fp32 against these weights on the device: of 80 rows of a prompt, and of the rows
 * generated behind it. */
static void kl_of(const char *path, int weights, double kl[2]) {
    struct model *exact = open_on(DEVICE_CPU, path, WEIGHT_FP32, 1),
                 *rounded = open_on(DEVICE_CUDA, path, weights, 1);
    int32_t ids[N];
    read_text(exact, ids);
    float *want = malloc(N * VOCAB * sizeof *want), *got = malloc(N * VOCAB * sizeof *got);
    read_both(exact, 0, ids, 80, NULL, N, want);
    read_both(rounded, 0, ids, 80, NULL, N, got);
    kl[0] = mean_kl(want, got, 80, VOCAB);
    kl[1] = mean_kl(want + 80 * VOCAB, got + 80 * VOCAB, N - 80, VOCAB);
    print_message("%s, %s: mean KL %.5f nats, generated %.5f\n", path,
                  weight_type_name((enum weight_type)weights), kl[0], kl[1]);
    free(want), free(got);
    model_close(exact), model_close(rounded);
}

/* E4M3's error has an rms of 2^-3 / sqrt(12) of a binade's lower end, 0.0255 of a value on average;
 * int8's is the largest of 32 over 127 sqrt(12), 0.0055 of their deviation.  KL goes with the
 * square: 22 times int8's, and as much again as a prompt's rows are rounded too. */
static void check_fp8(const char *path) {
    double int8[2], fp8[2];
    kl_of(path, WEIGHT_INT8, int8);
    kl_of(path, WEIGHT_FP8, fp8);
    for (int i = 0; i < 2; i++)
        assert_true(fp8[i] > int8[i] && fp8[i] <= 44 * int8[i]);
}

/* The tiny model's matrices are all fp8, the other's only qkv and o: 172 is no multiple of 16. */
static void fp8_stays_near_fp32(void **state) {
    (void)state;
    char tiny[] = "/tmp/urchin-tiny-XXXXXX";
    assert_non_null(mkdtemp(tiny));
    tiny_write(tiny);
    check_fp8(STORIES);
    check_fp8(tiny);
    tiny_remove(tiny);
}

static void fp8_needs_a_card_that_multiplies_it(void **state) {
    (void)state;
    struct model_options o = options_for(STORIES, WEIGHT_FP8, team);
    struct model *m = NULL;
    char msg[500] = "";
    o.device = DEVICE_CUDA;
    setenv("URCHIN_EMULATED_CAPABILITY", "86", 1);
    enum err e = model_open(&m, &o, msg, sizeof msg);
    unsetenv("URCHIN_EMULATED_CAPABILITY");
    if (!e) { /* a real card */
        model_close(m);
        skip();
    }
    assert_int_equal(e, ERR_ARG);
    assert_non_null(
        strstr(msg, " does not multiply fp8 weights: that needs compute capability 8.9 "));
}

/* ---- the same bits, whatever else ---- */

/* Other sequences beside it, other cuts, another slot: rows of the sequence keep their bits. */
static void check_bits(int weights) {
    struct model *m = open_on(DEVICE_CUDA, STORIES, weights, 4);
    enum { PROMPT = 70, MORE = 12 };
    int32_t ids[N];
    read_text(m, ids);
    float *want = malloc((size_t)(PROMPT + MORE) * VOCAB * sizeof *want);
    read_both(m, 0, ids, PROMPT, NULL, PROMPT + MORE, want);

    model_slot_clear(m, 1), model_slot_clear(m, 2), model_slot_clear(m, 3);
    const float *logits;
    for (int at = 0, step = 1; at < PROMPT; at += step) {
        step = at % 3 + 8 < PROMPT - at ? at % 3 + 8 : PROMPT - at;
        struct model_run runs[] = {
            {.slot = 1, .n_rows = 5, .tokens = ids + 20, .n_logits = 1},
            {.slot = 3, .n_rows = step, .tokens = ids + at, .n_logits = step}};
        assert_int_equal(model_step(m, runs, 2, &logits), OK);
        assert_memory_equal(logits + VOCAB, want + (size_t)at * VOCAB,
                            (size_t)step * VOCAB * sizeof *want);
    }
    for (int i = 0; i < MORE;
         i++) { /* among one, two, three generated rows and now and then a prompt */
        struct model_run runs[] = {
            {.slot = 3, .n_rows = 1, .tokens = ids + PROMPT + i, .n_logits = 1, .generated = true},
            {.slot = 1, .n_rows = 1, .tokens = ids + i, .n_logits = 1, .generated = true},
            {.slot = 2,
             .n_rows = 1 + i % 2,
             .tokens = ids + i,
             .n_logits = 1,
             .generated = i % 2 == 0}};
        if (i % 4 == 3)
            runs[0] = runs[1], runs[1] = (struct model_run){3, 1, ids + PROMPT + i, 1, true};
        assert_int_equal(model_step(m, runs, 1 + i % 3 + (i % 4 == 3 && i % 3 == 0), &logits), OK);
        assert_memory_equal(logits + (i % 4 == 3 ? VOCAB : 0), want + (size_t)(PROMPT + i) * VOCAB,
                            VOCAB * sizeof *want);
    }
    free(want);
    model_close(m);
}

static void bits_do_not_depend_on_the_batch(void **state) {
    (void)state;
    check_bits(WEIGHT_BF16);
    check_bits(WEIGHT_FP8);
}

/* ---- slots ---- */

static void check_moves(const char *path) {
    struct model *cpu = open_on(DEVICE_CPU, path, WEIGHT_FP32, 2),
                 *gpu = open_on(DEVICE_CUDA, path, WEIGHT_FP32, 2);
    int32_t ids[N];
    read_text(cpu, ids);
    float *want = malloc(N * VOCAB * sizeof *want), *got = malloc(N * VOCAB * sizeof *got);
    read_tokens(cpu, 96, 0, ids, N, NULL, want);
    size_t bytes = model_slot_state_bytes(cpu, 0);
    void *saved = malloc(bytes);
    char msg[200] = "";
    struct model *pair[] = {cpu, gpu};
    for (int from = 0; from < 2; from++) { /* half of it here, half of it there */
        const float *logits;
        read_tokens(pair[from], 96, 0, ids, 75, NULL, NULL);
        assert_int_equal(model_slot_state_bytes(pair[from], 0), bytes);
        assert_int_equal(model_slot_save(pair[from], 0, saved), OK);
        assert_int_equal(model_slot_load(pair[!from], 1, saved, bytes, msg, sizeof msg), OK);
        struct model_run run = {
            .slot = 1, .n_rows = N - 75, .tokens = ids + 75, .n_logits = N - 75};
        assert_int_equal(model_step(pair[!from], &run, 1, &logits), OK);
        assert_true(farthest(want + 75 * VOCAB, logits, (size_t)(N - 75) * VOCAB) <= 1e-3f);
    }
    memset(saved, 0, 8);
    assert_int_equal(model_slot_load(gpu, 0, saved, bytes, msg, sizeof msg), ERR_FORMAT);
    assert_string_equal(msg, "these bytes are not a saved sequence state");
    assert_true(model_slot_position(gpu, 0) == 0);
    free(saved), free(want), free(got);
    model_close(cpu), model_close(gpu);
}
static void sequences_move_between_devices(void **state) {
    (void)state;
    check_moves(STORIES);
}

/* More places than the others have in one kv head of a layer, two of another, none of the rest. */
static void retrieval_heads_have_their_places_on_either_device(void **state) {
    (void)state;
    static const char *const files[] = {"config.json", "model.safetensors", "hedgehog.safetensors",
                                        "tokenizer.json", "tokenizer_config.json"};
    static const char score[] = "\"self_recall\"";
    char folder[] = "/tmp/urchin-retrieval-XXXXXX", path[PATH_MAX], from[PATH_MAX], whole[PATH_MAX];
    char text[2048], with[2400];
    assert_non_null(mkdtemp(folder));
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        tiny_path(from, STORIES, files[i]), tiny_path(path, folder, files[i]);
        assert_non_null(realpath(from, whole));
        assert_int_equal(symlink(whole, path), 0);
    }
    FILE *f = fopen(STORIES "/urchin.json", "r");
    assert_non_null(f);
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    const char *rest = strstr(text, score);
    assert_non_null(rest);
    rest += strlen(score);
    snprintf(with, sizeof with,
             "%.*s,\"age\":64,\"retrieval\":{\"size\":41,\"recent\":8,"
             "\"heads\":[[0,1],[2,0],[2,3]]}%s",
             (int)(rest - text), text, rest);
    tiny_path(path, folder, "urchin.json"), write_text(path, with);
    check_exact(folder, 100, N);
    check_moves(folder);
    tiny_remove(folder);
}

static void a_copy_goes_its_own_way(void **state) {
    (void)state;
    struct model *m = open_on(DEVICE_CUDA, STORIES, WEIGHT_BF16, 3);
    int32_t ids[N];
    read_text(m, ids);
    float kept[VOCAB];
    const float *logits;
    read_tokens(m, 96, 0, ids, 70, NULL, NULL);
    model_slot_copy(m, 2, 0);
    struct model_run run = {
        .slot = 0, .n_rows = 1, .tokens = ids + 70, .n_logits = 1, .generated = true};
    assert_int_equal(model_step(m, &run, 1, &logits), OK);
    memcpy(kept, logits, sizeof kept);
    run.slot = 2;
    assert_int_equal(model_step(m, &run, 1, &logits), OK);
    assert_memory_equal(kept, logits, sizeof kept);
    assert_true(model_slot_position(m, 2) == 71);
    model_close(m);
}

/* ---- draws ---- */

static void greedy_draws_are_the_highest_logits(void **state) {
    (void)state;
    struct model *m = open_on(DEVICE_CUDA, STORIES, WEIGHT_BF16, 3);
    int32_t ids[N];
    read_text(m, ids);
    const float *logits;
    const struct gpu_drawn *drawn;
    assert_true(model_draws(m));
    for (int step = 0; step < 3; step++) { /* eager, recorded, replayed */
        struct model_run runs[] = {
            {.slot = 0, .n_rows = 1, .tokens = ids + step, .n_logits = 1, .generated = step > 0},
            {.slot = 1, .n_rows = 9, .tokens = ids + 9 * step, .n_logits = 2}};
        struct gpu_draw draws[3] = {{.row = 2}, {.row = 0}, {.row = 1}};
        for (int i = 0; i < 3; i++)
            draws[i].counts_row = draws[i].n_top = -1,
            draws[i].top_p = draws[i].repetition_penalty = 1;
        struct model_draws all = {.draws = draws, .n = 3};
        assert_int_equal(model_step_draw(m, runs, 2, &all, &drawn, &logits), OK);
        for (int i = 0; i < 3; i++) {
            const float *row = logits + (size_t)draws[i].row * VOCAB;
            for (int t = 0; t < VOCAB; t++)
                assert_true(row[drawn[i].token] > row[t] ||
                            (row[drawn[i].token] == row[t] && drawn[i].token <= t));
        }
    }
    struct gpu_draw wrong = {.row = 3, .counts_row = -1};
    struct model_run run = {.slot = 0, .n_rows = 1, .tokens = ids, .n_logits = 1};
    assert_int_equal(
        model_step_draw(m, &run, 1, &(struct model_draws){.draws = &wrong, .n = 1}, &drawn, NULL),
        ERR_ARG);
    model_close(m);
}

/* ---- what does not fit ---- */

static void layers_that_kept_softmax_run_on_the_cpu_or_not_at_all(void **state) {
    (void)state;
    char folder[] = "/tmp/urchin-mixed-XXXXXX", path[PATH_MAX], text[1200], msg[500] = "";
    assert_non_null(mkdtemp(folder));
    tiny_write(folder);
    tiny_path(path, folder, "urchin.json");
    snprintf(text, sizeof text,
             "{\"format\":1,\"name\":\"tiny\",\"base\":null,\"low_rank\":null,\"attention\":%.*s,"
             "\"softmax_layers\":[1]}}",
             (int)strlen(TINY_ATTENTION) - 1, TINY_ATTENTION);
    write_text(path, text);
    struct st_writer w = {0};
    uint32_t seed = 2;
    tiny_put(&w, "layers.", 0, "attn.feature_map_q", 3, (int[]){TINY_HEADS, TINY_HEAD_DIM, 8}, 0.4f,
             &seed);
    tiny_put(&w, "layers.", 0, "attn.feature_map_k", 3, (int[]){TINY_KV_HEADS, TINY_HEAD_DIM, 8},
             0.4f, &seed);
    tiny_put(&w, "layers.", 0, "attn.log_mix", 1, (int[]){TINY_HEADS}, 0.5f, &seed);
    struct bytes b = st_finish(&w);
    tiny_path(path, folder, "hedgehog.safetensors"), write_bytes(path, b.at, b.len), free(b.at);

    struct model_options o = options_for(folder, WEIGHT_FP32, team);
    struct model *m = NULL;
    o.n_slots = 1;
    o.device = DEVICE_CUDA;
    assert_int_equal(model_open(&m, &o, msg, sizeof msg), ERR_ARG);
    assert_non_null(strstr(msg, "--device cpu"));
    o.device = DEVICE_AUTO;
    assert_int_equal(model_open(&m, &o, msg, sizeof msg), OK);
    assert_string_equal(model_info(m)->device, "cpu");
    assert_false(model_draws(m));
    const float *logits;
    struct model_run run = {.n_rows = 3, .tokens = (int32_t[]){1, 2, 3}, .n_logits = 1};
    assert_int_equal(model_step(m, &run, 1, &logits), OK);
    model_close(m);
    tiny_remove(folder);
}

static void too_little_memory_is_a_sentence(void **state) {
    (void)state;
    struct model_options o = options_for(STORIES, WEIGHT_BF16, team);
    struct model *m = NULL;
    char msg[500] = "";
    o.device = DEVICE_CUDA;
    o.n_slots = 60000; /* 6 GB: more than the emulated device has */
    assert_int_equal(model_open(&m, &o, msg, sizeof msg), ERR_NOMEM);
    assert_non_null(strstr(msg, "60000 sequences of"));
    assert_non_null(strstr(msg, " would"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exact_weights_give_the_cpus_logits),
        cmocka_unit_test(softmax_models_run_too),
        cmocka_unit_test(gpt2_runs_too),
        cmocka_unit_test(rounded_weights_stay_close),
        cmocka_unit_test(fp8_stays_near_fp32),
        cmocka_unit_test(fp8_needs_a_card_that_multiplies_it),
        cmocka_unit_test(bits_do_not_depend_on_the_batch),
        cmocka_unit_test(sequences_move_between_devices),
        cmocka_unit_test(retrieval_heads_have_their_places_on_either_device),
        cmocka_unit_test(a_copy_goes_its_own_way),
        cmocka_unit_test(greedy_draws_are_the_highest_logits),
        cmocka_unit_test(layers_that_kept_softmax_run_on_the_cpu_or_not_at_all),
        cmocka_unit_test(too_little_memory_is_a_sentence),
    };
    team = new_team(1);
    int failed = cmocka_run_group_tests_name("gpu_model", tests, NULL, NULL);
    team_free(team);
    return failed;
}
