/* heads.c - the weights of every head, recomputed from q, k and what the engine kept. */
#include "convert/heads.h"

#include "attention/kernels.h"
#include "compute/memory.h"
#include "convert/kernels.h"
#include "convert/rank.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct room {                /* one thread's, pieces of one block */
    float *key_tile, *value; /* one entry as the engine stores it */
    float *x, *turned;       /* [T][D] keys as the maps see them, and rotated */
    float *turned_t;         /* [D][columns] */
    float *v;                /* [T][lanes] */
    float *u, *phi, *phi_t;  /* [T][fl], [T][2 fl], [2 fl][columns] */
    float *q, *far, *qx;     /* [D] rotated, rotated to max_distance, as the maps see it */
    float *uq, *phi_q;       /* [fl], [2 fl] */
    float *scores, *s;       /* [columns] of one row by key: q.k, phi_q.phi_k */
    float *rp, *rs, *ra;     /* [columns] by class: sinks, cache, linear, window */
    float *exact;            /* [columns] the pupil's logits of sinks and cache */
    float *weights;          /* [3][columns] by key: p, a, a without the state */
    float *y;                /* [3][lanes] */
    float *decay;            /* [T] what is left of a linear key; 0: it is exact */
    int *order;              /* [columns] keys by class */
    float *px, *ps;          /* [RANKED] */
    double *ranks;           /* [4 RANKED] */
};

struct heads {
    struct model *model;
    struct team *team;
    struct attention *attention;
    struct attention_config config;
    int n_layers, group, states; /* query heads and states of a kv head */
    int *own;                    /* [n_layers] the layer's number in attention; -1: it kept softmax */
    int max_tokens, max_rows, n_tokens, n_rows, n_blocks, columns, lanes, fl;
    size_t q_floats, kv_floats;
    int *rows;     /* [max_rows] positions, ascending */
    float *kv, *q; /* [layer][n_tokens][k, v] and [layer][n_rows][q] before RoPE */
    size_t kv_bytes, q_bytes;
    float *cosines, *sines, *far_cosines, *far_sines;
    int32_t *sets; /* [layer][kv head][n_blocks][most_cache], -1 ends */
    int most_cache;
    int64_t *positions;
    struct head_sums *sums;
    double n_read, n_linear;
    struct room *rooms; /* [threads] */
    void *block;
    size_t block_bytes;
    int at, next_row; /* of the step in progress */
    void (*watch)(void *, int, int, int, const float *, const float *);
    void *watch_arg;
};

/* ---- room ---- */
struct carve {
    char *base;
    size_t used;
};
static void *cut(struct carve *c, size_t n, size_t size) {
    void *at = c->base ? c->base + c->used : NULL;
    c->used += (n * size + 63) / 64 * 64;
    return at;
}
static float *floats(struct carve *c, size_t n) {
    return cut(c, n, sizeof(float));
}

static void place(const struct heads *h, struct carve *c, struct room *r) {
    size_t T = (size_t)h->max_tokens, D = (size_t)h->config.head_dim, lanes = (size_t)h->lanes,
           fl = (size_t)h->fl, columns = (size_t)h->columns;
    *r = (struct room){
        .key_tile = floats(c, D * TILE),
        .value = floats(c, lanes),
        .x = floats(c, T * D),
        .turned = floats(c, T * D),
        .turned_t = floats(c, D * columns),
        .v = floats(c, T * lanes),
        .u = floats(c, T * fl),
        .phi = floats(c, T * 2 * fl),
        .phi_t = floats(c, 2 * fl * columns),
        .q = floats(c, D),
        .far = floats(c, D),
        .qx = floats(c, D),
        .uq = floats(c, fl),
        .phi_q = floats(c, 2 * fl),
        .scores = floats(c, columns),
        .s = floats(c, columns),
        .rp = floats(c, columns),
        .rs = floats(c, columns),
        .ra = floats(c, columns),
        .exact = floats(c, columns),
        .weights = floats(c, 3 * columns),
        .y = floats(c, 3 * lanes),
        .decay = floats(c, T),
        .order = cut(c, columns, sizeof(int)),
        .px = floats(c, RANKED),
        .ps = floats(c, RANKED),
        .ranks = cut(c, 4 * RANKED, sizeof(double)),
    };
}

