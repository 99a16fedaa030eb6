/* student.h - one layer's Hedgehog attention as the pupil of softmax: loss and its gradients.
 *
 * Query rows n of head h are compared with their softmax rows, over all keys j <= n:
 *
 *   p_nj = softmax_j(q_n.k_j / sqrt(D))                  the teacher
 *   w_nj as attention.h has it, without cache and horizon,   a_nj = w_nj / sum_j w_nj
 *   L = ce mean_{n,h} KL(p_n || a_n)  +  mse mean_{n,h,d} (sum_j a_nj v_j - sum_j p_nj v_j)^2
 *
 * (The cross-entropy of rows is KL plus the teacher's entropy, which no map can change.)  With t_nj
 * = dL/d log w_nj, all gradients are closed forms:
 *
 *   t_nj = ce' (a_nj - p_nj) + a_nj e_n.(v_j - y_n)      e_n = dL/dy_n
 *   dL/dphi_q(n) = sum_j t_nj / s_nj phi_k(j)            j linear, s_nj = phi_q(n).phi_k(j)
 *   dL/dphi_k(j) = sum_n t_nj / s_nj phi_q(n)
 *   dL/dc_h = sum of t over linear keys (unified)        dL/domega_h = (1 - sigmoid(omega_h)) sum
 *                                                        of t over exact ones (lolcats)
 *
 * and through the maps to W_q, W_k.  q, k, v are the teacher's and fixed, so exact keys have no
 * parameters.  Sources: Hedgehog arXiv:2402.04347, LoLCATs arXiv:2410.10254.
 *
 * One call does one kv head of one layer with its query heads, and writes only what is theirs:
 * calls for different ones may run side by side, and results do not depend on how they are dealt
 * out. */
#ifndef URCHIN_CONVERT_STUDENT_H
#define URCHIN_CONVERT_STUDENT_H

#include "convert/kernels.h"
#include "convert/lesson.h"

/* Where a layer's parameters lie among its student_params(): map_q [n_heads][D][f], map_k [state
 * heads][D][f], mix [n_heads]. */
size_t student_map_k(const struct attention_config *c);
size_t student_mix(const struct attention_config *c);
size_t student_params(const struct attention_config *c);

struct student_loss { /* factors of L; both 0: no gradients */
    float ce, mse;
    float share; /* L is multiplied by it: one over the lessons of a step */
};

/* Sums over the rows of one query head. */
struct student_sums {
    double n_rows;
    double kl, entropy;          /* nats */
    double error, energy;        /* ||y - y_softmax||^2, ||y_softmax||^2; outputs only */
    double teacher_linear;       /* the teacher's mass on keys that are linear */
    double sink, window, linear; /* the pupil's mass */
    double gap, n_gap;           /* row_weights.gap, where there are linear keys */
};

struct student_scratch; /* one thread's */
enum err student_scratch_new(struct student_scratch **out, const struct attention_config *c,
                             int max_tokens, int max_rows);
void student_scratch_free(struct student_scratch *s); /* NULL is fine */
size_t student_scratch_bytes(const struct attention_config *c, int max_tokens, int max_rows);

/* params of the layer -> grads, added to (NULL: none), and sums [n_heads], added to.  outputs: also
 * error and energy. */
void student_learn(const struct attention_config *c, const struct lesson *lesson, int layer,
                   int kv_head, const float *params, float *grads, const struct student_loss *loss,
                   bool outputs, struct student_sums *sums, struct student_scratch *scratch);

#endif
