/* sampler.c - logits to tokens without ever sorting the vocabulary.
 *
 * Every filter (top_k, top_p, min_p) keeps a prefix of the tokens in order of falling logit, so all
 * that is needed is the set, not the order: select_prefix() is a quickselect that cuts by count or
 * by probability.  Before it, whatever provably lies outside is dropped in one pass.  Tokens are
 * compared as 64-bit keys (logit, then lower id), so there are no ties. */
#include "scheduler/sampler.h"

#include "compute/vec.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

void sampling_init(struct sampling *s) {
    *s = (struct sampling){.temperature = 1, .top_p = 1, .repetition_penalty = 1};
}

/* ---- what was read and written ---- */

struct token_counts {
    int vocab_size, n_tokens;
    uint32_t *marks; /* [vocab_size] times in the output << 1 | is in the prompt */
    int32_t *tokens; /* [n_tokens] those with a mark */
};

enum err token_counts_new(struct token_counts **out, int vocab_size) {
    struct token_counts *c = calloc(1, sizeof *c);
    if (!c) return ERR_NOMEM;
    c->vocab_size = vocab_size;
    c->marks = calloc((size_t)vocab_size, sizeof *c->marks);
    c->tokens = calloc((size_t)vocab_size, sizeof *c->tokens);
    if (!c->marks || !c->tokens) {
        token_counts_free(c);
        return ERR_NOMEM;
    }
    *out = c;
    return OK;
}

void token_counts_free(struct token_counts *c) {
    if (!c) return;
    free(c->marks);
    free(c->tokens);
    free(c);
}

void token_counts_clear(struct token_counts *c) {
    for (int i = 0; i < c->n_tokens; i++)
        c->marks[c->tokens[i]] = 0;
    c->n_tokens = 0;
}

void token_counts_copy(struct token_counts *dst, const struct token_counts *src) {
    token_counts_clear(dst);
    for (int i = 0; i < src->n_tokens; i++) {
        int32_t token = src->tokens[i];
        dst->tokens[i] = token;
        dst->marks[token] = src->marks[token];
    }
    dst->n_tokens = src->n_tokens;
}

static uint32_t *mark_of(struct token_counts *c, int32_t token) {
    if (!c->marks[token]) c->tokens[c->n_tokens++] = token;
    return &c->marks[token];
}

void token_counts_add_prompt(struct token_counts *c, int32_t token) {
    *mark_of(c, token) |= 1;
}
void token_counts_add_output(struct token_counts *c, int32_t token) {
    *mark_of(c, token) += 2;
}

/* ---- randomness ---- */

/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): key =
 * seed, counter = (index, choice, 0). */
double sampler_uniform(uint64_t seed, uint32_t choice, uint64_t index) {
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = choice, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53 * c0, p1 = (uint64_t)0xCD9E8D57 * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return (double)(((uint64_t)c0 << 32 | c1) >> 11) * 0x1p-53;
}

/* ---- selection ---- */

struct sampler {
    int vocab_size;
    float *logits;  /* [vocab_size] adjusted */
    float *weights; /* [vocab_size] exp((logit - highest) / temperature), by token */
    uint64_t *keys; /* [vocab_size] candidates */
    uint64_t *kept; /* [vocab_size / 64, rounded up] a bit per token; zero between calls */
};

enum err sampler_new(struct sampler **out, int vocab_size) {
    struct sampler *s = calloc(1, sizeof *s);
    if (!s) return ERR_NOMEM;
    s->vocab_size = vocab_size;
    s->logits = calloc((size_t)vocab_size, sizeof *s->logits);
    s->weights = calloc((size_t)vocab_size, sizeof *s->weights);
    s->keys = calloc((size_t)vocab_size, sizeof *s->keys);
    s->kept = calloc((size_t)vocab_size / 64 + 1, sizeof *s->kept);
    if (!s->logits || !s->weights || !s->keys || !s->kept) {
        sampler_free(s);
        return ERR_NOMEM;
    }
    *out = s;
    return OK;
}

void sampler_free(struct sampler *s) {
    if (!s) return;
    free(s->logits);
    free(s->weights);
    free(s->keys);
    free(s->kept);
    free(s);
}

/* Replaces what no arithmetic survives: NaN is never chosen, infinity is the highest number, and -0
 * is 0, so that keys tie as numbers do. */
static float sane(float x) {
    x += 0.0f;
    x = x > -INFINITY ? x : -INFINITY;
    return x < FLT_MAX ? x : FLT_MAX;
}

static void sane_copy(float *out, const float *logits, int n) {
    v16 least = v16_set1(-INFINITY), most = v16_set1(FLT_MAX), zero = v16_zero();
    int i = 0;
    for (; i + 16 <= n; i += 16)
        v16_store(out + i, v16_min(v16_max(v16_add(v16_load(logits + i), zero), least), most));
    for (; i < n; i++)
        out[i] = sane(logits[i]);
}

