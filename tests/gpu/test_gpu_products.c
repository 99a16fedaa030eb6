/* test_gpu_products.c - what training on a device is made of: rows taken from a step, and batched
 * products beside sums in double. */
#include "tests/gpu/training_device.h"

/* ---- rows of a step ---- */

/* All in order or those that are named, whole 16 bytes or not; what lies beside them stays. */
static void test_rows_are_taken_to_the_bit(void **state) {
    (void)state;
    enum { N = 9, TAKEN = 4 };
    const int names[TAKEN] = {100, 103, 104, 108};
    int *names_at = on_device(names, sizeof names);
    for (int way = 0; way < 4; way++) {
        size_t n = way & 1 ? 6 : 24, row = n + 8, rows = way & 2 ? TAKEN : N;
        float *from = uniforms(N * row, 1, 4), *from_at = on_device(from, N * row * sizeof *from),
              *to_at = nans_on_device((rows + 1) * n), *to = nans((rows + 1) * n);
        gpu_take_rows(gpu, to_at, n, from_at + 4, row, way & 2 ? names_at : NULL, 100, (int)rows);
        gpu_download(gpu, to, to_at, (rows + 1) * n * sizeof *to);
        assert_int_equal(gpu_wait(gpu), OK);
        for (size_t r = 0; r < rows; r++)
            assert_memory_equal(to + r * n,
                                from + (way & 2 ? (size_t)(names[r] - 100) : r) * row + 4,
                                n * sizeof *to);
        for (size_t i = rows * n; i < (rows + 1) * n; i++)
            assert_true(isnan(to[i]));
        gpu_release(gpu, from_at), gpu_release(gpu, to_at);
        free(from), free(to);
    }
    gpu_release(gpu, names_at);
}

/* ---- products ---- */

/* A sum of n fused terms errs by at most n 2^-24 of the sum of magnitudes. */
static void check_product(int m, int n, int k, int n_terms, int a_first, int b_first, int add) {
    enum { HEADS = 2, PER = 2 };
    int terms = HEADS * n_terms;
    size_t a_n = (size_t)(m + 2) * (size_t)(k + 3), b_n = (size_t)(k + 1) * (size_t)(n + 2),
           c_n = (size_t)m * (size_t)(n + 1);
    float *a = uniforms(2 * (size_t)terms * a_n, 1, 5),
          *b = uniforms(2 * (size_t)terms * b_n, 1, 6),
          *c = add ? uniforms(2 * HEADS * c_n, 1, 7) : nans(2 * HEADS * c_n);
    float *a_at = on_device(a, 2 * (size_t)terms * a_n * 4),
          *b_at = on_device(b, 2 * (size_t)terms * b_n * 4),
          *c_at = on_device(c, 2 * HEADS * c_n * 4), *got = nans(2 * HEADS * c_n);
    struct gpu_product p = {.a = {a_at, (size_t)terms * a_n, a_n, 1, a_first ? 1 : (size_t)k + 3,
                                  a_first ? (size_t)m + 2 : 1},
                            .b = {b_at, (size_t)terms * b_n, b_n, PER, b_first ? 1 : (size_t)n + 2,
                                  b_first ? (size_t)k + 1 : 1},
                            .c = {c_at, HEADS * c_n, c_n, 1, (size_t)n + 1, 1},
                            .m = m,
                            .n = n,
                            .k = k,
                            .n_layers = 2,
                            .n_heads = HEADS,
                            .n_terms = n_terms,
                            .add = add};
    gpu_products(gpu, &p);
    gpu_download(gpu, got, c_at, 2 * HEADS * c_n * 4);
    assert_int_equal(gpu_wait(gpu), OK);
    for (size_t z = 0; z < 2 * HEADS; z++)
        for (int i = 0; i < m; i++)
            for (int j = 0; j <= n; j++) {
                size_t at = z * c_n + (size_t)i * (size_t)(n + 1) + (size_t)j;
                if (j == n) { /* between rows nothing is written */
                    assert_memory_equal(&got[at], &c[at], 4);
                    continue;
                }
                double sum = add ? (double)c[at] : 0, size = fabs(sum);
                for (int t = 0; t < n_terms; t++) {
                    size_t layer = z / HEADS, head = z % HEADS * (size_t)n_terms + (size_t)t;
                    const float *x = a + layer * p.a.layer + head * a_n,
                                *y = b + layer * p.b.layer + head / PER * b_n;
                    for (int l = 0; l < k; l++) {
                        double term = (double)x[(size_t)i * p.a.row + (size_t)l * p.a.column] *
                                      (double)y[(size_t)l * p.b.row + (size_t)j * p.b.column];
                        sum += term, size += fabs(term);
                    }
                }
                assert_true(fabs((double)got[at] - sum) <= (n_terms * k + 2) * 0x1p-24 * size);
            }
    void *device[] = {a_at, b_at, c_at};
    for (int i = 0; i < 3; i++)
        gpu_release(gpu, device[i]);
    free(a), free(b), free(c), free(got);
}

