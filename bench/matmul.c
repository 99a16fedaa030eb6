/* matmul.c - how fast matmul() reads weights (few rows) and multiplies (many rows), beside what the
 * memory gives.
 *
 *   build/bench/matmul [n_threads [generic|avx2|avx512|amx]]
 *
 * Weights rotate over copies of at least 64 MB, so a single row shows memory and not cache.  Best
 * of several rounds: neighbours on the machine only ever add time. */
#include "compute/cpu.h"
#include "compute/matrix.h"
#include "compute/memory.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct reading {
    const char *p;
    size_t bytes;
    uint64_t sums[64];
};

static void read_all(void *arg, int thread, int n_threads) {
    struct reading *r = arg;
    typedef uint64_t pair __attribute__((vector_size(16))); /* what every x86-64 and arm64 has */
    const pair *p = (const pair *)r->p;
    pair a = {0}, b = {0}, c = {0}, d = {0};
    size_t n = r->bytes / sizeof *p / 4;
    size_t end = n * (size_t)(thread + 1) / (size_t)n_threads;
    for (size_t i = n * (size_t)thread / (size_t)n_threads; i < end; i++) {
        __builtin_prefetch((const char *)&p[4 * i] + 8192);
        a += p[4 * i], b += p[4 * i + 1], c += p[4 * i + 2], d += p[4 * i + 3];
    }
    a += b + c + d;
    r->sums[thread % 64] = a[0] + a[1]; /* so that the reading is not optimised away */
}

static double read_bandwidth(struct team *team, size_t bytes) { /* GB/s */
    struct reading r = {.p = memory_map(bytes), .bytes = bytes};
    if (!r.p) return 0;
    memset((char *)r.p, 1, bytes);
    double best = 1e9;
    for (int i = 0; i < 9; i++) {
        double start = now();
        team_run(team, read_all, &r);
        double t = now() - start;
        if (t < best) best = t;
    }
    memory_unmap((void *)r.p, bytes);
    return (double)bytes / best * 1e-9;
}

static void fill(float *x, size_t n) {
    uint64_t state = 1;
    for (size_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)(int32_t)(state >> 32) * 0x1p-31f;
    }
}

int main(int argc, char **argv) {
    enum { MAX_ROWS = 256, MAX_COPIES = 4096 };
    struct team *team;
    if (team_new(&team, argc > 1 ? atoi(argv[1]) : 0)) return 1;
    for (int isa = 0; argc > 2 && isa <= CPU_AMX; isa++)
        if (!strcmp(argv[2], cpu_isa_name((enum cpu_isa)isa))) cpu_isa_limit((enum cpu_isa)isa);
    printf("%s, %d threads; reading 64 MB: %.1f GB/s, 256 MB: %.1f GB/s\n", cpu_isa_name(cpu_isa()),
           team_size(team), read_bandwidth(team, 64 << 20), read_bandwidth(team, 256 << 20));
    printf("%-6s %12s %28s %36s\n", "", "N x K", "GB/s of weights at M = 1, 4",
           "GOP/s at M = 1, 4, 16, 32, 256");
    static const int shapes[][2] = {{576, 576}, {1536, 576}, {576, 1536}, {49152, 576}};
    static const int rows[] = {1, 4, 16, 32, 256};
    for (int type = 0; type < 4; type++) {
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            int n_out = shapes[s][0], n_in = shapes[s][1], n_copies = 0;
            static struct matrix *w[MAX_COPIES];
            float *values = malloc(sizeof *values * (size_t)n_out * (size_t)n_in);
            float *x = malloc(sizeof *x * MAX_ROWS * (size_t)n_in);
            float *y = malloc(sizeof *y * MAX_ROWS * (size_t)n_out);
            struct matmul_scratch *scratch = NULL;
            if (!values || !x || !y || matmul_scratch_new(&scratch, MAX_ROWS, n_in)) return 1;
            fill(values, (size_t)n_out * (size_t)n_in);
            fill(x, MAX_ROWS * (size_t)n_in);
            memset(y, 0, sizeof *y * MAX_ROWS * (size_t)n_out);
            for (size_t bytes = 0; bytes < 64 << 20 && n_copies < MAX_COPIES; n_copies++) {
                if (matrix_new(&w[n_copies], (enum weight_type)type, n_out, n_in)) return 1;
                matrix_set_rows(w[n_copies], 0, n_out, values);
                bytes += matrix_bytes(w[n_copies]);
            }
            double gbs[5], gops[5];
            for (int r = 0; r < 5; r++) {
                double best = 1e9, work = 2.0 * rows[r] * n_out * n_in;
                int calls = 0, next = 0, batch = (int)(2e8 / work) + 1;
                if (batch < n_copies && r == 0) batch = n_copies;
                for (double start = now(); calls < 3 || (calls < 20 && now() - start < 0.15);
                     calls++) {
                    double t = now();
                    for (int i = 0; i < batch; i++, next = (next + 1) % n_copies)
                        matmul(team, scratch, y, (size_t)n_out, x, (size_t)n_in, rows[r], w[next],
                               NULL);
                    t = (now() - t) / batch;
                    if (t < best) best = t;
                }
                gbs[r] = (double)matrix_bytes(w[0]) / best * 1e-9;
                gops[r] = work / best * 1e-9;
            }
            printf("%-6s %6d x %4d %13.1f %13.1f    %8.0f %7.0f %7.0f %7.0f %7.0f\n",
                   weight_type_name((enum weight_type)type), n_out, n_in, gbs[0], gbs[1], gops[0],
                   gops[1], gops[2], gops[3], gops[4]);
            fflush(stdout);
            for (int i = 0; i < n_copies; i++)
                matrix_free(w[i]);
            matmul_scratch_free(scratch);
            free(values), free(x), free(y);
        }
    }
    team_free(team);
}
