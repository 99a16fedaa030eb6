/* nodes.h - memory nodes (NUMA): which CPUs are near to which memory.
 *
 * Linux gives a page to the node of the CPU that writes it first.  Who keeps a thread on one node has what it wrote near. */
#ifndef URCHIN_COMPUTE_NODES_H
#define URCHIN_COMPUTE_NODES_H

#include <sched.h>
#include <stddef.h>

/* The CPUs of thread's node, of those in `usable`, when n_threads are shared out over the nodes that have any, in order and by how many
 * each has.  `nodes` is /sys/devices/system/node, or a test's.  Returns how many nodes have usable CPUs; below 2 *near is left alone.
 * Sets are of `bytes` (CPU_ALLOC_SIZE). */
int nodes_near(const char *nodes, const cpu_set_t *usable, size_t bytes, int thread, int n_threads, cpu_set_t *near);

#endif
