#!/bin/sh
# bench/gpu_convert.sh - attention transfer of SmolLM2-135M-Instruct (bf16 weights) on the card: the last line of progress has seconds
# a step (a sequence of 1,024 tokens and 80 rows, every fifth of 4,096 and 32), the line below it the divergence before and after.
#   DEVICE=cuda STEPS=200 URCHIN=build/urchin
set -e
cd "$(dirname "$0")/.."
base=${URCHIN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/urchin}/SmolLM2-135M-Instruct.Q4_1.gguf
[ -r "$base" ] || { echo "$base is not there: make model fetches it" >&2; exit 1; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"${URCHIN:-build/urchin}" convert "$base" --text tests/data/text --device "${DEVICE:-cuda}" --weights bf16 --finetune none \
    --steps "${STEPS:-200}" --out "$out/model" 2>&1 | grep -v '^memory' | tail -n 2
