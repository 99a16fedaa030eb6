/* team.c - one fork-join team of threads.
 *
 * A run is announced by counting `run` up; a worker that sees it change calls the function and
 * counts `busy` down.  Both words are futexes.  A side that is about to sleep says so first
 * (`sleepers`, `caller_sleeps`) and the kernel compares the word again before it sleeps, while the
 * other side changes the word first and looks for sleepers second; with sequentially consistent
 * order one of the two always notices, and when nobody sleeps there is no system call. */
#include "compute/team.h"

#include "compute/nodes.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    SPIN_NS = 50000,        /* longer than the gaps between the matmuls of one step */
    SPIN_CROWDED_NS = 2000, /* more threads than CPUs: whoever waits is in the way of a worker */
    MOST_CPUS = 8192,
    LOADS = 4,              /* lines between two looks, in less than a microsecond */
};

struct worker {
    struct team *team;
    pthread_t id;
    int thread; /* 1 .. n_threads - 1 */
};

struct team {
    int n_threads;
    int n_started; /* workers whose thread exists */
    long spin_ns;
    struct worker *workers; /* [n_threads - 1], owned */
    /* written by the caller before `run` changes, read by workers after */
    void (*fn)(void *arg, int thread, int n_threads);
    void *arg;
    team_reads *reads;
    const void *reads_arg;
    bool stop;
    /* the caller and the workers each wait on a line of their own */
    _Alignas(64) _Atomic uint32_t run;
    _Atomic uint32_t sleepers;
    _Alignas(64) _Atomic uint32_t busy;
    _Atomic uint32_t caller_sleeps;
};

/* ---- waiting ---- */

