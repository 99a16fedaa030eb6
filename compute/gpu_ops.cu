/* gpu_ops.cu - row-wise operations of the forward pass: all bound by the bytes they move.
 *
 * A thread owns groups of 4 consecutive elements: groups thread, thread + n_threads, ...  Whether a
 * group is loaded at once (rows of whole groups) or element by element changes neither who owns
 * what nor the order of sums, so bits depend on the row alone. */
#include "compute/gpu_ops.h"

#include "compute/cuda.h"

enum { WARP = 32, GROUP = 4, HELD = 2, PIECE = 128 };

struct four {
    float v[GROUP];
};

/* `left` elements, at least 1, from p on; zeros for the others.  whole: p is aligned, left >= 4. */
DEVICE four load_group(const float *p, int left, bool whole) {
    if (whole) {
        const float4 v = *(const float4 *)p;
        return {{v.x, v.y, v.z, v.w}};
    }
    four f;
#pragma unroll
    for (int i = 0; i < GROUP; i++)
        f.v[i] = i < left ? p[i] : 0.0f;
    return f;
}

DEVICE void store_group(float *p, const four &f, int left, bool whole) {
    if (whole) {
        *(float4 *)p = float4{f.v[0], f.v[1], f.v[2], f.v[3]};
        return;
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++)
        if (i < left) p[i] = f.v[i];
}

DEVICE void store_group(uint16_t *p, const four &f, int left, bool whole) {
    if (whole) {
        *(uint2 *)p = uint2{pack_bf16(f.v[0], f.v[1]), pack_bf16(f.v[2], f.v[3])};
        return;
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++)
        if (i < left) p[i] = float_to_bf16(f.v[i]);
}

static bool aligned(const void *p) { /* NULL is */
    return (uintptr_t)p % 16 == 0;
}

/* ---- norms ---- */

struct norm_args {
    float *x;
    const float *delta, *weight, *bias; /* delta, bias: or NULL */
    float eps;
    int dim;
    bool whole;
};

/* One block of threads a row.  The first HELD groups of a thread stay in registers (all of a row of
 * 8192 and less); further ones are read again, by the thread that wrote them. */
template <class Out>
static __global__ void __launch_bounds__(1024) add_norm(Out *out, const norm_args a) {
    __shared__ float lanes[WARP], lanes2[WARP];
    float *x = a.x + (size_t)blockIdx.x * (size_t)a.dim;
    const float *delta = a.delta ? a.delta + (size_t)blockIdx.x * (size_t)a.dim : nullptr;
    out += (size_t)blockIdx.x * (size_t)a.dim;
    const int first = (int)threadIdx.x * GROUP, step = (int)blockDim.x * GROUP;

    four held[HELD] = {};
    float sum = 0, squares = 0;
    auto take = [&](int k) {
        four f = load_group(x + k, a.dim - k, a.whole);
        if (delta) {
            const four d = load_group(delta + k, a.dim - k, a.whole);
#pragma unroll
            for (int i = 0; i < GROUP; i++)
                f.v[i] += d.v[i];
            store_group(x + k, f, a.dim - k, a.whole);
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            sum += f.v[i];
            squares = fmaf(f.v[i], f.v[i], squares);
        }
        return f;
    };
#pragma unroll
    for (int h = 0; h < HELD; h++)
        if (first + h * step < a.dim) held[h] = take(first + h * step);
    for (int k = first + HELD * step; k < a.dim; k += step)
        take(k);

    float mean = 0, variance;
    if (a.bias) { /* around the mean: squares less mean^2 would cancel */
        mean = block_sum(sum, lanes) / (float)a.dim;
        float away = 0;
        auto measure = [&](const four &f, int left) {
#pragma unroll
            for (int i = 0; i < GROUP; i++)
                if (i < left) away = fmaf(f.v[i] - mean, f.v[i] - mean, away);
        };
#pragma unroll
        for (int h = 0; h < HELD; h++)
            measure(held[h], a.dim - (first + h * step));
        for (int k = first + HELD * step; k < a.dim; k += step)
            measure(load_group(x + k, a.dim - k, a.whole), a.dim - k);
        variance = block_sum(away, lanes2) / (float)a.dim;
    } else {
        variance = block_sum(squares, lanes) / (float)a.dim;
    }
    const float scale = 1.0f / sqrtf(variance + a.eps);

    auto give = [&](four f, int k) {
        const int left = a.dim - k;
        const four w = load_group(a.weight + k, left, a.whole);
        const four b = a.bias ? load_group(a.bias + k, left, a.whole) : four{};
#pragma unroll
        for (int i = 0; i < GROUP; i++)
            f.v[i] = fmaf((f.v[i] - mean) * scale, w.v[i], b.v[i]);
        store_group(out + k, f, left, a.whole);
    };
#pragma unroll
    for (int h = 0; h < HELD; h++)
        if (first + h * step < a.dim) give(held[h], first + h * step);
    for (int k = first + HELD * step; k < a.dim; k += step)
        give(load_group(x + k, a.dim - k, a.whole), k);
}

