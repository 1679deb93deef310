"""Measure MNN through its Python package: one model folder, one cache type, one context. Prints one JSON line."""

from __future__ import annotations

import argparse
import time

import MNN.llm  # "from MNN import llm" gets the C module of that name
import numpy as np

from . import timing

#: MNN's attention_mode: flash attention, with floats in the cache or with keys and values in 8 bits.
ATTENTION = {"fp32": 8, "int8": 10}


def main(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    model = MNN.llm.create(f"{options.model}/config.json")
    model.set_config({"thread_num": options.threads, "attention_mode": ATTENTION[options.kv]})
    model.load()
    load_s = time.perf_counter() - started
    token = 0

    def run(tokens: list[int]) -> None:
        nonlocal token
        token = int(np.asarray(model.forward(tokens).read()).argmax())

    run(list(range(2, 2 + timing.WARM_UP)))
    run([token])
    model.reset()
    line = timing.Timing(options, "MNN", load_s).measure(run, lambda: run([token]))
    if model.context.all_seq_len != options.context + timing.GENERATE:
        raise RuntimeError("MNN did not keep the tokens in its cache")
    timing.emit(line)


if __name__ == "__main__":
    main(timing.arguments(__doc__))
