/* model.c - opening a model, and its slots. */
#include "model/model.h"

#include "compute/memory.h"
#include "config/log.h"
#include "model/budget.h"
#include "model/internal.h"
#include "model/mapped.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_AUTO_SLOTS = 256 };

/* What model_open gathers on its way; the sentence goes to msg. */
struct opening {
    const struct model_options *options;
    struct model *m;
    struct base *base; /* only while opening */
    struct gpu *gpu;   /* until the device's model takes it */
    size_t budget;     /* bytes for all slots */
    char *msg;
    size_t msg_len;
};

static enum err no_memory(struct opening *o) {
    return err_set(o->msg, o->msg_len, ERR_NOMEM, "%s: out of memory", o->options->path);
}

static void progress(struct opening *o, const char *what, double fraction) {
    if (o->options->progress) o->options->progress(o->options->progress_arg, what, fraction);
}

/* ---- which files ---- */
/* --base names another base: its digest is compared, and a difference is the user's wish. */
static enum err take_other_base(struct opening *o) {
    struct model *m = o->m;
    struct mapped file;
    struct stat st;
    if (!(m->base_path = strdup(o->options->base))) return no_memory(o);
    if (stat(m->base_path, &st) == 0 && S_ISDIR(st.st_mode)) {
        log_event(LOG_WARN, "base_differs",
                  "base=%s is a folder without a digest; %s was made over %s with sha256 %s",
                  m->base_path, m->converted->name, m->converted->base_file,
                  m->converted->base_sha256);
        return OK;
    }
    enum err e = mapped_open(&file, m->base_path, o->msg, o->msg_len);
    if (e) return e;
    sha256_hex(file.bytes, file.len, m->base_sha256);
    mapped_close(&file);
    if (strcmp(m->base_sha256, m->converted->base_sha256))
        log_event(LOG_WARN, "base_differs",
                  "base=%s has sha256 %s; %s was made over %s with sha256 %s", m->base_path,
                  m->base_sha256, m->converted->name, m->converted->base_file,
                  m->converted->base_sha256);
    return OK;
}

static enum err open_files(struct opening *o) {
    const char *path = o->options->path, *base = path;
    struct model *m = o->m;
    enum err e = OK;
    if (converted_is(path) && (e = converted_open(&m->converted, path, o->msg, o->msg_len)))
        return e;
    if (m->converted && m->converted->is_adapter) {
        progress(o, "checking the base", 0);
        if (o->options->base) {
            e = take_other_base(o);
        } else if (!(e = converted_find_base(m->converted, path, &m->base_path, o->msg,
                                             o->msg_len))) {
            memcpy(m->base_sha256, m->converted->base_sha256, SHA256_HEX);
        }
        base = m->base_path;
    } else if (o->options->base) {
        e = err_set(o->msg, o->msg_len, ERR_ARG, "%s is no adapter, so it takes no other base (%s)",
                    path, o->options->base);
    }
    if (!e) e = base_open(&o->base, base, o->msg, o->msg_len);
    if (!e) m->config = *base_config(o->base);
    if (!e && m->converted) e = converted_lay_over(m->converted, &m->config, o->msg, o->msg_len);
    return e;
}

/* urchin.json's name, else the file's or folder's. */
static enum err take_name(struct opening *o) {
    struct model *m = o->m;
    char *path = NULL;
    if (m->converted) {
        m->name = strdup(m->converted->name);
    } else if ((path = realpath(o->options->path, NULL))) {
        const char *last = strrchr(path, '/') + 1;
        size_t n = strlen(last);
        if (n > 5 && !strcmp(last + n - 5, ".gguf")) n -= 5;
        m->name = strndup(last, n);
        free(path);
    }
    m->info.name = m->name;
    return m->name ? OK : no_memory(o);
}

