/* record.c - the converted folder: maps, the two JSON files, links to the base. */
#include "convert/files.h"
#include "convert/merge_config.h"
#include "convert/run.h"
#include "convert/tokenizer_files.h"

#include "compute/cpu.h"
#include "config/version.h"
#include "model/base.h"
#include "model/mapped.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- the base ---- */
static const char *last_part(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static enum err describe_file(cJSON *o, const char *path, char *msg, size_t msg_len) {
    struct mapped file;
    char digest[SHA256_HEX];
    enum err e = mapped_open(&file, path, msg, msg_len);
    if (e) return e;
    sha256_hex(file.len ? file.bytes : "", file.len, digest);
    cJSON_AddStringToObject(o, "file", last_part(path));
    cJSON_AddNumberToObject(o, "bytes", (double)file.len);
    cJSON_AddStringToObject(o, "sha256", digest);
    mapped_close(&file);
    return OK;
}

/* What base_open and its tokenizer read of a Hugging Face folder. */
static int of_model(const struct dirent *entry) {
    static const char *const names[] = {"config.json",         "generation_config.json",
                                        "tokenizer.json",      "tokenizer_config.json",
                                        "chat_template.jinja", "model.safetensors.index.json"};
    const char *name = entry->d_name;
    size_t n = strlen(name);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(name, names[i])) return 1;
    return *name != '.' && n > 12 && !strcmp(name + n - 12, ".safetensors");
}

/* Calls fn for every such file, by name. */
static enum err each_file(const char *folder,
                          enum err (*fn)(void *arg, const char *path, const char *name, char *msg,
                                         size_t msg_len),
                          void *arg, char *msg, size_t msg_len) {
    struct dirent **entries;
    int n = scandir(folder, &entries, of_model, alphasort);
    if (n < 0)
        return err_set(msg, msg_len, ERR_IO, "cannot read '%s': %s", folder, strerror(errno));
    enum err e = OK;
    for (int i = 0; i < n; i++) {
        char *path = e ? NULL : path_join(folder, entries[i]->d_name);
        if (!e && !path) e = err_set(msg, msg_len, ERR_NOMEM, "out of memory");
        if (!e) e = fn(arg, path, entries[i]->d_name, msg, msg_len);
        free(path);
        free(entries[i]);
    }
    free(entries);
    return e;
}

static enum err list_file(void *arg, const char *path, const char *name, char *msg,
                          size_t msg_len) {
    cJSON *o = cJSON_CreateObject();
    (void)name;
    enum err e = describe_file(o, path, msg, msg_len);
    cJSON_AddItemToArray(arg, o);
    return e;
}

static enum err link_file(void *arg, const char *path, const char *name, char *msg,
                          size_t msg_len) {
    return file_link(arg, name, path, msg, msg_len);
}

/* All but weights. */
static enum err link_words(void *arg, const char *path, const char *name, char *msg,
                           size_t msg_len) {
    return strstr(name, ".safetensors") ? OK : link_file(arg, path, name, msg, msg_len);
}

enum err record_base(const char *path, const char *name, cJSON **base, cJSON **files, char *msg,
                     size_t msg_len) {
    cJSON *o = NULL, *list = NULL;
    enum err e;
    if (folder_is(path)) {
        o = cJSON_CreateNull();
        list = cJSON_CreateArray();
        e = each_file(path, list_file, list, msg, msg_len);
    } else if (*last_part(path) == '.') {
        e = err_set(msg, msg_len, ERR_ARG,
                    "%s: an adapter cannot name a base whose file begins with a dot", path);
    } else {
        o = cJSON_CreateObject();
        cJSON_AddStringToObject(o, "name", name);
        e = describe_file(o, path, msg, msg_len);
    }
    if (!e && !o) e = err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    if (e) {
        cJSON_Delete(o);
        cJSON_Delete(list);
        return e;
    }
    *base = o;
    *files = list;
    return OK;
}

/* ---- tensors ---- */
/* Maps and mixing as they are in the end. */
static const float *layer_maps(const struct run *run, int layer) {
    const float *w = run->fine ? run->fine->w : run->training->w;
    return w + (size_t)layer * run->training->n_layer_params;
}

