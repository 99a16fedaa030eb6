#!/usr/bin/env python3
"""llama2.c checkpoint (v0: seven int32, then fp32 weights) + tokenizer -> Hugging Face folder.

    llama2c_to_hf.py MODEL.bin TOKENIZER OUT_FOLDER

TOKENIZER is llama2.c's tokenizer.bin or a SentencePiece .model (BPE).  llama2.c rotates
neighbouring pairs (2i, 2i+1) of q and k, Hugging Face the halves (i, i + d/2): rows are reordered.
"""

import os
import struct
import sys

from hf_folder import sentencepiece_bpe, write_json, write_safetensors

BYTES = [f"<0x{b:02X}>" for b in range(256)]


def read_llama2c_tokenizer(data, vocab_size):
    """u32 longest piece, then per token: f32 score, u32 length, bytes.  Returns pieces and scores."""
    pos, pieces, scores = 4, [], []
    for _ in range(vocab_size):
        score, n = struct.unpack_from("<fI", data, pos)
        raw = data[pos + 8 : pos + 8 + n]
        pos += 8 + n
        text = raw.decode("utf-8")
        i = len(pieces)
        # llama2.c writes the specials with line ends around them and "▁" as a space.
        pieces.append(["<unk>", "<s>", "</s>"][i] if i < 3 else
                      text if text in BYTES else text.replace(" ", "\u2581"))
        scores.append(score)
    if pos != len(data):
        raise ValueError(f"{len(data) - pos} bytes left after {vocab_size} tokens")
    return pieces, scores


def protobuf_fields(data):
    pos = 0

    def varint():
        nonlocal pos
        value, shift = 0, 0
        while True:
            b = data[pos]
            pos += 1
            value |= (b & 127) << shift
            shift += 7
            if b < 128:
                return value

    while pos < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            value = varint()
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, pos = data[pos : pos + size], pos + size
        elif kind == 2:
            size = varint()
            value, pos = data[pos : pos + size], pos + size
        else:
            raise ValueError(f"protobuf wire type {kind}")
        yield tag >> 3, value


def read_sentencepiece(data):
    """sentencepiece_model.proto: pieces are field 1 {1 piece, 2 score}, trainer_spec field 2 {3 type}."""
    pieces, scores = [], []
    for field, value in protobuf_fields(data):
        if field == 1:
            piece = dict(protobuf_fields(value))
            pieces.append(piece[1].decode("utf-8"))
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
        elif field == 2 and dict(protobuf_fields(value)).get(3, 1) != 2:
            raise ValueError("only SentencePiece BPE models are converted")
    return pieces, scores


def merges_of(pieces, scores):
    """All ways to build a piece from two others; a higher score (the piece's) merges earlier."""
    known = {p: i for i, p in enumerate(pieces) if i >= 3 and p not in BYTES}
    merges = []
    for piece, i in known.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                merges.append((-scores[i], known[left], known[right], left, right))
    return [f"{left} {right}" for _, _, _, left, right in sorted(merges)]


def half_split(data, n_layers, n_heads, head_dim, n_in):
    """Reorders the rows of each head from pairs (2i, 2i+1) to halves (i, i + head_dim/2)."""
    row = 4 * n_in
    out = []
    for head in range(n_layers * n_heads):
        base = head * head_dim * row
        for i in list(range(0, head_dim, 2)) + list(range(1, head_dim, 2)):
            out.append(data[base + i * row : base + (i + 1) * row])
    return b"".join(out)


def main(model_path, tokenizer_path, folder):
    with open(model_path, "rb") as f:
        data = f.read()
    dim, ffn, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", data)
    tied, vocab = vocab > 0, abs(vocab)
    head_dim = dim // heads
    kv_dim = kv_heads * head_dim
    pos = 28

    def take(*shape):
        nonlocal pos
        n = 4
        for d in shape:
            n *= d
        part = data[pos : pos + n]
        pos += n
        return part

    embed = take(vocab, dim)
    blocks = {}
    blocks["input_layernorm"] = ((dim,), take(layers, dim))
    blocks["self_attn.q_proj"] = (
        (dim, dim), half_split(take(layers, dim, dim), layers, heads, head_dim, dim))
    blocks["self_attn.k_proj"] = (
        (kv_dim, dim), half_split(take(layers, kv_dim, dim), layers, kv_heads, head_dim, dim))
    blocks["self_attn.v_proj"] = ((kv_dim, dim), take(layers, kv_dim, dim))
    blocks["self_attn.o_proj"] = ((dim, dim), take(layers, dim, dim))
    blocks["post_attention_layernorm"] = ((dim,), take(layers, dim))
    blocks["mlp.gate_proj"] = ((ffn, dim), take(layers, ffn, dim))
    blocks["mlp.down_proj"] = ((dim, ffn), take(layers, dim, ffn))
    blocks["mlp.up_proj"] = ((ffn, dim), take(layers, ffn, dim))
    norm = take(dim)
    take(2, context, head_dim // 2)  # cosines and sines, made anew by every loader
    head = None if tied else take(vocab, dim)
    if pos != len(data):
        raise ValueError(f"{model_path}: {len(data)} bytes, its header says {pos}")

    tensors = {"model.embed_tokens.weight": ((vocab, dim), embed)}
    for layer in range(layers):
        for name, (shape, part) in blocks.items():
            n = len(part) // layers
            tensors[f"model.layers.{layer}.{name}.weight"] = (
                shape, part[layer * n : (layer + 1) * n])
    tensors["model.norm.weight"] = ((dim,), norm)
    if head is not None:
        tensors["lm_head.weight"] = ((vocab, dim), head)

    os.makedirs(folder, exist_ok=True)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
    write_json(folder, "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
        "max_position_embeddings": context, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "tie_word_embeddings": tied, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float32"})

    with open(tokenizer_path, "rb") as f:
        raw = f.read()
    if tokenizer_path.endswith(".model"):
        pieces, scores = read_sentencepiece(raw)
    else:
        pieces, scores = read_llama2c_tokenizer(raw, vocab)
    if len(pieces) != vocab:
        raise ValueError(f"{tokenizer_path}: {len(pieces)} tokens, the model has {vocab}")
    write_json(folder, "tokenizer.json",
               sentencepiece_bpe(pieces, merges_of(pieces, scores), BYTES[0] in pieces))
    write_json(folder, "tokenizer_config.json", {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
        "add_eos_token": False, "model_max_length": context, "tokenizer_class": "LlamaTokenizer"})


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
