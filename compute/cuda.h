/* cuda.h - what kernels are written with: CUDA C++ that nvcc compiles for a device, and a host compiler for
 * tests/emu, which runs the same source on the CPU, thread by thread.
 *
 *   DEVICE                                  before a function that kernels call
 *   DYNAMIC_SHARED(type, name);             type *name: the shared memory of the launch, 128-byte aligned
 *   LAUNCH(g, kernel, grid, threads, shared_bytes, arguments...)
 *
 * A launch is queued on g's stream; its error, if any, is kept for gpu_wait().  A template kernel stands in
 * parentheses, and has its shared memory from DYNAMIC_SHARED.  No early return of some threads of a block that
 * meets a barrier later, and no warp operation that some lanes miss. */
#ifndef URCHIN_COMPUTE_CUDA_H
#define URCHIN_COMPUTE_CUDA_H

#include "compute/gpu.h"
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DEVICE static __device__ __forceinline__
#define DYNAMIC_SHARED(type, name)                                                                 \
    extern __shared__ __align__(128) unsigned char launched_with[];                                \
    type *name = (type *)launched_with

/* gpu_cuda.cu: the stream, and where an error of what was queued on it goes. */
cudaStream_t gpu_stream(struct gpu *g);
void gpu_launched(struct gpu *g, cudaError_t error, const char *what);

template <class... Parameters, class... Arguments>
static void gpu_launch(struct gpu *g, const char *name, dim3 grid, unsigned threads, size_t shared,
                       void (*kernel)(Parameters...), Arguments... arguments) {
    if (shared > 48 << 10) /* more has to be asked for */
        cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)shared);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = gpu_stream(g);
    gpu_launched(g, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}
#define LAUNCH(g, kernel, grid, threads, shared, ...)                                              \
    gpu_launch(g, #kernel, grid, threads, shared, kernel, __VA_ARGS__)

DEVICE float as_float(uint32_t bits) {
    return __uint_as_float(bits);
}
DEVICE uint32_t as_bits(float x) {
    return __float_as_uint(x);
}
DEVICE float half_to_float(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}
DEVICE float exp2_fast(float x) { /* 2 ulp; results below 2^-126 are 0 */
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 16 bytes that are read once: they pass the first cache. */
DEVICE uint4 load_once(const void *at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

/* 16 bytes of global to shared memory, both aligned, there after a wait: groups complete in the order of their
 * commits, and wait<N> leaves at most the last N unfinished - for the thread's own copies.  A barrier shows them to
 * others. */
DEVICE void cp_async16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(global)
                 : "memory");
}
DEVICE void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* d [16 x 8] += a [16 x 16] b [16 x 8], bf16 products, fp32 sums.  Lane 4 g + t holds
 *   d[0, 1]: row g, columns 2 t, 2 t + 1        d[2, 3]: row g + 8
 *   a[0]: row g, k 2 t, 2 t + 1 (lower half the lower k); a[1]: row g + 8; a[2], a[3]: the same, k + 8
 *   b[0]: column g, k 2 t, 2 t + 1; b[1]: k + 8 */
DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* 8 x 8 matrices of 16 bits from shared memory.  Lane l names row l % 8 of matrix l / 8 (16 bytes, aligned); lane
 * 4 g + t gets of matrix i row g, columns 2 t and 2 t + 1, or with _t column g, rows 2 t and 2 t + 1. */
DEVICE void ldmatrix4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
DEVICE void ldmatrix4_t(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
DEVICE void ldmatrix2(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
DEVICE void ldmatrix2_t(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

#else
#include <emu_device.h> /* tests/emu: the same names for a host compiler */
#endif

/* ---- bf16 ---- */

DEVICE float bf16_to_float(uint16_t x) {
    return as_float((uint32_t)x << 16);
}

/* To the nearest, ties to even; NaN stays NaN. */
DEVICE uint16_t float_to_bf16(float x) {
    uint32_t bits = as_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

DEVICE uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    return (uint32_t)float_to_bf16(low) | (uint32_t)float_to_bf16(high) << 16;
#endif
}

/* ---- E4M3: ops.h's twin ---- */

/* To the nearest, ties to even; beyond 448: 448; NaN stays NaN.  Adding 2^14, whose last bit is worth 2^-9, rounds what lies
 * below 2^-6 to E4M3's multiples of 2^-9. */
DEVICE uint8_t float_to_e4m3(float x) {
    const uint32_t bits = as_bits(x), size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
    uint32_t code;
    if (size > 0x7f800000u)
        code = 0x7fu;
    else if (size >= 0x43e00000u) /* 448 */
        code = 0x7eu;
    else if (size < 0x3c800000u) /* 2^-6 */
        code = as_bits(as_float(size) + 16384.0f) - 0x46800000u;
    else
        code = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
    return (uint8_t)(code | sign);
}

DEVICE float e4m3_to_float(uint8_t e) {
    const uint32_t size = e & 0x7fu, sign = (uint32_t)(e & 0x80u) << 24;
    if (size == 0x7fu) return as_float(0x7fffffffu);
    return as_float(sign | as_bits(as_float(size << 20) * 0x1p120f));
}

/* Bytes 2 pair and 2 pair + 1 of q as two bf16, exactly: a byte's exponent and mantissa become the last bits of bf16's, which is
 * 2^-120 of its value (subnormal where the byte is), and are multiplied by 2^120.  Not for NaN. */
DEVICE uint32_t e4m3_pair_to_bf16(uint32_t q, int pair) {
#if defined(__CUDA_ARCH__)
    const uint32_t upper = __byte_perm(q, 0, pair ? 0x3424 : 0x1404);
#else
    const uint32_t two = q >> 16 * pair, upper = (two & 0xffu) << 8 | (two & 0xff00u) << 16;
#endif
    const uint32_t small = (upper & 0x80008000u) | (upper >> 4 & 0x07f007f0u);
#if defined(__CUDA_ARCH__)
    uint32_t both;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(both)
        : "r"(small), "r"(0x7b807b80u), "r"(0x80008000u)); /* small * 2^120 + -0 */
    return both;
#else
    return pack_bf16(bf16_to_float((uint16_t)small) * 0x1p120f,
                     bf16_to_float((uint16_t)(small >> 16)) * 0x1p120f);
#endif
}

/* ---- sums over threads, in an order of their own: every lane or thread gets the same bits ---- */

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
}

/* Over a block of whole warps; shared: 32 floats, of which no other use may be under way. */
DEVICE float block_sum(float x, float *shared) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0);
}

#endif
