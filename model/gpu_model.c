/* gpu_model.c - a model on a GPU: forward.c's step over device memory.
 *
 * A step has two passes.  Rows of prompts take the library's GEMM, are queued one by one, and only those that ask for logits go
 * on behind the last layer's attention.  Generated rows take our kernels; their number is rounded up to a bucket with rows of
 * nothing, so that the whole pass, from token ids to logits, is one graph that is recorded once for each bucket and then replayed:
 * nothing in it depends on positions.  Logits stay on the device, generated rows first; draws read them there. */
#include "model/gpu_model.h"

#include "attention/gpu_attention.h"
#include "compute/gpu_sampler.h"
#include "model/gpu_weights.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_AUTO_SLOTS = 256, BUCKETS = 64 };

struct bucket { /* generated rows, rounded up */
    bool met;   /* ran once: all is warm that a recording needs */
    struct gpu_graph *graph;
};

struct gpu_model {
    struct gpu *gpu;                /* owned */
    struct communicator ranks;      /* this card, of one */
    const struct base_config *base; /* borrowed */
    struct attention *twin;         /* borrowed */
    struct gpu_attention *attention;
    struct gpu_sampler *sampler;
    int n_slots, max_rows, max_logits, max_runs, max_bucket;
    bool bf16; /* what products read; fp32 weights: fp32 */
    enum gpu_activation activation;
    void (*tap)(void *arg, int layer, const float *qkv, int n_rows); /* or NULL */
    void *tap_arg;

    struct gpu_weights weights;

    /* of a step, on the device; rows: the larger of max_rows and max_bucket */
    int32_t *tokens, *positions, *logit_rows;
    float *x, *delta, *qkv, *ffn, *logits; /* logits [max_bucket + max_logits][vocab] */
    void *normed, *y, *activated;          /* bf16 or fp32 */
    void *scratch;                         /* widened weights, quantised rows */
    size_t activated_row;                  /* elements from row to row: whole 16 bytes */

    /* of a step, page-locked */
    int32_t *host_tokens, *host_positions, *host_logit_rows;
    float *host_logits; /* [max_logits][vocab] */

    struct gpu_draw *draws; /* [n_slots] */
    int *draw_rows;         /* [max_logits]: where a step's row of logits lies on the device */
    int *slots;             /* [max_bucket] */
    struct gpu_attention_run *prompts; /* [max_runs] */
    struct bucket buckets[BUCKETS];
};

/* ---- buckets ---- */

/* 1, 2, 4, 8, then in steps of 8 to 64, of 16 to 256, of 64 beyond: products take 8 rows at a time. */
static int bucket_size(int n) {
    if (n <= 8) {
        int size = 1;
        while (size < n)
            size *= 2;
        return size;
    }
    int step = n <= 64 ? 8 : n <= 256 ? 16 : 64;
    return (n + step - 1) / step * step;
}

/* Its place in buckets[], or BUCKETS: too large to be kept. */
static int bucket_index(int size) {
    int i = size <= 1   ? 0
            : size <= 2 ? 1
            : size <= 4 ? 2
            : size <= 64  ? 2 + size / 8
            : size <= 256 ? 6 + size / 16
                          : 18 + size / 64;
    return i < BUCKETS ? i : BUCKETS;
}

/* ---- the device ---- */

enum err gpu_model_device(struct gpu **out, char *msg, size_t msg_len) {
    return gpu_open(out, msg, msg_len);
}
const char *gpu_model_device_name(const struct gpu *g) {
    return gpu_info(g)->name;
}
size_t gpu_model_device_free_bytes(struct gpu *g) {
    return gpu_free_bytes(g);
}
bool gpu_model_device_has_fp8(const struct gpu *g) {
    return gpu_has_fp8(gpu_info(g));
}
void gpu_model_device_close(struct gpu *g) {
    gpu_close(g);
}

/* ---- opening ---- */

struct opening {
    struct gpu_model *m;
    const struct gpu_model_options *options;
    enum err err; /* the first; what follows does nothing */
};

