/* teacher.c - reading a pack and keeping what its layers attended with. */
#include "convert/teacher.h"

#include "compute/memory.h"
#include "convert/gpu_lesson.h"

#include <stdlib.h>
#include <string.h>

enum {
    ROW_DRAWS = 1 << 20,
    ANSWER_DRAWS = 3 << 20
}; /* rows draw from numbers that places of text do not use */

struct teacher {
    struct model *model;
    struct attention_config attention;
    int max_tokens, max_rows, n_layers, n_rows, n_tokens, step_rows, n_slots;
    struct gpu_lesson *device;  /* owned; NULL: the model is the CPU's */
    size_t q_floats, kv_floats; /* of a row: q, and k with v */
    float *kv, *q;              /* as struct lesson has them */
    size_t kv_bytes, q_bytes;
    float *cosines, *sines, *far_cosines, *far_sines;
    int *rows, *scratch;
    int at,
        next_row; /* of the step in progress: its first token, the first of rows not before it */
};

static size_t kv_bytes(const struct model_info *i, int max_tokens) {
    return (size_t)i->n_layers * (size_t)max_tokens * 2 * (size_t)i->attention.n_kv_heads *
           (size_t)i->attention.head_dim * sizeof(float);
}
static size_t q_bytes(const struct model_info *i, int max_rows) {
    return (size_t)i->n_layers * (size_t)max_rows * (size_t)i->attention.n_heads *
           (size_t)i->attention.head_dim * sizeof(float);
}
size_t teacher_bytes(const struct model_info *info, int max_tokens, int max_rows) {
    return kv_bytes(info, max_tokens) + q_bytes(info, max_rows);
}

static void take(void *arg, int layer, const float *qkv, int n_rows) {
    struct teacher *t = arg;
    size_t row = t->q_floats + t->kv_floats;
    float *kv = t->kv + ((size_t)layer * (size_t)t->n_tokens + (size_t)t->at) * t->kv_floats;
    for (int i = 0; i < n_rows; i++)
        memcpy(kv + (size_t)i * t->kv_floats, qkv + (size_t)i * row + t->q_floats,
               t->kv_floats * sizeof *kv);
    float *q = t->q + (size_t)layer * (size_t)t->n_rows * t->q_floats;
    for (int r = t->next_row; r < t->n_rows && t->rows[r] < t->at + n_rows; r++)
        memcpy(q + (size_t)r * t->q_floats, qkv + (size_t)(t->rows[r] - t->at) * row,
               t->q_floats * sizeof *q);
}

static void take_on_device(void *arg, int layer, const float *qkv, int n_rows) {
    struct teacher *t = arg;
    int end = t->next_row;
    while (end < t->n_rows && t->rows[end] < t->at + n_rows)
        end++;
    gpu_lesson_take(t->device, layer, qkv, t->at, n_rows, t->next_row, end - t->next_row);
}

enum err teacher_new(struct teacher **out, struct model *model,
                     const struct attention_config *attention, int max_tokens, int max_rows) {
    const struct model_info *info = model_info(model);
    const struct rope *rope = model_rope(model);
    struct gpu *device = model_gpu(model);
    struct teacher *t = calloc(1, sizeof *t);
    if (!t) return ERR_NOMEM;
    size_t half = (size_t)attention->head_dim / 2, tokens = (size_t)max_tokens;
    t->model = model;
    t->attention = *attention;
    t->max_tokens = max_tokens;
    t->max_rows = max_rows;
    t->n_layers = info->n_layers;
    t->q_floats = (size_t)attention->n_heads * (size_t)attention->head_dim;
    t->kv_floats = 2 * (size_t)attention->n_kv_heads * (size_t)attention->head_dim;
    t->kv_bytes = kv_bytes(info, max_tokens);
    t->q_bytes = q_bytes(info, max_rows);
    if (!device) {
        t->kv = memory_map(t->kv_bytes);
        t->q = memory_map(t->q_bytes);
    }
    t->rows = calloc((size_t)max_rows, sizeof *t->rows);
    t->scratch = calloc(2 * tokens, sizeof *t->scratch);
    t->cosines = calloc(tokens * half + 1, sizeof *t->cosines);
    t->sines = calloc(tokens * half + 1, sizeof *t->sines);
    t->far_cosines = calloc(half + 1, sizeof *t->far_cosines);
    t->far_sines = calloc(half + 1, sizeof *t->far_sines);
    t->step_rows = device ? TEACHER_DEVICE_ROWS : TEACHER_ROWS;
    t->n_slots = info->n_slots < TEACHER_DEVICE_SLOTS ? info->n_slots : TEACHER_DEVICE_SLOTS;
    if ((!device && (!t->kv || !t->q)) || !t->rows || !t->scratch || !t->cosines || !t->sines ||
        !t->far_cosines || !t->far_sines) {
        teacher_free(t);
        return ERR_NOMEM;
    }
    for (size_t p = 0; rope && p < tokens; p++)
        rope_angles(rope, (int64_t)p, t->cosines + p * half, t->sines + p * half);
    if (rope) rope_angles(rope, attention->max_distance, t->far_cosines, t->far_sines);
    const float *const angles[] = {t->cosines, t->sines}, *const far[] = {t->far_cosines,
                                                                          t->far_sines};
    enum err e = OK;
    if (device)
        e = gpu_lesson_new(&t->device, device, attention, t->n_layers, max_tokens, max_rows,
                           rope ? angles : NULL, rope ? far : NULL);
    if (e) {
        teacher_free(t);
        return e;
    }
    *out = t;
    return OK;
}

