/* choice.h - multiple choice by log-likelihood, as lm-evaluation-harness scores it.
 *
 * A question's context C is followed by one space and a choice A_i (no space where A_i begins with
 * white space, or C ends in it).  Tokens are those of lm-evaluation-harness: C alone gives the
 * context's n tokens, C and A_i together the choice's, all from the n-th on; BOS comes first where
 * the tokenizer adds it.
 *
 *   l_i = sum_t log p(a_it | C, a_i0 .. a_it-1)      chosen       argmax_i l_i           acc
 *                                                    normalised   argmax_i l_i / |A_i|   acc_norm
 *
 * |A_i| is the choice's length in bytes, without the space before it (the harness counts
 * characters: the same for ASCII).  Ties go to the first.  Both accuracies are means over
 * questions; their standard error is sqrt(a (1 - a) / (n - 1)).
 *
 * Every reader reads a context once; each choice goes on from a copy of the slot. */
#ifndef URCHIN_CONVERT_CHOICE_H
#define URCHIN_CONVERT_CHOICE_H

#include "convert/reading.h"
#include "convert/tasks.h"

struct choice_sums { /* questions, and how many are right by either rule */
    int n, right, right_norm;
};
double choice_accuracy(int n, int right);
double choice_error(int n, int right); /* NaN for n < 2 */

/* l_i of one task into likelihoods [n_choices].  Uses the reader's slot and its spare one.
 * ERR_ARG: longer than the reader's limit, or a choice that has no token of its own; the sentence
 * names file and line. */
enum err choice_ask(double *likelihoods, struct reader *reader, const char *file,
                    const struct task *task, int32_t bos, char *msg, size_t msg_len);

/* The indices chosen, plain and normalised. */
void choice_pick(const double *likelihoods, const struct task *task, int *plain, int *normalised);

/* All readers answer all tasks: sums [n_readers], added to. */
enum err choice_measure(struct choice_sums *sums, struct reader *readers, int n_readers,
                        const struct tasks *tasks, int32_t bos, char *msg, size_t msg_len);

#endif
