/* merge.c - from an adapter and its base to one folder. */
#include "convert/merge.h"

#include "compute/ops.h"
#include "convert/files.h"
#include "convert/merge_config.h"
#include "convert/tokenizer_files.h"
#include "model/base.h"
#include "model/converted.h"
#include "model/mapped.h"
#include "model/weights.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PIECE_ROWS = 64, MAX_DELTAS = 3, INTERRUPTED = 130 };

static volatile sig_atomic_t stopping;

static void stop(int signal) {
    (void)signal;
    stopping = 1;
}

struct delta { /* a low-rank part, of rows first .. first + n_rows */
    const struct low_rank *part;
    int first, n_rows;
};

struct tensor {
    char name[96];
    const struct base_tensor *source;
    struct delta deltas[MAX_DELTAS];
    int n_deltas;
    bool bf16, transposed, vector;
};

struct merge {
    const struct settings *settings;
    struct converted *converted; /* owned, as all pointers below */
    struct base *base;
    struct tensor *tensors;
    int n_tensors;
    float *rows;       /* [n][n_in] of a piece: PIECE_ROWS, or a whole matrix */
    uint16_t *rounded; /* the same piece as bf16 */
    char *out, *aside; /* FOLDER, FOLDER.new */
    bool made;         /* aside is there and ours */
    size_t bytes;      /* written */
    char *msg;
    size_t msg_len;
};

#define FAIL(m, code, ...) err_set((m)->msg, (m)->msg_len, code, __VA_ARGS__)

static enum err no_memory(struct merge *m) {
    return FAIL(m, ERR_NOMEM, "out of memory");
}

/* ---- opening ---- */
static enum err check_settings(struct merge *m) {
    const struct settings *s = m->settings;
    if (!s->model)
        return FAIL(m, ERR_ARG,
                    "name the converted model: urchin convert --merge MODEL --out FOLDER");
    if (!s->out) return FAIL(m, ERR_ARG, "--out is missing: name a folder for the whole model");
    if (s->text) return FAIL(m, ERR_ARG, "--merge learns nothing: leave --text out");
    if (!converted_is(s->model))
        return FAIL(m, ERR_ARG, "%s is no converted model (it has no urchin.json)", s->model);
    return OK;
}

static enum err open_model(struct merge *m) {
    const struct settings *s = m->settings;
    enum err e = converted_open(&m->converted, s->model, m->msg, m->msg_len);
    if (e) return e;
    char *path = NULL;
    if (!m->converted->is_adapter && s->base)
        return FAIL(m, ERR_ARG, "%s is no adapter, so it takes no other base (%s)", s->model,
                    s->base);
    if (m->converted->is_adapter && !s->base)
        e = converted_find_base(m->converted, s->model, &path, m->msg, m->msg_len);
    else if (!(path = strdup(s->base ? s->base : s->model)))
        e = no_memory(m);
    if (!e) e = base_open(&m->base, path, m->msg, m->msg_len);
    free(path);
    if (!e) e = converted_lay_over(m->converted, base_config(m->base), m->msg, m->msg_len);
    return e;
}

/* ---- which tensors ---- */
static void add_delta(struct merge *m, struct tensor *t, int layer, enum low_rank_target target,
                      int first, int n_rows) {
    if (!m->converted->targets[target]) return;
    t->deltas[t->n_deltas++] =
        (struct delta){&m->converted->layers[layer].low_rank[target], first, n_rows};
}

static void add_deltas(struct merge *m, struct tensor *t, enum base_part part, int layer) {
    const struct base_config *c = base_config(m->base);
    int q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    if (part == PART_Q || part == PART_QKV) add_delta(m, t, layer, LOW_RANK_Q, 0, q);
    if (part == PART_K) add_delta(m, t, layer, LOW_RANK_K, 0, kv);
    if (part == PART_V) add_delta(m, t, layer, LOW_RANK_V, 0, kv);
    if (part == PART_QKV) add_delta(m, t, layer, LOW_RANK_K, q, kv);
    if (part == PART_QKV) add_delta(m, t, layer, LOW_RANK_V, q + kv, kv);
    if (part == PART_O) add_delta(m, t, layer, LOW_RANK_O, 0, c->hidden_dim);
}

static bool is_bf16(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (bf16_float(bf16_round(x[i])) != x[i]) return false;
    return true;
}

/* Would bf16 lose nothing of it?  For the small tensors that stay exact. */
static enum err all_bf16(struct merge *m, const struct base_tensor *t, bool *all) {
    float *row = malloc((size_t)t->n_in * sizeof *row);
    if (!row) return no_memory(m);
    *all = true;
    for (int r = 0; r < t->n_out && *all; r++) {
        base_read(t, r, 1, row);
        *all = is_bf16(row, (size_t)t->n_in);
    }
    free(row);
    return OK;
}

