/* attention_back.c - chunks of rows, last to first.
 *
 * With a terraced window a chunk is a block: its state is constant, and what it folds is folded
 * before its first row.  Otherwise keys are folded at every row; then a chunk has the state before
 * it and the keys that it folds itself as columns of their own, each with the row from which it
 * counts.
 *
 * States and their gradients lie transposed, [D + 1][F], so that features are the lanes of all
 * products. */
#include "convert/attention_back.h"

#include "attention/kernels.h"
#include "compute/memory.h"
#include "convert/backward_kernels.h"
#include "convert/kernels.h"
#include "convert/student.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 64 }; /* rows, where the window is not terraced */

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
    float *p, *ev, *beta;          /* [rows][rows]: keys that the chunk itself folds */
    float *turned;                 /* [F][rows] or [D + 1][rows] */
    float *fold_phi, *fold_v;      /* [columns][F], [columns][Vl]: keys folded before the chunk */
    float *fold_dphi, *fold_dv;    /* [columns][F], [columns][Dl] */
    float *G, *G_t;                /* [D + 1][F], [F][Dl] */
};

struct carve { /* lays arrays into a block; at NULL only counts */
    float *at;
    size_t n;
};
static float *cut(struct carve *c, size_t n) {
    float *here = c->at ? c->at + c->n : NULL;
    c->n += (n + 15) / 16 * 16;
    return here;
}

static int chunk_rows(const struct attention_config *c) {
    return c->window == WINDOW_TERRACED ? c->window_size : CHUNK;
}
static int most_entries(const struct attention_config *c) {
    if (c->window == WINDOW_TERRACED) return c->sinks + c->cache_size + 2 * c->window_size;
    return c->sinks + c->window_size + CHUNK;
}

static size_t lay_out(struct attention_back_scratch *s, const struct attention_config *c,
                      int max_tokens, float *block) {
    struct carve at = {block, 0};
    size_t T = (size_t)max_tokens, D = (size_t)c->head_dim,
           Dl = (size_t)round_up(c->head_dim, TILE), Vl = (size_t)round_up(c->head_dim + 1, TILE),
           fl = (size_t)round_up(c->features, TILE), F = 2 * fl,
           R = (size_t)round_up(chunk_rows(c), TILE),
           columns = (size_t)round_up(most_entries(c), TILE),
           chunks = T / (size_t)chunk_rows(c) + 1;
    float **of_tokens[] = {&s->x_q, &s->x_k,    &s->q,  &s->q_far, &s->k,
                           &s->dq,  &s->dq_far, &s->dk, &s->dx,    &s->dv};
    s->columns = (int)columns;
    for (size_t i = 0; i < sizeof of_tokens / sizeof *of_tokens; i++)
        *of_tokens[i] = cut(&at, T * Dl);
    s->v = cut(&at, T * Vl);
    s->e = cut(&at, T * Vl);
    s->u = cut(&at, T * fl);
    s->phi_k = cut(&at, T * F);
    s->dphi_k = cut(&at, T * F);
    s->phi_q = cut(&at, T * F);
    s->dphi_q = cut(&at, T * F);
    s->reach = cut(&at, T);
    s->states = cut(&at, chunks * (D + 1) * F);
    s->w = cut(&at, D * fl);
    s->w_t = cut(&at, fl * Dl);
    s->dw = cut(&at, D * fl);
    s->position = (int *)cut(&at, columns);
    s->keys = cut(&at, columns * Dl);
    s->plain = cut(&at, columns * Dl);
    s->keys_t = cut(&at, D * columns);
    s->plain_t = cut(&at, D * columns);
    s->v_t = cut(&at, (D + 1) * columns);
    s->a = cut(&at, R * columns);
    s->t = cut(&at, R * columns);
    s->far = cut(&at, R * columns);
    s->t_far = cut(&at, R * columns);
    s->de = cut(&at, columns * Dl);
    s->de_far = cut(&at, columns * Dl);
    s->e_rows = cut(&at, R * Dl);
    s->psi = cut(&at, R * F);
    s->weight = cut(&at, R);
    s->p = cut(&at, R * R);
    s->ev = cut(&at, R * R);
    s->beta = cut(&at, R * R);
    s->turned = cut(&at, (F > Vl ? F : Vl) * R);
    s->fold_phi = cut(&at, columns * F);
    s->fold_v = cut(&at, columns * Vl);
    s->fold_dphi = cut(&at, columns * F);
    s->fold_dv = cut(&at, columns * Dl);
    s->G = cut(&at, (D + 1) * F);
    s->G_t = cut(&at, F * Dl);
    return at.n * sizeof(float);
}

