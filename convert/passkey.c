/* passkey.c - a five-digit number hidden in a text, and whether the model can repeat it. */
#include "convert/passkey.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

uint64_t passkey_mix(uint64_t x) { /* Steele et al. 2014 */
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

enum err passkey_make(struct passkey *out, const struct tokenizer *tokenizer,
                      const struct text *filler, int64_t seed, int64_t length, int i, int n_tries,
                      char *msg, size_t msg_len) {
    uint64_t random = (uint64_t)length ^ (seed > 0 ? passkey_mix((uint64_t)seed) : 0);
    random = passkey_mix(passkey_mix(random) + (uint64_t)i);
    struct passkey p = {.n = length};
    snprintf(p.key, sizeof p.key, "%d", 10000 + (int)(random % 90000));

    char fact[128], answer[16];
    static const char question[] = "\nWhat is the pass key? The pass key is";
    snprintf(fact, sizeof fact, "\nThe pass key is %s. Remember it. The pass key is %s.\n", p.key,
             p.key);
    snprintf(answer, sizeof answer, " %s", p.key);
    int32_t *fact_ids = NULL, *question_ids = NULL, *answer_ids = NULL;
    size_t n_fact = 0, n_question = 0, n_answer = 0;
    enum err err = tokenize(tokenizer, fact, strlen(fact), 0, &fact_ids, &n_fact);
    if (!err) err = tokenize(tokenizer, question, strlen(question), 0, &question_ids, &n_question);
    if (!err) err = tokenize(tokenizer, answer, strlen(answer), 0, &answer_ids, &n_answer);
    if (err) goto done;

    int64_t bos = filler->bos >= 0;
    int64_t n_fill = length - (int64_t)n_fact - (int64_t)n_question - bos;
    if (n_fill < 0 || n_fill > filler->n) {
        err = err_set(msg, msg_len, ERR_ARG,
                      "a passkey prompt of %lld tokens needs %lld tokens of text, there are %lld",
                      (long long)length, (long long)n_fill, (long long)filler->n);
        goto done;
    }
    p.n_answer = (int)n_answer;
    p.ids = malloc(((size_t)length + n_answer) * sizeof *p.ids);
    if (!p.ids) {
        err = err_set(msg, msg_len, ERR_NOMEM, "out of memory");
        goto done;
    }
    const int32_t *fill = filler->ids + passkey_mix(random) % (uint64_t)(filler->n - n_fill + 1);
    size_t before = (size_t)(n_fill * (2 * i + 1) / (2 * n_tries));
    size_t after = (size_t)n_fill - before;
    int32_t *to = p.ids;
    if (bos) *to++ = filler->bos;
    memcpy(to, fill, before * sizeof *to);
    memcpy(to += before, fact_ids, n_fact * sizeof *to);
    memcpy(to += n_fact, fill + before, after * sizeof *to);
    memcpy(to += after, question_ids, n_question * sizeof *to);
    memcpy(to + n_question, answer_ids, n_answer * sizeof *to);
    *out = p;
done:
    free(fact_ids);
    free(question_ids);
    free(answer_ids);
    return err;
}

enum err passkey_answer(struct answer *out, struct reader *reader, const int32_t *ids, int64_t n,
                        int n_answer, char *msg, size_t msg_len) {
    int vocab_size = model_info(reader->model)->vocab_size;
    const int32_t *answer = ids + n;
    const float *logits;
    enum err err = reader_feed(reader, ids, n + n_answer - 1, n_answer, &logits, msg, msg_len);
    if (err) return err;
    *out = (struct answer){.whole = true};
    for (int i = 0; i < n_answer; i++, logits += vocab_size) {
        int32_t best = 0;
        for (int32_t t = 1; t < vocab_size; t++)
            if (logits[t] > logits[best]) best = t;
        if (best != answer[i]) {
            out->whole = false;
            continue;
        }
        size_t bytes;
        const char *text = token_bytes(model_tokenizer(reader->model), best, false, &bytes);
        for (size_t b = 0; b < bytes; b++)
            out->digits += text[b] >= '0' && text[b] <= '9';
    }
    return OK;
}

enum err passkey_ask(struct answer *out, struct reader *reader, const struct passkey *passkey,
                     char *msg, size_t msg_len) {
    model_slot_clear(reader->model, reader->slot);
    return passkey_answer(out, reader, passkey->ids, passkey->n, passkey->n_answer, msg, msg_len);
}
