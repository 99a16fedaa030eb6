/* test_gpu_attention_state.c - slots on a device: copied, cleared, saved and loaded, between device
 * and CPU in both directions. */
#include "tests/gpu/attention_device.h"
#include "tests/gpu/orders.h"

static struct gpu *gpu;

enum { N = 60 };

static void open_sort(struct rig *g, struct device *d, int sort) {
    rig_open(g, sort_config(sort), 100, N, 1, false);
    device_open(d, gpu, g, true);
}
static void close_both(struct rig *g, struct device *d) {
    device_close(d);
    rig_close(g);
}

static const int ends[] = {0, 1, 8, 13, 16, 40, 43};
enum { ENDS = sizeof ends / sizeof *ends };

static void load_ok(struct device *d, int slot, const void *bytes, size_t n) {
    char msg[256] = "";
    if (gpu_attention_slot_load(d->a, slot, bytes, n, msg, sizeof msg)) fail_msg("%s", msg);
}

/* The CPU's state, loaded and saved again, is the same to the byte: planes lose nothing, nothing
 * unused is kept. */
static void test_a_saved_state_comes_back_to_the_byte(void **state) {
    (void)state;
    for (int sort = 0; sort < SORTS; sort++) {
        struct rig g;
        struct device d;
        open_sort(&g, &d, sort);
        float *y = rows_open(&g);
        for (int i = 0; i < ENDS; i++) {
            void *slot = slot_open(&g);
            size_t bytes = attention_state_bytes(g.a, ends[i]);
            char *saved = malloc(bytes), *again = malloc(bytes);
            memset(again, 0x55, bytes);
            if (ends[i]) rig_read(&g, slot, 0, ends[i], y);
            attention_state_save(g.a, saved, slot);
            device_prompt(&d, i % 2, 0, 0, 50, 50, y); /* an earlier owner */
            load_ok(&d, i % 2, saved, bytes);
            assert_int_equal(gpu_attention_slot_position(d.a, i % 2), ends[i]);
            assert_int_equal(gpu_attention_slot_save(d.a, i % 2, again), OK);
            assert_memory_equal(saved, again, bytes);
            gpu_attention_slot_clear(d.a, i % 2);
            free(slot), free(saved), free(again);
        }
        free(y);
        close_both(&g, &d);
    }
}

/* 5.3 MB: the page-locked memory it passes through is filled more than once. */
static void test_a_long_softmax_state_comes_back_to_the_byte(void **state) {
    (void)state;
    enum { LONG = 437 };
    struct attention_config c = {.kind = ATTENTION_SOFTMAX,
                                 .n_heads = 4,
                                 .n_kv_heads = 4,
                                 .head_dim = 128,
                                 .max_seq_len = 500,
                                 .kv_type = KV_FP32};
    struct rig g;
    struct device d;
    rig_open(&g, c, 100, LONG, 1, false);
    device_open(&d, gpu, &g, true);
    void *slot = slot_open(&g);
    float *y = rows_open(&g);
    size_t bytes = attention_state_bytes(g.a, LONG);
    assert_true(bytes > GPU_FERRY_BYTES + GPU_FERRY_BYTES / 4);
    char *saved = malloc(bytes), *again = malloc(bytes);
    memset(again, 0x55, bytes);
    rig_read(&g, slot, 0, LONG, y);
    attention_state_save(g.a, saved, slot);
    load_ok(&d, 1, saved, bytes);
    assert_int_equal(gpu_attention_slot_save(d.a, 1, again), OK);
    assert_memory_equal(saved, again, bytes);
    free(slot), free(y), free(saved), free(again);
    close_both(&g, &d);
}

