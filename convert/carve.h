/* carve.h - one block of floats cut into arrays, each at a multiple of 64 bytes from its beginning. */
#ifndef URCHIN_CONVERT_CARVE_H
#define URCHIN_CONVERT_CARVE_H

#include <stddef.h>

struct carve { /* lays arrays into a block; at NULL only counts */
    float *at;
    size_t n;
};
static inline float *cut(struct carve *c, size_t n) {
    float *here = c->at ? c->at + c->n : NULL;
    c->n += (n + 15) / 16 * 16;
    return here;
}

#endif
