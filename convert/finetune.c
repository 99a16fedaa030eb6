/* finetune.c - parameters, and the optimiser's step. */
#include "convert/finetune.h"

#include "compute/memory.h"
#include "convert/backward_kernels.h"
#include "convert/kernels.h"
#include "convert/student.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 1 << 14 }; /* floats of a task: a norm's sums have one order */
static const double CLIP = 1;

static size_t map_params(const struct recipe *r, const struct base_config *c) {
    return student_params(&r->attention) * (size_t)c->n_layers;
}
static size_t other_params(const struct recipe *r, const struct base_config *c, size_t n_values) {
    if (r->finetune.method == FINETUNE_FULL) return n_values;
    return low_rank_floats(c, r->finetune.rank) * (size_t)c->n_layers;
}
static int rank_of(const struct recipe *r) {
    return r->finetune.method == FINETUNE_LOW_RANK ? r->finetune.rank : 0;
}

size_t finetune_bytes(const struct recipe *r, const struct base *base, int n_threads,
                      int max_tokens) {
    const struct base_config *c = base_config(base);
    const struct attention_config attention = recipe_finetune_attention(r);
    size_t values = network_bytes(base),
           params = map_params(r, c) + other_params(r, c, values / sizeof(float));
    return values + 4 * params * sizeof(float) +
           pupil_bytes(c, &attention, r->n_softmax_layers > 0, n_threads, max_tokens,
                       rank_of(r));
}

/* Uniform in [-1, 1): the same for the same place. */
static float draw(const struct recipe *r, size_t i) {
    return (float)(chance(r->seed, PACK_FINETUNE, -1, i) >> 40) * 0x1p-23f - 1;
}

static void begin(struct finetune *f, const float *maps) {
    const struct recipe *r = f->recipe;
    const struct base_config *c = &f->base->config;
    float *rest = f->w + f->n_maps;
    memcpy(f->w, maps, f->n_maps * sizeof *f->w);
    if (f->own) {
        memcpy(rest, f->base->values, f->base->n_values * sizeof *rest);
        return;
    }
    size_t per = low_rank_floats(c, r->finetune.rank);
    for (size_t i = 0; i < (size_t)c->n_layers; i++)
        for (int t = 0; t < N_LOW_RANK_TARGETS; t++) {
            struct low_rank_part p = low_rank_part(c, r->finetune.rank, (enum low_rank_target)t);
            size_t first = i * per + p.a, n = (size_t)(r->finetune.rank * p.n_in);
            for (size_t k = first; k < first + n; k++)
                rest[k] = draw(r, k) / sqrtf((float)p.n_in);
        }
}

enum err finetune_new(struct finetune **out, const struct recipe *r, const struct base *base,
                      const struct rope *rope, struct team *team, const float *maps, int max_tokens,
                      char *msg, size_t msg_len) {
    struct finetune *f = calloc(1, sizeof *f);
    if (!f) return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    const struct base_config *c = base_config(base);
    f->recipe = r;
    f->team = team;
    enum err e = network_read(&f->base, base, team, msg, msg_len);
    if (e) {
        free(f);
        return e;
    }
    f->n_maps = map_params(r, c);
    f->n_params = f->n_maps + other_params(r, c, f->base->n_values);
    float **arrays[] = {&f->w, &f->m, &f->v, &f->g};
    bool all = true;
    for (int i = 0; i < 4; i++)
        all = (*arrays[i] = memory_map(f->n_params * sizeof(float))) && all;
    all = (f->pieces = calloc(f->n_params / PIECE + 2, sizeof *f->pieces)) && all;
    if (all && r->finetune.method == FINETUNE_FULL)
        all = !network_over(&f->own, f->base, f->w + f->n_maps) &&
              !network_over(&f->d_own, f->base, f->g + f->n_maps);
    if (all && r->n_softmax_layers) {
        all = (f->softmax = calloc((size_t)c->n_layers, sizeof *f->softmax));
        for (int i = 0; all && i < r->n_softmax_layers; i++)
            f->softmax[r->softmax_layers[i]] = true;
    }
    if (all && r->n_retrieval_heads) {
        f->retrieval = calloc((size_t)c->n_layers * (size_t)c->n_kv_heads, sizeof *f->retrieval);
        if ((all = f->retrieval)) recipe_mark_retrieval(r, f->retrieval);
    }
    const struct attention_config attention = recipe_finetune_attention(r);
    struct pupil_options o = {.base = f->base,
                              .attention = &attention,
                              .softmax = f->softmax,
                              .retrieval = f->retrieval,
                              .rope = rope,
                              .team = team,
                              .max_tokens = max_tokens,
                              .max_rank = rank_of(r),
                              .bf16 = r->finetune.bf16};
    if (!all || pupil_new(&f->pupil, &o)) {
        finetune_free(f);
        return err_set(msg, msg_len, ERR_NOMEM,
                       "out of memory for fine-tuning with sequences of %d tokens", max_tokens);
    }
    begin(f, maps);
    *out = f;
    return OK;
}

