/* test_retrieval.c - retrieval heads: their score is the mass that the definition says, they are
 * chosen by it, and a conversion records, trains and serves with them. */
#include "convert/retrieval.h"
#include "convert_testing.h"
#include "model/model.h"
#include "smollm.h"

enum { L = 2, H = 4, KV = 2, D = 6, T = 40, ROWS = 9 };

static const struct attention_config config = {.kind = ATTENTION_HEDGEHOG,
                                               .n_heads = H,
                                               .n_kv_heads = KV,
                                               .head_dim = D,
                                               .window = WINDOW_TERRACED,
                                               .window_size = 4,
                                               .sinks = 1};

static float next(uint32_t *seed) {
    *seed = *seed * 1664525u + 1013904223u;
    return 3 * ((float)(*seed >> 8) * 0x1p-23f - 1);
}

static float kv[L * T * 2 * KV * D], q[L * ROWS * H * D], cosines[T * D / 2], sines[T * D / 2];
static int32_t tokens[T];
static float weight[T];

/* Two documents; of nine rows five predict an answer's token, of which four have linear keys. */
static void make(struct lesson *l, struct pack *p) {
    static const int first[] = {0, 17, T}, rows[ROWS] = {3, 9, 14, 16, 22, 26, 30, 35, 38};
    uint32_t seed = 5;
    for (size_t i = 0; i < sizeof kv / sizeof *kv; i++)
        kv[i] = next(&seed);
    for (size_t i = 0; i < sizeof q / sizeof *q; i++)
        q[i] = next(&seed);
    for (int i = 0; i < T * D / 2; i++) {
        cosines[i] = cosf((float)i);
        sines[i] = sinf((float)i);
    }
    for (int i = 0; i < T; i++) {
        tokens[i] = i * i % 5;
        weight[i] = i == 4 || i == 15 || i == 17 || i == 27 || i == 36 || i == 39;
    }
    *p = (struct pack){
        .tokens = tokens, .first = (int *)first, .weight = weight, .n = T, .n_documents = 2};
    *l = (struct lesson){.n_tokens = T,
                         .n_documents = 2,
                         .n_rows = ROWS,
                         .first = first,
                         .rows = rows,
                         .kv = kv,
                         .q = q,
                         .cosines = cosines,
                         .sines = sines};
}

static double turned(const float *x, int d, int position) {
    int half = D / 2, i = d % half;
    double c = cosines[position * half + i], s = sines[position * half + i];
    return d < half ? x[d] * c - x[d + half] * s : x[d] * c + x[d - half] * s;
}

/* The score of a query head over rows that predict an answer of their own document. */
static double definition(int layer, int head) {
    static const struct {
        int r, row, first;
    } answers[] = {{0, 3, 0}, {2, 14, 0}, {5, 26, 17}, {7, 35, 17}, {8, 38, 17}};
    double sum = 0;
    for (int a = 0; a < 5; a++) {
        int first = answers[a].first, n = answers[a].row - first, from = (n / 4 - 1) * 4;
        const float *qr = q + ((size_t)(layer * ROWS + answers[a].r) * H + (size_t)head) * D;
        double all = 0, found = 0;
        for (int j = 0; j <= n; j++) {
            const float *k =
                kv + ((size_t)(layer * T + first + j) * 2 * KV + (size_t)(head / 2)) * D;
            double dot = 0;
            for (int d = 0; d < D; d++)
                dot += turned(qr, d, n) * turned(k, d, j);
            double w = exp(dot / sqrt(D));
            all += w;
            bool linear = j >= 1 && j < from; /* past the sink, before the window */
            if (linear && tokens[first + j] == tokens[answers[a].row + 1]) found += w;
        }
        sum += found / all;
    }
    return sum;
}

