/* test_compute_team.c - the fork-join team and big blocks of memory. */
#include "compute/memory.h"
#include "compute/nodes.h"
#include "compute/team.h"
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

enum { MAX_THREADS = 9 };

static struct team *team_of(int n_threads) {
    struct team *team = NULL;
    assert_int_equal(team_new(&team, n_threads), OK);
    return team;
}

/* Plain memory, no atomics: the team itself must order it, which ThreadSanitizer checks. */
struct board {
    long input;
    long calls[MAX_THREADS];
    long output[MAX_THREADS];
    int n_threads[MAX_THREADS];
};

static void write_board(void *arg, int thread, int n_threads) {
    struct board *b = arg;
    b->calls[thread]++;
    b->output[thread] = b->input * 10 + thread;
    b->n_threads[thread] = n_threads;
}

static void check_runs(struct team *team, int n_runs, long pause_ns) {
    struct board b = {0};
    int n = team_size(team);
    for (long run = 1; run <= n_runs; run++) {
        b.input = run;
        team_run(team, write_board, &b);
        for (int t = 0; t < n; t++) {
            assert_int_equal(b.calls[t], run);
            assert_int_equal(b.output[t], run * 10 + t);
            assert_int_equal(b.n_threads[t], n);
        }
        if (pause_ns) nanosleep(&(struct timespec){.tv_nsec = pause_ns}, NULL);
    }
}

/* Back to back the workers spin; after 1 ms they sleep; pauses near 50 us hit the moment in
 * between. */
static void test_each_thread_is_called_once_a_run_and_sees_the_arguments(void **state) {
    (void)state;
    for (int n = 1; n <= MAX_THREADS; n += n < 4 ? 1 : 5) { /* 9 is more than this machine has */
        struct team *team = team_of(n);
        assert_int_equal(team_size(team), n);
        check_runs(team, 2000, 0);
        check_runs(team, 20, 1000000);
        for (long pause = 1000; pause < 80000; pause += 1000)
            check_runs(team, 3, pause);
        team_free(team);
    }
}

static void late(void *arg, int thread, int n_threads) {
    _Atomic int *done = arg;
    (void)n_threads;
    if (thread)
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL); /* the caller falls asleep */
    atomic_fetch_add(done, 1);
}

static void test_a_run_ends_after_its_last_thread(void **state) {
    (void)state;
    struct team *team = team_of(4);
    for (int i = 1; i <= 10; i++) {
        _Atomic int done = 0;
        team_run(team, late, &done);
        assert_int_equal(atomic_load(&done), 4);
    }
    team_free(team);
}

static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* 50 us of spinning by 3 workers in 100 ms, with room for a slow machine; spinning on would take
 * 100 ms or more. */
static void test_an_idle_team_uses_no_cpu(void **state) {
    (void)state;
    struct team *team = team_of(4);
    check_runs(team, 1, 0);
    double start = cpu_seconds();
    nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    assert_true(cpu_seconds() - start < 0.02);
    team_free(team);
}

static void test_teams_come_and_go(void **state) {
    (void)state;
    for (int i = 0; i < 100; i++)
        team_free(team_of(i % 5 + 1)); /* also before their threads woke up */
    team_free(NULL);
    struct team *team = NULL;
    assert_int_equal(team_new(&team, -1), ERR_ARG);
    assert_null(team);
}

static void test_a_team_of_zero_is_as_large_as_the_cpus_allowed(void **state) {
    (void)state;
    cpu_set_t all, one;
    assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
    struct team *team = team_of(0);
    assert_in_range(team_size(team), 1, CPU_COUNT(&all));
    team_free(team);
    int cpu = 0;
    while (!CPU_ISSET(cpu, &all))
        cpu++;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    assert_int_equal(sched_setaffinity(0, sizeof one, &one), 0);
    team = team_of(0);
    assert_int_equal(team_size(team), 1);
    team_free(team);
    assert_int_equal(sched_setaffinity(0, sizeof all, &all), 0);
}

