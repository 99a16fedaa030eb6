/* tokenizer_impl.h - what the tokenizer's files share: vocabulary, merges, text edits, splits.
 *
 * Text goes through the stages of Hugging Face's tokenizers, whichever file the tokenizer came
 * from: added tokens cut out -> normaliser (edits) -> normalised added tokens cut out -> edits of
 * the pre-tokenizer -> splits into words -> symbols (bytes or characters) -> merges -> ids. Nothing
 * here is written after opening, so any thread may read; a call's scratch is its own. */
#ifndef URCHIN_MODEL_TOKENIZER_IMPL_H
#define URCHIN_MODEL_TOKENIZER_IMPL_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/tokenizer.h"
#include <pcre2.h>

/* ---- growing arrays ---- */

struct bytes { /* owned */
    char *data;
    size_t len, cap;
};
bool bytes_reserve(struct bytes *b,
                   size_t more); /* room for more bytes and a NUL; false: no memory */
bool bytes_add(struct bytes *b, const char *data, size_t len);

struct id_list { /* owned */
    int32_t *ids;
    size_t n, cap;
};
bool id_list_add(struct id_list *list, int32_t id);

/* ---- UTF-8 ---- */

enum utf8_state {
    UTF8_VALID,
    UTF8_INVALID,
    UTF8_CUT
}; /* CUT: text ends inside a character so far valid */

/* Looks at the first character of len >= 1 bytes.  *n_bytes: its length, or for INVALID and CUT
 * that of the longest prefix that begins some character (at least 1), which is what one U+FFFD
 * stands for. */
enum utf8_state utf8_next(const char *text, size_t len, size_t *n_bytes);
size_t utf8_valid_run(const char *text, size_t len); /* bytes of whole valid characters in front */
size_t utf8_space_at(const char *text,
                     size_t len); /* bytes of a White_Space character in front, 0: none */
size_t utf8_space_before(const char *text, size_t len); /* the same at the end */

/* ---- vocabulary ---- */

enum token_kind {
    TOKEN_NONE,    /* the id is not used */
    TOKEN_TEXT,    /* what merging makes */
    TOKEN_BYTE,    /* <0xNN> */
    TOKEN_ADDED,   /* cut out of any text before merging */
    TOKEN_SPECIAL, /* the same, but only where the caller allows it */
};

struct token {
    size_t piece, bytes; /* offsets into tokenizer.text */
    uint32_t piece_len, bytes_len;
    uint8_t kind;                                       /* enum token_kind */
    bool normalized, take_left_space, take_right_space; /* of added and special tokens */
};

struct id_map {     /* open addressing over a text of each token */
    int32_t *slots; /* id or -1; owned */
    size_t mask;    /* slots - 1; 0: empty */
};

struct merge { /* left, right -> result; the lowest rank goes first */
    int32_t left, right, result;
    uint32_t rank;
};

struct added {  /* text to cut out, sorted by its bytes */
    char *text; /* owned */
    size_t len;
    int32_t id;
};

struct added_set {
    struct added *items; /* owned */
    int n;
    int first[257]; /* items that begin with byte b: first[b] .. first[b + 1] - 1 */
};

/* ---- edits and splits ---- */

enum edit_kind {
    EDIT_PREPEND,       /* text in front, unless nothing follows */
    EDIT_PREPEND_ONCE,  /* the same, unless it stands there already */
    EDIT_PREPEND_FIRST, /* PREPEND_ONCE for the beginning of the whole text alone */
    EDIT_REPLACE,       /* every match of pattern becomes text */
    EDIT_NORMALIZE,     /* Unicode normal form */
};

struct edit {
    enum edit_kind kind;
    char *text; /* owned */
    size_t text_len;
    pcre2_code *pattern;      /* owned */
    bool compose, compatible; /* NFC: compose; NFD: neither; NFKC: both */
};

struct edit_list {
    struct edit *items; /* owned */
    int n;
};

enum split_behavior {
    SPLIT_ISOLATED,
    SPLIT_REMOVED,
    SPLIT_MERGED_WITH_PREVIOUS,
    SPLIT_MERGED_WITH_NEXT,
    SPLIT_CONTIGUOUS,
};

struct split {
    pcre2_code *pattern; /* owned */
    enum split_behavior behavior;
    bool invert; /* what the pattern does not match is the match */
};

struct tokenizer {
    struct token *tokens; /* owned; [n_tokens] */
    int n_tokens;
    int tokens_cap;
    struct bytes text; /* pieces (NUL-terminated) and bytes of all tokens */
    struct id_map by_piece;
    struct id_map by_bytes; /* whole words, when ignore_merges */
    struct merge *merges;   /* owned; open addressing by (left, right), left -1: free */
    size_t merge_mask;      /* 0: no merges */
    size_t n_merges;

    bool byte_level;    /* symbols are bytes, else characters */
    bool byte_fallback; /* characters outside the vocabulary become <0xNN> */
    bool fuse_unknown;
    bool ignore_merges; /* a word that is a token is that token */
    bool space_mark;    /* U+2581 in pieces stands for a space */
    bool prefix_space;  /* edits put one space in front of the text */
    int32_t unknown;    /* -1: characters without a token are dropped */
    int32_t byte_ids[256];
    int32_t char_ids[128]; /* ASCII characters, when symbols are characters */

    struct edit_list normalizer, pre_edits;
    struct split *splits; /* owned */
    int n_splits;
    struct added_set
        added; /* looked for in the text as it came: special tokens and most added ones */
    struct added_set added_normalized; /* looked for behind the normaliser; no special ones */

