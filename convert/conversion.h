/* conversion.h - a conversion in progress, shared by convert.c (settings to folder), transfer_run.c
 * (attention transfer), find_heads.c (retrieval heads) and fine_run.c (fine-tuning). */
#ifndef URCHIN_CONVERT_CONVERSION_H
#define URCHIN_CONVERT_CONVERSION_H

#include "config/settings.h"
#include "convert/run.h"
#include "convert/teacher.h"

enum { SAVE_SECONDS = 45, LINE_SECONDS = 10, PROBES = 4 };

struct conversion {
    const struct settings *settings;
    struct team *team;
    struct model *model; /* owned, as all pointers below */
    struct corpus *corpus;
    struct teacher *teacher;
    struct base *base; /* open while fine-tuning is set up; tensors are read from it */
    struct run run;
    char *name, *folder;
    int max_tokens, max_rows;
    size_t fine_bytes;            /* that fine-tuning needs; 0: none */
    double begun, saved, told;    /* seconds of the clock: this run, the last checkpoint, the last line */
    double saving;                /* that the last checkpoint took */
    int64_t steps_done;           /* in this run */
    bool interrupted;
    char *msg;
    size_t msg_len;
};

#define FAIL(c, code, ...) err_set((c)->msg, (c)->msg_len, code, __VA_ARGS__)

double conversion_now(void); /* seconds of the clock */

/* Pack number of a stream, long or not as the recipe has it; pack_free() it. */
enum err conversion_pack(struct conversion *c, int stream, int64_t number, bool is_long, struct pack *pack);
/* The base reads it; it must be freed once the lesson is done with. */
enum err conversion_read(struct conversion *c, int stream, int64_t number, bool is_long, struct pack *pack, struct lesson *lesson,
                         double *share);
/* What training says, where a device learns. */
enum err conversion_learned(struct conversion *c, enum err e);
bool conversion_is_long(const struct conversion *c, int64_t number);

/* After a step: prints a line now and then (always when `last`), saves now and then.  *stop: the user wants to. */
enum err conversion_after_step(struct conversion *c, int64_t step, int steps, int64_t first_step, double begun,
                               const char *what, double loss, double rate, bool *stop);
enum err conversion_save(struct conversion *c);
void conversion_tell_memory(void);

/* Finds the recipe's retrieval heads, unless the settings name them.  They are the base's, so it
 * does not matter when; a checkpoint keeps them. */
enum err conversion_find_heads(struct conversion *c);

/* Attention transfer: maps as they begin, and what the probe says of them; then from where run is
 * to the end (or the interruption), and the probe again. */
enum err transfer_begin(struct conversion *c);
enum err transfer_run(struct conversion *c);

/* Fine-tuning from where run is to the end (or the interruption), and the probe's loss before and after. */
enum err fine_run(struct conversion *c);

#endif
