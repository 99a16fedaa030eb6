/* picture.c - the attention of a few heads on a sample. */
#include "convert/picture.h"

#include <math.h>
#include <string.h>

static double mean_of(double sum, double n) {
    return n > 0 ? sum / n : 0;
}

enum rule { FARTHEST, WORST, SHARPEST, MEDIAN, N_RULES };
static const char *const reasons[] = {"most of softmax's weight on linear keys", "largest KL",
                                      "sharpest with a tenth of its weight on linear keys",
                                      "median KL"};

/* How well head i of n serves as an example; -INFINITY: not at all. */
static double merit(enum rule rule, const struct head_sums *sums, int i, int n) {
    const struct head_sums *s = &sums[i];
    double mass = mean_of(s->softmax[KEY_STATE], s->n_rows), kl = mean_of(s->kl, s->n_rows);
    if (s->n_rows <= 0) return -INFINITY;
    if (rule == FARTHEST) return mass;
    if (rule == WORST) return kl;
    if (rule == SHARPEST) return mass >= 0.1 ? -mean_of(s->entropy, s->n_rows) : -INFINITY;
    int below = 0;
    for (int k = 0; k < n; k++)
        below += mean_of(sums[k].kl, sums[k].n_rows) < kl;
    return -fabs(below - n / 2.0);
}

int picture_choose(struct picture *pictures, const struct head_sums *sums, int n_layers,
                   int n_heads) {
    int n = 0, total = n_layers * n_heads, taken[N_RULES];
    for (int rule = 0; rule < N_RULES; rule++) {
        int best = -1;
        double most = -INFINITY;
        for (int i = 0; i < total; i++) {
            double value = merit((enum rule)rule, sums, i, total);
            for (int k = 0; k < n; k++)
                if (taken[k] == i) value = -INFINITY;
            if (value > most) most = value, best = i;
        }
        if (best < 0) continue;
        taken[n] = best;
        pictures[n] =
            (struct picture){.layer = best / n_heads, .head = best % n_heads, .why = reasons[rule]};
        n++;
    }
    return n;
}

struct taking {
    struct picture *pictures;
    int n_pictures, n_tokens;
};

/* From several threads, for different heads; a picture is one head's. */
static void take_row(void *arg, int layer, int head, int position, const float *p, const float *a) {
    const struct taking *t = arg;
    for (int i = 0; i < t->n_pictures; i++) {
        struct picture *picture = &t->pictures[i];
        if (picture->layer != layer || picture->head != head) continue;
        int64_t row = (int64_t)position * PICTURE_CELLS / t->n_tokens;
        for (int j = 0; j <= position; j++) {
            int64_t cell = row * PICTURE_CELLS + (int64_t)j * PICTURE_CELLS / t->n_tokens;
            picture->softmax[cell] += p[j];
            picture->own[cell] += a[j];
        }
    }
}

enum err picture_take(struct picture *pictures, int n_pictures, struct heads *h, int slot,
                      const int32_t *ids, int n, char *msg, size_t msg_len) {
    struct taking t = {pictures, n_pictures, n};
    for (int i = 0; i < n_pictures; i++) {
        memset(pictures[i].softmax, 0, sizeof pictures[i].softmax);
        memset(pictures[i].own, 0, sizeof pictures[i].own);
        pictures[i].n_tokens = n;
    }
    heads_watch(h, take_row, &t);
    enum err e = heads_read(h, slot, ids, n, PICTURE_CELLS, true, msg, msg_len);
    heads_watch(h, NULL, NULL);
    return e;
}

static cJSON *rows_json(const float *cells) {
    cJSON *rows = cJSON_CreateArray();
    for (int r = 0; r < PICTURE_CELLS; r++) {
        char text[PICTURE_CELLS + 1] = "";
        for (int c = 0; c <= r; c++) {
            double level = (log10(fmax(cells[r * PICTURE_CELLS + c], 1e-30)) + 4) * 6;
            text[c] = (char)('A' + (int)lround(fmin(fmax(level, 0), PICTURE_LEVELS - 1)));
        }
        cJSON_AddItemToArray(rows, cJSON_CreateString(text));
    }
    return rows;
}

cJSON *picture_json(const struct picture *p) {
    cJSON *o = cJSON_CreateObject();
    cJSON_AddNumberToObject(o, "layer", p->layer);
    cJSON_AddNumberToObject(o, "head", p->head);
    cJSON_AddStringToObject(o, "why", p->why);
    cJSON_AddNumberToObject(o, "tokens", p->n_tokens);
    cJSON_AddItemToObject(o, "softmax", rows_json(p->softmax));
    cJSON_AddItemToObject(o, "hedgehog", rows_json(p->own));
    return o;
}
