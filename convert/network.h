/* network.h - a base's weights as plain fp32 rows: what fine-tuning reads, and with `full` also what it trains.
 *
 * One block of values, so that weights, their gradients and an optimiser's moments are arrays of one
 * length; the pointers say where each part lies in it. */
#ifndef URCHIN_CONVERT_NETWORK_H
#define URCHIN_CONVERT_NETWORK_H

#include "compute/team.h"
#include "model/base.h"

struct network_layer {           /* as struct layer_weights has them; NULL: the architecture has none */
    float *attn_norm, *attn_norm_bias;
    float *qkv, *qkv_bias;       /* [q rows | k rows | v rows][hidden] */
    float *o, *o_bias;           /* [hidden][n_heads head_dim] */
    float *ffn_norm, *ffn_norm_bias;
    float *gate_up, *gate_up_bias; /* Llama [gate rows | up rows][hidden]; GPT-2 [ffn][hidden] */
    float *down, *down_bias;     /* [hidden][ffn] */
};

struct network {
    struct base_config config; /* rope.freq_factors is not for use */
    float *values;             /* [n_values]: everything below points into it */
    size_t n_values;
    bool borrowed;             /* values are somebody else's */
    float *embed, *head;       /* [vocab][hidden]; the same where the head is tied */
    float *position;           /* GPT-2: [context][hidden] */
    float *norm, *norm_bias;
    struct network_layer *layers; /* [n_layers], owned */
};

size_t network_bytes(const struct base *base);

/* Reads all weights with the team.  ERR_FORMAT: a weight is not finite (the sentence names it). */
enum err network_read(struct network **out, const struct base *base, struct team *team, char *msg, size_t msg_len);

/* Another one of the same shape over values [n_values], which are borrowed and left as they are. */
enum err network_over(struct network **out, const struct network *of, float *values);
void network_free(struct network *n); /* NULL is fine */

/* Where the base's tensor of this part lies: rows of n_in, or NULL. */
float *network_part(const struct network *n, enum base_part part, int layer);

#endif
