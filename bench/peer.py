#!/usr/bin/env python3
"""peer.py - Urchin beside llama.cpp on this machine, in one run: same weights, same formats, same threads.

    python3 bench/peer.py --llama BIN [--rows decode,batch,prefill,server,start] [--depths 0,1024,4096] [--formats int8]

BIN is the folder with llama-bench, llama-batched-bench, llama-server and llama-quantize of a build of llama.cpp (any: it is the user's
own; the package llama-cpp-python carries its sources).  Peers read the default model's own base, requantised by llama-quantize to
the format that each row names; Urchin reads its conversion of it.  Both sides take turns, each figure is the median of its turns, and
llama.cpp's is the better of flash attention on and off (past depth 8,192, where it takes minutes to get to, the one that was better just before).  Prints
Markdown."""
import argparse
import asyncio
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import server_load

MODEL = "models/smollm2-135m-hedgehog"
BASE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def base_file():
    cache = os.environ.get("URCHIN_CACHE") or os.path.expanduser("~/.cache/urchin")
    path = pathlib.Path(cache, BASE)
    if not path.exists():
        sys.exit(f"{path} is not there: `make model` fetches it")
    return path


class Peers:
    def __init__(self, options, folder):
        self.o, self.folder = options, pathlib.Path(folder)
        self.files = {"Q4_1": base_file()}

    def file(self, kind):
        if kind not in self.files:
            path = self.folder / f"{kind}.gguf"
            subprocess.run([self.o.llama / "llama-quantize", "--allow-requantize", self.files["Q4_1"], path, kind],
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.files[kind] = path
        return self.files[kind]

    def ours(self, weights, *flags):
        out = subprocess.run([self.o.urchin, "bench", MODEL, "--device", "cpu", "--weights", weights, "--threads", str(self.o.threads),
                              "--repeat", "3", "--json", *map(str, flags)], check=True, capture_output=True, text=True)
        return json.loads(out.stdout)["points"]

    def llama_bench(self, kind, flash, *flags):
        out = subprocess.run([self.o.llama / "llama-bench", "-m", self.file(kind), "-t", str(self.o.threads), "-fa", str(flash),
                              "-r", "3", "-o", "json", *map(str, flags)], check=True, capture_output=True, text=True)
        return json.loads(out.stdout)[0]["avg_ts"]

    def turns(self, *sides):
        """Median of what each side's function gives, called in turn."""
        got = [[] for _ in sides]
        for _ in range(self.o.turns):
            for values, side in zip(got, sides):
                values.append(side())
        return [statistics.median(v) for v in got]


def row(*cells):
    print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)


def versus(name, ours, flash_on, flash_off, unit="tokens/s"):
    theirs = max(flash_on, flash_off)
    row(name, f"{ours:.1f}", f"{theirs:.1f}", "on" if flash_on >= flash_off else "off", f"{ours / theirs:.2f}x")


def heading(what):
    print(f"\n{what}\n")
    row("", "Urchin, tokens/s", "llama.cpp, tokens/s", "flash attention", "ratio")
    row(*["---"] * 5)


def decode(p):
    heading("Decode, one sequence")
    for weights, kind in [("int8", "Q8_0"), ("int4", "Q4_0"), ("int4", "Q4_1"), ("bf16", "BF16")]:
        settings = tuple(p.o.flash)
        for depth in p.o.depths if weights in p.o.formats else []:
            if weights != "int8" and depth > 4096:
                continue
            ours, *theirs = p.turns(
                lambda: p.ours(weights, "--n-prompt", 1, "--n-gen", 64, "--batch", 1, "--depth", depth)[-1]["tokens_per_s"],
                *(lambda flash=flash: p.llama_bench(kind, flash, "-p", 0, "-n", 64, "-d", depth) for flash in settings))
            theirs = dict(zip(settings, theirs))
            on, off = theirs.get(1, 0), theirs.get(0, 0)
            if depth >= 8192 and len(settings) > 1:
                settings = (1,) if on >= off else (0,)
            versus(f"{weights} ({kind}), depth {depth:,}", ours, on, off)


def prefill(p):
    heading("Prompt of 512 tokens")
    for weights, kind in [("int8", "Q8_0"), ("bf16", "BF16")]:
        for depth in (0, 4096) if weights in p.o.formats else ():
            ours, on, off = p.turns(
                lambda: p.ours(weights, "--n-prompt", 512, "--n-gen", 1, "--batch", 1, "--depth", depth)[0]["tokens_per_s"],
                *(lambda flash=flash: p.llama_bench(kind, flash, "-p", 512, "-n", 0, "-d", depth) for flash in (1, 0)))
            versus(f"{weights} ({kind}), depth {depth:,}", ours, on, off)


def batched(p, flash, depth, n=32):
    out = subprocess.run([p.o.llama / "llama-batched-bench", "-m", p.file("Q8_0"), "-t", str(p.o.threads), "-fa", "on" if flash else "off",
                          "-c", str(n * (depth + 40)), "-b", "512", "-npp", str(depth), "-ntg", "32", "-npl", str(n), "-pps",
                          "--output-format", "jsonl"], check=True, capture_output=True, text=True)
    return json.loads([line for line in out.stdout.splitlines() if line.startswith("{")][-1])["speed_tg"]


def batch(p):
    heading("32 sequences together, int8 (Q8_0)")
    for depth in (512, 4096):
        ours, on, off = p.turns(
            lambda: p.ours("int8", "--n-prompt", 1, "--n-gen", 32, "--batch", 32, "--depth", depth)[-1]["tokens_per_s"],
            *(lambda flash=flash: batched(p, flash, depth) for flash in (True, False)))
        versus(f"depth {depth:,}", ours, on, off)


