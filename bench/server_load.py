#!/usr/bin/env python3
"""Open-loop load: requests arrive when the trace says so, whether or not earlier ones have been answered.

  bench/server_load.py [--trace bench/data/azure_conv_2023.csv] [--rate 1] [--lengths 0.25] [--seconds 60] ...

Arrival times and lengths come from a trace (bench/data/README.md), the rate of arrivals and the lengths scaled to what the machine
can do.  Prompts are token ids of a real text; every answer is as long as the trace says (ignore_eos).  Without --url a server is
started for the run (bench/with-server).  Measures are defined as in vLLM's benchmark:

  TTFT  request sent -> first event with choices       ITL   between two events of a request
  TPOT  (E2E - TTFT) / (tokens - 1)                    E2E   request sent -> last event with choices
  goodput: requests/s that met every limit given by --goodput
"""
import argparse
import asyncio
import csv
import datetime
import json
import math
import os
import pathlib
import random
import statistics
import sys
import time
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = ROOT / "tests/data/text/doyle-lost-world-head.txt"


def read_trace(path, rate, lengths, seconds, cap):
    """[(arrival in s, prompt tokens, output tokens)], arrivals below `seconds`."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    at = [datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    scaled = lambda n: min(cap, max(1, round(int(n) * lengths)))
    plan = [((t - at[0]).total_seconds() / rate, scaled(row["ContextTokens"]), scaled(row["GeneratedTokens"]))
            for t, row in zip(at, rows)]
    if plan[-1][0] < seconds:
        sys.exit(f"{path} lasts {plan[-1][0]:.0f} s at --rate {rate:g}: too short for --seconds {seconds:g}")
    return [request for request in plan if request[0] < seconds]


def post_json(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


async def events(reader):
    """The data of every server-sent event of a chunked answer, with the time its last byte arrived."""
    pending = b""
    while size := int(await reader.readline(), 16):
        pending += await reader.readexactly(size)
        await reader.readexactly(2)
        now = time.perf_counter()
        *whole, pending = pending.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: "):
                yield now, event[len(b"data: "):]


async def ask(host, port, body):
    """One streamed completion -> {"status", "sent", "times", "tokens"} or {"status", "error"}."""
    payload = json.dumps(body).encode()
    sent = time.perf_counter()
    writer = None
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
                     b"Connection: close\r\n\r\n" % (host.encode(), len(payload)) + payload)
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if status != 200:
            return {"status": status, "error": (await reader.read()).decode(errors="replace")[:200]}
        times, tokens, ended = [], 0, False
        async for now, data in events(reader):
            if data == b"[DONE]":
                ended = True
                continue
            event = json.loads(data)
            if "error" in event:
                return {"status": status, "error": str(event["error"])}
            if event["choices"]:
                times.append(now)
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
        if not ended or not times:
            return {"status": status, "error": "the stream broke off"}
        return {"status": status, "sent": sent, "times": times, "tokens": tokens}
    except (OSError, asyncio.IncompleteReadError, ValueError, IndexError) as e:
        return {"status": 0, "error": f"{type(e).__name__}: {e}"}
    finally:
        if writer:
            writer.close()


async def replay(plan, url, model, ids, seed):
    """All answers in order of arrival, the wall time, and how late the client itself was."""
    address = urllib.parse.urlsplit(url)
    place = random.Random(seed)
    start = time.perf_counter()
    lateness, tasks = [], []
    for arrival, n_prompt, n_output in plan:
        await asyncio.sleep(max(0, start + arrival - time.perf_counter()))
        lateness.append(time.perf_counter() - start - arrival)
        first = place.randrange(len(ids))
        prompt = [ids[(first + i) % len(ids)] for i in range(n_prompt)]
        tasks.append(asyncio.create_task(ask(address.hostname, address.port, {
            "model": model, "prompt": prompt, "max_tokens": n_output, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}})))
    answers = await asyncio.gather(*tasks)
    return answers, time.perf_counter() - start, max(lateness)


def percentile(values, p):
    return sorted(values)[min(len(values) - 1, math.ceil(p * len(values)) - 1)]


def report(plan, answers, wall_s, late_s, limits):
    good = [a for a in answers if "times" in a]
    refused = sum(a["status"] == 429 for a in answers)
    result = {"requests": len(plan), "answered": len(good), "refused_429": refused,
              "errors": len(plan) - len(good) - refused, "wall_s": wall_s, "client_late_max_s": late_s,
              "offered_requests_s": len(plan) / (plan[-1][0] or 1),
              "prompt_tokens_s": sum(p for (_, p, _), a in zip(plan, answers) if "times" in a) / wall_s,
              "output_tokens_s": sum(a["tokens"] for a in good) / wall_s}
    for a in good:
        a["ttft"], a["e2e"] = a["times"][0] - a["sent"], a["times"][-1] - a["sent"]
        a["tpot"] = (a["e2e"] - a["ttft"]) / (a["tokens"] - 1) if a["tokens"] > 1 else 0
    samples = {"ttft": [a["ttft"] for a in good], "tpot": [a["tpot"] for a in good if a["tokens"] > 1],
               "itl": [b - c for a in good for b, c in zip(a["times"][1:], a["times"])], "e2e": [a["e2e"] for a in good]}
    for name, values in samples.items():
        if values:
            result[name + "_ms"] = {"mean": 1e3 * statistics.mean(values),
                                    **{f"p{p}": 1e3 * percentile(values, p / 100) for p in (50, 90, 99)}}
    met = [a for a in good if all(1e3 * a[name] <= limit for name, limit in limits.items())]
    result["goodput_requests_s"] = len(met) / wall_s
    return result


def print_report(r, limits):
    print(f"requests   {r['requests']} at {r['offered_requests_s']:.2f}/s: {r['answered']} answered, {r['refused_429']} refused (429), "
          f"{r['errors']} errors, in {r['wall_s']:.1f} s; the client was at most {1e3 * r['client_late_max_s']:.0f} ms late")
    print(f"tokens/s   {r['output_tokens_s']:.1f} generated, {r['prompt_tokens_s']:.1f} of prompts")
    print("ms         " + "".join(f"{h:>10}" for h in ("mean", "p50", "p90", "p99")))
    for name in ("ttft", "tpot", "itl", "e2e"):
        if values := r.get(name + "_ms"):
            print(f"{name.upper():10} " + "".join(f"{v:10.1f}" for v in values.values()))
    print(f"goodput    {r['goodput_requests_s']:.3f} requests/s within " +
          (", ".join(f"{n} {v:g} ms" for n, v in limits.items()) or "no limits"))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--url", help="a server that runs; none: one is started")
    p.add_argument("--trace", default=ROOT / "bench/data/azure_conv_2023.csv")
    p.add_argument("--rate", type=float, default=1, help="arrivals so many times as fast as in the trace (1)")
    p.add_argument("--lengths", type=float, default=0.25, help="prompts and answers so many times as long (0.25)")
    p.add_argument("--longest", type=int, default=4096, help="tokens of a prompt or an answer at most (4096)")
    p.add_argument("--seconds", type=float, default=60, help="of arrivals (60)")
    p.add_argument("--seed", type=int, default=1, help="which piece of the text is which prompt")
    p.add_argument("--goodput", nargs="*", default=["ttft:1000", "tpot:100"], metavar="NAME:MS", help="limits (ttft:1000 tpot:100)")
    p.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = p.parse_args()
    url = args.url or os.environ.get("URL")
    if not url:
        os.execv(ROOT / "bench/with-server", ["with-server", __file__, *sys.argv[1:]])
    limits = {name: float(ms) for name, ms in (g.split(":") for g in args.goodput)}
    plan = read_trace(args.trace, args.rate, args.lengths, args.seconds, args.longest)
    with urllib.request.urlopen(url + "/v1/models", timeout=10) as answer:
        model = json.load(answer)["data"][0]["id"]
    ids = post_json(url + "/tokenize", {"content": TEXT.read_text(), "add_special": False})["tokens"]
    answers, wall_s, late_s = asyncio.run(replay(plan, url, model, ids, args.seed))
    result = report(plan, answers, wall_s, late_s, limits)
    if args.json:
        print(json.dumps({"model": model, "trace": str(args.trace), "rate": args.rate, "lengths": args.lengths, **result}))
    else:
        print_report(result, limits)
        for error in sorted({a["error"] for a in answers if "error" in a and a["status"] != 429})[:5]:
            print("error      " + error)
    sys.exit(result["errors"] > 0)


if __name__ == "__main__":
    main()
