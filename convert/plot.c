/* plot.c - figures as inline SVG. */
#include "convert/plot.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- colours ---- */
static const unsigned char viridis[9][3] = {
    {0x44, 0x01, 0x54}, {0x47, 0x2d, 0x7b}, {0x3b, 0x52, 0x8b},
    {0x2c, 0x72, 0x8e}, {0x21, 0x91, 0x8c}, {0x28, 0xae, 0x80},
    {0x5e, 0xc9, 0x62}, {0xad, 0xdc, 0x30}, {0xfd, 0xe7, 0x25}};

static void shade_rgb(int shade, int rgb[3]) {
    double at = shade * 8.0 / (SHADES - 1);
    int i = at >= 8 ? 7 : (int)at;
    for (int c = 0; c < 3; c++)
        rgb[c] = (int)lround(viridis[i][c] + (at - i) * (viridis[i + 1][c] - viridis[i][c]));
}

void plot_style(struct html *h) {
    static const char *const light[] = {"#0072b2", "#d55e00", "#009e73",
                                        "#b58900", "#cc79a7", "#6c757d"},
                             *const dark[] = {"#56b4e9", "#ff8c42", "#2fd1a0",
                                              "#f0c808", "#e8a0c8", "#a0a8b0"};
    for (int i = 0; i < 6; i++)
        html_put(h, ".s%d{stroke:%s}.f%d{fill:%s}", i, light[i], i, light[i]);
    html_put(h, "@media(prefers-color-scheme:dark){");
    for (int i = 0; i < 6; i++)
        html_put(h, ".s%d{stroke:%s}.f%d{fill:%s}", i, dark[i], i, dark[i]);
    html_put(h, "}");
    for (int i = 0; i < SHADES; i++) {
        int c[3];
        shade_rgb(i, c);
        html_put(h,
                 ".v%d{fill:#%02x%02x%02x}.w%d{stroke:#%02x%02x%02x}.b%d{background:#%02x%02x%02x;"
                 "color:%s}",
                 i, c[0], c[1], c[2], i, c[0], c[1], c[2], i, c[0], c[1], c[2],
                 i < 15 ? "#fff" : "#111");
    }
    html_put(
        h, "svg{width:100%%;height:auto;display:block}"
           "svg text{fill:var(--ink);font:13px system-ui,sans-serif}"
           "svg .quiet{fill:var(--quiet)}svg .small{font-size:11.5px}"
           "svg .axis{stroke:var(--line);fill:none}svg .rule{stroke:var(--line);stroke-opacity:.55}"
           "svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}"
           "svg .faint{stroke-width:1;stroke-opacity:.35}"
           "svg .ink-on{fill:#fff}svg .ink-off{fill:#111}svg .none{fill:var(--line)}");
}

/* ---- frames ---- */
static void open_figure(struct html *h, const char *title, const char *note, int height) {
    html_put(h, "<figure><figcaption><b>");
    html_text(h, title);
    html_put(h, "</b>");
    if (note) {
        html_put(h, "<span>");
        html_text(h, note);
        html_put(h, "</span>");
    }
    html_put(h, "</figcaption><svg viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"", PLOT_WIDTH,
             height);
    html_text(h, title);
    html_put(h, "\">");
}
static void close_figure(struct html *h) {
    html_put(h, "</svg></figure>\n");
}

static void label(struct html *h, double x, double y, const char *anchor, const char *class,
                  const char *text) {
    html_put(h, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" class=\"%s\">", x, y, anchor,
             class);
    html_text(h, text);
    html_put(h, "</text>");
}
static void label_number(struct html *h, double x, double y, const char *anchor, double value) {
    html_put(h, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" class=\"quiet small\">", x, y,
             anchor);
    if (value != 0 && fabs(value) < 9.9e-4) {
        int power = (int)floor(log10(fabs(value)) + 1e-9);
        html_put(h, "%.3ge%d", value / pow(10, power), power);
    } else if (fabs(value) < 1000)
        html_put(h, "%.3g", value + 0.0);
    else
        html_number(h, value);
    html_put(h, "</text>");
}
static void upright(struct html *h, double x, double y, const char *text) {
    html_put(
        h,
        "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\" transform=\"rotate(-90 %.1f %.1f)\">",
        x, y, x, y);
    html_text(h, text);
    html_put(h, "</text>");
}

