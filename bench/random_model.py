#!/usr/bin/env python3
"""random_model.py DIR [--shape llama-3.1-8b] - a whole converted model of a known shape with random weights, for timing alone.

Speed does not depend on the values: one block of normally distributed bf16 numbers is written over and over.  Needs
nothing but Python; the tokenizer is the small one of the tests (ids above its own are never written as text)."""
import argparse
import json
import pathlib
import random
import shutil
import struct

SHAPES = {  # hidden, layers, heads, kv heads, head_dim, ffn, vocabulary
    "llama-3.1-8b": (4096, 32, 32, 8, 128, 14336, 128256),
    "smollm2-135m": (576, 30, 9, 3, 64, 1536, 49152),
    "tiny": (64, 2, 4, 2, 16, 128, 512),
}
BLOCK = 1 << 20


def normal_block(deviation):
    draw = random.Random(1)
    numbers = [draw.gauss(0, deviation) for _ in range(BLOCK)]
    packed = struct.pack(f"<{BLOCK}f", *numbers)
    high = bytearray(2 * BLOCK)
    high[0::2], high[1::2] = packed[2::4], packed[3::4]  # bf16 is the upper half of fp32
    return bytes(high)


def write_safetensors(path, tensors, block):
    """tensors: name -> shape, all bf16."""
    header, at = {}, 0
    for name, shape in tensors.items():
        n = 2
        for d in shape:
            n *= d
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        while at:
            f.write(block[:min(at, len(block))])
            at -= min(at, len(block))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(" - ")[0])
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--features", type=int, help="projections f of a head (default: head_dim)")
    options = parser.parse_args()
    hidden, layers, heads, kv, dim, ffn, vocab = SHAPES[options.shape]
    f = options.features or dim
    root = pathlib.Path(__file__).resolve().parent.parent
    options.dir.mkdir(parents=True, exist_ok=True)
    (options.dir / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": dim, "intermediate_size": ffn,
        "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
        "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}))
    shutil.copy(root / "models/stories260k-hedgehog/tokenizer.json", options.dir)
    shutil.copy(root / "models/stories260k-hedgehog/tokenizer_config.json", options.dir)
    tensors = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    maps = {}
    for i in range(layers):
        p = f"model.layers.{i}."
        tensors |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,),
                    p + "self_attn.q_proj.weight": (heads * dim, hidden), p + "self_attn.k_proj.weight": (kv * dim, hidden),
                    p + "self_attn.v_proj.weight": (kv * dim, hidden), p + "self_attn.o_proj.weight": (hidden, heads * dim),
                    p + "mlp.gate_proj.weight": (ffn, hidden), p + "mlp.up_proj.weight": (ffn, hidden),
                    p + "mlp.down_proj.weight": (hidden, ffn)}
        a = f"layers.{i}.attn."
        maps |= {a + "feature_map_q": (heads, dim, f), a + "feature_map_k": (kv, dim, f), a + "log_mix": (heads,)}
    block = normal_block(0.02)
    write_safetensors(options.dir / "model.safetensors", tensors, block)
    write_safetensors(options.dir / "hedgehog.safetensors", maps, block)
    (options.dir / "urchin.json").write_text(json.dumps({
        "format": 1, "name": f"random-{options.shape}", "base": None,
        "attention": {"kind": "hedgehog", "map": "exp", "features": f, "key_map_per": "kv_head", "map_position": "none",
                      "max_distance": 4096, "window": {"rule": "terraced", "size": 64}, "sinks": 1,
                      "cache": {"size": 128, "score": "self_recall", "recent": 32, "age": 512}, "horizon": 1024,
                      "mixing": "unified"},
        "low_rank": None}))


if __name__ == "__main__":
    main()
