/* test_sampler.c - filters against a naive reference, distributions against what they should be. */
#include "scheduler/sampler.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static uint64_t rng_state = 1;
static double uniform(void) { /* [0, 1) */
    rng_state = rng_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(rng_state >> 11) * 0x1p-53;
}
static float normal(void) {
    return (float)(sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()));
}
static void fill_normal(float *x, int n, float sd) {
    for (int i = 0; i < n; i++)
        x[i] = sd * normal();
}

static struct sampler *sampler_for(int vocab_size) {
    struct sampler *s = NULL;
    assert_int_equal(sampler_new(&s, vocab_size), OK);
    return s;
}
static struct sampling how_with(float temperature, int top_k, float top_p, float min_p) {
    struct sampling how;
    sampling_init(&how);
    how.temperature = temperature;
    how.top_k = top_k;
    how.top_p = top_p;
    how.min_p = min_p;
    return how;
}

/* ---- the naive reference: sort everything ---- */

struct ranked {
    double logit;
    int32_t token;
};
static int falling(const void *a, const void *b) {
    const struct ranked *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return (x->token > y->token) - (x->token < y->token);
}

/* Probability of every token after temperature, top_k, top_p and min_p. */
static void reference(double *p, const float *logits, int n, const struct sampling *how) {
    struct ranked *order = malloc((size_t)n * sizeof *order);
    assert_non_null(order);
    for (int i = 0; i < n; i++)
        order[i] = (struct ranked){(double)logits[i], i};
    qsort(order, (size_t)n, sizeof *order, falling);
    int kept = how->top_k > 0 && how->top_k < n ? how->top_k : n;
    double total = 0, sum = 0, best = order[0].logit;
    for (int i = 0; i < n; i++)
        p[i] = 0;
    for (int i = 0; i < kept; i++)
        total += p[order[i].token] = exp((order[i].logit - best) / (double)how->temperature);
    for (int i = 0; i < kept; i++) {
        double *w = &p[order[i].token];
        if ((i > 0 && sum >= (double)how->top_p * total && how->top_p < 1) ||
            *w < (double)how->min_p)
            *w = 0;
        else
            sum += *w;
    }
    for (int i = 0; i < n; i++)
        p[i] /= sum;
    free(order);
}

/* ---- tests ---- */

/* Known answers of Random123 (kat_vectors, philox4x32 10 rounds): the first two words of each. */
static void test_the_draw_is_philox(void **state) {
    (void)state;
    assert_true(sampler_uniform(0, 0, 0) == (double)(0x6627e8d5e169c58dull >> 11) * 0x1p-53);
    assert_true(sampler_uniform(1, 0, 0) != sampler_uniform(0, 0, 0));
    assert_true(sampler_uniform(0, 1, 0) != sampler_uniform(0, 0, 0));
    assert_true(sampler_uniform(0, 0, 1) != sampler_uniform(0, 0, 0));
}

/* 2^16 draws over 64 cells and over pairs of consecutive draws in 8 x 8: chi-square with 63 degrees
 * of freedom is above 127 once in 3 million runs; the seeds are fixed. */
static void test_draws_are_uniform_and_independent(void **state) {
    (void)state;
    enum { N = 1 << 16 };
    for (uint64_t seed = 0; seed < 3; seed++)
        for (uint32_t along = 0; along < 2; along++) { /* index counts, or choice does */
            int cells[64] = {0}, pairs[64] = {0};
            int before = 0;
            for (uint32_t i = 0; i < N; i++) {
                double u = along ? sampler_uniform(seed, i, 7) : sampler_uniform(seed, 0, i);
                assert_true(u >= 0 && u < 1);
                cells[(int)(u * 64)]++;
                if (i & 1) pairs[before * 8 + (int)(u * 8)]++;
                before = (int)(u * 8);
            }
            double chi_cells = 0, chi_pairs = 0;
            for (int i = 0; i < 64; i++) {
                chi_cells += pow(cells[i] - N / 64.0, 2) / (N / 64.0);
                chi_pairs += pow(pairs[i] - N / 128.0, 2) / (N / 128.0);
            }
            assert_true(chi_cells < 127);
            assert_true(chi_pairs < 127);
        }
}

