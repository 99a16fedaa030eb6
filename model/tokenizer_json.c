/* tokenizer_json.c - Hugging Face's tokenizer.json and tokenizer_config.json.
 *
 * What the format can say and we do not do is refused by name: a tokenizer that is nearly right
 * would make a model that is quietly worse. */
#include "config/json.h"
#include "model/tokenizer_impl.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct reader {
    struct tokenizer *t;
    const char *name; /* of the file being read, for messages */
    int32_t template_bos,
        template_eos; /* what the post-processor puts around a text; -1: nothing */
    double growth;    /* of texts, by what edits put into them */
    char *msg;
    size_t msg_len;
};

#define FAULT(r, ...) err_set((r)->msg, (r)->msg_len, ERR_FORMAT, __VA_ARGS__)

static bool is(const char *a, const char *b) {
    return a && strcmp(a, b) == 0;
}

static const char *type_of(const struct json *node) {
    const char *type = json_string(json_get(node, "type"));
    return type ? type : "(none)";
}

static int32_t find(const struct reader *r, const char *piece) {
    return vocab_find(r->t, piece, strlen(piece));
}

/* ---- vocabulary ---- */

static enum err read_vocab(struct reader *r, const struct json *vocab) {
    if (json_type(vocab) != JSON_OBJECT)
        return FAULT(r, "%s: model.vocab is not an object", r->name);
    for (const struct json *entry = json_child(vocab); entry; entry = json_next(entry)) {
        const char *piece = json_key(entry);
        int64_t id;
        if (!json_int(entry, &id) || id < 0 || id > MAX_TOKEN_ID)
            return FAULT(r, "%s: model.vocab gives \"%.80s\" an id that is not in 0 .. %d", r->name,
                         piece, MAX_TOKEN_ID);
        if (id < r->t->n_tokens && r->t->tokens[id].kind != TOKEN_NONE)
            return FAULT(r, "%s: model.vocab gives id %d to \"%.80s\" and to \"%.80s\"", r->name,
                         (int)id, token_piece(r->t, (int32_t)id), piece);
        if (!vocab_add(r->t, (int32_t)id, piece, strlen(piece), TOKEN_TEXT)) return ERR_NOMEM;
    }
    return vocab_index(r->t) ? OK : ERR_NOMEM;
}

static enum err read_added_tokens(struct reader *r, const struct json *list) {
    struct tokenizer *t = r->t;
    for (const struct json *entry = json_child(list); entry; entry = json_next(entry)) {
        const char *content = json_string(json_get(entry, "content"));
        if (!content) return FAULT(r, "%s: an entry of added_tokens has no content", r->name);
        int64_t given;
        int32_t id = find(r, content); /* the vocabulary's id wins, as it does there */
        if (id < 0) {
            if (!json_int(json_get(entry, "id"), &given) || given < 0 || given > MAX_TOKEN_ID)
                return FAULT(r, "%s: added token \"%.80s\" has an id that is not in 0 .. %d",
                             r->name, content, MAX_TOKEN_ID);
            id = (int32_t)given;
            if (id < t->n_tokens && t->tokens[id].kind != TOKEN_NONE) {
                if (is(token_piece(t, id), content)) continue; /* listed twice */
                return FAULT(r, "%s: added token \"%.80s\" has the id %d of \"%.80s\"", r->name,
                             content, (int)id, token_piece(t, id));
            }
            if (!vocab_add(t, id, content, strlen(content), TOKEN_ADDED)) return ERR_NOMEM;
        }
        if (json_bool(json_get(entry, "single_word"), false))
            return FAULT(r, "%s: added token \"%.80s\" has single_word, which is not supported",
                         r->name, content);
        bool special = json_bool(json_get(entry, "special"), false);
        struct token *token = &t->tokens[id];
        token->kind = special ? TOKEN_SPECIAL : TOKEN_ADDED;
        token->normalized = json_bool(json_get(entry, "normalized"), !special);
        token->take_left_space = json_bool(json_get(entry, "lstrip"), false);
        token->take_right_space = json_bool(json_get(entry, "rstrip"), false);
    }
    return vocab_index(t) ? OK : ERR_NOMEM;
}

