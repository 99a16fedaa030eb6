/* gpu_student.c - a lesson's way through the kernels, wave of layers after wave. */
#include "convert/gpu_student.h"

#include "convert/gpu_kernels.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static_assert(sizeof(struct student_sums) == GPU_SUMS * sizeof(double), "gpu_count() fills it");

struct gpu_student {
    struct gpu *gpu; /* borrowed */
    struct attention_config c;
    int n_layers, n_states; /* n_states: key maps of a layer */
    size_t n_params;        /* of a layer */
    bool *softmax_layers;
    char *memory; /* device, cut anew for every wave */
    size_t bytes;
    float *params, *m, *v, *grads; /* device [n_layers][n_params] */
    float *most;                   /* device [n_layers][heads of q and k] */
    double *sums, *norms;          /* device [n_layers][n_heads][GPU_SUMS], [n_layers] */
    /* page-locked */
    float *host_most;
    double *host_norms;
    struct student_sums *host_sums;
};

/* What a wave's layers need, each array [n_layers] of: */
struct room {
    float *turned_k, *turned_q;         /* [T][n_kv_heads D], [R][n_heads D] */
    float *u, *phi, *dphi;              /* [states] of [T][f], [T][2 f] twice */
    float *uq, *phi_q, *dphi_q, *reach; /* [n_heads] of [R][f], [R][2 f] twice, [R] */
    float *p, *s, *a, *ev;              /* [n_heads][R][columns] */
    float *y, *y_teacher, *ey;          /* [n_heads] of [R][D] twice, [R] */
    float *results;                     /* [n_heads][R][GPU_RESULTS] */
};

static int states_of(const struct attention_config *c) {
    return c->key_map_per_query_head ? c->n_heads : c->n_kv_heads;
}
static size_t columns_of(int n_tokens) { /* whole 128 bytes */
    return ((size_t)n_tokens + 31) / 32 * 32;
}

/* Lays the arrays into memory, each at a multiple of 256 bytes; NULL: only counts.  Returns bytes.
 */
static size_t lay_out(struct room *r, const struct attention_config *c, int n_tokens, int n_rows,
                      int n_layers, char *memory) {
    size_t T = (size_t)n_tokens, R = (size_t)n_rows, H = (size_t)c->n_heads,
           D = (size_t)c->head_dim, f = (size_t)c->features, S = (size_t)states_of(c),
           pairs = H * R * columns_of(n_tokens);
    const struct {
        float **at;
        size_t n;
    } arrays[] = {
        {&r->turned_k, T * (size_t)c->n_kv_heads * D},
        {&r->turned_q, R * H * D},
        {&r->u, S * T * f},
        {&r->phi, S * T * 2 * f},
        {&r->dphi, S * T * 2 * f},
        {&r->uq, H * R * f},
        {&r->phi_q, H * R * 2 * f},
        {&r->dphi_q, H * R * 2 * f},
        {&r->reach, H * R},
        {&r->p, pairs},
        {&r->s, pairs},
        {&r->a, pairs},
        {&r->ev, pairs},
        {&r->y, H * R * D},
        {&r->y_teacher, H * R * D},
        {&r->ey, H * R},
        {&r->results, H * R * GPU_RESULTS},
    };
    size_t bytes = 0;
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        *arrays[i].at = memory ? (float *)(memory + bytes) : NULL;
        bytes += (arrays[i].n * (size_t)n_layers * sizeof(float) + 255) / 256 * 256;
    }
    return bytes;
}

size_t gpu_student_layer_bytes(const struct attention_config *c, int n_tokens, int n_rows) {
    struct room r;
    return lay_out(&r, c, n_tokens, n_rows, 1, NULL);
}

