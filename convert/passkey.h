/* passkey.h - can a model repeat a number it read far back?
 *
 * After Mohtashami and Jaggi 2023, arXiv:2305.16300, section 4.2, with real text in place of their
 * filler, and the fact said twice in the same words: said theirs, "48213 is the pass key", small
 * base models themselves answered in words instead of digits.
 * A prompt of exactly `length` tokens, BOS included where the tokenizer adds one:
 *
 *   text
 *   "\nThe pass key is 48213. Remember it. The pass key is 48213.\n"
 *   text
 *   "\nWhat is the pass key? The pass key is"
 *
 * The text is a run of consecutive tokens of the filler from a random place; in try i of n the
 * key's sentence stands after the share (2 i + 1) / 2 n of it, so the tries cover all depths evenly.
 * Key and place are functions of (length, i) alone.  The model answers greedily; leading spaces are
 * dropped and the first five characters compared one by one: an answer is right by 0 to 5 digits.
 * No chat template. */
#ifndef URCHIN_CONVERT_PASSKEY_H
#define URCHIN_CONVERT_PASSKEY_H

#include "convert/reading.h"

enum { PASSKEY_DIGITS = 5 };

struct passkey {
    int32_t *ids; /* [n], owned: free() it */
    int64_t n;
    char key[PASSKEY_DIGITS + 1];
};

/* ERR_ARG: length has no room for the two sentences, or the filler is too short; ERR_NOMEM. */
enum err passkey_make(struct passkey *out, const struct tokenizer *tokenizer,
                      const struct text *filler, int64_t length, int i, int n_tries, char *msg,
                      size_t msg_len);

/* How many digits of the answer are right, 0 .. PASSKEY_DIGITS, into *right. */
enum err passkey_ask(int *right, struct reader *reader, const struct passkey *passkey, char *msg,
                     size_t msg_len);

/* The same for an answer at hand. */
int passkey_digits_right(const char *key, const char *answer, size_t len);

#endif
