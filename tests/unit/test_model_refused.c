/* test_model_refused.c - bad model files and settings are refused with one sentence that names the
 * culprit. */
#include "checkpoints.h"
#include "model_folder.h"

/* Rewrites model.safetensors of the folder: tensor `name` is left out, renamed, reshaped or given a
 * value that is not finite. */
enum change { DROP, RENAME, RESHAPE, POISON, INTEGER };
static void change_tensor(const char *file, const char *name, enum change change,
                          const char *new_name) {
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
            st_put(&w, is && change == RENAME ? new_name : t->name,
                   is && change == INTEGER ? "I32" : "F32", t->n_dims, dims, values, t->bytes);
        free(values);
    }
    safetensors_close(st);
    struct bytes b = st_finish(&w);
    write_bytes(in_folder(file), b.at, b.len);
    free(b.at);
}

static void test_bad_tensors_are_refused_by_name(void **state) {
    (void)state;
    static const struct {
        const char *name;
        enum change change;
        const char *new_name, *says;
    } cases[] = {
        {"model.layers.1.mlp.up_proj.weight", DROP, NULL,
         "tensor mlp.up_proj.weight of layer 1 is missing"},
        {"model.norm.weight", DROP, NULL, "tensor norm.weight is missing"},
        {"lm_head.weight", DROP, NULL, "tensor lm_head.weight is missing"},
        {"model.norm.weight", RENAME, "model.other.weight", "tensor model.other.weight is no part"},
        {"model.layers.1.mlp.up_proj.weight", RENAME, "model.layers.2.mlp.up_proj.weight",
         "tensor model.layers.2.mlp.up_proj.weight is of layer 2"},
        {"model.layers.1.mlp.up_proj.weight", RENAME, "layers.0.mlp.up_proj.weight",
         "mlp.up_proj.weight is there twice"},
        {"model.layers.1.mlp.up_proj.weight", RENAME, "model.layers.-1.mlp.up_proj.weight",
         "is no part"},
        {"model.layers.1.mlp.up_proj.weight", RENAME, "model.layers.1mlp.up_proj.weight",
         "is no part"},
        {"model.layers.0.self_attn.k_proj.weight", RESHAPE, NULL,
         "tensor model.layers.0.self_attn.k_proj.weight has shape [8, 64], but the configuration "
         "says [16, 32]"},
        {"model.layers.0.self_attn.k_proj.weight", INTEGER, NULL,
         "tensor model.layers.0.self_attn.k_proj.weight is not F32"},
        {"model.layers.0.self_attn.k_proj.weight", POISON, "N",
         "tensor model.layers.0.self_attn.k_proj.weight holds a value that is not finite"},
        {"model.layers.1.mlp.down_proj.weight", POISON, "I",
         "tensor model.layers.1.mlp.down_proj.weight holds a value that is not finite"},
        {"model.embed_tokens.weight", POISON, "N",
         "tensor model.embed_tokens.weight holds a value that is not finite"},
        {"model.layers.1.input_layernorm.weight", POISON, "I",
         "tensor model.layers.1.input_layernorm.weight holds a value that is not finite"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        check_write(folder, "llama");
        change_tensor("model.safetensors", cases[i].name, cases[i].change, cases[i].new_name);
        check_refused(options_for(folder, WEIGHT_FP32, team), ERR_FORMAT, cases[i].says);
        check_refused(options_for(folder, WEIGHT_FP32, team), ERR_FORMAT, folder);
    }
}

static void test_biases_that_the_configuration_promises_are_missed(void **state) {
    (void)state;
    char config[2000];
    check_write(folder, "llama");
    FILE *file = fopen(in_folder("config.json"), "r");
    size_t n = fread(config, 1, sizeof config - 64, file);
    fclose(file);
    while (n && config[n - 1] != '}')
        n--;
    strcpy(config + n - 1, ",\"attention_bias\":true}");
    write_text(in_folder("config.json"), config);
    check_refused(options_for(folder, WEIGHT_FP32, team), ERR_FORMAT,
                  "tensor self_attn.q_proj.bias of layer 0 is missing");
}

static void test_every_truncated_file_is_refused_by_name(void **state) {
    (void)state;
    static const char *const files[] = {"model.safetensors", "hedgehog.safetensors", "config.json",
                                        "urchin.json"};
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
#define REST                                                                                       \
    ",\"hidden_size\":32,\"intermediate_size\":48,\"num_hidden_layers\":2,\"num_attention_"        \
    "heads\":4,\"num_key_value_heads\":2,\"vocab_size\":300,\"max_position_embeddings\":40"
    static const struct {
        const char *config, *says;
    } cases[] = {
        {"{\"model_type\":\"falcon\"" REST "}",
         "model_type \"falcon\" is not supported; supported are llama"},
        {"{}", "model_type \"\" is not supported"},
        {"[1]", "model_type"},
        {"{\"model_type\":\"llama\",\"hidden_size\":32}", "num_hidden_layers is missing"},
        {"{\"model_type\":\"llama\"" REST ",\"head_dim\":\"x\"}", "head_dim is not a whole number"},
        {"{\"model_type\":\"llama\"" REST ",\"head_dim\":7}", "head size 7 is odd"},
        {"{\"model_type\":\"llama\"" REST ",\"head_dim\":0}", "head size is 0"},
        {"{\"model_type\":\"llama\"" REST ",\"hidden_act\":\"gelu\"}", "hidden_act"},
        {"{\"model_type\":\"llama\"" REST ",\"rms_norm_eps\":\"1e-5\"}", "rms_norm_eps"},
        {"{\"model_type\":\"llama\"" REST ",\"rope_theta\":-1}", "rope_theta"},
        {"{\"model_type\":\"llama\"" REST
         ",\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4}}",
         "type yarn is not supported"},
        {"{\"model_type\":\"llama\"" REST ",\"rope_scaling\":{\"rope_type\":\"linear\"}}",
         "factor"},
        {"{\"model_type\":\"llama\"" REST ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":"
         "8,\"low_freq_factor\":4,\"high_freq_factor\":1}}",
         "high_freq_factor"},
        {"{\"model_type\":\"llama\"" REST ",\"partial_rotary_factor\":0.5}",
         "partial_rotary_factor"},
        {"{\"model_type\":\"llama\"" REST ",\"quantization_config\":{}}", "quantization_config"},
        {"{\"model_type\":\"llama\",\"hidden_size\":32,\"intermediate_size\":48,\"num_hidden_"
         "layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":3,\"vocab_size\":300,\"max_"
         "position_embeddings\":40}",
         "4 heads cannot share 3"},
        {"{\"model_type\":\"llama\",\"hidden_size\":32,\"intermediate_size\":48,\"num_hidden_"
         "layers\":2000000000,\"num_attention_heads\":4,\"vocab_size\":300,\"max_position_"
         "embeddings\":40}",
         "number of layers is 2000000000"},
        {"{\"model_type\":\"gpt2\",\"n_embd\":30,\"n_layer\":2,\"n_head\":4,\"n_positions\":40,"
         "\"vocab_size\":300}",
         "GPT-2's 4 heads do not divide"},
        {"{\"model_type\":\"gpt2\",\"n_embd\":32,\"n_layer\":2,\"n_head\":4,\"n_positions\":40,"
         "\"vocab_size\":300,\"activation_function\":\"relu\"}",
         "activation_function"},
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
    static const struct {
        const char *from, *to, *says;
    } cases[] = {
        /* one edit of TINY_URCHIN */
        {"\"format\":1", "\"format\":2", "format is not 1"},
        {"\"name\":\"tiny\"", "\"name\":7", "name is missing"},
        {"\"base\":null", "\"base\":3", "base is neither"},
        {"\"base\":null", "\"base\":{\"file\":\"../x\",\"bytes\":1,\"sha256\":\"00\"}",
         "base.file"},
        {"\"base\":null", "\"base\":{\"file\":\"x\",\"bytes\":1,\"sha256\":\"00\"}", "base.sha256"},
        {"\"base\":null,", "", "base is missing"},
        {"\"name\":", "\"colour\":1,\"name\":", "colour is not known"},
        {"\"kind\":\"hedgehog\"", "\"kind\":\"mamba\"",
         "attention.kind is not one of softmax, hedgehog"},
        {"\"kind\":\"hedgehog\"", "\"kind\":\"softmax\"", "softmax takes no other settings"},
        {"\"map\":\"exp\"", "\"map\":\"elu\"", "attention.map is not one of exp"},
        {"\"features\":8", "\"features\":0", "attention.features"},
        {"\"features\":8", "\"features\":9", "feature_map_q is not of the shape [4, 8, 9]"},
        {"\"features\":8", "\"features\":8,\"gate\":true", "attention.gate is not known"},
        {"\"sinks\":1", "\"sinks\":1,\"sinks\":2", "attention.sinks is there twice"},
        {"\"sinks\":1", "\"sinks\":17", "sinks"},
        {"\"sinks\":1", "\"sinks\":-1", "attention.sinks"},
        {"{\"rule\":\"terraced\",\"size\":16}", "[1]", "attention.window is not an object"},
        {"{\"size\":16,\"score\":\"self_recall\",\"recent\":4,\"age\":32}", "[1]",
         "attention.cache is neither"},
        {TINY_LOW_RANK, "[2]", "low_rank is neither"},
        {"\"size\":16}", "\"size\":16,\"step\":2}", "attention.window.step is not known"},
        {"\"size\":16}", "\"size\":0}", "attention.window.size"},
        {"\"terraced\"", "\"striped\"", "attention.window.rule"},
        {"\"terraced\"", "\"sliding\"", "cache"},
        {"\"self_recall\"", "\"newest\"", "attention.cache.score"},
        {"\"recent\":4", "\"recent\":17", "recent"},
        {"\"age\":32", "\"age\":0", "attention.cache.age"},
        {"\"age\":32", "\"age\":32,\"fact_age\":0", "attention.cache.fact_age"},
        {"\"age\":32", "\"age\":32,\"min\":1", "attention.cache.min is not known"},
        {"\"age\":32", "\"age\":32,\"retrieval\":3", "attention.cache.retrieval is neither"},
        {"\"age\":32", "\"age\":32,\"retrieval\":{\"size\":9}", "attention.cache.retrieval.heads"},
        {"\"age\":32", "\"age\":32,\"retrieval\":{\"size\":9,\"heads\":[]}",
         "attention.cache.retrieval.heads"},
        {"\"age\":32", "\"age\":32,\"retrieval\":{\"size\":9,\"heads\":[1]}",
         "attention.cache.retrieval.heads"},
        {"\"age\":32", "\"age\":32,\"retrieval\":{\"size\":9,\"heads\":[[1,0,0]]}",
         "attention.cache.retrieval.heads"},
        {"\"age\":32", "\"age\":32,\"retrieval\":{\"size\":9,\"heads\":[[1,0],[0,1]]}",
         "attention.cache.retrieval.heads is not a list of ascending"},
        {"\"age\":32", "\"age\":32,\"retrieval\":{\"size\":9,\"heads\":[[0,77]]}",
         "names kv head 77 of layer 0"},
        {"\"age\":32", "\"age\":32,\"retrieval\":{\"size\":9,\"heads\":[[88,0]]}",
         "names kv head 0 of layer 88"},
        {"\"age\":32", "\"age\":32,\"retrieval\":{\"size\":0,\"heads\":[[0,0]]}",
         "attention.cache.retrieval.size"},
        {"\"age\":32", "\"age\":32,\"retrieval\":{\"size\":9,\"recent\":10,\"heads\":[[0,0]]}",
         "retrieval heads"},
        {"\"age\":32", "\"age\":32,\"retrieval\":{\"size\":9,\"age\":1,\"heads\":[[0,0]]}",
         "attention.cache.retrieval.age is not known"},
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
    check_refused(options_for(folder, WEIGHT_FP32, team), ERR_FORMAT,
                  "tensor layers.1.attn.log_mix holds a value that is not finite");
}

static void test_fp8_is_for_a_gpu(void **state) {
    (void)state;
    struct model_options o = options_for(STORIES, WEIGHT_FP8, team);
    o.device = DEVICE_CPU;
    check_refused(o, ERR_ARG, "fp8 weights are for a GPU (--device cuda)");
    o.device = DEVICE_AUTO; /* this program has none */
    check_refused(o, ERR_ARG, "fp8 weights are for a GPU (--device cuda)");
}

static void test_missing_base_says_how_to_get_it(void **state) {
    (void)state;
    char *cache = getenv("URCHIN_CACHE") ? strdup(getenv("URCHIN_CACHE")) : NULL,
         *home = strdup(getenv("HOME"));
    setenv("URCHIN_CACHE", folder, 1);
    setenv("HOME", folder, 1);
    check_refused(options_for(SMOLLM, WEIGHT_INT8, team), ERR_IO, "`make model`");
    check_refused(options_for(SMOLLM, WEIGHT_INT8, team), ERR_IO,
                  "SmolLM2-135M-Instruct.Q4_1.gguf");
    write_text(in_folder("SmolLM2-135M-Instruct.Q4_1.gguf"), "cut");
    check_refused(options_for(SMOLLM, WEIGHT_INT8, team), ERR_IO, "has another size");
    unlink(in_folder("SmolLM2-135M-Instruct.Q4_1.gguf"));
    setenv("HOME", home, 1);
    if (cache)
        setenv("URCHIN_CACHE", cache, 1);
    else
        unsetenv("URCHIN_CACHE");
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

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_bad_tensors_are_refused_by_name),
        IN_FOLDER(test_biases_that_the_configuration_promises_are_missed),
        IN_FOLDER(test_every_truncated_file_is_refused_by_name),
        IN_FOLDER(test_bad_configurations_are_refused_by_name),
        IN_FOLDER(test_bad_urchin_json_is_refused_by_name),
        cmocka_unit_test(test_fp8_is_for_a_gpu),
        IN_FOLDER(test_missing_base_says_how_to_get_it),
        IN_FOLDER(test_bad_settings_are_refused),
    };
    if (team_new(&team, 2)) return 1;
    int failed = cmocka_run_group_tests_name("model_refused", tests, NULL, NULL);
    team_free(team);
    return failed;
}
