"""Keys, limits, slow and vanishing clients, overload, start and end."""
import json
import os
import signal
import socket
import threading
import time

import harness
from harness import Server, endless, post_bytes, read_all, read_some, read_until


# ---- keys and browsers ----

def test_api_keys_guard_everything_but_health_version_and_page():
    with Server("--api-key", "alpha, beta-2") as s:
        for path in ("/health", "/v1/health", "/version", "/"):
            assert s.get(path).status == 200, path
        for path in ("/v1/models", "/metrics", "/tokenizer_info"):
            r = s.get(path)
            assert r.status == 401 and r.error()["code"] == "invalid_api_key" and r.headers["www-authenticate"] == "Bearer", path
            for key in ("Bearer alpha", "bearer beta-2", "Bearer  alpha"):
                assert s.get(path, Authorization=key).status == 200, (path, key)
            for key in ("Bearer", "Bearer ", "Bearer alph", "Bearer alphaa", "Bearer alpha, beta-2", "Basic alpha", "alpha", "Bearer ALPHA"):
                assert s.get(path, Authorization=key).status == 401, (path, key)
            assert s.get(path, **{"X-Api-Key": "beta-2"}).status == 200
            assert s.get(path, **{"X-Api-Key": "beta"}).status == 401
        r = s.post("/v1/completions", {"prompt": "x" * 100_000})
        assert r.status == 401, "a body that will not be used is still read, so that the answer arrives"
        assert s.request("OPTIONS", "/v1/completions").status == 204, "browsers send no key with a preflight"
        assert "alpha" not in s.errors() and not any("alpha" in line for line in s.lines)


