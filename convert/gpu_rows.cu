/* gpu_rows.cu - query rows beside their teacher's: weights, divergence, derivatives.  The equations
 * are kernels.h's (struct row_weights) and student.h's.
 *
 *   shapes  p, s, a, ev [layers][query heads][rows][columns], results [..][rows][GPU_RESULTS]
 *   launch  weigh, grade: a block of 128 threads a row (grid: rows, heads, layers); errors: a warp
 * a row; count: a thread a sum bound   bytes: weigh reads and writes 16 a key of each row (in three
 * passes, of which the first cache serves two), grade 12 or 16; and 6 exponentials and logarithms a
 * key.  SmolLM2, 1,024 tokens, 80 rows of 270 heads: 360 MB and 130 million of them, 0.2 ms twins
 * convert_kernels.weigh and grade; answer(), count() and clamped_sinks() of student.c
 *
 * A block's threads take keys thread, thread + 128, ... and add in block_all<add>()'s order, so a row's
 * bits depend on the row alone; rows are added one after the other, in double. */
#include "convert/gpu_kernels.h"

#include "compute/cuda.h"

extern "C" {
#include "attention/attention.h"
}

enum { THREADS = 128, ROW_WARPS = THREADS / 32 };

static const float LEAST = 1e-30f; /* a weight below it counts as that: its log is wanted */

/* ---- sums over a block: every thread gets the same bits ---- */

struct add {
    DEVICE float of(float a, float b) { return a + b; }
    DEVICE float warp(float x) { return warp_sum(x); }
};
struct largest {
    DEVICE float of(float a, float b) { return fmaxf(a, b); }
    DEVICE float warp(float x) { return warp_max(x); }
};

/* shared [N][ROW_WARPS], of which no other use may be under way. */
template <typename OP, int N> DEVICE void block_all(float (&x)[N], float *shared) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = OP::warp(x[i]);
        if (lane == 0) shared[i * ROW_WARPS + warp] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = shared[i * ROW_WARPS];
#pragma unroll
        for (int w = 1; w < ROW_WARPS; w++)
            x[i] = OP::of(x[i], shared[i * ROW_WARPS + w]);
    }
}

/* ---- a row ---- */

struct row_place {
    size_t at, columns; /* number of the row; of its key 0, in p, s and a */
    int row, head, layer;
    int first, position;     /* its document's first token; its place in it */
    int n_keys, sinks, from; /* struct row_weights */
    int span_from, span_end; /* keys, from key 0 on, that products of its tile read */
};

/* lesson_linear_keys() of student.c. */
DEVICE row_place place_of(const gpu_rows_args &r) {
    row_place p;
    p.row = (int)blockIdx.x;
    p.head = (int)blockIdx.y;
    p.layer = (int)blockIdx.z;
    p.at = ((size_t)p.layer * r.n_heads + p.head) * r.n_rows + p.row;
    p.first = r.first[p.row];
    p.position = r.position[p.row];
    p.columns = p.at * r.columns + p.first;
    p.n_keys = p.position + 1;
    p.from = p.n_keys;
    if (r.window == WINDOW_SLIDING) p.from = p.n_keys - r.window_size;
    if (r.window == WINDOW_TERRACED) p.from = (p.position / r.window_size - 1) * r.window_size;
    if (p.from < 0) p.from = 0;
    p.sinks = p.from < r.sinks ? p.from : r.sinks;
    const int *span = r.spans + 2 * (p.row / GPU_ROW_TILE);
    p.span_from = span[0] - p.first;
    p.span_end = (span[1] < r.n_tokens ? span[1] : r.n_tokens) - p.first;
    return p;
}

/* q . k of a sink that counts as max_distance behind: q turned so far, k not turned; by a warp. */
DEVICE float far_product(const gpu_rows_args &r, const row_place &p, int sink, int lane) {
    const int D = r.head_dim, half = D / 2;
    const float *q = r.q + (size_t)p.layer * r.q_layer + (size_t)p.row * r.q_row +
                     (size_t)p.head * D;
    const float *k = r.k + (size_t)p.layer * r.k_layer + (size_t)(p.first + sink) * r.k_row +
                     (size_t)(p.head / (r.n_heads / r.n_kv_heads)) * D;
    float sum = 0;
    for (int d = lane; d < half; d += 32) {
        const float a = q[d], b = q[half + d], c = r.far_cosines[d], s = r.far_sines[d];
        sum = fmaf(a * c - b * s, k[d], sum);
        sum = fmaf(b * c + a * s, k[half + d], sum);
    }
    return warp_sum(sum);
}

/* The pupil's logits of the sinks into shared [sinks]. */
DEVICE void sink_logits(const gpu_rows_args &r, const row_place &p, const float *scores,
                        float scale, float *out) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int from =
        r.window == WINDOW_TERRACED ? p.position / r.window_size * r.window_size : p.position;
    for (int j = warp; j < p.sinks; j += ROW_WARPS) {
        const bool far = r.max_distance && from - j > r.max_distance; /* the warp's lanes alike */
        const float product = far ? far_product(r, p, j, lane) : scores[j];
        if (lane == 0) out[j] = product * scale;
    }
    __syncthreads();
}

