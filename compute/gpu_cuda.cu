/* gpu_cuda.cu - gpu.h over the CUDA runtime, and cuBLASLt for its GEMM.
 *
 * The runtime is linked statically and finds the driver by itself; cuBLASLt is loaded when a device is opened, so that one
 * program runs with and without either. */
#include "compute/cuda.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <map>
#include <new>
#include <tuple>
#include <cstdio>
#include <cstdlib>

#include "config/err.h"

/* ---- the library's calls ---- */

struct library {
    void *handle;
    decltype(&cublasLtCreate) create;
    decltype(&cublasLtDestroy) destroy;
    decltype(&cublasLtMatmulDescCreate) desc_create;
    decltype(&cublasLtMatmulDescDestroy) desc_destroy;
    decltype(&cublasLtMatmulDescSetAttribute) desc_set;
    decltype(&cublasLtMatrixLayoutCreate) layout_create;
    decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
    decltype(&cublasLtMatmulPreferenceCreate) preference_create;
    decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
    decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
    decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
    decltype(&cublasLtMatmulAlgoConfigGetAttribute) config_get;
    decltype(&cublasLtMatmul) matmul;
};

static bool load_library(library *l) {
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
    for (const char *name : names)
        if (!l->handle) l->handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!l->handle) return false;
    bool all = true;
    auto find = [&](auto *to, const char *name) {
        *(void **)to = dlsym(l->handle, name);
        all = all && *to;
    };
    find(&l->create, "cublasLtCreate");
    find(&l->destroy, "cublasLtDestroy");
    find(&l->desc_create, "cublasLtMatmulDescCreate");
    find(&l->desc_destroy, "cublasLtMatmulDescDestroy");
    find(&l->desc_set, "cublasLtMatmulDescSetAttribute");
    find(&l->layout_create, "cublasLtMatrixLayoutCreate");
    find(&l->layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(&l->preference_create, "cublasLtMatmulPreferenceCreate");
    find(&l->preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(&l->preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(&l->heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(&l->config_get, "cublasLtMatmulAlgoConfigGetAttribute");
    find(&l->matmul, "cublasLtMatmul");
    return all;
}

/* ---- a device ---- */

struct gemm_shape { /* what an algorithm is chosen by */
    int n_out, n_in, element_bytes;
    bool operator<(const gemm_shape &o) const {
        return std::tie(n_out, n_in, element_bytes) < std::tie(o.n_out, o.n_in, o.element_bytes);
    }
};

struct gemm_way {
    cublasLtMatmulAlgo_t algorithm;
    bool scaled; /* fp8: the library multiplies by both scales */
};

enum { WORKSPACE = 32 << 20 };

struct gpu {
    struct gpu_info info;
    cudaStream_t stream;
    char error[256];
    library lt;
    cublasLtHandle_t blas;
    void *workspace;
    std::map<gemm_shape, gemm_way> ways;
};

struct gpu_graph {
    cudaGraphExec_t exec;
};

cudaStream_t gpu_stream(struct gpu *g) {
    return g->stream;
}

void gpu_launched(struct gpu *g, cudaError_t error, const char *what) {
    if (error != cudaSuccess && !g->error[0])
        snprintf(g->error, sizeof g->error, "%s: %s", what, cudaGetErrorString(error));
}

static void library_called(struct gpu *g, cublasStatus_t status, const char *what) {
    if (status != CUBLAS_STATUS_SUCCESS && !g->error[0])
        snprintf(g->error, sizeof g->error, "%s: cuBLASLt status %d", what, (int)status);
}

enum err gpu_open(struct gpu **out, char *msg, size_t msg_len) {
    int n = 0, driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return err_set(msg, msg_len, ERR_NO_CUDA, "this machine has no NVIDIA driver");
    cudaError_t error = cudaGetDeviceCount(&n);
    if (error == cudaSuccess && n == 0) error = cudaErrorNoDevice;
    if (error != cudaSuccess)
        return err_set(msg, msg_len, ERR_NO_CUDA, "there is no CUDA device to use: %s",
                       cudaGetErrorString(error));
    cudaDeviceProp of;
    error = cudaGetDeviceProperties(&of, 0);
    if (error == cudaSuccess) error = cudaSetDevice(0);
    if (error != cudaSuccess)
        return err_set(msg, msg_len, ERR_NO_CUDA, "the CUDA device cannot be used: %s",
                       cudaGetErrorString(error));
    if (of.major < 8)
        return err_set(msg, msg_len, ERR_NO_CUDA,
                       "%s has compute capability %d.%d; 8.0 (Ampere) or later is needed", of.name,
                       of.major, of.minor);
    struct gpu *g = new (std::nothrow) gpu();
    if (!g) return ERR_NOMEM;
    snprintf(g->info.name, sizeof g->info.name, "%.127s", of.name);
    g->info.capability = of.major * 10 + of.minor;
    g->info.n_processors = of.multiProcessorCount;
    g->info.total_bytes = of.totalGlobalMem;
    enum err e = OK;
    if (!load_library(&g->lt) || g->lt.create(&g->blas) != CUBLAS_STATUS_SUCCESS)
        e = err_set(msg, msg_len, ERR_NO_CUDA,
                    "cuBLASLt (libcublasLt.so.13 of the CUDA toolkit) cannot be loaded: %s",
                    g->lt.handle ? "it lacks a function or does not start" : dlerror());
    /* the stream first waits for nothing of the default one: all work is on it */
    if (!e && (error = cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking)) != cudaSuccess)
        e = err_set(msg, msg_len, ERR_NO_CUDA, "%s: no stream: %s", of.name,
                    cudaGetErrorString(error));
    if (!e && gpu_alloc(g, &g->workspace, WORKSPACE))
        e = err_set(msg, msg_len, ERR_NO_CUDA, "%s has no %d MiB of memory free", of.name,
                    WORKSPACE >> 20);
    if (e) {
        gpu_close(g);
        return e;
    }
    *out = g;
    return OK;
}

void gpu_close(struct gpu *g) {
    if (!g) return;
    if (g->stream) cudaStreamSynchronize(g->stream);
    cudaFree(g->workspace);
    if (g->stream) cudaStreamDestroy(g->stream);
    if (g->blas) g->lt.destroy(g->blas);
    if (g->lt.handle) dlclose(g->lt.handle);
    delete g;
}

const struct gpu_info *gpu_info(const struct gpu *g) {
    return &g->info;
}

size_t gpu_free_bytes(struct gpu *g) {
    size_t free_now = 0, total = 0;
    gpu_launched(g, cudaMemGetInfo(&free_now, &total), "free memory");
    return free_now;
}

/* ---- memory ---- */

enum err gpu_alloc(struct gpu *g, void **out, size_t bytes) {
    void *at = NULL;
    if (cudaMalloc(&at, bytes ? bytes : 1) != cudaSuccess) {
        cudaGetLastError(); /* running out leaves the context whole */
        return ERR_NOMEM;
    }
    gpu_fill(g, at, 0, bytes);
    *out = at;
    return OK;
}

void gpu_release(struct gpu *g, void *at) {
    if (!at) return;
    gpu_launched(g, cudaStreamSynchronize(g->stream), "waiting");
    gpu_launched(g, cudaFree(at), "releasing memory");
}

enum err gpu_host_alloc(struct gpu *g, void **out, size_t bytes) {
    (void)g;
    if (cudaHostAlloc(out, bytes ? bytes : 1, cudaHostAllocDefault) == cudaSuccess) return OK;
    cudaGetLastError();
    return ERR_NOMEM;
}

void gpu_host_release(struct gpu *g, void *at) {
    if (!at) return;
    gpu_launched(g, cudaStreamSynchronize(g->stream), "waiting");
    gpu_launched(g, cudaFreeHost(at), "releasing memory");
}

void gpu_upload(struct gpu *g, void *device, const void *host, size_t bytes) {
    if (!bytes) return;
    gpu_launched(g, cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, g->stream),
                 "an upload");
}
void gpu_download(struct gpu *g, void *host, const void *device, size_t bytes) {
    if (!bytes) return;
    gpu_launched(g, cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, g->stream),
                 "a download");
}
void gpu_copy(struct gpu *g, void *to, const void *from, size_t bytes) {
    if (!bytes) return;
    gpu_launched(g, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, g->stream),
                 "a copy");
}
void gpu_fill(struct gpu *g, void *at, int byte, size_t bytes) {
    if (!bytes) return;
    gpu_launched(g, cudaMemsetAsync(at, byte, bytes, g->stream), "a fill");
}

