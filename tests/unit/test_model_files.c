/* test_model_files.c - the same model from different files is the same model; bad files are refused by name. */
#include "checkpoints.h"
#include "model/base.h"
#include "model/sha256.h"
#include "model_testing.h"

static struct team *team;

enum { N = 32 };

static void fill_tokens(int32_t *tokens) {
    for (int i = 0; i < N; i++) tokens[i] = i * i * 7 % CHECK_V;
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

/* A folder of its own for each test. */
static char folder[64], other[PATH_MAX];

static int new_folder(void **state) {
    (void)state;
    strcpy(folder, "/tmp/urchin-model-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state) {
    (void)state;
    tiny_path(other, folder, "model.gguf");
    unlink(other);
    tiny_remove(folder);
    return 0;
}

static const char *in_folder(const char *name) {
    tiny_path(other, folder, name);
    return other;
}

static void check_containers(const char *type) {
    check_write(folder, type);
    float *a = logits_of(folder), *b = logits_of(in_folder("model.gguf"));
    float largest = 0;
    for (int i = 0; i < N * CHECK_V; i++) largest = fmaxf(largest, fabsf(a[i]));
    assert_true(largest > 0.1f && largest < 1e3f);
    assert_memory_equal(a, b, (size_t)N * CHECK_V * sizeof *a);
    free(a);
    free(b);
}

static void test_llama_in_gguf_is_llama_in_a_folder(void **state) { (void)state, check_containers("llama"); }
static void test_qwen2_in_gguf_is_qwen2_in_a_folder(void **state) { (void)state, check_containers("qwen2"); }
static void test_gpt2_in_gguf_is_gpt2_in_a_folder(void **state) { (void)state, check_containers("gpt2"); }

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
        st_put(&halves[i % 2], t->name, "F32", t->n_dims, (int[]){(int)t->dims[0], (int)t->dims[1]}, t->data, t->bytes);
        put(&index, line, (size_t)snprintf(line, sizeof line, "%s\"%s\":\"%c.safetensors\"", i ? "," : "{", t->name, 'a' + i % 2));
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

/* W + scale B A, merged here in double and written as the base's own W, gives the same logits up to fp32 rounding of W. */
static void test_low_rank_parts_are_merged(void **state) {
    (void)state;
    char merged[] = "/tmp/urchin-merged-XXXXXX", path[PATH_MAX], msg[200];
    struct safetensors *base, *maps;
    struct st_writer w = {0};
    tiny_write(folder);
    assert_non_null(mkdtemp(merged));
    tiny_write(merged);
    tiny_path(path, folder, "model.safetensors"), assert_int_equal(safetensors_open(&base, path, msg, sizeof msg), OK);
    tiny_path(path, folder, "hedgehog.safetensors"), assert_int_equal(safetensors_open(&maps, path, msg, sizeof msg), OK);
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
                    for (int k = 0; k < 2; k++) sum += (double)b[r * 2 + k] * (double)a[k * t->dims[1] + c];
                    values[r * t->dims[1] + c] = (float)(values[r * t->dims[1] + c] + 0.5 * sum);
                }
        }
        st_put(&w, t->name, "F32", t->n_dims, (int[]){(int)t->dims[0], (int)t->dims[1]}, values, t->bytes);
        free(values);
    }
    struct bytes b = st_finish(&w);
    tiny_path(path, merged, "model.safetensors"), write_bytes(path, b.at, b.len), free(b.at);
    for (int i = 0; i < safetensors_count(maps); i++) {
        const struct st_tensor *t = safetensors_at(maps, i);
        if (strstr(t->name, "lora")) continue;
        st_put(&w, t->name, "F32", t->n_dims, (int[]){(int)t->dims[0], (int)t->dims[1], (int)t->dims[2]}, t->data, t->bytes);
    }
    b = st_finish(&w);
    tiny_path(path, merged, "hedgehog.safetensors"), write_bytes(path, b.at, b.len), free(b.at);
    tiny_path(path, merged, "urchin.json");
    write_text(path, "{\"format\":1,\"name\":\"merged\",\"base\":null,\"attention\":" TINY_ATTENTION ",\"low_rank\":null}");
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