/* ---- axes ---- */
struct axis {
    double low, high; /* of the data, after nice() of the ticks */
    bool log;
    double step;       /* of the ticks; 0: log */
    double at, length; /* in units; negative length: upwards */
};

static double place(const struct axis *a, double x) {
    double low = a->low, high = a->high;
    if (a->log) x = log10(x), low = log10(low), high = log10(high);
    return a->at + (high > low ? (x - low) / (high - low) : 0.5) * a->length;
}

/* 1, 2 or 5 times a power of ten, so that there are about n steps */
static double nice_step(double range, int n) {
    double rough = range / n, power = pow(10, floor(log10(rough)));
    double times = rough / power;
    return (times <= 1.01 ? 1 : times <= 2.01 ? 2 : times <= 5.01 ? 5 : 10) * power;
}

enum { MOST_TICKS = 24 };
static int ticks_of(const struct axis *a, int n, double *ticks) {
    int count = 0;
    if (!(a->high > a->low)) {
        ticks[0] = a->low;
        return 1;
    }
    if (a->log) {
        static const double steps[] = {1, 2, 5};
        double decades = log10(a->high / a->low);
        for (double p = pow(10, floor(log10(a->low) + 1e-9));
             p <= a->high * 1.0001 && count < MOST_TICKS - 3; p *= 10)
            for (int i = 0; i < 3; i++) {
                double tick = p * steps[i];
                if (i && decades > 2.5) break;
                if (tick >= a->low * 0.9999 && tick <= a->high * 1.0001) ticks[count++] = tick;
            }
        return count;
    }
    double step = a->step > 0 ? a->step : nice_step(a->high - a->low, n);
    for (double i = ceil(a->low / step - 1e-9);
         i * step <= a->high + 1e-9 * step && count < MOST_TICKS; i++)
        ticks[count++] = i == 0 ? 0 : i * step; /* no -0 */
    return count;
}

/* Widens a range to whole ticks. */
static void widen(struct axis *a, int n) {
    if (!(a->high > a->low)) {
        double by = a->low ? fabs(a->low) * 0.1 : 1;
        a->low -= a->log ? 0 : by;
        a->high += by;
    }
    if (a->log) return;
    double step = a->step = nice_step(a->high - a->low, n);
    a->low = floor(a->low / step + 1e-9) * step;
    a->high = ceil(a->high / step - 1e-9) * step;
}

static void cover(struct axis *a, const double *x, int n) {
    for (int i = 0; i < n; i++)
        if (isfinite(x[i])) {
            if (!(a->low <= x[i])) a->low = x[i];
            if (!(a->high >= x[i])) a->high = x[i];
        }
}

/* ---- lines ---- */
static void draw_series(struct html *h, const struct series *s, const struct axis *x,
                        const struct axis *y) {
    enum { MOST_POINTS = 1200 };
    int stride = s->n / MOST_POINTS + 1;
    bool pen = false;
    html_put(h, "<path class=\"line s%d%s\" d=\"", s->colour % 6, s->faint ? " faint" : "");
    for (int i = 0; i < s->n; i += stride) {
        if (!isfinite(s->y[i]) || !isfinite(s->x[i]) || (y->log && s->y[i] <= 0)) {
            pen = false;
            continue;
        }
        html_put(h, "%c%.1f %.1f", pen ? 'L' : 'M', place(x, s->x[i]), place(y, s->y[i]));
        pen = true;
    }
    html_put(h, "\"/>");
}

static double legend_lines(struct html *h, const struct series *series, int n, double top) {
    double x = 56, y = top;
    int shown = 0;
    for (int i = 0; i < n; i++)
        shown += !series[i].faint;
    for (int i = 0; i < n && shown > 1; i++) {
        if (series[i].faint) continue;
        double width = 30 + 7.2 * (double)strlen(series[i].name);
        if (x > 56 && x + width > PLOT_WIDTH) x = 56, y += 19;
        html_put(h, "<path class=\"line s%d\" d=\"M%.0f %.0fh18\"/>", series[i].colour % 6, x,
                 y - 4);
        label(h, x + 23, y, "start", "", series[i].name);
        x += width + 8;
    }
    return shown > 1 ? y + 14 : top - 12;
}