size_t attention_back_scratch_bytes(const struct attention_config *c, int max_tokens) {
    struct attention_back_scratch s;
    return lay_out(&s, c, max_tokens, NULL);
}

enum err attention_back_scratch_new(struct attention_back_scratch **out,
                                    const struct attention_config *c, int max_tokens) {
    struct attention_back_scratch *s = calloc(1, sizeof *s);
    if (!s) return ERR_NOMEM;
    s->bytes = attention_back_scratch_bytes(c, max_tokens);
    s->block = memory_map(s->bytes);
    if (!s->block) {
        free(s);
        return ERR_NOMEM;
    }
    lay_out(s, c, max_tokens, s->block);
    *out = s;
    return OK;
}

void attention_back_scratch_free(struct attention_back_scratch *s) {
    if (!s) return;
    memory_unmap(s->block, s->bytes);
    free(s);
}

int attention_back_blocks(const struct attention_config *c, int n_tokens) {
    return c->cache_size ? (n_tokens + c->window_size - 1) / c->window_size : 0;
}

/* ---- one head ---- */
struct task {
    const struct attention_lesson *l;
    const struct attention_config *c;
    struct attention_back_scratch *tmp;
    const struct convert_kernels *maps;
    const struct attention_kernels *dense;
    const struct backward_kernels *rows;
    int T, D, f, head, kv_head, rows_of_chunk;
    size_t Dl, Vl, fl, F, state; /* strides; floats of a state */
    float mix, score_factor, dmix;
    bool rope;
};

/* y = x turned by RoPE, or back: a rotation's gradient is turned the other way. */
static void turn_by(const float *c, const float *s, float *y, const float *x, int D, bool back) {
    for (int i = 0, half = D / 2; i < half; i++) {
        float a = x[i], b = x[i + half], sine = back ? -s[i] : s[i];
        y[i] = a * c[i] - b * sine;
        y[i + half] = b * c[i] + a * sine;
    }
}
static void turn(const struct task *t, float *y, const float *x, size_t position, bool back) {
    size_t at = position * (size_t)t->D / 2;
    if (t->rope)
        turn_by(t->l->cosines + at, t->l->sines + at, y, x, t->D, back);
    else
        memcpy(y, x, (size_t)t->D * sizeof *y);
}
static void turn_far(const struct task *t, float *y, const float *x, bool back) {
    turn_by(t->l->far_cosines, t->l->far_sines, y, x, t->D, back);
}

static void read_rows(const struct task *t) {
    const struct attention_lesson *l = t->l;
    struct attention_back_scratch *s = t->tmp;
    size_t D = (size_t)t->D, row = (size_t)t->c->n_heads * D;
    bool far = t->c->max_distance > 0 && t->rope;
    for (size_t n = 0; n < (size_t)t->T; n++) {
        const float *q = l->q + n * l->qkv_row + (size_t)t->head * D,
                    *k = l->k + n * l->qkv_row + (size_t)t->kv_head * D,
                    *v = l->v + n * l->qkv_row + (size_t)t->kv_head * D,
                    *y = l->y + n * row + (size_t)t->head * D,
                    *dy = l->dy + n * row + (size_t)t->head * D;
        float *v1 = s->v + n * t->Vl, *e = s->e + n * t->Vl;
        turn(t, s->q + n * t->Dl, q, n, false);
        turn(t, s->k + n * t->Dl, k, n, false);
        if (far) turn_far(t, s->q_far + n * t->Dl, q, false);
        memcpy(s->x_q + n * t->Dl, t->c->map_before_rope ? q : s->q + n * t->Dl, D * sizeof *q);
        memcpy(s->x_k + n * t->Dl, t->c->map_before_rope ? k : s->k + n * t->Dl, D * sizeof *k);
        memcpy(v1, v, D * sizeof *v);
        memcpy(e, dy, D * sizeof *dy);
        v1[D] = 1;
        e[D] = -t->rows->dot(dy, y, t->D);
        float *padded[] = {s->q, s->k, s->q_far, s->x_q, s->x_k};
        for (size_t i = 0; i < sizeof padded / sizeof *padded; i++)
            memset(padded[i] + n * t->Dl + D, 0, (t->Dl - D) * sizeof(float));
        memset(v1 + D + 1, 0, (t->Vl - D - 1) * sizeof *v1);
        memset(e + D + 1, 0, (t->Vl - D - 1) * sizeof *e);
    }
}