static void test_products_are_those_of_double_sums(void **state) {
    (void)state;
    for (int order = 0; order <= 2; order += 2) {
        emu_set_order(order, 3);
        check_product(1, 1, 1, 1, 0, 0, 0);
        check_product(33, 65, 17, 1, 0, 0, 0);
        check_product(31, 70, 40, 1, 0, 1, 0);
        check_product(40, 5, 33, 3, 1, 0, 0);
        check_product(7, 66, 16, 2, 1, 0, 1);
        emu_set_order(0, 0);
    }
}

/* Rows 0 .. 31 see keys 64 .. 127, 32 .. 39 see 128 .. 191: elsewhere there is NaN, and there NaN
 * stays. */
static void test_products_keep_to_their_spans(void **state) {
    (void)state;
    enum { R = 40, T = 190, F = 5 };
    static const int spans[] = {64, 128, 128, 192},
                     seen_by[] = {0, 0, 0, 0, 0, 32, 0, 32, 32, 64, 32, 64};
    const int *spans_at = on_device(spans, sizeof spans),
              *seen_at = on_device(seen_by, sizeof seen_by);
    float *rows = uniforms(R * F, 1, 1), *keys = uniforms(T * F, 1, 2), *grid = nans(R * T),
          got[R * T];
    float *rows_at = on_device(rows, R * F * 4), *keys_at = on_device(keys, T * F * 4),
          *grid_at = on_device(grid, R * T * 4), *back_at = nans_on_device(T * F), back[T * F];
    struct gpu_operand by_rows = {rows_at, 0, 0, 1, F, 1}, by_keys = {keys_at, 0, 0, 1, F, 1},
                       both_ways = {grid_at, 0, 0, 1, T, 1}, keys_t = {keys_at, 0, 0, 1, 1, F},
                       grid_t = {grid_at, 0, 0, 1, 1, T}, to_rows = {back_at, 0, 0, 1, F, 1};
    struct gpu_product p = {.c = both_ways,
                            .a = by_rows,
                            .b = keys_t,
                            .m = R,
                            .n = T,
                            .k = F,
                            .n_layers = 1,
                            .n_heads = 1,
                            .n_terms = 1,
                            .limit = GPU_COLUMNS,
                            .spans = spans_at};
    gpu_products(gpu, &p);
    gpu_download(gpu, got, grid_at, sizeof got);
    assert_int_equal(gpu_wait(gpu), OK);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            assert_int_equal(isnan(got[r * T + t]),
                             t < spans[r / 32 * 2] || t >= spans[r / 32 * 2 + 1]);
    p = (struct gpu_product){.c = to_rows,
                             .a = both_ways,
                             .b = by_keys,
                             .m = R,
                             .n = F,
                             .k = T,
                             .n_layers = 1,
                             .n_heads = 1,
                             .n_terms = 1,
                             .limit = GPU_TERMS,
                             .spans = spans_at};
    for (int way = 0; way < 2; way++) { /* sums over keys, then over rows */
        int n = way ? T : R, other = way ? R : T;
        gpu_products(gpu, &p);
        gpu_download(gpu, back, back_at, (size_t)(n * F) * 4);
        assert_int_equal(gpu_wait(gpu), OK);
        for (int i = 0; i < n; i++)
            for (int f = 0; f < F; f++) {
                double sum = 0, size = 0;
                for (int j = 0; j < other; j++) {
                    float x = way ? got[j * T + i] : got[i * T + j];
                    double term = isnan(x) ? 0 : (double)x * (double)(way ? rows : keys)[j * F + f];
                    sum += term, size += fabs(term);
                }
                assert_true(fabs((double)back[i * F + f] - sum) <= T * 0x1p-24 * size);
            }
        p = (struct gpu_product){.c = to_rows,
                                 .a = grid_t,
                                 .b = by_rows,
                                 .m = T,
                                 .n = F,
                                 .k = R,
                                 .n_layers = 1,
                                 .n_heads = 1,
                                 .n_terms = 1,
                                 .limit = GPU_ROWS,
                                 .spans = seen_at};
    }
    void *device[] = {(void *)spans_at, (void *)seen_at, rows_at, keys_at, grid_at, back_at};
    for (int i = 0; i < 6; i++)
        gpu_release(gpu, device[i]);
    free(rows), free(keys), free(grid);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_are_taken_to_the_bit),
        cmocka_unit_test(test_products_are_those_of_double_sums),
        cmocka_unit_test(test_products_keep_to_their_spans),
    };
    return run_on_device(tests, sizeof tests / sizeof *tests);
}
