/* cpu.c - which instruction family the kernels run with. */
#include "compute/cpu.h"

#include <stdatomic.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
enum { REQUEST_PERMISSION = 0x1023 }; /* ARCH_REQ_XCOMP_PERM of asm/prctl.h, since Linux 5.16 */
enum { TILE_DATA = 18 };              /* XFEATURE_XTILEDATA: which registers */
enum { HAS_AMX = 1 << 22 | 1 << 24 | 1 << 25 }; /* leaf 7, EDX: products of bf16, tiles, of int8 */
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
enum { HAS_DOTPROD = 1 << 20 }; /* HWCAP_ASIMDDP of asm/hwcap.h */
#endif

static _Atomic int limit = CPU_DOTPROD;

#if defined(__x86_64__)
static bool has_f16c(void) { /* clang 14 does not know it by name */
    unsigned eax, ebx, ecx = 0, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

/* Linux saves 8 KB of tiles only for processes that asked; one that cannot say yes (the system is
 * older, or a container's filter) means that the first tile instruction would be a fault. */
static bool has_amx(void) {
    unsigned eax, ebx, ecx, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if ((edx & HAS_AMX) != HAS_AMX) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

static enum cpu_isa detect(void) {
#if defined(__x86_64__)
    /* These also ask whether the operating system saves the wide registers. */
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
        return CPU_GENERIC;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vnni"))
        return CPU_AVX2;
    return has_amx() ? CPU_AMX : CPU_AVX512;
#elif defined(__aarch64__) && defined(__linux__)
    return getauxval(AT_HWCAP) & HAS_DOTPROD ? CPU_DOTPROD : CPU_GENERIC;
#else
    return CPU_GENERIC;
#endif
}

enum cpu_isa cpu_isa(void) {
    int most = atomic_load_explicit(&limit, memory_order_relaxed);
    static _Atomic int found = -1; /* asked once: CPUID leaves a virtual machine, and kernels are
                                      looked up for every row */
    int best = atomic_load_explicit(&found, memory_order_relaxed);
    if (best < 0) {
        best = (int)detect();
        atomic_store_explicit(&found, best, memory_order_relaxed);
    }
    if (best <= most) return (enum cpu_isa)best;
    return best == CPU_DOTPROD ? CPU_GENERIC : (enum cpu_isa)most; /* another architecture's name */
}

void cpu_isa_limit(enum cpu_isa most) {
    atomic_store_explicit(&limit, (int)most, memory_order_relaxed);
}

bool cpu_streams(void) {
#if defined(__x86_64__)
    return __builtin_cpu_is("amdfam19h") && __builtin_cpu_supports("avx512f"); /* Zen 3 has none */
#else
    return false;
#endif
}

const char *cpu_isa_name(enum cpu_isa isa) {
    switch (isa) {
    case CPU_GENERIC:
        return "generic";
    case CPU_AVX2:
        return "avx2";
    case CPU_AVX512:
        return "avx512";
    case CPU_AMX:
        return "amx";
    case CPU_DOTPROD:
        return "dotprod";
    }
    return "unknown";
}
