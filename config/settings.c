/* settings.c - the table of settings, and the four things that read it: flags, environment, file
 * and help.
 *
 * Every value, defaults included, passes through set(): one parser, one range check, one sentence.
 */
#include "config/settings.h"

#include "config/version.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum type { TEXT, CHOICE, SWITCH, INT, INT64, DOUBLE, SIZE, LIST };

enum { /* which commands know a setting */
       SERVE = 1 << COMMAND_SERVE,
       RUN = 1 << COMMAND_RUN,
       INFO = 1 << COMMAND_INFO,
       EVAL = 1 << COMMAND_EVAL,
       BENCH = 1 << COMMAND_BENCH,
       CONVERT = 1 << COMMAND_CONVERT,
       ALL = SERVE | RUN | INFO | EVAL | BENCH | CONVERT,
};

struct row {
    const char *name;
    enum type type;
    size_t offset; /* of the field in struct settings */
    int commands;
    const char *value;   /* the default as a user would write it, NULL: none */
    double min, max;     /* numbers; SIZE: in bytes */
    int64_t unit;        /* SIZE: bytes in one of the field */
    const char *metavar; /* what --help calls the value; CHOICE: the words, separated by | */
    const char *help;
};

static const double BIG = 1e15; /* tokens: more than anyone will read, far from overflow */
#define AT(field) offsetof(struct settings, field)
#define KIB 1024.0

static const char *const command_names[] = {"serve", "run", "info", "eval", "bench", "convert"};
static const char *const command_help[] = {
    "serve a model over HTTP with OpenAI's API",
    "print a streamed answer, or chat on the terminal",
    "print a model's architecture, attention, slot size and capacity",
    "measure quality: perplexity, agreement with another model, recall",
    "measure speed: prefill and decode by depth and batch",
    "teach a softmax model Hedgehog attention, from text",
};
enum { N_COMMANDS = 6 };

enum { MODEL_ROW, PROMPT_ROW }; /* the two that may be given without a flag */