static enum err take_rooms(struct heads *h) {
    int n = team_size(h->team);
    struct carve c = {0};
    h->rooms = calloc((size_t)n, sizeof *h->rooms);
    if (!h->rooms) return ERR_NOMEM;
    for (int t = 0; t < n; t++)
        place(h, &c, &h->rooms[t]);
    h->block_bytes = c.used;
    if (!(h->block = memory_map(c.used))) return ERR_NOMEM;
    c = (struct carve){h->block, 0};
    for (int t = 0; t < n; t++)
        place(h, &c, &h->rooms[t]);
    return OK;
}

enum err heads_new(struct heads **out, struct model *model, struct team *team, int max_tokens,
                   int max_rows) {
    const struct model_info *info = model_info(model);
    if (info->attention.kind != ATTENTION_HEDGEHOG || max_tokens < 1 || max_rows < 1)
        return ERR_ARG;
    struct heads *h = calloc(1, sizeof *h);
    if (!h) return ERR_NOMEM;
    const struct attention_config *c = &info->attention;
    size_t D = (size_t)c->head_dim, half = D / 2 + 1, L = (size_t)info->n_layers,
           T = (size_t)max_tokens;
    h->model = model;
    h->team = team;
    h->attention = model_attention(model);
    h->config = *c;
    h->n_layers = info->n_layers;
    h->group = c->n_heads / c->n_kv_heads;
    h->states = c->key_map_per_query_head ? h->group : 1;
    h->max_tokens = max_tokens;
    h->max_rows = max_rows;
    h->columns = round_up(max_tokens, TILE) + TILE;
    h->lanes = round_up(c->head_dim, TILE);
    h->fl = round_up(c->features, TILE);
    h->q_floats = (size_t)c->n_heads * D;
    h->kv_floats = 2 * (size_t)c->n_kv_heads * D;
    h->most_cache = attention_cache_most(c);
    h->n_blocks = c->window == WINDOW_TERRACED ? (max_tokens - 1) / c->window_size + 1 : 0;
    h->kv_bytes = L * T * h->kv_floats * sizeof(float);
    h->q_bytes = L * (size_t)max_rows * h->q_floats * sizeof(float);
    h->kv = memory_map(h->kv_bytes);
    h->q = memory_map(h->q_bytes);
    h->rows = calloc((size_t)max_rows, sizeof *h->rows);
    h->cosines = calloc(T * half, sizeof *h->cosines);
    h->sines = calloc(T * half, sizeof *h->sines);
    h->far_cosines = calloc(half, sizeof *h->far_cosines);
    h->far_sines = calloc(half, sizeof *h->far_sines);
    h->sets = calloc(L * (size_t)c->n_kv_heads * (size_t)h->n_blocks * (size_t)h->most_cache + 1,
                     sizeof *h->sets);
    h->positions = calloc((size_t)h->most_cache + 1, sizeof *h->positions);
    h->sums = calloc(L * (size_t)c->n_heads, sizeof *h->sums);
    h->own = calloc(L, sizeof *h->own);
    if (!h->own || !h->kv || !h->q || !h->rows || !h->cosines || !h->sines || !h->far_cosines ||
        !h->far_sines || !h->sets || !h->positions || !h->sums || take_rooms(h)) {
        heads_free(h);
        return ERR_NOMEM;
    }
    for (int layer = 0, n = 0; layer < info->n_layers; layer++)
        h->own[layer] = info->softmax_layers && info->softmax_layers[layer] ? -1 : n++;
    const struct rope *rope = model_rope(model);
    for (size_t p = 0; rope && p < T; p++)
        rope_angles(rope, (int64_t)p, h->cosines + p * (D / 2), h->sines + p * (D / 2));
    if (rope) rope_angles(rope, c->max_distance, h->far_cosines, h->far_sines);
    *out = h;
    return OK;
}

void heads_free(struct heads *h) {
    if (!h) return;
    memory_unmap(h->kv, h->kv_bytes);
    memory_unmap(h->q, h->q_bytes);
    memory_unmap(h->block, h->block_bytes);
    free(h->rooms);
    free(h->rows);
    free(h->cosines);
    free(h->sines);
    free(h->far_cosines);
    free(h->far_sines);
    free(h->sets);
    free(h->positions);
    free(h->sums);
    free(h->own);
    free(h);
}

const struct head_sums *heads_sums(const struct heads *h) {
    return h->sums;
}
double heads_share(const struct heads *h) {
    return h->n_read > 0 ? h->n_linear / h->n_read : 0;
}
void heads_watch(struct heads *h,
                 void (*fn)(void *arg, int layer, int head, int position, const float *p,
                            const float *a),
                 void *arg) {
    h->watch = fn;
    h->watch_arg = arg;
}

