#!/usr/bin/env python3
"""Stage 1 of a conversion beside PyTorch on the same machine: the same base weights, packs, rows and recipe.

    bench/convert_pytorch.py [--steps 16] [--base FILE.gguf] [--text FILES] [--types float32,bfloat16]

Makes build/bench/convert_pytorch with a virtual environment (torch and safetensors from PyPI), the base's weights
(dequantised: `urchin convert --steps 0` and `--merge`) and the packs (build/bench/packs), then runs

    urchin convert BASE ... --steps N, and with 0: the difference is N sequences
    the same with --update-rows 0: the maps change once a sequence
    that in PyTorch: one forward pass of the teacher, each layer's maps by autograd, AdamW

and prints seconds for a sequence, by the clock and by the processor (which holds where a machine is busy), and the
mean KL of attention rows on the same four packs before and after.  The PyTorch side is our own, written to be read;
the teacher uses scaled_dot_product_attention, in bfloat16 where that is asked for; the maps learn in float32."""
import argparse
import json
import os
import pathlib
import resource
import shutil
import struct
import subprocess
import sys
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = ROOT / "build/bench/convert_pytorch"
FLAGS = ["--finetune", "none", "--retrieval-heads", "0", "--long-every", "0", "--length", "1024", "--rows", "80"]


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default=os.path.expanduser("~/.cache/urchin/SmolLM2-135M-Instruct.Q4_1.gguf"))
    p.add_argument("--text", default=str(ROOT / "tests/data/text"))
    p.add_argument("--steps", type=int, default=16)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--types", default="float32,bfloat16", help="of the teacher in PyTorch")
    p.add_argument("--python", help="one that has torch and safetensors, instead of a new environment")
    p.add_argument("--inside", help=argparse.SUPPRESS)  # the type: this is the run in the environment
    return p.parse_args()


# ---- PyTorch ----
def read_packs(path):
    """[(first, tokens, rows, share)]: calibration, four to measure on, training.  Layout: bench/packs.c."""
    data, at, packs = path.read_bytes(), 0, []

    def ints(n):
        nonlocal at
        at += 4 * n
        return struct.unpack_from(f"{n}i", data, at - 4 * n)

    while at < len(data):
        n_tokens, n_documents, n_rows = ints(3)
        first, tokens, rows = ints(n_documents + 1), ints(n_tokens), ints(n_rows)
        packs.append((first, tokens, rows, struct.unpack_from("d", data, at)[0]))
        at += 8
    return packs


