/* emu.cpp - the emulated device (emu.h): fibres, barriers, asynchronous copies, and gpu.h over plain memory.
 *
 * A fibre is a stack and a stack pointer; switching saves the registers that calls preserve.  All fibres of a block
 * run on one OS thread, so nothing here needs a lock. */
#include "tests/emu/emu.h"

#include "compute/cuda.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN 1
#else
#define ASAN 0
#endif

namespace emu {

fibre *current;
index block_index;
dim3 block_size, grid_size;
unsigned char *dynamic_shared;
site waiting;

/* ---- switching stacks ---- */

#if defined(__x86_64__)
extern "C" void emu_switch(void **save, void *load);
__asm__(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch, . - emu_switch
)");
enum { SAVED_REGISTERS = 6 };
#elif defined(__aarch64__)
extern "C" void emu_switch(void **save, void *load);
__asm__(R"(
.text
.globl emu_switch
.type emu_switch, %function
emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emu_switch, . - emu_switch
)");
#else
#error "emu.cpp: this processor's switch of stacks is not written"
#endif

static const size_t STACK_BYTES = 64 << 10;
static std::vector<fibre> fibres; /* of the running block; stacks are kept */
static void *scheduler_stack;
static const std::function<void()> *body;
static const char *kernel_name = "";

static void switch_to(fibre &f) {
    current = &f;
    f.at = READY;
#if ASAN
    void *fake;
    __sanitizer_start_switch_fiber(&fake, f.stack, STACK_BYTES);
    emu_switch(&scheduler_stack, f.stack_pointer);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    emu_switch(&scheduler_stack, f.stack_pointer);
#endif
}

#if ASAN
static const void *scheduler_bottom;
static size_t scheduler_size;
#endif

static void back_to_scheduler(status at) {
    fibre &f = *current;
    f.at = at;
#if ASAN
    void *fake;
    __sanitizer_start_switch_fiber(at == DONE ? nullptr : &fake, scheduler_bottom, scheduler_size);
    emu_switch(&f.stack_pointer, scheduler_stack);
    __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_size);
#else
    emu_switch(&f.stack_pointer, scheduler_stack);
#endif
}

static void begin_fibre() {
#if ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    (*body)();
    back_to_scheduler(DONE);
    abort(); /* nobody goes on with it */
}

static void prepare(fibre &f) {
    if (!f.stack) f.stack = (char *)malloc(STACK_BYTES);
#if ASAN
    __asan_unpoison_memory_region(f.stack, STACK_BYTES); /* frames that were left for good */
#endif
    char *top = (char *)(((uintptr_t)f.stack + STACK_BYTES) & ~(uintptr_t)15);
#if defined(__x86_64__)
    void **at = (void **)top;
    *--at = nullptr;
    *--at = (void *)&begin_fibre;
    for (int i = 0; i < SAVED_REGISTERS; i++)
        *--at = nullptr;
    f.stack_pointer = at;
#else
    memset(top - 160, 0, 160);
    ((void **)(top - 160))[11] = (void *)&begin_fibre; /* x30 */
    f.stack_pointer = top - 160;
#endif
    f.at = READY;
    f.parity = 0;
    f.copies.clear();
    f.groups.clear();
}

/* ---- barriers ---- */

static std::map<std::pair<std::string, int>, uint64_t> n_met; /* times a site was met */
static std::string skipped_file;
static int skipped_line;
static const char *sites_path;

static void write_sites() {
    FILE *f = fopen(sites_path, "a");
    if (!f) return;
    for (const auto &one : n_met)
        fprintf(f, "%s:%d %llu\n", one.first.first.c_str(), one.first.second,
                (unsigned long long)one.second);
    fclose(f);
}

static void read_environment() {
    static bool done;
    if (done) return;
    done = true;
    const char *skip = getenv("URCHIN_EMU_SKIP");
    const char *colon = skip ? strrchr(skip, ':') : nullptr;
    if (colon) {
        skipped_file.assign(skip, (size_t)(colon - skip));
        skipped_line = atoi(colon + 1);
    }
    sites_path = getenv("URCHIN_EMU_SITES");
    if (sites_path) atexit(write_sites);
}

bool met(const site &where) {
    if (sites_path) n_met[{where.file, where.line}]++;
    return where.line != skipped_line || skipped_file != where.file;
}

