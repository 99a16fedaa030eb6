/* retrieval.h - which heads look single facts up, wherever in the text they stand?
 *
 * A few heads of a Transformer do that for all of it (retrieval heads: Wu et al. 2024, arXiv:2404.15574, who count how often the
 * token that a head attends to most is the one that is copied).  A fact that leaves their exact keys is lost, in other heads it is
 * not missed; so the recall cache belongs to them.  The base shows them while it reads recall texts: of the rows n that predict a
 * token x_{n+1} of an answer, the mass that softmax lays on the same token far back,
 *
 *   score of query head h = mean_n  sum_{j in L_n, x_j = x_{n+1}} p_nj        L_n: past window and sinks
 *   score of a kv head    = the largest of its query heads'. */
#ifndef URCHIN_CONVERT_RETRIEVAL_H
#define URCHIN_CONVERT_RETRIEVAL_H

#include "compute/team.h"
#include "convert/corpus.h"
#include "convert/lesson.h"

/* Scores below it look nothing up: of SmolLM2's 90 kv heads 78 are. */
#define RETRIEVAL_LEAST 0.05

struct retrieval {
    int n_layers;
    double *sums; /* [n_layers][n_heads], owned */
    int64_t n_rows;
};

enum err retrieval_begin(struct retrieval *r, const struct attention_config *config, int n_layers); /* ERR_NOMEM */
void retrieval_end(struct retrieval *r);

/* Adds the rows of a lesson (on the host) that predict an answer; pack is the recall text that it is of.  ERR_NOMEM. */
enum err retrieval_add(struct retrieval *r, const struct attention_config *config, const struct lesson *lesson,
                       const struct pack *pack, struct team *team);

/* Marks the n kv heads of highest score (of equals the first) that have RETRIEVAL_LEAST, in out [n_layers][n_kv_heads]; not in
 * the layers left_out [n_left_out].  Returns how many; *least: the lowest score among them. */
int retrieval_choose(const struct retrieval *r, const struct attention_config *config, const int *left_out, int n_left_out, int n, bool *out,
                     double *least);

#endif
