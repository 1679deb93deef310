"""Measure the key and value scales that onnxruntime-genai's quantised caches need.

Usage: kv_scales.py CHECKPOINT FOLDER (writes kv_per_tensor.json and kv_per_channel.json)
"""

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
    checkpoint, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        result = model(torch.randint(2, model.config.vocab_size, (1, 512)), use_cache=True, logits_to_keep=1)
    layers = result.past_key_values.layers  # keys and values [1, heads, tokens, channels]
    for name, reduce in (("kv_per_tensor", lambda x: float(x.max())), ("kv_per_channel", lambda x: x.amax((0, 2)))):
        scales: dict[str, list[Any]] = {"k_scales": [], "v_scales": []}
        for layer in layers:
            for key, value in (("k_scales", layer.keys), ("v_scales", layer.values)):
                scale = reduce(value.abs() / CODES)
                scales[key].append(scale if isinstance(scale, float) else scale.reshape(-1).tolist())
        text = json.dumps({"qmax": CODES, "scales": scales})
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
