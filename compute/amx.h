/* amx.h - the tile instructions that amx_matmul.h and amx_bf16.h use: Intel's AMX-TILE, AMX-INT8
 * and AMX-BF16.
 *
 * Written as assembly and not with the compiler's intrinsics, because those of gcc 12 do not say
 * what memory they read: stores to a buffer that a tile is loaded from may be moved behind the
 * load, and _tile_loadconfig admits to 8 of its 64 bytes.  With AMX_MODEL the same functions are
 * plain C (amx_model.h), so that the kernels run anywhere. */
#ifndef URCHIN_COMPUTE_AMX_H
#define URCHIN_COMPUTE_AMX_H

#include <stddef.h>
#include <stdint.h>

enum { N_TILES = 8 };

/* The operand of LDTILECFG. */
struct tile_config {
    _Alignas(64) uint8_t palette; /* 1: eight tiles of up to 16 rows of 64 bytes */
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16]; /* the last eight are 0 */
    uint8_t rows[16];
};
_Static_assert(sizeof(struct tile_config) == 64, "what the instruction reads");

#if defined(AMX_MODEL)
#include "compute/amx_model.h"
#else
#define TILE_FN                                                                                    \
    static inline __attribute__((always_inline)) /* the numbers of tiles are constants */

/* A thread's tiles exist from one of these to the next release. */
TILE_FN void tiles_configure(const struct tile_config *config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*config));
}
TILE_FN void tiles_release(void) {
    __asm__ volatile("tilerelease");
}
TILE_FN void tile_zero(int tile) {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
/* Rows of the tile are `stride` bytes apart in memory. */
TILE_FN void tile_load(int tile, const void *src, size_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0"
                     :
                     : "i"(tile), "r"(src), "r"(stride)
                     : "memory");
}
TILE_FN void tile_store(int tile, void *dst, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)"
                     :
                     : "i"(tile), "r"(dst), "r"(stride)
                     : "memory");
}
/* c[m][n] += the sum over k and i < 4 of a[m][4 k + i] b[k][4 n + i]:  signed bytes, int32 sums. */
TILE_FN void tile_dot(int c, int a, int b) {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}
/* The same over i < 2 with bf16 and fp32 sums, in an order that amx_model.h spells out. */
TILE_FN void tile_dot_bf16(int c, int a, int b) {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}
#endif

#endif