/* Saved on one side and loaded on the other, a sequence goes on as the CPU's. */
static void test_either_side_goes_on_with_the_others_state(void **state) {
    (void)state;
    for (int sort = 0; sort < SORTS; sort++) {
        struct rig g;
        struct device d;
        open_sort(&g, &d, sort);
        for (int i = 0; i < ENDS; i++) {
            void *slot = slot_open(&g);
            float *want = rows_open(&g), *up = rows_open(&g), *down = rows_open(&g);
            size_t bytes = attention_state_bytes(g.a, ends[i]);
            char *saved = malloc(bytes);
            if (ends[i]) rig_read(&g, slot, 0, ends[i], want);
            attention_state_save(g.a, saved, slot);
            load_ok(&d, 1, saved, bytes);
            rig_read(&g, slot, ends[i], N, want);
            memcpy(up, want, RIG_LAYERS * N * row_floats(&g) * sizeof *up);
            memcpy(down, want, RIG_LAYERS * N * row_floats(&g) * sizeof *up);
            device_generate(&d, 1, 0, ends[i], ends[i] + 3,
                            up); /* from the slot as it was loaded */
            device_prompt(&d, 1, 0, ends[i] + 3, N - 5, 30, up);
            device_generate(&d, 1, 0, N - 5, N, up);
            assert_same_caches(&d, 1, slot);

            gpu_attention_slot_clear(d.a, 0);
            device_prompt(&d, 0, 0, 0, ends[i], 50, down);
            assert_int_equal(gpu_attention_slot_save(d.a, 0, saved), OK);
            assert_int_equal(attention_state_load(g.a, slot, saved, bytes, NULL, 0), OK);
            rig_read(&g, slot, ends[i], N, down);
            float most = device_tolerance(&g);
            if (!(farthest(&g, want, up, N) <= most && farthest(&g, want, down, N) <= most))
                fail_msg("sort %d from %d", sort, ends[i]);
            free(slot), free(want), free(up), free(down), free(saved);
        }
        close_both(&g, &d);
    }
}

/* A fork, and a state saved and loaded, go on with the bits of the original, which does not notice.
 */
static void test_copies_and_loaded_states_go_on_with_the_same_bits(void **state) {
    (void)state;
    for (int sort = 0; sort < SORTS; sort++) {
        struct rig g;
        struct device d;
        open_sort(&g, &d, sort);
        float *y[4];
        for (int i = 0; i < 4; i++)
            y[i] = rows_open(&g);
        for (int i = 1; i < 4; i++)
            device_prompt(&d, i, 0, 0, 50, 50, y[0]); /* earlier owners */
        device_prompt(&d, 0, 0, 0, 29, 29, y[0]);
        size_t bytes = attention_state_bytes(g.a, 29), floats = RIG_LAYERS * N * row_floats(&g);
        char *saved = malloc(bytes);
        gpu_attention_slot_copy(d.a, 1, 0);
        assert_int_equal(gpu_attention_slot_save(d.a, 0, saved), OK);
        load_ok(&d, 2, saved, bytes);
        for (int i = 1; i < 4; i++)
            memcpy(y[i], y[0], floats * sizeof *y[0]);
        for (int i = 0; i < 3; i++) { /* each is through before the next begins */
            device_prompt(&d, i, 0, 29, 45, 9, y[i]);
            device_generate(&d, i, 0, 45, N, y[i]);
        }
        assert_true(same_bits(&g, y[0], y[1]));
        assert_true(same_bits(&g, y[0], y[2]));
        gpu_attention_slot_copy(d.a, 3, 3);
        assert_int_equal(gpu_attention_slot_position(d.a, 3), 50);
        for (int i = 0; i < 4; i++)
            free(y[i]);
        free(saved);
        close_both(&g, &d);
    }
}

/* A slot's memory may hold anything when it is cleared. */
static void test_a_cleared_slot_remembers_nothing(void **state) {
    (void)state;
    for (int sort = 0; sort < SORTS; sort++) {
        struct rig g;
        struct device d;
        open_sort(&g, &d, sort);
        float *fresh = rows_open(&g), *y = rows_open(&g);
        device_prompt(&d, 0, 0, 0, 45, 45, fresh);
        device_generate(&d, 0, 0, 45, N, fresh);
        gpu_fill(gpu, d.a->slots, 0xff, d.a->shape.slot_stride); /* NaN */
        gpu_attention_slot_clear(d.a, 0);
        assert_int_equal(gpu_attention_slot_position(d.a, 0), 0);
        device_prompt(&d, 0, 0, 0, 45, 45, y);
        device_generate(&d, 0, 0, 45, N, y);
        if (!same_bits(&g, fresh, y)) fail_msg("sort %d", sort);
        free(fresh), free(y);
        close_both(&g, &d);
    }
}