/* clang-format off */
static const struct row rows[] = {
    {"model", TEXT, AT(model), ALL, NULL, 0, 0, 0, "MODEL", "a Hugging Face folder, a converted folder or a GGUF file; none: the default model"},
    {"prompt", TEXT, AT(prompt), RUN, NULL, 0, 0, 0, "PROMPT", "what to answer; none: a chat on the terminal"},

    {"base", TEXT, AT(base), ALL, NULL, 0, 0, 0, "FILE", "base model of an adapter, instead of the one found by its digest"},
    {"device", CHOICE, AT(device), ALL, "auto", 0, 0, 0, "auto|cpu|cuda", "where the model runs; auto: the GPU where there is one, else the CPU"},
    {"weights", CHOICE, AT(weights), ALL, "auto", 0, 0, 0, "auto|fp32|bf16|int8|int4|fp8", "precision of the weights; auto: near to the file's own; fp8: on a GPU only"},
    {"kv-type", CHOICE, AT(kv_type), ALL, "bf16", 0, 0, 0, "bf16|fp32", "precision of exact keys and values"},
    {"chat-template", CHOICE, AT(chat_template), ALL, NULL, 0, 0, 0, "chatml|llama2|llama3|mistral|phi3|gemma|zephyr|none", "chat format, instead of the one recognised in the model's own template"},
    {"threads", INT, AT(threads), ALL, "0", 0, 1024, 0, "N", "threads for the model; 0: as many as there are CPUs"},
    {"isa", CHOICE, AT(isa), ALL, "auto", 0, 0, 0, "auto|generic|avx2|avx512|amx|dotprod", "most modern instruction family that the kernels may use; auto: the best the machine has, but amx only where it is named"},
    {"max-seq-len", INT64, AT(max_seq_len), ALL, "0", 0, BIG, 0, "N", "longest sequence in tokens; 0: the model's own (Hedgehog: no limit)"},
    {"cache-size", INT, AT(cache_size), ALL, "-1", -1, 1 << 20, 0, "N", "places of the recall cache; -1: the model's"},
    {"cache-recent", INT, AT(cache_recent), ALL, "-1", -1, 1 << 20, 0, "N", "places of the recall cache that prefer recent keys; -1: the model's"},
    {"cache-age", INT, AT(cache_age), ALL, "-1", -1, INT_MAX, 0, "TOKENS", "distance at which a recent place halves a key's score; -1: the model's"},
    {"max-distance", INT64, AT(max_distance), ALL, "-1", -1, BIG, 0, "TOKENS", "farthest distance a far exact key is given; -1: the model's"},
    {"horizon", INT64, AT(horizon), ALL, "-1", -1, BIG, 0, "KEYS", "keys in the state before it is scaled down at each fold; -1: the model's"},

    {"host", TEXT, AT(host), SERVE, "127.0.0.1", 0, 0, 0, "ADDRESS", "address to listen on; 0.0.0.0: every interface"},
    {"port", INT, AT(port), SERVE, "8080", 0, 65535, 0, "N", "port to listen on; 0: any free one (printed)"},
    {"served-model-name", TEXT, AT(served_model_name), SERVE, NULL, 0, 0, 0, "NAME", "the model's name in the API, instead of its own"},
    {"api-key", TEXT, AT(api_key), SERVE, NULL, 0, 0, 0, "KEY[,KEY...]", "keys that clients must send; none: open (URCHIN_API_KEY keeps it out of the process list)"},
    {"cors-origin", TEXT, AT(cors_origin), SERVE, "*", 0, 0, 0, "ORIGIN", "origin that browsers may call from; empty: none"},
    {"max-seqs", INT, AT(max_seqs), SERVE | RUN | INFO, "0", 0, 65536, 0, "N", "sequences at once (slots); 0: as many as --memory holds, at most 256"},
    {"memory", SIZE, AT(memory_mb), SERVE | RUN | INFO | CONVERT, "0", 0, 1e15, 1 << 20, "SIZE", "memory for slots when --max-seqs is 0; 0: a quarter of what is free.  convert: what it may take in all; 0: what it needs"},
    {"prefill-chunk", INT, AT(prefill_chunk), SERVE | RUN | BENCH, "0", 0, 65536, 0, "N", "prompt tokens read in one step beside those generated, less keeps others smoother; 0: 64 on a CPU, 256 on a GPU"},
    {"max-queue", INT, AT(max_queue), SERVE, "256", 0, 1 << 20, 0, "N", "requests that may wait; the next gets 429 with Retry-After"},
    {"output-limit", SIZE, AT(output_limit_kb), SERVE, "256K", KIB, 1e12, 1024, "SIZE", "unread output of a request before its generation pauses"},
    {"body-limit", SIZE, AT(body_limit_kb), SERVE, "8M", KIB, 1e12, 1024, "SIZE", "largest request body"},
    {"header-limit", SIZE, AT(header_limit_kb), SERVE, "8K", 4 * KIB, 1e9, 1024, "SIZE", "largest request line and headers"},
    {"idle-timeout", INT, AT(idle_timeout_s), SERVE, "60", 1, 86400, 0, "SECONDS", "a connection silent for so long is closed"},
    {"max-connections", INT, AT(max_connections), SERVE, "4096", 1, 1 << 20, 0, "N", "connections at once"},
    {"drain-timeout", DOUBLE, AT(drain_timeout_s), SERVE, "30", 0, 86400, 0, "SECONDS", "on SIGTERM, how long running requests may go on"},
    {"log-prompts", SWITCH, AT(log_prompts), SERVE, "no", 0, 0, 0, NULL, "write prompts and answers to the log"},

    {"raw", SWITCH, AT(raw), RUN, "no", 0, 0, 0, NULL, "complete the prompt as it stands, without the chat format"},
    {"system", TEXT, AT(system), RUN, NULL, 0, 0, 0, "TEXT", "system message"},
    {"max-tokens", INT64, AT(max_tokens), RUN, "1024", -1, BIG, 0, "N", "longest answer; -1: no limit"},
    {"temperature", DOUBLE, AT(temperature), RUN, "0.7", 0, 100, 0, "T", "0: always the likeliest token"},
    {"top-p", DOUBLE, AT(top_p), RUN, "0.95", 0, 1, 0, "P", "draw from the likeliest tokens that sum to P; 1: off"},
    {"top-k", INT, AT(top_k), RUN, "0", 0, INT_MAX, 0, "K", "draw from the K likeliest tokens; 0: off"},
    {"min-p", DOUBLE, AT(min_p), RUN, "0", 0, 1, 0, "P", "drop tokens less likely than P times the likeliest; 0: off"},
    {"seed", INT64, AT(seed), RUN | EVAL | CONVERT, "-1", -1, 0x1p63, 0, "N", "same seed, same result; -1: run draws another one each time, eval and convert take 0"},

    {"text", TEXT, AT(text), EVAL | CONVERT, NULL, 0, 0, 0, "FILE[,FILE...]", "texts to measure on or to learn from; convert takes folders too, and .jsonl files with text or messages"},
    {"against", TEXT, AT(against), EVAL, NULL, 0, 0, 0, "MODEL", "model to compare with; 'base': the base of an adapter"},
    {"against-weights", CHOICE, AT(against_weights), EVAL, "auto", 0, 0, 0, "auto|fp32|bf16|int8|int4|fp8", "precision of that model's weights"},
    {"against-kv-type", CHOICE, AT(against_kv_type), EVAL, NULL, 0, 0, 0, "bf16|fp32", "precision of that model's exact keys and values, instead of --kv-type"},
    {"tests", TEXT, AT(tests), EVAL, "all", 0, 0, 0, "NAME[,NAME...]", "what to measure: perplexity, stream, choice, heads, passkey, recall, added, or all (but added, and choice where there are --tasks)"},
    {"tasks", TEXT, AT(tasks), EVAL, NULL, 0, 0, 0, "FILE", "choice: questions, a line of JSON each: {\"question\": \"...\", \"choices\": [\"...\", ...], \"answer\": index}"},
    {"html", TEXT, AT(html), EVAL, NULL, 0, 0, 0, "FILE.html", "a page of what is measured, with the model's conversion.json in it; FILE.json beside it says the same"},
    {"ablate", TEXT, AT(ablate), EVAL, "linear,cache,both", 0, 0, 0, "PART[,PART]", "parts switched off in turn, measured beside the whole: linear (exact keys only), cache, both (at once), or none"},
    {"tokens", INT64, AT(tokens), EVAL, "0", 0, BIG, 0, "N", "how much of each text to use; 0: all"},
    {"context", INT64, AT(context), EVAL, "1024", 2, 1 << 30, 0, "TOKENS", "perplexity and heads: context of each window"},
    {"stride", INT64, AT(stride), EVAL, "0", 0, 1 << 30, 0, "TOKENS", "perplexity: tokens scored in each window; 0: all of it"},
    {"bin", INT64, AT(bin), EVAL, "1024", 1, BIG, 0, "TOKENS", "stream: tokens in each line of the table"},
    {"lengths", LIST, AT(lengths), EVAL, "1000,2000", 1, 1 << 30, 0, "N[,N...]", "passkey, recall, added: tokens of each text"},
    {"tries", INT, AT(tries), EVAL, "40", 1, 100000, 0, "N", "passkey, recall, added: questions at each length"},
    {"facts", INT, AT(facts), EVAL, "8", 1, 64, 0, "N", "recall: facts hidden in one text"},
    {"memories", LIST, AT(memories), EVAL, "2,8", 2, 16, 0, "N[,N...]", "added: how many texts are read apart and their memories added"},

    {"out", TEXT, AT(out), CONVERT, NULL, 0, 0, 0, "FOLDER", "where the converted model goes"},
    {"merge", SWITCH, AT(merge), CONVERT, "no", 0, 0, 0, NULL, "learn nothing: write the adapter MODEL and its base as one whole model, in bf16"},
    {"recipe", CHOICE, AT(recipe), CONVERT, "urchin", 0, 0, 0, "urchin|lolcats|paper", "what the flags below are when they are not given"},
    {"name", TEXT, AT(name), CONVERT, NULL, 0, 0, 0, "NAME", "the converted model's name; none: the base's with -hedgehog"},
    {"steps", INT, AT(steps), CONVERT, "400", 0, 1 << 30, 0, "N", "steps of the optimiser; 0: calibrate only"},
    {"accumulate", INT, AT(accumulate), CONVERT, "1", 1, 1 << 20, 0, "N", "sequences read for one step"},
    {"length", INT, AT(length), CONVERT, "0", 0, 1 << 24, 0, "TOKENS", "length of a sequence; 0: 1,024, or the base's context where that is less"},
    {"long-length", INT, AT(long_length), CONVERT, "0", 0, 1 << 24, 0, "TOKENS", "length of a long sequence; 0: 4,096, or the base's context where that is less"},
    {"long-every", INT, AT(long_every), CONVERT, "5", 0, 1 << 30, 0, "N", "every so many sequences one is long; 0: none"},
    {"rows", INT, AT(rows), CONVERT, "80", 1, 1 << 20, 0, "N", "query rows compared in a sequence"},
    {"long-rows", INT, AT(long_rows), CONVERT, "32", 1, 1 << 20, 0, "N", "query rows compared in a long sequence"},
    {"join-documents", SWITCH, AT(join_documents), CONVERT, "no", 0, 0, 0, NULL, "fill sequences with documents one after the other, each seeing those before it"},
    {"recall", DOUBLE, AT(recall), CONVERT, "0", 0, 1, 0, "SHARE", "share of sequences that are synthetic: facts in ordinary text, then questions about them"},
    {"loss", CHOICE, AT(loss), CONVERT, NULL, 0, 0, 0, "cross-entropy|mse|both", "cross-entropy of rows of attention, squared error of outputs, or both"},
    {"mse-factor", DOUBLE, AT(mse_factor), CONVERT, "1000", 0, 1e12, 0, "X", "weight of the squared error"},
    {"lr", DOUBLE, AT(lr), CONVERT, "0", 0, 10, 0, "RATE", "learning rate of maps; 0: the recipe's"},
    {"lr-mix", DOUBLE, AT(lr_mix), CONVERT, "0", 0, 10, 0, "RATE", "learning rate of the mixing; 0: the recipe's"},
    {"schedule", CHOICE, AT(schedule), CONVERT, NULL, 0, 0, 0, "one-cycle|constant", "how the rates go over the steps"},
    {"warmup", DOUBLE, AT(warmup), CONVERT, "0.08", 0, 1, 0, "SHARE", "share of the steps in which the rates rise"},
    {"finetune", CHOICE, AT(finetune), CONVERT, NULL, 0, 0, 0, "none|low-rank|full", "what is trained after the maps: nothing, low-rank parts of q, k, v and o, or all weights; maps go on learning"},
    {"finetune-loss", CHOICE, AT(finetune_loss), CONVERT, NULL, 0, 0, 0, "distill|next-token", "divergence from the base's next-token probabilities, or the loss of the text's own next token"},
    {"finetune-steps", INT, AT(finetune_steps), CONVERT, "-1", -1, 1 << 30, 0, "N", "steps of fine-tuning; -1: the recipe's"},
    {"finetune-accumulate", INT, AT(finetune_accumulate), CONVERT, "0", 0, 1 << 20, 0, "N", "sequences read for one of its steps; 0: the recipe's"},
    {"finetune-lr", DOUBLE, AT(finetune_lr), CONVERT, "-1", -1, 10, 0, "RATE", "learning rate of low-rank parts or weights; -1: the recipe's"},
    {"finetune-lr-maps", DOUBLE, AT(finetune_lr_maps), CONVERT, "-1", -1, 10, 0, "RATE", "learning rate of maps and mixing meanwhile; 0: they stay; -1: the recipe's"},
    {"finetune-products", CHOICE, AT(finetune_products), CONVERT, "auto", 0, 0, 0, "auto|fp32|bf16", "what weights and activations are rounded to before they are multiplied; sums are fp32; auto: bf16 where the CPU has it, twice as fast"},
    {"rank", INT, AT(rank), CONVERT, "0", 0, 1 << 14, 0, "N", "rank of low-rank parts; 0: the recipe's"},
    {"map", CHOICE, AT(map), CONVERT, NULL, 0, 0, 0, "exp|softmax2|joint_softmax", "feature map: the paper's, LoLCATs' or fla's"},
    {"features", INT, AT(features), CONVERT, "0", 0, 1 << 14, 0, "N", "projections of a map, half as many as features; 0: the recipe's"},
    {"init-scale", DOUBLE, AT(init_scale), CONVERT, "0", 0, 100, 0, "X", "maps begin as X times the identity; 0: the recipe's"},
    {"key-map", CHOICE, AT(key_map), CONVERT, NULL, 0, 0, 0, "kv_head|query_head", "a key map, and a state, for each"},
    {"map-position", CHOICE, AT(map_position), CONVERT, NULL, 0, 0, 0, "none|rope", "maps see q and k before or after RoPE"},
    {"window", CHOICE, AT(window), CONVERT, NULL, 0, 0, 0, "none|sliding|terraced", "rule of the exact window"},
    {"window-size", INT, AT(window_size), CONVERT, "-1", -1, 1 << 20, 0, "TOKENS", "size of the window; -1: the recipe's"},
    {"sinks", INT, AT(sinks), CONVERT, "-1", -1, 1 << 20, 0, "N", "first tokens kept exact; -1: the recipe's"},
    {"mixing", CHOICE, AT(mixing), CONVERT, NULL, 0, 0, 0, "unified|lolcats", "how exact and linear terms are put together"},
    {"softmax-layers", LIST, AT(softmax_layers), CONVERT, NULL, 0, 1 << 12, 0, "N[,N...]", "layers, from 0, that keep softmax attention and its growing cache"},

    {"n-prompt", LIST, AT(n_prompt), BENCH, "512", 1, BIG, 0, "N[,N...]", "prompt lengths to read"},
    {"n-gen", INT, AT(n_gen), BENCH, "64", 1, INT_MAX, 0, "N", "tokens generated by each sequence"},
    {"batch", LIST, AT(batch), BENCH, "1,8,32", 1, 65536, 0, "N[,N...]", "sequences decoded together"},
    {"depth", LIST, AT(depth), BENCH, "0,1000", 0, BIG, 0, "N[,N...]", "tokens read before measuring"},
    {"repeat", INT, AT(repeat), BENCH, "3", 1, 1000, 0, "N", "measurements of each point"},
    {"profile", SWITCH, AT(profile), BENCH, "no", 0, 0, 0, NULL, "print where each point's time goes, operation by operation (on the CPU)"},
    {"json", SWITCH, AT(json), INFO | EVAL | BENCH, "no", 0, 0, 0, NULL, "print JSON"},

    {"log-level", CHOICE, AT(log_level), ALL, "auto", 0, 0, 0, "auto|debug|info|warn|error", "least level that is logged; auto: info for serve, else warn"},
    {"log-format", CHOICE, AT(log_format), ALL, "text", 0, 0, 0, "text|json", "one line an event, as text or JSON"},
};
/* clang-format on */
enum { N_ROWS = sizeof rows / sizeof *rows };