/* ---- attention and slots ---- */
static enum err override_attention(struct opening *o, struct attention_config *a) {
    const struct model_options *options = o->options;
    bool any = options->cache_size >= 0 || options->cache_recent >= 0 || options->cache_age >= 0 ||
               options->cache_fact_age >= 0 || options->retrieval_size >= 0 ||
               options->max_distance >= 0 || options->horizon >= 0;
    if (a->kind == ATTENTION_SOFTMAX) {
        if (!any) return OK;
        return err_set(o->msg, o->msg_len, ERR_ARG,
                       "%s has softmax attention: cache size, recent, age, fact age, "
                       "retrieval size, max distance and horizon are for Hedgehog models",
                       options->path);
    }
    if (options->max_distance >= 0 && !a->max_distance)
        return err_set(o->msg, o->msg_len, ERR_ARG,
                       "%s has map_position rope, which takes no max distance", options->path);
    if (options->cache_size > 0 && a->window != WINDOW_TERRACED)
        return err_set(o->msg, o->msg_len, ERR_ARG,
                       "%s has no terraced window, which a recall cache needs", options->path);
    if (options->cache_size >= 0) a->cache_size = options->cache_size;
    if (options->cache_recent >= 0)
        a->cache_recent = options->cache_recent;
    else if (options->cache_size >= 0 && a->cache_recent > a->cache_size)
        a->cache_recent = a->cache_size; /* a smaller cache asked for */
    if (options->retrieval_size > 0 && !a->retrieval_size)
        return err_set(o->msg, o->msg_len, ERR_ARG,
                       "%s names no retrieval heads, so there is nothing to give them",
                       options->path);
    if (options->retrieval_size >= 0) {
        if (a->retrieval_size) /* as large a part of them stays for recent keys */
            a->retrieval_recent =
                (int)((int64_t)a->retrieval_recent * options->retrieval_size / a->retrieval_size);
        a->retrieval_size = options->retrieval_size;
    }
    if (options->cache_age >= 0) a->cache_age = options->cache_age;
    if (options->cache_fact_age >= 0) a->cache_fact_age = options->cache_fact_age;
    a->cache_size *= options->cache_copies;
    a->retrieval_size *= options->cache_copies;
    if (options->max_distance >= 0) a->max_distance = options->max_distance;
    if (options->horizon >= 0) a->horizon = options->horizon;
    return OK;
}

static enum err new_attention(struct opening *o) {
    struct model *m = o->m;
    int n_layers = m->config.n_layers;
    struct attention_weights *weights = calloc((size_t)n_layers, sizeof *weights);
    if (!weights) return no_memory(o);
    for (int i = 0; m->converted && i < n_layers; i++) {
        const struct converted_layer *l = &m->converted->layers[i];
        const bool *retrieval = m->converted->retrieval;
        weights[i] = (struct attention_weights){
            .map_q = l->map_q,
            .map_k = l->map_k,
            .mix = l->mix,
            .retrieval = retrieval ? retrieval + i * m->config.n_kv_heads : NULL};
    }
    enum err e = attentions_new(&m->attention, &m->info.attention, m->info.softmax_layers,
                                m->info.max_seq_len, weights, n_layers, m->rope, m->team,
                                m->max_rows, m->max_runs);
    free(weights);
    if (e)
        return err_set(o->msg, o->msg_len, e, "%s: the attention cannot be set up (%s)",
                       o->options->path, err_name(e));
    m->slot_stride = attentions_slot_bytes(m->attention);
    return OK;
}

/* Softmax, in all layers or some: the cache has max_seq_len rows.  The model's context by default,
 * or what one slot's share of the budget holds. */
