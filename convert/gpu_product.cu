/* gpu_product.cu - the products of attention transfer: fp32 sums of fp32 products, of all layers
 * and heads at once.
 *
 *   shapes  C [m][n] = A [m][k] B [k][n] (gpu_kernels.h), any sizes and strides.  SmolLM2-135M,
 * 1,024 tokens, 80 rows: scores 80 x 1,024 of k = 64 and 128, for each of 270 query heads launch
 * 128 threads a tile of 32 x 64, 4 x 4 elements a thread; grid: tiles, heads, layers. Slices of 16
 * of k pass through two buffers of shared memory, 13 KiB bound   2 m n k flops of CUDA cores; a
 * slice is 96 loads for 2,048 products, out of the second cache.  All products of a sequence of
 * SmolLM2: 22 GFLOP, a third of a millisecond at 67 TFLOP/s (H100's fp32 on paper), 3 times that as
 * this kernel is written twin    attention_kernels.product, as student.c calls it
 *
 * fp32 because t / s spans many orders of magnitude, and because the CPU's gradients are the
 * specification.  An element is one chain of fused sums, so its bits do not depend on the tiling.
 */
#include "convert/gpu_kernels.h"

#include "compute/cuda.h"

enum { M = GPU_ROW_TILE, N = GPU_KEY_TILE, K = 16, THREADS = 128, PAD = 4 };

enum { SLICE_A = K * (M + PAD), SLICE_B = K * (N + PAD) }; /* [K][M + PAD]: floats */

static_assert(THREADS * 16 == M * N, "4 x 4 elements a thread");
static_assert((M + PAD) % 4 == 0 && (N + PAD) % 4 == 0, "four floats are read at once");

/* A slice on its way from global to shared memory: element i of a thread.  ALONG_K: neighbours in
 * memory are neighbours in k, else in the other index. */
template <int WIDTH, bool ALONG_K> DEVICE int other_of(int i) {
    const int thread = (int)threadIdx.x;
    return ALONG_K ? thread / K + i * (THREADS / K) : thread % WIDTH;
}
template <int WIDTH, bool ALONG_K> DEVICE int k_of(int i) {
    const int thread = (int)threadIdx.x;
    return ALONG_K ? thread % K : thread / WIDTH + i * (THREADS / WIDTH);
}

/* Elements (first .., k ..) of at; 0 from `end` and k_end on. */
template <int WIDTH, bool ALONG_K>
DEVICE void load_slice(float (&x)[WIDTH * K / THREADS], const float *at, size_t stride,
                       size_t k_stride, int first, int end, int k, int k_end) {
#pragma unroll
    for (int i = 0; i < WIDTH * K / THREADS; i++) {
        const int o = first + other_of<WIDTH, ALONG_K>(i), j = k + k_of<WIDTH, ALONG_K>(i);
        x[i] = o < end && j < k_end ? at[(size_t)o * stride + (size_t)j * k_stride] : 0.0f;
    }
}
template <int WIDTH, bool ALONG_K>
DEVICE void store_slice(float *shared, const float (&x)[WIDTH * K / THREADS]) {
#pragma unroll
    for (int i = 0; i < WIDTH * K / THREADS; i++)
        shared[k_of<WIDTH, ALONG_K>(i) * (WIDTH + PAD) + other_of<WIDTH, ALONG_K>(i)] = x[i];
}

DEVICE const float *matrix_of(const gpu_operand &o, int layer, int head) {
    return o.at + (size_t)layer * o.layer + (size_t)(head / o.per) * o.head;
}

template <bool A_ALONG_K, bool B_ALONG_K>
static __global__ void __launch_bounds__(THREADS) product(const gpu_product p) {
    DYNAMIC_SHARED(float, shared);
    float *const slices_a = shared, *const slices_b = shared + 2 * SLICE_A;
    const int n_tiles = (p.n + N - 1) / N, row_tile = (int)blockIdx.x / n_tiles, m0 = row_tile * M,
              n0 = (int)blockIdx.x % n_tiles * N;
    const int head = (int)blockIdx.y, layer = (int)blockIdx.z;

    int from = 0, end = p.k;
    if (p.limit == GPU_COLUMNS && (n0 < p.spans[2 * row_tile] || n0 >= p.spans[2 * row_tile + 1]))
        return; /* all threads alike */
    if (p.limit == GPU_TERMS || p.limit == GPU_ROWS) {
        from = p.spans[2 * row_tile];
        end = p.spans[2 * row_tile + 1] < p.k ? p.spans[2 * row_tile + 1] : p.k;
    }
    const int slices = end > from ? (end - from + K - 1) / K : 0, n_slices = slices * p.n_terms;

    float sum[4][4] = {};
    float a[M * K / THREADS], b[N * K / THREADS];
    auto load = [&](int slice) {
        const int term = head * p.n_terms + slice / slices, k = from + slice % slices * K;
        load_slice<M, A_ALONG_K>(a, matrix_of(p.a, layer, term), p.a.row, p.a.column, m0, p.m, k,
                                 end);
        load_slice<N, B_ALONG_K>(b, matrix_of(p.b, layer, term), p.b.column, p.b.row, n0, p.n, k,
                                 end);
    };
    auto store = [&](int slice) {
        store_slice<M, A_ALONG_K>(slices_a + slice % 2 * SLICE_A, a);
        store_slice<N, B_ALONG_K>(slices_b + slice % 2 * SLICE_B, b);
    };
    const int row = (int)threadIdx.x / 16 * 4, column = (int)threadIdx.x % 16 * 4;
    if (n_slices) {
        load(0);
        store(0);
    }
    for (int slice = 0; slice < n_slices; slice++) {
        __syncthreads(); /* the slice is there, and nobody reads the one before it any more */
        if (slice + 1 < n_slices) load(slice + 1);
        const float *at_a = slices_a + slice % 2 * SLICE_A + row,
                    *at_b = slices_b + slice % 2 * SLICE_B + column;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const float4 x = *(const float4 *)(at_a + k * (M + PAD)),
                         y = *(const float4 *)(at_b + k * (N + PAD));
            const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sum[i][j] = fmaf(xs[i], ys[j], sum[i][j]);
        }
        if (slice + 1 < n_slices) store(slice + 1); /* the other buffer: read before the barrier */
    }

    float *const c = p.c.at + (size_t)layer * p.c.layer + (size_t)(head / p.c.per) * p.c.head;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (m0 + row + i >= p.m || n0 + column + j >= p.n) continue;
            float *const to =
                c + (size_t)(m0 + row + i) * p.c.row + (size_t)(n0 + column + j) * p.c.column;
            *to = p.add ? *to + sum[i][j] : sum[i][j];
        }
}

void gpu_products(struct gpu *g, const struct gpu_product *p) {
    if (!p->m || !p->n || !p->n_heads || !p->n_layers) return;
    const unsigned tiles = (unsigned)((p->m + M - 1) / M) * (unsigned)((p->n + N - 1) / N);
    const dim3 grid(tiles, (unsigned)p->n_heads, (unsigned)p->n_layers);
    const size_t bytes = 2 * (SLICE_A + SLICE_B) * sizeof(float);
    const bool a_along_k = p->a.column == 1, b_along_k = a_along_k && p->b.row == 1;
    if (b_along_k)
        LAUNCH(g, (product<true, true>), grid, THREADS, bytes, *p);
    else if (a_along_k)
        LAUNCH(g, (product<true, false>), grid, THREADS, bytes, *p);
    else
        LAUNCH(g, (product<false, false>), grid, THREADS, bytes, *p);
}
