"""Measure ExecuTorch's own way: custom_sdpa with the cache in the graph, float or INT8. Prints one JSON line.

``model`` is a program that peers/executorch_own.py made, for contexts up to 4096. They run through the Python
bindings, since the wheel has the custom operators only as a library that needs torch; torch's own memory is not
counted: ``peak_rss_mb`` is what the process took after all imports.
"""

from __future__ import annotations

import argparse
import time

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers the operators
from executorch.kernels import quantized  # noqa: F401
from executorch.runtime import Runtime

from . import timing


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)  # sets ExecuTorch's pool too
    before = timing.memory_mb("VmHWM")
    started = time.perf_counter()
    method = Runtime.get().load_program(options.model).load_method("forward")
    assert method is not None
    load_s = time.perf_counter() - started
    token = position = 0

    def run(tokens: list[int]) -> None:
        nonlocal token, position
        logits = method.execute([torch.tensor([tokens]), torch.tensor([position])])[0]
        position += len(tokens)
        token = int(logits.reshape(-1, logits.shape[-1])[-1].argmax())

    run([3] * timing.WARM_UP)
    run([3])
    position = 0
    line = timing.Timing(options, "executorch", load_s).measure(run, lambda: run([token]))
    timing.emit({**line, "peak_rss_mb": round(line["peak_rss_mb"] - before, 1), "imports_mb": before})


if __name__ == "__main__":
    main(timing.arguments(__doc__))
