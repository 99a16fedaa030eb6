/* slot.c - one sequence's block of memory: where everything lies, and clear, copy, save, load.
 *
 * A slot's used entries follow from its position, so what an earlier owner left elsewhere is never
 * read; a saved state has zeros there. */
#include "attention/internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static const char MAGIC[8] = "urchinS";
enum { STATE_VERSION = 1 };

static size_t align(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

static size_t element_bytes(const struct attention *a) {
    return a->config.kv_type == KV_BF16 ? sizeof(uint16_t) : sizeof(float);
}

/* How much of everything a head has; where it lies is layout_init()'s. */
static void size_room(const struct attention *a, struct room *r, bool retrieval) {
    const struct attention_config *c = &a->config;
    size_t element = element_bytes(a);
    r->retrieval = retrieval;
    r->cache = retrieval ? c->retrieval_size : c->cache_size;
    r->places = r->cache;
    r->recent = retrieval ? c->retrieval_recent : c->cache_recent;
    r->entries = a->layout.sinks + r->cache + a->layout.ring;
    if (r->entries == 0) r->entries = 1; /* where a key is rounded on its way into the state */
    r->tiles = round_up(r->entries, TILE) / TILE;
    r->keys_bytes = (size_t)r->tiles * TILE * a->shape.head_dim * element;
    r->values_bytes = (size_t)r->entries * a->shape.lanes * element;
}

static int most(int a, int b) {
    return a > b ? a : b;
}

enum err layout_init(struct attention *a) {
    const struct attention_config *c = &a->config;
    struct layout *l = &a->layout;
    bool softmax = c->kind == ATTENTION_SOFTMAX;
    size_t heads = (size_t)a->n_layers * c->n_kv_heads;
    a->rooms = calloc(heads, sizeof *a->rooms);
    if (!a->rooms) return ERR_NOMEM;
    l->sinks = c->sinks;
    l->ring = softmax                        ? (int)c->max_seq_len
              : c->window == WINDOW_TERRACED ? 2 * c->window_size
                                             : c->window_size;
    for (size_t i = 0; i < heads; i++) {
        struct room *r = &a->rooms[i];
        const bool *retrieval = a->weights[i / c->n_kv_heads].retrieval;
        size_room(a, r, retrieval && retrieval[i % c->n_kv_heads]);
        l->most_cache = most(l->most_cache, r->cache);
        l->entries = most(l->entries, r->entries);
        l->tiles = most(l->tiles, r->tiles);
    }
    count_places(a);
    l->S_floats = softmax ? 0 : (size_t)a->shape.features * a->shape.lanes;
    l->state_floats = softmax ? 0 : l->S_floats + a->shape.phi_lanes;
    l->states = sizeof(struct slot_header);
    l->keys = l->states + heads * a->state_heads * l->state_floats * sizeof(float);
    size_t at = l->keys;
    for (size_t i = 0; i < heads; at += a->rooms[i++].keys_bytes)
        a->rooms[i].keys = at;
    l->values = at;
    for (size_t i = 0; i < heads; at += a->rooms[i++].values_bytes)
        a->rooms[i].values = at;
    l->positions = at;
    for (size_t i = 0; i < heads; at += (size_t)a->rooms[i++].cache * sizeof(int64_t))
        a->rooms[i].positions = at;
    at = l->sequence_bytes = align(at);

    bool rotated_later = a->rope && c->map_before_rope && l->ring;
    l->turned = rotated_later ? at : l->keys;
    for (size_t i = 0; i < heads; i++)
        a->rooms[i].turned = a->rooms[i].keys - l->keys + l->turned;
    if (rotated_later) at += l->values - l->keys;
    l->chosen = at;
    for (size_t i = 0; i < heads; i++) {
        a->rooms[i].chosen = at;
        if (a->rooms[i].cache) at += (size_t)(a->rooms[i].cache + c->window_size) * sizeof(bool);
    }
    l->chosen_for = align(at);
    l->next_for = l->chosen_for + heads * sizeof(int64_t);
    l->exchanged = l->next_for + heads * sizeof(int64_t);
    l->next = align(l->exchanged + heads * sizeof(atomic_bool));
    l->slot_bytes = align(l->next + (c->window == WINDOW_TERRACED ? l->keys - l->states : 0));
    return OK;
}

/* As a saved sequence has it, and a slot in which nothing was exchanged. */
static struct memory memory_at(const struct attention *a, const void *slot, int layer,
                               int kv_head) {
    const struct layout *l = &a->layout;
    char *at = (char *)slot;
    size_t head = (size_t)layer * a->config.n_kv_heads + kv_head;
    const struct room *room = &a->rooms[head];
    return (struct memory){
        .room = room,
        .state = (float *)(at + l->states) + head * a->state_heads * l->state_floats,
        .keys = at + room->keys,
        .turned = at + room->turned,
        .values = at + room->values,
        .positions = (int64_t *)(at + room->positions),
        .chosen = (bool *)(at + room->chosen),
        .chosen_for = (int64_t *)(at + l->chosen_for) + head,
        .next = (float *)(at + l->next) + head * a->state_heads * l->state_floats,
        .next_for = (int64_t *)(at + l->next_for) + head,
        .exchanged = (atomic_bool *)(at + l->exchanged) + head,
    };
}

struct memory memory_of(const struct attention *a, const void *slot, int layer, int kv_head) {
    struct memory m = memory_at(a, slot, layer, kv_head);
    if (!atomic_load_explicit(m.exchanged, memory_order_relaxed)) return m;
    float *state = m.next;
    m.next = m.state;
    m.state = state;
    return m;
}

size_t attention_slot_bytes(const struct attention *a) {
    return a->layout.slot_bytes;
}

int64_t attention_slot_position(const struct attention *a, const void *slot) {
    (void)a;
    return slot_header(slot)->position;
}

/* Nothing is chosen or folded for a next block: whoever comes to it does so. */
static void forget_prepared(const struct attention *a, void *slot) {
    memset((char *)slot + a->layout.chosen_for, 0, a->layout.next - a->layout.chosen_for);
}

void attention_slot_clear(const struct attention *a, void *slot) {
    const struct layout *l = &a->layout;
    struct slot_header header = {.version = STATE_VERSION, .fingerprint = a->fingerprint};
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    memcpy(slot, &header, sizeof header);
    memset((char *)slot + l->states, 0, l->keys - l->states);
    memset((char *)slot + l->positions, 0xff, l->sequence_bytes - l->positions); /* all -1 */
    forget_prepared(a, slot);
}

/* ---- copies ---- */

/* A softmax sequence is as long as its text: of each head, whole tiles of keys, and rows of values.
 */
static size_t softmax_keys_bytes(const struct attention *a, int64_t position) {
    return (size_t)((position + TILE - 1) / TILE) * TILE * a->shape.head_dim * element_bytes(a);
}
static size_t softmax_values_bytes(const struct attention *a, int64_t position) {
    return (size_t)position * a->shape.lanes * element_bytes(a);
}

void attention_slot_copy(const struct attention *a, void *dst, const void *src) {
    if (a->config.kind == ATTENTION_HEDGEHOG) {
        memcpy(dst, src, a->layout.slot_bytes);
        return;
    }
    int64_t position = slot_header(src)->position;
    attention_slot_clear(a, dst);
    slot_header(dst)->position = position;
    for (int layer = 0; layer < a->n_layers; layer++)
        for (int kv = 0; kv < a->config.n_kv_heads; kv++) {
            struct memory to = memory_of(a, dst, layer, kv), from = memory_of(a, src, layer, kv);
            memcpy(to.keys, from.keys, softmax_keys_bytes(a, position));
            memcpy(to.values, from.values, softmax_values_bytes(a, position));
        }
}

size_t attention_state_bytes(const struct attention *a, int64_t position) {
    if (a->config.kind == ATTENTION_HEDGEHOG) return a->layout.sequence_bytes;
    size_t heads = (size_t)a->n_layers * a->config.n_kv_heads;
    return sizeof(struct slot_header) +
           heads * (softmax_keys_bytes(a, position) + softmax_values_bytes(a, position));
}

/* Zeros in entries first .. end - 1. */
static void scrub_keys(const struct attention *a, void *keys, int first, int end) {
    size_t size = element_bytes(a), D = (size_t)a->shape.head_dim;
    for (int e = first; e < end; e++) {
        char *column = (char *)keys + ((size_t)(e / TILE) * D * TILE + (size_t)(e % TILE)) * size;
        for (size_t d = 0; d < D; d++)
            memset(column + d * TILE * size, 0, size);
    }
}
static void scrub_values(const struct attention *a, void *values, int first, int end) {
    size_t row = (size_t)a->shape.lanes * element_bytes(a);
    if (end > first) memset((char *)values + (size_t)first * row, 0, (size_t)(end - first) * row);
}

static void save_softmax(const struct attention *a, char *at, const void *slot, int64_t position) {
    memcpy(at, slot, sizeof(struct slot_header));
    at += sizeof(struct slot_header);
    for (int layer = 0; layer < a->n_layers; layer++)
        for (int kv = 0; kv < a->config.n_kv_heads; kv++) {
            struct memory m = memory_of(a, slot, layer, kv);
            memcpy(at, m.keys, softmax_keys_bytes(a, position));
            scrub_keys(a, at, (int)position, round_up((int)position, TILE));
            at += softmax_keys_bytes(a, position);
            memcpy(at, m.values, softmax_values_bytes(a, position));
            at += softmax_values_bytes(a, position);
        }
}

void attention_state_save(const struct attention *a, void *out, const void *slot) {
    const struct layout *l = &a->layout;
    int64_t position = slot_header(slot)->position;
    if (a->config.kind == ATTENTION_SOFTMAX) {
        save_softmax(a, out, slot, position);
        return;
    }
    memcpy(out, slot, l->sequence_bytes);
    for (int layer = 0; layer < a->n_layers; layer++)
        for (int kv = 0; kv < a->config.n_kv_heads; kv++) {
            struct memory m = memory_of(a, slot, layer, kv), saved = memory_at(a, out, layer, kv);
            if (*m.exchanged)
                memcpy(saved.state, m.state, a->state_heads * l->state_floats * sizeof(float));
            struct span spans[MAX_SPANS + 1];
            int growing, n = answer_spans(a, &m, position - 1, spans, &growing);
            spans[n++] = (struct span){m.room->entries, 0};
            for (int k = 0, used = 0; k < n; used = spans[k].first + spans[k].count, k++) {
                scrub_keys(a, saved.keys, used, spans[k].first);
                scrub_values(a, saved.values, used, spans[k].first);
            }
            scrub_keys(a, saved.keys, m.room->entries, m.room->tiles * TILE);
        }
}

/* ---- loading: nothing in the bytes is believed ---- */

static bool finite_fp32(const float *x, size_t n) {
    uint32_t bad = 0, bits;
    for (size_t i = 0; i < n; i++) {
        memcpy(&bits, x + i, sizeof bits);
        bad |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return !bad;
}
static bool finite_kv(const struct attention *a, const void *x, size_t bytes) {
    if (a->config.kv_type == KV_FP32) return finite_fp32(x, bytes / sizeof(float));
    const uint16_t *h = x;
    uint32_t bad = 0;
    for (size_t i = 0; i < bytes / sizeof *h; i++)
        bad |= (h[i] & 0x7f80u) == 0x7f80u;
    return !bad;
}

static enum err check_header(const struct attention *a, const struct slot_header *h, size_t bytes,
                             char *msg, size_t msg_len) {
    if (memcmp(h->magic, MAGIC, sizeof MAGIC) != 0)
        return err_set(msg, msg_len, ERR_FORMAT, "these bytes are not a saved sequence state");
    if (h->version != STATE_VERSION)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "saved state has format version %" PRIu32 ", this program reads %d",
                       h->version, STATE_VERSION);
    if (h->fingerprint != a->fingerprint)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "saved state comes from a model with other attention settings");
    int64_t most = a->config.kind == ATTENTION_SOFTMAX ? a->config.max_seq_len : INT64_MAX / 2;
    if (h->position < 0 || h->position > most)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "saved state claims position %" PRId64 ", possible are 0 to %" PRId64,
                       h->position, most);
    if (bytes != attention_state_bytes(a, h->position))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "saved state has %zu bytes, at position %" PRId64 " it must have %zu", bytes,
                       h->position, attention_state_bytes(a, h->position));
    return OK;
}

