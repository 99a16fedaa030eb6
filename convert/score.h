/* score.h - what a row of logits says: loss of the true token, and distance to another model's row.
 *
 *   p = softmax(x)    nll = -log p[target]    KL(b || p) = sum_i b_i (log b_i - log p_i)    agree =
 * argmax b == argmax p
 *
 * b is the model compared against (the teacher, or the same model in fp32).  Natural logarithms;
 * exponentials in single, everything else in double: a probability above 1e-7 is within 2e-6 of
 * itself, so a row's KL errs by less than 2e-6 of max |log b - log p|.  Ties of argmax go to the
 * lower id. */
#ifndef URCHIN_CONVERT_SCORE_H
#define URCHIN_CONVERT_SCORE_H

#include "compute/team.h"
#include <stdint.h>

/* Sums over scored tokens; add with score_add, read with the functions below. */
struct score {
    int64_t n;        /* tokens scored */
    double nll;       /* sum, nats */
    double kl;        /* sum, nats; 0 where nothing is compared */
    int64_t n_agree;  /* rows whose most likely token is the other model's */
    double off, off2; /* of an ablation: sums of nll less the whole model's, and of its square */
};

void score_add(struct score *sum, const struct score *part);
double score_perplexity(const struct score *s); /* exp of the mean nll; NaN for n 0 */
double score_mean_nll(const struct score *s);
double score_mean_kl(const struct score *s);
double score_agreement(const struct score *s); /* share of rows, 0 .. 1 */

/* Of one token's score, beside the whole model's of the same token. */
void score_compare(struct score *ablated, const struct score *whole);
double score_mean_off(const struct score *s);  /* nats */
double score_off_error(const struct score *s); /* its standard error, tokens taken as independent */

/* One row: logits and against [vocab_size], against NULL: kl and n_agree stay 0. */
struct score score_row(const float *logits, const float *against, int vocab_size, int32_t target);

/* rows [n_rows][vocab_size] each, targets [n_rows], results in out [n_rows]; rows are split over
 * the team. */
void score_rows(struct team *team, struct score *out, const float *logits, const float *against,
                int n_rows, int vocab_size, const int32_t *targets);

#endif
