/* sheet.c - the page as a whole: head, summary, recipe and digests; its figures are in sheet_*.c.
 */
#include "convert/sheet.h"

#include "config/version.h"
#include "convert/files.h"
#include "convert/plot.h"
#include "convert/sheet_parts.h"
#include "model/base.h"
#include "model/mapped.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- looking into the document ---- */
const cJSON *sheet_at(const cJSON *o, const char *path) {
    while (o && *path) {
        char key[64];
        size_t n = strcspn(path, ".");
        if (n >= sizeof key) return NULL;
        memcpy(key, path, n);
        key[n] = 0;
        o = cJSON_GetObjectItemCaseSensitive(o, key);
        path += n + (path[n] == '.');
    }
    return o;
}
double sheet_number(const cJSON *o, const char *path) {
    const cJSON *item = sheet_at(o, path);
    return cJSON_IsNumber(item) ? item->valuedouble : NAN;
}
const char *sheet_string(const cJSON *o, const char *path) {
    return cJSON_GetStringValue(sheet_at(o, path));
}

double *sheet_array(const cJSON *o, const char *path, int *n) {
    const cJSON *array = sheet_at(o, path), *item;
    int size = cJSON_IsArray(array) ? cJSON_GetArraySize(array) : 0, at = 0;
    *n = 0;
    double *out = size > 0 && size <= SHEET_MOST ? malloc((size_t)size * sizeof *out) : NULL;
    if (!out) return NULL;
    cJSON_ArrayForEach(item, array) out[at++] = cJSON_IsNumber(item) ? item->valuedouble : NAN;
    *n = size;
    return out;
}

double *sheet_grid(const cJSON *o, const char *path, int *n_rows, int *n_columns) {
    enum { MOST_SIDE = 1024 };
    const cJSON *array = sheet_at(o, path), *row, *item;
    int rows = cJSON_IsArray(array) ? cJSON_GetArraySize(array) : 0;
    int columns = rows ? cJSON_GetArraySize(array->child) : 0;
    *n_rows = *n_columns = 0;
    if (rows < 1 || columns < 1 || rows > MOST_SIDE || columns > MOST_SIDE) return NULL;
    double *out = malloc((size_t)rows * (size_t)columns * sizeof *out);
    size_t at = 0;
    bool even = out;
    if (out) cJSON_ArrayForEach(row, array) {
            even = even && cJSON_IsArray(row) && cJSON_GetArraySize(row) == columns;
            if (even)
                cJSON_ArrayForEach(item, row) out[at++] =
                    cJSON_IsNumber(item) ? item->valuedouble : NAN;
        }
    if (!even) {
        free(out);
        return NULL;
    }
    *n_rows = rows;
    *n_columns = columns;
    return out;
}

void sheet_open_section(struct html *h, const char *title, const char *note) {
    html_put(h, "<section><h2>%s</h2>", title);
    if (note) {
        html_put(h, "<p class=\"note\">");
        html_text(h, note);
        html_put(h, "</p>");
    }
}
void sheet_close_section(struct html *h) {
    html_put(h, "</section>\n");
}

