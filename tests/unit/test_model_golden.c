/* test_model_golden.c - whole models against values computed by PyTorch in fp32 from the same files
 * (tests/data/golden). */
#include "model_testing.h"

struct golden {
    struct safetensors *st;
    int32_t *ids;
    int n;
    int64_t *at; /* positions of golden logits; NULL: all */
    int n_at;
};

static struct golden read_golden(const char *name) {
    struct golden g = {.st = open_golden(name)};
    g.ids = golden_tokens(g.st, "ids", &g.n);
    g.at = golden_ints(g.st, "logit_positions", &g.n_at);
    if (!g.at) g.n_at = g.n;
    return g;
}

static void free_golden(struct golden *g) {
    safetensors_close(g->st);
    free(g->ids);
    free(g->at);
}

/* Largest difference of logits [n][vocab] from a golden tensor at the golden positions. */
static double largest_difference(const struct golden *g, const char *name, const float *logits,
                                 int vocab) {
    const struct st_tensor *t = safetensors_get(g->st, name);
    assert_non_null(t);
    assert_true(t->dims[0] == g->n_at && t->dims[1] == vocab);
    float *want = malloc((size_t)t->n_values * sizeof *want);
    double largest = 0;
    assert_int_equal(st_decode(want, t, 0, t->n_values), OK);
    for (int i = 0; i < g->n_at; i++)
        for (int v = 0; v < vocab; v++) {
            double d =
                fabs((double)logits[(size_t)(g->at ? g->at[i] : i) * (size_t)vocab + (size_t)v] -
                     (double)want[(size_t)i * (size_t)vocab + (size_t)v]);
            if (!(d <= largest)) largest = d; /* NaN counts */
        }
    free(want);
    return largest;
}

/* fp32 with the golden's cache sets: what is left is the order of sums, far below 2e-3 on logits of
 * up to 40. */
static void check_logits(const char *golden_name, struct model_options o, const char *logits_name,
                         const char *cache_name) {
    struct golden g = read_golden(golden_name);
    int n_sets = 0, n_blocks = 0;
    o.max_logits = o.max_rows = 128;
    struct model *m = open_with(&o);
    int vocab = model_info(m)->vocab_size;
    float *logits = malloc((size_t)g.n * (size_t)vocab * sizeof *logits);
    int64_t *sets = cache_name ? golden_ints(g.st, cache_name, &n_sets) : NULL;
    if (cache_name) {
        const struct st_tensor *t = safetensors_get(g.st, cache_name);
        assert_non_null(t);
        n_blocks = (int)t->dims[2];
        assert_true(t->dims[0] == model_info(m)->n_layers &&
                    t->dims[3] == model_info(m)->attention.cache_size);
        attention_impose_cache(model_attention(m), sets, n_blocks);
    }
    read_tokens(m, 128, 1, g.ids, g.n, NULL, logits);
    double d = largest_difference(&g, logits_name, logits, vocab);
    print_message("%s %s: largest difference %.2e\n", golden_name, logits_name, d);
    assert_true(d <= 2e-3);
    model_close(m);
    free(logits);
    free(sets);
    free_golden(&g);
}

/* Feeds the golden's greedy tokens: where our top two logits differ by more than 0.05, the first is
 * the golden's next token. */
static void check_greedy(const char *golden_name, struct model_options o) {
    struct safetensors *st = open_golden(golden_name);
    int n, n_prompt = 1, checked = 0;
    int32_t *ids = golden_tokens(st, "greedy", &n);
    int64_t *prompt = golden_ints(st, "greedy_prompt_tokens", &n_prompt);
    int first = prompt ? (int)prompt[0] : 5;
    o.max_logits = o.max_rows = 128;
    struct model *m = open_with(&o);
    int vocab = model_info(m)->vocab_size;
    float *logits = malloc((size_t)n * (size_t)vocab * sizeof *logits);
    read_tokens(m, 128, 0, ids, n, NULL, logits);
    for (int row = first - 1; row + 1 < n; row++) {
        const float *l = logits + (size_t)row * (size_t)vocab;
        int best = 0;
        float second = -INFINITY;
        for (int v = 1; v < vocab; v++) {
            if (l[v] > l[best])
                second = l[best], best = v;
            else if (l[v] > second)
                second = l[v];
        }
        if (l[best] - second <= 0.05f) continue;
        checked++;
        if (best != ids[row + 1])
            fail_msg("%s: after token %d the argmax is %d, the golden's next is %d", golden_name,
                     row, best, ids[row + 1]);
    }
    assert_true(checked > (n - first) / 2);
    model_close(m);
    free(logits);
    free(ids);
    free(prompt);
    safetensors_close(st);
}

/* The whole converted folder without its urchin.json: the base, as a Hugging Face folder.  Removed
 * by the caller. */