void plot_lines(struct html *h, const char *title, const char *note, const char *x_label,
                const char *y_label, const struct series *series, int n) {
    enum { HEIGHT = 220, LEFT = 64, RIGHT = 12 };
    struct axis x = {.low = NAN, .high = NAN, .at = LEFT, .length = PLOT_WIDTH - LEFT - RIGHT},
                y = {.low = NAN, .high = NAN};
    double ticks[MOST_TICKS];
    for (int i = 0; i < n; i++) {
        cover(&x, series[i].x, series[i].n);
        cover(&y, series[i].y, series[i].n);
    }
    if (!isfinite(x.low) || !isfinite(y.low)) return;
    y.log = !series[0].linear && y.low > 0 && y.high > 20 * y.low;
    widen(&y, 5);
    int rows = 1;
    double used = 56;
    for (int i = 0; i < n; i++) {
        double width = 30 + 7.2 * (double)strlen(series[i].name);
        if (series[i].faint) continue;
        if (used > 56 && used + width > PLOT_WIDTH) used = 56, rows++;
        used += width + 8;
    }
    int height = HEIGHT + 60 + rows * 19;
    open_figure(h, title, note, height);
    double top = legend_lines(h, series, n, 16);
    y.at = height - 48;
    y.length = top + 4 - y.at;
    int count = ticks_of(&y, 5, ticks);
    for (int i = 0; i < count; i++) {
        double at = place(&y, ticks[i]);
        html_put(h, "<path class=\"rule\" d=\"M%d %.1fH%d\"/>", LEFT, at, PLOT_WIDTH - RIGHT);
        label_number(h, LEFT - 7, at + 4, "end", ticks[i]);
    }
    count = ticks_of(&x, 5, ticks);
    for (int i = 0; i < count; i++) {
        double at = place(&x, ticks[i]);
        html_put(h, "<path class=\"axis\" d=\"M%.1f %.1fv5\"/>", at, y.at);
        label_number(h, at, y.at + 18, "middle", ticks[i]);
    }
    html_put(h, "<path class=\"axis\" d=\"M%d %.1fH%d\"/>", LEFT, y.at, PLOT_WIDTH - RIGHT);
    label(h, LEFT + x.length / 2, height - 8, "middle", "", x_label);
    upright(h, 13, y.at + y.length / 2, y_label);
    for (int i = 0; i < n; i++)
        draw_series(h, &series[i], &x, &y);
    close_figure(h);
}

/* ---- shades ---- */
int scale_shade(const struct scale *s, double x) {
    double low = s->low, high = s->high;
    if (!isfinite(x)) return -1;
    if (s->log) x = log10(x > low ? x : low), low = log10(low), high = log10(high);
    double share = high > low ? (x - low) / (high - low) : 0;
    share = share < 0 ? 0 : share > 1 ? 1 : share;
    return (int)lround(share * (SHADES - 1));
}

void scale_cover(struct scale *s, const double *values, int n) {
    struct axis a = {.low = isfinite(s->low) ? s->low : NAN,
                     .high = isfinite(s->high) ? s->high : NAN};
    cover(&a, values, n);
    s->low = a.low;
    s->high = a.high;
    s->log = a.low > 0 && a.high > 20 * a.low;
}

void plot_legend(struct html *h, const struct scale *s, double x, double y, double width) {
    double step = width / SHADES;
    for (int i = 0; i < SHADES; i++)
        html_put(h, "<rect class=\"v%d\" x=\"%.2f\" y=\"%.1f\" width=\"%.2f\" height=\"9\"/>", i,
                 x + i * step, y, step + 0.6);
    double middle = s->log ? sqrt(s->low * s->high) : (s->low + s->high) / 2;
    label_number(h, x, y + 22, "start", s->low);
    label_number(h, x + width / 2, y + 22, "middle", middle);
    label_number(h, x + width, y + 22, "end", s->high);
    if (s->unit) label(h, x + width + 10, y + 9, "start", "quiet small", s->unit);
}