static void features(const struct task *t, const float *map, const float *x, float *phi,
                     float *reach) {
    struct attention_back_scratch *s = t->tmp;
    for (int d = 0; d < t->D; d++)
        for (size_t i = 0; i < t->fl; i++)
            s->w[(size_t)d * t->fl + i] = i < (size_t)t->f ? map[(size_t)d * (size_t)t->f + i] : 0;
    t->dense->product(s->u, t->fl, false, x, t->Dl, 1, t->T, s->w, t->fl, t->D, (int)t->fl / TILE);
    t->maps->features(t->c->map, phi, reach, s->u, t->T, t->f, (int)t->fl);
}

/* Through a map whose features() were the last: dphi -> its gradient, and dx (+)= by what it saw.
 */
static void features_back(const struct task *t, float *dmap, float *dx, bool add, const float *x,
                          const float *dphi, const float *phi, bool key) {
    struct attention_back_scratch *s = t->tmp;
    t->maps->features_back(t->c->map, s->u, dphi, phi, s->u, key, t->T, (int)t->fl);
    t->dense->product(s->dw, t->fl, false, x, 1, t->Dl, t->D, s->u, t->fl, t->T, (int)t->fl / TILE);
    for (size_t d = 0; d < (size_t)t->D; d++)
        for (size_t i = 0; i < (size_t)t->f; i++)
            dmap[d * (size_t)t->f + i] += s->dw[d * t->fl + i];
    memset(s->w_t, 0, t->fl * t->Dl * sizeof *s->w_t);
    t->maps->transpose(s->w_t, t->Dl, s->w, t->fl, t->D, (int)t->fl);
    t->dense->product(dx, t->Dl, add, s->u, t->fl, 1, t->T, s->w_t, t->Dl, (int)t->fl,
                      (int)t->Dl / TILE);
}

/* ---- what is folded, and what the horizon leaves (attention/memory.c) ---- */
static int64_t folded_by(const struct attention_config *c, int64_t position) {
    int64_t n = position + 1;
    if (c->window == WINDOW_SLIDING) n = position + 1 - c->window_size - c->sinks;
    if (c->window == WINDOW_TERRACED)
        n = (position / c->window_size - 1) * c->window_size - c->sinks - c->cache_size;
    return position >= 0 && n > 0 ? n : 0;
}
static double forgetting(const struct attention_config *c,
                         int64_t position) { /* on arriving there */
    int64_t before = folded_by(c, position - 1), after = folded_by(c, position);
    if (!c->horizon || after <= c->horizon || after == before) return 1;
    int64_t held = (before < c->horizon ? before : c->horizon) + after - before;
    return (double)c->horizon / (double)held;
}

static const int64_t *cached(const struct task *t, int block) {
    int blocks = attention_back_blocks(t->c, t->T);
    return t->l->cache +
           ((size_t)t->kv_head * (size_t)blocks + (size_t)block) * (size_t)t->c->cache_size;
}
static bool contains(const int64_t *set, int n, int64_t x) {
    for (int i = 0; i < n && set[i] >= 0; i++)
        if (set[i] == x) return true;
    return false;
}

