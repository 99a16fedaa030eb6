/* gpu_chain.cuh - what the kernels of blocks that begin share (gpu_chain.cu, gpu_place.cu): where a
 * key of a piece lies, and where they keep what they hand on.
 *
 * A piece's keys have numbers: the places of the cache as the piece found them, then positions from
 * `oldest` on.  Slots stay as they were found until the end, so a number means the same in every
 * block. */
#ifndef URCHIN_ATTENTION_GPU_CHAIN_CUH
#define URCHIN_ATTENTION_GPU_CHAIN_CUH

#include "attention/gpu_device.cuh"

enum { CHAIN_THREADS = 256, CHAIN_COLUMNS = 16 };

/* ---- keys of a piece ---- */

struct key_source {
    int entry, row; /* of its slot, or of the step: the other is -1 */
    int64_t position;
};

DEVICE key_source source_at(const gpu_shape &s, const gpu_piece &piece, const gpu_place &slot,
                            int64_t position) {
    key_source from = {-1, -1, position};
    if (position < piece.position)
        from.entry = own_entry(s, slot.cache, position);
    else
        from.row = piece.first_row + (int)(position - piece.position);
    return from;
}

DEVICE key_source source_of(const gpu_shape &s, const gpu_piece &piece, const gpu_place &slot,
                            int key) {
    if (key >= slot.cache) return source_at(s, piece, slot, piece.oldest + key - slot.cache);
    key_source from = {s.sinks + key, -1, slot.positions[key]};
    return from;
}

/* The number of the key at a position that is not the cache's. */
DEVICE int key_number(const gpu_piece &piece, const gpu_place &slot, int64_t position) {
    return slot.cache + (int)(position - piece.oldest);
}

DEVICE float row_key(const gpu_shape &s, const gpu_rows &rows, int row, int kv_head, int d,
                     bool turned) {
    const float *k = rows.k + (size_t)row * rows.k_row + (size_t)kv_head * s.head_dim;
    if (!turned || !s.rope) return round_kv(s, k[d]);
    int half = s.head_dim / 2;
    bool second = d >= half;
    int other = second ? d - half : d + half;
    size_t angle = (size_t)row * half + (second ? d - half : d);
    float x = k[d], y = k[other];
    if (s.map_before_rope) x = round_kv(s, x), y = round_kv(s, y);
    return round_kv(s, rotated(x, y, second, rows.cosines[angle], rows.sines[angle]));
}

/* As maps see it, as rows score it, and its value: what store_element() would store, if it has not
 * yet. */
DEVICE float key_element(const gpu_shape &s, const gpu_place &m, const gpu_rows &rows,
                         const key_source &from, int kv_head, int d) {
    if (from.entry >= 0) return read_kv(s, m.keys, key_at(s, from.entry, d));
    return row_key(s, rows, from.row, kv_head, d, !s.map_before_rope);
}
DEVICE float turned_element(const gpu_shape &s, const gpu_place &m, const gpu_rows &rows,
                            const key_source &from, int kv_head, int d) {
    if (from.entry >= 0) return read_kv(s, m.turned, key_at(s, from.entry, d));
    return row_key(s, rows, from.row, kv_head, d, true);
}
DEVICE float value_element(const gpu_shape &s, const gpu_place &m, const gpu_rows &rows,
                           const key_source &from, int kv_head, int d) {
    if (from.entry >= 0) return read_kv(s, m.values, value_at(s, from.entry, d));
    if (d >= s.head_dim) return 0;
    return round_kv(s, rows.v[(size_t)from.row * rows.v_row + (size_t)kv_head * s.head_dim + d]);
}

/* ---- what is handed on ---- */

struct chain_unit { /* one layer, kv head and block */
    int index;      /* of the layer in this chain */
    int kv_head, snapshot;
    gpu_block block;
    gpu_piece piece;
    gpu_place slot, here; /* as it was found; this block's snapshot */
    int *list; /* keys of the cache in this block, ascending positions; how many at [most_cache] */
};

DEVICE int *chain_list(const gpu_chain &c, int snapshot, int kv_head) {
    return c.lists + ((size_t)snapshot * c.shape.n_kv_heads + kv_head) * (c.shape.most_cache + 1);
}

DEVICE chain_unit chain_unit_at(const gpu_chain &c, int block, int index, int kv_head) {
    chain_unit u;
    u.index = index;
    u.kv_head = kv_head;
    u.snapshot = index * c.n_blocks + block;
    u.block = c.blocks[block];
    u.piece = c.pieces[u.block.piece];
    u.slot = place_of(c.shape, u.piece.slot, c.first_layer + index, kv_head);
    u.here = place_of(c.snapshot, u.snapshot, c.first_layer + index, kv_head);
    u.list = chain_list(c, u.snapshot, kv_head);
    return u;
}

/* Features of a piece's keys [n_keys][phi_lanes] under a state head, and their values
 * [n_keys][lanes]. */
DEVICE float *chain_phi(const gpu_chain &c, const gpu_piece &piece, int index, int kv_head,
                        int state) {
    size_t head = ((size_t)index * c.shape.n_kv_heads + kv_head) * c.shape.state_heads + state;
    return c.phi + (head * c.n_keys + piece.first_key) * c.shape.phi_lanes;
}
DEVICE float *chain_values(const gpu_chain &c, const gpu_piece &piece, int index, int kv_head) {
    size_t head = (size_t)index * c.shape.n_kv_heads + kv_head;
    return c.values + (head * c.n_keys + piece.first_key) * c.shape.lanes;
}

/* Self-recall errors of the candidates of one turn, as one tile of columns of one state head has
 * them. */
DEVICE float *chain_errors(const gpu_chain &c, int turn, int piece, int index, int kv_head,
                           int state, int tile) {
    int tiles = c.shape.lanes / CHAIN_COLUMNS,
        candidates = c.shape.most_cache + c.shape.window_size;
    size_t head =
        (((size_t)turn * c.n_layers + index) * c.n_pieces + piece) * c.shape.n_kv_heads + kv_head;
    return c.errors + ((head * c.shape.state_heads + state) * tiles + tile) * (size_t)candidates;
}

/* ---- gpu_wave.cu ---- */

/* A wave by tensor cores, of heads with up to so many places; -1: not such a shape or device,
 * nothing was done. */
int launch_fast_wave(struct gpu *g, const gpu_chain *c, int first_block, int n_blocks, int turn,
                     bool before);

#endif
