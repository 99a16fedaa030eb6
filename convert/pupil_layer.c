/* pupil_layer.c - one layer of the base or the pupil, forward and backward. */
#include "convert/pupil_internal.h"

#include "compute/cpu.h"
#include "compute/ops.h"

#include <stdatomic.h>
#include <string.h>

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
void pupil_norm(struct pupil *p, float *y, const float *x, const float *w, const float *b,
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
/* dx += by x of pupil_norm(x), and with dw its weights' too. */
void pupil_norm_back(struct pupil *p, float *dx, const float *dy, const float *x, const float *w,
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
void pupil_linear_back(struct pupil *p, float *dx, const float *dy, const float *x, int n,
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

struct layer pupil_layer_of(struct pupil *p, const struct pupil_weights *w,
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
            int most = attention_cache_most(c);
            int64_t *set =
                sets + ((size_t)g * (size_t)n_blocks + (size_t)(at / step)) * (size_t)most;
            for (int i = attention_cache_positions(a, p->slot, 0, g, set); i < most; i++)
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
        bool softmax = pupil_is_softmax(p, h->l->w, h->l->i);
        if (softmax) out.map_q = out.map_k; /* nothing is added */
        attention_back(&h->lesson, i, &out, softmax ? p->back_exact[thread] : p->back[thread]);
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
    return blocks * (size_t)p->attention.n_kv_heads * (size_t)attention_cache_most(&p->attention);
}

/* y of all documents from qkvs. */
static enum err attend_all(struct pupil *p, const struct layer *l, const struct pack *pack) {
    struct attention *a;
    bool softmax = pupil_is_softmax(p, l->w, l->i);
    enum err e = pupil_attention(&a, p, l->w, l->i);
    if (e) return e;
    for (int d = 0; d < pack->n_documents; d++)
        attend(p, a, softmax, pack->first[d], pack->first[d + 1] - pack->first[d],
               softmax ? NULL : p->sets + sets_before(p, pack, d));
    attention_free(a);
    return OK;
}

/* dqkvs from dy, y and qkvs; the maps' gradients. */
static void attend_back(struct pupil *p, const struct layer *l, const struct pack *pack) {
    const struct attention_config *c = &p->attention;
    bool softmax = pupil_is_softmax(p, l->w, l->i);
    const float *maps = softmax ? p->no_maps : l->w->maps + (size_t)l->i * p->layer_params;
    const bool *retrieval =
        p->retrieval && !softmax ? p->retrieval + (size_t)l->i * (size_t)c->n_kv_heads : NULL;
    size_t H = (size_t)c->n_heads, map = p->map_floats, group = H / (size_t)c->n_kv_heads;
    memset(p->dmap_k, 0, H * map * sizeof *p->dmap_k);
    memset(p->dmix, 0, H * sizeof *p->dmix);
    for (int d = 0; d < pack->n_documents; d++) {
        size_t first = (size_t)pack->first[d];
        struct heads h = {.p = p, .l = l, .first = pack->first[d]};
        h.lesson = (struct attention_lesson){.config = softmax ? &p->all_exact : c,
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
                                             .retrieval = retrieval,
                                             .params = maps};
        team_run(p->team, head_back, &h);
    }
    deal((struct share){.p = p, .fn = sum_heads, .n = (size_t)pack->n});
    for (size_t h = 0; !softmax && h < H; h++) {
        size_t state = c->key_map_per_query_head ? h : h / group;
        p->rows->add(l->dmaps + student_map_k(c) + state * map, p->dmap_k + h * map, 1, (int)map);
        l->dmaps[student_mix(c) + h] += p->dmix[h];
    }
}

/* ---- a layer ---- */
/* normed, qkvs and y of the stream x; middle = x + W_o y. */
enum err pupil_first_half(struct pupil *p, const struct layer *l, const float *x,
                          const struct pack *pack) {
    size_t n = (size_t)pack->n;
    pupil_norm(p, p->normed, x, l->net->attn_norm, l->net->attn_norm_bias, n);
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

/* out = the layer of x; out may be x. */
enum err pupil_layer_forward(struct pupil *p, const struct layer *l, float *out, const float *x,
                             const struct pack *pack) {
    enum err e = pupil_first_half(p, l, x, pack);
    if (e) return e;
    pupil_norm(p, p->normed, p->middle, l->net->ffn_norm, l->net->ffn_norm_bias, (size_t)pack->n);
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
enum err pupil_layer_back(struct pupil *p, const struct layer *l, float *dx, const float *x,
                          const struct pack *pack) {
    const struct network_layer *net = l->net;
    enum err e = pupil_first_half(p, l, x, pack);
    if (e) return e;
    pupil_norm(p, p->normed, p->middle, net->ffn_norm, net->ffn_norm_bias, (size_t)pack->n);
    for (size_t r = 0; r < (size_t)pack->n; r += FFN_ROWS) {
        int n = piece(pack, r, FFN_ROWS);
        feed(p, l, r, n);
        pupil_linear_back(p, p->dact, dx + r * p->E, p->act, n, net->down, p->E, p->ffn,
                          GRADIENT(l, down), GRADIENT(l, down_bias));
        deal((struct share){.p = p, .fn = activate_back_share, .n = (size_t)n});
        pupil_linear_back(p, p->dn + r * p->E, p->dup, p->normed + r * p->E, n, net->gate_up,
                          p->gate_up, p->E, GRADIENT(l, gate_up), GRADIENT(l, gate_up_bias));
    }
    pupil_norm_back(p, dx, p->dn, p->middle, net->ffn_norm, GRADIENT(l, ffn_norm),
                    GRADIENT(l, ffn_norm_bias), pack);

    pupil_linear_back(p, p->dy, dx, p->y, pack->n, l->o, p->E, p->q, GRADIENT(l, o),
                      GRADIENT(l, o_bias));
    if (l->dlow) low_rank_back(p, l, LOW_RANK_O, dx, p->E, p->y, pack->n);
    attend_back(p, l, pack);
    pupil_norm(p, p->normed, x, net->attn_norm, net->attn_norm_bias, (size_t)pack->n);
    pupil_linear_back(p, p->dn, p->dqkvs, p->normed, pack->n, l->qkv, p->qkv, p->E,
                      GRADIENT(l, qkv), GRADIENT(l, qkv_bias));
    for (int t = LOW_RANK_Q; l->dlow && t <= LOW_RANK_V; t++) {
        struct low_rank_part part = low_rank_part(&p->config, l->w->rank, (enum low_rank_target)t);
        low_rank_back(p, l, (enum low_rank_target)t, p->dqkvs + part.row, p->qkv, p->normed,
                      pack->n);
    }
    pupil_norm_back(p, dx, p->dn, x, net->attn_norm, GRADIENT(l, attn_norm),
                    GRADIENT(l, attn_norm_bias), pack);
    return OK;
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
