/* gpu_choose.cuh - a block of threads works out what a block of the window keeps, folds and scores
 * next (memory.c, mark_kept()).
 *
 * Every block of threads of a wave does so for itself: a launch of its own would cost the chain
 * more than the choice.  A key's rank among n is a count of n comparisons; each warp counts its
 * part of them for all keys, and ranks are sums of integers, whatever their order.  What stays is a
 * bit a key, so a key's place in its list is a sum of n / 32 counts of bits. */
#ifndef URCHIN_ATTENTION_GPU_CHOOSE_CUH
#define URCHIN_ATTENTION_GPU_CHOOSE_CUH

#include "attention/gpu_chain.cuh"

struct choice_shared {
    double *aged;             /* [candidates] score for a recent place: by error and age */
    int64_t *score;           /* [candidates] aged of those that are no facts, as bits: they order like numbers */
    int *fact;                /* [candidates] score for any other place: bits of a float */
    int *rank;                /* [candidates] */
    int *key, *next, *folded; /* [candidates] numbers of keys, ascending positions: of this block,
                                 of the block after it, of those that leave */
    unsigned *kept;           /* [candidates / 32 + 1] a bit each */
    int *count;
};

static inline size_t choice_bytes(int candidates) {
    size_t n = ((size_t)candidates + 6) / 4 * 4;
    return n * (2 * sizeof(int64_t) + 5 * sizeof(int)) + (n / 32 + 2) * sizeof(int);
}

DEVICE choice_shared choice_shared_at(int candidates, void *at) { /* 16-byte aligned */
    int n = (candidates + 6) / 4 * 4; /* scores end in up to three -1 */
    choice_shared m;
    m.aged = (double *)at;
    m.score = (int64_t *)(m.aged + n);
    m.fact = (int *)(m.score + n);
    m.rank = m.fact + n;
    m.key = m.rank + n;
    m.next = m.key + n;
    m.folded = m.next + n;
    m.kept = (unsigned *)(m.folded + n);
    m.count = (int *)(m.kept + n / 32 + 1);
    return m;
}

/* The cache before this block: how many, their numbers into key. */
DEVICE int keys_before(const gpu_chain &c, const chain_unit &u, const choice_shared &m) {
    const gpu_shape &s = c.shape;
    if (u.block.previous >= 0) {
        const int *list = chain_list(c, u.index * c.n_blocks + u.block.previous, u.kv_head);
        int n = list[s.most_cache];
        for (int i = threadIdx.x; i < n; i += CHAIN_THREADS)
            m.key[i] = list[i];
        return n;
    }
    const int64_t *positions = u.slot.positions; /* those before the first -1 */
    int cache = u.slot.cache;
    if (threadIdx.x == 0) *m.count = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < cache; i += CHAIN_THREADS) {
        m.key[i] = i;
        if (positions[i] >= 0 && (i + 1 == cache || positions[i + 1] < 0)) *m.count = i + 1;
    }
    __syncthreads();
    return *m.count;
}

/* Block b - 2 leaves the window when b begins: its keys, less the sinks, come behind the first n.
 */
DEVICE int add_block(const gpu_shape &s, const chain_unit &u, int64_t b, int *key, int n) {
    int64_t start = (b - 2) * s.window_size;
    int skip = b == 2 ? s.sinks : 0, more = s.window_size - skip;
    int first = key_number(u.piece, u.slot, start + skip);
    for (int i = threadIdx.x; i < more; i += CHAIN_THREADS)
        key[n + i] = first + i;
    return n + more;
}

template <class T> struct alignas(16) four { T x[4]; };

/* How many of score[first ... end - 1], by fours, come before one: are larger, or equal where that
 * is enough. */
template <class T> DEVICE int count_before(const T *score, int first, int end, T one, bool equal) {
    int n = 0;
#pragma unroll 2
    for (int i = first; i < end; i += 4) {
        four<T> of = *(const four<T> *)(score + i);
#pragma unroll
        for (int k = 0; k < 4; k++)
            n += equal ? of.x[k] >= one : of.x[k] > one;
    }
    return n;
}

/* rank[j] += how many of the n come before j: larger scores, of equals the earlier.  Scores are
 * not negative, but for -1s that fill up the last four. */
template <class T> DEVICE void rank_scores(const T *score, int n, int *rank) {
    enum { STEP = CHAIN_THREADS / 32 * 4 };
    int part = (n + STEP - 1) / STEP * 4, first = (int)threadIdx.x / 32 * part;
    int end = first + part < n ? first + part : n;
    for (int j0 = 0; j0 < n; j0 += 32) {
        int j = j0 + (int)threadIdx.x % 32, before = 0;
        if (j >= n) continue;
        T mine = score[j];
        if (end <= j0) /* all of them are earlier */
            before = count_before(score, first, end, mine, true);
        else if (first >= j0 + 32) /* later */
            before = count_before(score, first, end, mine, false);
        else
            for (int i = first; i < end; i++)
                before += score[i] > mine || (score[i] == mine && i < j);
        if (before) atomicAdd(&rank[j], before);
    }
}

DEVICE int count_bits(unsigned x) {
#ifdef __CUDA_ARCH__
    return __popc(x);
#else
    return __builtin_popcount(x);
#endif
}