static enum err read_merges(struct reader *r, const struct json *list) {
    struct tokenizer *t = r->t;
    if (json_type(list) != JSON_ARRAY) return FAULT(r, "%s: model.merges is not an array", r->name);
    enum err e = merges_reserve(t, (size_t)json_size(list));
    struct bytes joined = {0};
    uint32_t rank = 0;
    for (const struct json *entry = json_child(list); entry && e == OK;
         entry = json_next(entry), rank++) {
        const char *left = json_string(entry), *right = NULL;
        size_t left_len = 0, right_len = 0;
        if (left) { /* "left right" */
            right = *left ? strchr(left + 1, ' ') : NULL;
            if (right) left_len = (size_t)(right++ - left);
        } else if (json_size(entry) == 2) { /* ["left", "right"] */
            left = json_string(json_child(entry));
            right = json_string(json_next(json_child(entry)));
            if (left) left_len = strlen(left);
        }
        if (!left || !right) {
            e = FAULT(r, "%s: model.merges[%u] is not a pair of tokens", r->name, rank);
            break;
        }
        right_len = strlen(right);
        joined.len = 0;
        if (!bytes_add(&joined, left, left_len) || !bytes_add(&joined, right, right_len)) {
            e = ERR_NOMEM;
            break;
        }
        int32_t a = vocab_find(t, left, left_len), b = vocab_find(t, right, right_len);
        int32_t result = vocab_find(t, joined.data, joined.len);
        if (a < 0 || b < 0 || result < 0)
            e = FAULT(r,
                      "%s: model.merges[%u] joins \"%.*s\" and \"%.80s\", but %s is not in the "
                      "vocabulary",
                      r->name, rank, (int)(left_len < 80 ? left_len : 80), left, right,
                      a < 0   ? "the first"
                      : b < 0 ? "the second"
                              : "the result");
        else
            merges_add(t, a, b, result, rank);
    }
    free(joined.data);
    return e;
}

/* ---- normaliser and pre-tokenizer ---- */

/* {"String": text} or {"Regex": pattern} */
static const char *pattern_of(const struct json *pattern, bool *literal) {
    const char *text = json_string(json_get(pattern, "String"));
    *literal = text != NULL;
    return text ? text : json_string(json_get(pattern, "Regex"));
}

/* How many times longer replacements may make a text: real files come to 4, a hostile one could ask
 * for any. */
enum { MAX_GROWTH = 1024 };

static enum err add_edit(struct reader *r, struct edit_list *list, enum edit_kind kind,
                         const char *text, const char *pattern, bool literal) {
    r->growth *= (double)strlen(text) + 1;
    if (r->growth > MAX_GROWTH)
        return FAULT(r, "%s: the normalizer can make texts over %d times longer with \"%.40s\"",
                     r->name, MAX_GROWTH, text);
    struct edit *edit = edit_add(list, kind, text, strlen(text));
    if (!edit) return ERR_NOMEM;
    if (!pattern) return OK;
    return pattern_compile(&edit->pattern, pattern, strlen(pattern), literal, r->name, r->msg,
                           r->msg_len);
}

static const char space_mark[] = "\xE2\x96\x81"; /* U+2581 */