static void test_greedy_takes_the_highest_and_the_lower_id_of_equals(void **state) {
    (void)state;
    enum { N = 101 };
    struct sampler *s = sampler_for(N);
    struct sampling how = how_with(0, 5, 0.5f, 0.5f);
    float x[N];
    for (int trial = 0; trial < 50; trial++) {
        fill_normal(x, N, 1);
        int a = (int)(uniform() * N), b = (int)(uniform() * N);
        x[a] = x[b] = 9;
        assert_int_equal(sample(s, x, &how, NULL, NULL, 0, 0, trial), a < b ? a : b);
    }
    for (int i = 0; i < N; i++)
        x[i] = i % 2 ? 0.0f : -0.0f; /* equal numbers */
    assert_int_equal(sample(s, x, &how, NULL, NULL, 0, 0, 0), 0);
    sampler_free(s);
}

/* Exhaustive over the filters' edges: what is drawn is never outside the reference's set, and all
 * of a small set is drawn.  A token of the set with the least probability p_min is missed by n
 * draws with (1 - p_min)^n < exp(-n p_min); draws go on until that is below 1e-9, where that takes
 * no more than 4000. */
static void test_filters_keep_what_the_reference_keeps(void **state) {
    (void)state;
    static const int sizes[] = {1, 2, 7, 64, 513};
    static const float temperatures[] = {0.3f, 1, 5}, ps[] = {1e-6f, 0.3f, 0.9f, 0.999f, 1},
                       mins[] = {0, 0.01f, 0.5f, 1};
    static const int ks[] = {-1, 0, 1, 2, 40, 512, 513, 1000000};
    static double p[513];
    static float x[513];
    static int seen[513];
    for (size_t size = 0; size < sizeof sizes / sizeof *sizes; size++) {
        int n = sizes[size], exhausted = 0;
        struct sampler *s = sampler_for(n);
        for (size_t k = 0; k < sizeof ks / sizeof *ks; k++)
            for (size_t t = 0; t < 3; t++)
                for (size_t j = 0; j < 5; j++)
                    for (size_t m = 0; m < 4; m++) {
                        struct sampling how = how_with(temperatures[t], ks[k], ps[j], mins[m]);
                        fill_normal(x, n, 2);
                        if (n > 2) x[n / 2] = x[n - 1]; /* equals, perhaps at the edge */
                        reference(p, x, n, &how);
                        double least = 1;
                        for (int i = 0; i < n; i++)
                            if (p[i] > 0 && p[i] < least) least = p[i];
                        double needed = 21 / least;
                        int draws = needed < 4000 ? (int)needed + 1 : 50;
                        memset(seen, 0, sizeof seen);
                        how.seed = k * 1000 + t * 100 + j * 10 + m;
                        for (int i = 0; i < draws; i++)
                            seen[sample(s, x, &how, NULL, NULL, 0, 0, i)]++;
                        for (int i = 0; i < n; i++) {
                            if (seen[i]) assert_true(p[i] > 0);
                            if (p[i] > 0 && needed < 4000) assert_true(seen[i] > 0);
                        }
                        exhausted += needed < 4000;
                    }
        assert_true(exhausted > 100);
        sampler_free(s);
    }
}

/* Of four equals, half the probability is the two of lower id, exactly. */
static void test_top_p_is_met_by_equality(void **state) {
    (void)state;
    struct sampler *s = sampler_for(4);
    struct sampling how = how_with(1, 0, 0.5f, 0);
    int seen[4] = {0};
    for (int i = 0; i < 200; i++)
        seen[sample(s, (float[]){2, 2, 2, 2}, &how, NULL, NULL, 0, 0, i)]++;
    assert_true(seen[0] && seen[1] && !seen[2] && !seen[3]);
    sampler_free(s);
}

