/* matrix.c - packing weights, preparing activations, and splitting matmul over the team. */
#include "compute/matrix.h"

#include "compute/cpu.h"
#include "compute/kernels.h"
#include "compute/memory.h"
#include "compute/ops.h"
#include <assert.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

struct matrix {
    enum weight_type type;
    int n_out, n_in, n_panels, n_blocks;
    size_t panel_bytes, bytes;
    unsigned char *data; /* owned: [n_panels][panel_bytes], layout in kernels.h */
};

enum { FP8_UNIT = 16 }; /* cuBLASLt wants whole 16 bytes */

static_assert((int)MATRIX_BLOCK == (int)BLOCK, "matrix_get_block() tells whole blocks");

static size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

const char *weight_type_name(enum weight_type type) {
    switch (type) {
    case WEIGHT_FP32:
        return "fp32";
    case WEIGHT_BF16:
        return "bf16";
    case WEIGHT_INT8:
        return "int8";
    case WEIGHT_INT4:
        return "int4";
    case WEIGHT_FP8:
        return "fp8";
    }
    return "unknown";
}

/* ---- packing ---- */

enum err matrix_new(struct matrix **out, enum weight_type type, int n_out, int n_in) {
    if (n_out < 1 || n_in < 1 || n_out > INT_MAX - PANEL || n_in > INT_MAX - BLOCK) return ERR_ARG;
    if (type == WEIGHT_FP8 && (n_out % FP8_UNIT || n_in % FP8_UNIT)) return ERR_ARG;
    struct matrix *w = calloc(1, sizeof *w);
    if (!w) return ERR_NOMEM;
    w->type = type;
    w->n_out = n_out;
    w->n_in = n_in;
    w->n_panels = (n_out + PANEL - 1) / PANEL;
    w->n_blocks = (n_in + BLOCK - 1) / BLOCK;
    switch (type) {
    case WEIGHT_FP32:
        w->panel_bytes = (size_t)n_in * PANEL * sizeof(float);
        break;
    case WEIGHT_BF16:
        w->panel_bytes = (size_t)w->n_blocks * BLOCK * PANEL * sizeof(uint16_t);
        break;
    case WEIGHT_INT8:
        w->panel_bytes = (size_t)w->n_blocks * INT8_BLOCK_BYTES;
        break;
    case WEIGHT_INT4:
        w->panel_bytes = (size_t)w->n_blocks * INT4_BLOCK_BYTES;
        break;
    case WEIGHT_FP8: /* rows one behind the other, then their scales */
        w->panel_bytes = PANEL * ((size_t)n_in + sizeof(float));
        break;
    }
    w->bytes = w->panel_bytes * (size_t)w->n_panels;
    w->data = memory_map(w->bytes);
    if (!w->data) {
        free(w);
        return ERR_NOMEM;
    }
    *out = w;
    return OK;
}

void matrix_free(struct matrix *w) {
    if (!w) return;
    memory_unmap(w->data, w->bytes);
    free(w);
}

int matrix_n_out(const struct matrix *w) {
    return w->n_out;
}
int matrix_n_in(const struct matrix *w) {
    return w->n_in;
}
enum weight_type matrix_type(const struct matrix *w) {
    return w->type;
}
size_t matrix_bytes(const struct matrix *w) {
    return w->bytes;
}

static float clamp_fp16(float x) {
    return x < -65504 ? -65504 : x > 65504 ? 65504 : x;
}

static int round_clamped(float x, int lo, int hi) {
    return x <= (float)lo ? lo : x >= (float)hi ? hi : (int)lrintf(x);
}

/* One block of one column: w ~= s q with q in [-127, 127]; a block with an infinity or NaN gets s =
 * NaN. */