enum err gpu_student_new(struct gpu_student **out, struct gpu *g, const struct attention_config *c,
                         int n_layers, const bool *softmax_layers, int max_tokens, int max_rows,
                         size_t memory) {
    struct gpu_student *s = calloc(1, sizeof *s);
    if (!s) return ERR_NOMEM;
    size_t layers = (size_t)n_layers, heads = (size_t)c->n_heads,
           most = heads + (size_t)c->n_kv_heads,
           one = gpu_student_layer_bytes(c, max_tokens, max_rows);
    s->gpu = g;
    s->c = *c;
    s->n_layers = n_layers;
    s->n_states = states_of(c);
    s->n_params = student_params(c);
    s->softmax_layers = calloc(layers, sizeof *s->softmax_layers);
    size_t params = layers * s->n_params * sizeof(float),
           sums = layers * heads * sizeof *s->host_sums, norms = layers * sizeof *s->norms;
    enum err e = s->softmax_layers ? OK : ERR_NOMEM;
    const struct {
        void *at;
        size_t bytes;
    } device[] = {{&s->params, params}, {&s->m, params},
                  {&s->v, params},      {&s->grads, params},
                  {&s->sums, sums},     {&s->most, layers * most * sizeof *s->most},
                  {&s->norms, norms}},
      host[] = {{&s->host_sums, sums},
                {&s->host_most, layers * most * sizeof *s->most},
                {&s->host_norms, norms}};
    for (size_t i = 0; !e && i < sizeof device / sizeof *device; i++)
        e = gpu_alloc(g, device[i].at, device[i].bytes);
    for (size_t i = 0; !e && i < sizeof host / sizeof *host; i++)
        e = gpu_host_alloc(g, host[i].at, host[i].bytes);
    s->bytes = memory ? memory : gpu_free_bytes(g) / 2;
    if (s->bytes > layers * one) s->bytes = layers * one;
    if (!e && s->bytes < one) e = ERR_NOMEM;
    if (!e) e = gpu_alloc(g, (void **)&s->memory, s->bytes);
    if (e) {
        gpu_student_free(s);
        return e;
    }
    if (softmax_layers) memcpy(s->softmax_layers, softmax_layers, layers * sizeof *softmax_layers);
    *out = s;
    return OK;
}

void gpu_student_free(struct gpu_student *s) {
    if (!s) return;
    void *device[] = {s->memory, s->params, s->m, s->v, s->grads, s->sums, s->most, s->norms},
         *host[] = {s->host_sums, s->host_most, s->host_norms};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        gpu_release(s->gpu, device[i]);
    for (size_t i = 0; i < sizeof host / sizeof *host; i++)
        gpu_host_release(s->gpu, host[i]);
    free(s->softmax_layers);
    free(s);
}

const char *gpu_student_error(const struct gpu_student *s) {
    return gpu_error(s->gpu);
}

/* ---- parameters ---- */

static size_t all_bytes(const struct gpu_student *s) {
    return (size_t)s->n_layers * s->n_params * sizeof(float);
}

enum err gpu_student_put(struct gpu_student *s, const float *w, const float *m, const float *v) {
    gpu_upload(s->gpu, s->params, w, all_bytes(s));
    gpu_upload(s->gpu, s->m, m, all_bytes(s));
    gpu_upload(s->gpu, s->v, v, all_bytes(s));
    return gpu_wait(s->gpu);
}

enum err gpu_student_get(struct gpu_student *s, float *w, float *m, float *v) {
    gpu_download(s->gpu, w, s->params, all_bytes(s));
    gpu_download(s->gpu, m, s->m, all_bytes(s));
    gpu_download(s->gpu, v, s->v, all_bytes(s));
    return gpu_wait(s->gpu);
}

enum err gpu_student_grads(struct gpu_student *s, float *grads) {
    gpu_download(s->gpu, grads, s->grads, all_bytes(s));
    return gpu_wait(s->gpu);
}

enum err gpu_student_norms(struct gpu_student *s, double *norms) {
    size_t bytes = (size_t)s->n_layers * sizeof *norms;
    gpu_norms(s->gpu, s->norms, s->grads, s->n_params, s->n_layers);
    gpu_download(s->gpu, s->host_norms, s->norms, bytes);
    enum err e = gpu_wait(s->gpu);
    if (!e) memcpy(norms, s->host_norms, bytes);
    return e;
}

void gpu_student_step(struct gpu_student *s, float rate, float rate_mix, float correct_m,
                      float correct_v, double most) {
    struct gpu_step step = {.n = s->n_params,
                            .n_maps = student_mix(&s->c),
                            .rate = rate,
                            .rate_mix = rate_mix,
                            .correct_m = correct_m,
                            .correct_v = correct_v,
                            .beta_m = ADAM_BETA1,
                            .beta_v = ADAM_BETA2,
                            .most = most};
    gpu_adam(s->gpu, s->params, s->m, s->v, s->grads, s->norms, &step, s->n_layers);
}

/* ---- a wave ---- */

struct wave {
    struct gpu_student *s;
    const struct gpu_lesson *lesson;
    const struct student_loss *loss;
    int first, n_layers;
    bool gradients, outputs, pull; /* pull: outputs are in the loss */
    struct room r;
    size_t map, columns;
    /* operands: queries as they were read, what attends, what maps see, projections, features */
    struct gpu_operand q_read, q, k, v, xq, x, map_q, map_k, uq, u, phi_q, phi, p, s_, a, ev, y, y_teacher;
};

