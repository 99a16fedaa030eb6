/* auth.c - comparing keys without telling how much of one was right. */
#include "server/auth.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

struct auth {
    bool required;
    char *text;  /* owned: the keys, NUL between them */
    char **keys; /* owned array, into text */
    int n_keys;
};

enum err auth_new(struct auth **out, const char *keys, char *msg, size_t msg_len) {
    struct auth *a = calloc(1, sizeof *a);
    if (!a) return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    if (!keys) {
        *out = a;
        return OK;
    }
    size_t most = 1;
    for (const char *p = keys; *p; p++)
        most += *p == ',';
    a->required = true;
    a->text = strdup(keys);
    a->keys = calloc(most, sizeof *a->keys);
    if (!a->text || !a->keys) {
        auth_free(a);
        return err_set(msg, msg_len, ERR_NOMEM, "out of memory");
    }
    for (char *rest = a->text, *key; (key = strsep(&rest, ",")) != NULL;) {
        key += strspn(key, " \t");
        size_t n = strlen(key);
        while (n && strchr(" \t\r\n", key[n - 1]))
            n--;
        key[n] = 0;
        if (n == 0) {
            auth_free(a);
            return err_set(msg, msg_len, ERR_ARG, "--api-key: one of the keys is empty");
        }
        a->keys[a->n_keys++] = key;
    }
    *out = a;
    return OK;
}

void auth_free(struct auth *a) {
    if (!a) return;
    free(a->text);
    free(a->keys);
    free(a);
}

/* Time depends on the lengths alone. */
static bool same(const char *key, const char *given) {
    size_t n_key = strlen(key), n = strlen(given);
    volatile unsigned char differ = n_key != n;
    for (size_t i = 0; i < n; i++)
        differ |= (unsigned char)(given[i] ^ key[i % n_key]);
    return differ == 0;
}

static bool known(const struct auth *a, const char *given) {
    bool found = false;
    for (int i = 0; i < a->n_keys; i++)
        found |= same(a->keys[i], given);
    return found;
}

bool auth_allows(const struct auth *a, const char *authorization, const char *x_api_key) {
    if (!a->required) return true;
    if (authorization && strncasecmp(authorization, "bearer ", 7) == 0 &&
        known(a, authorization + 7 + strspn(authorization + 7, " ")))
        return true;
    return x_api_key && known(a, x_api_key);
}
