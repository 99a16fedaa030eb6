/* test_sched_queue.c - who runs and who waits, and that every slot is given back. */
#include "scheduler_testing.h"

#include <sys/resource.h>

/* ---- slots and the queue ---- */

static void test_leaving_frees_the_slot_within_a_step(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = endless();
    struct reader *readers[N_SLOTS];
    for (int i = 0; i < N_SLOTS; i++)
        readers[i] = submit(s, &request);
    wait_for_stat(s, slots_used, N_SLOTS);
    for (int i = 1; i < N_SLOTS; i++)
        reader_free(readers[i]);
    wait_for_stat(s, slots_used, 1);
    struct sched_stats before, after;
    reader_free(readers[0]);
    sched_stats(s, &before);
    wait_for_stat(s, slots_used, 0);
    sched_stats(s, &after);
    assert_in_range(after.steps - before.steps, 0, 1); /* the one under way */
    assert_int_equal(after.finished[FINISH_CANCELLED], N_SLOTS);
    assert_int_equal(after.running, 0);
    request = request_for(n_story, 10);
    request.n = request.best_of = N_SLOTS; /* all slots serve again */
    reader_free(answered(s, &request));
    sched_free(s);
}

static void test_a_full_queue_says_when_to_come_back(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    options.max_queue = 2;
    struct sched *s = start(&options);
    struct sched_request request = endless();
    struct reader *readers[N_SLOTS], *waiting[2];
    for (int i = 0; i < N_SLOTS; i++)
        readers[i] = submit(s, &request);
    wait_for_stat(s, slots_used, N_SLOTS);
    struct sched_request short_one = request_for(n_story, 5);
    waiting[0] = submit(s, &short_one);
    waiting[1] = submit(s, &short_one);
    struct ticket *t = NULL;
    double retry = 0, before = 0;
    char msg[300] = "";
    for (int i = 0; i < 3; i++) { /* those turned away earlier come back earlier */
        assert_int_equal(sched_submit(s, &short_one, NULL, NULL, &t, &retry, msg, sizeof msg),
                         ERR_BUSY);
        assert_true(retry > before && retry <= 120);
        before = retry;
    }
    assert_string_equal(msg, "all 8 sequences are in use and 2 requests wait");
    struct sched_stats stats;
    sched_stats(s, &stats);
    assert_int_equal(stats.rejected, 3);
    assert_int_equal(stats.waiting, 2);
    reader_free(readers[0]); /* its slot serves both, one after the other */
    read_all(waiting[0]);
    read_all(waiting[1]);
    assert_same_answer(&waiting[0]->answers[0], &waiting[1]->answers[0]);
    reader_free(waiting[0]);
    reader_free(waiting[1]);
    reader_free(answered(s, &short_one)); /* and the queue takes again */
    waiting[0] = submit(s, &request);     /* one that leaves while it waits gives its place back */
    for (int i = 1; i < N_SLOTS; i++)
        reader_free(readers[i]);
    reader_free(waiting[0]);
    wait_for_stat(s, slots_used, 0);
    sched_stats(s, &stats);
    assert_int_equal(stats.waiting, 0);
    sched_free(s);
}

static void test_no_queue_still_takes_what_can_start_at_once(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    options.max_queue = 0;
    struct sched *s = start(&options);
    struct sched_request request = endless();
    struct reader *readers[N_SLOTS];
    struct ticket *t = NULL;
    double retry;
    for (int i = 0; i < N_SLOTS; i++)
        readers[i] = submit(s, &request);
    assert_int_equal(sched_submit(s, &request, NULL, NULL, &t, &retry, NULL, 0), ERR_BUSY);
    for (int i = 0; i < N_SLOTS; i++)
        reader_free(readers[i]);
    sched_free(s);
}

/* A reader whose news hold the scheduler thread up until it is let go. */
struct gate {
    pthread_mutex_t mu;
    pthread_cond_t moved;
    bool reached, open;
};

static void stand_at_gate(void *arg) {
    struct gate *g = arg;
    pthread_mutex_lock(&g->mu);
    g->reached = true;
    pthread_cond_broadcast(&g->moved);
    while (!g->open)
        pthread_cond_wait(&g->moved, &g->mu);
    pthread_mutex_unlock(&g->mu);
}