static void *take(struct opening *o, size_t n, size_t bytes) {
    void *at = NULL;
    if (!o->err) o->err = gpu_alloc(o->m->gpu, &at, n * bytes);
    return at;
}
static void *take_host(struct opening *o, size_t n, size_t bytes) {
    void *at = NULL;
    if (!o->err) o->err = gpu_host_alloc(o->m->gpu, &at, n * bytes);
    return at;
}

static void take_buffers(struct opening *o) {
    struct gpu_model *m = o->m;
    const struct base_config *c = m->base;
    size_t rows = (size_t)(m->max_rows > m->max_bucket ? m->max_rows : m->max_bucket);
    size_t hidden = (size_t)c->hidden_dim, vocab = (size_t)c->vocab_size,
           element = m->bf16 ? 2 : 4;
    size_t qkv = (size_t)(c->n_heads + 2 * c->n_kv_heads) * (size_t)c->head_dim;
    m->activated_row = ((size_t)c->ffn_dim + 7) / 8 * 8;
    m->tokens = take(o, rows, sizeof *m->tokens);
    m->positions = take(o, rows, sizeof *m->positions);
    m->logit_rows = take(o, (size_t)m->max_logits, sizeof *m->logit_rows);
    m->x = take(o, rows * hidden, sizeof(float));
    m->delta = take(o, rows * hidden, sizeof(float));
    m->qkv = take(o, rows * qkv, sizeof(float));
    m->ffn = take(o, rows * (size_t)gpu_matrix_n_out(m->weights.layers[0].gate_up), sizeof(float));
    m->normed = take(o, rows * hidden, element);
    m->y = take(o, rows * (size_t)(c->n_heads * c->head_dim), element);
    m->activated = take(o, rows * m->activated_row, element);
    m->scratch = take(o, gpu_weights_scratch_bytes(&m->weights, m->max_rows) + 1, 1);
    m->logits = take(o, (size_t)(m->max_bucket + m->max_logits) * vocab, sizeof(float));
    m->host_tokens = take_host(o, 2 * rows, sizeof *m->host_tokens);
    m->host_positions = take_host(o, 2 * rows, sizeof *m->host_positions);
    m->host_logit_rows = take_host(o, (size_t)m->max_logits, sizeof *m->host_logit_rows);
    m->host_logits = take_host(o, (size_t)m->max_logits * vocab, sizeof *m->host_logits);
    m->draw_rows = calloc((size_t)m->max_logits, sizeof *m->draw_rows);
    m->slots = calloc((size_t)m->max_bucket, sizeof *m->slots);
    m->prompts = calloc((size_t)m->max_runs, sizeof *m->prompts);
    if (!o->err && (!m->draw_rows || !m->slots || !m->prompts)) o->err = ERR_NOMEM;
}

/* Device memory of one sequence: its slot, and what is counted for penalties. */
static size_t sequence_bytes(const struct gpu_model *m) {
    size_t vocab = (size_t)m->base->vocab_size; /* sampler: counts of 2 bytes, logits and a result */
    return gpu_attention_slot_bytes(m->twin) + vocab * 6 + sizeof(struct gpu_drawn);
}

/* As many sequences as were asked for, or as fit. */
static enum err count_slots(struct opening *o, char *msg, size_t msg_len) {
    struct gpu_model *m = o->m;
    size_t each = sequence_bytes(m), left = gpu_free_bytes(m->gpu) / 20 * 19; /* attention's scratch */
    size_t budget = o->options->memory_budget ? o->options->memory_budget : left / 10 * 9;
    size_t fit = left / each, n = o->options->n_slots ? (size_t)o->options->n_slots : budget / each;
    if (!o->options->n_slots) n = n < 1 ? 1 : n > MAX_AUTO_SLOTS ? MAX_AUTO_SLOTS : n;
    if (n > fit)
        return err_set(msg, msg_len, ERR_NOMEM,
                       "%s: %zu sequences of %.1f MB do not fit in the %.1f MB that %s has left "
                       "beside the weights; %zu would",
                       o->options->name, n, (double)each / 1e6, (double)left / 1e6,
                       gpu_info(m->gpu)->name, fit);
    m->n_slots = (int)n;
    return OK;
}

