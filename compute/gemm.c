/* gemm.c - a product cut into blocks that the team deals out. */
#include "compute/gemm.h"

#include "compute/cpu.h"
#include "compute/gemm_kernel.h"
#include "compute/memory.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { TILES = (GEMM_ROWS + GEMM_COLUMNS) * GEMM_DEPTH }; /* floats of one thread */

struct gemm_scratch {
    struct team *team; /* borrowed */
    bool bf16;
    float *tiles; /* [threads][TILES] */
};

size_t gemm_scratch_bytes(int n_threads) {
    return (size_t)n_threads * TILES * sizeof(float);
}

bool gemm_has_bf16(void) {
#if defined(__x86_64__)
    return (cpu_isa() == CPU_AVX512 || cpu_isa() == CPU_AMX) &&
           __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

enum err gemm_scratch_new(struct gemm_scratch **out, struct team *team, bool bf16) {
    if (bf16 && !gemm_has_bf16()) return ERR_ARG;
    struct gemm_scratch *s = calloc(1, sizeof *s);
    if (!s) return ERR_NOMEM;
    s->team = team;
    s->bf16 = bf16;
    s->tiles = memory_map(gemm_scratch_bytes(team_size(team)));
    if (!s->tiles) {
        free(s);
        return ERR_NOMEM;
    }
    *out = s;
    return OK;
}

void gemm_scratch_free(struct gemm_scratch *s) {
    if (!s) return;
    memory_unmap(s->tiles, gemm_scratch_bytes(team_size(s->team)));
    free(s);
}

static gemm_block_fn *block_fn(bool bf16) {
#if defined(__x86_64__)
    if (bf16) return gemm_block_bf16;
#endif
    (void)bf16;
    switch (cpu_isa()) {
#if defined(__x86_64__)
    case CPU_AMX: /* which has AVX-512 too */
    case CPU_AVX512:
        return gemm_block_avx512;
    case CPU_AVX2:
        return gemm_block_avx2;
#elif defined(__aarch64__)
    case CPU_DOTPROD:
        return gemm_block_dotprod;
#endif
    default:
        return gemm_block_generic;
    }
}

struct job {
    struct gemm_scratch *scratch;
    gemm_block_fn *fn;
    struct gemm_block whole;
    int rows, columns, n_row_tasks, n_tasks; /* of a task */
    atomic_int next;
};

static void work(void *arg, int thread, int n_threads) {
    struct job *job = arg;
    float *tiles = job->scratch->tiles + (size_t)thread * TILES;
    (void)n_threads;
    for (int t; (t = atomic_fetch_add(&job->next, 1)) < job->n_tasks;) {
        struct gemm_block b = job->whole;
        int i = t % job->n_row_tasks * job->rows, j = t / job->n_row_tasks * job->columns;
        b.c += (size_t)i * b.c_row + (size_t)j;
        b.a.at += (size_t)i * b.a.row;
        b.b.at += (size_t)j * b.b.step;
        b.m = b.m - i < job->rows ? b.m - i : job->rows;
        b.n = b.n - j < job->columns ? b.n - j : job->columns;
        b.a_tiles = tiles;
        b.b_tiles = tiles + GEMM_ROWS * GEMM_DEPTH;
        job->fn(&b);
    }
}

static int up(int n, int to) {
    return (n + to - 1) / to * to;
}

void gemm(struct gemm_scratch *s, float *c, size_t c_row, bool add, struct gemm_matrix a,
          struct gemm_matrix b, int m, int n, int k) {
    if (m < 1 || n < 1) return;
    if (k < 1) {
        for (int i = 0; !add && i < m; i++)
            memset(c + (size_t)i * c_row, 0, (size_t)n * sizeof *c);
        return;
    }
    struct job job = {
        .scratch = s,
        .fn = block_fn(s->bf16),
        .whole = {.c = c, .c_row = c_row, .add = add, .a = a, .b = b, .m = m, .n = n, .k = k}};
    /* as wide as the tiles allow, and as many as share out evenly */
    int threads = team_size(s->team),
        rounds = (n + GEMM_COLUMNS * threads - 1) / (GEMM_COLUMNS * threads);
    job.columns = up((n + rounds * threads - 1) / (rounds * threads), GEMM_TILE_COLUMNS);
    int n_column_tasks = (n + job.columns - 1) / job.columns;
    int shares =
        (threads + n_column_tasks - 1) / n_column_tasks; /* narrow products are cut by rows */
    job.rows = up((m + shares - 1) / shares, GEMM_TILE_ROWS);
    job.n_row_tasks = (m + job.rows - 1) / job.rows;
    job.n_tasks = job.n_row_tasks * n_column_tasks;
    if (2.0 * m * n * k < 2e5)
        work(&job, 0, 1); /* waking the team costs more */
    else
        team_run(s->team, work, &job);
}