/* ---- waiting, recording ---- */

enum err gpu_wait(struct gpu *g) {
    gpu_launched(g, cudaStreamSynchronize(g->stream), "queued work");
    return g->error[0] ? ERR_DEVICE : OK;
}

const char *gpu_error(const struct gpu *g) {
    return g->error;
}

void gpu_record_begin(struct gpu *g) {
    gpu_launched(g, cudaStreamBeginCapture(g->stream, cudaStreamCaptureModeThreadLocal),
                 "recording");
}

enum err gpu_record_end(struct gpu *g, struct gpu_graph **out) {
    cudaGraph_t recorded = NULL;
    cudaGraphExec_t exec = NULL;
    gpu_launched(g, cudaStreamEndCapture(g->stream, &recorded), "recording");
    if (recorded) {
        gpu_launched(g, cudaGraphInstantiate(&exec, recorded, 0), "a graph");
        cudaGraphDestroy(recorded);
    }
    if (g->error[0]) return ERR_DEVICE;
    struct gpu_graph *graph = new (std::nothrow) gpu_graph;
    if (!graph) {
        cudaGraphExecDestroy(exec);
        return ERR_NOMEM;
    }
    graph->exec = exec;
    *out = graph;
    return OK;
}

void gpu_replay(struct gpu *g, struct gpu_graph *graph) {
    gpu_launched(g, cudaGraphLaunch(graph->exec, g->stream), "a graph");
}

