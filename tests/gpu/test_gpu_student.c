/* test_gpu_student.c - losses and gradients of attention transfer on a device beside student.c's.
 */
#include "tests/gpu/training_device.h"

#include "attention/rope.h"
#include "convert/gpu_student.h"

/* ---- lessons ---- */
enum { LAYERS = 3 };

struct shape {
    int H, KV, D, f, n_documents, T, R;
    const int *first, *rows;
};

/* A tile and a bit of rows, of documents of 20 and 41 tokens. */
static const int small_first[] = {0, 20, 61};
static const int small_rows[] = {3,  7,  11, 15, 19, 21, 22, 24, 26, 28, 30, 31,
                                 33, 35, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46,
                                 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 60};
static const struct shape small = {4, 2, 6, 5, 2, 61, 35, small_first, small_rows};

/* Four key tiles, and two of rows of which the second sees none of the first's keys; documents that
 * no row is of. */
static const int many_first[] = {0, 70, 75, 131, 150, 203};
static const int many_rows[] = {20, 21, 22, 23, 24, 25, 26,  27,  28,  29,  30,  31, 32,
                                33, 34, 35, 36, 37, 38, 39,  40,  41,  42,  43,  44, 45,
                                46, 47, 48, 49, 50, 51, 140, 149, 151, 160, 199, 202};
static const struct shape many = {6, 3, 8, 8, 5, 203, 38, many_first, many_rows};

/* SmolLM2's heads and a sequence of conversion's usual size: 80 rows of two documents. */
static const int real_first[] = {0, 700, 1024};
static int real_rows[80];
static const struct shape real = {3, 1, 64, 64, 2, 1024, 80, real_first, real_rows};

static struct attention_config config(const struct shape *s, enum feature_map map,
                                      enum mixing mixing, enum window_rule window, bool per_query,
                                      bool before_rope) {
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .n_heads = s->H,
                                     .n_kv_heads = s->KV,
                                     .head_dim = s->D,
                                     .map = map,
                                     .features = s->f,
                                     .key_map_per_query_head = per_query,
                                     .window = window,
                                     .window_size = window == WINDOW_NONE ? 0 : 4,
                                     .sinks = window == WINDOW_NONE ? 0 : 2,
                                     .mixing = mixing,
                                     .map_before_rope = before_rope,
                                     .max_distance = before_rope ? 15 : 0};
}

struct taught { /* a lesson on the host, the same on the device, and parameters */
    struct attention_config c;
    struct lesson lesson;
    struct gpu_lesson *device;
    float *kv, *q, *cosines, *sines, *far, *params;
    size_t n_params;
};

static void fill_device(struct taught *t, const float *kv, const float *q) {
    size_t layers = LAYERS, heads = (size_t)t->c.n_heads, kv_heads = (size_t)t->c.n_kv_heads,
           D = (size_t)t->c.head_dim;
    gpu_lesson_plan(t->device, &t->lesson);
    gpu_upload(gpu, t->device->kv, kv, layers * (size_t)t->lesson.n_tokens * 2 * kv_heads * D * 4);
    gpu_upload(gpu, t->device->q, q, layers * (size_t)t->lesson.n_rows * heads * D * 4);
    assert_int_equal(gpu_wait(gpu), OK);
}

static struct taught teach(const struct shape *s, struct attention_config c, bool rope) {
    size_t D = (size_t)s->D, T = (size_t)s->T, kv = LAYERS * T * 2 * (size_t)s->KV * D,
           q = LAYERS * (size_t)s->R * (size_t)s->H * D;
    struct taught t = {.c = c,
                       .kv = uniforms(kv, 1.5f, 1),
                       .q = uniforms(q, s->D > 8 ? 1 : 2.5f, 2),
                       .cosines = nans(T * D / 2),
                       .sines = nans(T * D / 2),
                       .far = nans(D),
                       .n_params = student_params(&c)};
    struct rope *r;
    assert_int_equal(rope_new(&r, &(struct rope_config){.head_dim = s->D, .base = 100}, NULL, 0),
                     OK);
    for (int p = 0; p < s->T; p++)
        rope_angles(r, p, t.cosines + (size_t)p * D / 2, t.sines + (size_t)p * D / 2);
    rope_angles(r, c.max_distance, t.far, t.far + D / 2);
    rope_free(r);
    t.lesson = (struct lesson){.n_tokens = s->T,
                               .n_documents = s->n_documents,
                               .n_rows = s->R,
                               .first = s->first,
                               .rows = s->rows,
                               .kv = t.kv,
                               .q = t.q,
                               .cosines = rope ? t.cosines : NULL,
                               .sines = rope ? t.sines : NULL,
                               .far_cosines = t.far,
                               .far_sines = t.far + D / 2};
    t.params = uniforms(LAYERS * t.n_params, s->D > 8 ? 0.15f : 0.4f, 3);
    for (size_t l = 0; l < LAYERS; l++)
        for (size_t i = student_mix(&c); i < t.n_params; i++)
            t.params[l * t.n_params + i] -= 1;
    const float *const angles[] = {t.cosines, t.sines}, *const far[] = {t.far, t.far + D / 2};
    assert_int_equal(gpu_lesson_new(&t.device, gpu, &c, LAYERS, s->T, s->R, rope ? angles : NULL,
                                    rope ? far : NULL),
                     OK);
    fill_device(&t, t.kv, t.q);
    return t;
}

