/* convert.c - `urchin convert`, from the settings to the folder. */
#include "convert/convert.h"

#include "convert/conversion.h"
#include "convert/files.h"
#include "convert/merge.h"
#include "convert/show.h"
#include "model/converted.h"
#include "model/options.h"

#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { INTERRUPTED = 130 };

static volatile sig_atomic_t stopping;
static int64_t stop_after; /* tests */

void convert_interrupt_after(int64_t steps) {
    stop_after = steps;
}

static void stop(int signal) {
    (void)signal;
    stopping = 1;
}

double conversion_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static enum err no_memory(struct conversion *c) {
    return FAIL(c, ERR_NOMEM, "out of memory");
}

/* ---- opening ---- */
static enum err check_settings(struct conversion *c) {
    const struct settings *s = c->settings;
    if (!s->model)
        return FAIL(c, ERR_ARG, "name the base: urchin convert BASE --text FILES --out FOLDER");
    if (!s->text) return FAIL(c, ERR_ARG, "--text is missing: name files or folders to learn from");
    if (!s->out) return FAIL(c, ERR_ARG, "--out is missing: name a folder for the converted model");
    if (converted_is(s->model))
        return FAIL(c, ERR_ARG, "%s is a converted model already; name its base", s->model);
    if (converted_is(s->out))
        return FAIL(c, ERR_ARG,
                    "%s holds a converted model already: name another --out, or remove it", s->out);
    char *base = realpath(s->model, NULL), *out = realpath(s->out, NULL);
    bool same = base && out && !strcmp(base, out);
    free(base);
    free(out);
    if (same) return FAIL(c, ERR_ARG, "--out %s: that is the base itself", s->out);
    char checkpoint[PATH_MAX];
    snprintf(checkpoint, sizeof checkpoint, "%s/checkpoint", s->out);
    if (access(checkpoint, F_OK) && folder_count(s->out) > 0)
        return FAIL(c, ERR_ARG,
                    "--out %s: the folder holds other things than an unfinished conversion; name "
                    "another",
                    s->out);
    return OK;
}

/* The recipe comes first: a softmax cache is sized by the longest sequence. */
static enum err take_recipe(struct conversion *c) {
    struct base *base;
    struct recipe *r = &c->run.recipe;
    enum err e = base_open(&base, c->settings->model, c->msg, c->msg_len);
    if (e) return e;
    e = recipe_from_settings(r, c->settings, base_config(base), c->msg, c->msg_len);
    c->run.n_wanted = r->n_retrieval;
    bool any_long = r->long_every > 0;
    c->max_tokens = any_long && r->long_length > r->length ? r->long_length : r->length;
    c->max_rows = any_long && r->long_rows > r->rows ? r->long_rows : r->rows;
    if (!e && r->finetune.method != FINETUNE_NONE)
        c->fine_bytes = finetune_bytes(r, base, team_size(c->team), c->max_tokens);
    base_close(base);
    return e;
}

/* On the GPU where there is one, or where it has to be one. */
static enum err open_base(struct conversion *c) {
    struct model_options o;
    model_options_set(&o, c->settings);
    o.max_seq_len = c->max_tokens;
    o.memory_budget = 0;
    o.cache_size = o.cache_recent = o.cache_age = o.cache_fact_age = o.retrieval_size =
        -1; /* the pupil's, not the base's */
    o.max_distance = o.horizon = -1;
    o.max_logits = 1;
    o.team = c->team;
    enum device device = o.device;
    enum err e = ERR_NO_CUDA;
    if (device != DEVICE_CPU) {
        o.device = DEVICE_CUDA;
        o.max_rows = TEACHER_DEVICE_ROWS;
        o.n_slots = TEACHER_DEVICE_SLOTS;
        e = model_open(&c->model, &o, c->msg, c->msg_len);
        if (e == ERR_NOMEM) {
            o.n_slots = 1; /* slower with short documents, but it may fit */
            e = model_open(&c->model, &o, c->msg, c->msg_len);
        }
    }
    if (e == ERR_NO_CUDA && device != DEVICE_CUDA) {
        o.device = DEVICE_CPU;
        o.max_rows = TEACHER_ROWS;
        o.n_slots = 1;
        e = model_open(&c->model, &o, c->msg, c->msg_len);
    }
    if (!e) c->run.base = model_info(c->model);
    return e;
}

