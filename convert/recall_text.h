/* recall_text.h - texts that can be gone on with only by who remembers: facts, ordinary text around
 * them, questions about them with answers.
 *
 * A recall text is drawn from a number (seed) and a length, and from nothing else:
 *
 *   1 to 8 facts, more in longer texts, of a small grammar: pass keys, codes, words, names to
 *     cities, belongings, prices, times, places.  Within a text no two facts of a kind have the
 *     same subject or the same value, so none contradicts another and every question has one answer
 *   each fact at a place of its own, uniform over the text, at a line end or space
 *   1 to 4 of them asked about behind the text, in any order and in the words of any of the kind's
 *     questions, plainly or, where the model has a chat format, mostly as turns of a conversation
 *     whose first message is the text
 *
 * The wordings differ from those of passkey.h, which is a test. */
#ifndef URCHIN_CONVERT_RECALL_TEXT_H
#define URCHIN_CONVERT_RECALL_TEXT_H

#include "model/chat.h"
#include <stdbool.h>

enum { RECALL_FACTS = 8, RECALL_QUESTIONS = 4, RECALL_LINE = 256 };

struct recall_fact {
    int kind;
    char subject[64], value[64];
    char sentence[RECALL_LINE]; /* "Mira Novak lives in Porto." */
    char question[RECALL_LINE]; /* "Where does Mira Novak live?" */
    char answer[RECALL_LINE];   /* "Mira Novak lives in Porto." */
    bool wants_subject;         /* that is what the answer has to remember, else the value */
    double depth;               /* in [0, 1): where in the text it stands */
};

struct recall {
    struct recall_fact facts[RECALL_FACTS]; /* in the text's order */
    int n_facts, n_questions;
    int asked[RECALL_QUESTIONS]; /* which facts, in the order of the questions */
    int style;                   /* how questions are put */
    bool chat;                   /* as a conversation */
};

const char *recall_wanted(const struct recall_fact *f); /* subject or value */

/* n_facts: at most so many. */
void recall_draw(struct recall *out, uint64_t seed, int length, bool may_chat, int n_facts);

/* The tokens of r around as much of filler (len bytes, or NULL) as fits into length tokens, with
 * BOS where the tokenizer or chat format puts it; answer[t] is 1 where ids[t] is (part of) what a
 * question wants, else 0.  Both malloc'd.  *n 0, no arrays: facts and questions alone are too long.
 * ERR_NOMEM, ERR_ARG (a role that the chat format cannot place). */
enum err recall_tokens(const struct recall *r, const struct tokenizer *tokenizer,
                       const struct chat *chat, const char *filler, size_t len, int length,
                       int32_t **ids, float **answer, int *n, char *msg, size_t msg_len);

#endif
