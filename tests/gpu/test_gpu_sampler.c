/* test_gpu_sampler.c - draws on a device against their definition in double precision. */
#include "compute/gpu_sampler.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/gpu/orders.h"

static struct gpu *gpu;

static uint64_t rng_state = 1;
static double uniform01(void) {
    rng_state = rng_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(rng_state >> 11) * 0x1p-53;
}
/* Roughly normal; many of the same value when steps > 0, as rounded logits have. */
static float some_logit(int steps) {
    double x = -6;
    for (int i = 0; i < 12; i++)
        x += uniform01();
    return steps ? (float)(round(x * steps) / steps * 3) : (float)(3 * x);
}

static void *allocate(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    assert_non_null(p);
    return p;
}
static float *to_device(const float *from, size_t n) {
    void *at;
    assert_int_equal(gpu_alloc(gpu, &at, n * sizeof *from), OK);
    gpu_upload(gpu, at, from, n * sizeof *from);
    assert_int_equal(gpu_wait(gpu), OK);
    return at;
}

static struct gpu_draw plain(int row) {
    return (struct gpu_draw){.row = row,
                             .counts_row = -1,
                             .n_top = -1,
                             .temperature = 1,
                             .top_p = 1,
                             .repetition_penalty = 1,
                             .uniform = uniform01()};
}

/* ---- the definition ---- */

static const float *ranked; /* qsort has no argument for it */
static int by_rank(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    if (ranked[x] != ranked[y]) return ranked[x] > ranked[y] ? -1 : 1;
    return x < y ? -1 : x > y;
}

/* The token that draw d takes of adjusted logits x [n], or -1: the choice hangs on less than 1e-6 of the mass, which is
 * more than expf and units of 2^-42 can move it (n 2^-42 + 2^-22 of every weight). */
static int32_t defined_draw(const float *x, int n, const struct gpu_draw *d) {
    int32_t *order = allocate((size_t)n * sizeof *order), token = -1;
    double *w = allocate((size_t)n * sizeof *w), total = 0, sum = 0;
    bool *kept = calloc((size_t)n, sizeof *kept), unclear = false;
    for (int i = 0; i < n; i++)
        order[i] = i;
    ranked = x;
    qsort(order, (size_t)n, sizeof *order, by_rank);
    token = order[0];
    if (d->temperature == 0) goto done;
    int k = d->top_k > 0 && d->top_k < n ? d->top_k : n;
    for (int i = 0; i < k; i++) {
        w[order[i]] = exp(((double)x[order[i]] - (double)x[order[0]]) / (double)d->temperature);
        total += w[order[i]];
    }
    for (int i = 0; i < k; i++) { /* as long as what was kept before is less than top_p */
        double before = sum - (double)d->top_p * total;
        if (d->top_p < 1 && i && fabs(before) < 1e-6 * total) unclear = true;
        if (d->top_p < 1 && i && before >= 0) break;
        kept[order[i]] = true;
        sum += w[order[i]];
    }
    total = 0;
    for (int i = 0; i < n; i++) {
        if (kept[i] && d->min_p > 0 && fabs(w[i] - (double)d->min_p) < 1e-6) unclear = true;
        kept[i] = kept[i] && !(w[i] < (double)d->min_p);
        total += kept[i] ? w[i] : 0;
    }
    sum = 0;
    token = -1;
    for (int i = 0; i < n; i++) {
        if (!kept[i]) continue;
        sum += w[i];
        double over = sum - d->uniform * total;
        if (fabs(over) < 1e-6 * total) unclear = true;
        if (over > 0 && token < 0) token = i;
    }
done:
    free(order), free(w), free(kept);
    return unclear ? -1 : token;
}

/* ---- filters ---- */