void wait_at(status barrier) {
    back_to_scheduler(barrier);
}

/* ---- what the lanes of a warp show each other ---- */

/* Two turns, used alternately: who still reads the last is not overwritten before all have met again. */
static std::vector<uint32_t> shown; /* [warp][turn][lane][8] */

uint32_t *exchange(int lane) {
    size_t turn = (size_t)current->warp * 2 + (size_t)current->parity;
    return &shown[(turn * 32 + (size_t)lane) * 8];
}
void exchanged() {
    current->parity ^= 1;
}

/* ---- asynchronous copies ---- */

void copy_later(void *to, const void *from) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) {
        fprintf(stderr, "emu: %s: cp.async of an address that is not a multiple of 16\n",
                kernel_name);
        abort();
    }
    memset(to, 0xff, 16);
    current->copies.push_back({to, from});
}
void commit_copies() {
    current->groups.push_back(current->copies.size());
}
void finish_copies(size_t but) {
    fibre &f = *current;
    if (f.groups.size() <= but) return;
    size_t n_groups = f.groups.size() - but, n = f.groups[n_groups - 1];
    for (size_t i = 0; i < n; i++)
        memcpy(f.copies[i].to, f.copies[i].from, 16);
    f.copies.erase(f.copies.begin(), f.copies.begin() + (long)n);
    f.groups.erase(f.groups.begin(), f.groups.begin() + (long)n_groups);
    for (size_t &end : f.groups)
        end -= n;
}

/* ---- matrices ---- */

void load_matrices(uint32_t *r, int n, bool transposed, const void *row) {
    int lane = current->lane;
    if (lane < 8 * n && (uintptr_t)row % 16) {
        fprintf(stderr, "emu: %s: ldmatrix of a row that is not 16-byte aligned\n", kernel_name);
        abort();
    }
    memcpy(exchange(lane), &row, sizeof row);
    wait_at(AT_WARP_BARRIER);
    for (int i = 0; i < n; i++) {
        uint16_t half[2];
        for (int e = 0; e < 2; e++) {
            int r0 = transposed ? lane % 4 * 2 + e : lane / 4;
            int c0 = transposed ? lane / 4 : lane % 4 * 2 + e;
            const char *from;
            memcpy(&from, exchange(8 * i + r0), sizeof from);
            memcpy(&half[e], from + 2 * c0, 2);
        }
        r[i] = (uint32_t)half[0] | (uint32_t)half[1] << 16;
    }
    exchanged();
    wait_at(AT_WARP_BARRIER); /* no lane goes on and overwrites what another has yet to read */
}

} // namespace emu

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    using namespace emu;
    int lane = current->lane, g = lane / 4, t = lane % 4;
    uint32_t *mine = exchange(lane);
    memcpy(mine, a, sizeof a);
    memcpy(mine + 4, b, sizeof b);
    wait_at(AT_WARP_BARRIER);
    float of_a[2][16], of_b[2][16]; /* rows g and g + 8, columns 2 t and 2 t + 1 */
    for (int k = 0; k < 16; k++) {
        const int word = k / 8, quarter = k % 8 / 2, shift = k % 2 * 16;
        for (int e = 0; e < 2; e++) {
            of_a[e][k] =
                as_float((exchange(4 * g + quarter)[2 * word + e] >> shift & 0xffffu) << 16);
            of_b[e][k] =
                as_float((exchange(4 * (2 * t + e) + quarter)[4 + word] >> shift & 0xffffu) << 16);
        }
    }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++)
            d[i] += of_a[i / 2][k] * of_b[i % 2][k];
    exchanged();
}

/* ---- blocks ---- */

extern "C" {
extern unsigned char __start_emu_shared[] __attribute__((weak));
extern unsigned char __stop_emu_shared[] __attribute__((weak));
}