/* ---- head ---- */
static const char style[] =
    ":root{color-scheme:light dark;--paper:#f6f7f9;--card:#fff;--ink:#1c2733;--quiet:#5b6876;"
    "--line:#b9c2cc;--edge:#e1e5ea;--warn:#fff3d6;--warn-ink:#5c4300}"
    "@media(prefers-color-scheme:dark){:root{--paper:#11161c;--card:#1a212a;--ink:#e4e9ee;"
    "--quiet:#98a5b3;--line:#4a5766;--edge:#2b3540;--warn:#3d3214;--warn-ink:#f5dfa6}}"
    "*{box-sizing:border-box}"
    "body{margin:0;background:var(--paper);color:var(--ink);"
    "font:16px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}"
    "main{max-width:1120px;margin:0 auto;padding:28px 18px 60px}"
    "h1{font-size:1.75rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}"
    "h2{font-size:1.2rem;margin:0 0 2px}"
    "h3{font-size:1rem;margin:18px 0 4px}"
    "p{margin:0 0 10px}"
    ".note,.by{color:var(--quiet);font-size:.92rem;max-width:75ch}"
    "section,.tile{background:var(--card);border:1px solid var(--edge);border-radius:10px}"
    "section{padding:18px;margin-top:18px}"
    ".tiles{display:grid;gap:12px;margin-top:18px;"
    "grid-template-columns:repeat(auto-fit,minmax(min(100%,205px),1fr))}"
    ".tile{padding:12px 14px;min-width:0}"
    ".tile b{display:block;font-size:1.12rem;line-height:1.35;font-variant-numeric:tabular-nums}"
    ".tile span{display:block;color:var(--quiet);font-size:.85rem;line-height:1.35}"
    ".grid{display:grid;gap:22px 30px;align-items:start;"
    "grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}"
    ".grid>*{min-width:0}"
    ".span{grid-column:1/-1}"
    "figure{margin:8px 0 0}"
    "figcaption{font-size:.92rem;margin-bottom:6px}"
    "figcaption b{display:block}"
    "figcaption span{color:var(--quiet);font-size:.86rem}"
    ".wide{overflow-x:auto}"
    "table{border-collapse:collapse;font-size:.92rem;margin:6px 0 2px}"
    "th,td{padding:5px 11px 5px 0;text-align:left;vertical-align:top;"
    "border-bottom:1px solid var(--edge)}"
    "thead th{color:var(--quiet);font-weight:600;vertical-align:bottom}"
    "tbody th{font-weight:400;white-space:nowrap}"
    ".n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;"
    "padding-right:0;padding-left:18px}"
    ".heat .n{text-align:center;padding:5px 9px}"
    ".heat td.n{border:2px solid var(--card);min-width:58px}"
    ".heat table .n.plain{border:0;border-bottom:1px solid var(--edge)}"
    "tr.base th{color:var(--quiet)}"
    "tr.whole th,tr.whole td{font-weight:650}"
    "tr.sub th{padding-left:1.2em}"
    ".warn{background:var(--warn);color:var(--warn-ink);border-radius:8px;"
    "padding:10px 14px;margin-top:18px}"
    ".keys{display:grid;gap:4px 34px;"
    "grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}"
    ".keys th{white-space:normal;min-width:8.5em;color:var(--quiet)}"
    ".keys td{overflow-wrap:anywhere}"
    "code{font:.85em ui-monospace,monospace;overflow-wrap:anywhere}"
    "@media(max-width:560px){main{padding:16px 10px 40px}section{padding:14px 12px}"
    "h1{font-size:1.35rem}.tiles{grid-template-columns:1fr 1fr;gap:8px}"
    ".tile{padding:9px 10px}.tile b{font-size:1.02rem}tbody th{white-space:normal}}"
    "@media print{section,.tile,figure{break-inside:avoid}}";

static void tile(struct html *h, const char *what, double from, double to, const char *note) {
    if (!isfinite(to)) return;
    html_put(h, "<div class=\"tile\"><span>");
    html_text(h, what);
    html_put(h, "</span><b>");
    if (isfinite(from)) {
        html_number(h, from);
        html_put(h, " &rarr; ");
    }
    html_number(h, to);
    html_put(h, "</b><span>");
    html_text(h, note);
    html_put(h, "</span></div>");
}

/* The base, the model itself and what it lacks, among the readers of an evaluation. */
static const cJSON *reader_that(const cJSON *quality, bool base) {
    const cJSON *r;
    cJSON_ArrayForEach(r, sheet_at(quality, "readers")) {
        bool compared = cJSON_IsTrue(sheet_at(r, "compared_against"));
        if (base ? compared : !compared && !cJSON_IsTrue(sheet_at(r, "ablation"))) return r;
    }
    return NULL;
}

