/* gpu_decode.cuh - what a block of the decode kernel reads, in which order, and how it arrives.
 *
 * A block answers some segments of one kv head, one after the other: its units.  Of each it reads
 * tiles of 16 rotated keys [D][16], the same tiles of values [16][D], and of S those of 16 features
 * [16][D]: all of 32 D bytes, dealt out in turn to the block's 8 warps.  Softmax takes keys and
 * values in pieces of SOFTMAX_TILES tiles; other memories are one piece.
 *
 * Tiles arrive by asynchronous copies through a queue of each warp, DEPTH tiles in shared memory,
 * so that no barrier of the block is between them; and the queue runs on from unit to unit, so that
 * memory is busy while the block turns logits into weights. */
#ifndef URCHIN_ATTENTION_GPU_DECODE_CUH
#define URCHIN_ATTENTION_GPU_DECODE_CUH

#include "attention/gpu_decode.h"
#include "attention/gpu_device.cuh"

#include <stddef.h>
#include <stdint.h>

enum { DECODE_THREADS = 256, DECODE_WARPS = DECODE_THREADS / 32 };
enum { MAX_UNITS = 16 };                          /* of a block */
enum { MAX_GROUP = 8 };                           /* query heads of a kv head */
enum { MAX_SPLITS = 16 };                         /* blocks that share a long softmax sequence */
enum { SOFTMAX_TILES = 16, TERRACED_LOGITS = 8192 }; /* tiles of a piece; of a memory, which is one piece, logits of all query heads */
/* Projections u = x W are sums of so many parts of the dimensions: (0 + 1) + (2 + 3), then the
 * bias. */
enum { PROJECTION_PARTS = 4 };

/* Where things lie in a block's shared memory, in bytes. */
struct decode_places {
    int units, q, far, x, phi, z, work, heads;
};

struct decode_job {
    gpu_shape s;
    gpu_layer layer;
    const gpu_segment *segments;
    gpu_rows rows;
    int n_segments, units;  /* of a block, at most */
    int piece_tiles, pitch; /* tiles of a piece at most; their entries */
    int splits;             /* blocks that share a softmax sequence */
    int store;              /* this kernel stores the rows' keys and values */
    const float *u;         /* [segments][n_heads][f] projections, or NULL: this kernel projects */
    float *partial;         /* [segments][n_heads][splits] of D + 2 floats, or NULL: y is written */
    decode_places at;
};

/* gpu_decode.cu: is this a shape for it?  Launches the kernel; units, piece_tiles and at are set
 * there. */
bool decode_takes(const gpu_shape &s);
int most_tiles(const gpu_shape &s); /* of any head */
void decode_launch(struct gpu *g, decode_job job);

/* What one row sees: the arithmetic of view_of() by position alone, but for what `cached` says. */
struct decode_unit {
    const char *keys, *values, *states;
    const int64_t *positions;
    int64_t position;
    int segment, row, slot;
    int sinks, cached, half[2]; /* as gpu_view; cached at most so many until the cache is read */
    int cache, clamped;
    int first[3],
        upto[3]; /* tiles in sight, numbered from 0: those before upto[k] are first[k] .. */
    int stretch; /* softmax: tiles of other blocks after every SOFTMAX_TILES */
    int n_tiles, n_pieces, linear;
};

DEVICE void open_ranges(const gpu_shape &s, decode_unit &u) {
    int ring = s.sinks + u.cache, seen = 0, end = 0;
    int from[3] = {0, ring, ring + half_size(s)},
        to[3] = {u.sinks + u.cached, ring + u.half[0], ring + half_size(s) + u.half[1]};
    for (int k = 0; k < 3; k++) {
        int first = from[k] / 16, last = (to[k] + 15) / 16; /* a tile counts once */
        if (first < end) first = end;
        if (to[k] > from[k] && last > first) {
            seen += last - first;
            end = last;
        } else
            first = end;
        u.first[k] = first - (k ? u.upto[k - 1] : 0); /* added to a tile's number */
        u.upto[k] = seen;
    }
    u.n_tiles = seen;
}

