/* rank.h - Spearman's rank correlation. */
#ifndef URCHIN_CONVERT_RANK_H
#define URCHIN_CONVERT_RANK_H

/* Of x and y [n], ties by their mean rank: -1 .. 1; 0 where either is constant.  room [4 n] doubles. */
double rank_correlation(const float *x, const float *y, int n, double *room);

#endif