/* Terraced: positions folded before block b, ascending, into s->position. */
static int leaving(const struct task *t, int b) {
    const struct attention_config *c = t->c;
    int n = 0, size = c->cache_size, w = c->window_size, *out = t->tmp->position;
    if (c->window != WINDOW_TERRACED || b < 2) return 0;
    const int64_t *now = size ? cached(t, b) : NULL, *before = size ? cached(t, b - 1) : NULL;
    for (int i = 0; i < size && before[i] >= 0; i++)
        if (!contains(now, size, before[i])) out[n++] = (int)before[i];
    for (int j = (b - 2) * w; j < (b - 1) * w; j++)
        if (j >= c->sinks && !(size && contains(now, size, j))) out[n++] = j;
    return n;
}

/* Otherwise: the keys that a chunk folds itself are consecutive, key first + i at row r0 + from_row
 * + i. */
struct own_fold {
    int first, n, from_row;
};
static struct own_fold folds_itself(const struct task *t, int r0, int r1) {
    const struct attention_config *c = t->c;
    int lag = c->window == WINDOW_SLIDING ? c->window_size : 0;
    int first = r0 - lag > c->sinks ? r0 - lag : c->sinks;
    struct own_fold o = {first, r1 - lag - first, first + lag - r0};
    if (c->window == WINDOW_TERRACED || o.n < 0) o.n = 0;
    return o;
}

/* alpha[r]: what is left of the state before the chunk at row r; beta [r][i]: of own key i, 0
 * before it is folded. */
static void decay(const struct task *t, int r0, int n, struct own_fold own, float *alpha) {
    size_t R = (size_t)round_up(t->rows_of_chunk, TILE);
    double left = 1;
    for (int r = 0; r < n; r++) {
        double f = t->c->window == WINDOW_TERRACED ? 1 : forgetting(t->c, r0 + r);
        float *beta = t->tmp->beta + (size_t)r * R;
        left *= f;
        alpha[r] = (float)left;
        for (int i = 0; i < own.n; i++)
            beta[i] = i > r - own.from_row ? 0
                      : i == r - own.from_row
                          ? (float)f
                          : (float)(f * (double)beta[(ptrdiff_t)i - (ptrdiff_t)R]);
        for (size_t i = (size_t)own.n; i < R; i++)
            beta[i] = 0;
    }
}

/* ---- the states before each chunk ---- */
static void gather_fold(const struct task *t, int n) {
    struct attention_back_scratch *s = t->tmp;
    for (int i = 0; i < n; i++) {
        size_t j = (size_t)s->position[i];
        memcpy(s->fold_phi + (size_t)i * t->F, s->phi_k + j * t->F, t->F * sizeof(float));
        memcpy(s->fold_v + (size_t)i * t->Vl, s->v + j * t->Vl, t->Vl * sizeof(float));
    }
}

static void read_states(const struct task *t) {
    struct attention_back_scratch *s = t->tmp;
    int rows = t->rows_of_chunk;
    float alpha[t->rows_of_chunk];
    memset(s->states, 0, t->state * sizeof *s->states);
    for (int b = 0, r0 = 0; r0 < t->T; b++, r0 += rows) {
        float *S = s->states + (size_t)b * t->state;
        int n = leaving(t, b), n_rows = t->T - r0 < rows ? t->T - r0 : rows;
        if (n) {
            gather_fold(t, n);
            t->dense->product(S, t->F, true, s->fold_v, 1, t->Vl, t->D + 1, s->fold_phi, t->F, n,
                              (int)t->F / TILE);
            double f = forgetting(t->c, r0);
            if (f != 1) t->rows->scale(S, S, (float)f, (int)t->state);
        }
        if (r0 + rows >= t->T) break;
        float *next = S + t->state;
        struct own_fold own = folds_itself(t, r0, r0 + n_rows);
        decay(t, r0, n_rows, own, alpha);
        t->rows->scale(next, S, alpha[n_rows - 1], (int)t->state);
        if (!own.n) continue;
        const float *beta = s->beta + (size_t)(n_rows - 1) * (size_t)round_up(rows, TILE);
        for (int i = 0; i < own.n; i++)
            t->rows->scale(s->fold_phi + (size_t)i * t->F,
                           s->phi_k + (size_t)(own.first + i) * t->F, beta[i], (int)t->F);
        t->dense->product(next, t->F, true, s->v + (size_t)own.first * t->Vl, 1, t->Vl, t->D + 1,
                          s->fold_phi, t->F, own.n, (int)t->F / TILE);
    }
}

