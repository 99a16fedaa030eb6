/* recall_text.c - the grammar of facts and questions, and their way into tokens. */
#include "convert/recall_text.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- chance ---- */
static uint64_t next(uint64_t *s) { /* splitmix64 (Steele et al. 2014) */
    uint64_t x = *s += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}
static int below(uint64_t *s, int n) {
    return (int)(next(s) % (uint64_t)n);
}

/* ---- words ---- */
#define WORDS(name, ...) static const char *const name[] = {__VA_ARGS__}
#define COUNT(list) ((int)(sizeof(list) / sizeof *(list)))
#define ONE_OF(s, list) ((list)[below(s, COUNT(list))])

WORDS(firsts, "Mira", "Jonas", "Aisha", "Pavel", "Lucia", "Tomas", "Ingrid", "Rahul", "Elena",
      "Mateo", "Sofia", "Anders", "Yuki", "Omar", "Clara", "Dmitri", "Nadia", "Samuel", "Greta",
      "Hassan", "Beatrice", "Kofi", "Lena", "Arthur", "Mei", "Viktor", "Rosa", "Daniel", "Amina",
      "Felix", "Helen", "Isaac", "Julia", "Marcus", "Nora", "Peter", "Ruth", "Simon", "Tara",
      "William");
WORDS(lasts, "Novak", "Berg", "Okafor", "Silva", "Larsen", "Marino", "Petrov", "Khan", "Weber",
      "Tanaka", "Moreau", "Walsh", "Lindqvist", "Costa", "Haddad", "Jansen", "Kovac", "Mensah",
      "Fischer", "Ortega", "Becker", "Doyle", "Ferrari", "Grant", "Hughes", "Ivanov", "Keller",
      "Moretti", "Nash", "Olsen", "Parker", "Quinn", "Romero", "Sato", "Turner", "Vogel", "Wright",
      "Young", "Zimmer", "Abbott");
WORDS(cities, "Porto", "Oslo", "Nairobi", "Lima", "Kyoto", "Prague", "Dublin", "Hanoi", "Seville",
      "Montreal", "Cairo", "Athens", "Boston", "Bergen", "Turin", "Krakow", "Accra", "Quito",
      "Vienna", "Bristol", "Osaka", "Denver", "Lyon", "Tallinn", "Havana", "Glasgow", "Mumbai",
      "Zagreb", "Geneva", "Perth", "Leipzig", "Riga", "Malaga", "Tunis", "Dakar", "Santiago",
      "Helsinki", "Antwerp", "Portland", "Naples");
WORDS(colours, "red", "blue", "green", "yellow", "black", "white", "silver", "brown", "purple",
      "pink", "grey", "golden");
WORDS(things, "bicycle", "umbrella", "guitar", "lantern", "suitcase", "teapot", "scarf", "kite",
      "violin", "notebook", "telescope", "rucksack", "canoe", "clock", "mirror", "carpet", "hammer",
      "camera", "drum", "basket", "vase", "boat", "wagon", "chair", "sledge", "flute", "coat",
      "ladder", "trumpet", "bell");
WORDS(goods, "coffee grinder", "garden bench", "wool blanket", "desk lamp", "copper kettle",
      "chess set", "leather satchel", "oak table", "winter tent", "piano stool", "brass compass",
      "rocking horse", "bread oven", "sewing machine", "picture frame", "fishing rod",
      "silk curtain", "stone fountain", "iron gate", "bird cage", "water pump", "apple press",
      "paper mill", "glass cabinet", "feather pillow", "travel trunk", "music box", "tool chest",
      "honey jar", "snow shovel");
WORDS(locks, "the cellar door", "the north gate", "the archive", "the boat house", "the old safe",
      "the laboratory", "the server room", "the attic", "the wine store", "the map room",
      "the tool shed", "the vault", "the side entrance", "the garage", "the library annex",
      "the engine room", "the greenhouse", "the chapel", "the post room", "the signal box");
