/* test_finetune_pass.c - forward and backward pass of a model that is fine-tuned: its gradients
 * against central differences of the definition in double (fine_reference.h), its forward against
 * the engine. */
#include "checkpoints.h"
#include "fine_reference.h"
#include "model/model.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum {
    T = 37,
    RANK = 3,
    SECOND = 15
}; /* tokens of the pack; the second document begins at SECOND */

static struct team *team;
static char folder[64];

static int new_folder(void **state) {
    (void)state;
    strcpy(folder, "/tmp/urchin-finetune-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}
static int remove_folder(void **state) {
    char command[128];
    (void)state;
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command);
}

static void fill(float *x, size_t n, float size, uint32_t seed) {
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = size * ((float)(seed >> 8) * 0x1p-23f - 1);
    }
}

/* A model in training: everything that can be in it. */
struct rig {
    struct base *base;
    struct rope *rope;
    struct attention_config attention;
    struct network *teacher, *network, *dnetwork;
    float *values, *dvalues; /* of the last two */
    float *maps, *dmaps, *low, *dlow;
    size_t n_maps, n_low;
    struct pupil *pupil;
    struct pack pack;
    int32_t tokens[T];
    int first[3];
    struct pupil_weights weights;
    struct pupil_gradients grads;
};

/* Retrieval heads, where there are any: not the same in both layers. */
static const bool some_heads[CHECK_L * CHECK_KV] = {[1] = true, [2] = true};

static void rig_new(struct rig *r, const char *type, struct attention_config a, const bool *softmax,
                    bool low_rank, bool full) {
    char msg[300] = "";
    *r = (struct rig){.attention = a};
    check_write(folder, type);
    if (base_open(&r->base, folder, msg, sizeof msg)) fail_msg("%s", msg);
    const struct base_config *c = base_config(r->base);
    r->attention.n_heads = c->n_heads;
    r->attention.n_kv_heads = c->n_kv_heads;
    r->attention.head_dim = c->head_dim;
    if (c->architecture == BASE_LLAMA)
        assert_int_equal(rope_new(&r->rope, &c->rope, msg, sizeof msg), OK);
    if (c->architecture == BASE_GPT2) r->attention.max_distance = 0;
    if (attention_config_check(&r->attention, msg, sizeof msg)) fail_msg("%s", msg);
    if (network_read(&r->teacher, r->base, team, msg, sizeof msg)) fail_msg("%s", msg);
    size_t n_values = r->teacher->n_values;
    r->values = calloc(n_values, sizeof *r->values);
    r->dvalues = calloc(n_values, sizeof *r->dvalues);
    memcpy(r->values, r->teacher->values, n_values * sizeof *r->values);
    assert_int_equal(network_over(&r->network, r->teacher, r->values), OK);
    assert_int_equal(network_over(&r->dnetwork, r->teacher, r->dvalues), OK);
    if (full) { /* away from the teacher */
        float *noise = calloc(r->network->n_values, sizeof *noise);
        fill(noise, r->network->n_values, 0.05f, 9);
        for (size_t i = 0; i < r->network->n_values; i++)
            r->network->values[i] += noise[i];
        free(noise);
    }
    size_t layers = (size_t)c->n_layers, per_layer = student_params(&r->attention);
    r->n_maps = layers * per_layer;
    r->n_low = layers * low_rank_floats(c, RANK);
    r->maps = calloc(r->n_maps, sizeof *r->maps);
    r->dmaps = calloc(r->n_maps, sizeof *r->maps);
    r->low = calloc(r->n_low, sizeof *r->low);
    r->dlow = calloc(r->n_low, sizeof *r->low);
    fill(r->maps, r->n_maps, 0.3f, 3);
    for (size_t i = 0; i < layers; i++)
        for (size_t h = student_mix(&r->attention); h < per_layer; h++)
            r->maps[i * per_layer + h] -= 0.7f;
    fill(r->low, r->n_low, 0.3f, 4);
    for (int i = 0; i < T; i++)
        r->tokens[i] = (i * i * 7 + 3 * i) % (i % 3 ? 23 : c->vocab_size);
    r->first[1] = SECOND;
    r->first[2] = T;
    r->pack = (struct pack){.tokens = r->tokens, .first = r->first, .n = T, .n_documents = 2};
    r->weights = (struct pupil_weights){.network = full ? r->network : r->teacher,
                                        .maps = r->maps,
                                        .low_rank = low_rank ? r->low : NULL,
                                        .rank = RANK,
                                        .scale = 0.5f};
    r->grads = (struct pupil_gradients){.network = full ? r->dnetwork : NULL,
                                        .maps = r->dmaps,
                                        .low_rank = low_rank ? r->dlow : NULL};
    struct pupil_options o = {.base = r->teacher,
                              .attention = &r->attention,
                              .softmax = softmax,
                              .retrieval = a.retrieval_size ? some_heads : NULL,
                              .rope = r->rope,
                              .team = team,
                              .max_tokens = T + 2,
                              .max_rank = RANK};
    assert_int_equal(pupil_new(&r->pupil, &o), OK);
}

