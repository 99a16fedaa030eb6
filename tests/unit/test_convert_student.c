/* test_convert_student.c - losses and gradients of attention transfer against the definition in
 * double: L computed row by row, gradients as central differences of it. */
#include "attention/rope.h"
#include "compute/cpu.h"
#include "compute/memory.h"
#include "compute/team.h"
#include "convert/student.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { H = 4, KV = 2, D = 6, LAYERS = 2, T = 61, DOCUMENTS = 2, R = 23, LONGEST = 41 };

static float uniform(uint32_t *state) { /* in [-1, 1) */
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) * 0x1p-23f - 1;
}
static void fill(float *x, size_t n, float size, uint32_t seed) {
    for (size_t i = 0; i < n; i++)
        x[i] = size * uniform(&seed);
}

static const int first[DOCUMENTS + 1] = {0, 20, T};
static int rows[R];
static float kv[LAYERS * T * 2 * KV * D], q[LAYERS * R * H * D];
static float cosines[LONGEST * D / 2], sines[LONGEST * D / 2], far_cosines[D / 2], far_sines[D / 2];

static struct lesson make_lesson(const struct attention_config *c) {
    struct rope *rope;
    assert_int_equal(rope_new(&rope, &(struct rope_config){.head_dim = D, .base = 100}, NULL, 0),
                     OK);
    for (int p = 0; p < LONGEST; p++)
        rope_angles(rope, p, cosines + p * (D / 2), sines + p * (D / 2));
    rope_angles(rope, c->max_distance, far_cosines, far_sines);
    rope_free(rope);
    fill(kv, sizeof kv / sizeof *kv, 1.5f, 1);
    fill(q, sizeof q / sizeof *q, 2.5f, 2);
    for (int r = 0; r < R; r++)
        rows[r] = r < 5 ? 3 + 4 * r : 12 + 2 * r - (r & 1); /* of both documents */
    rows[R - 1] = T - 1;
    return (struct lesson){.n_tokens = T,
                           .n_documents = DOCUMENTS,
                           .n_rows = R,
                           .first = first,
                           .rows = rows,
                           .kv = kv,
                           .q = q,
                           .cosines = cosines,
                           .sines = sines,
                           .far_cosines = far_cosines,
                           .far_sines = far_sines};
}

static struct attention_config config(enum feature_map map, enum mixing mixing,
                                      enum window_rule window, bool per_query, bool before_rope) {
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .n_heads = H,
                                     .n_kv_heads = KV,
                                     .head_dim = D,
                                     .map = map,
                                     .features = 5,
                                     .key_map_per_query_head = per_query,
                                     .window = window,
                                     .window_size = window == WINDOW_NONE ? 0 : 4,
                                     .sinks = window == WINDOW_NONE ? 0 : 2,
                                     .mixing = mixing,
                                     .map_before_rope = before_rope,
                                     .max_distance = before_rope ? 15 : 0};
}

/* ---- the definition, in double ---- */
static void turn(double *y, const float *x, int position) {
    for (int i = 0; i < D / 2; i++) {
        double a = position * pow(100, -2.0 * i / D), cos_a = cos(a), sin_a = sin(a);
        y[i] = x[i] * cos_a - x[i + D / 2] * sin_a;
        y[i + D / 2] = x[i + D / 2] * cos_a + x[i] * sin_a;
    }
}
static double dot(const double *a, const double *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}
static void phi_of(enum feature_map map, double *phi, const double *x, const double *w, int f) {
    double sums[2] = {0};
    for (int i = 0; i < f; i++) {
        double u = 0;
        for (int d = 0; d < D; d++)
            u += x[d] * w[d * f + i];
        phi[i] = exp(map == MAP_JOINT_SOFTMAX ? 2 * u : u);
        phi[f + i] = 1 / phi[i];
        sums[0] += phi[i];
        sums[1] += phi[f + i];
    }
    for (int i = 0; map != MAP_EXP && i < 2 * f; i++)
        phi[i] /= map == MAP_SOFTMAX2 ? sums[i / f] : sums[0] + sums[1];
}

struct reference {
    double loss, kl, error;
};

