#!/usr/bin/env python3
"""merged.py FOLDER WORK: does transformers make of a merged folder's base part what the engine made?

WORK holds text, ids (int32) and logits (fp32 [ids, vocabulary]) of the engine.  For tests/unit/test_merge.c."""
import pathlib
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, work = sys.argv[1], pathlib.Path(sys.argv[2])
ids = np.fromfile(work / "ids", np.int32)
want = np.fromfile(work / "logits", np.float32).reshape(len(ids), -1)

mine = AutoTokenizer.from_pretrained(folder)((work / "text").read_text())["input_ids"]
assert mine == ids.tolist(), f"ids {mine}, not {ids.tolist()}"

model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
assert not report["missing_keys"] and not report["unexpected_keys"], report
with torch.no_grad():
    got = model(torch.tensor([ids.tolist()])).logits[0].numpy()
error = np.abs(got - want).max() / np.abs(want).max()
assert error < 1e-4, f"logits differ by {error}"  # fp32 sums in other orders
print(f"logits differ by {error:.2g} of the largest")
