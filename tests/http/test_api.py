"""OpenAI's objects, field by field, and what they say."""
import json
import math
import os
import re
import threading

from harness import NAME, Server, events, post_bytes, read_all


def check_usage(u):
    assert u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"], u
    assert u["prompt_tokens_details"]["cached_tokens"] == 0, u


def check_head(o, kind, prefix):
    assert o["object"] == kind and o["id"].startswith(prefix), o
    assert isinstance(o["created"], int) and o["model"] == NAME, o
    assert o["system_fingerprint"].startswith("fp_"), o


def test_models_list_and_one_model_have_openai_shape_and_our_sizes(s):
    listed = s.get("/v1/models").json()
    assert listed["object"] == "list" and len(listed["data"]) == 1
    model = listed["data"][0]
    assert model == s.get(f"/v1/models/{NAME}").json()
    assert model["id"] == NAME and model["object"] == "model" and model["owned_by"] == "urchin"
    meta = model["meta"]
    assert meta["slots"] >= 1 and 0 < meta["state_bytes"] <= meta["slot_bytes"]
    assert meta["attention"]["kind"] == "hedgehog" and meta["n_vocab"] == 512
    r = s.get("/v1/models/another")
    assert r.status == 404 and r.error()["code"] == "model_not_found"


def test_served_model_name_replaces_the_models_own():
    with Server("--served-model-name", "team/a model") as s:
        assert s.get("/v1/models").json()["data"][0]["id"] == "team/a model"
        assert s.get("/v1/models/team/a%20model").status == 200
        assert s.complete(model="team/a model")["model"] == "team/a model"
        assert s.post("/v1/completions", {"model": NAME, "prompt": "x"}).status == 404


def test_version_health_and_page_answer(s):
    assert re.fullmatch(r"\d+\.\d+\.\d+", s.get("/version").json()["version"])
    assert s.get("/health").json() == {"status": "ok"} == s.get("/v1/health").json()
    page = s.get("/")
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert b"</script>" in page.body and page.body.startswith(b"<!doctype html>")
    assert not re.search(rb'(src|href)="https?:', page.body), "the page must need nothing from elsewhere"


def test_head_has_the_headers_of_get_and_no_body(s):
    r = s.request("HEAD", "/health")
    assert r.status == 200 and r.body == b"" and r.headers["content-length"] == "15"


def test_completion_has_every_required_field(s):
    r = s.complete()
    check_head(r, "text_completion", "cmpl-")
    check_usage(r["usage"])
    assert r["usage"]["prompt_tokens"] == 5 and r["usage"]["completion_tokens"] == 8
    (c,) = r["choices"]
    assert c["index"] == 0 and c["logprobs"] is None and c["finish_reason"] == "length" and c["stop_reason"] is None
    assert c["text"].strip()


def test_default_max_tokens_of_completions_is_16(s):
    r = s.post("/v1/completions", {"prompt": "Once", "ignore_eos": True, "max_tokens": None}).json()
    assert r["usage"]["completion_tokens"] == 16


def test_chat_completion_has_every_required_field(s):
    r = s.chat()
    check_head(r, "chat.completion", "chatcmpl-")
    check_usage(r["usage"])
    (c,) = r["choices"]
    assert c["message"] == {"role": "assistant", "content": c["message"]["content"], "refusal": None}
    assert c["logprobs"] is None and c["finish_reason"] == "length" and c["index"] == 0


def test_greedy_text_is_the_same_every_time_and_streamed_or_not(s):
    whole = s.complete(max_tokens=60)["choices"][0]["text"]
    assert whole == s.complete(max_tokens=60)["choices"][0]["text"]
    parts = s.stream("/v1/completions", {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 60})
    assert "".join(e["choices"][0]["text"] for e in parts) == whole
    chat = s.chat(max_tokens=60)["choices"][0]["message"]["content"]
    parts = s.stream("/v1/chat/completions", {"messages": [{"role": "user", "content": "Once upon a time"}],
                                              "temperature": 0, "max_tokens": 60})
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in parts) == chat


