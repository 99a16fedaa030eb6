/* kernels.h - the arithmetic of training feature maps: one table of functions per instruction
 * family, all from kernels.c.  Dense products are attention_kernels.product.
 *
 * Features lie in two halves of f_lanes (f rounded up to 16) floats, [plus | minus]; pad lanes are
 * 0. */
#ifndef URCHIN_CONVERT_KERNELS_H
#define URCHIN_CONVERT_KERNELS_H

#include "attention/attention.h"

/* One query row beside its teacher.  Keys of its document are 0 .. n_keys - 1, its own the last; 0
 * .. sinks - 1 and from .. n_keys - 1 are exact, sinks .. from - 1 linear.
 *
 *   p_j = exp(l_j) / Z                                      the teacher's weights
 *   log w_j = l_j + alpha          (exact)                  unified: 0;  lolcats: log
 * sigmoid(omega)
 *                                                           - the largest exact l_j
 *   log w_j = delta + log s_j      (linear)                 s_j = phi_q . phi_k(j), phi_q shifted
 *   a_j = w_j / sum w                                       the pupil's
 *   KL = sum_j p_j (log p_j - log a_j)
 */
struct row_weights {
    float *p;                 /* in: q . k_j, of any scale; out: p_j, 0 from n_keys to width */
    float *s;                 /* in: linear s_j; kept */
    float *a;                 /* out: a_j, 0 from n_keys to width */
    const float *sink_logits; /* [sinks] l_j as the pupil has it, or NULL: as the teacher */
    int n_keys, sinks, from, width;
    float scale;      /* l_j = scale * q . k_j */
    float mix, reach; /* c_h or omega_h; by how much phi_q was shifted: reach is in delta */
    enum mixing mixing;
    /* out */
    float kl, entropy;          /* nats; of the teacher's row */
    float teacher_linear;       /* sum of p over linear keys */
    float sink, window, linear; /* sums of a */
    float gap; /* log sum of exp(l_j) over linear keys - log sum of their w_j: 0 when both agree */
};

struct convert_kernels {
    /* Fills a row's weights from its scores. */
    void (*weigh)(struct row_weights *row);

    /* The derivatives of  ce KL + (e . y):  t_j = ce (a_j - p_j) + a_j (ev_j - ey)  by log w_j,
     * with e = dL/dy, ev_j = e . v_j (NULL: none) and ey = e . y.  s becomes t_j / s_j, 0 over
     * exact keys and up to width.  Returns dL/dmix. */
    float (*grade)(struct row_weights *row, float ce, const float *ev, float ey);

    /* phi of n rows u [n][f_lanes] -> phi [n][2 f_lanes].  reach [n] (queries; NULL: keys): what a
     * query's exponents were lowered by; a key's u is cut at +-30 instead. */
    void (*features)(enum feature_map map, float *phi, float *reach, const float *u, int n, int f,
                     int f_lanes);

    /* du [n][f_lanes] from dphi [n][2 f_lanes] = [g+, g-], with phi = [phi+, phi-]; du may be u:
     *   exp            du = phi+ g+ - phi- g-              (0 where a key's u was cut; a query's
     *                                                      reach leaves no trace in a ratio)
     *   softmax2       du = phi+ (g+ - phi+.g+) - phi- (g- - phi-.g-)
     *   joint_softmax  du = 2 (phi+ (g+ - phi.g) - phi- (g- - phi.g)) */
    void (*features_back)(enum feature_map map, float *du, const float *dphi, const float *phi,
                          const float *u, bool key, int n, int f_lanes);

    /* y [n_columns][y_row] = x [n_rows][x_row] transposed */
    void (*transpose)(float *y, size_t y_row, const float *x, size_t x_row, int n_rows,
                      int n_columns);

    /* AdamW without decay: m, v moments; the step is rate m^ / (sqrt v^ + 1e-8), with bias
     * corrections 1 / (1 - beta^t) given; g is first multiplied by clip. */
    void (*adam)(float *w, float *m, float *v, const float *g, size_t n, float clip, float rate,
                 float correct_m, float correct_v);
};

#define ADAM_BETA1 0.9f
#define ADAM_BETA2 0.99f

const struct convert_kernels *convert_kernels(void); /* the table of cpu_isa() */

extern const struct convert_kernels convert_kernels_generic;
#if defined(__x86_64__)
extern const struct convert_kernels convert_kernels_avx2, convert_kernels_avx512;
#endif

#endif
