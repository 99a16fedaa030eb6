/* draw.c - who draws a step's tokens: the device that has the logits, or the sampler here.
 *
 * Where the model draws, every choice whose row of logits comes in a step gets one draw: a choice that generates, and all choices
 * of a request whose prompt ends in the step (they read one row).  Logits then stay on the device, but for requests that
 * score their prompts or edit more logits than a draw may. */
#include "scheduler/internal.h"

#include <math.h>
#include <stdlib.h>

/* Decided by what was asked alone: counts of a choice are kept in one place. */
static bool on_device(const struct sched *s, const struct request *r) {
    return s->draws && r->asked.sampling.n_bias + r->n_ends <= GPU_SAMPLER_EDITS &&
           r->asked.n_logprobs <= GPU_SAMPLER_TOP;
}

enum err sched_draws_new(struct sched *s) {
    size_t n = (size_t)s->info->n_slots;
    if (!model_draws(s->options.model)) return OK;
    s->draws = malloc(n * sizeof *s->draws);
    s->edits = malloc(n * GPU_SAMPLER_EDITS * sizeof *s->edits);
    return s->draws && s->edits ? OK : ERR_NOMEM;
}

void sched_draws_free(struct sched *s) {
    free(s->draws);
    free(s->edits);
}

static void plan_draw(struct sched *s, struct sched_plan *plan, struct request *r, int index,
                      int row) {
    const struct sampling *how = &r->asked.sampling;
    struct choice *c = &r->choices[index];
    struct gpu_draw *d = &s->draws[plan->draws.n++];
    *d = (struct gpu_draw){.row = row,
                           .counts_row = c->counts ? c->slot : -1,
                           .first_edit = plan->draws.n_edits,
                           .temperature = how->temperature,
                           .top_p = how->top_p,
                           .min_p = how->min_p,
                           .top_k = how->top_k > 0 ? how->top_k : 0,
                           .repetition_penalty = how->repetition_penalty,
                           .presence_penalty = how->presence_penalty,
                           .frequency_penalty = how->frequency_penalty,
                           .n_top = !request_scores(r)         ? -1
                                    : r->asked.n_logprobs > 0 ? r->asked.n_logprobs
                                                              : 0,
                           .record = c->counts != NULL};
    if (how->temperature > 0)
        d->uniform = sampler_uniform(how->seed, (uint32_t)index, (uint64_t)c->n_generated);
    struct gpu_edit *e = s->edits + plan->draws.n_edits;
    for (int i = 0; i < how->n_bias; i++)
        *e++ = (struct gpu_edit){how->bias[i].token, how->bias[i].bias};
    for (int i = 0; c->n_generated < r->asked.min_tokens && i < r->n_ends; i++)
        *e++ = (struct gpu_edit){r->ends[i], -INFINITY};
    d->n_edits = (int)(e - s->edits) - d->first_edit;
    plan->draws.n_edits += d->n_edits;
}

/* Every choice of r goes on from this row, the prompt's last. */
static void plan_beginning(struct sched *s, struct sched_plan *plan, struct request *r, int row) {
    if (r->max_tokens == 0) return;
    for (int i = 0; i < r->asked.best_of; i++) {
        const struct choice *c = &r->choices[i];
        if (c->counts)
            model_count_prompt(s->options.model, c->slot, r->asked.prompt, (int)r->asked.n_prompt);
        plan_draw(s, plan, r, i, row);
    }
}

struct sched_plan sched_plan_draws(struct sched *s, int n_runs) {
    struct sched_plan plan = {.draws = {.draws = s->draws, .edits = s->edits}};
    int row = 0;
    for (int i = 0; i < n_runs; i++) {
        const struct model_run *run = &s->runs[i];
        struct request *r = s->owners[i].request;
        struct choice *c = s->owners[i].choice;
        bool ends = !c && r->n_read + (size_t)run->n_rows == r->asked.n_prompt;
        row += run->n_logits;
        if (!c && r->prompt_tokens) plan.wants_logits = true;
        if (!c && !ends) continue;
        if (!on_device(s, r))
            plan.wants_logits = true;
        else if (c)
            plan_draw(s, &plan, r, (int)(c - r->choices), row - 1);
        else
            plan_beginning(s, &plan, r, row - 1);
    }
    return plan;
}

int32_t sched_draw(struct sched *s, struct request *r, struct choice *c, struct sched_rows *from,
                   float *logprob) {
    const struct sched_request *asked = &r->asked;
    *logprob = NAN;
    if (on_device(s, r)) {
        const struct gpu_drawn *drawn = from->drawn++;
        if (request_scores(r)) {
            *logprob = drawn->logprob;
            for (int i = 0; i < asked->n_logprobs; i++)
                r->tops[i] =
                    (struct token_logprob){drawn->top_token[i], drawn->top_logprob[i]};
        }
        return drawn->token;
    }
    int n_banned = c->n_generated < asked->min_tokens ? r->n_ends : 0;
    int32_t token = sample(s->sampler, from->logits, &asked->sampling, c->counts, r->ends, n_banned,
                           (int)(c - r->choices), c->n_generated);
    if (request_scores(r))
        *logprob = sampler_logprobs(s->sampler, from->logits, token, r->tops, asked->n_logprobs);
    if (c->counts) token_counts_add_output(c->counts, token);
    return token;
}