static void rig_free(struct rig *r) {
    pupil_free(r->pupil);
    network_free(r->teacher), network_free(r->network), network_free(r->dnetwork);
    free(r->values), free(r->dvalues);
    free(r->maps), free(r->dmaps), free(r->low), free(r->dlow);
    rope_free(r->rope);
    base_close(r->base);
}

static double *doubles(const float *x, size_t n) {
    double *out = ref_new(n);
    for (size_t i = 0; i < n; i++)
        out[i] = x[i];
    return out;
}

/* The derivative of the loss along the gradient itself must be the gradient's length, and single
 * ones must be the single ones: for n values of which gradient g was computed. */
static void check_part(const char *what, struct fine_reference *ref, const double *base,
                       double *values, const float *g, size_t n) {
    double length = 0, largest = 0, step = 1e-4;
    double *was = ref_new(n);
    memcpy(was, values, n * sizeof *was);
    size_t at[3] = {0, n / 3, n - 1};
    for (size_t i = 0; i < n; i++) {
        length += (double)g[i] * g[i];
        if (fabs((double)g[i]) > largest) largest = fabs((double)g[i]), at[0] = i;
    }
    length = sqrt(length);
    if (!(length > 1e-7)) fail_msg("%s: there is no gradient", what);
    for (int k = -1; k < 3; k++) {
        double want[2], got = k < 0 ? length : (double)g[at[k]];
        for (int side = 0; side < 2; side++) {
            double by = side ? -step : step;
            for (size_t i = 0; i < n; i++)
                values[i] = was[i] + (k < 0 ? by * (double)g[i] / length : i == at[k] ? by : 0);
            want[side] = ref_loss(ref, base);
        }
        double numeric = (want[0] - want[1]) / (2 * step);
        /* differences: third derivatives times 1e-8 / 6, and rounding 1e-15 / 1e-4; gradients: fp32
         * sums over 37 rows, two layers and vocabulary, 1e-5 of the largest at most */
        double off = fabs(got - numeric), most = (k < 0 ? 1e-4 * length : 1e-4 * largest) + 1e-8;
        if (!(off <= most))
            fail_msg("%s, %d: %.9g, by differences %.9g (largest %.3g)", what, k, got, numeric,
                     largest);
    }
    memcpy(values, was, n * sizeof *was);
    free(was);
}