/* ---- reading ---- */
static void tap(void *arg, int layer, const float *qkv, int n_rows) {
    struct heads *h = arg;
    size_t row = h->q_floats + h->kv_floats;
    float *kv = h->kv + ((size_t)layer * (size_t)h->n_tokens + (size_t)h->at) * h->kv_floats;
    for (int i = 0; i < n_rows; i++)
        memcpy(kv + (size_t)i * h->kv_floats, qkv + (size_t)i * row + h->q_floats,
               h->kv_floats * sizeof *kv);
    float *q = h->q + (size_t)layer * (size_t)h->n_rows * h->q_floats;
    for (int r = h->next_row; r < h->n_rows && h->rows[r] < h->at + n_rows; r++)
        memcpy(q + (size_t)r * h->q_floats, qkv + (size_t)(h->rows[r] - h->at) * row,
               h->q_floats * sizeof *q);
}

static int32_t *set_of(const struct heads *h, int layer, int kv_head, int block) {
    size_t head = (size_t)layer * (size_t)h->config.n_kv_heads + (size_t)kv_head;
    return h->sets + (head * (size_t)h->n_blocks + (size_t)block) * (size_t)h->most_cache;
}

/* The caches as they are while this block is read. */
static void note_caches(struct heads *h, int slot, int block) {
    for (int layer = 0; layer < h->n_layers; layer++)
        for (int kv = 0; kv < h->config.n_kv_heads; kv++) {
            int32_t *set = set_of(h, layer, kv, block);
            if (h->own[layer] < 0) continue;
            int n = attention_cache_positions(h->attention, model_slot(h->model, slot),
                                              h->own[layer], kv, h->positions);
            for (int i = 0; i < h->most_cache; i++)
                set[i] = i < n ? (int32_t)h->positions[i] : -1;
        }
}

/* The middles of n_rows even parts of the rows from first on; less where there are not so many. */
static void choose_rows(struct heads *h, int first, int n, int n_rows) {
    h->n_rows = n - first < n_rows ? n - first : n_rows;
    for (int r = 0; r < h->n_rows; r++)
        h->rows[r] = first + (int)((2 * r + 1LL) * (n - first) / (2 * h->n_rows));
}

static enum err read_tokens(struct heads *h, int slot, const int32_t *ids, int n) {
    enum { CHUNK = 64 };
    int w = h->config.window == WINDOW_TERRACED ? h->config.window_size : CHUNK;
    enum err e = OK;
    model_set_tap(h->model, tap, h);
    model_slot_clear(h->model, slot);
    h->next_row = 0;
    for (int at = 0; at < n && !e;) {
        int rows = w - at % w; /* a step ends with its block, whose caches are then known */
        if (rows > CHUNK) rows = CHUNK;
        if (rows > n - at) rows = n - at;
        struct model_run run = {.slot = slot, .n_rows = rows, .tokens = ids + at};
        const float *none;
        h->at = at;
        while (h->next_row < h->n_rows && h->rows[h->next_row] < at)
            h->next_row++;
        e = model_step(h->model, &run, 1, &none);
        if (!e && h->n_blocks) note_caches(h, slot, at / w);
        at += rows;
    }
    model_set_tap(h->model, NULL, NULL);
    return e;
}

/* ---- one kv head ---- */
struct task {
    struct heads *h;
    struct room *r;
    const struct attention_kernels *dense;
    const struct convert_kernels *use;
    struct shape shape; /* of an entry */
    int layer, kv_head, D;
};

static void rotate(const struct task *t, float *y, const float *x, int position) {
    size_t at = (size_t)position * ((size_t)t->D / 2);
    if (model_rope(t->h->model))
        t->dense->rotate(y, x, t->h->cosines + at, t->h->sines + at, t->D);
    else
        memcpy(y, x, (size_t)t->D * sizeof *y);
}

/* x as the engine stores it */
static void round_key(const struct task *t, float *x) {
    t->dense->write_key(&t->shape, t->r->key_tile, 0, x);
    t->dense->read_key(&t->shape, x, t->r->key_tile, 0);
}

