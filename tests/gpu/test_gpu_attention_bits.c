/* test_gpu_attention_bits.c - a row's bits on a device follow from its sequence alone: not from how
 * its prompt was cut, nor from neighbours, slots, padding, or how much room there was. */
#include "tests/gpu/attention_device.h"
#include "tests/gpu/orders.h"

static struct gpu *gpu;

enum { N = 60, SHIFT = 9, LONG = N + 2 * SHIFT }; /* sequence s begins at token s SHIFT */

static void open_sort(struct rig *g, struct device *d, int sort, bool exact) {
    rig_open(g, sort_config(sort), 100, LONG, 1, false);
    device_open(d, gpu, g, exact);
}
static void close_both(struct rig *g, struct device *d) {
    device_close(d);
    rig_close(g);
}

/* ---- prompts ---- */

static void test_a_prompt_may_be_cut_anywhere(void **state) {
    (void)state;
    static const int cuts[] = {1, 3, 8, 13, 59};
    for (int sort = 0; sort < SORTS; sort++)
        for (int exact = 0; exact < 2; exact++) {
            struct rig g;
            struct device d;
            open_sort(&g, &d, sort, exact);
            float *whole = rows_open(&g);
            device_prompt(&d, 0, 0, 0, N, N, whole);
            for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
                float *y = rows_open(&g);
                gpu_attention_slot_clear(d.a, 1);
                device_prompt(&d, 1, 0, 0, N, cuts[i], y);
                if (!same_bits(&g, whole, y)) fail_msg("sort %d, cut %d", sort, cuts[i]);
                free(y);
            }
            free(whole);
            close_both(&g, &d);
        }
}

/* Three sequences in one batch, each in pieces of its own size. */
static void test_prompts_do_not_see_their_neighbours(void **state) {
    (void)state;
    for (int sort = 0; sort < SORTS; sort++) {
        struct rig g;
        struct device d;
        open_sort(&g, &d, sort, sort != FAST);
        float *alone[3], *y[3];
        for (int s = 0; s < 3; s++) {
            alone[s] = rows_open(&g), y[s] = rows_open(&g);
            device_prompt(&d, 3, s * SHIFT, 0, N, N, alone[s]);
            gpu_attention_slot_clear(d.a, 3);
        }
        static const int most[] = {23, 7, 16};
        int at[3] = {0};
        for (int left = 3; left > 0;) {
            struct piece p[3];
            left = 0;
            for (int s = 0; s < 3; s++) {
                int end = at[s] + most[s] < N ? at[s] + most[s] : N;
                if (at[s] < end) p[left++] = (struct piece){2 - s, s * SHIFT, at[s], end, y[s]};
                at[s] = end;
            }
            if (left) read_prompts(&d, p, left, 2);
        }
        for (int s = 0; s < 3; s++) {
            if (!same_bits(&g, alone[s], y[s])) fail_msg("sort %d, sequence %d", sort, s);
            free(alone[s]), free(y[s]);
        }
        close_both(&g, &d);
    }
}

static void check_little_room(int sort) {
    struct rig g;
    struct device d;
    open_sort(&g, &d, sort, true);
    float *whole = rows_open(&g), *y = rows_open(&g);
    device_prompt(&d, 0, 0, 0, N, N, whole);
    device_generate(&d, 0, 0, N, LONG, whole);
    int keys = d.a->shape.most_cache + d.a->shape.window_size;
    int blocks = d.a->n_snapshots, all_keys = d.a->max_keys;
    for (int room = 1; room < 5; room++) { /* of 1 or 2 blocks, or the keys of 1 or 2 */
        gpu_attention_slot_clear(d.a, 1);
        d.a->n_snapshots = room > 2 ? blocks : room;
        d.a->max_keys = room > 2 ? (room - 2) * keys : all_keys;
        assert_true(d.a->n_snapshots <= blocks && d.a->max_keys <= all_keys);
        device_prompt(&d, 1, 0, 0, N, N, y);
        device_generate(&d, 1, 0, N, LONG, y);
        assert_true(same_bits(&g, whole, y));
    }
    free(whole), free(y);
    close_both(&g, &d);
}
static void test_little_room_changes_nothing(void **state) {
    (void)state;
    check_little_room(4);
    check_little_room(FAST - 1); /* with retrieval heads */
}

