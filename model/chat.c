/* chat.c - rendering conversations as the families' Jinja templates do, without running Jinja.
 *
 * The families differ in their marks; within one, templates differ in small ways (a space beside
 * [INST], trimming, a default system text), and those are read off the template's text in chat_new.
 * Rendering writes one text and notes which parts are the family's own: only there may special
 * tokens be found, so that the tokens are those of the whole text (as Hugging Face's are) while a
 * message that says <|im_end|> stays text. */
#include "model/chat.h"

#include "model/tokenizer_impl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_STOPS = 2, MAX_MARK = 24 };

struct chat {
    const struct tokenizer *t; /* borrowed */
    enum chat_family family;
    bool bos;            /* the text begins with BOS; Llama-2: each user turn does */
    bool trim;           /* contents lose white space at both ends */
    bool tool_response;  /* ChatML: a tool's answers stand in a user turn, in <tool_response> (Qwen)
                          */
    bool eos_at_end;     /* Phi-3: EOS behind the last turn when no prompt for generation follows */
    bool system_in_last; /* Mistral: the system text goes into the last user turn, not the first */
    bool trim_answer, space_before_answer, space_before_eos,
        space_behind_eos; /* Llama-2, Mistral */
    char open[MAX_MARK],
        close[MAX_MARK]; /* Llama-2, Mistral: [INST] and [/INST] with their spaces */
    const char *line;    /* Phi-3: behind a mark */
    char *system;        /* owned; used when a conversation has no system message; NULL: none */
    char *preamble;      /* owned; Llama 3.1: begins the system text, which then is always there */
    int32_t stops[MAX_STOPS];
    int n_stops;
};

static const char *const family_names[] = {
    [CHAT_NONE] = "none",     [CHAT_CHATML] = "chatml",   [CHAT_LLAMA2] = "llama2",
    [CHAT_LLAMA3] = "llama3", [CHAT_MISTRAL] = "mistral", [CHAT_PHI3] = "phi3",
    [CHAT_GEMMA] = "gemma",   [CHAT_ZEPHYR] = "zephyr",
};
enum { N_FAMILIES = sizeof family_names / sizeof *family_names };
#define FAMILY_LIST "chatml, llama2, llama3, mistral, phi3, gemma, zephyr"

static bool is(const char *a, const char *b) {
    return a && strcmp(a, b) == 0;
}
static bool has(const char *text, const char *part) {
    return strstr(text, part) != NULL;
}

/* ---- what a template's text says ---- */

/* Zephyr ends the user's turn with EOS; others with its marks (Tulu, Falcon 3) do not. */
static bool user_turn_ends_with_eos(const char *jinja) {
    const char *user = strstr(jinja, "<|user|>");
    const char *eos = user ? strstr(user, "eos_token") : NULL;
    const char *next = user ? strstr(user + 1, "<|") : NULL;
    return eos && (!next || eos < next);
}

static bool recognise(const char *jinja, enum chat_family *family) {
    if (has(jinja, "<|im_start|>") && !has(jinja, "<|im_sep|>"))
        *family = CHAT_CHATML;
    else if (has(jinja, "<|start_header_id|>"))
        *family = CHAT_LLAMA3;
    else if (has(jinja, "<start_of_turn>"))
        *family = CHAT_GEMMA;
    else if (has(jinja, "<|assistant|>") && has(jinja, "<|end|>"))
        *family = CHAT_PHI3;
    else if (has(jinja, "<|assistant|>") && user_turn_ends_with_eos(jinja))
        *family = CHAT_ZEPHYR;
    else if (has(jinja, "[INST]") && has(jinja, "<<SYS>>"))
        *family = CHAT_LLAMA2;
    else if (has(jinja, "[INST]") && !has(jinja, "[SYSTEM_PROMPT]"))
        *family = CHAT_MISTRAL;
    else
        return false;
    return true;
}

/* A part of the template's text. */
struct part {
    const char *text; /* borrowed; NULL: none */
    size_t len;
};

static const char *find(struct part in, const char *what) {
    return in.text ? memmem(in.text, in.len, what, strlen(what)) : NULL;
}

static bool trims(struct part part) {
    return find(part, "| trim") || find(part, "|trim") || find(part, ".strip()");
}

