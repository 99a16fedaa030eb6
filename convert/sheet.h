/* sheet.h - the report of a conversion as one self-contained HTML page: no scripts, no other files, figures as inline SVG,
 * light and dark as the reader prefers.
 *
 * It is made from one JSON document alone, so the two say the same:
 *
 *   model        urchin.json
 *   conversion   conversion.json (docs/convert.md), where there is one
 *   quality      what `urchin eval --json` prints, where something was measured
 *
 * Nothing in the document is believed: what is missing or of another type is left out, and text is escaped. */
#ifndef URCHIN_CONVERT_SHEET_H
#define URCHIN_CONVERT_SHEET_H

#include "config/err.h"
#include <cjson/cJSON.h>

/* The page's text, owned by the caller: free().  NULL: out of memory. */
char *sheet_html(const cJSON *document);

/* The document of a model: urchin.json and conversion.json of its folder, as far as they are there, and quality (copied;
 * may be NULL).  NULL: out of memory. */
cJSON *sheet_document(const char *folder, const cJSON *quality);

/* May what was measured be written there?  path ends in .html, its folder can be written, and where
 * the JSON would lie is nothing but an earlier report. */
enum err sheet_check(const char *path, char *msg, size_t msg_len);

/* Both forms: path and the same with .json, each whole or not at all; but not over conversion.json,
 * which the record of a conversion is written to otherwise.  With quality: sheet_check() first. */
enum err sheet_write(const char *path, const cJSON *document, char *msg, size_t msg_len);

#endif
