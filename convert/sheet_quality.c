/* sheet_quality.c - what `urchin eval` measured, as tables and curves. */
#include "convert/plot.h"
#include "convert/sheet_parts.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const cJSON *readers_of(const cJSON *quality) {
    const cJSON *readers = sheet_at(quality, "readers");
    return cJSON_IsArray(readers) ? readers : NULL;
}
static const cJSON *first_of(const cJSON *o) {
    return o ? o->child : NULL;
}
static bool is_base(const cJSON *reader) {
    return cJSON_IsTrue(sheet_at(reader, "compared_against"));
}
static bool is_ablation(const cJSON *reader) {
    return cJSON_IsTrue(sheet_at(reader, "ablation"));
}

static bool any_has(const cJSON *readers, const char *path) {
    const cJSON *r;
    cJSON_ArrayForEach(r, readers) if (sheet_at(r, path)) return true;
    return false;
}

static void row_name(struct html *h, const cJSON *reader) {
    html_put(h, "<tr class=\"%s\"><th>",
             is_base(reader)       ? "base"
             : is_ablation(reader) ? "part"
                                   : "whole");
    html_text(h, sheet_string(reader, "name"));
    html_put(h, "</th>");
}
static void cell(struct html *h, double x) {
    html_put(h, "<td class=\"n\">");
    html_number(h, x);
    html_put(h, "</td>");
}
static void cell_percent(struct html *h, double share) {
    if (isfinite(share))
        html_put(h, "<td class=\"n\">%.2f %%</td>", 100 * share);
    else
        html_put(h, "<td class=\"n\">&ndash;</td>");
}

static void perplexity(struct html *h, const cJSON *readers) {
    if (!any_has(readers, "perplexity")) return;
    const cJSON *r, *first = readers->child;
    bool compare = is_base(first);
    double base = sheet_number(first, "perplexity.perplexity");
    html_put(h, "<div class=\"span\"><h3>Perplexity</h3><p class=\"note\">Windows of ");
    html_number(h, sheet_number(first, "perplexity.context"));
    html_put(h, " tokens, ");
    html_number(h, sheet_number(first, "perplexity.tokens_scored"));
    html_put(h, " tokens scored.</p><div class=\"wide\"><table><thead><tr><th></th><th "
                "class=\"n\">perplexity</th>");
    if (compare)
        html_put(h, "<th class=\"n\">to the base</th><th class=\"n\">KL, nats</th><th "
                    "class=\"n\">same token</th>");
    html_put(h, "</tr></thead><tbody>");
    cJSON_ArrayForEach(r, readers) {
        double own = sheet_number(r, "perplexity.perplexity");
        row_name(h, r);
        if (isfinite(own))
            html_put(h, "<td class=\"n\">%.3f</td>", own);
        else
            cell(h, own);
        if (compare) {
            double more = 100 * (own / base - 1);
            if (r == first || !isfinite(more))
                html_put(h, "<td class=\"n\">&ndash;</td>");
            else
                html_put(h, "<td class=\"n\">%+.2f %%</td>", more);
            cell(h, sheet_number(r, "perplexity.kl"));
            cell_percent(h, sheet_number(r, "perplexity.agreement"));
        }
        html_put(h, "</tr>");
    }
    html_put(h, "</tbody></table></div></div>");
}

static void choice(struct html *h, const cJSON *quality, const cJSON *readers) {
    if (!any_has(readers, "choice")) return;
    const cJSON *r;
    html_put(h, "<div><h3>Multiple choice</h3><p class=\"note\">");
    html_number(h, sheet_number(readers->child, "choice.questions"));
    html_put(h, " questions of ");
    html_text(h, sheet_string(quality, "tasks"));
    html_put(h, ", by log-likelihood; plus or minus one standard error.</p><div "
                "class=\"wide\"><table><thead><tr><th></th>"
                "<th class=\"n\">acc</th><th class=\"n\">acc_norm</th></tr></thead><tbody>");
    cJSON_ArrayForEach(r, readers) {
        static const char *const keys[2][2] = {
            {"choice.acc", "choice.acc_standard_error"},
            {"choice.acc_norm", "choice.acc_norm_standard_error"}};
        row_name(h, r);
        for (int k = 0; k < 2; k++) {
            double a = sheet_number(r, keys[k][0]), e = sheet_number(r, keys[k][1]);
            if (isfinite(e))
                html_put(h, "<td class=\"n\">%.2f &plusmn; %.2f %%</td>", 100 * a, 100 * e);
            else
                cell_percent(h, a);
        }
        html_put(h, "</tr>");
    }
    html_put(h, "</tbody></table></div></div>");
}