/* The first {{ expression }} that holds both. */
static struct part expression_with(const char *jinja, const char *one, const char *other) {
    for (const char *p = jinja, *end; (p = strstr(p, "{{")) && (end = strstr(p, "}}")); p = end) {
        struct part part = {p + 2, (size_t)(end - p - 2)};
        if (find(part, one) && find(part, other)) return part;
    }
    return (struct part){0};
}

/* mark with the spaces that stand beside it inside its quotes */
static void copy_with_spaces(char out[MAX_MARK], struct part expression, const char *mark) {
    const char *begin = find(expression, mark);
    if (!begin) return;
    const char *end = begin + strlen(mark);
    bool quoted = begin - expression.text >= 2 && (begin[-2] == '\'' || begin[-2] == '"');
    if (quoted && begin[-1] == ' ') begin--;
    if (*end == ' ') end++;
    memcpy(out, begin, (size_t)(end - begin));
    out[end - begin] = 0;
}

static void read_inst(struct chat *chat, const char *jinja) {
    struct part user = expression_with(jinja, "[/INST]", "content");
    struct part answer = expression_with(jinja, "eos_token", "content");
    copy_with_spaces(chat->open, user, "[INST]");
    copy_with_spaces(chat->close, user, "[/INST]");
    chat->trim = trims(user);
    chat->trim_answer = trims(answer);
    chat->system_in_last = has(jinja, "loop.last and system_message");
    if (!answer.text) return;
    const char *first = answer.text + strspn(answer.text, "- \n");
    const char *eos = find(answer, "eos_token");
    struct part behind = {eos, (size_t)(answer.text + answer.len - eos)};
    chat->space_before_answer = strncmp(first, "' '", 3) == 0 || strncmp(first, "\" \"", 3) == 0;
    chat->space_before_eos = find(answer, "' ' + eos_token") || find(answer, "\" \" + eos_token");
    chat->space_behind_eos = find(behind, "' '") || find(behind, "\" \"");
}

/* The constant text between begin (a mark; a line end follows it) and end; *out stays NULL where
 * there is none.  A line end is written as such or as \n, inside quotes or as plain template text.
 */
static enum err constant_between(const char *jinja, const char *begin, const char *end,
                                 char **out) {
    for (const char *p = jinja, *next; (p = strstr(p, begin)); p = next) {
        char quote = p > jinja && (p[-1] == '\'' || p[-1] == '"') ? p[-1] : 0;
        p += strlen(begin);
        next = strstr(p, begin);
        if (!next) next = p + strlen(p);
        const char *stop = memmem(p, (size_t)(next - p), end, strlen(end));
        if (!stop) continue;
        char *text = malloc((size_t)(stop - p) + 1);
        if (!text) return ERR_NOMEM;
        size_t n = 0;
        bool constant = true;
        for (; p < stop && constant; p++) {
            if (*p == '\\' && quote && p + 1 < stop) {
                p++;
                text[n++] = *p == 'n' ? '\n' : *p == 't' ? '\t' : *p;
            } else {
                constant =
                    !(quote && *p == quote) && !(p[0] == '{' && (p[1] == '{' || p[1] == '%'));
                text[n++] = *p;
            }
        }
        text[n] = 0;
        if (constant && n > 1 && text[0] == '\n') {
            memmove(text, text + 1, n);
            *out = text;
            return OK;
        }
        free(text);
    }
    return OK;
}

/* Llama 3.1 and 3.2 say which day it is.  We say the day the template falls back to, so that a
 * request gives the same tokens tomorrow. */
static enum err read_preamble(struct chat *chat, const char *jinja) {
    static const char cutoff[] = "Cutting Knowledge Date: December 2023\n";
    if (!has(jinja, "Cutting Knowledge Date: December 2023")) return OK;
    const char *key = "date_string = \"", *day = strstr(jinja, key);
    size_t len = 0;
    if (day) len = strcspn(day += strlen(key), "\"");
    if (len == 0 || len > 40) day = "26 Jul 2024", len = strlen(day);
    if (asprintf(&chat->preamble, "%sToday Date: %.*s\n\n", cutoff, (int)len, day) < 0) {
        chat->preamble = NULL;
        return ERR_NOMEM;
    }
    return OK;
}