WORDS(events, "the harbour meeting", "the choir rehearsal", "the chess final", "the night train",
      "the budget review", "the museum tour", "the first ferry", "the book club",
      "the dental check", "the evening lecture", "the football match", "the cooking class",
      "the mountain bus", "the film screening", "the job interview", "the piano lesson",
      "the market opening", "the wedding toast", "the radio show", "the flight to the coast");
WORDS(places, "under the stairs", "behind the bookcase", "in the top drawer", "beside the well",
      "inside the piano", "on the window sill", "below the loose board", "in the flour tin",
      "behind the clock", "under the doormat", "in the garden wall", "beneath the anchor",
      "inside the drum", "above the stove", "in the coat pocket", "behind the mirror",
      "under the third stone", "in the sewing box", "on the roof beam", "beside the chimney");

static void name_of(char *out, uint64_t *s) {
    snprintf(out, 64, "%s %s", ONE_OF(s, firsts), ONE_OF(s, lasts));
}

static void digits(char *out, uint64_t *s, int n) {
    out[0] = (char)('1' + below(s, 9));
    for (int i = 1; i < n; i++)
        out[i] = (char)('0' + below(s, 10));
    out[n] = 0;
}

static void code(char *out, uint64_t *s) {
    static const char letters[] = "ABCDEFGHJKLMNPQRSTUVWXYZ";
    int n = 2 + below(s, 2), at = 0;
    for (; at < n; at++)
        out[at] = letters[below(s, 24)];
    out[at++] = '-';
    digits(out + at, s, 3 + below(s, 2));
}

static void made_word(char *out, uint64_t *s) { /* "tamorik" */
    static const char *const syllables[] = {"ta", "mo", "ri", "ke", "lu", "sa", "no", "vi",
                                            "be", "du", "fa", "go", "hi", "jo", "pe", "zu"};
    int n = 3 + below(s, 2);
    out[0] = 0;
    for (int i = 0; i < n; i++)
        strcat(out, ONE_OF(s, syllables));
    if (below(s, 2)) strncat(out, &"nrlkst"[below(s, 6)], 1);
}

/* ---- the grammar: $ stands for the subject, # for the value ---- */
enum kind { PASS_KEY, OWNED_KEY, LOCK_CODE, WORD, CITY, BELONGING, PRICE, TIME, PLACE, N_KINDS };

