/* checkpoint.c - an unfinished conversion on disk, in this machine's byte order. */
#include "convert/files.h"
#include "convert/run.h"

#include "model/base.h"
#include "model/mapped.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char MAGIC[8] = "urchck4";

/* Then identity, and the parts of copy_part().  n_fine 0: fine-tuning has not begun. */
struct header {
    char magic[8];
    uint64_t identity_len, n_params, n_sums, step, n_updates, transferred, n_fine, fine_step;
    double seconds, share, fine_before;
    int64_t n_wanted, n_heads; /* n_wanted -1: not looked for yet */
    int32_t heads[MOST_RETRIEVAL][2];
    char digest[SHA256_HEX]; /* of the parts' digests, one after the other */
};

enum { N_PARTS_OF_TRANSFER = 6, N_ALL_PARTS = 10 };

struct piece { /* of the run's memory, as it lies in the file */
    void *at;
    size_t len;
};
/* at is NULL where the run has no room for it (yet). */
static void pieces_of(const struct run *run, const struct header *h,
                      struct piece out[N_ALL_PARTS]) {
    const struct training *t = run->training;
    const struct finetune *f = run->fine;
    size_t params = h->n_params * sizeof(float), sums = h->n_sums * sizeof *run->before,
           fine = h->n_fine * sizeof(float);
    const struct piece all[N_ALL_PARTS] = {
        {t->w, params},          {t->m, params},
        {t->v, params},          {run->curve, h->step * sizeof *run->curve},
        {run->before, sums},     {run->after, sums},
        {f ? f->w : NULL, fine}, {f ? f->m : NULL, fine},
        {f ? f->v : NULL, fine}, {run->fine_curve, h->fine_step * sizeof *run->fine_curve}};
    memcpy(out, all, sizeof all);
}

static size_t body_bytes(const struct run *run, const struct header *h) {
    struct piece pieces[N_ALL_PARTS];
    size_t sum = h->identity_len;
    pieces_of(run, h, pieces);
    for (int i = 0; i < N_ALL_PARTS; i++)
        sum += pieces[i].len;
    return sum;
}

/* Of identity and pieces. */
static void digest_of(const char *identity, size_t len, const struct piece pieces[N_ALL_PARTS],
                      char out[SHA256_HEX]) {
    char digests[N_ALL_PARTS + 1][SHA256_HEX];
    sha256_hex(identity, len, digests[0]);
    for (int i = 0; i < N_ALL_PARTS; i++)
        sha256_hex(pieces[i].len ? pieces[i].at : "", pieces[i].len, digests[i + 1]);
    sha256_hex(digests, sizeof digests, out);
}

static size_t n_sums(const struct run *run) {
    return (size_t)run->training->n_layers * (size_t)run->training->n_heads;
}

enum err checkpoint_save(const struct run *run, double seconds, char *msg, size_t msg_len) {
    char *identity = cJSON_PrintUnformatted(run->identity);
    struct header h = {.n_params = run->training->n_params,
                       .n_sums = n_sums(run),
                       .step = (uint64_t)run->training->step,
                       .n_updates = (uint64_t)run->training->n_updates,
                       .transferred = run->transferred,
                       .n_fine = run->fine ? run->fine->n_params : 0,
                       .fine_step = run->fine ? (uint64_t)run->fine->step : 0,
                       .seconds = seconds,
                       .share = run->share,
                       .fine_before = run->fine_before,
                       .n_wanted = run->heads_found ? run->n_wanted : -1,
                       .n_heads = run->recipe.n_retrieval_heads};
    for (int i = 0; i < run->recipe.n_retrieval_heads; i++)
        for (int k = 0; k < 2; k++)
            h.heads[i][k] = run->recipe.retrieval_heads[i][k];
    if (!identity)
        return err_set(msg, msg_len, ERR_NOMEM, "out of memory for %s/checkpoint", run->folder);
    struct piece pieces[N_ALL_PARTS];
    struct part parts[N_ALL_PARTS + 2];
    memcpy(h.magic, MAGIC, sizeof h.magic);
    h.identity_len = strlen(identity);
    pieces_of(run, &h, pieces);
    digest_of(identity, h.identity_len, pieces, h.digest);
    parts[0] = (struct part){&h, sizeof h};
    parts[1] = (struct part){identity, h.identity_len};
    for (int i = 0; i < N_ALL_PARTS; i++)
        parts[i + 2] = (struct part){pieces[i].at, pieces[i].len};
    enum err e = file_replace(run->folder, "checkpoint", parts, N_ALL_PARTS + 2, msg, msg_len);
    free(identity);
    return e;
}