static void tiles(struct html *h, const cJSON *conversion, const cJSON *quality) {
    const cJSON *base = reader_that(quality, true), *model = reader_that(quality, false);
    char note[160];
    html_put(h, "<div class=\"tiles\">");
    double own = sheet_number(model, "perplexity.perplexity"),
           of_base = sheet_number(base, "perplexity.perplexity");
    snprintf(note, sizeof note, "%s%.1f %%",
             own >= of_base ? "base to model, +" : "base to model, ", 100 * (own / of_base - 1));
    tile(h, "perplexity", of_base, own, isfinite(own / of_base) ? note : "of the model");
    tile(h, "KL of next-token rows", NAN, sheet_number(model, "perplexity.kl"),
         "nats, base to model");
    tile(h, "KL of attention rows", sheet_number(conversion, "before.kl_of_all_rows"),
         sheet_number(conversion, "after.kl_of_all_rows"),
         "nats, calibrated to trained, without cache");
    tile(h, "KL of attention rows", NAN, sheet_number(model, "heads.kl_of_all_rows"),
         "nats, as it runs, to softmax over its own q and k");
    tile(h, "error of attention", sheet_number(conversion, "before.attention_error_of_layers"),
         sheet_number(conversion, "after.attention_error_of_layers"),
         "share of the output's energy");
    tile(h, "loss of fine-tuning", sheet_number(conversion, "finetune.loss_before"),
         sheet_number(conversion, "finetune.loss_after"), "nats, before and after");
    tile(h, "tokens read", NAN, sheet_number(conversion, "tokens_read"), "in attention transfer");
    double seconds = sheet_number(conversion, "seconds"),
           threads = sheet_number(conversion, "threads");
    if (isfinite(seconds) && isfinite(threads)) {
        html_put(h, "<div class=\"tile\"><span>time</span><b>");
        if (seconds >= 5400)
            html_put(h, "%.1f hours", seconds / 3600);
        else if (seconds >= 90)
            html_put(h, "%.1f minutes", seconds / 60);
        else
            html_put(h, "%.0f seconds", seconds);
        html_put(h, "</b><span>on %.0f threads</span></div>", threads);
    }
    html_put(h, "</div>\n");
}

static void head(struct html *h, const cJSON *document) {
    const cJSON *model = sheet_at(document, "model"),
                *conversion = sheet_at(document, "conversion");
    const char *name = sheet_string(model, "name"), *base = sheet_string(model, "base.name");
    const cJSON *reader = reader_that(sheet_at(document, "quality"), false);
    if (!name) name = sheet_string(conversion, "name");
    if (!name) name = sheet_string(reader, "name");
    if (!name) name = "a model";
    html_put(h, "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
                "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>");
    html_text(h, name);
    html_put(h, "</title><style>%s", style);
    plot_style(h);
    html_put(h, "</style></head><body><main><h1>");
    html_text(h, name);
    html_put(h, "</h1><p class=\"by\">");
    if (sheet_at(model, "attention.map")) {
        html_put(h, "Hedgehog linear attention");
        if (base) {
            html_put(h, " over ");
            html_text(h, base);
        }
        const char *rule = sheet_string(model, "attention.window.rule");
        html_put(h, ": map ");
        html_text(h, sheet_string(model, "attention.map"));
        if (rule) {
            html_put(h, ", window ");
            html_text(h, rule);
            if (isfinite(sheet_number(model, "attention.window.size")))
                html_put(h, " %.0f", sheet_number(model, "attention.window.size"));
        }
        if (isfinite(sheet_number(model, "attention.sinks")))
            html_put(h, ", sinks %.0f", sheet_number(model, "attention.sinks"));
        if (isfinite(sheet_number(model, "attention.cache.size")))
            html_put(h, ", recall cache %.0f", sheet_number(model, "attention.cache.size"));
        if (isfinite(sheet_number(model, "attention.cache.retrieval.size")))
            html_put(h, " (%.0f in retrieval heads)",
                     sheet_number(model, "attention.cache.retrieval.size"));
        if (isfinite(sheet_number(model, "attention.horizon")))
            html_put(h, ", horizon %.0f", sheet_number(model, "attention.horizon"));
        html_put(h, ". ");
    }
    html_put(h, "Written by Urchin " URCHIN_VERSION ".</p>\n");
}

