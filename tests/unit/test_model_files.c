/* test_model_files.c - the same model from different files is the same model; bad files are refused
 * by name. */
#include "checkpoints.h"
#include "model/base.h"
#include "model/sha256.h"
#include "model_folder.h"
#include "model_testing.h"

enum { N = 32 };

static void fill_tokens(int32_t *tokens) {
    for (int i = 0; i < N; i++)
        tokens[i] = i * i * 7 % CHECK_V;
}

/* All logits of N tokens, fp32. */
static float *logits_of(const char *path) {
    int32_t tokens[N];
    struct model_options o = options_for(path, WEIGHT_FP32, team);
    o.max_logits = N;
    struct model *m = open_with(&o);
    float *out = malloc((size_t)N * (size_t)model_info(m)->vocab_size * sizeof *out);
    fill_tokens(tokens);
    read_tokens(m, N, 0, tokens, N, NULL, out);
    model_close(m);
    return out;
}

static void check_containers(const char *type) {
    check_write(folder, type);
    float *a = logits_of(folder), *b = logits_of(in_folder("model.gguf"));
    float largest = 0;
    for (int i = 0; i < N * CHECK_V; i++)
        largest = fmaxf(largest, fabsf(a[i]));
    assert_true(largest > 0.1f && largest < 1e3f);
    assert_memory_equal(a, b, (size_t)N * CHECK_V * sizeof *a);
    free(a);
    free(b);
}

static void test_llama_in_gguf_is_llama_in_a_folder(void **state) {
    (void)state, check_containers("llama");
}
static void test_qwen2_in_gguf_is_qwen2_in_a_folder(void **state) {
    (void)state, check_containers("qwen2");
}
static void test_gpt2_in_gguf_is_gpt2_in_a_folder(void **state) {
    (void)state, check_containers("gpt2");
}

static void test_shards_are_the_whole(void **state) {
    (void)state;
    struct safetensors *st;
    struct st_writer halves[2] = {0};
    struct bytes index = {0};
    char path[PATH_MAX], line[200], msg[200];
    check_write(folder, "llama");
    float *whole = logits_of(folder);
    tiny_path(path, folder, "model.safetensors");
    assert_int_equal(safetensors_open(&st, path, msg, sizeof msg), OK);
    put(&index, "{\"weight_map\":", 14);
    for (int i = 0; i < safetensors_count(st); i++) {
        const struct st_tensor *t = safetensors_at(st, i);
        st_put(&halves[i % 2], t->name, "F32", t->n_dims, (int[]){(int)t->dims[0], (int)t->dims[1]},
               t->data, t->bytes);
        put(&index, line,
            (size_t)snprintf(line, sizeof line, "%s\"%s\":\"%c.safetensors\"", i ? "," : "{",
                             t->name, 'a' + i % 2));
    }
    put(&index, "}}", 3);
    safetensors_close(st);
    unlink(path);
    for (int i = 0; i < 2; i++) {
        struct bytes b = st_finish(&halves[i]);
        write_bytes(in_folder(i ? "b.safetensors" : "a.safetensors"), b.at, b.len);
        free(b.at);
    }
    write_text(in_folder("model.safetensors.index.json"), (const char *)index.at);
    float *sharded = logits_of(folder);
    assert_memory_equal(whole, sharded, (size_t)N * CHECK_V * sizeof *whole);
    free(index.at);
    free(whole);
    free(sharded);
}

/* W + scale B A, merged here in double and written as the base's own W, gives the same logits up to
 * fp32 rounding of W. */
