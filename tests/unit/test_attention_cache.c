/* test_attention_cache.c - the recall cache: scores are the self-recall errors of the formula, and
 * the choice is the rule's.  And its keys move together. */
#include "attention/kernels.h"
#include "attention_rig.h"

#include "compute/cpu.h"

#include <limits.h>

enum { N = 120 };

static struct attention_config config(bool per_query_head) {
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .n_heads = 6,
                                     .n_kv_heads = 2,
                                     .head_dim = 16,
                                     .kv_type = KV_FP32,
                                     .map = MAP_EXP,
                                     .features = 16,
                                     .key_map_per_query_head = per_query_head,
                                     .window = WINDOW_TERRACED,
                                     .window_size = 8,
                                     .sinks = 1,
                                     .cache_size = 14,
                                     .cache_recent = 5,
                                     .cache_age = 16,
                                     .horizon = 40,
                                     .mixing = MIXING_UNIFIED,
                                     .map_before_rope = true,
                                     .max_distance = 1000};
}

/* e_j of every candidate by the definition: r_j is a weighted mean of all values that the state
 * holds or is to hold, e_j its squared distance from v_j.  weight[i]: how much of key i there is.
 */
static double reference_error(const struct rig *g, int layer, int kv, const double *weight, int n,
                              int j) {
    const struct attention_config *c = &g->config;
    int D = c->head_dim, K = c->n_kv_heads, f = c->features, G = c->n_heads / K,
        maps = c->key_map_per_query_head ? G : 1;
    double error = 0, phi_j[64], phi_i[64];
    for (int h = 0; h < maps; h++) {
        const float *w = g->weights[layer].map_k + ((size_t)kv * maps + h) * D * f;
        double total = 0, r[64] = {0};
        reference_map(phi_j, c->map, g->k[layer] + ((size_t)j * K + kv) * D, w, NULL, D, f, 0,
                      true);
        for (int i = 0; i < n; i++) {
            if (weight[i] == 0) continue;
            reference_map(phi_i, c->map, g->k[layer] + ((size_t)i * K + kv) * D, w, NULL, D, f, 0,
                          true);
            double like = 0;
            for (int p = 0; p < 2 * f; p++)
                like += phi_i[p] * phi_j[p];
            total += weight[i] * like;
            for (int d = 0; d < D; d++)
                r[d] += weight[i] * like * g->v[layer][((size_t)i * K + kv) * D + d];
        }
        for (int d = 0; d < D; d++) {
            double off = r[d] / total - g->v[layer][((size_t)j * K + kv) * D + d];
            error += off * off;
        }
    }
    return error;
}

/* The rule, by repeated search: of equals the earlier. */
static int reference_choice(const struct attention_config *c, int size, int n_recent,
                            const int64_t *position, const float *error, int n, int64_t start,
                            int64_t *out) {
    bool keep[256] = {0};
    for (int place = 0; place < size; place++) {
        double best = -1;
        int at = -1;
        for (int j = 0; j < n; j++) {
            double distance = (double)(start - position[j]), score = error[j];
            if (place >= size - n_recent)
                score /= 1 + distance / c->cache_age;
            else if (c->cache_fact_age)
                score = (float)(score / (1 + distance / c->cache_fact_age));
            if (!keep[j] && score > best) best = score, at = j;
        }
        if (at >= 0) keep[at] = true;
    }
    int kept = 0;
    for (int j = 0; j < n; j++)
        if (keep[j]) out[kept++] = position[j];
    return kept;
}

/* Each r is a mean of |v| <= 1 with weights good to 2^-24 * (N + F + 3 * 17 * steepness), steepness
 * under 40: 1.4e-4; e sums 16 squares of differences up to 2.  What is seen is 100 times smaller.
 */
static const double ERROR_TOLERANCE = 2e-4;