/* ---- generated rows ---- */

/* Prompts of different lengths, so that blocks begin at different steps. */
static void read_before(struct device *d, int slot, int s, float *y) {
    device_prompt(d, slot, s * SHIFT, 0, 21 + 5 * s, 60, y);
}

static void check_batches(struct device *d, struct rig *g, int sort, struct gpu_graph **graph) {
    float *alone[3], *y[3];
    for (int s = 0; s < 3; s++) {
        alone[s] = rows_open(g), y[s] = rows_open(g);
        gpu_attention_slot_clear(d->a, 3);
        gpu_attention_slot_clear(d->a, s);
        read_before(d, 3, s, alone[s]);
        device_generate(d, 3, s * SHIFT, 21 + 5 * s, 48, alone[s]);
        read_before(d, s, s, y[s]);
    }
    for (int step = 0; step < 27; step++) { /* now this one pauses, now that one */
        struct piece p[3];
        int n = 0;
        for (int s = 0; s < 3; s++) {
            int at = (int)gpu_attention_slot_position(d->a, s);
            bool pauses = at >= 48 || step % 7 == s;
            p[n++] = (struct piece){pauses ? -1 : s, s * SHIFT, at, at + 1, y[s]};
        }
        read_generated_by(d, p, n, 4, graph);
    }
    for (int s = 0; s < 3; s++) { /* as far as they came */
        int n = (int)gpu_attention_slot_position(d->a, s);
        assert_true(n > 40);
        if (farthest(g, alone[s], y[s], n) != 0) fail_msg("sort %d, sequence %d", sort, s);
        free(alone[s]), free(y[s]);
    }
}

static void test_generated_rows_do_not_see_their_neighbours(void **state) {
    (void)state;
    for (int sort = 0; sort < SORTS; sort++) {
        struct rig g;
        struct device d;
        open_sort(&g, &d, sort, sort != FAST);
        check_batches(&d, &g, sort, NULL);
        close_both(&g, &d);
    }
}

static void test_a_recorded_step_goes_on_with_any_batch(void **state) {
    (void)state;
    for (int sort = 0; sort < SORTS; sort++) {
        struct rig g;
        struct device d;
        struct gpu_graph *graph = NULL;
        open_sort(&g, &d, sort, sort != FAST);
        check_batches(&d, &g, sort, &graph);
        gpu_graph_free(gpu, graph);
        close_both(&g, &d);
    }
}

/* Rows of nothing are zeros; what lies between rows, and every slot, stays as it was. */
static void test_padding_is_zeros_and_touches_nothing(void **state) {
    (void)state;
    for (int sort = 0; sort < SORTS; sort++) {
        struct rig g;
        struct device d;
        open_sort(&g, &d, sort, sort != FAST);
        size_t row = row_floats(&g) + Y_PAD, floats = MOST_ROWS * row;
        size_t bytes = DEVICE_SLOTS * d.a->shape.slot_stride;
        char *before = malloc(bytes), *after = malloc(bytes);
        float *y = rows_open(&g), *out = malloc(floats * sizeof *out);
        for (int slot = 0; slot < DEVICE_SLOTS; slot++)
            device_prompt(&d, slot, 0, 0, 16 + slot, 32, y);
        gpu_download(gpu, before, d.a->slots, bytes);
        struct piece p[] = {{-1, 0, 0, 0, y}, {-1, 0, 0, 0, y}};
        read_generated(&d, p, 2, 4);
        gpu_download(gpu, after, d.a->slots, bytes);
        gpu_download(gpu, out, d.step_y[1], floats * sizeof *out);
        must_wait(gpu);
        assert_memory_equal(before, after, bytes);
        for (size_t i = 0; i < floats; i++)
            if (i < 4 * row && i % row < row - Y_PAD)
                assert_true(out[i] == 0);
            else
                assert_true(isnan(out[i]));
        free(before), free(after), free(y), free(out);
        close_both(&g, &d);
    }
}

/* ---- both ---- */

