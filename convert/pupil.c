/* pupil.c - the passes over a pack, layer by layer. */
#include "convert/pupil.h"

#include "compute/cpu.h"
#include "compute/gemm.h"
#include "compute/memory.h"
#include "compute/ops.h"
#include "convert/attention_back.h"
#include "convert/backward_kernels.h"
#include "convert/student.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { HEAD_ROWS = 128, FFN_ROWS = 512, STEP_ROWS = 256 };

struct pupil {
    const struct network *base;
    struct base_config config;
    struct attention_config attention, softmax;
    const struct rope *rope;
    struct team *team;
    const struct backward_kernels *rows;
    struct gemm_scratch *gemm, *exact;    /* exact: low-rank parts, fp32 always */
    struct attention_back_scratch **back; /* [threads] */
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
    int64_t *sets;                           /* of each document [n_kv_heads][blocks][cache_size] */
    void *slot;                              /* one layer's, softmax or not */
    size_t slot_bytes;
};

/* ---- low-rank parts ---- */
struct low_rank_part low_rank_part(const struct base_config *c, int rank,
                                   enum low_rank_target target) {
    int E = c->hidden_dim, q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    const struct low_rank_part parts[] = {
        {0, 0, E, q, 0}, {0, 0, E, kv, q}, {0, 0, E, kv, q + kv}, {0, 0, q, E, 0}};
    struct low_rank_part p = parts[target];
    for (int t = 0; t < (int)target; t++)
        p.a += (size_t)rank * (size_t)(parts[t].n_in + parts[t].n_out);
    p.b = p.a + (size_t)rank * (size_t)p.n_in;
    return p;
}
size_t low_rank_floats(const struct base_config *c, int rank) {
    struct low_rank_part last = low_rank_part(c, rank, LOW_RANK_O);
    return last.b + (size_t)rank * (size_t)last.n_out;
}

/* ---- room ---- */
struct carve { /* lays arrays into a block; at NULL only counts */
    char *at;
    size_t n;
};
static void *cut(struct carve *c, size_t bytes) {
    void *here = c->at ? c->at + c->n : NULL;
    c->n += (bytes + 63) / 64 * 64;
    return here;
}

static size_t lay_out(struct pupil *p, const struct base_config *c,
                      const struct attention_config *a, int max_tokens, int max_rank, void *block) {
    struct carve at = {block, 0};
    size_t T = (size_t)max_tokens, D = (size_t)c->head_dim, H = (size_t)c->n_heads,
           rank = (size_t)max_rank;
    p->E = (size_t)c->hidden_dim;
    p->q = H * D;
    p->kv = (size_t)c->n_kv_heads * D;
    p->qkv = p->q + 2 * p->kv;
    p->ffn = (size_t)c->ffn_dim;
    p->gate_up = c->architecture == BASE_LLAMA ? 2 * p->ffn : p->ffn;
    p->vocab = (size_t)c->vocab_size;
    p->map_floats = D * (size_t)a->features;
    p->layer_params = student_params(a);
    size_t ffn_rows = T < FFN_ROWS ? T : FFN_ROWS, head_rows = T < HEAD_ROWS ? T : HEAD_ROWS;
    const struct {
        float **to;
        size_t n;
    } arrays[] = {{&p->cosines, T * D / 2},
                  {&p->sines, T * D / 2},
                  {&p->far_cosines, D / 2},
                  {&p->far_sines, D / 2},
                  {&p->xs, ((size_t)c->n_layers + 1) * T * p->E},
                  {&p->x_base, T * p->E},
                  {&p->normed, T * p->E},
                  {&p->middle, T * p->E},
                  {&p->dx, T * p->E},
                  {&p->dn, T * p->E},
                  {&p->qkvs, T * p->qkv},
                  {&p->dqkvs, T * p->qkv},
                  {&p->y, T * p->q},
                  {&p->dy, T * p->q},
                  {&p->dk, H * T * D},
                  {&p->dv, H * T * D},
                  {&p->dmap_k, H * p->map_floats},
                  {&p->dmix, H},
                  {&p->up, ffn_rows * p->gate_up},
                  {&p->dup, ffn_rows * p->gate_up},
                  {&p->act, ffn_rows * p->ffn},
                  {&p->dact, ffn_rows * p->ffn},
                  {&p->z, head_rows * p->vocab},
                  {&p->z_base, head_rows * p->vocab},
                  {&p->mean, T},
                  {&p->r, T},
                  {&p->merged_qkv, rank ? p->qkv * p->E : 0},
                  {&p->merged_o, rank ? p->E * p->q : 0},
                  {&p->scaled_b, rank * (p->qkv > p->E ? p->qkv : p->E)},
                  {&p->low, T * rank}};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        *arrays[i].to = cut(&at, arrays[i].n * sizeof(float));
    p->losses = cut(&at, HEAD_ROWS * sizeof(double));
    p->sets = cut(&at, (size_t)c->n_kv_heads * T * (size_t)a->cache_size *
                           sizeof(int64_t)); /* blocks are no more than tokens */
    return at.n;
}