static void check_scores_and_choice(struct attention_config of) {
    struct rig g;
    rig_open(&g, of, 1000, N, 2, false);
    const struct attention_config *c = &g.config;
    void *slot = slot_open(&g);
    float *y = rows_open(&g);
    int w = c->window_size;
    static double weight[RIG_LAYERS][2][N]; /* of each key in the state */
    memset(weight, 0, sizeof weight);
    int64_t held[RIG_LAYERS][2] = {{0}}, choices = 0, differ = 0;
    for (int b = 0; b * w < N; b++) {
        if (b) rig_read(&g, slot, (b - 1) * w, b * w, y);
        if (b < 2) continue;
        int64_t position[RIG_LAYERS][2][64], mine[64], want[64];
        float error[RIG_LAYERS][2][64];
        int counts[RIG_LAYERS][2];
        for (int i = 0; i < RIG_LAYERS; i++)
            for (int kv = 0; kv < 2; kv++) {
                int n = counts[i][kv] =
                    attention_cache_scores(g.a, slot, i, kv, position[i][kv], error[i][kv]);
                double all[N];
                memcpy(all, weight[i][kv], sizeof all);
                for (int j = 0; j < n; j++)
                    all[position[i][kv][j]] += 1;
                for (int j = 0; j < n; j++) {
                    assert_true(j == 0 || position[i][kv][j] > position[i][kv][j - 1]);
                    double e =
                        reference_error(&g, i, kv, all, (b - 1) * w, (int)position[i][kv][j]);
                    assert_true(fabs(e - error[i][kv][j]) <= ERROR_TOLERANCE * fmax(1, e));
                }
            }
        void *next = slot_open(&g); /* the first row of block b, in a copy */
        attention_slot_copy(g.a, next, slot);
        rig_read(&g, next, b * w, b * w + 1, y);
        for (int i = 0; i < RIG_LAYERS; i++)
            for (int kv = 0; kv < 2; kv++) {
                bool retrieval = c->retrieval_size && rig_retrieves(i, kv);
                int n = counts[i][kv], size = retrieval ? c->retrieval_size : c->cache_size,
                    recent = retrieval ? c->retrieval_recent : c->cache_recent;
                int64_t *all = &held[i][kv];
                *all += n > size ? n - size : 0;
                double forget = *all > c->horizon ? (double)c->horizon / (double)*all : 1;
                if (*all > c->horizon) *all = c->horizon;
                int n_mine = attention_cache_positions(g.a, next, i, kv, mine);
                int n_want = reference_choice(c, size, recent, position[i][kv], error[i][kv], n,
                                              (int64_t)b * w, want);
                assert_int_equal(n_mine, n_want);
                assert_memory_equal(mine, want, (size_t)n_mine * sizeof *mine);
                for (int j = 0; j < n; j++) {
                    bool kept = false;
                    for (int e = 0; e < n_mine; e++)
                        kept |= mine[e] == position[i][kv][j];
                    if (!kept) weight[i][kv][position[i][kv][j]] = 1;
                    choices++;
                    differ += kept != (j >= n - size);
                }
                for (int j = 0; j < N; j++)
                    weight[i][kv][j] *= forget;
            }
        free(next);
    }
    assert_true(choices > 1000 && differ > choices / 10); /* not simply the most recent */
    free(slot), free(y);
    rig_close(&g);
}

static void test_scores_and_choice_follow_the_definition(void **state) {
    (void)state;
    check_scores_and_choice(config(false));
}
static void test_facts_age_slower_than_recent_keys(void **state) {
    (void)state;
    struct attention_config c = config(false);
    c.cache_fact_age = 90;
    check_scores_and_choice(c);
    c.retrieval_size = 33, c.retrieval_recent = 4;
    check_scores_and_choice(c);
    c.cache_recent = c.cache_age = 0, c.retrieval_size = c.retrieval_recent = 0;
    c.cache_fact_age = 30; /* facts alone */
    check_scores_and_choice(c);
}
static void test_retrieval_heads_choose_for_their_own_places(void **state) {
    (void)state;
    struct attention_config c = config(false);
    c.retrieval_size = 33, c.retrieval_recent = 4;
    check_scores_and_choice(c);
    c.retrieval_size = 5, c.retrieval_recent = 5;
    check_scores_and_choice(c);
}
static void test_scores_are_summed_over_the_groups_maps(void **state) {
    (void)state;
    check_scores_and_choice(config(true));
}

/* Keys without positions repeat where tokens repeat: their scores are the same bits, wherever they
 * lie, and the earlier stays; also where age lessens scores by less than fp32 shows. */
static void check_equal_keys(int fact_age) {
    struct rig g;
    struct attention_config c = config(false);
    c.cache_recent = c.cache_age = 0, c.cache_fact_age = fact_age;
    rig_open(&g, c, 1000, N, 2, false);
    size_t row = (size_t)c.n_kv_heads * c.head_dim;
    for (int i = 0; i < RIG_LAYERS; i++)
        for (int n = 11; n < N; n++) {
            memcpy(g.k[i] + n * row, g.k[i] + (n * 7 % 11) * row, row * sizeof(float));
            memcpy(g.v[i] + n * row, g.v[i] + (n * 7 % 11) * row, row * sizeof(float));
        }
    void *slot = slot_open(&g);
    float *y = rows_open(&g), error[64];
    int64_t position[64], mine[64];
    int ties = 0;
    for (int n = 0; n < N; n += 8) {
        rig_read(&g, slot, n, n + 8, y);
        void *next = slot_open(&g);
        attention_slot_copy(g.a, next, slot);
        if (n + 9 <= N) rig_read(&g, next, n + 8, n + 9, y);
        for (int i = 0; i < RIG_LAYERS && n + 9 <= N; i++) {
            int count = attention_cache_scores(g.a, slot, i, 1, position, error);
            int n_mine = attention_cache_positions(g.a, next, i, 1, mine);
            for (int a = 0; a < count; a++)
                for (int b = a + 1; b < count; b++) {
                    int64_t pa = position[a] < 11 ? position[a] : position[a] * 7 % 11,
                            pb = position[b] < 11 ? position[b] : position[b] * 7 % 11;
                    if (pa != pb) continue;
                    if ((double)(n + 8 - position[a]) * 0x1p25 >= fact_age && fact_age) continue;
                    assert_memory_equal(&error[a], &error[b], sizeof *error);
                    bool has_a = false, has_b = false;
                    for (int e = 0; e < n_mine; e++)
                        has_a |= mine[e] == position[a], has_b |= mine[e] == position[b];
                    assert_true(has_a || !has_b);
                    ties++;
                }
        }
        free(next);
    }
    assert_true(ties > 100);
    free(slot), free(y);
    rig_close(&g);
}
static void test_equal_keys_score_equal_bits_and_the_earlier_stays(void **state) {
    (void)state;
    check_equal_keys(0);
    check_equal_keys(INT_MAX);
}

