#!/usr/bin/env python3
"""gpu_prefill.py - one layer's attention over a long prompt: ours beside flash attention and fla's linear attention, one GPU, one run.

    python3 bench/gpu_prefill.py [--tokens 8192,65536] [--program build/bench/gpu_prefill]

32 query heads of 128.  Ours: feature maps, window, recall cache and state, read in chunks of 8192, 8 key heads (bench/gpu_prefill.c).
PyTorch: scaled_dot_product_attention, causal, the fastest backend, 8 key heads.  fla: chunk_linear_attn with features of 256 already
made, where the package is there.  Median milliseconds, and how many times longer the others take."""
import argparse
import subprocess

HEADS, KV_HEADS, DIM, FEATURES = 32, 8, 128, 256


def median_ms(torch, step, repeats=11):
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def flash(torch, n):
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    q = torch.randn(1, HEADS, n, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, KV_HEADS, n, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = (float("inf"), "-")
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend), torch.no_grad():
                best = min(best, (median_ms(torch, lambda: F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True)), backend.name))
        except RuntimeError as error:
            print(f"  {backend.name}: {str(error).splitlines()[0]}")
    return best


def fla_linear(torch, n):
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except Exception as error:  # not installed, or not for this card
        print(f"  fla: {type(error).__name__}: {error}")
        return None
    q, k = (torch.randn(1, n, HEADS, FEATURES, device="cuda", dtype=torch.bfloat16).softmax(-1) for _ in range(2))
    v = torch.randn(1, n, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        return median_ms(torch, lambda: chunk_linear_attn(q, k, v, normalize=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(" - ")[0])
    parser.add_argument("--tokens", default="8192,65536")
    parser.add_argument("--program", default="build/bench/gpu_prefill")
    options = parser.parse_args()
    import torch
    print(f"{torch.cuda.get_device_name()}\n tokens    ours ms    flash ms (backend)      x    fla ms      x")
    for n in map(int, options.tokens.split(",")):
        ours = float(subprocess.run([options.program, str(n)], check=True, capture_output=True, text=True).stdout)
        softmax, backend = flash(torch, n)
        linear = fla_linear(torch, n)
        print(f"{n:7} {ours:10.3f} {softmax:11.3f} ({backend}) {softmax / ours:6.2f} "
              + (f"{linear:9.3f} {linear / ours:6.2f}" if linear else "        -      -"))


if __name__ == "__main__":
    main()
