/* attention_back.c - chunks of rows, last to first.
 *
 * With a terraced window a chunk is a block: its state is constant, and what it folds is folded
 * before its first row.  Otherwise keys are folded at every row; then a chunk has the state before
 * it and the keys that it folds itself as columns of their own, each with the row from which it
 * counts.
 *
 * States and their gradients lie transposed, [D + 1][F], so that features are the lanes of all
 * products. */
#include "convert/attention_view.h"

#include "convert/student.h"

#include <math.h>
#include <string.h>

/* ---- a chunk of rows ---- */
struct chunk {
    int b, r0, n, entries, width, clamped; /* clamped: the most of any row */
    struct own_fold own;
    const float *S; /* before it */
    float *alpha;   /* [n] */
};

/* a: weights over N_n; t: dL/dlogit; weight[r]: the factor of phi_q in psi. */
static void weigh(struct task *t, const struct chunk *k) {
    struct attention_back_scratch *s = t->tmp;
    size_t columns = (size_t)s->columns, R = t->own_row, r0 = (size_t)k->r0;
    const float *q = s->q + r0 * t->Dl, *z = k->S + (size_t)t->D * t->F;
    t->dense->product(s->a, columns, false, q, t->Dl, 1, k->n, s->keys_t, columns, t->D,
                      k->width / TILE);
    t->dense->product(s->t, columns, false, s->e + r0 * t->Vl, t->Vl, 1, k->n, s->v_t, columns,
                      t->D + 1, k->width / TILE);
    t->dense->product(s->far, columns, false, s->q_far + r0 * t->Dl, t->Dl, 1, k->n, s->plain_t,
                      columns, t->D, round_up(k->clamped, TILE) / TILE);
    for (int r = 0; r < k->n; r++) {
        float *a = s->a + (size_t)r * columns, *grade = s->t + (size_t)r * columns;
        struct seen e = view_seen_by(t, k->b, k->r0, r, k->entries);
        size_t n = r0 + (size_t)r;
        bool linear = view_folded_by(t, (int64_t)n) > 0;
        float top = t->rows->logits(a, s->far + (size_t)r * columns, e.clamped, e.first, e.from,
                                    e.to, k->width, t->score_factor);
        int largest = 0; /* entry */
        for (int i = 0; t->c->mixing == MIXING_LOLCATS && i < k->width; i++)
            if (a[i] > a[largest]) largest = i;
        float shift, factor = 1, log_scale, reach = linear ? s->reach[n] : -INFINITY;
        if (t->c->mixing == MIXING_UNIFIED) {
            shift = t->c->map == MAP_EXP && reach > top ? reach : top;
            if (shift == -INFINITY) shift = 0;
            log_scale = t->mix + s->reach[n] - shift;
        } else {
            float lowered = t->c->map == MAP_EXP && reach > 0 ? reach : 0;
            shift = top + lowered;
            factor = 1 / (1 + expf(-t->mix));
            log_scale = s->reach[n] - lowered;
        }
        float total = k->width ? t->rows->exp_row(a, shift, factor, k->width) : 0, sum = 0;
        if (linear) {
            sum = k->alpha[r] * t->rows->dot(s->phi_q + n * t->F, z, (int)t->F);
            for (int i = 0; i < k->own.n; i++)
                sum += s->beta[(size_t)r * R + (size_t)i] * s->p[(size_t)r * R + (size_t)i];
        }
        float linear_factor = linear ? expf(log_scale) : 0;
        total += linear_factor * sum + 1e-30f;
        s->weight[r] = linear_factor / total;
        float graded = k->width ? t->rows->grade(a, grade, 1 / total, k->width) : 0;
        if (t->c->mixing == MIXING_LOLCATS && k->width) {
            t->dmix += (1 - factor) * graded;
            grade[largest] -= graded;
        }
        /* clamped keys have their own q and k */
        float *far = s->t_far + (size_t)r * columns;
        for (int i = 0; i < round_up(k->clamped, TILE); i++) {
            far[i] = i < e.clamped ? grade[i] : 0;
            if (i < e.clamped) grade[i] = 0;
        }
    }
}

