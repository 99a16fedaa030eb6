/* model.h - a model: weights, tokenizer, slots, and the forward pass over a ragged batch.
 *
 * Accepts a Hugging Face folder, a GGUF file, or a converted folder (urchin.json; docs/models.md), whole or an
 * adapter over a base file found by digest.  One owner at a time calls model_step and the slot functions (the scheduler
 * thread); model_info, model_tokenizer and model_chat are immutable and may be read from any thread. */
#ifndef URCHIN_MODEL_MODEL_H
#define URCHIN_MODEL_MODEL_H

#include "attention/attention.h"
#include "compute/gpu_sampler.h"
#include "compute/matrix.h"
#include "compute/team.h"
#include "config/err.h"
#include "model/chat.h"
#include "model/tokenizer.h"

enum device { DEVICE_AUTO, DEVICE_CPU, DEVICE_CUDA }; /* auto: the GPU where there is one, else the CPU */
enum { WEIGHTS_AUTO = -1 }; /* fp32 files: fp32; fp16 and bf16 files: bf16; anything quantised: int8 */

struct model_options {
    const char *path;          /* folder or GGUF file */
    enum device device;
    const char *base;          /* another base for an adapter, or NULL; a digest that differs is a warning naming both */
    int weights;               /* enum weight_type or WEIGHTS_AUTO */
    enum kv_type kv_type;      /* exact keys and values */
    int64_t max_seq_len;       /* 0: the model's own (softmax) or none (Hedgehog) */
    int max_rows;              /* rows of one step */
    int max_logits;            /* rows of one step that ask for logits */
    int n_slots;               /* 0: as many as memory_budget holds (at least 1, at most 256) */
    size_t memory_budget;      /* bytes for slots when n_slots is 0; 0: a quarter of available memory, nine tenths of a GPU's */
    int cache_size, cache_recent, cache_age, cache_fact_age; /* -1: as the file says */
    int retrieval_size;                      /* places of retrieval heads; -1: as the file says */
    int cache_copies;                        /* so many times as many places everywhere (attention_state_add) */
    int64_t max_distance, horizon;           /* -1: as the file says (tests and research) */
    const char *chat_template; /* family name or NULL */
    struct team *team;         /* borrowed for the model's life */
    void (*progress)(void *arg, const char *what, double fraction); /* may be NULL; from the opening thread */
    void *progress_arg;
};
void model_options_init(struct model_options *options); /* every field as documented above; the CPU, kv_type bf16, max_rows 256, max_logits 32 */

struct model_info {
    const char *device;        /* "cpu", or the GPU's name */
    const char *name;          /* urchin.json's name, else the file's or folder's */
    const char *architecture;  /* "llama", "gpt2" */
    int n_layers, hidden_dim, ffn_dim, vocab_size;
    struct attention_config attention; /* of the layers that softmax_layers does not name */
    const bool *softmax_layers; /* [n_layers]: a Hedgehog model's layers that kept softmax; NULL: none */
    int n_softmax_layers;
    const bool *retrieval;      /* [n_layers][n_kv_heads]: the retrieval heads (attention.h); NULL: none */
    int64_t context;           /* the base's trained context */
    int64_t measured_to;       /* quality.measured_to_tokens, else context: past it quality is not known */
    int64_t max_seq_len;       /* 0: no limit; softmax in any layer: rows of its cache */
    enum weight_type weights;
    int64_t n_params;
    size_t weight_bytes, slot_bytes, state_bytes; /* state_bytes: a saved sequence (softmax: at max_seq_len) */
    int n_slots;
    const char *base_path, *base_sha256; /* adapters: the base in use and its digest; else NULL */
    const int32_t *eos_ids;    /* ends of text: generation_config, GGUF, tokenizer and chat family together */
    int n_eos_ids;
};

struct model;
enum err model_open(struct model **out, const struct model_options *options, char *msg, size_t msg_len);
void model_close(struct model *m); /* NULL is fine */
const struct model_info *model_info(const struct model *m);
const struct tokenizer *model_tokenizer(const struct model *m);
const struct chat *model_chat(const struct model *m);

