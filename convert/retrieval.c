/* retrieval.c - the base's rows that answer, and where they look. */
#include "convert/retrieval.h"

#include "attention/kernels.h"
#include "convert/backward_kernels.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum err retrieval_begin(struct retrieval *r, const struct attention_config *c, int n_layers) {
    *r = (struct retrieval){.n_layers = n_layers};
    r->sums = calloc((size_t)n_layers * (size_t)c->n_heads, sizeof *r->sums);
    return r->sums ? OK : ERR_NOMEM;
}

void retrieval_end(struct retrieval *r) {
    free(r->sums);
    r->sums = NULL;
}

struct job {
    struct retrieval *r;
    const struct attention_config *c;
    const struct lesson *l;
    const struct pack *pack;
    float *room; /* [threads][floats] */
    size_t floats;
    atomic_int next;
};

static bool answers(const struct pack *pack, int row, int document_end) {
    return pack->weight && row + 1 < document_end && pack->weight[row + 1] > 0;
}

/* q or k at its position */
static void turn(const struct lesson *l, float *y, const float *x, int position, int D) {
    size_t at = (size_t)position * (size_t)D / 2;
    if (l->cosines)
        attention_kernels_chosen()->rotate(y, x, l->cosines + at, l->sines + at, D);
    else
        memcpy(y, x, (size_t)D * sizeof *y);
}

/* What softmax of the scores p [n] lays on keys first .. end - 1 whose token is x. */
static double mass_on(const float *p, int n, const int32_t *tokens, int first, int end, int32_t x) {
    float most = p[0];
    double all = 0, found = 0;
    for (int j = 1; j < n; j++)
        if (p[j] > most) most = p[j];
    for (int j = 0; j < n; j++) {
        double w = exp((double)p[j] - most);
        all += w;
        if (j >= first && j < end && tokens[j] == x) found += w;
    }
    return found / all;
}

static void measure(const struct job *job, int layer, int kv_head, float *room) {
    const struct attention_config *c = job->c;
    const struct lesson *l = job->l;
    const struct backward_kernels *rows = backward_kernels();
    size_t D = (size_t)c->head_dim, kv = 2 * (size_t)c->n_kv_heads * D, q = (size_t)c->n_heads * D;
    const float *keys = l->kv + (size_t)layer * (size_t)l->n_tokens * kv + (size_t)kv_head * D,
                *queries = l->q + (size_t)layer * (size_t)l->n_rows * q;
    float *turned = room, *query = turned + (size_t)l->n_tokens * D, *p = query + D;
    int group = c->n_heads / c->n_kv_heads, d = 0;
    for (int i = 0, document = 0; i < l->n_tokens; i++) {
        while (i >= l->first[document + 1])
            document++;
        turn(l, turned + (size_t)i * D, keys + (size_t)i * kv, i - l->first[document], c->head_dim);
    }
    for (int r = 0; r < l->n_rows; r++) {
        int row = l->rows[r], sinks;
        int64_t from;
        while (row >= l->first[d + 1])
            d++;
        int first = l->first[d], position = row - first;
        if (!answers(job->pack, row, l->first[d + 1])) continue;
        lesson_linear_keys(c, position, &sinks, &from);
        for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
            turn(l, query, queries + (size_t)r * q + (size_t)h * D, position, c->head_dim);
            for (int j = 0; j <= position; j++)
                p[j] = rows->dot(query, turned + (size_t)(first + j) * D, c->head_dim) /
                       sqrtf((float)c->head_dim);
            job->r->sums[(size_t)layer * (size_t)c->n_heads + (size_t)h] +=
                mass_on(p, position + 1, job->pack->tokens + first, sinks, (int)from,
                        job->pack->tokens[row + 1]);
        }
    }
}

static void work(void *arg, int thread, int n_threads) {
    struct job *job = arg;
    int n_kv = job->c->n_kv_heads;
    (void)n_threads;
    for (int i; (i = atomic_fetch_add(&job->next, 1)) < job->r->n_layers * n_kv;)
        measure(job, i / n_kv, i % n_kv, job->room + (size_t)thread * job->floats);
}

enum err retrieval_add(struct retrieval *r, const struct attention_config *c,
                       const struct lesson *lesson, const struct pack *pack, struct team *team) {
    size_t T = (size_t)lesson->n_tokens, D = (size_t)c->head_dim;
    struct job job = {.r = r, .c = c, .l = lesson, .pack = pack, .floats = T * D + D + T};
    job.room = malloc((size_t)team_size(team) * job.floats * sizeof *job.room);
    if (!job.room) return ERR_NOMEM;
    team_run(team, work, &job);
    free(job.room);
    for (int i = 0, d = 0; i < lesson->n_rows; i++) {
        while (lesson->rows[i] >= lesson->first[d + 1])
            d++;
        r->n_rows += answers(pack, lesson->rows[i], lesson->first[d + 1]);
    }
    return OK;
}

/* Of a kv head. */
static double score(const struct retrieval *r, const struct attention_config *c, int head) {
    int group = c->n_heads / c->n_kv_heads;
    double most = 0;
    for (int h = head * group; h < (head + 1) * group; h++) /* heads of all layers in one row */
        if (r->sums[h] > most) most = r->sums[h];
    return r->n_rows ? most / (double)r->n_rows : 0;
}

static bool is_one_of(int x, const int *list, int n) {
    for (int i = 0; i < n; i++)
        if (list[i] == x) return true;
    return false;
}

int retrieval_choose(const struct retrieval *r, const struct attention_config *c,
                     const int *left_out, int n_left_out, int n, bool *out, double *least) {
    int n_all = r->n_layers * c->n_kv_heads, chosen = 0;
    memset(out, 0, (size_t)n_all * sizeof *out);
    *least = 0;
    for (; chosen < n; chosen++) {
        int best = -1;
        for (int i = 0; i < n_all; i++)
            if (!out[i] && !is_one_of(i / c->n_kv_heads, left_out, n_left_out) &&
                score(r, c, i) >= RETRIEVAL_LEAST &&
                (best < 0 || score(r, c, i) > score(r, c, best)))
                best = i;
        if (best < 0) break;
        out[best] = true;
        *least = score(r, c, best);
    }
    return chosen;
}
