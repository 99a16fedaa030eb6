/* test_eval_heads.c - the weights that heads.c recomputes are those the engine used, and its sums
 * are their definition. */
#include "convert/heads.h"
#include "convert/picture.h"
#include "convert/rank.h"
#include "model_folder.h"

#include "attention/kernels.h"

enum { N = 300, H = TINY_HEADS, G = TINY_KV_HEADS, D = TINY_HEAD_DIM, L = TINY_LAYERS };
enum { ROW = (H + 2 * G) * D };

static int32_t tokens[N];
static float qkv[L][N][ROW]; /* of the whole text */
static int tapped;

static void tap(void *arg, int layer, const float *rows, int n_rows) {
    (void)arg;
    memcpy(qkv[layer][tapped], rows, (size_t)n_rows * sizeof *qkv[layer]);
    if (layer == L - 1) tapped += n_rows;
}

static struct model *open_tiny(const char *attention, enum kv_type kv) {
    char text[1000];
    tiny_write(folder);
    if (attention) {
        snprintf(text, sizeof text,
                 "{\"format\":1,\"name\":\"tiny\",\"base\":null,\"attention\":%s,\"low_rank\":%s}",
                 attention, TINY_LOW_RANK);
        write_text(in_folder("urchin.json"), text);
    }
    struct model_options o = options_for(folder, WEIGHT_FP32, team);
    o.kv_type = kv;
    for (int i = 0; i < N; i++)
        tokens[i] = i % 50 == 7 ? 3 : (i * 37 + i / 9) % TINY_VOCAB;
    return open_with(&o);
}

/* What the engine's attention answers to the same q, k and v. */
static void engine_answers(struct model *m, float *y) {
    struct attention *a = model_attention(m);
    tapped = 0;
    model_set_tap(m, tap, NULL);
    for (int at = 0; at < N; at += 100) {
        const float *none;
        struct model_run run = {.slot = 0, .n_rows = 100, .tokens = tokens + at};
        if (!at) model_slot_clear(m, 0);
        assert_int_equal(model_step(m, &run, 1, &none), OK);
    }
    model_set_tap(m, NULL, NULL);
    model_slot_clear(m, 1);
    for (int at = 0; at < N; at += 75) {
        struct attention_run run = {model_slot(m, 1), 0, 75};
        attention_step_begin(a, &run, 1);
        for (int layer = 0; layer < L; layer++) {
            const float *rows = qkv[layer][at];
            attention_layer(a, layer, y + ((size_t)layer * N + (size_t)at) * H * D, H * D, rows,
                            ROW, rows + H * D, ROW, rows + (H + G) * D, ROW);
        }
        attention_step_end(a);
    }
}

/* ---- what heads.c says of each row ---- */
struct seen {
    const float *y; /* the engine's */
    const struct rope *rope;
    double window, kl, entropy, own_entropy; /* sums over the rows of one head */
    int n_rows;
    float off,
        off_softmax; /* largest difference from the engine's answer, and from a naive softmax */
    enum kv_type kv;
};
static struct seen seen[L][H];
static int window_from; /* of terraced windows; 0: another rule */

