/* mapped.c - whole files mapped read-only into memory. */
#include "model/mapped.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum err mapped_open(struct mapped *out, const char *path, char *msg, size_t msg_len) {
    enum err e = OK;
    struct stat st;
    struct mapped file = {0};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe is refused, not waited for */
    if (fd < 0) return err_set(msg, msg_len, ERR_IO, "%s: %m", path);
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        e = err_set(msg, msg_len, ERR_IO, "%s: not a regular file", path);
    } else if (st.st_size >
               0) { /* mmap of nothing is an error, an empty file is the caller's to judge */
        void *bytes = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (bytes == MAP_FAILED)
            e = err_set(msg, msg_len, ERR_IO, "%s: cannot be mapped: %m", path);
        else
            file = (struct mapped){bytes, (size_t)st.st_size};
    }
    close(fd);
    if (!e) *out = file;
    return e;
}

void mapped_close(struct mapped *file) {
    if (file->bytes) munmap((void *)file->bytes, file->len);
    *file = (struct mapped){0};
}
