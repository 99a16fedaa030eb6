/* emu.h - a CUDA device on the CPU, for tests: gpu.h's third implementation.
 *
 * Kernels are compiled by the host compiler from the very source that nvcc reads (compute/cuda.h).  Every thread of a
 * block is a fibre that runs to its next barrier; one block runs at a time.  What is queued runs when the host waits,
 * and not before, so what the host changes or reads too early shows.  Shared memory is NaN when a block
 * starts, an asynchronous copy arrives when it is waited for and leaves NaN until then, device memory is one allocation
 * each (AddressSanitizer sees every byte beyond), ldmatrix sees what was in shared memory at its warp's last barrier
 * (shuffles and mma are none), and threads of a warp or block that part before a barrier are an error.
 *
 *   URCHIN_EMULATED_BYTES=N     of device memory, in place of 4 GiB
 *   URCHIN_EMULATED_PROCESSORS=N in place of 4
 *   URCHIN_EMULATED_CAPABILITY=N in place of 90
 *   URCHIN_EMU_SKIP=FILE:LINE   leaves out that barrier (or wait for copies): a test must fail
 *   URCHIN_EMU_SITES=FILE       appends every such place that was met, and how often */
#ifndef URCHIN_TESTS_EMU_H
#define URCHIN_TESTS_EMU_H

#include "compute/gpu.h"
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 0: all threads step by step, blocks in order.  1: threads in random order.  2: one warp alone as far as it gets, warps
 * and blocks in random order, which finds missing barriers that step by step hides. */
void emu_set_order(int mode, uint64_t seed);

#ifdef __cplusplus
}
#endif
#endif
