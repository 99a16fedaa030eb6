/* gpu_state.cu - copies of a sequence's memory: states as planes and whole, and rotated keys made
 * anew.
 *
 *   split, join  (1024 floats of a state head, state heads of all layers), 128 threads: 8 bytes
 *                read and written a float
 *   turn         (pairs of 256 elements, kv heads, layers), 256 threads
 *   bound        bandwidth
 *   twin         slot.c, rebuild_turned(); gpu_device.cuh has the planes */
#include "attention/gpu_device.cuh"

/* ---- planes ---- */

enum { PLANE_THREADS = 128, EIGHT = 8 };

/* Eight words of S, or of z, which is the same in both. */
template <bool SPLIT>
static __global__ void __launch_bounds__(PLANE_THREADS)
    planes_kernel(gpu_shape s, char *planes, char *whole) {
    size_t i = ((size_t)blockIdx.x * PLANE_THREADS + threadIdx.x) * EIGHT;
    size_t at = s.rooms->states + (size_t)blockIdx.y * s.state_floats * sizeof(float);
    if (i >= s.state_floats) return;
    uint4 *words = (uint4 *)(whole + at + i * sizeof(float));
    if (i >= s.S_floats) {
        uint4 *same = (uint4 *)(planes + at + i * sizeof(float));
        for (int k = 0; k < 2; k++)
            if (SPLIT)
                same[k] = words[k];
            else
                words[k] = same[k];
        return;
    }
    uint16_t *hi = (uint16_t *)(planes + at) + i, *lo = hi + s.S_floats;
    union {
        uint4 four[2];
        float x[EIGHT];
    } w;
    union {
        uint4 all;
        uint16_t half[EIGHT];
    } h, l;
    if (SPLIT) {
        w.four[0] = words[0];
        w.four[1] = words[1];
        for (int k = 0; k < EIGHT; k++) {
            h.half[k] = split_hi(w.x[k]);
            l.half[k] = split_lo(w.x[k]);
        }
        *(uint4 *)hi = h.all;
        *(uint4 *)lo = l.all;
    } else {
        h.all = *(const uint4 *)hi;
        l.all = *(const uint4 *)lo;
        for (int k = 0; k < EIGHT; k++)
            w.x[k] = join(h.half[k], l.half[k]);
        words[0] = w.four[0];
        words[1] = w.four[1];
    }
}

template <bool SPLIT>
static void launch_planes(struct gpu *g, const gpu_shape *s, int n_layers, char *planes,
                          char *whole) {
    size_t each = PLANE_THREADS * EIGHT;
    unsigned heads = (unsigned)(n_layers * s->n_kv_heads * s->state_heads);
    if (!heads || !s->state_floats) return;
    LAUNCH(g, (planes_kernel<SPLIT>), dim3((unsigned)((s->state_floats + each - 1) / each), heads),
           PLANE_THREADS, 0, *s, planes, whole);
}

extern "C" void gpu_launch_split(struct gpu *g, const struct gpu_shape *shape, int n_layers,
                                 void *planes, const void *whole) {
    launch_planes<true>(g, shape, n_layers, (char *)planes, (char *)whole);
}

extern "C" void gpu_launch_join(struct gpu *g, const struct gpu_shape *shape, int n_layers,
                                void *whole, const void *planes) {
    launch_planes<false>(g, shape, n_layers, (char *)planes, (char *)whole);
}

/* ---- rotated keys ---- */

enum { TURN_THREADS = 256 };

static __global__ void __launch_bounds__(TURN_THREADS)
    turn_kernel(gpu_shape s, int slot, int64_t last) {
    int half = s.head_dim / 2;
    size_t i = (size_t)blockIdx.x * TURN_THREADS + threadIdx.x;
    int e = (int)(i % s.most_entries), d = (int)(i / s.most_entries);
    if (d >= half) return;
    gpu_place m = place_of(s, slot, (int)blockIdx.z, (int)blockIdx.y);
    gpu_view view = view_of(s, m, last);
    if (!sees(s, view, e)) return; /* a smaller head has no such entry */
    float a = read_kv(s, m.keys, key_at(s, e, d)), b = read_kv(s, m.keys, key_at(s, e, d + half));
    float first = a, second = b;
    if (e >= view.clamped) {
        double sine, cosine;
        sincos((double)entry_position(s, m, e, last) * s.theta[d], &sine, &cosine);
        first = rotated(a, b, false, (float)cosine, (float)sine);
        second = rotated(b, a, true, (float)cosine, (float)sine);
    }
    write_kv(s, m.turned, key_at(s, e, d), first);
    write_kv(s, m.turned, key_at(s, e, d + half), second);
}

extern "C" void gpu_launch_turn(struct gpu *g, const struct gpu_shape *shape, int n_layers,
                                int slot, int64_t tokens) {
    if (!shape->turned || tokens <= 0) return;
    size_t n = (size_t)shape->most_entries * (shape->head_dim / 2);
    dim3 grid((unsigned)((n + TURN_THREADS - 1) / TURN_THREADS), (unsigned)shape->n_kv_heads,
              (unsigned)n_layers);
    LAUNCH(g, turn_kernel, grid, TURN_THREADS, 0, *shape, slot, tokens - 1);
}