/* heads matrices of n rows, row floats each, one after the other in every layer. */
static struct gpu_operand dense(float *at, int heads, size_t n, size_t row) {
    return (struct gpu_operand){at, (size_t)heads * n * row, n * row, 1, row, 1};
}
/* Of rows that hold all heads side by side. */
static struct gpu_operand side_by_side(float *at, size_t n, size_t row, size_t head) {
    return (struct gpu_operand){at, n * row, head, 1, row, 1};
}
static struct gpu_operand transposed(struct gpu_operand o) {
    size_t row = o.row;
    o.row = o.column;
    o.column = row;
    return o;
}
static struct gpu_operand shared_by(struct gpu_operand o, int heads) {
    o.per = heads;
    return o;
}

static void take_operands(struct wave *w) {
    const struct gpu_student *s = w->s;
    const struct attention_config *c = &s->c;
    const struct gpu_lesson *l = w->lesson;
    const struct room *r = &w->r;
    size_t T = (size_t)l->n_tokens, R = (size_t)l->n_rows, D = (size_t)c->head_dim,
           f = (size_t)c->features, kv = (size_t)c->n_kv_heads * D, first = (size_t)w->first,
           all = (size_t)l->all_rows;
    int H = c->n_heads;
    float *params = s->params + first * s->n_params;
    w->map = D * f;
    w->columns = columns_of(l->n_tokens);
    w->q_read =
        side_by_side(l->q + (first * all + (size_t)l->part) * l->q_floats, all, l->q_floats, D);
    w->q_read.row *= (size_t)l->n_parts;
    w->xq = w->q_read;
    w->x = side_by_side(l->kv + first * T * l->kv_floats, T, l->kv_floats, D);
    w->v = w->x;
    w->v.at += kv;
    w->q = w->xq;
    w->k = w->x;
    if (l->cosines) {
        w->q = side_by_side(r->turned_q, R, l->q_floats, D);
        w->k = side_by_side(r->turned_k, T, kv, D);
        if (!c->map_before_rope) {
            w->xq = w->q;
            w->x = w->k;
        }
    }
    w->map_q = (struct gpu_operand){params, s->n_params, w->map, 1, f, 1};
    w->map_k = w->map_q;
    w->map_k.at += student_map_k(c);
    w->uq = dense(r->uq, H, R, f);
    w->u = dense(r->u, s->n_states, T, f);
    w->phi_q = dense(r->phi_q, H, R, 2 * f);
    w->phi = dense(r->phi, s->n_states, T, 2 * f);
    w->p = dense(r->p, H, R, w->columns);
    w->s_ = dense(r->s, H, R, w->columns);
    w->a = dense(r->a, H, R, w->columns);
    w->ev = dense(r->ev, H, R, w->columns);
    w->y = dense(r->y, H, R, D);
    w->y_teacher = dense(r->y_teacher, H, R, D);
}

static void turn(const struct wave *w) {
    const struct attention_config *c = &w->s->c;
    const struct gpu_lesson *l = w->lesson;
    size_t T = (size_t)l->n_tokens, first = (size_t)w->first;
    struct gpu_turn t = {.y = w->r.turned_k,
                         .x = l->kv + first * T * l->kv_floats,
                         .x_layer = T * l->kv_floats,
                         .x_row = l->kv_floats,
                         .positions = l->positions,
                         .cosines = l->cosines,
                         .sines = l->sines,
                         .n_layers = w->n_layers,
                         .n = l->n_tokens,
                         .n_heads = c->n_kv_heads,
                         .head_dim = c->head_dim};
    if (!l->cosines) return;
    gpu_turn_rows(w->s->gpu, &t);
    t.y = w->r.turned_q;
    t.x = w->q_read.at;
    t.x_layer = w->q_read.layer;
    t.x_row = w->q_read.row;
    t.rows = l->rows;
    t.n = l->n_rows;
    t.n_heads = c->n_heads;
    gpu_turn_rows(w->s->gpu, &t);
}

/* C [m][n] = A [m][k] B [k][n] of every head. */
static void product(const struct wave *w, struct gpu_operand c, struct gpu_operand a,
                    struct gpu_operand b, int heads, int m, int n, int k, enum gpu_limit limit) {
    struct gpu_product p = {.c = c,
                            .a = a,
                            .b = b,
                            .m = m,
                            .n = n,
                            .k = k,
                            .n_layers = w->n_layers,
                            .n_heads = heads,
                            .n_terms = 1,
                            .limit = limit,
                            .spans = w->lesson->spans};
    gpu_products(w->s->gpu, &p);
}