static void cell_number(struct html *h, double x, double y, double value, int shade) {
    html_put(h,
             "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\" class=\"small %s\" "
             "style=\"font-size:10px\">%.*f</text>",
             x, y, shade < 15 ? "ink-on" : "ink-off",
             fabs(value) >= 10       ? 1
             : fabs(value) >= 0.0995 ? 2
                                     : 3,
             value);
}

void plot_grid(struct html *h, const char *title, const char *note, const double *values,
               int n_rows, int n_columns, const char *row_label, const char *column_label,
               const struct scale *scale) {
    enum { LEFT = 52, RIGHT = 10, TOP = 31 };
    double w = (PLOT_WIDTH - LEFT - RIGHT) / (double)n_columns, tall = n_rows > 16 ? 14 : 22;
    if (w > 46) w = 46;
    if (n_rows > 48) tall = 672.0 / n_rows;
    double bottom = TOP + n_rows * tall;
    bool numbers = w >= 28 && tall >= 14;
    open_figure(h, title, note, (int)bottom + 52);
    int every = (int)ceil(17 / w), every_row = (int)ceil(13 / tall);
    label(h, LEFT + n_columns * w / 2, 12, "middle", "", column_label);
    for (int c = 0; c < n_columns; c += every)
        html_put(h,
                 "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\" class=\"quiet small\">%d</text>",
                 LEFT + (c + 0.5) * w, TOP - 3, c);
    upright(h, 12, TOP + n_rows * tall / 2, row_label);
    for (int r = 0; r < n_rows; r++) {
        if (r % every_row == 0)
            html_put(
                h, "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\" class=\"quiet small\">%d</text>",
                LEFT - 6, TOP + (r + 0.5) * tall + 4, r);
        for (int c = 0; c < n_columns; c++) {
            double x = LEFT + c * w, y = TOP + r * tall,
                   value = values[(size_t)r * (size_t)n_columns + (size_t)c];
            int shade = scale_shade(scale, value);
            html_put(h,
                     "<rect class=\"%c%d\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" "
                     "height=\"%.1f\"><title>layer %d head %d: ",
                     shade < 0 ? 'x' : 'v', shade < 0 ? 0 : shade, x, y, w - 1, tall - 1, r, c);
            html_number(h, value);
            html_put(h, "</title></rect>");
            if (numbers && shade >= 0)
                cell_number(h, x + w / 2 - 0.5, y + tall / 2 + 3.2, value, shade);
        }
    }
    plot_legend(h, scale, LEFT, bottom + 14, PLOT_WIDTH - LEFT - RIGHT - 90);
    close_figure(h);
}

