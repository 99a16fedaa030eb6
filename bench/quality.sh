#!/bin/bash
# quality.sh - what weight formats and the conversion cost, with gates: exit status 1 when one is missed.
#
#   bench/quality.sh [MODEL]         URCHIN=build/urchin TOKENS=10240 PASSKEY=1000,2000 TRIES=40
#
# 1. bf16, int8 and int4 weights against fp32 (weights and exact keys), same model: mean KL over TOKENS
#    tokens of two texts in windows of 1,024.  Gates: bf16 0.003, int8 0.01 nats.
# 2. the model against its base (adapters): perplexity, KL, agreement; linear branch, cache and both off.
# 3. perplexity by position in one stream, heads, passkeys and recall.
set -euo pipefail
cd "$(dirname "$0")/.."
urchin=${URCHIN:-build/urchin}
model=${1:-models/smollm2-135m-hedgehog}
tokens=${TOKENS:-10240}
text=tests/data/text/doyle-lost-world-head.txt,tests/data/text/wikitext2-valid-head.txt
[[ $model == *stories260k* ]] && text=tests/data/text/tinystories-valid-head.txt

n_texts=$(tr ',' '\n' <<<"$text" | wc -l)
status=0
echo "== weights against fp32: $model, $tokens tokens of $text"
for gate in bf16=0.003 int8=0.01 int4=; do
    weights=${gate%=*} limit=${gate#*=}
    "$urchin" eval "$model" --weights "$weights" --against "$model" --against-weights fp32 \
        --against-kv-type fp32 --text "$text" --tokens $((tokens / n_texts)) --tests perplexity \
        --ablate none --json |
        python3 -c '
import json, sys
weights, limit = sys.argv[1:]
base, model = (r["perplexity"] for r in json.load(sys.stdin)["readers"])
missed = limit and not model["kl"] <= float(limit)
verdict = "missed" if missed else "met" if limit else "no gate"
limit = f"gate {limit}: " if limit else ""
print("%-5s mean KL %.5f nats over %d tokens (%s%s), same token %.2f %%, perplexity %.4f (fp32 %.4f)" %
      (weights, model["kl"], model["tokens_scored"], limit, verdict, 100 * model["agreement"],
       model["perplexity"], base["perplexity"]))
sys.exit(bool(missed))' "$weights" "$limit" || status=1
done

against=()
[[ $model == *smollm2* ]] && against=(--against base)
[[ $model == *stories260k* ]] && against=(--against tests/data/models/stories260k --context 512) # it reads no more
echo
echo "== the conversion"
"$urchin" eval "$model" "${against[@]}" --text "$text" --tokens $((tokens / n_texts)) \
    --lengths "${PASSKEY:-1000,2000}" --tries "${TRIES:-40}"
exit $status
