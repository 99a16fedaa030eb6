/* emu_gpu.cpp - gpu.h over plain memory: what is queued is a list of functions, run when the host
 * waits. */
#include "tests/emu/emu.h"

#include "compute/cuda.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

typedef std::vector<std::function<void()>> work;

struct gpu_graph {
    work steps;
};

struct gpu {
    struct gpu_info info;
    size_t used;
    std::map<void *, size_t> memory, host;
    work queued;
    bool recording;
    std::string error;
};

static const size_t LIMIT_THREADS = 1024, LIMIT_SHARED = 227 << 10, LIMIT_YZ = 65535;

static void queue(struct gpu *g, std::function<void()> step) {
    g->queued.push_back(std::move(step));
}

void emu::enqueue(struct gpu *g, const char *name, dim3 grid, unsigned threads, size_t shared,
                  std::function<void()> kernel) {
    if (!grid.x || !grid.y || !grid.z || grid.y > LIMIT_YZ || grid.z > LIMIT_YZ || !threads ||
        threads > LIMIT_THREADS || shared > LIMIT_SHARED) {
        if (g->error.empty()) g->error = std::string(name) + ": a launch that no device takes";
        return;
    }
    queue(g, [=] { emu::run_grid(name, grid, threads, shared, kernel); });
}

static int n_open;

enum err gpu_open(struct gpu **out, char *msg, size_t msg_len) {
    (void)msg, (void)msg_len;
    emu::read_environment();
    struct gpu *g = new gpu();
    strcpy(g->info.name, "emulated device");
    const char *capability = getenv("URCHIN_EMULATED_CAPABILITY");
    g->info.capability = capability ? atoi(capability) : 90;
    g->info.n_processors = 4;
    const char *processors = getenv("URCHIN_EMULATED_PROCESSORS");
    if (processors) g->info.n_processors = atoi(processors);
    const char *bytes = getenv("URCHIN_EMULATED_BYTES");
    g->info.total_bytes = bytes ? strtoull(bytes, NULL, 10) : (unsigned long long)4 << 30;
    g->info.emulated = true;
    n_open++;
    *out = g;
    return OK;
}

void gpu_close(struct gpu *g) {
    if (!g) return;
    for (auto &one : g->memory)
        free(one.first);
    for (auto &one : g->host)
        free(one.first);
    delete g;
    if (--n_open) return;
    emu::free_stacks();
}

const struct gpu_info *gpu_info(const struct gpu *g) {
    return &g->info;
}
size_t gpu_free_bytes(struct gpu *g) {
    return g->info.total_bytes - g->used;
}

enum err gpu_alloc(struct gpu *g, void **out, size_t bytes) {
    void *at = nullptr;
    if (bytes > gpu_free_bytes(g) || posix_memalign(&at, 256, bytes ? bytes : 1)) return ERR_NOMEM;
    memset(at, 0, bytes);
    g->memory[at] = bytes;
    g->used += bytes;
    *out = at;
    return OK;
}

void gpu_release(struct gpu *g, void *at) {
    if (!at) return;
    gpu_wait(g);
    g->used -= g->memory.at(at);
    g->memory.erase(at);
    free(at);
}

enum err gpu_host_alloc(struct gpu *g, void **out, size_t bytes) {
    void *at = nullptr;
    if (posix_memalign(&at, 256, bytes ? bytes : 1)) return ERR_NOMEM;
    memset(at, 0xff, bytes);
    g->host[at] = bytes;
    *out = at;
    return OK;
}

void gpu_host_release(struct gpu *g, void *at) {
    if (!at) return;
    gpu_wait(g);
    g->host.erase(at);
    free(at);
}

/* Copies stay inside one allocation. */
static void check_device(struct gpu *g, const void *at, size_t bytes, const char *what) {
    auto after = g->memory.upper_bound((void *)at);
    if (after != g->memory.begin()) {
        auto one = std::prev(after);
        if ((const char *)at + bytes <= (const char *)one->first + one->second) return;
    }
    fprintf(stderr, "emu: %s of %zu bytes outside the device's memory\n", what, bytes);
    abort();
}

static void not_recorded(struct gpu *g, const char *what) {
    if (g->recording && g->error.empty())
        g->error = std::string(what) + " while a graph is recorded";
}

