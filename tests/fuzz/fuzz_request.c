/* fuzz_request.c - bodies of /v1/completions, /tokenize and /detokenize: a struct or a 4xx with a
 * message, never a crash or a leak. */
#include "server/request.h"

#include <assert.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_error(const struct api_error *e) {
    assert(e->status >= 400 && e->type && e->message[0]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *body = (const char *)data;
    struct api_error e;
    struct api_request r;
    struct api_tokenize t;
    struct api_detokenize d;
    if (api_parse_completion(&r, body, size, &e)) {
        const struct sched_request *g = &r.generate;
        assert(r.n_prompts >= 1 && g->n >= 1 && g->best_of >= g->n && g->max_tokens >= 0);
        assert(g->max_tokens > 0 || r.echo);
        assert(g->sampling.temperature >= 0 && g->sampling.top_p > 0 && g->sampling.top_p <= 1);
        for (size_t i = 0; i < r.n_prompts; i++)
            assert(r.prompts[i].text || r.prompts[i].n_ids > 0);
        for (int i = 1; i < g->sampling.n_bias; i++)
            assert(g->sampling.bias[i - 1].token < g->sampling.bias[i].token);
        api_request_free(&r);
    } else {
        check_error(&e);
    }
    if (api_parse_tokenize(&t, body, size, &e))
        api_request_free(&t.request);
    else
        check_error(&e);
    if (api_parse_detokenize(&d, body, size, &e))
        free(d.ids);
    else
        check_error(&e);
    return 0;
}
