/* quant.h - GGUF tensor types, decoded to fp32 (reading only).
 * Layouts are ggml's (ggml-org/ggml, ggml-common.h); every row is a whole number of blocks. */
#ifndef URCHIN_COMPUTE_QUANT_H
#define URCHIN_COMPUTE_QUANT_H

#include <stddef.h>
#include <stdint.h>

enum quant_type { /* the numbers of the file format */
    QUANT_F32 = 0, QUANT_F16 = 1, QUANT_Q4_0 = 2, QUANT_Q4_1 = 3, QUANT_Q5_0 = 6, QUANT_Q5_1 = 7,
    QUANT_Q8_0 = 8, QUANT_Q4_K = 12, QUANT_Q5_K = 13, QUANT_Q6_K = 14, QUANT_BF16 = 30,
};

const char *quant_name(uint32_t type); /* "Q4_1"; "type 23" style text is the caller's job: NULL when unknown */
int quant_block_size(uint32_t type);   /* values a block, 0 when unknown */
size_t quant_block_bytes(uint32_t type);

/* n values (a multiple of the block size) from src, any alignment. */
void quant_decode(float *out, uint32_t type, const void *src, size_t n);

#endif