static enum err write_tensors(const struct run *run, char *msg, size_t msg_len) {
    static const char *const targets[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
    const struct training *t = run->training;
    const struct attention_config *a = &run->recipe.attention;
    const struct finetune *f = run->recipe.finetune.method == FINETUNE_LOW_RANK ? run->fine : NULL;
    int n = 0, states = a->key_map_per_query_head ? a->n_heads : a->n_kv_heads,
        rank = run->recipe.finetune.rank;
    struct tensor_out *tensors =
        calloc((size_t)t->n_layers * (3 + 2 * N_LOW_RANK_TARGETS), sizeof *tensors);
    if (!tensors) return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    n = 0;
    for (int i = 0; i < t->n_layers; i++) {
        const float *w = layer_maps(run, i);
        struct tensor_out *out = tensors + n;
        const struct tensor_out maps[] = {
            {.n_dims = 3, .dims = {a->n_heads, a->head_dim, a->features}, .values = w},
            {.n_dims = 3,
             .dims = {states, a->head_dim, a->features},
             .values = w + student_map_k(a)},
            {.n_dims = 1, .dims = {a->n_heads}, .values = w + student_mix(a)}};
        const char *parts[] = {"feature_map_q", "feature_map_k",
                               a->mixing == MIXING_UNIFIED ? "log_mix" : "window_factor"};
        int n_maps = recipe_keeps_softmax(&run->recipe, i) ? 0 : 3;
        for (int k = 0; k < n_maps; k++) {
            out[k] = maps[k];
            snprintf(out[k].name, sizeof out[k].name, "layers.%d.attn.%s", i, parts[k]);
        }
        n += n_maps;
        for (int target = 0; f && target < N_LOW_RANK_TARGETS; target++, n += 2) {
            struct low_rank_part p =
                low_rank_part(&f->base->config, rank, (enum low_rank_target)target);
            const float *low =
                f->w + f->n_maps + (size_t)i * low_rank_floats(&f->base->config, rank);
            tensors[n] =
                (struct tensor_out){.n_dims = 2, .dims = {rank, p.n_in}, .values = low + p.a};
            tensors[n + 1] =
                (struct tensor_out){.n_dims = 2, .dims = {p.n_out, rank}, .values = low + p.b};
            for (int k = 0; k < 2; k++)
                snprintf(tensors[n + k].name, sizeof tensors[n].name, "layers.%d.attn.%s.lora_%c",
                         i, targets[target], "AB"[k]);
        }
    }
    enum err e =
        file_replace_tensors(run->folder, "hedgehog.safetensors", tensors, n, msg, msg_len);
    free(tensors);
    return e;
}

enum err record_words(const struct run *run, const char *base_path, char *msg, size_t msg_len) {
    struct base *base;
    char why[512] = "";
    if (run->recipe.finetune.method != FINETUNE_FULL || folder_is(base_path)) return OK;
    enum err e = base_open(&base, base_path, msg, msg_len);
    if (e) return e;
    e = merge_config_write(base, "float32", run->folder, msg, msg_len);
    if (!e && (e = tokenizer_files_write(base_gguf(base), run->folder, why, sizeof why)))
        err_set(msg, msg_len, e, "%s: %s", base_path, why);
    base_close(base);
    if (e) { /* part of a model is none */
        static const char *const names[] = {"config.json", "generation_config.json",
                                            "tokenizer.json", "tokenizer_config.json"};
        for (int i = 0; i < 4; i++) {
            char *path = path_join(run->folder, names[i]);
            if (path) unlink(path);
            free(path);
        }
    }
    return e;
}

/* All weights in fp32, under the names and in the shapes of a Hugging Face folder. */
static enum err write_network(const struct run *run, const struct base *base, char *msg,
                              size_t msg_len) {
    const struct network *net = run->fine->own;
    int layers = net->config.n_layers, n = 0;
    struct tensor_out *tensors = calloc((size_t)(layers + 1) * N_PARTS, sizeof *tensors);
    float **turned = calloc((size_t)(layers + 1) * N_PARTS, sizeof *turned);
    enum err e = tensors && turned ? OK : err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    for (int part = 0; !e && part < N_PARTS; part++)
        for (int i = 0; !e && i < (part < PART_ATTN_NORM ? 1 : layers); i++) {
            const struct base_tensor *t = base_tensor(base, (enum base_part)part, i);
            if (!t || (part == PART_HEAD && net->config.tied)) continue;
            struct tensor_out *out = &tensors[n++];
            const float *w = network_part(net, (enum base_part)part, i);
            size_t rows = (size_t)t->n_out, columns = (size_t)t->n_in;
            bool vector = t->n_in == 1, transposed = net->config.architecture == BASE_GPT2 &&
                                                     part >= PART_ATTN_NORM && !vector;
            *out = (struct tensor_out){
                .n_dims = vector ? 1 : 2, .dims = {t->n_out, t->n_in}, .values = w};
            base_part_name(base, (enum base_part)part, i, out->name, sizeof out->name);
            if (!transposed) continue;
            float *y = turned[n - 1] = malloc(rows * columns * sizeof *y);
            if (!y) {
                e = err_set(msg, msg_len, ERR_NOMEM, "out of memory");
                continue;
            }
            for (size_t r = 0; r < rows; r++)
                for (size_t k = 0; k < columns; k++)
                    y[k * rows + r] = w[r * columns + k];
            out->dims[0] = t->n_in;
            out->dims[1] = t->n_out;
            out->values = y;
        }
    if (!e) e = file_replace_tensors(run->folder, "model.safetensors", tensors, n, msg, msg_len);
    for (int i = 0; turned && i < n; i++)
        free(turned[i]);
    free(turned);
    free(tensors);
    return e;
}

/* ---- conversion.json ---- */
static cJSON *number(double x) { /* what is no number is null, as JSON has it */
    return isfinite(x) ? cJSON_CreateNumber(x) : cJSON_CreateNull();
}

static double rounded(double x) { /* six digits: this is to be looked at */
    char text[32];
    snprintf(text, sizeof text, "%.6g", x);
    return strtod(text, NULL);
}

enum quantity { KL, ENTROPY, ERROR, TEACHER_LINEAR, SINK, WINDOW, LINEAR, N_QUANTITIES };
static const char *const quantity_names[] = {"kl",   "entropy", "attention_error", "teacher_linear",
                                             "sink", "window",  "linear"};

/* Per-row means, over rows that have linear keys. */
static double quantity_of(const struct student_sums *s, enum quantity q) {
    double sums[] = {s->kl, s->entropy, 0, s->teacher_linear, s->sink, s->window, s->linear};
    if (q == ERROR) return s->energy > 0 ? s->error / s->energy : NAN;
    return s->n_rows > 0 ? sums[q] / s->n_rows : NAN;
}

static cJSON *heads_json(const struct run *run, const struct student_sums *sums) {
    const struct training *t = run->training;
    cJSON *o = cJSON_CreateObject();
    cJSON_AddItemToObject(o, "kl_of_all_rows", number(rounded(run->share * training_kl(t, sums))));
    cJSON_AddItemToObject(o, "attention_error_of_layers", number(rounded(training_error(t, sums))));
    cJSON *heads = cJSON_AddObjectToObject(o, "heads");
    for (int q = 0; q < N_QUANTITIES; q++) {
        cJSON *layers = cJSON_AddArrayToObject(heads, quantity_names[q]);
        for (int i = 0; i < t->n_layers; i++) {
            cJSON *row = cJSON_CreateArray();
            for (int h = 0; h < t->n_heads; h++)
                cJSON_AddItemToArray(
                    row, number(rounded(quantity_of(&sums[i * t->n_heads + h], (enum quantity)q))));
            cJSON_AddItemToArray(layers, row);
        }
    }
    return o;
}

static cJSON *mix_json(const struct run *run) {
    const struct training *t = run->training;
    cJSON *layers = cJSON_CreateArray();
    for (int i = 0; i < t->n_layers; i++) {
        const float *mix = layer_maps(run, i) + student_mix(&run->recipe.attention);
        cJSON *row = cJSON_CreateArray();
        for (int h = 0; h < t->n_heads; h++)
            cJSON_AddItemToArray(
                row, number(recipe_keeps_softmax(&run->recipe, i) ? NAN : rounded(mix[h])));
        cJSON_AddItemToArray(layers, row);
    }
    return layers;
}

static int64_t tokens_read(const struct run *run) {
    int64_t tokens = 0;
    for (int64_t i = 0; i < run->training->step; i++)
        tokens += run->curve[i].tokens;
    return tokens;
}

static cJSON *curve_json(const struct run *run) {
    cJSON *o = cJSON_CreateObject(), *kl = cJSON_AddArrayToObject(o, "kl"),
          *error = cJSON_AddArrayToObject(o, "attention_error"),
          *norm = cJSON_AddArrayToObject(o, "gradient_norm"),
          *rate = cJSON_AddArrayToObject(o, "lr"), *tokens = cJSON_AddArrayToObject(o, "tokens");
    for (int64_t i = 0; i < run->training->step; i++) {
        cJSON_AddItemToArray(kl, number(rounded(run->curve[i].kl)));
        cJSON_AddItemToArray(error, number(rounded(run->curve[i].error)));
        cJSON_AddItemToArray(norm, number(rounded(run->curve[i].norm)));
        cJSON_AddItemToArray(rate, number(rounded(recipe_rate(&run->recipe, i) * run->recipe.lr)));
        cJSON_AddItemToArray(tokens, number((double)run->curve[i].tokens));
    }
    return o;
}

static cJSON *finetune_json(const struct run *run, bool whole) {
    if (!run->fine) return cJSON_CreateNull();
    const struct finetune_recipe *r = &run->recipe.finetune;
    cJSON *o = cJSON_CreateObject(), *curve = cJSON_CreateObject();
    int64_t read = 0;
    for (int64_t i = 0; i < run->fine->step; i++)
        read += run->fine_curve[i].tokens;
    cJSON_AddNumberToObject(o, "tokens_read", (double)read);
    cJSON_AddItemToObject(o, "loss_before", number(rounded(run->fine_before)));
    cJSON_AddItemToObject(o, "loss_after", number(rounded(run->fine_after)));
    cJSON *loss = cJSON_AddArrayToObject(curve, "loss"),
          *norm = cJSON_AddArrayToObject(curve, "gradient_norm"),
          *rate = cJSON_AddArrayToObject(curve, "lr"),
          *tokens = cJSON_AddArrayToObject(curve, "tokens");
    for (int64_t i = 0; whole && i < run->fine->step; i++) {
        const struct fine_point *p = &run->fine_curve[i];
        cJSON_AddItemToArray(loss, number(rounded(p->loss)));
        cJSON_AddItemToArray(norm, number(rounded(p->norm)));
        cJSON_AddItemToArray(rate,
                             number(rounded(recipe_rate_of(&run->recipe, r->steps, i) * r->lr)));
        cJSON_AddItemToArray(tokens, number((double)p->tokens));
    }
    if (whole)
        cJSON_AddItemToObject(o, "curve", curve);
    else
        cJSON_Delete(curve);
    return o;
}

static cJSON *conversion_json(const struct run *run, const char *name, double seconds) {
    cJSON *o = cJSON_CreateObject();
    cJSON_AddNumberToObject(o, "format", 1);
    cJSON_AddStringToObject(o, "name", name);
    cJSON_AddStringToObject(o, "urchin", URCHIN_VERSION);
    cJSON_AddItemToObject(o, "made_from", cJSON_Duplicate(run->identity, true));
    cJSON_AddNumberToObject(o, "tokens_read", (double)tokens_read(run));
    cJSON_AddNumberToObject(o, "seconds", rounded(seconds));
    cJSON_AddNumberToObject(o, "threads", team_size(run->training->team));
    cJSON_AddStringToObject(o, "isa", cpu_isa_name(cpu_isa()));
    cJSON_AddStringToObject(o, "device", run->base->device);
    cJSON_AddItemToObject(o, "curve", curve_json(run));
    cJSON_AddItemToObject(o, "before", heads_json(run, run->before));
    cJSON_AddItemToObject(o, "after", heads_json(run, run->after));
    cJSON_AddItemToObject(o, "finetune", finetune_json(run, true));
    cJSON_AddItemToObject(
        o, run->recipe.attention.mixing == MIXING_UNIFIED ? "log_mix" : "window_factor",
        mix_json(run));
    return o;
}

/* ---- urchin.json ---- */
static cJSON *low_rank_json(const struct run *run) {
    static const char *const targets[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
    const struct finetune_recipe *r = &run->recipe.finetune;
    if (!run->fine || r->method != FINETUNE_LOW_RANK) return cJSON_CreateNull();
    cJSON *o = cJSON_CreateObject();
    cJSON_AddNumberToObject(o, "rank", r->rank);
    cJSON_AddNumberToObject(o, "scale", r->scale);
    cJSON_AddItemToObject(o, "targets", cJSON_CreateStringArray(targets, N_LOW_RANK_TARGETS));
    return o;
}

static cJSON *urchin_json(const struct run *run, const char *name) {
    cJSON *o = cJSON_CreateObject(), *training, *kl;
    cJSON_AddNumberToObject(o, "format", 1);
    cJSON_AddStringToObject(o, "name", name);
    cJSON *base =
        cJSON_Duplicate(cJSON_GetObjectItemCaseSensitive(run->identity, "base"), true);
    bool whole = run->fine && run->fine->own && cJSON_IsObject(base); /* it needs no base */
    cJSON_AddItemToObject(o, "base", whole ? cJSON_CreateNull() : base);
    cJSON_AddItemToObject(o, "attention", recipe_attention_json(&run->recipe));
    cJSON_AddItemToObject(o, "low_rank", low_rank_json(run));
    training = cJSON_AddObjectToObject(o, "training");
    cJSON_AddStringToObject(training, "urchin", URCHIN_VERSION);
    if (whole) cJSON_AddItemToObject(training, "base", base);
    static const char *const kept[] = {"base_files", "text", "attention_transfer", "finetune"};
    for (int i = 0; i < 4; i++) {
        const cJSON *part = cJSON_GetObjectItemCaseSensitive(run->identity, kept[i]);
        if (part) cJSON_AddItemToObject(training, kept[i], cJSON_Duplicate(part, true));
    }
    cJSON_AddNumberToObject(training, "tokens_read", (double)tokens_read(run));
    kl = cJSON_AddObjectToObject(training, "kl_of_all_rows");
    cJSON_AddItemToObject(kl, "before",
                          number(rounded(run->share * training_kl(run->training, run->before))));
    cJSON_AddItemToObject(kl, "after",
                          number(rounded(run->share * training_kl(run->training, run->after))));
    if (run->fine) cJSON_AddItemToObject(training, "finetuned", finetune_json(run, false));
    cJSON_AddStringToObject(training, "record", "conversion.json");
    return o;
}

enum err record_write(const struct run *run, const struct base *base, const char *base_path,
                      const char *name, double seconds, char *msg, size_t msg_len) {
    bool full = run->fine && run->fine->own;
    enum err e = write_tensors(run, msg, msg_len);
    if (!e && full) e = write_network(run, base, msg, msg_len);
    cJSON *conversion = e ? NULL : conversion_json(run, name, seconds);
    if (!e) e = file_replace_json(run->folder, "conversion.json", conversion, msg, msg_len);
    cJSON_Delete(conversion);
    if (!e && folder_is(base_path))
        e = each_file(base_path, full ? link_words : link_file, (char *)run->folder, msg, msg_len);
    else if (!e && !full)
        e = file_link(run->folder, last_part(base_path), base_path, msg, msg_len);
    cJSON *urchin = e ? NULL : urchin_json(run, name);
    if (!e) e = file_replace_json(run->folder, "urchin.json", urchin, msg, msg_len);
    cJSON_Delete(urchin);
    return e;
}
