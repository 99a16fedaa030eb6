/* internal.h - what the files of attention/ share: the layout of a slot, and who does what.
 *
 *   attention.c  configuration, a step cut into tasks for the team
 *   memory.c     what a sequence remembers: append keys, choose the cache, fold the rest
 *   answer.c     what a row sees of it (kernels.c has the arithmetic)
 *   slot.c       slots: layout, clear, copy, save, load
 *   add.c        the memory of other sequences added to one
 *
 * Positions decide almost everything: which entries exist, how many keys the state holds, what the
 * horizon does.  Only the choice of the cache is data, and its positions are kept. */
#ifndef URCHIN_ATTENTION_INTERNAL_H
#define URCHIN_ATTENTION_INTERNAL_H

#include "attention/kernels.h"

#include <stdatomic.h>

/* Entries of one kv head: [sinks | cache, ascending positions | ring].  Terraced: block b lives in
 * half b % 2 of a ring of 2 w; sliding: position j in place j % w; softmax: the ring is the whole
 * sequence. */
struct room {
    bool retrieval;                    /* head */
    int cache, recent, entries, tiles; /* counts; entries: with sinks and ring */
    int places;                        /* of the cache in use: all, or fewer (attention_set_cache_share) */
    size_t keys_bytes, values_bytes;
    size_t keys, values, positions, turned, chosen; /* offsets into a slot */
};

struct layout {
    int sinks, ring;
    int most_cache;   /* of any head */
    int least_places; /* in use, of any head */
    int entries, tiles;            /* of the head that has most */
    size_t S_floats, state_floats; /* one state head: S, then z */
    /* offsets into a slot */
    size_t states, keys, values, positions; /* the sequence itself ... */
    size_t sequence_bytes;
    size_t turned, chosen, chosen_for, next_for, exchanged, next; /* ... and what is derived */
    size_t slot_bytes;
};

struct slot_header { /* the first 64 bytes of a slot and of a saved state */
    char magic[8];
    uint32_t version, zero;
    uint64_t fingerprint; /* of configuration, layers and layout */
    int64_t position;     /* tokens read */
    char pad[32];
};

/* One layer and kv head of a slot. */
struct memory {
    const struct room *room;
    float *state; /* [state heads of the group] of state_floats: S [F][lanes], z [phi_lanes] */
    void *keys;   /* k' (map_position rope: k) in tiles, as the maps see it */
    void *turned; /* what rows score: k' rotated to its position, as it is once clamped; may be keys
                   */
    void *values; /* [entries][lanes] */
    int64_t *positions; /* [cache] ascending, then -1 */
    bool *chosen;        /* [cache + w] which candidates stay in the cache */
    int64_t *chosen_for; /* at which block and by how many places; 0: no choice was made */
    float *next;         /* the states once what was not chosen is folded (terraced windows) */
    int64_t *next_for;   /* as chosen_for */
    atomic_bool *exchanged; /* state lies where next would, and the other way round; atomic, because
                             * who asks for memory ahead looks while it is another thread's */
};

struct scratch { /* one thread's */
    struct answer_scratch answer;
    /* candidates of a choice, or keys to fold */
    float *x, *v, *u, *phi, *recalled; /* [cache + w] rows of D, lanes, f_lanes, phi_lanes, lanes */
    int *entry;                        /* [cache + w] where they lie */
    int64_t *position;                 /* [cache + w] */
    float *error;                      /* [cache + w] self-recall errors */
    double *rank;                      /* [cache + w] by which the best are kept */
    bool *keep;                        /* [cache + w] */
    float *state;                      /* S and z as if all candidates were folded */
};

struct segment { /* rows of one run that see the same blocks */
    int run, first_row, n_rows;
    int64_t position;                               /* of its first row */
    int part_rows, part_heads, n_parts; /* how its questions are cut */
    int first_task;                     /* of the second phase */
    bool prepares;                      /* the next block's choice and state */
};

struct attention {
    struct attention_config config;
    struct shape shape;
    struct layout layout;
    struct room *rooms; /* [n_layers][n_kv_heads] */
    int n_layers, group;               /* query heads of a kv head */
    int state_heads;                   /* states of a kv head: 1, or group */
    struct attention_weights *weights; /* [n_layers] */
    float *padded; /* copies of maps whose f is no multiple of 16; weights then points here */
    const struct rope *rope;
    struct team *team;
    const struct attention_kernels *kernels;
    uint64_t fingerprint;

