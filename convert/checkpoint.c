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

static const char MAGIC[8] = "urchckp";

struct header { /* then identity, w, m, v, curve, before */
    char magic[8];
    uint64_t identity_len, n_params, n_sums, step;
    double seconds, share;
    char digest[SHA256_HEX]; /* of all that follows */
};

static size_t body_bytes(const struct header *h) {
    return h->identity_len + 3 * h->n_params * sizeof(float) + h->step * sizeof(struct point) +
           h->n_sums * sizeof(struct student_sums);
}

static size_t n_sums(const struct run *run) {
    return (size_t)run->training->n_layers * (size_t)run->training->n_heads;
}

/* Copies between a block and the run's arrays, in the order of the file. */
static void copy(const struct run *run, const struct header *h, char *block, bool save) {
    struct training *t = run->training;
    struct {
        void *at;
        size_t len;
    } parts[] = {
        {t->w, h->n_params * sizeof(float)},
        {t->m, h->n_params * sizeof(float)},
        {t->v, h->n_params * sizeof(float)},
        {run->curve, h->step * sizeof *run->curve},
        {run->before, h->n_sums * sizeof *run->before},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; block += parts[i++].len)
        if (save)
            memcpy(block, parts[i].at, parts[i].len);
        else
            memcpy(parts[i].at, block, parts[i].len);
}

enum err checkpoint_save(const struct run *run, double seconds, char *msg, size_t msg_len) {
    char *identity = cJSON_PrintUnformatted(run->identity), *body = NULL;
    struct header h = {.n_params = run->training->n_params,
                       .n_sums = n_sums(run),
                       .step = (uint64_t)run->training->step,
                       .seconds = seconds,
                       .share = run->share};
    memcpy(h.magic, MAGIC, sizeof h.magic);
    if (identity) {
        h.identity_len = strlen(identity);
        body = malloc(body_bytes(&h));
    }
    enum err e = OK;
    if (!body) {
        e = err_set(msg, msg_len, ERR_NOMEM, "out of memory for %s/checkpoint", run->folder);
    } else {
        memcpy(body, identity, h.identity_len);
        copy(run, &h, body + h.identity_len, true);
        sha256_hex(body, body_bytes(&h), h.digest);
        struct part parts[] = {{&h, sizeof h}, {body, body_bytes(&h)}};
        e = file_replace(run->folder, "checkpoint", parts, 2, msg, msg_len);
    }
    free(body);
    free(identity);
    return e;
}

/* The first key that differs between the two, in a sentence's words. */
static enum err refuse_other(const struct run *run, const cJSON *theirs, char *msg,
                             size_t msg_len) {
    char key[128] = "";
    char *was = NULL, *is = NULL;
    for (const cJSON *mine = run->identity->child; mine && !*key; mine = mine->next) {
        const cJSON *other = cJSON_GetObjectItemCaseSensitive(theirs, mine->string);
        if (cJSON_Compare(mine, other, true)) continue;
        snprintf(key, sizeof key, "%s", mine->string);
        const cJSON *a = mine, *b = other;
        for (const cJSON *inner = cJSON_IsObject(mine) ? mine->child : NULL; inner;
             inner = inner->next) {
            b = cJSON_GetObjectItemCaseSensitive(other, inner->string);
            if (cJSON_Compare(inner, b, true)) continue;
            a = inner;
            snprintf(key, sizeof key, "%s.%s", mine->string, inner->string);
            break;
        }
        was = b ? cJSON_PrintUnformatted(b) : NULL;
        is = cJSON_PrintUnformatted(a);
    }
    enum err e =
        err_set(msg, msg_len, ERR_ARG,
                "%s holds an unfinished conversion made otherwise (%s was %.80s, now it is "
                "%.80s): finish it as it was begun, name another --out, or remove "
                "%s/checkpoint",
                run->folder, *key ? key : "something", was ? was : "not set", is ? is : "other",
                run->folder);
    free(was);
    free(is);
    return e;
}

static enum err read_body(struct run *run, const struct mapped *file, const char *path, char *msg,
                          size_t msg_len) {
    struct header h;
    char digest[SHA256_HEX] = "";
    const char *body = (const char *)file->bytes + sizeof h;
    bool good = file->len >= sizeof h;
    if (good) memcpy(&h, file->bytes, sizeof h);
    good = good && !memcmp(h.magic, MAGIC, sizeof h.magic) && h.identity_len < file->len &&
           h.n_params < file->len && h.n_sums < file->len && h.step < file->len &&
           file->len - sizeof h == body_bytes(&h);
    if (good) sha256_hex(body, body_bytes(&h), digest);
    if (!good || memcmp(digest, h.digest, SHA256_HEX))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "%s is damaged, or no checkpoint: remove it to begin anew", path);
    cJSON *identity = cJSON_ParseWithLength(body, h.identity_len);
    enum err e = OK;
    if (!identity)
        e = err_set(msg, msg_len, ERR_NOMEM, "out of memory for %s", path);
    else if (!cJSON_Compare(identity, run->identity, true) ||
             h.n_params != run->training->n_params || h.n_sums != n_sums(run) ||
             h.step > (uint64_t)run->recipe.steps)
        e = refuse_other(run, identity, msg, msg_len);
    cJSON_Delete(identity);
    if (e) return e;
    copy(run, &h, (char *)body + h.identity_len, false);
    run->training->step = (int64_t)h.step;
    run->seconds = h.seconds;
    run->share = h.share;
    return OK;
}

enum err checkpoint_load(struct run *run, bool *found, char *msg, size_t msg_len) {
    struct stat st;
    char *path = path_join(run->folder, "checkpoint");
    if (!path) return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    enum err e = OK;
    *found = stat(path, &st) == 0;
    if (*found) {
        struct mapped file;
        e = mapped_open(&file, path, msg, msg_len);
        if (!e) {
            e = read_body(run, &file, path, msg, msg_len);
            mapped_close(&file);
        }
    }
    free(path);
    return e;
}

void checkpoint_remove(const struct run *run) {
    char *path = path_join(run->folder, "checkpoint");
    if (path) unlink(path);
    free(path);
}