/* ---- recipe, text, digests: whatever is there, as a table ---- */
static void value_cell(struct html *h, const cJSON *v) {
    bool digest = cJSON_IsString(v) && strlen(v->valuestring) == 64 &&
                  strspn(v->valuestring, "0123456789abcdef") == 64;
    if (cJSON_IsNumber(v)) {
        if (fabs(v->valuedouble) < 1000 && v->valuedouble != 0)
            html_put(h, "%.6g", v->valuedouble);
        else
            html_number(h, v->valuedouble);
    } else if (cJSON_IsString(v)) {
        if (digest) html_put(h, "<code>");
        html_text(h, v->valuestring);
        if (digest) html_put(h, "</code>");
    } else {
        html_put(h, cJSON_IsTrue(v) ? "yes" : cJSON_IsFalse(v) ? "no" : "none");
    }
}

static void words(struct html *h, const char *key) { /* low_rank: low rank */
    char text[160];
    snprintf(text, sizeof text, "%s", key);
    for (char *p = text; *p; p++)
        if (*p == '_') *p = ' ';
    html_text(h, text);
}

/* Rows of scalars; what lies deeper gets the path as its name. */
static void rows_of(struct html *h, const cJSON *o, const char *prefix, int depth) {
    const cJSON *item;
    int n = 0;
    if (depth > 5) return;
    cJSON_ArrayForEach(item, o) {
        char name[160];
        if (item->string)
            snprintf(name, sizeof name, "%s%s%s", prefix, *prefix ? " / " : "", item->string);
        else
            snprintf(name, sizeof name, "%s %d", prefix, ++n);
        if ((cJSON_IsObject(item) || cJSON_IsArray(item)) && item->child) {
            rows_of(h, item, name, depth + 1);
            continue;
        }
        html_put(h, "<tr><th>");
        words(h, name);
        html_put(h, "</th><td>");
        value_cell(h, item);
        html_put(h, "</td></tr>");
    }
}

static void details(struct html *h, const char *title, const cJSON *o) {
    if (!o || !o->child) return;
    html_put(h, "<div><h3>%s</h3><div class=\"wide\"><table><tbody>", title);
    rows_of(h, o, "", 0);
    html_put(h, "</tbody></table></div></div>");
}

static void recipe(struct html *h, const cJSON *document) {
    const cJSON *model = sheet_at(document, "model"),
                *conversion = sheet_at(document, "conversion");
    if (!sheet_at(model, "attention") && !conversion) return;
    sheet_open_section(
        h, "Recipe, text and digests",
        "Everything that decides the result: the same base, text and recipe give the same bytes.");
    html_put(h, "<div class=\"keys\">");
    details(h, "Attention", sheet_at(model, "attention"));
    details(h, "Base", sheet_at(model, "base"));
    details(h, "Files of the base", sheet_at(conversion, "made_from.base_files"));
    if (conversion) {
        details(h, "Attention transfer", sheet_at(conversion, "made_from.attention_transfer"));
        details(h, "Fine-tuning", sheet_at(conversion, "made_from.finetune"));
        details(h, "Text", sheet_at(conversion, "made_from.text"));
    } else {
        details(h, "Training", sheet_at(model, "training"));
        details(h, "Quality as recorded", sheet_at(model, "quality"));
    }
    html_put(h, "</div>");
    sheet_close_section(h);
}

char *sheet_html(const cJSON *document) {
    struct html h = {0};
    const cJSON *conversion = sheet_at(document, "conversion"),
                *quality = sheet_at(document, "quality");
    const char *verdict = sheet_string(quality, "linear_branch");
    head(&h, document);
    if (verdict) {
        html_put(&h, "<p class=\"warn\">");
        html_text(&h, verdict);
        html_put(&h, "</p>");
    }
    tiles(&h, conversion, quality);
    sheet_quality(&h, quality);
    sheet_curves(&h, conversion);
    sheet_maps(&h, conversion, quality);
    const cJSON *measured = sheet_at(reader_that(quality, false), "heads");
    sheet_pictures(&h, measured ? measured : sheet_at(conversion, "heads"));
    recipe(&h, document);
    html_put(&h, "</main></body></html>\n");
    if (!h.failed) return h.text;
    free(h.text);
    return NULL;
}

