/* rope.c - the frequencies of rotary position embedding and the angles of a position. */
#include "attention/rope.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

struct rope {
    int half;       /* head_dim / 2 */
    double theta[]; /* [half] radians per position */
};

/* Llama 3.1: long wavelengths are stretched by factor, short ones are left, and a ramp joins them
 * (as in Hugging Face transformers, modeling_rope_utils.py, _compute_llama3_parameters). */
static double llama3_theta(double theta, const struct rope_config *c) {
    double turns = c->original_context * theta / (2 * M_PI); /* within the original context */
    if (turns < c->low_freq_factor) return theta / c->factor;
    if (turns > c->high_freq_factor) return theta;
    double keep = (turns - c->low_freq_factor) / (c->high_freq_factor - c->low_freq_factor);
    return (1 - keep) * theta / c->factor + keep * theta;
}

static bool positive(double x) {
    return isfinite(x) && x > 0;
}

static enum err check(const struct rope_config *c, char *msg, size_t msg_len) {
    if (c->head_dim < 2 || c->head_dim % 2)
        return err_set(msg, msg_len, ERR_FORMAT, "RoPE needs an even head_dim, not %d",
                       c->head_dim);
    if (!positive(c->base))
        return err_set(msg, msg_len, ERR_FORMAT, "RoPE base must be positive, not %g", c->base);
    if (c->scaling != ROPE_SCALING_NONE && !positive(c->factor))
        return err_set(msg, msg_len, ERR_FORMAT, "RoPE scaling factor must be positive, not %g",
                       c->factor);
    if (c->scaling == ROPE_SCALING_LLAMA3 &&
        !(positive(c->low_freq_factor) && isfinite(c->high_freq_factor) &&
          c->high_freq_factor > c->low_freq_factor && positive(c->original_context)))
        return err_set(msg, msg_len, ERR_FORMAT,
                       "llama3 RoPE scaling needs 0 < low_freq_factor < high_freq_factor and a "
                       "positive original context, not %g, %g and %g",
                       c->low_freq_factor, c->high_freq_factor, c->original_context);
    for (int i = 0; c->freq_factors && i < c->head_dim / 2; i++)
        if (!positive(c->freq_factors[i]))
            return err_set(msg, msg_len, ERR_FORMAT,
                           "RoPE frequency factor %d must be positive, not %g", i,
                           c->freq_factors[i]);
    return OK;
}

enum err rope_new(struct rope **out, const struct rope_config *config, char *msg, size_t msg_len) {
    enum err e = check(config, msg, msg_len);
    if (e) return e;
    int half = config->head_dim / 2;
    struct rope *rope = malloc(sizeof *rope + (size_t)half * sizeof *rope->theta);
    if (!rope) return err_set(msg, msg_len, ERR_NOMEM, "no memory for RoPE frequencies");
    rope->half = half;
    for (int i = 0; i < half; i++) {
        double theta = pow(config->base, -(double)i / half);
        if (config->scaling == ROPE_SCALING_LINEAR) theta /= config->factor;
        if (config->scaling == ROPE_SCALING_LLAMA3) theta = llama3_theta(theta, config);
        if (config->freq_factors) theta /= config->freq_factors[i];
        rope->theta[i] = theta;
    }
    *out = rope;
    return OK;
}

void rope_free(struct rope *rope) {
    free(rope);
}

void rope_angles(const struct rope *rope, int64_t position, float *cosines, float *sines) {
    for (int i = 0; i < rope->half; i++) {
        double angle = (double)position * rope->theta[i];
        cosines[i] = (float)cos(angle);
        sines[i] = (float)sin(angle);
    }
}

const double *rope_frequencies(const struct rope *rope) {
    return rope->theta;
}
