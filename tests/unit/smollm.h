/* smollm.h - where the default model's base is, for tests that want it. */
#ifndef URCHIN_TESTS_SMOLLM_H
#define URCHIN_TESTS_SMOLLM_H

#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

/* The default model's base, where the user has fetched it; NULL: skip. Static. */
static inline const char *smollm_base(void) {
    static char path[PATH_MAX];
    const char *cache = getenv("URCHIN_CACHE"), *home = getenv("HOME");
    if (cache)
        snprintf(path, sizeof path, "%s/SmolLM2-135M-Instruct.Q4_1.gguf", cache);
    else
        snprintf(path, sizeof path, "%s/.cache/urchin/SmolLM2-135M-Instruct.Q4_1.gguf",
                 home ? home : "");
    if (access(path, R_OK) == 0) return path;
    print_message("skipped: %s is not there (`make model` fetches it)\n", path);
    return NULL;
}

#endif
