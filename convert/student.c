/* student.c - a kv head's rows in groups of sixteen, each against its document's keys.
 *
 * Keys lie twice, as rows and transposed, so that every product runs along its columns: scores want
 * keys side by side, gradients their features.  Groups are of ascending rows, so a group's products
 * end at the last key its last row may see. */
#include "convert/student.h"

#include "attention/kernels.h"
#include "compute/cpu.h"
#include "compute/memory.h"
#include "convert/carve.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GROUP = 16 };

const struct convert_kernels *convert_kernels(void) {
#if defined(__x86_64__)
    switch (cpu_isa()) {
    case CPU_AMX: /* which has AVX-512 too */
    case CPU_AVX512:
        return &convert_kernels_avx512;
    case CPU_AVX2:
        return &convert_kernels_avx2;
    default:
        break;
    }
#endif
    return &convert_kernels_generic;
}

int64_t lesson_linear_keys(const struct attention_config *c, int64_t position, int *sinks,
                           int64_t *from) {
    int64_t w = c->window_size;
    *from = position + 1;
    if (c->window == WINDOW_SLIDING) *from = position + 1 - w;
    if (c->window == WINDOW_TERRACED) *from = (position / w - 1) * w;
    if (*from < 0) *from = 0;
    *sinks = *from < c->sinks ? (int)*from : c->sinks;
    return *from - *sinks;
}

/* ---- parameters ---- */
static size_t map_floats(const struct attention_config *c) {
    return (size_t)c->head_dim * (size_t)c->features;
}
size_t student_map_k(const struct attention_config *c) {
    return (size_t)c->n_heads * map_floats(c);
}
size_t student_mix(const struct attention_config *c) {
    int state_heads = c->key_map_per_query_head ? c->n_heads : c->n_kv_heads;
    return student_map_k(c) + (size_t)state_heads * map_floats(c);
}
size_t student_params(const struct attention_config *c) {
    return student_mix(c) + (size_t)c->n_heads;
}

/* ---- scratch ---- */
struct student_scratch {
    void *block;
    size_t bytes;
    int columns; /* of what is transposed: max_tokens rounded up, and room to read past the end */
    /* keys: as the maps see them, turned and transposed, values and their transpose */
    float *k, *x, *turned, *v, *v_t; /* [T][D] twice, [D][columns], [T][lanes], [D][columns] */
    float *u, *phi, *phi_t, *dphi;   /* [T][fl] [T][F] [F][columns] [T][F] */
    float *w, *dw;                   /* [D][fl] */
    float *qx, *q, *uq, *phi_q, *dphi_q, *reach; /* [R][D] twice, [R][fl], [R][F] twice, [R] */
    float *p, *s, *a, *ev;                       /* [GROUP][columns] */
    float *y, *y_teacher, *sinks;                /* [GROUP][lanes] twice, [GROUP][sinks] */
};

static size_t lay_out(struct student_scratch *s, const struct attention_config *c, int max_tokens,
                      int max_rows, float *block) {
    struct carve at = {block, 0};
    size_t T = (size_t)max_tokens, R = (size_t)max_rows, D = (size_t)c->head_dim,
           lanes = (size_t)round_up(c->head_dim, TILE), fl = (size_t)round_up(c->features, TILE),
           columns = (size_t)round_up(max_tokens, TILE) + TILE;
    s->columns = (int)columns;
    s->k = cut(&at, T * D);
    s->x = cut(&at, T * D);
    s->turned = cut(&at, D * columns);
    s->v = cut(&at, T * lanes);
    s->v_t = cut(&at, D * columns);
    s->u = cut(&at, T * fl);
    s->phi = cut(&at, T * 2 * fl);
    s->phi_t = cut(&at, 2 * fl * columns);
    s->dphi = cut(&at, T * 2 * fl);
    s->w = cut(&at, D * fl);
    s->dw = cut(&at, D * fl);
    s->qx = cut(&at, R * D);
    s->q = cut(&at, R * D);
    s->uq = cut(&at, R * fl);
    s->phi_q = cut(&at, R * 2 * fl);
    s->dphi_q = cut(&at, R * 2 * fl);
    s->reach = cut(&at, R);
    s->p = cut(&at, GROUP * columns);
    s->s = cut(&at, GROUP * columns);
    s->a = cut(&at, GROUP * columns);
    s->ev = cut(&at, GROUP * columns);
    s->y = cut(&at, GROUP * lanes);
    s->y_teacher = cut(&at, GROUP * lanes);
    s->sinks = cut(&at, (size_t)GROUP * (size_t)c->sinks + 1);
    return at.n * sizeof(float);
}