struct settings_text {
    struct settings_text *next;
    char text[];
};

static const char *keep(struct settings *s, const char *text) {
    struct settings_text *t = malloc(sizeof *t + strlen(text) + 1);
    if (!t) return NULL;
    strcpy(t->text, text);
    t->next = s->owned;
    s->owned = t;
    return t->text;
}

/* ---- values ---- */

/* Is `word` one of the |-separated choices? */
static bool is_choice(const char *choices, const char *word) {
    size_t n = strlen(word);
    for (const char *c = choices; n && c; c = strchr(c, '|') ? strchr(c, '|') + 1 : NULL)
        if (!strncmp(c, word, n) && (c[n] == '|' || !c[n])) return true;
    return false;
}

static bool parse_switch(const char *text, bool *out) {
    static const char *const words[2][4] = {{"no", "false", "0", "off"},
                                            {"yes", "true", "1", "on"}};
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < 4; i++)
            if (!strcasecmp(text, words[v][i])) {
                *out = v;
                return true;
            }
    return false;
}

static bool parse_whole(const char *text, const char **end, int64_t *out) {
    if (isspace((unsigned char)*text)) return false; /* which strtoll would skip */
    char *stop;
    errno = 0;
    long long v = strtoll(text, &stop, 10);
    if (stop == text || errno) return false;
    *out = v;
    *end = stop;
    return true;
}