static enum err fit_context(struct opening *o) {
    struct model *m = o->m;
    size_t share = o->budget / (size_t)(o->options->n_slots ? o->options->n_slots : 1);
    int64_t *rows = &m->info.max_seq_len;
    enum err e = new_attention(o);
    while (!o->options->max_seq_len && *rows > 1 &&
           (e == ERR_NOMEM || (!e && m->slot_stride > share))) {
        /* at least one fewer, so that it ends whatever a slot holds besides rows */
        int64_t fewer =
            e ? *rows / 2 : (int64_t)((double)*rows * (double)share / (double)m->slot_stride);
        *rows = fewer < 1 ? 1 : fewer < *rows ? fewer : *rows - 1;
        attentions_free(m->attention);
        m->attention = NULL;
        e = new_attention(o);
    }
    if (!e && !o->options->max_seq_len && *rows < m->config.context)
        log_event(LOG_WARN, "context_limited",
                  "the softmax cache of %s holds %lld tokens instead of %lld: more does not fit in "
                  "%zu MiB",
                  m->name, (long long)*rows, (long long)m->config.context, o->budget >> 20);
    return e;
}

/* How many slots there are to be: as asked, or as many as fit; on a GPU it is known only once its
 * weights are there. */
static enum err count_slots(struct opening *o, size_t available) {
    const struct model_options *options = o->options;
    struct model *m = o->m;
    size_t n = options->n_slots ? (size_t)options->n_slots : o->budget / m->slot_stride;
    if (!options->n_slots) n = n < 1 ? 1 : n > MAX_AUTO_SLOTS ? MAX_AUTO_SLOTS : n;
    if (n > available / m->slot_stride)
        return err_set(
            o->msg, o->msg_len, ERR_NOMEM,
            "%zu sequences of %.1f MB do not fit in the %.1f MB of memory that are free: "
            "ask for fewer, or for a shorter max sequence length",
            n, (double)m->slot_stride / 1e6, (double)available / 1e6);
    m->info.n_slots = (int)n;
    return OK;
}

/* Bytes that the weights will take, near enough to size a softmax cache before they are there. */
static size_t weight_bytes_ahead(const struct opening *o) {
    static const double bytes_each[] = {[WEIGHT_FP32] = 4,
                                        [WEIGHT_BF16] = 2,
                                        [WEIGHT_INT8] = 1.1,
                                        [WEIGHT_INT4] = 0.7,
                                        [WEIGHT_FP8] = 1.1};
    return (size_t)((double)base_n_params(o->base) * bytes_each[o->m->info.weights]);
}

static enum err size_slots(struct opening *o) {
    const struct model_options *options = o->options;
    struct model *m = o->m;
    struct attention_config *a = &m->info.attention;
    size_t available = budget_available();
    int most = options->n_slots ? options->n_slots : MAX_AUTO_SLOTS;
    m->max_runs = most < m->max_rows ? most : m->max_rows; /* a run has a row at least */
    if (o->gpu) {
        size_t weights = weight_bytes_ahead(o);
        available = gpu_model_device_free_bytes(o->gpu);
        available = available > weights ? available - weights : 0;
    }
    o->budget = options->memory_budget ? options->memory_budget
                : o->gpu               ? available / 10 * 9
                                       : available / 4;

    if (m->config.architecture == BASE_GPT2 && options->max_seq_len > m->config.context)
        return err_set(
            o->msg, o->msg_len, ERR_ARG,
            "%s has learned positions up to %lld: a max sequence length of %lld is past them",
            options->path, (long long)m->config.context, (long long)options->max_seq_len);
    bool grows = a->kind == ATTENTION_SOFTMAX || m->info.softmax_layers;
    if (grows || m->config.architecture == BASE_GPT2)
        m->info.max_seq_len = options->max_seq_len ? options->max_seq_len : m->config.context;
    else
        m->info.max_seq_len = options->max_seq_len;
    if (a->kind == ATTENTION_SOFTMAX) a->max_seq_len = m->info.max_seq_len;

