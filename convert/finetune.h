/* finetune.h - stage 2: a converted model learns to say what its base says, or what the text says.
 *
 * What trains is one array of parameters: the maps and mixing of all layers as attention transfer left them, and behind them the
 * low-rank parts of q, k, v and o (A uniform within 1 / sqrt(n_in), B zero: the first step begins with the base's weights), or
 * all of the network's weights.  A step is AdamW on the gradient of `accumulate` packs (pupil.h), whose norm over all
 * parameters is clipped to 1. */
#ifndef URCHIN_CONVERT_FINETUNE_H
#define URCHIN_CONVERT_FINETUNE_H

#include "convert/pupil.h"
#include "convert/recipe.h"

struct finetune {
    const struct recipe *recipe; /* borrowed, team too */
    struct team *team;
    struct network *base;         /* owned, as all below */
    struct network *own, *d_own;  /* full: views of w and g; else NULL */
    bool *softmax;                /* [n_layers] that keep it; NULL: none */
    bool *retrieval;              /* [n_layers][n_kv_heads]: the retrieval heads; NULL: none */
    struct pupil *pupil;
    size_t n_maps, n_params;      /* maps lie first */
    float *w, *m, *v, *g;         /* parameters, Adam's moments, gradient */
    double *pieces;               /* of the norm */
    int64_t step;                 /* steps done */
    double norm;                  /* of the last step's gradient, before clipping */
};

/* base and rope are borrowed for the call and for life; maps [n_layers][student_params()] are copied.  Reads the base's weights. */
enum err finetune_new(struct finetune **out, const struct recipe *recipe, const struct base *base, const struct rope *rope,
                      struct team *team, const float *maps, int max_tokens, char *msg, size_t msg_len);
void finetune_free(struct finetune *f); /* NULL is fine */
size_t finetune_bytes(const struct recipe *recipe, const struct base *base, int n_threads, int max_tokens);

/* L = sum_n w_n l_n / sum_n w_n over a pack's rows, with more weight for what a recall text asks to remember (pupil.h); both
 * sums are added to.  learn adds the gradient of L too, divided by `accumulate`. */
enum err finetune_measure(struct finetune *f, const struct pack *pack, struct fine_sums *sums);
enum err finetune_learn(struct finetune *f, const struct pack *pack, struct fine_sums *sums);

/* Takes the step.  ERR_ARG, nothing changed: the gradient is not finite. */
enum err finetune_step(struct finetune *f);

#endif
