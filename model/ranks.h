/* ranks.h - how the matrices of a model divide over cards, and what the cards tell each other.
 *
 * Heads are independent, so rank r of n holds key heads  [K r / n, K (r + 1) / n)  with their query heads: of qkv their rows,
 * of o their columns; and FFN dimensions  [32 (U r / n), 32 (U (r + 1) / n)),  U = ceil(ffn / 32), as a matrix of blocks divides
 * in units of its blocks: of gate and up their rows, of down their columns; and rows [V r / n, V (r + 1) / n) of the head.
 * Norms, positions and the embedding are whole on every rank.  A layer then has two sums over ranks, behind o and behind down,
 * whose biases rank 0 alone adds, and a step one gathering, of logits.
 *
 * One rank of one is all there is: its parts are whole and its sums its own.  More ranks want, besides a library of collectives,
 * the heads of attention divided (struct attention takes its maps and counts) and one process or thread a card. */
#ifndef URCHIN_MODEL_RANKS_H
#define URCHIN_MODEL_RANKS_H

#include "compute/gpu_matrix.h"
#include "model/base.h"

/* One for each card, handed to whatever uploads or adds. */
struct communicator {
    int rank, n_ranks;
};

enum ranks_matrix { RANKS_QKV, RANKS_O, RANKS_GATE_UP, RANKS_DOWN, RANKS_HEAD, RANKS_WHOLE };

/* The rank's part of a matrix [n_out, n_in] (weights.h says how their rows lie).  ERR_ARG: a rank would have no key head, no FFN
 * dimension or no row of the head. */
enum err ranks_part(struct gpu_matrix_part *out, const struct communicator *c, const struct base_config *config,
                    enum ranks_matrix which, int n_out, int n_in);

/* x [n] fp32 on the device becomes its sum over ranks, in their order: a row's bits depend on nothing else. */
void ranks_sum(const struct communicator *c, struct gpu *g, float *x, size_t n);

/* Each rank has written its columns of y [n_rows][n_out]; all get all. */
void ranks_gather(const struct communicator *c, struct gpu *g, float *y, int n_rows, int n_out);

#endif