static void check_whole(const char *type, struct attention_config a, enum fine_loss loss,
                        bool low_rank, bool full, float *weight, const bool *softmax) {
    struct rig r;
    rig_new(&r, type, a, softmax, low_rank, full);
    r.pack.weight = weight;
    const struct base_config *c = base_config(r.base);
    struct fine_sums sums = {0};
    const int64_t *sets[CHECK_L], *seen;
    /* which keys are cached, as the pass itself chooses */
    const float *rows;
    assert_int_equal(pupil_read(r.pupil, &r.weights, &r.pack, &rows), OK);
    for (int i = 0; i < c->n_layers; i++) {
        size_t n = (size_t)(c->n_kv_heads * attention_cache_most(&r.attention)) *
                   (size_t)(attention_back_blocks(&r.attention, SECOND) +
                            attention_back_blocks(&r.attention, T - SECOND));
        int64_t *copy = calloc(n + 1, sizeof *copy);
        assert_int_equal(pupil_cache(r.pupil, &r.weights, &r.pack, i, &seen), OK);
        memcpy(copy, seen, n * sizeof *copy);
        sets[i] = copy;
    }
    assert_int_equal(pupil_learn(r.pupil, &r.weights, &r.pack, loss, 1, &r.grads, &sums), OK);

    struct fine_reference ref = {
        .shape = r.teacher, .pack = &r.pack, .rank = RANK, .scale = 0.5, .rope_factor = 1};
    if (r.rope) ref.rope_base = 500000;
    if (!strcmp(type, "qwen2")) ref.rope_factor = 4;
    double *teacher = doubles(r.teacher->values, r.teacher->n_values);
    ref.values = teacher;
    double *base = loss == FINE_DISTILL ? ref_logits(&ref) : NULL;
    ref.attention = &r.attention;
    ref.softmax = softmax;
    ref.sets = sets;
    ref.values = doubles(r.weights.network->values, r.teacher->n_values);
    ref.maps = doubles(r.maps, r.n_maps);
    ref.low = low_rank ? doubles(r.low, r.n_low) : NULL;
    double want = ref_loss(&ref, base);
    if (!(fabs(sums.loss / sums.weight - want) <= 2e-5 * (1 + want)))
        fail_msg("loss %.9g, in double %.9g", sums.loss / sums.weight, want);

    size_t mix = student_mix(&r.attention), map_k = student_map_k(&r.attention),
           per = student_params(&r.attention);
    for (int i = 0; i < c->n_layers; i++) {
        size_t at = (size_t)i * per;
        bool kept = softmax && softmax[i];
        for (size_t k = at; kept && k < at + per; k++)
            assert_true(r.dmaps[k] == 0);
        if (!kept) {
            check_part("feature_map_q", &ref, base, ref.maps + at, r.dmaps + at, map_k);
            check_part("feature_map_k", &ref, base, ref.maps + at + map_k, r.dmaps + at + map_k,
                       mix - map_k);
        }
        if (!kept && a.window != WINDOW_NONE)
            check_part("mix", &ref, base, ref.maps + at + mix, r.dmaps + at + mix, per - mix);
        for (int t = 0; low_rank && t < N_LOW_RANK_TARGETS; t++) {
            struct low_rank_part p = low_rank_part(c, RANK, (enum low_rank_target)t);
            size_t l = (size_t)i * low_rank_floats(c, RANK);
            check_part("lora_A", &ref, base, ref.low + l + p.a, r.dlow + l + p.a,
                       (size_t)(RANK * p.n_in));
            check_part("lora_B", &ref, base, ref.low + l + p.b, r.dlow + l + p.b,
                       (size_t)(RANK * p.n_out));
        }
    }
    for (int part = 0; full && part < N_PARTS; part++)
        for (int i = 0; i < (part < PART_ATTN_NORM ? 1 : c->n_layers); i++) {
            const struct base_tensor *t = base_tensor(r.base, (enum base_part)part, i);
            if (!t) continue;
            char what[40];
            size_t offset =
                (size_t)(network_part(r.dnetwork, (enum base_part)part, i) - r.dnetwork->values);
            snprintf(what, sizeof what, "part %d of layer %d", part, i);
            check_part(what, &ref, base, ref.values + offset, r.dnetwork->values + offset,
                       (size_t)t->n_out * (size_t)t->n_in);
        }
    for (int i = 0; i < c->n_layers; i++)
        free((void *)sets[i]);
    free(base), free(teacher), free(ref.values), free(ref.maps), free(ref.low);
    rig_free(&r);
}

