/* test_ranks.c - parts of matrices by rank: every weight once, and products that add up to the
 * whole layer's. */
#include "model/ranks.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* GQA with groups of 1, 2, 3 and 4; FFN sizes that are whole blocks of 32 or not; 1 to 3 ranks
 * share 3 or more key heads evenly or not. */
static const struct base_config configs[] = {
    {.hidden_dim = 24,
     .ffn_dim = 96,
     .n_heads = 3,
     .n_kv_heads = 3,
     .head_dim = 8,
     .vocab_size = 50},
    {.hidden_dim = 24,
     .ffn_dim = 172,
     .n_heads = 8,
     .n_kv_heads = 4,
     .head_dim = 4,
     .vocab_size = 51},
    {.hidden_dim = 24,
     .ffn_dim = 100,
     .n_heads = 9,
     .n_kv_heads = 3,
     .head_dim = 2,
     .vocab_size = 7},
    {.hidden_dim = 24,
     .ffn_dim = 128,
     .n_heads = 32,
     .n_kv_heads = 8,
     .head_dim = 2,
     .vocab_size = 64},
};
enum { N_CONFIGS = sizeof configs / sizeof *configs };

static struct gpu_matrix_part part_of(int rank, int n_ranks, const struct base_config *c,
                                      enum ranks_matrix which, int n_out, int n_in) {
    struct gpu_matrix_part p;
    struct communicator ranks = {rank, n_ranks};
    assert_int_equal(ranks_part(&p, &ranks, c, which, n_out, n_in), OK);
    return p;
}

static void count(uint8_t *times, const struct gpu_matrix_part *p, int n_in) {
    for (int i = 0; i < p->n_ranges; i++)
        for (int n = 0; n < p->rows[i].n; n++)
            for (int k = 0; k < p->columns.n; k++)
                times[(p->rows[i].first + n) * n_in + p->columns.first + k]++;
}

static void test_every_weight_is_on_one_rank(void **state) {
    (void)state;
    for (int i = 0; i < N_CONFIGS; i++) {
        const struct base_config *c = &configs[i];
        int q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
        const int sizes[][2] = {[RANKS_QKV] = {q + 2 * kv, c->hidden_dim},
                                [RANKS_O] = {c->hidden_dim, q},
                                [RANKS_GATE_UP] = {(1 + i % 2) * c->ffn_dim,
                                                   c->hidden_dim}, /* without a gate, and with */
                                [RANKS_DOWN] = {c->hidden_dim, c->ffn_dim},
                                [RANKS_HEAD] = {c->vocab_size, c->hidden_dim}};
        for (int n_ranks = 1; n_ranks <= 3; n_ranks++)
            for (int which = RANKS_QKV; which <= RANKS_HEAD; which++) {
                int n_out = sizes[which][0], n_in = sizes[which][1];
                uint8_t *times = calloc((size_t)n_out * (size_t)n_in, 1);
                assert_non_null(times);
                for (int rank = 0; rank < n_ranks; rank++) {
                    struct gpu_matrix_part p =
                        part_of(rank, n_ranks, c, (enum ranks_matrix)which, n_out, n_in);
                    count(times, &p, n_in);
                    if (which == RANKS_DOWN) assert_int_equal(p.columns.first % 32, 0);
                }
                for (int e = 0; e < n_out * n_in; e++)
                    assert_int_equal(times[e], 1);
                free(times);
            }
        struct gpu_matrix_part p = part_of(1, 3, c, RANKS_WHOLE, 5, 6);
        assert_true(p.n_ranges == 1 && p.rows[0].first == 0 && p.rows[0].n == 5 &&
                    p.columns.first == 0 && p.columns.n == 6);
    }
}

static uint32_t seed;
static double *randoms(int n) {
    double *x = malloc((size_t)n * sizeof *x);
    assert_non_null(x);
    for (int i = 0; i < n; i++)
        x[i] = (double)(int32_t)(seed = seed * 1664525u + 1013904223u) * 0x1p-31;
    return x;
}

/* y = W x over a part's rows, one behind the other, and its columns; x is the part's. */
static void multiply(double *y, const double *w, int n_in, const struct gpu_matrix_part *p,
                     const double *x) {
    for (int i = 0; i < p->n_ranges; i++)
        for (int n = 0; n < p->rows[i].n; n++, y++) {
            *y = 0;
            for (int k = 0; k < p->columns.n; k++)
                *y += w[(p->rows[i].first + n) * n_in + p->columns.first + k] * x[k];
        }
}

