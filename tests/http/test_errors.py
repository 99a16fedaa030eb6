"""What goes wrong is said in OpenAI's shape, with the right status, naming the field."""
import json

from harness import NAME, Server, post_bytes, read_all


def refused(s, path, body, status=400, param=None, code=None):
    r = s.post(path, body)
    assert r.status == status, (body, r.status, r.body)
    e = r.error()
    assert e["param"] == param, (body, e)
    assert code is None or e["code"] == code, (body, e)
    return e


C, H = "/v1/completions", "/v1/chat/completions"


def test_bodies_that_are_no_json_object(s):
    for path in (C, H, "/tokenize", "/detokenize"):
        for body in ("", "{", "nonsense", '{"prompt": "x"} trailing', '{"a": "\\u0000"}', b"\xff\xfe", '{"a":' * 200, "nul"):
            refused(s, path, body, code="invalid_json")
        for body in ("[]", '"x"', "1", "null", "true"):
            refused(s, path, body, code="invalid_type")


def test_missing_required_fields(s):
    for body in ({}, {"prompt": None}, {"model": NAME}):
        refused(s, C, body, param="prompt", code="missing_required_parameter")
    refused(s, H, {}, param="messages", code="missing_required_parameter")
    refused(s, "/tokenize", {}, param="prompt", code="missing_required_parameter")
    refused(s, "/detokenize", {}, param="tokens", code="missing_required_parameter")


def test_wrong_types_name_the_field(s):
    wrong = {"model": 1, "prompt": {}, "suffix": 1, "max_tokens": "x", "temperature": "hot", "top_p": [], "n": "1", "stream": "yes",
             "logprobs": True, "echo": 1, "stop": 5, "presence_penalty": "x", "frequency_penalty": {}, "best_of": [],
             "logit_bias": [], "seed": "x", "top_k": "x", "min_p": "x", "repetition_penalty": "x", "min_tokens": "x",
             "ignore_eos": 1, "stop_token_ids": 1, "include_stop_str_in_output": "x", "skip_special_tokens": 1,
             "add_special_tokens": 0, "response_format": 1, "tools": {}}
    for field, value in wrong.items():
        refused(s, C, {"prompt": "x", field: value}, param=field, code="invalid_type")
    chat = {"messages": [{"role": "user", "content": "x"}]}
    wrong = {"logprobs": 1, "top_logprobs": "x", "max_completion_tokens": "x", "max_tokens": 1.5, "messages": "x",
             "add_generation_prompt": 1, "continue_final_message": "x", "n": 1.5}
    for field, value in wrong.items():
        refused(s, H, {**chat, field: value}, param=field, code="invalid_type")
    refused(s, C, {"prompt": "x", "stream": True, "stream_options": 1}, param="stream_options")
    refused(s, C, {"prompt": "x", "stream": True, "stream_options": {"include_usage": 1}}, param="include_usage")


def test_values_out_of_range_name_the_field(s):
    wrong = {"max_tokens": [-1, 2**60, 1e300], "temperature": [-0.1, 2.1, 1e999], "top_p": [-0.1, 1.1], "n": [0, 129, -1],
             "logprobs": [-1, 21], "presence_penalty": [-2.1, 2.1], "frequency_penalty": [-3, 3], "best_of": [0, 1000],
             "top_k": [-2], "min_p": [-1, 2], "repetition_penalty": [-1, 0], "min_tokens": [-1], "seed": [2**64, -2**64]}
    for field, values in wrong.items():
        for v in values:
            refused(s, C, json.dumps({"prompt": "x", field: v}).replace("Infinity", "1e999"), param=field)
    for v in (0, -5):
        refused(s, H, {"messages": [{"role": "user", "content": "x"}], "max_tokens": v}, param="max_tokens")
    refused(s, H, {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 21}, param="top_logprobs")


def test_combinations_that_make_no_sense(s):
    refused(s, C, {"prompt": "x", "max_tokens": 0}, param="max_tokens")
    refused(s, C, {"prompt": "x", "n": 3, "best_of": 2}, param="best_of")
    refused(s, C, {"prompt": "x", "best_of": 2, "stream": True}, param="best_of")
    refused(s, C, {"prompt": "x", "stream_options": {"include_usage": True}}, param="stream_options")
    refused(s, C, {"prompt": "x", "min_tokens": 9, "max_tokens": 5}, param="min_tokens")
    chat = {"messages": [{"role": "user", "content": "x"}]}
    refused(s, H, {**chat, "top_logprobs": 3}, param="top_logprobs")
    refused(s, H, {**chat, "continue_final_message": True, "add_generation_prompt": True}, param="continue_final_message")


