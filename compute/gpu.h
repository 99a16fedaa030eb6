/* gpu.h - one CUDA device behind a small C interface: memory, copies, one stream, graphs, and the library's GEMM.
 *
 * Everything is queued on one stream, in call order; gpu_wait() is the only call that waits.  Calls that queue work return
 * nothing: the first failure is kept, and every later gpu_wait() returns it (a CUDA context does not recover).
 * Three implementations, chosen when linking: gpu_cuda.cu (the CUDA runtime; cuBLASLt, loaded when a device is opened),
 * tests/emu (kernels run on the CPU, thread by thread), and none at all (model/gpu_none.c).
 * One owner at a time. */
#ifndef URCHIN_COMPUTE_GPU_H
#define URCHIN_COMPUTE_GPU_H

#include "config/err.h"
#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct gpu;

struct gpu_info {
    char name[128];     /* "NVIDIA H100 80GB HBM3" */
    int capability;     /* 90: compute capability 9.0 */
    int n_processors;   /* streaming multiprocessors */
    size_t total_bytes; /* of device memory */
    bool emulated;
};

/* The first device of CUDA_VISIBLE_DEVICES.  ERR_NO_CUDA: no driver, no device, one older than 8.0, or no cuBLASLt; msg says which. */
enum err gpu_open(struct gpu **out, char *msg, size_t msg_len);
void gpu_close(struct gpu *g); /* NULL is fine */
const struct gpu_info *gpu_info(const struct gpu *g);
/* Shared memory that a block of threads may ask for and every device of the generation has: the CUDA C++ programming guide's
 * "Technical Specifications per Compute Capability"; cards for graphics have least. */
static inline size_t gpu_shared_bytes(const struct gpu_info *info) {
    bool graphics = info->capability == 86 || info->capability == 89 || info->capability >= 120;
    return (size_t)(graphics ? 99 : 163) << 10;
}
/* Tensor cores that multiply E4M3. */
static inline bool gpu_has_fp8(const struct gpu_info *info) {
    return info->capability >= 89;
}
size_t gpu_free_bytes(struct gpu *g); /* device memory that can be had now */

/* Device memory: zeroed, 256-byte aligned, owned by the caller until gpu_release().  ERR_NOMEM. */
enum err gpu_alloc(struct gpu *g, void **out, size_t bytes);
void gpu_release(struct gpu *g, void *at); /* NULL is fine; waits for queued work */
/* Host memory that copies at full speed (page-locked). */
enum err gpu_host_alloc(struct gpu *g, void **out, size_t bytes);
void gpu_host_release(struct gpu *g, void *at);

/* Queued.  Host memory must not change (upload) or be read (download) before gpu_wait(). */
void gpu_upload(struct gpu *g, void *device, const void *host, size_t bytes);
void gpu_download(struct gpu *g, void *host, const void *device, size_t bytes);
void gpu_copy(struct gpu *g, void *to, const void *from, size_t bytes);
void gpu_fill(struct gpu *g, void *at, int byte, size_t bytes);

/* Waits for all queued work.  ERR_DEVICE: something failed, now or before; gpu_error() says what. */
enum err gpu_wait(struct gpu *g);
const char *gpu_error(const struct gpu *g); /* "" or a sentence; lives as long as g */

/* What is queued between begin and end is recorded instead of run, with the arguments as they are then; replays queue all of it
 * at once.  No allocation, upload, download or wait in between.  Everything recorded must have run once before. */
struct gpu_graph;
void gpu_record_begin(struct gpu *g);
enum err gpu_record_end(struct gpu *g, struct gpu_graph **out);
void gpu_replay(struct gpu *g, struct gpu_graph *graph);
void gpu_graph_free(struct gpu *g, struct gpu_graph *graph); /* NULL is fine */

/* Y = X W^T by the library, fp32 accumulation without TF32 or split K:  x [n_rows][n_in] row stride x_stride,
 * w [n_out][n_in] dense, y fp32 [n_rows][n_out] row stride y_stride, all on the device; element_bytes of x and w: 4 (fp32) or
 * 2 (bf16).  The algorithm depends on n_out, n_in and element_bytes alone, never on n_rows, so that a row's bits do not depend
 * on how many there are. */
void gpu_gemm(struct gpu *g, float *y, size_t y_stride, const void *x, size_t x_stride, int n_rows, const void *w, int n_out,
              int n_in, int element_bytes);

/* The same for E4M3:  y[m][n] = x_scales[m] w_scales[n] sum_k x[m][k] w[n][k],  x [n_rows][n_in] and w dense bytes, scales fp32,
 * n_out and n_in multiples of 16, everything 16-byte aligned.  false: the library has no such scales for this shape on this
 * device (it has since CUDA 12.9, on 9.0 only), and y is the bare sum. */
bool gpu_gemm_fp8(struct gpu *g, float *y, size_t y_stride, const void *x, const float *x_scales, int n_rows, const void *w,
                  const float *w_scales, int n_out, int n_in);

#ifdef __cplusplus
}
#endif
#endif
