#!/usr/bin/env python3
"""gpu_step.py - a decode step of an 8B model on one GPU: ours, constant memory, beside PyTorch's growing KV cache.

    python3 bench/gpu_step.py [--urchin build/urchin] [--contexts 8192,32768] [--shape llama-3.1-8b]

Random bf16 weights on both sides; each side at the largest batch that fits.  PyTorch: static KV cache, the fastest backend of
scaled_dot_product_attention, the whole step in a CUDA graph.  Prints tokens a second of both, and the ratio."""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from random_model import SHAPES


def ours(urchin, folder, context, batches):
    """The largest of the batches that fits: (batch, tokens a second)."""
    for batch in batches:
        done = subprocess.run([urchin, "bench", folder, "--device", "cuda", "--weights", "bf16", "--n-prompt", "1",
                               "--n-gen", "64", "--batch", str(batch), "--depth", str(context), "--prefill-chunk", "2048",
                               "--repeat", "3", "--json"], capture_output=True, text=True)
        if done.returncode == 0:
            return batch, max(p["tokens_per_s"] for p in json.loads(done.stdout)["points"]
                              if p["test"] == "tg")
        print(f"  batch {batch}: {done.stderr.strip().splitlines()[-1]}")
    return 0, 0.0


def torch_step(shape, context):
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    hidden, layers, heads, kv, dim, ffn, vocab = SHAPES[shape]
    half, device = torch.bfloat16, "cuda"
    torch.manual_seed(1)

    def weight(*size):
        return torch.randn(*size, device=device, dtype=half) * 0.02
    model = [dict(n1=torch.ones(hidden, device=device, dtype=half), n2=torch.ones(hidden, device=device, dtype=half),
                  qkv=weight((heads + 2 * kv) * dim, hidden), o=weight(hidden, heads * dim), gu=weight(2 * ffn, hidden),
                  down=weight(hidden, ffn)) for _ in range(layers)]
    embed, head, norm = weight(vocab, hidden), weight(vocab, hidden), torch.ones(hidden, device=device, dtype=half)
    per_sequence = 2 * layers * kv * (context + 64) * dim * 2
    batch = int((torch.cuda.mem_get_info()[0] - (3 << 30)) // per_sequence)
    batch = batch // 8 * 8 if batch > 8 else batch
    batch = min(batch, 1024)
    if batch < 1:
        return 0, 0.0, "-"
    caches = [torch.randn(2, batch, kv, context + 64, dim, device=device, dtype=half) for _ in range(layers)]
    tokens = torch.zeros(batch, dtype=torch.long, device=device)
    at = torch.tensor([context], device=device)
    angle = context * 500000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    cos, sin = torch.cat([angle.cos()] * 2).to(half), torch.cat([angle.sin()] * 2).to(half)

    def rope(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def step():
        x = embed[tokens]
        for w, cache in zip(model, caches):
            y = F.rms_norm(x, (hidden,), w["n1"], 1e-5) @ w["qkv"].T
            q, k, v = y.view(batch, -1, dim).split([heads, kv, kv], 1)
            cache[0].index_copy_(2, at, rope(k).unsqueeze(2))
            cache[1].index_copy_(2, at, v.unsqueeze(2))
            y = F.scaled_dot_product_attention(rope(q).unsqueeze(2), cache[0][:, :, :context + 1],
                                               cache[1][:, :, :context + 1], enable_gqa=True)
            x = x + y.reshape(batch, -1) @ w["o"].T
            gate, up = (F.rms_norm(x, (hidden,), w["n2"], 1e-5) @ w["gu"].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ w["down"].T
        tokens.copy_((F.rms_norm(x, (hidden,), norm, 1e-5) @ head.T).argmax(-1))

    best = (0.0, "-")
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend), torch.no_grad():
                for _ in range(3):
                    step()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
            times = []
            for _ in range(21):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            best = max(best, (batch / sorted(times)[10] * 1e3, backend.name))
            del graph
        except RuntimeError as error:
            print(f"  {backend.name}: {str(error).splitlines()[0]}")
    return batch, best[0], best[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(" - ")[0])
    parser.add_argument("--urchin", default="build/urchin")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--contexts", default="8192,32768")
    parser.add_argument("--batches", default="1024,512,256,128,64")
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = pathlib.Path(__file__).resolve().parent
        subprocess.run([sys.executable, here / "random_model.py", folder, "--shape", options.shape], check=True)
        print("context    ours tok/s (batch)    PyTorch tok/s (batch, backend)    ratio")
        for context in map(int, options.contexts.split(",")):
            batch, speed = ours(options.urchin, folder, context, map(int, options.batches.split(",")))
            other = (0, 0.0, "-") if options.no_torch else torch_step(options.shape, context)
            ratio = f"{speed / other[1]:.1f}" if other[1] else "-"
            print(f"{context:7}    {speed:10.0f} ({batch})    {other[1]:10.0f} ({other[0]}, {other[2]})    {ratio}")


if __name__ == "__main__":
    main()