/* ---- exact keys of a chunk ---- */
struct seen { /* by one row among the chunk's entries: 0 .. first - 1, the first `clamped` as
                 max_distance behind; from .. to - 1 */
    int first, from, to, clamped;
};

/* Gathers them; returns how many. */
static int gather_entries(const struct task *t, int b, int r0, int r1) {
    struct attention_back_scratch *s = t->tmp;
    const struct attention_config *c = t->c;
    int n = 0, w = c->window_size, from = r1;
    size_t columns = (size_t)s->columns;
    if (c->window == WINDOW_TERRACED) {
        from = b ? r0 - w : 0;
        for (int i = 0; b >= 2 && i < c->sinks; i++)
            s->position[n++] = i;
        const int64_t *set = c->cache_size ? cached(t, b) : NULL;
        for (int i = 0; i < c->cache_size && set[i] >= 0; i++)
            s->position[n++] = (int)set[i];
    } else if (c->window == WINDOW_SLIDING) {
        from = r0 - w + 1 > 0 ? r0 - w + 1 : 0;
        for (int i = 0; i < c->sinks; i++)
            s->position[n++] = i;
    }
    for (int j = from; j < r1; j++)
        s->position[n++] = j;
    for (int i = 0; i < n; i++) {
        size_t j = (size_t)s->position[i];
        memcpy(s->keys + (size_t)i * t->Dl, s->k + j * t->Dl, t->Dl * sizeof(float));
        memcpy(s->plain + (size_t)i * t->Dl, s->x_k + j * t->Dl, t->Dl * sizeof(float));
    }
    t->maps->transpose(s->keys_t, columns, s->keys, t->Dl, n, t->D);
    t->maps->transpose(s->plain_t, columns, s->plain, t->Dl, n, t->D);
    for (int i = 0; i < n; i++)
        for (int d = 0; d <= t->D; d++)
            s->v_t[(size_t)d * columns + (size_t)i] =
                s->v[(size_t)s->position[i] * t->Vl + (size_t)d];
    return n;
}