static uint16_t int8_quantise(int8_t q[BLOCK], const float *w, int n) {
    float absmax = 0;
    for (int k = 0; k < n; k++) {
        if (!isfinite(w[k])) absmax = NAN;
        if (fabsf(w[k]) > absmax) absmax = fabsf(w[k]);
    }
    memset(q, 0, BLOCK);
    if (isnan(absmax)) return fp16_round(absmax);
    uint16_t scale = fp16_round(clamp_fp16(absmax / 127));
    float s = fp16_float(scale);
    for (int k = 0; s > 0 && k < n; k++)
        q[k] = (int8_t)round_clamped(w[k] / s, -127, 127);
    return scale;
}

struct int4_grid { /* w = s q + m */
    uint16_t s, m;
};

/* q of every w and whether s q + m gives back every w exactly. */
static bool int4_quantise_with(uint8_t q[BLOCK], struct int4_grid grid, const float *w, int n,
                               bool must_be_exact) {
    float s = fp16_float(grid.s), m = fp16_float(grid.m);
    bool exact = true;
    for (int k = 0; k < n; k++) {
        q[k] = (uint8_t)(s == 0 ? 0 : round_clamped((w[k] - m) / s, 0, 15));
        if (s * (float)q[k] + m != w[k]) exact = false;
        if (must_be_exact && !exact) return false;
    }
    return exact;
}

/* Values that came from a 4-bit file lie on a grid s q + m with fp16 s and m; they are found again
 * exactly even when the block does not use the whole range of q, so that Q4_0 and Q4_1 lose
 * nothing.  Q4_0 is s (q - 8) with s of either sign and q = 0 at one end of the block. */
static struct int4_grid int4_quantise(uint8_t q[BLOCK], const float *w, int n) {
    float lo = w[0], hi = w[0];
    memset(q, 0, BLOCK);
    for (int k = 0; k < n; k++) {
        if (!isfinite(w[k])) return (struct int4_grid){fp16_round(NAN), fp16_round(NAN)};
        if (w[k] < lo) lo = w[k];
        if (w[k] > hi) hi = w[k];
    }
    uint16_t lo16 = fp16_round(lo), hi16 = fp16_round(hi);
    bool from_lo = fp16_float(lo16) == lo, from_hi = fp16_float(hi16) == hi;
    for (int steps = 15; steps > 0 && (from_lo || from_hi); steps--) {
        uint16_t s = fp16_round(clamp_fp16((hi - lo) / (float)steps));
        struct int4_grid up = {s, lo16}, down = {s ^ 0x8000, hi16};
        if (from_lo && int4_quantise_with(q, up, w, n, true)) return up;
        if (from_hi && int4_quantise_with(q, down, w, n, true)) return down;
    }
    struct int4_grid grid = {fp16_round(clamp_fp16((hi - lo) / 15)), fp16_round(clamp_fp16(lo))};
    int4_quantise_with(q, grid, w, n, false);
    return grid;
}

/* Where k of a column is in a panel of bf16. */
static size_t bf16_at(int k, int column) {
    return (size_t)(k / 2) * PANEL * 2 + (size_t)column * 2 + (size_t)(k % 2);
}

/* A row with an infinity or NaN gets s = NaN. */
static float fp8_quantise(uint8_t *q, const float *w, int n) {
    float absmax = 0;
    for (int k = 0; k < n; k++) {
        if (!isfinite(w[k])) absmax = NAN;
        if (fabsf(w[k]) > absmax) absmax = fabsf(w[k]);
    }
    float s = absmax / 448;
    for (int k = 0; k < n; k++)
        q[k] = s > 0 ? e4m3_round(w[k] / s) : 0;
    return s;
}

