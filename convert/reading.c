/* reading.c - texts read by several models in step. */
#include "convert/reading.h"

#include <stdlib.h>

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

struct window window_of(int64_t t, int64_t n, int64_t context, int64_t stride, bool bos) {
    if (!stride) return (struct window){0, 0, n};
    int64_t first = t / stride * stride, last = first + stride;
    int64_t start = last - (context - bos);
    return (struct window){start > 0 ? start : 0, first, least(last, n)};
}

enum err reader_feed(struct reader *r, const int32_t *ids, int64_t n, int n_logits,
                     const float **logits, char *msg, size_t msg_len) {
    struct attention *attention = model_attention(r->model);
    if (!r->linear) attention_set_linear(attention, false);
    enum err err = OK;
    for (int64_t done = 0; done < n && err == OK;) {
        /* Rows without logits first, then those with, in one step. */
        int64_t quiet = n - n_logits - done;
        int rows = (int)least(quiet > 0 ? quiet : n - done, READING_ROWS);
        struct model_run run = {.slot = r->slot,
                                .n_rows = rows,
                                .tokens = ids + done,
                                .n_logits = quiet > 0 ? 0 : rows};
        const float *out;
        err = model_step(r->model, &run, 1, &out);
        if (run.n_logits) *logits = out;
        done += rows;
    }
    if (!r->linear) attention_set_linear(attention, true);
    if (err)
        return err_set(msg, msg_len, err, "%s: the model refused a step at position %lld (%s)",
                       r->name, (long long)model_slot_position(r->model, r->slot), err_name(err));
    return OK;
}

/* Reads what r has not read yet of the rows that predict tokens from .. to - 1. */
static enum err predict(struct reader *r, const struct text *text, int32_t *ids, int64_t from,
                        int64_t to, const float **logits, char *msg, size_t msg_len) {
    struct window w = window_of(from, text->n, r->context, r->stride, text->bos >= 0);
    int64_t n = 0;
    if (w.start != r->start || r->next < 0) {
        model_slot_clear(r->model, r->slot);
        r->start = r->next = w.start;
        if (text->bos >= 0) ids[n++] = text->bos;
    }
    while (r->next < to - 1)
        ids[n++] = text->ids[r->next++];
    return reader_feed(r, ids, n, (int)(to - from), logits, msg, msg_len);
}

enum err read_text(struct team *team, struct reader *readers, int n_readers, bool compare,
                   const struct text *text, int64_t bin_size, struct score *bins, int n_bins,
                   char *msg, size_t msg_len) {
    bool bos = text->bos >= 0;
    int vocab_size = model_info(readers[0].model)->vocab_size;
    int64_t longest = READING_ROWS + 1; /* a fresh context and a chunk after it */
    for (int r = 0; r < n_readers; r++) {
        readers[r].next = -1;
        if (readers[r].stride && readers[r].context + READING_ROWS + 1 > longest)
            longest = readers[r].context + READING_ROWS + 1;
    }
    int32_t *ids = malloc((size_t)longest * sizeof *ids);
    if (!ids) return err_set(msg, msg_len, ERR_NOMEM, "out of memory");

    enum err err = OK;
    for (int64_t from = 0, to; from < text->n && err == OK; from = to) {
        to = least(text->n, from + READING_ROWS);
        bool scored = true;
        for (int r = 0; r < n_readers; r++) {
            struct window w = window_of(from, text->n, readers[r].context, readers[r].stride, bos);
            to = least(to, w.last);
            if (from == w.start && !bos) scored = false;
        }
        if (!scored) { /* nothing before it: the next chunk's rows begin with this token */
            to = from + 1;
            continue;
        }
        const float *base = NULL, *logits;
        struct score scores[MAX_READERS][READING_ROWS];
        for (int r = 0; r < n_readers && err == OK; r++) {
            err = predict(&readers[r], text, ids, from, to, &logits, msg, msg_len);
            if (err) break;
            score_rows(team, scores[r], logits, r && compare ? base : NULL, (int)(to - from),
                       vocab_size, text->ids + from);
            if (r == 0) base = logits;
            for (int64_t t = from; t < to; t++) {
                int64_t bin = least(t / bin_size, n_bins - 1);
                struct score *s = &scores[r][t - from];
                if (readers[r].whole)
                    score_compare(s, &scores[readers[r].whole - readers][t - from]);
                score_add(&bins[(size_t)r * (size_t)n_bins + (size_t)bin], s);
            }
        }
    }
    free(ids);
    return err;
}
