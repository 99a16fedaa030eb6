/* corpus.c - files become documents, documents become packs.  Files stay mapped, and only what a
 * pack takes is tokenised. */
#include "convert/corpus.h"

#include "config/json.h"
#include "convert/recall_text.h"
#include "model/base.h"
#include "model/mapped.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

struct source {
    char *path;
    struct mapped file;
    char sha256[SHA256_HEX];
};

struct document {
    int source;
    bool jsonl;
    size_t at, len;
    uint64_t before; /* bytes of all documents before it */
};

struct corpus {
    struct corpus_options options;
    struct source *sources;
    struct document *documents;
    size_t n_sources, n_documents, room;
    uint64_t bytes;
    char digest[SHA256_HEX];
};

/* What opening gathers on its way. */
struct opening {
    struct corpus *c;
    char *msg;
    size_t msg_len;
};
#define FAIL(o, code, ...) err_set((o)->msg, (o)->msg_len, code, __VA_ARGS__)

static enum err no_memory(struct opening *o) {
    return FAIL(o, ERR_NOMEM, "--text: out of memory");
}

/* ---- documents ---- */
static enum err add_document(struct opening *o, bool jsonl, size_t at, size_t len) {
    struct corpus *c = o->c;
    if (!len) return OK;
    if (c->n_documents == c->room) {
        size_t room = c->room ? 2 * c->room : 64;
        struct document *more = realloc(c->documents, room * sizeof *more);
        if (!more) return no_memory(o);
        c->documents = more;
        c->room = room;
    }
    c->documents[c->n_documents++] =
        (struct document){(int)c->n_sources - 1, jsonl, at, len, c->bytes};
    c->bytes += len;
    return OK;
}

struct ids {
    int32_t *at; /* owned */
    size_t n;
};

/* A conversation in the model's chat format; most: bytes that are taken of each message. */
static enum err messages_ids(const struct corpus *c, const struct json *messages, size_t most,
                             struct ids *out, char *msg, size_t msg_len) {
    size_t n = (size_t)json_size(messages), i = 0;
    struct chat_message *list = calloc(n + 1, sizeof *list);
    if (!list) return ERR_NOMEM;
    for (const struct json *m = json_child(messages); m; m = json_next(m), i++) {
        const char *content = json_string(json_get(m, "content"));
        size_t len = strlen(content);
        list[i] = (struct chat_message){json_string(json_get(m, "role")), content,
                                        len < most ? len : most};
    }
    enum err e =
        chat_render(c->options.chat, list, n, false, false, &out->at, &out->n, msg, msg_len);
    free(list);
    return e;
}

/* Can the chat format place its roles?  Contents make no difference, so they are cut short. */
static enum err check_messages(struct opening *o, const struct json *messages, const char *where) {
    char why[300] = "";
    struct ids ids = {0};
    enum err e = messages_ids(o->c, messages, 1, &ids, why, sizeof why);
    free(ids.at);
    if (e == ERR_NOMEM) return no_memory(o);
    return e ? FAIL(o, ERR_FORMAT, "%s: %s", where, why) : OK;
}

/* Is a line of JSON one of the two kinds?  Whatever it holds is looked at again when it is drawn.
 */
static enum err check_line(struct opening *o, const char *line, size_t len, const char *where) {
    struct json *root = NULL;
    enum err e = json_parse(&root, line, len, where, o->msg, o->msg_len);
    if (e) return e;
    const struct json *messages = json_get(root, "messages");
    bool good = json_string(json_get(root, "text")) || json_type(messages) == JSON_ARRAY;
    for (const struct json *m = json_child(messages); good && m; m = json_next(m))
        good = json_string(json_get(m, "role")) && json_string(json_get(m, "content"));
    bool chat = good && !json_string(json_get(root, "text"));
    if (chat) e = check_messages(o, messages, where);
    json_free(root);
    if (good) return e;
    return FAIL(o, ERR_FORMAT,
                "%s: neither \"text\" nor \"messages\" with a role and a content each", where);
}

static size_t byte_order_mark(const struct source *s) { /* bytes of it in front */
    return s->file.len >= 3 && !memcmp(s->file.bytes, "\xEF\xBB\xBF", 3) ? 3 : 0;
}

