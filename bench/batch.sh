#!/bin/bash
# batch.sh - tokens per second of all streams together, by how many there are.
#
#   bench/batch.sh [MODEL]             BATCHES=1,2,4,8,16,32,64  DEPTH=1000  URCHIN=build/urchin
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${URCHIN:-build/urchin}" bench "${1:-models/smollm2-135m-hedgehog}" \
    --n-prompt 64 --n-gen 64 --batch "${BATCHES:-1,2,4,8,16,32,64}" --depth "${DEPTH:-1000}"