/* All come while the scheduler thread is busy, so that none has been given its slot yet. */
static void test_a_burst_finds_every_slot_and_every_place_of_the_queue(void **state) {
    (void)state;
    struct gate gate = {.mu = PTHREAD_MUTEX_INITIALIZER, .moved = PTHREAD_COND_INITIALIZER};
    struct sched_options options = options_for(model);
    options.max_queue = 2;
    struct sched *s = start(&options);
    struct sched_request request = request_for(n_story, 5);
    struct reader *readers[N_SLOTS - 1 + 2];
    struct ticket *first = NULL, *t = NULL;
    double retry;
    char msg[300] = "";
    assert_int_equal(
        sched_submit(s, &request, stand_at_gate, &gate, &first, &retry, msg, sizeof msg), OK);
    pthread_mutex_lock(&gate.mu);
    while (!gate.reached)
        pthread_cond_wait(&gate.moved, &gate.mu);
    pthread_mutex_unlock(&gate.mu);
    for (int i = 0; i < N_SLOTS - 1 + 2; i++)
        readers[i] = submit(s, &request);
    assert_int_equal(sched_submit(s, &request, NULL, NULL, &t, &retry, msg, sizeof msg), ERR_BUSY);
    assert_string_equal(msg, "all 8 sequences are in use and 2 requests wait");
    pthread_mutex_lock(&gate.mu);
    gate.open = true;
    pthread_cond_broadcast(&gate.moved);
    pthread_mutex_unlock(&gate.mu);
    for (int i = 0; i < N_SLOTS - 1 + 2; i++) {
        read_all(readers[i]);
        reader_free(readers[i]);
    }
    ticket_free(first);
    sched_free(s);
}

static void test_a_request_for_many_slots_is_not_overtaken(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = endless(), wide = request_for(n_story, 5), narrow = wide;
    wide.n = wide.best_of = N_SLOTS;
    struct reader *running = submit(s, &request);
    wait_for_stat(s, slots_used, 1);
    struct reader *first = submit(s, &wide), *second = submit(s, &narrow);
    wait_for_stat(s, waiting, 2);
    for (int i = 0; i < 20; i++)
        nap();
    struct sched_stats stats;
    sched_stats(s, &stats);
    assert_int_equal(stats.waiting, 2); /* although slots are free for the second */
    assert_int_equal(stats.slots_used, 1);
    reader_free(running);
    read_all(first);
    read_all(second);
    reader_free(first);
    reader_free(second);
    sched_free(s);
}

/* Every step that reads a part of the long prompt also generates a token of the running sequence.
 */
static void test_reading_a_long_prompt_delays_nobody_by_more_than_a_step(void **state) {
    (void)state;
    enum { LENGTH = 3000, CHUNK = 16 };
    static int32_t prompt[LENGTH];
    for (int i = 0; i < LENGTH; i++)
        prompt[i] = story[1 + (size_t)i % (n_story - 1)];
    struct sched_options options = options_for(model);
    options.prefill_chunk = CHUNK;
    options.output_limit = (size_t)1 << 30;
    struct sched *s = start(&options);
    struct sched_request request = endless(), reading = request_for(1, 0);
    reading.prompt = prompt;
    reading.n_prompt = LENGTH;
    struct reader *running = submit(s, &request);
    wait_for_stat(s, slots_used, 1);
    struct sched_stats before, after;
    do
        sched_stats(s, &before);
    while (!before.generation_tokens);
    reader_free(answered(s, &reading));
    sched_stats(s, &after);
    uint64_t n_steps = after.steps - before.steps;
    assert_true(n_steps >= LENGTH / CHUNK);
    assert_int_equal(after.generation_tokens - before.generation_tokens, n_steps);
    assert_int_equal(after.step_tokens.count[SCHED_BUCKETS], 0);
    for (int i = 0; i < SCHED_BUCKETS;
         i++) /* no step was larger than the chunk and one row: in the bucket up to 32 */
        if (sched_tokens_bounds[i] > 32) assert_int_equal(after.step_tokens.count[i], 0);
    reader_free(running);
    sched_free(s);
}

static void test_a_slow_reader_pauses_alone_and_misses_nothing(void **state) {
    (void)state;
    struct sched_request request = request_for(n_story, 400), other = request_for(n_story, 300);
    request.ignore_eos = other.ignore_eos = true;
    struct sched *s = start_default();
    struct reader *expected = answered(s, &request);
    sched_free(s);
    struct sched_options options = options_for(model);
    options.output_limit = 4096;
    s = start(&options);
    struct reader *slow = submit(s, &request);
    wait_for_stat(s, slots_paused, 1);
    assert_true(ticket_usage(slow->ticket).completion_tokens < 400);
    int64_t stuck = ticket_usage(slow->ticket).completion_tokens;
    reader_free(answered(s, &other)); /* while the slow one stands still */
    assert_int_equal(ticket_usage(slow->ticket).completion_tokens, stuck);
    read_all(slow);
    assert_same_answer(&slow->answers[0], &expected->answers[0]);
    assert_int_equal(slow->usage.completion_tokens, 400);
    reader_free(slow);
    reader_free(expected);
    sched_free(s);
}

/* ---- the end, and trouble ---- */

