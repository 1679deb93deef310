"""Measure OpenVINO GenAI on its paged attention: one model folder, one cache type, one context. Prints one JSON line."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from . import timing

CACHE = {"int8": "u8", "fp16": "f16"}


def settings(length: int) -> Any:
    """Return the settings of a greedy generation of ``length`` tokens."""
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
    return config


class Sequence:
    """One sequence at a time, a token per step: what ``LLMPipeline`` runs inside, with its settings."""

    def __init__(self, options: argparse.Namespace) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = 1
        scheduler.max_num_batched_tokens = options.context + timing.SPARE  # a prompt is one step
        scheduler.enable_prefix_caching = False
        properties = {
            "INFERENCE_NUM_THREADS": options.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "KV_CACHE_PRECISION": CACHE[options.kv],
        }
        tokenizer = genai.Tokenizer(options.model)
        self._pipeline = genai.ContinuousBatchingPipeline(options.model, tokenizer, scheduler, "CPU", **properties)
        self._requests = 0
        self._handle: Any = None

    def start(self, tokens: list[int], length: int) -> None:
        """Process a prompt up to its first new token."""
        prompt = ov.Tensor(np.asarray([tokens], np.int64))
        self._handle = self._pipeline.add_request(self._requests, prompt, settings(length))
        self._requests += 1
        self.step()

    def step(self) -> None:
        """Generate a token."""
        while not self._handle.can_read():
            self._pipeline.step()
        self._handle.read()

    def finish(self) -> None:
        """Generate what is left of the request."""
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def main(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    sequence = Sequence(options)
    load_s = time.perf_counter() - started
    sequence.start(list(range(2, 2 + timing.WARM_UP)), 2)
    sequence.finish()

    def prefill(tokens: list[int]) -> None:
        sequence.start(tokens, timing.GENERATE + timing.SPARE)

    timing.emit(timing.Timing(options, "openvino-genai", load_s).measure(prefill, sequence.step))


if __name__ == "__main__":
    main(timing.arguments(__doc__))
