/* gpu_internal.h - what the host's files of attention on a device share: gpu_attention.c (steps), gpu_plan.c (prompts cut up),
 * gpu_room.c (where heads lie) and gpu_slot.c (slots). */
#ifndef URCHIN_ATTENTION_GPU_INTERNAL_H
#define URCHIN_ATTENTION_GPU_INTERNAL_H

#include "attention/gpu_attention.h"
#include "attention/gpu_kernels.h"
#include "attention/internal.h"

/* Arrays that the host plans, page-locked, and their copies on the device. */
struct gpu_plan {
    struct gpu_segment *segments, *segments_at;
    struct gpu_piece *pieces, *pieces_at;
    struct gpu_block *blocks, *blocks_at;
    char *host, *device;    /* owned: where they lie */
    float *cosines, *sines; /* owned, device: [rows][D / 2] */
};

struct gpu_wave { /* the i-th block of every piece of a group */
    int first, n; /* blocks of the group */
};

/* Pieces of prompts that are read together: as many as there is room for. */
struct gpu_group {
    int piece, n_pieces, block, n_blocks, wave, n_waves; /* the first of each, and how many */
    int n_keys, most_keys;                               /* of all pieces, of the largest */
    int longest;                                         /* rows of a block */
    bool chained, begins; /* some block begins: rows see snapshots; one of the first wave does */
};

enum { GPU_FERRY_BYTES = 4 << 20 };

struct gpu_attention {
    struct gpu *gpu;         /* borrowed */
    struct attention *twin;  /* borrowed */
    struct gpu_shape shape;
    int n_layers, n_slots, max_rows, max_runs;
    int64_t *positions;      /* [n_slots] tokens read */
    char *slots;             /* device [n_slots] of shape.slot_stride */

    float *parameters;       /* device: what layers point to */
    double *theta;           /* device */
    float *far_angles;       /* device: cosines, then sines of max_distance */
    struct gpu_layer *layers, *layers_at; /* [n_layers] here and there */
    struct gpu_room *rooms, *rooms_at;    /* [n_layers][n_kv_heads] of slots, then of snapshots; here and there */

    /* blocks that begin: gpu_kernels.h, struct gpu_chain, whose device memory this is */
    struct gpu_shape snapshot;
    char *snapshots;
    float *phi, *values, *errors;
    int *lists;
    int n_snapshots, max_keys; /* blocks times layers, keys times layers that it has room for */

    /* generated rows: [bucket] segments; [n_begin] pieces and blocks of those that begin a block */
    struct gpu_plan generated;
    int max_bucket, bucket, n_generated;
    void *scratch; /* device: gpu_launch_generated()'s */

    /* rows of prompts: [n_runs] segments that are whole runs, [max_runs ...] blocks' in the order of blocks, slots as rows see
     * them */
    struct gpu_plan prompt;
    int max_segments, n_runs, n_groups;
    struct gpu_group *groups; /* [max_segments], as waves */
    struct gpu_wave *waves;

    /* saved states: page-locked, a slot of the twin's, or for softmax GPU_FERRY_BYTES that a longer one passes through; on the
     * device (Hedgehog only) a slot's states */
    char *host, *whole;
    struct slot_header header;
};

/* ---- gpu_plan.c ---- */
bool gpu_has_blocks(const struct gpu_attention *a);
bool gpu_begins(const struct gpu_attention *a, int64_t position); /* does the row there begin a block that folds another? */
void gpu_plan_prompts(struct gpu_attention *a); /* segments of whole runs -> groups, waves, pieces, blocks and their segments */

/* ---- gpu_room.c: rooms [n_layers][n_kv_heads] ---- */
void gpu_rooms_of_slots(const struct attention *twin, struct gpu_room *rooms);
size_t gpu_rooms_of_snapshots(const struct gpu_shape *shape, int n_layers, const struct gpu_room *slots,
                              struct gpu_room *rooms); /* returns the bytes of a snapshot, enough for any layer */

#endif