/* grads of one map: x^T du, added. */
static void map_gradient(const struct wave *w, size_t at, struct gpu_operand x,
                         struct gpu_operand du, int heads, int n) {
    const struct attention_config *c = &w->s->c;
    struct gpu_operand grads = w->map_q;
    grads.at = w->s->grads + (size_t)w->first * w->s->n_params + at;
    struct gpu_product p = {.c = grads,
                            .a = transposed(x),
                            .b = du,
                            .m = c->head_dim,
                            .n = c->features,
                            .k = n,
                            .n_layers = w->n_layers,
                            .n_heads = heads,
                            .n_terms = 1,
                            .add = 1};
    gpu_products(w->s->gpu, &p);
}

static void go_back(const struct wave *w, const struct gpu_rows_args *rows) {
    const struct gpu_student *s = w->s;
    const struct attention_config *c = &s->c;
    struct gpu *g = s->gpu;
    int T = w->lesson->n_tokens, R = w->lesson->n_rows, H = c->n_heads, S = s->n_states,
        F = 2 * c->features;
    struct gpu_operand phi = shared_by(w->phi, H / S);
    gpu_grade(g, rows);
    product(w, dense(w->r.dphi_q, H, (size_t)R, (size_t)F), w->s_, phi, H, R, F, T, GPU_TERMS);
    struct gpu_product keys = {.c = dense(w->r.dphi, S, (size_t)T, (size_t)F),
                               .a = transposed(w->s_),
                               .b = w->phi_q,
                               .m = T,
                               .n = F,
                               .k = R,
                               .n_layers = w->n_layers,
                               .n_heads = S,
                               .n_terms = H / S,
                               .limit = GPU_ROWS,
                               .spans = w->lesson->seen_by};
    gpu_products(g, &keys);
    size_t layers = (size_t)w->n_layers;
    gpu_features_back(g, c->map, w->r.uq, w->r.dphi_q, w->r.phi_q, w->r.uq, false,
                      layers * (size_t)H * (size_t)R, c->features);
    gpu_features_back(g, c->map, w->r.u, w->r.dphi, w->r.phi, w->r.u, true,
                      layers * (size_t)S * (size_t)T, c->features);
    map_gradient(w, 0, w->xq, w->uq, H, R);
    map_gradient(w, student_map_k(c), shared_by(w->x, S / c->n_kv_heads), w->u, S, T);
}

static void learn(const struct wave *w) {
    const struct gpu_student *s = w->s;
    const struct attention_config *c = &s->c;
    const struct gpu_lesson *l = w->lesson;
    struct gpu *g = s->gpu;
    int T = l->n_tokens, R = l->n_rows, H = c->n_heads, S = s->n_states, D = c->head_dim,
        f = c->features, group = H / c->n_kv_heads;
    size_t layers = (size_t)w->n_layers, first = (size_t)w->first;
    float count = (float)R * (float)H;
    struct gpu_operand v = shared_by(w->v, group);
    bool far = c->max_distance && c->map_before_rope && l->cosines;
    struct gpu_rows_args rows = {
        .n_layers = w->n_layers,
        .n_heads = H,
        .n_kv_heads = c->n_kv_heads,
        .n_rows = R,
        .head_dim = D,
        .n_tokens = T,
        .columns = w->columns,
        .p = w->r.p,
        .s = w->r.s,
        .a = w->r.a,
        .ev = w->pull ? w->r.ev : NULL,
        .ey = w->r.ey,
        .reach = w->r.reach,
        .results = w->r.results,
        .first = l->first,
        .position = l->position,
        .spans = l->spans,
        .mix = s->params + first * s->n_params + student_mix(c),
        .mix_layer = s->n_params,
        .ce = w->loss->share * w->loss->ce / count,
        .window = c->window,
        .window_size = c->window_size,
        .sinks = c->sinks,
        .mixing = c->mixing,
        .max_distance = far ? (int)(c->max_distance < T ? c->max_distance : T) : 0,
        .q = w->xq.at,
        .k = w->x.at,
        .q_layer = w->xq.layer,
        .q_row = w->xq.row,
        .k_layer = w->x.layer,
        .k_row = w->x.row,
        .far_cosines = l->far_cosines,
        .far_sines = l->far_sines,
    };
    turn(w);
    product(w, w->u, shared_by(w->x, S / c->n_kv_heads), w->map_k, S, T, f, D, GPU_WHOLE);
    product(w, w->uq, w->xq, w->map_q, H, R, f, D, GPU_WHOLE);
    gpu_features(g, c->map, w->r.phi, NULL, w->r.u, layers * (size_t)S * (size_t)T, f);
    gpu_features(g, c->map, w->r.phi_q, w->r.reach, w->r.uq, layers * (size_t)H * (size_t)R, f);
    product(w, w->p, w->q, transposed(shared_by(w->k, group)), H, R, T, D, GPU_COLUMNS);
    product(w, w->s_, w->phi_q, transposed(shared_by(w->phi, H / S)), H, R, T, 2 * f, GPU_COLUMNS);
    gpu_weigh(g, &rows);
    if (w->outputs) {
        float mse = w->pull ? w->loss->share * w->loss->mse * 2 / (count * (float)D) : 0;
        product(w, w->y, w->a, v, H, R, D, T, GPU_TERMS);
        product(w, w->y_teacher, w->p, v, H, R, D, T, GPU_TERMS);
        gpu_errors(g, &rows, w->r.y, w->r.y_teacher, w->r.ey, mse);
    }
    if (w->pull) product(w, w->ev, w->y, transposed(v), H, R, T, D, GPU_COLUMNS);
    if (w->gradients) go_back(w, &rows);
    gpu_count(g, &rows, s->sums + first * (size_t)H * GPU_SUMS,
              w->gradients ? s->grads + first * s->n_params + student_mix(c) : NULL);
}