static enum err open_on_device(struct opening *o, char *msg, size_t msg_len) {
    struct gpu_model *m = o->m;
    const struct gpu_model_options *options = o->options;
    const struct base_config *c = m->base;
    if (c->hidden_dim % 8 || c->n_heads * c->head_dim % 8)
        return err_set(msg, msg_len, ERR_ARG,
                       "%s: a hidden size of %d with heads of %d in all cannot run on a GPU: both "
                       "must be multiples of 8",
                       options->name, c->hidden_dim, c->n_heads * c->head_dim);
    m->ranks = (struct communicator){.rank = 0, .n_ranks = 1};
    m->bf16 = options->weights->type != WEIGHT_FP32;
    m->activation = c->architecture == BASE_LLAMA ? GPU_SILU_MUL
                    : c->gelu_erf                 ? GPU_GELU_ERF
                                                  : GPU_GELU_TANH;
    o->err = gpu_weights_copy(&m->weights, m->gpu, &m->ranks, c, options->weights);
    if (!o->err) take_buffers(o);
    if (o->err == ERR_NOMEM)
        return err_set(msg, msg_len, ERR_NOMEM,
                       "%s: the weights do not fit into the memory of %s, %.1f MB of which are free",
                       options->name, gpu_info(m->gpu)->name,
                       (double)gpu_free_bytes(m->gpu) / 1e6);
    if (!o->err) o->err = count_slots(o, msg, msg_len);
    if (o->err == ERR_NOMEM) return o->err;
    if (!o->err)
        o->err = gpu_attention_new(&m->attention, m->gpu, m->twin, m->n_slots, m->max_rows,
                                   m->max_runs, !m->bf16, msg, msg_len);
    if (!o->err) {
        m->draws = calloc((size_t)m->n_slots, sizeof *m->draws);
        o->err = m->draws ? gpu_sampler_new(&m->sampler, m->gpu, c->vocab_size, m->n_slots,
                                            m->n_slots)
                          : ERR_NOMEM;
        if (o->err)
            err_set(msg, msg_len, o->err, "%s: no sampler for a vocabulary of %d on %s",
                    options->name, c->vocab_size, gpu_info(m->gpu)->name);
    }
    if (!o->err) o->err = gpu_wait(m->gpu);
    if (o->err == ERR_DEVICE)
        err_set(msg, msg_len, ERR_DEVICE, "%s: %s", gpu_info(m->gpu)->name, gpu_error(m->gpu));
    return o->err;
}

enum err gpu_model_new(struct gpu_model **out, const struct gpu_model_options *options, char *msg,
                       size_t msg_len) {
    struct gpu_model *m = calloc(1, sizeof *m);
    if (!m) {
        gpu_close(options->gpu);
        return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", options->name);
    }
    m->gpu = options->gpu;
    m->base = options->base;
    m->twin = options->twin;
    m->max_rows = options->max_rows;
    m->max_logits = options->max_logits;
    m->max_runs = options->max_runs;
    m->max_bucket = bucket_size(options->max_runs);
    struct opening o = {.m = m, .options = options};
    enum err e = open_on_device(&o, msg, msg_len);
    if (e) {
        gpu_model_free(m);
        return e;
    }
    *out = m;
    return OK;
}

void gpu_model_free(struct gpu_model *m) {
    if (!m) return;
    struct gpu *g = m->gpu;
    for (int i = 0; i < BUCKETS; i++)
        gpu_graph_free(g, m->buckets[i].graph);
    gpu_sampler_free(m->sampler);
    gpu_attention_free(m->attention);
    gpu_weights_free(&m->weights, g);
    void *device[] = {m->tokens, m->positions, m->logit_rows, m->x, m->delta,  m->qkv,
                      m->ffn,    m->logits,    m->normed,     m->y, m->activated, m->scratch};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        gpu_release(g, device[i]);
    void *host[] = {m->host_tokens, m->host_positions, m->host_logit_rows, m->host_logits};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++)
        gpu_host_release(g, host[i]);
    void *blocks[] = {m->draws, m->draw_rows, m->slots, m->prompts};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        free(blocks[i]);
    gpu_close(g);
    free(m);
}

int gpu_model_n_slots(const struct gpu_model *m) {
    return m->n_slots;
}
size_t gpu_model_slot_bytes(const struct gpu_model *m) {
    return gpu_attention_slot_bytes(m->twin);
}
size_t gpu_model_weight_bytes(const struct gpu_model *m) {
    return m->weights.bytes;
}