static void tell_device(const struct conversion *c) {
    bool fine = c->run.recipe.finetune.method != FINETUNE_NONE;
    if (!model_gpu(c->model)) return;
    fprintf(stderr, "attention transfer on %s%s\n", c->run.base->device,
            fine ? "; fine-tuning will be the CPU's" : "");
}

static enum err open_corpus(struct conversion *c) {
    struct corpus_options o = {.sources = c->settings->text,
                               .tokenizer = model_tokenizer(c->model),
                               .chat = model_chat(c->model),
                               .vocab_size = c->run.base->vocab_size,
                               .join = c->run.recipe.join_documents,
                               .least = recipe_least_tokens(&c->run.recipe.attention),
                               .recall = c->run.recipe.recall};
    return corpus_open(&c->corpus, &o, c->msg, c->msg_len);
}

static enum err name_model(struct conversion *c) {
    const char *given = c->settings->name;
    size_t n = strlen(c->run.base->name) + 16;
    c->name = given ? strdup(given) : malloc(n);
    if (!c->name) return no_memory(c);
    if (!given) snprintf(c->name, n, "%s-hedgehog", c->run.base->name);
    c->folder = strdup(c->settings->out);
    if (!c->folder) return no_memory(c);
    for (size_t len = strlen(c->folder); len > 1 && c->folder[len - 1] == '/';)
        c->folder[--len] = 0;
    c->run.folder = c->folder;
    return OK;
}

/* What two runs of one conversion have in common. */
static enum err take_identity(struct conversion *c) {
    struct run *run = &c->run;
    cJSON *base, *files;
    enum err e =
        record_base(c->settings->model, run->base->name, &base, &files, c->msg, c->msg_len);
    if (e) return e;
    run->identity = cJSON_CreateObject();
    cJSON_AddItemToObject(run->identity, "base", base);
    if (files) cJSON_AddItemToObject(run->identity, "base_files", files);
    cJSON_AddItemToObject(run->identity, "attention", recipe_attention_json(&run->recipe));
    cJSON_AddItemToObject(run->identity, "attention_transfer", recipe_training_json(&run->recipe));
    cJSON_AddItemToObject(run->identity, "finetune", recipe_finetune_json(&run->recipe));
    cJSON_AddItemToObject(run->identity, "text", corpus_json(c->corpus));
    cJSON_AddStringToObject(run->identity, "weights", weight_type_name(run->base->weights));
    cJSON_AddStringToObject(run->identity, "kv_type", c->settings->kv_type);
    /* their sums run in different orders */
    cJSON_AddStringToObject(run->identity, "device", model_gpu(c->model) ? "cuda" : "cpu");
    return run->identity ? OK : no_memory(c);
}

static enum err check_memory(struct conversion *c) {
    const struct recipe *r = &c->run.recipe;
    const struct model_info *i = c->run.base;
    size_t limit = (size_t)c->settings->memory_mb << 20;
    bool gpu = model_gpu(c->model); /* it has memory of its own */
    size_t teacher =
        gpu ? 0 : teacher_bytes(i, c->max_tokens, c->max_rows); /* gone before fine-tuning begins */
    size_t need =
        (teacher > c->fine_bytes ? teacher : c->fine_bytes) +
        training_bytes(r, i->n_layers, gpu ? 0 : team_size(c->team), c->max_tokens, c->max_rows) +
        (64u << 20); /* the program, a step's rows, the tokenizer */
    if (!gpu) need += i->weight_bytes + i->slot_bytes;
    if (need < i->weight_bytes) need = i->weight_bytes; /* on their way to a device */
    if (!limit || need <= limit) return OK;
    return FAIL(c, ERR_ARG,
                "--memory: %zu MiB are allowed, about %zu are needed; shorter sequences need less "
                "(--long-length %d, --length %d), fewer --threads too",
                limit >> 20, need >> 20, r->long_length, r->length);
}