static void link_base_folder(char *folder) {
    static const char *const files[] = {"config.json", "model.safetensors", "tokenizer.json",
                                        "tokenizer_config.json"};
    assert_non_null(mkdtemp(folder));
    for (int i = 0; i < 4; i++) {
        char from[PATH_MAX], to[PATH_MAX], whole[PATH_MAX];
        snprintf(from, sizeof from, STORIES "/%s", files[i]);
        snprintf(to, sizeof to, "%s/%s", folder, files[i]);
        assert_non_null(realpath(from, whole));
        assert_int_equal(symlink(whole, to), 0);
    }
}

static void unlink_base_folder(const char *folder) {
    static const char *const files[] = {"config.json", "model.safetensors", "tokenizer.json",
                                        "tokenizer_config.json"};
    for (int i = 0; i < 4; i++) {
        char to[PATH_MAX];
        snprintf(to, sizeof to, "%s/%s", folder, files[i]);
        unlink(to);
    }
    rmdir(folder);
}

static struct team *team;

static void test_stories_logits(void **state) {
    (void)state;
    check_logits("stories260k-hedgehog", options_for(STORIES, WEIGHT_FP32, team), "logits",
                 "cache");
}

static void test_stories_softmax_logits(void **state) {
    (void)state;
    char folder[] = "/tmp/urchin-base-XXXXXX";
    link_base_folder(folder);
    check_logits("stories260k-hedgehog", options_for(folder, WEIGHT_FP32, team), "softmax_logits",
                 NULL);
    unlink_base_folder(folder);
}

static void test_stories_greedy(void **state) {
    (void)state;
    check_greedy("stories260k-hedgehog", options_for(STORIES, WEIGHT_FP32, team));
}

static void test_smollm_logits(void **state) {
    (void)state;
    if (!smollm_base()) skip();
    check_logits("smollm2-135m-study", options_for(STUDY, WEIGHT_FP32, team), "logits",
                 "cache");
}

static void test_smollm_logits_clamped_and_forgetting(void **state) {
    (void)state;
    if (!smollm_base()) skip();
    struct model_options o = options_for(STUDY, WEIGHT_FP32, team);
    o.max_distance = 256;
    o.horizon = 128;
    check_logits("smollm2-135m-study", o, "clamped.logits", "clamped.cache");
}

static void test_smollm_softmax_logits(void **state) {
    (void)state;
    if (!smollm_base()) skip();
    struct model_options o = options_for(smollm_base(), WEIGHT_FP32, team);
    o.max_seq_len = 1024;
    check_logits("smollm2-135m-study", o, "softmax_logits", NULL);
}

static void test_smollm_greedy(void **state) {
    (void)state;
    if (!smollm_base()) skip();
    check_greedy("smollm2-135m-study", options_for(STUDY, WEIGHT_FP32, team));
}

/* Own choice of cache: near ties may fall otherwise, so only the mean loss is compared. */
static void test_smollm_loss_over_8192_tokens(void **state) {
    (void)state;
    if (!smollm_base()) skip();
    struct safetensors *st = open_golden("smollm2-135m-study");
    int n;
    int32_t *ids = golden_tokens(st, "long.ids", &n);
    float want[8];
    assert_int_equal(st_decode(want, safetensors_get(st, "long.nll"), 0, 8), OK);
    struct model_options o = options_for(STUDY, WEIGHT_FP32, team);
    enum { ROWS = 256 };
    o.max_logits = o.max_rows = ROWS;
    struct model *m = open_with(&o);
    int vocab = model_info(m)->vocab_size;
    double nll[8] = {0}, start = seconds();
    for (int at = 0; at < n; at += ROWS) {
        const float *logits;
        assert_int_equal(
            model_step(m, &(struct model_run){0, ROWS, ids + at, ROWS, false}, 1, &logits), OK);
        for (int r = 0; r < ROWS && at + r + 1 < n; r++) {
            const float *l = logits + (size_t)r * (size_t)vocab;
            double most = l[0], sum = 0;
            for (int v = 1; v < vocab; v++)
                most = l[v] > most ? l[v] : most;
            for (int v = 0; v < vocab; v++)
                sum += exp(l[v] - most);
            nll[(at + r) / 1024] += most + log(sum) - l[ids[at + r + 1]];
        }
    }
    print_message("%d tokens in %.1f s\n", n, seconds() - start);
    for (int i = 0; i < 8; i++) {
        double mean = nll[i] / (i < 7 ? 1024 : 1023);
        print_message("rows from %d: loss %.4f, golden %.4f\n", 1024 * i, mean, (double)want[i]);
        assert_true(fabs(mean - (double)want[i]) <= 0.01);
    }
    model_close(m);
    free(ids);
    safetensors_close(st);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stories_logits),
        cmocka_unit_test(test_stories_softmax_logits),
        cmocka_unit_test(test_stories_greedy),
        cmocka_unit_test(test_smollm_logits),
        cmocka_unit_test(test_smollm_logits_clamped_and_forgetting),
        cmocka_unit_test(test_smollm_softmax_logits),
        cmocka_unit_test(test_smollm_greedy),
        cmocka_unit_test(test_smollm_loss_over_8192_tokens),
    };
    if (team_new(&team, 0)) return 1;
    int failed = cmocka_run_group_tests_name("model_golden", tests, NULL, NULL);
    team_free(team);
    return failed;
}