/* 0, or a whole number with K, M, G or T (powers of 1024; KiB and KB mean the same). */
static bool parse_size(const char *text, double *bytes) {
    const char *end;
    int64_t n;
    if (!parse_whole(text, &end, &n)) return false;
    static const char units[] = "KMGT";
    const char *u = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
    if (!u) {
        *bytes = 0;
        return n == 0 && !*end;
    }
    end++;
    if (*end && strcasecmp(end, "B") && strcasecmp(end, "iB")) return false;
    *bytes = ldexp((double)n, 10 * (int)(u - units + 1));
    return true;
}

int settings_list(const char *list, int64_t *out, int room) {
    int n = 0;
    for (const char *p = list;; p++) {
        int64_t v;
        if (!parse_whole(p, &p, &v)) return -1;
        if (n < room) out[n] = v;
        n++;
        if (!*p) return n;
        if (*p != ',') return -1;
    }
}

static bool list_in_range(const struct row *row, const char *list) {
    int64_t values[64];
    int n = settings_list(list, values, 64);
    if (n < 1 || n > 64) return false;
    for (int i = 0; i < n; i++)
        if ((double)values[i] < row->min || (double)values[i] > row->max) return false;
    return true;
}

/* What a right value looks like: "a whole number from 1 to 65535". */
static void describe(char *out, size_t len, const struct row *row) {
    static const char *const what[] = {[INT] = "a whole number",
                                       [INT64] = "a whole number",
                                       [DOUBLE] = "a number",
                                       [LIST] = "whole numbers",
                                       [SIZE] = "a size like 512K, 8M or 2G"};
    switch (row->type) {
    case TEXT:
        snprintf(out, len, "some text");
        return;
    case CHOICE:
        snprintf(out, len, "one of %s", row->metavar);
        return;
    case SWITCH:
        snprintf(out, len, "yes or no");
        return;
    case SIZE:
        if (row->min > 0)
            snprintf(out, len, "%s, at least %.0fK", what[row->type], row->min / KIB);
        else
            snprintf(out, len, "0 or %s", what[row->type]);
        return;
    default:
        break;
    }
    const char *comma = row->type == LIST ? ", separated by commas" : "";
    if (row->max >= INT_MAX)
        snprintf(out, len, "%s of at least %.0f%s", what[row->type], row->min, comma);
    else
        snprintf(out, len, "%s from %.0f to %.0f%s", what[row->type], row->min, row->max, comma);
}

