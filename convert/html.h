/* html.h - a page in memory, written piece by piece; what comes from outside goes through html_text. */
#ifndef URCHIN_CONVERT_HTML_H
#define URCHIN_CONVERT_HTML_H

#include <stdbool.h>
#include <stddef.h>

struct html { /* starts as zeros; text is owned: free() it */
    char *text;
    size_t len, room;
    bool failed; /* out of memory: nothing is added any more */
};

/* Markup of our own, with numbers and our own words in it. */
__attribute__((format(printf, 2, 3))) void html_put(struct html *h, const char *format, ...);

/* Foreign text: & < > " ' are escaped, control characters left out.  NULL writes nothing. */
void html_text(struct html *h, const char *text);

/* A number as people read it: four digits, thousands apart ("12,345", "0.0716", "3.2e-05"); a dash where it is none. */
void html_number(struct html *h, double x);

#endif
