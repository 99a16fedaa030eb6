/* gpu_memory.cu - the angles of a step's rows; keys and values that enter.
 *
 *   angles  (256 pairs of a segment's rows, segments), 256 threads
 *   store   (4 rows, kv heads, segments), 128 threads
 *   bound   bandwidth; angles: a sine and cosine in double of each row and pair
 *   twin    rope.c, rope_angles(); memory.c, write_entry() */
#include "attention/gpu_device.cuh"

enum { THREADS = 256 };

/* ---- angles ---- */

static __global__ void __launch_bounds__(THREADS)
    angles_kernel(gpu_shape s, const gpu_segment *segments, float *cosines, float *sines) {
    gpu_segment segment = segments[blockIdx.y];
    int half = s.head_dim / 2;
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (segment.slot < 0 || i >= (size_t)segment.n_rows * half) return;
    int r = (int)(i / half), pair = (int)(i % half);
    double sine, cosine;
    sincos((double)(segment.position + r) * s.theta[pair], &sine, &cosine);
    size_t at = ((size_t)segment.first_row + r) * half + pair;
    cosines[at] = (float)cosine;
    sines[at] = (float)sine;
}

extern "C" void gpu_launch_angles(struct gpu *g, const struct gpu_shape *shape,
                                  const struct gpu_segment *segments, int n_segments, int max_rows,
                                  float *cosines, float *sines) {
    if (!shape->rope || n_segments <= 0) return;
    size_t n = (size_t)max_rows * (shape->head_dim / 2);
    dim3 grid((unsigned)((n + THREADS - 1) / THREADS), (unsigned)n_segments, 1);
    LAUNCH(g, angles_kernel, grid, THREADS, 0, *shape, segments, cosines, sines);
}

/* ---- keys and values enter ---- */

enum { STORE_THREADS = 128, STORE_ROWS = 4 };

static __global__ void __launch_bounds__(STORE_THREADS)
    store_kernel(gpu_shape s, int layer, const gpu_segment *segments, gpu_rows rows) {
    gpu_segment segment = segments[blockIdx.z];
    if (segment.slot < 0) return;
    gpu_place m = place_of(s, segment.slot, layer, (int)blockIdx.y);
    for (int i = threadIdx.x; i < STORE_ROWS * s.lanes; i += STORE_THREADS) {
        int r = (int)blockIdx.x * STORE_ROWS + i / s.lanes, d = i % s.lanes;
        if (r < segment.n_rows)
            store_element(s, m, rows, segment.first_row + r, (int)blockIdx.y,
                          own_entry(s, m.cache, segment.position + r), d);
    }
}

extern "C" void gpu_launch_store(struct gpu *g, const struct gpu_shape *shape, int layer,
                                 const struct gpu_segment *segments, int n_segments, int max_rows,
                                 const struct gpu_rows *rows) {
    dim3 grid((unsigned)((max_rows + STORE_ROWS - 1) / STORE_ROWS), (unsigned)shape->n_kv_heads,
              (unsigned)n_segments);
    LAUNCH(g, store_kernel, grid, STORE_THREADS, 0, *shape, layer, segments, *rows);
}