void gpu_graph_free(struct gpu *g, struct gpu_graph *graph) {
    if (!graph) return;
    gpu_launched(g, cudaStreamSynchronize(g->stream), "waiting");
    cudaGraphExecDestroy(graph->exec);
    delete graph;
}

/* ---- the GEMM ----
 *
 * In the library's column-major terms  Y^T [n_out x n_rows] = W^T' [n_out x n_in] X^T [n_in x n_rows]:  its m is n_out, n is
 * n_rows.  The algorithm is chosen once for each shape of W, for CHOSEN_ROWS rows, without split K, and then used for
 * any number of rows: tile and order of k are part of it, so a row's sum is always made in the same way.
 *
 * fp8 sums stay fp32 throughout (no "fast accumulation", which loses bits on Hopper).  Scales of rows and columns are
 * the library's "outer vectors" where its heuristics offer an algorithm for them, else the caller's business. */

enum { CHOSEN_ROWS = 512 };

struct gemm {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t w, x, y;
};

static void gemm_free(struct gpu *g, gemm *m) {
    if (m->y) g->lt.layout_destroy(m->y);
    if (m->x) g->lt.layout_destroy(m->x);
    if (m->w) g->lt.layout_destroy(m->w);
    if (m->operation) g->lt.desc_destroy(m->operation);
}

struct gemm_scales { /* on the device, fp32; NULL: none */
    const float *x, *w;
};

static cublasStatus_t set_scales(struct gpu *g, gemm *m, const gemm_scales &scales) {
#if CUBLAS_VERSION >= 120900
    const int32_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    const struct {
        cublasLtMatmulDescAttributes_t which;
        const void *value;
        size_t bytes;
    } all[] = {
        {CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode, sizeof mode},
        {CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode, sizeof mode},
        {CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &scales.w, sizeof scales.w},
        {CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &scales.x, sizeof scales.x},
    };
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    for (const auto &one : all)
        if (!status) status = g->lt.desc_set(m->operation, one.which, one.value, one.bytes);
    return status;
#else
    (void)g, (void)m, (void)scales;
    return CUBLAS_STATUS_NOT_SUPPORTED;
#endif
}

