"""Measure transformers: eager model, bfloat16, scaled-dot-product attention, dynamic cache. Prints one JSON line."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from . import timing


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    started = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    load_s = time.perf_counter() - started
    cache: Any = DynamicCache(config=model.config)
    token: Any = None

    def prefill(tokens: list[int]) -> None:
        nonlocal token
        token = model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def step() -> None:
        nonlocal token
        token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    prefill(list(range(2, 2 + timing.WARM_UP)))
    step()
    cache = DynamicCache(config=model.config)
    timing.emit(timing.Timing(options, "transformers", load_s).measure(prefill, step))


if __name__ == "__main__":
    main(timing.arguments(__doc__))