struct gpu *gpu_model_gpu(const struct gpu_model *m) {
    return m->gpu;
}

void gpu_model_set_tap(struct gpu_model *m,
                       void (*fn)(void *arg, int layer, const float *qkv, int n_rows), void *arg) {
    m->tap = fn;
    m->tap_arg = arg;
}

/* ---- slots ---- */

void gpu_model_slot_clear(struct gpu_model *m, int slot) {
    gpu_attention_slot_clear(m->attention, slot);
}
void gpu_model_slot_copy(struct gpu_model *m, int dst, int src) {
    gpu_attention_slot_copy(m->attention, dst, src);
}
int64_t gpu_model_slot_position(const struct gpu_model *m, int slot) {
    return gpu_attention_slot_position(m->attention, slot);
}
enum err gpu_model_slot_save(struct gpu_model *m, int slot, void *out) {
    return gpu_attention_slot_save(m->attention, slot, out);
}
enum err gpu_model_slot_load(struct gpu_model *m, int slot, const void *state, size_t bytes,
                             char *msg, size_t msg_len) {
    return gpu_attention_slot_load(m->attention, slot, state, bytes, msg, msg_len);
}
void gpu_model_count_prompt(struct gpu_model *m, int slot, const int32_t *tokens, int n) {
    gpu_sampler_clear_counts(m->sampler, slot);
    gpu_sampler_add_prompt(m->sampler, slot, tokens, n);
}

/* ---- the step ---- */

static void embed(struct gpu_model *m, int n, const struct gpu_norm *norm) {
    gpu_matrix_rows(m->gpu, m->x, m->tokens, n, m->weights.embed);
    if (m->weights.position)
        gpu_matrix_rows(m->gpu, m->delta, m->positions, n, m->weights.position);
    gpu_add_norm(m->gpu, m->normed, m->bf16, m->x, m->weights.position ? m->delta : NULL, n,
                 m->base->hidden_dim, norm);
}

static void project_qkv(struct gpu_model *m, int layer, int n, enum gpu_path path) {
    const struct gpu_layer_weights *l = &m->weights.layers[layer];
    gpu_matmul(m->gpu, m->scratch, m->qkv, (size_t)gpu_matrix_n_out(l->qkv), m->normed,
               (size_t)m->base->hidden_dim, n, l->qkv, l->qkv_bias, path);
}

static struct gpu_attention_rows attention_rows(const struct gpu_model *m) {
    const struct base_config *c = m->base;
    size_t q = (size_t)(c->n_heads * c->head_dim), kv = (size_t)(c->n_kv_heads * c->head_dim);
    return (struct gpu_attention_rows){.q = m->qkv,
                                       .k = m->qkv + q,
                                       .v = m->qkv + q + kv,
                                       .q_row = q + 2 * kv,
                                       .k_row = q + 2 * kv,
                                       .v_row = q + 2 * kv,
                                       .y = m->y,
                                       .y_row = q,
                                       .y_bf16 = m->bf16};
}

/* What follows attention in a layer: x += W_o y, x += W_down act(...), and the norm that is read next. */
static void finish_layer(struct gpu_model *m, int layer, int n, enum gpu_path path) {
    const struct base_config *c = m->base;
    const struct gpu_layer_weights *l = &m->weights.layers[layer];
    size_t hidden = (size_t)c->hidden_dim;
    gpu_matmul(m->gpu, m->scratch, m->delta, hidden, m->y, (size_t)(c->n_heads * c->head_dim), n,
               l->o, l->o_bias, path);
    ranks_sum(&m->ranks, m->gpu, m->delta, (size_t)n * hidden);
    gpu_add_norm(m->gpu, m->normed, m->bf16, m->x, m->delta, n, c->hidden_dim, &l->ffn_norm);
    gpu_matmul(m->gpu, m->scratch, m->ffn, (size_t)gpu_matrix_n_out(l->gate_up), m->normed, hidden,
               n, l->gate_up, l->gate_up_bias, path);
    gpu_activate(m->gpu, m->activated, m->bf16, m->activated_row, m->ffn, n, c->ffn_dim,
                 m->activation);
    gpu_matmul(m->gpu, m->scratch, m->delta, hidden, m->activated, m->activated_row, n, l->down,
               l->down_bias, path);
    ranks_sum(&m->ranks, m->gpu, m->delta, (size_t)n * hidden);
    gpu_add_norm(m->gpu, m->normed, m->bf16, m->x, m->delta, n, c->hidden_dim,
                 layer + 1 == c->n_layers ? &m->weights.norm : &l[1].attn_norm);
}

