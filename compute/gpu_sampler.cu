/* gpu_sampler.cu - logits to tokens on a device, without sorting.
 *
 * One block draws one token, in passes over a row of logits (which the second level cache holds).
 * Every filter keeps a prefix of the tokens in order of falling logit, ties to the lower id, so
 * what is sought is where the prefix ends: a depth below the best logit, and among the tokens at
 * just that depth a last id.  search() finds it four bits of depth at a time.
 *
 * Weights exp((logit - best) / temperature) are taken in whole units of 2^-42.  Sums of whole
 * numbers have no order: a row's token depends neither on how threads share the row, nor on other
 * rows, and the sum of parts is the sum of the whole.  What is cut off is below 2^-42 of the best
 * token's weight each. */
#include "compute/cuda.h"
#include "compute/gpu_sampler.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST_THREADS = 512,
    DIGIT_BITS = 4,
    DIGITS = 1 << DIGIT_BITS,
    COUNT_BITS = 11, /* tokens of a thread, in the low bits of a cell of the table */
    PARTS = 32,
};
#define UNIT 0x1p42f /* of mass: the best token's weight */

struct sampler_memory { /* of a block */
    uint64_t mass[DIGITS];
    uint64_t parts[PARTS];
    uint32_t count[DIGITS];
    uint64_t best[32];
    uint64_t top[GPU_SAMPLER_TOP];
    int n_top;
};

struct cut { /* the end of a prefix of the falling order */
    uint32_t depth;
    int shift;    /* depths count in steps of 2^shift: nothing lies between that matters */
    int32_t last; /* of those at this depth, ids up to this are inside */
};

struct row {
    const float *x;
    int n;
    float best, temperature, least; /* least weight that counts: min_p */
    uint32_t best_order;
    struct cut k, p;
};

/* ---- numbers ---- */

/* As scheduler/sampler.c: NaN is never chosen, infinity is the highest number, -0 is 0. */
DEVICE float sane(float x) {
    x += 0.0f;
    x = x > -INFINITY ? x : -INFINITY;
    return x < FLT_MAX ? x : FLT_MAX;
}

/* Whole numbers that fall as floats rise. */
DEVICE uint32_t order_of(float x) {
    uint32_t bits = as_bits(x);
    return bits >> 31 ? bits : ~(bits | 0x80000000u);
}
DEVICE float number_of(uint32_t order) {
    return as_float(order >> 31 ? order : ~order & 0x7fffffffu);
}

DEVICE uint64_t from_lane(uint64_t x, int distance) {
    uint32_t low = __shfl_xor_sync(~0u, (uint32_t)x, distance);
    uint32_t high = __shfl_xor_sync(~0u, (uint32_t)(x >> 32), distance);
    return (uint64_t)high << 32 | low;
}
DEVICE uint64_t warp_total(uint64_t x) {
    for (int distance = 16; distance; distance /= 2)
        x += from_lane(x, distance);
    return x;
}

/* The best of a row: its order, then its id. */
DEVICE uint64_t best_of(struct sampler_memory *m, const float *x, int n) {
    uint64_t best = ~(uint64_t)0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        uint64_t key = (uint64_t)order_of(sane(x[i])) << 32 | (uint32_t)i;
        best = key < best ? key : best;
    }
    for (int distance = 16; distance; distance /= 2) {
        uint64_t other = from_lane(best, distance);
        best = other < best ? other : best;
    }
    __syncthreads(); /* the last reader of m->best is done */
    if (threadIdx.x % 32 == 0) m->best[threadIdx.x / 32] = best;
    __syncthreads();
    for (int i = 0; i < (int)blockDim.x / 32; i++)
        best = m->best[i] < best ? m->best[i] : best;
    return best;
}

/* ---- which tokens are kept, and what they weigh ---- */

DEVICE bool inside(const struct cut &cut, uint32_t depth, int i) {
    uint32_t at = depth >> cut.shift;
    return at < cut.depth || (at == cut.depth && i <= cut.last);
}

DEVICE struct cut no_cut() {
    struct cut cut = {~0u, 0, 0x7fffffff};
    return cut;
}

