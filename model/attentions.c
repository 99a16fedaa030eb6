/* attentions.c - one attention, or two side by side, behind one set of functions. */
#include "model/attentions.h"

#include <stdlib.h>
#include <string.h>

struct attentions {
    struct attention *first, *second; /* second: softmax beside Hedgehog, or NULL */
    size_t second_at;                 /* bytes of first's slot */
    struct attention_run *runs;       /* [max_runs] of second */
    struct layer {
        struct attention *attention;
        int index; /* among those of its attention */
    } * layers;    /* [n_layers] */
};

static size_t lines(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}
static void *behind(const struct attentions *a, const void *slot) {
    return (char *)slot + a->second_at;
}

enum err attentions_new(struct attentions **out, const struct attention_config *config,
                        const bool *softmax, int64_t max_seq_len,
                        const struct attention_weights *weights, int n_layers,
                        const struct rope *rope, struct team *team, int max_rows, int max_runs) {
    struct attention_config first = *config, second = {.kind = ATTENTION_SOFTMAX,
                                                       .n_heads = config->n_heads,
                                                       .n_kv_heads = config->n_kv_heads,
                                                       .head_dim = config->head_dim,
                                                       .kv_type = config->kv_type,
                                                       .max_seq_len = max_seq_len};
    if (first.kind == ATTENTION_SOFTMAX) first.max_seq_len = max_seq_len;
    struct attentions *a = calloc(1, sizeof *a);
    struct attention_weights *kept = calloc((size_t)n_layers, sizeof *kept);
    int n[2] = {0, 0};
    enum err e = ERR_NOMEM;
    if (!a || !kept || !(a->layers = calloc((size_t)n_layers, sizeof *a->layers))) goto fail;
    for (int i = 0; i < n_layers; i++) {
        bool other = softmax && softmax[i];
        if (!other && weights) kept[n[0]] = weights[i];
        a->layers[i].index = n[other]++;
    }
    e = attention_new(&a->first, &first, weights ? kept : NULL, n[0], rope, team, max_rows,
                      max_runs);
    if (!e && n[1])
        e = attention_new(&a->second, &second, NULL, n[1], rope, team, max_rows, max_runs);
    if (!e && !(a->runs = calloc((size_t)max_runs, sizeof *a->runs))) e = ERR_NOMEM;
    if (e) goto fail;
    for (int i = 0; i < n_layers; i++)
        a->layers[i].attention = softmax && softmax[i] ? a->second : a->first;
    a->second_at = lines(attention_slot_bytes(a->first));
    free(kept);
    *out = a;
    return OK;
fail:
    free(kept);
    attentions_free(a);
    return e;
}

void attentions_free(struct attentions *a) {
    if (!a) return;
    attention_free(a->first);
    attention_free(a->second);
    free(a->runs);
    free(a->layers);
    free(a);
}

struct attention *attentions_first(struct attentions *a) {
    return a->first;
}

/* ---- slots ---- */
size_t attentions_slot_bytes(const struct attentions *a) {
    return a->second_at + (a->second ? lines(attention_slot_bytes(a->second)) : 0);
}

void attentions_slot_clear(const struct attentions *a, void *slot) {
    attention_slot_clear(a->first, slot);
    if (a->second) attention_slot_clear(a->second, behind(a, slot));
}

void attentions_slot_copy(const struct attentions *a, void *dst, const void *src) {
    attention_slot_copy(a->first, dst, src);
    if (a->second) attention_slot_copy(a->second, behind(a, dst), behind(a, src));
}

int64_t attentions_slot_position(const struct attentions *a, const void *slot) {
    return attention_slot_position(a->first, slot);
}

size_t attentions_state_bytes(const struct attentions *a, int64_t position) {
    return attention_state_bytes(a->first, position) +
           (a->second ? attention_state_bytes(a->second, position) : 0);
}

void attentions_state_save(const struct attentions *a, void *out, const void *slot) {
    attention_state_save(a->first, out, slot);
    if (!a->second) return;
    size_t done = attention_state_bytes(a->first, attention_slot_position(a->first, slot));
    attention_state_save(a->second, (char *)out + done, behind(a, slot));
}

enum err attentions_state_load(const struct attentions *a, void *slot, const void *state,
                               size_t bytes, char *msg, size_t msg_len) {
    if (!a->second) return attention_state_load(a->first, slot, state, bytes, msg, msg_len);
    size_t first = attention_state_bytes(a->first, 0); /* Hedgehog's: at any position */
    void *second = behind(a, slot);
    attentions_slot_clear(a, slot);
    enum err e =
        attention_state_load(a->first, slot, state, bytes < first ? bytes : first, msg, msg_len);
    if (!e)
        e = attention_state_load(a->second, second, (const char *)state + first, bytes - first, msg,
                                 msg_len);
    int64_t x = attention_slot_position(a->first, slot),
            y = attention_slot_position(a->second, second);
    if (!e && x != y)
        e = err_set(msg, msg_len, ERR_FORMAT,
                    "saved state has its softmax layers at position %lld, the others at %lld",
                    (long long)y, (long long)x);
    if (e) attentions_slot_clear(a, slot);
    return e;
}

/* ---- a step ---- */
void attentions_step_begin(struct attentions *a, const struct attention_run *runs, int n_runs) {
    attention_step_begin(a->first, runs, n_runs);
    if (!a->second) return;
    for (int i = 0; i < n_runs; i++) {
        a->runs[i] = runs[i];
        a->runs[i].slot = behind(a, runs[i].slot);
    }
    attention_step_begin(a->second, a->runs, n_runs);
}

void attentions_expect(struct attentions *a, int layer) {
    attention_expect(a->layers[layer].attention, a->layers[layer].index);
}

void attentions_layer(struct attentions *a, int layer, float *y, size_t y_stride, const float *q,
                      size_t q_stride, const float *k, size_t k_stride, const float *v,
                      size_t v_stride) {
    const struct layer *l = &a->layers[layer];
    attention_layer(l->attention, l->index, y, y_stride, q, q_stride, k, k_stride, v, v_stride);
}

void attentions_step_end(struct attentions *a) {
    attention_step_end(a->first);
    if (a->second) attention_step_end(a->second);
}