static void project_logits(struct gpu_model *m, float *logits, int n, enum gpu_path path) {
    gpu_matmul(m->gpu, m->scratch, logits, (size_t)m->base->vocab_size, m->normed,
               (size_t)m->base->hidden_dim, n, m->weights.head, NULL, path);
    ranks_gather(&m->ranks, m->gpu, logits, n, m->base->vocab_size);
}

/* Host to device, first of the step's upload areas for prompts, second for generated rows: both are read when the queue gets
 * there, so they must not share memory. */
static void upload_tokens(struct gpu_model *m, int area, int n) {
    size_t rows = (size_t)(m->max_rows > m->max_bucket ? m->max_rows : m->max_bucket);
    size_t from = area ? rows : 0;
    gpu_upload(m->gpu, m->tokens, m->host_tokens + from, (size_t)n * sizeof *m->tokens);
    if (m->weights.position)
        gpu_upload(m->gpu, m->positions, m->host_positions + from,
                   (size_t)n * sizeof *m->positions);
}

static void set_token(struct gpu_model *m, int area, int row, int32_t token, int64_t position) {
    size_t rows = (size_t)(m->max_rows > m->max_bucket ? m->max_rows : m->max_bucket);
    size_t at = (area ? rows : 0) + (size_t)row;
    m->host_tokens[at] = token;
    m->host_positions[at] = (int32_t)position; /* read only by models with a table of positions */
}

static void gather_logit_rows(struct gpu_model *m, int n) {
    size_t element = m->bf16 ? 2 : 4, hidden = (size_t)m->base->hidden_dim,
           q = (size_t)(m->base->n_heads * m->base->head_dim);
    /* through buffers that are free at this point */
    gpu_gather_rows(m->gpu, m->delta, m->x, hidden * sizeof(float), m->logit_rows, n);
    gpu_copy(m->gpu, m->x, m->delta, (size_t)n * hidden * sizeof(float));
    gpu_gather_rows(m->gpu, m->qkv, m->y, q * element, m->logit_rows, n);
    gpu_copy(m->gpu, m->y, m->qkv, (size_t)n * q * element);
}

/* Rows of prompts; their n_logits rows of logits go to m->logits behind max_bucket. */
static void read_prompts(struct gpu_model *m, int n_runs, int n_rows, int n_logits) {
    struct gpu_attention_rows rows = attention_rows(m);
    int n_layers = m->base->n_layers;
    upload_tokens(m, 0, n_rows);
    if (n_logits)
        gpu_upload(m->gpu, m->logit_rows, m->host_logit_rows,
                   (size_t)n_logits * sizeof *m->logit_rows);
    gpu_attention_prompt_begin(m->attention, m->prompts, n_runs);
    embed(m, n_rows, &m->weights.layers[0].attn_norm);
    for (int i = 0; i < n_layers; i++) {
        project_qkv(m, i, n_rows, GPU_PROMPT);
        if (m->tap) m->tap(m->tap_arg, i, m->qkv, n_rows);
        gpu_attention_prompt_layer(m->attention, i, &rows);
        if (i + 1 < n_layers) finish_layer(m, i, n_rows, GPU_PROMPT);
    }
    gpu_attention_prompt_end(m->attention);
    if (!n_logits) return;
    gather_logit_rows(m, n_logits);
    finish_layer(m, n_layers - 1, n_logits, GPU_PROMPT);
    project_logits(m, m->logits + (size_t)m->max_bucket * (size_t)m->base->vocab_size, n_logits,
                   GPU_PROMPT);
}

static void queue_generated(struct gpu_model *m, int size) {
    struct gpu_attention_rows rows = attention_rows(m);
    embed(m, size, &m->weights.layers[0].attn_norm);
    for (int i = 0; i < m->base->n_layers; i++) {
        project_qkv(m, i, size, GPU_GENERATED);
        gpu_attention_generated_layer(m->attention, i, &rows);
        finish_layer(m, i, size, GPU_GENERATED);
    }
    project_logits(m, m->logits, size, GPU_GENERATED);
}