static enum err read_normalizer(struct reader *r, const struct json *node) {
    struct edit_list *list = &r->t->normalizer;
    if (json_type(node) == JSON_NULL) return OK;
    const char *type = type_of(node);
    if (is(type, "Sequence")) {
        const struct json *step = json_child(json_get(node, "normalizers"));
        enum err e = OK;
        for (; step && e == OK; step = json_next(step))
            e = read_normalizer(r, step);
        return e;
    }
    if (is(type, "Prepend")) {
        const char *text = json_string(json_get(node, "prepend"));
        if (!text) return FAULT(r, "%s: normalizer Prepend has no prepend", r->name);
        if (is(text, space_mark) || is(text, " ")) r->t->prefix_space = true;
        return add_edit(r, list, EDIT_PREPEND, text, NULL, false);
    }
    if (is(type, "Replace")) {
        bool literal;
        const char *pattern = pattern_of(json_get(node, "pattern"), &literal);
        const char *content = json_string(json_get(node, "content"));
        if (!pattern || !content)
            return FAULT(r, "%s: normalizer Replace lacks a pattern or content", r->name);
        if (literal && is(pattern, " ") && is(content, space_mark)) r->t->space_mark = true;
        return add_edit(r, list, EDIT_REPLACE, content, pattern, literal);
    }
    if (is(type, "NFC") || is(type, "NFD") || is(type, "NFKC") || is(type, "NFKD")) {
        struct edit *edit = edit_add(list, EDIT_NORMALIZE, "", 0);
        if (!edit) return ERR_NOMEM;
        edit->compose = type[strlen(type) - 1] == 'C';
        edit->compatible = type[2] == 'K';
        return OK;
    }
    return FAULT(r,
                 "%s: normalizer %.40s is not supported (Prepend, Replace, NFC, NFD, NFKC, NFKD "
                 "and Sequence are)",
                 r->name, type);
}

static enum err add_split(struct reader *r, const char *pattern, bool literal,
                          enum split_behavior behavior, bool invert) {
    return split_add(r->t, pattern, strlen(pattern), literal, behavior, invert, r->name, r->msg,
                     r->msg_len);
}

static enum err read_split(struct reader *r, const struct json *node) {
    static const char *const behaviors[] = {
        [SPLIT_ISOLATED] = "Isolated",
        [SPLIT_REMOVED] = "Removed",
        [SPLIT_MERGED_WITH_PREVIOUS] = "MergedWithPrevious",
        [SPLIT_MERGED_WITH_NEXT] = "MergedWithNext",
        [SPLIT_CONTIGUOUS] = "Contiguous",
    };
    bool literal;
    const char *pattern = pattern_of(json_get(node, "pattern"), &literal);
    if (!pattern) return FAULT(r, "%s: pre_tokenizer Split has no pattern", r->name);
    const char *name = json_string(json_get(node, "behavior"));
    for (int b = SPLIT_ISOLATED; b <= SPLIT_CONTIGUOUS; b++)
        if (is(name, behaviors[b]))
            return add_split(r, pattern, literal, (enum split_behavior)b,
                             json_bool(json_get(node, "invert"), false));
    return FAULT(r, "%s: pre_tokenizer Split has behavior %.40s, which is not known", r->name,
                 name ? name : "(none)");
}

static enum err read_byte_level(struct reader *r, const struct json *node) {
    struct tokenizer *t = r->t;
    t->byte_level = true;
    if (json_bool(json_get(node, "add_prefix_space"), true)) {
        if (t->n_splits)
            return FAULT(r,
                         "%s: pre_tokenizer ByteLevel with add_prefix_space behind another step is "
                         "not supported",
                         r->name);
        t->prefix_space = true;
        enum err e = add_edit(r, &t->pre_edits, EDIT_PREPEND_ONCE, " ", NULL, false);
        if (e != OK) return e;
    }
    if (!json_bool(json_get(node, "use_regex"), true)) return OK;
    return add_split(r, split_gpt2, false, SPLIT_ISOLATED, false);
}

