/* memory.c - what a sequence remembers: exact keys and values, the recall cache, and the state
 * everything else is folded into.
 *
 * Terraced windows work in blocks of w positions.  Before the first row of block b >= 2, block b -
 * 2 leaves the window: its keys and those in the cache are candidates, the state is asked to recall
 * each one's value from its own key,
 *
 *   S' = S + sum_{j in cand} phi_k(k'_j) [v_j, 1]^T     r_j = S'^T phi_k(k'_j)     e_j = ||
 * r_j[0:D] / r_j[D] - v_j ||^2
 *
 * the worst recalled stay in the cache and the others are folded into S.  (LoLA, arXiv:2505.23666;
 * ours: places for recent keys, age, a horizon.)  That is 200 times the work of a row, and its
 * inputs are complete one block earlier: so each layer chooses and folds at another row of block b
 * - 1, into a second state, which block b takes for its own.  Whoever comes to block b without them
 * (other places, a loaded state) does both there, to the same bits. */
#include "attention/internal.h"

#include <assert.h>
#include <math.h>
#include <string.h>

/* ---- positions ---- */

int64_t memory_folded(const struct attention *a, const struct room *room, int64_t position) {
    const struct attention_config *c = &a->config;
    int64_t left = 0;
    if (c->kind == ATTENTION_SOFTMAX) return 0;
    if (c->window == WINDOW_NONE) left = position + 1;
    if (c->window == WINDOW_SLIDING) left = position + 1 - c->window_size - c->sinks;
    if (c->window == WINDOW_TERRACED)
        left = (position / c->window_size - 1) * c->window_size - c->sinks - room->places;
    return left > 0 ? left : 0;
}

/* What S and z are multiplied by when the number of keys ever folded grows from before to after:
 * beyond the horizon the state forgets, so that it stays an average over that many keys. */
static float forgetting(const struct attention *a, int64_t before, int64_t after) {
    int64_t horizon = a->config.horizon;
    if (!horizon || after <= horizon) return 1;
    int64_t held = (before < horizon ? before : horizon) + after - before;
    return (float)((double)horizon / (double)held);
}

int memory_cached(const struct memory *m) {
    int n = 0;
    while (n < m->room->cache && m->positions[n] >= 0)
        n++;
    return n;
}

int64_t memory_entry_position(const struct attention *a, const struct memory *m, int entry,
                              int64_t position) {
    const struct layout *l = &a->layout;
    if (entry < l->sinks) return entry;
    if (entry < l->sinks + m->room->cache) return m->positions[entry - l->sinks];
    int64_t place = entry - l->sinks - m->room->cache, w = a->config.window_size;
    if (a->config.kind == ATTENTION_SOFTMAX) return place;
    if (a->config.window == WINDOW_SLIDING) return position - (position - place) % w;
    int64_t block = position / w;
    if (block % 2 != place / w) block--;
    return block * w + place % w;
}

bool memory_clamped(const struct attention *a, int64_t key, int64_t position) {
    if (!a->config.max_distance) return false;
    int64_t w = a->config.window_size;
    int64_t from = a->config.window == WINDOW_TERRACED ? position / w * w : position;
    return from - key > a->config.max_distance;
}

/* ---- entries ---- */

static size_t element_bytes(const struct attention *a) {
    return a->config.kv_type == KV_BF16 ? sizeof(uint16_t) : sizeof(float);
}

static void copy_column(const struct attention *a, void *to_keys, int to, const void *from_keys,
                        int from) {
    size_t tile = (size_t)a->shape.head_dim * TILE;
    size_t dst = (size_t)(to / TILE) * tile + (size_t)(to % TILE);
    size_t src = (size_t)(from / TILE) * tile + (size_t)(from % TILE);
    for (size_t d = 0; d < tile; d += TILE)
        if (a->config.kv_type == KV_BF16)
            ((uint16_t *)to_keys)[dst + d] = ((const uint16_t *)from_keys)[src + d];
        else
            ((float *)to_keys)[dst + d] = ((const float *)from_keys)[src + d];
}

void memory_copy_entry(const struct attention *a, struct memory *to_memory, int to,
                       const struct memory *from_memory, int from) {
    size_t row = (size_t)a->shape.lanes * element_bytes(a);
    copy_column(a, to_memory->keys, to, from_memory->keys, from);
    if (to_memory->turned != to_memory->keys)
        copy_column(a, to_memory->turned, to, from_memory->turned, from);
    memcpy((char *)to_memory->values + (size_t)to * row,
           (const char *)from_memory->values + (size_t)from * row, row);
}