static enum err add_tensor(struct merge *m, enum base_part part, int layer) {
    const struct base_config *c = base_config(m->base);
    const struct base_tensor *source = base_tensor(m->base, part, layer);
    if (!source || (part == PART_HEAD && c->tied)) return OK;
    struct tensor *t = &m->tensors[m->n_tensors++];
    *t = (struct tensor){.source = source, .vector = source->n_in == 1, .bf16 = true};
    base_part_name(m->base, part, layer, t->name, sizeof t->name);
    t->transposed = c->architecture == BASE_GPT2 && part >= PART_ATTN_NORM && !t->vector;
    add_deltas(m, t, part, layer);
    return t->vector || part == PART_POSITION ? all_bf16(m, source, &t->bf16) : OK;
}

static enum err list_tensors(struct merge *m) {
    int n_layers = base_config(m->base)->n_layers;
    size_t most = 0;
    m->tensors = calloc((size_t)(n_layers + 1) * N_PARTS, sizeof *m->tensors);
    if (!m->tensors) return no_memory(m);
    enum err e = OK;
    for (int p = 0; p < PART_ATTN_NORM && !e; p++)
        e = add_tensor(m, (enum base_part)p, 0);
    for (int layer = 0; layer < n_layers && !e; layer++)
        for (int p = PART_ATTN_NORM; p < N_PARTS && !e; p++)
            e = add_tensor(m, (enum base_part)p, layer);
    for (int i = 0; i < m->n_tensors; i++) {
        const struct tensor *t = &m->tensors[i];
        size_t n =
            (size_t)(t->transposed ? t->source->n_out : PIECE_ROWS) * (size_t)t->source->n_in;
        most = n > most ? n : most;
    }
    m->rows = malloc(most * sizeof *m->rows);
    m->rounded = malloc(most * sizeof *m->rounded);
    return e ? e : m->rows && m->rounded ? OK : no_memory(m);
}

/* ---- their values ---- */
/* Rows first .. first + n of W + scale B A into m->rows. */
static enum err read_rows(struct merge *m, const struct tensor *t, int first, int n) {
    const struct base_tensor *s = t->source;
    size_t n_in = (size_t)s->n_in;
    base_read(s, first, n, m->rows);
    for (int d = 0; d < t->n_deltas; d++)
        for (int r = 0; r < n; r++) {
            int index = first + r - t->deltas[d].first;
            if (index < 0 || index >= t->deltas[d].n_rows) continue;
            weights_add_low_rank(t->deltas[d].part, m->converted->rank, m->converted->scale, index,
                                 s->n_in, m->rows + (size_t)r * n_in);
        }
    for (size_t i = 0; i < (size_t)n * n_in; i++)
        if (!isfinite(m->rows[i]))
            return FAIL(m, ERR_FORMAT, "%s: tensor %s holds a value that is not finite", s->file,
                        s->name);
    return OK;
}

/* GPT-2's Conv1D: [n_in, n_out]. */
static void round_transposed(struct merge *m, int n_out, int n_in) {
    for (int r = 0; r < n_out; r++)
        for (int i = 0; i < n_in; i++)
            m->rounded[(size_t)i * (size_t)n_out + (size_t)r] =
                bf16_round(m->rows[(size_t)r * (size_t)n_in + (size_t)i]);
}

static enum err write_tensor(struct merge *m, const struct tensor *t, FILE *file) {
    int n_out = t->source->n_out, n_in = t->source->n_in;
    int step = t->transposed ? n_out : PIECE_ROWS;
    for (int first = 0; first < n_out; first += step) {
        int n = n_out - first < step ? n_out - first : step;
        size_t values = (size_t)n * (size_t)n_in;
        enum err e = read_rows(m, t, first, n);
        if (e) return e;
        if (stopping) return FAIL(m, ERR_IO, "interrupted");
        if (t->transposed)
            round_transposed(m, n_out, n_in);
        else
            for (size_t i = 0; i < values && t->bf16; i++)
                m->rounded[i] = bf16_round(m->rows[i]);
        size_t size = t->bf16 ? sizeof *m->rounded : sizeof *m->rows;
        const void *from = t->bf16 ? (const void *)m->rounded : m->rows;
        if (fwrite(from, size, values, file) != values) return ERR_IO; /* errno says why */
        m->bytes += values * size;
    }
    return OK;
}