/* ---- slots 0 .. n_slots - 1 ---- */
void model_slot_clear(struct model *m, int slot);
void model_slot_copy(struct model *m, int dst, int src);
int64_t model_slot_position(const struct model *m, int slot);
size_t model_slot_state_bytes(const struct model *m, int slot);
enum err model_slot_save(const struct model *m, int slot, void *out); /* ERR_DEVICE */
enum err model_slot_load(struct model *m, int slot, const void *state, size_t bytes, char *msg, size_t msg_len);

/* ---- a step ---- */
struct model_run {
    int slot;              /* no slot twice in one step */
    int n_rows;            /* >= 1 next tokens of the slot's sequence */
    const int32_t *tokens; /* [n_rows], each in [0, vocab_size) */
    int n_logits;          /* the last n_logits rows ask for logits, 0 .. n_rows */
    bool generated;        /* one row whose token the model itself drew, not one of a prompt: a GPU reads it by other kernels, so
                            * who wants the same bits again says the same again.  The CPU makes no difference. */
};

/* Reads all runs' tokens.  *logits [sum of n_logits][vocab_size] fp32 in run and row order, borrowed until the next
 * step.  ERR_ARG: a bound of model_options or max_seq_len broken, nothing done.  Allocates nothing. */
enum err model_step(struct model *m, const struct model_run *runs, int n_runs, const float **logits);

/* ---- where a step's time goes (the CPU's steps) ---- */
enum model_op { OP_EMBED, OP_QKV, OP_ATTENTION, OP_O, OP_GATE_UP, OP_ACTIVATE, OP_DOWN, OP_ADD_NORM, OP_HEAD, N_MODEL_OPS };
const char *model_op_name(enum model_op op);
struct model_profile { /* sums over steps, all layers together */
    int64_t steps;
    double seconds[N_MODEL_OPS];
    double bytes[N_MODEL_OPS]; /* that had to be read: weights once a step, states once a run */
    double flops[N_MODEL_OPS]; /* of products with weights */
};
void model_set_profile(struct model *m, struct model_profile *profile); /* borrowed; added to by every step; NULL: off */

/* ---- looking over its shoulder: what a teacher's layers attend with ---- */
/* fn is called from model_step once a layer, before its attention: qkv [n_rows][(n_heads + 2 n_kv_heads) head_dim], the rows of
 * the step in order, q, k and v of each before RoPE; borrowed for the call.  NULL: off.  On a GPU qkv is device memory that has
 * its numbers when the stream gets there: fn queues what reads it.  There rows of prompts are shown, generated ones are not. */
void model_set_tap(struct model *m, void (*fn)(void *arg, int layer, const float *qkv, int n_rows), void *arg);

/* ---- draws on the device, where the model can ---- */
bool model_draws(const struct model *m); /* on a GPU; the three functions below are for such models only */

/* The penalties of draws with counts_row == slot count from here: these tokens as the prompt, then what is drawn with draw.record.
 * Clearing or copying a slot leaves its counts alone. */
void model_count_prompt(struct model *m, int slot, const int32_t *tokens, int n);

struct model_draws {
    const struct gpu_draw *draws; /* [n <= n_slots]; draw.row counts the step's rows of logits in order, draw.counts_row is a slot */
    int n;
    const struct gpu_edit *edits;
    int n_edits;
};
/* A step whose logits stay on the device: *drawn [draws->n], borrowed until the next step.  logits: as model_step, or NULL:
 * not wanted. */
enum err model_step_draw(struct model *m, const struct model_run *runs, int n_runs, const struct model_draws *draws,
                         const struct gpu_drawn **drawn, const float **logits);

/* Evaluation and tests, between steps: see attention.h; layers are numbered without those that kept softmax.  For loading golden cache sets and ablations.  On a GPU model_attention is
 * the twin that holds configuration and layout, and model_slot is NULL. */
struct attention *model_attention(struct model *m);
struct gpu *model_gpu(const struct model *m); /* the device that runs it, borrowed; NULL: the CPU does */
const struct rope *model_rope(const struct model *m); /* NULL: the architecture has none */
void *model_slot(struct model *m, int slot); /* the slot's block, for attention_* calls */

#endif