void memory_clamp_entry(const struct attention *a, struct memory *m, int entry) {
    copy_column(a, m->turned, entry, m->keys, entry);
}

static void move_entry(const struct attention *a, struct memory *m, int to, int from) {
    if (to != from) memory_copy_entry(a, m, to, m, from);
}

/* Entry first + i becomes what entry from[i] was, i < n; from ascends, from[i] >= first + i. */
static void move_entries(const struct attention *a, struct memory *m, int first, const int *from,
                         int n) {
    size_t row = (size_t)a->shape.lanes * element_bytes(a);
    a->kernels->move_keys(&a->shape, m->keys, first, from, n);
    if (m->turned != m->keys) a->kernels->move_keys(&a->shape, m->turned, first, from, n);
    for (int i = 0, run; i < n; i += run) {
        for (run = 1; i + run < n && from[i + run] == from[i] + run;)
            run++;
        if (from[i] != first + i)
            memmove((char *)m->values + (size_t)(first + i) * row,
                    (const char *)m->values + (size_t)from[i] * row, (size_t)run * row);
    }
}

/* Stores a row's key and value; the rotated copy is made from k' as it was rounded. */
static void write_entry(const struct layer_job *job, struct memory *m, int entry, int row,
                        int kv_head, struct scratch *tmp) {
    const struct attention *a = job->a;
    const struct attention_kernels *use = a->kernels;
    const struct shape *s = &a->shape;
    int D = s->head_dim;
    const float *k = job->k + (size_t)row * job->k_row + (size_t)kv_head * D;
    const float *cosines = a->cosines + (size_t)row * (D / 2),
                *sines = a->sines + (size_t)row * (D / 2);
    if (a->rope && !s->map_before_rope) {
        use->rotate(tmp->x, k, cosines, sines, D);
        k = tmp->x;
    }
    use->write_key(s, m->keys, entry, k);
    if (m->turned != m->keys) {
        use->read_key(s, tmp->x, m->keys, entry);
        use->rotate(tmp->x, tmp->x, cosines, sines, D);
        use->write_key(s, m->turned, entry, tmp->x);
    }
    use->write_value(s, m->values, entry, job->v + (size_t)row * job->v_row + (size_t)kv_head * D);
}

/* An entry as row j of tmp->x and tmp->v, in fp32. */
static void read_entry(const struct attention *a, const struct memory *m, int entry, int j,
                       struct scratch *tmp) {
    a->kernels->read_key(&a->shape, tmp->x + (size_t)j * a->shape.head_dim, m->keys, entry);
    a->kernels->read_value(&a->shape, tmp->v + (size_t)j * a->shape.lanes, m->values, entry);
}

/* phi_k of the n keys in tmp->x under state head h of kv_head: the one place where features of keys
 * are made. */
static void key_features(const struct attention *a, int layer, int kv_head, int h, int n,
                         struct scratch *tmp) {
    const struct attention_weights *w = &a->weights[layer];
    size_t head = (size_t)kv_head * a->state_heads + h;
    a->kernels->key_features(
        &a->shape, tmp->phi, tmp->x, n, w->map_k + head * a->shape.head_dim * a->shape.f_lanes,
        w->map_k_bias ? w->map_k_bias + head * a->shape.f_lanes : NULL, tmp->u);
}

/* Folds the n keys and values in tmp into every state of the kv head; then the horizon. */
static void fold(const struct attention *a, int layer, int kv_head, float *states, int n,
                 float forget, struct scratch *tmp) {
    for (int h = 0; h < a->state_heads; h++) {
        float *S = states + (size_t)h * a->layout.state_floats;
        key_features(a, layer, kv_head, h, n, tmp);
        a->kernels->fold(&a->shape, S, S + a->layout.S_floats, tmp->phi, tmp->v, n);
        if (forget != 1) a->kernels->scale(S, a->layout.state_floats, forget);
    }
}

/* ---- the choice of the cache ---- */

/* Candidates for block b, ascending positions: the cache, then block b - 2 less the sinks.  Where
 * they lie, and their positions. */