/* L over all heads of one layer. */
static struct reference reference(const struct attention_config *c, const struct lesson *l,
                                  int layer, const double *params,
                                  const struct student_loss *loss) {
    struct reference out = {0};
    int f = c->features;
    for (int h = 0; h < H; h++)
        for (int r = 0; r < l->n_rows; r++) {
            int g = h / (H / KV), state = c->key_map_per_query_head ? h : g, document = 0;
            while (l->rows[r] >= l->first[document + 1])
                document++;
            int start = l->first[document], n = l->rows[r] - start, w = c->window_size;
            const float *qr = l->q + ((layer * R + r) * H + h) * D;
            double qt[D], q_far[D], q_map[D], q_plain[D], phi_q[16], p[LONGEST], a[LONGEST],
                exact_most = -INFINITY, z = 0, sum = 0;
            bool linear[LONGEST];
            turn(qt, qr, n);
            turn(q_far, qr, (int)c->max_distance);
            for (int d = 0; d < D; d++)
                q_plain[d] = qr[d];
            memcpy(q_map, c->map_before_rope ? q_plain : qt, sizeof q_map);
            phi_of(c->map, phi_q, q_map, params + h * D * f, f);
            for (int pass = 0; pass < 2; pass++)
                for (int j = 0; j <= n; j++) {
                    const float *kr = l->kv + ((layer * T + start + j) * 2 * KV + g) * D;
                    double kt[D], k_plain[D], phi_k[16];
                    turn(kt, kr, j);
                    for (int d = 0; d < D; d++)
                        k_plain[d] = kr[d];
                    double logit = dot(qt, kt, D) / sqrt(D), own = logit;
                    bool in_window = c->window == WINDOW_SLIDING    ? j > n - w
                                     : c->window == WINDOW_TERRACED ? j / w >= n / w - 1
                                                                    : false;
                    int from = c->window == WINDOW_TERRACED ? n / w * w : n;
                    linear[j] = !in_window && j >= c->sinks;
                    if (!in_window && !linear[j] && c->max_distance && from - j > c->max_distance)
                        own = dot(q_far, k_plain, D) / sqrt(D);
                    if (pass == 0) {
                        z += p[j] = exp(logit);
                        if (!linear[j]) exact_most = fmax(exact_most, own);
                        continue;
                    }
                    double mix = params[student_mix(c) + (size_t)h];
                    if (linear[j]) {
                        phi_of(c->map, phi_k, c->map_before_rope ? k_plain : kt,
                               params + student_map_k(c) + (size_t)(state * D * f), f);
                        a[j] = dot(phi_q, phi_k, 2 * f);
                        if (c->mixing == MIXING_UNIFIED) a[j] *= exp(mix);
                    } else {
                        a[j] = exp(own);
                        if (c->mixing == MIXING_LOLCATS) a[j] *= exp(-exact_most) / (1 + exp(-mix));
                    }
                    sum += a[j];
                }
            double kl = 0, y[D] = {0}, error = 0;
            for (int j = 0; j <= n; j++) {
                p[j] /= z;
                a[j] /= sum;
                kl += p[j] * log(p[j] / a[j]);
                const float *v = l->kv + ((layer * T + start + j) * 2 * KV + KV + g) * D;
                for (int d = 0; d < D; d++)
                    y[d] += (a[j] - p[j]) * v[d];
            }
            error = dot(y, y, D);
            out.kl += kl;
            out.error += error;
            out.loss += loss->share * (loss->ce * kl + loss->mse * error / D) / (R * H);
        }
    return out;
}

/* Loss and gradient of layer 1 through student_learn. */
static void learn(const struct attention_config *c, const struct lesson *l, const float *params,
                  float *grads, const struct student_loss *loss, struct student_sums *sums) {
    struct student_scratch *scratch;
    assert_int_equal(student_scratch_new(&scratch, c, T, R), OK);
    memset(sums, 0, H * sizeof *sums);
    for (int g = 0; g < KV; g++)
        student_learn(c, l, 1, g, params, grads, loss, true, sums, scratch);
    student_scratch_free(scratch);
}

