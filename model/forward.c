/* forward.c - one step of the model over a ragged batch.
 *
 *   x = embedding (+ position)
 *   per layer:  x += W_o attention(W_qkv norm(x));   x += W_down act(W_gate norm(x), W_up norm(x))
 *   logits = W_head norm(x)                           for the rows that ask
 *
 * With few rows a step is one reading of the weights: before each run of the team the matrix of the
 * next is named, and threads that wait load it (team.h).
 *
 * Every operation works on its row alone or is promised to (matrix.h, attention.h), so a row's
 * logits do not depend on the batch. */
#include "compute/ops.h"
#include "model/internal.h"

#include <string.h>
#include <time.h>

/* ---- row-wise operations, shared out over the team when there are many rows ---- */
struct row_op {
    struct model *m;
    void (*fn)(const struct row_op *op, int row);
    int n_rows;
    const float *norm, *norm_bias; /* of what follows */
};

enum { TEAM_ROWS = 16 }; /* below it waking the team costs more than it saves */

static void run_rows(void *arg, int thread, int n_threads) {
    const struct row_op *op = arg;
    int first = (int)((int64_t)op->n_rows * thread / n_threads),
        end = (int)((int64_t)op->n_rows * (thread + 1) / n_threads);
    for (int r = first; r < end; r++)
        op->fn(op, r);
}

static void for_rows(struct row_op op) {
    if (op.n_rows < TEAM_ROWS)
        run_rows(&op, 0, 1);
    else
        team_run(op.m->team, run_rows, &op);
}

static void norm_row(const struct row_op *op, float *out, const float *x) {
    const struct base_config *c = &op->m->config;
    if (c->architecture == BASE_GPT2)
        layer_norm(out, x, op->norm, op->norm_bias, c->hidden_dim, (float)c->norm_eps);
    else
        rms_norm(out, x, op->norm, c->hidden_dim, (float)c->norm_eps);
}

static void embed_row(const struct row_op *op, int row) {
    struct model *m = op->m;
    size_t hidden = (size_t)m->config.hidden_dim;
    float *x = m->x + (size_t)row * hidden, *normed = m->normed + (size_t)row * hidden;
    matrix_get_row(m->weights->embed, m->tokens[row], x);
    if (m->weights->position) {
        matrix_get_row(m->weights->position, (int)m->positions[row], normed);
        add_to(x, normed, (int)hidden);
    }
    norm_row(op, normed, x);
}

/* x += delta, and the norm that the next block reads. */
static void add_row(const struct row_op *op, int row) {
    struct model *m = op->m;
    size_t hidden = (size_t)m->config.hidden_dim;
    float *x = m->x + (size_t)row * hidden;
    add_to(x, m->delta + (size_t)row * hidden, (int)hidden);
    norm_row(op, m->normed + (size_t)row * hidden, x);
}

static void activate_row(const struct row_op *op, int row) {
    struct model *m = op->m;
    int ffn = m->config.ffn_dim;
    if (m->config.architecture == BASE_LLAMA) {
        float *gate = m->ffn + (size_t)row * 2 * (size_t)ffn;
        silu_mul(gate, gate, gate + ffn, ffn);
    } else {
        float *up = m->ffn + (size_t)row * (size_t)ffn;
        (m->config.gelu_erf ? gelu_erf : gelu_tanh)(up, up, ffn);
    }
}

/* ---- where time goes ---- */
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Gives the time since the last call to op, which read bytes. */
static void took(struct model *m, enum model_op op, size_t bytes) {
    if (!m->profile) return;
    double t = now();
    m->profile->seconds[op] += t - m->profiled_at;
    m->profile->bytes[op] += (double)bytes;
    m->profiled_at = t;
}

static void product_took(struct model *m, enum model_op op, const struct matrix *w, int n_rows) {
    if (!m->profile) return;
    took(m, op, matrix_bytes(w));
    m->profile->flops[op] += 2.0 * n_rows * matrix_n_out(w) * matrix_n_in(w);
}