/* A layer with, in place of attention, what mixes a query head with its key head and nothing else:
 * q * k + v.  A rank does it over its own rows alone; what the ranks make adds up to what one makes
 * of everything. */
static void layer(double *out, const struct base_config *c, double *const w[4], const double *x,
                  int rank, int n_ranks) {
    int q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim, hidden = c->hidden_dim,
        group = c->n_heads / c->n_kv_heads;
    struct gpu_matrix_part of_qkv = part_of(rank, n_ranks, c, RANKS_QKV, q + 2 * kv, hidden),
                           of_o = part_of(rank, n_ranks, c, RANKS_O, hidden, q),
                           of_gate_up =
                               part_of(rank, n_ranks, c, RANKS_GATE_UP, 2 * c->ffn_dim, hidden),
                           of_down = part_of(rank, n_ranks, c, RANKS_DOWN, hidden, c->ffn_dim);
    double *mixed = calloc((size_t)(q + 2 * kv + 2 * c->ffn_dim + 2 * hidden), sizeof *mixed),
           *gate = mixed + q + 2 * kv, *part = gate + 2 * c->ffn_dim;
    assert_non_null(mixed);
    multiply(mixed, w[0], hidden, &of_qkv, x);
    int my_q = of_qkv.rows[0].n, my_kv = of_qkv.rows[1].n;
    assert_true(my_kv > 0 && my_q == group * my_kv && of_qkv.rows[2].n == my_kv &&
                of_o.columns.n == my_q);
    for (int e = 0; e < my_q; e++) {
        int key = e / c->head_dim / group * c->head_dim + e % c->head_dim;
        mixed[e] = mixed[e] * mixed[my_q + key] + mixed[my_q + my_kv + key];
    }
    multiply(part, w[1], q, &of_o, mixed);
    for (int e = 0; e < hidden; e++)
        out[e] += part[e];
    multiply(gate, w[2], hidden, &of_gate_up, x);
    assert_int_equal(of_gate_up.rows[1].n, of_down.columns.n);
    for (int e = 0; e < of_down.columns.n; e++)
        gate[e] = fmax(gate[e], 0) * gate[of_down.columns.n + e];
    multiply(part, w[3], c->ffn_dim, &of_down, gate);
    for (int e = 0; e < hidden; e++)
        out[hidden + e] += part[e];
    free(mixed);
}

/* Sums of at most 172 products below 1: 1e-12 is a thousand times their rounding. */
static void test_the_ranks_sums_are_the_layers(void **state) {
    (void)state;
    for (int i = 0; i < N_CONFIGS; i++) {
        const struct base_config *c = &configs[i];
        int q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim, hidden = c->hidden_dim;
        double *w[] = {randoms((q + 2 * kv) * hidden), randoms(hidden * q),
                       randoms(2 * c->ffn_dim * hidden), randoms(hidden * c->ffn_dim)},
               *x = randoms(hidden), want[2 * 24] = {0};
        layer(want, c, w, x, 0, 1);
        for (int n_ranks = 2; n_ranks <= 3; n_ranks++) {
            double got[2 * 24] = {0};
            for (int rank = 0; rank < n_ranks; rank++)
                layer(got, c, w, x, rank, n_ranks);
            for (int e = 0; e < 2 * hidden; e++)
                assert_true(fabs(got[e] - want[e]) <= 1e-12 * (1 + fabs(want[e])));
        }
        for (int k = 0; k < 4; k++)
            free(w[k]);
        free(x);
    }
}

static void test_a_rank_without_a_head_is_refused(void **state) {
    (void)state;
    struct gpu_matrix_part p;
    struct communicator ranks = {0, 4};
    const struct base_config *c = &configs[0]; /* 3 key heads, 96 / 32 units */
    int q = c->n_heads * c->head_dim;
    assert_int_equal(ranks_part(&p, &ranks, c, RANKS_QKV, 3 * q, c->hidden_dim), ERR_ARG);
    assert_int_equal(ranks_part(&p, &ranks, c, RANKS_O, c->hidden_dim, q), ERR_ARG);
    assert_int_equal(ranks_part(&p, &ranks, c, RANKS_DOWN, c->hidden_dim, c->ffn_dim), ERR_ARG);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_weight_is_on_one_rank),
        cmocka_unit_test(test_the_ranks_sums_are_the_layers),
        cmocka_unit_test(test_a_rank_without_a_head_is_refused),
    };
    return cmocka_run_group_tests_name("ranks", tests, NULL, NULL);
}
