/* rope.h - rotary position embedding, half-split order: element i pairs with i + D/2.  (Su et al. 2021, arXiv:2104.09864)
 *
 *   x_i' = x_i cos(n theta_i) - x_{i+D/2} sin(n theta_i)     x_{i+D/2}' = x_{i+D/2} cos(n theta_i) + x_i sin(n theta_i)
 *
 * theta_i = base^(-2i/D), scaled as the checkpoint says.  Frequencies and angles are double: at position 10^6 fp32 angles are 0.03 rad off. */
#ifndef URCHIN_ATTENTION_ROPE_H
#define URCHIN_ATTENTION_ROPE_H

#include "config/err.h"
#include <stddef.h>
#include <stdint.h>

enum rope_scaling { ROPE_SCALING_NONE, ROPE_SCALING_LINEAR, ROPE_SCALING_LLAMA3 };

struct rope_config {
    int head_dim; /* even */
    double base;
    enum rope_scaling scaling;
    double factor;                                     /* linear, llama3 */
    double low_freq_factor, high_freq_factor;          /* llama3 */
    double original_context;                           /* llama3 */
    const float *freq_factors; /* [head_dim / 2] divisors of theta_i (GGUF rope_freqs.weight) or NULL; borrowed for the call */
};

struct rope;
enum err rope_new(struct rope **out, const struct rope_config *config, char *msg, size_t msg_len);
void rope_free(struct rope *rope);
void rope_angles(const struct rope *rope, int64_t position, float *cosines, float *sines); /* [head_dim / 2] each */
const double *rope_frequencies(const struct rope *rope); /* theta [head_dim / 2], lives as long as rope */

/* y may be x.  Here, not in rope.c, so that each instruction family compiles its own. */
static inline void rope_rotate(float *y, const float *x, const float *cosines, const float *sines,
                               int head_dim) {
    int half = head_dim / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        y[i] = a * cosines[i] - b * sines[i];
        y[i + half] = b * cosines[i] + a * sines[i];
    }
}

#endif
