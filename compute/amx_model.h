/* amx_model.h - the functions of amx.h in plain C, for tests on machines without AMX.
 *
 * After the "Operation" sections of Intel's Software Developer's Manual, vol. 2, and as strict as
 * the processor: what would fault there (#UD, #GP) fails an assertion here.  Included by amx.h. */
#ifndef URCHIN_COMPUTE_AMX_MODEL_H
#define URCHIN_COMPUTE_AMX_MODEL_H

#include <assert.h>
#include <stdbool.h>
#include <string.h>

struct tiles {
    bool configured;
    struct tile_config config;
    uint8_t data[N_TILES][16][64];
};
static _Thread_local struct tiles tiles; /* a thread's own, as the registers are */

static inline void tiles_configure(const struct tile_config *config) {
    static const uint8_t zeros[16];
    assert(config->palette == 1 && config->start_row == 0);
    assert(memcmp(config->reserved, zeros, sizeof config->reserved) == 0);
    assert(memcmp(config->row_bytes + N_TILES, zeros, 16) == 0);
    assert(memcmp(config->rows + N_TILES, zeros, 8) == 0);
    for (int t = 0; t < N_TILES; t++) {
        assert(config->rows[t] <= 16 && config->row_bytes[t] <= 64);
        assert((config->rows[t] == 0) == (config->row_bytes[t] == 0));
    }
    memset(&tiles, 0, sizeof tiles);
    tiles.configured = true;
    tiles.config = *config;
}

static inline void tiles_release(void) {
    memset(&tiles, 0, sizeof tiles);
}

static inline void tile_check(int tile) {
    assert(tiles.configured && tile >= 0 && tile < N_TILES && tiles.config.rows[tile] > 0);
}

static inline void tile_zero(int tile) {
    tile_check(tile);
    memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

static inline void tile_load(int tile, const void *src, size_t stride) {
    tile_zero(tile);
    for (size_t r = 0; r < tiles.config.rows[tile]; r++)
        memcpy(tiles.data[tile][r], (const char *)src + r * stride, tiles.config.row_bytes[tile]);
}

static inline void tile_store(int tile, void *dst, size_t stride) {
    tile_check(tile);
    for (size_t r = 0; r < tiles.config.rows[tile]; r++)
        memcpy((char *)dst + r * stride, tiles.data[tile][r], tiles.config.row_bytes[tile]);
}

static inline void tile_check_product(int c, int a, int b) {
    const struct tile_config *t = &tiles.config;
    tile_check(a), tile_check(b), tile_check(c);
    assert(a != b && b != c && c != a);
    assert(t->rows[c] == t->rows[a] && t->row_bytes[c] == t->row_bytes[b]);
    assert(t->row_bytes[a] == 4 * t->rows[b] && t->row_bytes[c] % 4 == 0);
}

/* TDPBSSD.  Sums wrap around, as the processor's do. */
static inline void tile_dot(int c, int a, int b) {
    const struct tile_config *t = &tiles.config;
    tile_check_product(c, a, b);
    for (int m = 0; m < t->rows[c]; m++)
        for (int n = 0; n < t->row_bytes[c] / 4; n++) {
            uint32_t sum;
            memcpy(&sum, &tiles.data[c][m][4 * n], 4);
            for (int k = 0; k < t->rows[b]; k++)
                for (int i = 0; i < 4; i++)
                    sum += (uint32_t)((int8_t)tiles.data[a][m][4 * k + i] *
                                      (int8_t)tiles.data[b][k][4 * n + i]);
            memcpy(&tiles.data[c][m][4 * n], &sum, 4);
        }
}

static inline float tile_flush(float x) { /* what is below the normal numbers is 0 */
    return x > -0x1p-126f && x < 0x1p-126f ? 0 * x : x;
}
static inline float tile_element(const uint8_t *at) {
    uint16_t high;
    memcpy(&high, at, 2);
    uint32_t bits = (uint32_t)high << 16;
    float x;
    memcpy(&x, &bits, 4);
    return tile_flush(x);
}

/* TDPBF16PS: the even k of a tile in one fused sum and the odd in another, both from 0; c takes the
 * sum of the two.  (A product of two bf16 is exact in fp32, so product and sum round once here too;
 * only where a product alone would overflow is a fused one another.) */
static inline void tile_dot_bf16(int c, int a, int b) {
    const struct tile_config *t = &tiles.config;
    tile_check_product(c, a, b);
    for (int m = 0; m < t->rows[c]; m++)
        for (int n = 0; n < t->row_bytes[c] / 4; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < t->rows[b]; k++) {
                const uint8_t *x = &tiles.data[a][m][4 * k], *w = &tiles.data[b][k][4 * n];
                even = tile_flush(even + tile_element(x) * tile_element(w));
                odd = tile_flush(odd + tile_element(x + 2) * tile_element(w + 2));
            }
            memcpy(&sum, &tiles.data[c][m][4 * n], 4);
            sum = tile_flush(tile_flush(sum) + tile_flush(even + odd));
            memcpy(&tiles.data[c][m][4 * n], &sum, 4);
        }
}

#endif