DEVICE uint64_t mass_of(const struct row &r, float x) {
    float weight = expf((x - r.best) / r.temperature);
    return weight >= r.least ? (uint64_t)(weight * UNIT) : 0;
}

enum measure { COUNT, MASS, COUNT_AT_CUT };

/* What token i of the row adds to a sum, of those within the cuts so far. */
template <int WHAT> DEVICE uint64_t measure_of(const struct row &r, int i, const struct cut &at) {
    float x = sane(r.x[i]);
    uint32_t depth = order_of(x) - r.best_order;
    if (!inside(r.k, depth, i) || !inside(r.p, depth, i)) return 0;
    if (WHAT == MASS) return mass_of(r, x);
    return WHAT == COUNT || depth >> at.shift == at.depth;
}

/* ---- where a sum is reached ---- */

/* The first id at which the running sum passes uniform * total (WHAT is MASS) or reaches target. */
template <int WHAT>
DEVICE int walk(struct sampler_memory *m, const struct row &r, const struct cut &at, double uniform,
                uint64_t target) {
    int low = 0, high = r.n, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (bool first = true;; first = false) {
        int n_parts = blockDim.x / 32, part = ((high - low - 1) / n_parts / 32 + 1) * 32;
        bool last = high - low <= PARTS;
        if (last) {
            n_parts = high - low;
            part = 1;
            if ((int)threadIdx.x < n_parts)
                m->parts[threadIdx.x] = measure_of<WHAT>(r, low + threadIdx.x, at);
        } else {
            int begin = low + warp * part, end = begin + part < high ? begin + part : high;
            uint64_t sum = 0;
            for (int i = begin + lane; i < end; i += 32)
                sum += measure_of<WHAT>(r, i, at);
            sum = warp_total(sum);
            if (lane == 0) m->parts[warp] = sum;
        }
        __syncthreads();
        if (WHAT == MASS && first) {
            uint64_t total = 0;
            for (int i = 0; i < n_parts; i++)
                total += m->parts[i];
            target = (uint64_t)(uniform * (double)total) + 1;
            target = target < total ? target : total;
        }
        int reached = 0;
        while (reached < n_parts - 1 && m->parts[reached] < target)
            target -= m->parts[reached++];
        __syncthreads();
        low += reached * part;
        high = low + part < high ? low + part : high;
        if (last) return low;
    }
}

/* Where the shortest prefix of the falling order ends that holds target tokens (COUNT), or the
 * fraction of the mass (MASS).  table: a column of DIGITS cells for every thread. */
template <int WHAT>
DEVICE struct cut search(struct sampler_memory *m, uint64_t *table, const struct row &r,
                         uint64_t target, double fraction) {
    struct cut cut = {0, 32, 0x7fffffff};
    uint64_t before = 0; /* in the prefix for certain */
    int digit = 0;
    while (cut.shift) {
        for (int d = 0; d < DIGITS; d++)
            table[d * blockDim.x + threadIdx.x] = 0;
        bool first = cut.shift == 32;
        int shift = cut.shift - DIGIT_BITS;
        for (int i = threadIdx.x; i < r.n; i += blockDim.x) {
            float x = sane(r.x[i]);
            uint32_t depth = order_of(x) - r.best_order;
            if ((!first && depth >> (shift + DIGIT_BITS) != cut.depth) || !inside(r.k, depth, i))
                continue;
            uint64_t what = WHAT == MASS ? mass_of(r, x) : 1;
            table[(depth >> shift) % DIGITS * blockDim.x + threadIdx.x] += what << COUNT_BITS | 1;
        }
        __syncthreads();
        for (int d = threadIdx.x / 32; d < DIGITS; d += blockDim.x / 32) {
            uint64_t mass = 0;
            uint32_t count = 0;
            for (int i = threadIdx.x % 32; i < (int)blockDim.x; i += 32) {
                uint64_t cell = table[d * blockDim.x + i];
                mass += cell >> COUNT_BITS;
                count += (uint32_t)cell % (1u << COUNT_BITS);
            }
            uint64_t both = warp_total(mass);
            count = (uint32_t)warp_total(count);
            if (threadIdx.x % 32 == 0) {
                m->mass[d] = both;
                m->count[d] = count;
            }
        }
        __syncthreads();
        if (WHAT == MASS && first) {
            uint64_t total = 0;
            for (int d = 0; d < DIGITS; d++)
                total += m->mass[d];
            target = (uint64_t)ceil(fraction * (double)total);
            target = target < 1 ? 1 : target < total ? target : total;
        }
        digit = 0;
        while (digit < DIGITS - 1 && before + m->mass[digit] < target)
            before += m->mass[digit++];
        cut.depth = (first ? 0 : cut.depth << DIGIT_BITS) + digit;
        cut.shift = shift;
        /* One token, or exactly these: nothing closer to see. */
        if (m->count[digit] <= 1 || before + m->mass[digit] == target) return cut;
    }
    /* Equal logits, some of which are inside: those of lower id. */
    uint64_t each = m->mass[digit] / m->count[digit];
    uint64_t needed = each ? (target - before + each - 1) / each : m->count[digit];
    if (needed < m->count[digit]) cut.last = walk<COUNT_AT_CUT>(m, r, cut, 0, needed);
    return cut;
}

