/* network.c - where each of a base's tensors lies among the values, and reading them. */
#include "convert/network.h"

#include "compute/memory.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static size_t rows_of(const struct base *base, enum base_part part, int layer, size_t n_in) {
    const struct base_tensor *t = base_tensor(base, part, layer);
    return t ? (size_t)t->n_out * n_in : 0;
}

/* Lays the parts into values (NULL: only counts), in the order of network_part()'s offsets. */
static size_t lay_out(struct network *n, const struct base *base, float *values) {
    const struct base_config *c = base_config(base);
    size_t at = 0, E = (size_t)c->hidden_dim, q = (size_t)(c->n_heads * c->head_dim),
           kv = (size_t)(c->n_kv_heads * c->head_dim), ffn = (size_t)c->ffn_dim,
           gate_up = c->architecture == BASE_LLAMA ? 2 * ffn : ffn;
#define PUT(field, floats, present)                                                                \
    do {                                                                                           \
        bool there = (present);                                                                    \
        if (values) (field) = there ? values + at : NULL;                                          \
        if (there) at += (floats);                                                                 \
    } while (0)
#define HAS(part) (base_tensor(base, part, i) != NULL)
    int i = 0;
    PUT(n->embed, rows_of(base, PART_EMBED, 0, E), true);
    PUT(n->position, rows_of(base, PART_POSITION, 0, E), HAS(PART_POSITION));
    for (; i < c->n_layers; i++) {
        struct network_layer none, *l = values ? &n->layers[i] : &none;
        PUT(l->attn_norm, E, true);
        PUT(l->attn_norm_bias, E, HAS(PART_ATTN_NORM_BIAS));
        PUT(l->qkv, (q + 2 * kv) * E, true);
        PUT(l->qkv_bias, q + 2 * kv,
            HAS(PART_QKV_BIAS) || HAS(PART_Q_BIAS) || HAS(PART_K_BIAS) || HAS(PART_V_BIAS));
        PUT(l->o, E * q, true);
        PUT(l->o_bias, E, HAS(PART_O_BIAS));
        PUT(l->ffn_norm, E, true);
        PUT(l->ffn_norm_bias, E, HAS(PART_FFN_NORM_BIAS));
        PUT(l->gate_up, gate_up * E, true);
        PUT(l->gate_up_bias, gate_up, HAS(PART_GATE_BIAS) || HAS(PART_UP_BIAS));
        PUT(l->down, E * ffn, true);
        PUT(l->down_bias, E, HAS(PART_DOWN_BIAS));
    }
    i = 0;
    PUT(n->norm, E, true);
    PUT(n->norm_bias, E, HAS(PART_NORM_BIAS));
    PUT(n->head, rows_of(base, PART_HEAD, 0, E), !c->tied);
    if (values && c->tied) n->head = n->embed;
#undef HAS
#undef PUT
    return at;
}

size_t network_bytes(const struct base *base) {
    return lay_out(NULL, base, NULL) * sizeof(float);
}

float *network_part(const struct network *n, enum base_part part, int layer) {
    const struct base_config *c = &n->config;
    size_t E = (size_t)c->hidden_dim, q = (size_t)(c->n_heads * c->head_dim),
           kv = (size_t)(c->n_kv_heads * c->head_dim), ffn = (size_t)c->ffn_dim;
    const struct network_layer *l = &n->layers[layer];
    size_t gate = c->architecture == BASE_LLAMA ? ffn : 0; /* rows before up's */
#define INTO(field, row) ((field) ? (field) + (row) : NULL)
    switch (part) {
    case PART_EMBED:
        return n->embed;
    case PART_POSITION:
        return n->position;
    case PART_NORM:
        return n->norm;
    case PART_NORM_BIAS:
        return n->norm_bias;
    case PART_HEAD:
        return n->head;
    case PART_ATTN_NORM:
        return l->attn_norm;
    case PART_ATTN_NORM_BIAS:
        return l->attn_norm_bias;
    case PART_Q:
    case PART_QKV:
        return l->qkv;
    case PART_K:
        return INTO(l->qkv, q * E);
    case PART_V:
        return INTO(l->qkv, (q + kv) * E);
    case PART_Q_BIAS:
    case PART_QKV_BIAS:
        return l->qkv_bias;
    case PART_K_BIAS:
        return INTO(l->qkv_bias, q);
    case PART_V_BIAS:
        return INTO(l->qkv_bias, q + kv);
    case PART_O:
        return l->o;
    case PART_O_BIAS:
        return l->o_bias;
    case PART_FFN_NORM:
        return l->ffn_norm;
    case PART_FFN_NORM_BIAS:
        return l->ffn_norm_bias;
    case PART_GATE:
        return l->gate_up;
    case PART_UP:
        return INTO(l->gate_up, gate * E);
    case PART_DOWN:
        return l->down;
    case PART_GATE_BIAS:
        return l->gate_up_bias;
    case PART_UP_BIAS:
        return INTO(l->gate_up_bias, gate);
    case PART_DOWN_BIAS:
        return l->down_bias;
    case N_PARTS:
        break;
    }
#undef INTO
    return NULL;
}