static void test_a_bad_state_is_refused_and_leaves_a_cleared_slot(void **state) {
    (void)state;
    for (int sort = 0; sort < SORTS; sort++) {
        struct rig g;
        struct device d;
        open_sort(&g, &d, sort);
        float *fresh = rows_open(&g), *y = rows_open(&g);
        char msg[256];
        device_prompt(&d, 0, 0, 0, 40, 40, fresh);
        size_t bytes = attention_state_bytes(g.a, 40);
        char *saved = malloc(bytes);
        assert_int_equal(gpu_attention_slot_save(d.a, 0, saved), OK);
        for (int bad = 0; bad < 3; bad++) {
            char *copy = malloc(bytes);
            memcpy(copy, saved, bytes);
            if (bad == 0) copy[0] ^= 1;
            if (bad == 1)
                memset(copy + sizeof(struct slot_header), 0xff, 4); /* NaN in S or a key */
            device_prompt(&d, 1, 0, 0, 17, 17, y);
            assert_int_equal(gpu_attention_slot_load(d.a, 1, copy, bad == 2 ? bytes - 1 : bytes,
                                                     msg, sizeof msg),
                             ERR_FORMAT);
            assert_true(msg[0] != 0);
            assert_int_equal(gpu_attention_slot_position(d.a, 1), 0);
            device_prompt(&d, 1, 0, 0, 40, 40, y);
            assert_true(farthest(&g, fresh, y, 40) == 0);
            gpu_attention_slot_clear(d.a, 1);
            free(copy);
        }
        free(fresh), free(y), free(saved);
        close_both(&g, &d);
    }
}

static void test_a_cache_too_large_for_a_block_is_refused(void **state) {
    (void)state;
    for (int retrieval = 0; retrieval < 2; retrieval++) {
        struct rig g;
        struct gpu_attention *a = NULL;
        struct attention_config c = base_config();
        char msg[256] = "";
        *(retrieval ? &c.retrieval_size : &c.cache_size) = 10000;
        rig_open(&g, c, 100, N, 1, false);
        assert_int_equal(gpu_attention_new(&a, gpu, g.a, 1, 8, 1, true, msg, sizeof msg),
                         ERR_NOMEM);
        assert_null(a);
        assert_non_null(strstr(msg, "10000"));
        assert_non_null(strstr(msg, retrieval ? "--retrieval-size" : "--cache-size"));
        rig_close(&g);
    }
}

static void test_too_many_slots_are_no_memory(void **state) {
    (void)state;
    struct rig g;
    struct gpu_attention *a = NULL;
    char msg[256] = "";
    rig_open(&g, base_config(), 100, N, 1, false);
    assert_int_equal(gpu_attention_new(&a, gpu, g.a, 1 << 27, 8, 1, true, msg, sizeof msg),
                     ERR_NOMEM);
    assert_null(a);
    assert_non_null(strstr(msg, "sequences"));
    assert_int_equal(gpu_attention_new(&a, gpu, g.a, 1, 8, 1, true, msg, sizeof msg), OK);
    gpu_attention_free(a);
    rig_close(&g);
}

int main(void) {
    char msg[256];
    if (gpu_open(&gpu, msg, sizeof msg)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_saved_state_comes_back_to_the_byte),
        cmocka_unit_test(test_a_long_softmax_state_comes_back_to_the_byte),
        cmocka_unit_test(test_either_side_goes_on_with_the_others_state),
        cmocka_unit_test(test_copies_and_loaded_states_go_on_with_the_same_bits),
        cmocka_unit_test(test_a_cleared_slot_remembers_nothing),
        cmocka_unit_test(test_a_bad_state_is_refused_and_leaves_a_cleared_slot),
        cmocka_unit_test(test_a_cache_too_large_for_a_block_is_refused),
        cmocka_unit_test(test_too_many_slots_are_no_memory),
    };
    int failed = run_in_both_orders(tests, sizeof tests / sizeof *tests, 3, NULL);
    gpu_close(gpu);
    return failed;
}
