/* gpu_device.cuh - what all attention kernels share: where things lie in a slot, what a row sees of
 * its sequence's memory, and the feature maps.  The meaning is memory.c's, answer.c's and
 * kernels.c's.
 *
 * One layer and kv head of a slot:
 *   states     [state heads] of: S as two planes of 16 bits, hi [F][lanes] then lo [F][lanes]; z
 * [phi_lanes] fp32 keys       tiles [entries / 16][D][16]: k' (map_position rope: k); turned alike:
 * what rows score values     [entries][lanes], pad lanes zero positions  [cache] ascending, then -1
 * Entries: [sinks | cache | ring].  Keys and values are bf16 or fp32 (kv_bf16). */
#ifndef URCHIN_ATTENTION_GPU_DEVICE_CUH
#define URCHIN_ATTENTION_GPU_DEVICE_CUH

#include "compute/cuda.h"

extern "C" {
#include "attention/attention.h"
}
#include "attention/gpu_kernels.h"

#include <math.h>

/* ---- places ---- */

struct gpu_place {
    char *states, *keys, *turned, *values;
    int64_t *positions;
    int cache, recent; /* places of its cache; of them for recent keys */
};

DEVICE gpu_place place_of(const gpu_shape &s, int slot, int layer, int kv_head) {
    const gpu_room &room = s.rooms[layer * s.n_kv_heads + kv_head];
    char *at = s.slots + (size_t)slot * s.slot_stride;
    gpu_place m;
    m.states = at + room.states;
    m.keys = at + room.keys;
    m.turned = at + room.turned;
    m.values = at + room.values;
    m.positions = (int64_t *)(at + room.positions);
    m.cache = room.cache;
    m.recent = room.recent;
    return m;
}

/* Entries of a head that has a ring. */
DEVICE int entries_of(const gpu_shape &s, int cache) {
    return s.sinks + cache + s.ring;
}

/* ---- a state head: planes of S, and z ---- */

DEVICE uint16_t *plane_hi(const gpu_shape &s, const gpu_place &m, int state) {
    return (uint16_t *)(m.states + (size_t)state * s.state_floats * sizeof(float));
}
DEVICE uint16_t *plane_lo(const gpu_shape &s, const gpu_place &m, int state) {
    return plane_hi(s, m, state) + s.S_floats;
}
DEVICE float *normaliser(const gpu_shape &s, const gpu_place &m, int state) {
    return (float *)(m.states + (size_t)state * s.state_floats * sizeof(float)) + s.S_floats;
}

/* hi is the nearest bf16, half away from zero; together they are x to the bit, whatever x is. */
DEVICE uint16_t split_hi(float x) {
    return (uint16_t)((as_bits(x) + 0x8000u) >> 16);
}
DEVICE uint16_t split_lo(float x) {
    return (uint16_t)as_bits(x);
}
DEVICE float join(uint16_t hi, uint16_t lo) {
    return as_float((((uint32_t)hi - (lo >> 15)) << 16) | lo);
}

/* Element i of S: whole, or as reading steps see it. */
DEVICE float whole_S(const uint16_t *hi, size_t S_floats, size_t i) {
    return join(hi[i], hi[S_floats + i]);
}
DEVICE float read_S(const gpu_shape &s, const uint16_t *hi, size_t i) {
    return s.exact ? whole_S(hi, s.S_floats, i) : bf16_to_float(hi[i]);
}
DEVICE void write_S(uint16_t *hi, size_t S_floats, size_t i, float x) {
    hi[i] = split_hi(x);
    hi[S_floats + i] = split_lo(x);
}

/* ---- exact keys and values ---- */

DEVICE size_t key_at(const gpu_shape &s, int entry, int d) { /* element of keys or turned */
    return ((size_t)(entry / 16) * s.head_dim + d) * 16 + entry % 16;
}
DEVICE size_t value_at(const gpu_shape &s, int entry, int d) {
    return (size_t)entry * s.lanes + d;
}
DEVICE float read_kv(const gpu_shape &s, const void *at, size_t element) {
    return s.kv_bf16 ? bf16_to_float(((const uint16_t *)at)[element])
                     : ((const float *)at)[element];
}
DEVICE void write_kv(const gpu_shape &s, void *at, size_t element, float x) {
    if (s.kv_bf16)
        ((uint16_t *)at)[element] = float_to_bf16(x);
    else
        ((float *)at)[element] = x;
}
DEVICE float round_kv(const gpu_shape &s, float x) { /* as it will be read back */
    return s.kv_bf16 ? bf16_to_float(float_to_bf16(x)) : x;
}

