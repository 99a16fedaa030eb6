/* gguf.c - one pass over the header with a bounds-checked cursor; lookups by binary search.
 * Counts are believed only as far as the bytes left could hold them, so memory taken is
 * proportional to the file. */
#include "model/gguf.h"

#include "compute/quant.h"
#include "model/mapped.h"
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum value_type {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    BOOL,
    STRING,
    ARRAY,
    U64,
    I64,
    F64,
    N_VALUE_TYPES
};
static const size_t value_bytes[N_VALUE_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

enum { MIN_PAIR_BYTES = 8 + 4 + 1, MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8, MAX_NAME = 1024 };

struct pair {
    char *key;            /* owned */
    enum value_type type; /* an array's: that of its elements */
    bool is_array;
    size_t n;                      /* elements; 1 for a single value */
    const unsigned char *values;   /* in the file; not for strings */
    const unsigned char **strings; /* owned; each points at a string's u64 length in the file */
    char *text;                    /* owned NUL-terminated copy of a single string */
};

struct gguf {
    char *name;                 /* owned; for messages */
    struct mapped file;         /* owned; empty when the bytes are the caller's */
    const unsigned char *bytes; /* the whole file */
    size_t len;
    struct pair *pairs; /* owned, sorted by key */
    int n_pairs;
    struct gguf_tensor *tensors; /* owned with their names, sorted by name */
    int n_tensors;
};

/* ---- reading forward, never past the end ---- */
struct cursor {
    const unsigned char *at, *end;
};

static size_t left(const struct cursor *c) {
    return (size_t)(c->end - c->at);
}

static bool take(struct cursor *c, void *out, size_t n) {
    if (left(c) < n) return false;
    memcpy(out, c->at, n);
    c->at += n;
    return true;
}

static bool take_string(struct cursor *c, const unsigned char **text, uint64_t *len) {
    if (!take(c, len, 8) || *len > left(c)) return false;
    *text = c->at;
    c->at += *len;
    return true;
}

/* A name: a string without NUL bytes, copied. ERR_FORMAT when it is none. */
static enum err take_name(struct cursor *c, char **out) {
    const unsigned char *text;
    uint64_t len;
    if (!take_string(c, &text, &len) || len > MAX_NAME || memchr(text, 0, len)) return ERR_FORMAT;
    char *copy = malloc(len + 1);
    if (!copy) return ERR_NOMEM;
    memcpy(copy, text, len);
    copy[len] = 0;
    *out = copy;
    return OK;
}

static uint64_t read_u64(const unsigned char *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

static enum err no_memory(const struct gguf *g, char *msg, size_t msg_len) {
    return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", g->name);
}

/* ---- metadata ---- */
static enum err read_pair(struct gguf *g, struct cursor *c, struct pair *p, char *msg,
                          size_t msg_len) {
    uint32_t type;
    uint64_t n = 1;
    enum err e = take_name(c, &p->key);
    if (e == ERR_NOMEM) return no_memory(g, msg, msg_len);
    if (e)
        return err_set(msg, msg_len, e, "%s: metadata key %d is cut off or no name", g->name,
                       g->n_pairs);
    if (!take(c, &type, 4)) goto cut;
    if (type == ARRAY) {
        p->is_array = true;
        if (!take(c, &type, 4) || !take(c, &n, 8)) goto cut;
    }
    if (type >= N_VALUE_TYPES || type == ARRAY)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: metadata %s has the unknown value type %u",
                       g->name, p->key, type);
    p->type = (enum value_type)type;
    if (n > left(c) / (type == STRING ? 8 : value_bytes[type])) goto cut;
    p->n = (size_t)n;
    p->values = c->at;
    if (type != STRING) {
        c->at += p->n * value_bytes[type];
        return OK;
    }
    if (!(p->strings = malloc((p->n + 1) * sizeof *p->strings))) return no_memory(g, msg, msg_len);
    for (size_t i = 0; i < p->n; i++) {
        const unsigned char *text;
        uint64_t len;
        p->strings[i] = c->at;
        if (!take_string(c, &text, &len)) goto cut;
        if (p->is_array) continue;
        if (!(p->text = malloc(len + 1))) return no_memory(g, msg, msg_len);
        memcpy(p->text, text, len);
        p->text[len] = 0;
    }
    return OK;
cut:
    return err_set(msg, msg_len, ERR_FORMAT, "%s: the file ends inside metadata %s", g->name,
                   p->key);
}

static int compare_pairs(const void *a, const void *b) {
    return strcmp(((const struct pair *)a)->key, ((const struct pair *)b)->key);
}

static const struct pair *find_pair(const struct gguf *g, const char *key) {
    struct pair wanted = {.key = (char *)key};
    return g->n_pairs
               ? bsearch(&wanted, g->pairs, (size_t)g->n_pairs, sizeof *g->pairs, compare_pairs)
               : NULL;
}

/* ---- tensors ---- */
static enum err read_tensor(struct gguf *g, struct cursor *c, struct gguf_tensor *t,
                            uint64_t *offset, char *msg, size_t msg_len) {
    uint32_t n_dims;
    uint64_t n_values = 1;
    char *name = NULL;
    enum err e = take_name(c, &name);
    if (e == ERR_NOMEM) return no_memory(g, msg, msg_len);
    if (e)
        return err_set(msg, msg_len, e, "%s: the name of tensor %d is cut off or no name", g->name,
                       g->n_tensors);
    t->name = name;
    if (!take(c, &n_dims, 4)) goto cut;
    if (n_dims < 1 || n_dims > 4)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s has %u dimensions, not 1 to 4",
                       g->name, name, n_dims);
    t->n_dims = (int)n_dims;
    for (int i = 0; i < 4; i++) {
        uint64_t dim = 1;
        if (i < t->n_dims && !take(c, &dim, 8)) goto cut;
        /* INT_MAX a side and 2^48 in all: no product below overflows */
        if (dim < 1 || dim > INT_MAX || (n_values *= dim) > (uint64_t)1 << 48)
            return err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s has an impossible shape",
                           g->name, name);
        t->dims[i] = (int64_t)dim;
    }
    if (!take(c, &t->type, 4) || !take(c, offset, 8)) goto cut;
    int block = quant_block_size(t->type);
    if (!block)
        return err_set(
            msg, msg_len, ERR_FORMAT,
            "%s: tensor %s has type %u; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, "
            "Q5_K and Q6_K are supported",
            g->name, name, t->type);
    if (t->dims[0] % block)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: rows of tensor %s are not whole %s blocks",
                       g->name, name, quant_name(t->type));
    t->bytes = (size_t)(n_values / (uint64_t)block) * quant_block_bytes(t->type);
    return OK;