def serve(command, port):
    log = tempfile.TemporaryFile()
    process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return process
        except OSError:
            if process.poll() is not None:
                log.seek(0)
                sys.exit(log.read().decode(errors="replace")[-2000:])
            time.sleep(0.1)
    sys.exit(f"{command[0]} does not answer")


def server(p):
    """32 streams at once, 512 tokens in, 128 out, over HTTP; the client runs on the same processors."""
    streams, port = 32, 8097
    text = server_load.TEXT.read_text()
    sides = {
        "Urchin": [p.o.urchin, "serve", MODEL, "--device", "cpu", "--weights", "int8", "--threads", p.o.threads, "--port", port,
                   "--max-seqs", streams, "--log-level", "warn"],
        "llama.cpp": [p.o.llama / "llama-server", "-m", p.file("Q8_0"), "-t", p.o.threads, "--port", port, "-np", streams,
                      "-c", streams * 704, "-fa", "on", "--no-webui", "--log-disable"]}
    print("\n32 streams over HTTP, 512 tokens in and 128 out, int8 (Q8_0)\n")
    row("", "tokens/s", "TTFT median, ms", "between tokens median, ms", "p99, ms", "p99 / median")
    row(*["---"] * 6)
    results = {}
    for name, command in sides.items():
        process = serve(command, port)
        url = f"http://127.0.0.1:{port}"
        try:
            with urllib.request.urlopen(url + "/v1/models") as answer:
                model = json.load(answer)["data"][0]["id"]
            ids = server_load.post_json(url + "/tokenize", {"content": text})["tokens"]
            answers, wall, _ = asyncio.run(server_load.replay([(0, 512, 128)] * streams, url, model, ids, 1))
        finally:
            process.terminate()
            process.wait()
        bad = [a for a in answers if a["status"] != 200 or "error" in a]
        if bad:
            sys.exit(f"{name}: {len(bad)} of {streams} failed: {bad[0]}")
        gaps = [b - a for x in answers for a, b in zip(x["times"], x["times"][1:])]
        first = statistics.median(x["times"][0] - x["sent"] for x in answers)
        results[name] = sum(x["tokens"] for x in answers) / wall, first
        median, p99 = statistics.median(gaps), server_load.percentile(gaps, 0.99)
        row(name, f"{results[name][0]:.0f}", f"{first * 1e3:.0f}", f"{median * 1e3:.1f}", f"{p99 * 1e3:.1f}", f"{p99 / median:.1f}")
    ours, theirs = results["Urchin"], results["llama.cpp"]
    row("ratio", f"{ours[0] / theirs[0]:.2f}x", f"{ours[1] / theirs[1]:.2f}x", "", "", "")


def start(p):
    """From the command to its first token, file cache warm; resident memory beside weights and slots."""
    command = [p.o.urchin, "run", MODEL, "--device", "cpu", "--threads", str(p.o.threads), "--max-tokens", "1", "Hello"]
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    print(f"\nStart to the first token: {statistics.median(times[1:]):.2f} s")
    process = serve([p.o.urchin, "serve", MODEL, "--device", "cpu", "--threads", p.o.threads, "--port", 8097, "--max-seqs", 8,
                     "--log-level", "warn"], 8097)
    try:
        server_load.post_json("http://127.0.0.1:8097/v1/completions", {"prompt": ["Once upon a time"] * 8, "max_tokens": 100,
                                                                      "ignore_eos": True})
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    finally:
        process.terminate()
        process.wait()
    resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
    of_files = int(re.search(r"RssFile:\s+(\d+)", status)[1]) / 1024
    out = json.loads(subprocess.run([p.o.urchin, "bench", MODEL, "--device", "cpu", "--n-prompt", "1", "--n-gen", "1", "--batch", "1", "--depth",
                                     "0", "--repeat", "1", "--json"], check=True, capture_output=True, text=True).stdout)
    known = (out["weight_bytes"] + 8 * out["slot_bytes"]) / 2**20
    print(f"Resident with 8 slots in use: {resident:.0f} MiB ({of_files:.0f} of mapped files); weights and slots {known:.0f} MiB")


def machine(o):
    cpu = re.search(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    sets = [name for name, flag in [("AVX2", "avx2"), ("AVX-512", "avx512bw"), ("VNNI", "avx512_vnni"), ("BF16", "avx512_bf16"),
                                    ("AMX", "amx_int8")] if re.search(rf"\b{flag}\b", flags)]
    version = subprocess.run([o.llama / "llama-server", "--version"], capture_output=True, text=True)
    print(f"{cpu[1] if cpu else 'unknown processor'}, {o.threads} threads, {', '.join(sets)}; llama.cpp "
          + ((re.search(r"version: (.*)", version.stdout + version.stderr) or [0, "of unknown version"])[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(" - ")[0])
    parser.add_argument("--llama", required=True, type=pathlib.Path, help="folder of llama.cpp's programs")
    parser.add_argument("--urchin", default="build/urchin")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", default="decode,batch,prefill,server,start")
    parser.add_argument("--depths", default="0,1024,4096,8192,16384,32768")
    parser.add_argument("--formats", default="int8,int4,bf16", help="of decode and prefill")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--flash", default="1,0", help="llama.cpp's settings of flash attention that decode tries")
    options = parser.parse_args()
    options.formats = options.formats.split(",")
    options.flash = [int(f) for f in options.flash.split(",")]
    options.depths = [int(d) for d in options.depths.split(",")]
    options.llama = options.llama.resolve()
    os.chdir(HERE.parent)
    machine(options)
    with tempfile.TemporaryDirectory() as folder:
        peers = Peers(options, folder)
        for name in options.rows.split(","):
            {"decode": decode, "batch": batch, "prefill": prefill, "server": server, "start": start}[name](peers)


if __name__ == "__main__":
    main()