/* Stores text in the row's field.  source: "--port", "URCHIN_PORT" or "urchin.conf:3: port". */
static enum err set(struct settings *s, const struct row *row, const char *text, const char *source,
                    char *msg, size_t msg_len) {
    void *field = (char *)s + row->offset;
    const char *end;
    int64_t whole = 0;
    double number = 0;
    bool good = false;
    switch (row->type) {
    case TEXT:
        good = true;
        break;
    case CHOICE:
        good = is_choice(row->metavar, text);
        break;
    case SWITCH:
        good = parse_switch(text, field);
        break;
    case LIST:
        good = list_in_range(row, text);
        break;
    case INT:
    case INT64:
        good = parse_whole(text, &end, &whole) && !*end;
        number = (double)whole;
        break;
    case DOUBLE: {
        char *stop;
        number = strtod(text, &stop);
        good = stop != text && !*stop && !isspace((unsigned char)*text);
        break;
    }
    case SIZE:
        good = parse_size(text, &number);
        break;
    }
    if (row->type == INT || row->type == INT64 || row->type == DOUBLE || row->type == SIZE)
        good = good && number >= row->min && number <= row->max; /* false for NaN */
    if (!good) {
        char right[256];
        describe(right, sizeof right, row);
        return err_set(msg, msg_len, ERR_ARG, "%s: '%.200s' is not %s", source, text, right);
    }
    switch (row->type) {
    case TEXT:
    case CHOICE:
    case LIST:
        if (!(*(const char **)field = keep(s, text)))
            return err_set(msg, msg_len, ERR_NOMEM, "%s: out of memory", source);
        break;
    case SWITCH:
        break;
    case INT:
        *(int *)field = (int)whole;
        break;
    case INT64:
        *(int64_t *)field = whole;
        break;
    case DOUBLE:
        *(double *)field = number;
        break;
    case SIZE:
        *(int64_t *)field = ((int64_t)number + row->unit - 1) / row->unit;
        break;
    }
    return OK;
}

/* ---- names ---- */

/* "serve, run" */
static void command_list(char *out, size_t len, int commands) {
    size_t n = 0;
    out[0] = 0;
    for (int c = 0; c < N_COMMANDS && n < len; c++)
        if (commands & 1 << c)
            n += (size_t)snprintf(out + n, len - n, "%s%s", n ? ", " : "", command_names[c]);
}

static const struct row *find(const char *name, size_t len) {
    for (int i = 0; i < N_ROWS; i++)
        if (!strncmp(rows[i].name, name, len) && !rows[i].name[len]) return &rows[i];
    return NULL;
}

/* Edits that turn a into b: inserted, dropped, changed or swapped letters (optimal string
 * alignment).  Names are short. */
static int distance(const char *a, size_t n, const char *b) {
    enum { LONGEST = 40 };
    int lines[3][LONGEST + 1], *before = lines[0], *above = lines[1], *row = lines[2];
    size_t m = strlen(b);
    if (m > LONGEST || n > LONGEST) return INT_MAX;
    for (size_t j = 0; j <= m; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int *spare = before;
        before = above;
        above = row;
        row = spare;
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int best = above[j - 1] + (a[i - 1] != b[j - 1]);
            if (above[j] + 1 < best) best = above[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
                before[j - 2] + 1 < best)
                best = before[j - 2] + 1;
            row[j] = best;
        }
    }
    return row[m];
}

/* The known name nearest to a wrong one among those of `command` (COMMAND_NONE: all), or NULL when
 * none is near. */
static const char *nearest(const char *name, size_t len, enum command command) {
    const char *best = NULL;
    int best_distance = (int)len / 3 + 2;
    for (int i = 0; i < N_ROWS; i++) {
        if (command != COMMAND_NONE && !(rows[i].commands & 1 << command)) continue;
        int d = distance(name, len, rows[i].name);
        if (d < best_distance) {
            best_distance = d;
            best = rows[i].name;
        }
    }
    return best;
}

/* ---- config file ---- */

