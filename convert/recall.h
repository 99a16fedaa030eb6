/* recall.h - facts hidden in texts, and questions about each.
 *
 * A fact is a name and a five-digit number:
 *
 *   "\nThe pass key of Anna is 48213. Remember it. The pass key of Anna is 48213.\n"
 *   "\nWhat is the pass key of Anna? The pass key of Anna is"   " 48213"
 *
 * Answers are read, not written (passkey.h): a digit is right when its token is the model's most likely one after the
 * digits before it, an answer is whole when all its tokens are.  What is hidden where is a function of (seed, length, text,
 * number) alone.
 *
 * Many facts in one text: the text of `length` tokens (BOS and facts included) is read once, and each question goes on from
 * a copy of the slot.  Fact k of K in text t of T stands after the share (k + (2 t + 1) / 2 T) / K of the filler, so all
 * depths are asked evenly.
 *
 * Texts read apart, memories added (attention_state_add): n texts of `length` tokens, one fact in each, all read from
 * position 0 with the model's own cache.  Each text in turn goes on with the memories of all others added, and is asked about
 * its own fact and about theirs.  Beside it: each text alone (its own fact, and, as a check that nothing else gives it away,
 * the others'), and all texts read one after the other (own: the last one's).  Facts stand before the last two blocks of
 * their text, since a source's window is not added. */
#ifndef URCHIN_CONVERT_RECALL_H
#define URCHIN_CONVERT_RECALL_H

#include "convert/passkey.h"

enum { DEPTHS = 5, MAX_FACTS = 64, MAX_TEXTS = 16 };

struct recalled { /* answers so far */
    int asked, whole, digits; /* answers, whole ones, digits right of PASSKEY_DIGITS each */
};
void recalled_add(struct recalled *r, const struct answer *a);
double recalled_digits(const struct recalled *r); /* shares; NaN: nothing was asked */
double recalled_whole(const struct recalled *r);
int depth_of(double share); /* 0 .. DEPTHS - 1 */
struct recalled recalled_all(const struct recalled depths[DEPTHS]);

struct recall_options {
    const struct tokenizer *tokenizer; /* borrowed */
    const struct text *filler;         /* borrowed */
    int64_t seed, length;
};

struct fact { /* tokens, owned */
    int32_t *told, *asked, *answer;
    size_t n_told, n_asked, n_answer;
};
struct recall_text {
    int32_t *ids; /* [length], owned: recall_free */
    struct fact facts[MAX_FACTS];
    double shares[MAX_FACTS]; /* of the filler that stand before each */
    int n_facts;
};
/* Text t of n_texts.  ERR_ARG: no room for the facts, or too little filler. */
enum err recall_make(struct recall_text *out, const struct recall_options *o, int n_facts, int t, int n_texts, char *msg,
                     size_t msg_len);
void recall_free(struct recall_text *t);

/* T = n_texts texts of K = n_facts facts to each reader: depths [n_readers][DEPTHS], added to.  Readers whose limit is
 * shorter are left out.  Uses each reader's slot and its spare one.  Errors as recall_make's. */
enum err recall_measure(struct recalled (*depths)[DEPTHS], struct reader *readers, int n_readers,
                        const struct recall_options *o, int n_facts, int n_texts, char *msg, size_t msg_len);

struct added { /* own: the fact of the text that goes on; others: those of the others */
    int n_texts;
    int64_t length;
    struct recalled own_alone, own_joined, own_added, others_alone, others_joined, others_added;
};

/* One set of n_texts texts, number `set` of n_sets.  model was opened with cache_copies n_texts and n_texts + 2 slots.  ERR_ARG: texts too short to have linear keys with all caches beside them. */
enum err added_measure(struct added *sums, struct model *model, const struct recall_options *o, int n_texts,
                       int set, int n_sets, char *msg, size_t msg_len);

#endif
