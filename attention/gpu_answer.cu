/* gpu_answer.cu - y of every row of the segments, in fp32, whatever the kind, map, mixing and
 * shape.
 *
 *   launch  (groups of ROWS rows, query heads, segments), 128 threads
 *   bound   arithmetic: each group reads its keys twice, values and S once
 *   twin    kernels.c, answer() */
#include "attention/gpu_answer.cuh"

template <int ROWS>
static __global__ void __launch_bounds__(ANSWER_THREADS, 4)
    answer_kernel(gpu_shape s, gpu_layer layer, const gpu_segment *segments, gpu_rows rows) {
    DYNAMIC_SHARED(float, shared);
    gpu_segment segment = segments[blockIdx.z];
    int r = (int)blockIdx.x * ROWS, head = (int)blockIdx.y;
    if (r >= segment.n_rows) return;
    answer_question ask;
    ask.head = head;
    ask.first_row = segment.first_row + r;
    ask.n_rows = segment.n_rows - r < ROWS ? segment.n_rows - r : ROWS;
    if (segment.slot < 0) {
        write_zeros(s, rows, ask.first_row, ask.n_rows, head);
        return;
    }
    ask.position = segment.position + r;
    ask.place = place_of(s, segment.slot, layer.layer, head / s.group);
    ask.view = view_of(s, ask.place, ask.position);
    ask.linear = folded_keys(s, ask.place.cache, ask.position) > 0;
    answer_rows<ROWS>(s, layer, rows, ask, shared);
}

template <int ROWS>
static void launch(struct gpu *g, const gpu_shape *s, const gpu_layer *layer,
                   const gpu_segment *segments, int n_segments, int max_rows,
                   const gpu_rows *rows) {
    dim3 grid((unsigned)((max_rows + ROWS - 1) / ROWS), (unsigned)s->n_heads, (unsigned)n_segments);
    LAUNCH(g, (answer_kernel<ROWS>), grid, ANSWER_THREADS, answer_floats(*s, ROWS) * sizeof(float),
           *s, *layer, segments, *rows);
}

extern "C" void gpu_launch_answer(struct gpu *g, const struct gpu_shape *shape,
                                  const struct gpu_layer *layer, const struct gpu_segment *segments,
                                  int n_segments, int max_rows, const struct gpu_rows *rows) {
    enum { MANY = 8, MOST_SHARED = 96 * 1024 };
    if (n_segments <= 0 || max_rows <= 0) return;
    bool fits = answer_floats(*shape, MANY) * sizeof(float) <= MOST_SHARED;
    if (max_rows > 1 && fits)
        launch<MANY>(g, shape, layer, segments, n_segments, max_rows, rows);
    else
        launch<1>(g, shape, layer, segments, n_segments, max_rows, rows);
}
