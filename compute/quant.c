/* quant.c - GGUF blocks to fp32.
 *
 * Written from the block layouts of ggml-org/ggml (ggml-common.h): multi-byte fields are
 * little-endian, scales fp16. */
#include "compute/quant.h"

#include "compute/ops.h"
#include <string.h>

struct format {
    const char *name;
    int block_size;
    size_t block_bytes;
    void (*decode)(float *out, const uint8_t *block); /* one block; NULL: plain floats */
};

static uint16_t u16_at(const uint8_t *p) {
    return (uint16_t)(p[0] | p[1] << 8);
}
static uint32_t u32_at(const uint8_t *p) {
    return u16_at(p) | (uint32_t)u16_at(p + 2) << 16;
}
static float half_at(const uint8_t *p) {
    return fp16_float(u16_at(p));
}

/* 32 values: byte j holds value j in its low nibble and value j + 16 in its high one. */
static void q4_0(float *out, const uint8_t *b) { /* { half d; u8 q[16] }  d (q - 8) */
    float d = half_at(b);
    for (int j = 0; j < 16; j++) {
        out[j] = (float)((b[2 + j] & 15) - 8) * d;
        out[j + 16] = (float)((b[2 + j] >> 4) - 8) * d;
    }
}
static void q4_1(float *out, const uint8_t *b) { /* { half d, m; u8 q[16] }  d q + m */
    float d = half_at(b), m = half_at(b + 2);
    for (int j = 0; j < 16; j++) {
        out[j] = (float)(b[4 + j] & 15) * d + m;
        out[j + 16] = (float)(b[4 + j] >> 4) * d + m;
    }
}
/* The fifth bit of value j is bit j of a 32-bit word. */
static void q5_0(float *out, const uint8_t *b) { /* { half d; u32 high; u8 q[16] }  d (q - 16) */
    float d = half_at(b);
    uint32_t high = u32_at(b + 2);
    for (int j = 0; j < 16; j++) {
        int lo = (b[6 + j] & 15) | (int)(high >> j & 1) << 4;
        int hi = (b[6 + j] >> 4) | (int)(high >> (j + 16) & 1) << 4;
        out[j] = (float)(lo - 16) * d;
        out[j + 16] = (float)(hi - 16) * d;
    }
}
static void q5_1(float *out, const uint8_t *b) { /* { half d, m; u32 high; u8 q[16] }  d q + m */
    float d = half_at(b), m = half_at(b + 2);
    uint32_t high = u32_at(b + 4);
    for (int j = 0; j < 16; j++) {
        int lo = (b[8 + j] & 15) | (int)(high >> j & 1) << 4;
        int hi = (b[8 + j] >> 4) | (int)(high >> (j + 16) & 1) << 4;
        out[j] = (float)lo * d + m;
        out[j + 16] = (float)hi * d + m;
    }
}
static void q8_0(float *out, const uint8_t *b) { /* { half d; i8 q[32] }  d q */
    float d = half_at(b);
    for (int j = 0; j < 32; j++)
        out[j] = (float)(int8_t)b[2 + j] * d;
}

/* 256 values in 8 groups of 32, each with a 6-bit scale and a 6-bit minimum.  The twelve bytes hold
 * the low 6 bits of scales 0-3, of minima 0-3, then the nibbles of scales and minima 4-7, whose top
 * 2 bits are the top 2 bits of the first eight bytes. */