static int candidates(const struct attention *a, const struct memory *m, int64_t b, int *entry,
                      int64_t *position) {
    const struct layout *l = &a->layout;
    int w = a->config.window_size, n = 0;
    int half = l->sinks + m->room->cache + (int)(b % 2) * w;
    for (; n < m->room->cache && m->positions[n] >= 0; n++) {
        entry[n] = l->sinks + n;
        position[n] = m->positions[n];
    }
    for (int i = b == 2 ? l->sinks : 0; i < w; i++, n++) {
        entry[n] = half + i;
        position[n] = (b - 2) * w + i;
    }
    return n;
}

/* error[n] = e_j of each candidate, summed over the group's states. */
static void self_recall(const struct attention *a, int layer, int kv_head, const struct memory *m,
                        const int *entry, int n, float *error, struct scratch *tmp) {
    const struct layout *l = &a->layout;
    for (int j = 0; j < n; j++)
        read_entry(a, m, entry[j], j, tmp);
    memset(error, 0, (size_t)n * sizeof *error);
    for (int h = 0; h < a->state_heads; h++) {
        float *S = tmp->state, *z = S + l->S_floats;
        key_features(a, layer, kv_head, h, n, tmp);
        memcpy(S, m->state + (size_t)h * l->state_floats, l->state_floats * sizeof *S);
        a->kernels->fold(&a->shape, S, z, tmp->phi, tmp->v, n);
        a->kernels->self_recall(&a->shape, error, tmp->recalled, S, z, tmp->phi, tmp->v, n);
    }
    for (int j = 0; j < n; j++) /* what overflows is not recalled at all */
        if (isnan(error[j])) error[j] = INFINITY;
}

/* What a choice, and the state it leaves, is for: block b, and so many of the places. */
static int64_t choice_name(const struct room *room, int64_t b) {
    return b * (room->cache + 1) + room->places;
}

static double aged(float error, int64_t distance, int age) {
    return age ? error / (1 + (double)distance / age) : error;
}

/* Most places are for facts: by error, slowly lessened by age, since by error alone the oldest keys
 * would stay for ever (the state forgets them, so it recalls them worst).  Then some by error and a
 * smaller age.  Facts' scores are rounded to fp32, which a device compares faster. */
static void choose(const struct attention *a, int layer, int kv_head, struct memory *m, int64_t b,
                   int n, struct scratch *tmp) {
    const struct attention_config *c = &a->config;
    double *score = tmp->rank;
    int64_t start = b * c->window_size;
    int recent = m->room->recent;
    self_recall(a, layer, kv_head, m, tmp->entry, n, tmp->error, tmp);
    memset(m->chosen, 0, (size_t)n * sizeof *m->chosen);
    for (int j = 0; j < n; j++)
        score[j] = (float)aged(tmp->error[j], start - tmp->position[j], c->cache_fact_age);
    a->kernels->keep_largest(m->chosen, score, n, m->room->places - recent);
    for (int j = 0; recent && j < n; j++)
        score[j] = aged(tmp->error[j], start - tmp->position[j], c->cache_age);
    if (recent) a->kernels->keep_largest(m->chosen, score, n, recent);
    *m->chosen_for = choice_name(m->room, b);
}

static const int64_t *imposed_set(const struct attention *a, int layer, int kv_head, int64_t b) {
    if (!a->imposed || b >= a->imposed_blocks) return NULL;
    size_t head = (size_t)layer * a->config.n_kv_heads + kv_head;
    return a->imposed + (head * a->imposed_blocks + (size_t)b) * attention_cache_most(&a->config);
}

static bool contains(const int64_t *set, int n, int64_t x) {
    for (int i = 0; i < n; i++)
        if (set[i] == x) return true;
    return false;
}

/* Marks what stays in the cache of block b among the n candidates in tmp. */
static void mark_kept(const struct attention *a, int layer, int kv_head, struct memory *m,
                      int64_t b, int n, struct scratch *tmp) {
    int size = m->room->places;
    const int64_t *imposed = imposed_set(a, layer, kv_head, b);
    for (int j = 0; j < n; j++)
        tmp->keep[j] =
            n <= size || (imposed && contains(imposed, m->room->cache, tmp->position[j]));
    if (n <= size || imposed || size == 0) return;
    if (*m->chosen_for != choice_name(m->room, b)) choose(a, layer, kv_head, m, b, n, tmp);
    memcpy(tmp->keep, m->chosen, (size_t)n * sizeof *tmp->keep);
}

