/* sampler.h - from a row of logits to a token, as users know it from vLLM and llama-server.
 *
 * Order: logit_bias, repetition / presence / frequency penalties, min_tokens mask, then (temperature 0: argmax, ties to the
 * lower id) temperature, top_k, top_p, min_p, one draw: of the tokens kept, in order of id, the first at which the sum of
 * weights passes uniform times their total, so that a device, which does not sort, draws the same.  Logprobs reported are
 * log-softmax of the raw logits, before all of this (vLLM's default).  Randomness is counter-based: the draw for token i of a
 * request is a function of (seed, choice, i) alone, so the same request gives the same tokens whatever else runs. */
#ifndef URCHIN_SCHEDULER_SAMPLER_H
#define URCHIN_SCHEDULER_SAMPLER_H

#include "config/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct logit_bias { int32_t token; float bias; };

struct sampling {
    float temperature;        /* >= 0; 0 is greedy */
    float top_p;              /* (0, 1], 1 off */
    int top_k;                /* 0 or -1: off */
    float min_p;              /* [0, 1], 0 off: drops p < min_p * p_max */
    float repetition_penalty; /* > 0, 1 off: over prompt and output (Keskar et al. 2019) */
    float presence_penalty, frequency_penalty; /* [-2, 2], 0 off: over output */
    uint64_t seed;
    const struct logit_bias *bias; /* [n_bias], distinct tokens */
    int n_bias;
};
void sampling_init(struct sampling *s); /* temperature 1, everything else off, seed 0 */

/* Per-sequence memory of what was read and written, for penalties: counts by token id. */
struct token_counts;
enum err token_counts_new(struct token_counts **out, int vocab_size);
void token_counts_free(struct token_counts *c);
void token_counts_clear(struct token_counts *c); /* O(distinct tokens) */
void token_counts_copy(struct token_counts *dst, const struct token_counts *src);
void token_counts_add_prompt(struct token_counts *c, int32_t token);
void token_counts_add_output(struct token_counts *c, int32_t token);

/* The draw itself, in [0, 1): Philox4x32-10 of (seed, choice, index). */
double sampler_uniform(uint64_t seed, uint32_t choice, uint64_t index);

struct sampler; /* scratch for one vocabulary; one per scheduler thread */
enum err sampler_new(struct sampler **out, int vocab_size);
void sampler_free(struct sampler *s);

/* Draws token number index (0, 1, ... of this choice).  counts may be NULL when no penalty is set.
 * banned [n_banned]: tokens that must not come (end of text before min_tokens, ignore_eos keeps them allowed). */
int32_t sample(struct sampler *s, const float *logits, const struct sampling *how,
               const struct token_counts *counts, const int32_t *banned, int n_banned, int choice,
               int64_t index);

struct token_logprob { int32_t token; float logprob; };
/* Log-probability of token, and the n_top best (descending, ties to the lower id) into top; raw logits. */
/* NaN logits count as -inf, so may the result be; n_top beyond the vocabulary leaves the rest of top untouched. */
float sampler_logprobs(struct sampler *s, const float *logits, int32_t token,
                       struct token_logprob *top, int n_top);

#endif
