/* gpu_place.cu - exact keys and values of blocks that begin: of every block's snapshot, and from
 * the last one into the slot.
 *
 *   place   (PIECES, kv heads, layers x blocks), 256 threads: an entry's pair of key elements or
 *           value element each
 *   commit  (PIECES, kv heads, layers x pieces), 256 threads
 *   bound   bandwidth: an entry of the exact set is read and written once
 *   twin    memory.c, move_entry() and write_entry() */
#include "attention/gpu_chain.cuh"

enum { PIECES = 8 };

DEVICE int up_to_tile(int entries) {
    return (entries + 15) / 16 * 16;
}

struct entry_kind {
    bool used, clamped;
    key_source from;
};

/* The key that lies at an entry once the block's rows have entered. */
DEVICE entry_kind entry_of(const gpu_shape &s, const chain_unit &u, int entry) {
    entry_kind e = {};
    int cache = u.slot.cache;
    int64_t w = s.window_size, position = u.block.segment.position, block = position / w;
    if (entry < s.sinks) {
        e.used = block >= 2;
        if (!e.used) return e;
        if (u.piece.position > 2 * w) { /* is one already */
            e.from.entry = entry;
            e.from.row = -1;
            e.from.position = entry;
        } else {
            e.from = source_at(s, u.piece, u.slot, entry);
        }
    } else if (entry < s.sinks + cache) {
        int i = entry - s.sinks;
        e.used = i < u.list[s.most_cache];
        if (!e.used) return e;
        e.from = source_of(s, u.piece, u.slot, u.list[i]);
    } else {
        int place = entry - s.sinks - cache;
        int64_t at = place / w == block % 2 ? block : block - 1, key = at * w + place % w;
        e.used = key >= 0 && key < position + u.block.segment.n_rows;
        e.from = source_at(s, u.piece, u.slot, key);
        return e;
    }
    e.clamped = is_clamped(s, e.from.position, position);
    return e;
}

DEVICE void place_key(const gpu_chain &c, const gpu_rows &rows, const chain_unit &u, int entry,
                      const entry_kind &e, int d, bool last) {
    const gpu_shape &s = c.shape;
    float key = 0, turned = 0;
    bool plain = e.clamped || !s.turned;
    if (e.used && (plain || last)) key = key_element(s, u.slot, rows, e.from, u.kv_head, d);
    if (e.used) turned = plain ? key : turned_element(s, u.slot, rows, e.from, u.kv_head, d);
    write_kv(s, u.here.turned, key_at(s, entry, d), turned);
    if (last && s.turned) write_kv(s, u.here.keys, key_at(s, entry, d), key);
}

static __global__ void __launch_bounds__(CHAIN_THREADS, 6) place_kernel(gpu_chain c, gpu_rows rows) {
    const gpu_shape &s = c.shape;
    int block = (int)blockIdx.z / c.n_layers;
    chain_unit u = chain_unit_at(c, block, (int)blockIdx.z % c.n_layers, (int)blockIdx.y);
    bool last = u.piece.last_block == block;
    int first = (int)(blockIdx.x * CHAIN_THREADS + threadIdx.x), step = PIECES * CHAIN_THREADS;
    int entries = entries_of(s, u.slot.cache), tiled = up_to_tile(entries);
    for (int i = first; i < tiled * s.head_dim; i += step) {
        int entry = i % tiled;
        entry_kind e = {}; /* pad entries are zeros too */
        if (entry < entries) e = entry_of(s, u, entry);
        place_key(c, rows, u, entry, e, i / tiled, last);
    }
    for (int i = first; i < entries * s.lanes; i += step) {
        int entry = i / s.lanes, d = i % s.lanes;
        entry_kind e = entry_of(s, u, entry);
        float x = e.used ? value_element(s, u.slot, rows, e.from, u.kv_head, d) : 0;
        write_kv(s, u.here.values, value_at(s, entry, d), x);
    }
    for (int i = first; i < u.slot.cache; i += step)
        u.here.positions[i] =
            i < u.list[s.most_cache] ? source_of(s, u.piece, u.slot, u.list[i]).position : -1;
}

extern "C" void gpu_launch_place(struct gpu *g, const struct gpu_chain *chain,
                                 const struct gpu_rows *rows) {
    dim3 grid(PIECES, (unsigned)chain->shape.n_kv_heads,
              (unsigned)(chain->n_layers * chain->n_blocks));
    LAUNCH(g, place_kernel, grid, CHAIN_THREADS, 0, *chain, *rows);
}

/* Every PIECES-th part of an array that is a whole number of T. */
template <class T> DEVICE void copy_part(void *to, const void *from, size_t bytes) {
#pragma unroll 2
    for (size_t i = (size_t)blockIdx.x * CHAIN_THREADS + threadIdx.x; i < bytes / sizeof(T);
         i += (size_t)PIECES * CHAIN_THREADS)
        ((T *)to)[i] = ((const T *)from)[i];
}

static __global__ void __launch_bounds__(CHAIN_THREADS) commit_kernel(gpu_chain c) {
    const gpu_shape &s = c.shape;
    int last = c.pieces[blockIdx.z / c.n_layers].last_block;
    chain_unit u = chain_unit_at(c, last, (int)blockIdx.z % c.n_layers, (int)blockIdx.y);
    copy_part<uint4>(u.slot.states, u.here.states, s.state_heads * s.state_floats * sizeof(float));
    size_t element = s.kv_bf16 ? 2 : 4, entries = entries_of(s, u.slot.cache);
    size_t keys = up_to_tile((int)entries) * s.head_dim * element;
    copy_part<uint4>(u.slot.keys, u.here.keys, keys);
    if (s.turned) copy_part<uint4>(u.slot.turned, u.here.turned, keys);
    copy_part<uint4>(u.slot.values, u.here.values, entries * s.lanes * element);
    copy_part<int64_t>(u.slot.positions, u.here.positions, u.slot.cache * sizeof(int64_t));
}

extern "C" void gpu_launch_commit(struct gpu *g, const struct gpu_chain *chain) {
    dim3 grid(PIECES, (unsigned)chain->shape.n_kv_heads,
              (unsigned)(chain->n_layers * chain->n_pieces));
    LAUNCH(g, commit_kernel, grid, CHAIN_THREADS, 0, *chain);
}
