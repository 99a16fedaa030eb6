/* open.c - which model, and how it is opened. */
#include "server/open.h"

#include "model/converted.h"
#include "model/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char good_model[] = "smollm2-135m-hedgehog", small_model[] = "stories260k-hedgehog";

/* dir/name/urchin.json exists. */
static bool has_model(char *path, size_t path_len, const char *dir, const char *name) {
    char file[MAX_PATH];
    if ((size_t)snprintf(path, path_len, "%s/%s", dir, name) >= path_len ||
        (size_t)snprintf(file, sizeof file, "%s/urchin.json", path) >= sizeof file)
        return false;
    return access(file, R_OK) == 0;
}

/* The first of the models folders that has it. */
static bool find_model(char *path, size_t path_len, const char *name) {
    static const char *const places[] = {"models",
                                         "share/urchin/models"}; /* built here; installed */
    char exe[MAX_PATH], beside[MAX_PATH + 32];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    const char *named = getenv("URCHIN_MODELS");
    if (n > 0) {
        exe[n] = 0;
        for (int i = 0; i < 2 && strrchr(exe, '/'); i++)
            *strrchr(exe, '/') = 0;
        for (int i = 0; i < 2; i++) {
            snprintf(beside, sizeof beside, "%s/%s", exe, places[i]);
            if (has_model(path, path_len, beside, name)) return true;
        }
    }
    return named && *named && has_model(path, path_len, named, name);
}

/* An adapter is of use only with its base. */
static bool base_is_here(const char *folder, char *why, size_t why_len) {
    struct converted *c = NULL;
    char *base = NULL;
    bool found = converted_open(&c, folder, why, why_len) == OK &&
                 converted_find_base(c, folder, &base, why, why_len) == OK;
    free(base);
    converted_close(c);
    return found;
}

static enum err no_model(char *msg, size_t msg_len) {
    return err_set(msg, msg_len, ERR_IO,
                   "no model was named and there is no default one in ../models or "
                   "../share/urchin/models beside the program or in $URCHIN_MODELS");
}

static void tell_of_small_model(const char *why) {
    fprintf(stderr, "urchin: the default model %s cannot be used (%s); using the small model %s\n",
            good_model, why, small_model);
}

enum err default_model(char *path, size_t path_len, const struct settings *settings, char *msg,
                       size_t msg_len) {
    char why[512] = "it is not among the models here";
    if (find_model(path, path_len, good_model) &&
        (settings->base || base_is_here(path, why, sizeof why)))
        return OK;
    if (!find_model(path, path_len, small_model)) return no_model(msg, msg_len);
    tell_of_small_model(why);
    return OK;
}

int prefill_chunk(const struct settings *settings, const struct model *model) {
    enum { ON_CPU = 64, ON_GPU = 256 };
    if (settings->prefill_chunk) return settings->prefill_chunk;
    return model && !strcmp(model_info(model)->device, "cpu") ? ON_CPU : ON_GPU;
}

struct step_bounds step_bounds(const struct settings *settings, int n_slots) {
    enum { BY_MEMORY_AT_MOST = 256, SCORED_ROWS = 64 };
    int n = n_slots ? n_slots : BY_MEMORY_AT_MOST, chunk = prefill_chunk(settings, NULL);
    int scored = chunk < SCORED_ROWS ? chunk : SCORED_ROWS;
    return (struct step_bounds){.rows = n + chunk, .logits = n + scored};
}

/* Opens the good model and, when its base is not there, the small one.  Unlike default_model this
 * reads the base only once. */
static enum err open_default(struct model **out, struct model_options *o, char *msg,
                             size_t msg_len) {
    char path[MAX_PATH], why[512] = "it is not among the models here";
    o->path = path;
    if (find_model(path, sizeof path, good_model)) {
        enum err err = model_open(out, o, why, sizeof why);
        if (err != ERR_IO || o->base) return err_set(msg, msg_len, err, "%s", why);
    }
    if (!find_model(path, sizeof path, small_model)) return no_model(msg, msg_len);
    tell_of_small_model(why);
    return model_open(out, o, msg, msg_len);
}

enum err open_model(struct model **out, const struct settings *s, int n_slots, struct team *team,
                    void (*progress)(void *arg, const char *what, double fraction), char *msg,
                    size_t msg_len) {
    enum { MOST_ROWS = 65536 };
    struct step_bounds bounds = step_bounds(s, n_slots);
    struct model_options o;
    if (bounds.rows > MOST_ROWS)
        return err_set(msg, msg_len, ERR_ARG,
                       "--max-seqs %d and --prefill-chunk %d make a step of %d rows, more than %d",
                       bounds.rows - prefill_chunk(s, NULL), prefill_chunk(s, NULL), bounds.rows, MOST_ROWS);
    model_options_set(&o, s);
    o.max_rows = bounds.rows;
    o.max_logits = bounds.logits;
    o.n_slots = n_slots;
    o.team = team;
    o.progress = progress;
    return s->model ? model_open(out, &o, msg, msg_len) : open_default(out, &o, msg, msg_len);
}

void show_progress(void *arg, const char *what, double fraction) {
    static int shown = -1; /* one model is opened at a time */
    int percent = (int)(fraction * 100);
    (void)arg;
    if (!isatty(STDERR_FILENO) || percent == shown) return;
    shown = percent;
    fprintf(stderr, "\r\033[K%s %d %%", what, percent);
    if (percent >= 100) fputs("\r\033[K", stderr);
}