static void forget(struct taught *t) {
    float *all[] = {t->kv, t->q, t->cosines, t->sines, t->far, t->params};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    gpu_lesson_free(t->device);
}

/* Gradients alone; NULL: none. */
static void learn_on_device(const struct taught *t, struct gpu_student *s, float *grads,
                            const struct student_loss *loss, bool outputs,
                            struct student_sums *sums) {
    float *zeros = calloc(LAYERS * t->n_params, sizeof *zeros);
    memset(sums, 0, LAYERS * (size_t)t->c.n_heads * sizeof *sums);
    gpu_student_step(s, 0, 0, 1, 1, 1); /* sets gradients to zero */
    assert_int_equal(gpu_student_put(s, t->params, zeros, zeros), OK);
    assert_int_equal(gpu_student_learn(s, t->device, grads != NULL, loss, outputs, sums), OK);
    if (grads) assert_int_equal(gpu_student_grads(s, grads), OK);
    free(zeros);
}

static struct gpu_student *new_student(const struct taught *t, const bool *softmax, size_t memory) {
    struct gpu_student *s;
    assert_int_equal(gpu_student_new(&s, gpu, &t->c, LAYERS, softmax, t->lesson.n_tokens,
                                     t->lesson.n_rows, memory),
                     OK);
    return s;
}

/* ---- all of it beside student.c ---- */

static void learn_on_cpu(const struct taught *t, float *grads, const struct student_loss *loss,
                         bool outputs, struct student_sums *sums) {
    struct student_scratch *scratch;
    size_t heads = (size_t)t->c.n_heads;
    assert_int_equal(student_scratch_new(&scratch, &t->c, t->lesson.n_tokens, t->lesson.n_rows),
                     OK);
    for (int l = 0; l < LAYERS; l++)
        for (int g = 0; g < t->c.n_kv_heads; g++)
            student_learn(&t->c, &t->lesson, l, g, t->params + (size_t)l * t->n_params,
                          grads ? grads + (size_t)l * t->n_params : NULL, loss, outputs,
                          sums + (size_t)l * heads, scratch);
    student_scratch_free(scratch);
}

/* Both are fp32: sums of up to 203 terms, logarithms and exponentials to a few ulp.  A row's
 * numbers are of order 1 and either's within 3e-6 of the definition, gradients within 2e-5 of the
 * largest of a layer (test_convert_student.c): twice that. */
static void compare(const struct taught *t, const float *want, const float *got,
                    const struct student_sums *sums, const struct student_sums *device_sums) {
    for (size_t l = 0; l < LAYERS; l++) {
        float largest = 0;
        const float *a = want + l * t->n_params, *b = got + l * t->n_params;
        for (size_t i = 0; i < t->n_params; i++)
            largest = fmaxf(largest, fabsf(a[i]));
        assert_true(largest > 1e-5f); /* there is something to compare */
        for (size_t i = 0; i < t->n_params; i++)
            if (!(fabsf(a[i] - b[i]) <= 4e-5f * largest))
                fail_msg("layer %zu, parameter %zu of %zu (keys from %zu, mix from %zu): %.9g, not "
                         "%.9g; the largest is %.3g",
                         l, i, t->n_params, student_map_k(&t->c), student_mix(&t->c), (double)b[i],
                         (double)a[i], (double)largest);
    }
    for (int h = 0; h < LAYERS * t->c.n_heads; h++) {
        const double *a = (const double *)&sums[h], *b = (const double *)&device_sums[h];
        for (int i = 0; i < GPU_SUMS; i++)
            if (!(fabs(a[i] - b[i]) <= 6e-6 * (fabs(a[i]) + sums[h].n_rows)))
                fail_msg("head %d, sum %d: %.9g, not %.9g", h, i, b[i], a[i]);
    }
}