static enum err read_template(struct chat *chat, const char *jinja) {
    chat->bos = has(jinja, "bos_token");
    chat->trim = trims((struct part){jinja, strlen(jinja)});
    switch (chat->family) {
    case CHAT_CHATML:
        chat->tool_response = has(jinja, "<tool_response>");
        return constant_between(jinja, "<|im_start|>system", "<|im_end|>", &chat->system);
    case CHAT_LLAMA3:
        return read_preamble(chat, jinja);
    case CHAT_PHI3:
        chat->eos_at_end = has(jinja, "{% else %}{{ eos_token }}");
        chat->line = has(jinja, "'<|assistant|>' }}") ? "" : "\n";
        return OK;
    case CHAT_LLAMA2:
    case CHAT_MISTRAL:
        read_inst(chat, jinja);
        return OK;
    default:
        return OK;
    }
}

/* ---- opening ---- */

static void set_defaults(struct chat *chat) {
    enum chat_family f = chat->family;
    chat->line = "\n";
    chat->bos = tokenizer_add_bos(chat->t) || f == CHAT_LLAMA2 || f == CHAT_LLAMA3 ||
                f == CHAT_MISTRAL || f == CHAT_GEMMA;
    chat->trim = f == CHAT_LLAMA2 || f == CHAT_LLAMA3 || f == CHAT_GEMMA;
    chat->trim_answer = chat->space_before_answer = chat->space_before_eos = f == CHAT_LLAMA2;
    strcpy(chat->open, "[INST] ");
    strcpy(chat->close, " [/INST]");
}

static void find_stops(struct chat *chat) {
    static const char *const pieces[N_FAMILIES][MAX_STOPS] = {
        [CHAT_CHATML] = {"<|im_end|>", "<|endoftext|>"},
        [CHAT_LLAMA3] = {"<|eot_id|>", "<|eom_id|>"},
        [CHAT_PHI3] = {"<|end|>", "<|endoftext|>"},
        [CHAT_GEMMA] = {"<end_of_turn>"},
    };
    for (int i = 0; i < MAX_STOPS && pieces[chat->family][i]; i++) {
        int32_t id = token_lookup(chat->t, pieces[chat->family][i]);
        if (id >= 0 && id != tokenizer_eos(chat->t)) chat->stops[chat->n_stops++] = id;
    }
}

enum err chat_new(struct chat **out, const struct tokenizer *t, const char *jinja,
                  const char *family_name, char *msg, size_t msg_len) {
    enum chat_family family = CHAT_NONE, recognised = CHAT_NONE;
    bool known = !jinja || !*jinja || recognise(jinja, &recognised);
    if (family_name) {
        int f = 0;
        while (f < N_FAMILIES && !is(family_name, family_names[f]))
            f++;
        if (f == N_FAMILIES)
            return err_set(msg, msg_len, ERR_ARG,
                           "--chat-template \"%.40s\" is not one of " FAMILY_LIST ", none",
                           family_name);
        family = (enum chat_family)f;
    } else if (known) {
        family = recognised;
    } else {
        return err_set(msg, msg_len, ERR_ARG,
                       "the model's chat template is of none of the families " FAMILY_LIST
                       "; choose one, or none, with --chat-template FAMILY");
    }
    struct chat *chat = calloc(1, sizeof *chat);
    if (!chat) return ERR_NOMEM;
    chat->t = t;
    chat->family = family;
    set_defaults(chat);
    if (family != CHAT_NONE && family == recognised && read_template(chat, jinja) != OK) {
        chat_free(chat);
        return err_set(msg, msg_len, ERR_NOMEM, "out of memory while reading the chat template");
    }
    find_stops(chat);
    *out = chat;
    return OK;
}

void chat_free(struct chat *chat) {
    if (!chat) return;
    free(chat->system);
    free(chat->preamble);
    free(chat);
}

enum chat_family chat_family(const struct chat *chat) {
    return chat->family;
}
const char *chat_family_name(enum chat_family family) {
    return family_names[family];
}

const int32_t *chat_stop_tokens(const struct chat *chat, int *n) {
    *n = chat->n_stops;
    return chat->stops;
}

/* ---- rendering ---- */