    int32_t bos, eos;
    bool add_bos, add_eos;
    char *chat_template; /* owned; NULL: none */
};

/* ---- tokenizer_vocab.c ---- */

enum { MAX_TOKEN_ID = (1 << 20) - 1 }; /* the largest vocabularies have a quarter of this */

/* *out starts with nothing known: no ids, no edits. */
enum err tokenizer_new(struct tokenizer **out);
/* Names one id; false: no memory.  The id is in [0, MAX_TOKEN_ID] and was TOKEN_NONE. */
bool vocab_add(struct tokenizer *t, int32_t id, const char *piece, size_t len,
               enum token_kind kind);
int32_t vocab_find(const struct tokenizer *t, const char *piece, size_t len);
/* Called once all ids are named, kinds, flags and edits set: makes bytes, byte ids and added
 * tokens. */
enum err vocab_finish(struct tokenizer *t);
bool vocab_index(struct tokenizer *t); /* (re)makes by_piece; vocab_find works from here on */
int32_t vocab_find_bytes(const struct tokenizer *t, const char *bytes, size_t len);

size_t table_size(size_t n); /* of a hash table for n entries: a power of two, at most half full */

/* ---- tokenizer_gguf.c ---- */

struct gguf_split { /* what a name in tokenizer.ggml.pre stands for */
    const char *name;
    bool digits; /* cut out one by one before the pattern */
    const char *pattern;
    bool nfc, ignore_merges, add_bos;
};
const struct gguf_split *gguf_split(const struct gguf *g); /* NULL: SentencePiece, or not known */

/* ---- tokenizer_merges.c ---- */

/* Room for n merges; called once, behind vocab_finish. */
enum err merges_reserve(struct tokenizer *t, size_t n);
/* The later of two for one pair stands.  Left out where a part or the result is not ordinary text,
 * so that no text merges into a special token. */
void merges_add(struct tokenizer *t, int32_t left, int32_t right, int32_t result, uint32_t rank);
/* SentencePiece: any two tokens that make a third may merge, the highest score first. */
enum err merges_from_scores(struct tokenizer *t, const double *scores);
const struct merge *merges_find(const struct tokenizer *t, int32_t left,
                                int32_t right); /* NULL: none */

/* ---- tokenizer_bpe.c ---- */

struct symbol {
    int32_t id, prev, next; /* neighbours; -1: none */
    int32_t result;         /* what it and the next one merge into; -1: they do not */
    uint32_t rank;
};

struct bpe_scratch { /* owned by one call */
    struct symbol *symbols;
    size_t symbols_cap;
    uint64_t *heap; /* rank << 32 | symbol, least first */
    size_t n_heap, heap_cap;
};
void bpe_scratch_free(struct bpe_scratch *s);

/* Appends the ids of one word; false: no memory.  O(len log len). */
bool bpe_word(const struct tokenizer *t, struct bpe_scratch *s, const char *word, size_t len,
              struct id_list *ids);

/* ---- tokenizer_split.c ---- */

/* UTF-8, Unicode classes, JIT where there is one; literal: no metacharacters. */
enum err pattern_compile(pcre2_code **out, const char *pattern, size_t len, bool literal,
                         const char *name, char *msg, size_t msg_len);
enum err split_add(struct tokenizer *t, const char *pattern, size_t len, bool literal,
                   enum split_behavior behavior, bool invert, const char *name, char *msg,
                   size_t msg_len);
extern const char split_gpt2[], split_llama3[], split_qwen2[]; /* the families' patterns */

/* The matches of a pattern in valid UTF-8, one after the other.  Starts with at 0 and last
 * SIZE_MAX. */
struct matches {
    const pcre2_code *pattern;
    pcre2_match_data *data;
    pcre2_match_context *context; /* NULL: PCRE2's limits */
    const char *text;
    size_t len, at, last; /* last: where the last match ended */
};
bool matches_next(struct matches *m, size_t *begin, size_t *end); /* begin == end: an empty match */

struct split_scratch { /* owned by one call */
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
    pcre2_match_data **matches; /* one per split */
};
enum err split_scratch_new(struct split_scratch *s, const struct tokenizer *t);
void split_scratch_free(struct split_scratch *s, const struct tokenizer *t);

typedef bool split_emit(void *arg, const char *word, size_t len); /* false: stop, no memory */
bool split_text(const struct tokenizer *t, struct split_scratch *s, const char *text, size_t len,
                split_emit *emit, void *arg);

/* ---- tokenizer_edit.c ---- */

/* Appends one edit and gives it to be filled; NULL: no memory. */
struct edit *edit_add(struct edit_list *list, enum edit_kind kind, const char *text,
                      size_t text_len);
void edit_list_free(struct edit_list *list);
/* *out and *out_len: text itself when there is nothing to do, else in one of the buffers. */
enum err edit_text(const struct edit_list *list, const char *text, size_t len, bool first,
                   struct bytes buffers[2], const char **out, size_t *out_len);

/* ---- tokenizer.c ---- */

struct text_range {
    size_t begin, end;
};
/* tokenize(), but special tokens are found only where they lie wholly inside one of the ranges,
 * which are in order and do not overlap: how chat.c keeps a user's text from becoming one. */
enum err tokenize_ranges(const struct tokenizer *t, const char *text, size_t len,
                         const struct text_range *special, size_t n_special, bool add_bos,
                         bool add_eos, int32_t **ids, size_t *n_ids);

#endif