cut:
    return err_set(msg, msg_len, ERR_FORMAT,
                   "%s: the file ends inside the description of tensor %s", g->name, t->name);
}

static int compare_names(const void *a, const void *b) {
    return strcmp(((const struct gguf_tensor *)a)->name, ((const struct gguf_tensor *)b)->name);
}

static int compare_places(const void *a, const void *b) {
    const unsigned char *x = ((const struct gguf_tensor *)a)->data,
                        *y = ((const struct gguf_tensor *)b)->data;
    return (x > y) - (x < y);
}

static enum err read_tensors(struct gguf *g, struct cursor *c, uint64_t n, char *msg,
                             size_t msg_len) {
    uint64_t *offsets = malloc((n + 1) * sizeof *offsets);
    int64_t alignment = 32;
    enum err e = OK;
    g->tensors = calloc(n + 1, sizeof *g->tensors);
    if (!offsets || !g->tensors) e = no_memory(g, msg, msg_len);
    for (uint64_t i = 0; !e && i < n; i++) {
        e = read_tensor(g, c, &g->tensors[i], &offsets[i], msg, msg_len);
        g->n_tensors = (int)i + 1; /* its name is to be freed in any case */
    }
    if (!e && find_pair(g, "general.alignment") &&
        (!gguf_int(g, "general.alignment", &alignment) || alignment < 1 || alignment > 1 << 20 ||
         (alignment & (alignment - 1))))
        e = err_set(msg, msg_len, ERR_FORMAT, "%s: general.alignment is not a power of two",
                    g->name);
    if (e) goto done;

    size_t header = (size_t)(c->at - g->bytes);
    size_t start = (header + (size_t)alignment - 1) / (size_t)alignment * (size_t)alignment;
    size_t room = start < g->len ? g->len - start : 0;
    for (int i = 0; i < g->n_tensors; i++) {
        struct gguf_tensor *t = &g->tensors[i];
        if (offsets[i] % (uint64_t)alignment) {
            e = err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s is not aligned to %d bytes",
                        g->name, t->name, (int)alignment);
            goto done;
        }
        if (offsets[i] > room || t->bytes > room - offsets[i]) {
            e = err_set(msg, msg_len, ERR_FORMAT,
                        "%s: tensor %s lies past the end of the file (is the download complete?)",
                        g->name, t->name);
            goto done;
        }
        t->data = g->bytes + start + offsets[i];
    }
    qsort(g->tensors, (size_t)g->n_tensors, sizeof *g->tensors, compare_places);
    for (int i = 1; i < g->n_tensors; i++) {
        const struct gguf_tensor *a = &g->tensors[i - 1], *b = &g->tensors[i];
        if ((const unsigned char *)a->data + a->bytes > (const unsigned char *)b->data) {
            e = err_set(msg, msg_len, ERR_FORMAT, "%s: tensors %s and %s overlap", g->name, a->name,
                        b->name);
            goto done;
        }
    }
    qsort(g->tensors, (size_t)g->n_tensors, sizeof *g->tensors, compare_names);
    for (int i = 1; i < g->n_tensors; i++)
        if (!strcmp(g->tensors[i - 1].name, g->tensors[i].name)) {
            e = err_set(msg, msg_len, ERR_FORMAT, "%s: tensor %s is there twice", g->name,
                        g->tensors[i].name);
            goto done;
        }