static void check(const char *type, struct attention_config a, enum fine_loss loss, bool low_rank,
                  bool full) {
    check_whole(type, a, loss, low_rank, full, NULL, NULL);
}

static struct attention_config
terraced(void) { /* cache, sinks, horizon and clamping all at work within 22 tokens */
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .map = MAP_EXP,
                                     .features = 5,
                                     .window = WINDOW_TERRACED,
                                     .window_size = 3,
                                     .sinks = 1,
                                     .cache_size = 4,
                                     .cache_recent = 1,
                                     .cache_age = 8,
                                     .horizon = 4,
                                     .mixing = MIXING_UNIFIED,
                                     .map_before_rope = true,
                                     .max_distance = 7};
}

static void test_gradients_of_low_rank_parts_and_maps_are_those_of_the_definition(void **state) {
    (void)state;
    check("llama", terraced(), FINE_DISTILL, true, false);
    struct attention_config a = terraced();
    a.map_before_rope = false;
    a.max_distance = 0;
    a.key_map_per_query_head = true;
    check("qwen2", a, FINE_NEXT_TOKEN, true, false);
}

static void test_gradients_with_retrieval_heads_are_those_of_the_definition(void **state) {
    (void)state;
    struct attention_config a = terraced();
    a.retrieval_size = 9, a.retrieval_recent = 2;
    check("llama", a, FINE_DISTILL, true, false);
    a.retrieval_size = 2;
    check("qwen2", a, FINE_NEXT_TOKEN, true, false);
    a.retrieval_size = 500; /* a slot larger than softmax's of so few tokens */
    check("llama", a, FINE_DISTILL, true, false);
}

static void test_gradients_of_all_weights_are_those_of_the_definition(void **state) {
    (void)state;
    check("llama", terraced(), FINE_NEXT_TOKEN, false, true);
    check("qwen2", terraced(), FINE_DISTILL, true, true);
    check("gpt2", terraced(), FINE_DISTILL, false, true);
}

static void test_gradients_of_lolcats_mixing_are_those_of_the_definition(void **state) {
    (void)state;
    struct attention_config a = terraced();
    a.mixing = MIXING_LOLCATS;
    a.map = MAP_SOFTMAX2;
    check("llama", a, FINE_DISTILL, true, false);
    a.map = MAP_EXP;
    a.map_before_rope = false;
    a.max_distance = 0;
    a.horizon = a.sinks = a.cache_size = a.cache_recent = a.cache_age = 0;
    a.key_map_per_query_head = true;
    check("llama", a, FINE_NEXT_TOKEN, true, false);
}

static void test_gradients_of_other_windows_are_those_of_the_definition(void **state) {
    (void)state;
    struct attention_config a = terraced();
    a.cache_size = a.cache_recent = a.cache_age = 0;
    a.window = WINDOW_SLIDING;
    a.sinks = 2;
    check("llama", a, FINE_DISTILL, true, false);
    a.map = MAP_JOINT_SOFTMAX;
    a.horizon = 0;
    check("gpt2", a, FINE_DISTILL, true, false);
    a.window = WINDOW_NONE;
    a.window_size = a.sinks = 0;
    a.max_distance = 0;
    a.map_before_rope = false;
    check("llama", a, FINE_DISTILL, true, false);
    a.map = MAP_EXP;
    a.horizon = 6;
    a.key_map_per_query_head = true;
    check("llama", a, FINE_NEXT_TOKEN, true, false);
}

static void test_gradients_beside_softmax_layers_are_those_of_the_definition(void **state) {
    (void)state;
    static const bool first[CHECK_L] = {true, false}, last[CHECK_L] = {false, true};
    check_whole("llama", terraced(), FINE_DISTILL, true, true, NULL, first);
    check_whole("qwen2", terraced(), FINE_NEXT_TOKEN, true, false, NULL, last);
    check_whole("gpt2", terraced(), FINE_DISTILL, false, true, NULL, last);
}