enum { FORMS = 4 };
static const struct {
    const char *sentences[FORMS];
    struct {
        const char *question, *answer;
        bool subject; /* the question gives the value and wants the subject */
    } questions[FORMS];
} kinds[N_KINDS] = {
    [PASS_KEY] = {{"Remember the secret number: it is #. Again, the secret number is #.",
                   "The secret number to keep in mind is #.",
                   "Here is the secret number, do not forget it: #.",
                   "Important: the secret number is #. You will be asked for it."},
                  {{"What is the secret number?", "The secret number is #.", false},
                   {"Which secret number was mentioned?", "The secret number was #.", false},
                   {"What was the secret number in the text?", "The secret number is #.", false},
                   {"Tell me the secret number.", "It is #.", false}}},
    [OWNED_KEY] = {{"The personal key of $ is #.", "$ has the personal key #.",
                    "# is the personal key of $.", "Note: the personal key of $ is #."},
                   {{"What is the personal key of $?", "The personal key of $ is #.", false},
                    {"Which personal key does $ have?", "$ has the personal key #.", false},
                    {"Whose personal key is #?", "# is the personal key of $.", true},
                    {"Give me the personal key of $.", "It is #.", false}}},
    [LOCK_CODE] = {{"The code for $ is #.", "To open $, enter #.",
                    "Whoever wants to open $ needs the code #.", "# opens $."},
                   {{"What is the code for $?", "The code for $ is #.", false},
                    {"Which code opens $?", "The code # opens it.", false},
                    {"What does one enter to open $?", "One enters #.", false},
                    {"What does the code # open?", "The code # opens $.", true}}},
    [WORD] = {{"The password that $ chose is \"#\".", "$ says the password is \"#\".",
               "\"#\" is the password of $.", "$ set a new password, \"#\"."},
              {{"What is the password of $?", "The password is \"#\".", false},
               {"Which password did $ choose?", "$ chose \"#\".", false},
               {"Who has the password \"#\"?", "The password \"#\" belongs to $.", true},
               {"Tell me the password of $.", "It is \"#\".", false}}},
    [CITY] = {{"$ lives in #.", "$ moved to # a year ago.", "The home of $ is in #.",
               "In # lives a person by the name of $."},
              {{"Where does $ live?", "$ lives in #.", false},
               {"In which city is the home of $?", "The home of $ is in #.", false},
               {"Who lives in #?", "The one who lives in # is $.", true},
               {"Name the city where $ lives.", "It is #.", false}}},
    [BELONGING] = {{"$ owns a #.", "The # belongs to $.", "$ bought a # at the market.",
                    "The # by the door is the property of $."},
                   {{"What does $ own?", "$ owns a #.", false},
                    {"Who owns the #?", "The # belongs to $.", true},
                    {"To whom does the # belong?", "It belongs to $.", true},
                    {"Which thing belongs to $?", "It is the #.", false}}},
    [PRICE] = {{"The $ costs # dollars.", "For the $ they ask # dollars.",
                "The price of the $ is # dollars.", "Someone paid # dollars for the $."},
               {{"How much does the $ cost?", "The $ costs # dollars.", false},
                {"What is the price of the $?", "The price is # dollars.", false},
                {"How many dollars do they ask for the $?", "They ask # dollars.", false},
                {"What costs # dollars?", "For # dollars one gets the $.", true}}},
    [TIME] = {{"The time set for $ is #.", "At # it is time for $.", "They planned $ for #.",
               "Do not miss $ at #."},
              {{"When is $?", "The time is #.", false},
               {"At what time is $ planned?", "It is planned for #.", false},
               {"What is planned for #?", "At # it is time for $.", true},
               {"What is the time set for $?", "It is #.", false}}},
    [PLACE] = {{"The key of $ lies #.", "$ hid the key #.", "Look #, there $ keeps the key.",
                "The key that $ lost was found #."},
               {{"Where is the key of $?", "The key of $ is #.", false},
                {"Where does $ keep the key?", "It is kept #.", false},
                {"Whose key is #?", "The key there belongs to $.", true},
                {"Where can one find the key of $?", "One finds it #.", false}}},
};

static void draw_pair(int kind, char *subject, char *value, uint64_t *s) {
    switch (kind) {
    case PASS_KEY:
        *subject = 0; /* there is one in a text */
        digits(value, s, 4 + below(s, 4));
        return;
    case OWNED_KEY:
        name_of(subject, s);
        digits(value, s, 4 + below(s, 4));
        return;
    case LOCK_CODE:
        snprintf(subject, 64, "%s", ONE_OF(s, locks));
        code(value, s);
        return;
    case WORD:
        name_of(subject, s);
        made_word(value, s);
        return;
    case CITY:
        name_of(subject, s);
        snprintf(value, 64, "%s", ONE_OF(s, cities));
        return;
    case BELONGING:
        name_of(subject, s);
        snprintf(value, 64, "%s ", ONE_OF(s, colours));
        strcat(value, ONE_OF(s, things));
        return;
    case PRICE:
        snprintf(subject, 64, "%s", ONE_OF(s, goods));
        snprintf(value, 64, "%d", 3 + below(s, 990));
        return;
    case TIME:
        snprintf(subject, 64, "%s", ONE_OF(s, events));
        snprintf(value, 64, "%d:%02d", 6 + below(s, 17), 5 * below(s, 12));
        return;
    default:
        name_of(subject, s);
        snprintf(value, 64, "%s", ONE_OF(s, places));
    }
}