/* Folds those of the n candidates in tmp that are not kept into states, which hold what was folded
 * before block b. */
static void fold_rest(const struct attention *a, int layer, int kv_head, const struct memory *m,
                      int64_t b, int n, float *states, struct scratch *tmp) {
    int64_t start = b * a->config.window_size;
    int n_fold = 0;
    for (int j = 0; j < n; j++)
        if (!tmp->keep[j]) read_entry(a, m, tmp->entry[j], n_fold++, tmp);
    float forget =
        forgetting(a, memory_folded(a, m->room, start - 1), memory_folded(a, m->room, start));
    if (n_fold) fold(a, layer, kv_head, states, n_fold, forget, tmp);
}

static void exchange(struct memory *m) {
    float *state = m->next;
    m->next = m->state;
    m->state = state;
    atomic_store_explicit(m->exchanged, !*m->exchanged, memory_order_relaxed);
}

/* Is the state of block b at hand?  It was made of what was chosen, not of a set imposed since. */
static bool next_is_for(const struct attention *a, int layer, int kv_head, const struct memory *m,
                        int64_t b) {
    return *m->next_for == choice_name(m->room, b) && !imposed_set(a, layer, kv_head, b);
}

/* Before the first row of block b: sinks become entries of their own, the cache is chosen, the
 * others are folded, and keys that are now too far are clamped. */
static void begin_block(const struct attention *a, int layer, int kv_head, struct memory *m,
                        int64_t b, struct scratch *tmp) {
    const struct layout *l = &a->layout;
    int64_t w = a->config.window_size, start = b * w;
    if (b < 2) return;
    int n = candidates(a, m, b, tmp->entry, tmp->position), n_kept = 0;
    mark_kept(a, layer, kv_head, m, b, n, tmp);
    if (next_is_for(a, layer, kv_head, m, b))
        exchange(m);
    else
        fold_rest(a, layer, kv_head, m, b, n, m->state, tmp);

    if (b == 2)
        for (int i = 0; i < l->sinks; i++)
            move_entry(a, m, i, l->sinks + m->room->cache + i);
    for (int j = 0; j < n; j++)
        if (tmp->keep[j]) {
            tmp->entry[n_kept] = tmp->entry[j];
            m->positions[n_kept++] = tmp->position[j];
        }
    move_entries(a, m, l->sinks, tmp->entry, n_kept); /* over what moves too, or is folded */
    for (int i = n_kept; i < m->room->cache; i++)
        m->positions[i] = -1;

    for (int e = 0; e < l->sinks + n_kept; e++) {
        int64_t key = memory_entry_position(a, m, e, start);
        bool was = key < start - 2 * w && memory_clamped(a, key, start - w);
        if (memory_clamped(a, key, start) && !was) copy_column(a, m->turned, e, m->keys, e);
    }
}

/* Sliding windows: the key pushed out by the row at position becomes a sink entry or is folded. */
static void leave_window(const struct attention *a, int layer, int kv_head, struct memory *m,
                         int64_t position, struct scratch *tmp) {
    const struct layout *l = &a->layout;
    int64_t w = a->config.window_size, key = position - w;
    int place = l->sinks + (int)(position % w);
    if (key >= 0 && key < l->sinks) {
        move_entry(a, m, (int)key, place);
    } else if (key >= 0) {
        read_entry(a, m, place, 0, tmp);
        fold(a, layer, kv_head, m->state, 1,
             forgetting(a, memory_folded(a, m->room, position - 1),
                        memory_folded(a, m->room, position)),
             tmp);
    }
    for (int e = 0; e < l->sinks && e <= key; e++) {
        bool was = e < key && memory_clamped(a, e, position - 1);
        if (memory_clamped(a, e, position) && !was) copy_column(a, m->turned, e, m->keys, e);
    }
}

/* No window: the row's own key goes into the state at once, by way of the one entry there is, which
 * rounds it. */
static void fold_own(const struct layer_job *job, int row, int kv_head, struct memory *m,
                     int64_t position, struct scratch *tmp) {
    const struct attention *a = job->a;
    write_entry(job, m, 0, row, kv_head, tmp);
    read_entry(a, m, 0, 0, tmp);
    fold(a, job->layer, kv_head, m->state, 1, forgetting(a, position, position + 1), tmp);
}