static float highest(const float *x, int n) {
    v16 m = v16_set1(-INFINITY);
    int i = 0;
    for (; i + 16 <= n; i += 16)
        m = v16_max(m, v16_load(x + i));
    float top = v16_hmax(m);
    for (; i < n; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

/* w[i] = exp((x[i] - top) / temperature); returns their sum: sixteen lanes are added in double, one
 * vector after the other. */
static double exponentials(float *w, const float *x, int n, float top, float temperature) {
    v16 tops = v16_set1(top), temperatures = v16_set1(temperature);
    double sum = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 e = v16_exp(v16_div(v16_sub(v16_load(x + i), tops), temperatures));
        v16_store(w + i, e);
        sum += (double)v16_sum(e);
    }
    v16 e = v16_exp(v16_div(v16_sub(v16_load_part(x + i, n - i), tops), temperatures));
    v16_store_part(w + i, e, n - i);
    return sum + (double)v16_sum(v16_load_part(w + i, n - i)); /* zeros behind the end */
}

static int32_t argmax(const float *x, int n) {
    float top = highest(x, n);
    for (int32_t i = 0; i < n; i++)
        if (x[i] == top) return i;
    return 0;
}

/* Greater keys are better tokens: the float's bits in an order that integers share, then the lower
 * id. */
static uint64_t key_of(float logit, int32_t token) {
    uint32_t bits;
    memcpy(&bits, &logit, sizeof bits);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~token;
}
static int32_t token_of(uint64_t key) {
    return (int32_t) ~(uint32_t)key;
}

static uint64_t middle(uint64_t a, uint64_t b, uint64_t c) {
    uint64_t low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c > high ? high : c;
}

/* Reorders keys so that the shortest prefix of the falling order whose mass reaches target comes
 * first, and returns its length (n when all together fall short).  Mass: weights by token, or 1
 * each when weights is NULL. */
static int select_prefix(uint64_t *keys, int n, const float *weights, double target) {
    int lo = 0, hi = n;
    double before = 0; /* mass of [0, lo), which is wholly inside */
    while (lo < hi) {
        uint64_t pivot = middle(keys[lo], keys[lo + (hi - lo) / 2], keys[hi - 1]);
        double mass = 0;
        int j = lo, at = lo;
        for (int i = lo; i < hi; i++) { /* better than the pivot to the front, without branches */
            uint64_t key = keys[i];
            bool better = key > pivot;
            keys[i] = keys[j];
            keys[j] = key;
            mass += better ? weights ? (double)weights[token_of(key)] : 1.0 : 0.0;
            j += better;
        }
        for (at = j; keys[at] != pivot; at++) {
        }
        keys[at] = keys[j];
        keys[j] = pivot;
        if (before + mass >= target) {
            hi = j;
            continue;
        }
        before += mass + (weights ? (double)weights[token_of(pivot)] : 1.0);
        lo = j + 1;
        if (before >= target) break;
    }
    return lo;
}

/* A logit that at least k tokens reach: the least of the highest of k disjoint groups. */
static float bound_of_top(const float *logits, int n, int k) {
    int group = n / k;
    if (group < 4) return -INFINITY;
    float bound = INFINITY;
    for (int i = 0; i < k; i++) {
        float top = highest(logits + (size_t)i * group, group);
        bound = top < bound ? top : bound;
    }
    return bound;
}

/* Tokens of at least this value in keys; value is logits or weights.  Returns how many. */
static int gather(uint64_t *keys, const float *logits, const float *value, float least, int n) {
    int kept = 0;
    for (int32_t i = 0; i < n; i++) {
        keys[kept] = key_of(logits[i], i);
        kept += value[i] >= least;
    }
    return kept;
}

/* The k best tokens' keys first, in no order; k <= vocab_size. */
static void select_top(struct sampler *s, const float *logits, int k) {
    int n = gather(s->keys, logits, logits, bound_of_top(logits, s->vocab_size, k), s->vocab_size);
    select_prefix(s->keys, n, NULL, k);
}

/* Puts the n keys in order of token id (what they say of the logits is lost); returns the sum of
 * their weights in that order. */
static double order_by_token(struct sampler *s, int n) {
    for (int i = 0; i < n; i++) {
        int32_t token = token_of(s->keys[i]);
        s->kept[token / 64] |= (uint64_t)1 << token % 64;
    }
    double sum = 0;
    int out = 0;
    for (int32_t word = 0; out < n; word++) {
        uint64_t bits = s->kept[word];
        if (!bits) continue;
        s->kept[word] = 0;
        for (; bits; bits &= bits - 1) {
            int32_t token = word * 64 + __builtin_ctzll(bits);
            sum += (double)s->weights[token];
            s->keys[out++] = (uint32_t)~token;
        }
    }
    return sum;
}

/* ---- sampling ---- */

static void adjust(float *logits, const struct sampling *how, const struct token_counts *counts) {
    for (int i = 0; i < how->n_bias; i++) {
        float *x = &logits[how->bias[i].token];
        *x = sane(*x + how->bias[i].bias);
    }
    bool penalised =
        how->repetition_penalty != 1 || how->presence_penalty != 0 || how->frequency_penalty != 0;
    for (int i = 0; penalised && counts && i < counts->n_tokens; i++) {
        int32_t token = counts->tokens[i];
        uint32_t n = counts->marks[token] >> 1;
        float x = logits[token];
        x = x > 0 ? x / how->repetition_penalty : x * how->repetition_penalty;
        x = fmaf(-how->frequency_penalty, (float)n, x); /* the same bits on every machine */
        x -= n ? how->presence_penalty : 0;
        logits[token] = sane(x);
    }
}

static double mass(const struct sampler *s, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)s->weights[token_of(s->keys[i])];
    return sum;
}