DEVICE int64_t softmax_pieces(int64_t position) {
    return position / (16 * SOFTMAX_TILES) + 1;
}

/* Of the blocks that share a sequence, does this one read the row's own key? */
DEVICE bool has_own_key(const decode_job &j, int64_t position, int split) {
    return position >= 0 &&
           (!is_softmax(j.s) || (softmax_pieces(position) - 1) % j.splits == split);
}

DEVICE void open_unit(const decode_job &j, int i, int kv_head, int split, decode_unit &u) {
    const gpu_shape &s = j.s;
    gpu_segment segment = j.segments[i];
    u.segment = i;
    u.row = segment.first_row;
    u.slot = segment.slot;
    u.position = segment.position;
    u.sinks = u.cached = u.half[0] = u.half[1] = u.cache = u.clamped = 0;
    u.stretch = u.n_tiles = u.n_pieces = u.linear = 0;
    if (u.slot < 0 || u.position < 0) {
        u.slot = -1;
        return;
    }
    gpu_place place = place_of(s, segment.slot, j.layer.layer, kv_head);
    u.keys = place.turned;
    u.values = place.values;
    u.states = place.states;
    u.positions = place.positions;
    u.cache = place.cache;
    if (is_softmax(s)) {
        int tiles = (int)(u.position / 16) + 1, pieces = (int)softmax_pieces(u.position);
        u.half[0] = (int)u.position + 1;
        u.n_pieces = split < pieces ? (pieces - split + j.splits - 1) / j.splits : 0;
        u.n_tiles = u.n_pieces * SOFTMAX_TILES;
        if (has_own_key(j, u.position, split)) u.n_tiles -= pieces * SOFTMAX_TILES - tiles;
        u.stretch = (j.splits - 1) * SOFTMAX_TILES;
        for (int k = 0; k < 3; k++)
            u.first[k] = split * SOFTMAX_TILES, u.upto[k] = u.n_tiles;
        return;
    }
    int64_t w = s.window_size, block = u.position / w, left = (block - 1) * w - s.sinks;
    int now = (int)(block % 2);
    u.sinks = block >= 2 ? s.sinks : 0;
    u.cached = left <= 0 ? 0 : left < u.cache ? (int)left : u.cache;
    u.half[now] = (int)(u.position % w) + 1;
    u.half[1 - now] = block >= 1 ? (int)w : 0;
    u.linear = folded_keys(s, u.cache, u.position) > 0;
    open_ranges(s, u);
    u.n_pieces = 1;
}

/* Tile i of those in sight. */
DEVICE int tile_of(const decode_unit &u, int i) {
    int first = i < u.upto[0] ? u.first[0] : i < u.upto[1] ? u.first[1] : u.first[2];
    return first + i + i / SOFTMAX_TILES * u.stretch;
}

DEVICE bool is_seen(const gpu_shape &s, const decode_unit &u, int entry) {
    gpu_view v = {u.sinks, u.cached, {u.half[0], u.half[1]}, u.cache, 0};
    return sees(s, v, entry);
}

DEVICE int tiles_of_piece(const decode_job &j, const decode_unit &u, int piece) {
    int left = u.n_tiles - piece * j.piece_tiles;
    return left < j.piece_tiles ? left : j.piece_tiles;
}

/* ---- the queue ---- */

template <int D, int DEPTH> struct decode_stream {
    const decode_unit *units;
    char *queue; /* [DEPTH] tiles of this warp */
    int n_units, warp, lane;
    int slot; /* where the oldest tile is */
    /* the next tile to ask for: stages 2 p and 2 p + 1 of a unit are keys and values of piece p,
     * then come the states; next: of the stage's tiles */
    int unit, stage, next;
};

/* Where 16 bytes of a tile lie in the queue: such that 8 neighbouring rows, of keys 32 bytes long
 * and else 2 D, can be read at once. */
