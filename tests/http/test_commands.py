"""`urchin run` and `urchin info`: the same model without a server."""
import json
import os
import pty
import re
import select
import signal
import subprocess
import time

import harness
from harness import MODEL, NAME, Server
from test_limits import big_model


def command(*args, stdin=None):
    return subprocess.run([harness.BINARY, *args], input=stdin, capture_output=True, text=True,
                          env=harness.environment(), timeout=60 * harness.PATIENCE)


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, *args):
        try:
            self.pid, self.fd = pty.fork()
        except OSError as error:  # a bare chroot has no /dev/pts
            raise harness.Skip(f"no terminal to be had: {error}")
        if self.pid == 0:
            os.execv(harness.BINARY, [harness.BINARY, "run", *args])
        self.text = ""

    def read_until(self, end, seconds=60):
        stop = time.monotonic() + seconds * harness.PATIENCE
        while end not in self.text:
            assert time.monotonic() < stop, f"no {end!r} in {self.text[-500:]!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.fd, 65536).decode(errors="replace").replace("\r\n", "\n")
                except OSError:  # the other end is closed
                    assert end in self.text, f"it ended: {self.text[-500:]!r}"
        before, _, self.text = self.text.partition(end)
        return before

    def say(self, line):
        """One turn: what is answered."""
        os.write(self.fd, line.encode() + b"\n")
        self.read_until(line + "\n")
        return self.read_until("\n\n> ")

    def end(self):
        os.write(self.fd, b"\x04")
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return status


def test_run_prints_what_the_server_would_answer(s):
    expected = s.complete(max_tokens=40)["choices"][0]["text"]
    r = command("run", MODEL, "Once upon a time", "--max-tokens", "40", "--temperature", "0")
    assert r.returncode == 0 and r.stderr == "" and r.stdout == expected + "\n", r
    r = command("run", MODEL, "--max-tokens", "40", "--temperature", "0", stdin="Once upon a time\n")
    assert r.stdout == expected + "\n", r


def test_run_with_a_seed_repeats_itself():
    asked = ("run", MODEL, "Once", "--max-tokens", "30", "--temperature", "1", "--seed")
    first = command(*asked, "5").stdout
    assert first == command(*asked, "5").stdout and first != command(*asked, "6").stdout


def test_run_prompts_longer_than_a_chunk_give_the_same_answer():
    prompt = "Lily saw a dog. " * 60
    one, other = (command("run", MODEL, prompt, "--max-tokens", "20", "--temperature", "0", "--prefill-chunk", n).stdout
                  for n in ("7", "1000"))
    assert one == other and one.strip()


def test_run_says_what_is_wrong_in_a_sentence():
    for args in (("run", "models/none", "x"), ("run", MODEL, "x", "--temperature", "hot"), ("run", MODEL, "x", "--nonsense", "1"),
                 ("run", MODEL, "a b c d e f g h", "--max-seq-len", "4"), ("run", MODEL, "x", "--prefill-chunk", "65536"), ("info", "README-that-is-not-there"), ("dance",)):
        r = command(*args)
        assert r.returncode == 1 and r.stdout.strip() == "" and r.stderr.startswith("urchin: "), (args, r)
        assert len(r.stderr.strip().splitlines()) == 1 and "max_rows" not in r.stderr, r.stderr


def test_info_for_people_and_for_programs_agrees_with_the_server(s):
    text = command("info", MODEL).stdout
    for word in (NAME, "hedgehog", "capacity", "sequences", "whatever its length", "fp32"):
        assert word in text, (word, text)
    meta = json.loads(command("info", MODEL, "--json").stdout)
    assert meta.pop("name") == NAME
    theirs = s.get("/v1/models").json()["data"][0]["meta"]
    meta.pop("slots"), theirs.pop("slots")  # by memory, which changes
    assert meta == theirs


def test_version_and_help_need_no_model():
    assert re.fullmatch(r"urchin \d+\.\d+\.\d+\n", command("--version").stdout)
    assert "serve" in command("--help").stdout and "--port" in command("serve", "--help").stdout


def test_chat_on_a_terminal_goes_on_from_the_state_as_if_it_had_read_everything():
    """Turn two reads only what is new; a server that reads the whole conversation must answer the same, to the token."""
    model = big_model()
    if harness.SANITIZED:
        raise harness.Skip("loading takes minutes under a sanitizer")
    t = Terminal(model, "--temperature", "0", "--max-tokens", "12", "--weights", "bf16")
    t.read_until("\n> ")
    questions = ["My name is Ada. Hello!", "What is my name?", "And again?"]
    answers = [t.say(q) for q in questions]
    assert t.end() == 0
    with Server("--max-seqs", "1", "--weights", "bf16", model=model) as s:
        messages = []
        for q, a in zip(questions, answers):
            messages.append({"role": "user", "content": q})
            r = s.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 12}).json()
            assert r["choices"][0]["message"]["content"] == a, (messages, r, a)
            messages.append({"role": "assistant", "content": a})


def test_ctrl_c_while_a_long_question_is_read_loses_nothing_of_it():
    """The rest is read with the next turn, so the conversation goes on as if nobody had been impatient."""
    model = big_model()
    if harness.SANITIZED:
        raise harness.Skip("loading takes minutes under a sanitizer")
    long = "The sea is deep and wide. " * 150  # one terminal line holds 4,095 characters
    t = Terminal(model, "--temperature", "0", "--max-tokens", "8", "--weights", "bf16", "--prefill-chunk", "8")
    t.read_until("\n> ")
    os.write(t.fd, long.encode() + b"\n")
    t.read_until(long + "\n")
    time.sleep(0.2)
    os.kill(t.pid, signal.SIGINT)
    first = t.read_until("\n\n> ")
    second = t.say("What is deep?")
    assert t.end() == 0
    with Server("--max-seqs", "1", "--weights", "bf16", model=model) as s:
        r = s.post("/v1/chat/completions", {"temperature": 0, "max_tokens": 8, "messages": [
            {"role": "user", "content": long}, {"role": "assistant", "content": first},
            {"role": "user", "content": "What is deep?"}]}).json()
        assert r["choices"][0]["message"]["content"] == second, (first, r, second)


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves():
    t = Terminal(MODEL, "--max-tokens", "-1", "--temperature", "1.3")
    t.read_until("\n> ")
    for _ in range(2):
        os.write(t.fd, b"Once upon a time\n")
        t.read_until("Once upon a time\n")
        time.sleep(0.2)
        os.kill(t.pid, signal.SIGINT)
        t.read_until("\n> ", 10)
    os.kill(t.pid, signal.SIGINT)  # at the prompt: a new prompt
    t.read_until("\n> ", 10)
    assert t.end() == 0
