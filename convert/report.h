/* report.h - what `urchin eval` found out, and its two printed forms. */
#ifndef URCHIN_CONVERT_REPORT_H
#define URCHIN_CONVERT_REPORT_H

#include "convert/reading.h"
#include <stdio.h>

enum { MAX_READERS = 4, MAX_LENGTHS = 64 };

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

    int n_lengths, tries; /* 0 lengths: no passkey test */
    int64_t lengths[MAX_LENGTHS];
    double passkey[MAX_READERS]
                  [MAX_LENGTHS]; /* share of digits right; NaN: longer than the reader's limit */
};

void report_free(struct report *r); /* what it owns; NULL is fine */
void report_table(FILE *out, const struct report *r);
enum err
report_json(FILE *out,
            const struct report *r); /* one object and a line end; NaN becomes null.  ERR_NOMEM */

#endif
