/* pupil.c - the stream of a pack through all layers and back, and the head with its losses. */
#include "convert/pupil_internal.h"

#include "compute/ops.h"

#include <string.h>

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
        struct layer l = pupil_layer_of(p, NULL, NULL, i);
        enum err e = pupil_layer_forward(p, &l, p->x_base, p->x_base, pack);
        if (e) return e;
    }
    pupil_norm(p, p->x_base, p->x_base, p->base->norm, p->base->norm_bias, (size_t)pack->n);
    return OK;
}

static float *stream(struct pupil *p, int layer) {
    return p->xs + (size_t)layer * (size_t)p->max_tokens * p->E;
}

static enum err read_pupil(struct pupil *p, const struct pupil_weights *w,
                           const struct pack *pack) {
    embed(p, w->network, stream(p, 0), pack);
    for (int i = 0; i < p->config.n_layers; i++) {
        struct layer l = pupil_layer_of(p, w, NULL, i);
        enum err e = pupil_layer_forward(p, &l, stream(p, i + 1), stream(p, i), pack);
        if (e) return e;
    }
    return OK;
}

/* ---- the head ---- */
/* w_n of row n of a document that ends at end. */
static float row_weight(const struct pack *pack, int n, int end) {
    return pack->weight && n + 1 < end ? 1 + ANSWER_WEIGHT * pack->weight[n + 1] : 1;
}
/* Sum of w_n over the rows that have a loss. */
static double all_weight(const struct pack *pack, enum fine_loss loss) {
    double sum = 0;
    for (int d = 0; d < pack->n_documents; d++) {
        int end = pack->first[d + 1];
        for (int n = pack->first[d]; n < (loss == FINE_DISTILL ? end : end - 1); n++)
            sum += (double)row_weight(pack, n, end);
    }
    return sum;
}

struct head {
    struct pupil *p;
    const struct pack *pack;
    enum fine_loss loss;
    float factor; /* of a row's gradient, times w_n */
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
        float w = row_weight(h->pack, n, h->pack->first[document + 1]), loss = 0;
        if (h->loss == FINE_DISTILL)
            loss = p->rows->distill(z, p->z_base + (size_t)i * p->vocab, V, w * h->factor);
        else if (n + 1 < h->pack->first[document + 1])
            loss = p->rows->next_token(z, h->pack->tokens[n + 1], V, w * h->factor);
        else
            memset(z, 0, p->vocab * sizeof *z);
        p->losses[i] = (double)w * (double)loss;
    }
}

/* Loss of the pupil's final rows in normed, and dn by them. */
static void head(struct pupil *p, const struct pupil_weights *w, const struct pack *pack,
                 enum fine_loss loss, float share, struct network *grads, bool back,
                 struct fine_sums *sums) {
    int V = (int)p->vocab, E = (int)p->E;
    double weight = all_weight(pack, loss);
    for (int r = 0; r < pack->n; r += HEAD_ROWS) {
        int n = piece(pack, (size_t)r, HEAD_ROWS);
        const float *x = p->normed + (size_t)r * p->E;
        gemm(p->gemm, p->z, p->vocab, false, gemm_plain(x, p->E),
             gemm_transposed(w->network->head, p->E), n, V, E);
        if (loss == FINE_DISTILL)
            gemm(p->gemm, p->z_base, p->vocab, false,
                 gemm_plain(p->x_base + (size_t)r * p->E, p->E),
                 gemm_transposed(p->base->head, p->E), n, V, E);
        struct head h = {p, pack, loss, share / (float)weight, r, n};
        team_run(p->team, head_rows, &h);
        for (int i = 0; i < n; i++)
            sums->loss += p->losses[i];
        if (!back) continue;
        pupil_linear_back(p, p->dn + (size_t)r * p->E, p->z, x, n, w->network->head, p->vocab, p->E,
                          grads ? grads->head : NULL, NULL);
    }
    sums->weight += weight;
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
    pupil_norm(p, p->normed, stream(p, L), w->network->norm, w->network->norm_bias, n);
    head(p, w, pack, loss, share, grads, g != NULL, sums);
    if (!g) return OK;
    memset(p->dx, 0, n * p->E * sizeof *p->dx);
    pupil_norm_back(p, p->dx, p->dn, stream(p, L), w->network->norm, grads ? grads->norm : NULL,
                    grads ? grads->norm_bias : NULL, pack);
    for (int i = L - 1; i >= 0; i--) {
        struct layer l = pupil_layer_of(p, w, g, i);
        if ((e = pupil_layer_back(p, &l, p->dx, stream(p, i), pack))) return e;
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
        pupil_norm(p, p->normed, stream(p, p->config.n_layers), w->network->norm,
                   w->network->norm_bias, (size_t)pack->n);
    *rows = w ? p->normed : p->x_base;
    return OK;
}

enum err pupil_cache(struct pupil *p, const struct pupil_weights *w, const struct pack *pack,
                     int layer, const int64_t **sets) {
    struct layer l = pupil_layer_of(p, w, NULL, layer);
    *sets = p->sets;
    return pupil_first_half(p, &l, stream(p, layer), pack);
}