template <int D> DEVICE int swizzled(int sixteen, bool keys) {
    int row = keys || D == 64 ? sixteen >> 3 : sixteen >> 4;
    return (sixteen ^ (row & 7)) * 16;
}

/* The next tile of this warp, and where it may not be read any more; NULL: there is none. */
template <int D, int DEPTH>
DEVICE const char *next_tile(const decode_job &j, decode_stream<D, DEPTH> &q, const char *&stop,
                             bool &keys) {
    enum { TILE_BYTES = 32 * D };
    stop = (const char *)UINTPTR_MAX;
    while (q.unit < q.n_units) {
        const decode_unit &u = q.units[q.unit];
        int piece = q.stage / 2, next = q.next;
        q.next += DECODE_WARPS;
        if (piece < u.n_pieces) {
            keys = q.stage % 2 == 0;
            if (next < tiles_of_piece(j, u, piece)) {
                size_t at = (size_t)tile_of(u, piece * j.piece_tiles + next) * TILE_BYTES;
                if (keys) return u.keys + at;
                stop = u.values + (size_t)entries_of(j.s, u.cache) * D * 2; /* not of 16 rows */
                return u.values + at;
            }
        } else if (u.linear && next < j.s.features / 16) {
            keys = false;
            return u.states +
                   (size_t)(q.stage - 2 * u.n_pieces) * j.s.state_floats * sizeof(float) +
                   (size_t)next * TILE_BYTES;
        }
        q.next = q.warp;
        if (++q.stage >= 2 * u.n_pieces + (u.linear ? j.s.state_heads : 0)) {
            q.stage = 0;
            q.unit++;
        }
    }
    return NULL;
}

/* Asks for the next tile, if there is one, where the oldest was, which no lane reads any more. */
template <int D, int DEPTH> DEVICE void ask(const decode_job &j, decode_stream<D, DEPTH> &q) {
    const char *stop;
    bool keys = false;
    const char *from = next_tile(j, q, stop, keys);
    if (from) {
        char *to = q.queue + q.slot * 32 * D;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            int sixteen = i * 32 + q.lane;
            const char *at = from + sixteen * 16;
            if (at < stop) cp_async16(to + swizzled<D>(sixteen, keys), at);
        }
    }
    cp_async_commit();
    q.slot = q.slot + 1 < DEPTH ? q.slot + 1 : 0;
}

template <int D, int DEPTH>
DEVICE void start(const decode_job &j, decode_stream<D, DEPTH> &q, const decode_unit *units,
                  int n_units, char *queue) {
    q.units = units;
    q.n_units = n_units;
    q.warp = (int)threadIdx.x / 32;
    q.lane = (int)threadIdx.x % 32;
    q.queue = queue + q.warp * DEPTH * 32 * D;
    q.slot = q.unit = q.stage = 0;
    q.next = q.warp;
#pragma unroll 1
    for (int i = 0; i < DEPTH; i++)
        ask(j, q);
}

/* The oldest tile, there for all lanes.  Once mma_bf16 has taken what ldmatrix read of it, all lanes
 * have read it: ask() needs no barrier before. */
template <int D, int DEPTH> DEVICE const char *oldest(const decode_stream<D, DEPTH> &q) {
    cp_async_wait<DEPTH - 1>();
    __syncwarp();
    return q.queue + q.slot * 32 * D;
}

/* Two right operands of mma_bf16: of keys, entries 0 .. 7 and 8 .. 15 at dimensions 16 i .. 16 i +
 * 15; of rows, columns 16 i .. 16 i + 7 and 16 i + 8 .. 16 i + 15. */
template <int D> DEVICE void key_operands(uint32_t (&b)[4], const char *tile, int i, int lane) {
    ldmatrix4_t(b, tile + swizzled<D>((i * 16 + lane % 16) * 2 + lane / 16, true));
}
template <int D> DEVICE void row_operands(uint32_t (&b)[4], const char *tile, int i, int lane) {
    ldmatrix4_t(b, tile + swizzled<D>(lane % 16 * (D / 8) + 2 * i + lane / 16, false));
}

#endif