static void check(struct attention_config c, struct student_loss loss) {
    struct lesson l = make_lesson(&c);
    size_t n = student_params(&c), mix = student_mix(&c);
    float params[n], grads[n];
    double exact[n];
    fill(params, n, 0.4f, 3);
    for (size_t i = mix; i < n; i++)
        params[i] -= 1;
    for (size_t i = 0; i < n; i++) {
        exact[i] = params[i];
        grads[i] = 0;
    }
    struct student_sums sums[H];
    learn(&c, &l, params, grads, &loss, sums);
    struct reference want = reference(&c, &l, 1, exact, &loss);
    double kl = 0, error = 0, mass = 0, largest = 0;
    for (int h = 0; h < H; h++) {
        kl += sums[h].kl;
        error += sums[h].error;
        mass += sums[h].sink + sums[h].window + sums[h].linear;
        assert_true(sums[h].n_rows == R);
    }
    /* fp32 sums of at most 41 terms, logs and exponentials to a few ulp: 1e-6 of values near 1 */
    assert_true(fabs(kl - want.kl) <= 3e-6 * (1 + want.kl) * R * H);
    assert_true(fabs(error - want.error) <= 1e-5 * want.error);
    assert_true(fabs(mass / (R * H) - 1) <= 2e-6);
    static double numeric[1024];
    for (size_t i = 0; i < n; i++) {
        const double step = 1e-5; /* third derivatives of order 1: 1e-10 off, and 1e-11 rounding */
        double was = exact[i];
        exact[i] = was + step;
        double above = reference(&c, &l, 1, exact, &loss).loss;
        exact[i] = was - step;
        double below = reference(&c, &l, 1, exact, &loss).loss;
        exact[i] = was;
        numeric[i] = (above - below) / (2 * step);
        largest = fmax(largest, fabs(numeric[i]));
    }
    assert_true(largest > 1e-4); /* there is something to compare */
    for (size_t i = 0; i < n; i++)
        if (!(fabs(grads[i] - numeric[i]) <= 2e-5 * largest))
            fail_msg("parameter %zu of %zu (mix from %zu): %.9g, by differences %.9g", i, n, mix,
                     (double)grads[i], numeric[i]);
}

static const struct student_loss rows_loss = {.ce = 1, .share = 0.5f},
                                 outputs_loss = {.mse = 3, .share = 1},
                                 both = {.ce = 0.7f, .mse = 2, .share = 1};

static void test_gradients_of_the_exp_map_are_those_of_the_definition(void **state) {
    (void)state;
    check(config(MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true), rows_loss);
    check(config(MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true), outputs_loss);
    check(config(MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, true, false), both);
    check(config(MAP_EXP, MIXING_UNIFIED, WINDOW_SLIDING, false, true), both);
}

static void test_gradients_of_lolcats_map_and_mixing_are_those_of_the_definition(void **state) {
    (void)state;
    check(config(MAP_SOFTMAX2, MIXING_LOLCATS, WINDOW_TERRACED, true, false), rows_loss);
    check(config(MAP_SOFTMAX2, MIXING_LOLCATS, WINDOW_TERRACED, true, false), outputs_loss);
    check(config(MAP_SOFTMAX2, MIXING_LOLCATS, WINDOW_SLIDING, false, true), both);
    check(config(MAP_SOFTMAX2, MIXING_UNIFIED, WINDOW_TERRACED, false, true), both);
}

static void test_gradients_of_flas_map_and_of_no_window_are_those_of_the_definition(void **state) {
    (void)state;
    check(config(MAP_JOINT_SOFTMAX, MIXING_UNIFIED, WINDOW_TERRACED, true, true), both);
    check(config(MAP_JOINT_SOFTMAX, MIXING_LOLCATS, WINDOW_SLIDING, true, false), rows_loss);
    check(config(MAP_EXP, MIXING_UNIFIED, WINDOW_NONE, true, false), both);
    check(config(MAP_EXP, MIXING_LOLCATS, WINDOW_TERRACED, false, false), both);
}

/* What parts of the rows teach, each its mean, adds up to what all of them do: sums of 23 terms in
 * another order, so to a few ulp of the largest. */
