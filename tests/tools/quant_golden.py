"""Writes tests/data/quant_golden.h: random blocks of every GGUF type and what the Python package `gguf` decodes
them to.  Run once (pip install gguf numpy); the C test needs only the header.

    python3 tests/tools/quant_golden.py > tests/data/quant_golden.h
"""
import numpy as np
from gguf import GGMLQuantizationType as T, quants

# type, bytes of a block, offsets of its fp16 scales (random bytes there could be infinite)
TYPES = [(T.Q4_0, 18, [0]), (T.Q4_1, 20, [0, 2]), (T.Q5_0, 22, [0]), (T.Q5_1, 24, [0, 2]), (T.Q8_0, 34, [0]),
         (T.Q4_K, 144, [0, 2]), (T.Q5_K, 176, [0, 2]), (T.Q6_K, 210, [208]), (T.F16, 2, [0]), (T.BF16, 2, [])]

rng = np.random.default_rng(4)


def rows(values, format, per_line):
    for i in range(0, len(values), per_line):
        print("    " + " ".join(format % v + "," for v in values[i:i + per_line]))


print("/* Written by tests/tools/quant_golden.py with the Python package gguf: random blocks, decoded. */")
for type, block_bytes, scales in TYPES:
    n_blocks = 2 if block_bytes < 210 and block_bytes > 2 else 1 if block_bytes > 2 else 24
    data = rng.integers(0, 256, (n_blocks, block_bytes), dtype=np.uint8)
    for at in scales:
        half = rng.uniform(-0.1, 0.1, n_blocks).astype(np.float16)
        half[0] = np.float16(3e-6)  # a denormal
        data[:, at:at + 2] = half.view(np.uint8).reshape(n_blocks, 2)
    if type == T.BF16:
        data[:, 1] &= 0xbf  # finite
    out = quants.dequantize(data.reshape(1, -1), type).astype(np.float32).reshape(-1)
    print(f"static const uint8_t {type.name.lower()}_bytes[] = {{")
    rows(data.reshape(-1), "%d", 24)
    print("};\n" f"static const uint32_t {type.name.lower()}_floats[] = {{ /* their bits */")
    rows(out.view(np.uint32), "0x%08x", 8)
    print("};")