static size_t softmax_slot_bytes(const struct base_config *c,
                                 int max_tokens) { /* about: keys turned or not, values */
    return 3 * sizeof(float) * (size_t)(c->n_kv_heads * c->head_dim) * (size_t)max_tokens;
}

size_t pupil_bytes(const struct base_config *c, const struct attention_config *a, int n_threads,
                   int max_tokens, int max_rank) {
    struct pupil p;
    return lay_out(&p, c, a, max_tokens, max_rank, NULL) + 2 * gemm_scratch_bytes(n_threads) +
           (size_t)n_threads * attention_back_scratch_bytes(a, max_tokens) +
           softmax_slot_bytes(c, max_tokens);
}

static enum err attention_of(struct attention **out, const struct pupil *p,
                             const struct pupil_weights *w, int layer) {
    struct attention_weights maps = {0};
    if (!w) return attention_new(out, &p->softmax, &maps, 1, p->rope, p->team, STEP_ROWS, 1);
    const float *params = w->maps + (size_t)layer * p->layer_params;
    maps.map_q = params;
    maps.map_k = params + student_map_k(&p->attention);
    maps.mix = params + student_mix(&p->attention);
    int rows = p->attention.window == WINDOW_TERRACED ? p->attention.window_size : STEP_ROWS;
    return attention_new(out, &p->attention, &maps, 1, p->rope, p->team, rows, 1);
}

/* A slot that fits either kind of attention. */
static bool take_slot(struct pupil *p) {
    float *maps = calloc(p->layer_params, sizeof *maps); /* any will do */
    struct pupil_weights w = {.maps = maps};
    for (int kind = 0; maps && kind < 2; kind++) {
        struct attention *a;
        if (attention_of(&a, p, kind ? &w : NULL, 0)) break;
        if (attention_slot_bytes(a) > p->slot_bytes) p->slot_bytes = attention_slot_bytes(a);
        attention_free(a);
        if (kind) p->slot = memory_map(p->slot_bytes);
    }
    free(maps);
    return p->slot;
}

enum err pupil_new(struct pupil **out, const struct pupil_options *o) {
    struct pupil *p = calloc(1, sizeof *p);
    if (!p) return ERR_NOMEM;
    const struct base_config *c = &o->base->config;
    p->base = o->base;
    p->config = *c;
    p->attention = *o->attention;
    p->attention.kv_type = KV_FP32;
    p->softmax = (struct attention_config){.kind = ATTENTION_SOFTMAX,
                                           .n_heads = c->n_heads,
                                           .n_kv_heads = c->n_kv_heads,
                                           .head_dim = c->head_dim,
                                           .kv_type = KV_FP32,
                                           .max_seq_len = o->max_tokens};
    p->rope = o->rope;
    p->team = o->team;
    p->rows = backward_kernels();
    p->max_tokens = o->max_tokens;
    p->max_rank = o->max_rank;
    p->bytes = lay_out(p, c, &p->attention, o->max_tokens, o->max_rank, NULL);
    p->block = memory_map(p->bytes);
    if (p->block) lay_out(p, c, &p->attention, o->max_tokens, o->max_rank, p->block);
    p->back = calloc((size_t)team_size(o->team), sizeof(struct attention_back_scratch *));
    bool all = p->block && p->back && gemm_scratch_new(&p->gemm, o->team, o->bf16) == OK &&
               gemm_scratch_new(&p->exact, o->team, false) == OK;
    for (int i = 0; all && i < team_size(o->team); i++)
        all = attention_back_scratch_new(&p->back[i], &p->attention, o->max_tokens) == OK;
    if (all) all = take_slot(p);
    if (!all) {
        pupil_free(p);
        return ERR_NOMEM;
    }
    size_t half = (size_t)c->head_dim / 2;
    for (size_t n = 0; p->rope && n < (size_t)o->max_tokens; n++)
        rope_angles(p->rope, (int64_t)n, p->cosines + n * half, p->sines + n * half);
    if (p->rope) rope_angles(p->rope, p->attention.max_distance, p->far_cosines, p->far_sines);
    *out = p;
    return OK;
}