/* ---- perplexity by position ---- */
static void stream(struct html *h, const cJSON *readers, int text) {
    struct series series[MAX_SERIES];
    double *xs[MAX_SERIES], *ys[MAX_SERIES];
    int n = 0, colour = 0;
    const cJSON *r, *bin;
    const char *name = NULL;
    cJSON_ArrayForEach(r, readers) {
        const cJSON *one = cJSON_GetArrayItem(sheet_at(r, "stream"), text),
                    *bins = sheet_at(one, "bins");
        int size = cJSON_IsArray(bins) ? cJSON_GetArraySize(bins) : 0, at = 0,
            shade = is_base(r) ? 5 : colour++;
        if (size < 2 || size > SHEET_MOST || n == MAX_SERIES) continue;
        double *x = malloc((size_t)size * sizeof *x), *y = malloc((size_t)size * sizeof *y);
        if (x && y) cJSON_ArrayForEach(bin, bins) {
                x[at] = sheet_number(bin, "from");
                y[at++] = sheet_number(bin, "perplexity");
            }
        name = sheet_string(one, "text");
        xs[n] = x;
        ys[n] = y;
        const char *reader = sheet_string(r, "name");
        series[n++] = (struct series){reader ? reader : "", x, y, at, false, shade, false};
    }
    if (n)
        plot_lines(h, "Perplexity by position, one sequence", name, "token", "perplexity", series,
                   n);
    for (int i = 0; i < n; i++) {
        free(xs[i]);
        free(ys[i]);
    }
}

/* ---- recall: shares right, by length and depth ---- */
static void shade_cell(struct html *h, double share) {
    static const struct scale scale = {0, 1, false, NULL};
    int shade = scale_shade(&scale, share);
    if (shade < 0)
        html_put(h, "<td class=\"n\">&ndash;</td>");
    else
        html_put(h, "<td class=\"n b%d\">%.2f</td>", shade, share);
}

static void recall(struct html *h, const cJSON *readers, const char *key, const char *title,
                   const char *note) {
    if (!any_has(readers, key)) return;
    const cJSON *r, *length, *bin, *lengths = NULL;
    cJSON_ArrayForEach(r, readers) if (!lengths) lengths = sheet_at(r, key);
    html_put(h,
             "<div><h3>%s</h3><p class=\"note\">%s</p><div class=\"wide "
             "heat\"><table><thead><tr><th></th>",
             title, note);
    cJSON_ArrayForEach(length, lengths) {
        html_put(h, "<th class=\"n\">");
        html_number(h, sheet_number(length, "tokens"));
        html_put(h, "</th>");
    }
    html_put(h, "</tr></thead><tbody>");
    cJSON_ArrayForEach(r, readers) {
        row_name(h, r);
        cJSON_ArrayForEach(length, sheet_at(r, key))
            shade_cell(h, sheet_number(length, "digits_right"));
        html_put(h, "</tr>");
        if (is_base(r) || is_ablation(r) || !sheet_at(first_of(sheet_at(r, key)), "whole_right"))
            continue;
        html_put(h, "<tr class=\"sub\"><th>whole answers</th>");
        cJSON_ArrayForEach(length, sheet_at(r, key))
            shade_cell(h, sheet_number(length, "whole_right"));
        html_put(h, "</tr>");
    }
    html_put(h, "</tbody></table></div>");
    cJSON_ArrayForEach(r, readers) {
        const cJSON *first = sheet_at(first_of(sheet_at(r, key)), "by_depth");
        if (is_base(r) || is_ablation(r) || !cJSON_IsArray(first)) continue;
        html_put(h, "<p class=\"note\">");
        html_text(h, sheet_string(r, "name"));
        html_put(h, " by where the fact stands in the text: digits right</p><div class=\"wide "
                    "heat\"><table><thead><tr><th>tokens</th>");
        cJSON_ArrayForEach(bin, first) {
            html_put(h, "<th class=\"n\">");
            html_number(h, round(100 * sheet_number(bin, "from")));
            html_put(h, "&ndash;");
            html_number(h, round(100 * sheet_number(bin, "to")));
            html_put(h, " %%</th>");
        }
        html_put(h, "</tr></thead><tbody>");
        cJSON_ArrayForEach(length, sheet_at(r, key)) {
            html_put(h, "<tr><th>");
            html_number(h, sheet_number(length, "tokens"));
            html_put(h, "</th>");
            cJSON_ArrayForEach(bin, sheet_at(length, "by_depth"))
                shade_cell(h, sheet_number(bin, "digits_right"));
            html_put(h, "</tr>");
        }
        html_put(h, "</tbody></table></div>");
    }
    html_put(h, "</div>");
}