/* Generated rows, in a bucket; all of their logits go to the front of m->logits. */
static enum err read_generated(struct gpu_model *m, int n) {
    int size = bucket_size(n), index = bucket_index(size);
    struct bucket *b = index < BUCKETS ? &m->buckets[index] : NULL;
    for (int i = n; i < size; i++)
        set_token(m, 1, i, -1, -1);
    upload_tokens(m, 1, size);
    gpu_attention_generated_begin(m->attention, m->slots, n, size);
    if (b && b->met && !b->graph) {
        gpu_record_begin(m->gpu);
        queue_generated(m, size);
        enum err e = gpu_record_end(m->gpu, &b->graph);
        if (e) return e;
    }
    if (b && b->graph)
        gpu_replay(m->gpu, b->graph);
    else
        queue_generated(m, size);
    if (b) b->met = true;
    gpu_attention_generated_end(m->attention);
    return OK;
}

/* Sorts the runs into the two passes; where each row of logits will lie. */
static void lay_out(struct gpu_model *m, const struct model_run *runs, int n_runs, int *n_prompts,
                    int *n_rows, int *n_prompt_logits, int *n_generated, int *n_logits) {
    *n_prompts = *n_rows = *n_prompt_logits = *n_generated = *n_logits = 0;
    for (int i = 0; i < n_runs; i++) {
        const struct model_run *r = &runs[i];
        int64_t position = gpu_attention_slot_position(m->attention, r->slot);
        if (r->generated) {
            set_token(m, 1, *n_generated, r->tokens[0], position);
            m->slots[*n_generated] = r->slot;
            if (r->n_logits) m->draw_rows[(*n_logits)++] = *n_generated;
            ++*n_generated;
            continue;
        }
        m->prompts[(*n_prompts)++] = (struct gpu_attention_run){r->slot, *n_rows, r->n_rows};
        for (int k = 0; k < r->n_rows; k++)
            set_token(m, 0, *n_rows + k, r->tokens[k], position + k);
        *n_rows += r->n_rows;
        for (int k = r->n_logits; k > 0; k--) {
            m->host_logit_rows[*n_prompt_logits] = *n_rows - k;
            m->draw_rows[(*n_logits)++] = m->max_bucket + (*n_prompt_logits)++;
        }
    }
}

/* Rows of logits in the step's order, neighbours together. */
static void download_logits(struct gpu_model *m, int n) {
    size_t vocab = (size_t)m->base->vocab_size;
    for (int first = 0, end; first < n; first = end) {
        end = first + 1;
        while (end < n && m->draw_rows[end] == m->draw_rows[first] + end - first)
            end++;
        gpu_download(m->gpu, m->host_logits + (size_t)first * vocab,
                     m->logits + (size_t)m->draw_rows[first] * vocab,
                     (size_t)(end - first) * vocab * sizeof(float));
    }
}

enum err gpu_model_step(struct gpu_model *m, const struct model_run *runs, int n_runs,
                        const struct model_draws *draws, const struct gpu_drawn **drawn,
                        const float **logits) {
    int n_prompts, n_rows, n_prompt_logits, n_generated, n_logits;
    lay_out(m, runs, n_runs, &n_prompts, &n_rows, &n_prompt_logits, &n_generated, &n_logits);
    if (n_prompts) read_prompts(m, n_prompts, n_rows, n_prompt_logits);
    enum err e = n_generated ? read_generated(m, n_generated) : OK;
    if (e) return e;
    if (draws) {
        if (draws->n > m->n_slots) return ERR_ARG;
        for (int i = 0; i < draws->n; i++) {
            m->draws[i] = draws->draws[i];
            m->draws[i].row = m->draw_rows[draws->draws[i].row];
        }
        gpu_sample(m->sampler, m->logits, m->draws, draws->n, draws->edits, draws->n_edits, drawn);
    }
    if (logits) download_logits(m, n_logits);
    if (logits) *logits = m->host_logits;
    return gpu_wait(m->gpu);
}
