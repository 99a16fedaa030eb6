/* training.c - lessons dealt to the team, and the optimiser. */
#include "convert/training.h"

#include "convert/gpu_student.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static const double CLIP = 1;          /* gradient norm of a layer */
static const float MOST_AT_FIRST = 10; /* |u| of the first maps: exp is far from its cut at 30 */

static enum err new_device(struct training *t, struct gpu *gpu, int max_tokens, int max_rows) {
    bool *softmax = calloc((size_t)t->n_layers, sizeof *softmax);
    if (!softmax) return ERR_NOMEM;
    for (int i = 0; i < t->n_layers; i++)
        softmax[i] = recipe_keeps_softmax(t->recipe, i);
    enum err e = gpu_student_new(&t->device, gpu, &t->recipe->attention, t->n_layers, softmax,
                                 max_tokens, max_rows, 0);
    free(softmax);
    return e;
}

enum err training_new(struct training **out, const struct recipe *recipe, int n_layers,
                      struct team *team, struct gpu *gpu, int max_tokens, int max_rows) {
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
    if (all && gpu) all = new_device(t, gpu, max_tokens, max_rows) == OK;
    for (int i = 0; all && !gpu && i < team_size(team); i++)
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
    gpu_student_free(t->device);
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

/* ---- a device's parameters ---- */
const char *training_device_error(const struct training *t) {
    return t->device ? gpu_student_error(t->device) : "";
}

enum err training_fetch(struct training *t) {
    enum err e = t->ahead ? gpu_student_get(t->device, t->w, t->m, t->v) : OK;
    if (!e) t->ahead = false;
    return e;
}

void training_loaded(struct training *t) {
    t->behind = t->device != NULL;
    t->ahead = false;
}

void training_leave_device(struct training *t) {
    gpu_student_free(t->device);
    t->device = NULL;
}

static enum err send(struct training *t) {
    enum err e = t->behind ? gpu_student_put(t->device, t->w, t->m, t->v) : OK;
    if (!e) t->behind = false;
    return e;
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

static enum err deal(struct training *t, const struct lesson *lesson, bool learn) {
    struct job job = {
        .t = t,
        .lesson = lesson,
        .learn = learn,
        .loss = {t->recipe->ce, t->recipe->mse, 1 / (float)t->recipe->accumulate},
    };
    if (t->device) {
        enum err e = send(t);
        if (e) return e;
        gpu_lesson_plan(lesson->device, lesson); /* the part */
        return gpu_student_learn(t->device, lesson->device, learn, &job.loss, !learn, t->sums);
    }
    team_run(t->team, work, &job);
    return OK;
}

enum err training_measure(struct training *t, const struct lesson *lesson) {
    return deal(t, lesson, false);
}
enum err training_learn(struct training *t, const struct lesson *lesson) {
    return deal(t, lesson, true);
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

/* most_q [n_heads], most_k [n_kv_heads]: the largest |q| and |k| of the layer. */
static void begin_layer(struct training *t, int layer, const float *most_q, const float *most_k) {
    const struct attention_config *a = &t->recipe->attention;
    float *w = t->w + (size_t)layer * t->n_layer_params;
    size_t map = (size_t)a->head_dim * (size_t)a->features;
    int group = a->n_heads / a->n_kv_heads;
    for (size_t h = 0; h < (size_t)a->n_heads; h++) {
        begin_map(t->recipe, w + h * map, most_q[h]);
        w[student_mix(a) + h] = t->recipe->init_mix;
    }
    size_t states = a->key_map_per_query_head ? (size_t)a->n_heads : (size_t)a->n_kv_heads;
    for (size_t s = 0; s < states; s++) {
        size_t g = a->key_map_per_query_head ? s / (size_t)group : s;
        begin_map(t->recipe, w + student_map_k(a) + s * map, most_k[g]);
    }
}

/* Of every layer: most_q [n_layers][n_heads], most_k [n_layers][n_kv_heads]. */
static enum err find_largest(struct training *t, const struct lesson *l, float *most_q,
                             float *most_k) {
    const struct attention_config *a = &t->recipe->attention;
    size_t D = (size_t)a->head_dim, H = (size_t)a->n_heads, KV = (size_t)a->n_kv_heads;
    if (t->device) return gpu_student_largest(t->device, l->device, most_q, most_k);
    for (size_t i = 0; i < (size_t)t->n_layers; i++) {
        const float *queries = l->q + i * (size_t)l->n_rows * H * D,
                    *keys = l->kv + i * (size_t)l->n_tokens * 2 * KV * D;
        for (size_t h = 0; h < H; h++)
            most_q[i * H + h] = largest(queries + h * D, H * D, l->n_rows, a->head_dim);
        for (size_t g = 0; g < KV; g++)
            most_k[i * KV + g] = largest(keys + g * D, 2 * KV * D, l->n_tokens, a->head_dim);
    }
    return OK;
}

enum err training_begin(struct training *t, const struct lesson *lesson) {
    size_t layers = (size_t)t->n_layers, H = (size_t)t->n_heads,
           KV = (size_t)t->recipe->attention.n_kv_heads;
    float *most = calloc(layers * (H + KV), sizeof *most);
    if (!most) return ERR_NOMEM;
    float *most_k = most + layers * H;
    enum err e = find_largest(t, lesson, most, most_k);
    for (size_t i = 0; !e && i < layers; i++)
        begin_layer(t, (int)i, most + i * H, most_k + i * KV);
    free(most);
    training_loaded(t);
    if (e || !t->recipe->calibrate || t->recipe->attention.mixing != MIXING_UNIFIED) return e;
    training_clear_sums(t);
    if ((e = training_measure(t, lesson))) return e;
    size_t mix = student_mix(&t->recipe->attention);
    for (int i = 0; i < t->n_layers; i++)
        for (int h = 0; h < t->n_heads; h++) {
            const struct student_sums *s = &t->sums[i * t->n_heads + h];
            float *c = &t->w[(size_t)i * t->n_layer_params + mix + (size_t)h];
            if (s->n_gap > 0 && isfinite(s->gap)) *c += (float)(s->gap / s->n_gap);
        }
    training_clear_sums(t);
    training_loaded(t);
    return OK;
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

struct rates {
    float maps, mix, correct_m, correct_v;
};
static struct rates rates_of(const struct training *t, double done) {
    double rate = recipe_rate(t->recipe, (double)t->step + done), n = (double)t->n_updates + 1;
    return (struct rates){.maps = (float)(rate * t->recipe->lr),
                          .mix = (float)(rate * t->recipe->lr_mix),
                          .correct_m = (float)(1 / (1 - pow(ADAM_BETA1, n))),
                          .correct_v = (float)(1 / (1 - pow(ADAM_BETA2, n)))};
}

struct update {
    struct training *t;
    struct rates rates;
};
static void update_layers(void *arg, int thread, int n_threads) {
    struct training *t = ((const struct update *)arg)->t;
    const struct rates r = ((const struct update *)arg)->rates;
    const struct convert_kernels *use = convert_kernels();
    size_t mix = student_mix(&t->recipe->attention);
    for (int i = thread; i < t->n_layers; i += n_threads) {
        size_t at = (size_t)i * t->n_layer_params;
        float clip = t->norms[i] > CLIP ? (float)(CLIP / t->norms[i]) : 1;
        use->adam(t->w + at, t->m + at, t->v + at, t->g + at, mix, clip, r.maps, r.correct_m,
                  r.correct_v);
        at += mix;
        use->adam(t->w + at, t->m + at, t->v + at, t->g + at, (size_t)t->n_heads, clip, r.mix,
                  r.correct_m, r.correct_v);
    }
}

enum err training_update(struct training *t, double done, int *layer) {
    struct update update = {t, rates_of(t, done)};
    enum err e = OK;
    if (t->device)
        e = gpu_student_norms(t->device, t->norms);
    else
        team_run(t->team, norm_layers, t);
    if (e) return e;
    for (int i = 0; i < t->n_layers; i++)
        if (!isfinite(t->norms[i])) {
            *layer = i;
            return ERR_ARG;
        }
    if (t->device) {
        struct rates r = update.rates;
        gpu_student_step(t->device, r.maps, r.mix, r.correct_m, r.correct_v, CLIP);
        t->ahead = true;
    } else {
        team_run(t->team, update_layers, &update);
        memset(t->g, 0, t->n_params * sizeof *t->g);
    }
    t->n_updates++;
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
