/* page.h - the small page at /: a chat box that streams, and the model's facts.  Its source is
 * page.html. */
#ifndef URCHIN_SERVER_PAGE_H
#define URCHIN_SERVER_PAGE_H

extern const char page_html[], page_html_end[];

#endif
