/* memory.c - big zeroed blocks in huge pages. */
#include "compute/memory.h"

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

enum { HUGE_PAGE = 2 << 20 };

static size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

/* What is really mapped for a request: whole pages, at least one. */
static size_t mapped_bytes(size_t bytes) {
    return round_up(bytes ? bytes : 1, (size_t)sysconf(_SC_PAGESIZE));
}

void *memory_map(size_t bytes) {
    if (bytes > SIZE_MAX / 2) return NULL;
    size_t size = mapped_bytes(bytes), extra = bytes >= HUGE_PAGE ? HUGE_PAGE : 0;
    char *p = mmap(NULL, size + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (!extra) return p;
    char *aligned = p + (round_up((uintptr_t)p, HUGE_PAGE) - (uintptr_t)p);
    if (aligned > p) munmap(p, (size_t)(aligned - p));
    char *end = aligned + size, *mapped_end = p + size + extra;
    if (mapped_end > end) munmap(end, (size_t)(mapped_end - end));
    madvise(aligned, size, MADV_HUGEPAGE); /* advice: without it the pages are just small */
    return aligned;
}

void memory_unmap(void *p, size_t bytes) {
    if (p) munmap(p, mapped_bytes(bytes));
}
