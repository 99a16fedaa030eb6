/* merge.h - `urchin convert --merge`: an adapter and its base become one folder that needs neither.
 *
 *   urchin convert --merge MODEL --out FOLDER [--base FILE] [--name NAME]
 *
 * MODEL is a converted model: an adapter over a GGUF file, or a folder whose base lies in it.
 * FOLDER gets
 *
 *   model.safetensors      the base's tensors under Hugging Face's names, q and k rows in
 *                          half-split order, GPT-2's matrices [in, out]; W + scale B A is added in
 *                          fp32.  Matrices are rounded to bf16 (nearest even), as --weights bf16
 *                          rounds them; vectors and GPT-2's positions, which the engine keeps in
 *                          fp32, stay F32 where bf16 would change them.  So the folder gives the
 *                          bits that MODEL gives with --weights bf16
 *   hedgehog.safetensors   maps and mixing, F32
 *   urchin.json            MODEL's, with base and low_rank null, and what was merged under
 *                          training.merged
 *   config.json, generation_config.json, tokenizer.json, ...
 *                          the folder's own, or made from GGUF's metadata (tokenizer_files.h)
 *
 * All of it is written to FOLDER.new, which becomes FOLDER at the end and is removed when something
 * goes wrong or a signal ends it.  Memory: a few rows; of GPT-2 a matrix. */
#ifndef URCHIN_CONVERT_MERGE_H
#define URCHIN_CONVERT_MERGE_H

#include "config/settings.h"

/* The process's exit status: 0; 1 after one sentence on stderr; 130 when a signal ended it. */
int merge_main(const struct settings *settings);

#endif
