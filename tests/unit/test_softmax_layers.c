/* test_softmax_layers.c - models in which some layers kept softmax attention beside Hedgehog's. */
#include "model/model.h"
#include "tiny_model.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum { V = TINY_VOCAB, N = 150 };

static struct team *team;
static char folder[64], said[512];

static int new_folder(void **state) {
    (void)state;
    strcpy(folder, "/tmp/urchin-softmax-XXXXXX");
    if (!mkdtemp(folder)) return -1;
    tiny_write(folder);
    return 0;
}
static int remove_folder(void **state) {
    char command[128];
    (void)state;
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command);
}

/* urchin.json with these softmax layers (JSON text; NULL: no converted model at all), and the maps
 * of layers that have_maps names. */
static void make(const char *layers, const bool have_maps[TINY_LAYERS]) {
    enum { D = TINY_HEAD_DIM, f = 8 };
    char path[PATH_MAX], text[1200];
    tiny_path(path, folder, "urchin.json");
    unlink(path);
    if (!layers) return;
    snprintf(text, sizeof text,
             "{\"format\":1,\"name\":\"tiny\",\"base\":null,\"low_rank\":null,\"attention\":%.*s,"
             "\"softmax_layers\":%s}}",
             (int)strlen(TINY_ATTENTION) - 1, TINY_ATTENTION, layers);
    write_text(path, text);
    struct st_writer w = {0};
    for (int i = 0; i < TINY_LAYERS; i++) {
        uint32_t seed = 7 + (uint32_t)i;
        if (!have_maps[i]) continue;
        tiny_put(&w, "layers.", i, "attn.feature_map_q", 3, (int[]){TINY_HEADS, D, f}, 0.4f, &seed);
        tiny_put(&w, "layers.", i, "attn.feature_map_k", 3, (int[]){TINY_KV_HEADS, D, f}, 0.4f,
                 &seed);
        tiny_put(&w, "layers.", i, "attn.log_mix", 1, (int[]){TINY_HEADS}, 0.5f, &seed);
    }
    struct bytes b = st_finish(&w);
    tiny_path(path, folder, "hedgehog.safetensors"), write_bytes(path, b.at, b.len), free(b.at);
}

static enum err try_open(struct model **m, int64_t max_seq_len) {
    struct model_options o;
    model_options_init(&o);
    o.path = folder;
    o.n_slots = 3;
    o.max_rows = o.max_logits = N;
    o.max_seq_len = max_seq_len;
    o.team = team;
    return model_open(m, &o, said, sizeof said);
}

static struct model *open_made(const char *layers, bool first, bool second) {
    struct model *m = NULL;
    make(layers, (bool[]){first, second});
    if (try_open(&m, 0)) fail_msg("%s", said);
    return m;
}

static const int32_t *ids(void) {
    static int32_t list[N];
    uint32_t seed = 3;
    for (int i = 0; i < N; i++) {
        seed = seed * 1664525u + 1013904223u;
        list[i] = (int32_t)((seed >> 12) % V);
    }
    return list;
}

/* Tokens from .. from + n - 1 in chunks of `chunk` rows, all their logits into out. */
static void feed(struct model *m, int slot, int from, int n, int chunk, float *out) {
    for (int i = 0; i < n; i += chunk) {
        int rows = n - i < chunk ? n - i : chunk;
        struct model_run run = {
            .slot = slot, .n_rows = rows, .tokens = ids() + from + i, .n_logits = rows};
        const float *logits;
        assert_int_equal(model_step(m, &run, 1, &logits), OK);
        memcpy(out + (size_t)i * V, logits, (size_t)rows * V * sizeof *out);
    }
}

static float *all_logits(struct model *m, int chunk) {
    float *out = malloc((size_t)N * V * sizeof *out);
    model_slot_clear(m, 0);
    feed(m, 0, 0, N, chunk, out);
    return out;
}

static void assert_same(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (a[i] != b[i]) fail_msg("logit %zu of %zu is %g, not %g", i, n, b[i], a[i]);
}

/* ---- what they compute ---- */
static void test_all_layers_softmax_is_the_base_to_the_bit(void **state) {
    (void)state;
    struct model *m = open_made(NULL, false, false);
    float *base = all_logits(m, N);
    model_close(m);
    m = open_made("[0,1]", false, false);
    assert_int_equal(model_info(m)->attention.kind, ATTENTION_SOFTMAX);
    assert_null(model_info(m)->softmax_layers);
    float *all = all_logits(m, 7);
    assert_same(base, all, (size_t)N * V);
    free(all);
    free(base);
    model_close(m);
}