/* 40000 draws of at most 12 tokens: chi-square with 11 degrees of freedom is above 50 once in 2
 * million runs (fewer degrees: less). Cells expect at least 40000 * p; those under 5 are joined to
 * none: the logits are such that there are none. */
static void test_tokens_come_as_often_as_they_should(void **state) {
    (void)state;
    enum { N = 12, DRAWS = 40000 };
    static const float x[N] = {1, 0.5f, -1, 2, 0, 0, 1.5f, -0.5f, 0.25f, -2, 1, 0.75f};
    struct sampler *s = sampler_for(N);
    struct sampling cases[] = {how_with(1, 0, 1, 0),    how_with(0.5f, 0, 1, 0),
                               how_with(2, 5, 1, 0),    how_with(1, 0, 0.8f, 0),
                               how_with(1, 0, 1, 0.2f), how_with(1.5f, 9, 0.9f, 0.1f)};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++)
        for (int choice = 0; choice < 2; choice++) {
            double p[N], chi = 0;
            int seen[N] = {0};
            cases[c].seed = 17 + c;
            reference(p, x, N, &cases[c]);
            for (int i = 0; i < DRAWS; i++)
                seen[sample(s, x, &cases[c], NULL, NULL, 0, choice, i)]++;
            for (int i = 0; i < N; i++) {
                if (p[i] == 0) {
                    assert_int_equal(seen[i], 0);
                    continue;
                }
                assert_true(p[i] * DRAWS >= 5);
                chi += pow(seen[i] - p[i] * DRAWS, 2) / (p[i] * DRAWS);
            }
            assert_true(chi < 50);
        }
    sampler_free(s);
}

/* The nucleus at 49152 tokens, where bounds and quickselect work on real sizes.  The mass that the
 * drawn tokens' worst rank covers is checked against the sorted reference. */
static void test_large_vocabularies_are_cut_where_sorting_cuts(void **state) {
    (void)state;
    enum { N = 49152 };
    static float x[N];
    static double p[N];
    struct sampler *s = sampler_for(N);
    struct sampling cases[] = {how_with(1, 0, 0.95f, 0), how_with(1, 50, 1, 0),
                               how_with(0.7f, 1000, 0.5f, 0), how_with(1, 0, 0.5f, 0.05f),
                               how_with(1, 20000, 1, 0)};
    for (int sd = 1; sd <= 4; sd++)
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            fill_normal(x, N, (float)sd);
            reference(p, x, N, &cases[c]);
            for (int i = 0; i < 200; i++)
                assert_true(p[sample(s, x, &cases[c], NULL, NULL, 0, 0, i)] > 0);
        }
    sampler_free(s);
}

/* The draw is a walk over the kept tokens in order of id.  Weights err by 4 ulp and the reference's
 * cut may fall on the other side of a token that just meets top_p, so uniforms within 1e-5 of a
 * boundary are left out; they must be few. */
static void test_the_kept_are_drawn_from_in_order_of_id(void **state) {
    (void)state;
    enum { N = 1000, TRIALS = 200 };
    float x[N];
    double p[N];
    struct sampler *s = sampler_for(N);
    struct sampling cases[] = {how_with(1, 0, 1, 0),        how_with(1, 0, 0.9f, 0),
                               how_with(1, 40, 1, 0),       how_with(1, 0, 1, 0.05f),
                               how_with(0.7f, 99, 0.8f, 0), how_with(2, 500, 0.99f, 0.01f)};
    int left_out = 0;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++)
        for (int i = 0; i < TRIALS; i++) {
            fill_normal(x, N, 2);
            reference(p, x, N, &cases[c]);
            double u = sampler_uniform(cases[c].seed, 3, (uint64_t)i), sum = 0;
            int32_t expected = 0;
            while (sum + p[expected] <= u)
                sum += p[expected++];
            bool close = u - sum < 1e-5 || sum + p[expected] - u < 1e-5;
            left_out += close;
            if (!close) assert_int_equal(sample(s, x, &cases[c], NULL, NULL, 0, 3, i), expected);
        }
    assert_true(left_out < TRIALS / 10);
    sampler_free(s);
}