static void set_row(struct matrix *m, int n, const float *w) {
    unsigned char *panel = m->data + (size_t)(n / PANEL) * m->panel_bytes;
    int column = n % PANEL;
    switch (m->type) {
    case WEIGHT_FP32:
        for (int k = 0; k < m->n_in; k++)
            ((float *)panel)[(size_t)k * PANEL + (size_t)column] = w[k];
        break;
    case WEIGHT_BF16:
        for (int k = 0; k < m->n_in; k++)
            ((uint16_t *)panel)[bf16_at(k, column)] = bf16_round(w[k]);
        break;
    case WEIGHT_INT8:
        for (int b = 0; b < m->n_blocks; b++, panel += INT8_BLOCK_BYTES) {
            int left = m->n_in - b * BLOCK;
            int8_t q[BLOCK];
            uint16_t s = int8_quantise(q, w + b * BLOCK, left < BLOCK ? left : BLOCK);
            for (int k = 0; k < BLOCK; k++)
                panel[k / 4 * PANEL * 4 + column * 4 + k % 4] = (unsigned char)(q[k] + 128);
            ((uint16_t *)(panel + INT8_BLOCK_SCALES))[column] = s;
        }
        break;
    case WEIGHT_INT4:
        for (int b = 0; b < m->n_blocks; b++, panel += INT4_BLOCK_BYTES) {
            int left = m->n_in - b * BLOCK;
            uint8_t q[BLOCK];
            struct int4_grid g = int4_quantise(q, w + b * BLOCK, left < BLOCK ? left : BLOCK);
            for (int k = 0; k < BLOCK / 2; k++)
                panel[k / 4 * PANEL * 4 + column * 4 + k % 4] =
                    (unsigned char)(q[k] | q[k + 16] << 4);
            ((uint16_t *)(panel + INT4_BLOCK_SCALES))[column] = g.s;
            ((uint16_t *)(panel + INT4_BLOCK_SCALES))[PANEL + column] = g.m;
        }
        break;
    case WEIGHT_FP8:
        ((float *)(panel + PANEL * (size_t)m->n_in))[column] =
            fp8_quantise(panel + (size_t)column * (size_t)m->n_in, w, m->n_in);
        break;
    }
}

void matrix_set_rows(struct matrix *m, int first, int n_rows, const float *w) {
    assert(first >= 0 && n_rows >= 0 && n_rows <= m->n_out - first);
    for (int i = 0; i < n_rows; i++)
        set_row(m, first + i, w + (size_t)i * (size_t)m->n_in);
}

void matrix_get_block(const struct matrix *m, int n, int b, struct matrix_block *out) {
    assert(n >= 0 && n < m->n_out && b >= 0 && b < m->n_blocks);
    const unsigned char *panel = m->data + (size_t)(n / PANEL) * m->panel_bytes;
    int column = n % PANEL;
    if (m->type == WEIGHT_INT8) {
        const unsigned char *block = panel + (size_t)b * INT8_BLOCK_BYTES;
        for (int group = 0; group < BLOCK / 4; group++) {
            uint32_t four;
            memcpy(&four, block + group * PANEL * 4 + column * 4, 4);
            four ^= 0x80808080u; /* takes 128 from each */
            memcpy(out->q + 4 * group, &four, 4);
        }
        out->s = ((const uint16_t *)(block + INT8_BLOCK_SCALES))[column];
        out->m = 0;
    } else {
        assert(m->type == WEIGHT_INT4);
        const unsigned char *block = panel + (size_t)b * INT4_BLOCK_BYTES;
        for (int group = 0; group < BLOCK / 8; group++) {
            uint32_t both;
            memcpy(&both, block + group * PANEL * 4 + column * 4, 4);
            uint32_t low = both & 0x0f0f0f0fu, high = both >> 4 & 0x0f0f0f0fu;
            memcpy(out->q + 4 * group, &low, 4);
            memcpy(out->q + 16 + 4 * group, &high, 4);
        }
        out->s = ((const uint16_t *)(block + INT4_BLOCK_SCALES))[column];
        out->m = ((const uint16_t *)(block + INT4_BLOCK_SCALES))[PANEL + column];
    }
}

