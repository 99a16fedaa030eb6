/* plot.h - figures as inline SVG: lines, grids of cells, stacked bars, and the weights of a head.
 *
 * A figure is 480 units wide and scales with its column.  Colours come from the page's style sheet (plot_style): series
 * are .s0 .. .s5 (Okabe and Ito's, which the colour-blind tell apart), shades are .v0 .. .v24 (viridis, even in lightness,
 * the same in light and dark). */
#ifndef URCHIN_CONVERT_PLOT_H
#define URCHIN_CONVERT_PLOT_H

#include "convert/html.h"

enum { SHADES = 25, MAX_SERIES = 8, PLOT_WIDTH = 480 };

void plot_style(struct html *h); /* the rules of all figures, for a <style> */

struct series {
    const char *name; /* foreign text is fine */
    const double *x, *y; /* [n]; NaN leaves a gap */
    int n;
    bool faint;  /* measured points behind a smooth line of the same colour: no entry in the legend */
    int colour;  /* 0 .. 5 */
    bool linear; /* no log scale, whatever it spans */
};
/* Lines over a common x; y on a log scale when it is positive and spans more than a factor of 20. */
void plot_lines(struct html *h, const char *title, const char *note, const char *x_label,
                const char *y_label, const struct series *series, int n);

struct scale { /* what a shade means */
    double low, high;
    bool log;
    const char *unit;
};
int scale_shade(const struct scale *s, double x); /* 0 .. SHADES - 1; -1: no number */
/* From values [n] that are numbers: the range of all, log where they are positive and span more than a factor of 20. */
void scale_cover(struct scale *s, const double *values, int n);

/* Cells [n_rows][n_columns], row 0 on top. */
void plot_grid(struct html *h, const char *title, const char *note, const double *values,
               int n_rows, int n_columns, const char *row_label, const char *column_label,
               const struct scale *scale);

/* Two panels of bars, each bar n_parts shares [n_bars][n_parts] that sum to about 1. */
void plot_shares(struct html *h, const char *title, const char *note, const char *x_label,
                 const char *const panels[2], const double *const shares[2], int n_bars,
                 const char *const *parts, int n_parts);

/* Two heads' weights side by side, rows of letters as picture.h has them (each at most n letters). */
void plot_pictures(struct html *h, const char *title, const char *note, const char *const panels[2],
                   const char *const *const rows[2], int n, double n_tokens);

/* A bar of the shades with its ends and middle. */
void plot_legend(struct html *h, const struct scale *scale, double x, double y, double width);

#endif