enum role { SYSTEM, USER, ASSISTANT, TOOL, N_ROLES };
static const char *const role_names[] = {"system", "user", "assistant", "tool"};

struct turn {
    enum role role;
    const char *text; /* borrowed, trimmed where the family trims */
    size_t len;
};

struct rendering {
    struct bytes text;
    struct text_range *marks; /* owned; the family's own parts of text */
    size_t n_marks, marks_cap;
    bool failed; /* no memory */
};

static void add_text(struct rendering *r, const char *text, size_t len) {
    if (!r->failed && !bytes_add(&r->text, text, len)) r->failed = true;
}

static void add_mark(struct rendering *r, const char *mark) {
    size_t begin = r->text.len;
    add_text(r, mark, strlen(mark));
    if (r->failed || begin == r->text.len) return;
    if (r->n_marks && r->marks[r->n_marks - 1].end == begin) {
        r->marks[r->n_marks - 1].end = r->text.len;
        return;
    }
    if (r->n_marks == r->marks_cap) {
        size_t cap = r->marks_cap * 2 + 16;
        struct text_range *marks = realloc(r->marks, cap * sizeof *marks);
        if (!marks) {
            r->failed = true;
            return;
        }
        r->marks = marks;
        r->marks_cap = cap;
    }
    r->marks[r->n_marks++] = (struct text_range){begin, r->text.len};
}

static void add_turn_text(struct rendering *r, const struct turn *turn) {
    add_text(r, turn->text, turn->len);
}

static const char *bos_piece(const struct chat *chat) {
    return chat->bos ? token_piece(chat->t, tokenizer_bos(chat->t)) : "";
}

static const char *eos_piece(const struct chat *chat) {
    return token_piece(chat->t, tokenizer_eos(chat->t));
}

static void trim(struct turn *turn) {
    size_t n;
    while ((n = utf8_space_at(turn->text, turn->len)))
        turn->text += n, turn->len -= n;
    while ((n = utf8_space_before(turn->text, turn->len)))
        turn->len -= n;
}

/* Each family's way of writing: open_end leaves the last turn open, prompt opens the assistant's.
 */
static void render_chatml(const struct chat *chat, struct rendering *r, const struct turn *turns,
                          size_t n, bool open_end, bool prompt) {
    if (turns[0].role != SYSTEM && chat->system) {
        add_mark(r, "<|im_start|>system\n");
        add_mark(r, chat->system);
        add_mark(r, "<|im_end|>\n");
    }
    for (size_t i = 0; i < n; i++) {
        bool tool = turns[i].role == TOOL && chat->tool_response;
        bool first_tool = tool && (i == 0 || turns[i - 1].role != TOOL);
        bool last_tool = tool && (i + 1 == n || turns[i + 1].role != TOOL);
        if (!tool || first_tool) {
            add_mark(r, "<|im_start|>");
            add_mark(r, tool ? "user" : role_names[turns[i].role]);
        }
        add_mark(r, tool ? "\n<tool_response>\n" : "\n");
        add_turn_text(r, &turns[i]);
        if (i + 1 == n && open_end) break;
        if (tool) add_mark(r, "\n</tool_response>");
        if (!tool || last_tool) add_mark(r, "<|im_end|>\n");
    }
    if (prompt) add_mark(r, "<|im_start|>assistant\n");
}

static void add_llama3_header(struct rendering *r, const char *role) {
    add_mark(r, "<|start_header_id|>");
    add_mark(r, role);
    add_mark(r, "<|end_header_id|>\n\n");
}

static void render_llama3(const struct chat *chat, struct rendering *r, const struct turn *turns,
                          size_t n, bool open_end, bool prompt) {
    if (chat->preamble && turns[0].role != SYSTEM) {
        add_llama3_header(r, "system");
        add_mark(r, chat->preamble);
        add_mark(r, "<|eot_id|>");
    }
    for (size_t i = 0; i < n; i++) {
        add_llama3_header(r, role_names[turns[i].role]);
        if (i == 0 && turns[i].role == SYSTEM && chat->preamble) add_mark(r, chat->preamble);
        add_turn_text(r, &turns[i]);
        if (i + 1 < n || !open_end) add_mark(r, "<|eot_id|>");
    }
    if (prompt) add_llama3_header(r, "assistant");
}

