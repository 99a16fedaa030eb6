/* gpu_slot.c - sequences on a device: clear, copy, save, load.  Saved states are slot.c's, which
 * also checks and completes them: here they only travel. */
#include "attention/gpu_internal.h"

#include "compute/memory.h"

#include <string.h>

static char *slot_at(const struct gpu_attention *a, int slot) {
    return a->slots + (size_t)slot * a->shape.slot_stride;
}

static bool softmax(const struct gpu_attention *a) {
    return a->twin->config.kind == ATTENTION_SOFTMAX;
}

int64_t gpu_attention_slot_position(const struct gpu_attention *a, int slot) {
    return a->positions[slot];
}

void gpu_attention_slot_clear(struct gpu_attention *a, int slot) {
    const struct layout *l = &a->twin->layout;
    char *at = slot_at(a, slot);
    a->positions[slot] = 0;
    if (softmax(a)) return;
    gpu_fill(a->gpu, at + l->states, 0, l->keys - l->states);
    if (l->most_cache) gpu_fill(a->gpu, at + l->positions, 0xff, l->sequence_bytes - l->positions);
}

/* ---- a softmax sequence is as long as its text: of each head, whole tiles of keys, and rows of
 * values ---- */

struct extent {
    size_t keys, values, keys_bytes, values_bytes; /* where in a slot, and how much */
};

static struct extent extent_of(const struct gpu_attention *a, int head, int64_t position) {
    const struct shape *s = &a->twin->shape;
    size_t element = s->kv_type == KV_BF16 ? sizeof(uint16_t) : sizeof(float);
    return (struct extent){
        .keys = a->rooms[head].keys,
        .values = a->rooms[head].values,
        .keys_bytes = (size_t)((position + TILE - 1) / TILE) * TILE * s->head_dim * element,
        .values_bytes = (size_t)position * s->lanes * element,
    };
}

static int all_heads(const struct gpu_attention *a) {
    return a->n_layers * a->shape.n_kv_heads;
}

void gpu_attention_slot_copy(struct gpu_attention *a, int dst, int src) {
    char *to = slot_at(a, dst), *from = slot_at(a, src);
    if (dst == src) return;
    a->positions[dst] = a->positions[src];
    if (!softmax(a)) {
        gpu_copy(a->gpu, to, from, a->shape.slot_stride);
        return;
    }
    for (int head = 0; a->positions[src] && head < all_heads(a); head++) {
        struct extent e = extent_of(a, head, a->positions[src]);
        gpu_copy(a->gpu, to + e.keys, from + e.keys, e.keys_bytes);
        gpu_copy(a->gpu, to + e.values, from + e.values, e.values_bytes);
    }
}

/* Zeros in the entries of the last tile that are not the sequence's. */
static void scrub_tile(const struct gpu_attention *a, char *end, int64_t position) {
    const struct shape *s = &a->twin->shape;
    size_t element = s->kv_type == KV_BF16 ? sizeof(uint16_t) : sizeof(float);
    size_t used = (size_t)(position % TILE) * element, row = TILE * element;
    for (int d = 1; used && d <= s->head_dim; d++)
        memset(end - (size_t)d * row + used, 0, row - used);
}

/* Copies go through page-locked memory, a->host: the driver would carry others through its own, in
 * smaller pieces and with this thread waiting. */
enum { HALF = GPU_FERRY_BYTES / 2, PIECE = 256 << 10 };

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

/* From the device to `out`, one piece behind the other: one half of a->host arrives while the other
 * is copied on. */
struct ferry {
    struct gpu_attention *a;
    char *out;
    int half;             /* that is being filled */
    size_t used, arrived; /* bytes of it, and of the other, which are not yet in out */
};

static enum err turn_round(struct ferry *f) {
    memcpy(f->out, f->a->host + (size_t)!f->half * HALF, f->arrived);
    f->out += f->arrived;
    f->arrived = f->used;
    f->used = 0;
    f->half = !f->half;
    return gpu_wait(f->a->gpu);
}

static enum err ferry_down(struct ferry *f, const char *from, size_t bytes) {
    enum err e = OK;
    for (size_t n; bytes && !e; from += n, bytes -= n) {
        n = least(bytes, HALF - f->used);
        gpu_download(f->a->gpu, f->a->host + (size_t)f->half * HALF + f->used, from, n);
        f->used += n;
        if (f->used == HALF) e = turn_round(f);
    }
    return e;
}

/* To the device: a piece is on its way while the next is copied into a->host. */
static enum err ferry_up(struct gpu_attention *a, size_t *used, char *to, const char *from,
                         size_t bytes) {
    enum err e = OK;
    for (size_t n; bytes && !e; from += n, to += n, bytes -= n) {
        n = least(bytes, least(PIECE, GPU_FERRY_BYTES - *used));
        memcpy(a->host + *used, from, n);
        gpu_upload(a->gpu, to, a->host + *used, n);
        *used += n;
        if (*used < GPU_FERRY_BYTES) continue;
        e = gpu_wait(a->gpu);
        *used = 0;
    }
    return e;
}

