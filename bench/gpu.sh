#!/bin/bash
# bench/gpu.sh: every figure of RESULTS.md's section on GPUs, on the card of this machine.  Peers need PyTorch and transformers;
# a part that cannot run says so and the next one goes on.
#
#   BUILD=build   PARTS="attention matmul prefill model step convert server"
cd "$(dirname "$0")/.."
build=${BUILD:-build} model=models/smollm2-135m-hedgehog
part() {
    case " ${PARTS:-attention matmul prefill model step convert server} " in
    *" $1 "*) echo "== ${*:2}" && "${@:2}" || echo "   (did not run to its end)" ;;
    esac
}
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader || true
git log -1 --format='commit %h' 2>/dev/null || true
part attention "$build/bench/gpu_attention"
part matmul "$build/bench/gpu_matmul"
part prefill python3 bench/gpu_prefill.py --program "$build/bench/gpu_prefill"
part model "$build/urchin" bench $model --device cuda --weights bf16 --batch 1,32,256 --depth 0,1000,32000 --n-prompt 512 --n-gen 128
part model "$build/urchin" bench $model --device cuda --weights int8 --batch 1,256 --depth 1000 --n-prompt 512 --n-gen 128
part model "$build/urchin" bench $model --device cuda --weights fp8 --batch 1,256 --depth 1000 --n-prompt 512 --n-gen 128
part step python3 bench/gpu_step.py --urchin "$build/urchin"
part convert env URCHIN="$build/urchin" bench/gpu_convert.sh
part server env URCHIN="$build/urchin" MODEL=$model SERVE_ARGS="--device cuda --weights bf16 --max-seqs 64" \
    bench/with-server python3 bench/gpu_server.py
