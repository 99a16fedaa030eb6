/* show.c - the report of a conversion that was just written. */
#include "convert/show.h"

#include "convert/files.h"
#include "convert/head_report.h"
#include "convert/sheet.h"
#include "model/options.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

/* What the heads of the model in folder do with the sample; *out stays NULL where all its keys are
 * exact. */
static enum err read_sample(cJSON **out, const char *folder, const struct settings *settings,
                            struct team *team, const struct text *sample, char *msg,
                            size_t msg_len) {
    struct model_options o;
    struct model *model = NULL;
    struct head_report *heads = NULL;
    int64_t n = sample->n + (sample->bos >= 0);
    model_options_set(&o, settings);
    o.path = folder;
    o.device = DEVICE_CPU;
    o.max_seq_len = o.memory_budget = 0;
    o.cache_size = o.cache_recent = o.cache_age = o.cache_fact_age = o.retrieval_size =
        -1; /* the settings' are in its urchin.json */
    o.max_distance = o.horizon = -1;
    o.max_rows = READING_ROWS;
    o.max_logits = 1;
    o.n_slots = 1;
    o.team = team;
    enum err e = model_open(&model, &o, msg, msg_len);
    if (!e && attention_linear_keys(model_attention(model), -1, 0, n - 1) > 0)
        e = head_report_take(&heads, model, team, 0, sample, 1, n, msg, msg_len);
    if (!e && heads) *out = head_report_json(heads);
    head_report_free(heads);
    model_close(model);
    return e;
}

enum err show_conversion(const char *folder, const struct settings *settings, struct team *team,
                         const struct text *sample, char *msg, size_t msg_len) {
    cJSON *heads = NULL;
    char path[PATH_MAX];
    enum err e = read_sample(&heads, folder, settings, team, sample, msg, msg_len);
    if (e) return e;
    cJSON *document = sheet_document(folder, NULL),
          *conversion = cJSON_GetObjectItemCaseSensitive(document, "conversion");
    if (heads && conversion) {
        cJSON_AddItemToObject(conversion, "heads", heads);
        e = file_replace_json(folder, "conversion.json", conversion, msg, msg_len);
    } else {
        cJSON_Delete(heads);
    }
    if (!e && snprintf(path, sizeof path, "%s/conversion.html", folder) >= (int)sizeof path)
        e = err_set(msg, msg_len, ERR_ARG, "%s: the name is too long", folder);
    if (!e) e = sheet_write(path, document, msg, msg_len);
    cJSON_Delete(document);
    return e;
}
