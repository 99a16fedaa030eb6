/* kernels.h - the arithmetic of attention: one table of functions per instruction family, all from
 * kernels.c.
 *
 * Everything dense is one product,  y[r][:] (+)= sum_i a[r][i] b[i][:],  with lanes across the
 * columns of b and i ascending, one fused multiply-add each.  So an element's bits do not depend on
 * how many rows are done at once:
 *
 *   scores         q . k of 16 keys     a = q,           b = a tile of keys [D][16]
 *   exact part     sum_j p_j v_j        a = weights,     b = values [entries][D]
 *   projection     u = x W              a = x,           b = W [D][f]
 *   linear part    S^T phi_q            a = phi_q,       b = S [F][D]
 *   fold           S += phi_k v^T       a = phi_k^T,     b = values
 *
 * Rows that end in pad lanes (up to a multiple of 16) hold zeros there.
 *
 * Keys lie in tiles of 16: element d of entry e is at tile e / 16, [d][e % 16]; values lie in rows
 * of shape.lanes. */
#ifndef URCHIN_ATTENTION_KERNELS_H
#define URCHIN_ATTENTION_KERNELS_H

#include "attention/attention.h"
#include "compute/ahead.h"

enum { TILE = 16 };        /* keys of a tile, and lanes of a vector */
enum { MAX_QUERIES = 16 }; /* (row, head) pairs answered together */
enum { MAX_SPANS = 4 };    /* sinks, cache, two halves of the ring */

static inline int round_up(int n, int to) {
    return (n + to - 1) / to * to;
}

/* Feature maps have F = 2 f features today; a map with another number says so here. */
static inline int feature_dim(enum feature_map map, int f) {
    (void)map;
    return 2 * f;
}

struct shape {
    int head_dim, lanes;     /* D; rounded up to 16: the length of a row of values or of S */
    int f, f_lanes;          /* projections; rounded up */
    int features, phi_lanes; /* F; rounded up: the length of z and of a row of features */
    enum feature_map map;
    enum mixing mixing;
    enum kv_type kv_type;
    bool map_before_rope;
};

struct span { /* entries first .. first + count - 1 */
    int first, count;
};

/* Rows of consecutive positions of one sequence, for some query heads of one kv head. */
struct question {
    int n_rows, n_heads; /* n_rows * n_heads <= MAX_QUERIES */
    const float *q;      /* row r, head h at q + r * q_row + h * D; before RoPE */
    size_t q_row;
    const float *cosines, *sines; /* [n_rows][D / 2] of the rows' positions; NULL: no RoPE */
    const float *far_cosines, *far_sines; /* [D / 2] of max_distance, when n_clamped > 0 */

    const void *keys, *values;    /* exact entries */
    struct span spans[MAX_SPANS]; /* what row 0 sees, ascending */
    int n_spans, growing;         /* row r sees r more entries of spans[growing] */
    int n_clamped;                /* the first so many entries count as max_distance behind */

    bool linear;             /* the state holds keys */
    const float *S, *z;      /* of the first head; the next head's state_stride floats on */
    size_t state_stride;     /* 0: all heads read one state */
    const float *map, *bias; /* [n_heads][D][f_lanes], [n_heads][f_lanes] or NULL */
    const float *mix;        /* [n_heads] c_h or omega_h */
    float linear_off;        /* added to the log of every linear weight: 0, or -60 as an ablation */

    float *y; /* row r, head h at y + r * y_row + h * D */
    size_t y_row;

    struct ahead ahead; /* another question's: a product asks for some beside each of its own steps */
};

/* Where a thread writes between loads: for one question. */
struct answer_scratch {
    float *turned, *far; /* [MAX_QUERIES][D]: q rotated to its position, and to max_distance */
    float *scores;       /* [MAX_QUERIES][entries rounded up to tiles] */
    float *u, *phi, *y;  /* [MAX_QUERIES][f_lanes], [..][phi_lanes], [..][lanes] */
};

struct attention_kernels {
    /* y of every row and head of a question. */
    void (*answer)(const struct shape *shape, const struct question *question,
                   const struct answer_scratch *scratch);

    /* phi_k of n keys x [n][D] -> phi [n][phi_lanes]; map [D][f_lanes], bias [f_lanes] or NULL; u
     * [f_lanes] scratch. */
    void (*key_features)(const struct shape *shape, float *phi, const float *x, int n,
                         const float *map, const float *bias, float *u);

    /* S += sum_j phi_j v_j^T and z += sum_j phi_j, j ascending; v [n][lanes]. */
    void (*fold)(const struct shape *shape, float *S, float *z, const float *phi, const float *v,
                 int n);

    void (*scale)(float *x, size_t n, float factor); /* n a multiple of 16 */

    /* error[j] += || (S^T phi_j) / (z . phi_j) - v_j ||^2; recalled [n][lanes] scratch. */
    void (*self_recall)(const struct shape *shape, float *error, float *recalled, const float *S,
                        const float *z, const float *phi, const float *v, int n);

    /* Keeps `count` more: the largest scores (>= 0) of those not kept yet, of equals the earlier.
     * Overwrites the scores of those that were. */
    void (*keep_largest)(bool *keep, double *score, int n, int count);

    /* The product itself, for who trains maps: y[r][0 .. 16 n_vecs) (+)= sum_{i < n} a[r a_row + i a_step] b[i b_row ..],
     * i ascending, one fused multiply-add each.  y and b in rows of y_row and b_row floats. */
    void (*product)(float *y, size_t y_row, bool add, const float *a, size_t a_row, size_t a_step,
                    int n_rows, const float *b, size_t b_row, int n, int n_vecs);

    void (*rotate)(float *y, const float *x, const float *cosines, const float *sines,
                   int head_dim);

    /* One entry in its stored type: keys by column of their tile, values by row (pad lanes zero).
     */
    void (*write_key)(const struct shape *shape, void *keys, int entry, const float *x);
    void (*read_key)(const struct shape *shape, float *x, const void *keys, int entry);
    void (*write_value)(const struct shape *shape, void *values, int entry, const float *v);
    void (*read_value)(const struct shape *shape, float *v, const void *values, int entry);

    /* Entry first + i becomes what entry from[i] was, i < n; from ascends, from[i] >= first + i. */
    void (*move_keys)(const struct shape *shape, void *keys, int first, const int *from, int n);
};

const struct attention_kernels *attention_kernels_chosen(void); /* by cpu_isa() */

extern const struct attention_kernels attention_kernels_generic;
#if defined(__x86_64__)
extern const struct attention_kernels attention_kernels_avx2, attention_kernels_avx512;
#elif defined(__aarch64__)
extern const struct attention_kernels attention_kernels_dotprod;
#endif

#endif
