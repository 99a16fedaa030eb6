/* sheet_heads.c - every layer and head: heat maps, where their weight lies, and pictures of a few.
 */
#include "convert/plot.h"
#include "convert/sheet_parts.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct grid {
    double *values;
    int rows, columns;
};
static struct grid grid_at(const cJSON *o, const char *path) {
    struct grid g;
    g.values = sheet_grid(o, path, &g.rows, &g.columns);
    return g;
}

/* Up to two grids of one quantity on one scale, so that they compare. */
static void pair(struct html *h, const cJSON *a, const char *path_a, const char *title_a,
                 const char *note_a, const cJSON *b, const char *path_b, const char *title_b,
                 const char *note_b, struct scale scale, bool cover) {
    struct grid first = grid_at(a, path_a), second = grid_at(b, path_b);
    if (cover) {
        scale_cover(&scale, first.values, first.rows * first.columns);
        scale_cover(&scale, second.values, second.rows * second.columns);
    }
    if (first.values)
        plot_grid(h, title_a, note_a, first.values, first.rows, first.columns, "layer", "head",
                  &scale);
    if (second.values)
        plot_grid(h, title_b, note_b, second.values, second.rows, second.columns, "layer", "head",
                  &scale);
    free(first.values);
    free(second.values);
}

/* Means over heads, [layers][classes]; NULL: none. */
static double *layer_shares(const cJSON *masses, const char *const *classes, int n_classes,
                            int *n_layers) {
    double *out = NULL;
    *n_layers = 0;
    for (int c = 0; c < n_classes; c++) {
        struct grid g = grid_at(masses, classes[c]);
        if (!g.values || (out && g.rows != *n_layers)) {
            free(g.values);
            free(out);
            return NULL;
        }
        if (!out) out = calloc((size_t)g.rows * (size_t)n_classes, sizeof *out);
        *n_layers = g.rows;
        for (int r = 0; out && r < g.rows; r++)
            for (int k = 0; k < g.columns; k++)
                out[r * n_classes + c] += g.values[r * g.columns + k] / g.columns;
        free(g.values);
        if (!out) return NULL;
    }
    return out;
}

static void shares(struct html *h, const cJSON *heads) {
    static const char *const classes[] = {"sink", "window", "cache", "linear"},
                             *const names[] = {"sink", "window", "cache", "state"},
                             *const panels[2] = {"softmax", "Hedgehog"};
    int n_softmax, n_own;
    double *softmax = layer_shares(sheet_at(heads, "softmax_mass"), classes, 4, &n_softmax),
           *own = layer_shares(sheet_at(heads, "mass"), classes, 4, &n_own);
    if (softmax && own && n_softmax == n_own)
        plot_shares(
            h, "Where the weight lies",
            "mean over heads and rows that have linear keys; the state holds all other keys",
            "layer", panels, (const double *const[2]){softmax, own}, n_own, names, 4);
    free(softmax);
    free(own);
}

static const cJSON *measured_heads(const cJSON *quality, const char **name) {
    const cJSON *r;
    cJSON_ArrayForEach(r, sheet_at(quality, "readers")) {
        if (!sheet_at(r, "heads")) continue;
        *name = sheet_string(r, "name");
        return sheet_at(r, "heads");
    }
    return NULL;
}

void sheet_maps(struct html *h, const cJSON *conversion, const cJSON *quality) {
    const char *name = NULL;
    const cJSON *heads = measured_heads(quality, &name),
                *before = sheet_at(conversion, "before.heads"),
                *after = sheet_at(conversion, "after.heads");
    if (!heads) heads = sheet_at(conversion, "heads");
    struct scale range = {NAN, NAN, false, NULL}, nats = {NAN, NAN, false, "nats"},
                 share = {0, 1, false, "share"}, rho = {0, 1, false, "rho"};
    if (!heads && !before && !after) return;
    sheet_open_section(h, "Layers and heads",
                       "Each cell is a head. Colours run from low (dark) to high (yellow); in a "
                       "pair both have one scale.");
    html_put(h, "<div class=\"grid\">");
    pair(h, before, "kl", "KL to the base's rows, calibrated",
         "before the first step, without cache", after, "kl", "KL to the base's rows, trained",
         "behind the last step, without cache", nats, true);
    if (heads) {
        pair(h, heads, "kl", "KL to softmax, as it runs", "over its own q and k, with the cache",
             NULL, NULL, NULL, NULL, nats, true);
        pair(h, heads, "rank_correlation", "Monotonicity of the maps",
             "Spearman's rho of feature products and q.k over linear keys; softmax is 1", NULL,
             NULL, NULL, NULL, rho, true);
        pair(h, heads, "attention_error", "Error of outputs, as it runs",
             "share of softmax's energy", heads, "attention_error_exact_only",
             "The same without the state", "what the linear branch is worth", range, true);
        pair(h, heads, "softmax_mass.linear", "Softmax's weight on linear keys", NULL, heads,
             "mass.linear", "Hedgehog's weight on the state", NULL, share, false);
        shares(h, heads);
    } else {
        pair(h, before, "teacher_linear", "The base's weight on keys that are linear here", NULL,
             after, "linear", "Hedgehog's weight on them, trained", NULL, share, false);
        pair(h, before, "attention_error", "Error of outputs, calibrated",
             "share of the output's energy", after, "attention_error", "Error of outputs, trained",
             NULL, range, true);
    }
    pair(h, conversion, "log_mix", "Mixing c", "log factor of linear terms, trained", conversion,
         "window_factor", "Mixing omega", "logit of the exact terms' factor, trained", range, true);
    html_put(h, "</div>");
    sheet_close_section(h);
}

/* ---- pictures ---- */
void sheet_pictures(struct html *h, const cJSON *heads) {
    enum { MOST = 128 };
    static const char *const panels[2] = {"softmax", "Hedgehog"}, *const keys[2] = {"softmax",
                                                                                    "hedgehog"};
    const cJSON *all = sheet_at(heads, "pictures"), *picture;
    bool open = false;
    cJSON_ArrayForEach(picture, all) {
        const char *rows[2][MOST];
        int n = 0;
        for (int k = 0; k < 2; k++) {
            const cJSON *row;
            int at = 0;
            cJSON_ArrayForEach(row, sheet_at(picture, keys[k])) if (at < MOST) rows[k][at++] =
                cJSON_GetStringValue(row);
            n = k == 0 || at == n ? at : 0;
        }
        if (!n || !isfinite(sheet_number(picture, "layer"))) continue;
        if (!open) {
            sheet_open_section(
                h, "Attention on a sample",
                "Weights of one head, softmax beside Hedgehog over the same q and k. "
                "A row is a query, a column a part of the "
                "keys; both begin at the top left.");
            html_put(h, "<div class=\"grid\">");
        }
        open = true;
        char title[80];
        snprintf(title, sizeof title, "Layer %.0f, head %.0f", sheet_number(picture, "layer"),
                 sheet_number(picture, "head"));
        plot_pictures(h, title, sheet_string(picture, "why"), panels,
                      (const char *const *const[2]){rows[0], rows[1]}, n,
                      sheet_number(picture, "tokens"));
    }
    if (!open) return;
    html_put(h, "</div>");
    sheet_close_section(h);
}