static enum err read_metaspace(struct reader *r, const struct json *node) {
    struct tokenizer *t = r->t;
    const char *mark = json_string(json_get(node, "replacement"));
    if (mark && !is(mark, space_mark))
        return FAULT(
            r,
            "%s: pre_tokenizer Metaspace with replacement \"%.20s\" is not supported (U+2581 is)",
            r->name, mark);
    if (t->n_splits || t->pre_edits.n)
        return FAULT(r, "%s: pre_tokenizer Metaspace behind another step is not supported",
                     r->name);
    t->space_mark = true;
    enum err e = add_edit(r, &t->pre_edits, EDIT_REPLACE, space_mark, " ", true);
    const char *scheme = json_string(json_get(node, "prepend_scheme"));
    if (!scheme) /* as files had it before prepend_scheme */
        scheme = json_bool(json_get(node, "add_prefix_space"), true) ? "always" : "never";
    if (e == OK && !is(scheme, "never")) {
        if (!is(scheme, "always") && !is(scheme, "first"))
            return FAULT(r,
                         "%s: pre_tokenizer Metaspace has prepend_scheme %.40s, which is not known",
                         r->name, scheme);
        t->prefix_space = true;
        enum edit_kind kind = is(scheme, "first") ? EDIT_PREPEND_FIRST : EDIT_PREPEND_ONCE;
        e = add_edit(r, &t->pre_edits, kind, space_mark, NULL, false);
    }
    if (e == OK && json_bool(json_get(node, "split"), true))
        e = add_split(r, space_mark, true, SPLIT_MERGED_WITH_NEXT, false);
    return e;
}

static enum err read_pre_tokenizer(struct reader *r, const struct json *node) {
    if (json_type(node) == JSON_NULL) return OK;
    const char *type = type_of(node);
    if (is(type, "Sequence")) {
        const struct json *step = json_child(json_get(node, "pretokenizers"));
        enum err e = OK;
        for (; step && e == OK; step = json_next(step))
            e = read_pre_tokenizer(r, step);
        return e;
    }
    /* ByteLevel rewrites the text in its alphabet: patterns behind it would see that. */
    if (r->t->byte_level)
        return FAULT(r, "%s: pre_tokenizer %.40s behind ByteLevel is not supported", r->name, type);
    if (is(type, "ByteLevel")) return read_byte_level(r, node);
    if (is(type, "Metaspace")) return read_metaspace(r, node);
    if (is(type, "Split")) return read_split(r, node);
    if (is(type, "Digits"))
        return add_split(
            r, json_bool(json_get(node, "individual_digits"), false) ? "\\p{N}" : "\\p{N}+", false,
            SPLIT_ISOLATED, false);
    return FAULT(r,
                 "%s: pre_tokenizer %.40s is not supported (ByteLevel, Split, Digits, Metaspace "
                 "and Sequence are)",
                 r->name, type);
}

/* ---- post-processor ---- */

static enum err read_template(struct reader *r, const struct json *single) {
    bool behind_text = false;
    for (const struct json *part = json_child(single); part; part = json_next(part)) {
        if (json_get(part, "Sequence")) {
            behind_text = true;
            continue;
        }
        const char *piece = json_string(json_get(json_get(part, "SpecialToken"), "id"));
        int32_t id = piece ? find(r, piece) : -1;
        int32_t *place = behind_text ? &r->template_eos : &r->template_bos;
        if (id < 0)
            return FAULT(r, "%s: post_processor names \"%.80s\", which is not a token", r->name,
                         piece ? piece : "");
        if (*place >= 0)
            return FAULT(
                r, "%s: post_processor puts more than one token %s a text, which is not supported",
                r->name, behind_text ? "behind" : "in front of");
        *place = id;
    }
    return OK;
}

static enum err read_post_processor(struct reader *r, const struct json *node) {
    if (json_type(node) == JSON_NULL) return OK;
    const char *type = type_of(node);
    if (is(type, "Sequence")) {
        const struct json *step = json_child(json_get(node, "processors"));
        enum err e = OK;
        for (; step && e == OK; step = json_next(step))
            e = read_post_processor(r, step);
        return e;
    }
    if (is(type, "ByteLevel")) return OK; /* offsets only */
    if (is(type, "TemplateProcessing")) return read_template(r, json_get(node, "single"));
    return FAULT(r,
                 "%s: post_processor %.40s is not supported (TemplateProcessing, ByteLevel and "
                 "Sequence are)",
                 r->name, type);
}

/* ---- tokenizer_config.json ---- */