static enum err add_lines(struct opening *o, const struct source *s) {
    const char *text = s->file.bytes;
    size_t number = 0;
    for (size_t at = byte_order_mark(s), len; at < s->file.len; at += len + 1) {
        const char *end = memchr(text + at, '\n', s->file.len - at);
        len = end ? (size_t)(end - text) - at : s->file.len - at;
        size_t used = len;
        while (used && strchr(" \t\r", text[at + used - 1]))
            used--;
        char where[PATH_MAX + 32];
        snprintf(where, sizeof where, "%s:%zu", s->path, ++number);
        if (!used) continue;
        enum err e = check_line(o, text + at, used, where);
        if (!e) e = add_document(o, true, at, used);
        if (e) return e;
    }
    return OK;
}

static bool ends_with(const char *name, const char *end) {
    size_t n = strlen(name), m = strlen(end);
    return n >= m && !strcmp(name + n - m, end);
}

static enum err add_file(struct opening *o, const char *path, bool named) {
    struct corpus *c = o->c;
    struct source *more = realloc(c->sources, (c->n_sources + 1) * sizeof *more);
    if (!more) return no_memory(o);
    c->sources = more;
    struct source *s = &more[c->n_sources];
    *s = (struct source){0};
    enum err e = mapped_open(&s->file, path, o->msg, o->msg_len);
    if (e) return e;
    size_t head = s->file.len < 8192 ? s->file.len : 8192;
    if (head && memchr(s->file.bytes, 0, head)) {
        mapped_close(&s->file);
        if (!named) return OK; /* a picture among the texts of a folder */
        return FAIL(o, ERR_FORMAT, "--text: '%s' is no text, it holds zero bytes", path);
    }
    c->n_sources++;
    if (!(s->path = strdup(path))) return no_memory(o);
    sha256_hex(s->file.len ? s->file.bytes : "", s->file.len, s->sha256);
    if (ends_with(path, ".jsonl")) return add_lines(o, s);
    size_t mark = byte_order_mark(s);
    return add_document(o, false, mark, s->file.len - mark);
}

static enum err add_path(struct opening *o, const char *path, bool named, int depth);

static int visible(const struct dirent *entry) {
    return entry->d_name[0] != '.';
}

static int by_name(const struct dirent **a, const struct dirent **b) { /* in every locale alike */
    return strcmp((*a)->d_name, (*b)->d_name);
}

static enum err add_folder(struct opening *o, const char *path, int depth) {
    struct dirent **entries;
    int n = scandir(path, &entries, visible, by_name);
    if (n < 0) return FAIL(o, ERR_IO, "--text: cannot read '%s': %s", path, strerror(errno));
    enum err e = OK;
    for (int i = 0; i < n; i++) {
        char *child = e ? NULL : path_join(path, entries[i]->d_name);
        if (!e) e = child ? add_path(o, child, false, depth + 1) : no_memory(o);
        free(child);
        free(entries[i]);
    }
    free(entries);
    return e;
}

static enum err add_path(struct opening *o, const char *path, bool named, int depth) {
    struct stat st;
    if (stat(path, &st)) {
        if (!named) return OK; /* a link to nothing */
        return FAIL(o, ERR_IO, "--text: cannot open '%s': %s", path, strerror(errno));
    }
    if (S_ISDIR(st.st_mode)) {
        if (depth > 32) return FAIL(o, ERR_IO, "--text: '%s' lies 32 folders deep", path);
        return add_folder(o, path, depth);
    }
    if (!S_ISREG(st.st_mode) && !named) return OK;
    return add_file(o, path, named);
}

static enum err take_digest(struct opening *o) {
    struct corpus *c = o->c;
    char *all = malloc(c->n_sources * (SHA256_HEX - 1) + 1);
    if (!all) return no_memory(o);
    for (size_t i = 0; i < c->n_sources; i++)
        memcpy(all + i * (SHA256_HEX - 1), c->sources[i].sha256, SHA256_HEX - 1);
    sha256_hex(all, c->n_sources * (SHA256_HEX - 1), c->digest);
    free(all);
    return OK;
}