def test_a_seed_gives_the_same_text_alone_and_among_others(s):
    asked = dict(temperature=1.0, max_tokens=40, seed=7)
    alone = s.complete(**asked)["choices"][0]["text"]
    texts = [None] * 8

    def ask(i):
        texts[i] = s.complete(**(asked if i % 2 else dict(asked, seed=i)))["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [texts[i] for i in range(1, 8, 2)] == [alone] * 4
    assert len({alone, *texts[0::2]}) > 1, "other seeds gave the same text"


def test_seeds_of_64_bits_are_taken(s):
    texts = [[s.complete("Once", max_tokens=12, temperature=1.5, seed=seed)["choices"][0]["text"] for _ in range(2)]
             for seed in (2**63 - 1, -2**63, 2**62)]
    assert all(a == b for a, b in texts) and len({a for a, _ in texts}) == 3, texts


def test_without_a_seed_texts_differ(s):
    texts = {s.complete(temperature=1.5, max_tokens=30)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


def test_chat_stream_has_role_content_finish_usage_in_this_order(s):
    body = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 5, "temperature": 0,
            "stream_options": {"include_usage": True}}
    chunks = s.stream("/v1/chat/completions", body)
    assert len({(c["id"], c["created"]) for c in chunks}) == 1
    for c in chunks:
        check_head(c, "chat.completion.chunk", "chatcmpl-")
    usage = chunks.pop()
    assert usage["choices"] == []
    check_usage(usage["usage"])
    assert usage["usage"]["completion_tokens"] == 5
    assert all(c["usage"] is None for c in chunks)
    choices = [c["choices"][0] for c in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "length"
    for c in choices[:-1]:
        assert c["finish_reason"] is None
    for c in choices[1:-1]:
        assert set(c["delta"]) == {"content"} and c["delta"]["content"]


def test_no_usage_key_in_chunks_unless_asked(s):
    for e in s.stream("/v1/completions", {"prompt": "Once", "max_tokens": 3}):
        assert "usage" not in e


def test_completion_stream_ends_with_finish_reason_in_its_last_chunk(s):
    chunks = s.stream("/v1/completions", {"prompt": "Once", "max_tokens": 4, "temperature": 0, "ignore_eos": True})
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]


def test_an_array_of_prompts_gives_choices_in_order_each_as_if_alone(s):
    prompts = ["Once upon a time", "The cat", "Lily saw a big"]
    r = s.complete(prompts, n=2)
    assert [c["index"] for c in r["choices"]] == list(range(6))
    alone = [s.complete(p) for p in prompts]
    for i, one in enumerate(alone):
        assert r["choices"][2 * i]["text"] == r["choices"][2 * i + 1]["text"] == one["choices"][0]["text"]
    assert r["usage"]["prompt_tokens"] == sum(a["usage"]["prompt_tokens"] for a in alone)
    assert r["usage"]["completion_tokens"] == 2 * sum(a["usage"]["completion_tokens"] for a in alone)


def test_more_prompts_than_slots_and_queue_places_all_get_answers():
    with Server("--max-seqs", "2", "--max-queue", "1") as s:
        r = s.complete(["Once"] * 20, max_tokens=5)
        assert len(r["choices"]) == 20 and len({c["text"] for c in r["choices"]}) == 1


def test_token_id_prompts_equal_text_prompts(s):
    ids = s.post("/tokenize", {"prompt": "Once upon a time"}).json()["tokens"]
    text = s.complete()["choices"][0]["text"]
    assert s.complete(ids)["choices"][0]["text"] == text
    assert [c["text"] for c in s.complete([ids, ids])["choices"]] == [text, text]
    assert s.complete(ids)["usage"]["prompt_tokens"] == len(ids), "nothing is added to token prompts"


def test_n_choices_differ_and_stream_interleaved_with_their_own_ends(s):
    body = {"messages": [{"role": "user", "content": "Once"}], "n": 3, "max_tokens": 12, "temperature": 1.2,
            "seed": 3, "ignore_eos": True}
    whole = s.post("/v1/chat/completions", body).json()
    texts = [c["message"]["content"] for c in whole["choices"]]
    assert len(set(texts)) == 3
    streamed, ends, roles = ["", "", ""], [0, 0, 0], [0, 0, 0]
    for e in s.stream("/v1/chat/completions", body):
        (c,) = e["choices"]
        assert not ends[c["index"]], "something after the end"
        streamed[c["index"]] += c["delta"].get("content") or ""
        roles[c["index"]] += "role" in c["delta"]
        ends[c["index"]] += c["finish_reason"] is not None
    assert streamed == texts and ends == [1, 1, 1] == roles


def test_best_of_returns_the_likeliest(s):
    asked = dict(temperature=1.0, seed=11, max_tokens=10, logprobs=0, ignore_eos=True)
    every = s.complete(n=6, **asked)["choices"]
    mean = [sum(c["logprobs"]["token_logprobs"]) / 10 for c in every]
    best = s.complete(best_of=6, n=2, **asked)["choices"]
    order = sorted(range(6), key=lambda i: -mean[i])
    assert [c["text"] for c in best] == [every[order[0]]["text"], every[order[1]]["text"]]


def test_stop_strings_end_the_text_before_them_and_are_named(s):
    whole = s.complete(max_tokens=40)["choices"][0]["text"]
    word = whole.split()[5]
    for stop in (word, ["zzz", word]):
        c = s.complete(max_tokens=40, stop=stop)["choices"][0]
        assert c["finish_reason"] == "stop" and c["stop_reason"] == word
        assert c["text"] == whole[:whole.index(word)]
    c = s.complete(max_tokens=40, stop=word, include_stop_str_in_output=True)["choices"][0]
    assert c["text"] == whole[:whole.index(word) + len(word)]
    # streamed: no part of the stop string may slip out
    parts = s.stream("/v1/completions", {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 40, "stop": [word]})
    assert "".join(e["choices"][0]["text"] for e in parts) == whole[:whole.index(word)]
    assert parts[-1]["choices"][0]["stop_reason"] == word


def test_stop_token_ids_and_min_tokens(s):
    ids = s.complete(max_tokens=20, logprobs=0, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]["tokens"]
    ids = [int(t.removeprefix("token_id:")) for t in ids]
    stop = ids[4]
    first = ids.index(stop)
    r = s.complete(max_tokens=20, stop_token_ids=[stop])
    assert r["choices"][0]["stop_reason"] == stop and r["choices"][0]["finish_reason"] == "stop"
    assert r["usage"]["completion_tokens"] == first + 1
    assert s.complete(max_tokens=20, stop_token_ids=[stop], min_tokens=first + 2)["usage"]["completion_tokens"] > first + 1


def test_echo_repeats_the_prompt(s):
    text = s.complete()["choices"][0]["text"]
    assert s.complete(echo=True)["choices"][0]["text"] == "Once upon a time" + text
    assert s.complete(echo=True, max_tokens=0)["choices"][0]["text"] == "Once upon a time"
    ids = s.post("/tokenize", {"prompt": "Once upon a time"}).json()["tokens"]
    assert s.complete(ids, echo=True)["choices"][0]["text"] == "Once upon a time" + text
    parts = s.stream("/v1/completions", {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 8, "echo": True})
    assert "".join(e["choices"][0]["text"] for e in parts) == "Once upon a time" + text


def test_echo_with_logprobs_aligns_tokens_and_offsets(s):
    """What lm-eval's log-likelihood needs: one entry a prompt token, then one generated, the first one null."""
    prompt = "Once upon a time, there was a café"
    ids = s.post("/tokenize", {"prompt": prompt}).json()["tokens"]
    for asked in (prompt, ids):
        r = s.complete(asked, echo=True, logprobs=2, max_tokens=1)
        c = r["choices"][0]
        lp = c["logprobs"]
        n = len(ids) + 1
        assert set(lp) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
        assert [len(lp[k]) for k in lp] == [n] * 4
        assert lp["token_logprobs"][0] is None and lp["top_logprobs"][0] is None
        assert all(-100 < x <= 0 for x in lp["token_logprobs"][1:])
        for token, logprob, top in list(zip(lp["tokens"], lp["token_logprobs"], lp["top_logprobs"]))[1:]:
            assert 2 <= len(top) <= 3 and top[token] == logprob and max(top.values()) >= logprob
        for i in range(1, n):  # a token's text lies at its offset, but for the space in front of the whole
            begin, end = lp["text_offset"][i], (lp["text_offset"] + [len(c["text"])])[i + 1]
            assert c["text"][begin:end] == lp["tokens"][i][1 if i == 1 else 0:], (i, lp)
        assert r["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": n,
                              "prompt_tokens_details": {"cached_tokens": 0}}
        alone = s.complete(asked, echo=True, logprobs=2, max_tokens=0)["choices"][0]["logprobs"]
        assert alone["token_logprobs"] == lp["token_logprobs"][:-1]


def test_prompt_logprobs_are_those_of_generation(s):
    """Scores of a text do not depend on whether it was generated or given; on a GPU, which reads given text by other
    kernels, by no more than bf16 products make of it."""
    r = s.complete(max_tokens=20, logprobs=3, ignore_eos=True, return_tokens_as_token_ids=True)
    generated = r["choices"][0]["logprobs"]
    ids = s.post("/tokenize", {"prompt": "Once upon a time"}).json()["tokens"]
    more = ids + [int(t.removeprefix("token_id:")) for t in generated["tokens"]]
    scored = s.complete(more, echo=True, logprobs=3, max_tokens=0, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    if os.environ.get("URCHIN_DEVICE") == "cuda":
        assert all(abs(a - b) < 0.1 for a, b in zip(scored["token_logprobs"][len(ids):], generated["token_logprobs"], strict=True))
        return
    assert scored["token_logprobs"][len(ids):] == generated["token_logprobs"]
    assert scored["top_logprobs"][len(ids):] == generated["top_logprobs"]


def test_logprobs_zero_gives_the_sampled_token_only(s):
    lp = s.complete(logprobs=0)["choices"][0]["logprobs"]
    assert len(lp["tokens"]) == 8 and all(len(t) == 1 for t in lp["top_logprobs"])


def test_streamed_logprobs_join_to_the_whole(s):
    whole = s.complete(logprobs=2, max_tokens=12, echo=True)["choices"][0]["logprobs"]
    joined = {k: [] for k in whole}
    for e in s.stream("/v1/completions", {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 12,
                                          "logprobs": 2, "echo": True}):
        for k, v in (e["choices"][0]["logprobs"] or {}).items():
            joined[k] += v
    assert joined == whole


def test_chat_logprobs_have_tokens_bytes_and_tops(s):
    c = s.chat(logprobs=True, top_logprobs=3, max_tokens=6)["choices"][0]
    content = c["logprobs"]["content"]
    assert c["logprobs"]["refusal"] is None and len(content) == 6
    for item in content:
        assert set(item) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(item["bytes"]).decode(errors="replace") == item["token"] and item["logprob"] <= 0
        assert len(item["top_logprobs"]) == 3
        tops = [t["logprob"] for t in item["top_logprobs"]]
        assert tops == sorted(tops, reverse=True) and tops[0] == item["logprob"]
    assert b"".join(bytes(i["bytes"]) for i in content).decode() == c["message"]["content"]
    assert s.chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    streamed = []
    for e in s.stream("/v1/chat/completions", {"messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 6,
                                               "temperature": 0, "logprobs": True, "top_logprobs": 3}):
        streamed += (e["choices"][0]["logprobs"] or {"content": []})["content"]
    assert streamed == content


def test_an_impossible_token_is_a_number_not_infinity(s):
    lp = s.complete(logit_bias={"300": 100}, max_tokens=1, logprobs=1, temperature=0)["choices"][0]["logprobs"]
    assert all(math.isfinite(x) for x in lp["token_logprobs"])


def test_logit_bias_forces_and_bans(s):
    ids = s.post("/tokenize", {"prompt": "x", "add_special_tokens": False}).json()["tokens"]
    r = s.complete(logit_bias={str(ids[-1]): 100}, max_tokens=3)
    assert r["choices"][0]["text"].count("x") == 3 or r["choices"][0]["text"].strip()
    first = s.complete(max_tokens=1, logprobs=0, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]["tokens"][0]
    banned = s.complete(max_tokens=1, logprobs=0, return_tokens_as_token_ids=True,
                        logit_bias={first.removeprefix("token_id:"): -100})["choices"][0]["logprobs"]["tokens"][0]
    assert banned != first


def test_penalties_change_what_repeats(s):
    plain = s.complete("a a a a a a", max_tokens=40, ignore_eos=True)["choices"][0]["text"]
    for penalty in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 2.0}, {"repeat_penalty": 2.0}):
        assert s.complete("a a a a a a", max_tokens=40, ignore_eos=True, **penalty)["choices"][0]["text"] != plain, penalty


