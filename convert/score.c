/* score.c - log-softmax, loss, KL divergence and agreement of rows of logits. */
#include "convert/score.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>

void score_add(struct score *sum, const struct score *part) {
    sum->n += part->n;
    sum->nll += part->nll;
    sum->kl += part->kl;
    sum->n_agree += part->n_agree;
    sum->off += part->off;
    sum->off2 += part->off2;
}

double score_mean_nll(const struct score *s) {
    return s->n ? s->nll / (double)s->n : NAN;
}
double score_perplexity(const struct score *s) {
    return exp(score_mean_nll(s));
}
double score_mean_kl(const struct score *s) {
    return s->n ? s->kl / (double)s->n : NAN;
}
double score_agreement(const struct score *s) {
    return s->n ? (double)s->n_agree / (double)s->n : NAN;
}

void score_compare(struct score *ablated, const struct score *whole) {
    ablated->off = ablated->nll - whole->nll;
    ablated->off2 = ablated->off * ablated->off;
}
double score_mean_off(const struct score *s) {
    return s->n ? s->off / (double)s->n : NAN;
}
double score_off_error(const struct score *s) {
    double n = (double)s->n, mean = score_mean_off(s);
    if (s->n < 2) return NAN;
    double variance = (s->off2 / n - mean * mean) * n / (n - 1);
    return sqrt((variance > 0 ? variance : 0) / n);
}

struct row { /* a row of logits: its most likely token and log of the sum of exponentials */
    int best;
    double log_sum;
};

static struct row measure(const float *x, int n) {
    struct row r = {0};
    for (int i = 1; i < n; i++)
        if (x[i] > x[r.best]) r.best = i;
    float top = x[r.best];
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += expf(x[i] - top);
    r.log_sum = top + log(sum);
    return r;
}

struct score score_row(const float *logits, const float *against, int vocab_size, int32_t target) {
    struct row p = measure(logits, vocab_size);
    struct score s = {.n = 1, .nll = p.log_sum - logits[target]};
    if (!against) return s;
    struct row b = measure(against, vocab_size);
    for (int i = 0; i < vocab_size; i++) {
        double log_b = against[i] - b.log_sum;
        s.kl += expf((float)log_b) * (log_b - (logits[i] - p.log_sum));
    }
    s.n_agree = p.best == b.best;
    return s;
}

struct rows {
    struct score *out;
    const float *logits, *against;
    int n_rows, vocab_size;
    const int32_t *targets;
};

static void score_share(void *arg, int thread, int n_threads) {
    const struct rows *r = arg;
    for (int i = thread; i < r->n_rows; i += n_threads) {
        size_t at = (size_t)i * (size_t)r->vocab_size;
        r->out[i] = score_row(r->logits + at, r->against ? r->against + at : NULL, r->vocab_size,
                              r->targets[i]);
    }
}

void score_rows(struct team *team, struct score *out, const float *logits, const float *against,
                int n_rows, int vocab_size, const int32_t *targets) {
    struct rows r = {out, logits, against, n_rows, vocab_size, targets};
    team_run(team, score_share, &r);
}
