/* safetensors.c - the header through json.h, every offset checked, tensors sorted by name. */
#include "model/safetensors.h"

#include "compute/ops.h"
#include "config/json.h"
#include "model/mapped.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_HEADER_BYTES = 100 << 20 }; /* the format's own limit */

struct safetensors {
    char *name;                /* owned; for messages */
    struct mapped file;        /* owned; empty when the bytes are the caller's */
    struct st_tensor *tensors; /* owned with their names, sorted by name */
    int n_tensors;
};

static const struct {
    const char *name;
    enum st_dtype dtype;
    size_t bytes;
} dtypes[] = {
    {"F32", ST_F32, 4},       {"F16", ST_F16, 2},       {"BF16", ST_BF16, 2},  {"F64", ST_F64, 8},
    {"I64", ST_I64, 8},       {"I32", ST_I32, 4},       {"U64", ST_OTHER, 8},  {"U32", ST_OTHER, 4},
    {"I16", ST_OTHER, 2},     {"U16", ST_OTHER, 2},     {"I8", ST_OTHER, 1},   {"U8", ST_OTHER, 1},
    {"F8_E4M3", ST_OTHER, 1}, {"F8_E5M2", ST_OTHER, 1}, {"BOOL", ST_OTHER, 1},
};
enum { N_DTYPES = sizeof dtypes / sizeof dtypes[0] };

static enum err read_tensor(struct safetensors *st, const struct json *member, const char *data,
                            size_t data_len, char *msg, size_t msg_len) {
    struct st_tensor *t = &st->tensors[st->n_tensors];
    if (!(t->name = strdup(json_key(member))))
        return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", st->name);
    st->n_tensors++;

    const char *dtype = json_string(json_get(member, "dtype"));
    size_t size = 0;
    for (int i = 0; dtype && i < N_DTYPES; i++)
        if (!strcmp(dtype, dtypes[i].name)) t->dtype = dtypes[i].dtype, size = dtypes[i].bytes;
    if (!size)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s has the unknown dtype %s", st->name,
                       t->name, dtype ? dtype : "(none)");

    const struct json *shape = json_get(member, "shape");
    t->n_dims = json_size(shape);
    if (json_type(shape) != JSON_ARRAY || t->n_dims > 8)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: tensor %s has no shape of at most 8 dimensions", st->name, t->name);
    for (int i = 0; i < 8; i++)
        t->dims[i] = 1;
    t->n_values = 1;
    int d = 0;
    for (const struct json *dim = json_child(shape); dim; dim = json_next(dim), d++)
        if (!json_int(dim, &t->dims[d]) || t->dims[d] < 0 ||
            __builtin_mul_overflow(t->n_values, t->dims[d], &t->n_values) ||
            t->n_values > (int64_t)1 << 48)
            return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s has an impossible shape",
                           st->name, t->name);

    const struct json *offsets = json_get(member, "data_offsets");
    int64_t begin, end;
    if (json_size(offsets) != 2 || !json_int(json_child(offsets), &begin) ||
        !json_int(json_next(json_child(offsets)), &end) || begin < 0 || end < begin)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s has no two ascending data_offsets",
                       st->name, t->name);
    if ((uint64_t)end > data_len)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: tensor %s lies past the end of the file (is the download complete?)",
                       st->name, t->name);
    if (end - begin != t->n_values * (int64_t)size)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: tensor %s has %lld bytes of data, but its shape needs %lld", st->name,
                       t->name, (long long)(end - begin), (long long)(t->n_values * (int64_t)size));
    if ((size_t)begin % size)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: tensor %s is not aligned to its %zu-byte values", st->name, t->name,
                       size);
    t->data = data + begin;
    t->bytes = (size_t)(end - begin);
    return OK;
}

static int compare_names(const void *a, const void *b) {
    return strcmp(((const struct st_tensor *)a)->name, ((const struct st_tensor *)b)->name);
}

static int compare_places(const void *a,
                          const void *b) { /* empty tensors before what follows them */
    const struct st_tensor *x = a, *y = b;
    if (x->data != y->data) return (const char *)x->data < (const char *)y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static enum err check_layout(struct safetensors *st, const char *data, size_t data_len, char *msg,
                             size_t msg_len) {
    size_t n = (size_t)st->n_tensors;
    const char *at = data;
    if (n) qsort(st->tensors, n, sizeof *st->tensors, compare_places);
    for (size_t i = 0; i < n; i++) {
        const struct st_tensor *t = &st->tensors[i];
        if ((const char *)t->data < at)
            return err_set(msg, msg_len, ERR_FORMAT, "%s: tensors %s and %s overlap", st->name,
                           t[-1].name, t->name);
        if ((const char *)t->data > at)
            return err_set(msg, msg_len, ERR_FORMAT, "%s: there is a hole in front of tensor %s",
                           st->name, t->name);
        at = (const char *)t->data + t->bytes;
    }
    if (at != data + data_len)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: %zu bytes at its end belong to no tensor",
                       st->name, (size_t)(data + data_len - at));
    if (n) qsort(st->tensors, n, sizeof *st->tensors, compare_names);
    for (size_t i = 1; i < n; i++)
        if (!strcmp(st->tensors[i - 1].name, st->tensors[i].name))
            return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s is there twice", st->name,
                           st->tensors[i].name);
    return OK;
}

