/* weights.c - decoding, merging and packing, shared out over the team in pieces of rows.
 *
 * Every matrix is a list of sources stacked by rows; a piece is at most PIECE_ROWS rows of one
 * matrix.  A thread packs those that matmul() will give it, so that on a machine with several memory
 * nodes their pages lie on its own (whoever writes a page first owns it); then what others have not
 * got to, for pieces differ in cost.  Who packs one changes no bit. */
#include "model/weights.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum {
    PIECE_ROWS = 64,
    MAX_SOURCES = 3
}; /* a multiple of the 16 rows that matrix_set_rows wants in one hand */

struct job { /* one matrix to be packed */
    struct matrix *matrix;
    const struct base_tensor *sources[MAX_SOURCES]; /* stacked by rows */
    int n_sources;
    const struct low_rank *low_rank[MAX_SOURCES]; /* of rows low_rank_first .. + low_rank_rows */
    int low_rank_first[MAX_SOURCES], low_rank_rows[MAX_SOURCES];
    int n_low_rank;
    int first_piece, n_pieces; /* among all */
};

struct packing {
    struct job *jobs;
    int n_jobs, n_pieces, max_n_in;
    int rank;
    float scale;
    float *scratch; /* [n_threads][PIECE_ROWS][max_n_in] */
    atomic_bool *taken; /* [n_pieces] */
    atomic_int packed;
    _Atomic(const struct base_tensor *) not_finite; /* the first found */
    void (*progress)(void *arg, const char *what, double fraction);
    void *progress_arg;
};

/* Four values at a time: compilers leave these two loops scalar at -O2, and all weights go through
 * them. */
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t four_bits __attribute__((vector_size(16), aligned(4), may_alias));

static bool all_finite(const float *x, size_t n) {
    four_bits bad = {0};
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        bad |= (*(const four_bits *)(x + i) & 0x7f800000) ==
               0x7f800000; /* the exponent of infinities and NaN */
    for (; i < n; i++)
        if (!isfinite(x[i])) return false;
    return !(bad[0] | bad[1] | bad[2] | bad[3]);
}

/* y += factor x */
static void add_scaled(float *y, const float *x, float factor, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4)
        *(four *)(y + i) += factor * *(const four *)(x + i);
    for (; i < n; i++)
        y[i] += factor * x[i];
}

/* rows first .. first + n of the stacked sources; false: a value is not finite. */
static bool read_rows(struct packing *p, const struct job *job, int first, int n, float *out) {
    size_t n_in = (size_t)matrix_n_in(job->matrix);
    int start = 0; /* first row of the source at hand */
    for (int s = 0; s < job->n_sources; s++) {
        const struct base_tensor *t = job->sources[s];
        int from = first > start ? first : start;
        int to = first + n < start + t->n_out ? first + n : start + t->n_out;
        if (from < to) {
            float *rows = out + (size_t)(from - first) * n_in;
            base_read(t, from - start, to - from, rows);
            if (!all_finite(rows, (size_t)(to - from) * n_in)) {
                const struct base_tensor *none = NULL;
                atomic_compare_exchange_strong(&p->not_finite, &none, t);
                return false;
            }
        }
        start += t->n_out;
    }
    return true;
}

void weights_add_low_rank(const struct low_rank *part, int rank, float scale, int index, int n_in,
                          float *row) {
    for (int k = 0; k < rank; k++)
        add_scaled(row, part->a + (size_t)k * (size_t)n_in,
                   scale * part->b[(size_t)index * (size_t)rank + (size_t)k], n_in);
}

/* W + scale B A on rows first .. first + n. */
static void merge_low_rank(const struct packing *p, const struct job *job, int first, int n,
                           float *rows) {
    int n_in = matrix_n_in(job->matrix);
    for (int l = 0; l < job->n_low_rank; l++) {
        for (int r = first; r < first + n; r++) {
            int in_target = r - job->low_rank_first[l];
            if (in_target < 0 || in_target >= job->low_rank_rows[l]) continue;
            weights_add_low_rank(job->low_rank[l], p->rank, p->scale, in_target, n_in,
                                 rows + (size_t)(r - first) * (size_t)n_in);
        }
    }
}