/* ---- documents and files ---- */
static cJSON *load(const char *folder, const char *name) {
    char *path = path_join(folder, name), msg[200];
    struct mapped file;
    cJSON *json = NULL;
    if (path && !mapped_open(&file, path, msg, sizeof msg)) {
        if (file.len) json = cJSON_ParseWithLength((const char *)file.bytes, file.len);
        mapped_close(&file);
    }
    free(path);
    return json;
}

cJSON *sheet_document(const char *folder, const cJSON *quality) {
    cJSON *o = cJSON_CreateObject(), *model = load(folder, "urchin.json"),
          *conversion = load(folder, "conversion.json");
    if (model) cJSON_AddItemToObject(o, "model", model);
    if (conversion) cJSON_AddItemToObject(o, "conversion", conversion);
    if (quality) cJSON_AddItemToObject(o, "quality", cJSON_Duplicate(quality, true));
    return o;
}

/* path, which ends in .html, cut into a folder and the JSON's name; owned by the caller. */
static enum err cut_path(const char *path, char **folder, char **json, char *msg, size_t msg_len) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    size_t n = strlen(name);
    *folder = *json = NULL;
    if (n < 6 || strcmp(name + n - 5, ".html"))
        return err_set(msg, msg_len, ERR_ARG, "'%s': the page's name must end in .html", path);
    *folder = slash ? strndup(path, (size_t)(slash - path) + (slash == path)) : strdup(".");
    *json = strdup(name);
    if (!*folder || !*json) return err_set(msg, msg_len, ERR_NOMEM, "out of memory for the report");
    strcpy(*json + n - 5, ".json");
    return OK;
}

/* Would writing this JSON take a file that is none of ours? */
static bool is_others(const char *folder, const char *json) {
    char *path = path_join(folder, json);
    bool there = path && access(path, F_OK) == 0;
    free(path);
    cJSON *was = there ? load(folder, json) : NULL;
    bool ours = cJSON_IsArray(sheet_at(sheet_at(was, "quality"), "readers"));
    cJSON_Delete(was);
    return (there && !ours) || !strcmp(json, "conversion.json");
}

enum err sheet_check(const char *path, char *msg, size_t msg_len) {
    char *folder, *json;
    enum err e = cut_path(path, &folder, &json, msg, msg_len);
    if (!e && access(folder, W_OK))
        e = err_set(msg, msg_len, ERR_IO, "cannot write '%s': %s", path, strerror(errno));
    if (!e && is_others(folder, json))
        e = err_set(msg, msg_len, ERR_ARG,
                    "'%s': its JSON would be written over %s; name it quality.html", path, json);
    free(folder);
    free(json);
    return e;
}

enum err sheet_write(const char *path, const cJSON *document, char *msg, size_t msg_len) {
    char *folder = NULL, *json = NULL;
    enum err e = sheet_at(document, "quality") ? sheet_check(path, msg, msg_len) : OK;
    if (!e) e = cut_path(path, &folder, &json, msg, msg_len);
    char *text = e ? NULL : sheet_html(document);
    if (!e && !text) e = err_set(msg, msg_len, ERR_NOMEM, "out of memory for the report");
    if (!e) {
        const char *slash = strrchr(path, '/');
        struct part part = {text, strlen(text)};
        e = file_replace(folder, slash ? slash + 1 : path, &part, 1, msg, msg_len);
        if (!e && strcmp(json, "conversion.json"))
            e = file_replace_json(folder, json, document, msg, msg_len);
    }
    free(folder);
    free(json);
    free(text);
    return e;
}