def test_roles_and_text_parts_are_accepted(s):
    parts = [{"type": "text", "text": "Once upon"}, {"type": "text", "text": "a time"}]
    r = s.post("/v1/chat/completions", {"max_tokens": 2, "temperature": 0, "messages": [
        {"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts, "name": "x"},
        {"role": "assistant", "content": None, "tool_calls": []}, {"role": "user", "content": "there"}]})
    assert r.status == 200, r.body
    one = s.post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], "max_tokens": 2, "temperature": 0}).json()
    other = s.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Once upon\na time"}], "max_tokens": 2, "temperature": 0}).json()
    assert one["usage"] == other["usage"] and one["choices"] == other["choices"]


def test_max_completion_tokens_counts_and_wins(s):
    assert s.chat(max_completion_tokens=3, max_tokens=None)["usage"]["completion_tokens"] == 3
    assert s.chat(max_completion_tokens=3, max_tokens=9)["usage"]["completion_tokens"] == 3


def test_null_means_absent_for_every_field(s):
    fields = ("suffix max_tokens temperature top_p n stream logprobs echo stop presence_penalty frequency_penalty best_of "
              "logit_bias user seed top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids stream_options model "
              "response_format tools").split()
    r = s.post("/v1/completions", {"prompt": "Once", **{f: None for f in fields}})
    assert r.status == 200, r.body