/* ---- all layers ---- */

enum err gpu_student_learn(struct gpu_student *s, const struct gpu_lesson *lesson, bool gradients,
                           const struct student_loss *loss, bool outputs,
                           struct student_sums *sums) {
    size_t heads = (size_t)s->n_layers * (size_t)s->c.n_heads;
    size_t one = gpu_student_layer_bytes(&s->c, lesson->n_tokens, lesson->n_rows);
    int together = (int)(s->bytes / one);
    assert(together > 0);
    struct wave w = {.s = s,
                     .lesson = lesson,
                     .loss = loss,
                     .gradients = gradients,
                     .outputs = outputs || (gradients && loss->mse > 0),
                     .pull = gradients && loss->mse > 0};
    gpu_fill(s->gpu, s->sums, 0, heads * sizeof *sums);
    for (int layer = 0; layer < s->n_layers; layer += w.n_layers) {
        for (w.n_layers = 0; layer + w.n_layers < s->n_layers && w.n_layers < together;
             w.n_layers++)
            if (s->softmax_layers[layer + w.n_layers]) break;
        if (!w.n_layers) { /* keeps softmax */
            w.n_layers = 1;
            continue;
        }
        w.first = layer;
        lay_out(&w.r, &s->c, lesson->n_tokens, lesson->n_rows, w.n_layers, s->memory);
        take_operands(&w);
        learn(&w);
    }
    gpu_download(s->gpu, s->host_sums, s->sums, heads * sizeof *sums);
    enum err e = gpu_wait(s->gpu);
    if (e) return e;
    for (size_t i = 0; i < heads * GPU_SUMS; i++)
        ((double *)sums)[i] += ((const double *)s->host_sums)[i];
    return OK;
}

enum err gpu_student_largest(struct gpu_student *s, const struct gpu_lesson *lesson, float *queries,
                             float *keys) {
    int H = s->c.n_heads, KV = s->c.n_kv_heads, D = s->c.head_dim, L = s->n_layers;
    size_t T = (size_t)lesson->n_tokens, R = (size_t)lesson->all_rows, n_q = (size_t)L * (size_t)H,
           n_k = (size_t)L * (size_t)KV;
    gpu_largest(s->gpu, s->most, lesson->q, R * lesson->q_floats, lesson->q_floats, L,
                lesson->all_rows, H, D);
    gpu_largest(s->gpu, s->most + n_q, lesson->kv, T * lesson->kv_floats, lesson->kv_floats, L,
                lesson->n_tokens, KV, D);
    gpu_download(s->gpu, s->host_most, s->most, (n_q + n_k) * sizeof *s->most);
    enum err e = gpu_wait(s->gpu);
    if (e) return e;
    memcpy(queries, s->host_most, n_q * sizeof *queries);
    memcpy(keys, s->host_most + n_q, n_k * sizeof *keys);
    return OK;
}