void gpu_upload(struct gpu *g, void *device, const void *host, size_t bytes) {
    not_recorded(g, "an upload");
    check_device(g, device, bytes, "an upload");
    queue(g, [=] { memcpy(device, host, bytes); });
}
void gpu_download(struct gpu *g, void *host, const void *device, size_t bytes) {
    not_recorded(g, "a download");
    check_device(g, device, bytes, "a download");
    memset(host, 0xff, bytes);
    queue(g, [=] { memcpy(host, device, bytes); });
}
void gpu_copy(struct gpu *g, void *to, const void *from, size_t bytes) {
    check_device(g, to, bytes, "a copy");
    check_device(g, from, bytes, "a copy");
    queue(g, [=] { memmove(to, from, bytes); });
}
void gpu_fill(struct gpu *g, void *at, int byte, size_t bytes) {
    check_device(g, at, bytes, "a fill");
    queue(g, [=] { memset(at, byte, bytes); });
}

enum err gpu_wait(struct gpu *g) {
    not_recorded(g, "a wait");
    work steps;
    if (!g->recording) steps.swap(g->queued);
    for (auto &step : steps)
        if (g->error.empty()) step();
    return g->error.empty() ? OK : ERR_DEVICE;
}
const char *gpu_error(const struct gpu *g) {
    return g->error.c_str();
}

void gpu_record_begin(struct gpu *g) {
    gpu_wait(g);
    g->recording = true;
}
enum err gpu_record_end(struct gpu *g, struct gpu_graph **out) {
    g->recording = false;
    struct gpu_graph *graph = new gpu_graph();
    graph->steps.swap(g->queued);
    if (!g->error.empty()) {
        delete graph;
        return ERR_DEVICE;
    }
    *out = graph;
    return OK;
}
void gpu_replay(struct gpu *g, struct gpu_graph *graph) {
    not_recorded(g, "a replay");
    for (const auto &step : graph->steps)
        g->queued.push_back(step);
}
void gpu_graph_free(struct gpu *g, struct gpu_graph *graph) {
    if (!graph) return;
    gpu_wait(g);
    delete graph;
}

void gpu_gemm(struct gpu *g, float *y, size_t y_stride, const void *x, size_t x_stride, int n_rows,
              const void *w, int n_out, int n_in, int element_bytes) {
    queue(g, [=] {
        auto element = [&](const void *at, size_t i) {
            return element_bytes == 4 ? ((const float *)at)[i]
                                      : bf16_to_float(((const uint16_t *)at)[i]);
        };
        std::vector<float> row((size_t)n_in);
        for (size_t m = 0; m < (size_t)n_rows; m++) {
            for (size_t k = 0; k < (size_t)n_in; k++)
                row[k] = element(x, m * x_stride + k);
            for (size_t n = 0; n < (size_t)n_out; n++) {
                float lanes[8] = {}; /* eight sums, so that the loop below is one of vectors */
                size_t k = 0, from = n * (size_t)n_in;
                for (; k + 8 <= (size_t)n_in; k += 8)
                    for (size_t i = 0; i < 8; i++)
                        lanes[i] += row[k + i] * element(w, from + k + i);
                for (; k < (size_t)n_in; k++)
                    lanes[k % 8] += row[k] * element(w, from + k);
                float sum = 0;
                for (float lane : lanes)
                    sum += lane;
                y[m * y_stride + n] = sum;
            }
        }
    });
}

/* As the library: scales on 9.0 only. */
bool gpu_gemm_fp8(struct gpu *g, float *y, size_t y_stride, const void *x, const float *x_scales,
                  int n_rows, const void *w, const float *w_scales, int n_out, int n_in) {
    const bool scaled = g->info.capability == 90;
    if ((n_out % 16 || n_in % 16 || (uintptr_t)x % 16 || (uintptr_t)w % 16 ||
         g->info.capability < 89) &&
        g->error.empty())
        g->error = "a GEMM of fp8 that the library does not take";
    queue(g, [=] {
        float value[256];
        for (int e = 0; e < 256; e++)
            value[e] = e4m3_to_float((uint8_t)e);
        for (size_t m = 0; m < (size_t)n_rows; m++)
            for (size_t n = 0; n < (size_t)n_out; n++) {
                const uint8_t *of_x = (const uint8_t *)x + m * (size_t)n_in,
                              *of_w = (const uint8_t *)w + n * (size_t)n_in;
                float sum = 0;
                for (int k = 0; k < n_in; k++)
                    sum += value[of_x[k]] * value[of_w[k]];
                y[m * y_stride + n] = scaled ? x_scales[m] * w_scales[n] * sum : sum;
            }
    });
    return scaled;
}
