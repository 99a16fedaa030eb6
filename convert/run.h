/* run.h - a conversion under way: what a checkpoint holds and a record tells. */
#ifndef URCHIN_CONVERT_RUN_H
#define URCHIN_CONVERT_RUN_H

#include "convert/corpus.h"
#include "convert/finetune.h"
#include "convert/training.h"
#include "model/model.h"

struct point {      /* one step of the training curve; means over layers, heads and rows */
    double kl;      /* nats, over all rows of the sequences: those without linear keys count as 0 */
    double error;   /* ||y - y_softmax||^2 / ||y_softmax||^2; NaN where outputs are no part of the
                       loss */
    double norm;    /* mean gradient norm of a layer, before clipping */
    int64_t tokens; /* read in this step */
};

struct fine_point { /* the same of fine-tuning: mean loss over rows, norm of the whole gradient */
    double loss, norm;
    int64_t tokens;
};

struct run {
    const char *folder; /* --out; borrowed */
    struct recipe recipe;
    const struct model_info *base; /* borrowed */
    struct training *training;     /* owned */
    cJSON *identity; /* owned: recipe, attention, base, text and device; one that resumes has the same */
    struct point *curve;                 /* [recipe.steps], owned */
    struct student_sums *before, *after; /* [n_layers][n_heads], owned: the probe at the first and
                                            behind the last step */
    double share;                        /* of the probe's rows that have linear keys */
    bool transferred;                    /* attention transfer is done: `after` holds */
    int n_wanted;                        /* retrieval heads to be found, as the settings have it */
    bool heads_found;                    /* they were looked for: the recipe names them */
    bool fine_begun;                     /* the checkpoint that was loaded holds a part of fine-tuning */
    struct finetune *fine;               /* owned; NULL: none, or not yet */
    struct fine_point *fine_curve;       /* [recipe.finetune.steps], owned */
    double fine_before, fine_after;      /* loss of the probe's packs */
    double seconds;                      /* that earlier runs took */
};

/* ---- checkpoint.c: folder/checkpoint ---- */

/* Parameters, moments, curve and the probe so far, replaced as one. */
enum err checkpoint_save(const struct run *run, double seconds, char *msg, size_t msg_len);

/* Goes on from folder/checkpoint where there is one: *found.  ERR_ARG: it is another conversion's
 * (the sentence names the first setting that differs), ERR_FORMAT: it is damaged. */
enum err checkpoint_load(struct run *run, bool *found, char *msg, size_t msg_len);

/* What it says of fine-tuning, where run->fine_begun was set by that and run->fine is there. */
enum err checkpoint_load_fine(struct run *run, char *msg, size_t msg_len);
void checkpoint_remove(const struct run *run);

/* ---- record.c ---- */

/* The base as urchin.json's `base` has it: an object with file, bytes and sha256 for a file, null
 * for a folder, whose files are then listed in *files (else NULL).  Owned by the caller. */
enum err record_base(const char *path, const char *name, cJSON **base, cJSON **files, char *msg,
                     size_t msg_len);

/* With all weights trained from a GGUF base: config.json and tokenizer files in Hugging Face's form, before anything is learnt, for
 * ERR_FORMAT says what of the file they cannot say. */
enum err record_words(const struct run *run, const char *base_path, char *msg, size_t msg_len);

/* hedgehog.safetensors (and with all weights trained model.safetensors: base is open then), conversion.json, what links to the base, and last urchin.json, which makes
 * the folder a model. */
enum err record_write(const struct run *run, const struct base *base, const char *base_path, const char *name,
                      double seconds, char *msg, size_t msg_len);

#endif
