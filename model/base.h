/* base.h - a base checkpoint, whichever container it came in: its configuration, and its tensors by
 * what they are for.
 *
 * A Hugging Face folder (config.json, model.safetensors or model.safetensors.index.json and its
 * shards) or a GGUF file.  Every tensor of the files is matched against one table: one that is
 * missing, unknown, there twice or of another shape than the configuration says is ERR_FORMAT with
 * a sentence naming it.
 *
 * Matrices are seen as Hugging Face's Linear has them, [n_out, n_in] with q and k rows in
 * half-split RoPE order: GPT-2's transposed Conv1D and GGUF's interleaved rows of Llama's q and k
 * are undone while reading. */
#ifndef URCHIN_MODEL_BASE_H
#define URCHIN_MODEL_BASE_H

#include "attention/rope.h"
#include "compute/matrix.h"
#include "config/err.h"
#include "model/gguf.h"
#include "model/safetensors.h"
#include "model/tokenizer.h"
#include <stdbool.h>
#include <stdint.h>

enum base_architecture { BASE_LLAMA, BASE_GPT2 };

struct base_config {
    enum base_architecture architecture;
    int n_layers, hidden_dim, ffn_dim, n_heads, n_kv_heads, head_dim, vocab_size;
    int64_t context; /* trained length; GPT-2: rows of the position table */
    double norm_eps;
    bool tied;               /* the head is the embedding */
    bool qkv_bias;           /* q, k and v must have biases (Qwen2; attention_bias); others may */
    bool gelu_erf;           /* GPT-2: exact GELU in place of the tanh form */
    bool interleaved_qk;     /* GGUF llama: rows of q and k are stored pairwise */
    struct rope_config rope; /* Llama; freq_factors is owned by the base */
    int32_t eos_ids[32];     /* as the files say, before tokenizer and chat template */
    int n_eos_ids;
};

enum base_part {
    /* once */
    PART_EMBED,
    PART_POSITION,
    PART_NORM,
    PART_NORM_BIAS,
    PART_HEAD,
    /* per layer */
    PART_ATTN_NORM,
    PART_ATTN_NORM_BIAS,
    PART_Q,
    PART_K,
    PART_V,
    PART_QKV,
    PART_Q_BIAS,
    PART_K_BIAS,
    PART_V_BIAS,
    PART_QKV_BIAS,
    PART_O,
    PART_O_BIAS,
    PART_FFN_NORM,
    PART_FFN_NORM_BIAS,
    PART_GATE,
    PART_UP,
    PART_DOWN,
    PART_GATE_BIAS,
    PART_UP_BIAS,
    PART_DOWN_BIAS,
    N_PARTS
};

struct base_tensor {         /* a vector is n_out rows of one value */
    const char *file, *name; /* borrowed from the base */
    int n_out, n_in;
    const struct gguf_tensor *gguf; /* one of the two */
    const struct st_tensor *st;
    bool transposed;       /* stored [n_in, n_out] */
    int interleaved_heads; /* > 0: each of so many heads has its rows stored pairwise */
};

struct base;
enum err base_open(struct base **out, const char *path, char *msg, size_t msg_len);
void base_close(struct base *base); /* NULL is fine */
const struct base_config *base_config(const struct base *base);
const char *base_path(const struct base *base);
int64_t base_n_params(const struct base *base);

/* WEIGHT_INT8 when any matrix is quantised, else WEIGHT_BF16 when any has 16 bits, else
 * WEIGHT_FP32. */
enum weight_type base_natural_weights(const struct base *base);

/* layer is 0 for parts that are there once.  NULL: the checkpoint has none, as it may. */
const struct base_tensor *base_tensor(const struct base *base, enum base_part part, int layer);

/* The part's name in a Hugging Face folder, whichever container this one is. */
void base_part_name(const struct base *base, enum base_part part, int layer, char *out, size_t len);

const struct gguf *base_gguf(const struct base *base); /* NULL: a folder; borrowed */

/* Rows first .. first + n_rows - 1 as fp32 [n_rows, n_in].  Safe from any thread. */
void base_read(const struct base_tensor *tensor, int first, int n_rows, float *out);

enum err base_tokenizer(const struct base *base, struct tokenizer **out, char *msg, size_t msg_len);

/* ---- the two kinds of configuration (base_config_*.c) ---- */
enum err base_config_from_folder(struct base_config *config, const char *folder, char *msg,
                                 size_t msg_len);
enum err base_config_from_gguf(struct base_config *config, const struct gguf *g, const char *path,
                               char *msg, size_t msg_len);
enum err base_config_check(const struct base_config *config, const char *path, char *msg,
                           size_t msg_len);
void base_config_add_eos(struct base_config *config,
                         int64_t id); /* once each; what is no token id is dropped */

/* folder/name, malloc'd; NULL: out of memory. */
char *path_join(const char *folder, const char *name);

#endif