static enum err take_room(struct conversion *c) {
    struct run *run = &c->run;
    const struct recipe *r = &run->recipe;
    const struct model_info *i = run->base;
    size_t heads = (size_t)i->n_layers * (size_t)i->attention.n_heads;
    run->curve = calloc((size_t)r->steps + 1, sizeof *run->curve);
    run->fine_curve = calloc((size_t)r->finetune.steps + 1, sizeof *run->fine_curve);
    run->before = calloc(heads, sizeof *run->before);
    run->after = calloc(heads, sizeof *run->after);
    if (!run->curve || !run->fine_curve || !run->before || !run->after) return no_memory(c);
    struct gpu *gpu = model_gpu(c->model);
    enum err e = teacher_new(&c->teacher, c->model, &r->attention, c->max_tokens, c->max_rows);
    if (!e)
        e = training_new(&run->training, r, i->n_layers, c->team, gpu, c->max_tokens, c->max_rows);
    if (e && gpu)
        return FAIL(c, e,
                    "%s has no room beside the base for sequences of %d tokens; shorter ones need "
                    "less (--long-length %d, --length %d)",
                    i->device, c->max_tokens, r->long_length, r->length);
    return e ? no_memory(c) : OK;
}

/* ---- reading and learning ---- */
bool conversion_is_long(const struct conversion *c, int64_t number) {
    int every = c->run.recipe.long_every;
    return every && number % every == every - 1;
}

enum err conversion_pack(struct conversion *c, int stream, int64_t number, bool is_long,
                         struct pack *pack) {
    const struct recipe *r = &c->run.recipe;
    return corpus_pack(c->corpus, r->seed, stream, number, is_long ? r->long_length : r->length,
                       pack, c->msg, c->msg_len);
}

enum err conversion_read(struct conversion *c, int stream, int64_t number, bool is_long,
                          struct pack *pack, struct lesson *lesson, double *share) {
    const struct recipe *r = &c->run.recipe;
    int rows = is_long ? r->long_rows : r->rows;
    enum err e = conversion_pack(c, stream, number, is_long, pack);
    if (e) return e;
    e = teacher_read(c->teacher, pack, rows, r->seed, stream, number, lesson, share, c->msg,
                     c->msg_len);
    if (e) pack_free(pack);
    return e;
}

enum err conversion_learned(struct conversion *c, enum err e) {
    if (e == ERR_DEVICE)
        return FAIL(c, e, "%s failed (%s); %s/checkpoint is from before", c->run.base->device,
                    training_device_error(c->run.training), c->folder);
    return e ? no_memory(c) : OK;
}

static double seconds_so_far(const struct conversion *c) {
    return c->run.seconds + conversion_now() - c->begun;
}

enum err conversion_save(struct conversion *c) {
    double begun = conversion_now();
    enum err e = training_fetch(c->run.training);
    if (e) return conversion_learned(c, e);
    e = checkpoint_save(&c->run, seconds_so_far(c), c->msg, c->msg_len);
    c->saved = conversion_now();
    c->saving = c->saved - begun;
    return e;
}

/* ---- progress ---- */
static void duration(char *out, size_t len, double seconds) {
    int s = (int)(seconds + 0.5);
    if (s >= 3600)
        snprintf(out, len, "%d h %02d min", s / 3600, s / 60 % 60);
    else if (s >= 60)
        snprintf(out, len, "%d min %02d s", s / 60, s % 60);
    else
        snprintf(out, len, "%d s", s);
}