void pupil_free(struct pupil *p) {
    if (!p) return;
    for (int i = 0; p->back && i < team_size(p->team); i++)
        attention_back_scratch_free(p->back[i]);
    free(p->back);
    gemm_scratch_free(p->gemm);
    gemm_scratch_free(p->exact);
    memory_unmap(p->slot, p->slot_bytes);
    memory_unmap(p->block, p->bytes);
    free(p);
}

/* ---- rows and columns shared out ---- */
struct share {
    struct pupil *p;
    void (*fn)(const struct share *s, size_t first, size_t end);
    size_t n;
    const struct pack *pack;
    const float *x, *dy, *w, *b;
    float *y, *dw, *db;
    size_t width;
};
static void run_share(void *arg, int thread, int n_threads) {
    const struct share *s = arg;
    s->fn(s, s->n * (size_t)thread / (size_t)n_threads,
          s->n * (size_t)(thread + 1) / (size_t)n_threads);
}
static void deal(struct share s) {
    team_run(s.p->team, run_share, &s);
}

static void norm_share(const struct share *s, size_t first, size_t end) {
    const struct base_config *c = &s->p->config;
    for (size_t i = first * s->width; i < end * s->width; i += s->width)
        if (c->architecture == BASE_GPT2)
            layer_norm(s->y + i, s->x + i, s->w, s->b, (int)s->width, (float)c->norm_eps);
        else
            rms_norm(s->y + i, s->x + i, s->w, (int)s->width, (float)c->norm_eps);
}
static void norm(struct pupil *p, float *y, const float *x, const float *w, const float *b,
                 size_t n) {
    deal((struct share){
        .p = p, .fn = norm_share, .n = n, .x = x, .w = w, .b = b, .y = y, .width = p->E});
}

static void norm_back_share(const struct share *s, size_t first, size_t end) {
    struct pupil *p = s->p;
    const struct base_config *c = &p->config;
    for (size_t n = first; n < end; n++) {
        size_t i = n * s->width;
        if (c->architecture == BASE_GPT2) {
            p->rows->layer_norm(s->y + i, &p->mean[n], &p->r[n], s->dy + i, s->x + i, s->w,
                                (int)s->width, (float)c->norm_eps);
        } else {
            p->rows->rms_norm(s->y + i, &p->r[n], s->dy + i, s->x + i, s->w, (int)s->width,
                              (float)c->norm_eps);
            p->mean[n] = 0;
        }
    }
}
static void norm_weights_share(const struct share *s, size_t first, size_t end) { /* columns */
    for (size_t n = 0; n < (size_t)s->pack->n; n++)
        for (size_t i = first; i < end; i++) {
            float d = s->dy[n * s->width + i];
            s->dw[i] += d * (s->x[n * s->width + i] - s->p->mean[n]) * s->p->r[n];
            if (s->db) s->db[i] += d;
        }
}
/* dx += by x of norm(x), and with dw its weights' too. */
static void norm_back(struct pupil *p, float *dx, const float *dy, const float *x, const float *w,
                      float *dw, float *db, const struct pack *pack) {
    struct share s = {.p = p,
                      .fn = norm_back_share,
                      .n = (size_t)pack->n,
                      .pack = pack,
                      .x = x,
                      .dy = dy,
                      .w = w,
                      .y = dx,
                      .dw = dw,
                      .db = db,
                      .width = p->E};
    deal(s);
    if (!dw) return;
    s.fn = norm_weights_share;
    s.n = p->E;
    deal(s);
}

/* ---- products ---- */
/* y [n][n_out] (+)= x W^T + bias */
static void linear(struct pupil *p, float *y, bool add, const float *x, int n, const float *w,
                   size_t n_out, size_t n_in, const float *bias) {
    for (size_t r = 0; bias && r < (size_t)n; r++)
        for (size_t i = 0; i < n_out; i++)
            y[r * n_out + i] = add ? y[r * n_out + i] + bias[i] : bias[i];
    gemm(p->gemm, y, n_out, add || bias, gemm_plain(x, n_in), gemm_transposed(w, n_in), n,
         (int)n_out, (int)n_in);
}
/* dx = dy W;  dw += dy^T x and db += its column sums where they are wanted */
static void linear_back(struct pupil *p, float *dx, const float *dy, const float *x, int n,
                        const float *w, size_t n_out, size_t n_in, float *dw, float *db) {
    gemm(p->gemm, dx, n_in, false, gemm_plain(dy, n_out), gemm_plain(w, n_in), n, (int)n_in,
         (int)n_out);
    if (dw)
        gemm(p->gemm, dw, n_in, true, gemm_transposed(dy, n_out), gemm_plain(x, n_in), (int)n_out,
             (int)n_in, n);
    for (size_t r = 0; db && r < (size_t)n; r++)
        for (size_t i = 0; i < n_out; i++)
            db[i] += dy[r * n_out + i];
}