static void fill_in(char *out, const char *form, const struct recall_fact *f) {
    size_t n = 0;
    for (; *form; form++) {
        const char *part = *form == '$' ? f->subject : *form == '#' ? f->value : NULL;
        if (part)
            n += (size_t)snprintf(out + n, RECALL_LINE - n, "%s", part);
        else
            out[n++] = *form;
    }
    out[n] = 0;
    if (*out >= 'a' && *out <= 'z') *out = (char)(*out - 'a' + 'A');
}

/* Would a reader of both wonder?  Names: one person is one home, but a first name alone tells no
 * two persons apart, so those differ as well. */
static bool clash(const struct recall_fact *a, const struct recall_fact *b) {
    if (a->kind != b->kind) return false;
    size_t first = strcspn(a->subject, " ");
    bool person = a->kind == OWNED_KEY || a->kind == WORD || a->kind == CITY ||
                  a->kind == BELONGING || a->kind == PLACE;
    if (person && first == strcspn(b->subject, " ") && !strncmp(a->subject, b->subject, first))
        return true;
    return !strcmp(a->subject, b->subject) || strstr(a->value, b->value) ||
           strstr(b->value, a->value);
}

static void draw_fact(struct recall_fact *f, const struct recall_fact *others, int n, uint64_t *s) {
    bool good = false;
    while (!good) {
        f->kind = below(s, N_KINDS);
        draw_pair(f->kind, f->subject, f->value, s);
        good = true;
        for (int i = 0; i < n && good; i++)
            good = !clash(f, &others[i]);
    }
    int q = below(s, FORMS);
    fill_in(f->sentence, kinds[f->kind].sentences[below(s, FORMS)], f);
    fill_in(f->question, kinds[f->kind].questions[q].question, f);
    fill_in(f->answer, kinds[f->kind].questions[q].answer, f);
    f->wants_subject = kinds[f->kind].questions[q].subject;
    f->depth = (double)(next(s) >> 11) * 0x1p-53;
}

const char *recall_wanted(const struct recall_fact *f) {
    return f->wants_subject ? f->subject : f->value;
}

static int by_depth(const void *a, const void *b) {
    const struct recall_fact *x = a, *y = b;
    return (x->depth > y->depth) - (x->depth < y->depth);
}

enum { STYLES = 4, TOKENS_PER_FACT = 96 };

void recall_draw(struct recall *r, uint64_t seed, int length, bool may_chat, int n_facts) {
    uint64_t s = seed;
    int most = length / TOKENS_PER_FACT;
    if (most > n_facts) most = n_facts;
    if (most > RECALL_FACTS) most = RECALL_FACTS;
    *r = (struct recall){.n_facts = most > 1 ? 1 + below(&s, most) : 1};
    for (int i = 0; i < r->n_facts; i++)
        draw_fact(&r->facts[i], r->facts, i, &s);
    qsort(r->facts, (size_t)r->n_facts, sizeof *r->facts, by_depth);
    most = r->n_facts < RECALL_QUESTIONS ? r->n_facts : RECALL_QUESTIONS;
    r->n_questions = 1 + below(&s, most);
    int order[RECALL_FACTS] = {0};
    for (int i = 0; i < r->n_facts; i++) {
        int k = below(&s, i + 1); /* a permutation */
        order[i] = order[k];
        order[k] = i;
    }
    memcpy(r->asked, order, (size_t)r->n_questions * sizeof *order);
    r->chat = may_chat && below(&s, 4) > 0;
    r->style = below(&s, STYLES);
}

/* ---- as text ---- */
struct text {
    char *at; /* owned */
    size_t len, room;
    bool failed;
};

static void put(struct text *t, const char *bytes, size_t len) {
    if (t->failed) return;
    if (t->len + len + 1 > t->room) {
        size_t room = 2 * (t->len + len) + 256;
        char *more = realloc(t->at, room);
        if (!more) {
            t->failed = true;
            return;
        }
        t->at = more;
        t->room = room;
    }
    if (len) memcpy(t->at + t->len, bytes, len);
    t->at[t->len += len] = 0;
}
static void puts_to(struct text *t, const char *text) {
    put(t, text, strlen(text));
}

