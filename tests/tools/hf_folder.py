"""Writing a Hugging Face model folder with nothing but the standard library."""

import json
import os
import struct


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, indent=1)
        f.write("\n")


def write_safetensors(path, tensors):
    """tensors: name -> (shape, bytes of little-endian fp32), written in the given order."""
    header, offset = {}, 0
    for name, (shape, data) in tensors.items():
        n = 4
        for dim in shape:
            n *= dim
        if n != len(data):
            raise ValueError(f"{name}: shape {list(shape)} needs {n} bytes, got {len(data)}")
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + n]}
        offset += n
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, data in tensors.values():
            f.write(data)


def sentencepiece_bpe(pieces, merges, byte_fallback):
    """tokenizer.json of a Llama-style SentencePiece BPE: pieces in id order, 0..2 are <unk> <s> </s>."""

    def special(i):
        return {"id": i, "content": pieces[i], "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True}

    def template(*parts):
        return [{"SpecialToken": {"id": "<s>", "type_id": t}} if p == "<s>" else
                {"Sequence": {"id": p, "type_id": t}} for p, t in parts]

    decoders = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}]
    decoders += [{"type": "ByteFallback"}] if byte_fallback else []
    decoders += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [special(i) for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template(("<s>", 0), ("A", 0)),
            "pair": template(("<s>", 0), ("A", 0), ("<s>", 1), ("B", 1)),
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": byte_fallback, "ignore_merges": False,
                  "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges},
    }