static void test_gradients_with_answers_are_those_of_the_weighted_mean(void **state) {
    (void)state;
    float weight[T] = {0};
    weight[9] = weight[10] = weight[30] = weight[T - 1] = 1;
    check_whole("llama", terraced(), FINE_DISTILL, true, false, weight, NULL);
    weight[SECOND] = 1; /* which no row predicts */
    check_whole("gpt2", terraced(), FINE_NEXT_TOKEN, true, true, weight, NULL);
}

/* A weight beside which the others vanish leaves the loss of one row, and the mean of those of all
 * rows is the loss without weights. */
static void test_a_heavy_row_has_the_loss_to_itself(void **state) {
    (void)state;
    for (enum fine_loss loss = FINE_DISTILL; loss <= FINE_NEXT_TOKEN; loss++) {
        struct rig r;
        rig_new(&r, "llama", terraced(), NULL, true, false);
        float weight[T];
        double sum = 0, lowest = INFINITY, highest = 0;
        struct fine_sums plain = {0}, light = {0}, last = {0};
        assert_int_equal(pupil_learn(r.pupil, &r.weights, &r.pack, loss, 1, NULL, &plain), OK);
        r.pack.weight = weight;
        memset(weight, 0, sizeof weight);
        weight[0] = weight[SECOND] = 1; /* which no row predicts */
        assert_int_equal(pupil_learn(r.pupil, &r.weights, &r.pack, loss, 1, NULL, &light), OK);
        assert_true(light.loss == plain.loss && light.weight == plain.weight);
        int rows = 0;
        for (int n = 0; n < T - 1; n++) {
            if (n + 1 == SECOND) continue;
            struct fine_sums one = {0};
            memset(weight, 0, sizeof weight);
            weight[n + 1] = 1e9f;
            assert_int_equal(pupil_learn(r.pupil, &r.weights, &r.pack, loss, 1, NULL, &one), OK);
            double row = one.loss / one.weight;
            sum += row;
            lowest = fmin(lowest, row), highest = fmax(highest, row);
            rows++;
        }
        assert_true(highest > 1.05 * lowest); /* else nothing was asked */
        if (loss == FINE_DISTILL) { /* a document's last rows: the rest of two packs without them */
            assert_int_equal((int)plain.weight, T);
            for (int d = 0; d < 2; d++) {
                int end = d ? T : SECOND, first[] = {0, end - r.first[d]};
                struct pack whole = {.tokens = r.tokens + r.first[d],
                                     .first = first,
                                     .n = first[1],
                                     .n_documents = 1},
                            less = whole;
                int shorter[] = {0, first[1] - 1};
                less.first = shorter;
                less.n--;
                struct fine_sums a = {0}, b = {0};
                assert_int_equal(pupil_learn(r.pupil, &r.weights, &whole, loss, 1, NULL, &a), OK);
                assert_int_equal(pupil_learn(r.pupil, &r.weights, &less, loss, 1, NULL, &b), OK);
                last.loss += a.loss - b.loss;
                rows++;
            }
        }
        assert_int_equal(rows, (int)plain.weight);
        /* fp32 losses of 37 rows, 1e-7 of their logits each; the other rows weigh 1e-8 of one */
        assert_true(fabs(sum + last.loss - plain.loss) <= 1e-5 * (1 + plain.loss));
        rig_free(&r);
    }
}

/* Logits of tokens [n] by the engine, with fp32 weights, keys and values, beside those of the pass
 * over the same files. */
