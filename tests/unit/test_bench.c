/* test_bench.c - the benchmark measures what it says: every point, its bytes, and depths that are
 * really read. */
#include "command_testing.h"
#include "config/json.h"
#include "model/model.h"
#include "server/bench.h"

#define MODEL "models/stories260k-hedgehog"
#define SOFTMAX "tests/data/models/stories260k"

static int run_bench(char **flags, int n_flags, int out_fd, char *text, size_t room) {
    return run_command(bench_main, flags, n_flags, out_fd, text, room);
}

static double number(const struct json *o, const char *key) {
    return json_number(json_get(o, key), -1);
}

/* bytes_per_token: what a sequence's state has to grow by; layout may pad it to twice that. */
static void check_points(const char *model, double bytes_per_token) {
    char text[1 << 14], *flags[] = {"bench",    (char *)model, "--n-prompt", "48",      "--n-gen",
                                    "20",       "--depth",     "128,0,128",  "--batch", "3,1",
                                    "--repeat", "2",           "--json"};
    assert_int_equal(run_bench(flags, sizeof flags / sizeof *flags, 1, text, sizeof text), 0);
    struct json *root;
    char msg[256];
    if (json_parse(&root, text, strlen(text), "bench", msg, sizeof msg)) fail_msg("%s", msg);
    static const struct {
        const char *test;
        int batch, depth, tokens;
    } expected[] = {{"pp", 1, 0, 48},   {"pp", 1, 128, 48}, {"tg", 1, 0, 20},
                    {"tg", 1, 128, 20}, {"tg", 3, 0, 20},   {"tg", 3, 128, 20}};
    int i = 0;
    double weights = number(root, "weight_bytes"), bytes[6] = {0};
    assert_true(weights > 1e6 && weights < 1.2e6); /* 260 thousand parameters in fp32 */
    for (const struct json *p = json_child(json_get(root, "points")); p; p = json_next(p), i++) {
        assert_true(i < 6);
        assert_string_equal(json_string(json_get(p, "test")), expected[i].test);
        assert_int_equal((int)number(p, "batch"), expected[i].batch);
        assert_int_equal((int)number(p, "depth"), expected[i].depth);
        assert_int_equal((int)number(p, "tokens"), expected[i].tokens);
        assert_true(number(p, "tokens_per_s") > 0);
        if (expected[i].depth == 0) assert_true(number(p, "against_first_depth") == 1);
        if (*expected[i].test == 'p') continue;
        bytes[i] = number(p, "step_bytes") - weights;
        assert_true(number(p, "step_median_ms") > 0);
        assert_true(number(p, "step_p99_ms") >= number(p, "step_median_ms"));
        assert_true(json_get(p, "step_slowest_ms") == NULL); /* 40 steps are too few for a block */
        assert_true(number(p, "read_bandwidth") > 1e8); /* a tenth of a GB/s: anything that runs */
    }
    assert_int_equal(i, 6);
    assert_true(bytes[2] > 0);
    assert_true(bytes[4] == 3 * bytes[2] && bytes[5] == 3 * bytes[3]);
    double growth = bytes[3] - bytes[2];
    assert_true(growth >= 128 * bytes_per_token && growth <= 2 * 128 * bytes_per_token);
    json_free(root);
}

static void test_every_point_is_measured_and_states_keep_their_size(void **state) {
    (void)state;
    check_points(MODEL, 0);
}

static void test_softmax_depth_is_really_read(void **state) {
    (void)state;
    check_points(SOFTMAX, 5 * 4 * (8 + 8) * 2); /* layers, heads, key and value, in bf16 */
}

static void test_depths_past_a_models_limit_are_refused(void **state) {
    (void)state;
    char text[1024],
        *flags[] = {"bench", SOFTMAX, "--depth", "0,500", "--n-prompt", "13", "--n-gen", "5"};
    assert_int_equal(run_bench(flags, 8, 2, text, sizeof text), 1);
    assert_non_null(strstr(text, "--max-seq-len 513"));
}

/* Two runs of 10 steps from position 7 on in blocks of 4: the places 3 0 1 2 3 0 1 2 3 0.  What is
 * disturbed once is not slow. */
static void test_the_slowest_step_is_of_a_place_in_the_block(void **state) {
    (void)state;
    double seconds[] = {5, 9, 2, 3, 90, 7, 4, 2.5, 6, 8, 70, 60, 50, 40, 30, 7.5, 2.25, 80, 9, 99};
    double slowest = -1, median = -1;
    assert_true(bench_slowest_step(seconds, 2, 10, 7, 4, &slowest, &median));
    assert_true(slowest == 7);            /* place 0: the least of 9, 7, 8, 60, 7.5, 99 */
    assert_true(median == (2.5 + 5) / 2); /* of 7, 2, 2.5, 5 */
    assert_true(bench_slowest_step(seconds, 2, 10, 4, 3, &slowest, &median));
    assert_true(slowest == 2.5 && median == 2.25); /* of 2, 2.25, 2.5 */
    slowest = median = -1;
    assert_false(bench_slowest_step(seconds, 2, 10, 7, 8, &slowest, &median)); /* seen twice */
    assert_false(bench_slowest_step(seconds, 1, 10, 7, 4, &slowest, &median));
    assert_false(bench_slowest_step(seconds, 1, 10, 7, 0, &slowest, &median)); /* no blocks */
    assert_true(slowest == -1 && median == -1);
}

int main(void) {
    if (team_new(&team, 2)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_point_is_measured_and_states_keep_their_size),
        cmocka_unit_test(test_softmax_depth_is_really_read),
        cmocka_unit_test(test_depths_past_a_models_limit_are_refused),
        cmocka_unit_test(test_the_slowest_step_is_of_a_place_in_the_block),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    team_free(team);
    return failed;
}
