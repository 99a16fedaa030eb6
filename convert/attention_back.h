/* attention_back.h - the backward pass of Hedgehog attention with exact keys: one query head of one document.
 *
 * Row n sees the exact keys E_n (sinks, cache, window) and the state of all others (attention.h):
 *
 *   w_nj = exp(l_nj), l_nj = q_n.k_j / sqrt(D)                 j in E_n             (q, k with RoPE)
 *   s_n  = exp(c_h) phi_q(q'_n)^T S_n                          S_n = sum_j f_nj phi_k(k'_j) [v_j, 1]^T
 *   N_n  = sum_j w_nj + s_n[D]                                 y_n = (sum_j w_nj v_j + s_n[0:D]) / N_n
 *
 * f_nj is what the horizon left of key j by row n.  With e_n = dL/dy_n and e'_n = [e_n, -e_n.y_n], so that
 * e'_n.[v_j, 1] = e_n.(v_j - y_n):
 *
 *   exact    t_nj = w_nj / N_n  e'_n.[v_j, 1]      dq_n += t_nj k_j / sqrt(D),  dk_j += t_nj q_n / sqrt(D)  (with RoPE; a
 *            clamped key against q at max_distance),  dv_j += w_nj / N_n e_n
 *   state    psi_n = exp(c_h) phi_q(q'_n) / N_n    dphi_q(n) = exp(c_h) / N_n S_n e'_n,  dS_n = psi_n e'_n^T
 *            G_j = sum_n f_nj psi_n e'_n^T         dphi_k(j) = G_j [v_j, 1],  dv_j += G_j[:, 0:D]^T phi_k(j)
 *   mixing   dc_h = sum_n phi_q(n).dphi_q(n)       (unified)
 *            l_nj less the largest exact logit, plus log sigmoid(omega_h): the largest takes -sum_j t_nj, and
 *            domega_h = (1 - sigmoid(omega_h)) sum_nj t_nj   (lolcats)
 *
 * and through the maps to W_q, W_k and to q', k', which are q and k before or after RoPE.  Which keys are cached is a
 * constant.  Everything goes in chunks of rows, so the cost is linear in the length.
 *
 * Calls for different heads may run side by side; results do not depend on how they are dealt out. */
#ifndef URCHIN_CONVERT_ATTENTION_BACK_H
#define URCHIN_CONVERT_ATTENTION_BACK_H

#include "attention/attention.h"

struct attention_lesson { /* one document in one layer; all borrowed */
    const struct attention_config *config;
    int n_tokens;
    const float *q, *k, *v; /* before RoPE: rows of qkv_row floats, heads side by side */
    size_t qkv_row;
    const float *y, *dy; /* [n_tokens][n_heads D] */
    const float *cosines, *sines, *far_cosines, *far_sines; /* as struct lesson has them; NULL: no RoPE */
    const int64_t *cache; /* [n_kv_heads][blocks of the document][attention_cache_most]: ascending positions, then -1 */
    const bool *retrieval; /* as struct attention_weights has it */
    const float *params;  /* as student.h lays them out */
};

struct attention_back_scratch; /* one thread's */
enum err attention_back_scratch_new(struct attention_back_scratch **out,
                                    const struct attention_config *c, int max_tokens);
void attention_back_scratch_free(struct attention_back_scratch *s); /* NULL is fine */
size_t attention_back_scratch_bytes(const struct attention_config *c, int max_tokens);

/* Blocks of a document: how many sets `cache` has for each kv head.  0: there is no cache. */
int attention_back_blocks(const struct attention_config *c, int n_tokens);

/* Gradients of the head: dq [n_tokens] rows of dq_row floats, dk and dv [n_tokens][D] are written; map_q [D][f],
 * map_k [D][f] and *mix are added to. */
struct attention_gradients {
    float *dq, *dk, *dv, *map_q, *map_k, *mix;
    size_t dq_row;
};
void attention_back(const struct attention_lesson *l, int head, const struct attention_gradients *out,
                    struct attention_back_scratch *scratch);

#endif
