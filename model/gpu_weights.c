/* gpu_weights.c - from host memory to the device's, part by part. */
#include "model/gpu_weights.h"

#include <stdlib.h>

struct copying {
    struct gpu_weights *to;
    struct gpu *gpu;
    const struct communicator *ranks;
    const struct base_config *base;
    enum err err; /* the first; what follows does nothing */
};

/* This rank's part. */
static struct gpu_matrix *copy_matrix(struct copying *c, const struct matrix *from,
                                      enum ranks_matrix which) {
    struct gpu_matrix *to = NULL;
    struct gpu_matrix_part part;
    if (!from || c->err) return NULL;
    c->err = ranks_part(&part, c->ranks, c->base, which, matrix_n_out(from), matrix_n_in(from));
    if (!c->err) c->err = gpu_matrix_new(&to, c->gpu, from, &part);
    if (!c->err) c->to->bytes += gpu_matrix_bytes(to);
    return to;
}

static float *copy_ranges(struct copying *c, const float *from,
                          const struct gpu_matrix_range *ranges, int n_ranges) {
    void *at = NULL;
    size_t n = 0;
    for (int i = 0; i < n_ranges; i++)
        n += (size_t)ranges[i].n;
    c->err = gpu_alloc(c->gpu, &at, n * sizeof *from);
    if (c->err) return NULL;
    c->to->vectors[c->to->n_vectors++] = at;
    c->to->bytes += n * sizeof *from;
    float *to = at;
    for (int i = 0; i < n_ranges; to += ranges[i++].n)
        gpu_upload(c->gpu, to, from + ranges[i].first, (size_t)ranges[i].n * sizeof *from);
    return at;
}

static float *copy_vector(struct copying *c, const float *from, int n) {
    if (!from || c->err) return NULL;
    return copy_ranges(c, from, &(struct gpu_matrix_range){0, n}, 1);
}

/* Of this rank's rows; what is added behind a sum over ranks, by rank 0 alone. */
static float *copy_bias(struct copying *c, const float *from, const struct matrix *matrix,
                        enum ranks_matrix which) {
    struct gpu_matrix_part part;
    bool summed = which == RANKS_O || which == RANKS_DOWN;
    if (!from || c->err || (summed && c->ranks->rank > 0)) return NULL;
    c->err = ranks_part(&part, c->ranks, c->base, which, matrix_n_out(matrix), matrix_n_in(matrix));
    return c->err ? NULL : copy_ranges(c, from, part.rows, part.n_ranges);
}

static struct gpu_norm copy_norm(struct copying *c, const float *weight, const float *bias) {
    const struct base_config *base = c->base;
    return (struct gpu_norm){.weight = copy_vector(c, weight, base->hidden_dim),
                             .bias = copy_vector(c, bias, base->hidden_dim),
                             .eps = (float)base->norm_eps};
}

static void copy_layer(struct copying *c, struct gpu_layer_weights *to,
                       const struct layer_weights *from) {
    *to = (struct gpu_layer_weights){
        .qkv = copy_matrix(c, from->qkv, RANKS_QKV),
        .o = copy_matrix(c, from->o, RANKS_O),
        .gate_up = copy_matrix(c, from->gate_up, RANKS_GATE_UP),
        .down = copy_matrix(c, from->down, RANKS_DOWN),
        .attn_norm = copy_norm(c, from->attn_norm, from->attn_norm_bias),
        .ffn_norm = copy_norm(c, from->ffn_norm, from->ffn_norm_bias),
        .qkv_bias = copy_bias(c, from->qkv_bias, from->qkv, RANKS_QKV),
        .o_bias = copy_bias(c, from->o_bias, from->o, RANKS_O),
        .gate_up_bias = copy_bias(c, from->gate_up_bias, from->gate_up, RANKS_GATE_UP),
        .down_bias = copy_bias(c, from->down_bias, from->down, RANKS_DOWN),
    };
}

enum err gpu_weights_copy(struct gpu_weights *to, struct gpu *g, const struct communicator *ranks,
                          const struct base_config *base, const struct weights *from) {
    struct copying c = {.to = to, .gpu = g, .ranks = ranks, .base = base};
    size_t n = (size_t)base->n_layers;
    to->layers = calloc(n, sizeof *to->layers);
    to->vectors = calloc(n * 8 + 2, sizeof *to->vectors);
    if (!to->layers || !to->vectors) return ERR_NOMEM;
    to->n_layers = base->n_layers;
    to->embed = copy_matrix(&c, from->embed, RANKS_WHOLE);
    bool tied = from->head == from->embed && ranks->n_ranks == 1;
    to->head = tied ? to->embed : copy_matrix(&c, from->head, RANKS_HEAD);
    to->position = copy_matrix(&c, from->position, RANKS_WHOLE);
    to->norm = copy_norm(&c, from->norm, from->norm_bias);
    for (int i = 0; i < to->n_layers; i++)
        copy_layer(&c, &to->layers[i], &from->layers[i]);
    return c.err ? c.err : gpu_wait(g); /* the vectors have been read */
}

void gpu_weights_free(struct gpu_weights *w, struct gpu *g) {
    for (int i = 0; i < w->n_layers; i++) {
        gpu_matrix_free(g, w->layers[i].qkv);
        gpu_matrix_free(g, w->layers[i].o);
        gpu_matrix_free(g, w->layers[i].gate_up);
        gpu_matrix_free(g, w->layers[i].down);
    }
    if (w->head != w->embed) gpu_matrix_free(g, w->head);
    gpu_matrix_free(g, w->embed);
    gpu_matrix_free(g, w->position);
    for (int i = 0; i < w->n_vectors; i++)
        gpu_release(g, w->vectors[i]);
    free(w->layers);
    free(w->vectors);
}

size_t gpu_weights_scratch_bytes(const struct gpu_weights *w, int max_rows) {
    size_t most = gpu_matmul_scratch_bytes(w->head, max_rows);
    for (int i = 0; i < w->n_layers; i++) {
        const struct gpu_layer_weights *l = &w->layers[i];
        const struct gpu_matrix *all[] = {l->qkv, l->o, l->gate_up, l->down};
        for (int k = 0; k < 4; k++) {
            size_t bytes = gpu_matmul_scratch_bytes(all[k], max_rows);
            if (bytes > most) most = bytes;
        }
    }
    return most;
}