done:
    free(offsets);
    return e;
}

static enum err read_file(struct gguf *g, char *msg, size_t msg_len) {
    struct cursor c = {g->bytes, g->bytes + g->len};
    unsigned char magic[4];
    uint32_t version;
    uint64_t n_tensors, n_pairs;
    if (!take(&c, magic, 4) || memcmp(magic, "GGUF", 4))
        return err_set(msg, msg_len, ERR_FORMAT, "%s: not a GGUF file", g->name);
    if (!take(&c, &version, 4) || version < 2 || version > 3)
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s: not GGUF version 2 or 3 in little-endian order", g->name);
    if (!take(&c, &n_tensors, 8) || !take(&c, &n_pairs, 8) || n_pairs > left(&c) / MIN_PAIR_BYTES ||
        n_tensors > left(&c) / MIN_TENSOR_BYTES || n_pairs > INT_MAX || n_tensors > INT_MAX)
        return err_set(msg, msg_len, ERR_FORMAT, "%s: the file is shorter than its header says",
                       g->name);
    g->pairs = calloc(n_pairs + 1, sizeof *g->pairs);
    if (!g->pairs) return no_memory(g, msg, msg_len);
    while (g->n_pairs < (int)n_pairs) {
        enum err e = read_pair(g, &c, &g->pairs[g->n_pairs++], msg, msg_len);
        if (e) return e;
    }
    qsort(g->pairs, (size_t)g->n_pairs, sizeof *g->pairs, compare_pairs);
    for (int i = 1; i < g->n_pairs; i++)
        if (!strcmp(g->pairs[i - 1].key, g->pairs[i].key))
            return err_set(msg, msg_len, ERR_FORMAT, "%s: metadata %s is there twice", g->name,
                           g->pairs[i].key);
    return read_tensors(g, &c, n_tensors, msg, msg_len);
}

enum err gguf_open_bytes(struct gguf **out, const void *bytes, size_t len, const char *name,
                         char *msg, size_t msg_len) {
    struct gguf *g = calloc(1, sizeof *g);
    if (!g || !(g->name = strdup(name))) {
        free(g);
        return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", name);
    }
    g->bytes = len ? bytes : (const void *)"";
    g->len = len;
    enum err e = read_file(g, msg, msg_len);
    if (e)
        gguf_close(g);
    else
        *out = g;
    return e;
}

enum err gguf_open(struct gguf **out, const char *path, char *msg, size_t msg_len) {
    struct mapped file;
    enum err e = mapped_open(&file, path, msg, msg_len);
    if (e) return e;
    e = gguf_open_bytes(out, file.bytes, file.len, path, msg, msg_len);
    if (e)
        mapped_close(&file);
    else
        (*out)->file = file;
    return e;
}

