/* gpu_decode.cuh - what a block of the decode kernel reads, in which order, and how it
 * arrives.
 *
 * A block answers some segments of one kv head, one after the other: its units.  Of each it reads
 * tiles of 16 rotated keys, the same tiles of values, and the hi planes of S.  Everything is cut
 * into lines of 512 bytes, 16 a lane, dealt out to the block's 8 warps:
 *
 *   keys     whole tiles [D][16]: tile i goes to warp i % 8, D / 16 lines one after the other
 *   values   lines of tiles [16][D]: line j goes to warp j % 8
 *   S        lines of [F][D]: line j goes to warp j % 8
 *
 * Softmax takes keys and values in pieces of SOFTMAX_TILES tiles; other memories are one piece.
 *
 * Lines arrive by asynchronous copies through a queue of DEPTH lines a warp, in shared memory.  A
 * lane reads only what it copied itself, so the queue needs no barrier; and it runs on from unit to
 * unit, so that memory is busy while the block turns logits into weights. */
#ifndef URCHIN_ATTENTION_GPU_DECODE_CUH
#define URCHIN_ATTENTION_GPU_DECODE_CUH

#include "attention/gpu_decode.h"
#include "attention/gpu_device.cuh"

#include <stddef.h>
#include <stdint.h>

enum { DECODE_THREADS = 256, DECODE_WARPS = DECODE_THREADS / 32 };
enum { LINE = 512 };                              /* bytes, a warp's load */
enum { MAX_UNITS = 16 };                          /* of a block */
enum { MAX_GROUP = 8 };                           /* query heads of a kv head */
enum { MAX_SPLITS = 16 };                         /* blocks that share a long softmax sequence */
enum { SOFTMAX_TILES = 16, TERRACED_TILES = 64 }; /* of a piece; of a memory, which is one piece */
/* Projections u = x W are sums of so many parts of the dimensions: (0 + 1) + (2 + 3), then the
 * bias. */
enum { PROJECTION_PARTS = 4 };

/* Where things lie in a block's shared memory, in bytes. */
struct decode_places {
    int units, q, far, x, phi, features, z, work, heads, bytes;
};

struct decode_job {
    gpu_shape s;
    gpu_layer layer;
    const gpu_segment *segments;
    gpu_rows rows;
    int n_segments, units;   /* of a block, at most */
    int piece_tiles, splits; /* piece_tiles: at most */
    int store;               /* this kernel stores the rows' keys and values */
    const float *u;          /* [segments][n_heads][f] projections, or NULL: this kernel projects */
    float *partial; /* [segments][n_heads][splits] of D + 2 floats, or NULL: y is written */
    decode_places at;
};

/* gpu_decode.cu: is this a shape for it?  Launches the kernel; units, piece_tiles and at are set
 * there. */
bool decode_takes(const gpu_shape &s);
void decode_launch(struct gpu *g, decode_job job);

/* What one row sees: the arithmetic of view_of() by position alone, but for what `cached` says. */
struct decode_unit {
    const char *keys, *values, *states;
    const int64_t *positions;
    int64_t position;
    int row, slot;
    int sinks, cached, half[2]; /* as gpu_view; cached at most so many until the cache is read */
    int clamped;
    int first[3],
        upto[3]; /* tiles in sight, numbered from 0: those before upto[k] are first[k] .. */
    int stretch; /* softmax: tiles of other blocks after every SOFTMAX_TILES */
    int n_tiles, n_pieces, linear;
};

DEVICE void open_ranges(const gpu_shape &s, decode_unit &u) {
    int ring = s.sinks + s.cache, seen = 0, end = 0;
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
    u.row = segment.first_row;
    u.slot = segment.slot;
    u.position = segment.position;
    u.sinks = u.cached = u.half[0] = u.half[1] = u.clamped = 0;
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
    u.cached = left <= 0 ? 0 : left < s.cache ? (int)left : s.cache;
    u.half[now] = (int)(u.position % w) + 1;
    u.half[1 - now] = block >= 1 ? (int)w : 0;
    u.linear = folded_keys(s, u.position) > 0;
    open_ranges(s, u);
    u.n_pieces = 1;
}

/* Tile i of those in sight. */
DEVICE int tile_of(const decode_unit &u, int i) {
    int first = i < u.upto[0] ? u.first[0] : i < u.upto[1] ? u.first[1] : u.first[2];
    return first + i + i / SOFTMAX_TILES * u.stretch;
}

/* Tiles from number i to here lie one after the other, softmax ones to the end of a piece. */
DEVICE int tile_range_end(const decode_unit &u, int i) {
    return i < u.upto[0] ? u.upto[0] : i < u.upto[1] ? u.upto[1] : u.upto[2];
}

DEVICE bool is_seen(const gpu_shape &s, const decode_unit &u, int entry) {
    gpu_view v = {u.sinks, u.cached, {u.half[0], u.half[1]}, 0};
    return sees(s, v, entry);
}