/* ---- RoPE ---- */

/* A product rounded by itself: the compiler may not fuse it into the sum around it, or stored keys
 * would differ from the CPU's. */
DEVICE float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    volatile float p = a * b;
    return p;
#endif
}

/* Element d of x rotated, from x[d] and its other half x[(d + D / 2) % D]; the angles are those of
 * d % (D / 2). */
DEVICE float rotated(float x, float other, bool second_half, float cosine, float sine) {
    float a = rounded_product(x, cosine), b = rounded_product(other, sine);
    return second_half ? a + b : a - b;
}

/* ---- positions ---- */

DEVICE bool is_softmax(const gpu_shape &s) {
    return s.kind == ATTENTION_SOFTMAX;
}

/* Keys that left the exact set of a head with so many places by the time the row at this position
 * is answered. */
DEVICE int64_t folded_keys(const gpu_shape &s, int cache, int64_t position) {
    int64_t left = 0;
    if (is_softmax(s)) return 0;
    if (s.window == WINDOW_NONE) left = position + 1;
    if (s.window == WINDOW_SLIDING) left = position + 1 - s.window_size - s.sinks;
    if (s.window == WINDOW_TERRACED)
        left = (position / s.window_size - 1) * s.window_size - s.sinks - cache;
    return left > 0 ? left : 0;
}

/* What S and z are multiplied by when the number of keys ever folded grows: beyond the horizon the
 * state forgets. */
DEVICE float forgetting(const gpu_shape &s, int64_t before, int64_t after) {
    if (!s.horizon || after <= s.horizon) return 1;
    int64_t held = (before < s.horizon ? before : s.horizon) + after - before;
    return (float)((double)s.horizon / (double)held);
}