static cublasStatus_t gemm_describe(struct gpu *g, gemm *m, const gemm_shape &s, size_t y_stride,
                                    size_t x_stride, int n_rows, const gemm_scales &scales) {
    const cudaDataType type = s.element_bytes == 4   ? CUDA_R_32F
                              : s.element_bytes == 2 ? CUDA_R_16BF
                                                     : CUDA_R_8F_E4M3;
    const int8_t no_fast_sums = 0;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    cublasStatus_t status = g->lt.desc_create(&m->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (!status)
        status = g->lt.desc_set(m->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                sizeof transposed);
    if (!status && s.element_bytes == 1)
        status = g->lt.desc_set(m->operation, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &no_fast_sums,
                                sizeof no_fast_sums);
    if (!status && scales.x) status = set_scales(g, m, scales);
    if (!status)
        status = g->lt.layout_create(&m->w, type, (uint64_t)s.n_in, (uint64_t)s.n_out, s.n_in);
    if (!status)
        status = g->lt.layout_create(&m->x, type, (uint64_t)s.n_in, (uint64_t)n_rows,
                                     (int64_t)x_stride);
    if (!status)
        status = g->lt.layout_create(&m->y, CUDA_R_32F, (uint64_t)s.n_out, (uint64_t)n_rows,
                                     (int64_t)y_stride);
    return status;
}

static cublasStatus_t gemm_choose(struct gpu *g, const gemm_shape &s, const gemm_scales &scales,
                                  cublasLtMatmulAlgo_t *chosen) {
    gemm m = {};
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t found[8];
    int n_found = 0;
    const uint32_t no_reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
    const size_t workspace = WORKSPACE;
    const uint32_t alignment = 16; /* of x and y: any number of rows must take the algorithm */
    cublasStatus_t status =
        gemm_describe(g, &m, s, (size_t)s.n_out, (size_t)s.n_in, CHOSEN_ROWS, scales);
    if (!status) status = g->lt.preference_create(&preference);
    auto prefer = [&](cublasLtMatmulPreferenceAttributes_t which, const void *value, size_t bytes) {
        if (!status) status = g->lt.preference_set(preference, which, value, bytes);
    };
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_reduction, sizeof no_reduction);
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment, sizeof alignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment, sizeof alignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment, sizeof alignment);
    if (!status)
        status = g->lt.heuristic(g->blas, m.operation, m.w, m.x, m.y, m.y, preference, 8, found,
                                 &n_found);
    if (!status) status = CUBLAS_STATUS_NOT_SUPPORTED;
    for (int i = 0; i < n_found && status; i++) {
        int32_t split_k = 1;
        size_t written;
        if (found[i].state != CUBLAS_STATUS_SUCCESS) continue;
        g->lt.config_get(&found[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split_k, sizeof split_k,
                         &written);
        if (split_k > 1) continue;
        *chosen = found[i].algo;
        status = CUBLAS_STATUS_SUCCESS;
    }
    if (preference) g->lt.preference_destroy(preference);
    gemm_free(g, &m);
    return status;
}

/* NULL, and an error is kept: there is none. */
static const gemm_way *way_for(struct gpu *g, const gemm_shape &s, const gemm_scales &scales) {
    auto known = g->ways.find(s);
    if (known != g->ways.end()) return &known->second;
    gemm_way way = {};
    cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
    if (scales.x) status = gemm_choose(g, s, scales, &way.algorithm);
    way.scaled = !status;
    if (status) status = gemm_choose(g, s, {}, &way.algorithm);
    library_called(g, status, "choosing a GEMM");
    return status ? NULL : &g->ways.emplace(s, way).first->second;
}

static bool multiply(struct gpu *g, float *y, size_t y_stride, const void *x, size_t x_stride,
                     int n_rows, const void *w, const gemm_shape &s, const gemm_scales &scales) {
    if (g->error[0] || n_rows <= 0) return true;
    const gemm_way *way = way_for(g, s, scales);
    if (!way) return true;
    gemm m = {};
    const float one = 1, zero = 0;
    cublasStatus_t status = gemm_describe(g, &m, s, y_stride, x_stride, n_rows,
                                          way->scaled ? scales : gemm_scales{});
    if (!status)
        status = g->lt.matmul(g->blas, m.operation, &one, w, m.w, x, m.x, &zero, y, m.y, y, m.y,
                              &way->algorithm, g->workspace, WORKSPACE, g->stream);
    library_called(g, status, "a GEMM");
    gemm_free(g, &m);
    return way->scaled;
}

void gpu_gemm(struct gpu *g, float *y, size_t y_stride, const void *x, size_t x_stride, int n_rows,
              const void *w, int n_out, int n_in, int element_bytes) {
    multiply(g, y, y_stride, x, x_stride, n_rows, w, {n_out, n_in, element_bytes}, {});
}

bool gpu_gemm_fp8(struct gpu *g, float *y, size_t y_stride, const void *x, const float *x_scales,
                  int n_rows, const void *w, const float *w_scales, int n_out, int n_in) {
    return multiply(g, y, y_stride, x, (size_t)n_in, n_rows, w, {n_out, n_in, 1},
                    {x_scales, w_scales});
}