/* ---- weights of a layer ---- */
struct layer { /* what it multiplies with; w NULL: the base's */
    int i;
    const struct pupil_weights *w;
    const struct network_layer *net;
    const float *qkv, *o;
    const struct network_layer *grads; /* or NULL */
    float *dmaps, *dlow;               /* of the layer, or NULL */
};

/* merged += scale B A */
static void merge(struct pupil *p, const struct pupil_weights *w, int layer,
                  enum low_rank_target target) {
    struct low_rank_part part = low_rank_part(&p->config, w->rank, target);
    const float *low = w->low_rank + (size_t)layer * low_rank_floats(&p->config, w->rank);
    size_t rank = (size_t)w->rank, n_in = (size_t)part.n_in;
    float *to = target == LOW_RANK_O ? p->merged_o : p->merged_qkv + (size_t)part.row * n_in;
    p->rows->scale(p->scaled_b, low + part.b, w->scale, part.n_out * w->rank);
    gemm(p->exact, to, n_in, true, gemm_plain(p->scaled_b, rank), gemm_plain(low + part.a, n_in),
         part.n_out, part.n_in, w->rank);
}

static struct layer layer_of(struct pupil *p, const struct pupil_weights *w,
                             const struct pupil_gradients *g, int i) {
    const struct network *net = w ? w->network : p->base;
    struct layer l = {
        .i = i, .w = w, .net = &net->layers[i], .qkv = net->layers[i].qkv, .o = net->layers[i].o};
    if (g && g->network) l.grads = &g->network->layers[i];
    if (g && g->maps) l.dmaps = g->maps + (size_t)i * p->layer_params;
    if (!w || !w->low_rank) return l;
    if (g && g->low_rank) l.dlow = g->low_rank + (size_t)i * low_rank_floats(&p->config, w->rank);
    memcpy(p->merged_qkv, l.qkv, p->qkv * p->E * sizeof(float));
    memcpy(p->merged_o, l.o, p->E * p->q * sizeof(float));
    for (int t = 0; t < N_LOW_RANK_TARGETS; t++)
        merge(p, w, i, (enum low_rank_target)t);
    l.qkv = p->merged_qkv;
    l.o = p->merged_o;
    return l;
}

/* Gradients of a target's parts: y = x (W + scale B A)^T. */
static void low_rank_back(struct pupil *p, const struct layer *l, enum low_rank_target target,
                          const float *dy, size_t dy_row, const float *x, int n) {
    const struct pupil_weights *w = l->w;
    struct low_rank_part part = low_rank_part(&p->config, w->rank, target);
    const float *low = w->low_rank + (size_t)l->i * low_rank_floats(&p->config, w->rank);
    size_t rank = (size_t)w->rank, n_in = (size_t)part.n_in;
    gemm(p->exact, p->low, rank, false, gemm_plain(x, n_in), gemm_transposed(low + part.a, n_in), n,
         w->rank, part.n_in);
    p->rows->scale(p->low, p->low, w->scale, n * w->rank);
    gemm(p->exact, l->dlow + part.b, rank, true, gemm_transposed(dy, dy_row),
         gemm_plain(p->low, rank), part.n_out, w->rank, n);
    gemm(p->exact, p->low, rank, false, gemm_plain(dy, dy_row), gemm_plain(low + part.b, rank), n,
         w->rank, part.n_out);
    p->rows->scale(p->low, p->low, w->scale, n * w->rank);
    gemm(p->exact, l->dlow + part.a, n_in, true, gemm_transposed(p->low, rank), gemm_plain(x, n_in),
         w->rank, part.n_in, n);
}

/* ---- attention ---- */
/* y of a document, rows first .. of qkvs; with sets, what was cached in each block. */
static void attend(struct pupil *p, struct attention *a, bool softmax, int first, int n,
                   int64_t *sets) {
    const struct attention_config *c = &p->attention;
    bool blocks = !softmax && c->window == WINDOW_TERRACED;
    int step = blocks ? c->window_size : STEP_ROWS, n_blocks = attention_back_blocks(c, n);
    attention_slot_clear(a, p->slot);
    for (int at = 0; at < n; at += step) {
        int rows = n - at < step ? n - at : step;
        const float *qkv = p->qkvs + (size_t)(first + at) * p->qkv;
        attention_step_begin(a, &(struct attention_run){p->slot, 0, rows}, 1);
        attention_layer(a, 0, p->y + (size_t)(first + at) * p->q, p->q, qkv, p->qkv, qkv + p->q,
                        p->qkv, qkv + p->q + p->kv, p->qkv);
        attention_step_end(a);
        for (int g = 0; sets && n_blocks && g < c->n_kv_heads; g++) {
            int64_t *set =
                sets + ((size_t)g * (size_t)n_blocks + (size_t)(at / step)) * (size_t)c->cache_size;
            for (int i = attention_cache_positions(a, p->slot, 0, g, set); i < c->cache_size; i++)
                set[i] = -1;
        }
    }
}

