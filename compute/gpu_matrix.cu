/* gpu_matrix.cu - copies of packed matrices on a device, rows of them, and the way to the library's
 * GEMM. */
#include "compute/gpu_matrix_device.cuh"

#include <cstdlib>
#include <cstring>

/* ---- kernels ---- */

/* out[n][k] = bf16(W[n][k]), dense.  A warp takes one record of int8 or int4: reads 512 or 256
 * bytes and their scales, writes 16 rows of 64 bytes.  Bound by those bytes. */
static __global__ void widen_records(uint16_t *out, const gpu_matrix w) {
    const int lane = (int)threadIdx.x % WARP;
    const size_t record = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (record >= (size_t)w.n_tiles * (size_t)w.n_blocks) return;
    uint32_t words[2][4];
    if (w.type == WEIGHT_INT8)
        read_int8(words, w.data + record * INT8_RECORD, lane, FLOAT_2_23);
    else
        read_int4(words, w.data + record * INT4_RECORD, lane, FLOAT_2_23);
    const int tile = (int)(record / (size_t)w.n_blocks);
    const int k = (int)(record % (size_t)w.n_blocks) * K_BLOCK + lane % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int n = tile * TILE + half * 8 + lane / 4;
        const uint4 eight = {words[half][0], words[half][1], words[half][2], words[half][3]};
        if (n < w.n_out && k < w.n_in) *(uint4 *)(out + (size_t)n * (size_t)w.n_in + k) = eight;
    }
}

/* The same for rows whose starts are not aligned: small matrices only, one element a thread. */
static __global__ void widen_elements(uint16_t *out, const gpu_matrix w) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)w.n_out * (size_t)w.n_in) return;
    out[i] = float_to_bf16(matrix_value(w, (int)(i / (size_t)w.n_in), (int)(i % (size_t)w.n_in)));
}

/* One block of threads a row. */
static __global__ void copy_rows(float *x, const int32_t *index, const gpu_matrix w) {
    const int n = index[blockIdx.x];
    float *row = x + (size_t)blockIdx.x * (size_t)w.n_in;
    for (int k = (int)threadIdx.x; k < w.n_in; k += (int)blockDim.x)
        row[k] = n < 0 ? 0.0f : matrix_value(w, n, k);
}

static __global__ void add_bias(float *y, size_t y_stride, const float *bias, int n_out) {
    float *row = y + (size_t)blockIdx.x * y_stride;
    for (int n = (int)threadIdx.x; n < n_out; n += (int)blockDim.x)
        row[n] += bias[n];
}

static void widen(struct gpu *g, void *out, const gpu_matrix *w) {
    if (w->n_in % 8 == 0 && w->type != WEIGHT_BF16) {
        const size_t records = (size_t)w->n_tiles * (size_t)w->n_blocks;
        LAUNCH(g, widen_records, dim3((unsigned)((records + 7) / 8)), 8 * WARP, 0, (uint16_t *)out,
               *w);
    } else {
        const size_t n = (size_t)w->n_out * (size_t)w->n_in;
        LAUNCH(g, widen_elements, dim3((unsigned)((n + 255) / 256)), 256, 0, (uint16_t *)out, *w);
    }
}

/* ---- copying from the CPU's matrix ---- */

static size_t tile_bytes(const gpu_matrix *w) {
    switch (w->type) {
    case WEIGHT_FP32:
        return (size_t)TILE * (size_t)w->stride * 4;
    case WEIGHT_BF16:
        return (size_t)TILE * (size_t)w->stride * 2;
    case WEIGHT_INT8:
        return (size_t)w->n_blocks * INT8_RECORD;
    case WEIGHT_FP8:
        return (size_t)TILE * (size_t)w->stride;
    case WEIGHT_INT4:
        break;
    }
    return (size_t)w->n_blocks * INT4_RECORD;
}

struct source {
    const struct matrix *matrix;
    gpu_matrix_part part;
};

static int row_of(const source &from, int n) {
    const gpu_matrix_range *range = from.part.rows;
    while (n >= range->n)
        n -= (range++)->n;
    return range->first + n;
}

/* Row n, in its 16-bit or block format, of a tile at `to`; `row` has room for a row of the source.
 */
