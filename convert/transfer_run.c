/* transfer_run.c - stage 1 of a conversion: packs, steps, and what can go wrong. */
#include "convert/conversion.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* The same few packs before and after, so that the two compare. */
static enum err probe(struct conversion *c, struct student_sums *out) {
    struct training *t = c->run.training;
    training_clear_sums(t);
    c->run.share = 0;
    for (int i = 0; i < PROBES; i++) {
        struct pack pack;
        struct lesson lesson;
        double share;
        enum err e = conversion_read(c, PACK_PROBE, i, false, &pack, &lesson, &share);
        if (e) return e;
        e = training_measure(t, &lesson);
        pack_free(&pack);
        if (e) return conversion_learned(c, e);
        c->run.share += share / PROBES;
    }
    memcpy(out, t->sums, (size_t)t->n_layers * (size_t)t->n_heads * sizeof *out);
    training_clear_sums(t);
    return OK;
}

enum err transfer_begin(struct conversion *c) {
    struct pack pack;
    struct lesson lesson;
    double share;
    enum err e = conversion_read(c, PACK_CALIBRATE, 0, false, &pack, &lesson, &share);
    if (e) return e;
    e = training_begin(c->run.training, &lesson);
    pack_free(&pack);
    if (e) return conversion_learned(c, e);
    if ((e = probe(c, c->run.before))) return e;
    double kl = training_kl(c->run.training, c->run.before);
    if (!isfinite(kl))
        return FAIL(c, ERR_ARG,
                    "the maps overflow before the first step: try a smaller --init-scale than %g",
                    c->run.recipe.init_scale);
    return OK;
}

/* Means of the last few steps of the curve. */
static double recent_kl(const struct run *run, int64_t most, int64_t *n) {
    double sum = 0;
    int64_t step = run->training->step, from = step > most ? step - most : 0;
    for (int64_t i = from; i < step; i++)
        sum += run->curve[i].kl;
    *n = step - from;
    return sum / (double)(step - from);
}

static enum err check_progress(struct conversion *c) {
    enum { RECENT = 16 };
    int64_t n;
    double kl = recent_kl(&c->run, RECENT, &n),
           begun = c->run.share * training_kl(c->run.training, c->run.before);
    if (n < RECENT || kl <= 2 * begun + 1) return OK;
    return FAIL(
        c, ERR_ARG,
        "the divergence from the base has grown from %.3f to %.3f by step %lld, so training "
        "was stopped; %s/checkpoint is from before. Try a lower --lr than %g in another "
        "--out",
        begun, kl, (long long)c->run.training->step, c->folder, c->run.recipe.lr);
}

static enum err no_number(struct conversion *c, int layer) {
    return FAIL(c, ERR_ARG,
                "step %lld: the gradient of layer %d is no number, so training was stopped; "
                "%s/checkpoint is from before. Try a lower --lr than %g in another --out",
                (long long)c->run.training->step, layer, c->folder, c->run.recipe.lr);
}

/* *norm: the gradient's, mean over layers. */
static enum err update(struct conversion *c, double done, double *norm) {
    const struct training *t = c->run.training;
    int layer = 0;
    enum err e = training_update(c->run.training, done, &layer);
    if (e == ERR_DEVICE) return conversion_learned(c, e);
    if (e) return no_number(c, layer);
    *norm = 0;
    for (int i = 0; i < t->n_layers; i++)
        *norm += t->norms[i] / (t->n_layers - c->run.recipe.n_softmax_layers);
    return OK;
}

/* All rows at once; or a part of them at a time, spread over the sequence, the maps changed after
 * each. */
static enum err learn(struct conversion *c, struct lesson *lesson, struct point *point) {
    int rows = c->run.recipe.update_rows, n = rows ? (lesson->n_rows + rows - 1) / rows : 0;
    if (n <= 1) n = 1;
    lesson->n_parts = n;
    for (lesson->part = 0; lesson->part < n; lesson->part++) {
        double norm;
        enum err e = training_learn(c->run.training, lesson);
        if (e) return conversion_learned(c, e);
        if (!rows) return OK; /* the step's gradient is not whole yet */
        if ((e = update(c, (double)lesson->part / n, &norm))) return e;
        point->norm += norm / n;
    }
    return OK;
}

static enum err step(struct conversion *c) {
    const struct recipe *r = &c->run.recipe;
    struct training *t = c->run.training;
    struct point point = {0};
    for (int a = 0; a < r->accumulate; a++) {
        int64_t number = t->step * r->accumulate + a;
        struct pack pack;
        struct lesson lesson;
        double share;
        enum err e = conversion_read(c, PACK_TRAIN, number, conversion_is_long(c, number), &pack,
                                     &lesson, &share);
        if (e) return e;
        training_clear_sums(t);
        e = learn(c, &lesson, &point);
        if (e) {
            pack_free(&pack);
            return e;
        }
        point.kl += share * training_kl(t, t->sums) / r->accumulate;
        point.error += training_error(t, t->sums) / r->accumulate;
        point.tokens += pack.n;
        pack_free(&pack);
    }
    if (!r->update_rows) {
        enum err e = update(c, 0, &point.norm);
        if (e) return e;
    }
    if (!isfinite(point.kl)) return no_number(c, 0);
    if (r->mse <= 0) point.error = NAN;
    c->run.curve[t->step++] = point;
    return check_progress(c);
}

enum err transfer_run(struct conversion *c) {
    struct run *run = &c->run;
    bool told_memory = false, stop = false;
    double begun = conversion_now();
    int64_t first_step = run->training->step, n;
    while (run->training->step < run->recipe.steps) {
        enum err e = step(c);
        if (e) return e;
        int64_t done = run->training->step;
        bool all_lengths =
            !run->recipe.long_every || done * run->recipe.accumulate >= run->recipe.long_every;
        if (!told_memory && all_lengths) {
            conversion_tell_memory();
            told_memory = true;
        }
        e = conversion_after_step(c, done, run->recipe.steps, first_step, begun,
                                  "attention transfer", recent_kl(run, 10, &n),
                                  recipe_rate(&run->recipe, done - 1) * run->recipe.lr, &stop);
        if (e || stop) return e;
    }
    enum err e = training_fetch(run->training);
    if (e) return conversion_learned(c, e);
    if (run->transferred) return OK;
    e = probe(c, run->after);
    run->transferred = !e;
    return e;
}
