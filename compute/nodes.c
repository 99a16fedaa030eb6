/* nodes.c - reads the kernel's lists of nodes and their CPUs: "0-3,8-11". */
#include "compute/nodes.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_NODES = 256 };

/* Adds to *set what the list in the file names and `usable` has; false: there is no such file, or
 * it is no list. */
static bool read_list(const char *path, const cpu_set_t *usable, size_t bytes, cpu_set_t *set) {
    FILE *f = fopen(path, "re");
    if (!f) return false;
    long first, last;
    bool ok = true;
    for (int end = ','; ok && end == ',' && fscanf(f, "%ld", &first) == 1;) {
        last = first;
        end = fgetc(f);
        if (end == '-') ok = fscanf(f, "%ld", &last) == 1, end = fgetc(f);
        ok = ok && first >= 0 && last >= first && last < (long)(8 * bytes);
        for (long cpu = first; ok && cpu <= last; cpu++)
            if (!usable || CPU_ISSET_S((size_t)cpu, bytes, usable))
                CPU_SET_S((size_t)cpu, bytes, set);
    }
    fclose(f);
    return ok;
}

int nodes_near(const char *nodes, const cpu_set_t *usable, size_t bytes, int thread, int n_threads,
               cpu_set_t *near) {
    int total = CPU_COUNT_S(bytes, usable), before = 0, n = 0;
    cpu_set_t *set = CPU_ALLOC(8 * bytes), *mine = CPU_ALLOC(8 * bytes);
    bool found = false;
    for (int node = 0; set && mine && node < MAX_NODES; node++) {
        char path[4200];
        CPU_ZERO_S(bytes, set);
        snprintf(path, sizeof path, "%s/node%d/cpulist", nodes, node);
        if (!read_list(path, usable, bytes, set)) continue;
        int count = CPU_COUNT_S(bytes, set);
        if (!count) continue;
        n++;
        /* threads are laid over the CPUs in the nodes' order; one belongs where its middle falls */
        double middle = ((double)thread + 0.5) * total / n_threads;
        if (!found && middle < before + count) {
            CPU_ZERO_S(bytes, mine);
            CPU_OR_S(bytes, mine, mine, set);
            found = true;
        }
        before += count;
    }
    if (n > 1 && found) {
        CPU_ZERO_S(bytes, near);
        CPU_OR_S(bytes, near, near, mine);
    }
    CPU_FREE(set);
    CPU_FREE(mine);
    return found ? n : 0;
}