    char reason[300] = "";
    enum err e = attention_config_check(a, reason, sizeof reason);
    if (e) return err_set(o->msg, o->msg_len, e, "%s: %s", options->path, reason);
    e = grows ? fit_context(o) : new_attention(o);
    if (e) return e;
    if (a->kind == ATTENTION_SOFTMAX) a->max_seq_len = m->info.max_seq_len;
    return o->gpu ? OK : count_slots(o, available);
}

/* Weights, slots and scratch of the device; what the CPU packed is given back. */
static enum err move_to_gpu(struct opening *o) {
    struct model *m = o->m;
    struct gpu_model_options options = {
        .name = o->options->path,
        .gpu = o->gpu,
        .base = &m->config,
        .weights = m->weights,
        .twin = attentions_first(m->attention),
        .n_slots = o->options->n_slots,
        .memory_budget = o->options->memory_budget,
        .max_rows = m->max_rows,
        .max_logits = m->max_logits,
        .max_runs = m->max_runs,
    };
    o->gpu = NULL; /* taken */
    progress(o, "moving weights to the GPU", 0);
    enum err e = gpu_model_new(&m->gpu, &options, o->msg, o->msg_len);
    if (e) return e;
    m->info.n_slots = gpu_model_n_slots(m->gpu);
    m->slot_stride = gpu_model_slot_bytes(m->gpu);
    weights_free(m->weights);
    m->weights = NULL;
    progress(o, "moving weights to the GPU", 1);
    return OK;
}

static enum err take_slots(struct opening *o) {
    struct model *m = o->m;
    m->slots = memory_map((size_t)m->info.n_slots * m->slot_stride);
    m->slot_ready = calloc((size_t)m->info.n_slots, sizeof *m->slot_ready);
    return m->slots && m->slot_ready ? OK : no_memory(o);
}

/* ---- the rest ---- */
/* What laying out a step needs, wherever it runs. */
static enum err take_step(struct opening *o) {
    struct model *m = o->m;
    size_t rows = (size_t)m->max_rows, slots = (size_t)m->info.n_slots;
    m->runs = calloc((size_t)m->max_runs, sizeof *m->runs);
    m->slot_step = calloc(slots, sizeof *m->slot_step);
    m->tokens = calloc(rows, sizeof *m->tokens);
    m->positions = calloc(rows, sizeof *m->positions);
    m->logit_rows = calloc((size_t)m->max_logits, sizeof *m->logit_rows);
    bool all = m->runs && m->slot_step && m->tokens && m->positions && m->logit_rows;
    return all ? OK : no_memory(o);
}

static enum err take_scratch(struct opening *o) {
    struct model *m = o->m;
    const struct base_config *c = &m->config;
    size_t rows = (size_t)m->max_rows, logits = (size_t)m->max_logits;
    size_t hidden = (size_t)c->hidden_dim, q = (size_t)(c->n_heads * c->head_dim),
           kv = (size_t)(c->n_kv_heads * c->head_dim);
    size_t gate_up = (size_t)matrix_n_out(m->weights->layers[0].gate_up);
    int widest = c->ffn_dim > c->hidden_dim ? c->ffn_dim : c->hidden_dim;
    if ((int)q > widest) widest = (int)q;
    m->x = calloc(rows * hidden, sizeof(float));
    m->normed = calloc(rows * hidden, sizeof(float));
    m->delta = calloc(rows * hidden, sizeof(float));
    m->qkv = calloc(rows * (q + 2 * kv), sizeof(float));
    m->y = calloc(rows * q, sizeof(float));
    m->ffn = calloc(rows * gate_up, sizeof(float));
    m->logits = calloc(logits * (size_t)c->vocab_size, sizeof(float));
    if (!m->x || !m->normed || !m->delta || !m->qkv || !m->y || !m->ffn || !m->logits ||
        matmul_scratch_new(&m->scratch, m->max_rows, widest))
        return no_memory(o);
    return OK;
}

