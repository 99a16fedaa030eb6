/* sheet_curves.c - how training went. */
#include "convert/plot.h"
#include "convert/sheet_parts.h"

#include <math.h>
#include <stdlib.h>

/* Means over up to `reach` neighbours on either side. */
static double *smooth(const double *x, int n, int reach) {
    double *out = malloc((size_t)n * sizeof *out);
    for (int i = 0; out && i < n; i++) {
        double sum = 0;
        int count = 0;
        for (int k = i - reach > 0 ? i - reach : 0; k <= i + reach && k < n; k++)
            if (isfinite(x[k])) sum += x[k], count++;
        out[i] = count ? sum / count : NAN;
    }
    return out;
}

static void curve(struct html *h, const cJSON *curves, const char *key, const char *title,
                  const char *note, const char *unit, bool raw) {
    int n;
    double *y = sheet_array(curves, key, &n);
    double *x = n ? malloc((size_t)n * sizeof *x) : NULL,
           *mean = n && raw ? smooth(y, n, n / 40 + 1) : NULL;
    bool any = false;
    for (int i = 0; x && i < n; i++) {
        x[i] = i + 1;
        any |= isfinite(y[i]);
    }
    if (any && n > 1 && (mean || !raw)) {
        struct series series[] = {
            {"a step", x, y, n, raw, 0, !raw},
            {"mean", x, mean, n, false, 0, !raw}}; /* rates fall to nothing: no log */
        plot_lines(h, title, note, "step", unit, series, raw ? 2 : 1);
    }
    free(x);
    free(y);
    free(mean);
}

void sheet_curves(struct html *h, const cJSON *conversion) {
    const cJSON *curves = sheet_at(conversion, "curve"),
                *later = sheet_at(conversion, "finetune.curve");
    if (!curves && !later) return;
    sheet_open_section(h, "Training", "A step is faint, the line is the mean of its neighbours.");
    html_put(h, "<div class=\"grid\">");
    curve(h, curves, "kl", "KL of attention rows to the base",
          "mean over layers, heads and all rows", "nats", true);
    curve(h, curves, "attention_error", "Error of attention outputs",
          "share of the output's energy", "share", true);
    curve(h, curves, "gradient_norm", "Gradient norm", "mean of layers, before clipping at 1",
          "norm", true);
    curve(h, curves, "lr", "Learning rate of maps", NULL, "rate", false);
    curve(h, later, "loss", "Fine-tuning: loss", NULL, "nats", true);
    curve(h, later, "gradient_norm", "Fine-tuning: gradient norm", "before clipping", "norm", true);
    curve(h, later, "lr", "Fine-tuning: learning rate", NULL, "rate", false);
    html_put(h, "</div>");
    sheet_close_section(h);
}