enum err corpus_open(struct corpus **out, const struct corpus_options *options, char *msg,
                     size_t msg_len) {
    struct opening o = {calloc(1, sizeof *o.c), msg, msg_len};
    if (!o.c) return no_memory(&o);
    o.c->options = *options;
    enum err e = OK;
    for (const char *p = options->sources; !e && *p; p += strcspn(p, ",") + !!strchr(p, ',')) {
        char *path = strndup(p, strcspn(p, ","));
        e = path ? add_path(&o, path, true, 0) : no_memory(&o);
        free(path);
    }
    if (!e && !o.c->n_documents)
        e = FAIL(&o, ERR_ARG, "--text: there is no text in '%s'", options->sources);
    if (!e) e = take_digest(&o);
    if (e)
        corpus_close(o.c);
    else
        *out = o.c;
    return e;
}

void corpus_close(struct corpus *c) {
    if (!c) return;
    for (size_t i = 0; i < c->n_sources; i++) {
        mapped_close(&c->sources[i].file);
        free(c->sources[i].path);
    }
    free(c->sources);
    free(c->documents);
    free(c);
}

const char *corpus_digest(const struct corpus *c) {
    return c->digest;
}

cJSON *corpus_json(const struct corpus *c) {
    enum { LISTED = 100 };
    cJSON *o = cJSON_CreateObject();
    cJSON_AddNumberToObject(o, "documents", (double)c->n_documents);
    cJSON_AddNumberToObject(o, "bytes", (double)c->bytes);
    cJSON_AddNumberToObject(o, "files", (double)c->n_sources);
    cJSON_AddStringToObject(o, "sha256", c->digest);
    cJSON *list = cJSON_AddArrayToObject(o, "first_files");
    for (size_t i = 0; i < c->n_sources && i < LISTED; i++) {
        cJSON *file = cJSON_CreateObject();
        const char *name = strrchr(c->sources[i].path, '/');
        cJSON_AddStringToObject(file, "name", name ? name + 1 : c->sources[i].path);
        cJSON_AddNumberToObject(file, "bytes", (double)c->sources[i].file.len);
        cJSON_AddStringToObject(file, "sha256", c->sources[i].sha256);
        cJSON_AddItemToArray(list, file);
    }
    return o;
}

/* ---- packs ---- */
uint64_t chance(int64_t seed, int stream, int64_t number, uint64_t i) {
    uint64_t parts[] = {(uint64_t)seed, (uint64_t)stream, (uint64_t)number, i}, x = 0;
    for (int k = 0; k < 4; k++) {
        x += parts[k] + 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        x ^= x >> 31;
    }
    return x;
}

static const struct document *document_at(const struct corpus *c, uint64_t byte) {
    size_t low = 0, high = c->n_documents;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (c->documents[middle].before <= byte)
            low = middle;
        else
            high = middle;
    }
    return &c->documents[low];
}

/* A place to begin near from: behind a line end, else a space, else between two characters. */
static size_t begin_near(const char *text, size_t len, size_t from) {
    enum { NEAR = 400 };
    if (from == 0) return 0;
    size_t most = len - from < NEAR ? len - from : NEAR;
    const char *end = memchr(text + from, '\n', most), *space = memchr(text + from, ' ', most);
    if (end) return (size_t)(end - text) + 1;
    if (space) return (size_t)(space - text);
    while (from < len && ((unsigned char)text[from] & 0xc0) == 0x80)
        from++;
    return from;
}

/* At most room tokens of plain text, from a place drawn by chance where the text is longer. */
static enum err text_ids(const struct corpus *c, const char *text, size_t len, int room,
                         uint64_t draw, struct ids *out) {
    enum { BYTES_PER_TOKEN = 8 }; /* more than any tokenizer's average */
    size_t want = (size_t)room * BYTES_PER_TOKEN;
    size_t from = len > want ? begin_near(text, len, draw % (len - want + 1)) : 0;
    if (want > len - from) want = len - from;
    return tokenize(c->options.tokenizer, text + from, want, 0, &out->at, &out->n);
}