static float stored(float x, enum kv_type kv) { /* to 16 bits, nearest even */
    uint32_t bits;
    if (kv == KV_FP32) return x;
    memcpy(&bits, &x, sizeof bits);
    bits += 0x7fff + (bits >> 16 & 1);
    bits &= 0xffff0000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void rotated(float *out, const float *x, const struct rope *rope, int position) {
    float c[D / 2], s[D / 2];
    rope_angles(rope, position, c, s);
    for (int d = 0; d < D / 2; d++) {
        out[d] = x[d] * c[d] - x[d + D / 2] * s[d];
        out[d + D / 2] = x[d + D / 2] * c[d] + x[d] * s[d];
    }
}

static void see_row(void *arg, int layer, int head, int position, const float *p, const float *a) {
    struct seen *s = &seen[layer][head];
    const float *y = s->y + (((size_t)layer * N + (size_t)position) * H + (size_t)head) * D;
    int kv = head / (H / G);
    float q[D], k[D], rounded[D];
    double all = 0, naive[N];
    (void)arg;
    rotated(q, qkv[layer][position] + head * D, s->rope, position);
    for (int j = 0; j <= position; j++) {
        double dot = 0;
        for (int d = 0; d < D; d++)
            rounded[d] = stored(qkv[layer][j][(H + kv) * D + d], s->kv);
        rotated(k, rounded, s->rope, j);
        for (int d = 0; d < D; d++)
            dot += (double)q[d] * stored(k[d], s->kv);
        all += naive[j] = exp(dot / sqrt(D));
    }
    double own[D] = {0};
    s->n_rows++;
    for (int j = 0; j <= position; j++) {
        const float *v = qkv[layer][j] + (H + G + kv) * D;
        for (int d = 0; d < D; d++)
            own[d] += (double)a[j] * stored(v[d], s->kv);
        s->off_softmax = fmaxf(s->off_softmax, fabsf((float)(naive[j] / all) - p[j]));
        if (p[j] > 0) s->kl += p[j] * log((double)p[j] / a[j]), s->entropy -= p[j] * log(p[j]);
        if (a[j] > 0) s->own_entropy -= a[j] * log(a[j]);
        if (window_from && j >= (position / window_from - 1) * window_from) s->window += a[j];
    }
    for (int d = 0; d < D; d++)
        s->off = fmaxf(s->off, fabsf((float)own[d] - y[d]));
}

/* fp32 sums of 300 weights, each within 1e-5 of itself (exp, log, features); |v| < 8 here. */
static void check_heads(const char *attention, enum kv_type kv, bool terraced) {
    struct model *m = open_tiny(attention, kv);
    static float y[L * N * H * D];
    struct heads *h;
    char msg[256] = "";
    engine_answers(m, y);
    window_from = terraced ? 16 : 0;
    for (int i = 0; i < L * H; i++)
        seen[i / H][i % H] = (struct seen){.y = y, .rope = model_rope(m), .kv = kv};
    assert_int_equal(heads_new(&h, m, team, N, N), OK);
    heads_watch(h, see_row, NULL);
    if (heads_read(h, 2, tokens, N, N, false, msg, sizeof msg)) fail_msg("%s", msg);
    for (int i = 0; i < L * H; i++) {
        const struct seen *s = &seen[i / H][i % H];
        const struct head_sums *sums = &heads_sums(h)[i];
        int n = s->n_rows;
        assert_true(n > 200); /* all that have linear keys */
        assert_int_equal(sums->n_rows, n);
        if (!(s->off <= 2e-4f))
            fail_msg("%s: layer %d head %d is off by %g", attention, i / H, i % H, s->off);
        if (!(s->off_softmax <= 1e-5f))
            fail_msg("%s: softmax of layer %d head %d is off by %g", attention, i / H, i % H,
                     s->off_softmax);
        assert_true(fabs(sums->kl - s->kl) <= 1e-4 * n);
        assert_true(fabs(sums->entropy - s->entropy) <= 1e-4 * n);
        assert_true(fabs(sums->entropy_own - s->own_entropy) <= 1e-4 * n);
        if (terraced) assert_true(fabs(sums->own[KEY_WINDOW] - s->window) <= 1e-4 * n);
        double mass = 0, softmax = 0;
        for (int c = 0; c < N_KEY_CLASSES; c++)
            mass += sums->own[c], softmax += sums->softmax[c];
        assert_true(fabs(mass - n) <= 1e-4 * n && fabs(softmax - n) <= 1e-4 * n);
        assert_true(sums->own[KEY_STATE] > 0.01 * n); /* there is something to get wrong */
        assert_true(sums->rank >= -sums->n_rank && sums->rank <= sums->n_rank &&
                    sums->n_rank > 100);
    }
    heads_free(h);
    model_close(m);
}

static void test_weights_are_the_engines_with_cache_horizon_and_far_keys(void **state) {
    (void)state;
    check_heads(NULL, KV_FP32, true);
}
static void test_weights_are_the_engines_with_16_bit_keys(void **state) {
    (void)state;
    check_heads(NULL, KV_BF16, true);
}
#define MAPS                                                                                       \
    "{\"kind\":\"hedgehog\",\"features\":8,\"key_map_per\":\"kv_head\",\"mixing\":\"unified\","    \
    "\"horizon\":64,"
static void test_weights_are_the_engines_of_every_window(void **state) {
    (void)state;
    check_heads(MAPS "\"map\":\"exp\",\"map_position\":\"none\",\"max_distance\":48,"
                     "\"window\":{\"rule\":\"sliding\",\"size\":24},\"sinks\":2}",
                KV_FP32, false);
    tiny_remove(folder), new_folder(NULL);
    check_heads(
        MAPS
        "\"map\":\"exp\",\"map_position\":\"rope\",\"window\":{\"rule\":\"none\"},\"sinks\":0}",
        KV_FP32, false);
    tiny_remove(folder), new_folder(NULL);
    check_heads(MAPS "\"map\":\"softmax2\",\"map_position\":\"rope\","
                     "\"window\":{\"rule\":\"terraced\",\"size\":16},\"sinks\":3}",
                KV_FP32, true);
}

/* One head, one row at a time: means do not depend on how rows are shared out, nor on the threads.
 */
static void test_sums_are_the_same_bits_on_any_number_of_threads(void **state) {
    (void)state;
    static struct head_sums sums[3][L * H];
    for (int threads = 1; threads <= 3; threads++) {
        struct team *some;
        struct heads *h;
        assert_int_equal(team_new(&some, threads), OK);
        if (threads > 1) tiny_remove(folder), new_folder(NULL);
        struct model *m = open_tiny(NULL, KV_BF16);
        assert_int_equal(heads_new(&h, m, some, N, 17), OK);
        assert_int_equal(heads_read(h, 0, tokens, N, 17, false, NULL, 0), OK);
        memcpy(sums[threads - 1], heads_sums(h), sizeof sums[0]);
        assert_int_equal(sums[threads - 1][0].n_rows, 17);
        assert_memory_equal(sums[threads - 1], sums[0], sizeof sums[0]);
        heads_free(h);
        model_close(m);
        team_free(some);
    }
}

static void test_a_text_without_linear_keys_is_refused(void **state) {
    (void)state;
    struct model *m = open_tiny(NULL, KV_BF16);
    struct heads *h;
    char msg[256];
    assert_int_equal(heads_new(&h, m, team, N, 8), OK);
    assert_int_equal(heads_read(h, 0, tokens, 48, 8, false, msg, sizeof msg), ERR_ARG);
    assert_non_null(strstr(msg, "all keys of 48 tokens are exact"));
    /* (b - 1) 16 - 1 sink - 16 cached > 0 from block 3 on: rows 48 .. 63 of 64 */
    assert_int_equal(heads_read(h, 0, tokens, 64, 8, false, msg, sizeof msg), OK);
    assert_true(heads_share(h) == 0.25);
    heads_free(h);
    model_close(m);
}

static void test_ranks_correlate_as_spearman_has_it(void **state) {
    (void)state;
    double room[4 * 5];
    float x[] = {-1, 0, 2, 3, 9}, rising[] = {1, 2, 40, 41, 42}, falling[] = {5, 4, 3, 2, 1},
          flat[] = {7, 7, 7, 7, 7}, ties[] = {1, 1, 2, 2};
    assert_true(fabs(rank_correlation(x, rising, 5, room) - 1) < 1e-12);
    assert_true(fabs(rank_correlation(x, falling, 5, room) + 1) < 1e-12);
    assert_true(rank_correlation(x, flat, 5, room) == 0);
    assert_true(fabs(rank_correlation(x, ties, 4, room) - 4 / sqrt(20)) < 1e-12);
}

/* ---- pictures ---- */
static void test_pictures_show_the_weights_of_the_head_they_name(void **state) {
    (void)state;
    struct model *m = open_tiny(NULL, KV_FP32);
    static struct picture pictures[MAX_PICTURES];
    static struct head_sums sums[L * H];
    struct heads *h;
    assert_int_equal(heads_new(&h, m, team, N, PICTURE_CELLS), OK);
    assert_int_equal(heads_read(h, 0, tokens, N, 40, false, NULL, 0), OK);
    memcpy(sums, heads_sums(h), sizeof sums);
    int n = picture_choose(pictures, sums, L, H);
    assert_true(n >= 3 && n <= MAX_PICTURES);
    for (int i = 0; i < n; i++)
        for (int k = 0; k < i; k++)
            assert_false(pictures[i].layer == pictures[k].layer &&
                         pictures[i].head == pictures[k].head);
    int farthest = 0;
    for (int i = 1; i < L * H; i++)
        if (sums[i].softmax[KEY_STATE] > sums[farthest].softmax[KEY_STATE]) farthest = i;
    assert_int_equal(pictures[0].layer * H + pictures[0].head, farthest);
    assert_int_equal(picture_take(pictures, n, h, 1, tokens, N, NULL, 0), OK);
    for (int i = 0; i < n; i++)
        for (int r = 0; r < PICTURE_CELLS; r++) {
            double p = 0, a = 0;
            for (int c = 0; c < PICTURE_CELLS; c++) {
                p += pictures[i].softmax[r * PICTURE_CELLS + c];
                a += pictures[i].own[r * PICTURE_CELLS + c];
                if (c > r) assert_true(pictures[i].softmax[r * PICTURE_CELLS + c] == 0);
            }
            assert_true(fabs(p - 1) < 1e-4 && fabs(a - 1) < 1e-4);
        }
    /* the first rows see exact keys only: the two are one */
    for (int c = 0; c < 4 * PICTURE_CELLS; c++)
        assert_true(fabsf(pictures[0].softmax[c] - pictures[0].own[c]) < 1e-5f);
    pictures[0].softmax[0] = 1, pictures[0].own[0] = 1e-9f;
    pictures[0].softmax[PICTURE_CELLS] = 0.01f;
    cJSON *json = picture_json(&pictures[0]);
    const cJSON *rows = cJSON_GetObjectItem(json, "softmax");
    assert_int_equal(cJSON_GetArraySize(rows), PICTURE_CELLS);
    assert_string_equal(cJSON_GetArrayItem(rows, 0)->valuestring, "Y");
    assert_int_equal(cJSON_GetArrayItem(rows, 1)->valuestring[0], 'M'); /* 2 decades of 6 letters */
    assert_string_equal(cJSON_GetArrayItem(cJSON_GetObjectItem(json, "hedgehog"), 0)->valuestring,
                        "A");
    cJSON_Delete(json);
    heads_free(h);
    model_close(m);
}

int main(void) {
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_weights_are_the_engines_with_cache_horizon_and_far_keys),
        IN_FOLDER(test_weights_are_the_engines_with_16_bit_keys),
        IN_FOLDER(test_weights_are_the_engines_of_every_window),
        IN_FOLDER(test_sums_are_the_same_bits_on_any_number_of_threads),
        IN_FOLDER(test_a_text_without_linear_keys_is_refused),
        cmocka_unit_test(test_ranks_correlate_as_spearman_has_it),
        IN_FOLDER(test_pictures_show_the_weights_of_the_head_they_name),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