static void blocked_signals(void *arg, int thread, int n_threads) {
    sigset_t *sets = arg;
    (void)n_threads;
    pthread_sigmask(SIG_SETMASK, NULL, &sets[thread]);
}

static void test_workers_leave_signals_to_the_callers_threads(void **state) {
    (void)state;
    struct team *team = team_of(3);
    sigset_t sets[3];
    team_run(team, blocked_signals, sets);
    assert_false(sigismember(&sets[0], SIGTERM));
    assert_true(sigismember(&sets[1], SIGTERM));
    assert_true(sigismember(&sets[2], SIGTERM));
    team_free(team);
}

/* ---- what is ahead ---- */

static void test_lines_ahead_are_loaded_in_order_and_no_more_than_asked(void **state) {
    (void)state;
    static const char text[1000];
    struct ahead ahead = {{{text + 640, text + 1000}, {text, text + 129}, {text, text}}, 3};
    ahead_load(&ahead, 0);
    assert_int_equal(ahead.n, 2); /* the empty one is gone */
    ahead_load(&ahead, 2);
    assert_int_equal(ahead.n, 2);
    assert_ptr_equal(ahead.range[1].at, text + 128);
    assert_ptr_equal(ahead.range[0].at, text + 640);
    ahead_load(&ahead, 4); /* one is left of the last range, three are of the first */
    assert_int_equal(ahead.n, 1);
    assert_ptr_equal(ahead.range[0].at, text + 640 + 3 * CACHE_LINE);
    ahead_load(&ahead, 3); /* 360 bytes are six lines, the last of them short */
    assert_int_equal(ahead.n, 0);
    ahead_load(&ahead, 5);
    assert_int_equal(ahead.n, 0);
}

enum { PAGES = 4 }; /* a thread's: one before and one behind that no one may touch */

struct reading {
    char *pages; /* [threads][PAGES] */
    size_t page;
    _Atomic int asked[MAX_THREADS];
    int n_threads;
};

static struct ahead own_pages(const void *arg, int thread, int n_threads) {
    struct reading *r = (struct reading *)arg;
    char *own = r->pages + (size_t)thread * PAGES * r->page;
    atomic_fetch_add(&r->asked[thread], 1);
    assert_int_equal(n_threads, r->n_threads);
    return (struct ahead){
        {{own + 2 * r->page + CACHE_LINE, own + 3 * r->page}, {own + r->page, own + 2 * r->page}},
        2};
}

static void pause_by_turns(void *arg, int thread, int n_threads) {
    const int *late_one = arg;
    (void)n_threads;
    if (thread == *late_one) nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
}

static bool touched(char *page, size_t size) {
    unsigned char there = 0;
    assert_int_equal(mincore(page, size, &there), 0);
    return there & 1;
}

/* Waiting for a late caller, a worker loads what was named for it and nothing beside it, which
 * would be a fault; so does the caller for a late worker.  Where loads are only hints, nothing is
 * seen. */
static void test_a_thread_that_waits_loads_what_it_reads_next(void **state) {
    (void)state;
    struct team *team = team_of(0);
    const bool crowded = team_size(team) < 2; /* which leaves the CPU to whoever has work */
    team_free(team);
    if (crowded) skip();
    team = team_of(2);
    for (int late_one = 0; late_one < 2; late_one++) {
        struct reading r = {.page = (size_t)sysconf(_SC_PAGESIZE), .n_threads = 2};
        size_t bytes = 2 * PAGES * r.page;
        r.pages = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        assert_true(r.pages != MAP_FAILED);
        for (size_t t = 0; t < 2; t++)
            assert_int_equal(mprotect(r.pages + (t * PAGES + 1) * r.page, 2 * r.page, PROT_READ),
                             0);
        team_run(team, pause_by_turns, &late_one);
        assert_int_equal(r.asked[0] + r.asked[1], 0);
        team_expect(team, own_pages, &r);
        for (int run = 1; run <= 2; run++) {
            team_run(team, pause_by_turns, &late_one);
            assert_int_equal(r.asked[0], run);
            assert_int_equal(r.asked[1], run);
        }
        team_expect(team, NULL, NULL);
        team_run(team, pause_by_turns, &late_one);
        assert_int_equal(r.asked[0] + r.asked[1], 4);
#if defined(__x86_64__)
        for (size_t p = 1; p <= 2; p++)
            assert_true(touched(r.pages + ((size_t)!late_one * PAGES + p) * r.page, r.page));
#endif
        munmap(r.pages, bytes);
    }
    team_free(team);
}