def test_unknown_fields_are_ignored(s):
    assert s.complete(store=True, metadata={"a": 1}, service_tier="auto", user="me", made_up=[1])["choices"]


def test_tokenize_speaks_llama_servers_and_vllms_names(s):
    a = s.post("/tokenize", {"content": "Once upon a time", "add_special": False}).json()
    b = s.post("/tokenize", {"prompt": "Once upon a time", "add_special_tokens": False, "return_token_strs": True}).json()
    assert a["tokens"] == b["tokens"] and b["count"] == len(b["tokens"]) == len(b["token_strs"])
    with_bos = s.post("/tokenize", {"content": "Once upon a time"}).json()["tokens"]
    assert with_bos[1:] == a["tokens"] and with_bos[0] == 1
    pieces = s.post("/tokenize", {"content": "Hé😀", "with_pieces": True, "add_special": False}).json()["tokens"]
    raw = b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces)
    assert raw.decode().strip() == "Hé😀"
    chat = s.post("/tokenize", {"messages": [{"role": "user", "content": "Once upon a time"}]}).json()
    assert chat["count"] == s.chat(max_tokens=1)["usage"]["prompt_tokens"]


def test_detokenize_gives_back_what_was_tokenized(s):
    for text in ("Once upon a time", "naïve café 😀\n\ttabs", "a\"b\\c", "  two spaces"):
        ids = s.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
        r = s.post("/detokenize", {"tokens": ids}).json()
        assert r["prompt"] == r["content"] == text, (text, r)


