/* report.h - what `urchin eval` found out: as tables for people and as one JSON document, which
 * sheet.h makes a page of. */
#ifndef URCHIN_CONVERT_REPORT_H
#define URCHIN_CONVERT_REPORT_H

#include "convert/choice.h"
#include "convert/head_report.h"
#include "convert/reading.h"
#include "convert/recall.h"
#include <cjson/cJSON.h>
#include <stdio.h>

enum { MAX_LENGTHS = 64 };

struct stream {       /* one text read as one sequence, by position */
    const char *file; /* borrowed */
    int64_t n_tokens, bin_size;
    int n_bins;
    struct score *bins; /* [n_readers][n_bins], owned */
};

struct report {
    const struct reader *readers; /* borrowed; names, models and windows */
    int n_readers;
    bool compare; /* readers[0] is the model compared against */
    const char *texts;

    bool has_perplexity;
    int64_t n_tokens, context, stride;
    struct score perplexity[MAX_READERS];

    struct stream *streams; /* [n_streams], owned */
    int n_streams;
    int64_t stream_context, stream_stride; /* of readers with a limit; 0: none has */

    struct choice_sums choice[MAX_READERS];
    const char *tasks; /* the file; NULL: no choice test */

    struct head_report *heads[MAX_READERS]; /* owned; NULL: not measured */

    int n_lengths; /* of the two tests below */
    int64_t lengths[MAX_LENGTHS];
    bool has_passkey, has_recall;
    int facts; /* in one text */
    struct recalled passkey[MAX_READERS][MAX_LENGTHS][DEPTHS]; /* nothing asked: longer than the reader's limit */
    struct recalled recall[MAX_READERS][MAX_LENGTHS][DEPTHS];

    struct added *added; /* [n_added], owned: each length, each number of texts */
    int n_added;
};

void report_free(struct report *r); /* what it owns; NULL is fine */
void report_table(FILE *out, const struct report *r);

/* One object; NaN becomes null.  NULL: out of memory.  The caller's. */
cJSON *report_json(const struct report *r);

/* What an ablation of the linear branch says about it, one sentence into out; false: nothing to
 * say.  A branch is dead when the loss without it differs by less than two standard errors of the
 * difference. */
bool report_verdict(const struct report *r, char *out, size_t len);

#endif
