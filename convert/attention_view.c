/* attention_view.c - the tokens of a document gathered as rows of a chunk see them. */
#include "convert/attention_view.h"

#include "compute/memory.h"
#include "convert/carve.h"
#include "convert/student.h"

#include <stdlib.h>
#include <string.h>

enum { CHUNK = 64 }; /* rows, where the window is not terraced */

int view_chunk_rows(const struct attention_config *c) {
    return c->window == WINDOW_TERRACED ? c->window_size : CHUNK;
}
/* Columns for keys that a chunk folds itself: with a terraced window it folds none. */
int view_own_room(const struct attention_config *c) {
    return c->window == WINDOW_TERRACED ? TILE : CHUNK;
}
static int most_entries(const struct attention_config *c) {
    if (c->window == WINDOW_TERRACED)
        return c->sinks + attention_cache_most(c) + 2 * c->window_size;
    return c->sinks + c->window_size + CHUNK;
}

static size_t lay_out(struct attention_back_scratch *s, const struct attention_config *c,
                      int max_tokens, float *block) {
    struct carve at = {block, 0};
    size_t T = (size_t)max_tokens, D = (size_t)c->head_dim,
           Dl = (size_t)round_up(c->head_dim, TILE), Vl = (size_t)round_up(c->head_dim + 1, TILE),
           fl = (size_t)round_up(c->features, TILE), F = 2 * fl,
           R = (size_t)round_up(view_chunk_rows(c), TILE), own = (size_t)view_own_room(c),
           columns = (size_t)round_up(most_entries(c), TILE),
           chunks = T / (size_t)view_chunk_rows(c) + 1;
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
    s->p = cut(&at, R * own);
    s->ev = cut(&at, R * own);
    s->beta = cut(&at, R * own);
    s->turned = cut(&at, (F > Vl ? F : Vl) * own);
    s->alpha = cut(&at, R);
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
    return attention_cache_most(c) ? (n_tokens + c->window_size - 1) / c->window_size : 0;
}

/* ---- one head ---- */
/* y = x turned by RoPE, or back: a rotation's gradient is turned the other way. */
static void turn_by(const float *c, const float *s, float *y, const float *x, int D, bool back) {
    for (int i = 0, half = D / 2; i < half; i++) {
        float a = x[i], b = x[i + half], sine = back ? -s[i] : s[i];
        y[i] = a * c[i] - b * sine;
        y[i + half] = b * c[i] + a * sine;
    }
}
void view_turn(const struct task *t, float *y, const float *x, size_t position, bool back) {
    size_t at = position * (size_t)t->D / 2;
    if (t->rope)
        turn_by(t->l->cosines + at, t->l->sines + at, y, x, t->D, back);
    else
        memcpy(y, x, (size_t)t->D * sizeof *y);
}
void view_turn_far(const struct task *t, float *y, const float *x, bool back) {
    turn_by(t->l->far_cosines, t->l->far_sines, y, x, t->D, back);
}

