/* files.c - writing aside, syncing, renaming. */
#include "convert/files.h"

#include "model/base.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool write_all(int file, const char *bytes, size_t len) {
    while (len) {
        ssize_t n = write(file, bytes, len < 1 << 30 ? len : 1 << 30);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        bytes += n;
        len -= (size_t)n;
    }
    return true;
}

/* A rename is on disk once its folder is. */
static void sync_folder(const char *folder) {
    int dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0) return;
    fsync(dir);
    close(dir);
}

enum err file_replace(const char *folder, const char *name, const struct part *parts, int n,
                      char *msg, size_t msg_len) {
    char path[PATH_MAX], aside[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path ||
        snprintf(aside, sizeof aside, "%s.new", path) >= (int)sizeof aside)
        return err_set(msg, msg_len, ERR_ARG, "%s: the name is too long", folder);
    int file = open(aside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (file < 0)
        return err_set(msg, msg_len, ERR_IO, "cannot write '%s': %s", aside, strerror(errno));
    bool good = true;
    for (int i = 0; good && i < n; i++)
        good = write_all(file, parts[i].bytes, parts[i].len);
    good = good && fsync(file) == 0;
    int why = errno;
    if (close(file) && good) good = false, why = errno;
    if (good && rename(aside, path)) good = false, why = errno;
    if (!good) {
        unlink(aside);
        return err_set(msg, msg_len, ERR_IO, "cannot write '%s': %s", path, strerror(why));
    }
    sync_folder(folder);
    return OK;
}

enum err file_replace_json(const char *folder, const char *name, const cJSON *json, char *msg,
                           size_t msg_len) {
    char *text = json ? cJSON_Print(json) : NULL;
    if (!text) return err_set(msg, msg_len, ERR_NOMEM, "out of memory for %s/%s", folder, name);
    struct part parts[] = {{text, strlen(text)}, {"\n", 1}};
    enum err e = file_replace(folder, name, parts, 2, msg, msg_len);
    free(text);
    return e;
}

enum err file_replace_tensors(const char *folder, const char *name,
                              const struct tensor_out *tensors, int n, char *msg, size_t msg_len) {
    enum { LINE = 256 };
    size_t len = 0, at = 0, room = (size_t)n * LINE + 16;
    char *header = malloc(room);
    struct part *parts = calloc((size_t)n + 2, sizeof *parts);
    if (!header || !parts) {
        free(header);
        free(parts);
        return err_set(msg, msg_len, ERR_NOMEM, "out of memory for %s/%s", folder, name);
    }
    header[len++] = '{';
    for (int i = 0; i < n; i++) {
        const struct tensor_out *t = &tensors[i];
        size_t bytes = sizeof(float);
        len += (size_t)snprintf(header + len, LINE, "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[",
                                i ? "," : "", t->name);
        for (int d = 0; d < t->n_dims; d++) {
            len += (size_t)snprintf(header + len, LINE, "%s%d", d ? "," : "", t->dims[d]);
            bytes *= (size_t)t->dims[d];
        }
        len +=
            (size_t)snprintf(header + len, LINE, "],\"data_offsets\":[%zu,%zu]}", at, at + bytes);
        parts[i + 2] = (struct part){t->values, bytes};
        at += bytes;
    }
    header[len++] = '}';
    while (len % 8)
        header[len++] = ' ';
    uint64_t length = len;
    parts[0] = (struct part){&length, sizeof length};
    parts[1] = (struct part){header, len};
    enum err e = file_replace(folder, name, parts, n + 2, msg, msg_len);
    free(header);
    free(parts);
    return e;
}

bool folder_is(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

int folder_count(const char *path) {
    DIR *dir = opendir(path);
    int n = 0;
    if (!dir) return -1;
    for (struct dirent *entry; (entry = readdir(dir));)
        n += strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..");
    closedir(dir);
    return n;
}

enum err folder_make(const char *folder, char *msg, size_t msg_len) {
    struct stat st;
    if (mkdir(folder, 0755) == 0) return OK;
    if (errno != EEXIST)
        return err_set(msg, msg_len, ERR_IO, "cannot make '%s': %s", folder, strerror(errno));
    if (stat(folder, &st) || !S_ISDIR(st.st_mode))
        return err_set(msg, msg_len, ERR_IO, "'%s' is there and is no folder", folder);
    return OK;
}

enum err file_link(const char *folder, const char *name, const char *target, char *msg,
                   size_t msg_len) {
    char path[PATH_MAX], whole[PATH_MAX];
    struct stat st;
    if (!realpath(target, whole))
        return err_set(msg, msg_len, ERR_IO, "cannot open '%s': %s", target, strerror(errno));
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path)
        return err_set(msg, msg_len, ERR_ARG, "%s: the name is too long", folder);
    if (lstat(path, &st) == 0 && S_ISLNK(st.st_mode)) unlink(path);
    if (symlink(whole, path))
        return err_set(msg, msg_len, ERR_IO, "cannot link '%s' to '%s': %s", path, whole,
                       strerror(errno));
    return OK;
}
