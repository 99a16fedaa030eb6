#!/usr/bin/env python3
"""research.py - what each choice of a conversion is worth: stories260K converted once for each, both stages, and read beside its base.

    python3 bench/research.py [--rows features,exact,recent,horizon,rate,updates,training,pure,past] [--threads 1] [--seeds 0,1]

Text of training and of measuring are two files of this repository.  Every conversion is `urchin convert` with the flags of
bench/convert_stories.sh and those in the first column; the figures are means over --seeds.  `bytes` is what one saved sequence takes.
Prints Markdown.  About 50 processor seconds a conversion."""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE, DATA = "tests/data/models/stories260k", "tests/data/text/"
USUAL = ["--window-size", "32", "--cache-size", "16", "--cache-recent", "4", "--finetune-steps", "400", "--finetune-lr", "0.004",
         "--finetune-lr-maps", "0.01"]
PURE = ["--recipe", "paper", "--finetune-lr", "0.002"]

ROWS = {
    "features": ("Projections of a map (features are twice as many; head_dim is 8)",
                 [["--features", n] for n in (4, 8, 16, 32)] + [["--key-map", "query_head"]]),
    "exact": ("Window against cache, 80 exact keys in all",
              [["--window-size", w, "--cache-size", 80 - 2 * w, "--cache-recent", (80 - 2 * w) // 4] for w in (8, 16, 24, 32, 40)]),
    "recent": ("Places of a cache of 16 that prefer recent keys", [["--cache-recent", n] for n in (0, 4, 8, 16)]),
    "horizon": ("Horizon (sequences of 512 tokens)", [["--horizon", n] for n in (32, 64, 128, 256)]),
    "rate": ("Rate of maps in fine-tuning", [["--finetune-lr-maps", x] for x in (0.0001, 0.001, 0.03)]),
    "updates": ("Rows for one change of the maps (80 a sequence), attention transfer alone", [["--finetune", "none", "--update-rows", n] for n in (0, 40, 20, 16, 8)]),
    "training": ("What is trained", [["--steps", 0], ["--finetune", "none"], ["--recall", 0.15], ["--finetune-loss", "next-token"],
                                     ["--steps", 0, "--finetune-steps", 800]]),
    "pure": ("The paper's recipe: no window, no sinks, no cache; by steps of fine-tuning (4,096 tokens each)",
             [["--finetune-steps", n] for n in (0, 50, 100, 200, 400)]),
}


BIN = 2048
PAST = ("One stream by position, perplexity against the base in windows of 512; training had sequences of 512",
        [["--map-position", p, "--horizon", h] for p in ("none", "rope") for h in (64, 0)])


def convert(o, model, seed, flags):
    subprocess.run([o.urchin, "convert", BASE, "--text", DATA + "tinystories-train-head.txt", "--out", model, "--seed", str(seed), *map(str, flags),
                    "--threads", str(o.threads)], check=True, stdout=subprocess.DEVNULL)


def evaluate(o, model, *flags):
    out = subprocess.run([o.urchin, "eval", model, "--against", BASE, "--text", DATA + "tinystories-valid-head.txt", "--context", "512",
                          "--weights", "fp32", "--against-weights", "fp32", "--json", "--threads", str(o.threads), *flags],
                         check=True, capture_output=True, text=True).stdout
    return json.loads(out)["readers"]


def past(o):
    for flags in PAST[1]:
        with tempfile.TemporaryDirectory() as folder:
            model = str(pathlib.Path(folder, "model"))
            convert(o, model, o.seeds[0], [*USUAL, *flags])
            base, own = [[b["perplexity"] for b in r["stream"][0]["bins"]]
                         for r in evaluate(o, model, "--tests", "stream", "--bin", str(BIN), "--tokens", str(6 * BIN), "--ablate", "none")]
        if flags == PAST[1][0]:
            print(f"| tokens from | {' | '.join(str(i * BIN) for i in range(len(base)))} |\n|---|{'---|' * len(base)}")
            print(f"| base | {' | '.join(f'{x:.3f}' for x in base)} |")
        print(f"| {' '.join(map(str, flags))} | {' | '.join(f'{x:.3f} ({100 * (x / b - 1):+.1f} %)' for x, b in zip(own, base))} |", flush=True)


def measure(o, usual, flags):
    """Perplexities of base and model and mean KL over held-out text, bytes of a sequence, tokens learned from."""
    got = []
    for seed in o.seeds:
        with tempfile.TemporaryDirectory() as folder:
            model = str(pathlib.Path(folder, "model"))
            convert(o, model, seed, [*usual, *flags])
            readers = [r["perplexity"] for r in evaluate(o, model, "--tests", "perplexity", "--ablate", "linear")]
            record = json.loads(pathlib.Path(model, "conversion.json").read_text())
            info = json.loads(subprocess.run([o.urchin, "info", model, "--json"], check=True, capture_output=True, text=True).stdout)
        tuned = record.get("finetune") or {"tokens_read": 0}
        linear = readers[2]["perplexity"] if len(readers) > 2 else float("nan")
        got.append((readers[0]["perplexity"], readers[1]["perplexity"], readers[1]["kl"], linear, record["tokens_read"] + tuned["tokens_read"],
                    info["state_bytes"]))
    return [statistics.mean(column) for column in zip(*got)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(" - ")[0])
    parser.add_argument("--urchin", default="build/urchin")
    parser.add_argument("--rows", default=",".join([*ROWS, "past"]))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", default="0")
    o = parser.parse_args()
    o.seeds = [int(s) for s in o.seeds.split(",")]
    os.chdir(ROOT)
    for name in o.rows.split(","):
        if name == "past":
            print(f"\n{PAST[0]}\n", flush=True)
            past(o)
            continue
        title, variants = ROWS[name]
        print(f"\n{title}\n\n| | perplexity | against the base | mean KL, nats | exact keys only | tokens learned from | bytes |\n|---|---|---|---|---|---|---|",
              flush=True)
        if name == "training":
            variants = [[]] + variants
        for flags in variants:
            base, model, kl, linear, tokens, size = measure(o, PURE if name == "pure" else USUAL, flags)
            print(f"| {' '.join(map(str, flags)) or 'usual'} | {model:.3f} | {100 * (model / base - 1):+.1f} % | {kl:.4f} | {linear:.3f} | "
                  f"{tokens:,.0f} | {size:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