static void test_low_rank_parts_are_merged(void **state) {
    (void)state;
    char merged[] = "/tmp/urchin-merged-XXXXXX", path[PATH_MAX], msg[200];
    struct safetensors *base, *maps;
    struct st_writer w = {0};
    tiny_write(folder);
    assert_non_null(mkdtemp(merged));
    tiny_write(merged);
    tiny_path(path, folder, "model.safetensors"),
        assert_int_equal(safetensors_open(&base, path, msg, sizeof msg), OK);
    tiny_path(path, folder, "hedgehog.safetensors"),
        assert_int_equal(safetensors_open(&maps, path, msg, sizeof msg), OK);
    for (int i = 0; i < safetensors_count(base); i++) {
        const struct st_tensor *t = safetensors_at(base, i);
        float *values = malloc(t->bytes);
        int layer = 0;
        char target[32] = "";
        st_decode(values, t, 0, t->n_values);
        if (sscanf(t->name, "model.layers.%d.self_attn.%1[qo]_proj", &layer, target) == 2) {
            char name[128];
            snprintf(name, sizeof name, "layers.%d.attn.%s_proj.lora_A", layer, target);
            const float *a = safetensors_get(maps, name)->data;
            name[strlen(name) - 1] = 'B';
            const float *b = safetensors_get(maps, name)->data;
            for (int r = 0; r < t->dims[0]; r++)
                for (int c = 0; c < t->dims[1]; c++) {
                    double sum = 0;
                    for (int k = 0; k < 2; k++)
                        sum += (double)b[r * 2 + k] * (double)a[k * t->dims[1] + c];
                    values[r * t->dims[1] + c] = (float)(values[r * t->dims[1] + c] + 0.5 * sum);
                }
        }
        st_put(&w, t->name, "F32", t->n_dims, (int[]){(int)t->dims[0], (int)t->dims[1]}, values,
               t->bytes);
        free(values);
    }
    struct bytes b = st_finish(&w);
    tiny_path(path, merged, "model.safetensors"), write_bytes(path, b.at, b.len), free(b.at);
    for (int i = 0; i < safetensors_count(maps); i++) {
        const struct st_tensor *t = safetensors_at(maps, i);
        if (strstr(t->name, "lora")) continue;
        st_put(&w, t->name, "F32", t->n_dims,
               (int[]){(int)t->dims[0], (int)t->dims[1], (int)t->dims[2]}, t->data, t->bytes);
    }
    b = st_finish(&w);
    tiny_path(path, merged, "hedgehog.safetensors"), write_bytes(path, b.at, b.len), free(b.at);
    tiny_path(path, merged, "urchin.json");
    write_text(path, "{\"format\":1,\"name\":\"merged\",\"base\":null,\"attention\":" TINY_ATTENTION
                     ",\"low_rank\":null}");
    float *x = logits_of(folder), *y = logits_of(merged);
    double largest = 0, difference = 0;
    for (int i = 0; i < N * TINY_VOCAB; i++) {
        largest = fmax(largest, fabs((double)x[i]));
        difference = fmax(difference, fabs((double)x[i] - (double)y[i]));
    }
    /* one rounding of each weight, 2^-24 relative, through two layers: some tens of them */
    assert_true(largest > 1 && difference <= largest * 0x1p-18);
    free(x);
    free(y);
    safetensors_close(base);
    safetensors_close(maps);
    tiny_remove(merged);
}

/* ---- every kind of converted model ---- */
/* hedgehog.safetensors for a base of CHECK_HEADS heads. */
static void write_maps(int key_heads, const char *mix) {
    struct st_writer w = {0};
    uint32_t seed = 3;
    for (int i = 0; i < CHECK_L; i++) {
        tiny_put(&w, "layers.", i, "attn.feature_map_q", 3, (int[]){CHECK_HEADS, CHECK_D, 6}, 0.4f,
                 &seed);
        tiny_put(&w, "layers.", i, "attn.feature_map_k", 3, (int[]){key_heads, CHECK_D, 6}, 0.4f,
                 &seed);
        tiny_put(&w, "layers.", i, mix, 1, (int[]){CHECK_HEADS}, 0.5f, &seed);
    }
    struct bytes b = st_finish(&w);
    write_bytes(in_folder("hedgehog.safetensors"), b.at, b.len);
    free(b.at);
}

/* Logits of one prompt, whole and in two pieces: finite, the same bits, and not those of another
 * kind (differs from before). */
static void check_kind(const char *attention, float *before) {
    enum { CUT = 23 };
    char text[1000];
    int32_t tokens[N];
    snprintf(text, sizeof text,
             "{\"format\":1,\"name\":\"kind\",\"base\":null,\"attention\":%s,\"low_rank\":null}",
             attention);
    write_text(in_folder("urchin.json"), text);
    struct model_options o = options_for(folder, WEIGHT_FP32, team);
    o.max_logits = N;
    struct model *m = open_with(&o);
    float whole[N * CHECK_V], cut[N * CHECK_V];
    fill_tokens(tokens);
    read_tokens(m, N, 0, tokens, N, NULL, whole);
    read_tokens(m, N, 1, tokens, N, (int[]){CUT, 0}, cut);
    for (int i = 0; i < N * CHECK_V; i++)
        if (!isfinite(whole[i])) fail_msg("%s: not finite", attention);
    if (memcmp(whole, cut, sizeof whole)) fail_msg("%s: logits differ when cut", attention);
    if (!memcmp(whole, before, sizeof whole)) fail_msg("%s: the same as another kind", attention);
    memcpy(before, whole, sizeof whole);
    model_close(m);
}

