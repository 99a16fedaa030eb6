/* safetensors.h - safetensors files, memory-mapped and checked (huggingface/safetensors format: u64 header length,
 * JSON header, data).  Overlapping, misaligned, out-of-file or duplicate tensors are ERR_FORMAT with a sentence. */
#ifndef URCHIN_MODEL_SAFETENSORS_H
#define URCHIN_MODEL_SAFETENSORS_H

#include "config/err.h"
#include <stddef.h>
#include <stdint.h>

enum st_dtype { ST_F32, ST_F16, ST_BF16, ST_F64, ST_I64, ST_I32, ST_OTHER };

struct st_tensor {
    const char *name;
    enum st_dtype dtype;
    int n_dims;
    int64_t dims[8]; /* dims[0] is the slowest; unused ones are 1 */
    const void *data;
    size_t bytes;
    int64_t n_values;
};

struct safetensors;
enum err safetensors_open(struct safetensors **out, const char *path, char *msg, size_t msg_len);
enum err safetensors_open_bytes(struct safetensors **out, const void *bytes, size_t len,
                                const char *name, char *msg, size_t msg_len);
void safetensors_close(struct safetensors *st); /* NULL is fine */
const struct st_tensor *safetensors_get(const struct safetensors *st, const char *name); /* NULL: none; O(log n) */
int safetensors_count(const struct safetensors *st);
const struct st_tensor *safetensors_at(const struct safetensors *st, int i);

/* n values from index first as fp32 (F32, F16, BF16 and F64 only: ERR_FORMAT otherwise). */
enum err st_decode(float *out, const struct st_tensor *t, int64_t first, int64_t n);

#endif