void memory_append(const struct layer_job *job, const struct segment *segment, int kv_head,
                   struct scratch *tmp) {
    const struct attention *a = job->a;
    const struct layout *l = &a->layout;
    struct memory m = memory_of(a, a->runs[segment->run].slot, job->layer, kv_head);
    bool hedgehog = a->config.kind == ATTENTION_HEDGEHOG;
    enum window_rule rule = a->config.window;
    int w = a->config.window_size;
    if (hedgehog && rule == WINDOW_TERRACED && segment->position % w == 0)
        begin_block(a, job->layer, kv_head, &m, segment->position / w, tmp);
    for (int r = 0; r < segment->n_rows; r++) {
        int row = segment->first_row + r;
        int64_t position = segment->position + r;
        if (hedgehog && rule == WINDOW_NONE) {
            fold_own(job, row, kv_head, &m, position, tmp);
            continue;
        }
        if (hedgehog && rule == WINDOW_SLIDING)
            leave_window(a, job->layer, kv_head, &m, position, tmp);
        write_entry(job, &m, l->sinks + m.room->cache + (int)(position % l->ring), row, kv_head,
                    tmp);
    }
}

static void add_range(struct ahead *ahead, const void *base, size_t from, size_t to) {
    ahead->range[ahead->n++] = (struct range){(const char *)base + from, (const char *)base + to};
}

/* Entries first .. end - 1. */
static void add_entries(const struct attention *a, const struct memory *m, struct ahead *ahead,
                        int first, int end) {
    size_t row = (size_t)a->shape.lanes * element_bytes(a),
           tile = (size_t)TILE * a->shape.head_dim * element_bytes(a);
    add_range(ahead, m->values, (size_t)first * row, (size_t)end * row);
    add_range(ahead, m->turned, (size_t)(first / TILE) * tile,
              (size_t)((end + TILE - 1) / TILE) * tile);
}

struct ahead memory_ahead(const struct attention *a, const struct segment *segment, int layer,
                          int kv_head) {
    const struct layout *l = &a->layout;
    struct memory m = memory_of(a, a->runs[segment->run].slot, layer, kv_head);
    struct ahead ahead = {0};
    if (a->config.kind != ATTENTION_HEDGEHOG) return ahead; /* as long as the text */
    int w = a->config.window_size, ring = l->sinks + m.room->cache;
    int place = ring + (int)(segment->position % l->ring), end = place + segment->n_rows;
    int first = place, last = place + 1; /* where the next key goes */
    size_t tile = (size_t)TILE * a->shape.head_dim * element_bytes(a);
    float *state = m.state;
    if (segment->position % w == 0) {
        /* As a rule: the memory may be another thread's by now, so nothing in it is read. */
        state = m.next;
        first = 0, last = end = place + w; /* keys move, of the block that leaves as well */
    }
    if (memory_folded(a, m.room, segment->position) > 0) {
        size_t map = (size_t)a->group * a->shape.head_dim * a->shape.f_lanes;
        add_range(&ahead, state, 0, (size_t)a->state_heads * l->state_floats * sizeof *state);
        add_range(&ahead, a->weights[layer].map_q + kv_head * map, 0, map * sizeof(float));
    }
    if (place < ring + w && segment->position >= w) /* the block before is the second half */
        add_entries(a, &m, &ahead, ring + w, ring + 2 * w);
    add_entries(a, &m, &ahead, 0, end);
    if (m.keys != m.turned)
        add_range(&ahead, m.keys, (size_t)(first / TILE) * tile,
                  (size_t)((last + TILE - 1) / TILE) * tile);
    add_range(&ahead, m.positions, 0, (size_t)m.room->cache * sizeof *m.positions);
    return ahead;
}

/* The row of a block in which a layer of this sequence prepares the next: never the first, beside
 * what is left to do where a block begins; layers one after the other, and sequences, whose blocks
 * may begin together, each from a row of its own (multiples of the golden ratio lie evenly however
 * many there are), so that no step has the choices of many. */