static void pack_piece(struct packing *p, const struct job *job, int i, int thread) {
    float *rows = p->scratch + (size_t)thread * PIECE_ROWS * (size_t)p->max_n_in;
    int first = i * PIECE_ROWS, n = matrix_n_out(job->matrix) - first;
    if (n > PIECE_ROWS) n = PIECE_ROWS;
    if (atomic_load(&p->not_finite) || atomic_exchange(&p->taken[job->first_piece + i], true) ||
        !read_rows(p, job, first, n, rows))
        return;
    merge_low_rank(p, job, first, n, rows);
    matrix_set_rows(job->matrix, first, n, rows);
    int packed = atomic_fetch_add(&p->packed, 1);
    if (thread == 0 && p->progress)
        p->progress(p->progress_arg, "packing weights", (double)packed / p->n_pieces);
}

static void pack_pieces(void *arg, int thread, int n_threads) {
    struct packing *p = arg;
    for (int others = 0; others < 2; others++)
        for (int j = 0; j < p->n_jobs; j++) {
            const struct job *job = &p->jobs[j];
            int n = job->n_pieces, first = (int)((int64_t)n * thread / n_threads),
                end = others ? first + n : (int)((int64_t)n * (thread + 1) / n_threads);
            for (int i = first; i < end; i++)
                pack_piece(p, job, i % n, thread);
        }
}

/* ---- what is to be packed ---- */
struct loader {
    struct weights *w;
    const struct base *base;
    const struct converted *converted;
    struct packing packing;
    char *msg;
    size_t msg_len;
};

static enum err no_memory(struct loader *l) {
    return err_set(l->msg, l->msg_len, ERR_NOMEM, "%s: out of memory for the weights",
                   base_path(l->base));
}

static enum err not_finite(struct loader *l, const struct base_tensor *t) {
    return err_set(l->msg, l->msg_len, ERR_FORMAT, "%s: tensor %s holds a value that is not finite",
                   t->file, t->name);
}

/* Room for a matrix of these sources (NULL ones are left out), and a job to fill it. */
static enum err add_matrix(struct loader *l, struct matrix **out, enum weight_type type,
                           const struct base_tensor *a, const struct base_tensor *b,
                           const struct base_tensor *c) {
    const struct base_tensor *sources[MAX_SOURCES] = {a, b, c};
    struct job *job = &l->packing.jobs[l->packing.n_jobs];
    int n_out = 0;
    *job = (struct job){.first_piece = l->packing.n_pieces};
    for (int s = 0; s < MAX_SOURCES; s++)
        if (sources[s]) {
            job->sources[job->n_sources++] = sources[s];
            n_out += sources[s]->n_out;
        }
    int n_in = job->sources[0]->n_in;
    if (type == WEIGHT_FP8 && (n_out % 16 || n_in % 16)) type = WEIGHT_INT8;
    if (matrix_new(out, type, n_out, n_in)) return no_memory(l);
    job->matrix = *out;
    l->w->bytes += matrix_bytes(*out);
    l->packing.n_jobs++;
    job->n_pieces = (n_out + PIECE_ROWS - 1) / PIECE_ROWS;
    l->packing.n_pieces += job->n_pieces;
    if (n_in > l->packing.max_n_in) l->packing.max_n_in = n_in;
    return OK;
}

static bool has_low_rank(const struct loader *l, enum low_rank_target target) {
    return l->converted && l->converted->targets[target];
}

/* The last job's rows first .. first + n_rows are this target's. */
static void add_low_rank(struct loader *l, int layer, enum low_rank_target target, int first,
                         int n_rows) {
    if (!has_low_rank(l, target)) return;
    struct job *job = &l->packing.jobs[l->packing.n_jobs - 1];
    job->low_rank[job->n_low_rank] = &l->converted->layers[layer].low_rank[target];
    job->low_rank_first[job->n_low_rank] = first;
    job->low_rank_rows[job->n_low_rank++] = n_rows;
}

/* Vectors are few: read here and now.  Those of several parts are stacked; an absent part is zeros,
 * all absent: NULL. */