/* A copy.  Until fine-tuning has made a step, what attention transfer knows nothing of may still
 * change and is left out. */
static cJSON *identity_of(const cJSON *identity, bool only_transfer) {
    static const char *const unknown[] = {"cache", "horizon"};
    cJSON *o = cJSON_Duplicate(identity, true);
    if (!only_transfer) return o;
    cJSON *attention = cJSON_GetObjectItemCaseSensitive(o, "attention");
    cJSON_DeleteItemFromObjectCaseSensitive(o, "finetune");
    for (int i = 0; i < 2; i++)
        cJSON_DeleteItemFromObjectCaseSensitive(attention, unknown[i]);
    return o;
}

static bool same_conversion(const cJSON *a, const cJSON *b, bool only_transfer) {
    cJSON *x = identity_of(a, only_transfer), *y = identity_of(b, only_transfer);
    bool same = x && y && cJSON_Compare(x, y, true);
    cJSON_Delete(x);
    cJSON_Delete(y);
    return same;
}

/* The first setting that differs, as deep as both have it: its name into key, and both values
 * (NULL: not set). */
static void find_difference(const cJSON *is, const cJSON *was, char *key, size_t len,
                            const cJSON *found[2]) {
    size_t n = strlen(key);
    for (int gone = 0; gone < 2; gone++) /* then what is set no longer */
        for (const cJSON *at = (gone ? was : is)->child; at; at = at->next) {
            const cJSON *mine = cJSON_GetObjectItemCaseSensitive(is, at->string),
                        *theirs = cJSON_GetObjectItemCaseSensitive(was, at->string);
            if (mine && theirs && cJSON_Compare(mine, theirs, true)) continue;
            snprintf(key + n, len - n, "%s%s", n ? "." : "", at->string);
            found[0] = mine;
            found[1] = theirs;
            if (cJSON_IsObject(mine) && cJSON_IsObject(theirs))
                find_difference(mine, theirs, key, len, found);
            return;
        }
}

static enum err refuse_other(const struct run *run, const cJSON *identity, bool only_transfer,
                             char *msg, size_t msg_len) {
    char key[128] = "";
    const cJSON *found[2] = {0};
    cJSON *is = identity_of(run->identity, only_transfer),
          *was = identity_of(identity, only_transfer);
    if (is && was) find_difference(is, was, key, sizeof key, found);
    char *now = found[0] ? cJSON_PrintUnformatted(found[0]) : NULL;
    char *before = found[1] ? cJSON_PrintUnformatted(found[1]) : NULL;
    enum err e =
        err_set(msg, msg_len, ERR_ARG,
                "%s holds an unfinished conversion made otherwise (%s was %.80s, now it is "
                "%.80s): finish it as it was begun, name another --out, or remove "
                "%s/checkpoint",
                run->folder, *key ? key : "something", before ? before : "not set",
                now ? now : "not set", run->folder);
    free(now);
    free(before);
    cJSON_Delete(is);
    cJSON_Delete(was);
    return e;
}

static enum err damaged(const char *path, char *msg, size_t msg_len) {
    return err_set(msg, msg_len, ERR_FORMAT,
                   "%s is damaged, or no checkpoint: remove it to begin anew", path);
}

/* Heads ascend and are of this model, and so many updates can be: the digest says nothing of the
 * header. */
static bool header_is_good(const struct run *run, const struct header *h) {
    int n_kv = run->recipe.attention.n_kv_heads, last = -1;
    if (h->n_heads < 0 || h->n_heads > MOST_RETRIEVAL || h->n_updates >> 40) return false;
    for (int i = 0; i < (int)h->n_heads; i++) {
        int layer = h->heads[i][0], head = h->heads[i][1];
        if (layer < 0 || layer >= run->training->n_layers || head < 0 || head >= n_kv) return false;
        if (layer * n_kv + head <= last || recipe_keeps_softmax(&run->recipe, layer)) return false;
        last = layer * n_kv + head;
    }
    return true;
}

/* The heads found, where as many are wanted now. */
static void take_heads(struct run *run, const struct header *h) {
    struct recipe *r = &run->recipe;
    run->heads_found = true;
    r->n_retrieval_heads = (int)h->n_heads;
    for (int i = 0; i < r->n_retrieval_heads; i++)
        for (int k = 0; k < 2; k++)
            r->retrieval_heads[i][k] = h->heads[i][k];
}

