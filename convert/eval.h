/* eval.h - `urchin eval`: what a conversion, a weight format or a code change costs.
 *
 *   urchin eval MODEL --text FILE[,FILE...] [--against BASE] [--tests NAME,...]
 *
 * Opens MODEL (and BASE) itself, prints a table (or, --json, one object) on stdout.  Returns the
 * process's exit status: 0, or 1 after one sentence on stderr.
 *
 * Who reads: the model; the model compared against (--against, read first, always whole); and of a
 * Hedgehog model, unless --ablate says otherwise, "exact keys only", the model with its linear
 * branch off (attention_set_linear, the rest as it is), "no cache", the model opened with a recall
 * cache of size 0 (everything but sinks and window goes to the state), and both at once, which
 * leaves sinks and window.
 *
 * What is read: each file's bytes as they are, tokenised whole, special tokens' text as plain text,
 * cut after --tokens.  BOS comes first where the tokenizer adds it, EOS never.  Files are never
 * joined.
 *
 * perplexity: windows of --context tokens, --stride of them scored (reading.h says which); exp of
 *   the mean loss over all scored tokens of all files.  Beside BASE also the mean KL of a reader to
 *   it and the share of rows with the same most likely token, over the same rows (score.h).  When the
 *   loss without the linear branch differs by less than its own noise, a sentence says so.
 *
 * stream: each file as one sequence from position 0, perplexity of each --bin tokens.  A model with
 *   a length limit (softmax) reads windows of C = min(4,096, limit) instead, C / 2 of them scored:
 *   from its second block on it has the C / 2 tokens before the block and what the block brings.
 *
 * choice: the questions of --tasks by log-likelihood (tasks.h, choice.h); --text is not needed for it.
 *
 * heads: each head's weights beside softmax over the same q and k (heads.h), of every reader whose
 *   linear branch is on; at most 4 windows of --context tokens of each text, 64 rows of each.  On the
 *   CPU.
 *
 * passkey: one number hidden in the first file (passkey.h), --tries prompts at each of --lengths;
 *   digits right, whole answers, and digits by depth.  A model whose limit is shorter is left out.
 *
 * recall: --facts numbers with names in one text, --tries questions at each of --lengths (recall.h);
 *   the text is read once, questions go on from copies of its slot.
 *
 * added: what the memories of 2, 8 ... (--memories) texts are worth when they are added (recall.h).
 *   By name only: it opens the model once more, with places for all their caches.  On the CPU.
 *
 * All readers score the same tokens, so columns compare; a difference between two readers is much
 * more precise than either. */
#ifndef URCHIN_CONVERT_EVAL_H
#define URCHIN_CONVERT_EVAL_H

#include "compute/team.h"
#include "config/settings.h"

int eval_main(const struct settings *settings, struct team *team);

#endif