static void read_keys(const struct task *t) {
    const struct heads *h = t->h;
    struct room *r = t->r;
    size_t D = (size_t)t->D, half = h->kv_floats / 2, lanes = (size_t)h->lanes;
    const float *rows =
        h->kv + (size_t)t->layer * (size_t)h->n_tokens * h->kv_floats + (size_t)t->kv_head * D;
    for (int i = 0; i < h->n_tokens; i++) {
        const float *k = rows + (size_t)i * h->kv_floats;
        float *x = r->x + (size_t)i * D, *turned = r->turned + (size_t)i * D;
        if (h->config.map_before_rope) {
            memcpy(x, k, D * sizeof *x);
            round_key(t, x);
            rotate(t, turned, x, i);
            if (model_rope(h->model)) round_key(t, turned);
        } else {
            rotate(t, turned, k, i);
            round_key(t, turned);
            memcpy(x, turned, D * sizeof *x);
        }
        t->dense->write_value(&t->shape, r->value, 0, k + half);
        t->dense->read_value(&t->shape, r->v + (size_t)i * lanes, r->value, 0);
    }
    t->use->transpose(r->turned_t, (size_t)h->columns, r->turned, D, h->n_tokens, t->D);
}

static void add_bias(float *u, const float *bias, int n, int fl) {
    for (int i = 0; bias && i < n; i++)
        for (int j = 0; j < fl; j++)
            u[(size_t)i * (size_t)fl + (size_t)j] += bias[j];
}

static void key_features(const struct task *t, int state) {
    const struct heads *h = t->h;
    const struct attention_weights *w = attention_weights_of(h->attention, h->own[t->layer]);
    struct room *r = t->r;
    size_t fl = (size_t)h->fl, head = (size_t)t->kv_head * (size_t)h->states + (size_t)state;
    const float *map = w->map_k + head * (size_t)t->D * fl;
    t->dense->product(r->u, fl, false, r->x, (size_t)t->D, 1, h->n_tokens, map, fl, t->D,
                      h->fl / TILE);
    add_bias(r->u, w->map_k_bias ? w->map_k_bias + head * fl : NULL, h->n_tokens, h->fl);
    t->use->features(h->config.map, r->phi, NULL, r->u, h->n_tokens, h->config.features, h->fl);
    t->use->transpose(r->phi_t, (size_t)h->columns, r->phi, 2 * fl, h->n_tokens, 2 * h->fl);
}

/* The row's q in its three forms, and phi_q; returns by how much its exponents were lowered. */
static float query_features(const struct task *t, int row, int head) {
    const struct heads *h = t->h;
    const struct attention_weights *w = attention_weights_of(h->attention, h->own[t->layer]);
    struct room *r = t->r;
    size_t D = (size_t)t->D, fl = (size_t)h->fl;
    const float *q = h->q + ((size_t)t->layer * (size_t)h->n_rows + (size_t)row) * h->q_floats +
                     (size_t)head * D;
    float reach = 0;
    rotate(t, r->q, q, h->rows[row]);
    if (h->config.max_distance) t->dense->rotate(r->far, q, h->far_cosines, h->far_sines, t->D);
    memcpy(r->qx, h->config.map_before_rope ? q : r->q, D * sizeof *q);
    t->dense->product(r->uq, fl, false, r->qx, D, 1, 1, w->map_q + (size_t)head * D * fl, fl, t->D,
                      h->fl / TILE);
    add_bias(r->uq, w->map_q_bias ? w->map_q_bias + (size_t)head * fl : NULL, 1, h->fl);
    t->use->features(h->config.map, r->phi_q, &reach, r->uq, 1, h->config.features, h->fl);
    return reach;
}

static bool cached(const int32_t *set, int n, int key) {
    for (int i = 0; i < n && set[i] >= 0; i++)
        if (set[i] == key) return true;
    return false;
}

/* What the row at this position folds before it is answered, and the horizon. */
static void advance(const struct task *t, int position) {
    const struct heads *h = t->h;
    const struct attention_config *c = &h->config;
    float *decay = t->r->decay;
    int w = c->window_size;
    if (c->window == WINDOW_NONE) {
        decay[position] = 1;
    } else if (c->window == WINDOW_SLIDING) {
        if (position - w >= c->sinks) decay[position - w] = 1;
    } else if (position % w == 0 && position >= 2 * w) {
        const int32_t *set = h->most_cache ? set_of(h, t->layer, t->kv_head, position / w) : NULL;
        for (int j = c->sinks; j < position - w; j++)
            if (decay[j] == 0 && !cached(set, h->most_cache, j)) decay[j] = 1;
    } else {
        return;
    }
    float forget = attention_forgetting(h->attention, h->own[t->layer], t->kv_head, position);
    for (int j = 0; forget != 1 && j <= position; j++)
        decay[j] *= forget;
}