/* ---- a row ---- */

DEVICE float penalised(float x, const struct gpu_draw &how, uint32_t mark) {
    if (!mark) return x;
    float n = (float)(mark >> 1);
    x = x > 0 ? x / how.repetition_penalty : x * how.repetition_penalty;
    x = fmaf(-how.frequency_penalty, n, x);
    x -= mark >> 1 ? how.presence_penalty : 0;
    return sane(x);
}

/* out = logits after biases, penalties and bans. */
DEVICE void adjust(float *out, const float *logits, int n, const struct gpu_draw &how,
                   const struct gpu_edit *edits, const uint16_t *counts) {
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        out[i] = penalised(sane(logits[i]), how, counts ? counts[i] : 0);
    __syncthreads();
    for (int i = threadIdx.x; i < how.n_edits; i += blockDim.x) {
        int32_t t = edits[i].token;
        if (edits[i].bias == -INFINITY) continue;
        out[t] = penalised(sane(sane(logits[t]) + edits[i].bias), how, counts ? counts[t] : 0);
    }
    __syncthreads(); /* a ban is stronger than a bias of the same token */
    for (int i = threadIdx.x; i < how.n_edits; i += blockDim.x)
        if (edits[i].bias == -INFINITY) out[edits[i].token] = -INFINITY;
    __syncthreads();
}

DEVICE struct row row_of(struct sampler_memory *m, const float *x, int n, float temperature,
                         int32_t *argmax) {
    uint64_t best = best_of(m, x, n);
    struct row r = {x, n, 0, temperature, 0, 0, no_cut(), no_cut()};
    r.best_order = (uint32_t)(best >> 32);
    r.best = number_of(r.best_order);
    *argmax = (int32_t)(uint32_t)best;
    return r;
}

DEVICE int32_t draw_token(struct sampler_memory *m, uint64_t *table, const float *x, int n,
                          const struct gpu_draw &how) {
    int32_t argmax;
    struct row r = row_of(m, x, n, how.temperature, &argmax);
    if (how.temperature == 0 || r.best == -INFINITY) return argmax;
    if (how.top_k > 0 && how.top_k < n) r.k = search<COUNT>(m, table, r, how.top_k, 0);
    if (how.top_p < 1) r.p = search<MASS>(m, table, r, 0, how.top_p);
    r.least = how.min_p; /* after top_p: its mass is of all */
    return walk<MASS>(m, r, no_cut(), how.uniform, 0);
}