const char *model_op_name(enum model_op op) {
    static const char *const names[] = {"embedding",  "q, k, v", "attention",  "o",   "gate, up",
                                        "activation", "down",    "add, norms", "head"};
    return names[op];
}

void model_set_profile(struct model *m, struct model_profile *profile) {
    m->profile = profile;
}

void model_set_tap(struct model *m, void (*fn)(void *arg, int layer, const float *qkv, int n_rows),
                   void *arg) {
    m->tap = fn;
    m->tap_arg = arg;
    if (m->gpu) gpu_model_set_tap(m->gpu, fn, arg);
}

struct gpu *model_gpu(const struct model *m) {
    return m->gpu ? gpu_model_gpu(m->gpu) : NULL;
}

/* ---- the step ---- */
/* Checks the runs against every bound and lays out rows; nothing but scratch is written. */
static enum err lay_out(struct model *m, const struct model_run *runs, int n_runs, int *n_rows_out,
                        int *n_logits_out) {
    int n_rows = 0, n_logits = 0;
    if (n_runs < 1 || n_runs > m->max_runs) return ERR_ARG;
    m->step++;
    for (int i = 0; i < n_runs; i++) {
        const struct model_run *r = &runs[i];
        if (r->slot < 0 || r->slot >= m->info.n_slots || m->slot_step[r->slot] == m->step)
            return ERR_ARG;
        if (r->n_rows < 1 || r->n_rows > m->max_rows - n_rows) return ERR_ARG;
        if (r->n_logits < 0 || r->n_logits > r->n_rows || r->n_logits > m->max_logits - n_logits)
            return ERR_ARG;
        int64_t position = model_slot_position(m, r->slot);
        if (m->info.max_seq_len && position + r->n_rows > m->info.max_seq_len) return ERR_ARG;
        m->slot_step[r->slot] = m->step;
        if (r->generated && r->n_rows != 1) return ERR_ARG;
        m->runs[i] = (struct attention_run){
            .slot = model_slot(m, r->slot), .first_row = n_rows, .n_rows = r->n_rows};
        for (int k = 0; k < r->n_rows; k++) {
            if (r->tokens[k] < 0 || r->tokens[k] >= m->config.vocab_size) return ERR_ARG;
            m->tokens[n_rows + k] = r->tokens[k];
            m->positions[n_rows + k] = position + k;
        }
        n_rows += r->n_rows;
        for (int k = r->n_logits; k > 0; k--)
            m->logit_rows[n_logits++] = n_rows - k;
    }
    *n_rows_out = n_rows;
    *n_logits_out = n_logits;
    return OK;
}

/* Once the last layer's keys are remembered only the rows that ask go on: they move to the front.
 * Returns how many. */
static int keep_logit_rows(struct model *m, int n_logits) {
    size_t hidden = (size_t)m->config.hidden_dim,
           q = (size_t)(m->config.n_heads * m->config.head_dim);
    for (size_t i = 0; i < (size_t)n_logits; i++) {
        size_t row = (size_t)m->logit_rows[i]; /* >= i, ascending */
        memmove(m->x + i * hidden, m->x + row * hidden, hidden * sizeof(float));
        memmove(m->y + i * q, m->y + row * q, q * sizeof(float));
    }
    return n_logits;
}

/* What the step's sequences keep, as attention has to read it. */
static size_t states_bytes(const struct model *m, int n_runs) {
    size_t sum = 0;
    for (int i = 0; i < n_runs; i++)
        sum += attentions_state_bytes(m->attention,
                                      attentions_slot_position(m->attention, m->runs[i].slot));
    return sum;
}