static char *trim(char *text) {
    while (isspace((unsigned char)*text))
        text++;
    size_t n = strlen(text);
    while (n && isspace((unsigned char)text[n - 1]))
        text[--n] = 0;
    return text;
}

/* Cuts a comment: # at the start or after white space, outside of quotes. */
static void cut_comment(char *line) {
    bool quoted = false;
    for (char *p = line; *p; p++) {
        if (*p == '"') quoted = !quoted;
        if (*p == '#' && !quoted && (p == line || isspace((unsigned char)p[-1]))) {
            *p = 0;
            return;
        }
    }
}

static enum err read_line(struct settings *s, char *line, const char *path, int number, char *msg,
                          size_t msg_len) {
    cut_comment(line);
    line = trim(line);
    if (!*line) return OK;
    char *equals = strchr(line, '=');
    if (!equals)
        return err_set(msg, msg_len, ERR_ARG, "%s:%d: '%.100s' is not of the form name = value",
                       path, number, line);
    *equals = 0;
    char *name = trim(line), *value = trim(equals + 1);
    size_t n = strlen(value);
    if (n >= 2 && value[0] == '"' && value[n - 1] == '"') {
        value[n - 1] = 0;
        value++;
    }
    const struct row *row = find(name, strlen(name));
    if (!row) {
        const char *near = nearest(name, strlen(name), COMMAND_NONE);
        return err_set(msg, msg_len, ERR_ARG, "%s:%d: no setting is named '%.100s'%s%s%s", path,
                       number, name, near ? "; did you mean '" : "", near ? near : "",
                       near ? "'?" : "");
    }
    char source[512];
    snprintf(source, sizeof source, "%.400s:%d: %s", path, number, row->name);
    return set(s, row, value, source, msg, msg_len);
}

static enum err read_file(struct settings *s, const char *path, const char *source, char *msg,
                          size_t msg_len) {
    FILE *file = fopen(path, "r");
    if (!file)
        return err_set(msg, msg_len, ERR_ARG, "%s: cannot open '%.400s': %s", source, path,
                       strerror(errno));
    char *line = NULL;
    size_t room = 0;
    enum err err = OK;
    for (int number = 1; err == OK && getline(&line, &room, file) >= 0; number++)
        err = read_line(s, line, path, number, msg, msg_len);
    if (err == OK && ferror(file))
        err = err_set(msg, msg_len, ERR_ARG, "%s: cannot read '%.400s': %s", source, path,
                      strerror(errno));
    free(line);
    fclose(file);
    return err;
}

/* ---- environment ---- */

static void variable_name(char *out, size_t len, const char *name) {
    size_t n = (size_t)snprintf(out, len, "URCHIN_%s", name);
    for (size_t i = 0; i < n && i < len; i++)
        out[i] = out[i] == '-' ? '_' : (char)toupper((unsigned char)out[i]);
}

static enum err read_environment(struct settings *s, char *msg, size_t msg_len) {
    for (int i = 0; i < N_ROWS; i++) {
        char name[64];
        variable_name(name, sizeof name, rows[i].name);
        const char *value = getenv(name);
        /* A Kubernetes service named urchin puts URCHIN_PORT=tcp://... into every pod beside it. */
        if (!value || !strncmp(value, "tcp://", 6)) continue;
        enum err err = set(s, &rows[i], value, name, msg, msg_len);
        if (err) return err;
    }
    return OK;
}

/* ---- flags ---- */

static enum err unknown_flag(const char *flag, size_t len, enum command command, char *msg,
                             size_t msg_len) {
    const char *near = nearest(flag, len, command);
    if (!near) near = nearest(flag, len, COMMAND_NONE);
    return err_set(msg, msg_len, ERR_ARG, "there is no flag --%.*s%s%s%s", (int)len, flag,
                   near ? "; did you mean --" : "", near ? near : "", near ? "?" : "");
}

/* argv[*i] begins with "--": sets its row and moves *i past its value. */
static enum err read_flag(struct settings *s, int argc, char **argv, int *i, char *msg,
                          size_t msg_len) {
    const char *flag = argv[*i] + 2;
    const char *equals = strchr(flag, '=');
    size_t len = equals ? (size_t)(equals - flag) : strlen(flag);
    const struct row *row = find(flag, len);
    bool negated = false;
    if (!row && !strncmp(flag, "no-", 3) && (row = find(flag + 3, len - 3))) {
        negated = true;
        if (row->type != SWITCH || equals) row = NULL;
    }
    if (!row) return unknown_flag(flag, len, s->command, msg, msg_len);
    if (s->command != COMMAND_NONE && !(row->commands & 1 << s->command)) {
        char owners[64];
        command_list(owners, sizeof owners, row->commands);
        return err_set(msg, msg_len, ERR_ARG,
                       "--%s is not a flag of 'urchin %s' (it belongs to %s)", row->name,
                       command_names[s->command], owners);
    }
    char source[64];
    snprintf(source, sizeof source, "--%s", row->name);
    const char *value = equals ? equals + 1 : negated ? "no" : "yes";
    if (row->type != SWITCH && !equals) {
        if (*i + 1 >= argc || !strncmp(argv[*i + 1], "--", 2))
            return err_set(msg, msg_len, ERR_ARG,
                           "%s needs a value (one that begins with -- is written %s=--...)", source,
                           source);
        value = argv[++*i];
    }
    return set(s, row, value, source, msg, msg_len);
}