static void test_imposed_sets_are_held_and_later_blocks_choose(void **state) {
    (void)state;
    struct rig g;
    rig_open(&g, config(false), 1000, N, 2, false);
    enum { IMPOSED = 10, SIZE = 14 };
    static int64_t sets[RIG_LAYERS][2][IMPOSED][SIZE];
    memset(sets, 0xff, sizeof sets);
    for (int i = 0; i < RIG_LAYERS;
         i++) /* the oldest keys, less one that changes by layer and head */
        for (int kv = 0; kv < 2; kv++)
            for (int b = 0; b < IMPOSED; b++)
                for (int e = 0; e < SIZE; e++)
                    sets[i][kv][b][e] = 1 + e + (e >= i + kv);
    attention_impose_cache(g.a, &sets[0][0][0][0], IMPOSED);
    void *slot = slot_open(&g);
    float *y = rows_open(&g);
    int64_t mine[SIZE];
    rig_read(&g, slot, 0, IMPOSED * 8, y);
    for (int i = 0; i < RIG_LAYERS; i++)
        for (int kv = 0; kv < 2; kv++) {
            assert_int_equal(attention_cache_positions(g.a, slot, i, kv, mine), SIZE);
            assert_memory_equal(mine, sets[i][kv][IMPOSED - 1], sizeof mine);
        }
    rig_read(&g, slot, IMPOSED * 8, N, y);
    assert_int_equal(attention_cache_positions(g.a, slot, 0, 0, mine), SIZE);
    assert_true(memcmp(mine, sets[0][0][0], sizeof mine) != 0);
    free(slot), free(y);
    rig_close(&g);
}

/* ---- entries that move ---- */

static void check_moves(const struct attention_kernels *kernels, enum kv_type type, int D,
                        uint64_t seed) {
    enum { TILES = 9, ENTRIES = TILES * TILE };
    struct shape shape = {.head_dim = D, .kv_type = type};
    size_t size = type == KV_BF16 ? 2 : 4, bytes = (size_t)ENTRIES * D * size;
    unsigned char *keys = malloc(bytes), *want = malloc(bytes);
    for (size_t i = 0; i < bytes; i++)
        want[i] = keys[i] = (unsigned char)uniform(&seed, 0, 256);
    int from[ENTRIES], n = 0, first = (int)uniform(&seed, 0, 20);
    float dropped = uniform(&seed, 0, 1) * uniform(&seed, 0, 1); /* often few */
    for (int e = first; e < ENTRIES; e++)
        if (uniform(&seed, 0, 1) >= dropped) from[n++] = e;
    for (int i = 0; i < n; i++)
        for (int d = 0; d < D; d++) {
            size_t to = ((size_t)((first + i) / TILE) * D + d) * TILE + (first + i) % TILE,
                   at = ((size_t)(from[i] / TILE) * D + d) * TILE + from[i] % TILE;
            memcpy(want + to * size, keys + at * size, size);
        }
    kernels->move_keys(&shape, keys, first, from, n);
    assert_memory_equal(keys, want, bytes);
    free(keys), free(want);
}

static void test_keys_move_as_if_one_by_one(void **state) {
    (void)state;
    const struct attention_kernels *tables[] = {&attention_kernels_generic, NULL, NULL};
    int n = 1;
#if defined(__x86_64__)
    if (cpu_isa() >= CPU_AVX2) tables[n++] = &attention_kernels_avx2;
    if (cpu_isa() >= CPU_AVX512) tables[n++] = &attention_kernels_avx512;
#elif defined(__aarch64__)
    if (cpu_isa() == CPU_DOTPROD) tables[n++] = &attention_kernels_dotprod;
#endif
    for (int i = 0; i < n; i++)
        for (uint64_t seed = 1; seed <= 300; seed++)
            check_moves(tables[i], seed % 2 ? KV_BF16 : KV_FP32, seed % 3 ? 20 : 1, seed * 77);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_scores_and_choice_follow_the_definition),
        cmocka_unit_test(test_facts_age_slower_than_recent_keys),
        cmocka_unit_test(test_retrieval_heads_choose_for_their_own_places),
        cmocka_unit_test(test_scores_are_summed_over_the_groups_maps),
        cmocka_unit_test(test_equal_keys_score_equal_bits_and_the_earlier_stays),
        cmocka_unit_test(test_imposed_sets_are_held_and_later_blocks_choose),
        cmocka_unit_test(test_keys_move_as_if_one_by_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