static enum err line_ids(const struct corpus *c, const char *line, size_t len, int room,
                         uint64_t draw, struct ids *out, char *msg, size_t msg_len) {
    struct json *root = NULL;
    enum err e = json_parse(&root, line, len, "--text", msg, msg_len);
    if (e) return e;
    const char *text = json_string(json_get(root, "text"));
    const struct json *messages = json_get(root, "messages");
    if (text) {
        e = text_ids(c, text, strlen(text), room, draw, out);
    } else {
        e = messages_ids(c, messages, SIZE_MAX, out, msg, msg_len);
    }
    json_free(root);
    return e;
}

static void append(struct pack *p, int32_t id) {
    p->tokens[p->n++] = id;
}

/* One drawn piece at the end of the pack, at most length tokens in all. */
static enum err add_piece(const struct corpus *c, const struct document *d, uint64_t draw,
                          int length, struct pack *p, char *msg, size_t msg_len) {
    const struct tokenizer *t = c->options.tokenizer;
    const char *text = (const char *)c->sources[d->source].file.bytes + d->at;
    int32_t bos = tokenizer_add_bos(t) ? tokenizer_bos(t) : -1, eos = tokenizer_eos(t);
    int begin = p->n, room = length - begin;
    struct ids ids = {0};
    enum err e = d->jsonl ? line_ids(c, text, d->len, room, draw, &ids, msg, msg_len)
                          : text_ids(c, text, d->len, room, draw, &ids);
    if (e == ERR_NOMEM) return err_set(msg, msg_len, e, "--text: out of memory");
    if (e) return e;
    if (bos >= 0 && !(ids.n && ids.at[0] == bos)) append(p, bos); /* a chat brings its own */
    for (size_t i = 0; i < ids.n && p->n < length; i++)
        if (ids.at[i] < c->options.vocab_size) append(p, ids.at[i]);
    free(ids.at);
    if (c->options.join) {
        if (eos >= 0 && p->n < length) append(p, eos);
        p->first[p->n_documents = 1] = p->n;
    } else if (p->n - begin < c->options.least) {
        p->n = begin; /* nothing to learn from so few */
    } else {
        p->first[++p->n_documents] = p->n;
    }
    return OK;
}

/* ---- recall texts ---- */
enum { RECALL_DRAWS = 1 << 21 }; /* numbers that neither places of text nor rows draw from */

/* Of each run of 1 / share packs one is, which is left to chance: not always the long ones. */
static bool is_recall(const struct corpus *c, int64_t seed, int stream, int64_t number) {
    double share = c->options.recall;
    if (stream == PACK_RETRIEVAL) return true;
    if (share <= 0 || stream == PACK_CALIBRATE || stream == PACK_PROBE) return false;
    int64_t run = (int64_t)floor((double)number * share);
    int64_t first = (int64_t)ceil((double)run / share),
            next = (int64_t)ceil((double)(run + 1) / share);
    uint64_t draw = chance(seed, stream, run, RECALL_DRAWS);
    return number == first + (int64_t)(draw % (uint64_t)(next > first ? next - first : 1));
}

struct filler {
    char *at; /* owned */
    size_t len;
};

static bool add_filler(struct filler *f, const char *text, size_t len, size_t most, uint64_t draw) {
    size_t want = most - f->len,
           from = len > want ? begin_near(text, len, draw % (len - want + 1)) : 0;
    if (want > len - from) want = len - from;
    while (want && from + want < len && ((unsigned char)text[from + want] & 0xc0) == 0x80)
        want--;
    char *more = realloc(f->at, f->len + want + 2);
    if (!more) return false;
    if (f->len) more[f->len++] = '\n';
    memcpy(more + f->len, text + from, want);
    f->at = more;
    f->len += want;
    return true;
}

/* What a document says, without the marks of chats. */
static enum err add_document_text(const struct corpus *c, const struct document *d, size_t most,
                                  uint64_t draw, struct filler *f, char *msg, size_t msg_len) {
    const char *text = (const char *)c->sources[d->source].file.bytes + d->at;
    if (!d->jsonl) return add_filler(f, text, d->len, most, draw) ? OK : ERR_NOMEM;
    struct json *root = NULL;
    enum err e = json_parse(&root, text, d->len, "--text", msg, msg_len);
    if (e) return e;
    const char *whole = json_string(json_get(root, "text"));
    bool good = !whole || add_filler(f, whole, strlen(whole), most, draw);
    const struct json *m = whole ? NULL : json_child(json_get(root, "messages"));
    for (; m && good && f->len + 1 < most; m = json_next(m)) {
        const char *content = json_string(json_get(m, "content"));
        good = add_filler(f, content, strlen(content), most, 0);
    }
    json_free(root);
    return good ? OK : ERR_NOMEM;
}