/* Keys of a row by class. */
struct classes {
    int sinks, cached, linear, window; /* how many, in this order in room.order */
};
static struct classes sort_keys(const struct task *t, int position) {
    const struct heads *h = t->h;
    const struct attention_config *c = &h->config;
    struct classes n = {0};
    int w = c->window_size, at = 0, *order = t->r->order;
    int from = position + 1; /* first key of the window */
    if (c->window == WINDOW_SLIDING) from = position + 1 - w;
    if (c->window == WINDOW_TERRACED) from = (position / w - 1) * w;
    if (from < 0) from = 0;
    for (int j = 0; j < c->sinks && j < from; j++, n.sinks++)
        order[at++] = j;
    if (h->most_cache) {
        const int32_t *set = set_of(h, t->layer, t->kv_head, position / w);
        for (int i = 0; i < h->most_cache && set[i] >= 0; i++, n.cached++)
            order[at++] = set[i];
    }
    for (int j = n.sinks; j < from; j++)
        if (t->r->decay[j] > 0) order[at++] = j, n.linear++;
    for (int j = from; j <= position; j++, n.window++)
        order[at++] = j;
    return n;
}

/* The pupil's logits of sinks and cache, far ones as if max_distance behind. */
static void exact_logits(const struct task *t, int n, int position) {
    const struct heads *h = t->h;
    struct room *r = t->r;
    int w = h->config.window_size;
    int64_t block = h->config.window == WINDOW_TERRACED ? position / w * w : position;
    float scale = 1 / sqrtf((float)t->D);
    for (int i = 0; i < n; i++) {
        int key = r->order[i];
        float dot = r->scores[key];
        if (h->config.max_distance && block - key > h->config.max_distance) {
            const float *x = r->x + (size_t)key * (size_t)t->D;
            dot = 0;
            for (int d = 0; d < t->D; d++)
                dot += r->far[d] * x[d];
        }
        r->exact[i] = scale * dot;
    }
}

static double entropy_of(const float *a, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        if (a[i] > 0) sum -= (double)a[i] * log((double)a[i]);
    return sum;
}

static void add_masses(double *out, const float *a, const struct classes *n) {
    int counts[] = {n->sinks, n->cached, n->linear, n->window};
    enum key_class classes[] = {KEY_SINK, KEY_CACHE, KEY_STATE, KEY_WINDOW};
    for (int c = 0, at = 0; c < 4; c++)
        for (int i = 0; i < counts[c]; i++)
            out[classes[c]] += a[at++];
}

static void add_rank(const struct task *t, const struct classes *n, struct head_sums *sums) {
    struct room *r = t->r;
    int first = n->sinks + n->cached, m = n->linear < RANKED ? n->linear : RANKED;
    if (m < 3) return;
    for (int i = 0; i < m; i++) {
        int key = r->order[first + (int)((int64_t)i * n->linear / m)];
        r->px[i] = r->scores[key];
        r->ps[i] = r->s[key];
    }
    sums->rank += rank_correlation(r->px, r->ps, m, r->ranks);
    sums->n_rank++;
}

/* ||y - y_softmax||^2 with the state and without */
static void add_errors(const struct task *t, int n_keys, float linear, struct head_sums *sums) {
    const struct heads *h = t->h;
    struct room *r = t->r;
    size_t lanes = (size_t)h->lanes;
    t->dense->product(r->y, lanes, false, r->weights, (size_t)h->columns, 1, 3, r->v, lanes, n_keys,
                      h->lanes / TILE);
    const float *p = r->y, *a = p + lanes, *exact = a + lanes;
    for (int d = 0; d < t->D; d++) {
        sums->energy += (double)p[d] * p[d];
        sums->error += (double)(a[d] - p[d]) * (a[d] - p[d]);
        double off = linear < 1 ? exact[d] / (1 - linear) - p[d] : NAN;
        sums->error_exact += off * off;
    }
}