static void compare(const char *path, int64_t horizon, int n, bool converted) {
    char msg[300] = "";
    struct model_options o;
    model_options_init(&o);
    o.path = path;
    o.weights = WEIGHT_FP32;
    o.kv_type = KV_FP32;
    o.horizon = horizon;
    o.max_logits = o.max_rows = n;
    o.n_slots = 1;
    o.team = team;
    struct model *m;
    if (model_open(&m, &o, msg, sizeof msg)) fail_msg("%s", msg);
    const struct model_info *info = model_info(m);
    struct base *base;
    struct converted *c = NULL;
    struct network *network;
    if (base_open(&base, path, msg, sizeof msg)) fail_msg("%s", msg);
    if (network_read(&network, base, team, msg, sizeof msg)) fail_msg("%s", msg);
    const struct base_config *config = base_config(base);
    struct attention_config a = info->attention;
    struct pupil_weights w = {.network = network};
    float *maps = NULL, *low = NULL;
    if (converted) {
        if (converted_open(&c, path, msg, sizeof msg) ||
            converted_lay_over(c, config, msg, sizeof msg))
            fail_msg("%s", msg);
        size_t per = student_params(&a), low_per = low_rank_floats(config, c->rank);
        w.maps = maps = calloc(per * (size_t)config->n_layers, sizeof *maps);
        w.low_rank = low = calloc(low_per * (size_t)config->n_layers, sizeof *low);
        w.rank = c->rank;
        w.scale = c->scale;
        for (int i = 0; i < config->n_layers; i++) {
            float *to = maps + (size_t)i * per;
            if (!info->softmax_layers || !info->softmax_layers[i]) {
                memcpy(to, c->layers[i].map_q, student_map_k(&a) * sizeof *to);
                memcpy(to + student_map_k(&a), c->layers[i].map_k,
                       (student_mix(&a) - student_map_k(&a)) * sizeof *to);
                memcpy(to + student_mix(&a), c->layers[i].mix,
                       (per - student_mix(&a)) * sizeof *to);
            }
            for (int t = 0; t < N_LOW_RANK_TARGETS; t++) {
                struct low_rank_part p = low_rank_part(config, c->rank, (enum low_rank_target)t);
                float *at = low + (size_t)i * low_per;
                if (!c->targets[t]) continue;
                memcpy(at + p.a, c->layers[i].low_rank[t].a,
                       (size_t)(c->rank * p.n_in) * sizeof *at);
                memcpy(at + p.b, c->layers[i].low_rank[t].b,
                       (size_t)(c->rank * p.n_out) * sizeof *at);
            }
        }
    } else {
        a = (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                      .n_heads = config->n_heads,
                                      .n_kv_heads = config->n_kv_heads,
                                      .head_dim = config->head_dim,
                                      .features = 8};
    }
    struct pupil_options options = {.base = network,
                                    .attention = &a,
                                    .softmax = info->softmax_layers,
                                    .rope = model_rope(m),
                                    .team = team,
                                    .max_tokens = n,
                                    .max_rank = c ? c->rank : 0};
    struct pupil *p;
    assert_int_equal(pupil_new(&p, &options), OK);
    int32_t *tokens = calloc((size_t)n, sizeof *tokens);
    for (int i = 0; i < n; i++)
        tokens[i] = (i * i * 3 + i % 11 * 7 + 3) % (i % 5 ? 90 : config->vocab_size);
    int first[] = {0, n};
    struct pack pack = {.tokens = tokens, .first = first, .n = n, .n_documents = 1};
    const float *rows, *logits;
    assert_int_equal(pupil_read(p, converted ? &w : NULL, &pack, &rows), OK);
    struct model_run run = {.n_rows = n, .tokens = tokens, .n_logits = n};
    assert_int_equal(model_step(m, &run, 1, &logits), OK);
    double off = 0, size = 0;
    for (int i = 0; i < n; i++)
        for (int v = 0; v < config->vocab_size; v++) {
            double mine = 0,
                   theirs = (double)logits[(size_t)i * (size_t)config->vocab_size + (size_t)v];
            for (int e = 0; e < config->hidden_dim; e++)
                mine += (double)rows[i * config->hidden_dim + e] *
                        network->head[v * config->hidden_dim + e];
            off = fmax(off, fabs(mine - theirs));
            size = fmax(size, fabs(theirs));
        }
    /* fp32 sums of some hundred terms in another order, five layers: 1e-6 each */
    if (!(off <= 3e-5 * size)) fail_msg("%s: logits differ by %.3g of %.3g", path, off, size);
    free(tokens), free(maps), free(low);
    pupil_free(p);
    converted_close(c);
    network_free(network);
    base_close(base);
    model_close(m);
}