/* A place for a sentence near from: behind a line end, else at a space, else between characters. */
static size_t gap_near(const char *text, size_t len, size_t from) {
    enum { NEAR = 300 };
    size_t most = len - from < NEAR ? len - from : NEAR;
    const char *end = most ? memchr(text + from, '\n', most) : NULL,
               *space = most ? memchr(text + from, ' ', most) : NULL;
    if (end) return (size_t)(end - text) + 1;
    if (space) return (size_t)(space - text) + 1;
    while (from < len && ((unsigned char)text[from] & 0xc0) == 0x80)
        from++;
    return from;
}

/* The facts with len bytes of filler around them. */
static void put_body(struct text *t, const struct recall *r, const char *filler, size_t len) {
    size_t done = 0;
    for (int i = 0; i < r->n_facts; i++) {
        size_t at = gap_near(filler, len, (size_t)(r->facts[i].depth * (double)len));
        if (at < done) at = done;
        if (at > done) put(t, filler + done, at - done);
        done = at;
        bool line = !t->len || t->at[t->len - 1] == '\n';
        if (!line && t->at[t->len - 1] != ' ') puts_to(t, " ");
        puts_to(t, r->facts[i].sentence);
        puts_to(t, line ? "\n" : " ");
    }
    if (len > done) put(t, filler + done, len - done);
}

static void put_questions(struct text *t, const struct recall *r) {
    static const char *const forms[STYLES][3] = {{"\n\nQuestion: ", "\nAnswer: ", ""},
                                                 {"\n\n", " ", ""},
                                                 {"\n\nQ: ", "\nA: ", ""},
                                                 {"\n\n\"", "\"\n\"", "\""}};
    for (int i = 0; i < r->n_questions; i++) {
        const struct recall_fact *f = &r->facts[r->asked[i]];
        puts_to(t, forms[r->style][0]);
        puts_to(t, f->question);
        puts_to(t, forms[r->style][1]);
        puts_to(t, f->answer);
        puts_to(t, forms[r->style][2]);
    }
    puts_to(t, "\n");
}

/* ---- as tokens ---- */
static enum err plain_ids(const struct recall *r, const struct tokenizer *tokenizer,
                          const char *filler, size_t len, int32_t **ids, size_t *n) {
    struct text t = {0};
    put_body(&t, r, filler, len);
    put_questions(&t, r);
    enum err e = t.failed ? ERR_NOMEM : tokenize(tokenizer, t.at, t.len, 0, ids, n);
    free(t.at);
    int32_t bos = tokenizer_add_bos(tokenizer) ? tokenizer_bos(tokenizer) : -1;
    if (e || bos < 0) return e;
    int32_t *more = realloc(*ids, (*n + 1) * sizeof **ids);
    if (!more) {
        free(*ids);
        return ERR_NOMEM;
    }
    memmove(more + 1, more, *n * sizeof *more);
    more[0] = bos;
    *ids = more;
    ++*n;
    return OK;
}

static enum err chat_ids(const struct recall *r, const struct chat *chat, const char *filler,
                         size_t len, int32_t **ids, size_t *n, char *msg, size_t msg_len) {
    static const char *const before[STYLES] = {"", "Read the following text.\n\n",
                                               "Here is a text. I will ask you about it.\n\n",
                                               "Text:\n"};
    static const char *const between[STYLES] = {"\n\n", "\n\nQuestion: ", "\n\n", "\n\n---\n"};
    struct chat_message list[2 * RECALL_QUESTIONS];
    struct text t = {0};
    puts_to(&t, before[r->style]);
    put_body(&t, r, filler, len);
    puts_to(&t, between[r->style]);
    puts_to(&t, r->facts[r->asked[0]].question);
    if (t.failed) {
        free(t.at);
        return ERR_NOMEM;
    }
    for (int i = 0; i < r->n_questions; i++) {
        const struct recall_fact *f = &r->facts[r->asked[i]];
        list[2 * i] = (struct chat_message){"user", f->question, strlen(f->question)};
        list[2 * i + 1] = (struct chat_message){"assistant", f->answer, strlen(f->answer)};
    }
    list[0].content = t.at;
    list[0].content_len = t.len;
    enum err e =
        chat_render(chat, list, 2 * (size_t)r->n_questions, false, false, ids, n, msg, msg_len);
    free(t.at);
    return e;
}