/* Log-softmax of the raw logits at token and at the n_top best. */
DEVICE void log_probabilities(struct sampler_memory *m, uint64_t *table, const float *x, int n,
                              int32_t token, int n_top, struct gpu_drawn *out) {
    int32_t argmax;
    struct row r = row_of(m, x, n, 1, &argmax);
    n_top = n_top < n ? n_top : n;
    struct row all = r;
    if (r.best == -INFINITY) all.best = 0; /* no token has a probability: all get -inf */
    uint64_t sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        sum += mass_of(all, sane(x[i]));
    sum = warp_total(sum);
    if (threadIdx.x % 32 == 0) m->parts[threadIdx.x / 32] = sum;
    if (threadIdx.x == 0) m->n_top = 0;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++)
        sum += m->parts[i];
    double log_sum = sum ? log((double)sum / (double)UNIT) : 0;
    if (threadIdx.x == 0) out->logprob = (float)((double)sane(x[token]) - all.best - log_sum);
    if (n_top <= 0) return;

    struct cut cut = no_cut();
    if (n_top < n) cut = search<COUNT>(m, table, r, n_top, 0);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        uint32_t order = order_of(sane(x[i]));
        if (inside(cut, order - r.best_order, i))
            m->top[atomicAdd(&m->n_top, 1)] = (uint64_t)order << 32 | (uint32_t)i;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_top; i += blockDim.x) {
        int rank = 0;
        for (int j = 0; j < n_top; j++)
            rank += m->top[j] < m->top[i];
        float logit = number_of((uint32_t)(m->top[i] >> 32));
        out->top_token[rank] = (int32_t)(uint32_t)m->top[i];
        out->top_logprob[rank] = (float)((double)logit - all.best - log_sum);
    }
}

static __global__ void __launch_bounds__(MOST_THREADS)
    sample_rows(const float *logits, int n, const struct gpu_draw *draws,
                const struct gpu_edit *edits, uint16_t *counts, float *scratch,
                struct gpu_drawn *drawn, int32_t *tokens) {
    DYNAMIC_SHARED(uint64_t, table); /* [DIGITS][threads] */
    __shared__ struct sampler_memory memory[1];
    const struct gpu_draw how = draws[blockIdx.x];
    const float *raw = logits + (size_t)how.row * n, *x = raw;
    uint16_t *counted = how.counts_row < 0 ? NULL : counts + (size_t)how.counts_row * n;
    bool penalties = counted && (how.repetition_penalty != 1 || how.presence_penalty != 0 ||
                                 how.frequency_penalty != 0);
    if (penalties || how.n_edits) {
        float *adjusted = scratch + (size_t)blockIdx.x * n;
        adjust(adjusted, raw, n, how, edits + how.first_edit, penalties ? counted : NULL);
        x = adjusted;
    }
    int32_t token = draw_token(memory, table, x, n, how);
    struct gpu_drawn *out = drawn + blockIdx.x;
    if (how.n_top >= 0) log_probabilities(memory, table, raw, n, token, how.n_top, out);
    if (threadIdx.x) return;
    out->token = tokens[blockIdx.x] = token;
    if (how.n_top < 0) out->logprob = NAN;
    if (how.record && counted && counted[token] < 0xfffe) counted[token] += 2;
}

static __global__ void count_prompt(uint16_t *counts, const int32_t *tokens, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) counts[tokens[i]] |= 1; /* equal tokens write equal values */
}

/* ---- the host's side ---- */

struct gpu_sampler {
    struct gpu *g; /* borrowed for life */
    int vocab_size, threads;
    float *scratch;   /* [max_rows][vocab_size] adjusted logits */
    uint16_t *counts; /* [n_count_rows][vocab_size] */
    struct gpu_drawn *drawn, *host_drawn; /* [max_rows] */
    int32_t *tokens;                      /* [max_rows] */
    char *staged, *host_staged; /* [staged_room] what was uploaded since the last known wait */
    size_t staged_room, n_staged;
};