static enum err add_vector(struct loader *l, float **out, int layer, const enum base_part *wanted,
                           const int *sizes, int n) {
    size_t total = 0;
    bool any = false;
    for (int i = 0; i < n; i++) {
        total += (size_t)sizes[i];
        any |= base_tensor(l->base, wanted[i], layer) != NULL;
    }
    if (!any) return OK;
    float *at = *out = calloc(total, sizeof **out);
    if (!at) return no_memory(l);
    l->w->bytes += total * sizeof *at;
    for (int i = 0; i < n; at += sizes[i++]) {
        const struct base_tensor *t = base_tensor(l->base, wanted[i], layer);
        if (!t) continue;
        base_read(t, 0, t->n_out, at);
        if (!all_finite(at, (size_t)t->n_out)) return not_finite(l, t);
    }
    return OK;
}

/* Not everything bears four bits.  Mean KL to fp32 over 1,024 tokens of a novel,
 * smollm2-135m-hedgehog over its Q4_1 base: 0.082 nats with all matrices in int4; 0.014 with
 * embedding and head in int8; 0.005, as int8 throughout, with those matrices in int8 too that have
 * a low-rank part merged and so are no longer what the file's four bits said.  (Low-rank parts kept
 * apart would take four more matmuls a layer for the same.) */
static enum weight_type merged_type(enum weight_type type) {
    return type == WEIGHT_INT4 ? WEIGHT_INT8 : type;
}
static enum weight_type embedding_type(enum weight_type type) {
    return type == WEIGHT_INT4 || type == WEIGHT_FP8 ? WEIGHT_INT8 : type;
}

static enum err add_layer(struct loader *l, int i) {
    const struct base_config *c = base_config(l->base);
    struct layer_weights *w = &l->w->layers[i];
    enum weight_type type = l->w->type, finer = merged_type(type);
    int q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim, hidden = c->hidden_dim,
        ffn = c->ffn_dim;
    bool fused = base_tensor(l->base, PART_QKV, i) != NULL;
#define PART(part) base_tensor(l->base, part, i)
    bool merged =
        has_low_rank(l, LOW_RANK_Q) || has_low_rank(l, LOW_RANK_K) || has_low_rank(l, LOW_RANK_V);
    enum err e = add_matrix(l, &w->qkv, merged ? finer : type,
                            fused ? PART(PART_QKV) : PART(PART_Q), PART(PART_K), PART(PART_V));
    if (e) return e;
    add_low_rank(l, i, LOW_RANK_Q, 0, q);
    add_low_rank(l, i, LOW_RANK_K, q, kv);
    add_low_rank(l, i, LOW_RANK_V, q + kv, kv);
    if ((e = add_matrix(l, &w->o, has_low_rank(l, LOW_RANK_O) ? finer : type, PART(PART_O), NULL,
                        NULL)))
        return e;
    add_low_rank(l, i, LOW_RANK_O, 0, hidden);
    if ((e = add_matrix(l, &w->gate_up, type, PART(PART_GATE) ? PART(PART_GATE) : PART(PART_UP),
                        PART(PART_GATE) ? PART(PART_UP) : NULL, NULL)))
        return e;
    if ((e = add_matrix(l, &w->down, type, PART(PART_DOWN), NULL, NULL))) return e;
#undef PART
    const struct {
        float **out;
        enum base_part parts[3];
        int sizes[3];
        int n;
    } vectors[] = {
        {&w->attn_norm, {PART_ATTN_NORM}, {hidden}, 1},
        {&w->attn_norm_bias, {PART_ATTN_NORM_BIAS}, {hidden}, 1},
        {&w->ffn_norm, {PART_FFN_NORM}, {hidden}, 1},
        {&w->ffn_norm_bias, {PART_FFN_NORM_BIAS}, {hidden}, 1},
        {&w->qkv_bias,
         {fused ? PART_QKV_BIAS : PART_Q_BIAS, PART_K_BIAS, PART_V_BIAS},
         {fused ? q + 2 * kv : q, kv, kv},
         fused ? 1 : 3},
        {&w->o_bias, {PART_O_BIAS}, {hidden}, 1},
        {&w->gate_up_bias,
         {c->architecture == BASE_GPT2 ? PART_UP_BIAS : PART_GATE_BIAS, PART_UP_BIAS},
         {ffn, ffn},
         c->architecture == BASE_GPT2 ? 1 : 2},
        {&w->down_bias, {PART_DOWN_BIAS}, {hidden}, 1},
    };
    for (size_t v = 0; !e && v < sizeof vectors / sizeof vectors[0]; v++)
        e = add_vector(l, vectors[v].out, i, vectors[v].parts, vectors[v].sizes, vectors[v].n);
    return e;
}

