/* attentions.h - the attention of a model's layers: all of one kind, or Hedgehog's in some and
 * softmax with its growing cache in the others.
 *
 * The functions are those of attention.h, with a model's layer numbers.  Where both kinds are, a
 * slot is Hedgehog's block and behind it softmax's, each with the position in its header, and a
 * saved state is the two states one after the other: the first is the same size at every position.
 * Which layers are softmax is no part of a state. */
#ifndef URCHIN_MODEL_ATTENTIONS_H
#define URCHIN_MODEL_ATTENTIONS_H

#include "attention/attention.h"

struct attentions;

/* config->kind is that of the layers that softmax (NULL: none) does not name; softmax layers have
 * max_seq_len rows.  weights [n_layers], looked at where the layer is Hedgehog's.  The rest as
 * attention_new. */
enum err attentions_new(struct attentions **out, const struct attention_config *config,
                        const bool *softmax, int64_t max_seq_len,
                        const struct attention_weights *weights, int n_layers,
                        const struct rope *rope, struct team *team, int max_rows, int max_runs);
void attentions_free(struct attentions *a); /* NULL is fine */

/* Hedgehog's where there is any, else softmax's: its slots begin the model's. */
struct attention *attentions_first(struct attentions *a);

size_t attentions_slot_bytes(const struct attentions *a); /* whole cache lines */
void attentions_slot_clear(const struct attentions *a, void *slot);
void attentions_slot_copy(const struct attentions *a, void *dst, const void *src);
int64_t attentions_slot_position(const struct attentions *a, const void *slot);
size_t attentions_state_bytes(const struct attentions *a, int64_t position);
void attentions_state_save(const struct attentions *a, void *out, const void *slot);
enum err attentions_state_load(const struct attentions *a, void *slot, const void *state,
                               size_t bytes, char *msg, size_t msg_len);

void attentions_step_begin(struct attentions *a, const struct attention_run *runs, int n_runs);
void attentions_expect(struct attentions *a, int layer);
void attentions_layer(struct attentions *a, int layer, float *y, size_t y_stride, const float *q,
                      size_t q_stride, const float *k, size_t k_stride, const float *v,
                      size_t v_stride);
void attentions_step_end(struct attentions *a);

#endif
