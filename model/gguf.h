/* gguf.h - GGUF v2 and v3 files, memory-mapped and checked: every count, length, offset and alignment is verified against the
 * file's size before it is used, so a truncated or hostile file gives ERR_FORMAT and a sentence naming file and key or tensor.
 * Format: ggml-org/ggml docs/gguf.md. */
#ifndef URCHIN_MODEL_GGUF_H
#define URCHIN_MODEL_GGUF_H

#include "config/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct gguf;

struct gguf_tensor {
    const char *name; /* borrowed from the file */
    uint32_t type;    /* enum quant_type */
    int n_dims;
    int64_t dims[4]; /* dims[0] is the contiguous one (n_in), unused ones are 1 */
    const void *data;
    size_t bytes;
};

enum err gguf_open(struct gguf **out, const char *path, char *msg, size_t msg_len);
/* The same over bytes that the caller keeps until gguf_close (fuzzing, tests). */
enum err gguf_open_bytes(struct gguf **out, const void *bytes, size_t len, const char *name,
                         char *msg, size_t msg_len);
void gguf_close(struct gguf *g); /* NULL is fine */

const struct gguf_tensor *gguf_tensor(const struct gguf *g, const char *name); /* NULL: none */
int gguf_n_tensors(const struct gguf *g);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, int i);

/* Metadata.  A missing key or a value of another type gives false / NULL / 0. */
bool gguf_int(const struct gguf *g, const char *key, int64_t *out);     /* any integer type or bool */
bool gguf_double(const struct gguf *g, const char *key, double *out);   /* any number type */
const char *gguf_string(const struct gguf *g, const char *key, size_t *len); /* NUL-terminated copy, owned by g */
size_t gguf_array_size(const struct gguf *g, const char *key);
const char *gguf_array_string(const struct gguf *g, const char *key, size_t i, size_t *len); /* O(1); not NUL-terminated */
bool gguf_array_double(const struct gguf *g, const char *key, size_t i, double *out);        /* O(1); any number type or bool */

#endif