def test_tokenizer_info_has_what_lm_eval_probes_for(s):
    info = s.get("/tokenizer_info").json()
    assert info["eos_token"] == "</s>" and info["bos_token"] == "<s>" and info["pad_token"]
    assert info["chat_template"] is None


def test_characters_split_over_tokens_arrive_whole(s):
    """Byte tokens make characters of several tokens; logit_bias makes the model say them."""
    emoji = [243, 162, 155, 131]  # <0xF0> <0x9F> <0x98> <0x80> of this vocabulary
    assert s.post("/detokenize", {"tokens": emoji}).json()["content"] == "😀"
    for i, first in enumerate(emoji):
        prompt = s.post("/tokenize", {"prompt": "Hi"}).json()["tokens"] + emoji[:i]
        chunks = s.stream("/v1/completions", {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 0,
                                              "logit_bias": {str(first): 100}})
        text = "".join(c["choices"][0]["text"] for c in chunks)
        assert len(text) == 1, (i, text)  # the lone byte is replaced, never sent broken
    r = s.complete(max_tokens=4, logit_bias={"243": 100}, logprobs=0)
    assert r["choices"][0]["text"] == "\ufffd" * 4
    assert len(r["choices"][0]["logprobs"]["tokens"]) == 4


def test_request_id_is_echoed_when_harmless_and_made_otherwise(s):
    assert s.get("/health", **{"x-request-id": "abc-123_Z.9"}).headers["x-request-id"] == "abc-123_Z.9"
    for bad in ("a b", "x" * 65, "<script>", "a;b", "ü"):
        r = s.request("GET", "/health", headers={"x-request-id": bad.encode("latin-1")})
        assert re.fullmatch(r"req_[0-9a-f]{32}", r.headers["x-request-id"]), (bad, r.headers)
    r = s.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert r.headers["x-request-id"].startswith("req_") and int(r.headers["openai-processing-ms"]) >= 0


