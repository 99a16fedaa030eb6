/* emu.cpp - the emulated device (emu.h): fibres, barriers and asynchronous copies.  emu_gpu.cpp is
 * gpu.h.
 *
 * A fibre is a stack and a stack pointer; switching saves the registers that calls preserve.  All
 * fibres of a block run on one OS thread, so nothing here needs a lock. */
#include "tests/emu/emu.h"

#include "compute/cuda.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN 1
#else
#define ASAN 0
#endif

extern "C" {
extern unsigned char __start_emu_shared[] __attribute__((weak));
extern unsigned char __stop_emu_shared[] __attribute__((weak));
}

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

void read_environment() {
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

/* ---- what ldmatrix sees of shared memory ----
 *
 * ldmatrix and mma bring the lanes of a warp together, but order no memory: what other lanes wrote
 * is there behind __syncwarp() or __syncthreads() and not before.  So ldmatrix reads shared memory
 * as it was at its warp's last such barrier; kept only for kernels that have been seen to use it.
 */
struct view {
    std::vector<unsigned char> dynamic, fixed;
};
static std::set<std::string> with_matrices; /* names of such kernels */
static bool keeps_views;                    /* of the running grid */
static size_t dynamic_bytes;
static view of_block;
static std::vector<view> of_warp;
static std::vector<const view *> seen; /* [warp] */

/* Byte by byte: under AddressSanitizer variables of a section have gaps that memcpy() minds. */
__attribute__((no_sanitize("address"))) static void
copy_bytes(std::vector<unsigned char> &to, const unsigned char *from, size_t n) {
    to.resize(n);
    for (size_t i = 0; i < n; i++)
        to[i] = from[i];
}

static void look(view &v) {
    copy_bytes(v.dynamic, dynamic_shared, dynamic_bytes);
    copy_bytes(v.fixed, __start_emu_shared, (size_t)(__stop_emu_shared - __start_emu_shared));
}

static void look_all() {
    if (!keeps_views) return;
    look(of_block);
    seen.assign(seen.size(), &of_block);
}

static void look_warp(size_t warp) {
    if (!keeps_views) return;
    look(of_warp[warp]);
    seen[warp] = &of_warp[warp];
}

static uint16_t seen_half(const unsigned char *at) {
    uint16_t half;
    memcpy(&half, at, 2); /* AddressSanitizer sees every byte beyond */
    if (!keeps_views) return half;
    const view &v = *seen[(size_t)current->warp];
    if (at >= dynamic_shared && at < dynamic_shared + dynamic_bytes)
        memcpy(&half, &v.dynamic[(size_t)(at - dynamic_shared)], 2);
    else if (at >= __start_emu_shared && at < __stop_emu_shared)
        memcpy(&half, &v.fixed[(size_t)(at - __start_emu_shared)], 2);
    return half;
}

/* ---- what the lanes of a warp show each other ---- */

/* Two turns, used alternately: who still reads the last is not overwritten before all have met
 * again. */
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
    if (!keeps_views) with_matrices.insert(kernel_name);
    memcpy(exchange(lane), &row, sizeof row);
    wait_at(AT_EXCHANGE);
    for (int i = 0; i < n; i++) {
        uint16_t half[2];
        for (int e = 0; e < 2; e++) {
            int r0 = transposed ? lane % 4 * 2 + e : lane / 4;
            int c0 = transposed ? lane / 4 : lane % 4 * 2 + e;
            const unsigned char *from;
            memcpy(&from, exchange(8 * i + r0), sizeof from);
            half[e] = seen_half(from + 2 * c0);
        }
        r[i] = (uint32_t)half[0] | (uint32_t)half[1] << 16;
    }
    exchanged();
    wait_at(AT_EXCHANGE); /* no lane goes on and overwrites what another has yet to read */
}

} // namespace emu

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    using namespace emu;
    int lane = current->lane, g = lane / 4, t = lane % 4;
    uint32_t *mine = exchange(lane);
    memcpy(mine, a, sizeof a);
    memcpy(mine + 4, b, sizeof b);
    wait_at(AT_EXCHANGE);
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

namespace emu {

static int order_mode;
static std::mt19937_64 random_order;

__attribute__((no_sanitize("address"))) static void poison_shared() {
    for (unsigned char *at = __start_emu_shared; at < __stop_emu_shared; at++)
        *at = 0xff;
    memset(dynamic_shared, 0xff, dynamic_bytes);
}

[[noreturn]] static void parted(const char *how) {
    fprintf(stderr, "emu: %s, block (%u, %u, %u): %s\n", kernel_name, block_index.x, block_index.y,
            block_index.z, how);
    abort();
}

/* Lets a warp whose lanes have all come to the same barrier of the warp go on. */
static bool release_warp(size_t first, size_t end) {
    size_t n_done = 0, n_at[2] = {};
    for (size_t i = first; i < end; i++) {
        n_at[0] += fibres[i].at == AT_WARP_BARRIER;
        n_at[1] += fibres[i].at == AT_EXCHANGE;
        n_done += fibres[i].at == DONE;
    }
    size_t n_waiting = n_at[0] + n_at[1];
    if (n_waiting && n_waiting + n_done == end - first && n_done)
        parted("lanes of a warp returned while others wait for them");
    if (n_waiting != end - first) return false;
    if (n_at[0] && n_at[1]) parted("lanes of a warp wait at different barriers");
    if (n_at[0]) look_warp(first / 32);
    for (size_t i = first; i < end; i++)
        fibres[i].at = READY;
    return true;
}

static bool run_ready(size_t i) {
    if (fibres[i].at != READY) return false;
    switch_to(fibres[i]);
    return true;
}

static void run_block(size_t n) {
    size_t n_warps = (n + 31) / 32;
    shown.assign(n_warps * 2 * 32 * 8, 0xffffffffu);
    poison_shared();
    of_warp.resize(n_warps);
    seen.resize(n_warps);
    look_all();
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
        if (n_waiting == n) {
            look_all();
            for (size_t i = 0; i < n; i++)
                fibres[i].at = READY;
        } else if (!progress)
            parted("threads wait at different barriers, or some returned before one");
    }
    for (size_t i = 0; i < n; i++)
        if (!fibres[i].copies.empty()) parted("asynchronous copies were never waited for");
}

void run_grid(const char *name, dim3 grid, unsigned threads, size_t shared,
              const std::function<void()> &kernel) {
    kernel_name = name;
    body = &kernel;
    block_size = dim3(threads);
    grid_size = grid;
    void *memory = nullptr;
    if (posix_memalign(&memory, 128, shared ? shared : 1)) abort();
    dynamic_shared = (unsigned char *)memory;
    dynamic_bytes = shared;
    keeps_views = with_matrices.count(name) > 0;
    if (fibres.size() < threads) fibres.resize(threads);
    std::vector<uint64_t> blocks((size_t)grid.x * grid.y * grid.z);
    for (size_t i = 0; i < blocks.size(); i++)
        blocks[i] = i;
    if (order_mode) std::shuffle(blocks.begin(), blocks.end(), random_order);
    for (uint64_t b : blocks) {
        block_index = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y),
                       (unsigned)(b / grid.x / grid.y)};
        run_block(threads);
    }
    free(memory);
}

void free_stacks() {
    for (fibre &one : fibres)
        free(one.stack);
    fibres.clear();
}

} // namespace emu

extern "C" void emu_set_order(int mode, uint64_t seed) {
    emu::order_mode = mode;
    emu::random_order.seed(seed);
}