static void render_phi3(const struct chat *chat, struct rendering *r, const struct turn *turns,
                        size_t n, bool open_end, bool prompt) {
    static const char *const marks[] = {"<|system|>", "<|user|>", "<|assistant|>"};
    for (size_t i = 0; i < n; i++) {
        add_mark(r, marks[turns[i].role]);
        add_mark(r, chat->line);
        add_turn_text(r, &turns[i]);
        if (i + 1 == n && open_end) return;
        add_mark(r, "<|end|>");
        add_mark(r, chat->line);
    }
    if (prompt) {
        add_mark(r, "<|assistant|>");
        add_mark(r, chat->line);
    } else if (chat->eos_at_end) {
        add_mark(r, eos_piece(chat));
    }
}

static void render_zephyr(const struct chat *chat, struct rendering *r, const struct turn *turns,
                          size_t n, bool open_end, bool prompt) {
    static const char *const marks[] = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"};
    for (size_t i = 0; i < n; i++) {
        add_mark(r, marks[turns[i].role]);
        add_turn_text(r, &turns[i]);
        if (i + 1 == n && open_end) return;
        add_mark(r, eos_piece(chat));
        add_mark(r, "\n");
    }
    if (prompt) add_mark(r, marks[ASSISTANT]);
}

/* Gemma 1 and 2 know no system text; as in Gemma 3's template it precedes the first user's. */
static void render_gemma(const struct chat *chat, struct rendering *r, const struct turn *turns,
                         size_t n, bool open_end, bool prompt) {
    (void)chat;
    for (size_t i = turns[0].role == SYSTEM; i < n; i++) {
        add_mark(r, turns[i].role == USER ? "<start_of_turn>user\n" : "<start_of_turn>model\n");
        if (i == 1 && turns[0].role == SYSTEM) {
            add_turn_text(r, &turns[0]);
            add_mark(r, "\n\n");
        }
        add_turn_text(r, &turns[i]);
        if (i + 1 < n || !open_end) add_mark(r, "<end_of_turn>\n");
    }
    if (prompt) add_mark(r, "<start_of_turn>model\n");
}

static void render_inst(const struct chat *chat, struct rendering *r, const struct turn *turns,
                        size_t n, bool open_end, bool prompt) {
    (void)prompt;         /* [/INST] is the prompt */
    size_t system_at = n; /* the user turn that takes the system text */
    for (size_t i = 0; i < n && turns[0].role == SYSTEM; i++)
        if (turns[i].role == USER && (system_at == n || chat->system_in_last)) system_at = i;
    for (size_t i = turns[0].role == SYSTEM; i < n; i++) {
        bool ends = i + 1 < n || !open_end;
        if (turns[i].role == USER) {
            if (chat->family == CHAT_LLAMA2) add_mark(r, bos_piece(chat));
            add_mark(r, chat->open);
            if (i == system_at) {
                if (chat->family == CHAT_LLAMA2) add_mark(r, "<<SYS>>\n");
                add_turn_text(r, &turns[0]);
                add_mark(r, chat->family == CHAT_LLAMA2 ? "\n<</SYS>>\n\n" : "\n\n");
            }
            add_turn_text(r, &turns[i]);
            if (ends) add_mark(r, chat->close);
        } else {
            if (chat->space_before_answer) add_mark(r, " ");
            add_turn_text(r, &turns[i]);
            if (!ends) continue;
            if (chat->space_before_eos) add_mark(r, " ");
            add_mark(r, eos_piece(chat));
            if (chat->space_behind_eos) add_mark(r, " ");
        }
    }
}

static void render_plain(const struct chat *chat, struct rendering *r, const struct turn *turns,
                         size_t n, bool open_end, bool prompt) {
    (void)chat, (void)open_end, (void)prompt;
    for (size_t i = 0; i < n; i++) {
        if (i > 0) add_text(r, "\n", 1);
        add_turn_text(r, &turns[i]);
    }
}

struct family {
    void (*render)(const struct chat *chat, struct rendering *r, const struct turn *turns, size_t n,
                   bool open_end, bool prompt);
    bool system_first; /* a system message stands first and goes into a user's turn */
    bool tools;        /* there is a place for a tool's answer */
};

