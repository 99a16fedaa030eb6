/* gpu_room.c - where each head's memory lies: in slots, which are laid out as slot.c says, and in
 * snapshots, which hold one layer. */
#include "attention/gpu_internal.h"

static size_t up_to(size_t bytes, size_t multiple) {
    return (bytes + multiple - 1) / multiple * multiple;
}

size_t gpu_place_rooms(const struct gpu_shape *s, struct gpu_room *rooms, size_t n, size_t at) {
    size_t element = s->kv_bf16 ? sizeof(uint16_t) : sizeof(float), D = (size_t)s->head_dim,
           lanes = (size_t)s->lanes, others = (size_t)s->sinks + s->ring;
    size_t states = (size_t)s->state_heads * s->state_floats * sizeof(float);
    for (size_t i = 0; i < n; i++, at += states)
        rooms[i].states = at;
    size_t keys = at;
    for (size_t i = 0; i < n; i++) {
        rooms[i].keys = rooms[i].turned = at;
        at += up_to(others + rooms[i].cache, TILE) * D * element;
    }
    size_t keys_bytes = at - keys;
    for (size_t i = 0; i < n; i++) {
        rooms[i].values = at;
        at += (others + rooms[i].cache) * lanes * element;
    }
    for (size_t i = 0; i < n; i++) {
        rooms[i].positions = at;
        at += (size_t)rooms[i].cache * sizeof(int64_t);
    }
    if (!s->turned) return at;
    at = up_to(at, 64);
    for (size_t i = 0; i < n; i++)
        rooms[i].turned = rooms[i].keys - keys + at;
    return at + keys_bytes;
}

void gpu_rooms_of_slots(const struct attention *twin, struct gpu_room *rooms) {
    const struct layout *l = &twin->layout;
    size_t states = (size_t)twin->state_heads * l->state_floats * sizeof(float);
    for (int i = 0; i < twin->n_layers * twin->config.n_kv_heads; i++) {
        const struct room *r = &twin->rooms[i];
        rooms[i] = (struct gpu_room){
            .cache = r->cache,
            .recent = r->recent,
            .states = l->states + (size_t)i * states,
            .keys = r->keys,
            .values = r->values,
            .positions = r->positions,
            .turned = r->turned,
        };
    }
}

size_t gpu_rooms_of_snapshots(const struct gpu_shape *shape, int n_layers,
                              const struct gpu_room *slots, struct gpu_room *rooms) {
    size_t heads = (size_t)shape->n_kv_heads, most = 0;
    for (size_t i = 0; i < (size_t)n_layers * heads; i++)
        rooms[i] = slots[i];
    for (int layer = 0; layer < n_layers; layer++) {
        size_t end = gpu_place_rooms(shape, rooms + (size_t)layer * heads, heads, 0);
        if (end > most) most = end;
    }
    return up_to(most, 256);
}
