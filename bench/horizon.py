#!/usr/bin/env python3
"""One horizon for all heads, or one for each: what would that be worth?

    bench/horizon.py MODEL TEXT [--tokens 8192] [--horizons 256,512,1024,2048,4096]

Reads the text with each horizon (`urchin eval --tests heads`) and prints the means over heads of KL to softmax rows and
of attention's relative squared error, and below them the means of each head's, and each layer's, best.  Those are chosen
on the text that they are measured on, by a model that was tuned for one horizon: an upper bound for the choice alone."""
import argparse
import json
import pathlib
import subprocess

URCHIN = pathlib.Path(__file__).resolve().parent.parent / "build/urchin"
QUANTITIES = ("kl", "attention_error")


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("text")
    p.add_argument("--tokens", default="8192")
    p.add_argument("--horizons", default="256,512,1024,2048,4096")
    args = p.parse_args()
    print("| horizon | KL | error |\n|---|---|---|")
    seen = []
    for horizon in args.horizons.split(","):
        out = subprocess.run([URCHIN, "eval", args.model, "--text", args.text, "--tokens", args.tokens, "--context",
                              args.tokens, "--tests", "heads", "--ablate", "none", "--horizon", horizon, "--json"],
                             check=True, stdout=subprocess.PIPE, text=True).stdout
        seen.append(json.loads(out)["readers"][0]["heads"])
        print(f"| {horizon} |", " | ".join(f"{mean(map(mean, seen[-1][q])):.4f}" for q in QUANTITIES), "|", flush=True)
    layers, heads = [], []
    for q in QUANTITIES:
        by_layer = list(zip(*(s[q] for s in seen)))  # of each layer, a list of heads for each horizon
        layers.append(mean(min(map(mean, layer)) for layer in by_layer))
        heads.append(mean(mean(map(min, zip(*layer))) for layer in by_layer))
    for name, values in (("each layer's best", layers), ("each head's best", heads)):
        print(f"| {name} |", " | ".join(f"{v:.4f}" for v in values), "|")


if __name__ == "__main__":
    main()
