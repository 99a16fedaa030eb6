#!/bin/bash
# prefill.sh - how fast a prompt is read, by its length and by weight format.
#
#   bench/prefill.sh [MODEL]           LENGTHS=64,512,4096  DEPTH=1000  WEIGHTS="int8 int4 bf16 fp32"  URCHIN=build/urchin
set -euo pipefail
cd "$(dirname "$0")/.."
for weights in ${WEIGHTS:-int8 int4 bf16 fp32}; do
    "${URCHIN:-build/urchin}" bench "${1:-models/smollm2-135m-hedgehog}" --weights "$weights" \
        --n-prompt "${LENGTHS:-64,512,4096}" --n-gen 64 --batch 1 --depth "${DEPTH:-1000}"
done
