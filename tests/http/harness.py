"""Starts the real program and talks to it over sockets; standard library only."""
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import tempfile
import time

MODEL = "models/stories260k-hedgehog"
NAME = "stories260k-hedgehog"
BINARY = None      # set by use()
SANITIZED = False  # built with a sanitizer: slower, and memory means nothing


PATIENCE = 1.0     # what waits are multiplied by


def use(binary):
    global BINARY, SANITIZED, PATIENCE
    BINARY = os.path.abspath(binary)
    with open(BINARY, "rb") as f:
        program = f.read()
    SANITIZED = b"__asan_init" in program or b"__tsan_init" in program
    PATIENCE = 5.0 if SANITIZED else 1.0


class Skip(Exception):
    """Raised by a test that cannot run here, with the reason."""


def no_key_twice(pairs):
    assert len(dict(pairs)) == len(pairs), f"a key is there twice: {pairs}"
    return dict(pairs)


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body, object_pairs_hook=no_key_twice)

    def error(self):
        e = self.json()["error"]
        assert set(e) == {"message", "type", "param", "code"}, e
        assert isinstance(e["message"], str) and isinstance(e["type"], str), e
        assert e["param"] is None or isinstance(e["param"], str), e
        assert e["code"] is None or isinstance(e["code"], str), e
        return e


def environment():
    """What programs under test see: no setting of the user's, but the device that these tests are run on."""
    kept = ("URCHIN_DEVICE", "URCHIN_EMULATED_BYTES", "URCHIN_CACHE")
    return {k: v for k, v in os.environ.items() if not k.startswith("URCHIN_") or k in kept}


class Server:
    """A running `urchin serve`; use it in a with statement."""

    def __init__(self, *args, model=MODEL, wait=True):
        env = environment()
        env.setdefault("URCHIN_CACHE", os.path.expanduser("~/.cache/urchin"))
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [BINARY, "serve", model, "--port", "0", "--threads", "1", *args],
            stdout=subprocess.PIPE, stderr=self.log, env=env, bufsize=0)
        self.lines = []
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.process.kill()
                self.process.wait()
                raise

    def wait_ready(self, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not select.select([self.process.stdout], [], [], 0.1)[0]:
                continue
            line = self.process.stdout.readline().decode()
            if not line:
                raise AssertionError(f"the server ended: {self.errors()}")
            self.lines.append(line)
            if line.startswith("try"):
                self.port = int(re.search(r"127\.0\.0\.1:(\d+)", line)[1])
                return self
        raise AssertionError(f"the server was not ready after {seconds} s: {self.errors()}")

    def port_from_log(self):
        """The port while the model may still be loading."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            m = re.search(r"address=127\.0\.0\.1:(\d+)", self.errors())
            if m:
                self.port = int(m[1])
                return self.port
            time.sleep(0.005)
        raise AssertionError("the server did not listen")

    def errors(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGHUP)
            try:
                self.process.wait(10 * PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError("the server did not end")
        self.process.stdout.close()
        status, errors = self.process.returncode, self.errors()
        self.log.close()
        assert status == 0, f"exit status {status}: {errors[-3000:]}"
        assert "runtime error" not in errors and "Sanitizer" not in errors, errors[-5000:]

    # ---- requests ----

    def connect(self, timeout=20):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout * PATIENCE)

    def raw(self, data=b"", rcvbuf=None, timeout=10):
        s = socket.socket()
        if rcvbuf:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        s.settimeout(timeout * PATIENCE)
        s.connect(("127.0.0.1", self.port))
        if data:
            s.sendall(data)
        return s

    def request(self, method, path, body=None, headers=None):
        c = self.connect()
        try:
            if isinstance(body, (dict, list)):
                body = json.dumps(body)
            c.request(method, path, body, headers or {})
            r = c.getresponse()
            return Reply(r.status, {k.lower(): v for k, v in r.getheaders()}, r.read())
        finally:
            c.close()

    def get(self, path, **headers):
        return self.request("GET", path, headers=headers)

    def post(self, path, body, headers=None):
        return self.request("POST", path, body, headers)

    def complete(self, prompt="Once upon a time", **fields):
        r = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8, **fields})
        assert r.status == 200, r.body
        return r.json()

    def chat(self, text="Once upon a time", **fields):
        r = self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}],
                                               "temperature": 0, "max_tokens": 8, **fields})
        assert r.status == 200, r.body
        return r.json()

    def stream(self, path, body, headers=None):
        """All events of a stream; checks the framing on the way."""
        r = self.post(path, {**body, "stream": True}, headers)
        assert r.status == 200, r.body
        assert r.headers["content-type"].startswith("text/event-stream"), r.headers
        return events(r.body)

    def metric(self, name):
        text = self.get("/metrics").body.decode()
        found = re.findall(rf"^urchin_{name}(?:\{{.*\}})? (\S+)$", text, re.M)
        assert found, f"no metric {name}"
        return sum(float(v) for v in found)

    def settled(self, name):
        """A metric once it has stood still: an answer can arrive before the step that ended it is counted."""
        value = None
        while value != (now := self.metric(name)):
            value = now
            time.sleep(0.1 * PATIENCE)
        return value

    def until(self, what, seconds=5):
        """Waits until what() is true; returns how long that took."""
        start = time.monotonic()
        while not what():
            if time.monotonic() - start > seconds * PATIENCE:
                raise AssertionError(f"not true after {seconds * PATIENCE} s")
            time.sleep(0.005)
        return time.monotonic() - start

    def memory(self):
        with open(f"/proc/{self.process.pid}/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def events(body):
    text = body.decode()  # strict: a broken character raises
    assert text.endswith("data: [DONE]\n\n"), text[-200:]
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    out = []
    for block in blocks:
        assert block.startswith("data: ") and "\n" not in block, block
        out.append(block[6:])
    assert out.pop() == "[DONE]"
    return [json.loads(e, object_pairs_hook=no_key_twice) for e in out]


def endless(path="/v1/completions", **fields):
    """A request that goes on until its client leaves, as raw bytes."""
    body = {"prompt": "Once upon a time", "max_tokens": 10_000_000, "ignore_eos": True, "stream": True, **fields}
    return post_bytes(path, body)


def post_bytes(path, body, *headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


def read_some(sock, at_least=1):
    data = b""
    while len(data) < at_least:
        piece = sock.recv(65536)
        if not piece:
            break
        data += piece
    return data


def read_until(sock, end):
    data = b""
    while not data.endswith(end):
        piece = sock.recv(65536)
        assert piece, f"the connection ended before {end!r}: {data[-200:]!r}"
        data += piece
    return data


def read_all(sock):
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data