/* ---- model.safetensors ---- */
static char *header_text(const struct merge *m) { /* padded to 8 bytes; malloc'd */
    enum { LINE = 320 };
    char *text = malloc((size_t)m->n_tensors * LINE + 64);
    if (!text) return NULL;
    size_t len = (size_t)sprintf(text, "{\"__metadata__\":{\"format\":\"pt\"}"), at = 0;
    for (int i = 0; i < m->n_tensors; i++) {
        const struct tensor *t = &m->tensors[i];
        int n_out = t->source->n_out, n_in = t->source->n_in;
        size_t bytes = (size_t)n_out * (size_t)n_in * (t->bf16 ? 2 : 4);
        len += (size_t)snprintf(text + len, LINE, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%d",
                                t->name, t->bf16 ? "BF16" : "F32", t->transposed ? n_in : n_out);
        if (!t->vector)
            len += (size_t)snprintf(text + len, LINE, ",%d", t->transposed ? n_out : n_in);
        len += (size_t)snprintf(text + len, LINE, "],\"data_offsets\":[%zu,%zu]}", at, at + bytes);
        at += bytes;
    }
    text[len++] = '}';
    while (len % 8)
        text[len++] = ' ';
    text[len] = 0;
    return text;
}

/* F32 tensors first: their values must lie at whole multiples of four bytes.  Then as the base's
 * table has them. */
static int wider_first(const void *a, const void *b) {
    const struct tensor *x = a, *y = b;
    if (x->bf16 != y->bf16) return x->bf16 ? 1 : -1;
    return (x->source > y->source) - (x->source < y->source);
}

static enum err write_weights(struct merge *m) {
    qsort(m->tensors, (size_t)m->n_tensors, sizeof *m->tensors, wider_first);
    char *header = header_text(m), *path = path_join(m->aside, "model.safetensors");
    FILE *file = header && path ? fopen(path, "wbx") : NULL;
    enum err e = !header || !path ? no_memory(m) : file ? OK : ERR_IO;
    if (!e) {
        uint64_t len = strlen(header);
        if (fwrite(&len, sizeof len, 1, file) != 1 || fwrite(header, 1, len, file) != len)
            e = ERR_IO;
    }
    for (int i = 0; i < m->n_tensors && !e; i++)
        e = write_tensor(m, &m->tensors[i], file);
    if (!e && (fflush(file) || fsync(fileno(file)))) e = ERR_IO;
    int why = errno;
    if (file && fclose(file) && !e) e = ERR_IO, why = errno;
    if (e == ERR_IO && !*m->msg) FAIL(m, e, "cannot write '%s': %s", path, strerror(why));
    free(header);
    free(path);
    return e;
}

/* ---- hedgehog.safetensors ---- */
static enum err write_maps(struct merge *m) {
    const struct attention_config *a = &m->converted->attention;
    int n = 0, states = a->key_map_per_query_head ? a->n_heads : a->n_kv_heads;
    struct tensor_out *out = calloc(3 * (size_t)m->converted->n_layers + 1, sizeof *out);
    if (!out) return no_memory(m);
    for (int i = 0; i < m->converted->n_layers; i++) {
        const struct converted_layer *l = &m->converted->layers[i];
        if (!l->map_q) continue; /* softmax */
        const char *names[] = {"feature_map_q", "feature_map_k",
                               a->mixing == MIXING_UNIFIED ? "log_mix" : "window_factor"};
        const float *values[] = {l->map_q, l->map_k, l->mix};
        for (int k = 0; k < 3; k++, n++) {
            out[n] = (struct tensor_out){
                .n_dims = k < 2 ? 3 : 1,
                .dims = {k == 1 ? states : a->n_heads, a->head_dim, a->features},
                .values = values[k]};
            snprintf(out[n].name, sizeof out[n].name, "layers.%d.attn.%s", i, names[k]);
        }
    }
    enum err e =
        n ? file_replace_tensors(m->aside, "hedgehog.safetensors", out, n, m->msg, m->msg_len) : OK;
    free(out);
    return e;
}

/* ---- the small files ---- */
static bool is_there(const char *folder, const char *name) {
    char *path = path_join(folder, name);
    bool is = path && access(path, F_OK) == 0;
    free(path);
    return is;
}

static enum err copy_file(struct merge *m, const char *from, const char *name) {
    struct part part;
    char *path = path_join(from, name);
    if (!path) return no_memory(m);
    struct mapped file;
    enum err e = mapped_open(&file, path, m->msg, m->msg_len);
    free(path);
    if (e) return e;
    part = (struct part){file.bytes, file.len};
    e = file_replace(m->aside, name, &part, 1, m->msg, m->msg_len);
    mapped_close(&file);
    return e;
}

