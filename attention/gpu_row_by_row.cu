/* gpu_row_by_row.cu - sliding windows and none: every row changes what the next one sees, so one
 * block of threads takes a kv head of a run, row after row: what leaves the window is folded, the
 * row's key enters, its query heads are answered.
 *
 *   launch  (kv heads, segments), 128 threads
 *   bound   each row reads and writes the kv head's states, 8 bytes a float, and reads them again
 *           for each query head
 *   twin    memory.c: leave_window(), fold_own(); kernels.c: answer() */
#include "attention/gpu_answer.cuh"

struct fold_shared {
    float *x, *phi, *v; /* [D], [phi_lanes], [lanes] of the key that is folded */
};

static size_t fold_floats(const gpu_shape &s) {
    return (size_t)s.head_dim + s.phi_lanes + s.lanes;
}

/* An entry's key and value enter every state of the kv head; then the horizon.  All threads. */
DEVICE void fold_entry(const gpu_shape &s, const gpu_layer &layer, const gpu_place &m, int kv_head,
                       int entry, float forget, const fold_shared &t) {
    for (int d = threadIdx.x; d < s.lanes; d += ANSWER_THREADS) {
        if (d < s.head_dim) t.x[d] = read_kv(s, m.keys, key_at(s, entry, d));
        t.v[d] = read_kv(s, m.values, value_at(s, entry, d));
    }
    __syncthreads();
    for (int h = 0; h < s.state_heads; h++) {
        size_t head = (size_t)kv_head * s.state_heads + h;
        const float *map = layer.map_k + head * s.head_dim * s.f_lanes;
        for (int i = threadIdx.x; i < s.f; i += ANSWER_THREADS) {
            float u = 0;
            for (int d = 0; d < s.head_dim; d++)
                u = fmaf(t.x[d], map[(size_t)d * s.f_lanes + i], u);
            t.phi[i] = layer.map_k_bias ? u + layer.map_k_bias[head * s.f_lanes + i] : u;
        }
        __syncthreads();
        if (threadIdx.x < 32) map_key(s, t.phi, t.phi, threadIdx.x);
        __syncthreads();
        uint16_t *S = plane_hi(s, m, h);
        for (size_t i = threadIdx.x; i < s.S_floats; i += ANSWER_THREADS) {
            float sum = fmaf(t.phi[i / s.lanes], t.v[i % s.lanes], whole_S(S, s.S_floats, i));
            write_S(S, s.S_floats, i, sum * forget);
        }
        float *z = normaliser(s, m, h);
        for (int i = threadIdx.x; i < s.phi_lanes; i += ANSWER_THREADS)
            z[i] = (z[i] + t.phi[i]) * forget;
        __syncthreads(); /* phi is used again, and S and z are read */
    }
}

/* An entry of an array of keys, with another's place. */
DEVICE void copy_key(const gpu_shape &s, char *to_keys, int to, const char *from_keys, int from) {
    for (int d = threadIdx.x; d < s.head_dim; d += ANSWER_THREADS)
        if (s.kv_bf16)
            ((uint16_t *)to_keys)[key_at(s, to, d)] =
                ((const uint16_t *)from_keys)[key_at(s, from, d)];
        else
            ((float *)to_keys)[key_at(s, to, d)] = ((const float *)from_keys)[key_at(s, from, d)];
}

/* The key pushed out by the row at position becomes a sink or is folded; sinks that are now too far
 * are clamped.  An element of a key is moved and clamped by the same thread. */
DEVICE void leave_window(const gpu_shape &s, const gpu_layer &layer, const gpu_place &m,
                         int kv_head, int64_t position, const fold_shared &t) {
    int64_t w = s.window_size, key = position - w;
    int place = own_entry(s, m.cache, position);
    if (key >= 0 && key < s.sinks) {
        copy_key(s, m.keys, (int)key, m.keys, place);
        if (s.turned) copy_key(s, m.turned, (int)key, m.turned, place);
        for (int d = threadIdx.x; d < s.lanes; d += ANSWER_THREADS)
            if (s.kv_bf16)
                ((uint16_t *)m.values)[value_at(s, (int)key, d)] =
                    ((const uint16_t *)m.values)[value_at(s, place, d)];
            else
                ((float *)m.values)[value_at(s, (int)key, d)] =
                    ((const float *)m.values)[value_at(s, place, d)];
    } else if (key >= 0) {
        fold_entry(
            s, layer, m, kv_head, place,
            forgetting(s, folded_keys(s, m.cache, position - 1), folded_keys(s, m.cache, position)),
            t);
    }
    for (int e = 0; s.turned && e < s.sinks && e <= key; e++) {
        bool was = e < key && is_clamped(s, e, position - 1);
        if (is_clamped(s, e, position) && !was) copy_key(s, m.turned, e, m.keys, e);
    }
}

DEVICE void store_row(const gpu_shape &s, const gpu_place &m, const gpu_rows &rows, int row,
                      int kv_head, int entry) {
    for (int d = threadIdx.x; d < s.lanes; d += ANSWER_THREADS)
        store_element(s, m, rows, row, kv_head, entry, d);
}

static __global__ void __launch_bounds__(ANSWER_THREADS, 4)
    row_by_row_kernel(gpu_shape s, gpu_layer layer, const gpu_segment *segments, gpu_rows rows) {
    DYNAMIC_SHARED(float, shared);
    gpu_segment segment = segments[blockIdx.y];
    int kv_head = (int)blockIdx.x, first_head = kv_head * s.group;
    if (segment.slot < 0) {
        for (int g = 0; g < s.group; g++)
            write_zeros(s, rows, segment.first_row, segment.n_rows, first_head + g);
        return;
    }
    fold_shared t;
    t.x = shared;
    t.phi = t.x + s.head_dim;
    t.v = t.phi + s.phi_lanes;
    answer_question ask;
    ask.place = place_of(s, segment.slot, layer.layer, kv_head);
    ask.n_rows = 1;
    for (int r = 0; r < segment.n_rows; r++) {
        ask.first_row = segment.first_row + r;
        ask.position = segment.position + r;
        int entry = own_entry(s, ask.place.cache, ask.position);
        if (s.window == WINDOW_SLIDING) leave_window(s, layer, ask.place, kv_head, ask.position, t);
        /* an element of an entry is moved, stored and taken for folding by one thread */
        store_row(s, ask.place, rows, ask.first_row, kv_head, entry);
        if (s.window == WINDOW_NONE)
            fold_entry(s, layer, ask.place, kv_head, entry,
                       forgetting(s, ask.position, ask.position + 1), t);
        ask.view = view_of(s, ask.place, ask.position);
        ask.linear = folded_keys(s, ask.place.cache, ask.position) > 0;
        for (int g = 0; g < s.group; g++) {
            ask.head = first_head + g;
            answer_rows<1>(s, layer, rows, ask, t.v + s.lanes);
        }
    }
}

extern "C" void gpu_launch_row_by_row(struct gpu *g, const struct gpu_shape *shape,
                                      const struct gpu_layer *layer,
                                      const struct gpu_segment *segments, int n_segments,
                                      const struct gpu_rows *rows) {
    if (n_segments <= 0) return;
    LAUNCH(g, row_by_row_kernel, dim3((unsigned)shape->n_kv_heads, (unsigned)n_segments),
           ANSWER_THREADS, (fold_floats(*shape) + answer_floats(*shape, 1)) * sizeof(float), *shape,
           *layer, segments, *rows);
}