def test_cors_preflight_and_headers(s):
    r = s.request("OPTIONS", "/v1/chat/completions", headers={
        "Origin": "http://a.example", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"})
    assert r.status == 204 and r.headers["access-control-allow-origin"] == "*"
    assert "POST" in r.headers["access-control-allow-methods"]
    assert "x-stainless-lang" in r.headers["access-control-allow-headers"]
    assert s.get("/v1/models", Origin="http://a.example").headers["access-control-allow-origin"] == "*"


def test_cors_of_one_origin_and_of_none():
    with Server("--cors-origin", "https://chat.example") as s:
        r = s.get("/health")
        assert r.headers["access-control-allow-origin"] == "https://chat.example" and r.headers["vary"] == "Origin"
    with Server("--cors-origin", "") as s:
        assert "access-control-allow-origin" not in s.get("/health").headers


# ---- sizes ----

def test_a_body_beyond_the_limit_is_413_and_within_it_is_read():
    with Server("--body-limit", "64K") as s:
        r = s.post("/v1/completions", {"prompt": "x" * 70_000})
        assert r.status == 413 and r.error()["code"] == "body_too_large"
        assert s.post("/v1/completions", " " * 65_000 + '{"prompt":"x","max_tokens":1}').status == 200
        chunks = b"".join(b"2000\r\n" + b"x" * 8192 + b"\r\n" for _ in range(10)) + b"0\r\n\r\n"
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        with s.raw(head + chunks) as sock:
            assert read_all(sock).startswith(b"HTTP/1.1 413")
        with s.raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n") as sock:
            assert read_some(sock).startswith(b"HTTP/1.1 413"), "who asks first is told at once"
        before = s.memory()
        with s.raw() as sock:  # a body without end is cut, and never kept
            sock.sendall(head)
            sent = 0
            try:
                while sent < 32 << 20:
                    sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                    sent += 65536
            except OSError:
                pass
            assert sent < 16 << 20
        assert s.memory() - before < 4 << 20


def test_a_chunked_body_is_read(s):
    body = json.dumps({"prompt": "Once", "max_tokens": 1}).encode()
    data = b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in body) + b"0\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    with s.raw(head + data) as sock:
        assert read_all(sock).startswith(b"HTTP/1.1 200")


def test_headers_beyond_the_limit_are_431():
    with Server("--header-limit", "8K") as s:
        r = s.get("/health", **{"X-Long": "x" * 9000})
        assert r.status == 431 and r.error()["code"] == "headers_too_large"
        with s.raw(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n") as sock:
            assert read_some(sock).startswith(b"HTTP/1.1 431")
        assert s.get("/health", **{"X-Long": "x" * 6000}).status == 200


def test_connections_beyond_the_limit_wait_for_a_place():
    with Server("--max-connections", "4") as s:
        held = [s.raw() for _ in range(4)]
        for sock in held:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_some(sock).startswith(b"HTTP/1.1 200")
        late = s.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        late.settimeout(0.3)
        try:
            assert not late.recv(1), "a fifth connection was served"
        except TimeoutError:
            pass
        held.pop().close()
        late.settimeout(10)
        assert read_some(late).startswith(b"HTTP/1.1 200")
        for sock in (*held, late):
            sock.close()


# ---- slow clients ----

def test_slow_heads_and_bodies_are_cut_and_hold_nobody_up():
    with Server("--idle-timeout", "1") as s:
        drips = [(b"GET /health HTTP/1.1\r\nHo", b"x"), (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{", b" ")]
        for head, drop in drips:
            with s.raw(head) as sock:
                start, ended = time.monotonic(), False
                while time.monotonic() - start < 6 * harness.PATIENCE and not ended:
                    try:
                        sock.sendall(drop)  # never silent for as long as the timeout
                        sock.settimeout(0.2)
                        ended = sock.recv(1) == b""
                    except TimeoutError:
                        assert s.get("/health").status == 200
                    except OSError:
                        ended = True
                assert ended, "a client that drips bytes keeps its connection for ever"
        with s.raw() as sock:
            assert sock.recv(1) == b"", "a silent connection is closed"


def test_a_giant_prompt_holds_nobody_up(s):
    body = {"content": "The sea urchin. " * 150_000}
    took, replies = [], []

    def ask():
        start = time.monotonic()
        replies.append(s.post("/tokenize", body).status)
        took.append(time.monotonic() - start)

    asking = threading.Thread(target=ask)
    asking.start()
    longest = 0
    while asking.is_alive():
        start = time.monotonic()
        assert s.get("/health").status == 200
        longest = max(longest, time.monotonic() - start)
    assert replies == [200] and longest < took[0] / 3, (replies, longest, took)


def test_a_giant_body_is_answered_like_any_other(s):
    padding = {"padding": "x" * 200_000}  # unknown fields are ignored
    for fields in ({"n": 2, "logprobs": 2}, {"echo": True}, {"max_tokens": 0}, {"model": "another"}, {"prompt": [1, "x"]}):
        body = {"prompt": "Once", "max_tokens": 5, "temperature": 0, **fields}
        small, large = s.post("/v1/completions", body), s.post("/v1/completions", {**body, **padding})
        assert large.status == small.status and large.headers["x-request-id"], (fields, large.status)
        for key in ("choices", "usage", "error"):
            assert large.json().get(key) == small.json().get(key), (fields, key)
    body = {"prompt": "Once", "max_tokens": 5, "temperature": 0}
    texts = ["".join(e["choices"][0]["text"] for e in s.stream("/v1/completions", b)) for b in (body, {**body, **padding})]
    assert texts[0] == texts[1], texts


def test_clients_that_leave_while_their_giant_prompt_is_read(s):
    data = post_bytes("/v1/completions", {"prompt": "The sea urchin. " * 200_000, "max_tokens": 5, "stream": True})
    for pause in (0, 0.01, 0.1):
        with s.raw(data):
            time.sleep(pause)
    s.until(lambda: s.metric("http_connections") == 1 and not s.metric("slots_used"), 60)
    assert s.complete("Once", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_signal_while_a_giant_prompt_is_read_ends_the_server():
    data = post_bytes("/v1/completions", {"prompt": "The sea urchin. " * 100_000, "max_tokens": 1})
    for how in (signal.SIGHUP, signal.SIGTERM):
        with Server("--drain-timeout", "1") as s, s.raw(data):
            time.sleep(0.05)
            s.process.send_signal(how)
            assert s.process.wait(60 * harness.PATIENCE) == 0


def test_a_request_in_many_pieces_is_put_together(s):
    data = post_bytes("/v1/completions", {"prompt": "Once", "max_tokens": 2}, "Connection: close")
    with s.raw() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(0, len(data), 7):
            sock.sendall(data[i:i + 7])
            time.sleep(0.001)
        assert read_all(sock).startswith(b"HTTP/1.1 200")


def stuck(s):
    """Waits until a reader's buffers are full all the way: its sequence stays paused."""
    since = time.monotonic()

    def long_enough():
        nonlocal since
        if s.metric("slots_paused") != 1:
            since = time.monotonic()
        return time.monotonic() - since > 0.3

    s.until(long_enough, 30)


def test_a_reader_that_stops_pauses_its_own_sequence_only():
    with Server("--output-limit", "16K", "--idle-timeout", "60") as s:
        with s.raw(endless(), rcvbuf=4096) as lazy:
            read_some(lazy)
            stuck(s)
            tokens, memory = s.metric("generation_tokens_total"), s.memory()
            for _ in range(3):
                assert s.complete(max_tokens=20)["choices"][0]["text"]
            assert s.metric("slots_paused") == 1
            time.sleep(0.2)
            assert s.metric("generation_tokens_total") <= tokens + 60, "the paused sequence went on"
            assert s.memory() - memory < 2 << 20
            got = read_some(lazy, 600_000)  # it reads again: everything is there, in order
            assert len(got) >= 600_000 and got.count(b"data: ") > 1000
        s.until(lambda: s.metric("num_requests_running") == 0)


def test_a_stalled_reader_is_closed_after_the_idle_timeout():
    with Server("--output-limit", "16K", "--idle-timeout", "2") as s:
        with s.raw(endless(), rcvbuf=4096) as lazy:
            read_some(lazy)
            s.until(lambda: s.metric("num_requests_running") == 1)
            s.until(lambda: s.metric("num_requests_running") == 0, 30)
            assert b"[DONE]" not in read_all(lazy)


# ---- clients that leave ----

def test_a_client_that_leaves_frees_its_slot_at_once(s):
    kinds = {"stream": endless(), "whole": endless(stream=False), "n": endless(n=3), "prompts": endless(prompt=["a", "b"]),
             "chat": endless("/v1/chat/completions", messages=[{"role": "user", "content": "x"}])}
    for kind, data in kinds.items():
        for reset in (False, True):
            before = s.metric("request_success_total")
            sock = s.raw(data)
            s.until(lambda: s.metric("num_requests_running") >= 1)
            if kind != "whole":
                read_some(sock, 1000)
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
            took = s.until(lambda: s.metric("num_requests_running") == 0 and s.metric("slots_used") == 0)
            assert took < 0.2 * harness.PATIENCE, f"{kind}: {took:.3f} s"
            assert s.metric("request_success_total") > before


def test_a_client_that_leaves_the_queue_is_forgotten():
    with Server("--max-seqs", "1") as s:
        first = s.raw(endless())
        read_some(first)
        waiting = [s.raw(endless()) for _ in range(3)]
        s.until(lambda: s.metric("num_requests_waiting") == 3)
        for sock in waiting:
            sock.close()
        s.until(lambda: s.metric("num_requests_waiting") == 0)
        first.close()
        s.until(lambda: s.metric("num_requests_running") == 0)


def test_clients_that_leave_in_the_middle_of_anything_leak_nothing(s):
    data = post_bytes("/v1/completions", {"prompt": "Once", "max_tokens": 30, "stream": True})
    for i in range(0, len(data), 9):
        s.raw(data[:i]).close()
    for i in range(30):
        sock = s.raw(data)
        time.sleep(0.001 * (i % 7))
        sock.close()
    s.until(lambda: s.metric("num_requests_running") == 0 and s.metric("slots_used") == 0)
    files = len(os.listdir(f"/proc/{s.process.pid}/fd"))
    s.until(lambda: len(os.listdir(f"/proc/{s.process.pid}/fd")) <= files and s.metric("http_connections") <= 2)


# ---- overload ----

def test_a_full_queue_is_429_with_retry_after():
    with Server("--max-seqs", "1", "--max-queue", "2") as s:
        held = []
        for _ in range(3):
            held.append(s.raw(endless()))
            time.sleep(0.05)
        s.until(lambda: s.metric("num_requests_running") == 1 and s.metric("num_requests_waiting") == 2)
        for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": ["x", "y"]}):
            r = s.post("/v1/completions", body)
            assert r.status == 429 and r.error()["type"] == "rate_limit_error", r.body
            assert 1 <= int(r.headers["retry-after"]) <= 120
        assert s.metric("requests_rejected_total") == 3
        assert s.get("/health").status == 200
        for sock in held:
            sock.close()
        s.until(lambda: s.metric("num_requests_running") == 0)
        assert s.complete()["choices"]


def test_ten_times_too_many_clients_all_get_an_answer():
    with Server("--max-seqs", "4", "--max-queue", "8") as s:
        statuses, lock = [], threading.Lock()

        def ask():
            r = s.post("/v1/completions", {"prompt": "Once", "max_tokens": 200, "ignore_eos": True})
            with lock:
                statuses.append(r.status)

        threads = [threading.Thread(target=ask) for _ in range(120)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(statuses) == 120 and set(statuses) <= {200, 429}, set(statuses)
        assert statuses.count(200) >= 12


# ---- a thousand streams ----

def needs_true_memory():
    if harness.SANITIZED:
        raise harness.Skip("a sanitizer keeps memory of its own")


def test_a_thousand_idle_streams_cost_less_than_20_kb_each():
    needs_true_memory()
    with Server("--max-seqs", "1", "--max-queue", "1100", "--max-connections", "1200") as s:
        first = s.raw(endless())
        read_some(first)
        time.sleep(0.2)
        n, held = 1000, []
        before = s.memory()
        for i in range(n):
            held.append(s.raw(endless()))
        s.until(lambda: s.metric("num_requests_waiting") == n, 20)
        each = (s.memory() - before) / n
        print(f"        {each / 1000:.1f} kB a waiting stream")
        assert each < 20_000, each
        assert len(os.listdir(f"/proc/{s.process.pid}/task")) < 8, "a thread a connection?"
        for sock in held:
            sock.close()
        s.until(lambda: s.metric("num_requests_waiting") == 0, 20)
        first.close()


def test_a_thousand_idle_keep_alive_connections_cost_less_than_20_kb_each():
    needs_true_memory()
    with Server("--max-connections", "1200") as s:
        s.complete()
        before, held = s.memory(), []
        for i in range(1000):
            held.append(s.raw(post_bytes("/v1/completions", {"prompt": "Once", "max_tokens": 1, "stream": True})))
            read_until(held[-1], b"\r\n0\r\n\r\n")
        s.until(lambda: s.metric("http_connections") >= 1000)
        each = (s.memory() - before) / 1000
        print(f"        {each / 1000:.1f} kB a connection")
        assert each < 20_000, each
        for sock in held:
            sock.close()


def cpu_seconds(s, what="stat"):
    with open(f"/proc/{s.process.pid}/{what}") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_between_tokens_the_http_thread_sleeps():
    """A token of a stream costs it some 50 us; always awake it would take much of a CPU."""
    if harness.SANITIZED:
        raise harness.Skip("loading takes minutes under a sanitizer")
    with Server("--max-seqs", "2", model=big_model()) as s:
        with s.raw(endless()) as one, s.raw(endless()) as other:
            read_some(one), read_some(other)
            thread = f"task/{s.process.pid}/stat"
            cpu, tokens = cpu_seconds(s, thread), s.metric("generation_tokens_total")
            time.sleep(1.5)
            used, tokens = cpu_seconds(s, thread) - cpu, s.metric("generation_tokens_total") - tokens
            assert used < 0.05 + 200e-6 * tokens, (used, tokens)


def test_an_idle_server_uses_no_cpu(s):
    with s.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as idle:
        read_some(idle)
        time.sleep(0.2)
        start = cpu_seconds(s)
        time.sleep(1.5)
        assert cpu_seconds(s) - start <= 0.03


# ---- start and end ----

def big_model():
    base = os.path.expanduser("~/.cache/urchin/SmolLM2-135M-Instruct.Q4_1.gguf")
    if not os.path.exists(base):
        raise harness.Skip("the default model's base is not here")
    return "models/smollm2-135m-hedgehog"


def test_a_signal_while_loading_ends_the_server_at_once():
    for number in (signal.SIGTERM, signal.SIGHUP):
        with Server("--max-seqs", "1", model=big_model(), wait=False) as s:
            s.port_from_log()
            s.process.send_signal(number)
            assert s.process.wait(1 * harness.PATIENCE) == 0


def test_requests_while_loading_are_503_and_health_says_so():
    if harness.SANITIZED:
        raise harness.Skip("loading takes minutes under a sanitizer")
    with Server("--max-seqs", "1", model=big_model(), wait=False) as s:
        s.port_from_log()
        r = s.get("/health")
        assert r.status == 503 and r.error()["code"] == "loading"
        r = s.post("/v1/completions", {"prompt": "x"})
        assert r.status == 503 and r.headers["retry-after"] == "1" and r.error()["type"] == "unavailable_error"
        assert s.get("/version").status == 200 and s.get("/").status == 200 and s.get("/metrics").status == 200
        s.wait_ready()
        assert s.get("/health").status == 200


def test_a_model_that_is_not_there_ends_the_server_with_a_sentence():
    s = Server(model="models/no-such-model", wait=False)
    assert s.process.wait(20) == 1
    assert "no-such-model" in s.errors() and len(s.errors().splitlines()) <= 3, s.errors()
    s.process.stdout.close()
    s.log.close()


def test_a_port_in_use_ends_the_server_with_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        s = Server("--port", str(taken.getsockname()[1]), wait=False)
        assert s.process.wait(20) == 1
        assert "in use" in s.errors()
        s.process.stdout.close()
        s.log.close()


def test_sigterm_finishes_what_runs_and_takes_nothing_new():
    with Server("--drain-timeout", "30") as s:
        sock = s.raw(endless(max_tokens=800))
        read_some(sock)
        idle = s.connect()
        idle.request("GET", "/health")
        idle.getresponse().read()
        s.process.send_signal(signal.SIGTERM)
        s.until(lambda: not can_connect(s.port))
        idle.request("POST", "/v1/completions", json.dumps({"prompt": "x"}))
        r = idle.getresponse()
        assert r.status == 503 and json.loads(r.read())["error"]["code"] == "shutting_down"
        idle.close()
        rest = read_all(sock)
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), rest[-200:]
        assert rest.count(b'"finish_reason":"length"') == 1
        assert s.process.wait(10) == 0


def test_the_drain_timeout_cuts_what_takes_longer():
    with Server("--drain-timeout", "0.5") as s:
        sock = s.raw(endless())
        whole = s.raw(endless(stream=False))
        read_some(sock)
        s.until(lambda: s.metric("num_requests_running") == 2)
        s.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        rest, answer = read_all(sock), read_all(whole)
        assert s.process.wait(10) == 0
        last = [e for e in rest.split(b"data: ") if e.startswith(b"{")][-1]
        assert json.loads(last.split(b"\n")[0])["error"]["code"] == "shutting_down", last
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), "a stream that is cut ends with an error and in good order"
        assert answer.startswith(b"HTTP/1.1 503") and b'"shutting_down"' in answer
        assert 0.3 < time.monotonic() - start < 3 * harness.PATIENCE


def test_sighup_and_a_second_sigterm_end_at_once():
    for signals in ([signal.SIGHUP], [signal.SIGTERM, signal.SIGTERM], [signal.SIGINT, signal.SIGINT]):
        with Server("--drain-timeout", "60") as s:
            socks = [s.raw(endless(stream=stream)) for stream in (True, False)]
            read_some(socks[0])
            for number in signals:
                s.process.send_signal(number)
                time.sleep(0.1)
            assert s.process.wait(5 * harness.PATIENCE) == 0
            for sock in socks:
                sock.close()


def test_it_ends_well_under_a_flood_of_new_requests():
    data = {True: endless(), False: endless(stream=False)}
    for number in (signal.SIGHUP, signal.SIGTERM) * 3:
        with Server("--drain-timeout", "0.1", "--max-seqs", "4") as s:
            ended = threading.Event()

            def flood():
                held = [s.raw() for _ in range(40)]  # accepted before the end, used at the end
                while not ended.is_set():
                    for i, sock in enumerate(held):
                        try:
                            sock.sendall(data[i % 2 == 0])
                        except OSError:
                            pass
                        time.sleep(0.001)
                for sock in held:
                    sock.close()

            threads = [threading.Thread(target=flood) for _ in range(3)]
            for t in threads:
                t.start()
            time.sleep(0.06)
            s.process.send_signal(number)
            try:
                assert s.process.wait(10 * harness.PATIENCE) == 0
            finally:
                ended.set()
                for t in threads:
                    t.join()


def test_an_idle_server_ends_at_once_on_sigterm(s):
    with Server() as other:
        other.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert other.process.wait(5) == 0
        assert time.monotonic() - start < 1 * harness.PATIENCE


def test_prompts_and_answers_are_not_logged_unless_asked(s):
    s.complete("Once upon a secret", max_tokens=5)
    assert "secret" not in s.errors()
    with Server("--log-prompts") as other:
        text = other.complete("Once upon a secret", max_tokens=5)["choices"][0]["text"]
        assert "secret" in other.errors() and other.errors().count(text) == 1
        other.stream("/v1/completions", {"prompt": "Once upon a secret", "max_tokens": 5, "temperature": 0})
        assert other.errors().count(text) == 2


def test_log_format_json_is_json_a_line():
    with Server("--log-format", "json") as s:
        s.get('/nothing"\\x')
        s.complete(max_tokens=1)
        s.until(lambda: "completion_tokens=1" in s.errors())
        for line in s.errors().splitlines():
            assert {"time", "level", "event", "detail"} == set(json.loads(line)), line


def can_connect(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    except OSError:
        return False
