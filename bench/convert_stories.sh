#!/bin/sh
# bench/convert_stories.sh - stories260K converted, both stages, and what it costs on text that training did not see: seconds, and
# perplexity beside the base's.  Goal: within 2 %, under 2 minutes on 2 cores.  Arguments go to `urchin convert`.
set -e
cd "$(dirname "$0")/.."
base=tests/data/models/stories260k
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
start=$(date +%s)
build/urchin convert $base --text tests/data/text/tinystories-train-head.txt --out "$out/model" --window-size 32 --cache-size 16 --horizon 64 \
    --finetune-steps 400 --finetune-lr 0.004 --finetune-lr-maps 0.01 "$@"
echo "converted in $(($(date +%s) - start)) seconds"
build/urchin eval "$out/model" --against $base --text tests/data/text/tinystories-valid-head.txt --context 512 --tests perplexity \
    --weights fp32 --against-weights fp32
