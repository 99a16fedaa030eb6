/* recipe.h - how a model is converted: everything that decides the result, but text and base.
 *
 * Three recipes, of which every part may be set otherwise (docs/convert.md):
 *   urchin   ours: exp map before RoPE, key map per kv head, terraced window 64, 1 sink, recall
 *            cache 128, of retrieval heads 3,072, one scale, horizon 1,024; cross-entropy of rows,
 *            calibrated first
 *   lolcats  arXiv:2410.10254, stage 1: two softmaxes of half the head's size after RoPE, key map
 *            per query head, terraced window 64, its own mixing; 1000 times the squared error of
 *            outputs
 *   paper    Hedgehog arXiv:2402.04347: exp map after RoPE per query head, no window;
 *            cross-entropy of rows.  (Its rate is not published: 0.01 is LoLCATs'.) */
#ifndef URCHIN_CONVERT_RECIPE_H
#define URCHIN_CONVERT_RECIPE_H

#include "attention/attention.h"
#include "config/settings.h"
#include "model/base.h"
#include <cjson/cJSON.h>

enum finetune_method { FINETUNE_NONE, FINETUNE_LOW_RANK, FINETUNE_FULL };

struct finetune_recipe { /* stage 2; its sequences are as long as stage 1's */
    enum finetune_method method;
    bool next_token; /* the loss; else distillation */
    int steps, accumulate, rank;
    int retrieval_size;  /* places of a retrieval head meanwhile, at most attention.retrieval_size */
    bool bf16;           /* products of bf16 pairs (gemm.h), where the CPU has them */
    double scale;        /* W + scale B A */
    double lr, lr_maps;  /* of low-rank parts or weights; of maps and mixing */
};

enum { MOST_RETRIEVAL = 256 };

struct recipe {
    const char *name;
    struct attention_config
        attention;          /* as the converted model will have it; heads from the base */
    bool rope;              /* the base has RoPE */
    int softmax_layers[64]; /* that are not converted, ascending */
    int n_softmax_layers;
    int n_retrieval;       /* kv heads that look facts up (retrieval.h), to be found or named; 0: none */
    int retrieval_heads[MOST_RETRIEVAL][2]; /* layer and kv head of those known, ascending */
    int n_retrieval_heads;                  /* n_retrieval where the settings name them, else 0 until they are found */
    double recall; /* share of packs that are recall texts */
    float ce, mse; /* factors of the loss, see student.h */
    int steps, accumulate;
    int length, long_length, long_every, rows, long_rows;
    int update_rows; /* rows of a sequence for one change of the maps; 0: all of a step */
    double lr, lr_mix, warmup; /* rates of maps and of c_h or omega_h; the recipe's are halved by update_rows */
    bool one_cycle;
    double init_scale; /* maps begin as it times the identity */
    float init_mix;
    bool calibrate; /* c_h before the first step (training_begin()) */
    int64_t seed;
    bool join_documents;
    struct finetune_recipe finetune;
};

/* ERR_ARG with a sentence that names the flag.  Strings are borrowed from the settings. */
enum err recipe_from_settings(struct recipe *out, const struct settings *s,
                              const struct base_config *base, char *msg, size_t msg_len);

/* The rate's factor at a step of so many, 0 .. 1: one-cycle rises from 1/25 over the warm-up and falls to
 * nothing, both along a cosine; constant rises the same and stays. */
double recipe_rate_of(const struct recipe *r, int steps, double step);
double recipe_rate(const struct recipe *r, double step); /* stage 1 */

bool recipe_keeps_softmax(const struct recipe *r, int layer);

/* No head was found: the caches of all are for facts too, unless the settings say how many places are recent ones. */
void recipe_without_retrieval(struct recipe *r, const struct settings *s);

/* What fine-tuning has in the loop: the converted model's attention, but for finetune.retrieval_size.
 * Its sequences are a fraction of what will be served, and so is the room: heads learn to do with the
 * few keys that are kept, and what is left to the state. */
struct attention_config recipe_finetune_attention(const struct recipe *r);

/* Marks layer and kv head in [n_layers][n_kv_heads] flags; and the other way round, as the recipe's retrieval heads. */
void recipe_mark_retrieval(const struct recipe *r, bool *flags);
void recipe_take_retrieval(struct recipe *r, const bool *flags, int n_layers);

/* Tokens of a document at which its last row has a linear key: fewer teach nothing. */
int recipe_least_tokens(const struct attention_config *attention);

/* Objects for urchin.json: its attention key, and the rest.  NULL: out of memory. */
cJSON *recipe_attention_json(const struct recipe *r);
cJSON *recipe_training_json(const struct recipe *r);
cJSON *recipe_finetune_json(const struct recipe *r); /* null: none */

#endif