static enum err read_special(struct reader *r, const struct json *config, const char *key,
                             int32_t *id) {
    const struct json *node = json_get(config, key);
    const char *piece =
        json_string(json_type(node) == JSON_OBJECT ? json_get(node, "content") : node);
    if (!piece) return OK;
    *id = find(r, piece);
    if (*id < 0) return FAULT(r, "%s: %s \"%.80s\" is not in the vocabulary", r->name, key, piece);
    return OK;
}

static enum err set_chat_template(struct tokenizer *t, const char *text) {
    free(t->chat_template);
    t->chat_template = strdup(text);
    return t->chat_template ? OK : ERR_NOMEM;
}

static enum err read_chat_template(struct reader *r, const struct json *node) {
    if (json_string(node)) return set_chat_template(r->t, json_string(node));
    for (const struct json *entry = json_child(node); entry; entry = json_next(entry)) {
        const char *text = json_string(json_get(entry, "template"));
        if (text && is(json_string(json_get(entry, "name")), "default"))
            return set_chat_template(r->t, text);
    }
    return OK;
}

/* config may be NULL. */
static enum err read_config(struct reader *r, const struct json *config) {
    struct tokenizer *t = r->t;
    enum err e = read_special(r, config, "bos_token", &t->bos);
    if (e == OK) e = read_special(r, config, "eos_token", &t->eos);
    if (e == OK) e = read_chat_template(r, json_get(config, "chat_template"));
    if (e != OK) return e;
    if (t->bos < 0) t->bos = r->template_bos;
    if (t->eos < 0) t->eos = r->template_eos;
    t->add_bos = json_bool(json_get(config, "add_bos_token"), r->template_bos >= 0);
    t->add_eos = json_bool(json_get(config, "add_eos_token"), r->template_eos >= 0);
    if (t->add_bos && r->template_bos >= 0 && r->template_bos != t->bos)
        return FAULT(r,
                     "%s: bos_token is \"%.80s\", but the post_processor puts \"%.80s\" in front",
                     r->name, token_piece(t, t->bos), token_piece(t, r->template_bos));
    if (t->add_eos && r->template_eos >= 0 && r->template_eos != t->eos)
        return FAULT(r, "%s: eos_token is \"%.80s\", but the post_processor puts \"%.80s\" behind",
                     r->name, token_piece(t, t->eos), token_piece(t, r->template_eos));
    return OK;
}

/* ---- the whole ---- */

static enum err read_model(struct reader *r, const struct json *model) {
    struct tokenizer *t = r->t;
    if (json_type(model) != JSON_OBJECT) return FAULT(r, "%s: there is no model", r->name);
    const struct json *type = json_get(model, "type");
    if (json_string(type) ? !is(json_string(type), "BPE") : !json_get(model, "merges"))
        return FAULT(r, "%s: model type %.40s is not supported (BPE is)", r->name, type_of(model));
    if (json_number(json_get(model, "dropout"), 0) != 0)
        return FAULT(r, "%s: model.dropout is not supported", r->name);
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (int i = 0; i < 2; i++) {
        const char *affix = json_string(json_get(model, affixes[i]));
        if (affix && *affix)
            return FAULT(r, "%s: model.%s \"%.40s\" is not supported", r->name, affixes[i], affix);
    }
    t->byte_fallback = json_bool(json_get(model, "byte_fallback"), false) && !t->byte_level;
    t->fuse_unknown = json_bool(json_get(model, "fuse_unk"), false);
    t->ignore_merges = json_bool(json_get(model, "ignore_merges"), false);
    return read_special(r, model, "unk_token", &t->unknown);
}

static enum err read_all(struct reader *r, const struct json *root, const char *config_name,
                         const struct json *config) {
    const struct json *model = json_get(root, "model");
    enum err e = read_pre_tokenizer(r, json_get(root, "pre_tokenizer"));
    if (e == OK) e = read_normalizer(r, json_get(root, "normalizer"));
    if (e == OK) e = read_vocab(r, json_get(model, "vocab"));
    if (e == OK) e = read_added_tokens(r, json_get(root, "added_tokens"));
    if (e == OK) e = read_model(r, model);
    if (e == OK) e = read_post_processor(r, json_get(root, "post_processor"));
    if (e != OK) return e;
    const char *name = r->name;
    r->name = config_name;
    e = read_config(r, config);
    r->name = name;
    if (e == OK) e = vocab_finish(r->t);
    return e == OK ? read_merges(r, json_get(model, "merges")) : e;
}