static void test_drain_finishes_what_runs_and_takes_nothing_new(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = request_for(n_story, 200);
    request.ignore_eos = true;
    struct reader *readers[12];
    for (int i = 0; i < 12; i++)
        readers[i] = submit(s, &request); /* more than there are slots */
    assert_true(sched_drain(s, 60));
    for (int i = 0; i < 12; i++) {
        assert_true(read_some(readers[i])); /* all of it is there */
        assert_int_equal(readers[i]->answers[0].n_tokens, 200);
        reader_free(readers[i]);
    }
    struct ticket *t = NULL;
    double retry = 0;
    assert_int_equal(sched_submit(s, &request, NULL, NULL, &t, &retry, NULL, 0), ERR_BUSY);
    assert_true(retry == -1);
    sched_free(s);
}

static void test_drain_gives_up_after_its_time_and_free_cancels_the_rest(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = endless();
    struct reader *r = submit(s, &request);
    double started = seconds();
    assert_false(sched_drain(s, 0.02)); /* short: what it wrote by then has to fit an answer */
    assert_true(seconds() - started >= 0.02);
    sched_free(s);
    read_some(r); /* a ticket outlives the scheduler */
    assert_true(ticket_done(r->ticket));
    assert_int_equal(r->answers[0].finish, FINISH_CANCELLED);
    reader_free(r);
}

/* The scheduler is told of more rows a step than the model takes, so that the model refuses the
 * step. */
static void test_a_failed_step_ends_its_requests_with_a_sentence(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    options.max_rows = 4096;
    options.prefill_chunk = 4000;
    struct sched *s = start(&options);
    int32_t prompt[MAX_ROWS + 1];
    for (int i = 0; i <= MAX_ROWS; i++)
        prompt[i] = story[1];
    struct sched_request request = request_for(1, 5);
    request.prompt = prompt;
    request.n_prompt = MAX_ROWS + 1;
    struct reader *r = answered(s, &request);
    assert_int_equal(r->answers[0].finish, FINISH_ERROR);
    assert_string_equal(r->answers[0].error, "the model's step failed");
    reader_free(r);
    struct sched_stats stats;
    wait_for_stat(s, slots_used, 0);
    sched_stats(s, &stats);
    assert_true(stats.healthy); /* only a lost device is for good */
    request = request_for(n_story, 5);
    r = answered(s, &request);
    assert_int_equal(r->answers[0].n_tokens, 5);
    reader_free(r);
    sched_free(s);
}

static void test_steps_that_cannot_hold_all_slots_are_refused(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    struct sched *s = NULL;
    char msg[300];
    options.max_logits = N_SLOTS;
    assert_int_equal(sched_new(&s, &options, msg, sizeof msg), ERR_ARG);
    options.max_logits = MAX_LOGITS;
    options.max_rows = N_SLOTS;
    assert_int_equal(sched_new(&s, &options, msg, sizeof msg), ERR_ARG);
    assert_null(s);
}

static double cpu_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* Neither with nothing to do nor with a reader that does not read: 0.3 s asleep cost less than a
 * tenth of that. */
static void test_an_idle_scheduler_uses_no_cpu(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    options.output_limit = 1024;
    struct sched *s = start(&options);
    struct sched_request request = endless();
    for (int paused = 0; paused < 2; paused++) {
        struct reader *r = paused ? submit(s, &request) : NULL;
        if (paused) wait_for_stat(s, slots_paused, 1);
        double before = cpu_seconds();
        nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
        assert_true(cpu_seconds() - before < 0.03);
        if (r) reader_free(r);
    }
    sched_free(s);
}

static void test_numbers_add_up(void **state) {
    (void)state;
    struct sched *s = start_default();
    struct sched_request request = request_for(n_story, 30);
    request.ignore_eos = true;
    for (int i = 0; i < 3; i++)
        reader_free(answered(s, &request));
    assert_true(sched_drain(s, 10));
    wait_for_stat(s, running, 0);
    struct sched_stats st;
    sched_stats(s, &st);
    assert_int_equal(st.slots, N_SLOTS);
    assert_int_equal(st.prompt_tokens, 3 * n_story);
    assert_int_equal(st.generation_tokens, 90);
    assert_int_equal(st.finished[FINISH_LENGTH], 3);
    const struct {
        const struct histogram *h;
        uint64_t count;
        double sum;
    } expected[] = {{&st.time_to_first_token, 3, -1},
                    {&st.inter_token, 3 * 29, -1},
                    {&st.e2e, 3, -1},
                    {&st.queue_time, 3, -1},
                    {&st.prefill_time, 3, -1},
                    {&st.decode_time, 3, -1},
                    {&st.prompt_len, 3, 3.0 * (double)n_story},
                    {&st.generation_len, 3, 90},
                    {&st.step_tokens, st.steps, 3.0 * (double)n_story + 3 * 29}};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        uint64_t n = 0;
        for (int b = 0; b <= SCHED_BUCKETS; b++)
            n += expected[i].h->count[b];
        assert_int_equal(n, expected[i].count);
        if (expected[i].sum >= 0) assert_true(expected[i].h->sum == expected[i].sum);
    }
    assert_true(st.tokens_per_s > 0);
    for (int b = 1; b < SCHED_BUCKETS; b++) {
        assert_true(sched_seconds_bounds[b] > sched_seconds_bounds[b - 1]);
        assert_true(sched_tokens_bounds[b] > sched_tokens_bounds[b - 1]);
    }
    sched_free(s);
}

