/* answer.c - what a row sees of its sequence's memory, handed to the kernel that answers it. */
#include "attention/internal.h"

#include <string.h>

int answer_spans(const struct attention *a, const struct memory *m, int64_t position,
                 struct span spans[MAX_SPANS], int *growing) {
    const struct attention_config *c = &a->config;
    const struct layout *l = &a->layout;
    int n = 0, ring = l->sinks + m->room->cache, w = c->window_size;
    *growing = -1;
    if (!l->ring || position < 0) return 0;
    if (c->kind == ATTENTION_SOFTMAX) {
        *growing = 0;
        spans[0] = (struct span){0, (int)position + 1};
        return 1;
    }
    if (c->window == WINDOW_SLIDING) {
        int64_t left = position + 1 - w; /* keys that have left the window */
        int sinks = left < 0 ? 0 : left < l->sinks ? (int)left : l->sinks;
        if (sinks) spans[n++] = (struct span){0, sinks};
        *growing = n;
        spans[n++] = (struct span){ring, position + 1 < w ? (int)position + 1 : w};
        return n;
    }
    if (c->window == WINDOW_NONE) return 0;
    int64_t block = position / w;
    int half = (int)(block % 2), cached = memory_cached(m);
    if (block >= 2 && l->sinks) spans[n++] = (struct span){0, l->sinks};
    if (cached) spans[n++] = (struct span){l->sinks, cached};
    for (int h = 0; h < 2; h++) {
        if (h == half) *growing = n;
        if (h == half)
            spans[n++] = (struct span){ring + h * w, (int)(position % w) + 1};
        else if (block >= 1)
            spans[n++] = (struct span){ring + h * w, w};
    }
    return n;
}

/* Sinks and cache ascend in position, so the clamped ones come first. */
static int clamped_entries(const struct attention *a, const struct memory *m,
                           const struct span *spans, int n_spans, int64_t position) {
    int n = 0, most = a->layout.sinks + m->room->cache;
    for (int k = 0; a->config.max_distance && k < n_spans; k++)
        for (int e = spans[k].first; e < most && e < spans[k].first + spans[k].count; e++) {
            if (!memory_clamped(a, memory_entry_position(a, m, e, position), position)) return n;
            n = e + 1;
        }
    return n;
}

void answer_part(const struct layer_job *job, const struct segment *segment, int kv_head, int part,
                 const struct ahead *ahead, struct scratch *tmp) {
    const struct attention *a = job->a;
    const struct attention_weights *w = &a->weights[job->layer];
    int heads_parts = (a->group + segment->part_heads - 1) / segment->part_heads;
    int g = part % heads_parts * segment->part_heads, r = part / heads_parts * segment->part_rows;
    int n_heads = a->group - g < segment->part_heads ? a->group - g : segment->part_heads;
    int n_rows =
        segment->n_rows - r < segment->part_rows ? segment->n_rows - r : segment->part_rows;
    struct memory m = memory_of(a, a->runs[segment->run].slot, job->layer, kv_head);
    int64_t position = segment->position + r;
    size_t row = (size_t)segment->first_row + r, head = (size_t)kv_head * a->group + g,
           D = a->shape.head_dim;

    struct question ask = {
        .n_rows = n_rows,
        .n_heads = n_heads,
        .q = job->q + row * job->q_row + head * D,
        .q_row = job->q_row,
        .cosines = a->rope ? a->cosines + row * (D / 2) : NULL,
        .sines = a->rope ? a->sines + row * (D / 2) : NULL,
        .far_cosines = a->far_cosines,
        .far_sines = a->far_sines,
        .keys = m.turned,
        .values = m.values,
        .linear = memory_folded(a, m.room, position) > 0,
        .linear_off = a->linear_off,
        .y = job->y + row * job->y_row + head * D,
        .y_row = job->y_row,
        .ahead = *ahead,
    };
    ask.n_spans = answer_spans(a, &m, position, ask.spans, &ask.growing);
    ask.n_clamped = clamped_entries(a, &m, ask.spans, ask.n_spans, position);
    if (w->mix) ask.mix = w->mix + head;
    if (ask.linear) {
        size_t state = a->state_heads > 1 ? (size_t)g : 0;
        ask.S = m.state + state * a->layout.state_floats;
        ask.z = ask.S + a->layout.S_floats;
        ask.state_stride = a->state_heads > 1 ? a->layout.state_floats : 0;
        ask.map = w->map_q + head * D * a->shape.f_lanes;
        ask.bias = w->map_q_bias ? w->map_q_bias + head * a->shape.f_lanes : NULL;
    }
    a->kernels->answer(&a->shape, &ask, &tmp->answer);
}
