/* ranks.c - arithmetic of parts, and the collectives of a single rank. */
#include "model/ranks.h"

#include <assert.h>

/* [total r / n, total (r + 1) / n) */
static struct gpu_matrix_range share(const struct communicator *c, int total) {
    int first = (int)((int64_t)total * c->rank / c->n_ranks);
    return (struct gpu_matrix_range){first,
                                     (int)((int64_t)total * (c->rank + 1) / c->n_ranks) - first};
}

static struct gpu_matrix_range scaled(struct gpu_matrix_range r, int by) {
    return (struct gpu_matrix_range){r.first * by, r.n * by};
}

static struct gpu_matrix_range behind(struct gpu_matrix_range r, int first) {
    return (struct gpu_matrix_range){first + r.first, r.n};
}

enum { FFN_UNIT = 32 };

static struct gpu_matrix_range ffn_of(const struct communicator *c, int ffn_dim) {
    struct gpu_matrix_range r = scaled(share(c, (ffn_dim + FFN_UNIT - 1) / FFN_UNIT), FFN_UNIT);
    if (r.first + r.n > ffn_dim) r.n = ffn_dim - r.first; /* the last block is short */
    return r;
}

enum err ranks_part(struct gpu_matrix_part *out, const struct communicator *c,
                    const struct base_config *config, enum ranks_matrix which, int n_out,
                    int n_in) {
    struct gpu_matrix_range keys = scaled(share(c, config->n_kv_heads), config->head_dim),
                            queries = scaled(keys, config->n_heads / config->n_kv_heads),
                            ffn = ffn_of(c, config->ffn_dim);
    int q = config->n_heads * config->head_dim, kv = config->n_kv_heads * config->head_dim;
    struct gpu_matrix_part p = {.n_ranges = 1, .rows = {{0, n_out}}, .columns = {0, n_in}};
    switch (which) {
    case RANKS_QKV:
        p.n_ranges = 3;
        p.rows[0] = queries;
        p.rows[1] = behind(keys, q);
        p.rows[2] = behind(keys, q + kv);
        break;
    case RANKS_O:
        p.columns = queries;
        break;
    case RANKS_GATE_UP: /* GPT-2 has no gate */
        p.rows[0] = ffn;
        if (n_out == 2 * config->ffn_dim) p.rows[p.n_ranges++] = behind(ffn, config->ffn_dim);
        break;
    case RANKS_DOWN:
        p.columns = ffn;
        break;
    case RANKS_HEAD:
        p.rows[0] = share(c, n_out);
        break;
    case RANKS_WHOLE:
        break;
    }
    if (p.rows[0].n <= 0 || p.columns.n <= 0) return ERR_ARG;
    *out = p;
    return OK;
}

void ranks_sum(const struct communicator *c, struct gpu *g, float *x, size_t n) {
    assert(c->n_ranks == 1);
    (void)c, (void)g, (void)x, (void)n;
}

void ranks_gather(const struct communicator *c, struct gpu *g, float *y, int n_rows, int n_out) {
    assert(c->n_ranks == 1);
    (void)c, (void)g, (void)y, (void)n_rows, (void)n_out;
}