size_t student_scratch_bytes(const struct attention_config *c, int max_tokens, int max_rows) {
    struct student_scratch s;
    return lay_out(&s, c, max_tokens, max_rows, NULL);
}

enum err student_scratch_new(struct student_scratch **out, const struct attention_config *c,
                             int max_tokens, int max_rows) {
    struct student_scratch *s = calloc(1, sizeof *s);
    if (!s) return ERR_NOMEM;
    s->bytes = student_scratch_bytes(c, max_tokens, max_rows);
    s->block = memory_map(s->bytes);
    if (!s->block) {
        free(s);
        return ERR_NOMEM;
    }
    lay_out(s, c, max_tokens, max_rows, s->block);
    *out = s;
    return OK;
}

void student_scratch_free(struct student_scratch *s) {
    if (!s) return;
    memory_unmap(s->block, s->bytes);
    free(s);
}

/* ---- one kv head ---- */
struct task {
    const struct attention_config *c;
    const struct lesson *lesson;
    const struct student_loss *loss;
    struct student_scratch *tmp;
    const struct convert_kernels *use;
    const struct attention_kernels *dense;
    int layer, kv_head, D, lanes, f, fl;
    int n_rows, row_step; /* of the lesson's rows, that are learned from */
    bool outputs, gradients;
};

/* The token of one of the n_rows. */
static int token_of(const struct task *t, int r) {
    return t->lesson->rows[t->lesson->part + r * t->row_step];
}

static void rotate(const struct task *t, float *y, const float *x, int position) {
    const struct lesson *l = t->lesson;
    size_t half = (size_t)t->D / 2, at = (size_t)position * half;
    if (l->cosines)
        t->dense->rotate(y, x, l->cosines + at, l->sines + at, t->D);
    else
        memcpy(y, x, (size_t)t->D * sizeof *y);
}

/* Keys and values of the head, and what is made of them for all its query heads. */
static void read_keys(const struct task *t) {
    const struct lesson *l = t->lesson;
    struct student_scratch *tmp = t->tmp;
    size_t D = (size_t)t->D, kv = (size_t)t->c->n_kv_heads * D, T = (size_t)l->n_tokens;
    const float *rows = l->kv + (size_t)t->layer * T * 2 * kv + (size_t)t->kv_head * D;
    for (int d = 0; d < l->n_documents; d++)
        for (int i = l->first[d]; i < l->first[d + 1]; i++) {
            const float *k = rows + (size_t)i * 2 * kv;
            float *turned = tmp->k + (size_t)i * D;
            float *x = tmp->x + (size_t)i * D, *v = tmp->v + (size_t)i * (size_t)t->lanes;
            rotate(t, turned, k, i - l->first[d]);
            memcpy(x, t->c->map_before_rope ? k : turned, D * sizeof *x);
            if (!t->outputs) continue;
            memcpy(v, k + kv, D * sizeof *v);
            for (size_t e = D; e < (size_t)t->lanes; e++)
                v[e] = 0;
        }
    t->use->transpose(tmp->turned, (size_t)tmp->columns, tmp->k, D, l->n_tokens, t->D);
    if (t->outputs && t->gradients && t->loss->mse > 0)
        t->use->transpose(tmp->v_t, (size_t)tmp->columns, tmp->v, (size_t)t->lanes, l->n_tokens,
                          t->D);
}