enum err conversion_after_step(struct conversion *c, int64_t step, int steps, int64_t first_step,
                               double begun, const char *what, double loss, double rate,
                               bool *stop) {
    bool terminal = isatty(STDERR_FILENO);
    c->steps_done++;
    bool more = step < steps || (!c->run.fine && c->run.recipe.finetune.method != FINETUNE_NONE);
    c->interrupted = more && (stopping || (stop_after && c->steps_done >= stop_after));
    *stop = c->interrupted;
    bool last = step == steps || c->interrupted;
    double t = conversion_now(), each = (t - begun) / (double)(step - first_step);
    if (last || t - c->told >= (terminal ? 0.2 : LINE_SECONDS)) {
        char left[32];
        c->told = t;
        duration(left, sizeof left, each * (double)(steps - step));
        fprintf(stderr, "%s%s, step %lld of %d  loss %.4f  lr %.2g  %.2f s a step  %s left%s",
                terminal ? "\r\033[K" : "", what, (long long)step, steps, loss, rate, each, left,
                terminal && !last ? "" : "\n");
        fflush(stderr);
    }
    /* a checkpoint of all weights takes long: a twentieth of the time at most */
    if (c->interrupted ||
        t - c->saved >= (20 * c->saving > SAVE_SECONDS ? 20 * c->saving : SAVE_SECONDS))
        return conversion_save(c);
    return OK;
}

void conversion_tell_memory(void) {
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage)) return;
    fprintf(stderr, "memory: %ld MiB at its highest, and no step needs more\n",
            usage.ru_maxrss / 1024);
}

/* ---- the whole ---- */
static enum err train(struct conversion *c) {
    c->begun = c->saved = conversion_now();
    c->told = -1e9;
    enum err e = transfer_run(c);
    if (!e && !c->interrupted) e = conversion_find_heads(c);
    if (!e) training_leave_device(c->run.training);
    if (e || c->interrupted || c->run.recipe.finetune.method == FINETUNE_NONE) return e;
    teacher_free(c->teacher); /* its room is wanted */
    c->teacher = NULL;
    return fine_run(c);
}

static enum err finish(struct conversion *c) {
    struct run *run = &c->run;
    enum err e = record_write(run, c->base, c->settings->model, c->name, seconds_so_far(c), c->msg,
                              c->msg_len);
    if (e) {
        char why[512];
        snprintf(why, sizeof why, "%s", c->msg);
        if (checkpoint_save(run, seconds_so_far(c), NULL, 0)) return e;
        return FAIL(c, e,
                    "%s; the training is kept in %s/checkpoint, the same command goes on "
                    "from there",
                    why, c->folder);
    }
    checkpoint_remove(run);
    printf("%s: %s, %d steps; KL of attention rows to the base %.4f before training, %.4f after, "
           "error of outputs %.3f and %.3f\n",
           c->folder, c->name, run->recipe.steps,
           run->share * training_kl(run->training, run->before),
           run->share * training_kl(run->training, run->after),
           training_error(run->training, run->before), training_error(run->training, run->after));
    if (run->fine)
        printf("fine-tuning, %d steps: %s %.4f before, %.4f after\n", run->recipe.finetune.steps,
               run->recipe.finetune.next_token ? "loss of the next token"
                                               : "KL to the base's next token",
               run->fine_before, run->fine_after);
    return OK;
}

/* The page: the longest piece of a probe's pack, as the finished model reads it.  The base is given
 * up for it. */