def test_pipelined_requests_are_answered_in_order(s):
    one = post_bytes("/v1/completions", {"prompt": "Once", "max_tokens": 30, "ignore_eos": True})
    two = post_bytes("/v1/completions", {"prompt": "Once", "max_tokens": 2, "stream": True})
    with s.raw(one + two + b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") as sock:
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 ") == 3
    assert answer.index(b'"completion_tokens":30') < answer.index(b"[DONE]") < answer.index(b"HTTP/1.1 404")


def test_an_http_1_0_client_gets_its_stream_and_the_end_of_the_connection(s):
    with s.raw(post_bytes("/v1/completions", {"prompt": "Once", "max_tokens": 3, "stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0")) as sock:
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower() and len(events(body)) == 3


def test_many_requests_on_one_connection(s):
    c = s.connect()
    for i in range(20):
        c.request("POST", "/v1/completions", json.dumps({"prompt": "Once", "max_tokens": 2, "stream": i % 2 == 0}))
        body = c.getresponse().read()
        assert events(body) if i % 2 == 0 else json.loads(body)["choices"]
    c.close()


def test_metrics_are_well_formed_and_count(s):
    before = s.settled("generation_tokens_total")
    s.complete(max_tokens=7, ignore_eos=True)
    s.until(lambda: s.metric("generation_tokens_total") == before + 7)
    r = s.get("/metrics")
    assert r.headers["content-type"].startswith("text/plain; version=0.0.4")
    typed, helped, seen = {}, set(), set()
    for line in r.body.decode().splitlines():
        if line.startswith("# HELP "):
            helped.add(line.split()[2])
        elif line.startswith("# TYPE "):
            typed[line.split()[2]] = line.split()[3]
        else:
            m = re.fullmatch(r'(urchin_[a-z0-9_]+)(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? (-?[0-9.e+-]+|\+Inf|NaN)', line)
            assert m, line
            assert line.rsplit(" ", 1)[0] not in seen, f"twice: {line}"
            seen.add(line.rsplit(" ", 1)[0])
            family = m[1] if m[1] in typed else re.sub("_(bucket|sum|count)$", "", m[1])
            assert family in typed and family in helped, line
            assert (typed[family] == "counter") == family.endswith("_total"), line
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
                 "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
                 "request_prompt_tokens", "request_generation_tokens"):
        assert typed["urchin_" + name] == "histogram"
        assert s.metric(name + "_count") > 0
    buckets = [float(v) for v in re.findall(r"urchin_inter_token_latency_seconds_bucket\{.*\} (\S+)", r.body.decode())]
    assert buckets == sorted(buckets), "buckets are cumulative"