/* w [D][fl], pad columns 0 */
static void read_map(const struct task *t, const float *map) {
    for (int d = 0; d < t->D; d++)
        for (int i = 0; i < t->fl; i++)
            t->tmp->w[(size_t)d * (size_t)t->fl + (size_t)i] =
                i < t->f ? map[(size_t)d * (size_t)t->f + (size_t)i] : 0;
}

/* grads += x^T du */
static void add_map_gradient(const struct task *t, float *grads, const float *x, const float *du,
                             int n) {
    size_t D = (size_t)t->D, fl = (size_t)t->fl, f = (size_t)t->f;
    t->dense->product(t->tmp->dw, fl, false, x, 1, D, t->D, du, fl, n, t->fl / TILE);
    for (size_t d = 0; d < D; d++)
        for (size_t i = 0; i < f; i++)
            grads[d * f + i] += t->tmp->dw[d * fl + i];
}

static void key_features(const struct task *t, const float *map) {
    struct student_scratch *tmp = t->tmp;
    size_t fl = (size_t)t->fl;
    int T = t->lesson->n_tokens;
    read_map(t, map);
    t->dense->product(tmp->u, fl, false, tmp->x, (size_t)t->D, 1, T, tmp->w, fl, t->D,
                      t->fl / TILE);
    t->use->features(t->c->map, tmp->phi, NULL, tmp->u, T, t->f, t->fl);
    t->use->transpose(tmp->phi_t, (size_t)tmp->columns, tmp->phi, 2 * fl, T, 2 * t->fl);
    if (t->gradients) memset(tmp->dphi, 0, (size_t)T * 2 * fl * sizeof *tmp->dphi);
}

static void query_features(const struct task *t, int head, const float *map) {
    const struct lesson *l = t->lesson;
    struct student_scratch *tmp = t->tmp;
    size_t D = (size_t)t->D, q = (size_t)t->c->n_heads * D, fl = (size_t)t->fl;
    int document = 0;
    const float *first = l->q + (size_t)t->layer * (size_t)l->n_rows * q + (size_t)head * D;
    for (int r = 0; r < t->n_rows; r++) {
        const float *x = first + (size_t)(l->part + r * t->row_step) * q;
        while (token_of(t, r) >= l->first[document + 1])
            document++;
        float *turned = tmp->q + (size_t)r * D;
        rotate(t, turned, x, token_of(t, r) - l->first[document]);
        memcpy(tmp->qx + (size_t)r * D, t->c->map_before_rope ? x : turned, D * sizeof *x);
    }
    read_map(t, map);
    t->dense->product(tmp->uq, fl, false, tmp->qx, D, 1, t->n_rows, tmp->w, fl, t->D, t->fl / TILE);
    t->use->features(t->c->map, tmp->phi_q, tmp->reach, tmp->uq, t->n_rows, t->f, t->fl);
    if (t->gradients) memset(tmp->dphi_q, 0, (size_t)t->n_rows * 2 * fl * sizeof *tmp->dphi_q);
}

/* The pupil's logits of sinks that count as max_distance behind (attention.h), or NULL. */
static const float *clamped_sinks(const struct task *t, int r, int position, int first, int n_sinks,
                                  float *out) {
    const struct attention_config *c = t->c;
    if (!c->max_distance || !c->map_before_rope || !t->lesson->cosines || !n_sinks) return NULL;
    int64_t from =
        c->window == WINDOW_TERRACED ? position / c->window_size * c->window_size : position;
    if (from - 0 <= c->max_distance) return NULL; /* sink 0 is the farthest */
    float *far = t->tmp->dw;                      /* a row of it, not in use here */
    t->dense->rotate(far, t->tmp->qx + (size_t)r * (size_t)t->D, t->lesson->far_cosines,
                     t->lesson->far_sines, t->D);
    for (int j = 0; j < n_sinks; j++) {
        bool clamped = from - j > c->max_distance;
        const float *q = clamped ? far : t->tmp->q + (size_t)r * (size_t)t->D;
        const float *k = (clamped ? t->tmp->x : t->tmp->k) + (size_t)(first + j) * (size_t)t->D;
        float sum = 0;
        for (int d = 0; d < t->D; d++)
            sum += q[d] * k[d];
        out[j] = sum / sqrtf((float)t->D);
    }
    return out;
}