static enum err save_softmax(struct gpu_attention *a, int slot, char *out) {
    int64_t position = a->positions[slot];
    const char *from = slot_at(a, slot);
    struct slot_header header = a->header;
    header.position = position;
    memcpy(out, &header, sizeof header);
    char *at = out + sizeof header;
    struct ferry f = {.a = a, .out = at};
    enum err err = OK;
    for (int head = 0; !err && position && head < all_heads(a); head++) {
        struct extent e = extent_of(a, head, position);
        err = ferry_down(&f, from + e.keys, e.keys_bytes);
        if (!err) err = ferry_down(&f, from + e.values, e.values_bytes);
    }
    for (int halves = 0; halves < 2 && !err; halves++)
        err = turn_round(&f);
    for (int head = 0; !err && position && head < all_heads(a); head++) {
        struct extent e = extent_of(a, head, position);
        scrub_tile(a, at + e.keys_bytes, position);
        at += e.keys_bytes + e.values_bytes;
    }
    return err;
}

static void upload_softmax(struct gpu_attention *a, int slot, const char *host, int64_t position) {
    char *to = slot_at(a, slot);
    size_t used = 0;
    enum err err = OK; /* the next wait returns it as well */
    for (int head = 0; !err && position && head < all_heads(a); head++) {
        struct extent e = extent_of(a, head, position);
        err = ferry_up(a, &used, to + e.keys, host + e.keys, e.keys_bytes);
        if (!err) err = ferry_up(a, &used, to + e.values, host + e.values, e.values_bytes);
    }
}

/* ---- save and load ---- */

enum err gpu_attention_slot_save(struct gpu_attention *a, int slot, void *out) {
    const struct layout *l = &a->twin->layout;
    char *at = slot_at(a, slot);
    if (softmax(a)) return save_softmax(a, slot, out);
    gpu_launch_join(a->gpu, &a->shape, a->n_layers, a->whole, at);
    gpu_download(a->gpu, a->host, a->whole, l->keys);
    gpu_download(a->gpu, a->host + l->keys, at + l->keys, l->sequence_bytes - l->keys);
    enum err e = gpu_wait(a->gpu);
    if (e) return e;
    struct slot_header header = a->header;
    header.position = a->positions[slot];
    memcpy(a->host, &header, sizeof header);
    attention_state_save(a->twin, out, a->host); /* zeros where nothing is used */
    return OK;
}

static void upload_hedgehog(struct gpu_attention *a, int slot, const char *host, int64_t position) {
    const struct layout *l = &a->twin->layout;
    char *at = slot_at(a, slot);
    gpu_upload(a->gpu, a->whole, host, l->keys);
    gpu_upload(a->gpu, at + l->keys, host + l->keys, l->sequence_bytes - l->keys);
    gpu_launch_split(a->gpu, &a->shape, a->n_layers, at, a->whole);
    gpu_launch_turn(a->gpu, &a->shape, a->n_layers, slot, position);
}

enum err gpu_attention_slot_load(struct gpu_attention *a, int slot, const void *state, size_t bytes,
                                 char *msg, size_t msg_len) {
    size_t slot_bytes = attention_slot_bytes(a->twin);
    char *host = softmax(a) ? memory_map(slot_bytes) : a->host; /* of what it maps little is used */
    if (!host) return err_set(msg, msg_len, ERR_NOMEM, "no memory to check a saved state");
    gpu_attention_slot_clear(a, slot);
    enum err e = state_copy_in(a->twin, host, state, bytes, msg, msg_len);
    if (!e) {
        int64_t position = attention_slot_position(a->twin, host);
        if (softmax(a))
            upload_softmax(a, slot, host, position);
        else
            upload_hedgehog(a, slot, host, position);
        e = gpu_wait(a->gpu);
        if (e) err_set(msg, msg_len, e, "%s", gpu_error(a->gpu));
        if (!e) a->positions[slot] = position;
    }
    if (softmax(a)) memory_unmap(host, slot_bytes);
    return e;
}

int gpu_attention_cache_positions(struct gpu_attention *a, int slot, int layer, int kv_head,
                                  int64_t *out) {
    const struct gpu_room *room = &a->rooms[layer * a->shape.n_kv_heads + kv_head];
    size_t bytes = (size_t)room->cache * sizeof *out;
    int n = 0;
    if (!bytes) return 0;
    gpu_download(a->gpu, out, slot_at(a, slot) + room->positions, bytes);
    if (gpu_wait(a->gpu)) return 0;
    while (n < room->cache && out[n] >= 0)
        n++;
    return n;
}