static void exact_back(const struct task *t, const struct chunk *k) {
    struct attention_back_scratch *s = t->tmp;
    size_t columns = (size_t)s->columns, r0 = (size_t)k->r0;
    int vecs = (int)t->Dl / TILE;
    float factor = t->score_factor;
    if (!k->entries) return;
    t->dense->product(s->dq + r0 * t->Dl, t->Dl, false, s->t, columns, 1, k->n, s->keys, t->Dl,
                      k->entries, vecs);
    t->rows->scale(s->dq + r0 * t->Dl, s->dq + r0 * t->Dl, factor, k->n * (int)t->Dl);
    t->dense->product(s->de, t->Dl, false, s->t, 1, columns, k->entries, s->q + r0 * t->Dl, t->Dl,
                      k->n, vecs);
    for (int i = 0; i < k->entries; i++)
        t->rows->add(s->dk + (size_t)s->position[i] * t->Dl, s->de + (size_t)i * t->Dl, factor,
                     (int)t->Dl);
    if (k->clamped) {
        t->dense->product(s->dq_far + r0 * t->Dl, t->Dl, false, s->t_far, columns, 1, k->n,
                          s->plain, t->Dl, k->clamped, vecs);
        t->rows->scale(s->dq_far + r0 * t->Dl, s->dq_far + r0 * t->Dl, factor, k->n * (int)t->Dl);
        t->dense->product(s->de_far, t->Dl, false, s->t_far, 1, columns, k->clamped,
                          s->q_far + r0 * t->Dl, t->Dl, k->n, vecs);
        for (int i = 0; i < k->clamped; i++)
            t->rows->add(s->dx + (size_t)s->position[i] * t->Dl, s->de_far + (size_t)i * t->Dl,
                         factor, (int)t->Dl);
    }
    /* e without its last element, which is no part of dv */
    for (int r = 0; r < k->n; r++) {
        float *e = s->e_rows + (size_t)r * t->Dl;
        memcpy(e, s->e + (r0 + (size_t)r) * t->Vl, (size_t)t->D * sizeof *e);
        memset(e + t->D, 0, (t->Dl - (size_t)t->D) * sizeof *e);
    }
    t->dense->product(s->de, t->Dl, false, s->a, 1, columns, k->entries, s->e_rows, t->Dl, k->n,
                      vecs);
    for (int i = 0; i < k->entries; i++)
        t->rows->add(s->dv + (size_t)s->position[i] * t->Dl, s->de + (size_t)i * t->Dl, 1,
                     (int)t->Dl);
}

/* dphi += what G says of n keys, phi and v given; dv of their positions. */
static void fold_back(const struct task *t, const int *position, int first, int n, const float *phi,
                      const float *v, float *dphi) {
    struct attention_back_scratch *s = t->tmp;
    t->maps->transpose(s->G_t, t->Dl, s->G, t->F, t->D, (int)t->F);
    t->dense->product(dphi, t->F, true, v, t->Vl, 1, n, s->G, t->F, t->D + 1, (int)t->F / TILE);
    t->dense->product(s->fold_dv, t->Dl, false, phi, t->F, 1, n, s->G_t, t->Dl, (int)t->F,
                      (int)t->Dl / TILE);
    for (int i = 0; i < n; i++)
        t->rows->add(s->dv + (size_t)(position ? position[i] : first + i) * t->Dl,
                     s->fold_dv + (size_t)i * t->Dl, 1, t->D);
}

/* The linear part of rows and of the keys that the chunk folds itself; then G is by the state
 * before the chunk. */