static void count(struct student_sums *sums, const struct row_weights *row, bool has_linear) {
    sums->n_rows++;
    sums->kl += row->kl;
    sums->entropy += row->entropy;
    sums->teacher_linear += row->teacher_linear;
    sums->sink += row->sink;
    sums->window += row->window;
    sums->linear += row->linear;
    if (!has_linear) return;
    sums->gap += row->gap;
    sums->n_gap++;
}

/* y of the group's rows, teacher's and pupil's; with an MSE, y becomes e_n = dL/dy_n, returned in
 * ey[i] with e_n . y_n, and ev the products e_n . v_j. */
static void answer(const struct task *t, const struct row_weights *rows, int n, int first,
                   int width, float mse, float *ey, struct student_sums *sums) {
    struct student_scratch *tmp = t->tmp;
    size_t lanes = (size_t)t->lanes, columns = (size_t)tmp->columns;
    int n_keys = rows[n - 1].n_keys;
    const float *v = tmp->v + (size_t)first * lanes;
    t->dense->product(tmp->y, lanes, false, tmp->a, columns, 1, n, v, lanes, n_keys,
                      t->lanes / TILE);
    t->dense->product(tmp->y_teacher, lanes, false, tmp->p, columns, 1, n, v, lanes, n_keys,
                      t->lanes / TILE);
    for (int i = 0; i < n; i++) {
        float *y = tmp->y + (size_t)i * lanes;
        const float *teacher = tmp->y_teacher + (size_t)i * lanes;
        double error = 0, energy = 0, along = 0;
        for (int d = 0; d < t->D; d++) {
            float off = y[d] - teacher[d], e = mse * off;
            error += (double)off * off;
            energy += (double)teacher[d] * teacher[d];
            along += (double)e * y[d];
            y[d] = e;
        }
        sums->error += error;
        sums->energy += energy;
        ey[i] = (float)along;
    }
    if (mse > 0)
        t->dense->product(tmp->ev, columns, false, tmp->y, lanes, 1, n, tmp->v_t + first, columns,
                          t->D, width / TILE);
}

/* Rows r .. r + n - 1 of one document, whose first token is first; returns dL/dmix. */
static float learn_group(const struct task *t, int r, int n, int first, float mix,
                         struct student_sums *sums) {
    struct student_scratch *tmp = t->tmp;
    struct row_weights rows[GROUP];
    size_t columns = (size_t)tmp->columns, D = (size_t)t->D, F = 2 * (size_t)t->fl;
    float ey[GROUP] = {0}, dmix = 0;
    int sinks;
    int64_t from;
    int last = token_of(t, r + n - 1) - first, width = round_up(last + 1, TILE);
    int64_t linear = lesson_linear_keys(t->c, last, &sinks, &from);
    int linear_width = linear > 0 ? round_up((int)from, TILE) : 0;
    float count_of = (float)t->n_rows * (float)t->c->n_heads;
    float ce = t->gradients ? t->loss->share * t->loss->ce / count_of : 0;
    float mse = t->gradients ? t->loss->share * t->loss->mse * 2 / (count_of * (float)t->D) : 0;

    t->dense->product(tmp->p, columns, false, tmp->q + (size_t)r * D, D, 1, n, tmp->turned + first,
                      columns, t->D, width / TILE);
    t->dense->product(tmp->s, columns, false, tmp->phi_q + (size_t)r * F, F, 1, n,
                      tmp->phi_t + first, columns, (int)F, linear_width / TILE);
    for (int i = 0; i < n; i++) {
        int position = token_of(t, r + i) - first;
        int64_t n_linear = lesson_linear_keys(t->c, position, &sinks, &from);
        rows[i] = (struct row_weights){
            .p = tmp->p + (size_t)i * columns,
            .s = tmp->s + (size_t)i * columns,
            .a = tmp->a + (size_t)i * columns,
            .sink_logits = clamped_sinks(t, r + i, position, first, sinks,
                                         tmp->sinks + (size_t)i * (size_t)t->c->sinks),
            .n_keys = position + 1,
            .sinks = sinks,
            .from = (int)from,
            .width = width,
            .scale = 1 / sqrtf((float)t->D),
            .mix = mix,
            .reach = tmp->reach[r + i],
            .mixing = t->c->mixing,
        };
        t->use->weigh(&rows[i]);
        count(sums, &rows[i], n_linear > 0);
    }
    if (t->outputs) answer(t, rows, n, first, width, mse, ey, sums);
    if (!t->gradients || !linear_width) return 0;
    for (int i = 0; i < n; i++)
        dmix += t->use->grade(&rows[i], ce, mse > 0 ? tmp->ev + (size_t)i * columns : NULL, ey[i]);
    float *dphi = tmp->dphi + (size_t)first * F;
    t->dense->product(tmp->dphi_q + (size_t)r * F, F, false, tmp->s, columns, 1, n,
                      tmp->phi + (size_t)first * F, F, (int)from, (int)F / TILE);
    t->dense->product(dphi, F, true, tmp->s, 1, columns, (int)from, tmp->phi_q + (size_t)r * F, F,
                      n, (int)F / TILE);
    return dmix;
}