/* The tiny model with that layer softmax; tiny_write's otherwise. */
static void without_maps(int kept) {
    enum { E = TINY_HIDDEN, D = TINY_HEAD_DIM, f = 8, Q = TINY_HEADS * D, RANK_2 = 2 };
    char path[PATH_MAX], text[1200];
    snprintf(text, sizeof text,
             "{\"format\":1,\"name\":\"tiny\",\"base\":null,\"low_rank\":%s,\"attention\":%.*s,"
             "\"softmax_layers\":[%d]}}",
             TINY_LOW_RANK, (int)strlen(TINY_ATTENTION) - 1, TINY_ATTENTION, kept);
    tiny_path(path, folder, "urchin.json"), write_text(path, text);
    struct st_writer w = {0};
    for (int i = 0; i < TINY_LAYERS; i++) {
        uint32_t seed = 7 + (uint32_t)i;
        const struct {
            const char *name;
            int n_dims, dims[3];
        } parts[] = {{"attn.feature_map_q", 3, {TINY_HEADS, D, f}},
                     {"attn.feature_map_k", 3, {TINY_KV_HEADS, D, f}},
                     {"attn.log_mix", 1, {TINY_HEADS}},
                     {"attn.q_proj.lora_A", 2, {RANK_2, E}},
                     {"attn.q_proj.lora_B", 2, {Q, RANK_2}},
                     {"attn.o_proj.lora_A", 2, {RANK_2, Q}},
                     {"attn.o_proj.lora_B", 2, {E, RANK_2}}};
        for (size_t k = i == kept ? 3 : 0; k < sizeof parts / sizeof *parts; k++)
            tiny_put(&w, "layers.", i, parts[k].name, parts[k].n_dims, parts[k].dims, 0.4f, &seed);
    }
    struct bytes b = st_finish(&w);
    tiny_path(path, folder, "hedgehog.safetensors"), write_bytes(path, b.at, b.len), free(b.at);
}

static void test_the_pass_reads_as_the_engine_serves(void **state) {
    (void)state;
    tiny_write(folder); /* map_position none, cache, horizon, clamped keys */
    compare(folder, -1, 300, true);
    for (int kept = 0; kept < TINY_LAYERS; kept++) {
        without_maps(kept);
        compare(folder, -1, 300, true);
    }
    compare("models/stories260k-hedgehog", 40, 300, true); /* maps after RoPE */
    compare("models/stories260k-hedgehog", -1, 300, true);
    compare("tests/data/models/stories260k", -1, 200, false); /* the teacher */
}

#define IN_FOLDER(name) cmocka_unit_test_setup_teardown(name, new_folder, remove_folder)

int main(void) {
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_the_pass_reads_as_the_engine_serves),
        IN_FOLDER(test_gradients_of_low_rank_parts_and_maps_are_those_of_the_definition),
        IN_FOLDER(test_gradients_with_retrieval_heads_are_those_of_the_definition),
        IN_FOLDER(test_gradients_of_all_weights_are_those_of_the_definition),
        IN_FOLDER(test_gradients_of_lolcats_mixing_are_those_of_the_definition),
        IN_FOLDER(test_gradients_of_other_windows_are_those_of_the_definition),
        IN_FOLDER(test_gradients_beside_softmax_layers_are_those_of_the_definition),
        IN_FOLDER(test_gradients_with_answers_are_those_of_the_weighted_mean),
        IN_FOLDER(test_a_heavy_row_has_the_loss_to_itself),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
