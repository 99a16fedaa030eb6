/* training.c - lessons dealt to the team, and the optimiser. */
#include "convert/training.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static const double CLIP = 1;          /* gradient norm of a layer */
static const float MOST_AT_FIRST = 10; /* |u| of the first maps: exp is far from its cut at 30 */

enum err training_new(struct training **out, const struct recipe *recipe, int n_layers,
                      struct team *team, int max_tokens, int max_rows) {
    struct training *t = calloc(1, sizeof *t);
    if (!t) return ERR_NOMEM;
    const struct attention_config *a = &recipe->attention;
    size_t layers = (size_t)n_layers;
    t->recipe = recipe;
    t->team = team;
    t->n_layers = n_layers;
    t->n_heads = a->n_heads;
    t->n_layer_params = student_params(a);
    t->n_params = t->n_layer_params * layers;
    t->w = calloc(t->n_params, sizeof *t->w);
    t->m = calloc(t->n_params, sizeof *t->m);
    t->v = calloc(t->n_params, sizeof *t->v);
    t->g = calloc(t->n_params, sizeof *t->g);
    t->sums = calloc(layers * (size_t)a->n_heads, sizeof *t->sums);
    t->norms = calloc(layers, sizeof *t->norms);
    t->scratch = calloc((size_t)team_size(team), sizeof(struct student_scratch *));
    bool all = t->w && t->m && t->v && t->g && t->sums && t->norms && t->scratch;
    for (int i = 0; all && i < team_size(team); i++)
        all = student_scratch_new(&t->scratch[i], a, max_tokens, max_rows) == OK;
    if (!all) {
        training_free(t);
        return ERR_NOMEM;
    }
    *out = t;
    return OK;
}

void training_free(struct training *t) {
    if (!t) return;
    for (int i = 0; t->scratch && i < team_size(t->team); i++)
        student_scratch_free(t->scratch[i]);
    free(t->scratch);
    free(t->w);
    free(t->m);
    free(t->v);
    free(t->g);
    free(t->sums);
    free(t->norms);
    free(t);
}

size_t training_bytes(const struct recipe *r, int n_layers, int n_threads, int max_tokens,
                      int max_rows) {
    return 4 * sizeof(float) * student_params(&r->attention) * (size_t)n_layers +
           (size_t)n_threads * student_scratch_bytes(&r->attention, max_tokens, max_rows);
}

/* ---- lessons ---- */
struct job {
    struct training *t;
    const struct lesson *lesson;
    struct student_loss loss;
    bool learn;
    atomic_int next;
};

static void work(void *arg, int thread, int n_threads) {
    struct job *job = arg;
    struct training *t = job->t;
    const struct attention_config *a = &t->recipe->attention;
    (void)n_threads;
    for (int i; (i = atomic_fetch_add(&job->next, 1)) < t->n_layers * a->n_kv_heads;) {
        int layer = i / a->n_kv_heads, kv_head = i % a->n_kv_heads;
        size_t at = (size_t)layer * t->n_layer_params;
        if (recipe_keeps_softmax(t->recipe, layer)) continue;
        student_learn(a, job->lesson, layer, kv_head, t->w + at, job->learn ? t->g + at : NULL,
                      &job->loss, !job->learn, t->sums + (size_t)layer * (size_t)t->n_heads,
                      t->scratch[thread]);
    }
}

static void deal(struct training *t, const struct lesson *lesson, bool learn) {
    struct job job = {
        .t = t,
        .lesson = lesson,
        .learn = learn,
        .loss = {t->recipe->ce, t->recipe->mse, 1 / (float)t->recipe->accumulate},
    };
    team_run(t->team, work, &job);
}

void training_measure(struct training *t, const struct lesson *lesson) {
    deal(t, lesson, false);
}
void training_learn(struct training *t, const struct lesson *lesson) {
    deal(t, lesson, true);
}
void training_clear_sums(struct training *t) {
    memset(t->sums, 0, (size_t)t->n_layers * (size_t)t->n_heads * sizeof *t->sums);
}

/* ---- before the first step ---- */
static float largest(const float *x, size_t row, int n_rows, int n) {
    float most = 0;
    for (int r = 0; r < n_rows; r++)
        for (int i = 0; i < n; i++)
            if (fabsf(x[(size_t)r * row + (size_t)i]) > most)
                most = fabsf(x[(size_t)r * row + (size_t)i]);
    return most;
}

/* scale times the identity, or as much of it as there are columns (LoLCATs' zero-init). */
static void begin_map(const struct recipe *r, float *map, float most) {
    const struct attention_config *a = &r->attention;
    float scale = (float)r->init_scale;
    if (a->map == MAP_EXP && scale * most > MOST_AT_FIRST) scale = MOST_AT_FIRST / most;
    for (int i = 0; i < a->head_dim && i < a->features; i++)
        map[(size_t)i * (size_t)a->features + (size_t)i] = scale;
}