void view_read_rows(const struct task *t) {
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
        view_turn(t, s->q + n * t->Dl, q, n, false);
        view_turn(t, s->k + n * t->Dl, k, n, false);
        if (far) view_turn_far(t, s->q_far + n * t->Dl, q, false);
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

void view_features(const struct task *t, const float *map, const float *x, float *phi,
                   float *reach) {
    struct attention_back_scratch *s = t->tmp;
    for (int d = 0; d < t->D; d++)
        for (size_t i = 0; i < t->fl; i++)
            s->w[(size_t)d * t->fl + i] = i < (size_t)t->f ? map[(size_t)d * (size_t)t->f + i] : 0;
    t->dense->product(s->u, t->fl, false, x, t->Dl, 1, t->T, s->w, t->fl, t->D, (int)t->fl / TILE);
    t->maps->features(t->c->map, phi, reach, s->u, t->T, t->f, (int)t->fl);
}

/* Through a map whose view_features() were the last: dphi -> its gradient, and dx (+)= by what it
 * saw.
 */
void view_features_back(const struct task *t, float *dmap, float *dx, bool add, const float *x,
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
int64_t view_folded_by(const struct task *t, int64_t position) {
    const struct attention_config *c = t->c;
    int64_t n = position + 1;
    if (c->window == WINDOW_SLIDING) n = position + 1 - c->window_size - c->sinks;
    if (c->window == WINDOW_TERRACED)
        n = (position / c->window_size - 1) * c->window_size - c->sinks - t->places;
    return position >= 0 && n > 0 ? n : 0;
}
double view_forgetting(const struct task *t, int64_t position) { /* on arriving there */
    const struct attention_config *c = t->c;
    int64_t before = view_folded_by(t, position - 1), after = view_folded_by(t, position);
    if (!c->horizon || after <= c->horizon || after == before) return 1;
    int64_t held = (before < c->horizon ? before : c->horizon) + after - before;
    return (double)c->horizon / (double)held;
}

static const int64_t *cached(const struct task *t, int block) {
    int blocks = attention_back_blocks(t->c, t->T);
    return t->l->cache + ((size_t)t->kv_head * (size_t)blocks + (size_t)block) *
                             (size_t)attention_cache_most(t->c);
}
static bool contains(const int64_t *set, int n, int64_t x) {
    for (int i = 0; i < n && set[i] >= 0; i++)
        if (set[i] == x) return true;
    return false;
}

/* Terraced: positions folded before block b, ascending, into s->position. */
int view_leaving(const struct task *t, int b) {
    const struct attention_config *c = t->c;
    int n = 0, size = t->places, w = c->window_size, *out = t->tmp->position;
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
struct own_fold view_folds_itself(const struct task *t, int r0, int r1) {
    const struct attention_config *c = t->c;
    int lag = c->window == WINDOW_SLIDING ? c->window_size : 0;
    int first = r0 - lag > c->sinks ? r0 - lag : c->sinks;
    struct own_fold o = {first, r1 - lag - first, first + lag - r0};
    if (c->window == WINDOW_TERRACED || o.n < 0) o.n = 0;
    return o;
}

/* alpha[r]: what is left of the state before the chunk at row r; beta [r][i]: of own key i, 0
 * before it is folded. */
void view_decay(const struct task *t, int r0, int n, struct own_fold own, float *alpha) {
    size_t R = t->own_row;
    double left = 1;
    for (int r = 0; r < n; r++) {
        double f = t->c->window == WINDOW_TERRACED ? 1 : view_forgetting(t, r0 + r);
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
void view_gather_fold(const struct task *t, int n) {
    struct attention_back_scratch *s = t->tmp;
    for (int i = 0; i < n; i++) {
        size_t j = (size_t)s->position[i];
        memcpy(s->fold_phi + (size_t)i * t->F, s->phi_k + j * t->F, t->F * sizeof(float));
        memcpy(s->fold_v + (size_t)i * t->Vl, s->v + j * t->Vl, t->Vl * sizeof(float));
    }
}

void view_read_states(const struct task *t) {
    struct attention_back_scratch *s = t->tmp;
    int rows = t->rows_of_chunk;
    memset(s->states, 0, t->state * sizeof *s->states);
    for (int b = 0, r0 = 0; r0 < t->T; b++, r0 += rows) {
        float *S = s->states + (size_t)b * t->state;
        int n = view_leaving(t, b), n_rows = t->T - r0 < rows ? t->T - r0 : rows;
        if (n) {
            view_gather_fold(t, n);
            t->dense->product(S, t->F, true, s->fold_v, 1, t->Vl, t->D + 1, s->fold_phi, t->F, n,
                              (int)t->F / TILE);
            double f = view_forgetting(t, r0);
            if (f != 1) t->rows->scale(S, S, (float)f, (int)t->state);
        }
        if (r0 + rows >= t->T) break;
        float *next = S + t->state;
        struct own_fold own = view_folds_itself(t, r0, r0 + n_rows);
        view_decay(t, r0, n_rows, own, s->alpha);
        t->rows->scale(next, S, s->alpha[n_rows - 1], (int)t->state);
        if (!own.n) continue;
        const float *beta = s->beta + (size_t)(n_rows - 1) * t->own_row;
        for (int i = 0; i < own.n; i++)
            t->rows->scale(s->fold_phi + (size_t)i * t->F,
                           s->phi_k + (size_t)(own.first + i) * t->F, beta[i], (int)t->F);
        t->dense->product(next, t->F, true, s->v + (size_t)own.first * t->Vl, 1, t->Vl, t->D + 1,
                          s->fold_phi, t->F, own.n, (int)t->F / TILE);
    }
}

/* ---- exact keys of a chunk ---- */
/* Gathers them; returns how many. */
int view_gather_entries(const struct task *t, int b, int r0, int r1) {
    struct attention_back_scratch *s = t->tmp;
    const struct attention_config *c = t->c;
    int n = 0, w = c->window_size, from = r1;
    size_t columns = (size_t)s->columns;
    if (c->window == WINDOW_TERRACED) {
        from = b ? r0 - w : 0;
        for (int i = 0; b >= 2 && i < c->sinks; i++)
            s->position[n++] = i;
        const int64_t *set = t->places ? cached(t, b) : NULL;
        for (int i = 0; i < t->places && set[i] >= 0; i++)
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

struct seen view_seen_by(const struct task *t, int b, int r0, int row, int n_entries) {
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