static void weigh_row(const struct task *t, int row, int head, struct head_sums *sums) {
    struct heads *h = t->h;
    struct room *r = t->r;
    const struct attention_weights *w = attention_weights_of(h->attention, h->own[t->layer]);
    int position = h->rows[row], n_keys = position + 1, width = round_up(n_keys, TILE);
    size_t columns = (size_t)h->columns;
    float reach = query_features(t, row, head);
    t->dense->product(r->scores, columns, false, r->q, (size_t)t->D, 1, 1, r->turned_t, columns,
                      t->D, width / TILE);
    t->dense->product(r->s, columns, false, r->phi_q, 2 * (size_t)h->fl, 1, 1, r->phi_t, columns,
                      2 * h->fl, width / TILE);
    struct classes n = sort_keys(t, position);
    int exact = n.sinks + n.cached;
    exact_logits(t, exact, position);
    for (int i = 0; i < n_keys; i++) {
        r->rp[i] = r->scores[r->order[i]];
        r->rs[i] = r->s[r->order[i]] * r->decay[r->order[i]];
    }
    struct row_weights weights = {
        .p = r->rp,
        .s = r->rs,
        .a = r->ra,
        .sink_logits = r->exact,
        .n_keys = n_keys,
        .sinks = exact,
        .from = exact + n.linear,
        .width = width,
        .scale = 1 / sqrtf((float)t->D),
        .mix = w->mix ? w->mix[head] : 0,
        .reach = reach,
        .mixing = h->config.mixing,
    };
    t->use->weigh(&weights);
    sums->n_rows++;
    sums->kl += weights.kl;
    sums->entropy += weights.entropy;
    sums->entropy_own += entropy_of(r->ra, n_keys);
    add_masses(sums->softmax, r->rp, &n);
    add_masses(sums->own, r->ra, &n);
    add_rank(t, &n, sums);
    for (int i = 0; i < n_keys; i++) {
        size_t key = (size_t)r->order[i];
        bool linear = i >= exact && i < exact + n.linear;
        r->weights[key] = r->rp[i];
        r->weights[columns + key] = r->ra[i];
        r->weights[2 * columns + key] = linear ? 0 : r->ra[i];
    }
    add_errors(t, n_keys, weights.linear, sums);
    if (h->watch)
        h->watch(h->watch_arg, t->layer, head, position, r->weights, r->weights + columns);
}

static void measure(const struct task *t) {
    struct heads *h = t->h;
    int shared = h->group / h->states;
    read_keys(t);
    for (int state = 0; state < h->states; state++) {
        key_features(t, state);
        memset(t->r->decay, 0, (size_t)h->n_tokens * sizeof *t->r->decay);
        for (int row = 0, position = 0; row < h->n_rows; row++) {
            for (; position <= h->rows[row]; position++)
                advance(t, position);
            for (int i = 0; i < shared; i++) {
                int head = t->kv_head * h->group + state * shared + i;
                weigh_row(t, row, head, &h->sums[t->layer * h->config.n_heads + head]);
            }
        }
    }
}

static void measure_share(void *arg, int thread, int n_threads) {
    struct heads *h = arg;
    struct task t = {
        .h = h,
        .r = &h->rooms[thread],
        .dense = attention_kernels_chosen(),
        .use = convert_kernels(),
        .D = h->config.head_dim,
        .shape = {.head_dim = h->config.head_dim, .lanes = h->lanes, .kv_type = h->config.kv_type}};
    int n_kv = h->config.n_kv_heads;
    for (int i = thread; i < h->n_layers * n_kv; i += n_threads) {
        t.layer = i / n_kv;
        t.kv_head = i % n_kv;
        if (h->own[t.layer] >= 0) measure(&t);
    }
}

enum err heads_read(struct heads *h, int slot, const int32_t *ids, int n, int n_rows, bool every,
                    char *msg, size_t msg_len) {
    int first = 0;
    if (n < 1 || n > h->max_tokens || n_rows < 1 || n_rows > h->max_rows)
        return err_set(msg, msg_len, ERR_ARG, "too many tokens or rows for the room there is");
    while (first < n && attention_linear_keys(h->attention, -1, 0, first) == 0)
        first++;
    if (first == n && !every)
        return err_set(msg, msg_len, ERR_ARG,
                       "all keys of %d tokens are exact in %s: heads need a longer --context", n,
                       model_info(h->model)->name);
    h->n_tokens = n;
    h->n_read += n;
    h->n_linear += n - first;
    choose_rows(h, every ? 0 : first, n, n_rows);
    enum err e = read_tokens(h, slot, ids, n);
    if (e)
        return err_set(msg, msg_len, e, "%s: the model refused to read %d tokens (%s)",
                       model_info(h->model)->name, n, err_name(e));
    team_run(h->team, measure_share, h);
    return OK;
}