static void check_filters(int n_vocab, int steps, int n_draws) {
    enum { ROWS = 3 };
    struct gpu_sampler *s;
    float *x = allocate((size_t)(ROWS * n_vocab) * sizeof *x);
    int clear = 0;
    for (int i = 0; i < ROWS * n_vocab; i++)
        x[i] = some_logit(steps);
    float *at = to_device(x, (size_t)(ROWS * n_vocab));
    assert_int_equal(gpu_sampler_new(&s, gpu, n_vocab, n_draws, 1), OK);
    struct gpu_draw *draws = allocate((size_t)n_draws * sizeof *draws);
    for (int i = 0; i < n_draws; i++) {
        struct gpu_draw *d = &draws[i];
        *d = plain(i % ROWS);
        d->temperature = i % 5 == 0 ? 0 : (float)(0.3 + 1.5 * uniform01());
        if (i % 2) d->top_k = 1 + (int)(uniform01() * (double)(n_vocab < 60 ? n_vocab : 60));
        if (i % 3) d->top_p = (float)(0.05 + 0.95 * uniform01());
        if (i % 7 == 3) d->min_p = (float)(0.3 * uniform01());
    }
    const struct gpu_drawn *drawn;
    gpu_sample(s, at, draws, n_draws, NULL, 0, &drawn);
    assert_int_equal(gpu_wait(gpu), OK);
    for (int i = 0; i < n_draws; i++) {
        int32_t want = defined_draw(x + draws[i].row * n_vocab, n_vocab, &draws[i]);
        assert_in_range(drawn[i].token, 0, n_vocab - 1);
        if (want < 0) continue;
        clear++;
        assert_int_equal(drawn[i].token, want);
    }
    assert_true(clear > n_draws * 3 / 4); /* the exception stays one */
    gpu_sampler_free(s);
    gpu_release(gpu, at);
    free(x), free(draws);
}

static void draws_are_those_of_the_definition(void **state) {
    (void)state;
    static const int vocabularies[] = {1, 2, 33, 512, 5000};
    for (size_t i = 0; i < sizeof vocabularies / sizeof *vocabularies; i++) {
        check_filters(vocabularies[i], 0, 40);
        check_filters(vocabularies[i], 2, 40); /* ties everywhere */
    }
}

/* A draw of 1,000 is each token as often as its weight says: chi-squared of 7 degrees of freedom passes 30 once in
 * 10,000 times, and the draws here are always the same. */
static void draws_follow_the_weights(void **state) {
    (void)state;
    enum { N = 8, DRAWS = 1000 };
    static const float p[N] = {0.30f, 0.02f, 0.18f, 0.05f, 0.25f, 0.10f, 0.03f, 0.07f};
    float x[N];
    int times[N] = {0};
    for (int i = 0; i < N; i++)
        x[i] = logf(p[i]);
    float *at = to_device(x, N);
    struct gpu_sampler *s;
    const struct gpu_drawn *drawn;
    static struct gpu_draw draws[DRAWS];
    assert_int_equal(gpu_sampler_new(&s, gpu, N, DRAWS, 1), OK);
    for (int i = 0; i < DRAWS; i++)
        draws[i] = plain(0);
    gpu_sample(s, at, draws, DRAWS, NULL, 0, &drawn);
    assert_int_equal(gpu_wait(gpu), OK);
    for (int i = 0; i < DRAWS; i++)
        times[drawn[i].token]++;
    double chi = 0;
    for (int i = 0; i < N; i++) {
        double want = DRAWS * (double)p[i];
        chi += (times[i] - want) * (times[i] - want) / want;
    }
    assert_true(chi < 30);
    gpu_sampler_free(s);
    gpu_release(gpu, at);
}

/* ---- edits and penalties ---- */