static __global__ void __launch_bounds__(THREADS) weigh(const gpu_rows_args r) {
    DYNAMIC_SHARED(float, shared); /* of sums, then of the largest, then of sums; then the sinks */
    float *const lanes[3] = {shared, shared + 6 * ROW_WARPS, shared + 9 * ROW_WARPS},
                 *const sinks = shared + 15 * ROW_WARPS;
    const row_place at = place_of(r);
    float *const p = r.p + at.columns, *const a = r.a + at.columns;
    const float *const s = r.s + at.columns;
    const float scale = 1 / sqrtf((float)r.head_dim),
                mix = r.mix[(size_t)at.layer * r.mix_layer + at.head], reach = r.reach[at.at];
    const int thread = (int)threadIdx.x;
    const bool exact = at.sinks || at.from<at.n_keys, linear = at.from> at.sinks;
    auto is_linear = [&](int j) { return j >= at.sinks && j < at.from; };
    sink_logits(r, at, p, scale, sinks);
    auto own = [&](int j, float l) {
        return j < at.sinks ? sinks[j] : l;
    }; /* as the pupil has it */

    float most[2] = {-INFINITY, -INFINITY}; /* of the teacher's logits, of the pupil's exact ones */
    for (int j = thread; j < at.n_keys; j += THREADS) {
        const float l = p[j] * scale;
        most[0] = fmaxf(most[0], l);
        if (!is_linear(j)) most[1] = fmaxf(most[1], own(j, l));
    }
    block_all<largest>(most, lanes[1]);
    float totals[3] = {}; /* of exp(l - most), of the exact ones' likewise, of s */
    for (int j = thread; j < at.n_keys; j += THREADS) {
        const float l = p[j] * scale;
        totals[0] += expf(l - most[0]);
        if (is_linear(j))
            totals[2] += s[j];
        else
            totals[1] += expf(own(j, l) - most[1]);
    }
    block_all<add>(totals, lanes[0]);
    const float log_z = most[0] + logf(totals[0]);

    /* log of the sums of exact and of linear weights, then of all */
    float alpha = 0, delta = reach, log_exact = -INFINITY;
    if (r.mixing == MIXING_UNIFIED)
        delta += mix;
    else if (exact)
        alpha = -logf(1 + expf(-mix)) - most[1];
    if (exact) log_exact = alpha + most[1] + logf(totals[1]);
    const float log_linear = linear ? delta + logf(fmaxf(totals[2], LEAST)) : -INFINITY;
    const float upper = fmaxf(log_exact, log_linear), lower = fminf(log_exact, log_linear);
    const float log_all = upper + logf(1 + expf(lower - upper));
    const float factor = linear ? expf(delta - log_all) : 0;

    enum { KL, P_L, P_LINEAR, SINK, WINDOW, LINEAR, N };
    float sums[N] = {};
    const float floor = -1e30f; /* 0 times it is 0, and not NaN as with -inf */
    for (int j = at.span_from + thread; j < at.span_end; j += THREADS) {
        float weight = 0, own_weight = 0;
        if (j >= 0 && j < at.n_keys) {
            const float l = p[j] * scale, log_p = l - log_z;
            float log_a;
            weight = expf(log_p);
            if (is_linear(j)) {
                own_weight = s[j] * factor;
                log_a = logf(fmaxf(s[j], LEAST)) + (delta - log_all);
                sums[P_LINEAR] += weight;
                sums[LINEAR] += own_weight;
            } else {
                log_a = own(j, l) + (alpha - log_all);
                own_weight = expf(log_a);
                sums[j < at.sinks ? SINK : WINDOW] += own_weight;
            }
            sums[P_L] = fmaf(weight, fmaxf(l, floor), sums[P_L]);
            sums[KL] = fmaf(weight, fmaxf(log_p, floor) - fmaxf(log_a, floor), sums[KL]);
        }
        p[j] = weight;
        a[j] = own_weight;
    }
    block_all<add>(sums, lanes[2]);
    if (thread) return;
    const bool gap = linear && sums[P_LINEAR] > LEAST;
    const float out[GPU_RESULTS] = {1,
                                    sums[KL],
                                    log_z - sums[P_L],
                                    0,
                                    0,
                                    sums[P_LINEAR],
                                    sums[SINK],
                                    sums[WINDOW],
                                    sums[LINEAR],
                                    gap ? log_z + logf(sums[P_LINEAR]) - log_linear : 0,
                                    linear ? 1.0f : 0.0f,
                                    0};
    for (int i = 0; i < GPU_RESULTS; i++)
        r.results[at.at * GPU_RESULTS + i] = out[i];
}