static void test_results_in_bf16_are_rounded_results(void **state) {
    (void)state;
    for (int sort = 0; sort < SORTS; sort++) {
        struct rig g;
        struct device d;
        open_sort(&g, &d, sort, sort != FAST);
        size_t row = row_floats(&g);
        float *y = rows_open(&g);
        uint16_t *got = malloc(MOST_ROWS * (row + Y_PAD) * sizeof *got);
        struct piece p = {0, 0, 0, 30, y};
        read_prompts(&d, &p, 1, 0); /* leaves the inputs in the step */
        for (int generated = 0; generated < 2; generated++) {
            int n = generated ? 1 : 30, slot = 1;
            struct gpu_attention_rows rows = step_rows(&d, 0);
            rows.y_bf16 = true;
            gpu_attention_slot_clear(d.a, slot);
            if (generated)
                gpu_attention_generated_begin(d.a, &slot, 1, 1);
            else
                gpu_attention_prompt_begin(d.a, &(struct gpu_attention_run){slot, 0, n}, 1);
            if (generated)
                gpu_attention_generated_layer(d.a, 0, &rows);
            else
                gpu_attention_prompt_layer(d.a, 0, &rows);
            gpu_download(gpu, got, d.step_y[0], (size_t)n * (row + Y_PAD) * sizeof *got);
            must_wait(gpu);
            for (int r = 0; r < n; r++)
                for (size_t i = 0; i < row; i++) {
                    uint32_t bits = (uint32_t)got[(size_t)r * (row + Y_PAD) + i] << 16;
                    float x;
                    memcpy(&x, &bits, sizeof x);
                    assert_true(x == reference_round(KV_BF16, y[(size_t)r * row + i]));
                }
        }
        free(y), free(got);
        close_both(&g, &d);
    }
}

/* A sequence full of NaN in the same steps, and in the slot before. */
static void test_nan_stays_in_its_sequence(void **state) {
    (void)state;
    for (int sort = 0; sort < SORTS; sort++) {
        struct rig g;
        struct device d;
        rig_open(&g, sort_config(sort), 100, LONG, 1, false);
        float *alone = rows_open(&g), *y = rows_open(&g), *bad = rows_open(&g);
        for (int i = 0; i < RIG_LAYERS;
             i++) /* the last SHIFT tokens: sequence 0 never reads them */
            for (size_t e = (size_t)N * kv_floats(&g); e < (size_t)LONG * kv_floats(&g); e++)
                g.k[i][e] = g.v[i][e] = NAN;
        device_open(&d, gpu, &g, sort != FAST);
        device_prompt(&d, 0, 0, 0, 50, 25, alone);
        device_generate(&d, 0, 0, 50, N, alone);
        gpu_attention_slot_clear(d.a, 0);
        device_prompt(&d, 2, N, 0, 18, 18, bad); /* what it leaves there is forgotten */
        gpu_attention_slot_clear(d.a, 2);
        for (int from = 0; from < 50; from += 25) {
            struct piece p[] = {{1, N, from / 5, from / 5 + 5, bad}, {2, 0, from, from + 25, y}};
            read_prompts(&d, p, 2, 0);
        }
        for (int at = 50; at < N; at++) {
            struct piece p[] = {{1, N, at - 44, at - 43, bad}, {2, 0, at, at + 1, y}};
            read_generated(&d, p, 2, 2);
        }
        if (!(farthest(&g, alone, y, N) == 0)) fail_msg("sort %d", sort);
        free(alone), free(y), free(bad);
        close_both(&g, &d);
    }
}

int main(void) {
    char msg[256];
    if (gpu_open(&gpu, msg, sizeof msg)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_prompt_may_be_cut_anywhere),
        cmocka_unit_test(test_prompts_do_not_see_their_neighbours),
        cmocka_unit_test(test_little_room_changes_nothing),
        cmocka_unit_test(test_generated_rows_do_not_see_their_neighbours),
        cmocka_unit_test(test_a_recorded_step_goes_on_with_any_batch),
        cmocka_unit_test(test_padding_is_zeros_and_touches_nothing),
        cmocka_unit_test(test_results_in_bf16_are_rounded_results),
        cmocka_unit_test(test_nan_stays_in_its_sequence),
    };
    int failed = run_in_both_orders(tests, sizeof tests / sizeof *tests, 7, NULL);
    gpu_close(gpu);
    return failed;
}
