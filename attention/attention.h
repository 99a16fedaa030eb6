/* attention.h - attention over a constant-size memory: Hedgehog linear attention with exact keys, and softmax.
 *
 * For row n, query head h of kv head g = h / (n_heads / n_kv_heads), with window set W_n, sinks P and recall cache C_n
 * all exact, and L_n the rest of the past:
 *
 *   w_nj = exp(q_n.k_j / sqrt(D))                       j in W_n, P, C_n      (q, k with RoPE)
 *   w_nj = exp(c_h) phi_q(q'_n).phi_k(k'_j)             j in L_n              (mixing unified)
 *   y_n  = sum_j w_nj v_j / sum_j w_nj
 *   S [F][D] = sum_{j in L_n} phi_k(k'_j) v_j^T         z [F] = sum_{j in L_n} phi_k(k'_j)
 *
 * phi is one of feature_map.h; q', k' are q, k before RoPE (map_position none) or after it (rope).  Mixing lolcats scales
 * the exact terms by sigmoid(omega_h) exp(-max exact logit) instead.  Sources: Hedgehog arXiv:2402.04347 (map), LoLCATs
 * arXiv:2410.10254 eq. 7 (mixing, terraced window), LoLA arXiv:2505.23666 (recall cache).  Where we differ: docs/architecture.md.
 *
 * One code path serves prefill and decode.  A row's result depends on its sequence's tokens alone: never on
 * how a prompt is cut, on neighbours, slot or number of threads, to the bit.  One owner at a time: none of these functions runs beside
 * another of the same struct attention (they share its scratch).
 *
 * A slot is one contiguous block of attention_slot_bytes(): first the part that is the sequence (attention_state_bytes():
 * header, S, z, exact keys and values, cache positions), then what is derived from it: rotated keys, and the choice, S and z of the
 * next block, made ahead.  (The two S and z change places: saving finds the right one.) */
#ifndef URCHIN_ATTENTION_ATTENTION_H
#define URCHIN_ATTENTION_ATTENTION_H

#include "attention/rope.h"
#include "compute/team.h"
#include "config/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum attention_kind { ATTENTION_SOFTMAX, ATTENTION_HEDGEHOG };
enum feature_map { MAP_EXP, MAP_SOFTMAX2, MAP_JOINT_SOFTMAX }; /* paper; LoLCATs; fla */
enum window_rule { WINDOW_NONE, WINDOW_SLIDING, WINDOW_TERRACED };
enum mixing { MIXING_UNIFIED, MIXING_LOLCATS };
enum kv_type { KV_FP32, KV_BF16 };

struct attention_config {
    enum attention_kind kind;
    int n_heads, n_kv_heads, head_dim; /* H, G, D */
    enum kv_type kv_type;              /* exact keys and values, rounded before any use */
    int64_t max_seq_len;               /* softmax: rows of its cache.  Hedgehog: unused */
    /* the rest: ATTENTION_HEDGEHOG only */
    enum feature_map map;
    int features;                /* f projections; F = 2 f features [plus half | minus half] */
    bool key_map_per_query_head; /* state heads: n_heads, else n_kv_heads */
    enum window_rule window;
    int window_size;      /* w; 0 with WINDOW_NONE */
    int sinks;            /* 0 <= sinks <= w; 0 with WINDOW_NONE */
    int cache_size;       /* terraced only, else 0 */
    int cache_recent;     /* places of the cache chosen by error / (1 + distance / age) */
    int cache_age;        /* tokens, > 0 when any places are recent ones */
    int cache_fact_age; /* tokens: the other places are chosen by error / (1 + distance / fact age),
                           in fp32; 0: by error alone */
    int retrieval_size, retrieval_recent; /* the same two of retrieval heads (attention_weights), where there are any */
    int64_t horizon;      /* keys; 0: a plain sum */
    enum mixing mixing;
    bool map_before_rope; /* map_position none */
    int64_t max_distance; /* map_before_rope with RoPE only, else 0 */
};

/* Checks a configuration: ERR_FORMAT and one sentence naming the field, e.g. sinks with WINDOW_NONE. */
enum err attention_config_check(const struct attention_config *config, char *msg, size_t msg_len);

/* Per-layer parameters, fp32, borrowed for the life of the attention; NULL where the kind has none. */
struct attention_weights {
    const float *map_q;      /* [n_heads][D][f]: u = x W, x a row */
    const float *map_k;      /* [state heads][D][f] */
    const float *map_q_bias; /* [n_heads][f] or NULL */
    const float *map_k_bias; /* [state heads][f] or NULL */
    const float *mix;        /* [n_heads]: c_h (unified) or omega_h (lolcats) */
    /* [n_kv_heads]: the retrieval heads, which look single facts up wherever they stand (Wu et al. 2024, arXiv:2404.15574);
     * their cache has places of its own.  NULL: none.  Not a parameter that is learned, but it differs from layer to layer. */
    const bool *retrieval;
};

struct attention; /* one model's: configuration, layout, RoPE tables and scratch */

/* weights [n_layers] is copied, what it points to is borrowed; rope borrowed or NULL (no RoPE); team borrowed.
 * max_rows, max_runs bound a step. */
enum err attention_new(struct attention **out, const struct attention_config *config,
                       const struct attention_weights *weights, int n_layers,
                       const struct rope *rope, struct team *team, int max_rows, int max_runs);
void attention_free(struct attention *a);