/* ---- shares ---- */
void plot_shares(struct html *h, const char *title, const char *note, const char *x_label,
                 const char *const panels[2], const double *const shares[2], int n_bars,
                 const char *const *parts, int n_parts) {
    enum { LEFT = 52, RIGHT = 10, PANEL = 118, GAP = 26, TOP = 50 };
    static const int colours[] = {5, 0, 3, 2, 1, 4};
    double w = (PLOT_WIDTH - LEFT - RIGHT) / (double)n_bars;
    int bottom = TOP + 2 * PANEL + GAP;
    open_figure(h, title, note, bottom + 44);
    double at = LEFT;
    for (int p = 0; p < n_parts; p++) {
        html_put(h, "<rect class=\"f%d\" x=\"%.1f\" y=\"6\" width=\"12\" height=\"12\"/>",
                 colours[p % 6], at);
        label(h, at + 17, 16, "start", "", parts[p]);
        at += 34 + 7.2 * (double)strlen(parts[p]);
    }
    for (int panel = 0; panel < 2; panel++) {
        double top = TOP + panel * (PANEL + GAP);
        label(h, LEFT, top - 6, "start", "quiet", panels[panel]);
        for (int k = 0; k <= 2; k++) {
            html_put(h, "<path class=\"rule\" d=\"M%d %.1fH%d\"/>", LEFT, top + k * PANEL / 2.0,
                     PLOT_WIDTH - RIGHT);
            html_put(
                h,
                "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\" class=\"quiet small\">%d %%</text>",
                LEFT - 6, top + k * PANEL / 2.0 + 4, 100 - 50 * k);
        }
        for (int b = 0; b < n_bars; b++) {
            double y = top + PANEL;
            for (int p = 0; p < n_parts; p++) {
                double share = shares[panel][(size_t)b * (size_t)n_parts + (size_t)p];
                if (!isfinite(share) || share <= 0) continue;
                if (share > 1) share = 1;
                y -= share * PANEL;
                html_put(h,
                         "<rect class=\"f%d\" x=\"%.1f\" y=\"%.2f\" width=\"%.1f\" "
                         "height=\"%.2f\"><title>%s, layer %d, ",
                         colours[p % 6], LEFT + b * w + 0.5, y, w > 3 ? w - 1 : w, share * PANEL,
                         panels[panel], b);
                html_text(h, parts[p]);
                html_put(h, ": %.1f %%</title></rect>", 100 * share);
            }
        }
    }
    int every = (int)ceil(17 / w);
    for (int b = 0; b < n_bars; b += every)
        html_put(h,
                 "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\" class=\"quiet small\">%d</text>",
                 LEFT + (b + 0.5) * w, bottom + 15, b);
    label(h, LEFT + n_bars * w / 2, bottom + 36, "middle", "", x_label);
    close_figure(h);
}

/* ---- pictures ---- */

/* One path for each shade, of runs of cells: "M x y h length" in a stroke one cell high. */
static void draw_picture(struct html *h, const char *const *rows, int n, double x, double y,
                         double cell) {
    html_put(h, "<g transform=\"translate(%.1f %.1f) scale(%.4f)\" stroke-width=\"1.04\">", x, y,
             cell);
    for (int shade = 0; shade < SHADES; shade++) {
        bool open = false;
        for (int r = 0; r < n; r++) {
            const char *row = rows[r];
            for (int c = 0, end; row && row[c] && c < n; c = end) {
                for (end = c + 1; end < n && row[end] == row[c];)
                    end++;
                if (row[c] - 'A' != shade) continue;
                if (!open) html_put(h, "<path class=\"w%d\" d=\"", shade);
                open = true;
                html_put(h, "M%d %.1fh%d", c, r + 0.5, end - c);
            }
        }
        if (open) html_put(h, "\"/>");
    }
    html_put(h, "</g>");
}

void plot_pictures(struct html *h, const char *title, const char *note, const char *const panels[2],
                   const char *const *const rows[2], int n, double n_tokens) {
    enum { LEFT = 46, GAP = 14, RIGHT = 6, TOP = 22 };
    double side = (PLOT_WIDTH - LEFT - GAP - RIGHT) / 2.0;
    open_figure(h, title, note, (int)(TOP + side) + 74);
    for (int panel = 0; panel < 2; panel++) {
        double x = LEFT + panel * (side + GAP);
        label(h, x + side / 2, 14, "middle", "", panels[panel]);
        draw_picture(h, rows[panel], n, x, TOP, side / n);
        html_put(h, "<path class=\"axis\" d=\"M%.1f %dv%.1fh%.1f\"/>", x, TOP, side, side);
        for (int k = 0; k <= 2; k++)
            label_number(h, x + k * side / 2, TOP + side + 15,
                         k == 0   ? "start"
                         : k == 1 ? "middle"
                                  : "end",
                         k * n_tokens / 2);
        if (panel) continue;
        for (int k = 0; k <= 2; k++)
            label_number(h, x - 5,
                         TOP + k * side / 2 +
                             (k == 0   ? 9
                              : k == 1 ? 4
                                       : 0),
                         "end", k * n_tokens / 2);
    }
    label(h, LEFT + side + GAP / 2.0, TOP + side + 30, "middle", "", "key token");
    upright(h, 11, TOP + side / 2, "query token");
    struct scale scale = {1e-4, 1, true, "weight of 1/96 of the keys"};
    plot_legend(h, &scale, LEFT, TOP + side + 42, 200);
    close_figure(h);
}