static enum err open_nodes(struct tokenizer **out, const char *name, const struct json *root,
                           const char *config_name, const struct json *config, char *msg,
                           size_t msg_len) {
    struct reader r = {NULL, name, -1, -1, 1, msg, msg_len};
    enum err e = tokenizer_new(&r.t);
    if (e == OK) e = read_all(&r, root, config_name, config);
    if (e == ERR_NOMEM) err_set(msg, msg_len, e, "%s: out of memory", name);
    if (e != OK)
        tokenizer_free(r.t);
    else
        *out = r.t;
    return e;
}

enum err tokenizer_open_text(struct tokenizer **out, const char *json, size_t len,
                             const char *config_json, size_t config_len, char *msg,
                             size_t msg_len) {
    struct json *root = NULL, *config = NULL;
    enum err e = json_parse(&root, json, len, "tokenizer.json", msg, msg_len);
    if (e == OK && config_json)
        e = json_parse(&config, config_json, config_len, "tokenizer_config.json", msg, msg_len);
    if (e == OK)
        e = open_nodes(out, "tokenizer.json", root, "tokenizer_config.json", config, msg, msg_len);
    json_free(root);
    json_free(config);
    return e;
}

/* chat_template.jinja beside tokenizer.json is where newer folders keep it.  No file is no error.
 */
static enum err read_jinja(struct tokenizer *t, const char *path, char *msg, size_t msg_len) {
    enum { MAX_BYTES = 1 << 20 };
    FILE *f = fopen(path, "rb");
    if (!f) return OK;
    struct bytes b = {0};
    enum err e = bytes_reserve(&b, MAX_BYTES) ? OK : ERR_NOMEM;
    if (e == OK) {
        b.len = fread(b.data, 1, MAX_BYTES, f);
        if (ferror(f))
            e = err_set(msg, msg_len, ERR_IO, "%s: %s", path, strerror(errno));
        else if (b.len == MAX_BYTES)
            e = err_set(msg, msg_len, ERR_FORMAT, "%s: 1 MiB or more", path);
        else
            b.data[b.len] = 0;
    }
    if (e == OK) e = set_chat_template(t, b.data);
    free(b.data);
    fclose(f);
    return e;
}

enum err tokenizer_open_json(struct tokenizer **out, const char *folder, char *msg,
                             size_t msg_len) {
    char *path = NULL, *config_path = NULL, *jinja_path = NULL;
    struct json *root = NULL, *config = NULL;
    struct tokenizer *t = NULL;
    enum err e = ERR_NOMEM;
    if (asprintf(&path, "%s/tokenizer.json", folder) < 0) path = NULL;
    if (asprintf(&config_path, "%s/tokenizer_config.json", folder) < 0) config_path = NULL;
    if (asprintf(&jinja_path, "%s/chat_template.jinja", folder) < 0) jinja_path = NULL;
    if (!path || !config_path || !jinja_path) goto done;
    e = json_load(&root, path, msg, msg_len);
    if (e != OK) goto done;
    FILE *config_file = fopen(config_path, "rb");
    if (config_file) {
        fclose(config_file);
        e = json_load(&config, config_path, msg, msg_len);
        if (e != OK) goto done;
    }
    e = open_nodes(&t, path, root, config_path, config, msg, msg_len);
    if (e == OK) e = read_jinja(t, jinja_path, msg, msg_len);
    if (e == OK) {
        *out = t;
        t = NULL;
    }
done:
    tokenizer_free(t);
    json_free(root);
    json_free(config);
    free(path);
    free(config_path);
    free(jinja_path);
    return e;
}