struct taken {
    int layer;
    float *qkv;
};
static void take(void *arg, int layer, const float *qkv, int n_rows) {
    struct taken *t = arg;
    size_t row = (TINY_HEADS + 2 * TINY_KV_HEADS) * TINY_HEAD_DIM;
    if (layer != t->layer) return;
    t->qkv = malloc((size_t)n_rows * row * sizeof *t->qkv);
    memcpy(t->qkv, qkv, (size_t)n_rows * row * sizeof *t->qkv);
}
/* What layer 1 attends with: it shows what layer 0 gave. */
static float *second_layer(struct model *m) {
    struct taken t = {.layer = 1};
    model_set_tap(m, take, &t);
    free(all_logits(m, N));
    model_set_tap(m, NULL, NULL);
    model_close(m);
    return t.qkv;
}

static void test_each_layer_is_of_its_own_kind(void **state) {
    (void)state;
    size_t n = (size_t)N * (TINY_HEADS + 2 * TINY_KV_HEADS) * TINY_HEAD_DIM;
    float *base = second_layer(open_made(NULL, false, false)),
          *hedgehog = second_layer(open_made("[]", true, true)),
          *first = second_layer(open_made("[0]", false, true)),
          *second = second_layer(open_made("[1]", true, false));
    assert_same(base, first, n);
    assert_same(hedgehog, second, n);
    assert_memory_not_equal(base, hedgehog, n * sizeof *base);
    struct model *a = open_made("[]", true, true), *b = open_made("[1]", true, false);
    float *x = all_logits(a, N), *y = all_logits(b, N);
    assert_same(x, y, V); /* the first token sees itself alone */
    assert_memory_not_equal(x, y, (size_t)N * V * sizeof *x);
    assert_int_equal(model_info(b)->n_softmax_layers, 1);
    assert_true(model_info(b)->softmax_layers[1] && !model_info(b)->softmax_layers[0]);
    model_close(a);
    model_close(b);
    float *all[] = {base, hedgehog, first, second, x, y};
    for (int i = 0; i < 6; i++)
        free(all[i]);
}

static void test_any_cut_of_a_prompt_gives_the_same_bits(void **state) {
    (void)state;
    for (int layer = 0; layer < 2; layer++) {
        struct model *m = open_made(layer ? "[1]" : "[0]", layer == 1, layer == 0);
        float *whole = all_logits(m, N);
        static const int chunks[] = {1, 7, 16, 33, 149};
        for (int i = 0; i < 5; i++) {
            float *cut = all_logits(m, chunks[i]);
            assert_same(whole, cut, (size_t)N * V);
            free(cut);
        }
        /* two sequences side by side, in slots that held others */
        float *rows = malloc((size_t)N * V * sizeof *rows);
        feed(m, 1, 3, 60, 60, rows);
        model_slot_clear(m, 1);
        model_slot_clear(m, 2);
        for (int i = 0; i < 70; i++) {
            struct model_run runs[] = {
                {.slot = 2, .n_rows = 1, .tokens = ids() + i, .n_logits = 1},
                {.slot = 1, .n_rows = 2, .tokens = ids() + 2 * i, .n_logits = 2}};
            const float *logits;
            assert_int_equal(model_step(m, runs, 2, &logits), OK);
            assert_same(whole + (size_t)i * V, logits, V);
            assert_same(whole + (size_t)2 * i * V, logits + V, 2 * V);
        }
        free(rows);
        free(whole);
        model_close(m);
    }
}

/* ---- states ---- */
static void test_a_saved_sequence_goes_on_with_the_same_bits(void **state) {
    (void)state;
    struct model *m = open_made("[0]", false, true);
    float *whole = all_logits(m, N), *rest = malloc((size_t)N * V * sizeof *rest);
    size_t last = 0;
    static const int cuts[] = {0, 1, 31, 32, 77, 149};
    for (int i = 0; i < 6; i++) {
        int cut = cuts[i];
        model_slot_clear(m, 0);
        if (cut) feed(m, 0, 0, cut, 40, rest);
        assert_int_equal(model_slot_position(m, 0), cut);
        size_t bytes = model_slot_state_bytes(m, 0);
        assert_true(bytes > last); /* it grows, and says so */
        last = bytes;
        char *saved = malloc(bytes), *again = malloc(bytes);
        assert_int_equal(model_slot_save(m, 0, saved), OK);
        model_slot_copy(m, 1, 0);
        feed(m, 1, cut, N - cut, 13, rest);
        assert_same(whole + (size_t)cut * V, rest, (size_t)(N - cut) * V);
        if (model_slot_load(m, 2, saved, bytes, said, sizeof said)) fail_msg("%s", said);
        assert_int_equal(model_slot_save(m, 2, again), OK);
        assert_memory_equal(saved, again, bytes);
        feed(m, 2, cut, N - cut, 50, rest);
        assert_same(whole + (size_t)cut * V, rest, (size_t)(N - cut) * V);
        free(saved);
        free(again);
    }
    free(rest);
    free(whole);
    model_close(m);
}

