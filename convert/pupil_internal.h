/* pupil_internal.h - what the files of the pupil share.
 *
 *   pupil_room.c   memory, and how low-rank parts lie in theirs
 *   pupil_layer.c  one layer forward and backward
 *   pupil.c        the stream through all layers, the head and its losses */
#ifndef URCHIN_CONVERT_PUPIL_INTERNAL_H
#define URCHIN_CONVERT_PUPIL_INTERNAL_H

#include "compute/gemm.h"
#include "convert/attention_back.h"
#include "convert/backward_kernels.h"
#include "convert/pupil.h"
#include "convert/student.h"

enum { HEAD_ROWS = 128, FFN_ROWS = 512, STEP_ROWS = 256 };

struct pupil {
    const struct network *base;
    struct base_config config;
    struct attention_config attention, softmax;
    struct attention_config all_exact; /* the same for attention_back(): all keys are in its window */
    const bool *kept;                  /* [n_layers] that keep softmax, or NULL */
    const bool *retrieval;             /* [n_layers][n_kv_heads], or NULL */
    const struct rope *rope;
    struct team *team;
    const struct backward_kernels *rows;
    struct gemm_scratch *gemm, *exact;    /* exact: low-rank parts, fp32 always */
    struct attention_back_scratch **back;       /* [threads] */
    struct attention_back_scratch **back_exact; /* [threads]; NULL: no layer keeps softmax */
    float *no_maps;                             /* of all_exact: zeros, which nothing reads through */
    int max_tokens, max_rank;
    size_t E, q, kv, qkv, ffn, gate_up, vocab, map_floats, layer_params;

    void *block;
    size_t bytes;
    float *cosines, *sines, *far_cosines, *far_sines; /* [max_tokens][D / 2], [D / 2] */
    float *xs;     /* [n_layers + 1][T][E]: inputs of the layers, and what the last gives */
    float *x_base; /* [T][E]: the base's stream, then its final rows */
    float *normed, *middle, *dx, *dn;        /* [T][E] */
    float *qkvs, *dqkvs;                     /* [T][qkv] */
    float *y, *dy;                           /* [T][q] */
    float *dk, *dv;                          /* [heads][T][D] */
    float *dmap_k, *dmix;                    /* [heads][D f], [heads] */
    float *up, *dup, *act, *dact;            /* [FFN_ROWS][gate_up] twice, [..][ffn] twice */
    float *z, *z_base;                       /* [HEAD_ROWS][vocab] */
    float *mean, *r;                         /* [T] of a norm's rows */
    float *merged_qkv, *merged_o, *scaled_b; /* W + scale B A of the layer at hand; scale B */
    float *low;                              /* [T][rank] */
    double *losses;                          /* [HEAD_ROWS] */
    int64_t *sets;                           /* of each document [n_kv_heads][blocks][attention_cache_most] */
    void *slot;                              /* one layer's, softmax or not */
    size_t slot_bytes;
};

struct layer { /* what it multiplies with; w NULL: the base's */
    int i;
    const struct pupil_weights *w;
    const struct network_layer *net;
    const float *qkv, *o;
    const struct network_layer *grads; /* or NULL */
    float *dmaps, *dlow;               /* of the layer, or NULL */
};

static inline bool pupil_is_softmax(const struct pupil *p, const struct pupil_weights *w, int layer) {
    return !w || (p->kept && p->kept[layer]);
}

/* Rows of the pack from r on, `most` at most. */
static inline int piece(const struct pack *pack, size_t r, int most) {
    return pack->n - (int)r < most ? pack->n - (int)r : most;
}

/* ---- pupil_room.c ---- */
/* The engine's attention of a layer, w NULL: the base's, softmax as in those that keep it; attention_free() it. */
enum err pupil_attention(struct attention **out, const struct pupil *p, const struct pupil_weights *w, int layer);

/* ---- pupil_layer.c ---- */
/* y [n][E] = norm(x), RMSNorm or LayerNorm as the architecture has it. */
void pupil_norm(struct pupil *p, float *y, const float *x, const float *w, const float *b, size_t n);
/* dx += by x of norm(x), over the pack's rows; with dw its weights' are added too. */
void pupil_norm_back(struct pupil *p, float *dx, const float *dy, const float *x, const float *w, float *dw, float *db,
                     const struct pack *pack);
/* dx = dy W;  dw += dy^T x and db += its column sums where they are wanted. */
void pupil_linear_back(struct pupil *p, float *dx, const float *dy, const float *x, int n, const float *w, size_t n_out,
                       size_t n_in, float *dw, float *db);

/* Merges low-rank parts into p's scratch: one layer at a time. */
struct layer pupil_layer_of(struct pupil *p, const struct pupil_weights *w, const struct pupil_gradients *g, int i);
/* normed, qkvs and y of the stream x, and the sets chosen; middle = x + W_o y. */
enum err pupil_first_half(struct pupil *p, const struct layer *l, const float *x, const struct pack *pack);
/* out = the layer of x; out may be x. */
enum err pupil_layer_forward(struct pupil *p, const struct layer *l, float *out, const float *x, const struct pack *pack);
/* dx: by the layer's output -> by its input x. */
enum err pupil_layer_back(struct pupil *p, const struct layer *l, float *dx, const float *x, const struct pack *pack);

#endif
