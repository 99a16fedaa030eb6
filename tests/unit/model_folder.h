/* model_folder.h - a folder of its own for each test that writes model files, and models that must
 * not open. */
#ifndef URCHIN_TESTS_MODEL_FOLDER_H
#define URCHIN_TESTS_MODEL_FOLDER_H

#include "model_testing.h"
#include "tiny_model.h"

static struct team *team; /* of the whole program */

/* A folder of its own for each test. */
static char folder[64], other[PATH_MAX];

static inline int new_folder(void **state) {
    (void)state;
    strcpy(folder, "/tmp/urchin-model-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static inline int remove_folder(void **state) {
    (void)state;
    tiny_path(other, folder, "model.gguf");
    unlink(other);
    tiny_remove(folder);
    return 0;
}

static inline const char *in_folder(const char *name) {
    tiny_path(other, folder, name);
    return other;
}

/* Opens, which must fail, with a sentence that says this. */
static inline void check_refused(struct model_options o, enum err want, const char *says) {
    struct model *m = (void *)&o;
    char msg[2000] = "";
    enum err e = model_open(&m, &o, msg, sizeof msg);
    if (!e) fail_msg("opened, though: %s", says);
    assert_ptr_equal(m, &o);
    if (!strstr(msg, says) || e != want)
        fail_msg("%s: \"%s\", expected \"%s\"", err_name(e), msg, says);
}

#define IN_FOLDER(name) cmocka_unit_test_setup_teardown(name, new_folder, remove_folder)

#endif
