/* settings.h - one table drives flags, URCHIN_* environment, the config file, --help and docs/settings.md.
 *
 *   urchin COMMAND [MODEL] [PROMPT] [--flag value | --flag=value | --switch | --no-switch] ...
 *
 * Order: a flag wins over the environment, that over the config file (--config FILE or URCHIN_CONFIG: lines `name = value`, # comments), that over
 * the default.  --max-seqs is URCHIN_MAX_SEQS and `max-seqs = 8`.  A bad value is one sentence that names the setting, the value and its source
 * (flag, variable, or file and line), and what would be right.  An unknown flag names the nearest known one.  Environment and file
 * may hold settings of other commands; a flag of another command is refused. */
#ifndef URCHIN_CONFIG_SETTINGS_H
#define URCHIN_CONFIG_SETTINGS_H

#include "config/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum command { COMMAND_NONE = -1, COMMAND_SERVE, COMMAND_RUN, COMMAND_INFO, COMMAND_EVAL, COMMAND_BENCH, COMMAND_CONVERT };

struct settings {
    enum command command;       /* COMMAND_NONE: only --help, --version or nothing was given */
    /* model (all commands) */
    const char *model;          /* positional; NULL: the default model */
    const char *base;
    const char *device;         /* auto, cpu, cuda */
    const char *weights;        /* auto, fp32, bf16, int8, int4, fp8 */
    const char *kv_type;        /* bf16, fp32 */
    const char *chat_template;  /* family name or NULL */
    const char *isa;            /* auto, generic, avx2, avx512, amx, dotprod */
    int threads;                /* 0: all */
    int cache_size, cache_recent, cache_age, cache_fact_age, retrieval_size; /* -1: the model's */
    int64_t max_distance, horizon;           /* -1: the model's */
    int64_t max_seq_len;        /* 0: the model's / none */
    /* serve (max_seqs, memory_mb and prefill_chunk: run and bench too) */
    const char *host; int port;
    const char *served_model_name; /* NULL: the model's name */
    const char *api_key;        /* NULL: open; comma-separated list */
    const char *cors_origin;    /* "*"; "": no CORS headers */
    int max_seqs;               /* slots; 0: by memory */
    int64_t memory_mb;          /* --memory: budget for slots in MiB; 0: a quarter of what is free */
    int max_queue, prefill_chunk;
    int64_t body_limit_kb, header_limit_kb; /* --body-limit, --header-limit */
    int idle_timeout_s;         /* --idle-timeout */
    int max_connections;
    int64_t output_limit_kb;    /* --output-limit: unread output per request before its sequence pauses */
    double drain_timeout_s;     /* --drain-timeout */
    /* run */
    const char *prompt;         /* positional; NULL: a chat on the terminal */
    bool raw;                   /* complete the prompt as it is, no chat template */
    const char *system;
    int64_t max_tokens; double temperature, top_p, min_p; int top_k; int64_t seed; /* seed -1: another one each time */
    /* eval (see convert/eval.h) */
    const char *text;           /* comma-separated files */
    const char *against;        /* model, "base", or NULL */
    const char *against_weights, *against_kv_type; /* kv type NULL: as kv_type */
    const char *tests, *ablate;
    const char *tasks;          /* questions, JSONL; NULL: none */
    const char *html;           /* where the page of results goes, with its JSON beside it; NULL: nowhere */
    int64_t context, stride, bin, tokens; /* stride 0: as the context allows; tokens 0: the whole text */
    const char *lengths, *memories; int tries, facts;  /* lists: settings_list */
    /* convert (see convert/recipe.h); NULL, -1 and 0: the recipe's.  text, seed, memory_mb and what overrides a model's attention too */
    const char *out, *recipe, *name;
    bool merge;                 /* MODEL and its base become one folder (convert/merge.h) */
    const char *retrieval_heads; /* how many, or which; NULL: the recipe's */
    double recall;              /* share of sequences that are synthetic */
    const char *softmax_layers; /* settings_list; NULL: none */
    const char *map, *key_map, *map_position, *window, *mixing, *loss, *schedule;
    int window_size, sinks, features;
    int steps, accumulate, length, long_length, long_every, rows, long_rows;
    int update_rows; /* -1: the recipe's */
    double lr, lr_mix, warmup, init_scale, mse_factor;
    bool join_documents;
    const char *finetune, *finetune_loss; /* NULL: the recipe's */
    const char *finetune_products;
    int finetune_steps, finetune_accumulate, finetune_retrieval_size, rank; /* steps -1, others 0: the recipe's */
    double finetune_lr, finetune_lr_maps; /* -1: the recipe's */
    /* bench (see server/bench.h); lists: settings_list */
    const char *n_prompt, *batch, *depth;
    int n_gen, repeat;
    bool json, profile;         /* info, eval, bench: print JSON; bench: and where time goes */
    /* logs */
    const char *log_level;      /* debug, info, warn, error */
    const char *log_format;     /* text, json */
    bool log_prompts;
    bool version;               /* --version was given: print URCHIN_VERSION (config/version.h) and exit 0 */
    struct settings_text *owned; /* every string above; settings_free */
};

/* Fills s from argv (after the program's name), environment and file.  ERR_ARG with the sentence (nothing to free then).  Strings live as
 * long as the returned settings (settings_free).  *help is set when --help was asked for, or nothing at all: then print settings_help
 * (settings_usage for COMMAND_NONE) and exit 0. */
enum err settings_load(struct settings *s, int argc, char **argv, bool *help, char *msg, size_t msg_len);
void settings_free(struct settings *s);
void settings_help(FILE *out, enum command command);   /* --help of one command */
void settings_usage(FILE *out);                        /* urchin --help */
void settings_markdown(FILE *out);                     /* docs/settings.md */

/* A comma-separated list of whole numbers ("0,1000,64000"), checked by settings_load: the first `room` into out, returns how many there are. */
int settings_list(const char *list, int64_t *out, int room);

#endif