DEVICE int tiles_of_piece(const decode_job &j, const decode_unit &u, int piece) {
    int left = u.n_tiles - piece * j.piece_tiles;
    return left < j.piece_tiles ? left : j.piece_tiles;
}

/* ---- the queue ---- */

template <int D, int DEPTH> struct decode_stream {
    const decode_unit *units;
    uint4 *queue; /* [DEPTH][threads], from this thread's first on */
    int n_units, warp, lane;
    int slot;              /* where the oldest line is */
    const char *at, *stop; /* this lane's part of the next line; where those that may be read end */
    int left, stride;      /* lines that come `stride` bytes after one another */
    /* where those that follow are: stages 2 p and 2 p + 1 of a unit are keys and values of piece p,
     * then come the states; `next` is the warp's next tile of keys, line of values or of S */
    int unit, stage, next;
};

template <int D, int DEPTH>
DEVICE void set_lines(decode_stream<D, DEPTH> &q, const char *from, int line, int n, int stride) {
    q.at = from + (size_t)line * LINE + q.lane * 16;
    q.left = n;
    q.stride = stride;
    q.stop = (const char *)UINTPTR_MAX;
}

/* To the next lines that lie in steps; none are left when q.left stays 0. */
template <int D, int DEPTH>
DEVICE void next_lines(const decode_job &j, decode_stream<D, DEPTH> &q) {
    enum { ROWS = LINE / 2 / D, TILE_LINES = D / 16, STRIDE = DECODE_WARPS * LINE };
    while (q.unit < q.n_units) {
        const decode_unit &u = q.units[q.unit];
        int piece = q.stage / 2, next = q.next;
        int lines = j.s.features / ROWS; /* of a state; per warp a whole number */
        if (piece < u.n_pieces) {
            int first = piece * j.piece_tiles, tiles = tiles_of_piece(j, u, piece);
            lines = tiles * TILE_LINES;
            if (q.stage % 2 == 0 && next < tiles) {
                q.next += DECODE_WARPS;
                set_lines(q, u.keys, tile_of(u, first + next) * TILE_LINES, TILE_LINES, LINE);
                return;
            }
            if (q.stage % 2 == 1 && next < lines) {
                int tile = first + next / TILE_LINES, last = tile_range_end(u, tile) - first;
                if (lines > last * TILE_LINES) lines = last * TILE_LINES;
                int n = (lines - next + DECODE_WARPS - 1) / DECODE_WARPS;
                q.next += n * DECODE_WARPS;
                set_lines(q, u.values, tile_of(u, tile) * TILE_LINES + next % TILE_LINES, n,
                          STRIDE);
                q.stop = u.values + (size_t)j.s.entries * D * 2;
                return;
            }
        } else if (u.linear && next < lines) {
            q.next += lines;
            set_lines(
                q, u.states + (size_t)(q.stage - 2 * u.n_pieces) * j.s.state_floats * sizeof(float),
                next, lines / DECODE_WARPS, STRIDE);
            return;
        }
        q.next = q.warp;
        if (++q.stage >= 2 * u.n_pieces + (u.linear ? j.s.state_heads : 0)) {
            q.stage = 0;
            q.unit++;
        }
    }
}

/* Asks for the next line, if there is one, where the oldest was, which nobody reads any more. */
template <int D, int DEPTH> DEVICE void ask(const decode_job &j, decode_stream<D, DEPTH> &q) {
    if (q.left == 0) next_lines(j, q);
    if (q.left > 0) {
        if (q.at < q.stop) cp_async16(q.queue + q.slot * DECODE_THREADS, q.at);
        q.at += q.stride;
        q.left--;
    }
    cp_async_commit();
    q.slot = q.slot + 1 < DEPTH ? q.slot + 1 : 0;
}

template <int D, int DEPTH>
DEVICE void start(const decode_job &j, decode_stream<D, DEPTH> &q, const decode_unit *units,
                  int n_units, uint4 *queue) {
    q.units = units;
    q.n_units = n_units;
    q.queue = queue + threadIdx.x;
    q.warp = (int)threadIdx.x / 32;
    q.lane = (int)threadIdx.x % 32;
    q.slot = q.left = q.unit = q.stage = 0;
    q.next = q.warp;
    q.at = q.stop = NULL;
    q.stride = 0;
#pragma unroll 1
    for (int i = 0; i < DEPTH; i++)
        ask(j, q);
}

/* The i-th oldest line, of which cp_async_wait() has left DEPTH - 1 - i at most on their way. */
template <int D, int DEPTH> DEVICE uint4 peek(const decode_stream<D, DEPTH> &q, int i) {
    int place = q.slot + i;
    return q.queue[(place < DEPTH ? place : place - DEPTH) * DECODE_THREADS];
}

template <int D, int DEPTH> DEVICE uint4 take(const decode_job &j, decode_stream<D, DEPTH> &q) {
    cp_async_wait<DEPTH - 1>();
    uint4 x = peek(q, 0);
    ask(j, q);
    return x;
}

#endif
