/* gpu_kernels.h - what gpu_attention.c hands to the kernels: plain structs by value, and the functions that launch them. */
#ifndef URCHIN_ATTENTION_GPU_KERNELS_H
#define URCHIN_ATTENTION_GPU_KERNELS_H

#include "compute/gpu.h"
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One layer and kv head of a slot: heads differ in the places of their cache (internal.h, struct room). */
struct gpu_room {
    int cache, recent;                              /* places; of them for recent keys */
    size_t states, keys, values, positions, turned; /* offsets into a slot */
};

/* One model's attention: configuration, layout of a slot, and where the slots are.  Field meanings: attention.h, internal.h. */
struct gpu_shape {
    int n_heads, n_kv_heads, group, state_heads; /* state_heads: states of a kv head, 1 or group */
    int head_dim, lanes, f, f_lanes, features, phi_lanes;
    int kind, map, mixing, window, kv_bf16;      /* enums of attention.h; kv_bf16: exact keys and values are bf16, not fp32 */
    int window_size, sinks, ring, cache_age, cache_fact_age;
    int most_cache, most_entries;                /* of any head: what scratch and lists are made for */
    int64_t horizon, max_distance, max_seq_len;
    int map_before_rope, rope;                   /* rope: there is one */
    int turned;                                  /* rotated copies of keys lie apart from the keys */
    int exact;                                   /* read both planes, no bf16 products */
    char *slots;
    size_t slot_stride;
    const struct gpu_room *rooms;                /* [layers][n_kv_heads], on the device as all below */
    size_t S_floats, state_floats;               /* of one state head */
    const double *theta;                         /* [head_dim / 2] radians per position, or NULL */
};

/* Lays n heads out from byte `at` of a slot on: all states, then all keys and so on; turned ones last.  rooms[].cache is given.
 * Returns where they end. */
size_t gpu_place_rooms(const struct gpu_shape *shape, struct gpu_room *rooms, size_t n, size_t at);

struct gpu_layer { /* one layer's parameters, fp32, on the device; NULL where the kind has none */
    int layer;
    const float *map_q;      /* [n_heads][D][f_lanes] */
    const float *map_k;      /* [n_kv_heads * state_heads][D][f_lanes] */
    const float *map_q_bias; /* [n_heads][f_lanes] */
    const float *map_k_bias;
    const float *mix;        /* [n_heads] */
};

struct gpu_segment { /* consecutive rows of one sequence; with a terraced window, within one block */
    int slot;        /* < 0: padding */
    int first_row, n_rows;
    int64_t position; /* of its first row */
};

struct gpu_rows { /* struct gpu_attention_rows, and the angles of each row */
    const float *q, *k, *v;
    size_t q_row, k_row, v_row;
    void *y;
    size_t y_row;
    int y_bf16;
    const float *cosines, *sines;         /* [rows][D / 2] */
    const float *far_cosines, *far_sines; /* [D / 2] of max_distance */
};

/* Angles of every row of the segments, in double, rounded once: cosines, sines [rows][D / 2]. */
void gpu_launch_angles(struct gpu *g, const struct gpu_shape *shape, const struct gpu_segment *segments, int n_segments,
                       int max_rows, float *cosines, float *sines);

/* The segments' keys and values enter the memory (terraced, softmax) where no block begins or all have begun.  max_rows: the longest segment. */
void gpu_launch_store(struct gpu *g, const struct gpu_shape *shape, int layer, const struct gpu_segment *segments,
                      int n_segments, int max_rows, const struct gpu_rows *rows);

/* y of every row.  Any kind, map, mixing and shape; fp32 products. */
void gpu_launch_answer(struct gpu *g, const struct gpu_shape *shape, const struct gpu_layer *layer,
                       const struct gpu_segment *segments, int n_segments, int max_rows, const struct gpu_rows *rows);

/* Windows of one row a step (sliding, none): append and answer row after row of each segment, in one kernel. */
void gpu_launch_row_by_row(struct gpu *g, const struct gpu_shape *shape, const struct gpu_layer *layer,
                           const struct gpu_segment *segments, int n_segments, const struct gpu_rows *rows);