static void test_expecting_changes_no_run(void **state) {
    (void)state;
    for (int n = 1; n <= MAX_THREADS; n += n < 4 ? 1 : 5) {
        struct team *team = team_of(n);
        static char data[MAX_THREADS * PAGES << 12];
        struct reading r = {.pages = data, .page = 1 << 12, .n_threads = n};
        team_expect(team, own_pages, &r);
        check_runs(team, 500, 0);
        for (long pause = 1000; pause < 80000; pause += 5000)
            check_runs(team, 3, pause);
        team_free(team);
    }
}

/* 64 MiB take a worker milliseconds to load, and are gone at once: were it not done with them, it
 * would stumble. */
enum { READ_BYTES = 64 << 20 };
static struct ahead many_lines(const void *arg, int thread, int n_threads) {
    const char *from = arg;
    (void)thread;
    (void)n_threads;
    return (struct ahead){.n = 1, .range = {{from, from + READ_BYTES}}};
}
static void do_nothing(void *arg, int thread, int n_threads) {
    (void)arg;
    (void)thread;
    (void)n_threads;
}
static void test_what_was_expected_may_be_given_back_once_it_is_forgotten(void **state) {
    (void)state;
    struct team *team;
    assert_int_equal(team_new(&team, 2), OK);
    for (int i = 0; i < 20; i++) {
        char *memory = memory_map(READ_BYTES);
        assert_non_null(memory);
        team_expect(team, many_lines, memory);
        team_run(team, do_nothing, NULL);
        team_forget(team);
        memory_unmap(memory, READ_BYTES);
    }
    team_free(team);
}

static void test_memory_is_zeroed_and_aligned(void **state) {
    (void)state;
    static const size_t sizes[] = {1,      63, 4096, 5000, (2 << 20) - 1, 2 << 20, (2 << 20) + 1,
                                   7 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int again = 0; again < 3; again++) { /* used memory that comes back is zeroed too */
            unsigned char *p = memory_map(sizes[i]);
            assert_non_null(p);
            assert_int_equal((uintptr_t)p % (sizes[i] >= 2 << 20 ? 2 << 20 : 64), 0);
            for (size_t at = 0; at < sizes[i]; at++)
                if (p[at]) fail_msg("byte %zu of %zu is not zero", at, sizes[i]);
            memset(p, 0xa5, sizes[i]);
            memory_unmap(p, sizes[i]);
        }
    }
    memory_unmap(NULL, 100);
}

static long mapped_pages(void) { /* of this process, as the kernel counts them */
    long pages = -1;
    FILE *f = fopen("/proc/self/statm", "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%ld", &pages), 1);
    fclose(f);
    return pages;
}

static void test_unmapping_gives_everything_back(void **state) {
    (void)state;
    memory_unmap(memory_map(5 << 20), 5 << 20);
    long before = mapped_pages();
    for (int i = 0; i < 100; i++) {
        size_t bytes = (size_t)(i + 1) * 100003;
        memory_unmap(memory_map(bytes), bytes);
    }
    assert_int_equal(mapped_pages(), before);
}

static void test_too_much_memory_is_refused(void **state) {
    (void)state;
    assert_null(memory_map(SIZE_MAX));
    assert_null(memory_map(SIZE_MAX / 2));
    assert_null(memory_map((size_t)1 << 60));
}

