/* heads.h - what each head of a converted model does with a text, beside softmax over the same q
 * and k.
 *
 * The model reads; its own q and k (so its own stream, as fine-tuned) are weighed twice, row by
 * row:
 *
 *   p_nj = softmax_j(q_n.k_j / sqrt(D))              over all keys j <= n
 *   a_nj = w_nj / sum_j w_nj                         w as attention.h has it: the window, the
 *                                                    sinks and the cache that the engine chose as
 *                                                    it read, and everything else by phi_q.phi_k,
 *                                                    faded by the horizon since it was folded
 *
 * Keys and values are rounded as the engine stores them.  Means over sampled rows that have linear
 * keys, of
 *
 *   kl            KL(p || a) in nats
 *   error         ||y - y_softmax||^2 / ||y_softmax||^2, sums over rows, y before the output
 *                 projection
 *   error_exact   the same with the linear keys left out (c_h = -60)
 *   entropy       of p, and of a, in nats
 *   rank          Spearman's rho between phi_q.phi_k and q.k over a row's linear keys (at most
 *                 RANKED of them, evenly spaced): 1 where the map is monotone in q.k, as softmax
 *                 is.  (Hedgehog, arXiv:2402.04347, asks it of a map and gives no number for it.)
 *   mass          of p and of a on sinks, window, cache and state (the linear keys)
 *
 * On the CPU, with Hedgehog attention only; sums of layers that kept softmax stay 0. */
#ifndef URCHIN_CONVERT_HEADS_H
#define URCHIN_CONVERT_HEADS_H

#include "compute/team.h"
#include "model/model.h"

enum key_class { KEY_SINK, KEY_WINDOW, KEY_CACHE, KEY_STATE, N_KEY_CLASSES };
enum { RANKED = 256 };

struct head_sums { /* sums over rows */
    double n_rows, kl, entropy, entropy_own;
    double error, error_exact, energy; /* error_exact: NaN without exact keys */
    double rank, n_rank;
    double softmax[N_KEY_CLASSES], own[N_KEY_CLASSES];
};

struct heads;

/* model and team are borrowed.  Reads use a slot of the model, which they clear. */
enum err heads_new(struct heads **out, struct model *model, struct team *team, int max_tokens,
                   int max_rows);
void heads_free(struct heads *h); /* NULL is fine */

/* Reads ids [n <= max_tokens] (BOS included) from position 0 and adds n_rows (<= max_rows) rows to
 * the sums, spread evenly over those that have linear keys; `every` instead spreads them over all.
 * ERR_ARG: no row has linear keys. */
enum err heads_read(struct heads *h, int slot, const int32_t *ids, int n, int n_rows, bool every,
                    char *msg, size_t msg_len);

const struct head_sums *heads_sums(const struct heads *h); /* [n_layers][n_heads] */
/* Of the rows read, those that have linear keys: 0 .. 1. */
double heads_share(const struct heads *h);

/* fn sees every row of heads_read: p and a [position + 1] by key.  Calls for different (layer,
 * head) come from several threads; those of one come in ascending position.  NULL: none. */
void heads_watch(struct heads *h,
                 void (*fn)(void *arg, int layer, int head, int position, const float *p,
                            const float *a),
                 void *arg);

#endif