const uint8_t *matrix_get_fp8(const struct matrix *m, int n, float *s) {
    assert(m->type == WEIGHT_FP8 && n >= 0 && n < m->n_out);
    const unsigned char *panel = m->data + (size_t)(n / PANEL) * m->panel_bytes;
    *s = ((const float *)(panel + PANEL * (size_t)m->n_in))[n % PANEL];
    return panel + (size_t)(n % PANEL) * (size_t)m->n_in;
}

static void get_fp8(const struct matrix *m, int n, float *out) {
    float s;
    const uint8_t *q = matrix_get_fp8(m, n, &s);
    for (int k = 0; k < m->n_in; k++)
        out[k] = s * e4m3_float(q[k]);
}

static void get_blocks(const struct matrix *m, int n, float *out) {
    for (int b = 0; b < m->n_blocks; b++) {
        struct matrix_block block;
        matrix_get_block(m, n, b, &block);
        float scale = fp16_float(block.s), minimum = fp16_float(block.m);
        for (int i = 0; i < BLOCK && b * BLOCK + i < m->n_in; i++)
            out[b * BLOCK + i] = m->type == WEIGHT_INT8 ? scale * (float)block.q[i]
                                                        : scale * (float)block.q[i] + minimum;
    }
}

void matrix_get_row(const struct matrix *m, int n, float *out) {
    assert(n >= 0 && n < m->n_out);
    const unsigned char *panel = m->data + (size_t)(n / PANEL) * m->panel_bytes;
    int column = n % PANEL;
    switch (m->type) {
    case WEIGHT_FP32:
        for (int k = 0; k < m->n_in; k++)
            out[k] = ((const float *)panel)[(size_t)k * PANEL + (size_t)column];
        break;
    case WEIGHT_BF16:
        for (int k = 0; k < m->n_in; k++)
            out[k] = bf16_float(((const uint16_t *)panel)[bf16_at(k, column)]);
        break;
    case WEIGHT_INT8:
    case WEIGHT_INT4:
        get_blocks(m, n, out);
        break;
    case WEIGHT_FP8:
        get_fp8(m, n, out);
        break;
    }
}

/* ---- matmul ---- */

struct matmul_scratch {
    int max_rows, max_n_in;
    struct quantised_rows rows; /* q owned; the others are in the same block */
    uint16_t *parts;            /* the same block, for bf16; NULL: the kernels split no rows */
    size_t bytes;
};

enum err matmul_scratch_new(struct matmul_scratch **out, int max_rows, int max_n_in) {
    if (max_rows < 1 || max_n_in < 1 || max_n_in > INT_MAX - BLOCK) return ERR_ARG;
    size_t row_blocks = ((size_t)max_n_in + BLOCK - 1) / BLOCK;
    size_t blocks = (size_t)max_rows * row_blocks;
    struct matmul_scratch *s = calloc(1, sizeof *s);
    if (!s) return ERR_NOMEM;
    size_t q = round_up(blocks * BLOCK, 64), each = round_up(blocks * sizeof(float), 64);
    s->max_rows = max_rows;
    s->max_n_in = max_n_in;
    s->bytes = q + 3 * each;
    const bool splits = compute_kernels()->split_row != NULL;
    size_t parts =
        (blocks + (SPLIT_GROUP - 1) * row_blocks) * BLOCK * SPLIT_PARTS * sizeof(uint16_t);
    if (splits && s->bytes < parts) s->bytes = parts;
    unsigned char *p = memory_map(s->bytes);
    if (!p) {
        free(s);
        return ERR_NOMEM;
    }
    if (splits) s->parts = (uint16_t *)p;
    s->rows.q = (int8_t *)p;
    s->rows.scale = (float *)(p + q);
    s->rows.offset = (int32_t *)(p + q + each);
    s->rows.scaled_sum = (float *)(p + q + 2 * each);
    *out = s;
    return OK;
}

void matmul_scratch_free(struct matmul_scratch *s) {
    if (!s) return;
    memory_unmap(s->rows.q, s->bytes);
    free(s);
}