/* ---- slots: room for one sequence each; memory is the caller's (64-byte aligned) ---- */
size_t attention_slot_bytes(const struct attention *a);
void attention_slot_clear(const struct attention *a, void *slot); /* position 0; cost: the header and S, z */
void attention_slot_copy(const struct attention *a, void *dst, const void *src); /* fork */
int64_t attention_slot_position(const struct attention *a, const void *slot); /* tokens read */

/* A saved state: attention_state_bytes(a) bytes (softmax: for position tokens; Hedgehog: the same for every position).
 * Loading checks every count against the configuration (ERR_FORMAT; the slot is then cleared), and rebuilds what is derived.
 * A loaded sequence goes on with the same bits as the saved one. */
size_t attention_state_bytes(const struct attention *a, int64_t position);
void attention_state_save(const struct attention *a, void *out, const void *slot);
enum err attention_state_load(const struct attention *a, void *slot, const void *state,
                              size_t bytes, char *msg, size_t msg_len);

/* ---- a step: one ragged batch through all layers ---- */
struct attention_run { /* rows first_row .. first_row + n_rows - 1 are the next tokens of one sequence */
    void *slot;
    int first_row, n_rows;
};

/* Fixes the runs of this step (copied) and computes what all layers share: angles of every row's position.
 * No slot may be in two runs. */
void attention_step_begin(struct attention *a, const struct attention_run *runs, int n_runs);

/* This layer comes after the team's next run: threads that wait meanwhile load what their first tasks read (team.h). */
void attention_expect(struct attention *a, int layer);

/* One layer: q [rows][n_heads][D], k and v [rows][n_kv_heads][D], all before RoPE, row strides in floats (they may lie in one
 * fused buffer), -> y [rows][n_heads * D] stride y_stride.  Folds, chooses the cache, appends, attends. */
void attention_layer(struct attention *a, int layer, float *y, size_t y_stride, const float *q,
                     size_t q_stride, const float *k, size_t k_stride, const float *v,
                     size_t v_stride);

/* After the last layer: the slots' positions advance by their runs' rows. */
void attention_step_end(struct attention *a);

/* ---- switches of evaluation and tests; between steps only ---- */
void attention_set_linear(struct attention *a, bool on); /* off: exact keys only (c_h = -60) */

/* Uses part / of of every head's cache, rounded down, which is at least its recent places (at first all: 1, 1).  A sequence that so
 * reads its text keeps, folds and forgets as with caches of that size, and leaves room for attention_state_add. */
void attention_set_cache_share(struct attention *a, int part, int of);

/* The memory of other sequences, added to that of dst, which goes on where it was:
 *
 *   S = s (S_0 + S_1 + ... + S_n)     z = s (z_0 + ... + z_n)     C = C_0, C_1, ... C_n side by side
 *   s = min(1, horizon / (N_0 + ... + N_n))
 *
 * N_i: the keys state i holds.  Cached keys keep the positions they had, ascending, of equals dst's first; so no source may have
 * read farther than dst.  A source's window and sinks are not added: what should be remembered lies two blocks before its end.
 * From here on dst counts keys by its own position, as before: exactly, once its own state has reached the horizon.  It is for
 * asking, not for saving: loading refuses a cache in which a position occurs twice.  A head whose places could hold every key that left
 * dst's window does without what was folded: it has all that was kept.
 *
 * srcs [n] are not dst.  ERR_ARG, nothing changed: not a terraced window, a source is farther than dst, no head
 * of dst has linear keys at its position with all places in use, or the places in use (attention_set_cache_share) do not hold all caches.  Cost: reading n + 1 memories.
 * Only with map_before_rope does a state know no positions.  What it is worth: docs/eval.md, `added`. */
enum err attention_state_add(const struct attention *a, void *dst, const void *const *srcs, int n);

/* Most places that a head has: the length of a cache set below. */
int attention_cache_most(const struct attention_config *config);

/* Imposes the cache sets of every sequence: sets [n_layers][n_kv_heads][n_blocks][attention_cache_most], positions in the cache while
 * block b is processed, -1 for none; borrowed until NULL is given.  Blocks past n_blocks choose as usual. */
void attention_impose_cache(struct attention *a, const int64_t *sets, int n_blocks);

/* Parameters of a layer as attention reads them: the columns of its maps (and biases) are padded with zeros to a multiple of 16. */
const struct attention_weights *attention_weights_of(const struct attention *a, int layer);

/* Keys that left a head's exact set by the time the row at this position is answered (those the horizon has faded count whole);
 * layer -1: the most of all heads. */
int64_t attention_linear_keys(const struct attention *a, int layer, int kv_head, int64_t position);

/* What the horizon multiplies the head's S and z by just before the row at this position is answered, after what left the exact set
 * was folded: 1 for most rows. */
float attention_forgetting(const struct attention *a, int layer, int kv_head, int64_t position);

/* The cache of one layer and kv head as it stands: ascending positions into out [attention_cache_most]; returns how many. */
int attention_cache_positions(const struct attention *a, const void *slot, int layer, int kv_head,
                              int64_t *out);

/* Scores e_j of the newest choice at this layer and kv head, for tests: candidates' positions and errors, ascending positions.
 * Computes them anew from the slot (whose next row must begin a block).  Returns the number of candidates. */
int attention_cache_scores(const struct attention *a, const void *slot, int layer, int kv_head,
                           int64_t *positions, float *errors);

#endif
