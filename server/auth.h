/* auth.h - API keys: which are known, and does a request carry one? */
#ifndef URCHIN_SERVER_AUTH_H
#define URCHIN_SERVER_AUTH_H

#include "config/err.h"
#include <stdbool.h>

struct auth;

/* keys: separated by commas, white space around them dropped; NULL: no key is asked for.  ERR_ARG:
 * an empty key. */
enum err auth_new(struct auth **out, const char *keys, char *msg, size_t msg_len);
void auth_free(struct auth *auth);

/* authorization: the header "Authorization" ("Bearer KEY"), x_api_key: "X-Api-Key"; NULL when
 * absent.  Takes the same time whatever part of a key is right. */
bool auth_allows(const struct auth *auth, const char *authorization, const char *x_api_key);

#endif