/* Below these a second thread costs more than it saves (a fork and join takes about 0.5 us). */
enum {
    PREPARE_ALONE = 16 << 10,   /* values */
    MULTIPLY_ALONE = 256 << 10, /* multiplications */
};

enum {
    EXPECT_ROWS = 8,          /* with more, products compute for longer than they read */
    EXPECT_BYTES = 256 << 10, /* of a thread: a part of its second-level cache */
};

struct job {
    const struct compute_kernels *kernels;
    struct matmul_args args;
    enum weight_type type;
    int n_panels;
    uint16_t *parts; /* or NULL: rows are quantised */
};

/* Thread t of n gets [t total / n, (t + 1) total / n). */
static int share(int total, int thread, int n_threads) {
    return (int)((int64_t)total * thread / n_threads);
}

static void prepare_rows(void *arg, int thread, int n_threads) {
    const struct job *job = arg;
    const struct matmul_args *a = &job->args;
    int end = share(a->n_rows, thread + 1, n_threads);
    for (int row = share(a->n_rows, thread, n_threads); row < end; row++) {
        const float *x = a->x + (size_t)row * a->x_stride;
        if (job->parts)
            job->kernels->split_row(job->parts, row, x, a->n_in);
        else
            job->kernels->quantise_row(&a->xq, row, x, a->n_in);
    }
}

static void multiply(void *arg, int thread, int n_threads) {
    const struct job *job = arg;
    int first = share(job->n_panels, thread, n_threads);
    int end = share(job->n_panels, thread + 1, n_threads);
    job->kernels->matmul[job->type](&job->args, first, end);
}

static struct ahead first_panels(const void *arg, int thread, int n_threads) {
    const struct matrix *w = arg;
    int first = share(w->n_panels, thread, n_threads);
    size_t bytes = (size_t)(share(w->n_panels, thread + 1, n_threads) - first) * w->panel_bytes;
    const char *at = (const char *)w->data + (size_t)first * w->panel_bytes;
    return (struct ahead){{{at, at + (bytes < EXPECT_BYTES ? bytes : EXPECT_BYTES)}}, 1};
}

void matrix_expect(struct team *team, const struct matrix *w, int n_rows) {
    team_expect(team, w && n_rows <= EXPECT_ROWS ? first_panels : NULL, w);
}

void matmul(struct team *team, struct matmul_scratch *scratch, float *y, size_t y_stride,
            const float *x, size_t x_stride, int n_rows, const struct matrix *w,
            const float *bias) {
    if (n_rows == 0) return;
    assert(n_rows > 0 && n_rows <= scratch->max_rows && w->n_in <= scratch->max_n_in);
    assert(w->type != WEIGHT_FP8);
    struct job job = {
        .kernels = compute_kernels(),
        .type = w->type,
        .n_panels = w->n_panels,
        .args = {.y = y,
                 .y_stride = y_stride,
                 .x = x,
                 .x_stride = x_stride,
                 .xq = scratch->rows,
                 .n_rows = n_rows,
                 .n_in = w->n_in,
                 .n_out = w->n_out,
                 .n_blocks = w->n_blocks,
                 .w = w->data,
                 .panel_bytes = w->panel_bytes,
                 .bias = bias,
                 .streams = cpu_streams()},
    };
    int64_t values = (int64_t)n_rows * w->n_in;
    const bool split = w->type == WEIGHT_BF16 && job.kernels->split_row;
    assert(!split || scratch->parts);
    if (split) job.args.x_parts = job.parts = scratch->parts;
    if (w->type == WEIGHT_INT8 || w->type == WEIGHT_INT4 || split) {
        if (values <= PREPARE_ALONE)
            prepare_rows(&job, 0, 1);
        else
            team_run(team, prepare_rows, &job);
    }
    if (values * w->n_out <= MULTIPLY_ALONE)
        multiply(&job, 0, 1);
    else
        team_run(team, multiply, &job);
}