/* ---- reading ---- */
enum { PIECE = 256 }; /* rows */

struct reading {
    const struct network *n;
    const struct base *base;
    atomic_int next;
    _Atomic(const struct base_tensor *) not_finite;
};

/* Pieces of all tensors, dealt out by number: every thread walks the whole list and takes what
 * falls to it. */
static void read_pieces(void *arg, int thread, int n_threads) {
    struct reading *r = arg;
    int mine = atomic_fetch_add(&r->next, 1), number = 0;
    (void)thread, (void)n_threads;
    for (int part = 0; part < N_PARTS; part++) {
        int layers = part < PART_ATTN_NORM ? 1 : r->n->config.n_layers;
        for (int i = 0; i < layers; i++) {
            const struct base_tensor *t = base_tensor(r->base, (enum base_part)part, i);
            if (!t || (part == PART_HEAD && r->n->config.tied)) continue;
            float *to = network_part(r->n, (enum base_part)part, i);
            for (int row = 0; row < t->n_out; row += PIECE) {
                if (number++ != mine) continue;
                int n = t->n_out - row < PIECE ? t->n_out - row : PIECE;
                float *out = to + (size_t)row * (size_t)t->n_in;
                base_read(t, row, n, out);
                for (size_t k = 0; k < (size_t)n * (size_t)t->n_in; k++)
                    if (!isfinite(out[k])) atomic_store(&r->not_finite, t);
                mine = atomic_fetch_add(&r->next, 1);
            }
        }
    }
}

static enum err no_memory(const struct base *base, char *msg, size_t msg_len) {
    return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory for weights to train with",
                   base_path(base));
}

enum err network_read(struct network **out, const struct base *base, struct team *team, char *msg,
                      size_t msg_len) {
    struct network *n = calloc(1, sizeof *n);
    if (!n) return no_memory(base, msg, msg_len);
    n->config = *base_config(base);
    n->n_values = lay_out(NULL, base, NULL);
    n->layers = calloc((size_t)n->config.n_layers, sizeof *n->layers);
    n->values = memory_map(n->n_values * sizeof(float));
    if (!n->layers || !n->values) {
        network_free(n);
        return no_memory(base, msg, msg_len);
    }
    lay_out(n, base, n->values);
    struct reading r = {.n = n, .base = base};
    team_run(team, read_pieces, &r);
    const struct base_tensor *bad = r.not_finite;
    if (bad) {
        network_free(n);
        return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s holds a value that is not finite",
                       bad->file, bad->name);
    }
    *out = n;
    return OK;
}

static void relocate(float **p, const struct network *from, const struct network *to) {
    if (*p) *p = to->values + (*p - from->values);
}

enum err network_over(struct network **out, const struct network *of, float *values) {
    struct network *n = calloc(1, sizeof *n);
    size_t layers = (size_t)of->config.n_layers;
    if (!n) return ERR_NOMEM;
    *n = *of;
    n->layers = calloc(layers, sizeof *n->layers);
    n->values = values;
    n->borrowed = true;
    if (!n->layers) {
        network_free(n);
        return ERR_NOMEM;
    }
    memcpy(n->layers, of->layers, layers * sizeof *n->layers);
    float **once[] = {&n->embed, &n->head, &n->position, &n->norm, &n->norm_bias};
    for (size_t i = 0; i < sizeof once / sizeof *once; i++)
        relocate(once[i], of, n);
    for (size_t i = 0; i < layers; i++) {
        struct network_layer *l = &n->layers[i];
        float **parts[] = {&l->attn_norm, &l->attn_norm_bias, &l->qkv,      &l->qkv_bias,
                           &l->o,         &l->o_bias,         &l->ffn_norm, &l->ffn_norm_bias,
                           &l->gate_up,   &l->gate_up_bias,   &l->down,     &l->down_bias};
        for (size_t k = 0; k < sizeof parts / sizeof *parts; k++)
            relocate(parts[k], of, n);
    }
    *out = n;
    return OK;
}

void network_free(struct network *n) {
    if (!n) return;
    if (!n->borrowed) memory_unmap(n->values, n->n_values * sizeof(float));
    free(n->layers);
    free(n);
}
