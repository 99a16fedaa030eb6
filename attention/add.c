/* add.c - the memory of other sequences added to one.
 *
 * A state is a sum over keys and, where maps see k before RoPE, knows no positions: sums of
 * separate texts can be added.  Caches lie side by side. */
#include "attention/internal.h"

/* Keys a head's state in a slot holds, the horizon applied. */
static int64_t held(const struct attention *a, const struct room *room, const void *slot) {
    int64_t n = memory_folded(a, room, slot_header(slot)->position - 1),
            horizon = a->config.horizon;
    return horizon && n > horizon ? horizon : n;
}

static bool caches_fit(const struct attention *a, const void *dst, const void *const *srcs, int n) {
    for (int layer = 0; layer < a->n_layers; layer++)
        for (int kv = 0; kv < a->config.n_kv_heads; kv++) {
            struct memory m = memory_of(a, dst, layer, kv);
            int entries = memory_cached(&m);
            for (int i = 0; i < n; i++) {
                m = memory_of(a, srcs[i], layer, kv);
                entries += memory_cached(&m);
            }
            if (entries > m.room->places) return false;
        }
    return true;
}

/* Two ascending lists become one, from the back; entries of equal positions: dst's come first. */
static void merge_cache(const struct attention *a, struct memory *dst, const struct memory *src) {
    int i = memory_cached(dst), j = memory_cached(src), sinks = a->layout.sinks;
    for (int k = i + j; j > 0;) {
        bool own = i > 0 && dst->positions[i - 1] > src->positions[j - 1];
        int from = own ? --i : --j;
        k--;
        if (!own || from != k) memory_copy_entry(a, dst, sinks + k, own ? dst : src, sinks + from);
        dst->positions[k] = own ? dst->positions[from] : src->positions[from];
    }
}

enum err attention_state_add(const struct attention *a, void *dst, const void *const *srcs, int n) {
    int64_t position = slot_header(dst)->position, horizon = a->config.horizon;
    if (a->config.kind != ATTENTION_HEDGEHOG || a->config.window != WINDOW_TERRACED ||
        attention_linear_keys(a, -1, 0, position - 1) <= 0)
        return ERR_ARG;
    for (int i = 0; i < n; i++)
        if (srcs[i] == dst || slot_header(srcs[i])->position > position) return ERR_ARG;
    if (!caches_fit(a, dst, srcs, n)) return ERR_ARG;
    size_t floats = (size_t)a->state_heads * a->layout.state_floats;
    for (int layer = 0; layer < a->n_layers; layer++)
        for (int kv = 0; kv < a->config.n_kv_heads; kv++) {
            struct memory m = memory_of(a, dst, layer, kv);
            int64_t total = held(a, m.room, dst);
            for (int i = 0; i < n; i++) {
                struct memory src = memory_of(a, srcs[i], layer, kv);
                total += held(a, m.room, srcs[i]);
                for (size_t k = 0; k < floats; k++)
                    m.state[k] += src.state[k];
                merge_cache(a, &m, &src);
            }
            if (horizon && total > horizon)
                a->kernels->scale(m.state, floats, (float)((double)horizon / (double)total));
            int sinks = a->layout.sinks, cached = memory_cached(&m);
            for (int e = sinks; e < sinks + cached; e++) /* far for dst, though near for its own */
                if (memory_clamped(a, m.positions[e - sinks], position - 1))
                    memory_clamp_entry(a, &m, e);
            *m.chosen_for = *m.next_for = 0; /* of other candidates, from another state */
        }
    return OK;
}