static void pack_row(unsigned char *to, const gpu_matrix *w, const source &from, int n,
                     float *row) {
    const int r = n % TILE, half = r / 8, g = r % 8, first_k = from.part.columns.first;
    n = row_of(from, n);
    if (w->type == WEIGHT_FP32) {
        matrix_get_row(from.matrix, n, row);
        memcpy((float *)to + (size_t)r * (size_t)w->stride, row + first_k,
               (size_t)w->n_in * sizeof *row);
        return;
    }
    if (w->type == WEIGHT_BF16) {
        uint16_t *out = (uint16_t *)to + (size_t)r * (size_t)w->stride;
        matrix_get_row(from.matrix, n, row);
        for (int k = 0; k < w->n_in; k++) { /* their lower half is zero */
            uint32_t bits;
            memcpy(&bits, &row[first_k + k], 4);
            out[k] = (uint16_t)(bits >> 16);
        }
        return;
    }
    if (w->type == WEIGHT_FP8) {
        memcpy(to + (size_t)r * (size_t)w->stride, matrix_get_fp8(from.matrix, n, row) + first_k,
               (size_t)w->n_in);
        return;
    }
    for (int b = 0; b < w->n_blocks; b++) {
        struct matrix_block block;
        matrix_get_block(from.matrix, n, first_k / K_BLOCK + b, &block);
        if (w->type == WEIGHT_INT8) {
            unsigned char *record = to + (size_t)b * INT8_RECORD;
            for (int t = 0; t < 4; t++) {
                uint64_t eight;
                memcpy(&eight, block.q + 8 * t, 8);
                eight ^= 0x8080808080808080u; /* adds 128 to each */
                memcpy(record + 16 * (4 * g + t) + 8 * half, &eight, 8);
            }
            ((uint16_t *)(record + INT8_SCALES))[2 * g + half] = block.s;
        } else {
            unsigned char *record = to + (size_t)b * INT4_RECORD;
            for (int t = 0; t < 4; t++) {
                uint64_t eight; /* a nibble in each byte, which close up */
                memcpy(&eight, block.q + 8 * t, 8);
                eight = (eight | eight >> 4) & 0x00ff00ff00ff00ffu;
                eight = (eight | eight >> 8) & 0x0000ffff0000ffffu;
                eight |= eight >> 16;
                memcpy(record + 8 * (4 * g + t) + 4 * half, &eight, 4);
            }
            uint16_t *sm = (uint16_t *)(record + INT4_SCALES) + 4 * g + half;
            sm[0] = block.s;
            sm[2] = block.m;
        }
    }
}

/* Fills one half of the staging memory while the other is on its way. */
static enum err upload(struct gpu *g, const gpu_matrix *w, const source &from) {
    const size_t tile = tile_bytes(w), aim = (size_t)4 << 20;
    const int per_piece = tile >= aim ? 1 : (int)(aim / tile);
    const int n_tiles = per_piece < w->n_tiles ? per_piece : w->n_tiles;
    void *staging;
    float *row = (float *)malloc((size_t)matrix_n_in(from.matrix) * sizeof *row);
    if (!row || gpu_host_alloc(g, &staging, 2 * (size_t)n_tiles * tile) != OK) {
        free(row);
        return ERR_NOMEM;
    }
    enum err err = OK;
    int piece = 0;
    for (int first = 0; first < w->n_tiles && err == OK; first += n_tiles, piece++) {
        unsigned char *to = (unsigned char *)staging + (size_t)(piece % 2) * (size_t)n_tiles * tile;
        const int end = first + n_tiles < w->n_tiles ? first + n_tiles : w->n_tiles;
        memset(to, 0, (size_t)(end - first) * tile);
        for (int n = first * TILE; n < end * TILE && n < w->n_out; n++)
            pack_row(to + (size_t)(n / TILE - first) * tile, w, from, n, row);
        err = gpu_wait(g); /* for the piece before, whose half is filled next */
        gpu_upload(g, w->data + (size_t)first * tile, to, (size_t)(end - first) * tile);
    }
    if (err == OK) err = gpu_wait(g);
    gpu_host_release(g, staging);
    free(row);
    return err;
}

static enum err upload_scales(struct gpu *g, gpu_matrix *w, const source &from) {
    const size_t bytes = (size_t)w->n_out * sizeof(float);
    void *at = NULL;
    float *scales = (float *)malloc(bytes);
    enum err err = scales ? gpu_alloc(g, &at, bytes) : ERR_NOMEM;
    w->scales = (float *)at;
    w->bytes += bytes;
    for (int n = 0; n < w->n_out && err == OK; n++)
        matrix_get_fp8(from.matrix, row_of(from, n), &scales[n]);
    if (err == OK) {
        gpu_upload(g, at, scales, bytes);
        err = gpu_wait(g);
    }
    free(scales);
    return err;
}

static bool within(const gpu_matrix_range &r, int n) {
    return r.first >= 0 && r.n >= 0 && r.n <= n - r.first;
}

static bool is_part(const source &from, int n_out) {
    const enum weight_type type = matrix_type(from.matrix);
    const gpu_matrix_part &p = from.part;
    const bool blocks = type == WEIGHT_INT8 || type == WEIGHT_INT4, fp8 = type == WEIGHT_FP8;
    for (int i = 0; i < p.n_ranges; i++)
        if (!within(p.rows[i], matrix_n_out(from.matrix))) return false;
    return within(p.columns, matrix_n_in(from.matrix)) && n_out > 0 && p.columns.n > 0 &&
           !(blocks && p.columns.first % K_BLOCK) &&
           !(fp8 && (p.columns.first % 16 || p.columns.n % 16 || n_out % 16));
}

