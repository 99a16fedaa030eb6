/* bench.h - `urchin bench`: the engine's speed without HTTP or sampling, in llama-bench's terms.
 *
 *   urchin bench MODEL [--n-prompt 512] [--n-gen 64] [--depth 0,1000] [--batch 1,8,32] [--json]
 *
 * Opens MODEL itself and prints a table (or one JSON object) on stdout.  Returns the process's exit
 * status: 0, or 1 after one sentence on stderr.
 *
 *   pp N   a sequence that has read D tokens (the depth) reads N more, in steps of --prefill-chunk,
 *          with logits for the last
 *   tg N   B sequences that have read D tokens (copies of one) are given N tokens each, one a step,
 *          with logits for all
 *
 * Tokens are pseudo-random, the same in every run, and every depth is really read.  Each point is
 * measured --repeat times, all depths in turn, so that a disturbed machine disturbs them alike.
 * tokens/s and the ratio between depths are from the median over repetitions (decode: of each step,
 * then summed); step times are the median and the 99th percentile over all steps.  With terraced
 * windows of w a fold and a choice of the cache happen every w tokens: N should be a multiple of w.
 *
 * "slowest" is how unequal the steps of a block are: each of its w places is worth the least time a
 * step took there, which other work on the machine seldom disturbs, and the slowest place is set
 * against their median.  "-": no such block, or a place was seen less than three times.
 *
 * Bytes: a decode step has to read the weights once and each sequence's state once (a saved state's
 * bytes; softmax: the keys and values so far).  "of limit" is that, over the median step, over the
 * bandwidth at which the same threads read a buffer of as many bytes again and again, measured in
 * the same run: 100 % would be a step that does nothing but stream.  (An embedding table that is
 * not tied to the head counts as read, though only a row of it is.) */
#ifndef URCHIN_SERVER_BENCH_H
#define URCHIN_SERVER_BENCH_H

#include "compute/team.h"
#include "config/settings.h"

#include <stdbool.h>

/* seconds [repeat][n] of steps at positions first .. first + n - 1, in blocks of w: the least of
 * each place in a block; the largest of them, and their median (w even: the mean of the middle two).
 * False, nothing written: a place has fewer than three. */
bool bench_slowest_step(const double *seconds, int repeat, int n, int64_t first, int w,
                        double *slowest, double *median);

int bench_main(const struct settings *settings, struct team *team);

#endif
