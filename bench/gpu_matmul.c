/* gpu_matmul.c - how fast a device reads weights when it multiplies few rows, beside what its
 * memory gives and beside the library's GEMM over the same matrix in bf16.
 *
 *   build/bench/gpu_matmul [135m|8b [fp32|bf16|int8|int4|fp8]]
 *
 * Products are replayed as one graph, as a step of the model is, each over another copy of the
 * matrix: together at least 160 MB, so that caches serve nothing.  Median of several replays. Bytes
 * are those of weights, x and y, once.  An emulated device runs a tiny shape and shows only that
 * everything runs. */
#include "compute/gpu_matrix.h"
#include "compute/matrix.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { REPLAYS = 7, MAX_ROWS = 256, MAX_COPIES = 1024 };

static struct gpu *gpu;
static struct team *team;
static size_t rotated = 160 << 20;

static void check(enum err err, const char *what) {
    if (err == OK) return;
    fprintf(stderr, "%s: error %d %s\n", what, err, gpu ? gpu_error(gpu) : "");
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void *device_bytes(size_t bytes) {
    void *at;
    check(gpu_alloc(gpu, &at, bytes), "memory of the device");
    return at;
}

/* ---- what is timed ---- */
struct work {
    void (*queue)(const struct work *w, int i);
    int n_launches;
    struct gpu_matrix **copies;
    int n_copies, n_rows;
    enum gpu_path path;
    void *x, *y;
    size_t bytes; /* copied */
};

static void queue_product(const struct work *w, int i) {
    const struct gpu_matrix *m = w->copies[i % w->n_copies];
    gpu_matmul(gpu, NULL, w->y, (size_t)gpu_matrix_n_out(m), w->x, (size_t)gpu_matrix_n_in(m),
               w->n_rows, m, NULL, w->path);
}

static void queue_copy(const struct work *w, int i) {
    (void)i;
    gpu_copy(gpu, w->y, w->x, w->bytes);
}

static double seconds_each(const struct work *w) {
    struct gpu_graph *graph;
    double times[REPLAYS];
    for (int i = 0; i < w->n_launches; i++)
        w->queue(w, i);
    check(gpu_wait(gpu), "first run");
    gpu_record_begin(gpu);
    for (int i = 0; i < w->n_launches; i++)
        w->queue(w, i);
    check(gpu_record_end(gpu, &graph), "graph");
    int n = gpu_info(gpu)->emulated ? 1 : REPLAYS;
    for (int r = 0; r < n; r++) {
        double start = now();
        gpu_replay(gpu, graph);
        check(gpu_wait(gpu), "replay");
        times[r] = (now() - start) / w->n_launches;
    }
    gpu_graph_free(gpu, graph);
    qsort(times, (size_t)n, sizeof *times, by_value);
    return times[n / 2];
}

static double copy_bandwidth(void) { /* bytes/s, read and written */
    size_t bytes = gpu_info(gpu)->emulated ? (size_t)1 << 20 : (size_t)1 << 30;
    struct work w = {.queue = queue_copy, .n_launches = 8, .bytes = bytes};
    w.x = device_bytes(bytes);
    w.y = device_bytes(bytes);
    double each = seconds_each(&w);
    gpu_release(gpu, w.x);
    gpu_release(gpu, w.y);
    return 2 * (double)bytes / each;
}

/* ---- matrices ---- */
struct packing {
    struct matrix *to;
    const float *rows; /* 16 rows, again and again */
};

static void pack(void *arg, int thread, int n_threads) {
    const struct packing *p = arg;
    int n_out = matrix_n_out(p->to), groups = (n_out + 15) / 16;
    int end = (int)((int64_t)groups * (thread + 1) / n_threads);
    for (int i = (int)((int64_t)groups * thread / n_threads); i < end; i++)
        matrix_set_rows(p->to, 16 * i, n_out - 16 * i < 16 ? n_out - 16 * i : 16, p->rows);
}

static int make_copies(struct gpu_matrix **copies, enum weight_type type, int n_out, int n_in) {
    struct matrix *m;
    check(matrix_new(&m, type, n_out, n_in), "matrix");
    float *rows = malloc((size_t)16 * (size_t)n_in * sizeof *rows);
    if (!rows) check(ERR_NOMEM, "matrix");
    uint64_t state = 1;
    for (size_t i = 0; i < (size_t)16 * (size_t)n_in; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        rows[i] = (float)(int32_t)(state >> 32) * 0x1p-36f;
    }
    team_run(team, pack, &(struct packing){m, rows});
    free(rows);
    int n = 0;
    do
        check(gpu_matrix_new(&copies[n++], gpu, m, NULL), "matrix of the device");
    while (n < MAX_COPIES && (size_t)n * gpu_matrix_bytes(copies[0]) < rotated);
    matrix_free(m);
    return n;
}

static void free_copies(struct gpu_matrix **copies, int n) {
    for (int i = 0; i < n; i++)
        gpu_matrix_free(gpu, copies[i]);
}

/* ---- the table ---- */
static const int rows[] = {1, 8, 32, 64, 256};
enum { N_ROWS = sizeof rows / sizeof *rows };

static void measure(int n_in, int n_out, int only, double bandwidth) {
    struct gpu_matrix *copies[MAX_COPIES];
    double library[N_ROWS];
    struct work w = {.queue = queue_product, .copies = copies};
    size_t x_bytes = (size_t)MAX_ROWS * (size_t)n_in * 4,
           y_bytes = (size_t)MAX_ROWS * (size_t)n_out * 4;
    w.x = device_bytes(x_bytes);
    w.y = device_bytes(y_bytes);
    static const enum weight_type order[] = {WEIGHT_BF16, WEIGHT_INT8, WEIGHT_INT4, WEIGHT_FP8,
                                             WEIGHT_FP32};
    for (int t = 0; t < 5; t++) {
        enum weight_type type = order[t];
        if (type != WEIGHT_BF16 && only >= 0 && type != (enum weight_type)only) continue;
        w.n_copies = make_copies(copies, type, n_out, n_in);
        int least = gpu_info(gpu)->emulated ? 2 : 16;
        w.n_launches = w.n_copies < least ? least / w.n_copies * w.n_copies : w.n_copies;
        for (int r = 0; r < N_ROWS; r++) {
            w.n_rows = rows[r];
            if (type == WEIGHT_BF16) {
                w.path = GPU_PROMPT;
                library[r] = seconds_each(&w);
            }
            w.path = GPU_GENERATED;
            double each = seconds_each(&w);
            double bytes =
                (double)gpu_matrix_bytes(copies[0]) +
                (double)rows[r] * (n_in * (type == WEIGHT_FP32 ? 4.0 : 2.0) + n_out * 4.0);
            printf(
                "%6d x %-6d %4s %5d rows %9.2f us %8.1f GB/s %5.1f %%   library, bf16 %9.2f us\n",
                n_in, n_out, weight_type_name(type), rows[r], each * 1e6, bytes / each * 1e-9,
                100 * bytes / each / bandwidth, library[r] * 1e6);
            fflush(stdout);
        }
        free_copies(copies, w.n_copies);
    }
    gpu_release(gpu, w.x);
    gpu_release(gpu, w.y);
}

int main(int argc, char **argv) {
    static const int small[][2] = {{576, 960}, {576, 576}, {576, 3072}, {1536, 576}, {576, 49152}};
    static const int large[][2] = {
        {4096, 6144}, {4096, 4096}, {4096, 28672}, {14336, 4096}, {4096, 128256}};
    char msg[256] = "";
    int only = -1;
    for (int t = 0; t < 5; t++)
        if (argc > 2 && !strcmp(argv[2], weight_type_name((enum weight_type)t))) only = t;
    if ((argc > 1 && strcmp(argv[1], "135m") && strcmp(argv[1], "8b")) || (argc > 2 && only < 0)) {
        fprintf(stderr, "usage: gpu_matmul [135m|8b [fp32|bf16|int8|int4|fp8]]\n");
        return 2;
    }
    if (gpu_open(&gpu, msg, sizeof msg)) {
        fprintf(stderr, "%s\n", msg);
        return 1;
    }
    check(team_new(&team, 0), "threads");
    bool emulated = gpu_info(gpu)->emulated;
    if (emulated) rotated = 0;
    double bandwidth = copy_bandwidth();
    printf("%s: copies %.1f GB/s\n", gpu_info(gpu)->name, bandwidth * 1e-9);
    if (emulated) {
        measure(80, 48, only, bandwidth);
    } else {
        for (int s = 0; s < 5 && (argc < 2 || !strcmp(argv[1], "135m")); s++)
            measure(small[s][0], small[s][1], only, bandwidth);
        for (int s = 0; s < 5 && (argc < 2 || !strcmp(argv[1], "8b")); s++)
            measure(large[s][0], large[s][1], only, bandwidth);
    }
    team_free(team);
    gpu_close(gpu);
    return 0;
}