def test_more_prompt_logprobs_than_an_answer_holds_are_refused(s):
    for prompt, logprobs in (([5] * 50_000, 20), ([[5] * 50_000] * 11, 1)):
        r = s.post(C, {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": logprobs})
        assert r.status == 400 and r.error()["param"] == "logprobs", r.status
    r = s.complete([5] * 1000, max_tokens=0, echo=True, logprobs=20)
    assert len(r["choices"][0]["logprobs"]["tokens"]) == 1000


def test_what_is_not_supported_is_refused_not_ignored(s):
    refused(s, C, {"prompt": "x", "suffix": "y"}, param="suffix", code="unsupported_parameter")
    chat = {"messages": [{"role": "user", "content": "x"}]}
    refused(s, H, {**chat, "tools": [{"type": "function"}]}, param="tools", code="unsupported_parameter")
    refused(s, H, {**chat, "functions": [{}]}, param="functions")
    refused(s, H, {**chat, "response_format": {"type": "json_object"}}, param="response_format", code="unsupported_value")
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    refused(s, H, {"messages": [{"role": "user", "content": image}]}, param="messages[0].content")
    for fine in ({"suffix": ""}, {"tools": []}, {"response_format": {"type": "text"}}):
        assert s.post(C, {"prompt": "x", "max_tokens": 1, **fine}).status == 200


def test_prompts_of_every_wrong_kind(s):
    for prompt in (5, True, {}, [], [1.5], [["x"]], [1, "x"], ["x", 1], [[]], [[1], []], [None], ["x", None],
                   [-1], [2**40], [512], [[512]], {"a": 1}):
        refused(s, C, {"prompt": prompt}, param="prompt")
    refused(s, C, {"prompt": ["x"] * 1025}, param="prompt")
    refused(s, C, {"prompt": "", "add_special_tokens": False}, param="prompt")


def test_messages_of_every_wrong_kind(s):
    cases = [([], "messages"), ([1], "messages[0]"), ([{}], "messages[0].role"), ([{"role": 1}], "messages[0].role"),
             ([{"role": "king", "content": "x"}], "messages[0].role"), ([{"role": "user"}], "messages[0].content"),
             ([{"role": "user", "content": None}], "messages[0].content"), ([{"role": "user", "content": 5}], "messages[0].content"),
             ([{"role": "user", "content": [1]}], "messages[0].content"),
             ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
             ([{"role": "user", "content": "x"}, {"role": "user", "content": {}}], "messages[1].content")]
    for messages, param in cases:
        refused(s, H, {"messages": messages}, param=param)


def test_stops_and_biases_of_every_wrong_kind(s):
    for stop in ("", [""], [1], ["x", None], ["x"] * 65, "x" * 5000, {}):
        refused(s, C, {"prompt": "x", "stop": stop}, param="stop")
    for bias in ({"x": 1}, {"-1": 1}, {"1": 101}, {"1": "x"}, {"1": None}, {"512": 1}, {"99999999999999999999": 1}, {"1.5": 1},
                 {" 1": 1}, {"1": 1, "01": 2}):
        refused(s, C, {"prompt": "x", "logit_bias": bias}, param="logit_bias")
    for ids in (["x"], [-1], [512], [1.5], [1] * 65):
        refused(s, C, {"prompt": "x", "stop_token_ids": ids}, param="stop_token_ids")


def test_detokenize_of_wrong_ids(s):
    for tokens in ("x", [-1], [512], [1.5], ["x"], {}):
        refused(s, "/detokenize", {"tokens": tokens}, param="tokens")


def test_unknown_model_is_404(s):
    for path, rest in ((C, {"prompt": "x"}), (H, {"messages": [{"role": "user", "content": "x"}]})):
        for stream in (False, True):
            refused(s, path, {"model": "gpt-4", "stream": stream, **rest}, 404, "model", "model_not_found")


def test_unknown_paths_and_methods(s):
    for path in ("/nothing", "/v1", "/v1/", "/v1/models/", "/v1/completions/", "/..", "//", "/v1/%00x", "/health/x"):
        r = s.get(path)
        assert r.status == 404 and r.error()["code"] in ("not_found", "model_not_found"), (path, r.status)
    for method, path, allow in (("GET", C, "POST"), ("POST", "/health", "GET"), ("DELETE", "/v1/models", "GET"),
                                ("PUT", H, "POST"), ("PATCH", "/", "GET"), ("TRACE", "/", "GET")):
        r = s.request(method, path)
        assert r.status == 405 and r.error()["code"] == "method_not_allowed" and allow in r.headers["allow"], (method, path)


def test_more_sequences_than_slots_are_refused():
    with Server("--max-seqs", "2") as s:
        e = refused(s, C, {"prompt": "x", "n": 3}, param="n")
        assert "3" in e["message"] and "2" in e["message"], e
        refused(s, C, {"prompt": "x", "n": 2, "best_of": 3}, param="best_of")


def test_a_model_with_a_length_limit_says_context_length_exceeded():
    with Server("--max-seq-len", "64") as s:
        limit = s.get("/v1/models").json()["data"][0]["max_model_len"]
        assert limit == 64
        for body in ({"prompt": [5] * 65, "max_tokens": 1}, {"prompt": [5] * 40, "max_tokens": 30}, {"prompt": "a b " * 100}):
            refused(s, C, body, param="prompt", code="context_length_exceeded")
        refused(s, H, {"messages": [{"role": "user", "content": "a b " * 100}]}, param="messages", code="context_length_exceeded")
        r = s.complete([5] * 40, max_tokens=24, ignore_eos=True)
        assert r["usage"]["completion_tokens"] == 24
        r = s.chat("Once", max_tokens=None, ignore_eos=True)
        assert r["usage"]["total_tokens"] == 64 and r["choices"][0]["finish_reason"] == "length"


def test_error_messages_are_valid_utf8_json_whatever_came_in(s):
    for body in (b'{"prompt":"x","model":"\xff\xfe"}', b'{"prompt":"x","model":"\\ud83d\\ude00 \\"quoted\\" \\n"}',
                 '{"prompt":"x","model":"' + "😀" * 300 + '"}'):
        e = refused(s, C, body if isinstance(body, bytes) else body.encode(), 404, "model", "model_not_found")
        assert e["message"]


def test_invalid_utf8_in_prompts_is_taken_as_bytes_and_answered_as_utf8(s):
    r = s.post(C, b'{"prompt":"\xff\xfeOnce \xc3","max_tokens":3,"echo":true,"temperature":0}')
    assert r.status == 200 and r.json()["choices"][0]["text"].startswith("\ufffd\ufffdOnce \ufffd")


def test_errors_carry_request_id_and_cors(s):
    r = s.post(C, "{", {"x-request-id": "mine"})
    assert r.status == 400 and r.headers["x-request-id"] == "mine" and r.headers["access-control-allow-origin"] == "*"


def test_ambiguous_framing_is_refused_and_the_connection_closed(s):
    """Two readings of where a body ends are how requests are smuggled past a proxy."""
    hidden = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
    for headers in (["Transfer-Encoding: chunked"], ["Content-Length: 5"], ["Transfer-Encoding: xchunked"],
                    ["Transfer-Encoding : chunked"], ["Transfer-Encoding: chunked, identity"], ["content-length: 0"]):
        with s.raw(post_bytes(C, b"0\r\n\r\n" + hidden, *headers)) as sock:
            answer = read_all(sock)
            assert answer.startswith(b"HTTP/1.1 400"), (headers, answer[:200])
            assert answer.count(b"HTTP/1.1") == 1, (headers, answer)
    assert b"/hidden" not in s.get("/metrics").body


def test_malformed_requests_do_no_harm(s):
    for junk in (b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", b"\x00" * 100 + b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
                 b"POST " + C.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
                 b"POST " + C.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
                 b"POST " + C.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
                 b"POST " + C.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n",
                 b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        with s.raw(junk) as sock:
            sock.shutdown(1)
            answer = read_all(sock)
            assert not answer.startswith(b"HTTP/1.1 200"), junk
    assert s.get("/health").status == 200