static enum err open_tokenizer(struct opening *o) {
    struct model *m = o->m;
    enum err e = base_tokenizer(o->base, &m->tokenizer, o->msg, o->msg_len);
    if (e) return e;
    if (tokenizer_vocab_size(m->tokenizer) > m->config.vocab_size)
        log_event(LOG_WARN, "tokens_without_weights",
                  "the tokenizer of %s knows %d tokens, the model %d: the others cannot be read",
                  m->name, tokenizer_vocab_size(m->tokenizer), m->config.vocab_size);
    return chat_new(&m->chat, m->tokenizer, tokenizer_chat_template(m->tokenizer),
                    o->options->chat_template, o->msg, o->msg_len);
}

static enum err gather_eos(struct opening *o) {
    struct model *m = o->m;
    int n_stops = 0, n = 0;
    const int32_t *stops = chat_stop_tokens(m->chat, &n_stops);
    base_config_add_eos(&m->config, tokenizer_eos(m->tokenizer));
    for (int i = 0; i < n_stops; i++)
        base_config_add_eos(&m->config, stops[i]);
    m->eos_ids = calloc((size_t)m->config.n_eos_ids + 1, sizeof *m->eos_ids);
    if (!m->eos_ids) return no_memory(o);
    for (int i = 0; i < m->config.n_eos_ids; i++)
        if (m->config.eos_ids[i] < m->config.vocab_size) m->eos_ids[n++] = m->config.eos_ids[i];
    m->info.eos_ids = m->eos_ids;
    m->info.n_eos_ids = n;
    return OK;
}

static void fill_info(struct opening *o) {
    struct model *m = o->m;
    struct model_info *i = &m->info;
    const struct base_config *c = &m->config;
    i->architecture = c->architecture == BASE_GPT2 ? "gpt2" : "llama";
    i->n_layers = c->n_layers;
    i->hidden_dim = c->hidden_dim;
    i->ffn_dim = c->ffn_dim;
    i->vocab_size = c->vocab_size;
    i->context = c->context;
    i->measured_to =
        m->converted && m->converted->measured_to ? m->converted->measured_to : c->context;
    i->weight_bytes = m->gpu ? gpu_model_weight_bytes(m->gpu) : m->weights->bytes;
    if (m->converted) i->weight_bytes += (size_t)m->converted->n_map_params * sizeof(float);
    i->n_params = base_n_params(o->base) + (m->converted ? m->converted->n_map_params : 0);
    i->slot_bytes = m->slot_stride;
    i->state_bytes = attentions_state_bytes(m->attention, i->max_seq_len);
    i->base_path = m->base_path;
    i->base_sha256 = m->base_path && *m->base_sha256 ? m->base_sha256 : NULL;
}

static enum err check_options(const struct model_options *o, char *msg, size_t msg_len) {
    const struct {
        const char *name;
        int64_t value, least, most;
    } bounds[] = {
        {"max_rows", o->max_rows, 1, 65536},
        {"max_logits", o->max_logits, 1, 65536},
        {"n_slots", o->n_slots, 0, 65536},
        {"max_seq_len", o->max_seq_len, 0, (int64_t)1 << 53},
        {"weights", o->weights, WEIGHTS_AUTO, WEIGHT_FP8},
    };
    for (size_t i = 0; i < sizeof bounds / sizeof bounds[0]; i++)
        if (bounds[i].value < bounds[i].least || bounds[i].value > bounds[i].most)
            return err_set(msg, msg_len, ERR_ARG, "%s is %lld, not %lld to %lld", bounds[i].name,
                           (long long)bounds[i].value, (long long)bounds[i].least,
                           (long long)bounds[i].most);
    return OK;
}

/* A GPU knows one kind of attention a model. */
static enum err check_device(struct opening *o) {
    struct model *m = o->m;
    if (!o->gpu || !m->info.softmax_layers) return OK;
    if (o->options->device == DEVICE_CUDA)
        return err_set(o->msg, o->msg_len, ERR_ARG,
                       "%s keeps softmax attention in some layers, which a GPU cannot do yet: run "
                       "it with --device cpu",
                       o->options->path);
    gpu_model_device_close(o->gpu);
    o->gpu = NULL;
    m->info.device = "cpu";
    return OK;
}

