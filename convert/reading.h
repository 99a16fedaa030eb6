/* reading.h - texts read by several models side by side, every token scored once.
 *
 * Which tokens are scored, and with what before them: a text has n tokens, 0 .. n - 1.  A reader
 * with a window (context C, stride s <= C) scores it in blocks of s tokens.  Block b is tokens
 * b s .. (b + 1) s - 1, read with as many tokens before it as fit into C: its context starts at
 * token max(0, (b + 1) s - C), at position 0 of an empty slot.  Where s divides C this is Hugging
 * Face's strided perplexity; s = C are separate windows.  A reader without a window (stride 0)
 * reads the whole text as one sequence.
 *
 * Where the tokenizer puts BOS in front of a text, every context starts with it, and it counts into
 * C.  A token with nothing before it in its context is not scored, by any reader: so separate
 * windows of 1,024 score 1,023 tokens each (with BOS: the 1,023 that fit beside it). */
#ifndef URCHIN_CONVERT_READING_H
#define URCHIN_CONVERT_READING_H

#include "convert/score.h"
#include "model/model.h"

/* Steps have at most so many rows, all with logits: open the models with at least this. */
enum { READING_ROWS = 128, MAX_READERS = 5 };

struct reader { /* one way of reading: a model, perhaps with something switched off */
    const char *name;
    struct model *model; /* borrowed; readers may share one when their slots differ */
    int slot, spare;     /* spare: a slot for copies; choice.h and recall.h use it */
    const struct reader
        *whole;              /* what this one lacks a part of, earlier in its array; NULL: none */
    bool linear;             /* false: exact keys only (attention_set_linear) */
    int64_t context, stride; /* tokens; stride 0: no window */
    int64_t start, next;     /* the reading's own: context's first token, next token to read */
};

struct text {
    const int32_t *ids; /* borrowed */
    int64_t n;
    int32_t bos; /* -1: none */
};

/* The block that token t is scored in: tokens first .. last - 1, with a context from token start.
 */
struct window {
    int64_t start, first, last;
};
struct window window_of(int64_t t, int64_t n, int64_t context, int64_t stride, bool bos);

/* Feeds ids [n] to the reader's slot; the last n_logits (<= READING_ROWS) rows' logits into
 * *logits, borrowed until the model's next step.  n_logits 0: *logits is not written. */
enum err reader_feed(struct reader *r, const int32_t *ids, int64_t n, int n_logits,
                     const float **logits, char *msg, size_t msg_len);

/* Reads text with all readers (MAX_READERS at most) in step.  readers[0] is what the others are
 * compared against when compare is set (all have one vocabulary; its model is no other reader's).
 * bins [n_readers][n_bins]: token t is added to bin t / bin_size. */
enum err read_text(struct team *team, struct reader *readers, int n_readers, bool compare,
                   const struct text *text, int64_t bin_size, struct score *bins, int n_bins,
                   char *msg, size_t msg_len);

#endif
