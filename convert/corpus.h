/* corpus.h - text to learn from, and the packs of tokens that a step reads.
 *
 * Sources are files and folders (every file below one whose name does not begin with a dot, by
 * name).  A file is one document; of a .jsonl file every line is one, either {"text": "..."} or
 * {"messages": [{"role", "content"}, ...]}, which the model's chat format puts into words.
 *
 * Pack number i of a seed is a function of (corpus, seed, i) alone.  Its tokens come from places
 * drawn by chance, a document as often as it has bytes; pieces of different documents never see
 * each other, unless they are joined (EOS between them).  Where the tokenizer puts BOS in front of
 * a text, every piece begins with it.
 *
 * A share of the packs are recall texts (recall_text.h), one document each: facts, ordinary text of
 * the corpus around them (pieces one after the other, each in a paragraph of its own), questions
 * and answers.  Of n packs in a row n * share are, give or take one; never of PACK_CALIBRATE and
 * PACK_PROBE, all of PACK_RETRIEVAL.  A length with no room for a fact and a question gets an ordinary pack. */
#ifndef URCHIN_CONVERT_CORPUS_H
#define URCHIN_CONVERT_CORPUS_H

#include "model/chat.h"
#include "model/sha256.h"
#include "model/tokenizer.h"
#include <cjson/cJSON.h>
#include <stdint.h>

struct corpus;

struct corpus_options {
    const char *sources;               /* comma-separated */
    const struct tokenizer *tokenizer; /* borrowed, chat too */
    const struct chat *chat;
    int vocab_size; /* tokens past it are left out: the model has no weights for them */
    bool join;
    int least;     /* pieces of fewer tokens are passed over, unless joined */
    double recall; /* share of packs that are recall texts, 0 to 1 */
};
/* Reads names and lines, not tokens.  ERR_IO, ERR_FORMAT: a sentence that names file and line. */
enum err corpus_open(struct corpus **out, const struct corpus_options *options, char *msg,
                     size_t msg_len);
void corpus_close(struct corpus *c);               /* NULL is fine */
const char *corpus_digest(const struct corpus *c); /* SHA-256 over those of all files, in order */
cJSON *corpus_json(const struct corpus *c);        /* files, bytes, documents, digest */

enum { PACK_CALIBRATE, PACK_TRAIN, PACK_PROBE, PACK_FINETUNE, PACK_RETRIEVAL }; /* streams of packs that have nothing in common */

struct pack {
    int32_t *tokens; /* [n], owned: pack_free */
    int *first;      /* [n_documents + 1] */
    /* [n], owned; NULL: no recall text.  1 where token t is (part of) what a question asks to
     * remember, else 0.  A loss that is to dwell on answers takes 1 + x weight[t] for the row
     * before t, which predicts it. */
    float *weight;
    int n, n_documents;
};
/* ERR_ARG: no document is long enough. */
enum err corpus_pack(const struct corpus *c, int64_t seed, int stream, int64_t number, int length,
                     struct pack *out, char *msg, size_t msg_len);
void pack_free(struct pack *p);

/* The same 64 bits for the same arguments: splitmix64 (Steele et al. 2014) of their mixture. */
uint64_t chance(int64_t seed, int stream, int64_t number, uint64_t i);

#endif