/* ---- memory nodes ---- */

static void write_list(const char *folder, int node, const char *list) {
    char path[200];
    snprintf(path, sizeof path, "%s/node%d", folder, node);
    mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/node%d/cpulist", folder, node);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(list, f);
    fclose(f);
}

static void assert_near(const char *folder, const cpu_set_t *usable, int thread, int n_threads,
                        int nodes, int first, int last) {
    cpu_set_t near;
    CPU_ZERO(&near);
    assert_int_equal(nodes_near(folder, usable, sizeof near, thread, n_threads, &near), nodes);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (!!CPU_ISSET(cpu, &near) != (cpu >= first && cpu <= last && CPU_ISSET(cpu, usable)))
            fail_msg("thread %d of %d: cpu %d", thread, n_threads, cpu);
}

/* Neighbours in the team share a node, each node has threads by its number of CPUs, and only CPUs
 * that the process may use count. */
static void test_threads_are_laid_over_the_nodes_in_order(void **state) {
    (void)state;
    char folder[] = "/tmp/urchin-nodes-XXXXXX", command[100];
    assert_non_null(mkdtemp(folder));
    write_list(folder, 0, "0-1,6-7\n");
    write_list(folder, 2, "\n"); /* memory alone */
    write_list(folder, 5, "8-15\n");
    cpu_set_t all;
    CPU_ZERO(&all);
    for (int cpu = 0; cpu < 16; cpu++)
        CPU_SET(cpu, &all);
    CPU_CLR(2, &all), CPU_CLR(3, &all), CPU_CLR(4, &all), CPU_CLR(5, &all);
    for (int t = 0; t < 12; t++)
        assert_near(folder, &all, t, 12, 2, t < 4 ? 0 : 8, t < 4 ? 7 : 15);
    for (int t = 0; t < 3; t++) /* fewer, or more, threads than CPUs */
        assert_near(folder, &all, t, 3, 2, t < 1 ? 0 : 8, t < 1 ? 7 : 15);
    for (int t = 0; t < 24; t++)
        assert_near(folder, &all, t, 24, 2, t < 8 ? 0 : 8, t < 8 ? 7 : 15);
    CPU_CLR(7, &all);
    assert_near(folder, &all, 0, 11, 2, 0, 6);
    for (int cpu = 8; cpu < 16; cpu++)
        CPU_CLR(cpu, &all);
    assert_near(folder, &all, 0, 3, 1, 1, 0); /* one node left: nothing to choose */
    write_list(folder, 0, "0-x\n");
    assert_near(folder, &all, 0, 3, 0, 1, 0);
    assert_near("/nowhere", &all, 0, 3, 0, 1, 0);
    snprintf(command, sizeof command, "rm -r %s", folder);
    assert_int_equal(system(command), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_threads_are_laid_over_the_nodes_in_order),
        cmocka_unit_test(test_each_thread_is_called_once_a_run_and_sees_the_arguments),
        cmocka_unit_test(test_a_run_ends_after_its_last_thread),
        cmocka_unit_test(test_an_idle_team_uses_no_cpu),
        cmocka_unit_test(test_teams_come_and_go),
        cmocka_unit_test(test_a_team_of_zero_is_as_large_as_the_cpus_allowed),
        cmocka_unit_test(test_workers_leave_signals_to_the_callers_threads),
        cmocka_unit_test(test_lines_ahead_are_loaded_in_order_and_no_more_than_asked),
        cmocka_unit_test(test_a_thread_that_waits_loads_what_it_reads_next),
        cmocka_unit_test(test_expecting_changes_no_run),
        cmocka_unit_test(test_what_was_expected_may_be_given_back_once_it_is_forgotten),
        cmocka_unit_test(test_memory_is_zeroed_and_aligned),
        cmocka_unit_test(test_unmapping_gives_everything_back),
        cmocka_unit_test(test_too_much_memory_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
