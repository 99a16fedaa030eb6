/* tokenizer_files.h - a GGUF file's tokenizer as tokenizer.json and tokenizer_config.json.
 *
 * GGUF names the pre-tokenizer and gives SentencePiece's scores; Hugging Face's files spell out
 * patterns and merges.  Scores become merges in their order; of equal scores the lower id comes
 * first, of the ways to cut one result the longest left part.
 *
 * What the files cannot say is ERR_FORMAT and one sentence: a piece that is no UTF-8, two ids of
 * one piece.  What was written is read again by the engine's own loader, and must give the same ids
 * for every piece, for runs of pieces, and for texts in which merges of one score compete (GGUF's
 * go from the left, JSON's one after the other), or it is refused too. */
#ifndef URCHIN_CONVERT_TOKENIZER_FILES_H
#define URCHIN_CONVERT_TOKENIZER_FILES_H

#include "config/err.h"
#include "model/gguf.h"

enum err tokenizer_files_write(const struct gguf *g, const char *folder, char *msg, size_t msg_len);

#endif