static void learn_query_head(const struct task *t, int head, const float *params, float *grads,
                             struct student_sums *sums) {
    const struct lesson *l = t->lesson;
    size_t map = map_floats(t->c), mix = student_mix(t->c) + (size_t)head;
    query_features(t, head, params + (size_t)head * map);
    float dmix = 0;
    for (int d = 0, r = 0; d < l->n_documents; d++)
        while (r < t->n_rows && token_of(t, r) < l->first[d + 1]) {
            int n = 1;
            while (n < GROUP && r + n < t->n_rows && token_of(t, r + n) < l->first[d + 1])
                n++;
            dmix += learn_group(t, r, n, l->first[d], params[mix], &sums[head]);
            r += n;
        }
    if (!t->gradients) return;
    t->use->features_back(t->c->map, t->tmp->uq, t->tmp->dphi_q, t->tmp->phi_q, t->tmp->uq, false,
                          t->n_rows, t->fl);
    add_map_gradient(t, grads + (size_t)head * map, t->tmp->qx, t->tmp->uq, t->n_rows);
    grads[mix] += dmix;
}

void student_learn(const struct attention_config *c, const struct lesson *lesson, int layer,
                   int kv_head, const float *params, float *grads, const struct student_loss *loss,
                   bool outputs, struct student_sums *sums, struct student_scratch *scratch) {
    struct task t = {
        .c = c,
        .lesson = lesson,
        .loss = loss,
        .tmp = scratch,
        .use = convert_kernels(),
        .dense = attention_kernels_chosen(),
        .layer = layer,
        .kv_head = kv_head,
        .n_rows = lesson_n_rows(lesson),
        .row_step = lesson_row_step(lesson),
        .D = c->head_dim,
        .lanes = round_up(c->head_dim, TILE),
        .f = c->features,
        .fl = round_up(c->features, TILE),
        .gradients = grads != NULL,
        .outputs = outputs || (grads && loss->mse > 0),
    };
    int group = c->n_heads / c->n_kv_heads, first = kv_head * group;
    int states = c->key_map_per_query_head ? group : 1, heads = group / states;
    read_keys(&t);
    for (int s = 0; s < states; s++) {
        size_t map = student_map_k(c) + (size_t)(kv_head * states + s) * map_floats(c);
        key_features(&t, params + map);
        for (int h = 0; h < heads; h++)
            learn_query_head(&t, first + s * heads + h, params, grads, sums);
        if (!grads) continue;
        t.use->features_back(c->map, scratch->u, scratch->dphi, scratch->phi, scratch->u, true,
                             lesson->n_tokens, t.fl);
        add_map_gradient(&t, grads + map, scratch->x, scratch->u, lesson->n_tokens);
    }
}