void finetune_free(struct finetune *f) {
    if (!f) return;
    float *arrays[] = {f->w, f->m, f->v, f->g};
    for (int i = 0; i < 4; i++)
        memory_unmap(arrays[i], f->n_params * sizeof(float));
    free(f->pieces);
    free(f->softmax);
    free(f->retrieval);
    pupil_free(f->pupil);
    network_free(f->own);
    network_free(f->d_own);
    network_free(f->base);
    free(f);
}

/* ---- packs ---- */
static enum err read(struct finetune *f, const struct pack *pack, bool learn,
                     struct fine_sums *sums) {
    const struct finetune_recipe *r = &f->recipe->finetune;
    struct pupil_weights w = {.network = f->own ? f->own : f->base, .maps = f->w};
    struct pupil_gradients g = {.network = f->d_own, .maps = f->g};
    struct fine_sums mine = {0};
    if (!f->own) {
        w.low_rank = f->w + f->n_maps;
        w.rank = r->rank;
        w.scale = (float)r->scale;
        g.low_rank = f->g + f->n_maps;
    }
    enum err e = pupil_learn(f->pupil, &w, pack, r->next_token ? FINE_NEXT_TOKEN : FINE_DISTILL,
                             1 / (float)r->accumulate, learn ? &g : NULL, &mine);
    if (e) return e;
    sums->loss += mine.loss;
    sums->weight += mine.weight;
    return OK;
}

enum err finetune_measure(struct finetune *f, const struct pack *pack, struct fine_sums *sums) {
    return read(f, pack, false, sums);
}
enum err finetune_learn(struct finetune *f, const struct pack *pack, struct fine_sums *sums) {
    return read(f, pack, true, sums);
}

/* ---- a step ---- */
static size_t n_pieces(const struct finetune *f) {
    return (f->n_params + PIECE - 1) / PIECE;
}
static size_t piece_end(const struct finetune *f, size_t piece) {
    return (piece + 1) * PIECE < f->n_params ? (piece + 1) * PIECE : f->n_params;
}

static void norm_pieces(void *arg, int thread, int n_threads) {
    struct finetune *f = arg;
    for (size_t p = (size_t)thread; p < n_pieces(f); p += (size_t)n_threads)
        f->pieces[p] = backward_kernels()->squares(f->g + p * PIECE, piece_end(f, p) - p * PIECE);
}

static void step_pieces(void *arg, int thread, int n_threads) {
    struct finetune *f = arg;
    const struct finetune_recipe *r = &f->recipe->finetune;
    double rate = recipe_rate_of(f->recipe, r->steps, f->step), n = (double)f->step + 1;
    float clip = f->norm > CLIP ? (float)(CLIP / f->norm) : 1,
          correct_m = (float)(1 / (1 - pow(ADAM_BETA1, n))),
          correct_v = (float)(1 / (1 - pow(ADAM_BETA2, n)));
    for (size_t p = (size_t)thread; p < n_pieces(f); p += (size_t)n_threads) {
        size_t at = p * PIECE, end = piece_end(f, p), maps = at < f->n_maps ? f->n_maps : at;
        if (maps > end) maps = end;
        const struct {
            size_t from, to;
            double lr;
        } parts[] = {{at, maps, r->lr_maps}, {maps, end, r->lr}};
        for (int i = 0; i < 2; i++)
            if (parts[i].to > parts[i].from)
                convert_kernels()->adam(f->w + parts[i].from, f->m + parts[i].from,
                                        f->v + parts[i].from, f->g + parts[i].from,
                                        parts[i].to - parts[i].from, clip,
                                        (float)(rate * parts[i].lr), correct_m, correct_v);
    }
}

enum err finetune_step(struct finetune *f) {
    if (f->recipe->finetune.lr_maps <= 0) memset(f->g, 0, f->n_maps * sizeof *f->g);
    double sum = 0;
    team_run(f->team, norm_pieces, f);
    for (size_t p = 0; p < n_pieces(f); p++)
        sum += f->pieces[p];
    f->norm = sqrt(sum);
    if (!isfinite(f->norm)) return ERR_ARG;
    team_run(f->team, step_pieces, f);
    memset(f->g, 0, f->n_params * sizeof *f->g);
    f->step++;
    return OK;
}