/* The cache's positions ascend, lie after the sinks and before the window, and end in -1 where it
 * is not full. */
static bool cache_is_sound(const struct attention *a, const struct memory *m, int64_t position) {
    int64_t w = a->config.window_size, last = a->config.sinks - 1;
    int64_t end = position > 0 && w > 0 ? ((position - 1) / w - 1) * w : 0;
    int n = memory_cached(m);
    for (int i = 0; i < n; i++) {
        if (m->positions[i] <= last || m->positions[i] >= end) return false;
        last = m->positions[i];
    }
    for (int i = n; i < m->room->cache; i++)
        if (m->positions[i] != -1) return false;
    return true;
}

/* S is any finite numbers; z, a sum of features, is not negative. */
static bool state_is_sound(const struct attention *a, const struct memory *m) {
    if (!finite_fp32(m->state, a->state_heads * a->layout.state_floats)) return false;
    for (int h = 0; h < a->state_heads; h++) {
        const float *z = m->state + (size_t)h * a->layout.state_floats + a->layout.S_floats;
        for (int i = 0; a->layout.state_floats && i < a->shape.phi_lanes; i++)
            if (z[i] < 0) return false;
    }
    return true;
}

/* The copies that score, from the keys as saved. */
static void rebuild_turned(const struct attention *a, struct memory *m, int64_t position,
                           struct scratch *tmp) {
    struct span spans[MAX_SPANS];
    int growing, n = answer_spans(a, m, position - 1, spans, &growing),
                 far = a->layout.sinks + m->room->cache;
    float *cosines = tmp->v, *sines = tmp->v + a->shape.head_dim / 2;
    for (int k = 0; k < n; k++)
        for (int e = spans[k].first; e < spans[k].first + spans[k].count; e++) {
            int64_t key = memory_entry_position(a, m, e, position - 1);
            a->kernels->read_key(&a->shape, tmp->x, m->keys, e);
            if (e >= far || !memory_clamped(a, key, position - 1)) {
                rope_angles(a->rope, key, cosines, sines);
                a->kernels->rotate(tmp->x, tmp->x, cosines, sines, a->shape.head_dim);
            }
            a->kernels->write_key(&a->shape, m->turned, e, tmp->x);
        }
}

