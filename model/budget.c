/* budget.c - /proc/meminfo and the cgroups above this process. */
#include "model/budget.h"

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* The number a one-line file holds; false for none, or for "max". */
static bool read_number(const char *folder, const char *name, uint64_t *out) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "r");
    unsigned long long x = 0;
    bool found = file && fscanf(file, "%llu", &x) == 1;
    if (file) fclose(file);
    if (found) *out = x;
    return found;
}

/* A cgroup's file pages count as used, but go when memory is asked for. */
static uint64_t reclaimable(const char *folder) {
    char path[PATH_MAX], line[128];
    unsigned long long x, sum = 0;
    snprintf(path, sizeof path, "%s/memory.stat", folder);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "inactive_file %llu", &x) == 1 ||
            sscanf(line, "active_file %llu", &x) == 1)
            sum += x;
    if (file) fclose(file);
    return sum;
}

static void limit_by(uint64_t *available, const char *folder, const char *limit_name,
                     const char *used_name) {
    uint64_t limit, used;
    if (!read_number(folder, limit_name, &limit) || !read_number(folder, used_name, &used)) return;
    uint64_t files = reclaimable(folder);
    used -= files < used ? files : used;
    uint64_t left = limit > used ? limit - used : 0;
    if (left < *available) *available = left;
}

static uint64_t system_available(void) {
    char line[128];
    unsigned long long kib, found = 1 << 20;
    FILE *file = fopen("/proc/meminfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) found = kib;
    if (file) fclose(file);
    return (uint64_t)found << 10;
}

size_t budget_available(void) {
    uint64_t available = system_available();
    char line[PATH_MAX], folder[PATH_MAX + 32];
    FILE *file = fopen("/proc/self/cgroup", "r");
    while (file && fgets(line, sizeof line, file)) { /* hierarchy:controllers:/path */
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line, "0::", 3)) continue;
        for (char *path = line + 3, *end;;
             *end = 0) { /* v2: every ancestor limits, the mount's root last */
            snprintf(folder, sizeof folder, "/sys/fs/cgroup%s", path);
            limit_by(&available, folder, "memory.max", "memory.current");
            if (!(end = strrchr(path, '/'))) break;
        }
    }
    if (file) fclose(file);
    limit_by(&available, "/sys/fs/cgroup/memory", "memory.limit_in_bytes",
             "memory.usage_in_bytes"); /* v1, as containers see it */
    return available < SIZE_MAX ? (size_t)available : SIZE_MAX;
}
