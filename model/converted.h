/* converted.h - a converted model's folder: urchin.json and hedgehog.safetensors, format 1
 * (docs/models.md).
 *
 * urchin.json says how the model attends and over which base it lies; hedgehog.safetensors holds
 * what training made: feature maps, mixing, low-rank parts.  Keys and tensors that are not known
 * here are refused by name. */
#ifndef URCHIN_MODEL_CONVERTED_H
#define URCHIN_MODEL_CONVERTED_H

#include "attention/attention.h"
#include "config/err.h"
#include "model/base.h"
#include "model/safetensors.h"
#include "model/sha256.h"
#include <stdint.h>

enum low_rank_target { LOW_RANK_Q, LOW_RANK_K, LOW_RANK_V, LOW_RANK_O, N_LOW_RANK_TARGETS };

struct low_rank { /* W + scale B A */
    float *a, *b; /* [rank, n_in], [n_out, rank]; NULL: none */
};

struct converted_layer {
    float *map_q, *map_k, *mix; /* as struct attention_weights has them; NULL for softmax */
    struct low_rank low_rank[N_LOW_RANK_TARGETS];
};

struct converted {
    char *name;
    struct attention_config attention; /* heads from the base, see converted_lay_over */
    bool has_max_distance;
    bool *softmax_layers; /* [n_layers] once laid over a base, NULL: none */
    int *softmax_list;    /* [n_softmax_layers] as urchin.json names them, ascending */
    int n_softmax_layers; /* 0 where all are: then the kind is softmax */
    int (*retrieval_list)[2]; /* [n_retrieval] layer and kv head of each retrieval head as urchin.json names them, ascending */
    int n_retrieval;
    bool *retrieval; /* [n_layers][n_kv_heads] once laid over a base; NULL: none */
    bool is_adapter;
    char *base_file; /* adapters: file name without a folder, bytes, digest */
    int64_t base_bytes;
    char base_sha256[SHA256_HEX];
    int rank; /* 0: no low-rank parts */
    float scale;
    bool targets[N_LOW_RANK_TARGETS];
    int64_t measured_to; /* 0: not said */
    char *tensors_path;
    struct safetensors *tensors;
    struct converted_layer *layers; /* [n_layers] once laid over a base */
    int n_layers;
    int64_t n_map_params; /* maps and mixing; low-rank parts add none, they are merged */
};

/* Is there an urchin.json in this folder? */
bool converted_is(const char *folder);

enum err converted_open(struct converted **out, const char *folder, char *msg, size_t msg_len);
/* urchin.json's text alone, without tensors (fuzzing, tests). */
enum err converted_open_text(struct converted **out, const char *json, size_t len, const char *name,
                             char *msg, size_t msg_len);
void converted_close(struct converted *c); /* NULL is fine */

/* Fills in what the base decides (heads, default max_distance), checks every tensor against it and
 * reads them. */
enum err converted_lay_over(struct converted *c, const struct base_config *base, char *msg,
                            size_t msg_len);

/* After packing: low-rank parts and the file itself are no longer needed. */
void converted_drop_files(struct converted *c);

/* The file an adapter lies over: the folder itself, $URCHIN_CACHE, $XDG_CACHE_HOME/urchin,
 * ~/.cache/urchin, the first that has one of the right name, size and digest.  *path malloc'd.
 * ERR_IO with a sentence on how to get it. */
enum err converted_find_base(const struct converted *c, const char *folder, char **path, char *msg,
                             size_t msg_len);

#endif
