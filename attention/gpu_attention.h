/* gpu_attention.h - attention on a device: attention.h's twin, same equations, same choices, same saved states.
 *
 * A slot on the device is laid out as attention.h's slot, but for the states: a state head's S is stored as two planes of
 * 16-bit halves, which together are the same fp32 numbers:
 *
 *   hi = (u + 0x8000) >> 16  (bf16, rounded)      lo = u & 0xffff      u = ((hi - (lo >> 15)) << 16) | lo
 *
 * so that reading steps, all but one in w, move only hi.  With `exact` both are read always, and no product is rounded to
 * bf16: the CPU's results but for the order of sums.  Saved states are the CPU's: either goes on with the other's.
 *
 * Rows are of two sorts, which take different kernels: those of prompts and those generated one by one.  A row's result depends on
 * its sequence's tokens and on where its prompt ended, never on how the prompt was cut, on neighbours or slot. */
#ifndef URCHIN_ATTENTION_GPU_ATTENTION_H
#define URCHIN_ATTENTION_GPU_ATTENTION_H

#include "attention/attention.h"
#include "compute/gpu.h"

struct gpu_attention;

/* twin: the CPU's attention of the same model (one row, one run are enough): configuration, weights, RoPE and layout come
 * from it; borrowed for life.  ERR_NOMEM names how many slots would fit. */
enum err gpu_attention_new(struct gpu_attention **out, struct gpu *g, struct attention *twin, int n_slots, int max_rows,
                           int max_runs, bool exact, char *msg, size_t msg_len);
void gpu_attention_free(struct gpu_attention *a);
size_t gpu_attention_slot_bytes(const struct attention *twin); /* device memory of one slot */

/* ---- slots 0 .. n_slots - 1; between steps ---- */
void gpu_attention_slot_clear(struct gpu_attention *a, int slot);
void gpu_attention_slot_copy(struct gpu_attention *a, int dst, int src);
int64_t gpu_attention_slot_position(const struct gpu_attention *a, int slot);
enum err gpu_attention_slot_save(struct gpu_attention *a, int slot, void *out); /* attention_state_bytes(twin, position); waits */
enum err gpu_attention_slot_load(struct gpu_attention *a, int slot, const void *state, size_t bytes, char *msg,
                                 size_t msg_len); /* checked as attention_state_load does; waits */

/* ---- a step: generated rows, or rows of prompts ---- */
struct gpu_attention_run {
    int slot, first_row, n_rows;
};
struct gpu_attention_rows { /* on the device; row strides in elements */
    const float *q, *k, *v; /* [rows][heads][D], before RoPE */
    size_t q_row, k_row, v_row;
    void *y; /* [rows][n_heads D]: bf16 when y_bf16, else fp32 */
    size_t y_row;
    bool y_bf16;
};

/* begin plans the step in host memory that queued copies read: the next begin of the same sort comes after gpu_wait().
 *
 * Generated rows: run i is row i, one row of slots[i]; slots[i] < 0 and rows from n on are padding: nothing is read or
 * written but zeros in y.  bucket: at most the least power of two from max_runs on.  begin queues the upload of what the step
 * needs, and in all layers what rows at the start of a block do to the memory; layer may be recorded in a graph and replayed
 * after another begin with the same bucket.  end advances the positions. */
void gpu_attention_generated_begin(struct gpu_attention *a, const int *slots, int n, int bucket);
void gpu_attention_generated_layer(struct gpu_attention *a, int layer, const struct gpu_attention_rows *rows);
void gpu_attention_generated_end(struct gpu_attention *a);

/* Rows of prompts, n_runs runs of any length. */
void gpu_attention_prompt_begin(struct gpu_attention *a, const struct gpu_attention_run *runs, int n_runs);
void gpu_attention_prompt_layer(struct gpu_attention *a, int layer, const struct gpu_attention_rows *rows);
void gpu_attention_prompt_end(struct gpu_attention *a);

/* The cache of one layer and kv head as it stands, for tests; waits.  As attention_cache_positions(). */
int gpu_attention_cache_positions(struct gpu_attention *a, int slot, int layer, int kv_head, int64_t *out);

#endif