static void biases_penalties_and_bans_change_logits_in_this_order(void **state) {
    (void)state;
    enum { N = 70, DRAWS = 24 };
    struct gpu_sampler *s;
    const struct gpu_drawn *drawn;
    float x[N], adjusted[N];
    int32_t prompt[] = {3, 9, 9, 60, 11}, output[DRAWS];
    for (int i = 0; i < N; i++)
        x[i] = some_logit(4);
    float *at = to_device(x, N);
    assert_int_equal(gpu_sampler_new(&s, gpu, N, 2, 3), OK);
    gpu_sampler_clear_counts(s, 2);
    gpu_sampler_add_prompt(s, 2, prompt, 5);
    struct gpu_edit edits[] = {{5, 2.5f}, {9, 4}, {60, -INFINITY}, {60, 100}, {12, -3}};
    for (int i = 0; i < DRAWS; i++) {
        struct gpu_draw d[2] = {plain(0), plain(0)}; /* the second without all of it */
        d[0].counts_row = 2;
        d[0].record = 1;
        d[0].n_edits = 5;
        d[0].temperature = i % 2 ? 0 : 0.8f;
        d[0].repetition_penalty = 1.25f;
        d[0].presence_penalty = 0.5f;
        d[0].frequency_penalty = 0.25f;
        gpu_sample(s, at, d, 2, edits, 5, &drawn);
        assert_int_equal(gpu_wait(gpu), OK);
        memcpy(adjusted, x, sizeof x);
        adjusted[5] += 2.5f, adjusted[9] += 4, adjusted[12] -= 3;
        for (int t = 0; t < N; t++) {
            int n = 0;
            bool seen = t == 3 || t == 9 || t == 60 || t == 11;
            for (int k = 0; k < i; k++)
                n += output[k] == t;
            if (!seen && !n) continue;
            adjusted[t] = adjusted[t] > 0 ? adjusted[t] / 1.25f : adjusted[t] * 1.25f;
            adjusted[t] = fmaf(-0.25f, (float)n, adjusted[t]);
            if (n) adjusted[t] -= 0.5f;
        }
        adjusted[60] = -INFINITY;
        int32_t want = defined_draw(adjusted, N, &d[0]), bare = defined_draw(x, N, &d[1]);
        output[i] = drawn[0].token;
        if (want >= 0) assert_int_equal(drawn[0].token, want);
        if (bare >= 0) assert_int_equal(drawn[1].token, bare);
        assert_int_not_equal(drawn[0].token, 60);
    }
    gpu_sampler_free(s);
    gpu_release(gpu, at);
}

/* ---- logprobs ---- */

/* log-softmax in fp32 errs by 2^-23 of its magnitude, the sum by n 2^-42 and 2^-22 of itself. */
static void logprobs_are_of_the_raw_logits(void **state) {
    (void)state;
    enum { N = 1000, TOP = GPU_SAMPLER_TOP };
    struct gpu_sampler *s;
    const struct gpu_drawn *drawn;
    float x[N];
    for (int i = 0; i < N; i++)
        x[i] = some_logit(3); /* ties among the best */
    float *at = to_device(x, N);
    assert_int_equal(gpu_sampler_new(&s, gpu, N, 3, 1), OK);
    struct gpu_draw d[3] = {plain(0), plain(0), plain(0)};
    struct gpu_edit ban = {0, -INFINITY};
    d[0].n_top = TOP, d[0].n_edits = 1, d[0].temperature = 0.5f;
    d[1].n_top = 0;
    gpu_sample(s, at, d, 3, &ban, 1, &drawn);
    assert_int_equal(gpu_wait(gpu), OK);
    int32_t order[N];
    double sum = 0;
    for (int i = 0; i < N; i++)
        order[i] = i, sum += exp((double)x[i]);
    ranked = x;
    qsort(order, N, sizeof *order, by_rank);
    for (int i = 0; i < 2; i++) {
        double want = (double)x[drawn[i].token] - log(sum);
        assert_true(fabs((double)drawn[i].logprob - want) <= 1e-6 * (1 + fabs(want)));
    }
    assert_true(isnan(drawn[2].logprob));
    for (int i = 0; i < TOP; i++) {
        double want = (double)x[order[i]] - log(sum);
        assert_int_equal(drawn[0].top_token[i], order[i]);
        assert_true(fabs((double)drawn[0].top_logprob[i] - want) <= 1e-6 * (1 + fabs(want)));
    }
    gpu_sampler_free(s);
    gpu_release(gpu, at);
}