void gpu_add_norm(struct gpu *g, void *out, bool out_bf16, float *x, const float *delta, int n_rows,
                  int dim, const struct gpu_norm *norm) {
    if (n_rows == 0) return;
    const bool whole = dim % GROUP == 0 && aligned(out) && aligned(x) && aligned(delta) &&
                       aligned(norm->weight) && aligned(norm->bias);
    const norm_args args = {x, delta, norm->weight, norm->bias, norm->eps, dim, whole};
    const int threads = (dim + GROUP * HELD - 1) / (GROUP * HELD);
    const int block =
        threads > 1024 ? 1024 : (threads + WARP - 1) / WARP * WARP; /* depends on dim alone */
    if (out_bf16)
        LAUNCH(g, (add_norm<uint16_t>), dim3((unsigned)n_rows), block, 0, (uint16_t *)out, args);
    else
        LAUNCH(g, (add_norm<float>), dim3((unsigned)n_rows), block, 0, (float *)out, args);
}

/* ---- sums ---- */

static __global__ void add(float *x, const float *y, size_t n, bool is_aligned) {
    const size_t k = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * GROUP;
    if (k >= n) return;
    const int left = n - k < GROUP ? (int)(n - k) : (int)GROUP;
    const bool whole = is_aligned && left == GROUP;
    four a = load_group(x + k, left, whole);
    const four b = load_group(y + k, left, whole);
#pragma unroll
    for (int i = 0; i < GROUP; i++)
        a.v[i] += b.v[i];
    store_group(x + k, a, left, whole);
}

void gpu_add(struct gpu *g, float *x, const float *y, size_t n) {
    if (n == 0) return;
    LAUNCH(g, add, dim3((unsigned)((n + PIECE * GROUP - 1) / (PIECE * GROUP))), PIECE, 0, x, y, n,
           aligned(x) && aligned(y));
}

/* ---- activations ---- */

DEVICE float activated(float x, enum gpu_activation activation) {
    switch (activation) {
    case GPU_SILU_MUL:
        return x / (1.0f + expf(-x));
    case GPU_GELU_TANH:
        return 0.5f * x * (1.0f + tanhf(0.7978845608f * fmaf(0.044715f * x * x, x, x)));
    default:
        return 0.5f * x * erfcf(-0.70710678f * x);
    }
}

/* Rows, and pieces of 4 PIECE elements of each, over the grid. */
template <class Out>
static __global__ void activate(Out *out, size_t out_stride, const float *h, int dim,
                                enum gpu_activation activation, bool whole) {
    const int k = (int)(blockIdx.y * blockDim.x + threadIdx.x) * GROUP;
    if (k >= dim) return;
    const bool gated = activation == GPU_SILU_MUL;
    h += (size_t)blockIdx.x * (size_t)dim * (gated ? 2 : 1);
    four f = load_group(h + k, dim - k, whole);
    const four up = gated ? load_group(h + dim + k, dim - k, whole) : four{{1, 1, 1, 1}};
#pragma unroll
    for (int i = 0; i < GROUP; i++)
        f.v[i] = activated(f.v[i], activation) * up.v[i];
    store_group(out + (size_t)blockIdx.x * out_stride + k, f, dim - k, whole);
}

void gpu_activate(struct gpu *g, void *out, bool out_bf16, size_t out_stride, const float *h,
                  int n_rows, int dim, enum gpu_activation activation) {
    if (n_rows == 0) return;
    const bool whole = dim % GROUP == 0 && out_stride % GROUP == 0 && aligned(h) && aligned(out);
    const dim3 grid((unsigned)n_rows, (unsigned)((dim + PIECE * GROUP - 1) / (PIECE * GROUP)));
    if (out_bf16)
        LAUNCH(g, (activate<uint16_t>), grid, PIECE, 0, (uint16_t *)out, out_stride, h, dim,
               activation, whole);
    else
        LAUNCH(g, (activate<float>), grid, PIECE, 0, (float *)out, out_stride, h, dim, activation,
               whole);
}

/* ---- gathering ---- */

/* One block of threads a row; Word is 16 bytes where rows are whole and aligned, else 4. */
template <class Word>
static __global__ void gather(Word *to, const Word *from, size_t row_words, const int32_t *index) {
    const int32_t i = index[blockIdx.x];
    to += (size_t)blockIdx.x * row_words;
    for (size_t k = threadIdx.x; k < row_words; k += blockDim.x)
        to[k] = i < 0 ? Word{} : from[(size_t)i * row_words + k];
}

void gpu_gather_rows(struct gpu *g, void *to, const void *from, size_t row_bytes,
                     const int32_t *index, int n) {
    if (n == 0) return;
    if (row_bytes % 16 == 0 && aligned(to) && aligned(from))
        LAUNCH(g, (gather<uint4>), dim3((unsigned)n), PIECE, 0, (uint4 *)to, (const uint4 *)from,
               row_bytes / 16, index);
    else
        LAUNCH(g, (gather<uint32_t>), dim3((unsigned)n), PIECE, 0, (uint32_t *)to,
               (const uint32_t *)from, row_bytes / 4, index);
}
