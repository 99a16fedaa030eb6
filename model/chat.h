/* chat.h - chat messages to the text a model was trained on.
 *
 * The template's Jinja source is recognised, not run: families are told apart by their marks.
 * Special tokens come from the family alone; user text never becomes one (it is tokenised without TOKENIZE_SPECIAL). */
#ifndef URCHIN_MODEL_CHAT_H
#define URCHIN_MODEL_CHAT_H

#include "config/err.h"
#include "model/tokenizer.h"

enum chat_family { CHAT_NONE, CHAT_CHATML, CHAT_LLAMA2, CHAT_LLAMA3, CHAT_MISTRAL, CHAT_PHI3, CHAT_GEMMA, CHAT_ZEPHYR };

struct chat_message {
    const char *role;    /* system, developer (read as system), user, assistant, tool */
    const char *content; /* bytes, content_len long */
    size_t content_len;
};

struct chat; /* family, default system text and end-of-turn tokens of one model */

/* family_name: NULL recognises jinja (NULL or "": CHAT_NONE, contents joined by line ends, the caller warns
 * once); otherwise one of chatml, llama2, llama3, mistral, phi3, gemma, zephyr, none.  An unknown
 * template or name is ERR_ARG with a sentence listing the families and --chat-template.  t borrowed for the chat's life. */
enum err chat_new(struct chat **out, const struct tokenizer *t, const char *jinja,
                  const char *family_name, char *msg, size_t msg_len);
void chat_free(struct chat *chat);
enum chat_family chat_family(const struct chat *chat);
const char *chat_family_name(enum chat_family family);

/* Tokens of a conversation, with BOS as the family wants it.  add_generation_prompt opens the assistant's turn;
 * continue_final leaves the last message's turn open instead.  *ids malloc'd.  ERR_ARG: a role the family cannot place. */
enum err chat_render(const struct chat *chat, const struct chat_message *messages, size_t n_messages,
                     bool add_generation_prompt, bool continue_final, int32_t **ids, size_t *n_ids,
                     char *msg, size_t msg_len);

/* Tokens that end an assistant's turn in this family besides EOS (e.g. <|im_end|>, <|eot_id|>): borrowed array. */
const int32_t *chat_stop_tokens(const struct chat *chat, int *n);

#endif