static void check_parts(struct attention_config c, int n_parts) {
    struct lesson l = make_lesson(&c);
    size_t n = student_params(&c);
    float params[n], whole[n], part[n];
    double added[n], kl[H] = {0}, n_rows = 0, largest = 0;
    struct student_sums sums[H];
    fill(params, n, 0.4f, 3);
    memset(whole, 0, sizeof whole);
    memset(added, 0, sizeof added);
    for (l.n_parts = n_parts, l.part = 0; l.part < n_parts; l.part++) {
        memset(part, 0, sizeof part);
        learn(&c, &l, params, part, &both, sums);
        assert_true(sums[0].n_rows == (double)((R - l.part + n_parts - 1) / n_parts));
        for (size_t i = 0; i < n; i++)
            added[i] += (double)part[i] * sums[0].n_rows / R;
        for (int h = 0; h < H; h++)
            kl[h] += sums[h].kl;
        n_rows += sums[0].n_rows;
    }
    assert_true(n_rows == R);
    l.n_parts = l.part = 0;
    learn(&c, &l, params, whole, &both, sums);
    for (size_t i = 0; i < n; i++)
        largest = fmax(largest, fabs((double)whole[i]));
    assert_true(largest > 1e-4);
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)whole[i] - added[i]) <= 4e-6 * largest))
            fail_msg("parameter %zu: %.9g, in %d parts %.9g", i, (double)whole[i], n_parts,
                     added[i]);
    for (int h = 0; h < H; h++)
        assert_true(fabs(kl[h] - sums[h].kl) <= 1e-12 * R);
}
static void test_parts_of_the_rows_teach_what_all_do(void **state) {
    (void)state;
    check_parts(config(MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true), 2);
    check_parts(config(MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, true, false), 5);
    check_parts(config(MAP_SOFTMAX2, MIXING_LOLCATS, WINDOW_SLIDING, true, false), R);
}

/* Setting c_h to what calibration reads off makes the mean gap 0. */
static void test_calibration_puts_both_kinds_of_terms_on_one_scale(void **state) {
    (void)state;
    struct attention_config c = config(MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true);
    struct lesson l = make_lesson(&c);
    size_t n = student_params(&c), mix = student_mix(&c);
    float params[n];
    struct student_sums sums[H];
    fill(params, n, 0.4f, 3);
    learn(&c, &l, params, NULL, &rows_loss, sums);
    for (int h = 0; h < H; h++) {
        assert_true(sums[h].n_gap > 5 && sums[h].n_gap < R);
        assert_true(fabs(sums[h].gap / sums[h].n_gap) > 0.01);
        params[mix + (size_t)h] += (float)(sums[h].gap / sums[h].n_gap);
    }
    learn(&c, &l, params, NULL, &rows_loss, sums);
    for (int h = 0; h < H; h++)
        assert_true(fabs(sums[h].gap / sums[h].n_gap) < 2e-6);
}

/* Rows whose past all is exact are softmax rows: no divergence, whatever the maps. */
static void test_rows_without_linear_keys_are_softmax_rows(void **state) {
    (void)state;
    struct attention_config c = config(MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true);
    struct lesson l = make_lesson(&c);
    l.n_rows = 1; /* token 3 of the first document, in its first block */
    size_t n = student_params(&c);
    float params[n], grads[n];
    struct student_sums sums[H];
    fill(params, n, 0.4f, 3);
    memset(grads, 0, sizeof grads);
    learn(&c, &l, params, grads, &both, sums);
    for (int h = 0; h < H; h++) {
        assert_true(fabs(sums[h].kl) < 1e-6 && sums[h].error < 1e-12);
        assert_true(sums[h].linear == 0 && sums[h].n_gap == 0);
    }
    for (size_t i = 0; i < n; i++)
        assert_true(grads[i] == 0);
}

/* y [LONGEST][H * D] of the second document's rows, as the engine serves them. */
static void serve(struct attention_config c, const float *params, const struct rope *rope,
                  struct team *team, float *y) {
    enum { N = LONGEST };
    static float queries[N * H * D], keys[N * KV * D], values[N * KV * D];
    struct attention *a;
    struct attention_weights w = {params, params + student_map_k(&c), NULL, NULL,
                                  params + student_mix(&c), NULL};
    assert_int_equal(attention_new(&a, &c, &w, 1, rope, team, N, 1), OK);
    void *slot = memory_map(attention_slot_bytes(a));
    attention_slot_clear(a, slot);
    for (int n = 0; n < N; n++) {
        memcpy(queries + n * H * D, q + (R + n % R) * H * D, H * D * sizeof *q);
        const float *row = kv + (T + first[1] + n) * 2 * KV * D;
        memcpy(keys + n * KV * D, row, KV * D * sizeof *row);
        memcpy(values + n * KV * D, row + KV * D, KV * D * sizeof *row);
    }
    attention_step_begin(a, &(struct attention_run){slot, 0, N}, 1);
    attention_layer(a, 0, y, H * D, queries, H * D, keys, KV * D, values, KV * D);
    attention_step_end(a);
    memory_unmap(slot, attention_slot_bytes(a));
    attention_free(a);
}