/* ---- many at once ---- */

enum { N_CLIENTS = 8, N_EACH = 25 };
static struct sched *shared;

static uint32_t next_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

static void *client(void *arg) {
    uint64_t random = (uint64_t)(uintptr_t)arg;
    for (int i = 0; i < N_EACH; i++) {
        struct sched_request request =
            request_for(1 + next_random(&random) % n_story, next_random(&random) % 60);
        static const char *const stops[] = {" the", "a"};
        static const size_t lens[] = {4, 1};
        request.sampling.seed = next_random(&random);
        request.sampling.top_k = (int)(next_random(&random) % 3) * 20;
        request.sampling.presence_penalty = (float)(next_random(&random) % 2);
        request.best_of = 1 + (int)(next_random(&random) % 4);
        request.n = 1 + (int)(next_random(&random) % (uint32_t)request.best_of);
        request.n_logprobs = (int)(next_random(&random) % 4) - 1;
        request.prompt_logprobs = next_random(&random) % 4 == 0;
        request.stop = stops;
        request.stop_len = lens;
        request.n_stop = (int)(next_random(&random) % 3);
        struct reader *r = submit(shared, &request);
        uint32_t fate = next_random(&random) % 4;
        if (fate == 0) { /* leaves at once or after a few events */
            for (uint32_t naps = next_random(&random) % 4; naps; naps--)
                nap();
            read_some(r);
        } else {
            read_all(r);
            for (int c = 0; c < request.n; c++)
                assert_true(r->answers[c].finish == FINISH_STOP ||
                            r->answers[c].finish == FINISH_LENGTH);
        }
        reader_free(r);
    }
    return NULL;
}

static void test_many_clients_that_come_and_go_leave_nothing_behind(void **state) {
    (void)state;
    struct sched_options options = options_for(model);
    options.max_queue = N_CLIENTS * N_EACH; /* who leaves keeps a place until the next step */
    options.output_limit = 2000;
    shared = start(&options);
    pthread_t threads[N_CLIENTS];
    for (uintptr_t i = 0; i < N_CLIENTS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, client, (void *)(i + 1)), 0);
    for (int i = 0; i < N_CLIENTS; i++)
        pthread_join(threads[i], NULL);
    assert_true(sched_drain(shared, 30));
    wait_for_stat(shared, slots_used, 0);
    struct sched_stats stats;
    sched_stats(shared, &stats);
    assert_int_equal(stats.running, 0);
    assert_int_equal(stats.waiting, 0);
    uint64_t n = 0;
    for (int i = 0; i < 5; i++)
        n += stats.finished[i];
    assert_int_equal(n, N_CLIENTS * N_EACH);
    assert_int_equal(stats.finished[FINISH_ERROR], 0);
    sched_free(shared);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_leaving_frees_the_slot_within_a_step),
        cmocka_unit_test(test_a_full_queue_says_when_to_come_back),
        cmocka_unit_test(test_no_queue_still_takes_what_can_start_at_once),
        cmocka_unit_test(test_a_burst_finds_every_slot_and_every_place_of_the_queue),
        cmocka_unit_test(test_a_request_for_many_slots_is_not_overtaken),
        cmocka_unit_test(test_reading_a_long_prompt_delays_nobody_by_more_than_a_step),
        cmocka_unit_test(test_a_slow_reader_pauses_alone_and_misses_nothing),
        cmocka_unit_test(test_drain_finishes_what_runs_and_takes_nothing_new),
        cmocka_unit_test(test_drain_gives_up_after_its_time_and_free_cancels_the_rest),
        cmocka_unit_test(test_a_failed_step_ends_its_requests_with_a_sentence),
        cmocka_unit_test(test_steps_that_cannot_hold_all_slots_are_refused),
        cmocka_unit_test(test_an_idle_scheduler_uses_no_cpu),
        cmocka_unit_test(test_numbers_add_up),
        cmocka_unit_test(test_many_clients_that_come_and_go_leave_nothing_behind),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