/* The first, or the last, place of text in all[from .. end - 1]; SIZE_MAX: none. */
static size_t find_text(const char *all, size_t from, size_t end, const char *text, bool last) {
    size_t found = SIZE_MAX, len = strlen(text);
    const char *at;
    while (from < end && (at = memmem(all + from, end - from, text, len))) {
        found = (size_t)(at - all);
        from = found + 1;
        if (!last) break;
    }
    return found;
}

/* Marks the tokens of what each question wants.  From the last question to the first, each at its
 * last place before the one behind it: so nothing that the text says is taken for it. */
static enum err mark(const struct recall *r, const struct tokenizer *tokenizer, const int32_t *ids,
                     size_t n, float *answer) {
    struct text all = {0};
    size_t *start = malloc((n + 1) * sizeof *start);
    for (size_t i = 0; i < n && start; i++) {
        size_t len;
        const char *bytes = token_bytes(tokenizer, ids[i], true, &len);
        start[i] = all.len;
        put(&all, bytes, len);
    }
    if (!start || all.failed) {
        free(start);
        free(all.at);
        return ERR_NOMEM;
    }
    start[n] = all.len;
    for (int q = r->n_questions - 1, end = (int)all.len; q >= 0; q--) {
        const struct recall_fact *f = &r->facts[r->asked[q]];
        size_t question = find_text(all.at, 0, (size_t)end, f->question, true), reply, wanted;
        if (question == SIZE_MAX) break; /* a vocabulary that cannot write it */
        reply = find_text(all.at, question + strlen(f->question), (size_t)end, f->answer, false);
        wanted = find_text(all.at, reply, (size_t)end, recall_wanted(f), false);
        for (size_t i = 0; i < n && wanted != SIZE_MAX; i++)
            if (start[i] < wanted + strlen(recall_wanted(f)) && start[i + 1] > wanted)
                answer[i] = 1;
        end = (int)question;
    }
    free(all.at);
    free(start);
    return OK;
}

enum err recall_tokens(const struct recall *r, const struct tokenizer *tokenizer,
                       const struct chat *chat, const char *filler, size_t len, int length,
                       int32_t **out, float **answer, int *n_out, char *msg, size_t msg_len) {
    int32_t *ids = NULL;
    size_t n = 0, room = (size_t)length;
    enum err e = OK;
    *n_out = 0;
    *out = NULL;
    *answer = NULL;
    if (!filler) filler = "", len = 0;
    for (;;) { /* less filler until it fits: two or three times, as a rule */
        e = r->chat ? chat_ids(r, chat, filler, len, &ids, &n, msg, msg_len)
                    : plain_ids(r, tokenizer, filler, len, &ids, &n);
        if (e) return e == ERR_NOMEM ? err_set(msg, msg_len, e, "--recall: out of memory") : e;
        if (n <= room) break;
        free(ids);
        ids = NULL;
        if (!len) return OK;
        size_t cut = (n - room) * len / n + 1;
        len -= cut < len ? cut : len;
        while (len && ((unsigned char)filler[len] & 0xc0) == 0x80)
            len--;
    }
    float *marks = calloc(n + 1, sizeof *marks);
    e = marks ? mark(r, tokenizer, ids, n, marks) : ERR_NOMEM;
    if (e) {
        free(ids);
        free(marks);
        return err_set(msg, msg_len, e, "--recall: out of memory");
    }
    *out = ids;
    *answer = marks;
    *n_out = (int)n;
    return OK;
}
