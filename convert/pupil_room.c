/* pupil_room.c - memory, taken once; the engine's attention over it; where low-rank parts lie. */
#include "convert/pupil_internal.h"

#include "compute/memory.h"

#include <stdlib.h>
#include <string.h>

/* ---- low-rank parts ---- */
struct low_rank_part low_rank_part(const struct base_config *c, int rank,
                                   enum low_rank_target target) {
    int E = c->hidden_dim, q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    const struct low_rank_part parts[] = {
        {0, 0, E, q, 0}, {0, 0, E, kv, q}, {0, 0, E, kv, q + kv}, {0, 0, q, E, 0}};
    struct low_rank_part p = parts[target];
    for (int t = 0; t < (int)target; t++)
        p.a += (size_t)rank * (size_t)(parts[t].n_in + parts[t].n_out);
    p.b = p.a + (size_t)rank * (size_t)p.n_in;
    return p;
}
size_t low_rank_floats(const struct base_config *c, int rank) {
    struct low_rank_part last = low_rank_part(c, rank, LOW_RANK_O);
    return last.b + (size_t)rank * (size_t)last.n_out;
}

/* ---- room ---- */
struct carve { /* lays arrays into a block; at NULL only counts */
    char *at;
    size_t n;
};
static void *cut(struct carve *c, size_t bytes) {
    void *here = c->at ? c->at + c->n : NULL;
    c->n += (bytes + 63) / 64 * 64;
    return here;
}

static size_t lay_out(struct pupil *p, const struct base_config *c,
                      const struct attention_config *a, int max_tokens, int max_rank, void *block) {
    struct carve at = {block, 0};
    size_t T = (size_t)max_tokens, D = (size_t)c->head_dim, H = (size_t)c->n_heads,
           rank = (size_t)max_rank;
    p->E = (size_t)c->hidden_dim;
    p->q = H * D;
    p->kv = (size_t)c->n_kv_heads * D;
    p->qkv = p->q + 2 * p->kv;
    p->ffn = (size_t)c->ffn_dim;
    p->gate_up = c->architecture == BASE_LLAMA ? 2 * p->ffn : p->ffn;
    p->vocab = (size_t)c->vocab_size;
    p->map_floats = D * (size_t)a->features;
    p->layer_params = student_params(a);
    size_t ffn_rows = T < FFN_ROWS ? T : FFN_ROWS, head_rows = T < HEAD_ROWS ? T : HEAD_ROWS;
    const struct {
        float **to;
        size_t n;
    } arrays[] = {{&p->cosines, T * D / 2},
                  {&p->sines, T * D / 2},
                  {&p->far_cosines, D / 2},
                  {&p->far_sines, D / 2},
                  {&p->xs, ((size_t)c->n_layers + 1) * T * p->E},
                  {&p->x_base, T * p->E},
                  {&p->normed, T * p->E},
                  {&p->middle, T * p->E},
                  {&p->dx, T * p->E},
                  {&p->dn, T * p->E},
                  {&p->qkvs, T * p->qkv},
                  {&p->dqkvs, T * p->qkv},
                  {&p->y, T * p->q},
                  {&p->dy, T * p->q},
                  {&p->dk, H * T * D},
                  {&p->dv, H * T * D},
                  {&p->dmap_k, H * p->map_floats},
                  {&p->dmix, H},
                  {&p->up, ffn_rows * p->gate_up},
                  {&p->dup, ffn_rows * p->gate_up},
                  {&p->act, ffn_rows * p->ffn},
                  {&p->dact, ffn_rows * p->ffn},
                  {&p->z, head_rows * p->vocab},
                  {&p->z_base, head_rows * p->vocab},
                  {&p->mean, T},
                  {&p->r, T},
                  {&p->merged_qkv, rank ? p->qkv * p->E : 0},
                  {&p->merged_o, rank ? p->E * p->q : 0},
                  {&p->scaled_b, rank * (p->qkv > p->E ? p->qkv : p->E)},
                  {&p->low, T * rank}};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        *arrays[i].to = cut(&at, arrays[i].n * sizeof(float));
    p->losses = cut(&at, HEAD_ROWS * sizeof(double));
    p->sets = cut(&at, (size_t)c->n_kv_heads * T * (size_t)attention_cache_most(a) *
                           sizeof(int64_t)); /* blocks are no more than tokens */
    return at.n;
}

/* About: keys turned or not, and values, of a softmax layer or of one whose heads have the most places. */
static size_t slot_bytes(const struct base_config *c, const struct attention_config *a,
                         int max_tokens) {
    int entries = a->sinks + attention_cache_most(a) + 2 * a->window_size;
    return 3 * sizeof(float) * (size_t)(c->n_kv_heads * c->head_dim) *
           (size_t)(entries > max_tokens ? entries : max_tokens);
}

/* All keys of a sequence are in the window, and the one feature of a map never counts. */
static struct attention_config all_exact(const struct base_config *c, int max_tokens) {
    return (struct attention_config){.kind = ATTENTION_HEDGEHOG,
                                     .n_heads = c->n_heads,
                                     .n_kv_heads = c->n_kv_heads,
                                     .head_dim = c->head_dim,
                                     .map = MAP_EXP,
                                     .features = 1,
                                     .window = WINDOW_SLIDING,
                                     .window_size = max_tokens,
                                     .mixing = MIXING_UNIFIED};
}

