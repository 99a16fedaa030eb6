/* packs.c - the packs and rows that a conversion learns from, for others to learn from the same.
 *
 *   build/bench/packs BASE --text FILES --steps N ... > FILE      flags as of `urchin convert`
 *
 * Writes the pack of calibration, the four of measurement, and N of training, each as int32:
 * n_tokens, n_documents, n_rows, first [n_documents + 1], tokens, rows; then float64 share.  The
 * layout is read by bench/convert_pytorch.py. */
#include "convert/recipe.h"
#include "convert/teacher.h"
#include "model/base.h"

#include <stdio.h>
#include <stdlib.h>

enum { PROBES = 4 }; /* as convert.c */

static void put(const void *values, size_t size, int n) {
    if (fwrite(values, size, (size_t)n, stdout) != (size_t)n) exit(1);
}

static enum err write_pack(const struct corpus *c, const struct recipe *r, int stream,
                           int64_t number, char *msg, size_t msg_len) {
    bool is_long =
        stream == PACK_TRAIN && r->long_every && number % r->long_every == r->long_every - 1;
    int length = is_long ? r->long_length : r->length, n_rows = is_long ? r->long_rows : r->rows;
    struct pack p;
    enum err e = corpus_pack(c, r->seed, stream, number, length, &p, msg, msg_len);
    if (e) return e;
    int *rows = calloc((size_t)n_rows + 2 * (size_t)p.n, sizeof *rows);
    if (!rows) return ERR_NOMEM;
    double share;
    n_rows = teacher_rows(&r->attention, &p, n_rows, r->seed, stream, number, rows, rows + n_rows,
                          &share);
    put((int[]){p.n, p.n_documents, n_rows}, sizeof(int), 3);
    put(p.first, sizeof *p.first, p.n_documents + 1);
    put(p.tokens, sizeof *p.tokens, p.n);
    put(rows, sizeof *rows, n_rows);
    put(&share, sizeof share, 1);
    free(rows);
    pack_free(&p);
    return OK;
}

int main(int argc, char **argv) {
    char msg[1024] = "";
    struct settings s;
    struct recipe r;
    struct base *base = NULL;
    struct tokenizer *t = NULL;
    struct chat *chat = NULL;
    struct corpus *c = NULL;
    bool help;
    argv[0] = (char *)"convert";
    enum err e = settings_load(&s, argc, argv, &help, msg, sizeof msg);
    if (!e) e = base_open(&base, s.model, msg, sizeof msg);
    if (!e) e = recipe_from_settings(&r, &s, base_config(base), msg, sizeof msg);
    if (!e) e = base_tokenizer(base, &t, msg, sizeof msg);
    if (!e) e = chat_new(&chat, t, tokenizer_chat_template(t), s.chat_template, msg, sizeof msg);
    if (!e) {
        struct corpus_options o = {.sources = s.text,
                                   .tokenizer = t,
                                   .chat = chat,
                                   .vocab_size = base_config(base)->vocab_size,
                                   .join = r.join_documents,
                                   .least = recipe_least_tokens(&r.attention),
                                   .recall = r.recall};
        e = corpus_open(&c, &o, msg, sizeof msg);
    }
    if (!e) e = write_pack(c, &r, PACK_CALIBRATE, 0, msg, sizeof msg);
    for (int i = 0; i < PROBES && !e; i++)
        e = write_pack(c, &r, PACK_PROBE, i, msg, sizeof msg);
    for (int i = 0; i < r.steps && !e; i++)
        e = write_pack(c, &r, PACK_TRAIN, i, msg, sizeof msg);
    if (e) fprintf(stderr, "packs: %s\n", *msg ? msg : err_name(e));
    return e != OK; /* what was opened goes with the program */
}
