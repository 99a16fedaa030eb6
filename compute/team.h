/* team.h - one fork-join team of threads for the whole process.
 *
 * team_run(team, fn, arg) calls fn(arg, thread, n_threads) once on each of the team's threads, the
 * caller being thread 0, and returns when all have finished; everything written before it is
 * visible inside, everything written inside is visible after it.  Idle workers spin for about 50 us,
 * then sleep on a futex, so a loaded step costs no system call and an idle server no CPU.
 * One team_run at a time (the scheduler thread owns the team); fn must not call team_run.
 * Work is split so that results never depend on n_threads: threads own outputs, never parts of
 * a sum. */
#ifndef URCHIN_COMPUTE_TEAM_H
#define URCHIN_COMPUTE_TEAM_H

#include "compute/ahead.h"
#include "config/err.h"

struct team;

/* n_threads 0: as many as the CPUs this process may use (affinity and cgroup quota, at least 1). */
enum err team_new(struct team **out, int n_threads);
void team_free(struct team *team); /* joins the workers; NULL is fine */
int team_size(const struct team *team);
void team_run(struct team *team, void (*fn)(void *arg, int thread, int n_threads), void *arg);

/* A thread that waits, for others to finish or for the next run, can meanwhile bring near what it reads
 * first then: `reads` says what that is.  It is called on each thread when that has done its part of a
 * run, with the arg given here (borrowed), from the next run on until another is given; NULL: nothing
 * is read.  Hints: what is computed does not depend on them, nor when a thread sees that it has work. */
typedef struct ahead team_reads(const void *arg, int thread, int n_threads);
void team_expect(struct team *team, team_reads *reads, const void *arg);

/* Nothing is expected any more, and no thread is reading: to be called before memory that was expected
 * is given back.  A run. */
void team_forget(struct team *team);

#endif