/* fp32 scores under 40: exponents are good to 40 * 2^-22 */
static void test_a_score_is_the_mass_on_the_token_that_is_asked_for(void **state) {
    (void)state;
    struct lesson lesson;
    struct pack pack;
    struct retrieval r;
    double some = 0;
    make(&lesson, &pack);
    assert_int_equal(retrieval_begin(&r, &config, L), OK);
    for (int twice = 0; twice < 2; twice++)
        assert_int_equal(retrieval_add(&r, &config, &lesson, &pack, team), OK);
    assert_int_equal(r.n_rows, 10);
    for (int layer = 0; layer < L; layer++)
        for (int h = 0; h < H; h++) {
            double want = 2 * definition(layer, h);
            assert_true(fabs(r.sums[layer * H + h] - want) <= 1e-4 * (want + 1e-3));
            some += want;
        }
    assert_true(some > 0.1);
    retrieval_end(&r);
}

static void test_the_best_heads_are_chosen_and_none_that_looks_nothing_up(void **state) {
    (void)state;
    double sums[] = {1, 0, 6, 2, /* layer 1 */ 3, 9, 0.4, 0.1};
    struct retrieval r = {.n_layers = L, .sums = sums, .n_rows = 10};
    bool out[L * KV];
    double least;
    assert_int_equal(retrieval_choose(&r, &config, NULL, 0, 2, out, &least), 2);
    assert_true(!out[0] && out[1] && out[2] && !out[3] && fabs(least - 0.6) < 1e-9);
    assert_int_equal(retrieval_choose(&r, &config, NULL, 0, 4, out, &least),
                     3); /* 0.04 is too little */
    assert_true(out[0] && out[1] && out[2] && !out[3] && fabs(least - 0.1) < 1e-9);
    assert_int_equal(retrieval_choose(&r, &config, (const int[]){1}, 1, 4, out, &least), 2);
    assert_true(out[0] && out[1] && !out[2] && !out[3]);
    r.n_rows = 0; /* no text had an answer */
    assert_int_equal(retrieval_choose(&r, &config, NULL, 0, 4, out, &least), 0);
}

static const struct json *heads_of(const char *name, struct json **record) {
    assert_int_equal(json_load(record, in(name), said, sizeof said), OK);
    const struct json *cache = json_get(json_get(*record, "attention"), "cache");
    return json_get(json_get(cache, "retrieval"), "heads");
}

#define CONVERT_SHORT                                                                              \
    "convert", STORIES, "--text", TEXT, "--weights", "fp32", "--window-size", "16",                \
        "--cache-size", "8", "--long-every", "0", "--steps", "2", "--rows", "20",                  \
        "--finetune-steps", "2", "--rank", "2"

/* A base that looks nothing up gets no retrieval heads, and caches as without. */
static void test_a_base_that_looks_nothing_up_has_none(void **state) {
    (void)state;
    struct json *record;
    CONVERTED(CONVERT_SHORT, "--out", in("none"), "--retrieval-heads", "3", "--retrieval-size",
              "40");
    assert_non_null(strstr(said, "retrieval heads: none"));
    assert_null(heads_of("none/urchin.json", &record));
    json_free(record);
}

/* Of SmolLM2's 90 kv heads these two lead by far, whatever the text around the facts. */
static void test_a_bases_heads_are_found_recorded_and_served(void **state) {
    (void)state;
    const char *base = smollm_base();
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    base = NULL; /* minutes; the test above goes the same way */
#endif
    if (!base) skip();
    CONVERTED("convert", base, "--text", "tests/data/text", "--length", "600", "--long-every", "0",
              "--steps", "0", "--finetune", "none", "--out", in("found"), "--retrieval-heads", "2",
              "--retrieval-size", "64");
    struct model_options o;
    model_options_init(&o);
    o.path = in("found");
    o.n_slots = 1;
    o.team = team;
    struct model *m;
    if (model_open(&m, &o, said, sizeof said)) fail_msg("%s", said);
    const struct model_info *i = model_info(m);
    int n_kv = i->attention.n_kv_heads, flagged = 0;
    for (int h = 0; h < i->n_layers * n_kv; h++)
        flagged += i->retrieval[h];
    assert_int_equal(flagged, 2);
    assert_true(i->retrieval[17 * n_kv + 1] && i->retrieval[18 * n_kv + 2]);
    assert_true(i->attention.retrieval_size == 64 && i->attention.retrieval_recent == 8 &&
                i->attention.cache_size == 128 && i->attention.cache_recent == 96 &&
                i->attention.cache_fact_age == 32768);
    model_close(m);
}