static void check_loss(struct taught *t, struct gpu_student *s, struct student_loss loss) {
    size_t heads = LAYERS * (size_t)t->c.n_heads, n = LAYERS * t->n_params;
    float *want = calloc(n, sizeof *want), *got = calloc(n, sizeof *got);
    struct student_sums *sums = calloc(heads, sizeof *sums), *ours = calloc(heads, sizeof *ours);
    float *bad_kv = nans(LAYERS * (size_t)t->lesson.n_tokens * 2 *
                         (size_t)(t->c.n_kv_heads * t->c.head_dim)),
          *bad_q = nans(LAYERS * (size_t)t->lesson.n_rows * (size_t)(t->c.n_heads * t->c.head_dim));
    fill_device(t, bad_kv, bad_q); /* leaves NaN everywhere */
    learn_on_device(t, s, got, &loss, true, ours);
    fill_device(t, t->kv, t->q);
    learn_on_cpu(t, want, &loss, loss.mse > 0, sums);
    learn_on_device(t, s, got, &loss, loss.mse > 0, ours);
    compare(t, want, got, sums, ours);

    for (t->lesson.n_parts = 3, t->lesson.part = 0; t->lesson.part < 3; t->lesson.part++) {
        memset(want, 0, n * sizeof *want);
        memset(sums, 0, heads * sizeof *sums);
        gpu_lesson_plan(t->device, &t->lesson);
        learn_on_cpu(t, want, &loss, loss.mse > 0, sums);
        learn_on_device(t, s, got, &loss, loss.mse > 0, ours);
        compare(t, want, got, sums, ours);
    }
    t->lesson.n_parts = t->lesson.part = 0;
    gpu_lesson_plan(t->device, &t->lesson);

    memset(sums, 0, heads * sizeof *sums); /* the same without gradients, with outputs */
    learn_on_cpu(t, NULL, &loss, true, sums);
    learn_on_device(t, s, NULL, &loss, true, ours);
    compare(t, want, got, sums, ours);
    assert_true(ours[0].energy > 0);
    free(want), free(got), free(sums), free(ours), free(bad_kv), free(bad_q);
}

static void check(const struct shape *shape, struct attention_config c, bool rope,
                  struct student_loss loss) {
    struct taught t = teach(shape, c, rope);
    struct gpu_student *s = new_student(&t, NULL, 0);
    check_loss(&t, s, loss);
    gpu_student_free(s);
    forget(&t);
}

static const struct student_loss rows_loss = {.ce = 1, .share = 0.5f},
                                 outputs_loss = {.mse = 3, .share = 1},
                                 both = {.ce = 0.7f, .mse = 2, .share = 1};

static void test_the_exp_map_learns_as_on_the_cpu(void **state) {
    (void)state;
    check(&small, config(&small, MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true), true,
          rows_loss);
    check(&small, config(&small, MAP_EXP, MIXING_UNIFIED, WINDOW_SLIDING, false, true), true, both);
    check(&small, config(&small, MAP_EXP, MIXING_LOLCATS, WINDOW_TERRACED, false, false), true,
          both);
    check(&many, config(&many, MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true), true, both);
}

static void test_lolcats_learns_as_on_the_cpu(void **state) {
    (void)state;
    check(&small, config(&small, MAP_SOFTMAX2, MIXING_LOLCATS, WINDOW_TERRACED, true, false), true,
          outputs_loss);
    check(&many, config(&many, MAP_SOFTMAX2, MIXING_LOLCATS, WINDOW_SLIDING, false, true), true,
          both);
}

static void test_other_maps_no_window_and_no_rope_learn_as_on_the_cpu(void **state) {
    (void)state;
    check(&small, config(&small, MAP_JOINT_SOFTMAX, MIXING_UNIFIED, WINDOW_TERRACED, true, true),
          true, both);
    check(&many, config(&many, MAP_EXP, MIXING_UNIFIED, WINDOW_NONE, true, false), true, both);
    check(&small, config(&small, MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true), false,
          both);
}

static void test_a_real_models_heads_learn_as_on_the_cpu(void **state) {
    (void)state;
    struct attention_config c =
        config(&real, MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true);
    c.window_size = 64;
    c.max_distance = 0;
    for (int r = 0; r < 80; r++)
        real_rows[r] = r < 50 ? 130 + 11 * r : 832 + (r - 50) * 6;
    check(&real, c, true, both);
}

