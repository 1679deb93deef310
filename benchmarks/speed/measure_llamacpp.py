"""Measure llama.cpp through the C API of llama-cpp-python: flash attention on, weights mapped. Prints one JSON line."""

from __future__ import annotations

import argparse
import ctypes
import time
from typing import Any

import llama_cpp as llama
import llama_cpp.llama_cpp as c
import numpy as np

from . import timing

BATCH = 2048
MICRO_BATCH = 512
TYPES = {"fp16": c.GGML_TYPE_F16, "int8": c.GGML_TYPE_Q8_0}


@c.llama_log_callback
def _quiet(level: int, text: bytes, data: Any) -> None:
    pass


class Context:
    """One sequence."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        settings = llama.llama_context_default_params()
        settings.n_ctx = options.context + timing.GENERATE + timing.SPARE
        settings.n_batch, settings.n_ubatch = BATCH, MICRO_BATCH
        settings.n_threads = settings.n_threads_batch = options.threads
        settings.type_k = settings.type_v = TYPES[options.kv]
        settings.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED
        settings.no_perf = True
        self._context = llama.llama_init_from_model(model, settings)
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._batch = llama.llama_batch_init(BATCH, 0, 1)
        self.position = 0

    def run(self, tokens: list[int], *, last: bool = True) -> int:
        """Add tokens; return the likeliest next one if they are the last of a prompt."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self.position + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 0
        batch.logits[len(tokens) - 1] = int(last)
        if llama.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        self.position += len(tokens)
        if not last:
            return 0
        logits = llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())

    def clear(self) -> None:
        """Forget everything."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self.position = 0


def main(options: argparse.Namespace) -> None:
    c.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    started = time.perf_counter()
    model = llama.llama_model_load_from_file(options.model.encode(), settings)
    context = Context(model, options)
    load_s = time.perf_counter() - started
    context.run(list(range(2, 2 + timing.WARM_UP)))
    context.clear()
    token = 0

    def prefill(tokens: list[int]) -> None:
        nonlocal token
        for start in range(0, len(tokens), BATCH):
            token = context.run(tokens[start : start + BATCH], last=start + BATCH >= len(tokens))

    def step() -> None:
        nonlocal token
        token = context.run([token])

    timing.emit(timing.Timing(options, "llama.cpp", load_s).measure(prefill, step))


if __name__ == "__main__":
    main(timing.arguments(__doc__))
