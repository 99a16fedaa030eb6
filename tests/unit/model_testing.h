/* model_testing.h - opening models, feeding tokens in pieces and reading golden values, for the
 * model's tests. */
#ifndef URCHIN_TESTS_MODEL_TESTING_H
#define URCHIN_TESTS_MODEL_TESTING_H

#include "model/model.h"
#include "model/safetensors.h"
#include "smollm.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define STORIES "models/stories260k-hedgehog"
#define SMOLLM "models/smollm2-135m-hedgehog"
#define STUDY "tests/data/models/smollm2-135m-study" /* over the same base; has golden values */

static inline double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static inline struct model *open_with(const struct model_options *options) {
    struct model *m = NULL;
    char msg[1000] = "";
    if (model_open(&m, options, msg, sizeof msg)) fail_msg("%s", msg);
    return m;
}

static inline struct model_options options_for(const char *path, int weights, struct team *team) {
    struct model_options o;
    model_options_init(&o);
    o.path = path;
    o.weights = weights;
    o.kv_type = weights == WEIGHT_FP32 ? KV_FP32 : KV_BF16;
    o.n_slots = 3;
    o.team = team;
    return o;
}

static inline struct team *new_team(int n) {
    struct team *team = NULL;
    assert_int_equal(team_new(&team, n), OK);
    return team;
}

/* Reads tokens [n] into a cleared slot, cut at cuts (ascending, ended by 0) and wherever max_rows
 * asks for it; all rows' logits into out [n][vocab] when it is not NULL. */
static inline void read_tokens(struct model *m, int max_rows, int slot, const int32_t *tokens,
                               int n, const int *cuts, float *out) {
    size_t vocab = (size_t)model_info(m)->vocab_size;
    model_slot_clear(m, slot);
    for (int at = 0; at < n;) {
        while (cuts && *cuts && *cuts <= at)
            cuts++;
        int end = cuts && *cuts && *cuts < n ? *cuts : n;
        int rows = end - at < max_rows ? end - at : max_rows;
        const float *logits;
        struct model_run run = {
            .slot = slot, .n_rows = rows, .tokens = tokens + at, .n_logits = out ? rows : 0};
        assert_int_equal(model_step(m, &run, 1, &logits), OK);
        if (out) memcpy(out + (size_t)at * vocab, logits, (size_t)rows * vocab * sizeof *out);
        at += rows;
    }
    assert_true(model_slot_position(m, slot) == n);
}

/* ---- golden values ---- */
static inline struct safetensors *open_golden(const char *name) {
    char path[200], msg[300];
    struct safetensors *st = NULL;
    snprintf(path, sizeof path, "tests/data/golden/%s.safetensors", name);
    if (safetensors_open(&st, path, msg, sizeof msg)) fail_msg("%s", msg);
    return st;
}

/* A tensor of whole numbers of any width; NULL: none.  *n values; the caller frees. */
static inline int64_t *golden_ints(const struct safetensors *st, const char *name, int *n) {
    const struct st_tensor *t = safetensors_get(st, name);
    *n = 0;
    if (!t) return NULL;
    int64_t *out = malloc((size_t)t->n_values * sizeof *out);
    *n = (int)t->n_values;
    for (int i = 0; i < *n; i++) {
        int16_t i16;
        int32_t i32;
        switch (t->bytes / (size_t)t->n_values) {
        case 2:
            memcpy(&i16, (const char *)t->data + i * 2, 2), out[i] = i16;
            break;
        case 4:
            memcpy(&i32, (const char *)t->data + i * 4, 4), out[i] = i32;
            break;
        default:
            memcpy(out + i, (const char *)t->data + i * 8, 8);
            break;
        }
    }
    return out;
}

static inline int32_t *golden_tokens(const struct safetensors *st, const char *name, int *n) {
    int64_t *wide = golden_ints(st, name, n);
    assert_non_null(wide);
    int32_t *out = malloc((size_t)*n * sizeof *out);
    for (int i = 0; i < *n; i++)
        out[i] = (int32_t)wide[i];
    free(wide);
    return out;
}

#endif
