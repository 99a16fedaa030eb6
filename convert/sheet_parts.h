/* sheet_parts.h - what the files of the page share: looking into a document that may hold anything, and its parts. */
#ifndef URCHIN_CONVERT_SHEET_PARTS_H
#define URCHIN_CONVERT_SHEET_PARTS_H

#include "convert/html.h"
#include <cjson/cJSON.h>

/* The item at a path of keys ("before.heads.kl"); NULL: none. */
const cJSON *sheet_at(const cJSON *o, const char *path);
double sheet_number(const cJSON *o, const char *path);      /* NaN: none */
const char *sheet_string(const cJSON *o, const char *path); /* NULL: none */

/* An array of numbers (null is NaN), at most SHEET_MOST; *n of them, owned by the caller.  NULL, *n 0: none. */
enum { SHEET_MOST = 1 << 20 };
double *sheet_array(const cJSON *o, const char *path, int *n);

/* An array of equally long arrays of numbers, [*n_rows][*n_columns], owned by the caller.  NULL: none. */
double *sheet_grid(const cJSON *o, const char *path, int *n_rows, int *n_columns);

void sheet_open_section(struct html *h, const char *title, const char *note); /* note may be NULL */
void sheet_close_section(struct html *h);

/* ---- parts: each writes nothing where its part of the document is missing ---- */
void sheet_curves(struct html *h, const cJSON *conversion);   /* sheet_curves.c */
void sheet_maps(struct html *h, const cJSON *conversion, const cJSON *quality); /* sheet_heads.c: heat maps and masses */
void sheet_pictures(struct html *h, const cJSON *heads);
void sheet_quality(struct html *h, const cJSON *quality);     /* sheet_quality.c */

#endif
