/* routes.h - which path and method does what. */
#ifndef URCHIN_SERVER_ROUTES_H
#define URCHIN_SERVER_ROUTES_H

#include "server/exchange.h"

struct route {
    const char *method, *path; /* a path that ends in '*' stands for all that begin so */
    const char *label;         /* in metrics */
    bool open;                 /* no API key asked */
    bool needs_model;          /* 503 while loading */
    bool generates;            /* 503 while draining */
    enum MHD_Result (*handle)(struct exchange *x); /* the body is in x->body; POST: on the server's
                                                      thread or the reader's */
};

extern const struct route routes[];
extern const int n_routes;

/* The route, or NULL with *allow the methods the path knows ("" when it is unknown). */
const struct route *route_find(const char *method, const char *path, char *allow, size_t allow_len);

#endif