/* The GPU that is to run the model, if one is; early, for the sentence why not should not wait for
 * the weights. */
static enum err choose_device(struct opening *o) {
    enum device device = o->options->device;
    bool fp8 = o->options->weights == WEIGHT_FP8;
    o->m->info.device = "cpu";
    enum err e = device == DEVICE_CPU ? ERR_NO_CUDA : gpu_model_device(&o->gpu, o->msg, o->msg_len);
    if (e == ERR_NO_CUDA && device != DEVICE_CUDA)
        return fp8 ? err_set(o->msg, o->msg_len, ERR_ARG,
                             "fp8 weights are for a GPU (--device cuda); int8 takes as much memory "
                             "on the CPU")
                   : OK;
    if (e) return e;
    o->m->info.device = gpu_model_device_name(o->gpu);
    if (fp8 && !gpu_model_device_has_fp8(o->gpu))
        return err_set(o->msg, o->msg_len, ERR_ARG,
                       "%s does not multiply fp8 weights: that needs compute capability 8.9 (Ada, "
                       "Hopper) or later; int8 takes as much memory",
                       o->m->info.device);
    return OK;
}

static enum err open_model(struct opening *o) {
    const struct model_options *options = o->options;
    struct model *m = o->m;
    enum err e = choose_device(o);
    if (!e) e = open_files(o);
    if (!e) e = take_name(o);
    if (e) return e;
    if (m->converted)
        m->info.attention = m->converted->attention;
    else
        m->info.attention = (struct attention_config){.kind = ATTENTION_SOFTMAX,
                                                      .n_heads = m->config.n_heads,
                                                      .n_kv_heads = m->config.n_kv_heads,
                                                      .head_dim = m->config.head_dim};
    if (m->converted) m->info.retrieval = m->converted->retrieval;
    if (m->converted && m->converted->n_softmax_layers) {
        m->info.softmax_layers = m->converted->softmax_layers;
        m->info.n_softmax_layers = m->converted->n_softmax_layers;
    }
    if ((e = check_device(o))) return e;
    m->info.attention.kv_type = options->kv_type;
    if ((e = override_attention(o, &m->info.attention))) return e;
    if (m->config.architecture == BASE_LLAMA &&
        (e = rope_new(&m->rope, &m->config.rope, o->msg, o->msg_len)))
        return e;
    m->info.weights = options->weights == WEIGHTS_AUTO ? base_natural_weights(o->base)
                                                       : (enum weight_type)options->weights;
    if ((e = open_tokenizer(o)) || (e = size_slots(o))) return e;
    e = weights_load(&m->weights, o->base, m->converted, m->info.weights, m->team,
                     options->progress, options->progress_arg, o->msg, o->msg_len);
    if (o->gpu) {
        if (!e) e = move_to_gpu(o);
    } else {
        if (!e) e = take_slots(o);
        if (!e) e = take_scratch(o);
    }
    if (!e) e = take_step(o);
    if (!e) e = gather_eos(o);
    if (!e) fill_info(o);
    if (m->converted) converted_drop_files(m->converted);
    return e;
}

enum err model_open(struct model **out, const struct model_options *options, char *msg,
                    size_t msg_len) {
    struct stat st;
    enum err e = check_options(options, msg, msg_len);
    if (e) return e;
    if (stat(options->path, &st) != 0)
        return err_set(msg, msg_len, ERR_IO, "%s: %m", options->path);
    struct opening o = {
        .options = options, .msg = msg, .msg_len = msg_len, .m = calloc(1, sizeof *o.m)};
    if (!o.m) return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", options->path);
    o.m->team = options->team;
    o.m->max_rows = options->max_rows;
    o.m->max_logits = options->max_logits;
    e = open_model(&o);
    base_close(o.base);
    gpu_model_device_close(o.gpu);
    if (e)
        model_close(o.m);
    else
        *out = o.m;
    return e;
}

