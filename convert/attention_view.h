/* attention_view.h - what rows see of a sequence: exact keys, folded keys and states, chunk by chunk, as the engine's memory
 * (attention/memory.c) has them.  Shared by attention_view.c and attention_back.c, which has the gradients. */
#ifndef URCHIN_CONVERT_ATTENTION_VIEW_H
#define URCHIN_CONVERT_ATTENTION_VIEW_H

#include "attention/kernels.h"
#include "convert/attention_back.h"
#include "convert/backward_kernels.h"
#include "convert/kernels.h"

struct attention_back_scratch {
    void *block;
    size_t bytes;
    int columns; /* room for exact entries */
    /* of all tokens */
    float *x_q, *x_k, *q, *q_far, *k; /* [T][Dl]: as maps see them, and turned */
    float *v, *e;                     /* [T][Vl]: [v, 1], [e, -e.y] */
    float *u, *phi_k, *dphi_k;        /* [T][fl], [T][F] twice */
    float *phi_q, *dphi_q, *reach;    /* [T][F] twice, [T] */
    float *dq, *dq_far, *dk, *dx; /* [T][Dl] gradients by q and k turned, and by what maps see */
    float *dv;                    /* [T][Dl] */
    float *states;                /* [chunks][D + 1][F] */
    float *w, *w_t, *dw;          /* [D][fl], [f][Dl], [D][fl] */
    /* of a chunk */
    int *position;                 /* [columns] of exact entries */
    float *keys, *plain;           /* [columns][Dl] */
    float *keys_t, *plain_t, *v_t; /* [D][columns] twice, [D + 1][columns] */
    float *a, *t, *far, *t_far;    /* [rows][columns] */
    float *de, *de_far;            /* [columns][Dl] */
    float *e_rows;                 /* [rows][Dl]: e */
    float *psi, *weight;           /* [rows][F], [rows] exp(c_h + ..) / N_n */
    float *p, *ev, *beta;            /* [rows][own_row]: keys that the chunk itself folds */
    float *alpha;                    /* [rows]: what is left of the state before the chunk */
    float *turned;                   /* [F or D + 1][own_row] */
    float *fold_phi, *fold_v;      /* [columns][F], [columns][Vl]: keys folded before the chunk */
    float *fold_dphi, *fold_dv;    /* [columns][F], [columns][Dl] */
    float *G, *G_t;                /* [D + 1][F], [F][Dl] */
};

struct task {
    const struct attention_lesson *l;
    const struct attention_config *c;
    struct attention_back_scratch *tmp;
    const struct convert_kernels *maps;
    const struct attention_kernels *dense;
    const struct backward_kernels *rows;
    int T, D, f, head, kv_head, rows_of_chunk;
    int places; /* of the head's cache */
    size_t Dl, Vl, fl, F, own_row, state; /* strides; floats of a state */
    float mix, score_factor, dmix;
    bool rope;
};

struct own_fold {
    int first, n, from_row;
};
struct seen { /* by one row among the chunk's entries: 0 .. first - 1, the first `clamped` as
                 max_distance behind; from .. to - 1 */
    int first, from, to, clamped;
};

/* Rows of a chunk: a terraced window's block. */
int view_chunk_rows(const struct attention_config *c);
int view_own_room(const struct attention_config *c); /* columns for keys that a chunk folds itself */

/* y = x turned by RoPE to a position, or back: a rotation's gradient is turned the other way; to max_distance. */
void view_turn(const struct task *t, float *y, const float *x, size_t position, bool back);
void view_turn_far(const struct task *t, float *y, const float *x, bool back);

/* All tokens: q and k turned, as maps see them, [v, 1] and e'. */
void view_read_rows(const struct task *t);

/* phi of all rows x under a map; s->u and s->w stay for the way back: dmap is added to, dx (+)= by x. */
void view_features(const struct task *t, const float *map, const float *x, float *phi, float *reach);
void view_features_back(const struct task *t, float *dmap, float *dx, bool add, const float *x, const float *dphi, const float *phi, bool key);

/* Keys that left the exact set by the time a row is answered, and what the state is scaled by on arriving at it
 * (attention/memory.c). */
int64_t view_folded_by(const struct task *t, int64_t position);
double view_forgetting(const struct task *t, int64_t position);

/* Terraced: positions folded before block b, ascending, into s->position; returns how many. */
int view_leaving(const struct task *t, int b);

/* Otherwise: keys that rows r0 .. r1 - 1 fold themselves. */
struct own_fold view_folds_itself(const struct task *t, int r0, int r1);

/* alpha[r]: what is left of the state before the chunk at row r; s->beta [r][i]: of own key i, 0 before it is folded. */
void view_decay(const struct task *t, int r0, int n, struct own_fold own, float *alpha);

/* phi and [v, 1] of the n keys in s->position. */
void view_gather_fold(const struct task *t, int n);

/* States before each chunk. */
void view_read_states(const struct task *t);

/* Exact keys that a chunk's rows see, ascending as the engine has them; returns how many. */
int view_gather_entries(const struct task *t, int b, int r0, int r1);
struct seen view_seen_by(const struct task *t, int b, int r0, int row, int n_entries);

#endif