static enum err add_all(struct loader *l) {
    struct weights *w = l->w;
    int hidden = base_config(l->base)->hidden_dim;
    const struct base_tensor *embed = base_tensor(l->base, PART_EMBED, 0),
                             *position = base_tensor(l->base, PART_POSITION, 0);
    const struct base_tensor *head =
        base_config(l->base)->tied ? NULL : base_tensor(l->base, PART_HEAD, 0);
    enum weight_type type = embedding_type(w->type);
    enum err e = add_matrix(l, &w->embed, type, embed, NULL, NULL);
    if (!e && head)
        e = add_matrix(l, &w->head, type, head, NULL, NULL);
    else
        w->head = w->embed;
    if (!e && position)
        e = add_matrix(l, &w->position, WEIGHT_FP32, position, NULL,
                       NULL); /* small, and never multiplied */
    if (!e) e = add_vector(l, &w->norm, 0, (enum base_part[]){PART_NORM}, &hidden, 1);
    if (!e) e = add_vector(l, &w->norm_bias, 0, (enum base_part[]){PART_NORM_BIAS}, &hidden, 1);
    for (int i = 0; !e && i < w->n_layers; i++)
        e = add_layer(l, i);
    return e;
}

enum err weights_load(struct weights **out, const struct base *base,
                      const struct converted *converted, enum weight_type type, struct team *team,
                      void (*progress)(void *arg, const char *what, double fraction),
                      void *progress_arg, char *msg, size_t msg_len) {
    struct loader l = {.base = base, .converted = converted, .msg = msg, .msg_len = msg_len};
    struct packing *p = &l.packing;
    size_t n_layers = (size_t)base_config(base)->n_layers;
    enum err e = OK;
    p->progress = progress;
    p->progress_arg = progress_arg;
    if (converted) {
        p->rank = converted->rank;
        p->scale = converted->scale;
    }
    l.w = calloc(1, sizeof *l.w);
    p->jobs = calloc(n_layers * 4 + 3, sizeof *p->jobs);
    if (!l.w || !p->jobs || !(l.w->layers = calloc(n_layers, sizeof *l.w->layers))) {
        e = no_memory(&l);
        goto done;
    }
    l.w->type = type;
    l.w->n_layers = (int)n_layers;
    if ((e = add_all(&l))) goto done;
    p->scratch =
        malloc((size_t)team_size(team) * PIECE_ROWS * (size_t)p->max_n_in * sizeof *p->scratch);
    p->taken = calloc((size_t)p->n_pieces, sizeof *p->taken);
    if (!p->scratch || !p->taken) {
        e = no_memory(&l);
        goto done;
    }
    team_run(team, pack_pieces, p);
    if (p->not_finite)
        e = not_finite(&l, p->not_finite);
    else if (progress)
        progress(progress_arg, "packing weights", 1);
done:
    free(p->scratch);
    free(p->taken);
    free(p->jobs);
    if (e)
        weights_free(l.w);
    else
        *out = l.w;
    return e;
}

void weights_free(struct weights *w) {
    if (!w) return;
    for (int i = 0; w->layers && i < w->n_layers; i++) {
        struct layer_weights *l = &w->layers[i];
        matrix_free(l->qkv);
        matrix_free(l->o);
        matrix_free(l->gate_up);
        matrix_free(l->down);
        float *vectors[] = {l->attn_norm, l->attn_norm_bias, l->ffn_norm,     l->ffn_norm_bias,
                            l->qkv_bias,  l->o_bias,         l->gate_up_bias, l->down_bias};
        for (size_t v = 0; v < sizeof vectors / sizeof vectors[0]; v++)
            free(vectors[v]);
    }
    if (w->head != w->embed) matrix_free(w->head);
    matrix_free(w->embed);
    matrix_free(w->position);
    free(w->norm);
    free(w->norm_bias);
    free(w->layers);
    free(w);
}