/* Draws from the n tokens in keys, in order of id, each as likely as its weight. */
static int32_t draw(const struct sampler *s, int n, double total, double u) {
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += (double)s->weights[token_of(s->keys[i])];
        if (sum > u * total) return token_of(s->keys[i]);
    }
    return -1;
}

int32_t sample(struct sampler *s, const float *logits, const struct sampling *how,
               const struct token_counts *counts, const int32_t *banned, int n_banned, int choice,
               int64_t index) {
    int n_vocab = s->vocab_size;
    float *x = s->logits, *w = s->weights;
    sane_copy(x, logits, n_vocab);
    adjust(x, how, counts);
    for (int i = 0; i < n_banned; i++)
        x[banned[i]] = -INFINITY;
    float top = highest(x, n_vocab);
    if (how->temperature == 0 || top == -INFINITY) return argmax(x, n_vocab);

    int n;
    double total = 0;
    bool has_top_k = how->top_k > 0 && how->top_k < n_vocab;
    bool selected = has_top_k || how->top_p < 1; /* else the keys stay in order of id */
    if (has_top_k) {                             /* weights of the k only */
        n = how->top_k;
        select_top(s, x, n);
        for (int i = 0; i < n; i++) {
            int32_t token = token_of(s->keys[i]);
            w[token] = expf((x[token] - top) / how->temperature);
            total += (double)w[token];
        }
    } else {
        total = exponentials(w, x, n_vocab, top, how->temperature);
        /* Tokens below (1 - top_p) total / n_vocab sum to less than what top_p drops, so top_p
         * drops them all; and one ulp is left for the rounding of this bound. */
        double least = (1 - (double)how->top_p) * total / n_vocab * (1 - 0x1p-20);
        n = gather(s->keys, x, w, (float)fmax(least, (double)how->min_p), n_vocab);
    }
    if (how->top_p < 1) {
        double target = fmax((double)how->top_p * total, DBL_MIN); /* at least one token */
        n = select_prefix(s->keys, n, w, target);
    }
    if (how->min_p > 0) { /* the best token's weight is 1 */
        int kept = 0;
        for (int i = 0; i < n; i++)
            if (w[token_of(s->keys[i])] >= how->min_p) s->keys[kept++] = s->keys[i];
        n = kept;
    }
    total = selected ? order_by_token(s, n) : mass(s, n);
    int32_t token =
        draw(s, n, total, sampler_uniform(how->seed, (uint32_t)choice, (uint64_t)index));
    return token >= 0 ? token : argmax(x, n_vocab);
}

/* ---- log-probabilities ---- */

static int descending(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x < y) - (x > y);
}

float sampler_logprobs(struct sampler *s, const float *logits, int32_t token,
                       struct token_logprob *top, int n_top) {
    float *x = s->logits;
    sane_copy(x, logits, s->vocab_size);
    float best = highest(x, s->vocab_size);
    if (best == -INFINITY) best = 0; /* no token has a probability: all get -inf */
    double sum = exponentials(s->weights, x, s->vocab_size, best, 1);
    double log_sum = sum > 0 ? log(sum) : 0;
    if (n_top > s->vocab_size) n_top = s->vocab_size;
    if (n_top > 0) {
        select_top(s, x, n_top);
        qsort(s->keys, (size_t)n_top, sizeof *s->keys, descending);
    }
    for (int i = 0; i < n_top; i++) {
        int32_t id = token_of(s->keys[i]);
        top[i] = (struct token_logprob){id, (float)((double)x[id] - best - log_sum)};
    }
    return (float)((double)x[token] - best - log_sum);
}
