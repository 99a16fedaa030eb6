/* training.h - the maps of all layers while they learn: parameters, calibration, AdamW.
 *
 * Layers learn side by side and know nothing of each other: one layer's loss, gradient, norm and
 * step depend on the teacher and on its own parameters.  Tasks (a layer's kv head) are dealt to the
 * team, and each sums what is its own in one order, so results are the same bits for any number of
 * threads.  Or a device does it all (gpu_student.h): then w, m and v lie there, and here after
 * training_fetch(). */
#ifndef URCHIN_CONVERT_TRAINING_H
#define URCHIN_CONVERT_TRAINING_H

#include "compute/gpu.h"
#include "compute/team.h"
#include "convert/recipe.h"
#include "convert/student.h"

struct training {
    const struct recipe *recipe; /* borrowed, team too */
    struct team *team;
    int n_layers, n_heads;
    size_t n_layer_params, n_params;
    float *w, *m, *v, *g; /* [n_layers][n_layer_params]: parameters, Adam's moments, gradient */
    int64_t step, n_updates; /* sequences (or groups of `accumulate`) learned from; times that w changed */
    struct student_sums
        *sums; /* [n_layers][n_heads] of the step in progress, or of a measurement */
    struct student_scratch **scratch; /* [threads] */
    double *norms;                    /* [n_layers] */
    struct gpu_student *device;       /* owned; NULL: the team learns */
    bool ahead, behind;               /* the device's w, m and v are newer than those here, or older */
};

/* gpu: the device that is to learn, borrowed, or NULL.  ERR_NOMEM: of the host, or there. */
enum err training_new(struct training **out, const struct recipe *recipe, int n_layers,
                      struct team *team, struct gpu *gpu, int max_tokens, int max_rows);
void training_free(struct training *t); /* NULL is fine */
/* Of the host; n_threads 0: a device learns. */
size_t training_bytes(const struct recipe *r, int n_layers, int n_threads, int max_tokens,
                      int max_rows);

/* All below may fail with ERR_DEVICE, where there is one: this says of what. */
const char *training_device_error(const struct training *t);

/* w, m and v as they are after the last step; and after they were written here. */
enum err training_fetch(struct training *t);
void training_loaded(struct training *t);

/* Nothing is learned any more: gives the device's memory back, before the device goes. */
void training_leave_device(struct training *t);

/* Before the first step: maps are init_scale times the identity (under the exp map less where a
 * head's keys or queries are so large that |u| would pass 10), and c_h so that linear terms have
 * the mean log of the softmax terms they stand for, over the lesson's rows. */
enum err training_begin(struct training *t, const struct lesson *lesson);

/* What the pupils make of a lesson, into t->sums (added to: clear them first), with outputs. */
enum err training_measure(struct training *t, const struct lesson *lesson);
void training_clear_sums(struct training *t);

/* Adds a lesson's gradient, and its sums. */
enum err training_learn(struct training *t, const struct lesson *lesson);

/* Changes the maps: each layer's gradient, clipped to norm 1, by AdamW at the rate that the schedule
 * has for step + done, where done (0 .. 1) is the share of the step that was learned from before;
 * the caller counts steps.  ERR_ARG, nothing changed: a gradient is not finite, *layer says where. */
enum err training_update(struct training *t, double done, int *layer);

/* Means over converted layers and their heads of what sums hold. */
double training_kl(const struct training *t, const struct student_sums *sums);
double training_error(const struct training *t, const struct student_sums *sums); /* relative */

#endif
