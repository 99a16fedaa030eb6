/* weights.h - a checkpoint packed for the CPU: what the forward pass reads.
 *
 * q, k, v are rows of one matrix, gate and up of another, so that a layer is four matmuls. Low-rank
 * parts W + scale B A are merged in fp32 before packing.  A tied head is packed once and serves as
 * the embedding too.  With int4, embedding, head and matrices with a merged low-rank part are int8:
 * see weights.c.  With fp8 embedding and head are, and matrices whose sizes are no multiples of 16. */
#ifndef URCHIN_MODEL_WEIGHTS_H
#define URCHIN_MODEL_WEIGHTS_H

#include "compute/matrix.h"
#include "config/err.h"
#include "model/base.h"
#include "model/converted.h"

struct layer_weights {      /* vectors fp32; NULL where the architecture has none */
    struct matrix *qkv;     /* [q rows | k rows | v rows, hidden] */
    struct matrix *o;       /* [hidden, n_heads * head_dim] */
    struct matrix *gate_up; /* Llama [gate rows | up rows, hidden]; GPT-2 [ffn, hidden] */
    struct matrix *down;    /* [hidden, ffn] */
    float *attn_norm, *attn_norm_bias, *ffn_norm, *ffn_norm_bias;
    float *qkv_bias, *o_bias, *gate_up_bias, *down_bias;
};

struct weights {
    enum weight_type type;
    struct matrix *embed;    /* [vocab, hidden]; the head itself when tied */
    struct matrix *head;     /* [vocab, hidden] */
    struct matrix *position; /* GPT-2: [context, hidden], fp32 */
    float *norm, *norm_bias;
    struct layer_weights *layers; /* [n_layers] */
    int n_layers;
    size_t bytes;
};

/* Packs all weights with the team, once.  converted may be NULL.  ERR_FORMAT: a weight is not
 * finite (the sentence names file and tensor).  progress (may be NULL) is called from this thread.
 */
enum err weights_load(struct weights **out, const struct base *base,
                      const struct converted *converted, enum weight_type type, struct team *team,
                      void (*progress)(void *arg, const char *what, double fraction),
                      void *progress_arg, char *msg, size_t msg_len);
void weights_free(struct weights *w); /* NULL is fine */

/* row += scale B[index] A, in fp32, the rank's parts in order: row `index` of a matrix with this
 * low-rank part, row [n_in]. */
void weights_add_low_rank(const struct low_rank *part, int rank, float scale, int index, int n_in,
                          float *row);

#endif
