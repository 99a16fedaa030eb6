/* gpu_decode.h - generated rows with scratch memory: gpu_launch_decode() of gpu_kernels.h, and what it cannot do without. */
#ifndef URCHIN_ATTENTION_GPU_DECODE_H
#define URCHIN_ATTENTION_GPU_DECODE_H

#include "attention/gpu_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* gpu_launch_store() and gpu_launch_decode() of one layer, with scratch of gpu_generated_scratch_bytes() for n_segments at
 * least:
 *   few segments    one launch, which projects queries and stores keys and values itself
 *   many            the maps are read once for 16 rows by a launch of its own, which stores too
 *   softmax         a long sequence is shared by up to 16 blocks, whose answers another launch combines
 * A terraced row's bits are gpu_launch_decode()'s; a softmax row's differ in the last places, whatever the number of segments.
 * False: not a shape of gpu_launch_decode(), nothing was done. */
size_t gpu_generated_scratch_bytes(const struct gpu_shape *shape, int n_segments);
bool gpu_launch_generated(struct gpu *g, const struct gpu_shape *shape, const struct gpu_layer *layer,
                          const struct gpu_segment *segments, int n_segments, const struct gpu_rows *rows, void *scratch);

/* Bytes of a slot that the answer to a row at `position` needs of one layer, all heads, if each has most_cache places; 0: not such a shape. */
size_t gpu_decode_bytes(const struct gpu_shape *shape, int64_t position);

#ifdef __cplusplus
}
#endif
#endif
