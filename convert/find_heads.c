/* find_heads.c - the base reads recall texts, which show its retrieval heads. */
#include "convert/conversion.h"
#include "convert/gpu_lesson.h"
#include "convert/retrieval.h"

#include <stdio.h>
#include <stdlib.h>

/* A recall text that the base has read, on the host. */
static enum err look_at(struct conversion *c, struct retrieval *found, const struct pack *pack,
                        struct lesson lesson) {
    const struct recipe *r = &c->run.recipe;
    struct gpu_lesson *device = lesson.device;
    if (!device) return retrieval_add(found, &r->attention, &lesson, pack, c->team);
    size_t layers = (size_t)c->run.base->n_layers;
    float *kv = malloc(layers * (size_t)lesson.n_tokens * device->kv_floats * sizeof *kv),
          *q = malloc(layers * (size_t)lesson.n_rows * device->q_floats * sizeof *q);
    enum err e = kv && q ? gpu_lesson_download(device, kv, q) : ERR_NOMEM;
    lesson.kv = kv;
    lesson.q = q;
    if (!e) e = retrieval_add(found, &r->attention, &lesson, pack, c->team);
    free(kv);
    free(q);
    return e;
}

/* Half of the texts are long, for far is far. */
static enum err look_for_heads(struct conversion *c, struct retrieval *found) {
    enum { TEXTS = 16 };
    enum err e = OK;
    for (int i = 0; !e && i < TEXTS; i++) {
        struct pack pack;
        struct lesson lesson;
        double share;
        e = conversion_read(c, PACK_RETRIEVAL, i, c->run.recipe.long_every && i % 2, &pack, &lesson,
                            &share);
        if (e) return e;
        e = look_at(c, found, &pack, lesson);
        pack_free(&pack);
        if (e) conversion_learned(c, e);
    }
    return e;
}

static enum err find_heads(struct conversion *c) {
    struct recipe *r = &c->run.recipe;
    struct retrieval found = {0};
    int n_layers = c->run.base->n_layers;
    bool *flags = calloc((size_t)n_layers * (size_t)r->attention.n_kv_heads, sizeof *flags);
    enum err e = flags ? retrieval_begin(&found, &r->attention, n_layers) : ERR_NOMEM;
    if (e) FAIL(c, e, "out of memory");
    if (!e) e = look_for_heads(c, &found);
    if (!e) {
        double least;
        int n = retrieval_choose(&found, &r->attention, r->softmax_layers, r->n_softmax_layers,
                                 r->n_retrieval, flags, &least);
        if (n)
            fprintf(stderr, "retrieval heads: %d of %d, mass on what they look up %.2f or more\n",
                    n, n_layers * r->attention.n_kv_heads, least);
        else
            fprintf(stderr, "retrieval heads: none, no head of the base looks facts up\n");
        recipe_take_retrieval(r, flags, n_layers);
        c->run.heads_found = true;
    }
    retrieval_end(&found);
    free(flags);
    return e;
}

enum err conversion_find_heads(struct conversion *c) {
    struct recipe *r = &c->run.recipe;
    if (r->n_retrieval == r->n_retrieval_heads) return OK; /* known, or none wanted */
    enum err e = c->run.heads_found ? OK : find_heads(c);
    if (e) return e;
    r->n_retrieval = r->n_retrieval_heads;
    if (r->n_retrieval) return OK;
    r->attention.retrieval_size = r->attention.retrieval_recent = 0;
    recipe_without_retrieval(r, c->settings);
    return OK;
}
