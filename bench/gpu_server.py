#!/usr/bin/env python3
"""gpu_server.py - 64 streams over HTTP against `transformers` generating the same batch on the same GPU.

    URL=... python3 bench/gpu_server.py [--streams 64] [--prompt 512] [--new 128]        (none: bench/with-server starts one)

Ours: real requests, each streamed on a connection of its own, answers of fixed length.  Theirs: one call of generate() on the whole
batch, greedy, bf16, SDPA, with its dynamic cache and with a static compiled one, after a warm-up; random weights of the default
model's shape.  Prints tokens a second of all streams together."""
import argparse
import asyncio
import json
import os
import pathlib
import sys
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import server_load
from random_model import SHAPES


def ours(url, options):
    with urllib.request.urlopen(url + "/v1/models", timeout=10) as answer:
        model = json.load(answer)["data"][0]["id"]
    ids = server_load.post_json(url + "/tokenize", {"content": server_load.TEXT.read_text(), "add_special": False})["tokens"]
    best = None
    for _ in range(3):
        plan = [(0, options.prompt, options.new)] * options.streams
        answers, wall_s, late_s = asyncio.run(server_load.replay(plan, url, model, ids, 1))
        result = server_load.report(plan, answers, wall_s, late_s, {})
        if result["errors"] or result["refused_429"]:
            sys.exit(f"{result['errors']} requests failed, {result['refused_429']} were refused: "
                     f"start the server with --max-seqs {options.streams}")
        if not best or result["output_tokens_s"] > best["output_tokens_s"]:
            best = result
    return best


def theirs(options):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    hidden, layers, heads, kv, _, ffn, vocab = SHAPES["smollm2-135m"]
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
                         intermediate_size=ffn, vocab_size=vocab, max_position_embeddings=8192, tie_word_embeddings=True,
                         attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(10, vocab, (options.streams, options.prompt), device="cuda")
    speeds = {}
    for name, more in (("dynamic cache", {}), ("static cache, compiled", {"cache_implementation": "static"})):
        try:
            for _ in range(2):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                with torch.no_grad():
                    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new,
                                   min_new_tokens=options.new, do_sample=False, pad_token_id=0, **more)
                torch.cuda.synchronize()
                speeds[name] = options.streams * options.new / (time.perf_counter() - begin)
        except Exception as error:  # a compiler that is not there
            print(f"{name}: {str(error).splitlines()[0]}")
    return speeds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(" - ")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--no-transformers", action="store_true")
    options = parser.parse_args()
    if not os.environ.get("URL"):
        os.environ.setdefault("SERVE_ARGS", f"--max-seqs {options.streams} --max-queue {options.streams}")
        os.execv(HERE / "with-server", ["with-server", __file__, *sys.argv[1:]])
    result = ours(os.environ["URL"], options)
    print(f"urchin       {result['output_tokens_s']:10.0f} tokens/s; first token after {result['ttft_ms']['p50']:.0f} ms (median), "
          f"then one every {result['itl_ms']['p50']:.2f} ms (median), {result['itl_ms']['p99']:.2f} (p99)")
    for name, speed in ({} if options.no_transformers else theirs(options)).items():
        print(f"transformers {speed:10.0f} tokens/s, {name}: ours is {result['output_tokens_s'] / speed:.1f} times as fast")


if __name__ == "__main__":
    main()
