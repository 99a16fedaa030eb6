/* cpu.h - which instruction family the kernels run with, chosen once at start.
 *
 * Kernel sources (compute/kernels.c, attention/kernels.c) are written with 16-lane vector types
 * and compiled once per family; each build exports one table of functions.  Lanes and the order
 * of every sum are the same in all families. */
#ifndef URCHIN_COMPUTE_CPU_H
#define URCHIN_COMPUTE_CPU_H

#include <stdbool.h>

enum cpu_isa {
    CPU_GENERIC, /* what the compiler targets by default: portable C */
    CPU_AVX2,    /* AVX2, FMA, F16C */
    CPU_AVX512,  /* AVX-512 F, BW, VL, DQ, VNNI */
    CPU_AMX,     /* that and AMX tiles, int8 and bf16: matmul */
    CPU_DOTPROD, /* 64-bit Arm: NEON with the dot products of Armv8.2 */
};

/* The best family this machine offers, or the one named by cpu_isa_limit().  The first call asks
 * the system for AMX's registers where the CPU has them, for all threads of the process. */
enum cpu_isa cpu_isa(void);

/* Tests and --isa: use at most this family from now on.  Call before any model is opened. */
void cpu_isa_limit(enum cpu_isa most);

/* Whether loads in ascending order alone read as fast as the memory gives, so that asking for lines
 * before (software prefetch) only takes from the misses that a core may have.  So on AMD's Zen 4; where
 * it was not measured, false. */
bool cpu_streams(void);

const char *cpu_isa_name(enum cpu_isa isa); /* "generic", "avx2", "avx512", "amx", "dotprod" */

#endif