static struct seen seen_by(const struct task *t, int b, int r0, int row, int n_entries) {
    const struct attention_config *c = t->c;
    const int *position = t->tmp->position;
    int n = r0 + row, w = c->window_size, from = c->window == WINDOW_TERRACED ? r0 : n;
    struct seen s = {0};
    if (c->window == WINDOW_TERRACED) {
        int own = n_entries - (t->T - r0 < w ? t->T - r0 : w),
            before = b ? w : 0; /* where rows' own keys begin */
        s = (struct seen){own - before, own - before, own + row + 1, 0};
    } else if (c->window == WINDOW_SLIDING) {
        int first = r0 - w + 1 > 0 ? r0 - w + 1 : 0, left = n - w + 1 > 0 ? n - w + 1 : 0;
        s.first = left < c->sinks ? left : c->sinks;
        s.from = c->sinks + left - first;
        s.to = c->sinks + n - first + 1;
    }
    while (c->max_distance && t->rope && s.clamped < s.first &&
           from - position[s.clamped] > c->max_distance)
        s.clamped++;
    return s;
}

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
    size_t columns = (size_t)s->columns, R = (size_t)round_up(t->rows_of_chunk, TILE),
           r0 = (size_t)k->r0;
    const float *q = s->q + r0 * t->Dl, *z = k->S + (size_t)t->D * t->F;
    t->dense->product(s->a, columns, false, q, t->Dl, 1, k->n, s->keys_t, columns, t->D,
                      k->width / TILE);
    t->dense->product(s->t, columns, false, s->e + r0 * t->Vl, t->Vl, 1, k->n, s->v_t, columns,
                      t->D + 1, k->width / TILE);
    t->dense->product(s->far, columns, false, s->q_far + r0 * t->Dl, t->Dl, 1, k->n, s->plain_t,
                      columns, t->D, round_up(k->clamped, TILE) / TILE);
    for (int r = 0; r < k->n; r++) {
        float *a = s->a + (size_t)r * columns, *grade = s->t + (size_t)r * columns;
        struct seen e = seen_by(t, k->b, k->r0, r, k->entries);
        size_t n = r0 + (size_t)r;
        bool linear = folded_by(t->c, (int64_t)n) > 0;
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
    size_t R = (size_t)round_up(t->rows_of_chunk, TILE), r0 = (size_t)k->r0;
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
    size_t R = (size_t)round_up(t->rows_of_chunk, TILE);
    float alpha[t->rows_of_chunk];
    int r0 = b * t->rows_of_chunk, n = t->T - r0 < t->rows_of_chunk ? t->T - r0 : t->rows_of_chunk;
    struct chunk k = {
        .b = b, .r0 = r0, .n = n, .S = s->states + (size_t)b * t->state, .alpha = alpha};
    k.own = folds_itself(t, r0, r0 + n);
    decay(t, r0, n, k.own, alpha);
    k.entries = t->c->window == WINDOW_NONE ? 0 : gather_entries(t, b, r0, r0 + n);
    k.width = round_up(k.entries, TILE);
    for (int r = 0; k.entries && r < n; r++) {
        int clamped = seen_by(t, b, r0, r, k.entries).clamped;
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
    int left = leaving(t, b);
    if (!left) return;
    double f = forgetting(t->c, r0);
    if (f != 1) t->rows->scale(s->G, s->G, (float)f, (int)t->state);
    gather_fold(t, left);
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
        .rows_of_chunk = chunk_rows(c),
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
    read_rows(&t);
    features(&t, map_k, s->x_k, s->phi_k, NULL);
    features(&t, map_q, s->x_q, s->phi_q, s->reach);
    read_states(&t);
    float *zero[] = {s->dq, s->dq_far, s->dk, s->dx, s->dv};
    for (size_t i = 0; i < sizeof zero / sizeof *zero; i++)
        memset(zero[i], 0, T * t.Dl * sizeof(float));
    memset(s->dphi_k, 0, T * t.F * sizeof *s->dphi_k);
    memset(s->G, 0, t.state * sizeof *s->G);
    for (int b = (t.T - 1) / t.rows_of_chunk; b >= 0; b--)
        chunk_back(&t, b);
    *out->mix += t.dmix;

    /* the query's map first, whose features() were the last; keys' are made again */
    float *dx_q = s->v; /* values are done with */
    features_back(&t, out->map_q, c->map_before_rope ? dx_q : s->dq, !c->map_before_rope, s->x_q,
                  s->dphi_q, s->phi_q, false);
    for (size_t n = 0; n < T; n++) {
        float *dq = out->dq + n * out->dq_row, far[t.D];
        turn(&t, dq, s->dq + n * t.Dl, n, true);
        if (c->max_distance && t.rope) {
            turn_far(&t, far, s->dq_far + n * t.Dl, true);
            t.rows->add(dq, far, 1, t.D);
        }
        if (c->map_before_rope) t.rows->add(dq, dx_q + n * t.Dl, 1, t.D);
    }
    features(&t, map_k, s->x_k, s->phi_k, NULL);
    features_back(&t, out->map_k, c->map_before_rope ? s->dx : s->dk, true, s->x_k, s->dphi_k,
                  s->phi_k, true);
    for (size_t n = 0; n < T; n++) {
        float *dk = out->dk + n * (size_t)t.D;
        turn(&t, dk, s->dk + n * t.Dl, n, true);
        if (c->map_before_rope) t.rows->add(dk, s->dx + n * t.Dl, 1, t.D);
        memcpy(out->dv + n * (size_t)t.D, s->dv + n * t.Dl, (size_t)t.D * sizeof(float));
    }
}