static void added(struct html *h, const cJSON *quality) {
    static const char *const keys[] = {"own_alone",    "own_joined",    "own_added",
                                       "others_alone", "others_joined", "others_added"},
                             *const names[] = {"alone",  "all read in turn", "memories added",
                                               "unread", "all read in turn", "memories added"};
    const cJSON *all = sheet_at(quality, "added"), *one;
    if (!cJSON_IsArray(all) || !all->child) return;
    html_put(h,
             "<div class=\"span\"><h3>Texts read apart, memories added</h3><p "
             "class=\"note\">Digits right of pass "
             "keys, one in each text. "
             "Each text goes on with the memories of all others and is asked for its own key and "
             "for theirs.</p>"
             "<div class=\"wide heat\"><table><thead><tr><th>texts</th><th class=\"n\">tokens "
             "each</th><th class=\"n\">tries</th>");
    for (int k = 0; k < 6; k++)
        html_put(h, "<th class=\"n\">%s,<br>%s</th>", k < 3 ? "own" : "others'", names[k]);
    html_put(h, "</tr></thead><tbody>");
    cJSON_ArrayForEach(one, all) {
        char path[64];
        html_put(h, "<tr><th>");
        html_number(h, sheet_number(one, "texts"));
        html_put(h, "</th>");
        static const char *const counts[] = {"tokens", "own_added.tries"};
        for (int k = 0; k < 2; k++) {
            html_put(h, "<td class=\"n plain\">");
            html_number(h, sheet_number(one, counts[k]));
            html_put(h, "</td>");
        }
        for (int k = 0; k < 6; k++) {
            snprintf(path, sizeof path, "%s.digits_right", keys[k]);
            shade_cell(h, sheet_number(one, path));
        }
        html_put(h, "</tr>");
    }
    html_put(h, "</tbody></table></div></div>");
}

void sheet_quality(struct html *h, const cJSON *quality) {
    const cJSON *readers = readers_of(quality);
    if (!readers || !readers->child) return;
    sheet_open_section(h, "Quality", sheet_string(quality, "texts"));
    html_put(h, "<div class=\"grid\">");
    perplexity(h, readers);
    choice(h, quality, readers);
    recall(h, readers, "passkey", "Pass key",
           "One five-digit number hidden in a text of so many tokens: share of its digits right.");
    recall(h, readers, "recall", "Many facts",
           "Several numbers with names hidden in one text, each asked for: share of digits right.");
    added(h, quality);
    int n_streams = cJSON_GetArraySize(sheet_at(readers->child, "stream"));
    for (int i = 0; i < n_streams && i < 32; i++)
        stream(h, readers, i);
    html_put(h, "</div>");
    sheet_close_section(h);
}