/* ---- what is said about a model ---- */
static void test_info_of_a_whole_converted_model(void **state) {
    (void)state;
    struct model_options o = options_for(STORIES, WEIGHTS_AUTO, team);
    struct model *m = open_with(&o);
    const struct model_info *i = model_info(m);
    assert_string_equal(i->name, "stories260k-hedgehog");
    assert_string_equal(i->architecture, "llama");
    assert_true(i->n_layers == 5 && i->hidden_dim == 64 && i->ffn_dim == 172 && i->vocab_size == 512 && i->context == 512);
    assert_true(i->attention.kind == ATTENTION_HEDGEHOG && i->attention.n_heads == 8 && i->attention.n_kv_heads == 4 && i->attention.head_dim == 8);
    assert_true(i->attention.window_size == 32 && i->attention.cache_size == 16 && i->attention.sinks == 1 && !i->attention.map_before_rope);
    assert_true(i->measured_to == 512 && i->max_seq_len == 0 && i->weights == WEIGHT_FP32 && i->n_slots == 3);
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
    assert_true(i->measured_to == 65536 && i->context == 8192 && i->max_seq_len == 0 && i->weights == WEIGHT_INT4);
    assert_true(i->attention.map_before_rope && i->attention.max_distance == 4096 && i->attention.horizon == 1024);
    assert_string_equal(i->base_sha256, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53");
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
    assert_true(model_info(m)->max_seq_len == CHECK_CONTEXT && model_info(m)->attention.kind == ATTENTION_SOFTMAX);
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
}

/* ---- bounds of a step ---- */
static void test_steps_out_of_bounds_change_nothing(void **state) {
    (void)state;
    struct model_options o = options_for(STORIES, WEIGHT_FP32, team);
    int32_t tokens[20] = {1, 2, 3}, bad[2] = {5, 512}, negative[1] = {-1};
    const float *logits = (const float *)&o;
    o.max_rows = 8, o.max_logits = 4, o.max_seq_len = 10, o.n_slots = 2;
    struct model *m = open_with(&o);
    const struct { struct model_run runs[3]; int n; } cases[] = {
        {{{0, 1, tokens, 1}}, 0},
        {{{0, 1, tokens, 1}}, -1},
        {{{-1, 1, tokens, 1}}, 1},
        {{{2, 1, tokens, 1}}, 1},
        {{{0, 0, tokens, 0}}, 1},
        {{{0, 9, tokens, 1}}, 1},
        {{{0, 4, tokens, 1}, {1, 5, tokens, 1}}, 2},
        {{{0, 5, tokens, 5}}, 1},
        {{{0, 3, tokens, 3}, {1, 3, tokens, 2}}, 2},
        {{{0, 1, tokens, 2}}, 1},
        {{{0, 1, tokens, -1}}, 1},
        {{{0, 1, tokens, 1}, {0, 1, tokens, 1}}, 2},
        {{{1, 2, bad, 1}}, 1},
        {{{1, 1, negative, 1}}, 1},
        {{{0, 1, tokens, 0}, {1, 1, tokens, 0}, {0, 1, tokens, 0}}, 3},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (model_step(m, cases[i].runs, cases[i].n, &logits) != ERR_ARG) fail_msg("case %zu was let through", i);
        assert_ptr_equal(logits, &o);
        assert_true(model_slot_position(m, 0) == 0 && model_slot_position(m, 1) == 0);
    }
    assert_int_equal(model_step(m, &(struct model_run){0, 8, tokens, 0}, 1, &logits), OK);
    assert_int_equal(model_step(m, &(struct model_run){0, 3, tokens, 1}, 1, &logits), ERR_ARG); /* past max_seq_len */
    assert_int_equal(model_step(m, &(struct model_run){0, 2, tokens, 1}, 1, &logits), OK);
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
    assert_int_equal(model_step(m, &(struct model_run){0, CHECK_CONTEXT + 1, tokens, 1}, 1, &logits), ERR_ARG);
    assert_int_equal(model_step(m, &(struct model_run){0, CHECK_CONTEXT, tokens, 1}, 1, &logits), OK);
    model_close(m);
    o.max_seq_len = CHECK_CONTEXT + 1;
    assert_int_equal(model_open(&m, &o, msg, sizeof msg), ERR_ARG);
    assert_non_null(strstr(msg, "learned positions"));
}

/* ---- bad files ---- */
/* Opens, which must fail, with a sentence that says this. */
static void check_refused(struct model_options o, enum err want, const char *says) {
    struct model *m = (void *)&o;
    char msg[2000] = "";
    enum err e = model_open(&m, &o, msg, sizeof msg);
    if (!e) fail_msg("opened, though: %s", says);
    assert_ptr_equal(m, &o);
    if (!strstr(msg, says) || e != want) fail_msg("%s: \"%s\", expected \"%s\"", err_name(e), msg, says);
}

/* Rewrites model.safetensors of the folder: tensor `name` is left out, renamed, reshaped or given a value that is not finite. */
enum change { DROP, RENAME, RESHAPE, POISON, INTEGER };
static void change_tensor(const char *file, const char *name, enum change change, const char *new_name) {
    struct safetensors *st;
    struct st_writer w = {0};
    char msg[200];
    assert_int_equal(safetensors_open(&st, in_folder(file), msg, sizeof msg), OK);
    assert_non_null(safetensors_get(st, name));
    for (int i = 0; i < safetensors_count(st); i++) {
        const struct st_tensor *t = safetensors_at(st, i);
        int dims[3] = {(int)t->dims[0], (int)t->dims[1], (int)t->dims[2]};
        bool is = !strcmp(t->name, name);
        float *values = malloc(t->bytes);
        memcpy(values, t->data, t->bytes);
        if (is && change == RESHAPE) dims[0] /= 2, dims[1] *= 2;
        if (is && change == POISON) values[t->n_values / 2] = *new_name == 'N' ? NAN : -INFINITY;
        if (!is || change != DROP)
            st_put(&w, is && change == RENAME ? new_name : t->name, is && change == INTEGER ? "I32" : "F32", t->n_dims, dims, values, t->bytes);
        free(values);
    }
    safetensors_close(st);
    struct bytes b = st_finish(&w);
    write_bytes(in_folder(file), b.at, b.len);
    free(b.at);
}

static void test_bad_tensors_are_refused_by_name(void **state) {
    (void)state;
    static const struct { const char *name; enum change change; const char *new_name, *says; } cases[] = {
        {"model.layers.1.mlp.up_proj.weight", DROP, NULL, "tensor mlp.up_proj.weight of layer 1 is missing"},
        {"model.norm.weight", DROP, NULL, "tensor norm.weight is missing"},
        {"lm_head.weight", DROP, NULL, "tensor lm_head.weight is missing"},
        {"model.norm.weight", RENAME, "model.other.weight", "tensor model.other.weight is no part"},
        {"model.layers.1.mlp.up_proj.weight", RENAME, "model.layers.2.mlp.up_proj.weight", "tensor model.layers.2.mlp.up_proj.weight is of layer 2"},
        {"model.layers.1.mlp.up_proj.weight", RENAME, "layers.0.mlp.up_proj.weight", "mlp.up_proj.weight is there twice"},
        {"model.layers.1.mlp.up_proj.weight", RENAME, "model.layers.-1.mlp.up_proj.weight", "is no part"},
        {"model.layers.1.mlp.up_proj.weight", RENAME, "model.layers.1mlp.up_proj.weight", "is no part"},
        {"model.layers.0.self_attn.k_proj.weight", RESHAPE, NULL, "tensor model.layers.0.self_attn.k_proj.weight has shape [8, 64], but the configuration says [16, 32]"},
        {"model.layers.0.self_attn.k_proj.weight", INTEGER, NULL, "tensor model.layers.0.self_attn.k_proj.weight is not F32"},
        {"model.layers.0.self_attn.k_proj.weight", POISON, "N", "tensor model.layers.0.self_attn.k_proj.weight holds a value that is not finite"},
        {"model.layers.1.mlp.down_proj.weight", POISON, "I", "tensor model.layers.1.mlp.down_proj.weight holds a value that is not finite"},
        {"model.embed_tokens.weight", POISON, "N", "tensor model.embed_tokens.weight holds a value that is not finite"},
        {"model.layers.1.input_layernorm.weight", POISON, "I", "tensor model.layers.1.input_layernorm.weight holds a value that is not finite"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        check_write(folder, "llama");
        change_tensor("model.safetensors", cases[i].name, cases[i].change, cases[i].new_name);
        check_refused(options_for(folder, WEIGHT_FP32, team), ERR_FORMAT, cases[i].says);
        check_refused(options_for(folder, WEIGHT_FP32, team), ERR_FORMAT, folder);
    }
}

static void test_every_truncated_file_is_refused_by_name(void **state) {
    (void)state;
    static const char *const files[] = {"model.safetensors", "hedgehog.safetensors", "config.json", "urchin.json"};
    tiny_write(folder);
    for (int i = 0; i < 4; i++) {
        FILE *file = fopen(in_folder(files[i]), "rb");
        static char whole[1 << 20];
        size_t n = fread(whole, 1, sizeof whole, file);
        fclose(file);
        for (size_t cut = 0; cut < n; cut += n / 7 + 1) {
            write_bytes(in_folder(files[i]), whole, cut);
            check_refused(options_for(folder, WEIGHT_FP32, team), ERR_FORMAT, files[i]);
        }
        unlink(in_folder(files[i]));
        /* without urchin.json the folder is a plain model */
        if (i < 3) check_refused(options_for(folder, WEIGHT_FP32, team), ERR_IO, files[i]);
        write_bytes(in_folder(files[i]), whole, n);
    }
    struct model_options o = options_for(folder, WEIGHT_FP32, team);
    model_close(open_with(&o)); /* put together again */
}

static void test_bad_configurations_are_refused_by_name(void **state) {
    (void)state;
#define REST ",\"hidden_size\":32,\"intermediate_size\":48,\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"vocab_size\":300,\"max_position_embeddings\":40"
    static const struct { const char *config, *says; } cases[] = {
        {"{\"model_type\":\"falcon\"" REST "}", "model_type \"falcon\" is not supported; supported are llama"},
        {"{}", "model_type \"\" is not supported"},
        {"[1]", "model_type"},
        {"{\"model_type\":\"llama\",\"hidden_size\":32}", "num_hidden_layers is missing"},
        {"{\"model_type\":\"llama\"" REST ",\"head_dim\":\"x\"}", "head_dim is not a whole number"},
        {"{\"model_type\":\"llama\"" REST ",\"head_dim\":7}", "head size 7 is odd"},
        {"{\"model_type\":\"llama\"" REST ",\"head_dim\":0}", "head size is 0"},
        {"{\"model_type\":\"llama\"" REST ",\"hidden_act\":\"gelu\"}", "hidden_act"},
        {"{\"model_type\":\"llama\"" REST ",\"rms_norm_eps\":\"1e-5\"}", "rms_norm_eps"},
        {"{\"model_type\":\"llama\"" REST ",\"rope_theta\":-1}", "rope_theta"},
        {"{\"model_type\":\"llama\"" REST ",\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4}}", "type yarn is not supported"},
        {"{\"model_type\":\"llama\"" REST ",\"rope_scaling\":{\"rope_type\":\"linear\"}}", "factor"},
        {"{\"model_type\":\"llama\"" REST ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":1}}", "high_freq_factor"},
        {"{\"model_type\":\"llama\"" REST ",\"partial_rotary_factor\":0.5}", "partial_rotary_factor"},
        {"{\"model_type\":\"llama\"" REST ",\"quantization_config\":{}}", "quantization_config"},
        {"{\"model_type\":\"llama\",\"hidden_size\":32,\"intermediate_size\":48,\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":3,\"vocab_size\":300,\"max_position_embeddings\":40}", "4 heads cannot share 3"},
        {"{\"model_type\":\"llama\",\"hidden_size\":32,\"intermediate_size\":48,\"num_hidden_layers\":2000000000,\"num_attention_heads\":4,\"vocab_size\":300,\"max_position_embeddings\":40}", "number of layers is 2000000000"},
        {"{\"model_type\":\"gpt2\",\"n_embd\":30,\"n_layer\":2,\"n_head\":4,\"n_positions\":40,\"vocab_size\":300}", "GPT-2's 4 heads do not divide"},
        {"{\"model_type\":\"gpt2\",\"n_embd\":32,\"n_layer\":2,\"n_head\":4,\"n_positions\":40,\"vocab_size\":300,\"activation_function\":\"relu\"}", "activation_function"},
    };
#undef REST
    check_write(folder, "llama");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_text(in_folder("config.json"), cases[i].config);
        check_refused(options_for(folder, WEIGHT_FP32, team), ERR_FORMAT, cases[i].says);
        check_refused(options_for(folder, WEIGHT_FP32, team), ERR_FORMAT, "config.json");
    }
}

static void test_bad_urchin_json_is_refused_by_name(void **state) {
    (void)state;
    static const struct { const char *from, *to, *says; } cases[] = { /* one edit of TINY_URCHIN */
        {"\"format\":1", "\"format\":2", "format is not 1"},
        {"\"name\":\"tiny\"", "\"name\":7", "name is missing"},
        {"\"base\":null", "\"base\":3", "base is neither"},
        {"\"base\":null", "\"base\":{\"file\":\"../x\",\"bytes\":1,\"sha256\":\"00\"}", "base.file"},
        {"\"base\":null", "\"base\":{\"file\":\"x\",\"bytes\":1,\"sha256\":\"00\"}", "base.sha256"},
        {"\"base\":null,", "", "base is missing"},
        {"\"name\":", "\"colour\":1,\"name\":", "colour is not known"},
        {"\"kind\":\"hedgehog\"", "\"kind\":\"mamba\"", "attention.kind is not one of softmax, hedgehog"},
        {"\"kind\":\"hedgehog\"", "\"kind\":\"softmax\"", "softmax takes no other settings"},
        {"\"map\":\"exp\"", "\"map\":\"elu\"", "attention.map is not one of exp"},
        {"\"features\":8", "\"features\":0", "attention.features"},
        {"\"features\":8", "\"features\":9", "feature_map_q is not of the shape [4, 8, 9]"},
        {"\"features\":8", "\"features\":8,\"gate\":true", "attention.gate is not known"},
        {"\"sinks\":1", "\"sinks\":1,\"sinks\":2", "attention.sinks is there twice"},
        {"\"sinks\":1", "\"sinks\":17", "sinks"},
        {"\"sinks\":1", "\"sinks\":-1", "attention.sinks"},
        {"\"size\":16}", "\"size\":16,\"step\":2}", "attention.window.step is not known"},
        {"\"size\":16}", "\"size\":0}", "attention.window.size"},
        {"\"terraced\"", "\"striped\"", "attention.window.rule"},
        {"\"terraced\"", "\"sliding\"", "cache"},
        {"\"self_recall\"", "\"newest\"", "attention.cache.score"},
        {"\"recent\":4", "\"recent\":17", "recent"},
        {"\"age\":32", "\"age\":0", "attention.cache.age"},
        {"\"age\":32", "\"age\":32,\"min\":1", "attention.cache.min is not known"},
        {"\"horizon\":64", "\"horizon\":0", "attention.horizon"},
        {"\"map_position\":\"none\"", "\"map_position\":\"rope\"", "max_distance"},
        {"\"mixing\":\"unified\"", "\"mixing\":\"lolcats\"", "window_factor is missing"},
        {"\"kv_head\"", "\"query_head\"", "feature_map_k is not of the shape [4, 8, 8]"},
        {"\"rank\":2", "\"rank\":3", "lora_A is not of the shape [3, 32]"},
        {"\"rank\":2", "\"rank\":2,\"alpha\":3", "low_rank.alpha is not known"},
        {"\"scale\":0.5", "\"scale\":\"x\"", "low_rank.scale"},
        {"\"o_proj\"", "\"up_proj\"", "low_rank.targets"},
        {"\"q_proj\",", "", "q_proj.lora_A is not what urchin.json asks for"},
        {"\"q_proj\",", "\"q_proj\",\"v_proj\",", "v_proj.lora_A is missing"},
    };
    tiny_write(folder);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[2000] = "";
        const char *at = strstr(TINY_URCHIN, cases[i].from);
        assert_non_null(at);
        strncat(text, TINY_URCHIN, (size_t)(at - TINY_URCHIN));
        strcat(text, cases[i].to);
        strcat(text, at + strlen(cases[i].from));
        write_text(in_folder("urchin.json"), text);
        check_refused(options_for(folder, WEIGHT_FP32, team), ERR_FORMAT, cases[i].says);
    }
    write_text(in_folder("urchin.json"), TINY_URCHIN);
    change_tensor("hedgehog.safetensors", "layers.1.attn.log_mix", POISON, "N");
    check_refused(options_for(folder, WEIGHT_FP32, team), ERR_FORMAT, "tensor layers.1.attn.log_mix holds a value that is not finite");
}

