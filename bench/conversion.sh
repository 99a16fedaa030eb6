#!/bin/sh
# conversion.sh - what a conversion of the default model's base costs on texts of your own, at the lengths of training and past them.
#
#   bench/conversion.sh MODEL WIKITEXT NOVEL[,NOVEL...]        TOKENS=65536 TRIES=40 THREADS=0 URCHIN=build/urchin
#
# WIKITEXT: WikiText-2's test split (wiki.test.tokens), as the literature has it: the first TOKENS tokens in windows of 1,024.  NOVEL: texts that neither
# base nor conversion is measured on elsewhere: half of TOKENS of each in windows of 4,096; the first one as one stream, and as what pass keys are hidden in.
# Goals: perplexity within 2 %; the stream within 5 % at every position; pass keys 0.95 to 8,000 tokens and 0.8 at 16,000; memories added 0.9.
set -e
if [ $# -ne 3 ]; then sed -n '2,4s/^# *//p' "$0" >&2; exit 2; fi
cd "$(dirname "$0")/.."
model=$1 wikitext=$2 novels=$3 tokens=${TOKENS:-65536}
measure() { echo; echo "== $1"; shift; "${URCHIN:-build/urchin}" eval "$model" --threads "${THREADS:-0}" "$@"; }

measure "WikiText-2 test, windows of 1,024" --against base --text "$wikitext" --tokens "$tokens" --tests perplexity
measure "novels, windows of 4,096" --against base --text "$novels" --tokens $((tokens / 2)) --context 4096 --tests perplexity
measure "one stream, by position" --against base --text "${novels%%,*}" --tokens "$tokens" --bin $((tokens / 8)) --tests stream --ablate none
measure "pass keys" --text "${novels%%,*}" --tests passkey --lengths 1000,2000,4000,8000,16000 --tries "${TRIES:-40}" --ablate none
measure "texts read apart, memories added" --text "${novels%%,*}" --tests added --lengths 1500 --memories 2,8 --tries "${TRIES:-40}" --ablate none