struct heads {
    struct pupil *p;
    const struct layer *l;
    struct attention_lesson lesson;
    int first; /* token of the document */
    atomic_int next;
};
static void head_back(void *arg, int thread, int n_threads) {
    struct heads *h = arg;
    struct pupil *p = h->p;
    size_t D = (size_t)p->config.head_dim;
    (void)n_threads;
    for (int i; (i = atomic_fetch_add(&h->next, 1)) < p->config.n_heads;) {
        size_t at = ((size_t)i * (size_t)p->max_tokens + (size_t)h->first) * D, map = p->map_floats;
        struct attention_gradients out = {.dq =
                                              p->dqkvs + (size_t)h->first * p->qkv + (size_t)i * D,
                                          .dq_row = p->qkv,
                                          .dk = p->dk + at,
                                          .dv = p->dv + at,
                                          .map_q = h->l->dmaps + (size_t)i * map,
                                          .map_k = p->dmap_k + (size_t)i * map,
                                          .mix = p->dmix + i};
        attention_back(&h->lesson, i, &out, p->back[thread]);
    }
}

/* dk, dv of a kv head: its query heads' in order. */
static void sum_heads(const struct share *s, size_t first, size_t end) {
    struct pupil *p = s->p;
    size_t D = (size_t)p->config.head_dim,
           group = (size_t)(p->config.n_heads / p->config.n_kv_heads);
    for (size_t n = first; n < end; n++)
        for (size_t g = 0; g < (size_t)p->config.n_kv_heads; g++)
            for (int part = 0; part < 2; part++) {
                float *to = p->dqkvs + n * p->qkv + p->q + (size_t)part * p->kv + g * D;
                for (size_t h = g * group; h < (g + 1) * group; h++) {
                    const float *from =
                        (part ? p->dv : p->dk) + (h * (size_t)p->max_tokens + n) * D;
                    for (size_t d = 0; d < D; d++)
                        to[d] = h == g * group ? from[d] : to[d] + from[d];
                }
            }
}

/* How much of sets the documents before this one took. */
static size_t sets_before(const struct pupil *p, const struct pack *pack, int document) {
    size_t blocks = 0;
    for (int d = 0; d < document; d++)
        blocks += (size_t)attention_back_blocks(&p->attention, pack->first[d + 1] - pack->first[d]);
    return blocks * (size_t)p->attention.n_kv_heads * (size_t)p->attention.cache_size;
}

/* y of all documents from qkvs. */
static enum err attend_all(struct pupil *p, const struct layer *l, const struct pack *pack) {
    struct attention *a;
    enum err e = attention_of(&a, p, l->w, l->i);
    if (e) return e;
    for (int d = 0; d < pack->n_documents; d++)
        attend(p, a, !l->w, pack->first[d], pack->first[d + 1] - pack->first[d],
               l->w ? p->sets + sets_before(p, pack, d) : NULL);
    attention_free(a);
    return OK;
}

/* dqkvs from dy, y and qkvs; the maps' gradients. */
static void attend_back(struct pupil *p, const struct layer *l, const struct pack *pack) {
    const struct attention_config *c = &p->attention;
    size_t H = (size_t)c->n_heads, map = p->map_floats, group = H / (size_t)c->n_kv_heads;
    memset(p->dmap_k, 0, H * map * sizeof *p->dmap_k);
    memset(p->dmix, 0, H * sizeof *p->dmix);
    for (int d = 0; d < pack->n_documents; d++) {
        size_t first = (size_t)pack->first[d];
        struct heads h = {.p = p, .l = l, .first = pack->first[d]};
        h.lesson = (struct attention_lesson){.config = c,
                                             .n_tokens = pack->first[d + 1] - pack->first[d],
                                             .q = p->qkvs + first * p->qkv,
                                             .k = p->qkvs + first * p->qkv + p->q,
                                             .v = p->qkvs + first * p->qkv + p->q + p->kv,
                                             .qkv_row = p->qkv,
                                             .y = p->y + first * p->q,
                                             .dy = p->dy + first * p->q,
                                             .cosines = p->rope ? p->cosines : NULL,
                                             .sines = p->sines,
                                             .far_cosines = p->far_cosines,
                                             .far_sines = p->far_sines,
                                             .cache = p->sets + sets_before(p, pack, d),
                                             .params = l->w->maps + (size_t)l->i * p->layer_params};
        team_run(p->team, head_back, &h);
    }
    deal((struct share){.p = p, .fn = sum_heads, .n = (size_t)pack->n});
    for (size_t h = 0; h < H; h++) {
        size_t state = c->key_map_per_query_head ? h : h / group;
        p->rows->add(l->dmaps + student_map_k(c) + state * map, p->dmap_k + h * map, 1, (int)map);
        l->dmaps[student_mix(c) + h] += p->dmix[h];
    }
}

