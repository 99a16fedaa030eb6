/* pupil.h - the converted model while it is fine-tuned: forward pass, loss, backward pass.
 *
 *   x_0 = embedding (+ position)
 *   m = x + W_o attention(W_qkv norm(x)),   x' = m + W_down act(W_gate norm(m), W_up norm(m))      each layer
 *   z = W_head norm(x_L)
 *   l_n = KL(softmax(z_base) || softmax(z))                      distill: the base has read the same tokens
 *   l_n = -log softmax(z)[next token]                            next token: all rows but a document's last
 *   L   = sum_n w_n l_n / sum_n w_n                              over those rows of a pack
 *
 * w_n = 1 + ANSWER_WEIGHT weight[n + 1] where a pack has weights (corpus.h: token n + 1, of the same document, is what a
 * question asks to remember), else 1: the plain mean.
 *
 * Weights are a network's, those of q, k, v and o with W + scale B A where there are low-rank parts (merged before
 * use, as the engine does).  Attention forward is the engine's own (attention.h), block by block: window, sinks, self-recall
 * with the present state and horizon are what will be served, in fp32; the sets chosen are a constant for the gradient.
 * Layers that keep softmax see all keys exactly, y_n = sum_{j <= n} w_nj v_j / sum_{j <= n} w_nj; their maps get no gradient.
 *
 * Of a sequence only each layer's input is kept; the backward pass makes the rest again, a layer at a time.  Logits exist for
 * HEAD_ROWS rows at a time.  Threads own outputs and sums have one order: results are the same bits for any number. */
#ifndef URCHIN_CONVERT_PUPIL_H
#define URCHIN_CONVERT_PUPIL_H

#include "attention/attention.h"
#include "convert/corpus.h"
#include "convert/network.h"
#include "model/converted.h"

/* ---- low-rank parts: [layer][q, k, v, o]{ A [rank][n_in], B [n_out][rank] } ---- */
struct low_rank_part {
    size_t a, b;        /* where they begin among a layer's floats */
    int n_in, n_out, row; /* row: its first one in qkv (o: 0) */
};
struct low_rank_part low_rank_part(const struct base_config *c, int rank, enum low_rank_target target);
size_t low_rank_floats(const struct base_config *c, int rank); /* of a layer */

/* ---- the pass ---- */
struct pupil_weights { /* borrowed */
    const struct network *network;
    const float *maps;     /* [n_layers][student_params()] */
    const float *low_rank; /* [n_layers][low_rank_floats()], or NULL */
    int rank;
    float scale;
};
struct pupil_gradients { /* added to; NULL: frozen */
    struct network *network;
    float *maps, *low_rank;
};

struct pupil;
struct pupil_options {
    const struct network *base;               /* the teacher; borrowed, as all here */
    const struct attention_config *attention; /* as served; kv_type is not looked at: fp32 */
    const bool *softmax;                      /* [n_layers]: those that keep it; NULL: none */
    const bool *retrieval;                    /* [n_layers][n_kv_heads]: the retrieval heads; NULL: none */
    const struct rope *rope;                  /* NULL: none */
    struct team *team;
    int max_tokens, max_rank; /* of a pack; 0: no low-rank parts */
    bool bf16;                /* products as gemm.h has them */
};
enum err pupil_new(struct pupil **out, const struct pupil_options *options);
void pupil_free(struct pupil *p); /* NULL is fine */
size_t pupil_bytes(const struct base_config *c, const struct attention_config *a, bool any_softmax, int n_threads,
                   int max_tokens, int max_rank);

enum fine_loss { FINE_DISTILL, FINE_NEXT_TOKEN };
/* A row that says what is to be remembered counts as five of the ordinary text around it: chosen, not measured. */
enum { ANSWER_WEIGHT = 4 };
struct fine_sums { /* added to: sum_n w_n l_n, sum_n w_n */
    double loss, weight;
};
/* Reads a pack, and with gradients adds share times those of its L.  ERR_NOMEM. */
enum err pupil_learn(struct pupil *p, const struct pupil_weights *w, const struct pack *pack, enum fine_loss loss,
                     float share, const struct pupil_gradients *gradients, struct fine_sums *sums);

/* Tests: final-norm rows [n][hidden] of the pack, by the pupil, or by the base when w is NULL; borrowed until the next call. */
enum err pupil_read(struct pupil *p, const struct pupil_weights *w, const struct pack *pack, const float **rows);
/* Tests: the sets chosen in a layer for the first document of the pack read last (as struct attention_lesson has them). */
enum err pupil_cache(struct pupil *p, const struct pupil_weights *w, const struct pack *pack, int layer,
                     const int64_t **sets);

#endif