static __global__ void __launch_bounds__(THREADS) grade(const gpu_rows_args r) {
    DYNAMIC_SHARED(float, shared);
    const row_place at = place_of(r);
    const float *const p = r.p + at.columns, *const a = r.a + at.columns;
    const float *const ev = r.ev ? r.ev + at.columns : nullptr;
    float *const s = r.s + at.columns;
    const float ey = ev ? r.ey[at.at] : 0;
    float sums[2] = {}; /* of t over exact keys, over linear ones */
    for (int j = at.span_from + (int)threadIdx.x; j < at.span_end; j += THREADS) {
        float ratio = 0;
        if (j >= 0 && j < at.n_keys) {
            float t = r.ce * (a[j] - p[j]);
            if (ev) t = fmaf(a[j], ev[j] - ey, t);
            const bool linear = j >= at.sinks && j < at.from;
            sums[linear] += t;
            if (linear) ratio = t / fmaxf(s[j], LEAST);
        }
        s[j] = ratio;
    }
    block_all<add>(sums, shared);
    if (threadIdx.x) return;
    const float mix = r.mix[(size_t)at.layer * r.mix_layer + at.head];
    /* d log sigmoid(omega) = 1 - sigmoid(omega) */
    r.results[at.at * GPU_RESULTS + GPU_SUMS] =
        r.mixing == MIXING_UNIFIED ? sums[1] : sums[0] / (1 + expf(mix));
}

static __global__ void __launch_bounds__(THREADS)
    errors(const gpu_rows_args r, float *y, const float *teacher, float *ey, float mse) {
    const size_t row = (size_t)blockIdx.x * ROW_WARPS + threadIdx.x / 32,
                 n = (size_t)r.n_layers * r.n_heads * r.n_rows;
    const int lane = (int)threadIdx.x % 32;
    if (row >= n) return; /* a whole warp */
    y += row * r.head_dim;
    teacher += row * r.head_dim;
    float error = 0, energy = 0, along = 0;
    for (int d = lane; d < r.head_dim; d += 32) {
        const float off = y[d] - teacher[d], e = mse * off;
        error = fmaf(off, off, error);
        energy = fmaf(teacher[d], teacher[d], energy);
        along = fmaf(e, y[d], along);
        y[d] = e;
    }
    error = warp_sum(error);
    energy = warp_sum(energy);
    along = warp_sum(along);
    if (lane) return;
    ey[row] = along;
    r.results[row * GPU_RESULTS + 3] = error; /* struct student_sums' places */
    r.results[row * GPU_RESULTS + 4] = energy;
}

static __global__ void __launch_bounds__(THREADS)
    count(const gpu_rows_args r, double *sums, float *mix_grads) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, head = i / GPU_RESULTS;
    const int which = (int)(i % GPU_RESULTS);
    if (head >= (size_t)r.n_layers * r.n_heads || (which == GPU_SUMS && !mix_grads)) return;
    const float *at = r.results + head * r.n_rows * GPU_RESULTS + which;
    double sum = 0;
    for (int row = 0; row < r.n_rows; row++)
        sum += (double)at[(size_t)row * GPU_RESULTS];
    if (which < GPU_SUMS)
        sums[head * GPU_SUMS + which] += sum;
    else
        mix_grads[head / r.n_heads * r.mix_layer + head % r.n_heads] += (float)sum;
}

static dim3 grid_of(const struct gpu_rows_args *r) {
    return dim3((unsigned)r->n_rows, (unsigned)r->n_heads, (unsigned)r->n_layers);
}

void gpu_weigh(struct gpu *g, const struct gpu_rows_args *r) {
    if (!r->n_rows || !r->n_layers) return;
    LAUNCH(g, weigh, grid_of(r), THREADS, (15 * ROW_WARPS + (size_t)r->sinks) * sizeof(float), *r);
}
void gpu_grade(struct gpu *g, const struct gpu_rows_args *r) {
    if (!r->n_rows || !r->n_layers) return;
    LAUNCH(g, grade, grid_of(r), THREADS, 2 * ROW_WARPS * sizeof(float), *r);
}
void gpu_errors(struct gpu *g, const struct gpu_rows_args *r, float *y, const float *teacher,
                float *ey, float mse) {
    const size_t n = (size_t)r->n_layers * r->n_heads * r->n_rows;
    if (!n) return;
    LAUNCH(g, errors, dim3((unsigned)((n + ROW_WARPS - 1) / ROW_WARPS)), THREADS, 0, *r, y, teacher,
           ey, mse);
}
void gpu_count(struct gpu *g, const struct gpu_rows_args *r, double *sums, float *mix_grads) {
    const size_t n = (size_t)r->n_layers * r->n_heads * GPU_RESULTS;
    if (!n) return;
    LAUNCH(g, count, dim3((unsigned)((n + THREADS - 1) / THREADS)), THREADS, 0, *r, sums,
           mix_grads);
}
