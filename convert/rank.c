/* rank.c - Spearman's rank correlation. */
#include "convert/rank.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>

struct ranked {
    double x;
    int at;
};
static int by_value(const void *a, const void *b) {
    const struct ranked *p = a, *q = b;
    if (p->x != q->x) return p->x < q->x ? -1 : 1;
    return p->at - q->at;
}

/* rank[i] of x[i], ties by their mean, less the mean rank; pairs [n] */
static void rank_values(double *rank, const float *x, int n, struct ranked *pairs) {
    for (int i = 0; i < n; i++)
        pairs[i] = (struct ranked){x[i], i};
    qsort(pairs, (size_t)n, sizeof *pairs, by_value);
    for (int i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && pairs[end].x == pairs[i].x;)
            end++;
        for (int k = i; k < end; k++)
            rank[pairs[k].at] = (i + end - 1) / 2.0 - (n - 1) / 2.0;
    }
}

double rank_correlation(const float *x, const float *y, int n, double *room) {
    static_assert(sizeof(struct ranked) == 2 * sizeof(double), "pairs fit the room");
    double *rx = room, *ry = room + n, xx = 0, yy = 0, xy = 0;
    rank_values(rx, x, n, (struct ranked *)(room + 2 * n));
    rank_values(ry, y, n, (struct ranked *)(room + 2 * n));
    for (int i = 0; i < n; i++) {
        xx += rx[i] * rx[i];
        yy += ry[i] * ry[i];
        xy += rx[i] * ry[i];
    }
    return xx > 0 && yy > 0 ? xy / sqrt(xx * yy) : 0;
}