static void k_scale_min(const uint8_t *s, int group, int *scale, int *min) {
    if (group < 4) {
        *scale = s[group] & 63;
        *min = s[group + 4] & 63;
    } else {
        *scale = (s[group + 4] & 15) | (s[group - 4] >> 6) << 4;
        *min = (s[group + 4] >> 4) | (s[group] >> 6) << 4;
    }
}
static void q4_k(float *out, const uint8_t *b) { /* { half d, dmin; u8 scales[12], q[128] } */
    float d = half_at(b), dmin = half_at(b + 2);
    for (int group = 0; group < 8; group++) {
        int scale, min;
        k_scale_min(b + 4, group, &scale, &min);
        float s = d * (float)scale, m = dmin * (float)min;
        const uint8_t *q =
            b + 16 + group / 2 * 32; /* two groups share 32 bytes: low, high nibbles */
        for (int j = 0; j < 32; j++)
            out[group * 32 + j] = s * (float)(q[j] >> group % 2 * 4 & 15) - m;
    }
}
static void q5_k(float *out,
                 const uint8_t *b) { /* { half d, dmin; u8 scales[12], high[32], q[128] } */
    float d = half_at(b), dmin = half_at(b + 2);
    const uint8_t *high = b + 16; /* bit g of byte j: the fifth bit of value j of group g */
    for (int group = 0; group < 8; group++) {
        int scale, min;
        k_scale_min(b + 4, group, &scale, &min);
        float s = d * (float)scale, m = dmin * (float)min;
        const uint8_t *q = b + 48 + group / 2 * 32;
        for (int j = 0; j < 32; j++) {
            int v = (q[j] >> group % 2 * 4 & 15) | (high[j] >> group & 1) << 4;
            out[group * 32 + j] = s * (float)v - m;
        }
    }
}
/* { u8 low[128], high[64]; i8 scales[16]; half d }  d scale (q - 32), one scale for 16 values. Each
 * half of 128 values is four groups of 32: low nibbles of 64 bytes, then their high nibbles; two
 * more bits of group g are at bit 2 g of 32 bytes of `high`. */
static void q6_k(float *out, const uint8_t *b) {
    float d = half_at(b + 208);
    for (int i = 0; i < 256; i += 16) {
        int half = i / 128, group = i % 128 / 32;
        const uint8_t *low = b + half * 64 + group % 2 * 32 + i % 32;
        const uint8_t *high = b + 128 + half * 32 + i % 32;
        float s = d * (float)(int8_t)b[192 + i / 16];
        for (int j = 0; j < 16; j++) {
            int q = (low[j] >> group / 2 * 4 & 15) | (high[j] >> group * 2 & 3) << 4;
            out[i + j] = s * (float)(q - 32);
        }
    }
}

static const struct format formats[] = {
    [QUANT_F32] = {"F32", 1, 4, NULL},       [QUANT_F16] = {"F16", 1, 2, NULL},
    [QUANT_Q4_0] = {"Q4_0", 32, 18, q4_0},   [QUANT_Q4_1] = {"Q4_1", 32, 20, q4_1},
    [QUANT_Q5_0] = {"Q5_0", 32, 22, q5_0},   [QUANT_Q5_1] = {"Q5_1", 32, 24, q5_1},
    [QUANT_Q8_0] = {"Q8_0", 32, 34, q8_0},   [QUANT_Q4_K] = {"Q4_K", 256, 144, q4_k},
    [QUANT_Q5_K] = {"Q5_K", 256, 176, q5_k}, [QUANT_Q6_K] = {"Q6_K", 256, 210, q6_k},
    [QUANT_BF16] = {"BF16", 1, 2, NULL},
};

static const struct format *find(uint32_t type) {
    static const struct format unknown;
    return type < sizeof formats / sizeof *formats ? &formats[type] : &unknown;
}

const char *quant_name(uint32_t type) {
    return find(type)->name;
}
int quant_block_size(uint32_t type) {
    return find(type)->block_size;
}
size_t quant_block_bytes(uint32_t type) {
    return find(type)->block_bytes;
}

void quant_decode(float *out, uint32_t type, const void *src, size_t n) {
    const struct format *f = find(type);
    const uint8_t *p = src;
    switch (type) {
    case QUANT_F32:
        for (size_t i = 0; i < n; i++) {
            uint32_t bits = u32_at(p + 4 * i);
            memcpy(&out[i], &bits, sizeof bits);
        }
        break;
    case QUANT_F16:
        for (size_t i = 0; i < n; i++)
            out[i] = half_at(p + 2 * i);
        break;
    case QUANT_BF16:
        for (size_t i = 0; i < n; i++)
            out[i] = bf16_float(u16_at(p + 2 * i));
        break;
    default:
        for (size_t i = 0; i < n; i += (size_t)f->block_size, p += f->block_bytes)
            f->decode(out + i, p);
    }
}
