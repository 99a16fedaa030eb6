/* fine_run.c - stage 2 of a conversion: packs, steps, and what can go wrong. */
#include "convert/conversion.h"

#include <math.h>
#include <stdio.h>

static enum err probe(struct conversion *c, double *loss) {
    struct fine_sums sums = {0};
    for (int i = 0; i < PROBES; i++) {
        struct pack pack;
        enum err e = conversion_pack(c, PACK_PROBE, i, false, &pack);
        if (e) return e;
        e = finetune_measure(c->run.fine, &pack, &sums);
        pack_free(&pack);
        if (e) return FAIL(c, e, "out of memory");
    }
    *loss = sums.weight > 0 ? sums.loss / sums.weight : 0;
    return OK;
}

static enum err set_up(struct conversion *c) {
    struct run *run = &c->run;
    enum err e = base_open(&c->base, c->settings->model, c->msg, c->msg_len);
    if (!e)
        e = finetune_new(&run->fine, &run->recipe, c->base, model_rope(c->model), c->team,
                         run->training->w, c->max_tokens, c->msg, c->msg_len);
    if (!e && run->fine_begun) return checkpoint_load_fine(run, c->msg, c->msg_len);
    if (!e) e = probe(c, &run->fine_before);
    if (!e && !isfinite(run->fine_before))
        e = FAIL(c, ERR_ARG,
                 "the converted model's logits are no numbers, so there is nothing to fine-tune");
    return e ? e : conversion_save(c);
}

/* Mean loss of the last few steps. */
static double recent(const struct run *run, int64_t most, int64_t *n) {
    double sum = 0;
    int64_t step = run->fine->step, from = step > most ? step - most : 0;
    for (int64_t i = from; i < step; i++)
        sum += run->fine_curve[i].loss;
    *n = step - from;
    return sum / (double)(step - from);
}

static enum err step(struct conversion *c) {
    enum { RECENT = 16 };
    struct run *run = &c->run;
    struct finetune *f = run->fine;
    const struct finetune_recipe *r = &run->recipe.finetune;
    struct fine_point point = {0};
    struct fine_sums sums = {0};
    for (int a = 0; a < r->accumulate; a++) {
        struct pack pack;
        int64_t number = f->step * r->accumulate + a;
        enum err e =
            conversion_pack(c, PACK_FINETUNE, number, conversion_is_long(c, number), &pack);
        if (e) return e;
        e = finetune_learn(f, &pack, &sums);
        point.tokens += pack.n;
        pack_free(&pack);
        if (e) return FAIL(c, e, "out of memory");
    }
    point.loss = sums.weight > 0 ? sums.loss / sums.weight : 0;
    if (!isfinite(point.loss) || finetune_step(f))
        return FAIL(c, ERR_ARG,
                    "step %lld of fine-tuning: its loss or gradient is no number, so training was "
                    "stopped; %s/checkpoint is "
                    "from before. Try a lower --finetune-lr than %g in another --out",
                    (long long)f->step + 1, c->folder, r->lr);
    point.norm = f->norm;
    run->fine_curve[f->step - 1] = point;
    int64_t n;
    double loss = recent(run, RECENT, &n);
    if (n < RECENT || loss <= 2 * run->fine_before + 1) return OK;
    return FAIL(c, ERR_ARG,
                "the loss of fine-tuning has grown from %.3f to %.3f by step %lld, so training was "
                "stopped; %s/checkpoint is "
                "from before. Try a lower --finetune-lr than %g in another --out",
                run->fine_before, loss, (long long)f->step, c->folder, r->lr);
}

enum err fine_run(struct conversion *c) {
    struct run *run = &c->run;
    const struct finetune_recipe *r = &run->recipe.finetune;
    bool told_memory = false;
    enum err e = set_up(c);
    if (e) return e;
    double begun = conversion_now();
    int64_t first_step = run->fine->step, n;
    while (run->fine->step < r->steps) {
        if ((e = step(c))) return e;
        int64_t done = run->fine->step;
        double rate = recipe_rate_of(&run->recipe, r->steps, done - 1) * r->lr;
        bool stop = false;
        if (!told_memory &&
            (!run->recipe.long_every || done * r->accumulate >= run->recipe.long_every)) {
            conversion_tell_memory();
            told_memory = true;
        }
        e = conversion_after_step(c, done, r->steps, first_step, begun, "fine-tuning",
                                  recent(run, 10, &n), rate, &stop);
        if (e || stop) return e;
    }
    return probe(c, &run->fine_after);
}
