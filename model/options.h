/* options.h - from settings to the options of model_open. */
#ifndef URCHIN_MODEL_OPTIONS_H
#define URCHIN_MODEL_OPTIONS_H

#include "config/settings.h"
#include "model/model.h"

/* Everything that settings say about a model; team, slots, bounds of a step and progress stay as
 * model_options_init leaves them.  Strings are borrowed from the settings. */
void model_options_set(struct model_options *options, const struct settings *settings);

int weights_named(const char *name);          /* "int8" -> WEIGHT_INT8; "auto": WEIGHTS_AUTO */
enum kv_type kv_type_named(const char *name); /* "fp32", "bf16" */

#endif