static void begin_layer(struct training *t, const struct lesson *l, int layer) {
    const struct attention_config *a = &t->recipe->attention;
    float *w = t->w + (size_t)layer * t->n_layer_params;
    size_t D = (size_t)a->head_dim, map = D * (size_t)a->features, q = (size_t)a->n_heads * D,
           kv = 2 * (size_t)a->n_kv_heads * D;
    const float *queries = l->q + (size_t)layer * (size_t)l->n_rows * q,
                *keys = l->kv + (size_t)layer * (size_t)l->n_tokens * kv;
    int group = a->n_heads / a->n_kv_heads;
    for (size_t h = 0; h < (size_t)a->n_heads; h++) {
        begin_map(t->recipe, w + h * map, largest(queries + h * D, q, l->n_rows, a->head_dim));
        w[student_mix(a) + h] = t->recipe->init_mix;
    }
    size_t states = a->key_map_per_query_head ? (size_t)a->n_heads : (size_t)a->n_kv_heads;
    for (size_t s = 0; s < states; s++) {
        size_t g = a->key_map_per_query_head ? s / (size_t)group : s;
        begin_map(t->recipe, w + student_map_k(a) + s * map,
                  largest(keys + g * D, kv, l->n_tokens, a->head_dim));
    }
}

void training_begin(struct training *t, const struct lesson *lesson) {
    for (int i = 0; i < t->n_layers; i++)
        begin_layer(t, lesson, i);
    if (!t->recipe->calibrate || t->recipe->attention.mixing != MIXING_UNIFIED) return;
    training_clear_sums(t);
    training_measure(t, lesson);
    size_t mix = student_mix(&t->recipe->attention);
    for (int i = 0; i < t->n_layers; i++)
        for (int h = 0; h < t->n_heads; h++) {
            const struct student_sums *s = &t->sums[i * t->n_heads + h];
            float *c = &t->w[(size_t)i * t->n_layer_params + mix + (size_t)h];
            if (s->n_gap > 0 && isfinite(s->gap)) *c += (float)(s->gap / s->n_gap);
        }
    training_clear_sums(t);
}

/* ---- a step ---- */
static void norm_layers(void *arg, int thread, int n_threads) {
    struct training *t = arg;
    for (int i = thread; i < t->n_layers; i += n_threads) {
        const float *g = t->g + (size_t)i * t->n_layer_params;
        double sum[4] = {0};
        for (size_t k = 0; k < t->n_layer_params; k++)
            sum[k % 4] += (double)g[k] * g[k];
        t->norms[i] = sqrt((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
}

static void step_layers(void *arg, int thread, int n_threads) {
    struct training *t = arg;
    const struct convert_kernels *use = convert_kernels();
    double rate = recipe_rate(t->recipe, t->step), n = (double)t->step + 1;
    float correct_m = (float)(1 / (1 - pow(ADAM_BETA1, n))),
          correct_v = (float)(1 / (1 - pow(ADAM_BETA2, n)));
    size_t mix = student_mix(&t->recipe->attention);
    for (int i = thread; i < t->n_layers; i += n_threads) {
        size_t at = (size_t)i * t->n_layer_params;
        float clip = t->norms[i] > CLIP ? (float)(CLIP / t->norms[i]) : 1;
        use->adam(t->w + at, t->m + at, t->v + at, t->g + at, mix, clip,
                  (float)(rate * t->recipe->lr), correct_m, correct_v);
        at += mix;
        use->adam(t->w + at, t->m + at, t->v + at, t->g + at, (size_t)t->n_heads, clip,
                  (float)(rate * t->recipe->lr_mix), correct_m, correct_v);
    }
}

enum err training_step(struct training *t, int *layer) {
    team_run(t->team, norm_layers, t);
    for (int i = 0; i < t->n_layers; i++)
        if (!isfinite(t->norms[i])) {
            *layer = i;
            return ERR_ARG;
        }
    team_run(t->team, step_layers, t);
    memset(t->g, 0, t->n_params * sizeof *t->g);
    t->step++;
    return OK;
}

double training_kl(const struct training *t, const struct student_sums *sums) {
    double kl = 0, n = 0;
    for (int i = 0; i < t->n_layers * t->n_heads; i++) {
        kl += sums[i].kl;
        n += sums[i].n_rows;
    }
    return n > 0 ? kl / n : 0;
}

double training_error(const struct training *t, const struct student_sums *sums) {
    double sum = 0;
    for (int i = 0; i < t->n_layers; i++) {
        double error = 0, energy = 0;
        for (int h = 0; h < t->n_heads; h++) {
            error += sums[i * t->n_heads + h].error;
            energy += sums[i * t->n_heads + h].energy;
        }
        sum += energy > 0 ? error / energy : 0;
    }
    return sum / (t->n_layers - t->recipe->n_softmax_layers);
}