static enum err read_positional(struct settings *s, const char *text, int *n_seen, char *msg,
                                size_t msg_len) {
    int most = s->command == COMMAND_RUN ? 2 : 1;
    if (*n_seen >= most)
        return err_set(msg, msg_len, ERR_ARG,
                       "'%.100s' is one argument too many: urchin %s takes %s", text,
                       command_names[s->command],
                       most == 2 ? "MODEL and PROMPT (put the prompt in quotes)" : "one MODEL");
    const struct row *row = &rows[(*n_seen)++ ? PROMPT_ROW : MODEL_ROW];
    return set(s, row, text, row->metavar, msg, msg_len);
}

static enum err find_command(const char *name, enum command *out, char *msg, size_t msg_len) {
    int best = -1, best_distance = 3;
    for (int c = 0; c < N_COMMANDS; c++) {
        int d = distance(name, strlen(name), command_names[c]);
        if (d == 0) {
            *out = (enum command)c;
            return OK;
        }
        if (d < best_distance) {
            best_distance = d;
            best = c;
        }
    }
    if (best >= 0)
        return err_set(msg, msg_len, ERR_ARG, "there is no command '%.100s'; did you mean '%s'?",
                       name, command_names[best]);
    return err_set(msg, msg_len, ERR_ARG,
                   "there is no command '%.100s'; there are serve, run, info, eval, bench and convert",
                   name);
}

/* The config file is named by the last --config, else by URCHIN_CONFIG. It is read before either,
 * so that they win. */
static enum err read_config(struct settings *s, int argc, char **argv, char *msg, size_t msg_len) {
    const char *path = getenv("URCHIN_CONFIG"), *source = "URCHIN_CONFIG";
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++) {
        if (strncmp(argv[i], "--config", 8)) continue;
        if (argv[i][8] == '=') {
            path = argv[i] + 9;
        } else if (!argv[i][8]) {
            if (i + 1 >= argc) return err_set(msg, msg_len, ERR_ARG, "--config needs a file");
            path = argv[++i];
        } else {
            continue;
        }
        source = "--config";
    }
    return path && *path ? read_file(s, path, source, msg, msg_len) : OK;
}

static enum err read_flags(struct settings *s, int argc, char **argv, bool *help, char *msg,
                           size_t msg_len) {
    int n_positional = 0;
    bool flags = true;
    enum err err = OK;
    for (int i = s->command == COMMAND_NONE ? 0 : 1; err == OK && i < argc; i++) {
        const char *arg = argv[i];
        if (!flags || arg[0] != '-' || !arg[1]) {
            err = read_positional(s, arg, &n_positional, msg, msg_len);
        } else if (!strcmp(arg, "--")) {
            flags = false;
        } else if (!strcmp(arg, "--help") || !strcmp(arg, "-h")) {
            *help = true;
            return OK; /* what else is on the line no longer matters */
        } else if (!strcmp(arg, "--version")) {
            s->version = true;
        } else if (!strcmp(arg, "--config")) {
            i++;
        } else if (!strncmp(arg, "--config=", 9)) {
            continue;
        } else if (arg[1] != '-') {
            err =
                err_set(msg, msg_len, ERR_ARG, "there is no flag %.100s; flags begin with --", arg);
        } else {
            err = read_flag(s, argc, argv, &i, msg, msg_len);
        }
    }
    return err;
}

enum err settings_load(struct settings *out, int argc, char **argv, bool *help, char *msg,
                       size_t msg_len) {
    struct settings loaded = {.command = COMMAND_NONE}, *s = &loaded;
    bool asked = argc == 0 || (argc == 1 && !strcmp(argv[0], "help"));
    enum err err = OK;
    if (!asked && argv[0][0] != '-') {
        err = find_command(argv[0], &s->command, msg, msg_len);
        if (err) return err;
    }
    for (int i = 0; err == OK && i < N_ROWS; i++)
        if (rows[i].value) err = set(s, &rows[i], rows[i].value, rows[i].name, msg, msg_len);
    if (err == OK && s->command != COMMAND_NONE) err = read_config(s, argc, argv, msg, msg_len);
    if (err == OK && s->command != COMMAND_NONE) err = read_environment(s, msg, msg_len);
    if (err == OK && !asked) err = read_flags(s, argc, argv, &asked, msg, msg_len);
    if (err == OK && s->command == COMMAND_NONE && !asked && !s->version)
        err = err_set(msg, msg_len, ERR_ARG,
                      "a command comes first: urchin serve, run, info, eval, bench or convert");
    if (err) {
        settings_free(s);
        return err;
    }
    if (!strcmp(s->log_level, "auto")) s->log_level = s->command == COMMAND_SERVE ? "info" : "warn";
    *out = loaded;
    *help = asked;
    return OK;
}

void settings_free(struct settings *s) {
    while (s->owned) {
        struct settings_text *next = s->owned->next;
        free(s->owned);
        s->owned = next;
    }
    *s = (struct settings){.command = COMMAND_NONE};
}

/* ---- help ---- */

/* text from column `indent` on, broken at spaces before column 100. */
static void print_wrapped(FILE *out, const char *text, int indent) {
    enum { WIDTH = 100 };
    int column = indent;
    while (*text) {
        int n = (int)strcspn(text, " ");
        if (column > indent && column + 1 + n > WIDTH) {
            fprintf(out, "\n%*s", indent, "");
            column = indent;
        }
        column += fprintf(out, "%s%.*s", column > indent ? " " : "", n, text);
        text += n;
        while (*text == ' ')
            text++;
    }
}