static const struct family families[] = {
    [CHAT_NONE] = {render_plain, false, true},   [CHAT_CHATML] = {render_chatml, false, true},
    [CHAT_LLAMA2] = {render_inst, true, false},  [CHAT_LLAMA3] = {render_llama3, false, false},
    [CHAT_MISTRAL] = {render_inst, true, false}, [CHAT_PHI3] = {render_phi3, false, false},
    [CHAT_GEMMA] = {render_gemma, true, false},  [CHAT_ZEPHYR] = {render_zephyr, false, false},
};

static enum err read_turns(const struct chat *chat, const struct chat_message *messages, size_t n,
                           struct turn *turns, char *msg, size_t msg_len) {
    const struct family *family = &families[chat->family];
    const char *name = chat_family_name(chat->family);
    if (n == 0) return err_set(msg, msg_len, ERR_ARG, "messages is empty");
    for (size_t i = 0; i < n; i++) {
        int role = 0;
        while (role < N_ROLES && !is(messages[i].role, role_names[role]))
            role++;
        if (is(messages[i].role, "developer")) role = SYSTEM;
        if (role == N_ROLES)
            return err_set(msg, msg_len, ERR_ARG,
                           "messages[%zu].role \"%.40s\" is not one of system, developer, user, "
                           "assistant, tool",
                           i, messages[i].role ? messages[i].role : "");
        if (role == TOOL && !family->tools)
            return err_set(
                msg, msg_len, ERR_ARG,
                "messages[%zu].role is tool, for which the %s chat template has no place", i, name);
        if (role == SYSTEM && i > 0 && family->system_first)
            return err_set(
                msg, msg_len, ERR_ARG,
                "messages[%zu].role is system, which the %s chat template takes only first", i,
                name);
        if (i == 1 && turns[0].role == SYSTEM && role != USER && family->system_first)
            return err_set(
                msg, msg_len, ERR_ARG,
                "messages[1].role is %s, but the %s chat template needs user behind system",
                role_names[role], name);
        turns[i] = (struct turn){(enum role)role, messages[i].content, messages[i].content_len};
        /* In the [INST] families the system text is not trimmed, and a text behind it only at its
         * end. */
        bool inst = chat->family == CHAT_LLAMA2 || chat->family == CHAT_MISTRAL;
        bool trimmed = inst && role == ASSISTANT ? chat->trim_answer : chat->trim;
        if (trimmed && !(family->system_first && role == SYSTEM)) {
            struct turn whole = turns[i];
            trim(&turns[i]);
            if (inst && i == 1 && turns[0].role == SYSTEM) {
                turns[i].len += (size_t)(turns[i].text - whole.text);
                turns[i].text = whole.text;
            }
        }
    }
    if (n == 1 && turns[0].role == SYSTEM && family->system_first)
        return err_set(
            msg, msg_len, ERR_ARG,
            "messages has only a system message: the %s chat template needs user behind it", name);
    return OK;
}

enum err chat_render(const struct chat *chat, const struct chat_message *messages,
                     size_t n_messages, bool add_generation_prompt, bool continue_final,
                     int32_t **ids, size_t *n_ids, char *msg, size_t msg_len) {
    struct rendering r = {0};
    enum err e = ERR_NOMEM;
    struct turn *turns = calloc(n_messages + 1, sizeof *turns);
    if (!turns) goto done;
    e = read_turns(chat, messages, n_messages, turns, msg, msg_len);
    if (e != OK) goto done;
    bool plain = chat->family == CHAT_NONE;
    if (!plain && chat->family != CHAT_LLAMA2) add_mark(&r, bos_piece(chat));
    families[chat->family].render(chat, &r, turns, n_messages, continue_final,
                                  add_generation_prompt && !continue_final);
    e = r.failed
            ? ERR_NOMEM
            : tokenize_ranges(chat->t, r.text.data ? r.text.data : "", r.text.len, r.marks,
                              r.n_marks, plain && tokenizer_add_bos(chat->t), false, ids, n_ids);
done:
    if (e == ERR_NOMEM) err_set(msg, msg_len, e, "out of memory for the conversation");
    free(turns);
    free(r.text.data);
    free(r.marks);
    return e;
}