static int64_t preparing_row(const struct attention *a, int layer, const void *slot) {
    int64_t rows = a->config.window_size - 1;
    uint32_t turn = (uint32_t)((uintptr_t)slot / attention_slot_bytes(a)) * 2654435769u;
    if (rows < 1) return 0;
    return 1 +
           (layer * rows / a->n_layers + (int64_t)(((uint64_t)turn * (uint64_t)rows) >> 32)) % rows;
}

bool memory_prepares_in(const struct attention *a, int layer, const struct segment *segment) {
    const struct attention_config *c = &a->config;
    if (c->kind == ATTENTION_SOFTMAX || c->window != WINDOW_TERRACED) return false;
    int64_t w = c->window_size, next = segment->position / w + 1;
    /* all that ever left the window fit every cache: nothing to choose */
    if ((next - 1) * w - c->sinks <= a->layout.least_places || imposed_set(a, layer, 0, next))
        return false;
    int64_t row = preparing_row(a, layer, a->runs[segment->run].slot) - segment->position % w;
    return row >= 0 && row < segment->n_rows;
}

void memory_prepare_next(const struct attention *a, int layer, const struct segment *segment,
                         int kv_head, struct scratch *tmp) {
    struct memory m = memory_of(a, a->runs[segment->run].slot, layer, kv_head);
    int64_t next = segment->position / a->config.window_size + 1;
    int n = candidates(a, &m, next, tmp->entry, tmp->position);
    if (n <= m.room->places)
        return; /* this head's cache holds them all, or an imposed
                 * set was small, or places were added */
    mark_kept(a, layer, kv_head, &m, next, n, tmp);
    memcpy(m.next, m.state, a->state_heads * a->layout.state_floats * sizeof *m.next);
    fold_rest(a, layer, kv_head, &m, next, n, m.next, tmp);
    *m.next_for = choice_name(m.room, next);
}

/* ---- looking in, for evaluation and tests ---- */

void attention_set_linear(struct attention *a, bool on) {
    a->linear_off = on ? 0 : -60;
}

int attention_cache_most(const struct attention_config *c) {
    return c->retrieval_size > c->cache_size ? c->retrieval_size : c->cache_size;
}

void count_places(struct attention *a) {
    struct layout *l = &a->layout;
    l->least_places = a->rooms[0].places;
    for (int i = 1; i < a->n_layers * a->config.n_kv_heads; i++)
        if (a->rooms[i].places < l->least_places) l->least_places = a->rooms[i].places;
}

void attention_set_cache_share(struct attention *a, int part, int of) {
    int n = a->n_layers * a->config.n_kv_heads;
    assert(part >= 0 && part <= of);
    for (int i = 0; i < n; i++) {
        struct room *r = &a->rooms[i];
        r->places = (int)((int64_t)r->cache * part / of);
        assert(r->places >= r->recent);
    }
    count_places(a);
}

void attention_impose_cache(struct attention *a, const int64_t *sets, int n_blocks) {
    a->imposed = sets;
    a->imposed_blocks = n_blocks;
}

const struct attention_weights *attention_weights_of(const struct attention *a, int layer) {
    return &a->weights[layer];
}

int64_t attention_linear_keys(const struct attention *a, int layer, int kv_head, int64_t position) {
    struct room smallest = {.places = a->layout.least_places};
    const struct room *room = layer < 0 ? &smallest : room_of(a, layer, kv_head);
    return memory_folded(a, room, position);
}

float attention_forgetting(const struct attention *a, int layer, int kv_head, int64_t position) {
    const struct room *room = room_of(a, layer, kv_head);
    return forgetting(a, memory_folded(a, room, position - 1), memory_folded(a, room, position));
}

int attention_cache_positions(const struct attention *a, const void *slot, int layer, int kv_head,
                              int64_t *out) {
    struct memory m = memory_of(a, slot, layer, kv_head);
    int n = memory_cached(&m);
    for (int i = 0; i < n; i++)
        out[i] = m.positions[i];
    return n;
}

int attention_cache_scores(const struct attention *a, const void *slot, int layer, int kv_head,
                           int64_t *positions, float *errors) {
    struct memory m = memory_of(a, slot, layer, kv_head);
    struct scratch *tmp = a->scratch;
    int64_t position = slot_header(slot)->position, b = position / a->config.window_size;
    if (b < 2) return 0;
    int n = candidates(a, &m, b, tmp->entry, positions);
    self_recall(a, layer, kv_head, &m, tmp->entry, n, errors, tmp);
    return n;
}
