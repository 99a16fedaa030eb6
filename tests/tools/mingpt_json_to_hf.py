#!/usr/bin/env python3
"""gpt-nano-sort as bbycroft/llm-viz keeps it (minGPT tensors as base64 fp32 in JSON) -> Hugging Face folder.

    mingpt_json_to_hf.py MODEL.json OUT_FOLDER [PARTIALS.json]

minGPT's linear layers are [out, in]; Hugging Face's GPT-2 keeps them [in, out].  With PARTIALS the
activations recorded from PyTorch are written beside it as golden.safetensors, idx as fp32.
"""

import array
import base64
import json
import os
import sys

from hf_folder import write_json, write_safetensors

LETTERS = "ABC"


def decode(node):
    if node["dtype"] != "torch.float32":
        raise ValueError(f"dtype {node['dtype']}")
    return tuple(node["shape"]), base64.b64decode(node["data"])


def transpose(tensor):
    (rows, cols), data = tensor
    values = array.array("f", data)
    flipped = array.array("f")
    for c in range(cols):
        flipped.extend(values[c::cols])
    return (cols, rows), flipped.tobytes()


def main(model_path, folder, partials_path=None):
    with open(model_path, encoding="utf-8") as f:
        model = json.load(f)
    config = model.pop("config")
    tensors = {}
    for name, node in model.items():
        if name.endswith(".attn.bias"):
            continue  # the causal mask, not a parameter
        tensor = decode(node)
        if ".h." in name and name.endswith("weight") and "ln_" not in name:
            tensor = transpose(tensor)
        tensors[name] = tensor

    os.makedirs(folder, exist_ok=True)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
    write_json(folder, "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": config["n_embd"],
        "n_layer": config["n_layer"], "n_head": config["n_head"],
        "n_positions": config["block_size"], "n_ctx": config["block_size"],
        "vocab_size": config["vocab_size"], "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float32"})
    write_json(folder, "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                  "byte_fallback": False, "vocab": {c: i for i, c in enumerate(LETTERS)},
                  "merges": []}})
    if partials_path:
        with open(partials_path, encoding="utf-8") as f:
            partials = json.load(f)
        partials.pop("config")
        write_safetensors(os.path.join(folder, "golden.safetensors"),
                          {name: decode(node) for name, node in partials.items()})


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
