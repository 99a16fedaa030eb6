/* picture.h - one head's attention on a sample, small enough to look at: softmax beside the
 * converted model.
 *
 * A sample of n tokens is cut into PICTURE_CELLS even parts.  Row r is the token in the middle of
 * part r, column c the sum of its weights on the keys of part c; so a row sums to 1. */
#ifndef URCHIN_CONVERT_PICTURE_H
#define URCHIN_CONVERT_PICTURE_H

#include "convert/heads.h"
#include <cjson/cJSON.h>

enum { PICTURE_CELLS = 96, MAX_PICTURES = 4, PICTURE_LEVELS = 25 };

struct picture {
    int layer, head, n_tokens;
    const char *why; /* this head: static */
    float softmax[PICTURE_CELLS * PICTURE_CELLS], own[PICTURE_CELLS * PICTURE_CELLS];
};

/* Chooses heads by what was measured: the one that softmax spreads farthest (most mass on linear
 * keys), the one that is worst imitated (largest KL), the sharpest of those with a tenth of their
 * mass on linear keys (least entropy of softmax), and the median by KL.  Returns how many there
 * are, MAX_PICTURES at most. */
int picture_choose(struct picture *pictures, const struct head_sums *sums, int n_layers,
                   int n_heads);

/* Reads the sample (heads_read with every) and fills them; the sums of h grow, so copy them first.
 * n >= PICTURE_CELLS; h has room for PICTURE_CELLS rows. */
enum err picture_take(struct picture *pictures, int n_pictures, struct heads *h, int slot,
                      const int32_t *ids, int n, char *msg, size_t msg_len);

/* Rows of letters, as long as the diagonal: 'A' is 1e-4 and less, each letter 10^(1/6) more, 'Y'
 * is 1. */
cJSON *picture_json(const struct picture *p);

#endif