static void test_same_seed_choice_and_index_give_the_same_token(void **state) {
    (void)state;
    enum { N = 300 };
    float x[N];
    fill_normal(x, N, 1);
    struct sampler *a = sampler_for(N), *b = sampler_for(N);
    struct sampling how = how_with(1, 0, 0.9f, 0), other = how_with(1, 10, 1, 0);
    int differ = 0, choices_differ = 0;
    for (int i = 0; i < 200; i++) {
        int32_t token = sample(a, x, &how, NULL, NULL, 0, 2, i);
        sample(b, x, &other, NULL, NULL, 0, 1, i); /* a sampler remembers nothing */
        assert_int_equal(sample(b, x, &how, NULL, NULL, 0, 2, i), token);
        choices_differ += sample(b, x, &how, NULL, NULL, 0, 3, i) != token;
        how.seed = 1;
        differ += sample(b, x, &how, NULL, NULL, 0, 2, i) != token;
        how.seed = 0;
    }
    assert_true(differ > 100 && choices_differ > 100);
    sampler_free(a);
    sampler_free(b);
}

/* vLLM's formulas: repetition over prompt and output: x > 0 ? x / r : x * r; frequency * count and
 * presence over output only. */
static void test_penalties_follow_the_formulas(void **state) {
    (void)state;
    enum { N = 40 };
    struct sampler *s = sampler_for(N);
    struct token_counts *counts = NULL, *other = NULL;
    assert_int_equal(token_counts_new(&counts, N), OK);
    assert_int_equal(token_counts_new(&other, N), OK);
    for (int trial = 0; trial < 300; trial++) {
        float x[N], expected[N];
        int in_prompt[N] = {0}, in_output[N] = {0};
        fill_normal(x, N, 2);
        token_counts_clear(counts);
        for (int i = 0; i < 30; i++) {
            int32_t a = (int32_t)(uniform() * N), b = (int32_t)(uniform() * N);
            token_counts_add_prompt(counts, a);
            token_counts_add_output(counts, b);
            in_prompt[a] = 1;
            in_output[b]++;
        }
        token_counts_add_output(other, 3); /* must be gone after the copy */
        token_counts_copy(other, counts);
        struct sampling how = how_with(0, 0, 1, 0);
        how.repetition_penalty = (float)(0.5 + uniform());
        how.presence_penalty = (float)(uniform() * 4 - 2);
        how.frequency_penalty = (float)(uniform() * 4 - 2);
        struct logit_bias bias[2] = {{5, 3}, {trial % N == 5 ? 6 : trial % N, -INFINITY}};
        how.bias = bias;
        how.n_bias = 2;
        for (int i = 0; i < N; i++) {
            float v = x[i] + (i == 5 ? 3 : 0);
            if (i == bias[1].token) v = -INFINITY;
            if (in_prompt[i] || in_output[i])
                v = v > 0 ? v / how.repetition_penalty : v * how.repetition_penalty;
            v -= how.frequency_penalty * (float)in_output[i];
            if (in_output[i]) v -= how.presence_penalty;
            expected[i] = v;
        }
        int best = 0;
        for (int i = 1; i < N; i++)
            if (expected[i] > expected[best]) best = i;
        assert_int_equal(sample(s, x, &how, counts, NULL, 0, 0, 0), best);
        assert_int_equal(sample(s, x, &how, other, NULL, 0, 0, 0), best);
        assert_int_not_equal(sample(s, x, &how, counts, &(int32_t){best}, 1, 0, 0), best);
    }
    token_counts_free(counts);
    token_counts_free(other);
    sampler_free(s);
}