/* gpu_launch_answer() for the shapes that matter, fast: D = 64 or 128, F a multiple of 32 up to 256, terraced or softmax, bf16 keys, not
 * exact.  False: not such a shape, nothing was done. */
bool gpu_launch_decode(struct gpu *g, const struct gpu_shape *shape, const struct gpu_layer *layer,
                       const struct gpu_segment *segments, int n_segments, const struct gpu_rows *rows);
bool gpu_launch_prefill(struct gpu *g, const struct gpu_shape *shape, const struct gpu_layer *layer,
                        const struct gpu_segment *segments, int n_segments, int max_rows, const struct gpu_rows *rows);

/* ---- blocks of a terraced window that begin: memory.c, begin_block() ----
 *
 * What block b keeps and folds follows from what block b - 1 did: only that is serial.  A piece is consecutive rows of one
 * sequence, or none: then the next row begins a block that is to begin.  Its blocks are numbered in waves, first those that
 * are first in their piece, and each ends as a snapshot of what its rows see: so rows of all blocks are answered at once, from
 * slots that hold one layer, and the last block's becomes the slot.
 *
 *   prepare   features and values of all keys that may be folded
 *   recall    before the first wave, for pieces whose first block begins: how badly its candidates are recalled
 *   wave      each of its blocks chooses the cache, folds the rest into S, and scores the candidates of the block after it
 *   place     exact keys and values of every block
 *   commit    the slots */
struct gpu_piece {
    int slot, first_row, n_rows;
    int64_t position; /* of its first row */
    int64_t oldest;   /* the first position that candidates may have but for the cache's; all of them are in the ring or rows */
    int first_key, n_keys; /* of the scratch: the largest cache, then so many positions as are candidates within the piece */
    int last_block;
};
struct gpu_block {
    struct gpu_segment segment;
    int piece, previous; /* previous: of the piece, -1: the slot is what there was before */
    int begins, more;    /* it chooses and folds; the block after it in the piece does */
};
struct gpu_chain {
    struct gpu_shape shape, snapshot; /* snapshot: slots that hold one layer, n_layers * n_blocks of them */
    const struct gpu_layer *layers;   /* of the model, on the device */
    int first_layer, n_layers;
    int least_cache, most_cache; /* of these layers' heads */
    const struct gpu_piece *pieces; /* on the device, as blocks */
    const struct gpu_block *blocks;
    int n_pieces, n_blocks, n_keys; /* n_keys: of all pieces */
    float *phi, *values, *errors;
    int *lists;
};
/* What a chain points to besides, in bytes: phi and values for each key and layer; errors for each piece and layer; lists for
 * each snapshot. */
size_t gpu_chain_phi_bytes(const struct gpu_shape *shape);
size_t gpu_chain_value_bytes(const struct gpu_shape *shape);
size_t gpu_chain_error_bytes(const struct gpu_shape *shape);
size_t gpu_chain_list_bytes(const struct gpu_shape *shape);
/* A block's shared memory holds what a wave keeps of its candidates. */
bool gpu_chain_fits(const struct gpu_info *device, const struct gpu_shape *shape);
void gpu_launch_prepare(struct gpu *g, const struct gpu_chain *chain, int most_keys, const struct gpu_rows *rows);
void gpu_launch_recall(struct gpu *g, const struct gpu_chain *chain, int n_blocks);
void gpu_launch_wave(struct gpu *g, const struct gpu_chain *chain, int wave, int first_block, int n_blocks);
void gpu_launch_place(struct gpu *g, const struct gpu_chain *chain, const struct gpu_rows *rows);
void gpu_launch_commit(struct gpu *g, const struct gpu_chain *chain);

/* Saved states: the S of every state head of a slot, fp32 at `whole` (a slot's bytes) <-> planes at `planes` (another's). */
void gpu_launch_split(struct gpu *g, const struct gpu_shape *shape, int n_layers, void *planes, const void *whole);
void gpu_launch_join(struct gpu *g, const struct gpu_shape *shape, int n_layers, void *whole, const void *planes);

/* The rotated copies of a slot's keys, made anew from the keys of a sequence that has read so many tokens. */
void gpu_launch_turn(struct gpu *g, const struct gpu_shape *shape, int n_layers, int slot, int64_t tokens);

#ifdef __cplusplus
}
#endif
#endif
