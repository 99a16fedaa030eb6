/* gpu_internal.h - what the host's files of attention on a device share: gpu_attention.c (steps) and gpu_slot.c (slots). */
#ifndef URCHIN_ATTENTION_GPU_INTERNAL_H
#define URCHIN_ATTENTION_GPU_INTERNAL_H

#include "attention/gpu_attention.h"
#include "attention/gpu_kernels.h"
#include "attention/internal.h"

struct gpu_wave { /* the i-th block of every run of prompts: none needs a key of another */
    int first, n, longest; /* segments; rows of the longest */
    bool begins;           /* some segment is at the start of a block that folds */
};

/* Segments of a step: what the host plans, and its copy on the device. */
struct gpu_plan {
    struct gpu_segment *host, *device; /* host: page-locked */
    float *cosines, *sines;            /* device: [rows][D / 2] */
};

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

    /* blocks that begin */
    char *scratch; /* device */
    int units;     /* (layer, segment) pairs that it holds */

    /* generated rows: [bucket] segments, then [n_begin] of those that begin a block */
    struct gpu_plan generated;
    int max_bucket, bucket, n_generated;

    /* rows of prompts: [n_runs] whole runs, [n_segments] within a block, and the same by snapshot */
    struct gpu_plan prompt;
    int max_segments, n_runs, n_segments, n_waves, longest_run;
    struct gpu_wave *waves;
    struct gpu_shape snapshot; /* slots of one layer */
    char *snapshots;           /* device [n_snapshots] */
    int n_snapshots;

    /* saved states: a slot of the twin's (page-locked; Hedgehog only), and its states on the device */
    char *host, *whole;
    struct slot_header header;
};

#endif
