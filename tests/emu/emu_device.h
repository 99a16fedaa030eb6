/* emu_device.h - what a kernel needs of CUDA, for a host compiler: included by compute/cuda.h, which says what each
 * name does.  emu.cpp runs the threads. */
#ifndef URCHIN_TESTS_EMU_DEVICE_H
#define URCHIN_TESTS_EMU_DEVICE_H

#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <vector>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {
    }
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emu {

struct index {
    unsigned x, y, z;
};
struct copy {
    void *to;
    const void *from;
};
/* An exchange (shuffle, ldmatrix, mma) brings a warp's lanes together; only a barrier orders memory. */
enum status { READY, AT_WARP_BARRIER, AT_EXCHANGE, AT_BLOCK_BARRIER, DONE };
struct fibre {
    void *stack_pointer;
    char *stack;
    index thread;
    int lane, warp, parity;
    status at;
    std::vector<copy> copies;   /* not yet arrived */
    std::vector<size_t> groups; /* copies up to here were committed together */
};
struct site {
    const char *file;
    int line;
};

extern fibre *current;
extern index block_index;
extern dim3 block_size, grid_size;
extern unsigned char *dynamic_shared;

void wait_at(status barrier);   /* until all threads of the warp or block are there */
bool met(const site &where);    /* false: this one is left out */
uint32_t *exchange(int lane);   /* 8 words of a lane of the current warp, for this exchange */
void exchanged();               /* the current lane has read what it wanted */
void enqueue(struct gpu *g, const char *name, dim3 grid, unsigned threads, size_t shared,
             std::function<void()> body);

void run_grid(const char *name, dim3 grid, unsigned threads, size_t shared, const std::function<void()> &kernel);
void read_environment();
void free_stacks();

inline void warp_barrier(const site &where) {
    if (met(where)) wait_at(AT_WARP_BARRIER);
}
inline void block_barrier(const site &where) {
    if (met(where)) wait_at(AT_BLOCK_BARRIER);
}

template <class T> T from_lane(T value, int lane) {
    static_assert(sizeof(T) == 4, "a word");
    memcpy(exchange(current->lane), &value, 4);
    wait_at(AT_EXCHANGE);
    T other;
    memcpy(&other, exchange(lane), 4);
    exchanged();
    return other;
}

void copy_later(void *to, const void *from);
void commit_copies();
void finish_copies(size_t but);
template <int N> void wait_for_copies(const site &where) {
    if (met(where)) finish_copies(N);
}

void load_matrices(uint32_t *r, int n, bool transposed, const void *row);

/* Arguments are copied, converted to the kernel's parameters, when the launch is queued. */
template <class... Parameters, class... Arguments>
void launch(struct gpu *g, const char *name, dim3 grid, unsigned threads, size_t shared,
            void (*kernel)(Parameters...), Arguments &&...arguments) {
    std::tuple<std::decay_t<Parameters>...> copied{static_cast<Parameters>(arguments)...};
    enqueue(g, name, grid, threads, shared, [=] { std::apply(kernel, copied); });
}

} // namespace emu

#define threadIdx (emu::current->thread)
#define blockIdx emu::block_index
#define blockDim emu::block_size
#define gridDim emu::grid_size
#define __global__
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static __attribute__((section("emu_shared")))
#define DEVICE static inline
#define DYNAMIC_SHARED(type, name) type *name = (type *)emu::dynamic_shared
#define LAUNCH(g, kernel, grid, threads, shared, ...)                                              \
    emu::launch(g, #kernel, grid, threads, shared, kernel, __VA_ARGS__)

#define __syncthreads() emu::block_barrier(emu::site{__FILE__, __LINE__})
#define __syncwarp() emu::warp_barrier(emu::site{__FILE__, __LINE__})

template <class T> static inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return emu::from_lane(value, emu::current->lane ^ mask);
}
template <class T> static inline T __shfl_sync(unsigned, T value, int lane) {
    return emu::from_lane(value, lane % 32);
}
template <class T> static inline T __shfl_down_sync(unsigned, T value, int by) {
    int lane = emu::current->lane + by;
    return emu::from_lane(value, lane < 32 ? lane : emu::current->lane);
}
template <class T> static inline T __shfl_up_sync(unsigned, T value, int by) {
    int lane = emu::current->lane - by;
    return emu::from_lane(value, lane >= 0 ? lane : emu::current->lane);
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned all = 0;
    *emu::exchange(emu::current->lane) = predicate != 0;
    emu::wait_at(emu::AT_EXCHANGE);
    for (int lane = 0; lane < 32; lane++)
        all |= *emu::exchange(lane) << lane;
    emu::exchanged();
    return all;
}
template <class T> static inline T atomicAdd(T *at, T value) {
    T before = *at;
    *at = before + value;
    return before;
}

static inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline float half_to_float(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, rest = bits & 1023;
    if (exponent == 0) return as_float(sign | as_bits((float)rest * 0x1p-24f));
    if (exponent == 31) return as_float(sign | 0x7f800000u | rest << 13);
    return as_float(sign | (exponent + 112) << 23 | rest << 13);
}
static inline float exp2_fast(float x) {
    float y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;
}
static inline uint4 load_once(const void *at) {
    return *(const uint4 *)at;
}

#define cp_async16 emu::copy_later
#define cp_async_commit emu::commit_copies
/* cp_async_wait<N>() : the place comes first, and the call's own parentheses are those of now() */
namespace emu {
extern site waiting;
template <int N> inline void wait_now() {
    wait_for_copies<N>(waiting);
}
} // namespace emu
#define cp_async_wait emu::waiting = emu::site{__FILE__, __LINE__}, emu::wait_now

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
static inline void ldmatrix4(uint32_t (&r)[4], const void *row) {
    emu::load_matrices(r, 4, false, row);
}
static inline void ldmatrix4_t(uint32_t (&r)[4], const void *row) {
    emu::load_matrices(r, 4, true, row);
}
static inline void ldmatrix2(uint32_t (&r)[2], const void *row) {
    emu::load_matrices(r, 2, false, row);
}
static inline void ldmatrix2_t(uint32_t (&r)[2], const void *row) {
    emu::load_matrices(r, 2, true, row);
}

#endif
