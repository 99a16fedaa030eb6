/* open.h - from settings to an open model, for the commands that need one. */
#ifndef URCHIN_SERVER_OPEN_H
#define URCHIN_SERVER_OPEN_H

#include "compute/team.h"
#include "config/settings.h"
#include "model/model.h"

enum { MAX_PATH = 4096 };

/* The model used when none is named: smollm2-135m-hedgehog where its base lies on this machine (or
 * is named by --base), else the small stories260k-hedgehog with one line on stderr that says so.
 * Looked for beside the binary (../models, ../share/urchin/models), in $URCHIN_MODELS. */
enum err default_model(char *path, size_t path_len, const struct settings *settings, char *msg,
                       size_t msg_len);

/* settings->model NULL: the default model, as above.  progress as in model.h, may be NULL. */
enum err open_model(struct model **out, const struct settings *settings, int n_slots,
                    struct team *team,
                    void (*progress)(void *arg, const char *what, double fraction), char *msg,
                    size_t msg_len);

/* Prompt rows of a step: --prefill-chunk or, where that is 0, what reads as fast as any on the model's device: 64
 * on a CPU, where more only make others wait, 256 on a GPU.  model NULL: the most it may be. */
int prefill_chunk(const struct settings *settings, const struct model *model);

/* Rows and logits of one step that open_model asks for. */
struct step_bounds {
    int rows, logits;
};
struct step_bounds step_bounds(const struct settings *settings, int n_slots);

/* Progress on a terminal's stderr, one line rewritten; nothing elsewhere. */
void show_progress(void *arg, const char *what, double fraction);

#endif