/* The best of the edited row, then that of the raw one, are found in the same shared memory. */
static void greedy_tokens_and_logprobs_are_of_their_own_rows(void **state) {
    (void)state;
    enum { N = 900 };
    struct gpu_sampler *s;
    const struct gpu_drawn *drawn;
    float x[N];
    double sum = 0;
    for (int i = 0; i < N; i++)
        x[i] = (float)(i % 89) * 0.01f, sum += exp((double)x[i]);
    x[40] = 3, x[840] = 2; /* seen by warps 1 and 2, told by warp 0 */
    sum += exp(3) - exp(0.4) + exp(2) - exp((840 % 89) * 0.01);
    float *at = to_device(x, N);
    struct gpu_draw d = plain(0);
    struct gpu_edit ban = {40, -INFINITY};
    d.temperature = 0, d.n_edits = 1, d.n_top = 1;
    assert_int_equal(gpu_sampler_new(&s, gpu, N, 1, 1), OK);
    for (int i = 0; i < 8; i++) {
        gpu_sample(s, at, &d, 1, &ban, 1, &drawn);
        assert_int_equal(gpu_wait(gpu), OK);
        assert_int_equal(drawn[0].token, 840);
        assert_int_equal(drawn[0].top_token[0], 40);
        assert_true(fabs((double)drawn[0].logprob - (2 - log(sum))) <= 1e-5);
    }
    gpu_sampler_free(s);
    gpu_release(gpu, at);
}

/* ---- bad numbers ---- */

static void nan_is_never_drawn_and_infinity_always(void **state) {
    (void)state;
    enum { N = 40 };
    struct gpu_sampler *s;
    const struct gpu_drawn *drawn;
    float x[3 * N];
    for (int i = 0; i < N; i++) {
        x[i] = i == 17 ? 1 : NAN;
        x[N + i] = i == 5 ? INFINITY : some_logit(0);
        x[2 * N + i] = -INFINITY;
    }
    float *at = to_device(x, 3 * N);
    struct gpu_draw d[3] = {plain(0), plain(1), plain(2)};
    d[0].n_top = d[1].n_top = d[2].n_top = 2;
    assert_int_equal(gpu_sampler_new(&s, gpu, N, 3, 1), OK);
    gpu_sample(s, at, d, 3, NULL, 0, &drawn);
    assert_int_equal(gpu_wait(gpu), OK);
    assert_int_equal(drawn[0].token, 17);
    assert_true(drawn[0].logprob == 0);
    assert_int_equal(drawn[1].token, 5);
    assert_in_range(drawn[2].token, 0, N - 1);
    gpu_sampler_free(s);
    gpu_release(gpu, at);
}

static void a_vocabulary_too_large_is_refused(void **state) {
    (void)state;
    struct gpu_sampler *s = NULL;
    assert_int_equal(gpu_sampler_new(&s, gpu, 2000000, 1, 1), ERR_ARG);
    assert_int_equal(gpu_sampler_new(&s, gpu, 0, 1, 1), ERR_ARG);
    assert_null(s);
}

int main(void) {
    char msg[256];
    if (gpu_open(&gpu, msg, sizeof msg)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(draws_are_those_of_the_definition),
        cmocka_unit_test(draws_follow_the_weights),
        cmocka_unit_test(biases_penalties_and_bans_change_logits_in_this_order),
        cmocka_unit_test(logprobs_are_of_the_raw_logits),
        cmocka_unit_test(greedy_tokens_and_logprobs_are_of_their_own_rows),
        cmocka_unit_test(nan_is_never_drawn_and_infinity_always),
        cmocka_unit_test(a_vocabulary_too_large_is_refused),
    };
    int failed = run_in_both_orders(tests, sizeof tests / sizeof *tests, 1, NULL);
    gpu_close(gpu);
    return failed;
}