    int n_threads;
    struct deal *deals;      /* [n_threads] */
    struct scratch *scratch; /* [n_threads], pieces of scratch_block */
    void *scratch_block;
    size_t scratch_bytes;

    /* the step */
    int max_rows, max_runs, n_runs;
    struct attention_run *runs;     /* [max_runs] */
    int64_t *positions;             /* [max_runs] of the runs' first rows */
    float *cosines, *sines;         /* [max_rows][D / 2] */
    float *far_cosines, *far_sines; /* [D / 2] of max_distance */
    struct segment *segments;       /* [max_runs] of the present wave */
    int n_segments;
    int next_layer; /* attention_expect() */

    float linear_off;
    const int64_t *imposed;
    int imposed_blocks;
};

/* A thread's share of a phase's tasks: next .. end - 1.  Whoever is done takes from the others. */
struct deal {
    _Alignas(64) atomic_int next;
    int end;
};

/* The tensors of a step's layer. */
struct layer_job {
    struct attention *a;
    int layer, n_tasks;
    float *y;
    const float *q, *k, *v;
    size_t y_row, q_row, k_row, v_row;
};

static inline struct slot_header *slot_header(const void *slot) {
    return (struct slot_header *)slot;
}
static inline const struct room *room_of(const struct attention *a, int layer, int kv_head) {
    return &a->rooms[layer * a->config.n_kv_heads + kv_head];
}
struct memory memory_of(const struct attention *a, const void *slot, int layer, int kv_head);

/* ---- memory.c ---- */
/* Keys that left a head's exact set by the time the row at this position is answered. */
int64_t memory_folded(const struct attention *a, const struct room *room, int64_t position);
/* Places of the cache that hold a key. */
int memory_cached(const struct memory *m);
void count_places(struct attention *a); /* into its layout */
/* The position of the key at an entry in use, as of the row at position. */
int64_t memory_entry_position(const struct attention *a, const struct memory *m, int entry,
                              int64_t position);
/* Does a sink or cached key count as exactly max_distance behind for the row at position? */
bool memory_clamped(const struct attention *a, int64_t key, int64_t position);
/* The segment's keys and values of one kv head enter the memory; a block that begins takes up its
 * state and cache first, made now unless they are at hand. */
void memory_append(const struct layer_job *job, const struct segment *segment, int kv_head,
                   struct scratch *tmp);
/* Is this the segment that chooses and folds for the next block?  And doing so: only what is
 * derived is written. */
bool memory_prepares_in(const struct attention *a, int layer, const struct segment *segment);
void memory_prepare_next(const struct attention *a, int layer, const struct segment *segment,
                         int kv_head, struct scratch *tmp);

/* Entry `from` of one memory becomes entry `to` of another: key, rotated copy, value. */
void memory_copy_entry(const struct attention *a, struct memory *to_memory, int to,
                       const struct memory *from_memory, int from);
/* The copy of an entry that scores becomes its key as it is, which is what a clamped one wants. */
void memory_clamp_entry(const struct attention *a, struct memory *m, int entry);

/* ---- answer.c ---- */
/* The entries that the row at this position sees: count of spans, ascending; *growing the one whose
 * last entry is the row's own key. */
int answer_spans(const struct attention *a, const struct memory *m, int64_t position,
                 struct span spans[MAX_SPANS], int *growing);
/* Answers one part of a segment's rows and heads, and asks for what is ahead meanwhile. */
void answer_part(const struct layer_job *job, const struct segment *segment, int kv_head, int part,
                 const struct ahead *ahead, struct scratch *tmp);
/* What whoever appends to and answers from this memory will read, of the maps too. */
struct ahead memory_ahead(const struct attention *a, const struct segment *segment, int layer,
                          int kv_head);

/* ---- slot.c ---- */
enum err layout_init(struct attention *a); /* ERR_NOMEM */
/* attention_state_load() but for the rotated copies of keys, which are left as they were. */
enum err state_copy_in(const struct attention *a, void *slot, const void *state, size_t bytes, char *msg, size_t msg_len);

#endif