/* Keys so large that exp is cut at 30, queries that would overflow without their shift. */
static void test_large_projections_are_cut_as_on_the_cpu(void **state) {
    (void)state;
    struct attention_config c =
        config(&small, MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true);
    struct taught t = teach(&small, c, true);
    for (size_t i = student_map_k(&c); i < student_mix(&c); i++)
        t.params[i] *= 22;
    for (size_t i = 0; i < student_map_k(&c); i++)
        t.params[i] *= 30;
    struct gpu_student *s = new_student(&t, NULL, 0);
    check_loss(&t, s, rows_loss);
    gpu_student_free(s);
    forget(&t);
}

/* ---- what changes no bit ---- */

static void test_neither_memory_nor_order_nor_other_layers_change_a_bit(void **state) {
    (void)state;
    struct taught t =
        teach(&many, config(&many, MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true), true);
    size_t heads = LAYERS * (size_t)t.c.n_heads, n = LAYERS * t.n_params,
           one = gpu_student_layer_bytes(&t.c, t.lesson.n_tokens, t.lesson.n_rows);
    float *want = calloc(n, sizeof *want), *got = calloc(n, sizeof *got);
    struct student_sums *sums = calloc(heads, sizeof *sums), *ours = calloc(heads, sizeof *ours);
    const bool middle[LAYERS] = {false, true, false};
    struct gpu_student *s = new_student(&t, NULL, 0);
    learn_on_device(&t, s, want, &both, true, sums);
    for (int way = 0; way < 4; way++) {
        struct gpu_student *other = new_student(&t, way == 3 ? middle : NULL,
                                                way == 1   ? one
                                                : way == 2 ? 2 * one + 300
                                                           : 0);
        emu_set_order(way == 0 ? 2 : 0, 11);
        learn_on_device(&t, other, got, &both, true, ours);
        emu_set_order(0, 0);
        for (size_t l = 0; l < LAYERS; l++) {
            if (way == 3 && middle[l]) { /* has nothing to learn */
                for (size_t i = 0; i < t.n_params; i++)
                    assert_true(got[l * t.n_params + i] == 0);
                continue;
            }
            size_t h = (size_t)t.c.n_heads;
            assert_memory_equal(got + l * t.n_params, want + l * t.n_params,
                                t.n_params * sizeof *got);
            assert_memory_equal(ours + l * h, sums + l * h, h * sizeof *sums);
        }
        gpu_student_free(other);
    }
    /* gradients and sums are added */
    learn_on_device(&t, s, got, &both, true, ours);
    assert_int_equal(gpu_student_learn(s, t.device, true, &both, true, ours), OK);
    assert_int_equal(gpu_student_grads(s, got), OK);
    assert_true(got[0] == 2 * want[0] && ours[0].kl == 2 * sums[0].kl);
    gpu_student_free(s);
    free(want), free(got), free(sums), free(ours);
    forget(&t);
}

static void test_what_does_not_fit_is_refused(void **state) {
    (void)state;
    struct taught t =
        teach(&small, config(&small, MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true), true);
    struct gpu_student *s = NULL;
    size_t one = gpu_student_layer_bytes(&t.c, t.lesson.n_tokens, t.lesson.n_rows);
    assert_int_equal(
        gpu_student_new(&s, gpu, &t.c, LAYERS, NULL, t.lesson.n_tokens, t.lesson.n_rows, one - 1),
        ERR_NOMEM);
    assert_null(s);
    forget(&t);
}

static void test_the_largest_are_exact(void **state) {
    (void)state;
    struct taught t =
        teach(&many, config(&many, MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true), true);
    struct gpu_student *s = new_student(&t, NULL, 0);
    const struct shape *m = &many;
    float q[LAYERS * 6], k[LAYERS * 3];
    memset(q, 0xff, sizeof q), memset(k, 0xff, sizeof k);
    assert_int_equal(gpu_student_largest(s, t.device, q, k), OK);
    for (int l = 0; l < LAYERS; l++)
        for (int h = 0; h < m->H; h++) {
            float most = 0, most_k = 0;
            for (int r = 0; r < m->R * m->D; r++)
                most =
                    fmaxf(most, fabsf(t.q[((l * m->R + r / m->D) * m->H + h) * m->D + r % m->D]));
            assert_true(most == q[l * m->H + h]);
            if (h >= m->KV) continue;
            for (int r = 0; r < m->T * m->D; r++)
                most_k = fmaxf(
                    most_k, fabsf(t.kv[((l * m->T + r / m->D) * 2 * m->KV + h) * m->D + r % m->D]));
            assert_true(most_k == k[l * m->KV + h]);
        }
    gpu_student_free(s);
    forget(&t);
}

/* ---- the step ---- */