static void test_nan_and_infinite_logits_are_survived(void **state) {
    (void)state;
    enum { N = 50 };
    struct sampler *s = sampler_for(N);
    struct token_logprob top[5];
    float x[N];
    struct sampling cases[] = {how_with(0, 0, 1, 0),
                               how_with(1, 0, 1, 0),
                               how_with(1, 0, 0.9f, 0),
                               how_with(1, 7, 1, 0),
                               how_with(1, 0, 1, 0.1f),
                               how_with(FLT_MIN, 0, 0.5f, 0),
                               how_with(FLT_MAX, 3, 0.5f, 0.5f)};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++)
        for (int i = 0; i < 50; i++) {
            fill_normal(x, N, 1);
            x[3] = NAN;
            x[4] = -NAN;
            x[5] = -INFINITY;
            int32_t token = sample(s, x, &cases[c], NULL, NULL, 0, 0, i);
            assert_true(token >= 0 && token < N && !isnan(x[token]) && x[token] > -INFINITY);
            float logprob = sampler_logprobs(s, x, token, top, 5);
            assert_true(logprob <= 0 && logprob > -INFINITY && !isnan(top[0].logprob));
            assert_true(sampler_logprobs(s, x, 3, NULL, 0) == -INFINITY);
            x[7] = INFINITY;
            if (cases[c].temperature < FLT_MAX) /* there all finite differences are as nothing */
                assert_int_equal(sample(s, x, &cases[c], NULL, NULL, 0, 0, i), 7);
            assert_true(sampler_logprobs(s, x, 7, top, 5) == 0);
            assert_int_equal(top[0].token, 7);
            for (int j = 0; j < N; j++)
                x[j] = i % 2 ? NAN : -INFINITY;
            token = sample(s, x, &cases[c], NULL, NULL, 0, 0, i);
            assert_true(token >= 0 && token < N);
            assert_true(sampler_logprobs(s, x, token, top, 5) == -INFINITY);
        }
    sampler_free(s);
}

/* Against log-softmax in double.  Each of N terms errs by 2 ulp and their sum, in trees of 16 and
 * then in double, by 4 more, so log(sum) by 6 * 2^-24 < 2^-21; the subtraction is in double and the
 * result is rounded once: relative 2^-24. */
static void test_logprobs_are_log_softmax_of_the_raw_logits(void **state) {
    (void)state;
    enum { N = 1000 };
    float x[N];
    struct sampler *s = sampler_for(N);
    struct token_logprob top[N + 3];
    struct ranked order[N];
    for (int trial = 0; trial < 40; trial++) {
        int n_top = (const int[]){0, 1, 5, 20, N + 3}[trial % 5];
        fill_normal(x, N, 1 + (float)trial / 4);
        x[11] = x[10];
        double sum = 0;
        for (int i = 0; i < N; i++) {
            sum += exp((double)x[i]);
            order[i] = (struct ranked){(double)x[i], i};
        }
        qsort(order, N, sizeof *order, falling);
        int32_t token = (int32_t)(uniform() * N);
        double expected = (double)x[token] - log(sum);
        assert_true(fabs((double)sampler_logprobs(s, x, token, top, n_top) - expected) <=
                    0x1p-21 + fabs(expected) * 0x1p-23);
        for (int i = 0; i < n_top && i < N; i++) {
            assert_int_equal(top[i].token, order[i].token);
            expected = order[i].logit - log(sum);
            assert_true(fabs((double)top[i].logprob - expected) <=
                        0x1p-21 + fabs(expected) * 0x1p-23);
        }
    }
    sampler_free(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_draw_is_philox),
        cmocka_unit_test(test_draws_are_uniform_and_independent),
        cmocka_unit_test(test_greedy_takes_the_highest_and_the_lower_id_of_equals),
        cmocka_unit_test(test_filters_keep_what_the_reference_keeps),
        cmocka_unit_test(test_top_p_is_met_by_equality),
        cmocka_unit_test(test_tokens_come_as_often_as_they_should),
        cmocka_unit_test(test_large_vocabularies_are_cut_where_sorting_cuts),
        cmocka_unit_test(test_the_kept_are_drawn_from_in_order_of_id),
        cmocka_unit_test(test_same_seed_choice_and_index_give_the_same_token),
        cmocka_unit_test(test_penalties_follow_the_formulas),
        cmocka_unit_test(test_nan_and_infinite_logits_are_survived),
        cmocka_unit_test(test_logprobs_are_log_softmax_of_the_raw_logits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