static void futex_wait(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake_all(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void cpu_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Waits until *word differs from value, loading what is ahead, and returns what it became. */
static uint32_t wait_change(_Atomic uint32_t *word, uint32_t value, _Atomic uint32_t *sleepers,
                            long spin_ns, struct ahead *ahead) {
    uint32_t seen;
    int64_t end = 0;
    for (; ahead->n; ahead_load(ahead, LOADS))
        if ((seen = atomic_load_explicit(word, memory_order_acquire)) != value) return seen;
    for (;;) {
        for (int i = 0; i < 64; i++) {
            if ((seen = atomic_load_explicit(word, memory_order_acquire)) != value) return seen;
            cpu_pause();
        }
        int64_t now = now_ns();
        if (!end) end = now + spin_ns;
        if (now >= end) break;
    }
    atomic_fetch_add(sleepers, 1);
    while ((seen = atomic_load(word)) == value)
        futex_wait(word, value);
    atomic_fetch_sub(sleepers, 1);
    return seen;
}

/* On a machine with several memory nodes a worker stays on one, near to the pages that it wrote.
 * Which of the node's CPUs is the kernel's to say.  Advice: where it cannot be had all is as before. */
static void stay_near(const struct worker *self) {
    cpu_set_t *usable = CPU_ALLOC(MOST_CPUS), *near = CPU_ALLOC(MOST_CPUS);
    size_t bytes = CPU_ALLOC_SIZE(MOST_CPUS);
    if (usable && near && !sched_getaffinity(0, bytes, usable) &&
        nodes_near("/sys/devices/system/node", usable, bytes, self->thread, self->team->n_threads,
                   near) > 1)
        sched_setaffinity(0, bytes, near);
    CPU_FREE(usable);
    CPU_FREE(near);
}

/* What a thread that is done with its part of the run reads in the next. */
static struct ahead reads_next(const struct team *team, int thread) {
    if (!team->reads || team->spin_ns == SPIN_CROWDED_NS) return (struct ahead){.n = 0};
    return team->reads(team->reads_arg, thread, team->n_threads);
}

static void *work(void *arg) {
    struct worker *self = arg;
    struct team *team = self->team;
    struct ahead ahead = {.n = 0};
    stay_near(self);
    for (uint32_t seen = 0;;) {
        seen = wait_change(&team->run, seen, &team->sleepers, team->spin_ns, &ahead);
        if (team->stop) return NULL;
        team->fn(team->arg, self->thread, team->n_threads);
        ahead = reads_next(team, self->thread); /* the caller may change it once nobody is busy */
        if (atomic_fetch_sub(&team->busy, 1) == 1 && atomic_load(&team->caller_sleeps))
            futex_wake_all(&team->busy);
    }
}

static void announce(struct team *team) {
    atomic_fetch_add(&team->run, 1);
    if (atomic_load(&team->sleepers)) futex_wake_all(&team->run);
}

/* ---- how many CPUs ---- */

static int affinity_cpus(void) {
    for (int n = 1024; n <= 1 << 20; n *= 2) {
        cpu_set_t *set = CPU_ALLOC((size_t)n);
        if (!set) return 1;
        size_t bytes = CPU_ALLOC_SIZE((size_t)n);
        int rc = sched_getaffinity(0, bytes, set), count = rc ? 0 : CPU_COUNT_S(bytes, set);
        CPU_FREE(set);
        if (!rc) return count > 0 ? count : 1;
    }
    return 1;
}

static bool read_line(const char *path, char *line, size_t size) {
    FILE *f = fopen(path, "re");
    if (!f) return false;
    bool ok = fgets(line, (int)size, f) != NULL;
    fclose(f);
    return ok;
}

/* CPUs that one control group allows: v2 "quota period" in cpu.max, v1 in two files; a quota of
 * "max" or -1 is none. Part of a CPU counts as none: a team of spinning threads that is throttled
 * is slower than a smaller one. */
static int group_cpus(const char *dir) {
    char path[4400], line[128];
    long long quota = -1, period = -1;
    snprintf(path, sizeof path, "%s/cpu.max", dir);
    if (read_line(path, line, sizeof line)) {
        if (sscanf(line, "%lld %lld", &quota, &period) != 2) quota = -1;
    } else {
        snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", dir);
        if (read_line(path, line, sizeof line)) quota = atoll(line);
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", dir);
        if (read_line(path, line, sizeof line)) period = atoll(line);
    }
    if (quota <= 0 || period <= 0 || quota / period >= INT_MAX) return INT_MAX;
    return quota < period ? 1 : (int)(quota / period);
}

/* The strictest quota from this process's group up to the root of the hierarchy. */
static int quota_cpus(void) {
    FILE *f = fopen("/proc/self/cgroup", "re");
    if (!f) return INT_MAX;
    int least = INT_MAX;
    char line[4200], dir[4300];
    while (fgets(line, sizeof line, f)) { /* "0::/path" (v2) or "7:cpu,cpuacct:/path" (v1) */
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        controllers++;
        bool v2 = !*controllers;
        if (!v2 && strcmp(controllers, "cpu") && strncmp(controllers, "cpu,", 4) &&
            !strstr(controllers, ",cpu,"))
            continue;
        for (;;) {
            snprintf(dir, sizeof dir, "/sys/fs/cgroup%s%s", v2 ? "" : "/cpu", group);
            int cpus = group_cpus(dir);
            if (cpus < least) least = cpus;
            char *slash = strrchr(group, '/');
            if (!slash) break;
            *slash = 0;
        }
    }
    fclose(f);
    return least;
}

static int usable_cpus(void) {
    int cpus = affinity_cpus(), quota = quota_cpus();
    return cpus < quota ? cpus : quota;
}

/* ---- public ---- */

enum err team_new(struct team **out, int n_threads) {
    if (n_threads < 0) return ERR_ARG;
    int cpus = usable_cpus();
    if (!n_threads) n_threads = cpus;
    struct team *team = aligned_alloc(64, (sizeof *team + 63) / 64 * 64);
    if (!team) return ERR_NOMEM;
    memset(team, 0, sizeof *team);
    team->n_threads = n_threads;
    team->spin_ns = n_threads > cpus ? SPIN_CROWDED_NS : SPIN_NS;
    if (n_threads > 1) {
        team->workers = calloc((size_t)n_threads - 1, sizeof *team->workers);
        if (!team->workers) goto fail;
    }
    /* Signals are for the threads that wait for them, never for a worker. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 0; i < n_threads - 1; i++) {
        struct worker *w = &team->workers[i];
        *w = (struct worker){.team = team, .thread = i + 1};
        if (pthread_create(&w->id, NULL, work, w)) break;
        team->n_started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (team->n_started < n_threads - 1) goto fail;
    *out = team;
    return OK;
fail:
    team_free(team);
    return ERR_NOMEM;
}

void team_free(struct team *team) {
    if (!team) return;
    team->stop = true;
    announce(team);
    for (int i = 0; i < team->n_started; i++)
        pthread_join(team->workers[i].id, NULL);
    free(team->workers);
    free(team);
}

int team_size(const struct team *team) {
    return team->n_threads;
}

void team_run(struct team *team, void (*fn)(void *arg, int thread, int n_threads), void *arg) {
    if (team->n_threads > 1) {
        team->fn = fn;
        team->arg = arg;
        atomic_store(&team->busy, (uint32_t)team->n_threads - 1);
        announce(team);
    }
    fn(arg, 0, team->n_threads);
    struct ahead ahead = reads_next(team, 0);
    for (uint32_t busy; (busy = atomic_load_explicit(&team->busy, memory_order_acquire));)
        wait_change(&team->busy, busy, &team->caller_sleeps, team->spin_ns, &ahead);
}

void team_expect(struct team *team, team_reads *reads, const void *arg) {
    team->reads = reads;
    team->reads_arg = arg;
}

static void nothing(void *arg, int thread, int n_threads) {
    (void)arg;
    (void)thread;
    (void)n_threads;
}
void team_forget(struct team *team) {
    team_expect(team, NULL, NULL);
    team_run(team, nothing, NULL);
}