static void copy_in(const struct attention *a, void *slot, const char *state, int64_t position) {
    if (a->config.kind == ATTENTION_HEDGEHOG) {
        memcpy(slot, state, a->layout.sequence_bytes);
        return;
    }
    memcpy(slot, state, sizeof(struct slot_header));
    state += sizeof(struct slot_header);
    for (int layer = 0; layer < a->n_layers; layer++)
        for (int kv = 0; kv < a->config.n_kv_heads; kv++) {
            struct memory m = memory_of(a, slot, layer, kv);
            memcpy(m.keys, state, softmax_keys_bytes(a, position));
            state += softmax_keys_bytes(a, position);
            memcpy(m.values, state, softmax_values_bytes(a, position));
            state += softmax_values_bytes(a, position);
        }
}

static enum err check_memory(const struct attention *a, const struct memory *m, int layer, int kv,
                             int64_t position, char *msg, size_t msg_len) {
    bool softmax = a->config.kind == ATTENTION_SOFTMAX;
    const char *what = NULL;
    if (!state_is_sound(a, m))
        what = "a state that is not finite or has a negative normaliser";
    else if (!finite_kv(a, m->keys,
                        softmax ? softmax_keys_bytes(a, position) : m->room->keys_bytes))
        what = "a key that is not finite";
    else if (!finite_kv(a, m->values,
                        softmax ? softmax_values_bytes(a, position) : m->room->values_bytes))
        what = "a value that is not finite";
    else if (!cache_is_sound(a, m, position))
        what = "impossible positions in its cache";
    if (!what) return OK;
    return err_set(msg, msg_len, ERR_FORMAT, "saved state has %s (layer %d, kv head %d)", what,
                   layer, kv);
}

