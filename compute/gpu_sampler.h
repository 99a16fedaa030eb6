/* gpu_sampler.h - from rows of logits to tokens on a device: the twin of scheduler/sampler.h, same order, same draws.
 *
 * logits -> + bias -> penalties -> bans -> (temperature 0: argmax, ties to the lower id) -> temperature -> top_k -> top_p ->
 * min_p -> one draw with the uniform that the caller computed (sampler_uniform).  The kept set is drawn from in order of token
 * id.  Weights count in whole units of 2^-42 of the best token's, so that sums do not depend on their order.  A token depends
 * on its own row of logits, counts and parameters alone, to the bit. */
#ifndef URCHIN_COMPUTE_GPU_SAMPLER_H
#define URCHIN_COMPUTE_GPU_SAMPLER_H

#include "compute/gpu.h"
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { GPU_SAMPLER_EDITS = 512 }; /* biases and bans of a row */
enum { GPU_SAMPLER_TOP = 20 };    /* most logprobs of a row */

struct gpu_draw {            /* one token, plain data, uploaded as it is */
    int32_t row;             /* of the logits; several draws may read one */
    int32_t counts_row;      /* row of the counts table, or -1: no penalties */
    int32_t n_edits, first_edit; /* into the step's list of edits */
    float temperature, top_p, min_p;
    int32_t top_k;           /* 0: off */
    float repetition_penalty, presence_penalty, frequency_penalty;
    int32_t n_top;           /* logprobs wanted: -1 none, 0 the token's own, up to GPU_SAMPLER_TOP */
    int32_t record;          /* add the token to the counts row, as output */
    double uniform;          /* in [0, 1) */
};
struct gpu_edit {
    int32_t token;
    float bias; /* -INFINITY: banned (after the penalties); else added before them */
};
struct gpu_drawn {
    int32_t token;
    float logprob;                          /* log-softmax of the raw logits at token */
    int32_t top_token[GPU_SAMPLER_TOP];     /* n_top best, falling, ties to the lower id */
    float top_logprob[GPU_SAMPLER_TOP];
};

struct gpu_sampler;
/* ERR_NOMEM; ERR_ARG: a vocabulary of more than a million.  Device memory: 4 bytes x vocab_size x max_rows (adjusted logits), and the
 * counts: n_count_rows x vocab_size of 2 bytes on the device (bit 0 in the prompt, the rest times in the output,
 * at most 32767). */
enum err gpu_sampler_new(struct gpu_sampler **out, struct gpu *g, int vocab_size, int max_rows, int n_count_rows);
void gpu_sampler_free(struct gpu_sampler *s);
void gpu_sampler_clear_counts(struct gpu_sampler *s, int row);
void gpu_sampler_add_prompt(struct gpu_sampler *s, int row, const int32_t *tokens, int n); /* host tokens; queued */

/* Queues n draws, n <= max_rows: logits fp32 on the device, row r at logits + r * vocab_size; each draw names its row, and
 * several may read one.  No counts row twice among draws that record.  draws and edits are host memory (copied before return).
 * *drawn [n] is readable after gpu_wait(), until the next call. */
void gpu_sample(struct gpu_sampler *s, const float *logits, const struct gpu_draw *draws, int n, const struct gpu_edit *edits,
                int n_edits, const struct gpu_drawn **drawn);
/* The tokens of the last gpu_sample(), on the device [n]: a step queued behind it can read them without the host. */
const int32_t *gpu_sampler_tokens(const struct gpu_sampler *s);

#ifdef __cplusplus
}
#endif
#endif
