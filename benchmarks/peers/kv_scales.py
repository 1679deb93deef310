"""Measure the key and value scales that onnxruntime-genai's INT8 cache needs. Usage: kv_scales.py CHECKPOINT OUT.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

#: The largest magnitude of a code that onnxruntime-genai's builder divides by.
CODES = 128


def main() -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    with torch.no_grad():
        result = model(torch.randint(2, model.config.vocab_size, (1, 512)), use_cache=True, logits_to_keep=1)
    layers = result.past_key_values.layers
    scales = {
        "k_scales": [float(layer.keys.abs().max() / CODES) for layer in layers],
        "v_scales": [float(layer.values.abs().max() / CODES) for layer in layers],
    }
    Path(sys.argv[2]).write_text(json.dumps({"qmax": CODES, "scales": scales}), encoding="utf-8")


if __name__ == "__main__":
    main()