static void linear_back(struct task *t, const struct chunk *k) {
    struct attention_back_scratch *s = t->tmp;
    size_t R = t->own_row, r0 = (size_t)k->r0;
    int vecs = (int)t->F / TILE, own = k->own.n;
    const float *last = s->beta + (size_t)(k->n - 1) * R, *e = s->e + r0 * t->Vl;
    if (own) { /* folded at the chunk's end as far as later rows are concerned */
        for (int i = 0; i < own; i++) {
            size_t j = (size_t)(k->own.first + i);
            t->rows->scale(s->fold_phi + (size_t)i * t->F, s->phi_k + j * t->F, last[i], (int)t->F);
            t->rows->scale(s->fold_v + (size_t)i * t->Vl, s->v + j * t->Vl, last[i], (int)t->Vl);
        }
        fold_back(t, NULL, k->own.first, own, s->fold_phi, s->fold_v,
                  s->dphi_k + (size_t)k->own.first * t->F);
    }
    t->dense->product(s->dphi_q + r0 * t->F, t->F, false, e, t->Vl, 1, k->n, k->S, t->F, t->D + 1,
                      vecs);
    for (int r = 0; r < k->n; r++) {
        float *d = s->dphi_q + (r0 + (size_t)r) * t->F;
        t->rows->scale(s->psi + (size_t)r * t->F, s->phi_q + (r0 + (size_t)r) * t->F, s->weight[r],
                       (int)t->F);
        t->rows->scale(d, d, k->alpha[r] * s->weight[r], (int)t->F);
    }
    if (own) {
        float *phi = s->phi_k + (size_t)k->own.first * t->F;
        for (int r = 0; r < k->n; r++)
            for (int i = 0; i < own; i++) {
                size_t at = (size_t)r * R + (size_t)i;
                float w = s->weight[r] * s->beta[at];
                s->ev[at] *= w; /* by s_nj */
                s->p[at] *= w;  /* a_nj */
            }
        t->dense->product(s->dphi_q + r0 * t->F, t->F, true, s->ev, R, 1, k->n, phi, t->F, own,
                          vecs);
        t->dense->product(s->dphi_k + (size_t)k->own.first * t->F, t->F, true, s->ev, 1, R, own,
                          s->phi_q + r0 * t->F, t->F, k->n, vecs);
        for (int i = 0; i < own; i++) /* dv */
            for (int r = 0; r < k->n; r++)
                t->rows->add(s->dv + (size_t)(k->own.first + i) * t->Dl, e + (size_t)r * t->Vl,
                             s->p[(size_t)r * R + (size_t)i], t->D);
    }
    for (int r = 0; t->c->mixing == MIXING_UNIFIED && r < k->n; r++) {
        size_t n = r0 + (size_t)r;
        t->dmix += t->rows->dot(s->phi_q + n * t->F, s->dphi_q + n * t->F, (int)t->F);
    }
    if (k->alpha[k->n - 1] != 1) t->rows->scale(s->G, s->G, k->alpha[k->n - 1], (int)t->state);
    for (int r = 0; t->c->window != WINDOW_TERRACED && r < k->n; r++)
        t->rows->scale(s->psi + (size_t)r * t->F, s->psi + (size_t)r * t->F, k->alpha[r],
                       (int)t->F);
    t->dense->product(s->G, t->F, true, e, 1, t->Vl, t->D + 1, s->psi, t->F, k->n, vecs);
}

static void chunk_back(struct task *t, int b) {
    struct attention_back_scratch *s = t->tmp;
    size_t R = t->own_row;
    int r0 = b * t->rows_of_chunk, n = t->T - r0 < t->rows_of_chunk ? t->T - r0 : t->rows_of_chunk;
    struct chunk k = {
        .b = b, .r0 = r0, .n = n, .S = s->states + (size_t)b * t->state, .alpha = s->alpha};
    k.own = view_folds_itself(t, r0, r0 + n);
    view_decay(t, r0, n, k.own, s->alpha);
    k.entries = t->c->window == WINDOW_NONE ? 0 : view_gather_entries(t, b, r0, r0 + n);
    k.width = round_up(k.entries, TILE);
    for (int r = 0; k.entries && r < n; r++) {
        int clamped = view_seen_by(t, b, r0, r, k.entries).clamped;
        if (clamped > k.clamped) k.clamped = clamped;
    }
    if (k.own.n) { /* scores of own keys, and e'.[v, 1] */
        int width = round_up(k.own.n, TILE);
        t->maps->transpose(s->turned, R, s->phi_k + (size_t)k.own.first * t->F, t->F, k.own.n,
                           (int)t->F);
        t->dense->product(s->p, R, false, s->phi_q + (size_t)r0 * t->F, t->F, 1, n, s->turned, R,
                          (int)t->F, width / TILE);
        t->maps->transpose(s->turned, R, s->v + (size_t)k.own.first * t->Vl, t->Vl, k.own.n,
                           t->D + 1);
        t->dense->product(s->ev, R, false, s->e + (size_t)r0 * t->Vl, t->Vl, 1, n, s->turned, R,
                          t->D + 1, width / TILE);
    }
    weigh(t, &k);
    exact_back(t, &k);
    linear_back(t, &k);
    int left = view_leaving(t, b);
    if (!left) return;
    double f = view_forgetting(t, r0);
    if (f != 1) t->rows->scale(s->G, s->G, (float)f, (int)t->state);
    view_gather_fold(t, left);
    memset(s->fold_dphi, 0, (size_t)left * t->F * sizeof *s->fold_dphi);
    fold_back(t, s->position, 0, left, s->fold_phi, s->fold_v, s->fold_dphi);
    for (int i = 0; i < left; i++)
        t->rows->add(s->dphi_k + (size_t)s->position[i] * t->F, s->fold_dphi + (size_t)i * t->F, 1,
                     (int)t->F);
}