void model_close(struct model *m) {
    if (!m) return;
    if (m->team) team_forget(m->team); /* a worker may still be bringing weights near */
    gpu_model_free(m->gpu);            /* borrows the attention */
    attentions_free(m->attention); /* borrows rope and the converted maps */
    rope_free(m->rope);
    weights_free(m->weights);
    converted_close(m->converted);
    chat_free(m->chat); /* borrows the tokenizer */
    tokenizer_free(m->tokenizer);
    if (m->slots) memory_unmap(m->slots, (size_t)m->info.n_slots * m->slot_stride);
    matmul_scratch_free(m->scratch);
    void *blocks[] = {m->name,       m->base_path, m->eos_ids, m->slot_ready,
                      m->runs,       m->slot_step, m->tokens,  m->positions,
                      m->logit_rows, m->x,         m->normed,  m->delta,
                      m->qkv,        m->y,         m->ffn,     m->logits};
    for (size_t i = 0; i < sizeof blocks / sizeof blocks[0]; i++)
        free(blocks[i]);
    free(m);
}

const struct model_info *model_info(const struct model *m) {
    return &m->info;
}
const struct tokenizer *model_tokenizer(const struct model *m) {
    return m->tokenizer;
}
const struct chat *model_chat(const struct model *m) {
    return m->chat;
}

/* ---- slots ---- */
/* Slots are cleared when first used: touching them all took longer at start than everything else
 * together. */
static void *slot_at(const struct model *m, int slot) {
    void *at = m->slots + (size_t)slot * m->slot_stride;
    if (!m->slot_ready[slot]) {
        attentions_slot_clear(m->attention, at);
        m->slot_ready[slot] = true;
    }
    return at;
}

struct attention *model_attention(struct model *m) {
    return attentions_first(m->attention);
}
const struct rope *model_rope(const struct model *m) {
    return m->rope;
}
void *model_slot(struct model *m, int slot) {
    return m->gpu ? NULL : slot_at(m, slot);
}

void model_slot_clear(struct model *m, int slot) {
    if (m->gpu)
        gpu_model_slot_clear(m->gpu, slot);
    else
        m->slot_ready[slot] = false;
}

void model_slot_copy(struct model *m, int dst, int src) {
    if (dst == src) return;
    if (m->gpu) {
        gpu_model_slot_copy(m->gpu, dst, src);
        return;
    }
    attentions_slot_copy(m->attention, m->slots + (size_t)dst * m->slot_stride, slot_at(m, src));
    m->slot_ready[dst] = true;
}

int64_t model_slot_position(const struct model *m, int slot) {
    if (m->gpu) return gpu_model_slot_position(m->gpu, slot);
    return m->slot_ready[slot] ? attentions_slot_position(m->attention, slot_at(m, slot)) : 0;
}

size_t model_slot_state_bytes(const struct model *m, int slot) {
    return attentions_state_bytes(m->attention, model_slot_position(m, slot));
}

enum err model_slot_save(const struct model *m, int slot, void *out) {
    if (m->gpu) return gpu_model_slot_save(m->gpu, slot, out);
    attentions_state_save(m->attention, out, slot_at(m, slot));
    return OK;
}

enum err model_slot_load(struct model *m, int slot, const void *state, size_t bytes, char *msg,
                         size_t msg_len) {
    if (m->gpu) return gpu_model_slot_load(m->gpu, slot, state, bytes, msg, msg_len);
    enum err e = attentions_state_load(m->attention, slot_at(m, slot), state, bytes, msg, msg_len);
    if (e) m->slot_ready[slot] = false; /* whatever was half loaded */
    return e;
}
