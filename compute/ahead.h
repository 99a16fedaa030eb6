/* ahead.h - memory that a thread reads soon, and bringing it near before. */
#ifndef URCHIN_COMPUTE_AHEAD_H
#define URCHIN_COMPUTE_AHEAD_H

enum { CACHE_LINE = 64, MAX_AHEAD = 8 };

struct range {
    const char *at, *end;
};

/* The last range is read first.  All of it is mapped. */
struct ahead {
    struct range range[MAX_AHEAD];
    int n;
};

/* Beside other work: a hint to the second level, since the first has that work at hand.  A CPU drops
 * it when its misses are all in use: bursts of hints do nothing. */
static inline void ask_for_line(const void *at) {
    __builtin_prefetch(at, 0, 2);
}

/* With nothing else to do: a load, which is never dropped and which the hardware's own prefetch
 * follows.  Nobody looks at the value, so it does not matter that another thread may be writing it; no
 * compiler or sanitizer sees it. */
static inline void load_line(const void *at) {
#if defined(__x86_64__)
    __asm__ volatile("testb $1, (%0)" : : "r"(at) : "cc");
#else
    ask_for_line(at);
#endif
}

/* Loads the next n lines, or those that are left; n becomes 0 when none are. */
static inline void ahead_load(struct ahead *ahead, int n) {
    while (ahead->n) {
        struct range *r = &ahead->range[ahead->n - 1];
        for (; n && r->at < r->end; n--, r->at += CACHE_LINE)
            load_line(r->at);
        if (r->at < r->end) return;
        ahead->n--;
    }
}

#endif