enum err model_step(struct model *m, const struct model_run *runs, int n_runs,
                    const float **logits) {
    const struct base_config *c = &m->config;
    const struct weights *w = m->weights;
    int n_rows, n_logits;
    if (lay_out(m, runs, n_runs, &n_rows, &n_logits)) return ERR_ARG;
    if (m->gpu) return gpu_model_step(m->gpu, runs, n_runs, NULL, NULL, logits);

    size_t hidden = (size_t)c->hidden_dim, q = (size_t)(c->n_heads * c->head_dim),
           kv = (size_t)(c->n_kv_heads * c->head_dim);
    size_t qkv = q + 2 * kv, gate_up = (size_t)matrix_n_out(w->layers[0].gate_up);
    if (m->profile) m->profile->steps++, m->profiled_at = now();
    attentions_step_begin(m->attention, m->runs, n_runs);
    took(m, OP_ATTENTION, m->profile ? states_bytes(m, n_runs) : 0);
    for_rows(
        (struct row_op){m, embed_row, n_rows, w->layers[0].attn_norm, w->layers[0].attn_norm_bias});
    took(m, OP_EMBED, 0);
    for (int i = 0; i < c->n_layers; i++) {
        const struct layer_weights *l = &w->layers[i];
        bool last = i + 1 == c->n_layers;
        attentions_expect(m->attention, i);
        matmul(m->team, m->scratch, m->qkv, qkv, m->normed, hidden, n_rows, l->qkv, l->qkv_bias);
        product_took(m, OP_QKV, l->qkv, n_rows);
        if (m->tap) m->tap(m->tap_arg, i, m->qkv, n_rows);
        matrix_expect(m->team, l->o, n_rows);
        attentions_layer(m->attention, i, m->y, q, m->qkv, qkv, m->qkv + q, qkv, m->qkv + q + kv,
                         qkv);
        if (last) n_rows = keep_logit_rows(m, n_logits);
        took(m, OP_ATTENTION, 0);
        matrix_expect(m->team, l->gate_up, n_rows);
        matmul(m->team, m->scratch, m->delta, hidden, m->y, q, n_rows, l->o, l->o_bias);
        product_took(m, OP_O, l->o, n_rows);
        for_rows((struct row_op){m, add_row, n_rows, l->ffn_norm, l->ffn_norm_bias});
        took(m, OP_ADD_NORM, 0);
        matrix_expect(m->team, l->down, n_rows);
        matmul(m->team, m->scratch, m->ffn, gate_up, m->normed, hidden, n_rows, l->gate_up,
               l->gate_up_bias);
        product_took(m, OP_GATE_UP, l->gate_up, n_rows);
        for_rows((struct row_op){m, activate_row, n_rows, NULL, NULL});
        took(m, OP_ACTIVATE, 0);
        matrix_expect(m->team, last ? w->head : l[1].qkv, n_rows);
        matmul(m->team, m->scratch, m->delta, hidden, m->ffn, gate_up, n_rows, l->down,
               l->down_bias);
        product_took(m, OP_DOWN, l->down, n_rows);
        for_rows((struct row_op){m, add_row, n_rows, last ? w->norm : l[1].attn_norm,
                                 last ? w->norm_bias : l[1].attn_norm_bias});
        took(m, OP_ADD_NORM, 0);
    }
    attentions_step_end(m->attention);
    matrix_expect(m->team, NULL, 0);
    matmul(m->team, m->scratch, m->logits, (size_t)c->vocab_size, m->normed, hidden, n_rows,
           w->head, NULL);
    product_took(m, OP_HEAD, w->head, n_rows);
    *logits = m->logits;
    return OK;
}

bool model_draws(const struct model *m) {
    return m->gpu != NULL;
}

void model_count_prompt(struct model *m, int slot, const int32_t *tokens, int n) {
    gpu_model_count_prompt(m->gpu, slot, tokens, n);
}

enum err model_step_draw(struct model *m, const struct model_run *runs, int n_runs,
                         const struct model_draws *draws, const struct gpu_drawn **drawn,
                         const float **logits) {
    int n_rows, n_logits;
    if (!m->gpu || lay_out(m, runs, n_runs, &n_rows, &n_logits)) return ERR_ARG;
    for (int i = 0; i < draws->n; i++)
        if (draws->draws[i].row < 0 || draws->draws[i].row >= n_logits) return ERR_ARG;
    return gpu_model_step(m->gpu, runs, n_runs, draws, drawn, logits);
}