static void test_missing_base_says_how_to_get_it(void **state) {
    (void)state;
    char *cache = getenv("URCHIN_CACHE") ? strdup(getenv("URCHIN_CACHE")) : NULL, *home = strdup(getenv("HOME"));
    setenv("URCHIN_CACHE", folder, 1);
    setenv("HOME", folder, 1);
    check_refused(options_for(SMOLLM, WEIGHT_INT8, team), ERR_IO, "`make model`");
    check_refused(options_for(SMOLLM, WEIGHT_INT8, team), ERR_IO, "SmolLM2-135M-Instruct.Q4_1.gguf");
    write_text(in_folder("SmolLM2-135M-Instruct.Q4_1.gguf"), "cut");
    check_refused(options_for(SMOLLM, WEIGHT_INT8, team), ERR_IO, "has another size");
    unlink(in_folder("SmolLM2-135M-Instruct.Q4_1.gguf"));
    setenv("HOME", home, 1);
    if (cache) setenv("URCHIN_CACHE", cache, 1);
    else unsetenv("URCHIN_CACHE");
    free(cache);
    free(home);
}

static void test_bad_settings_are_refused(void **state) {
    (void)state;
    struct model_options o = options_for(STORIES, WEIGHT_FP32, team);
    o.base = "x.gguf";
    check_refused(o, ERR_ARG, "is no adapter");
    o = options_for(STORIES, WEIGHT_FP32, team);
    o.max_distance = 100;
    check_refused(o, ERR_ARG, "map_position rope");
    o = options_for("no/such/model", WEIGHT_FP32, team);
    check_refused(o, ERR_IO, "no/such/model");
    check_write(folder, "llama");
    o = options_for(folder, WEIGHT_FP32, team);
    o.horizon = 5;
    check_refused(o, ERR_ARG, "softmax attention");
    o = options_for(folder, WEIGHT_FP32, team);
    o.chat_template = "esperanto";
    check_refused(o, ERR_ARG, "esperanto");
    o = options_for(folder, WEIGHT_FP32, team);
    o.n_slots = 60000;
    o.max_seq_len = 1 << 30;
    check_refused(o, ERR_NOMEM, "");
}