/* How many of those before j stay. */
DEVICE int kept_before(const unsigned *kept, int j) {
    int n = count_bits(kept[j / 32] & ((1u << j % 32) - 1));
    for (int i = 0; i < j / 32; i++)
        n += count_bits(kept[i]);
    return n;
}
DEVICE bool is_kept(const unsigned *kept, int j) {
    return kept[j / 32] >> j % 32 & 1;
}

/* Of those that are not kept as facts, the first by error and age. */
DEVICE void choose_recent(int facts, int recent, int n, const choice_shared &m) {
    int *rest = m.folded, n_rest = n - facts;
    for (int j = threadIdx.x; j < n; j += CHAIN_THREADS) {
        m.rank[j] = 0;
        if (is_kept(m.kept, j)) continue;
        int r = j - kept_before(m.kept, j);
        memcpy(&m.score[r], &m.aged[j], sizeof m.aged[j]);
        rest[r] = j;
    }
    if (threadIdx.x < 3) m.score[n_rest + threadIdx.x] = -1;
    __syncthreads();
    rank_scores(m.score, n_rest, m.rank);
    __syncthreads();
    for (int r = threadIdx.x; r < n_rest; r += CHAIN_THREADS)
        if (m.rank[r] < recent) atomicAdd(&m.kept[rest[r] / 32], 1u << rest[r] % 32);
    __syncthreads();
}

DEVICE double aged(float error, int64_t distance, int age) {
    return age ? error / (1 + (double)distance / age) : error;
}

/* More candidates than places: key[n] -> next[cache], folded[n - cache], ascending.  Most places by
 * error, which age hardly lessens, some by error and age. */
DEVICE void choose(const gpu_chain &c, const chain_unit &u, int turn, int64_t b, int n,
                   const choice_shared &m) {
    const gpu_shape &s = c.shape;
    int recent = u.slot.recent, facts = u.slot.cache - recent;
    const float *errors = chain_errors(c, turn, u.block.piece, u.index, u.kv_head, 0, 0);
    for (int j = threadIdx.x; j < n;
         j += CHAIN_THREADS) { /* what takes long is under way at once */
        int64_t position = 0;
        if (recent || s.cache_fact_age) position = source_of(s, u.piece, u.slot, m.key[j]).position;
        const float *at = errors + j;
        float error = 0;
        for (int h = 0; h < s.state_heads; h++) {
            float head = 0;
#pragma unroll 8
            for (int t = 0; t < s.lanes / CHAIN_COLUMNS; t++, at += s.most_cache + s.window_size)
                head += *at;
            error += head;
        }
        if (isnan(error)) error = INFINITY; /* what overflows is not recalled at all */
        int64_t distance = b * s.window_size - position;
        if (recent) m.aged[j] = aged(error, distance, s.cache_age);
        m.fact[j] = (int)as_bits((float)aged(error, distance, s.cache_fact_age));
        m.rank[j] = 0;
    }
    if (threadIdx.x < 3) m.fact[n + threadIdx.x] = -1;
    __syncthreads();
    rank_scores(m.fact, n, m.rank);
    __syncthreads();
    for (int j = threadIdx.x; j < (n + 31) / 32 * 32; j += CHAIN_THREADS) { /* whole warps */
        bool keep = j < n && m.rank[j] < facts;
        unsigned bits = __ballot_sync(0xffffffffu, keep);
        if (j % 32 == 0) m.kept[j / 32] = bits;
    }
    __syncthreads();
    if (recent) choose_recent(facts, recent, n, m);
    for (int j = threadIdx.x; j < n; j += CHAIN_THREADS) {
        int before = kept_before(m.kept, j);
        if (is_kept(m.kept, j))
            m.next[before] = m.key[j];
        else
            m.folded[j - before] = m.key[j];
    }
}

struct chosen {
    int n_folded, n_next; /* m.folded; m.next: the cache, then what is a candidate with it */
    bool scoring;         /* more of them than places */
    float forget;         /* what folding multiplies the state by */
};

/* before: what is to be scored before the piece's first block chooses. */
DEVICE chosen choose_keys(const gpu_chain &c, const chain_unit &u, int turn, bool before,
                          bool lists, const choice_shared &m) {
    const gpu_shape &s = c.shape;
    int64_t start = u.block.segment.position, b = start / s.window_size;
    int n = keys_before(c, u, m), n_kept = n, cache = u.slot.cache;
    chosen to = {0, 0, false, 1};
    if (u.block.begins && !before) n = add_block(s, u, b, m.key, n);
    __syncthreads();
    if (u.block.begins && !before && n > cache && cache) {
        n_kept = cache;
        choose(c, u, turn, b, n, m);
    } else {
        n_kept = n > cache ? 0 : n;
        for (int i = threadIdx.x; i < n; i += CHAIN_THREADS)
            (n > cache ? m.folded : m.next)[i] = m.key[i];
    }
    to.n_folded = n - n_kept;
    if (to.n_folded)
        to.forget = forgetting(s, folded_keys(s, cache, start / s.window_size * s.window_size - 1),
                               folded_keys(s, cache, start / s.window_size * s.window_size));
    to.n_next = n_kept;
    if (before || u.block.more) to.n_next = add_block(s, u, before ? b : b + 1, m.next, n_kept);
    to.scoring = (before || u.block.more) && to.n_next > cache && cache > 0;
    __syncthreads();
    if (!lists) return to;
    for (int i = threadIdx.x; i < n_kept; i += CHAIN_THREADS)
        u.list[i] = m.next[i];
    if (threadIdx.x == 0) u.list[s.most_cache] = n_kept;
    return to;
}

#endif