static void test_every_kind_of_attention_is_served(void **state) {
    (void)state;
    static const char *const bases[] = {"llama", "gpt2"};
    static const char *const maps[] = {"exp", "softmax2", "joint_softmax"};
    static const char *const windows[] = {
        "\"window\":{\"rule\":\"none\"}",
        "\"window\":{\"rule\":\"sliding\",\"size\":5},\"sinks\":2",
        "\"window\":{\"rule\":\"terraced\",\"size\":4},\"sinks\":1,\"cache\":null,\"horizon\":8",
        "\"window\":{\"rule\":\"terraced\",\"size\":4},\"cache\":{\"size\":3,\"score\":\"self_"
        "recall\",\"recent\":1,\"age\":9}",
    };
    static float before[N * CHECK_V];
    for (int kind = 0; kind < 2 * 3 * 4 * 2 * 2 * 2; kind++) {
        int map = kind % 3, window = kind / 3 % 4, lolcats = kind / 12 % 2, none = kind / 24 % 2,
            query = kind / 48 % 2, base = kind / 96;
        char attention[500];
        if (kind % 96 == 0) check_write(folder, bases[base]);
        write_maps(base == 0 && !query ? CHECK_KV : CHECK_HEADS,
                   lolcats ? "attn.window_factor" : "attn.log_mix");
        snprintf(attention, sizeof attention,
                 "{\"kind\":\"hedgehog\",\"map\":\"%s\",\"features\":6,\"key_map_per\":\"%s\",%s,"
                 "\"mixing\":\"%s\",\"map_position\":\"%s\"%s}",
                 maps[map], query ? "query_head" : "kv_head", windows[window],
                 lolcats ? "lolcats" : "unified", none ? "none" : "rope",
                 none && base == 0 ? ",\"max_distance\":10" : "");
        check_kind(attention, before);
    }
}

/* ---- adapters ---- */
static void write_adapter(const char *digest, long bytes) {
    char text[1000];
    snprintf(text, sizeof text,
             "{\"format\":1,\"name\":\"thin\",\"base\":{\"name\":\"b\",\"file\":\"model.gguf\","
             "\"bytes\":%ld,\"sha256\":\"%s\"},"
             "\"attention\":{\"kind\":\"softmax\"},\"low_rank\":null}",
             bytes, digest);
    write_text(in_folder("urchin.json"), text);
}

static void test_an_adapter_finds_its_base_by_name_and_digest(void **state) {
    (void)state;
    char digest[SHA256_HEX], base[PATH_MAX];
    static char whole[1 << 20];
    check_write(folder, "qwen2");
    tiny_path(base, folder, "model.gguf");
    FILE *file = fopen(base, "rb");
    size_t n = fread(whole, 1, sizeof whole, file);
    fclose(file);
    sha256_hex(whole, n, digest);
    write_adapter(digest, (long)n);
    struct model_options o = options_for(folder, WEIGHT_FP32, team);
    struct model *m = open_with(&o);
    assert_string_equal(model_info(m)->base_path, base);
    assert_string_equal(model_info(m)->base_sha256, digest);
    model_close(m);

    digest[0] = digest[0] == '0' ? '1' : '0';
    write_adapter(digest, (long)n);
    check_refused(o, ERR_IO, "has another digest");
    write_adapter(digest, (long)n + 1);
    check_refused(o, ERR_IO, "has another size");
    o.base = base; /* the user's wish: served, with a warning */
    m = open_with(&o);
    assert_string_not_equal(model_info(m)->base_sha256, digest);
    model_close(m);
    o.base = "no/such.gguf";
    check_refused(o, ERR_IO, "no/such.gguf");
}

/* ---- what is said about a model ---- */
static void test_info_of_a_whole_converted_model(void **state) {
    (void)state;
    struct model_options o = options_for(STORIES, WEIGHTS_AUTO, team);
    struct model *m = open_with(&o);
    const struct model_info *i = model_info(m);
    assert_string_equal(i->name, "stories260k-hedgehog");
    assert_string_equal(i->architecture, "llama");
    assert_true(i->n_layers == 5 && i->hidden_dim == 64 && i->ffn_dim == 172 &&
                i->vocab_size == 512 && i->context == 512);
    assert_true(i->attention.kind == ATTENTION_HEDGEHOG && i->attention.n_heads == 8 &&
                i->attention.n_kv_heads == 4 && i->attention.head_dim == 8);
    assert_true(i->attention.window_size == 32 && i->attention.cache_size == 16 &&
                i->attention.sinks == 1 && !i->attention.map_before_rope);
    assert_true(i->measured_to == 512 && i->max_seq_len == 0 && i->weights == WEIGHT_FP32 &&
                i->n_slots == 3);
    assert_true(i->slot_bytes >= i->state_bytes && i->state_bytes == model_slot_state_bytes(m, 0));
    assert_true(i->n_eos_ids == 1 && i->eos_ids[0] == 2);
    assert_null(i->base_path);
    model_close(m);
}

