#!/bin/bash
# decode_depth.sh - is the next token as cheap at depth 1,000,000 as at 1,000?  Reads every depth for real.
#
#   bench/decode_depth.sh [MODEL]      DEPTHS=1000,10000,100000 (1,000,000 takes minutes to read)  URCHIN=build/urchin
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${URCHIN:-build/urchin}" bench "${1:-models/smollm2-135m-hedgehog}" \
    --n-prompt 512 --n-gen 128 --batch 1 --depth "${DEPTHS:-1000,10000,100000}" --repeat 5