/* out->n 0: there is no room for a fact and a question. */
static enum err recall_pack(const struct corpus *c, int64_t seed, int stream, int64_t number,
                            int length, struct pack *out, char *msg, size_t msg_len) {
    enum { TRIES = 200, BYTES_PER_TOKEN = 6 };
    size_t most = (size_t)length * BYTES_PER_TOKEN;
    struct filler f = {0};
    struct pack p = {0};
    enum err e = OK;
    for (uint64_t i = 0; !e && i < TRIES && f.len + 1 < most; i++) {
        uint64_t at = chance(seed, stream, number, 2 * i) % c->bytes,
                 draw = chance(seed, stream, number, 2 * i + 1);
        e = add_document_text(c, document_at(c, at), most, draw, &f, msg, msg_len);
    }
    uint64_t draw = chance(seed, stream, number, RECALL_DRAWS + 1);
    bool chat = c->options.chat && chat_family(c->options.chat) != CHAT_NONE;
    for (int facts = RECALL_FACTS; !e && !p.n && facts; facts = facts > 1 ? 1 : 0) {
        struct recall r;
        recall_draw(&r, draw, length, chat, facts);
        e = recall_tokens(&r, c->options.tokenizer, c->options.chat, f.at, f.len, length, &p.tokens,
                          &p.weight, &p.n, msg, msg_len);
    }
    free(f.at);
    int n = 0;
    for (int i = 0; i < p.n; i++) {
        if (p.tokens[i] >= c->options.vocab_size) continue;
        p.tokens[n] = p.tokens[i];
        p.weight[n++] = p.weight[i];
    }
    p.n = n;
    p.first = calloc(2, sizeof *p.first);
    if (!e && !p.first) e = ERR_NOMEM;
    if (e || !n) {
        pack_free(&p);
        return e == ERR_NOMEM ? err_set(msg, msg_len, e, "--recall: out of memory") : e;
    }
    p.first[p.n_documents = 1] = n;
    *out = p;
    return OK;
}

enum err corpus_pack(const struct corpus *c, int64_t seed, int stream, int64_t number, int length,
                     struct pack *out, char *msg, size_t msg_len) {
    enum { TRIES = 200 };
    if (is_recall(c, seed, stream, number)) {
        struct pack recall = {0};
        enum err e = recall_pack(c, seed, stream, number, length, &recall, msg, msg_len);
        if (e || recall.n) {
            if (!e) *out = recall;
            return e;
        }
    }
    int most = c->options.join ? 1 : length / c->options.least + 1;
    struct pack p = {.tokens = malloc((size_t)length * sizeof *p.tokens),
                     .first = calloc((size_t)most + 1, sizeof *p.first)};
    enum err e = OK;
    if (!p.tokens || !p.first) e = err_set(msg, msg_len, ERR_NOMEM, "--text: out of memory");
    for (uint64_t i = 0; !e && i < TRIES; i++) {
        int room = length - p.n;
        if (room < (c->options.join ? 1 : c->options.least)) break;
        const struct document *d = document_at(c, chance(seed, stream, number, 2 * i) % c->bytes);
        e = add_piece(c, d, chance(seed, stream, number, 2 * i + 1), length, &p, msg, msg_len);
    }
    if (!e && p.n < c->options.least)
        e = err_set(msg, msg_len, ERR_ARG,
                    "--text: of %d documents drawn none has the %d tokens it takes to learn from; "
                    "--join-documents reads them one after the other",
                    (int)TRIES, c->options.least);
    if (e)
        pack_free(&p);
    else
        *out = p;
    return e;
}

void pack_free(struct pack *p) {
    free(p->tokens);
    free(p->first);
    free(p->weight);
    *p = (struct pack){0};
}