static void flag_usage(char *out, size_t len, const struct row *row) {
    if (row->type == SWITCH)
        snprintf(out, len, "--[no-]%s", row->name);
    else if (row->type == CHOICE)
        snprintf(out, len, "--%s NAME", row->name);
    else
        snprintf(out, len, "--%s %s", row->name, row->metavar);
}

/* Help sentence with choices and default. */
static void explain(char *out, size_t len, const struct row *row) {
    int n = snprintf(out, len, "%s", row->help);
    if (row->type == CHOICE) n += snprintf(out + n, len - (size_t)n, ": %s", row->metavar);
    if (row->value && row->type != SWITCH)
        snprintf(out + n, len - (size_t)n, " (default %s)", row->value);
}

static void help_row(FILE *out, const struct row *row) {
    enum { INDENT = 32 };
    char usage[96], text[512];
    flag_usage(usage, sizeof usage, row);
    explain(text, sizeof text, row);
    int n = fprintf(out, "  %s", usage);
    if (n > INDENT - 2)
        fprintf(out, "\n%*s", INDENT, "");
    else
        fprintf(out, "%*s", INDENT - n, "");
    print_wrapped(out, text, INDENT);
    fputc('\n', out);
}

void settings_help(FILE *out, enum command command) {
    fprintf(out, "urchin %s [MODEL]%s [flags]: %s\n", command_names[command],
            command == COMMAND_RUN ? " [PROMPT]" : "", command_help[command]);
    fprintf(out, "\n  %-30s", "MODEL");
    print_wrapped(out, rows[MODEL_ROW].help, 32);
    if (command == COMMAND_RUN) {
        fprintf(out, "\n  %-30s", "PROMPT");
        print_wrapped(out, rows[PROMPT_ROW].help, 32);
    }
    fprintf(out, "\n\nFlags of %s:\n", command_names[command]);
    for (int i = PROMPT_ROW + 1; i < N_ROWS; i++)
        if (rows[i].commands & 1 << command && rows[i].commands != ALL) help_row(out, &rows[i]);
    fprintf(out, "\nFlags of every command:\n");
    for (int i = PROMPT_ROW + 1; i < N_ROWS; i++)
        if (rows[i].commands == ALL) help_row(out, &rows[i]);
    fprintf(out, "  --config FILE                 lines of the form name = value\n"
                 "  --version                     print the version\n"
                 "\nEach is also a variable (--max-seq-len is URCHIN_MAX_SEQ_LEN) and a line of "
                 "the config file.\n"
                 "A flag wins over a variable, that over the file.\n");
}

void settings_usage(FILE *out) {
    fprintf(out, "urchin " URCHIN_VERSION
                 ": serves Transformers converted to Hedgehog linear attention\n\n");
    for (int c = 0; c < N_COMMANDS; c++)
        fprintf(out, "  urchin %-7s [MODEL]%-10s%s\n", command_names[c],
                c == COMMAND_RUN ? " [PROMPT]" : "", command_help[c]);
    fprintf(out, "\n  urchin COMMAND --help lists its flags.  urchin --version\n");
}

static void markdown_escaped(FILE *out, const char *text) {
    for (; *text; text++)
        fprintf(out, *text == '|' ? "\\|" : "%c", *text);
}

static void markdown_rows(FILE *out, int commands) {
    char title[64] = "Every command";
    if (commands != ALL) command_list(title, sizeof title, commands);
    fprintf(out, "\n## %s\n\n| flag | variable | default | meaning |\n| --- | --- | --- | --- |\n",
            title);
    for (int i = 0; i < N_ROWS; i++) {
        const struct row *row = &rows[i];
        if (row->commands != commands) continue;
        char usage[96], variable[64], right[256];
        flag_usage(usage, sizeof usage, row);
        variable_name(variable, sizeof variable, row->name);
        fprintf(out, "| `");
        markdown_escaped(out, i <= PROMPT_ROW ? row->metavar : usage);
        fprintf(out, "` | `%s` | %s%s%s | ", variable, row->value ? "`" : "",
                row->value ? row->value : "", row->value ? "`" : "");
        markdown_escaped(out, row->help);
        if (row->type != TEXT && row->type != SWITCH) {
            describe(right, sizeof right, row);
            fprintf(out, "; ");
            markdown_escaped(out, right);
        }
        fprintf(out, " |\n");
    }
}

void settings_markdown(FILE *out) {
    fprintf(out,
            "# Settings\n\n"
            "Every setting is a flag, a variable of the environment and a line `name = value` "
            "of the file given\n"
            "by `--config FILE` or `URCHIN_CONFIG` (`#` begins a comment; quotes keep spaces "
            "and `#`). A flag\n"
            "wins over a variable, that over the file. Sizes are written `512K`, `8M`, `2G`. "
            "A switch is given\n"
            "as `--name` or `--no-name`, elsewhere as yes or no. This page is written by the "
            "program.\n\n"
            "Two more variables say where files lie: `URCHIN_CACHE` (else "
            "`$XDG_CACHE_HOME/urchin`, else\n"
            "`~/.cache/urchin`) holds the bases of adapters, `URCHIN_MODELS` the default model "
            "where none lies\n"
            "beside the program.\n");
    for (int i = 0; i < N_ROWS;
         i++) { /* one section for each set of commands, where it first occurs */
        int j = 0;
        while (rows[j].commands != rows[i].commands)
            j++;
        if (j == i) markdown_rows(out, rows[i].commands);
    }
}