static void test_damaged_states_are_refused_and_the_slot_is_empty(void **state) {
    (void)state;
    struct model *m = open_made("[0]", false, true);
    float *logits = malloc((size_t)N * V * sizeof *logits);
    feed(m, 0, 0, 50, 50, logits);
    feed(m, 1, 0, 51, 51, logits);
    free(logits);
    size_t bytes = model_slot_state_bytes(m, 0), more = model_slot_state_bytes(m, 1), one = 0;
    char *a = malloc(more), *b = malloc(more);
    assert_int_equal(model_slot_save(m, 0, a), OK);
    assert_int_equal(model_slot_save(m, 1, b), OK);
    /* the second header: where the magic word stands again */
    for (one = 8; memcmp(b + one, b, 8); one++)
        assert_true(one < more);
    for (size_t cut = 0; cut < bytes; cut += bytes / 9)
        assert_int_equal(model_slot_load(m, 2, a, cut, said, sizeof said), ERR_FORMAT);
    memcpy(b, a, one); /* Hedgehog at 50, softmax at 51 */
    assert_int_equal(model_slot_load(m, 2, b, more, said, sizeof said), ERR_FORMAT);
    assert_non_null(strstr(said, "51"));
    assert_int_equal(model_slot_position(m, 2), 0);
    a[one] ^= 1;
    assert_int_equal(model_slot_load(m, 2, a, bytes, said, sizeof said), ERR_FORMAT);
    a[one] ^= 1;
    memset(a + bytes - 4, 0xff, 4); /* a value that is no number */
    assert_int_equal(model_slot_load(m, 2, a, bytes, said, sizeof said), ERR_FORMAT);
    assert_int_equal(model_slot_position(m, 2), 0);
    free(a);
    free(b);
    model_close(m);
}

static void test_the_cache_has_as_many_rows_as_max_seq_len_says(void **state) {
    (void)state;
    struct model *m = open_made("[1]", true, false);
    assert_int_equal(model_info(m)->max_seq_len, 512); /* the base's context */
    size_t whole = model_info(m)->slot_bytes;
    model_close(m);
    assert_int_equal(try_open(&m, 100), OK);
    assert_int_equal(model_info(m)->max_seq_len, 100);
    assert_true(model_info(m)->slot_bytes < whole);
    float *logits = malloc((size_t)N * V * sizeof *logits);
    feed(m, 0, 0, 100, 30, logits);
    struct model_run run = {.n_rows = 1, .tokens = ids()};
    const float *none;
    assert_int_equal(model_step(m, &run, 1, &none), ERR_ARG);
    assert_int_equal(model_slot_position(m, 0), 100);
    free(logits);
    model_close(m);
}

/* ---- what is refused ---- */
static void test_lists_that_do_not_fit_are_named(void **state) {
    (void)state;
    static const struct {
        const char *layers, *says;
        bool maps[TINY_LAYERS];
    } cases[] = {
        {"[2]", "names layer 2, but the base has 2 layers", {true, true}},
        {"[1,0]", "ascending", {true, true}},
        {"[0,0]", "ascending", {true, true}},
        {"[-1]", "ascending", {true, true}},
        {"[0.5]", "ascending", {true, true}},
        {"1", "not a list", {true, true}},
        {"[0]", "layers.0.attn", {true, true}},
        {"[0]", "layers.1.attn.feature_map_q is missing", {false, false}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model *m = NULL;
        make(cases[i].layers, cases[i].maps);
        assert_int_equal(try_open(&m, 0), ERR_FORMAT);
        if (!strstr(said, cases[i].says)) fail_msg("'%s' does not say '%s'", said, cases[i].says);
    }
}

#define IN_FOLDER(name) cmocka_unit_test_setup_teardown(name, new_folder, remove_folder)

int main(void) {
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_all_layers_softmax_is_the_base_to_the_bit),
        IN_FOLDER(test_each_layer_is_of_its_own_kind),
        IN_FOLDER(test_any_cut_of_a_prompt_gives_the_same_bits),
        IN_FOLDER(test_a_saved_sequence_goes_on_with_the_same_bits),
        IN_FOLDER(test_damaged_states_are_refused_and_the_slot_is_empty),
        IN_FOLDER(test_the_cache_has_as_many_rows_as_max_seq_len_says),
        IN_FOLDER(test_lists_that_do_not_fit_are_named),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