size_t pupil_bytes(const struct base_config *c, const struct attention_config *a, bool any_softmax,
                   int n_threads, int max_tokens, int max_rank) {
    struct pupil p;
    struct attention_config exact = all_exact(c, max_tokens);
    size_t of_thread = attention_back_scratch_bytes(a, max_tokens);
    if (any_softmax) of_thread += attention_back_scratch_bytes(&exact, max_tokens);
    return lay_out(&p, c, a, max_tokens, max_rank, NULL) + 2 * gemm_scratch_bytes(n_threads) +
           (size_t)n_threads * of_thread + slot_bytes(c, a, max_tokens);
}

enum err pupil_attention(struct attention **out, const struct pupil *p,
                         const struct pupil_weights *w, int layer) {
    struct attention_weights maps = {0};
    if (pupil_is_softmax(p, w, layer))
        return attention_new(out, &p->softmax, &maps, 1, p->rope, p->team, STEP_ROWS, 1);
    const float *params = w->maps + (size_t)layer * p->layer_params;
    maps.map_q = params;
    maps.map_k = params + student_map_k(&p->attention);
    maps.mix = params + student_mix(&p->attention);
    if (p->retrieval) maps.retrieval = p->retrieval + (size_t)layer * (size_t)p->config.n_kv_heads;
    int rows = p->attention.window == WINDOW_TERRACED ? p->attention.window_size : STEP_ROWS;
    return attention_new(out, &p->attention, &maps, 1, p->rope, p->team, rows, 1);
}

/* A slot that fits either kind of attention, in any layer.  Before `kept` is set: w means Hedgehog's. */
static bool take_slot(struct pupil *p) {
    size_t layers = (size_t)p->config.n_layers;
    float *maps = calloc(layers * p->layer_params, sizeof *maps); /* any will do */
    struct pupil_weights w = {.maps = maps};
    bool all = maps;
    for (int i = -1; all && i < (int)layers; i++) {
        struct attention *a;
        all = pupil_attention(&a, p, i < 0 ? NULL : &w, i < 0 ? 0 : i) == OK;
        if (!all) break;
        if (attention_slot_bytes(a) > p->slot_bytes) p->slot_bytes = attention_slot_bytes(a);
        attention_free(a);
    }
    free(maps);
    if (all) p->slot = memory_map(p->slot_bytes);
    return p->slot;
}

enum err pupil_new(struct pupil **out, const struct pupil_options *o) {
    struct pupil *p = calloc(1, sizeof *p);
    if (!p) return ERR_NOMEM;
    const struct base_config *c = &o->base->config;
    p->base = o->base;
    p->config = *c;
    p->attention = *o->attention;
    p->attention.kv_type = KV_FP32;
    p->softmax = (struct attention_config){.kind = ATTENTION_SOFTMAX,
                                           .n_heads = c->n_heads,
                                           .n_kv_heads = c->n_kv_heads,
                                           .head_dim = c->head_dim,
                                           .kv_type = KV_FP32,
                                           .max_seq_len = o->max_tokens};
    p->all_exact = all_exact(c, o->max_tokens);
    p->rope = o->rope;
    p->team = o->team;
    p->rows = backward_kernels();
    p->max_tokens = o->max_tokens;
    p->max_rank = o->max_rank;
    p->bytes = lay_out(p, c, &p->attention, o->max_tokens, o->max_rank, NULL);
    p->block = memory_map(p->bytes);
    if (p->block) lay_out(p, c, &p->attention, o->max_tokens, o->max_rank, p->block);
    p->back = calloc((size_t)team_size(o->team), sizeof(struct attention_back_scratch *));
    bool all = p->block && p->back && gemm_scratch_new(&p->gemm, o->team, o->bf16) == OK &&
               gemm_scratch_new(&p->exact, o->team, false) == OK;
    p->retrieval = o->retrieval;
    if (all) all = take_slot(p);
    p->kept = o->softmax;
    if (p->kept) {
        p->back_exact = calloc((size_t)team_size(o->team), sizeof(struct attention_back_scratch *));
        p->no_maps = calloc(student_params(&p->all_exact), sizeof *p->no_maps);
        all = p->back_exact && p->no_maps && all;
    }
    for (int i = 0; all && i < team_size(o->team); i++) {
        all = attention_back_scratch_new(&p->back[i], &p->attention, o->max_tokens) == OK;
        if (all && p->kept)
            all = attention_back_scratch_new(&p->back_exact[i], &p->all_exact, o->max_tokens) == OK;
    }
    if (!all) {
        pupil_free(p);
        return ERR_NOMEM;
    }
    size_t half = (size_t)c->head_dim / 2;
    for (size_t n = 0; p->rope && n < (size_t)o->max_tokens; n++)
        rope_angles(p->rope, (int64_t)n, p->cosines + n * half, p->sines + n * half);
    if (p->rope) rope_angles(p->rope, p->attention.max_distance, p->far_cosines, p->far_sines);
    *out = p;
    return OK;
}

void pupil_free(struct pupil *p) {
    if (!p) return;
    for (int i = 0; p->back && i < team_size(p->team); i++)
        attention_back_scratch_free(p->back[i]);
    for (int i = 0; p->back_exact && i < team_size(p->team); i++)
        attention_back_scratch_free(p->back_exact[i]);
    free(p->back);
    free(p->back_exact);
    free(p->no_maps);
    gemm_scratch_free(p->gemm);
    gemm_scratch_free(p->exact);
    memory_unmap(p->slot, p->slot_bytes);
    memory_unmap(p->block, p->bytes);
    free(p);
}
