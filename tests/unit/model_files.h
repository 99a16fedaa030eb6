/* model_files.h - small writers of GGUF and safetensors files, for tests only. */
#ifndef URCHIN_TESTS_MODEL_FILES_H
#define URCHIN_TESTS_MODEL_FILES_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct bytes {
    unsigned char *at; /* owned */
    size_t len, room;
};

static inline void put(struct bytes *b, const void *data, size_t n) {
    if (b->len + n > b->room) {
        b->room = (b->len + n) * 2 + 64;
        b->at = realloc(b->at, b->room);
        if (!b->at) abort();
    }
    if (n) memcpy(b->at + b->len, data, n);
    b->len += n;
}
static inline void put_u32(struct bytes *b, uint32_t x) {
    put(b, &x, 4);
}
static inline void put_u64(struct bytes *b, uint64_t x) {
    put(b, &x, 8);
}
static inline void put_string(struct bytes *b, const char *s) {
    put_u64(b, strlen(s));
    put(b, s, strlen(s));
}
static inline void put_zeros(struct bytes *b, size_t n) {
    for (; n; n--)
        put(b, "", 1);
}

static inline void write_bytes(const char *path, const void *data, size_t n) {
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(data, 1, n, file) != n || fclose(file)) abort();
}
static inline void write_text(const char *path, const char *text) {
    write_bytes(path, text, strlen(text));
}

/* ---- GGUF v3 ---- */
enum { GGUF_U32 = 4, GGUF_F32 = 6, GGUF_BOOL = 7, GGUF_STRING = 8, GGUF_ARRAY = 9, GGUF_I64 = 11 };

struct gguf_writer { /* metadata and tensor descriptions as they will stand, then data aligned to 32
                      */
    struct bytes pairs, infos, data;
    uint64_t n_pairs, n_tensors;
};
static inline void gguf_put_u32(struct gguf_writer *w, const char *key, uint32_t x) {
    put_string(&w->pairs, key), put_u32(&w->pairs, GGUF_U32), put_u32(&w->pairs, x), w->n_pairs++;
}
static inline void gguf_put_f32(struct gguf_writer *w, const char *key, float x) {
    put_string(&w->pairs, key), put_u32(&w->pairs, GGUF_F32), put(&w->pairs, &x, 4), w->n_pairs++;
}
static inline void gguf_put_string(struct gguf_writer *w, const char *key, const char *s) {
    put_string(&w->pairs, key), put_u32(&w->pairs, GGUF_STRING), put_string(&w->pairs, s),
        w->n_pairs++;
}
static inline void gguf_put_strings(struct gguf_writer *w, const char *key, const char *const *s,
                                    size_t n) {
    put_string(&w->pairs, key), put_u32(&w->pairs, GGUF_ARRAY), put_u32(&w->pairs, GGUF_STRING),
        put_u64(&w->pairs, n);
    for (size_t i = 0; i < n; i++)
        put_string(&w->pairs, s[i]);
    w->n_pairs++;
}
static inline void gguf_put_info(struct gguf_writer *w, const char *name, uint32_t type, int n_dims,
                                 const uint64_t *dims, uint64_t offset) {
    put_string(&w->infos, name), put_u32(&w->infos, (uint32_t)n_dims);
    for (int i = 0; i < n_dims; i++)
        put_u64(&w->infos, dims[i]);
    put_u32(&w->infos, type), put_u64(&w->infos, offset), w->n_tensors++;
}
/* n_out 0: a vector of n_in values. */
static inline void gguf_put_tensor(struct gguf_writer *w, const char *name, uint32_t type, int n_in,
                                   int n_out, const void *data, size_t bytes) {
    put_zeros(&w->data, (32 - w->data.len % 32) % 32);
    gguf_put_info(w, name, type, n_out ? 2 : 1, (uint64_t[]){(uint64_t)n_in, (uint64_t)n_out},
                  w->data.len);
    put(&w->data, data, bytes);
}
/* The whole file; frees the writer's parts. */
static inline struct bytes gguf_finish(struct gguf_writer *w, uint32_t version) {
    struct bytes b = {0};
    put(&b, "GGUF", 4), put_u32(&b, version), put_u64(&b, w->n_tensors), put_u64(&b, w->n_pairs);
    put(&b, w->pairs.at, w->pairs.len), put(&b, w->infos.at, w->infos.len);
    put_zeros(&b, (32 - b.len % 32) % 32);
    put(&b, w->data.at, w->data.len);
    free(w->pairs.at), free(w->infos.at), free(w->data.at);
    memset(w, 0, sizeof *w);
    return b;
}

/* ---- safetensors ---- */
/* header as given, length in front, data behind. */
static inline struct bytes safetensors_raw(const char *header, const void *data, size_t data_len) {
    struct bytes b = {0};
    put_string(&b, header);
    put(&b, data, data_len);
    return b;
}

struct st_writer {
    struct bytes header, data;
};
/* dims of n_dims, slowest first. */
static inline void st_put(struct st_writer *w, const char *name, const char *dtype, int n_dims,
                          const int *dims, const void *data, size_t bytes) {
    char text[512];
    int n = snprintf(text, sizeof text, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[",
                     w->header.len ? "," : "{", name, dtype);
    for (int i = 0; i < n_dims; i++)
        n += snprintf(text + n, sizeof text - (size_t)n, "%s%d", i ? "," : "", dims[i]);
    n += snprintf(text + n, sizeof text - (size_t)n, "],\"data_offsets\":[%zu,%zu]}", w->data.len,
                  w->data.len + bytes);
    put(&w->header, text, (size_t)n);
    put(&w->data, data, bytes);
}
static inline struct bytes st_finish(struct st_writer *w) {
    put(&w->header, w->header.len ? "}" : "{}", w->header.len ? 1 : 2);
    while (w->header.len % 8)
        put(&w->header, " ", 1);
    put(&w->header, "", 1);
    struct bytes b = safetensors_raw((const char *)w->header.at, w->data.at, w->data.len);
    free(w->header.at), free(w->data.at);
    memset(w, 0, sizeof *w);
    return b;
}

#endif
