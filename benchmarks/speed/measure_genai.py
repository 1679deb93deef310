"""Measure onnxruntime-genai: one model folder (its cache type is part of the model), one context. Prints one JSON line."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og

from . import timing


def main(options: argparse.Namespace) -> None:
    config = og.Config(options.model)
    session = {"intra_op_num_threads": options.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    started = time.perf_counter()
    model = og.Model(config)
    load_s = time.perf_counter() - started

    def make(context: int) -> Any:
        length = context + timing.GENERATE + timing.SPARE
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
        return og.Generator(model, parameters)

    warm = make(timing.WARM_UP)
    warm.append_tokens(np.arange(2, 2 + timing.WARM_UP, dtype=np.int32))
    warm.generate_next_token()
    warm.generate_next_token()
    del warm
    generator = make(options.context)

    def prefill(tokens: list[int]) -> None:
        generator.append_tokens(np.asarray(tokens, np.int32))
        generator.generate_next_token()  # only samples: the logits are there

    line = timing.Timing(options, "onnxruntime-genai", load_s).measure(prefill, generator.generate_next_token)
    timing.emit(line)


if __name__ == "__main__":
    main(timing.arguments(__doc__))
