#!/bin/bash
# server_curl.sh - a server under load from curl alone: tokens/s, time to first token, errors.
#
#   bench/server_curl.sh               starts a server (see with-server); URL=http://127.0.0.1:8080 uses one that runs
#   REQUESTS=64  PARALLEL=32  TOKENS=64  PROMPT="..."
#
# Every request streams exactly TOKENS tokens.  The server sends its first byte with the first token, so curl's time to
# the first byte is the time to the first token.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${URL:-}" ] || exec bench/with-server "$0" "$@"
requests=${REQUESTS:-64} parallel=${PARALLEL:-32} tokens=${TOKENS:-64}
prompt=${PROMPT:-Write a long story about a small animal that lives at the bottom of the sea.}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

printf '{"prompt": "%s", "max_tokens": %d, "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true}}' \
    "$prompt" "$tokens" >"$folder/body"
for ((i = 0; i < requests; i++)); do
    ((i == 0)) || echo next
    printf 'url = "%s/v1/completions"\ndata = "@%s"\nheader = "Content-Type: application/json"\noutput = "%s"\nwrite-out = "%%{http_code} %%{time_starttransfer} %%{time_total}\\n"\n' \
        "$URL" "$folder/body" "$folder/answer.$i"
done >"$folder/config"

curl -s "$URL/v1/completions" -H 'Content-Type: application/json' -d "@$folder/body" >/dev/null # warm
start=$(date +%s.%N)
curl --no-progress-meter --no-keepalive --parallel --parallel-immediate --parallel-max "$parallel" --config "$folder/config" >"$folder/times" || true
end=$(date +%s.%N)

generated=$(cat "$folder"/answer.* | grep -o '"completion_tokens":[0-9]*' | cut -d: -f2 | awk '{n += $1} END {print n + 0}')
whole=$(grep -lF 'data: [DONE]' "$folder"/answer.* | wc -l)
sort -n -k 2 "$folder/times" | awk -v requests="$requests" -v whole="$whole" -v tokens="$generated" -v s="$(echo "$end $start" | awk '{print $1 - $2}')" '
    $1 == 200 { first[n++] = $2; total += $3 }
    function quantile(p) { i = int(p * n); return first[i < n ? i : n - 1] }
    END {
        printf "requests             %d, %d answered whole, %d errors\n", requests, whole, requests - whole
        printf "tokens               %d in %.2f s: %.1f tokens/s\n", tokens, s, tokens / s
        if (n) printf "time to first token  p50 %.3f s, p90 %.3f s, p99 %.3f s\n", quantile(.5), quantile(.9), quantile(.99)
        if (n) printf "whole answer         mean %.3f s\n", total / n
        exit requests != whole
    }'