/* ---- a layer ---- */
/* normed, qkvs and y of the stream x; middle = x + W_o y. */
static enum err first_half(struct pupil *p, const struct layer *l, const float *x,
                           const struct pack *pack) {
    size_t n = (size_t)pack->n;
    norm(p, p->normed, x, l->net->attn_norm, l->net->attn_norm_bias, n);
    linear(p, p->qkvs, false, p->normed, pack->n, l->qkv, p->qkv, p->E, l->net->qkv_bias);
    enum err e = attend_all(p, l, pack);
    if (e) return e;
    memcpy(p->middle, x, n * p->E * sizeof(float));
    linear(p, p->middle, true, p->y, pack->n, l->o, p->E, p->q, l->net->o_bias);
    return OK;
}

static void activate_share(const struct share *s, size_t first, size_t end) {
    struct pupil *p = s->p;
    int ffn = (int)p->ffn;
    for (size_t n = first; n < end; n++) {
        const float *up = p->up + n * p->gate_up;
        float *act = p->act + n * p->ffn;
        if (p->config.architecture == BASE_LLAMA)
            silu_mul(act, up, up + ffn, ffn);
        else
            (p->config.gelu_erf ? gelu_erf : gelu_tanh)(act, up, ffn);
    }
}
static void activate_back_share(const struct share *s, size_t first, size_t end) {
    struct pupil *p = s->p;
    int ffn = (int)p->ffn;
    for (size_t n = first; n < end; n++) {
        const float *up = p->up + n * p->gate_up, *dact = p->dact + n * p->ffn;
        float *dup = p->dup + n * p->gate_up;
        if (p->config.architecture == BASE_LLAMA)
            p->rows->silu_mul(dup, dup + ffn, dact, up, up + ffn, ffn);
        else
            p->rows->gelu(dup, dact, up, p->config.gelu_erf, ffn);
    }
}

/* Rows r .. r + n - 1 of normed -> up, act. */
static void feed(struct pupil *p, const struct layer *l, size_t r, int n) {
    linear(p, p->up, false, p->normed + r * p->E, n, l->net->gate_up, p->gate_up, p->E,
           l->net->gate_up_bias);
    deal((struct share){.p = p, .fn = activate_share, .n = (size_t)n});
}

static int piece(const struct pack *pack, size_t r, int most) {
    return pack->n - (int)r < most ? pack->n - (int)r : most;
}

/* out = the layer of x; out may be x. */
static enum err layer_forward(struct pupil *p, const struct layer *l, float *out, const float *x,
                              const struct pack *pack) {
    enum err e = first_half(p, l, x, pack);
    if (e) return e;
    norm(p, p->normed, p->middle, l->net->ffn_norm, l->net->ffn_norm_bias, (size_t)pack->n);
    memcpy(out, p->middle, (size_t)pack->n * p->E * sizeof *out);
    for (size_t r = 0; r < (size_t)pack->n; r += FFN_ROWS) {
        int n = piece(pack, r, FFN_ROWS);
        feed(p, l, r, n);
        linear(p, out + r * p->E, true, p->act, n, l->net->down, p->E, p->ffn, l->net->down_bias);
    }
    return OK;
}

#define GRADIENT(l, field) ((l)->grads ? (l)->grads->field : NULL)