/* Places of the cache in use: those before the first -1. */
DEVICE int cached_entries(const gpu_place &m) {
    int low = 0, high = m.cache;
    while (low < high) {
        int middle = (low + high) / 2;
        if (m.positions[middle] >= 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The position of the key at an entry in use, as of the row at position. */
DEVICE int64_t entry_position(const gpu_shape &s, const gpu_place &m, int entry, int64_t position) {
    if (entry < s.sinks) return entry;
    if (entry < s.sinks + m.cache) return m.positions[entry - s.sinks];
    int64_t place = entry - s.sinks - m.cache, w = s.window_size;
    if (is_softmax(s)) return place;
    if (s.window == WINDOW_SLIDING) return position - (position - place) % w;
    int64_t block = position / w;
    if (block % 2 != place / w) block--;
    return block * w + place % w;
}

/* Does a sink or cached key count as exactly max_distance behind for the row at position? */
DEVICE bool is_clamped(const gpu_shape &s, int64_t key, int64_t position) {
    if (!s.max_distance) return false;
    int64_t w = s.window_size, from = s.window == WINDOW_TERRACED ? position / w * w : position;
    return from - key > s.max_distance;
}

/* The entry that holds the key of the row at position, of a head with so many places. */
DEVICE int own_entry(const gpu_shape &s, int cache, int64_t position) {
    return s.ring ? s.sinks + cache + (int)(position % s.ring) : 0;
}

/* ---- a key and value enter ---- */

/* Element d (of lanes) of a row's value, key and rotated key: each rounded as it is stored, and the
 * rotated one is made from the key as it was rounded. */
DEVICE void store_element(const gpu_shape &s, const gpu_place &m, const gpu_rows &rows, int row,
                          int kv_head, int entry, int d) {
    int D = s.head_dim, half = D / 2;
    const float *k = rows.k + (size_t)row * rows.k_row + (size_t)kv_head * D;
    const float *v = rows.v + (size_t)row * rows.v_row + (size_t)kv_head * D;
    write_kv(s, m.values, value_at(s, entry, d), d < D ? v[d] : 0);
    if (d >= D) return;
    if (!s.rope) {
        write_kv(s, m.keys, key_at(s, entry, d), k[d]);
        return;
    }
    bool second = d >= half;
    int other = second ? d - half : d + half, angle = second ? d - half : d;
    float cosine = rows.cosines[(size_t)row * half + angle],
          sine = rows.sines[(size_t)row * half + angle];
    if (!s.map_before_rope) {
        write_kv(s, m.keys, key_at(s, entry, d), rotated(k[d], k[other], second, cosine, sine));
        return;
    }
    write_kv(s, m.keys, key_at(s, entry, d), k[d]);
    if (s.turned)
        write_kv(s, m.turned, key_at(s, entry, d),
                 rotated(round_kv(s, k[d]), round_kv(s, k[other]), second, cosine, sine));
}

/* ---- what a row sees ---- */

/* Visible entries: so many of the sinks, of the cache, and of each half of the ring, each from its
 * start. Sliding and softmax have one half, the whole ring. */
struct gpu_view {
    int sinks, cached, half[2];
    int cache;   /* places there are */
    int clamped; /* the first so many of sinks and cache count as max_distance behind */
};

DEVICE int half_size(const gpu_shape &s) {
    return !is_softmax(s) && s.window == WINDOW_TERRACED ? s.window_size : s.ring;
}

/* Sinks and cache ascend in position, so the clamped ones come first.  n: sinks and cached keys in
 * sight. */
DEVICE int clamped_entries(const gpu_shape &s, const int64_t *positions, int n, int64_t position) {
    if (!s.max_distance) return 0;
    int low = 0, high = n;
    while (low < high) {
        int middle = (low + high) / 2;
        if (is_clamped(s, middle < s.sinks ? middle : positions[middle - s.sinks], position))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* What the row at position sees; all rows of a block of a terraced window differ in half[] alone.
 */
DEVICE gpu_view view_of(const gpu_shape &s, const gpu_place &m, int64_t position) {
    gpu_view v = {0, 0, {0, 0}, m.cache, 0};
    if (!s.ring || position < 0) return v;
    int64_t w = s.window_size;
    if (is_softmax(s)) {
        v.half[0] = (int)(position + 1);
    } else if (s.window == WINDOW_SLIDING) {
        int64_t left = position + 1 - w; /* keys that have left the window */
        v.sinks = left < 0 ? 0 : left < s.sinks ? (int)left : s.sinks;
        v.half[0] = (int)(position + 1 < w ? position + 1 : w);
        v.clamped = clamped_entries(s, m.positions, v.sinks, position);
    } else if (s.window == WINDOW_TERRACED) {
        int64_t block = position / w;
        int own = (int)(position % w) + 1, before = block >= 1 ? (int)w : 0;
        v.sinks = block >= 2 ? s.sinks : 0;
        v.cached = cached_entries(m);
        v.half[0] = block % 2 ? before : own;
        v.half[1] = block % 2 ? own : before;
        v.clamped = clamped_entries(s, m.positions, v.sinks + v.cached, position);
    }
    return v;
}

DEVICE bool sees(const gpu_shape &s, const gpu_view &v, int entry) {
    if (entry < s.sinks) return entry < v.sinks;
    entry -= s.sinks;
    if (entry < v.cache) return entry < v.cached;
    entry -= v.cache;
    int size = half_size(s);
    return entry < size ? entry < v.half[0] : entry - size < v.half[1];
}

DEVICE int visible_entries(const gpu_view &v) {
    return v.sinks + v.cached + v.half[0] + v.half[1];
}

/* The i-th visible entry, ascending. */
DEVICE int visible_entry(const gpu_shape &s, const gpu_view &v, int i) {
    if (i < v.sinks) return i;
    i -= v.sinks;
    if (i < v.cached) return s.sinks + i;
    i -= v.cached;
    int ring = s.sinks + v.cache;
    return i < v.half[0] ? ring + i : ring + half_size(s) + i - v.half[0];
}

/* One past the last visible entry. */
DEVICE int entries_end(const gpu_shape &s, const gpu_view &v) {
    int n = visible_entries(v);
    return n ? visible_entry(s, v, n - 1) + 1 : 0;
}

/* ---- feature maps (kernels.c): a warp turns one row of projections u [f] into phi [phi_lanes]
 * ----
 *
 * phi may be u: lane l reads and writes only elements l, l + 32, ... of u, and what it writes past
 * f nobody reads. */

/* How far a query's exponents reach: max |u|; the row's bound where the map has one is -inf. */
DEVICE float map_reach(const gpu_shape &s, const float *u, int lane) {
    if (s.map != MAP_EXP) return -INFINITY;
    float most = 0;
    for (int i = lane; i < s.f; i += 32)
        most = fmaxf(most, fabsf(u[i]));
    return warp_max(most);
}

/* phi = [exp(u), exp(-u)].  A key's u is cut at +-30, so that bad input stays finite; a query's row
 * may be shifted. */
DEVICE void map_exp(const gpu_shape &s, float *phi, const float *u, float shift, float most,
                    int lane) {
    for (int i = lane; i < s.f; i += 32) {
        float x = u[i];
        phi[i] = expf(fminf(x + shift, most));
        phi[s.f + i] = expf(fminf(shift - x, most));
    }
}

/* phi = [softmax(u), softmax(-u)], at least 1e-12 each, times factor. */
DEVICE void map_softmax2(const gpu_shape &s, float *phi, const float *u, float factor, int lane) {
    float top = -INFINITY, bottom = -INFINITY, plus = 0, minus = 0;
    for (int i = lane; i < s.f; i += 32) {
        top = fmaxf(top, u[i]);
        bottom = fmaxf(bottom, -u[i]);
    }
    top = warp_max(top);
    bottom = warp_max(bottom);
    for (int i = lane; i < s.f; i += 32) {
        plus += expf(u[i] - top);
        minus += expf(-u[i] - bottom);
    }
    plus = warp_sum(plus);
    minus = warp_sum(minus);
    for (int i = lane; i < s.f; i += 32) {
        float x = u[i];
        phi[i] = fmaxf(expf(x - top) / plus, 1e-12f) * factor;
        phi[s.f + i] = fmaxf(expf(-x - bottom) / minus, 1e-12f) * factor;
    }
}

/* phi = softmax over all of [2u, -2u], times factor. */
DEVICE void map_joint_softmax(const gpu_shape &s, float *phi, const float *u, float factor,
                              int lane) {
    float most = 0, plus = 0, minus = 0;
    for (int i = lane; i < s.f; i += 32)
        most = fmaxf(most, 2 * fabsf(u[i]));
    most = warp_max(most);
    for (int i = lane; i < s.f; i += 32) {
        plus += expf(2 * u[i] - most);
        minus += expf(-2 * u[i] - most);
    }
    float sum = warp_sum(plus) + warp_sum(minus);
    for (int i = lane; i < s.f; i += 32) {
        float x = u[i];
        phi[i] = expf(2 * x - most) / sum * factor;
        phi[s.f + i] = expf(-2 * x - most) / sum * factor;
    }
}

DEVICE void map_bounded(const gpu_shape &s, float *phi, const float *u, float factor, int lane) {
    if (s.map == MAP_SOFTMAX2)
        map_softmax2(s, phi, u, factor, lane);
    else
        map_joint_softmax(s, phi, u, factor, lane);
}

DEVICE void zero_pad(const gpu_shape &s, float *phi, int lane) {
    for (int i = s.features + lane; i < s.phi_lanes; i += 32)
        phi[i] = 0;
}

DEVICE void map_key(const gpu_shape &s, float *phi, const float *u, int lane) {
    if (s.map == MAP_EXP)
        map_exp(s, phi, u, 0, 30, lane);
    else
        map_bounded(s, phi, u, 1, lane);
    zero_pad(s, phi, lane);
}

DEVICE void map_query(const gpu_shape &s, float *phi, const float *u, float log_scale, int lane) {
    if (s.map == MAP_EXP)
        map_exp(s, phi, u, log_scale, INFINITY, lane);
    else
        map_bounded(s, phi, u, expf(log_scale), lane);
    zero_pad(s, phi, lane);
}

/* ---- one scale for a row's exact and linear terms: kernels.c, mix() ---- */

/* Exact terms are factor exp(l - shift), linear ones exp(log_scale) phi_q.phi_k. */
struct gpu_scales {
    float shift, factor, log_scale;
};

/* top: the largest exact logit, -inf without any; reach: map_reach(), -inf where the state is
 * empty; mix: c_h or omega_h of the head, or NULL. */
DEVICE gpu_scales mix_scales(const gpu_shape &s, float top, float reach, const float *mix) {
    gpu_scales to;
    if (s.mixing == MIXING_LOLCATS) {
        float shift = reach > 0 ? reach : 0;
        to.shift = top + shift;
        to.factor = mix ? 1 / (1 + expf(-*mix)) : 1;
        to.log_scale = -shift;
        return to;
    }
    float m = top > reach ? top : reach;
    if (m == -INFINITY) m = 0;
    to.shift = m;
    to.factor = 1;
    to.log_scale = (mix ? *mix : 0) - m;
    return to;
}

#endif