/* Takes what it says of attention transfer, or of fine-tuning. */
static enum err read_body(struct run *run, const struct mapped *file, const char *path, bool fine,
                          char *msg, size_t msg_len) {
    struct header h;
    char digest[SHA256_HEX] = "";
    const char *body = (const char *)file->bytes + sizeof h;
    struct piece mine[N_ALL_PARTS], theirs[N_ALL_PARTS];
    bool good = file->len >= sizeof h;
    if (good) memcpy(&h, file->bytes, sizeof h);
    good = good && !memcmp(h.magic, MAGIC, sizeof h.magic) && h.identity_len < file->len &&
           h.n_params < file->len && h.n_sums < file->len && h.step < file->len &&
           h.n_fine < file->len && h.fine_step < file->len && header_is_good(run, &h) &&
           file->len - sizeof h == body_bytes(run, &h);
    if (good) {
        const char *at = body + h.identity_len;
        pieces_of(run, &h, mine);
        for (int i = 0; i < N_ALL_PARTS; at += mine[i++].len)
            theirs[i] = (struct piece){(void *)at, mine[i].len};
        digest_of(body, h.identity_len, theirs, digest);
    }
    if (!good || memcmp(digest, h.digest, SHA256_HEX)) return damaged(path, msg, msg_len);
    cJSON *identity = cJSON_ParseWithLength(body, h.identity_len);
    const bool at_the_turn = h.step == (uint64_t)run->recipe.steps && h.fine_step == 0;
    if (identity && !cJSON_GetObjectItemCaseSensitive(identity, "device"))
        cJSON_AddStringToObject(identity, "device",
                                "cpu"); /* written when that was all there was */
    enum err e = OK;
    if (!identity)
        e = err_set(msg, msg_len, ERR_NOMEM, "out of memory for %s", path);
    else if (!same_conversion(identity, run->identity, at_the_turn))
        e = refuse_other(run, identity, at_the_turn, msg, msg_len);
    else if (h.n_params != run->training->n_params || h.n_sums != n_sums(run) ||
             h.step > (uint64_t)run->recipe.steps ||
             h.fine_step > (uint64_t)run->recipe.finetune.steps)
        e = damaged(path, msg, msg_len);
    cJSON_Delete(identity);
    if (!e && fine && run->fine->n_params != h.n_fine) e = damaged(path, msg, msg_len);
    if (e) return e;
    for (int i = fine ? N_PARTS_OF_TRANSFER : 0; i < (fine ? N_ALL_PARTS : N_PARTS_OF_TRANSFER);
         i++)
        if (mine[i].len) memcpy(mine[i].at, theirs[i].at, mine[i].len);
    if (fine) {
        run->fine->step = (int64_t)h.fine_step;
        run->fine_before = h.fine_before;
        return OK;
    }
    run->training->step = (int64_t)h.step;
    run->training->n_updates = (int64_t)h.n_updates;
    run->transferred = h.transferred != 0;
    if (h.n_wanted == run->n_wanted && run->recipe.n_retrieval > run->recipe.n_retrieval_heads)
        take_heads(run, &h);
    run->fine_begun = h.fine_step > 0;
    run->seconds = h.seconds;
    run->share = h.share;
    return OK;
}

static enum err load(struct run *run, bool fine, bool *found, char *msg, size_t msg_len) {
    struct stat st;
    char *path = path_join(run->folder, "checkpoint");
    if (!path) return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    enum err e = OK;
    *found = stat(path, &st) == 0;
    if (*found) {
        struct mapped file;
        e = mapped_open(&file, path, msg, msg_len);
        if (!e) {
            e = read_body(run, &file, path, fine, msg, msg_len);
            mapped_close(&file);
        }
    }
    free(path);
    return e;
}

enum err checkpoint_load(struct run *run, bool *found, char *msg, size_t msg_len) {
    return load(run, false, found, msg, msg_len);
}
enum err checkpoint_load_fine(struct run *run, char *msg, size_t msg_len) {
    bool found;
    enum err e = load(run, true, &found, msg, msg_len);
    if (!e && !found) e = err_set(msg, msg_len, ERR_IO, "%s/checkpoint is gone", run->folder);
    return e;
}

void checkpoint_remove(const struct run *run) {
    char *path = path_join(run->folder, "checkpoint");
    if (path) unlink(path);
    free(path);
}
