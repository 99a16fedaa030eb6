/* head_report.h - all heads of a model over some texts, and pictures of a few: what eval and convert tell of them. */
#ifndef URCHIN_CONVERT_HEAD_REPORT_H
#define URCHIN_CONVERT_HEAD_REPORT_H

#include "convert/heads.h"
#include "convert/picture.h"
#include "convert/reading.h"

struct head_report {
    struct head_sums *sums; /* [n_layers][n_heads], owned */
    int n_layers, n_heads, n_rows; /* rows of a window */
    int64_t context, n_tokens;
    double share; /* of rows, those that have linear keys */
    struct picture pictures[MAX_PICTURES];
    int n_pictures;
};

/* Reads at most HEAD_WINDOWS windows of `context` tokens (BOS included) of each text, HEAD_ROWS rows of each, and for the
 * pictures the first SAMPLE_TOKENS of the first text.  Uses and clears a slot.  ERR_ARG with a sentence: a window has no
 * linear keys. */
enum { HEAD_WINDOWS = 4, HEAD_ROWS = 64, SAMPLE_TOKENS = 768 };
enum err head_report_take(struct head_report **out, struct model *model, struct team *team, int slot,
                          const struct text *texts, int n_texts, int64_t context, char *msg, size_t msg_len);
void head_report_free(struct head_report *h); /* NULL is fine */

/* Arrays of layers, one number a head (docs/convert.md).  NULL: out of memory. */
cJSON *head_report_json(const struct head_report *h);

/* The sums of several heads as one. */
struct head_sums head_sums_of(const struct head_sums *s, int n);

#endif