static enum err read_file(struct safetensors *st, const char *bytes, size_t len, char *msg,
                          size_t msg_len) {
    uint64_t header_len;
    struct json *header = NULL;
    if (len < 8)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: too short for a safetensors file", st->name);
    memcpy(&header_len, bytes, 8);
    if (header_len > MAX_HEADER_BYTES || header_len > len - 8)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: not a safetensors file, or cut off inside its header", st->name);
    const char *data = bytes + 8 + header_len;
    size_t data_len = len - 8 - (size_t)header_len;
    enum err e = json_parse(&header, bytes + 8, (size_t)header_len, st->name, msg, msg_len);
    if (e) return e;
    if (json_type(header) != JSON_OBJECT) {
        e = err_set(msg, msg_len, ERR_FORMAT, "%s: the header is not a JSON object", st->name);
    } else if (!(st->tensors = calloc((size_t)json_size(header) + 1, sizeof *st->tensors))) {
        e = err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", st->name);
    }
    for (const struct json *m = json_child(header); !e && m; m = json_next(m))
        if (strcmp(json_key(m), "__metadata__"))
            e = read_tensor(st, m, data, data_len, msg, msg_len);
    if (!e) e = check_layout(st, data, data_len, msg, msg_len);
    json_free(header);
    return e;
}

enum err safetensors_open_bytes(struct safetensors **out, const void *bytes, size_t len,
                                const char *name, char *msg, size_t msg_len) {
    struct safetensors *st = calloc(1, sizeof *st);
    if (!st || !(st->name = strdup(name))) {
        free(st);
        return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", name);
    }
    enum err e = read_file(st, bytes, len, msg, msg_len);
    if (e)
        safetensors_close(st);
    else
        *out = st;
    return e;
}

enum err safetensors_open(struct safetensors **out, const char *path, char *msg, size_t msg_len) {
    struct mapped file;
    enum err e = mapped_open(&file, path, msg, msg_len);
    if (e) return e;
    e = safetensors_open_bytes(out, file.bytes, file.len, path, msg, msg_len);
    if (e)
        mapped_close(&file);
    else
        (*out)->file = file;
    return e;
}

void safetensors_close(struct safetensors *st) {
    if (!st) return;
    for (int i = 0; i < st->n_tensors; i++)
        free((char *)st->tensors[i].name);
    free(st->tensors);
    free(st->name);
    mapped_close(&st->file);
    free(st);
}

const struct st_tensor *safetensors_get(const struct safetensors *st, const char *name) {
    struct st_tensor wanted = {.name = name};
    return st->n_tensors ? bsearch(&wanted, st->tensors, (size_t)st->n_tensors, sizeof *st->tensors,
                                   compare_names)
                         : NULL;
}

int safetensors_count(const struct safetensors *st) {
    return st->n_tensors;
}

const struct st_tensor *safetensors_at(const struct safetensors *st, int i) {
    return &st->tensors[i];
}

/* Data may lie at any address: headers of old files are not padded. */
enum err st_decode(float *out, const struct st_tensor *t, int64_t first, int64_t n) {
    uint16_t h;
    double d;
    switch (t->dtype) {
    case ST_F32:
        memcpy(out, (const char *)t->data + first * 4, (size_t)n * 4);
        return OK;
    case ST_F16:
        for (int64_t i = 0; i < n; i++) {
            memcpy(&h, (const char *)t->data + (first + i) * 2, 2);
            out[i] = fp16_float(h);
        }
        return OK;
    case ST_BF16:
        for (int64_t i = 0; i < n; i++) {
            memcpy(&h, (const char *)t->data + (first + i) * 2, 2);
            out[i] = bf16_float(h);
        }
        return OK;
    case ST_F64:
        for (int64_t i = 0; i < n; i++) {
            memcpy(&d, (const char *)t->data + (first + i) * 8, 8);
            out[i] = (float)d;
        }
        return OK;
    default:
        return ERR_FORMAT;
    }
}
