/* tokenizer.h - text to token ids and back: byte-level BPE and SentencePiece BPE with byte
 * fallback.
 *
 * A token's text is bytes; any bytes can be encoded (invalid UTF-8 is encoded byte by byte) and
 * detokenising what was encoded gives back the same bytes, up to what the tokenizer's own
 * normaliser changes (SentencePiece's leading space).  Immutable after opening: safe from any
 * thread. */
#ifndef URCHIN_MODEL_TOKENIZER_H
#define URCHIN_MODEL_TOKENIZER_H

#include "config/err.h"
#include "model/gguf.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

/* From a Hugging Face folder's tokenizer.json (and tokenizer_config.json beside it when there is
 * one). */
enum err tokenizer_open_json(struct tokenizer **out, const char *folder, char *msg, size_t msg_len);
enum err tokenizer_open_gguf(struct tokenizer **out, const struct gguf *g, char *msg,
                             size_t msg_len);
/* tokenizer.json text alone (fuzzing, tests); config_text may be NULL. */
enum err tokenizer_open_text(struct tokenizer **out, const char *json, size_t len,
                             const char *config_json, size_t config_len, char *msg, size_t msg_len);
void tokenizer_free(struct tokenizer *t); /* NULL is fine */

int tokenizer_vocab_size(const struct tokenizer *t); /* highest id + 1 */
int32_t tokenizer_bos(const struct tokenizer *t);    /* -1: none */
int32_t tokenizer_eos(const struct tokenizer *t);    /* -1: none */
bool tokenizer_add_bos(
    const struct tokenizer *t); /* does the tokenizer put BOS in front by itself? */
bool tokenizer_add_eos(const struct tokenizer *t);
const char *
tokenizer_chat_template(const struct tokenizer *t); /* Jinja source, NULL: none; borrowed */

enum {
    TOKENIZE_SPECIAL =
        1, /* text like <|im_end|> becomes the special token (templates only, never user text) */
    TOKENIZE_ADD_BOS_EOS = 2
}; /* BOS / EOS as tokenizer_add_bos/_eos say */

/* Appends nothing and frees nothing: *ids is malloc'd, the caller frees it.  Time O(len log len)
 * for any input. ERR_NOMEM. */
enum err tokenize(const struct tokenizer *t, const char *text, size_t len, int flags, int32_t **ids,
                  size_t *n_ids);

/* Bytes of one token as they stand in running text; special (control) tokens give 0 bytes unless
 * with_special.  Borrowed; ids out of range give 0 bytes. */
const char *token_bytes(const struct tokenizer *t, int32_t id, bool with_special, size_t *len);
bool token_is_special(const struct tokenizer *t,
                      int32_t id); /* control tokens: BOS, <|im_end|>, ... */
const char *
token_piece(const struct tokenizer *t,
            int32_t id); /* as the vocabulary writes it (diagnostics); NUL-terminated, borrowed */
int32_t token_lookup(const struct tokenizer *t,
                     const char *piece); /* exact vocabulary entry -> id, -1: none */

/* Joins tokens into bytes; *text malloc'd, NUL-terminated. SentencePiece: strip_leading_space drops
 * the one space its normaliser added. */
enum err detokenize(const struct tokenizer *t, const int32_t *ids, size_t n_ids, bool with_special,
                    bool strip_leading_space, char **text, size_t *len);

/* How many of these bytes form whole UTF-8 characters: the rest (at most 3) waits for the next
 * token.  An invalid sequence is not held back: it counts, and is to be replaced by U+FFFD where
 * the wire needs UTF-8. */
size_t utf8_whole(const char *text, size_t len);

/* text as valid UTF-8, each invalid byte sequence replaced by U+FFFD (as Python's
 * errors="replace"); *out malloc'd, NUL-terminated. */
enum err utf8_repair(const char *text, size_t len, char **out, size_t *out_len);

#endif