/* dx: by the layer's output -> by its input x. */
static enum err layer_back(struct pupil *p, const struct layer *l, float *dx, const float *x,
                           const struct pack *pack) {
    const struct network_layer *net = l->net;
    enum err e = first_half(p, l, x, pack);
    if (e) return e;
    norm(p, p->normed, p->middle, net->ffn_norm, net->ffn_norm_bias, (size_t)pack->n);
    for (size_t r = 0; r < (size_t)pack->n; r += FFN_ROWS) {
        int n = piece(pack, r, FFN_ROWS);
        feed(p, l, r, n);
        linear_back(p, p->dact, dx + r * p->E, p->act, n, net->down, p->E, p->ffn,
                    GRADIENT(l, down), GRADIENT(l, down_bias));
        deal((struct share){.p = p, .fn = activate_back_share, .n = (size_t)n});
        linear_back(p, p->dn + r * p->E, p->dup, p->normed + r * p->E, n, net->gate_up, p->gate_up,
                    p->E, GRADIENT(l, gate_up), GRADIENT(l, gate_up_bias));
    }
    norm_back(p, dx, p->dn, p->middle, net->ffn_norm, GRADIENT(l, ffn_norm),
              GRADIENT(l, ffn_norm_bias), pack);

    linear_back(p, p->dy, dx, p->y, pack->n, l->o, p->E, p->q, GRADIENT(l, o), GRADIENT(l, o_bias));
    if (l->dlow) low_rank_back(p, l, LOW_RANK_O, dx, p->E, p->y, pack->n);
    attend_back(p, l, pack);
    norm(p, p->normed, x, net->attn_norm, net->attn_norm_bias, (size_t)pack->n);
    linear_back(p, p->dn, p->dqkvs, p->normed, pack->n, l->qkv, p->qkv, p->E, GRADIENT(l, qkv),
                GRADIENT(l, qkv_bias));
    for (int t = LOW_RANK_Q; l->dlow && t <= LOW_RANK_V; t++) {
        struct low_rank_part part = low_rank_part(&p->config, l->w->rank, (enum low_rank_target)t);
        low_rank_back(p, l, (enum low_rank_target)t, p->dqkvs + part.row, p->qkv, p->normed,
                      pack->n);
    }
    norm_back(p, dx, p->dn, x, net->attn_norm, GRADIENT(l, attn_norm), GRADIENT(l, attn_norm_bias),
              pack);
    return OK;
}

/* ---- the whole ---- */
static void embed(struct pupil *p, const struct network *net, float *x, const struct pack *pack) {
    for (int d = 0; d < pack->n_documents; d++)
        for (int n = pack->first[d]; n < pack->first[d + 1]; n++) {
            float *row = x + (size_t)n * p->E;
            memcpy(row, net->embed + (size_t)pack->tokens[n] * p->E, p->E * sizeof *x);
            if (net->position)
                add_to(row, net->position + (size_t)(n - pack->first[d]) * p->E, (int)p->E);
        }
}
static void embed_back(struct pupil *p, const struct network *grads, const float *dx,
                       const struct pack *pack) {
    for (int d = 0; d < pack->n_documents; d++)
        for (int n = pack->first[d]; n < pack->first[d + 1]; n++) {
            const float *row = dx + (size_t)n * p->E;
            add_to(grads->embed + (size_t)pack->tokens[n] * p->E, row, (int)p->E);
            if (grads->position)
                add_to(grads->position + (size_t)(n - pack->first[d]) * p->E, row, (int)p->E);
        }
}

/* The base's final rows into x_base. */
static enum err read_base(struct pupil *p, const struct pack *pack) {
    embed(p, p->base, p->x_base, pack);
    for (int i = 0; i < p->config.n_layers; i++) {
        struct layer l = layer_of(p, NULL, NULL, i);
        enum err e = layer_forward(p, &l, p->x_base, p->x_base, pack);
        if (e) return e;
    }
    norm(p, p->x_base, p->x_base, p->base->norm, p->base->norm_bias, (size_t)pack->n);
    return OK;
}

static float *stream(struct pupil *p, int layer) {
    return p->xs + (size_t)layer * (size_t)p->max_tokens * p->E;
}

static enum err read_pupil(struct pupil *p, const struct pupil_weights *w,
                           const struct pack *pack) {
    embed(p, w->network, stream(p, 0), pack);
    for (int i = 0; i < p->config.n_layers; i++) {
        struct layer l = layer_of(p, w, NULL, i);
        enum err e = layer_forward(p, &l, stream(p, i + 1), stream(p, i), pack);
        if (e) return e;
    }
    return OK;
}

