/* gpu_lesson.cu - rows of a step's q, k and v kept for the lesson, and what is made of them once.
 *
 *   take     to [n][n_floats] dense; from: n rows, from_row floats apart, all in order or those
 * that `rows` names.  A block of 128 threads a row, 16 bytes a thread where rows are whole and
 *            aligned.  Bound: 8 n n_floats bytes; SmolLM2's k and v of 1,024 tokens: 3 MB a layer.
 *            Twin: take() of teacher.c
 *   turn     x, y: of every layer n rows of n_heads D floats.  A block of 128 threads a row and
 *            layer, a thread a pair.  Bound: 8 n n_heads D bytes a layer.  Twin: rope_rotate()
 *   largest  x as above.  A block of 128 threads a head and layer: once a conversion.  Bound: 4 n
 *            n_heads D bytes a layer.  Twin: largest() of training.c, to the bit */
#include "convert/gpu_kernels.h"

#include "compute/cuda.h"

enum { THREADS = 128 };

template <class Word>
static __global__ void take_rows(Word *to, size_t n_words, const Word *from, size_t from_row,
                                 const int *rows, int first) {
    const size_t i = blockIdx.x, row = rows ? (size_t)(rows[i] - first) : i;
    for (size_t k = threadIdx.x; k < n_words; k += blockDim.x)
        to[i * n_words + k] = from[row * from_row + k];
}

void gpu_take_rows(struct gpu *g, float *to, size_t n_floats, const float *from, size_t from_row,
                   const int *rows, int first, int n) {
    if (n == 0) return;
    const bool whole = n_floats % 4 == 0 && from_row % 4 == 0 && (uintptr_t)to % 16 == 0 &&
                       (uintptr_t)from % 16 == 0;
    if (whole)
        LAUNCH(g, (take_rows<uint4>), dim3((unsigned)n), THREADS, 0, (uint4 *)to, n_floats / 4,
               (const uint4 *)from, from_row / 4, rows, first);
    else
        LAUNCH(g, (take_rows<float>), dim3((unsigned)n), THREADS, 0, to, n_floats, from, from_row,
               rows, first);
}

static __global__ void turn_rows(const gpu_turn t) {
    const size_t row = blockIdx.x, layer = blockIdx.y, half = (size_t)t.head_dim / 2;
    const size_t width = (size_t)t.n_heads * t.head_dim;
    const float *x = t.x + layer * t.x_layer + row * t.x_row;
    float *y = t.y + (layer * t.n + row) * width;
    const size_t angles = (size_t)t.positions[t.rows ? t.rows[row] : (int)row] * half;
    for (size_t i = threadIdx.x; i < width / 2; i += blockDim.x) {
        const size_t a = i / half * t.head_dim + i % half, b = a + half;
        const float c = t.cosines[angles + i % half], s = t.sines[angles + i % half];
        y[a] = x[a] * c - x[b] * s;
        y[b] = x[b] * c + x[a] * s;
    }
}

void gpu_turn_rows(struct gpu *g, const struct gpu_turn *t) {
    if (!t->n || !t->n_layers) return;
    LAUNCH(g, turn_rows, dim3((unsigned)t->n, (unsigned)t->n_layers), THREADS, 0, *t);
}

static __global__ void largest(float *most, const float *x, size_t x_layer, size_t x_row, int n,
                               int head_dim) {
    DYNAMIC_SHARED(float, warps);
    const size_t head = blockIdx.x, layer = blockIdx.y;
    x += layer * x_layer + head * head_dim;
    float m = 0;
    for (size_t i = threadIdx.x; i < (size_t)n * head_dim; i += blockDim.x)
        m = fmaxf(m, fabsf(x[i / head_dim * x_row + i % head_dim]));
    m = warp_max(m);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = m;
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 1; w < THREADS / 32; w++)
        m = fmaxf(m, warps[w]);
    most[layer * gridDim.x + head] = m;
}

void gpu_largest(struct gpu *g, float *most, const float *x, size_t x_layer, size_t x_row,
                 int n_layers, int n, int n_heads, int head_dim) {
    if (!n_heads || !n_layers) return;
    LAUNCH(g, largest, dim3((unsigned)n_heads, (unsigned)n_layers), THREADS,
           THREADS / 32 * sizeof(float), most, x, x_layer, x_row, n, head_dim);
}