enum err gpu_matrix_new(struct gpu_matrix **out, struct gpu *g, const struct matrix *matrix,
                        const struct gpu_matrix_part *part) {
    source from = {matrix, {1, {{0, matrix_n_out(matrix)}}, {0, matrix_n_in(matrix)}}};
    if (part) from.part = *part;
    int n_out = 0;
    for (int i = 0; i < from.part.n_ranges; i++)
        n_out += from.part.rows[i].n;
    if (!is_part(from, n_out)) return ERR_ARG;
    gpu_matrix *w = (gpu_matrix *)calloc(1, sizeof *w);
    if (!w) return ERR_NOMEM;
    w->type = matrix_type(matrix);
    w->n_out = n_out;
    w->n_in = from.part.columns.n;
    w->n_blocks = (w->n_in + K_BLOCK - 1) / K_BLOCK;
    w->n_tiles = (w->n_out + TILE - 1) / TILE;
    w->stride = w->type == WEIGHT_BF16 ? (w->n_in + 7) / 8 * 8 : w->n_in;
    w->n_processors = gpu_info(g)->n_processors;
    w->shared_bytes = (int)gpu_shared_bytes(gpu_info(g));
    w->bytes = (size_t)w->n_tiles * tile_bytes(w);
    void *at = NULL;
    enum err err = gpu_alloc(g, &at, w->bytes);
    w->data = (unsigned char *)at;
    if (err == OK) err = upload(g, w, from);
    if (err == OK && w->type == WEIGHT_FP8) err = upload_scales(g, w, from);
    if (err == OK && w->type == WEIGHT_BF16 && w->stride != w->n_in) {
        const size_t dense = (size_t)w->n_out * (size_t)w->n_in * 2;
        err = gpu_alloc(g, &w->dense, dense);
        w->bytes += dense;
        if (err == OK) widen(g, w->dense, w);
    }
    if (err != OK) {
        gpu_matrix_free(g, w);
        return err;
    }
    *out = w;
    return OK;
}

void gpu_matrix_free(struct gpu *g, struct gpu_matrix *w) {
    if (!w) return;
    gpu_release(g, w->data);
    gpu_release(g, w->dense);
    gpu_release(g, w->scales);
    free(w);
}

int gpu_matrix_n_out(const struct gpu_matrix *w) {
    return w->n_out;
}
int gpu_matrix_n_in(const struct gpu_matrix *w) {
    return w->n_in;
}
size_t gpu_matrix_bytes(const struct gpu_matrix *w) {
    return w->bytes;
}
bool gpu_matrix_reads_bf16(const struct gpu_matrix *w) {
    return w->type != WEIGHT_FP32;
}

/* ---- products ---- */

static bool has_blocks(const struct gpu_matrix *w) {
    return w->type == WEIGHT_INT8 || w->type == WEIGHT_INT4;
}

size_t gpu_matmul_scratch_bytes(const struct gpu_matrix *w, int n_rows) {
    if (w->type == WEIGHT_FP8) return (size_t)n_rows * ((size_t)w->n_in + sizeof(float));
    return has_blocks(w) ? (size_t)w->n_out * (size_t)w->n_in * 2 : 0;
}

void gpu_matmul(struct gpu *g, void *scratch, float *y, size_t y_stride, const void *x,
                size_t x_stride, int n_rows, const struct gpu_matrix *w, const float *bias,
                enum gpu_path path) {
    if (n_rows == 0) return;
    if (path == GPU_GENERATED) {
        gpu_matrix_product(g, y, y_stride, x, x_stride, n_rows, w, bias, 0);
        return;
    }
    if (w->type == WEIGHT_FP8) {
        float *scales = (float *)((unsigned char *)scratch + (size_t)n_rows * (size_t)w->n_in);
        gpu_quantise_fp8(g, scratch, scales, x, x_stride, n_rows, w->n_in);
        if (!gpu_gemm_fp8(g, y, y_stride, scratch, scales, n_rows, w->data, w->scales, w->n_out,
                          w->n_in))
            gpu_scale_fp8(g, y, y_stride, scales, w->scales, bias, n_rows, w->n_out);
        else if (bias)
            LAUNCH(g, add_bias, dim3((unsigned)n_rows), 256, 0, y, y_stride, bias, w->n_out);
        return;
    }
    const void *weights = w->dense ? w->dense : w->data;
    if (has_blocks(w)) {
        widen(g, scratch, w);
        weights = scratch;
    }
    gpu_gemm(g, y, y_stride, x, x_stride, n_rows, weights, w->n_out, w->n_in,
             w->type == WEIGHT_FP32 ? 4 : 2);
    if (bias) LAUNCH(g, add_bias, dim3((unsigned)n_rows), 256, 0, y, y_stride, bias, w->n_out);
}

void gpu_matrix_rows(struct gpu *g, float *x, const int32_t *index, int n,
                     const struct gpu_matrix *w) {
    if (n > 0) LAUNCH(g, copy_rows, dim3((unsigned)n), 256, 0, x, index, *w);
}