void gguf_close(struct gguf *g) {
    if (!g) return;
    for (int i = 0; i < g->n_pairs; i++) {
        free(g->pairs[i].key);
        free(g->pairs[i].strings);
        free(g->pairs[i].text);
    }
    for (int i = 0; i < g->n_tensors; i++)
        free((char *)g->tensors[i].name);
    free(g->pairs);
    free(g->tensors);
    free(g->name);
    mapped_close(&g->file);
    free(g);
}

/* ---- look-up ---- */
const struct gguf_tensor *gguf_tensor(const struct gguf *g, const char *name) {
    struct gguf_tensor wanted = {.name = name};
    return g->n_tensors ? bsearch(&wanted, g->tensors, (size_t)g->n_tensors, sizeof *g->tensors,
                                  compare_names)
                        : NULL;
}

int gguf_n_tensors(const struct gguf *g) {
    return g->n_tensors;
}

const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, int i) {
    return &g->tensors[i];
}

/* Element i as a number of either kind: whole says which one was written. */
static bool read_value(const struct pair *p, size_t i, int64_t *integer, double *real,
                       bool *whole) {
    union {
        uint8_t u8;
        int8_t i8;
        uint16_t u16;
        int16_t i16;
        uint32_t u32;
        int32_t i32;
        float f32;
        uint64_t u64;
        int64_t i64;
        double f64;
    } v;
    if (p->type == STRING || i >= p->n) return false;
    memcpy(&v, p->values + i * value_bytes[p->type], value_bytes[p->type]);
    *whole = true;
    switch (p->type) {
    case U8:
        *integer = v.u8;
        return true;
    case BOOL:
        *integer = v.u8 != 0;
        return true;
    case I8:
        *integer = v.i8;
        return true;
    case U16:
        *integer = v.u16;
        return true;
    case I16:
        *integer = v.i16;
        return true;
    case U32:
        *integer = v.u32;
        return true;
    case I32:
        *integer = v.i32;
        return true;
    case I64:
        *integer = v.i64;
        return true;
    case U64:
        *integer = (int64_t)v.u64;
        return v.u64 <= INT64_MAX;
    default:
        break;
    }
    *whole = false;
    *real = p->type == F32 ? v.f32 : v.f64;
    return true;
}

bool gguf_int(const struct gguf *g, const char *key, int64_t *out) {
    const struct pair *p = find_pair(g, key);
    int64_t integer;
    double real;
    bool whole;
    if (!p || p->is_array || !read_value(p, 0, &integer, &real, &whole) || !whole) return false;
    *out = integer;
    return true;
}

bool gguf_double(const struct gguf *g, const char *key, double *out) {
    const struct pair *p = find_pair(g, key);
    int64_t integer;
    double real;
    bool whole;
    if (!p || p->is_array || !read_value(p, 0, &integer, &real, &whole)) return false;
    *out = whole ? (double)integer : real;
    return true;
}

const char *gguf_string(const struct gguf *g, const char *key, size_t *len) {
    const struct pair *p = find_pair(g, key);
    if (!p || !p->text) return NULL;
    if (len) *len = (size_t)read_u64(p->strings[0]);
    return p->text;
}

size_t gguf_array_size(const struct gguf *g, const char *key) {
    const struct pair *p = find_pair(g, key);
    return p && p->is_array ? p->n : 0;
}

const char *gguf_array_string(const struct gguf *g, const char *key, size_t i, size_t *len) {
    const struct pair *p = find_pair(g, key);
    if (!p || !p->is_array || p->type != STRING || i >= p->n) return NULL;
    *len = (size_t)read_u64(p->strings[i]);
    return (const char *)p->strings[i] + 8;
}

bool gguf_array_double(const struct gguf *g, const char *key, size_t i, double *out) {
    const struct pair *p = find_pair(g, key);
    int64_t integer;
    double real;
    bool whole;
    if (!p || !p->is_array || !read_value(p, i, &integer, &real, &whole)) return false;
    *out = whole ? (double)integer : real;
    return true;
}