enum err gpu_sampler_new(struct gpu_sampler **out, struct gpu *g, int vocab_size, int max_rows,
                         int n_count_rows) {
    if (vocab_size < 1 || vocab_size > MOST_THREADS * ((1 << COUNT_BITS) - 1)) return ERR_ARG;
    struct gpu_sampler *s = (struct gpu_sampler *)calloc(1, sizeof *s);
    if (!s) return ERR_NOMEM;
    size_t n = (size_t)vocab_size, rows = (size_t)max_rows;
    s->g = g;
    s->vocab_size = vocab_size;
    /* Small rows need few threads; large ones as many as the table holds columns. */
    s->threads = (vocab_size / 8 + 31) / 32 * 32;
    s->threads = s->threads < 64 ? 64 : s->threads > MOST_THREADS ? MOST_THREADS : s->threads;
    s->staged_room = 2 * rows *
                         (sizeof(struct gpu_draw) + GPU_SAMPLER_EDITS * sizeof(struct gpu_edit)) +
                     65536;
    enum err err = gpu_alloc(g, (void **)&s->scratch, rows * n * sizeof *s->scratch);
    if (!err) err = gpu_alloc(g, (void **)&s->counts, (size_t)n_count_rows * n * sizeof *s->counts);
    if (!err) err = gpu_alloc(g, (void **)&s->drawn, rows * sizeof *s->drawn);
    if (!err) err = gpu_alloc(g, (void **)&s->tokens, rows * sizeof *s->tokens);
    if (!err) err = gpu_alloc(g, (void **)&s->staged, s->staged_room);
    if (!err) err = gpu_host_alloc(g, (void **)&s->host_drawn, rows * sizeof *s->host_drawn);
    if (!err) err = gpu_host_alloc(g, (void **)&s->host_staged, s->staged_room);
    if (err) {
        gpu_sampler_free(s);
        return err;
    }
    *out = s;
    return OK;
}

void gpu_sampler_free(struct gpu_sampler *s) {
    if (!s) return;
    gpu_release(s->g, s->scratch);
    gpu_release(s->g, s->counts);
    gpu_release(s->g, s->drawn);
    gpu_release(s->g, s->tokens);
    gpu_release(s->g, s->staged);
    gpu_host_release(s->g, s->host_drawn);
    gpu_host_release(s->g, s->host_staged);
    free(s);
}

/* Uploads bytes (at most half of the room) that may change once this returns. */
static void *stage(struct gpu_sampler *s, const void *from, size_t bytes) {
    if (s->n_staged + bytes > s->staged_room) { /* the first of it may be on its way still */
        gpu_wait(s->g);                         /* an error shows at the caller's own wait */
        s->n_staged = 0;
    }
    char *host = s->host_staged + s->n_staged, *device = s->staged + s->n_staged;
    memcpy(host, from, bytes);
    gpu_upload(s->g, device, host, bytes);
    s->n_staged += (bytes + 15) / 16 * 16;
    return device;
}

void gpu_sampler_clear_counts(struct gpu_sampler *s, int row) {
    size_t n = (size_t)s->vocab_size;
    gpu_fill(s->g, s->counts + (size_t)row * n, 0, n * sizeof *s->counts);
}

void gpu_sampler_add_prompt(struct gpu_sampler *s, int row, const int32_t *tokens, int n) {
    uint16_t *counts = s->counts + (size_t)row * (size_t)s->vocab_size;
    for (int at = 0; at < n;) {
        int some = n - at < 4096 ? n - at : 4096;
        const int32_t *staged =
            (const int32_t *)stage(s, tokens + at, (size_t)some * sizeof *tokens);
        LAUNCH(s->g, count_prompt, dim3((some + 255) / 256), 256, 0, counts, staged, some);
        at += some;
    }
}

void gpu_sample(struct gpu_sampler *s, const float *logits, const struct gpu_draw *draws, int n,
                const struct gpu_edit *edits, int n_edits, const struct gpu_drawn **drawn) {
    *drawn = s->host_drawn;
    if (n < 1) return;
    const struct gpu_draw *staged_draws =
        (const struct gpu_draw *)stage(s, draws, (size_t)n * sizeof *draws);
    const struct gpu_edit *staged_edits = NULL;
    if (n_edits)
        staged_edits =
            (const struct gpu_edit *)stage(s, edits, (size_t)n_edits * sizeof *edits);
    LAUNCH(s->g, sample_rows, dim3(n), s->threads, DIGITS * s->threads * sizeof(uint64_t), logits,
           s->vocab_size, staged_draws, staged_edits, s->counts, s->scratch, s->drawn, s->tokens);
    gpu_download(s->g, s->host_drawn, s->drawn, (size_t)n * sizeof *s->drawn);
}

const int32_t *gpu_sampler_tokens(const struct gpu_sampler *s) { return s->tokens; }