static enum err show(struct conversion *c) {
    const struct recipe *r = &c->run.recipe;
    struct pack pack;
    enum err e =
        corpus_pack(c->corpus, r->seed, PACK_PROBE, 0, r->length, &pack, c->msg, c->msg_len);
    if (e) return e;
    int longest = 0;
    for (int d = 1; d < pack.n_documents; d++)
        if (pack.first[d + 1] - pack.first[d] > pack.first[longest + 1] - pack.first[longest])
            longest = d;
    const int32_t *ids = pack.tokens + pack.first[longest];
    int n = pack.first[longest + 1] - pack.first[longest];
    const struct tokenizer *t = model_tokenizer(c->model);
    bool bos = tokenizer_add_bos(t) && ids[0] == tokenizer_bos(t);
    struct text sample = {ids + bos, n - bos, bos ? ids[0] : -1};
    teacher_free(c->teacher);
    model_close(c->model);
    c->teacher = NULL;
    c->model = NULL;
    e = show_conversion(c->folder, c->settings, c->team, &sample, c->msg, c->msg_len);
    pack_free(&pack);
    char why[512];
    snprintf(why, sizeof why, "%s", c->msg);
    return e ? FAIL(c, e, "%s; the model in %s is whole, its report is not", why, c->folder) : OK;
}

static enum err convert(struct conversion *c) {
    enum err e = check_settings(c);
    if (!e) e = take_recipe(c);
    if (!e) e = open_base(c);
    if (!e) e = name_model(c);
    if (!e) e = open_corpus(c);
    if (!e) e = take_identity(c);
    if (!e) e = check_memory(c);
    if (!e) e = take_room(c);
    if (!e) e = folder_make(c->folder, c->msg, c->msg_len);
    bool found = false;
    if (!e) e = checkpoint_load(&c->run, &found, c->msg, c->msg_len);
    if (!e) e = record_words(&c->run, c->settings->model, c->msg, c->msg_len);
    if (e) return e;
    c->begun = conversion_now();
    tell_device(c);
    if (found) {
        training_loaded(c->run.training);
        fprintf(stderr, "going on from step %lld%s of %s/checkpoint\n",
                (long long)c->run.training->step, c->run.fine_begun ? " and fine-tuning" : "",
                c->folder);
    } else {
        e = transfer_begin(c);
        if (!e)
            e = conversion_save(
                c); /* at once: whoever cannot write should not find out after an hour */
    }
    if (!e) {
        c->run.seconds += conversion_now() - c->begun;
        e = train(c);
    }
    if (!e && !c->interrupted) e = finish(c);
    if (!e && !c->interrupted) e = show(c);
    return e;
}

/* Once is a wish to stop; twice is an order. */
static void catch_signals(struct sigaction old[2]) {
    struct sigaction action = {.sa_handler = stop, .sa_flags = SA_RESTART | (int)SA_RESETHAND};
    sigemptyset(&action.sa_mask);
    stopping = 0;
    sigaction(SIGINT, &action, &old[0]);
    sigaction(SIGTERM, &action, &old[1]);
}

int convert_main(const struct settings *settings, struct team *team) {
    if (settings->merge) return merge_main(settings);
    char msg[1024] = "";
    struct sigaction old[2];
    struct conversion c = {.settings = settings, .team = team, .msg = msg, .msg_len = sizeof msg};
    catch_signals(old);
    enum err e = convert(&c);
    sigaction(SIGINT, &old[0], NULL);
    sigaction(SIGTERM, &old[1], NULL);
    if (e)
        fprintf(stderr, "urchin convert: %s\n", *msg ? msg : err_name(e));
    else if (c.interrupted)
        fprintf(stderr, "interrupted: the same command goes on from %s/checkpoint\n", c.folder);
    finetune_free(c.run.fine);
    base_close(c.base);
    training_free(c.run.training);
    teacher_free(c.teacher);
    corpus_close(c.corpus);
    model_close(c.model);
    cJSON_Delete(c.run.identity);
    free(c.run.curve);
    free(c.run.fine_curve);
    free(c.run.before);
    free(c.run.after);
    free(c.name);
    free(c.folder);
    return e ? 1 : c.interrupted ? INTERRUPTED : 0;
}