enum err state_copy_in(const struct attention *a, void *slot, const void *state, size_t bytes,
                       char *msg, size_t msg_len) {
    struct slot_header header = {0};
    attention_slot_clear(a, slot);
    if (bytes < sizeof header)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "saved state has %zu bytes, its header alone has %zu", bytes, sizeof header);
    memcpy(&header, state, sizeof header);
    enum err e = check_header(a, &header, bytes, msg, msg_len);
    if (e) return e;
    copy_in(a, slot, state, header.position);
    for (int layer = 0; layer < a->n_layers && !e; layer++)
        for (int kv = 0; kv < a->config.n_kv_heads && !e; kv++) {
            struct memory m = memory_of(a, slot, layer, kv);
            e = check_memory(a, &m, layer, kv, header.position, msg, msg_len);
        }
    if (e) attention_slot_clear(a, slot);
    return e;
}

enum err attention_state_load(const struct attention *a, void *slot, const void *state,
                              size_t bytes, char *msg, size_t msg_len) {
    enum err e = state_copy_in(a, slot, state, bytes, msg, msg_len);
    for (int layer = 0; layer < a->n_layers && !e; layer++)
        for (int kv = 0; kv < a->config.n_kv_heads; kv++) {
            struct memory m = memory_of(a, slot, layer, kv);
            if (m.turned != m.keys) rebuild_turned(a, &m, slot_header(slot)->position, a->scratch);
        }
    return e;
}
