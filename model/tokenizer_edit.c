/* tokenizer_edit.c - changing text before it is split: prefixes, replacements, Unicode normal
 * forms. */
#include "model/tokenizer_impl.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

struct edit *edit_add(struct edit_list *list, enum edit_kind kind, const char *text,
                      size_t text_len) {
    struct edit *items = realloc(list->items, (size_t)(list->n + 1) * sizeof *items);
    if (!items) return NULL;
    list->items = items;
    struct edit *edit = &items[list->n];
    *edit = (struct edit){.kind = kind, .text_len = text_len, .text = malloc(text_len + 1)};
    if (!edit->text) return NULL;
    if (text_len) memcpy(edit->text, text, text_len);
    list->n++;
    return edit;
}

void edit_list_free(struct edit_list *list) {
    for (int i = 0; i < list->n; i++) {
        free(list->items[i].text);
        pcre2_code_free(list->items[i].pattern);
    }
    free(list->items);
}

/* ---- normal forms ---- */

struct code_points {
    utf8proc_int32_t *data;
    size_t n, cap;
};

static bool code_points_reserve(struct code_points *c, size_t more) {
    if (c->n + more <= c->cap) return true;
    size_t cap = c->cap * 2 + more + 256;
    utf8proc_int32_t *data = realloc(c->data, cap * sizeof *data);
    if (!data) return false;
    c->data = data;
    c->cap = cap;
    return true;
}

static int mark_class(utf8proc_int32_t c) {
    return utf8proc_get_property(c)->combining_class;
}

/* Canonical ordering: each run of combining marks stably by class.  utf8proc's own pass is an
 * insertion sort, which a megabyte of marks makes quadratic; a counting sort over the 256 classes
 * is not. */
static bool order_marks(struct code_points *c) {
    struct code_points sorted = {0};
    for (size_t i = 0; i < c->n;) {
        size_t run = 0;
        bool ordered = true;
        for (int last = 0, class; i + run < c->n; run++, last = class) {
            class = mark_class(c->data[i + run]);
            if (class == 0) break;
            ordered = ordered && class >= last;
        }
        if (!ordered) {
            size_t start[257] = {0}; /* of each class in the sorted run */
            for (size_t k = 0; k < run; k++)
                start[mark_class(c->data[i + k]) + 1]++;
            for (int k = 0; k < 256; k++)
                start[k + 1] += start[k];
            if (!code_points_reserve(&sorted, run)) return false;
            for (size_t k = 0; k < run; k++)
                sorted.data[start[mark_class(c->data[i + k])]++] = c->data[i + k];
            memcpy(c->data + i, sorted.data, run * sizeof *c->data);
        }
        i += run ? run : 1;
    }
    free(sorted.data);
    return true;
}

/* Appends the normal form of len bytes of valid UTF-8. */
static bool normalize(const struct edit *edit, const char *text, size_t len, struct bytes *out) {
    size_t ascii = 0;
    while (ascii < len && !(text[ascii] & 0x80))
        ascii++;
    if (ascii == len) return bytes_add(out, text, len);

    utf8proc_option_t form = UTF8PROC_STABLE | (edit->compatible ? UTF8PROC_COMPAT : 0);
    struct code_points c = {0};
    bool ok = true;
    for (size_t i = 0; ok && i < len;) {
        enum { MOST = 32 }; /* code points one character decomposes to: 18 in Unicode 15 */
        utf8proc_int32_t character;
        i += (size_t)utf8proc_iterate((const utf8proc_uint8_t *)text + i,
                                      (utf8proc_ssize_t)(len - i), &character);
        ok = code_points_reserve(&c, MOST);
        if (!ok) break;
        int boundary = 0;
        utf8proc_ssize_t n = utf8proc_decompose_char(character, c.data + c.n, MOST,
                                                     form | UTF8PROC_DECOMPOSE, &boundary);
        ok = n >= 0 && n <= MOST;
        if (ok) c.n += (size_t)n;
    }
    ok = ok && order_marks(&c);
    if (ok && edit->compose)
        c.n = (size_t)utf8proc_normalize_utf32(c.data, (utf8proc_ssize_t)c.n,
                                               UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    for (size_t i = 0; ok && i < c.n; i++) {
        ok = bytes_reserve(out, 4);
        if (ok)
            out->len +=
                (size_t)utf8proc_encode_char(c.data[i], (utf8proc_uint8_t *)out->data + out->len);
    }
    free(c.data);
    return ok;
}

/* ---- replacements ---- */

/* Appends len bytes of valid UTF-8 with every match replaced. */
static bool replace(const struct edit *edit, pcre2_match_data *data, const char *text, size_t len,
                    struct bytes *out) {
    struct matches m = {edit->pattern, data, NULL, text, len, 0, SIZE_MAX};
    size_t done = 0, begin, end;
    while (matches_next(&m, &begin, &end)) {
        if (!bytes_add(out, text + done, begin - done) ||
            !bytes_add(out, edit->text, edit->text_len))
            return false;
        done = end;
    }
    return bytes_add(out, text + done, len - done);
}

/* ---- all of them ---- */

static bool starts_with(const char *text, size_t len, const struct edit *edit) {
    return len >= edit->text_len && memcmp(text, edit->text, edit->text_len) == 0;
}

/* Whole valid runs are edited; bytes that are not UTF-8 are copied between them. */
static enum err edit_runs(const struct edit *edit, const char *text, size_t len,
                          struct bytes *out) {
    pcre2_match_data *data = NULL;
    if (edit->kind == EDIT_REPLACE && !(data = pcre2_match_data_create(1, NULL))) return ERR_NOMEM;
    bool ok = true;
    for (size_t i = 0; ok && i < len;) {
        size_t n = utf8_valid_run(text + i, len - i);
        if (n && data) ok = replace(edit, data, text + i, n, out);
        if (n && !data) ok = normalize(edit, text + i, n, out);
        i += n;
        if (ok && i < len) ok = bytes_add(out, text + i++, 1);
    }
    pcre2_match_data_free(data);
    return ok ? OK : ERR_NOMEM;
}

enum err edit_text(const struct edit_list *list, const char *text, size_t len, bool first,
                   struct bytes buffers[2], const char **out, size_t *out_len) {
    int in_use = 1;
    for (int i = 0; i < list->n && len > 0; i++) {
        const struct edit *edit = &list->items[i];
        bool prepend = edit->kind == EDIT_PREPEND ||
                       (edit->kind == EDIT_PREPEND_ONCE && !starts_with(text, len, edit)) ||
                       (edit->kind == EDIT_PREPEND_FIRST && first && !starts_with(text, len, edit));
        bool runs = edit->kind == EDIT_REPLACE || edit->kind == EDIT_NORMALIZE;
        if (!prepend && !runs) continue;
        struct bytes *to = &buffers[!in_use];
        to->len = 0;
        if (!bytes_reserve(to, len)) return ERR_NOMEM;
        if (runs) {
            enum err e = edit_runs(edit, text, len, to);
            if (e != OK) return e;
        } else if (!bytes_add(to, edit->text, edit->text_len) || !bytes_add(to, text, len)) {
            return ERR_NOMEM;
        }
        in_use = !in_use;
        text = to->data;
        len = to->len;
    }
    *out = text;
    *out_len = len;
    return OK;
}