static void test_info_of_an_adapter(void **state) {
    (void)state;
    if (!smollm_base()) skip();
    struct model_options o = options_for(SMOLLM, WEIGHT_INT4, team);
    o.kv_type = KV_BF16;
    struct model *m = open_with(&o);
    const struct model_info *i = model_info(m);
    assert_string_equal(i->name, "smollm2-135m-hedgehog");
    assert_true(i->measured_to == 65536 && i->context == 8192 && i->max_seq_len == 0 &&
                i->weights == WEIGHT_INT4);
    assert_true(i->attention.map_before_rope && i->attention.max_distance == 4096 &&
                i->attention.horizon == 1024);
    assert_string_equal(i->base_sha256,
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53");
    assert_non_null(i->base_path);
    assert_true(i->n_eos_ids >= 1 && i->eos_ids[0] == 2);
    model_close(m);
}

static void test_weights_follow_the_file(void **state) {
    (void)state;
    check_write(folder, "llama");
    struct model_options o = options_for(folder, WEIGHTS_AUTO, team);
    struct model *m = open_with(&o);
    assert_int_equal(model_info(m)->weights, WEIGHT_FP32);
    assert_int_equal(model_info(m)->n_eos_ids, 2);
    assert_true(model_info(m)->max_seq_len == CHECK_CONTEXT &&
                model_info(m)->attention.kind == ATTENTION_SOFTMAX);
    model_close(m);
    if (!smollm_base()) return;
    o.path = smollm_base();
    o.max_seq_len = 100;
    m = open_with(&o);
    assert_int_equal(model_info(m)->weights, WEIGHT_INT8);
    assert_string_equal(model_info(m)->name, "SmolLM2-135M-Instruct.Q4_1");
    assert_true(model_info(m)->max_seq_len == 100);
    model_close(m);
}

/* ---- slots by memory ---- */
static void test_slots_fill_the_budget(void **state) {
    (void)state;
    struct model_options o = options_for(STORIES, WEIGHT_FP32, team);
    o.n_slots = 0;
    o.memory_budget = 1 << 20;
    struct model *m = open_with(&o);
    size_t slot = model_info(m)->slot_bytes;
    assert_true((size_t)model_info(m)->n_slots == o.memory_budget / slot);
    model_close(m);
    o.memory_budget = 1;
    m = open_with(&o);
    assert_int_equal(model_info(m)->n_slots, 1);
    model_close(m);
    o.memory_budget = (size_t)1 << 40;
    m = open_with(&o);
    assert_int_equal(model_info(m)->n_slots, 256);
    model_close(m);
}

static void test_a_softmax_cache_shrinks_to_the_budget(void **state) {
    (void)state;
    check_write(folder, "llama");
    struct model_options o = options_for(folder, WEIGHT_FP32, team);
    o.n_slots = 1;
    struct model *m = open_with(&o);
    size_t full = model_info(m)->slot_bytes;
    model_close(m);
    o.memory_budget = full / 2;
    m = open_with(&o);
    assert_true(model_info(m)->max_seq_len < CHECK_CONTEXT && model_info(m)->max_seq_len > 4);
    assert_true(model_info(m)->slot_bytes <= full / 2);
    model_close(m);

    /* a context that no memory holds, as a file may claim */
    char config[1024] = "";
    FILE *file = fopen(in_folder("config.json"), "rb");
    assert_true(fread(config, 1, sizeof config - 1, file) > 0);
    fclose(file);
    char *at = strstr(config, "\"max_position_embeddings\":40");
    assert_non_null(at);
    memmove(at + 36, at + 28, strlen(at + 28) + 1); /* 40 makes room for 10^9 */
    memcpy(at, "\"max_position_embeddings\":1000000000", 36);
    write_text(in_folder("config.json"), config);
    m = open_with(&o);
    assert_true(model_info(m)->context == 1000000000 && model_info(m)->slot_bytes <= full / 2);
    model_close(m);
}

/* ---- bounds of a step ---- */
static void test_steps_out_of_bounds_change_nothing(void **state) {
    (void)state;
    struct model_options o = options_for(STORIES, WEIGHT_FP32, team);
    int32_t tokens[20] = {1, 2, 3}, bad[2] = {5, 512}, negative[1] = {-1};
    const float *logits = (const float *)&o;
    o.max_rows = 8, o.max_logits = 4, o.max_seq_len = 10, o.n_slots = 2;
    struct model *m = open_with(&o);
    const struct {
        struct model_run runs[3];
        int n;
    } cases[] = {
        {{{0, 1, tokens, 1, false}}, 0},
        {{{0, 1, tokens, 1, false}}, -1},
        {{{-1, 1, tokens, 1, false}}, 1},
        {{{2, 1, tokens, 1, false}}, 1},
        {{{0, 0, tokens, 0, false}}, 1},
        {{{0, 9, tokens, 1, false}}, 1},
        {{{0, 4, tokens, 1, false}, {1, 5, tokens, 1, false}}, 2},
        {{{0, 5, tokens, 5, false}}, 1},
        {{{0, 3, tokens, 3, false}, {1, 3, tokens, 2, false}}, 2},
        {{{0, 1, tokens, 2, false}}, 1},
        {{{0, 1, tokens, -1, false}}, 1},
        {{{0, 2, tokens, 1, true}}, 1},
        {{{0, 1, tokens, 1, false}, {0, 1, tokens, 1, false}}, 2},
        {{{1, 2, bad, 1, false}}, 1},
        {{{1, 1, negative, 1, false}}, 1},
        {{{0, 1, tokens, 0, false}, {1, 1, tokens, 0, false}, {0, 1, tokens, 0, false}}, 3},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (model_step(m, cases[i].runs, cases[i].n, &logits) != ERR_ARG)
            fail_msg("case %zu was let through", i);
        assert_ptr_equal(logits, &o);
        assert_true(model_slot_position(m, 0) == 0 && model_slot_position(m, 1) == 0);
    }
    assert_int_equal(model_step(m, &(struct model_run){0, 8, tokens, 0, false}, 1, &logits), OK);
    assert_int_equal(model_step(m, &(struct model_run){0, 3, tokens, 1, false}, 1, &logits),
                     ERR_ARG); /* past max_seq_len */
    assert_int_equal(model_step(m, &(struct model_run){0, 2, tokens, 1, false}, 1, &logits), OK);
    assert_true(model_slot_position(m, 0) == 10);
    model_slot_clear(m, 0);
    assert_true(model_slot_position(m, 0) == 0);
    model_close(m);
}

static void test_gpt2_ends_at_its_last_position(void **state) {
    (void)state;
    int32_t tokens[CHECK_CONTEXT + 1] = {0};
    const float *logits;
    char msg[300];
    check_write(folder, "gpt2");
    struct model_options o = options_for(folder, WEIGHT_FP32, team);
    struct model *m = open_with(&o);
    assert_true(model_info(m)->max_seq_len == CHECK_CONTEXT);
    assert_int_equal(
        model_step(m, &(struct model_run){0, CHECK_CONTEXT + 1, tokens, 1, false}, 1, &logits),
        ERR_ARG);
    assert_int_equal(
        model_step(m, &(struct model_run){0, CHECK_CONTEXT, tokens, 1, false}, 1, &logits), OK);
    model_close(m);
    o.max_seq_len = CHECK_CONTEXT + 1;
    assert_int_equal(model_open(&m, &o, msg, sizeof msg), ERR_ARG);
    assert_non_null(strstr(msg, "learned positions"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_llama_in_gguf_is_llama_in_a_folder),
        IN_FOLDER(test_qwen2_in_gguf_is_qwen2_in_a_folder),
        IN_FOLDER(test_gpt2_in_gguf_is_gpt2_in_a_folder),
        IN_FOLDER(test_shards_are_the_whole),
        IN_FOLDER(test_low_rank_parts_are_merged),
        IN_FOLDER(test_every_kind_of_attention_is_served),
        IN_FOLDER(test_an_adapter_finds_its_base_by_name_and_digest),
        IN_FOLDER(test_info_of_a_whole_converted_model),
        IN_FOLDER(test_info_of_an_adapter),
        IN_FOLDER(test_weights_follow_the_file),
        IN_FOLDER(test_slots_fill_the_budget),
        IN_FOLDER(test_a_softmax_cache_shrinks_to_the_budget),
        IN_FOLDER(test_steps_out_of_bounds_change_nothing),
        IN_FOLDER(test_gpt2_ends_at_its_last_position),
    };
    if (team_new(&team, 2)) return 1;
    int failed = cmocka_run_group_tests_name("model_files", tests, NULL, NULL);
    team_free(team);
    return failed;
}
