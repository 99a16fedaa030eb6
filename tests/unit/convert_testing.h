/* convert_testing.h - `urchin convert` run from the words of its command line, in a folder of the
 * test's own. */
#ifndef URCHIN_TESTS_CONVERT_TESTING_H
#define URCHIN_TESTS_CONVERT_TESTING_H

#include "config/json.h"
#include "convert/convert.h"
#include "convert/corpus.h"
#include "convert/reading.h"
#include "model_files.h"

#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define STORIES "tests/data/models/stories260k"
#define TEXT "tests/data/text/tinystories-valid-head.txt"
static struct team *team;
static char folder[64], said[4096];

static inline const char *in(const char *name) {
    static char paths[8][PATH_MAX];
    static int turn;
    char *path = paths[turn++ % 8];
    snprintf(path, PATH_MAX, "%s/%s", folder, name);
    return path;
}

static int new_folder(void **state) {
    (void)state;
    strcpy(folder, "/tmp/urchin-convert-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}
static int remove_folder(void **state) {
    char command[128];
    (void)state;
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command);
}

/* Runs the command; what it writes to stderr lands in `said`, what to stdout nowhere. */
static int convert_on(struct team *on, const char *const *args) {
    struct settings s;
    bool help;
    int n = 0;
    while (args[n])
        n++;
    if (settings_load(&s, n, (char **)args, &help, said, sizeof said)) fail_msg("%s", said);
    fflush(stderr);
    fflush(stdout);
    int err = dup(2), out = dup(1), file = open(in("said"), O_RDWR | O_CREAT | O_TRUNC, 0600),
        null = open("/dev/null", O_WRONLY);
    dup2(file, 2);
    dup2(null, 1);
    int status = convert_main(&s, on);
    fflush(stderr);
    fflush(stdout);
    dup2(err, 2);
    dup2(out, 1);
    ssize_t len = pread(file, said, sizeof said - 1, 0);
    said[len > 0 ? len : 0] = 0;
    close(err), close(out), close(file), close(null);
    settings_free(&s);
    return status;
}
#define CONVERT(...) convert_on(team, (const char *const[]){__VA_ARGS__, NULL})
#define CONVERTED(...)                                                                             \
    do {                                                                                           \
        if (CONVERT(__VA_ARGS__)) fail_msg("%s", said);                                            \
    } while (0)
#define REFUSED(says, ...)                                                                         \
    do {                                                                                           \
        assert_int_equal(CONVERT(__VA_ARGS__), 1);                                                 \
        if (!strstr(said, says)) fail_msg("'%s' does not say '%s'", said, says);                   \
    } while (0)

static inline bool is_there(const char *path) {
    return access(path, F_OK) == 0;
}

static struct bytes contents(const char *path) {
    struct bytes b = {0};
    char block[4096];
    FILE *file = fopen(path, "rb");
    if (!file) fail_msg("%s is not there", path);
    for (size_t n; (n = fread(block, 1, sizeof block, file)) > 0;)
        put(&b, block, n);
    put(&b, "", 1); /* also a string */
    b.len--;
    fclose(file);
    return b;
}

static inline void assert_same_file(const char *a, const char *b) {
    struct bytes x = contents(a), y = contents(b);
    assert_int_equal(x.len, y.len);
    assert_memory_equal(x.at, y.at, x.len);
    free(x.at);
    free(y.at);
}

static inline struct model *open_model(const char *path) {
    struct model_options o;
    model_options_init(&o);
    o.path = path;
    o.weights = WEIGHT_FP32;
    o.kv_type = KV_FP32;
    o.max_rows = o.max_logits = READING_ROWS;
    o.n_slots = 1;
    o.team = team;
    struct model *m = NULL;
    char msg[512] = "";
    if (model_open(&m, &o, msg, sizeof msg)) fail_msg("%s", msg);
    return m;
}

/* Scores of base and model over the first tokens of a text, in windows of 512. */
static inline void read_both(const char *path, const char *file, int64_t n_tokens,
                             struct score scores[2]) {
    struct model *m = open_model(path), *base = open_model(STORIES);
    struct bytes text = contents(file);
    int32_t *ids;
    size_t n;
    char msg[512] = "";
    assert_int_equal(tokenize(model_tokenizer(m), (char *)text.at, text.len, 0, &ids, &n), OK);
    struct text t = {ids, n_tokens < (int64_t)n ? n_tokens : (int64_t)n,
                     tokenizer_bos(model_tokenizer(m))};
    struct reader readers[] = {{.name = "base", .model = base, .linear = true},
                               {.name = "pupil", .model = m, .linear = true}};
    memset(scores, 0, 2 * sizeof *scores);
    for (int i = 0; i < 2; i++)
        readers[i].context = 512, readers[i].stride = 511;
    if (read_text(team, readers, 2, true, &t, INT64_MAX, scores, 1, msg, sizeof msg))
        fail_msg("%s", msg);
    free(ids);
    free(text.at);
    model_close(m);
    model_close(base);
}

/* Mean KL of the model's next-token rows to the base's. */
static inline double divergence(const char *path) {
    struct score scores[2];
    read_both(path, TEXT, 6000, scores);
    return score_mean_kl(&scores[1]);
}

#define IN_FOLDER(name) cmocka_unit_test_setup_teardown(name, new_folder, remove_folder)

#endif
