/* merge_config.h - the JSON files of a merged model: what base and adapter say, as one folder says
 * it. */
#ifndef URCHIN_CONVERT_MERGE_CONFIG_H
#define URCHIN_CONVERT_MERGE_CONFIG_H

#include "config/err.h"
#include "model/base.h"

/* config.json, and for a GGUF base generation_config.json.  A folder's config.json is kept but for
 * the type of its weights (dtype: "bfloat16", "float32"); GGUF's metadata is put into Hugging Face's
 * words.  ERR_FORMAT: RoPE factors that are not Llama 3's, which config.json cannot hold. */
enum err merge_config_write(const struct base *base, const char *dtype, const char *folder, char *msg, size_t msg_len);

/* model/urchin.json as folder/urchin.json: base and low_rank null, both moved to training.merged.
 * name may be NULL: as it was. */
enum err merge_urchin_write(const char *model, const char *name, const char *folder, char *msg,
                            size_t msg_len);

#endif