/* ---- the head ---- */
struct head {
    struct pupil *p;
    const struct pack *pack;
    enum fine_loss loss;
    float factor;
    int first, n; /* rows of the block */
};
static void head_rows(void *arg, int thread, int n_threads) {
    struct head *h = arg;
    struct pupil *p = h->p;
    int V = (int)p->vocab, document = 0;
    for (int i = h->n * thread / n_threads; i < h->n * (thread + 1) / n_threads; i++) {
        int n = h->first + i;
        float *z = p->z + (size_t)i * p->vocab;
        while (n >= h->pack->first[document + 1])
            document++;
        p->losses[i] = 0;
        if (h->loss == FINE_DISTILL)
            p->losses[i] = p->rows->distill(z, p->z_base + (size_t)i * p->vocab, V, h->factor);
        else if (n + 1 < h->pack->first[document + 1])
            p->losses[i] = p->rows->next_token(z, h->pack->tokens[n + 1], V, h->factor);
        else
            memset(z, 0, p->vocab * sizeof *z);
    }
}

/* Loss of the pupil's final rows in normed, and dn by them. */
static void head(struct pupil *p, const struct pupil_weights *w, const struct pack *pack,
                 enum fine_loss loss, float share, struct network *grads, bool back,
                 struct fine_sums *sums) {
    int rows = loss == FINE_DISTILL ? pack->n : pack->n - pack->n_documents, V = (int)p->vocab,
        E = (int)p->E;
    for (int r = 0; r < pack->n; r += HEAD_ROWS) {
        int n = piece(pack, (size_t)r, HEAD_ROWS);
        const float *x = p->normed + (size_t)r * p->E;
        gemm(p->gemm, p->z, p->vocab, false, gemm_plain(x, p->E),
             gemm_transposed(w->network->head, p->E), n, V, E);
        if (loss == FINE_DISTILL)
            gemm(p->gemm, p->z_base, p->vocab, false,
                 gemm_plain(p->x_base + (size_t)r * p->E, p->E),
                 gemm_transposed(p->base->head, p->E), n, V, E);
        struct head h = {p, pack, loss, share / (float)rows, r, n};
        team_run(p->team, head_rows, &h);
        for (int i = 0; i < n; i++)
            sums->loss += p->losses[i];
        if (!back) continue;
        linear_back(p, p->dn + (size_t)r * p->E, p->z, x, n, w->network->head, p->vocab, p->E,
                    grads ? grads->head : NULL, NULL);
    }
    sums->rows += rows;
}

enum err pupil_learn(struct pupil *p, const struct pupil_weights *w, const struct pack *pack,
                     enum fine_loss loss, float share, const struct pupil_gradients *g,
                     struct fine_sums *sums) {
    struct network *grads = g ? g->network : NULL;
    size_t n = (size_t)pack->n;
    int L = p->config.n_layers;
    enum err e = loss == FINE_DISTILL ? read_base(p, pack) : OK;
    if (!e) e = read_pupil(p, w, pack);
    if (e) return e;
    norm(p, p->normed, stream(p, L), w->network->norm, w->network->norm_bias, n);
    head(p, w, pack, loss, share, grads, g != NULL, sums);
    if (!g) return OK;
    memset(p->dx, 0, n * p->E * sizeof *p->dx);
    norm_back(p, p->dx, p->dn, stream(p, L), w->network->norm, grads ? grads->norm : NULL,
              grads ? grads->norm_bias : NULL, pack);
    for (int i = L - 1; i >= 0; i--) {
        struct layer l = layer_of(p, w, g, i);
        if ((e = layer_back(p, &l, p->dx, stream(p, i), pack))) return e;
    }
    if (grads) embed_back(p, grads, p->dx, pack);
    return OK;
}

/* ---- tests ---- */
enum err pupil_read(struct pupil *p, const struct pupil_weights *w, const struct pack *pack,
                    const float **rows) {
    enum err e = w ? read_pupil(p, w, pack) : read_base(p, pack);
    if (e) return e;
    if (w)
        norm(p, p->normed, stream(p, p->config.n_layers), w->network->norm, w->network->norm_bias,
             (size_t)pack->n);
    *rows = w ? p->normed : p->x_base;
    return OK;
}

enum err pupil_cache(struct pupil *p, const struct pupil_weights *w, const struct pack *pack,
                     int layer, const int64_t **sets) {
    struct layer l = layer_of(p, w, NULL, layer);
    *sets = p->sets;
    return first_half(p, &l, stream(p, layer), pack);
}

const struct backward_kernels *backward_kernels(void) {
#if defined(__x86_64__)
    switch (cpu_isa()) {
    case CPU_AMX: /* which has AVX-512 too */
    case CPU_AVX512:
        return &backward_kernels_avx512;
    case CPU_AVX2:
        return &backward_kernels_avx2;
    default:
        break;
    }
#elif defined(__aarch64__)
    if (cpu_isa() == CPU_DOTPROD) return &backward_kernels_dotprod;
#endif
    return &backward_kernels_generic;
}