void teacher_free(struct teacher *t) {
    if (!t) return;
    gpu_lesson_free(t->device);
    memory_unmap(t->kv, t->kv_bytes);
    memory_unmap(t->q, t->q_bytes);
    free(t->rows);
    free(t->scratch);
    free(t->cosines);
    free(t->sines);
    free(t->far_cosines);
    free(t->far_sines);
    free(t);
}

/* One of each of n even parts of from [m]; returns how many: m where that is fewer. */
static int draw_some(int *out, int n, const int *from, int m, int64_t seed, int stream,
                     int64_t number, uint64_t draws) {
    if (n > m) n = m;
    for (int r = 0; r < n; r++) {
        int first = (int)((int64_t)r * m / n), end = (int)((r + 1LL) * m / n);
        uint64_t draw = chance(seed, stream, number, draws + (uint64_t)r);
        out[r] = from[first + (int)(draw % (uint64_t)(end - first))];
    }
    return n;
}

static int ascending(const void *a, const void *b) {
    return *(const int *)a - *(const int *)b;
}

int teacher_rows(const struct attention_config *attention, const struct pack *pack, int n_rows,
                 int64_t seed, int stream, int64_t number, int *rows, int *scratch, double *share) {
    int n = 0, n_answers = 0, sinks, *answers = scratch, *others = scratch + pack->n;
    int64_t from;
    for (int d = 0; d < pack->n_documents; d++)
        for (int i = pack->first[d]; i < pack->first[d + 1]; i++) {
            if (lesson_linear_keys(attention, i - pack->first[d], &sinks, &from) <= 0) continue;
            bool answer = pack->weight && i + 1 < pack->first[d + 1] && pack->weight[i + 1] > 0;
            if (answer)
                answers[n_answers++] = i;
            else
                others[n++] = i;
        }
    int taken = draw_some(rows, n_rows, answers, n_answers, seed, stream, number, ANSWER_DRAWS);
    int all =
        taken + draw_some(rows + taken, n_rows - taken, others, n, seed, stream, number, ROW_DRAWS);
    if (taken) qsort(rows, (size_t)all, sizeof *rows, ascending);
    *share = (double)(n + n_answers) / pack->n;
    return all;
}

/* The next tokens of the pack, from t->at on: whole documents, and the ends of one that goes on, as
 * many as a step and the model's slots take.  *n tokens; *document the last one's. */
static int next_step(const struct teacher *t, const struct pack *pack, int *document,
                     struct model_run *runs, int *n) {
    int n_runs = 0;
    *n = 0;
    while (n_runs < t->n_slots && *n < t->step_rows && t->at + *n < pack->n) {
        int from = t->at + *n;
        while (from >= pack->first[*document + 1])
            ++*document;
        int left = pack->first[*document + 1] - from, room = t->step_rows - *n,
            slot = *document % t->n_slots;
        if (from == pack->first[*document]) model_slot_clear(t->model, slot);
        runs[n_runs] = (struct model_run){
            .slot = slot, .n_rows = left < room ? left : room, .tokens = pack->tokens + from};
        *n += runs[n_runs++].n_rows;
    }
    return n_runs;
}

enum err teacher_read(struct teacher *t, const struct pack *pack, int n_rows, int64_t seed,
                      int stream, int64_t number, struct lesson *out, double *share, char *msg,
                      size_t msg_len) {
    if (pack->n > t->max_tokens || n_rows > t->max_rows) return ERR_ARG;
    t->n_tokens = pack->n;
    t->n_rows =
        teacher_rows(&t->attention, pack, n_rows, seed, stream, number, t->rows, t->scratch, share);
    bool rope = model_rope(t->model);
    *out = (struct lesson){.n_tokens = pack->n,
                           .n_documents = pack->n_documents,
                           .n_rows = t->n_rows,
                           .first = pack->first,
                           .rows = t->rows,
                           .kv = t->kv,
                           .q = t->q,
                           .cosines = rope ? t->cosines : NULL,
                           .sines = rope ? t->sines : NULL,
                           .far_cosines = t->far_cosines,
                           .far_sines = t->far_sines,
                           .device = t->device};
    if (t->device) gpu_lesson_plan(t->device, out);
    model_set_tap(t->model, t->device ? take_on_device : take, t);
    enum err e = OK;
    int document = 0, n = 0;
    t->next_row = 0;
    for (t->at = 0; !e && t->at < pack->n; t->at += n) {
        struct model_run runs[TEACHER_DEVICE_SLOTS];
        const float *none;
        int n_runs = next_step(t, pack, &document, runs, &n);
        e = model_step(t->model, runs, n_runs, &none);
        while (t->next_row < t->n_rows && t->rows[t->next_row] < t->at + n)
            t->next_row++;
    }
    model_set_tap(t->model, NULL, NULL);
    if (e)
        return err_set(msg, msg_len, e, "%s: the model refused to read a text of %d tokens (%s)",
                       model_info(t->model)->name, pack->n, err_name(e));
    return OK;
}