/* What is trained is what is served: the error of outputs that the pupil is told is that between
 * the engine's Hedgehog rows and its softmax rows, of 23 rows at all depths.  Outputs of both agree
 * to 1e-6, their squared differences of about 0.1 to 1e-5. */
static void check_served(struct attention_config c, struct team *team) {
    static float y[LONGEST * H * D], teacher[LONGEST * H * D];
    struct lesson l = make_lesson(&c);
    struct rope *rope;
    struct student_sums sums[H];
    size_t n = student_params(&c);
    float params[n];
    int shift = LONGEST % R; /* row r of the lesson has the engine's query of position r + shift */
    for (int r = 0; r < R; r++)
        rows[r] = first[1] + (r + shift) % LONGEST;
    assert_int_equal(shift + R, LONGEST);
    static float turned[R * H * D];
    for (int r = 0; r < R; r++)
        memcpy(turned + r * H * D, q + (R + (r + shift) % R) * H * D, H * D * sizeof *q);
    fill(params, n, 0.4f, 3);
    assert_int_equal(rope_new(&rope, &(struct rope_config){.head_dim = D, .base = 100}, NULL, 0),
                     OK);
    serve(c, params, rope, team, y);
    struct attention_config softmax = {.kind = ATTENTION_SOFTMAX,
                                       .n_heads = H,
                                       .n_kv_heads = KV,
                                       .head_dim = D,
                                       .max_seq_len = LONGEST};
    serve(softmax, params, rope, team, teacher);
    rope_free(rope);
    memcpy(q + R * H * D, turned, sizeof turned);
    learn(&c, &l, params, NULL, &both, sums);
    for (int h = 0; h < H; h++) {
        double error = 0;
        for (int r = 0; r < R; r++)
            for (int d = 0; d < D; d++) {
                int at = ((r + shift) * H + h) * D + d;
                error += ((double)y[at] - teacher[at]) * ((double)y[at] - teacher[at]);
            }
        assert_true(error > 0.01);
        if (!(fabs(sums[h].error - error) <= 1e-5 * error))
            fail_msg("head %d: error %.9g, served %.9g", h, sums[h].error, error);
    }
}

static void test_what_is_trained_is_what_is_served(void **state) {
    (void)state;
    struct team *team;
    assert_int_equal(team_new(&team, 1), OK);
    check_served(config(MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true), team);
    check_served(config(MAP_EXP, MIXING_UNIFIED, WINDOW_SLIDING, false, true), team);
    check_served(config(MAP_EXP, MIXING_UNIFIED, WINDOW_NONE, true, false), team);
    check_served(config(MAP_SOFTMAX2, MIXING_LOLCATS, WINDOW_TERRACED, true, false), team);
    check_served(config(MAP_JOINT_SOFTMAX, MIXING_UNIFIED, WINDOW_TERRACED, false, true), team);
    team_free(team);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradients_of_the_exp_map_are_those_of_the_definition),
        cmocka_unit_test(test_gradients_of_lolcats_map_and_mixing_are_those_of_the_definition),
        cmocka_unit_test(test_parts_of_the_rows_teach_what_all_do),
        cmocka_unit_test(test_gradients_of_flas_map_and_of_no_window_are_those_of_the_definition),
        cmocka_unit_test(test_calibration_puts_both_kinds_of_terms_on_one_scale),
        cmocka_unit_test(test_rows_without_linear_keys_are_softmax_rows),
        cmocka_unit_test(test_what_is_trained_is_what_is_served),
    };
    int failed = 0;
    for (int isa = CPU_AVX512; isa >= CPU_GENERIC; isa--) { /* whichever of them this machine has */
        cpu_isa_limit((enum cpu_isa)isa);
        if ((int)cpu_isa() == isa) failed += cmocka_run_group_tests(tests, NULL, NULL);
    }
    return failed;
}