void attention_back(const struct attention_lesson *l, int head,
                    const struct attention_gradients *out, struct attention_back_scratch *s) {
    const struct attention_config *c = l->config;
    int group = c->n_heads / c->n_kv_heads;
    struct task t = {
        .l = l,
        .c = c,
        .tmp = s,
        .maps = convert_kernels(),
        .dense = attention_kernels_chosen(),
        .rows = backward_kernels(),
        .T = l->n_tokens,
        .D = c->head_dim,
        .f = c->features,
        .head = head,
        .kv_head = head / group,
        .places = l->retrieval && l->retrieval[head / group] ? c->retrieval_size : c->cache_size,
        .rows_of_chunk = view_chunk_rows(c),
        .own_row = (size_t)view_own_room(c),
        .Dl = (size_t)round_up(c->head_dim, TILE),
        .Vl = (size_t)round_up(c->head_dim + 1, TILE),
        .fl = (size_t)round_up(c->features, TILE),
        .F = 2 * (size_t)round_up(c->features, TILE),
        .mix = l->params[student_mix(c) + (size_t)head],
        .score_factor = 1 / sqrtf((float)c->head_dim),
        .rope = l->cosines != NULL,
    };
    size_t map = (size_t)c->head_dim * (size_t)c->features, T = (size_t)t.T;
    int key_map = c->key_map_per_query_head ? head : t.kv_head;
    const float *map_q = l->params + (size_t)head * map,
                *map_k = l->params + student_map_k(c) + (size_t)key_map * map;
    t.state = (size_t)(t.D + 1) * t.F;
    view_read_rows(&t);
    view_features(&t, map_k, s->x_k, s->phi_k, NULL);
    view_features(&t, map_q, s->x_q, s->phi_q, s->reach);
    view_read_states(&t);
    float *zero[] = {s->dq, s->dq_far, s->dk, s->dx, s->dv};
    for (size_t i = 0; i < sizeof zero / sizeof *zero; i++)
        memset(zero[i], 0, T * t.Dl * sizeof(float));
    memset(s->dphi_k, 0, T * t.F * sizeof *s->dphi_k);
    memset(s->G, 0, t.state * sizeof *s->G);
    for (int b = (t.T - 1) / t.rows_of_chunk; b >= 0; b--)
        chunk_back(&t, b);
    *out->mix += t.dmix;

    /* the query's map first, whose view_features() were the last; keys' are made again */
    float *dx_q = s->v; /* values are done with */
    view_features_back(&t, out->map_q, c->map_before_rope ? dx_q : s->dq, !c->map_before_rope,
                       s->x_q, s->dphi_q, s->phi_q, false);
    for (size_t n = 0; n < T; n++) {
        float *dq = out->dq + n * out->dq_row, far[t.D];
        view_turn(&t, dq, s->dq + n * t.Dl, n, true);
        if (c->max_distance && t.rope) {
            view_turn_far(&t, far, s->dq_far + n * t.Dl, true);
            t.rows->add(dq, far, 1, t.D);
        }
        if (c->map_before_rope) t.rows->add(dq, dx_q + n * t.Dl, 1, t.D);
    }
    view_features(&t, map_k, s->x_k, s->phi_k, NULL);
    view_features_back(&t, out->map_k, c->map_before_rope ? s->dx : s->dk, true, s->x_k, s->dphi_k,
                       s->phi_k, true);
    for (size_t n = 0; n < T; n++) {
        float *dk = out->dk + n * (size_t)t.D;
        view_turn(&t, dk, s->dk + n * t.Dl, n, true);
        if (c->map_before_rope) t.rows->add(dk, s->dx + n * t.Dl, 1, t.D);
        memcpy(out->dv + n * (size_t)t.D, s->dv + n * t.Dl, (size_t)t.D * sizeof(float));
    }
}