static enum err copy_files(struct merge *m, const char *from, const char *const *names) {
    enum err e = OK;
    for (int i = 0; names[i] && !e; i++)
        if (is_there(from, names[i])) e = copy_file(m, from, names[i]);
    return e;
}

static enum err write_small(struct merge *m) {
    static const char *const of_base[] = {"generation_config.json",
                                          "tokenizer.json",
                                          "tokenizer_config.json",
                                          "chat_template.jinja",
                                          "tokenizer.model",
                                          "special_tokens_map.json",
                                          "added_tokens.json",
                                          "vocab.json",
                                          "merges.txt",
                                          "LICENSE",
                                          "LICENSE.txt",
                                          "LICENSE.md",
                                          "NOTICE",
                                          NULL};
    static const char *const of_model[] = {"conversion.json", "conversion.html", "quality.json",
                                           "quality.html", NULL};
    const struct gguf *g = base_gguf(m->base);
    enum err e = merge_config_write(m->base, "bfloat16", m->aside, m->msg, m->msg_len);
    if (!e && g) {
        e = tokenizer_files_write(g, m->aside, m->msg, m->msg_len);
        if (e) {
            char why[512];
            snprintf(why, sizeof why, "%s", m->msg);
            FAIL(m, e, "%s: %s", base_path(m->base), why);
        }
    } else if (!e) {
        e = copy_files(m, base_path(m->base), of_base);
    }
    if (!e) e = copy_files(m, m->settings->model, of_model);
    if (!e)
        e = merge_urchin_write(m->settings->model, m->settings->name, m->aside, m->msg, m->msg_len);
    return e;
}

/* ---- the folder ---- */
static enum err name_folders(struct merge *m) {
    struct stat st;
    if (!(m->out = strdup(m->settings->out))) return no_memory(m);
    for (size_t len = strlen(m->out); len > 1 && m->out[len - 1] == '/';)
        m->out[--len] = 0;
    if (asprintf(&m->aside, "%s.new", m->out) < 0) {
        m->aside = NULL;
        return no_memory(m);
    }
    if (folder_count(m->out) > 0)
        return FAIL(m, ERR_ARG, "--out %s: the folder is not empty; name another", m->out);
    if (lstat(m->out, &st) == 0 && !S_ISDIR(st.st_mode)) /* a link could not be renamed over */
        return FAIL(m, ERR_ARG, "--out %s: that is there and is no folder", m->out);
    if (mkdir(m->aside, 0755))
        return errno == EEXIST
                   ? FAIL(m, ERR_IO, "%s is there, perhaps from a merge that was killed: remove it",
                          m->aside)
                   : FAIL(m, ERR_IO, "cannot make '%s': %s", m->aside, strerror(errno));
    m->made = true;
    return OK;
}

static void remove_aside(const struct merge *m) {
    DIR *dir = opendir(m->aside);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        unlinkat(dirfd(dir), entry->d_name, 0);
    }
    if (dir) closedir(dir);
    rmdir(m->aside);
}

static enum err merge(struct merge *m) {
    enum err e = check_settings(m);
    if (!e) e = open_model(m);
    if (!e) e = list_tensors(m);
    if (!e) e = name_folders(m);
    if (!e) e = write_small(m);
    if (!e) e = write_maps(m);
    if (!e) e = write_weights(m);
    if (!e && stopping) e = FAIL(m, ERR_IO, "interrupted");
    if (!e && rename(m->aside, m->out))
        e = FAIL(m, ERR_IO, "cannot rename '%s' to '%s': %s", m->aside, m->out, strerror(errno));
    if (e && m->made) remove_aside(m);
    return e;
}

int merge_main(const struct settings *settings) {
    char msg[1024] = "";
    struct merge m = {.settings = settings, .msg = msg, .msg_len = sizeof msg};
    struct sigaction action = {.sa_handler = stop, .sa_flags = SA_RESTART}, old[2];
    sigemptyset(&action.sa_mask);
    stopping = 0;
    sigaction(SIGINT, &action, &old[0]);
    sigaction(SIGTERM, &action, &old[1]);
    enum err e = merge(&m);
    sigaction(SIGINT, &old[0], NULL);
    sigaction(SIGTERM, &old[1], NULL);
    if (e && stopping)
        fprintf(stderr, "interrupted: nothing was written\n");
    else if (e)
        fprintf(stderr, "urchin convert: %s\n", *msg ? msg : err_name(e));
    else
        printf("%s: a whole model, %.1f MB of weights\n", m.out, (double)m.bytes / 1e6);
    free(m.rows);
    free(m.rounded);
    free(m.tensors);
    base_close(m.base);
    converted_close(m.converted);
    free(m.out);
    free(m.aside);
    return !e ? 0 : stopping ? INTERRUPTED : 1;
}