/* FIPS 180-4 examples; padding at every length; the SHA instructions against plain C. */
static void test_sha256(void **state) {
    (void)state;
    char hex[SHA256_HEX], plain[SHA256_HEX], million[1000000];
    sha256_hex("", 0, hex);
    assert_string_equal(hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    sha256_hex("abc", 3, hex);
    assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56, hex);
    assert_string_equal(hex, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    memset(million, 'a', sizeof million);
    sha256_hex(million, sizeof million, hex);
    assert_string_equal(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    for (size_t n = 0; n < 300; n++) {
        for (size_t i = 0; i < n; i++) million[i] = (char)(i * 37 + n);
        sha256_hex(million, n, hex);
        sha256_hex_portable(million, n, plain);
        assert_string_equal(hex, plain);
    }
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, new_folder, remove_folder)
    const struct CMUnitTest tests[] = {
        TEST(test_llama_in_gguf_is_llama_in_a_folder),
        TEST(test_qwen2_in_gguf_is_qwen2_in_a_folder),
        TEST(test_gpt2_in_gguf_is_gpt2_in_a_folder),
        TEST(test_shards_are_the_whole),
        TEST(test_low_rank_parts_are_merged),
        TEST(test_info_of_a_whole_converted_model),
        TEST(test_info_of_an_adapter),
        TEST(test_weights_follow_the_file),
        TEST(test_slots_fill_the_budget),
        TEST(test_a_softmax_cache_shrinks_to_the_budget),
        TEST(test_steps_out_of_bounds_change_nothing),
        TEST(test_gpt2_ends_at_its_last_position),
        TEST(test_bad_tensors_are_refused_by_name),
        TEST(test_every_truncated_file_is_refused_by_name),
        TEST(test_bad_configurations_are_refused_by_name),
        TEST(test_bad_urchin_json_is_refused_by_name),
        TEST(test_missing_base_says_how_to_get_it),
        TEST(test_bad_settings_are_refused),
        cmocka_unit_test(test_sha256),
    };
    if (team_new(&team, 2)) return 1;
    int failed = cmocka_run_group_tests_name("model_files", tests, NULL, NULL);
    team_free(team);
    return failed;
}