/* A product or two of fp32 more or less fused: a few 2^-24 of w's step, m and v.  Norms are sums of
 * squares in double; the first layer's is cut. */
static void test_the_step_is_the_cpus(void **state) {
    (void)state;
    struct taught t =
        teach(&small, config(&small, MAP_EXP, MIXING_UNIFIED, WINDOW_TERRACED, false, true), true);
    struct gpu_student *s = new_student(&t, NULL, 0);
    size_t n = t.n_params, all = LAYERS * n, mix = student_mix(&t.c);
    float *m = uniforms(all, 0.1f, 8), *v = uniforms(all, 0.1f, 9), *w = nans(all),
          *grads = nans(all), *m_at = nans(all), *v_at = nans(all),
          *cpu_w = malloc(all * sizeof *cpu_w);
    struct student_sums sums[LAYERS * 4];
    double norms[LAYERS];
    memset(sums, 0, sizeof sums);
    memcpy(cpu_w, t.params, all * sizeof *cpu_w);
    for (size_t i = 0; i < all; i++)
        v[i] = v[i] * v[i];
    const struct student_loss loss = {.ce = 40, .share = 1};
    assert_int_equal(gpu_student_put(s, t.params, m, v), OK);
    assert_int_equal(gpu_student_learn(s, t.device, true, &loss, false, sums), OK);
    assert_int_equal(gpu_student_grads(s, grads), OK);
    assert_int_equal(gpu_student_norms(s, norms), OK);
    double most = norms[0] / 2;
    gpu_student_step(s, 0.02f, 0.05f, 1.5f, 2.5f, most);
    assert_int_equal(gpu_student_get(s, w, m_at, v_at), OK);
    for (size_t l = 0; l < LAYERS; l++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++)
            sum += (double)grads[l * n + i] * (double)grads[l * n + i];
        assert_true(fabs(norms[l] - sqrt(sum)) <= 1e-12 * sqrt(sum));
        float clip = norms[l] > most ? (float)(most / norms[l]) : 1;
        const struct convert_kernels *use = convert_kernels();
        for (int part = 0; part < 2; part++) {
            size_t at = l * n + (part ? mix : 0), len = part ? n - mix : mix;
            use->adam(cpu_w + at, m + at, v + at, grads + at, len, clip, part ? 0.05f : 0.02f, 1.5f,
                      2.5f);
        }
    }
    for (size_t i = 0; i < all; i++) {
        assert_true(fabsf(m[i] - m_at[i]) <= 0x1p-22f * (fabsf(m[i]) + 0.1f));
        assert_true(fabsf(v[i] - v_at[i]) <= 0x1p-22f * (fabsf(v[i]) + 0.01f));
        assert_true(fabsf(w[i] - cpu_w[i]) <= 0x1p-20f * (fabsf(w[i] - t.params[i]) + 0.1f));
        assert_true(fabsf(w[i] - t.params[i]) > 0);
    }
    assert_int_equal(gpu_student_grads(s, grads), OK);
    for (size_t i = 0; i < all; i++)
        assert_true(grads[i] == 0);
    assert_int_equal(gpu_student_norms(s, norms), OK);
    assert_true(norms[0] == 0);
    for (size_t i = 0; i < all; i++)
        t.params[i] = i / n == 2 ? NAN : t.params[i];
    assert_int_equal(gpu_student_put(s, t.params, m, v), OK);
    assert_int_equal(gpu_student_learn(s, t.device, true, &loss, false, sums), OK);
    assert_int_equal(gpu_student_norms(s, norms), OK);
    assert_true(norms[0] > 0 && norms[1] > 0 && isnan(norms[2]));
    gpu_student_free(s);
    free(m), free(v), free(w), free(grads), free(m_at), free(v_at), free(cpu_w);
    forget(&t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_exp_map_learns_as_on_the_cpu),
        cmocka_unit_test(test_lolcats_learns_as_on_the_cpu),
        cmocka_unit_test(test_other_maps_no_window_and_no_rope_learn_as_on_the_cpu),
        cmocka_unit_test(test_a_real_models_heads_learn_as_on_the_cpu),
        cmocka_unit_test(test_large_projections_are_cut_as_on_the_cpu),
        cmocka_unit_test(test_neither_memory_nor_order_nor_other_layers_change_a_bit),
        cmocka_unit_test(test_what_does_not_fit_is_refused),
        cmocka_unit_test(test_the_largest_are_exact),
        cmocka_unit_test(test_the_step_is_the_cpus),
    };
    return run_on_device(tests, sizeof tests / sizeof *tests);
}