def learn(args):
    import torch
    from safetensors.torch import load_file
    F = torch.nn.functional
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # exp() of far terms
    dtype = getattr(torch, args.inside)
    config = json.loads((WORK / "base/config.json").read_text())
    attention = json.loads((WORK / "adapter/urchin.json").read_text())["attention"]
    recipe = json.loads((WORK / "plain/conversion.json").read_text())["made_from"]["attention_transfer"]
    assert attention["map"] == "exp" and attention["key_map_per"] == "kv_head" and recipe["loss"] == "cross_entropy"
    w = {name: t.to(dtype) for name, t in load_file(WORK / "base/model.safetensors").items()}
    L, H, G = config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]
    D, eps, f = config["head_dim"], config["rms_norm_eps"], attention["features"]
    window, sinks = attention["window"]["size"], attention["sinks"]
    frequencies = config["rope_theta"] ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)

    def rope(x):  # [T, heads, D] from position 0
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
        cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def norm(x, name):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(dtype) * w[name]

    @torch.no_grad()
    def teacher(tokens):
        """q [T, H, D] and k [T, G, D] of every layer, before RoPE."""
        x, out = w["model.embed_tokens.weight"][torch.tensor(tokens)], []
        for i in range(L):
            p = f"model.layers.{i}."
            h = norm(x, p + "input_layernorm.weight")
            q = (h @ w[p + "self_attn.q_proj.weight"].T).view(-1, H, D)
            k = (h @ w[p + "self_attn.k_proj.weight"].T).view(-1, G, D)
            out.append((q.float(), k.float()))
            if i + 1 == L:
                break  # what follows no layer reads
            v = (h @ w[p + "self_attn.v_proj.weight"].T).view(-1, G, D)
            y = F.scaled_dot_product_attention(rope(q).transpose(0, 1)[None], rope(k).transpose(0, 1)[None],
                                               v.transpose(0, 1)[None], is_causal=True, enable_gqa=True)
            x = x + y[0].transpose(0, 1).reshape(len(tokens), -1) @ w[p + "self_attn.o_proj.weight"].T
            h = norm(x, p + "post_attention_layernorm.weight")
            gate = F.silu(h @ w[p + "mlp.gate_proj.weight"].T) * (h @ w[p + "mlp.up_proj.weight"].T)
            x = x + gate @ w[p + "mlp.down_proj.weight"].T
        return out

    def read(pack):
        """Per layer, a list of documents: (q of the sampled rows and their positions, k)."""
        first, tokens, rows, _ = pack
        layers = [[] for _ in range(L)]
        for begin, end in zip(first, first[1:]):
            mine = torch.tensor([r - begin for r in rows if begin <= r < end], dtype=torch.long)
            for layer, (q, k) in zip(layers, teacher(tokens[begin:end])) if len(mine) else ():
                layer.append((q[mine], rope(q)[mine], mine, k, rope(k)))
        return layers

    def rows_kl(maps, document):
        """Sum over rows and heads of KL(softmax || Hedgehog), and of the calibration's gaps [H]."""
        map_q, map_k, c = maps
        q, q_turned, position, k, k_turned = document
        key = torch.arange(len(k))
        seen = key <= position[:, None]
        exact = seen & ((key < sinks) | (key >= (position[:, None] // window - 1) * window))
        linear = seen & ~exact
        logits = torch.einsum("rghd,tgd->ghrt", q_turned.view(-1, G, H // G, D), k_turned).flatten(0, 1) * D**-0.5
        u_q = torch.einsum("rhd,hdf->hrf", q, map_q)
        u_k = torch.einsum("tgd,gdf->gtf", k, map_k).clamp(-30, 30)
        reach = u_q.detach().abs().amax(-1, keepdim=True)
        phi_q = torch.cat([u_q - reach, -u_q - reach], -1).exp()
        phi_k = torch.cat([u_k, -u_k], -1).exp()
        s = torch.einsum("ghrf,gtf->ghrt", phi_q.view(G, H // G, -1, 2 * f), phi_k).flatten(0, 1)
        far = s.clamp_min(1e-30).log() + reach
        log_p = logits.masked_fill(~seen, -torch.inf).log_softmax(-1)
        log_a = torch.where(exact, logits, far + c[:, None, None]).masked_fill(~seen, -torch.inf).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_a)).masked_fill(~seen, 0).sum()
        gap = [x.masked_fill(~linear, -torch.inf).logsumexp(-1) for x in (logits, far)]
        return kl, (gap[0] - gap[1]).sum(-1).detach()

    def measure(maps, packs):
        total, n = 0.0, 0
        with torch.no_grad():
            for pack in packs:
                for m, documents in zip(maps, read(pack)):
                    total += sum(float(rows_kl(m, d)[0]) for d in documents)
                n += len(pack[2]) * H * L
        return total / n * sum(p[3] for p in packs) / len(packs)  # rows without linear keys count as 0

    def begin(pack):
        """The identity, less where |u| would pass 10; c by the gap between logs of terms."""
        maps = []
        for documents in read(pack):
            q, k = torch.cat([d[0] for d in documents]), torch.cat([d[3] for d in documents])
            scale = [(10 / x.abs().amax((0, 2))).clamp_max(recipe["init_scale"])[:, None, None] for x in (q, k)]
            m = [torch.eye(D, f) * s for s in scale] + [torch.zeros(H)]
            with torch.no_grad():
                m[2] += sum(rows_kl(m, d)[1] for d in documents) / len(pack[2])
            maps.append([t.requires_grad_() for t in m])
        return maps

    def rate(step):
        import math
        low, end, warm = 1 / 25, 1 / 25e4, recipe["warmup"] * recipe["steps"]
        if step < warm:
            return low + (1 - low) * (1 - math.cos(math.pi * step / warm)) / 2
        return end + (1 - end) * (1 + math.cos(math.pi * (step - warm) / (recipe["steps"] - warm))) / 2

    packs = read_packs(WORK / "packs")
    maps = begin(packs[0])
    before = measure(maps, packs[1:5])
    optimisers = [torch.optim.AdamW([{"params": m[:2], "base": recipe["lr"]}, {"params": m[2:], "base": recipe["lr_mix"]}],
                                    betas=(0.9, 0.99), eps=1e-8, weight_decay=0) for m in maps]
    clock, processor = time.perf_counter(), time.process_time()
    for step, pack in enumerate(packs[5:]):
        for m, documents, optimiser in zip(maps, read(pack), optimisers):
            (sum(rows_kl(m, d)[0] for d in documents) / (len(pack[2]) * H)).backward()
            torch.nn.utils.clip_grad_norm_(m, 1)
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * rate(step)
            optimiser.step()
            optimiser.zero_grad()
    n = len(packs) - 5
    print(json.dumps({"seconds": (time.perf_counter() - clock) / n, "processor": (time.process_time() - processor) / n,
                      "before": before, "after": measure(maps, packs[1:5]), "version": torch.__version__}))


# ---- both ----
def run(command, **more):
    """Seconds by the clock and by the processor."""
    clock, was = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([str(c) for c in command], check=True, **more)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - clock, now.ru_utime + now.ru_stime - was.ru_utime - was.ru_stime


def python(args):
    if args.python:
        return args.python
    folder = WORK.parent / "torch"
    if not (folder / "bin/python").exists():
        venv.create(folder, with_pip=True)
    run([folder / "bin/python", "-m", "pip", "install", "-q", "torch", "safetensors", "numpy"])
    return folder / "bin/python"


def convert(args, out, steps, *more, stderr=subprocess.DEVNULL):
    return run([ROOT / "build/urchin", "convert", args.base, "--text", args.text, "--steps", steps, *FLAGS, *more,
                "--threads", args.threads, "--out", WORK / out], stdout=subprocess.DEVNULL, stderr=stderr)


def main():
    args = arguments()
    if args.inside:
        return learn(args)
    interpreter = python(args)
    run(["make", "-C", ROOT, "-s", "build/urchin", "build/bench/packs"])
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    idle = convert(args, "adapter", 0, stderr=None)
    runs = [("learned", ""), ("plain", ", --update-rows 0")]
    busy = [convert(args, "learned", args.steps), convert(args, "plain", args.steps, "--update-rows", "0")]
    run([ROOT / "build/urchin", "convert", "--merge", WORK / "adapter", "--out", WORK / "base"], stdout=subprocess.DEVNULL)
    with open(WORK / "packs", "wb") as file:
        run([ROOT / "build/bench/packs", args.base, "--text", args.text, "--steps", args.steps, *FLAGS], stdout=file)
    table = []
    for (folder, how), took in zip(runs, busy):
        record = json.loads((WORK / folder / "conversion.json").read_text())
        table.append((f"Urchin, {record['made_from']['weights']} weights, {record['isa']}{how}",
                      *((b - i) / args.steps for b, i in zip(took, idle)),
                      record["before"]["kl_of_all_rows"], record["after"]["kl_of_all_rows"]))
    for dtype in args.types.split(","):
        out = subprocess.run([interpreter, __file__, "--inside", dtype, "--threads", str(args.threads)],
                             env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, check=True, stdout=subprocess.PIPE,
                             text=True).stdout
        r = json.loads(out)
        table.append((f"PyTorch {r['version']}, {dtype} teacher", r["seconds"], r["processor"], r["before"], r["after"]))
    print(f"\n{args.steps} sequences of 1,024 tokens, 80 rows, {args.threads} threads, {pathlib.Path(args.base).name}\n")
    print(f"| | seconds a sequence | processor seconds | KL before | KL after {args.steps} |\n|---|---|---|---|---|")
    for name, seconds, processor, before, after in table:
        print(f"| {name} | {seconds:.2f} | {processor:.2f} | {before:.4f} | {after:.4f} |")


if __name__ == "__main__":
    sys.exit(main())