/* What was found goes on with the rest: the base is not read for it again. */
static void test_heads_are_looked_for_once(void **state) {
    (void)state;
#define LOOKING CONVERT_SHORT, "--retrieval-heads", "3", "--retrieval-size", "40"
    CONVERTED(LOOKING, "--out", in("whole"));
    convert_interrupt_after(3); /* two of transfer, one of fine-tuning */
    assert_int_equal(CONVERT(LOOKING, "--out", in("cut")), 130);
    convert_interrupt_after(0);
    assert_non_null(strstr(said, "retrieval heads:"));
    CONVERTED(LOOKING, "--out", in("cut"));
    assert_non_null(strstr(said, "and fine-tuning"));
    assert_null(strstr(said, "retrieval heads:"));
    assert_same_file(in("whole/hedgehog.safetensors"), in("cut/hedgehog.safetensors"));
    assert_same_file(in("whole/urchin.json"), in("cut/urchin.json"));
}

static void test_named_heads_are_taken_as_they_are(void **state) {
    (void)state;
    struct json *record;
    CONVERTED(CONVERT_SHORT, "--out", in("named"), "--retrieval-heads", "0.3,2.1",
              "--retrieval-size", "40");
    const struct json *first = json_child(heads_of("named/urchin.json", &record));
    int64_t x[4];
    for (int i = 0; i < 4; i++) {
        const struct json *pair = i < 2 ? first : json_next(first), *at = json_child(pair);
        assert_true(json_int(i % 2 ? json_next(at) : at, &x[i]));
    }
    assert_true(x[0] == 0 && x[1] == 3 && x[2] == 2 && x[3] == 1);
    json_free(record);
    CONVERTED(CONVERT_SHORT, "--out", in("lolcats"), "--recipe", "lolcats", "--retrieval-heads", "1.1",
              "--retrieval-size", "40");
    assert_int_equal(json_size(heads_of("lolcats/urchin.json", &record)), 1);
    json_free(record);
    CONVERTED(CONVERT_SHORT, "--out", in("none"), "--retrieval-heads", "0");
    assert_null(heads_of("none/urchin.json", &record));
    json_free(record);
}

static void test_heads_that_cannot_be_are_named(void **state) {
    (void)state;
    static const char *const wrong[] = {"5.0", "1.4", "2.1,0.3", "1.1,1.1", "1.",
                                        "x",   "-1",  "1.1;2.0", "1.1,"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        REFUSED("--retrieval-heads", CONVERT_SHORT, "--out", in("no"), "--retrieval-heads",
                wrong[i]);
    REFUSED("--softmax-layers", CONVERT_SHORT, "--out", in("no"), "--retrieval-heads", "2.1",
            "--softmax-layers", "2");
    REFUSED("terraced", CONVERT_SHORT, "--out", in("no"), "--retrieval-heads", "2", "--window",
            "sliding");
}

int main(void) {
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_score_is_the_mass_on_the_token_that_is_asked_for),
        cmocka_unit_test(test_the_best_heads_are_chosen_and_none_that_looks_nothing_up),
        IN_FOLDER(test_a_base_that_looks_nothing_up_has_none),
        IN_FOLDER(test_a_bases_heads_are_found_recorded_and_served),
        IN_FOLDER(test_heads_are_looked_for_once),
        IN_FOLDER(test_named_heads_are_taken_as_they_are),
        IN_FOLDER(test_heads_that_cannot_be_are_named),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
