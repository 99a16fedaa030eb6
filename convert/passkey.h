/* passkey.h - can a model repeat a number it read far back?
 *
 * After Mohtashami and Jaggi 2023, arXiv:2305.16300, section 4.2, with real text in place of their
 * filler.  A prompt of exactly `length` tokens, BOS included where the tokenizer adds one, and its
 * answer:
 *
 *   text
 *   "\nThe pass key is 48213. Remember it. The pass key is 48213.\n"
 *   text
 *   "\nWhat is the pass key? The pass key is"
 *                                            " 48213"
 *
 * The text is a run of consecutive tokens of the filler from a random place; in try i of n the
 * key's sentence stands after the share (2 i + 1) / 2 n of it, so the tries cover all depths
 * evenly. Key and place are functions of (seed, length, i) alone.  No chat template.
 *
 * The answer is read, not written: a digit is right when its token is the model's most likely one
 * after the prompt and the digits before it.  So a model that would rather say "the one" first is
 * asked for the number all the same, and one wrong digit does not spoil the others.  An answer is
 * whole when all its tokens are right: then the model, left alone, writes it. */
#ifndef URCHIN_CONVERT_PASSKEY_H
#define URCHIN_CONVERT_PASSKEY_H

#include "convert/reading.h"

enum { PASSKEY_DIGITS = 5 };

struct passkey {
    int32_t *ids; /* [n + n_answer], owned: free() it */
    int64_t n;    /* the prompt */
    int n_answer; /* the answer's tokens, 1 .. PASSKEY_DIGITS + 1 */
    char key[PASSKEY_DIGITS + 1];
};

/* ERR_ARG: length has no room for the two sentences, or the filler is too short; ERR_NOMEM. */
enum err passkey_make(struct passkey *out, const struct tokenizer *tokenizer,
                      const struct text *filler, int64_t seed, int64_t length, int i, int n_tries,
                      char *msg, size_t msg_len);

struct answer {
    int digits; /* right ones, 0 .. PASSKEY_DIGITS */
    bool whole;
};
enum err passkey_ask(struct answer *out, struct reader *reader, const struct passkey *passkey,
                     char *msg, size_t msg_len);

/* The same of any prompt: the reader's slot goes on with ids [n + n_answer], n of the question. */
enum err passkey_answer(struct answer *out, struct reader *reader, const int32_t *ids, int64_t n,
                     int n_answer, char *msg, size_t msg_len);

uint64_t passkey_mix(uint64_t x); /* the next of a chain of random numbers: SplitMix64's finaliser */

#endif