namespace emu {

static int order_mode;
static std::mt19937_64 random_order;

__attribute__((no_sanitize("address"))) static void poison_shared(size_t dynamic_bytes) {
    for (unsigned char *at = __start_emu_shared; at < __stop_emu_shared; at++)
        *at = 0xff;
    memset(dynamic_shared, 0xff, dynamic_bytes);
}

[[noreturn]] static void parted(const char *how) {
    fprintf(stderr, "emu: %s, block (%u, %u, %u): %s\n", kernel_name, block_index.x, block_index.y,
            block_index.z, how);
    abort();
}

/* Lets a warp whose lanes have all come to a barrier of the warp go on. */
static bool release_warp(size_t first, size_t end) {
    size_t n_waiting = 0, n_done = 0;
    for (size_t i = first; i < end; i++) {
        n_waiting += fibres[i].at == AT_WARP_BARRIER;
        n_done += fibres[i].at == DONE;
    }
    if (n_waiting && n_waiting + n_done == end - first && n_done)
        parted("lanes of a warp returned while others wait for them");
    if (n_waiting != end - first) return false;
    for (size_t i = first; i < end; i++)
        fibres[i].at = READY;
    return true;
}

static bool run_ready(size_t i) {
    if (fibres[i].at != READY) return false;
    switch_to(fibres[i]);
    return true;
}

static void run_block(size_t n, size_t dynamic_bytes) {
    size_t n_warps = (n + 31) / 32;
    shown.assign(n_warps * 2 * 32 * 8, 0xffffffffu);
    poison_shared(dynamic_bytes);
    for (size_t i = 0; i < n; i++) {
        fibre &f = fibres[i];
        f.thread = {(unsigned)i, 0, 0};
        f.lane = (int)(i % 32);
        f.warp = (int)(i / 32);
        prepare(f);
    }
    std::vector<size_t> order(order_mode == 2 ? n_warps : n);
    for (size_t i = 0; i < order.size(); i++)
        order[i] = i;
    for (;;) {
        bool progress = false;
        if (order_mode) std::shuffle(order.begin(), order.end(), random_order);
        if (order_mode == 2) {
            for (size_t w : order)
                for (bool more = true; more;) {
                    size_t first = w * 32, end = std::min(n, first + 32);
                    more = false;
                    for (size_t i = first; i < end; i++)
                        more |= run_ready(i);
                    more |= release_warp(first, end);
                    progress |= more;
                }
        } else {
            for (size_t i : order)
                progress |= run_ready(i);
            for (size_t first = 0; first < n; first += 32)
                progress |= release_warp(first, std::min(n, first + 32));
        }
        size_t n_waiting = 0, n_done = 0;
        for (size_t i = 0; i < n; i++) {
            n_waiting += fibres[i].at == AT_BLOCK_BARRIER;
            n_done += fibres[i].at == DONE;
        }
        if (n_done == n) break;
        if (n_waiting == n)
            for (size_t i = 0; i < n; i++)
                fibres[i].at = READY;
        else if (!progress)
            parted("threads wait at different barriers, or some returned before one");
    }
    for (size_t i = 0; i < n; i++)
        if (!fibres[i].copies.empty()) parted("asynchronous copies were never waited for");
}

static void run_grid(const char *name, dim3 grid, unsigned threads, size_t shared,
                     const std::function<void()> &kernel) {
    kernel_name = name;
    body = &kernel;
    block_size = dim3(threads);
    grid_size = grid;
    void *memory = nullptr;
    if (posix_memalign(&memory, 128, shared ? shared : 1)) abort();
    dynamic_shared = (unsigned char *)memory;
    if (fibres.size() < threads) fibres.resize(threads);
    std::vector<uint64_t> blocks((size_t)grid.x * grid.y * grid.z);
    for (size_t i = 0; i < blocks.size(); i++)
        blocks[i] = i;
    if (order_mode) std::shuffle(blocks.begin(), blocks.end(), random_order);
    for (uint64_t b : blocks) {
        block_index = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y),
                       (unsigned)(b / grid.x / grid.y)};
        run_block(threads, shared);
    }
    free(memory);
}

} // namespace emu

extern "C" void emu_set_order(int mode, uint64_t seed) {
    emu::order_mode = mode;
    emu::random_order.seed(seed);
}

/* ---- gpu.h ---- */

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
    queue(g, [=] { run_grid(name, grid, threads, shared, kernel); });
}

static int n_open;

enum err gpu_open(struct gpu **out, char *msg, size_t msg_len) {
    (void)msg, (void)msg_len;
    emu::read_environment();
    struct gpu *g = new gpu();
    strcpy(g->info.name, "emulated device");
    g->info.capability = 90;
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
    for (auto &one : emu::fibres)
        free(one.stack);
    emu::fibres.clear();
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
