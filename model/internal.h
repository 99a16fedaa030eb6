/* internal.h - struct model, shared by model.c (opening, slots) and forward.c (the step). */
#ifndef URCHIN_MODEL_INTERNAL_H
#define URCHIN_MODEL_INTERNAL_H

#include "model/attentions.h"
#include "model/base.h"
#include "model/converted.h"
#include "model/gpu_model.h"
#include "model/model.h"
#include "model/weights.h"

struct model {
    struct model_info info;
    struct base_config config; /* rope.freq_factors is not for use after opening */
    char *name, *base_path;    /* owned, info points at them */
    char base_sha256[SHA256_HEX];
    int32_t *eos_ids;
    struct tokenizer *tokenizer;
    struct chat *chat;
    struct converted *converted; /* NULL: none; attention borrows its maps */
    struct weights *weights; /* NULL once they are on a GPU */
    struct rope *rope;
    struct attentions *attention;
    struct team *team;     /* borrowed */
    struct model_profile *profile; /* borrowed or NULL */
    void (*tap)(void *arg, int layer, const float *qkv, int n_rows); /* or NULL */
    void *tap_arg;
    double profiled_at;            /* seconds: up to here time has been given to an operation */
    struct gpu_model *gpu; /* NULL: the CPU runs the model; else slots and all buffers of a step but runs are its own */

    char *slots; /* [n_slots] blocks of slot_stride bytes, one mapping */
    size_t slot_stride;
    bool *slot_ready; /* [n_slots]: cleared since it was last given back */

    /* scratch of a step */
    int max_rows, max_logits, max_runs;
    struct matmul_scratch *scratch;
    struct attention_run *runs; /* [max_runs] */
    uint64_t *slot_step;        /* [n_slots]: the last step that named it */
    uint64_t step;
    int32_t *tokens;    /* [max_rows] */
    int64_t *positions; /* [max_rows] */
    int *logit_rows;    /* [max_logits]: which row each belongs to */
    float *x;           /* [max_rows][hidden]: the residual stream */
    float *normed;      /* [max_rows][hidden] */
    float *delta;       /* [max_rows][hidden]: what a block adds to the stream */
    float *qkv;         /* [max_rows][(n_heads + 2 n_kv_heads) head_dim] */
    float *y;           /* [max_rows][n_heads head_dim] */
    float *ffn;         /* [max_rows][2 ffn (Llama) or ffn] */
    float *logits;      /* [max_logits][vocab] */
};

#endif
