"""Attention kernels against ONNX Runtime's GroupQueryAttention and against merely reading the bytes.

Prints JSON lines. Decode walks the layers of a model in turn, and 512 MiB of other data are read before, so that the data
comes from memory and not from a cache, as it does between two tokens. The contestants take turns within one run, in another
order each round, all of them on ONNX Runtime's one pool of threads, as in `edgekv run`; a figure is the median of the rounds.
Usage: python -m benchmarks.kernels.attention [--rounds N] [--threads N] [--only decode|prefill]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.runtime.engines.onnx.options import lend_threads, share_threads
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.kernels.interface import PAGE_REF
from edgekv.runtime.system.buffers import anonymous
from edgekv.spec import PageSpec

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE = 24, 16, 8, 64, 32
#: Beyond the last cache of this machine, or a virtual machine's share of it.
EVICT_BYTES = 512 * 1024 * 1024
SPEC = PageSpec(LAYERS, KV_HEADS, HEAD_DIM, PAGE)


def emit(**fields: Any) -> None:
    """Print one JSON line."""
    print(json.dumps(fields), flush=True)


def take_turns(
    contestants: dict[str, Callable[[], float]], rounds: int, before: Callable[[], object]
) -> dict[str, float]:
    """Run every contestant once per round, each after ``before``; returns the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    # Who comes after whom matters by a few percent, so nobody always comes after the same.
    order = random.Random(0)
    for index in range(rounds + 1):
        for name in order.sample(list(contestants), len(contestants)):
            time.sleep(0.01)  # let the other's threads go to sleep
            before()
            seconds = contestants[name]()
            if index:  # the first round warms up
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


class Pages:
    """Pages of every layer, scattered in one arena."""

    def __init__(self, tokens: int, *, warm: bool, layers: int = LAYERS) -> None:
        rng = np.random.default_rng(0)
        n = tokens // PAGE
        stride = SPEC.warm_slot_bytes if warm else SPEC.hot_bytes
        self.arena = np.frombuffer(anonymous(layers * n * stride, huge=True), np.uint8)  # as the runtime's own
        order = rng.permutation(layers * n).astype(np.uint64)
        self.refs = np.zeros((layers, n), PAGE_REF)
        self.refs["data"] = np.uint64(self.arena.ctypes.data) + order.reshape(layers, n) * np.uint64(stride)
        self.refs["mask"] = np.uint64(2**64 - 1)
        self.refs["position"] = np.arange(n) * PAGE
        self.refs["n_slots"] = PAGE
        self.refs["kind"] = int(warm)
        part = 2 * SPEC.elements
        for page in self.arena.reshape(-1, stride):
            if warm:
                page[:part] = rng.integers(0, 256, part, np.uint8)
                page[part : SPEC.warm_bytes].view(np.float16)[:] = 0.01
            else:
                page.view(np.float16)[:] = rng.standard_normal(part, np.float32)
        self.layers = layers


class Ours:
    """Our kernel over all layers."""

    def __init__(self, pages: Pages, tokens_new: int, threads: int) -> None:
        kernels = load_kernels()
        rng = np.random.default_rng(1)
        self.pages = pages
        self.attention = kernels.Attention(
            kernels.ThreadPool(threads, lend_threads()),
            Q_HEADS,
            KV_HEADS,
            HEAD_DIM,
            PAGE,
            HEAD_DIM**-0.5,
            max_tokens=512,
        )
        self.q = rng.standard_normal((tokens_new, Q_HEADS, HEAD_DIM), np.float32)
        self.k = rng.standard_normal((tokens_new, KV_HEADS, HEAD_DIM), np.float32)
        self.v = rng.standard_normal((tokens_new, KV_HEADS, HEAD_DIM), np.float32)
        self.out = np.empty_like(self.q)
        self.positions = np.arange(tokens_new) + pages.refs.shape[1] * PAGE

    def __call__(self) -> float:
        """Seconds per layer."""
        start = time.perf_counter()
        for layer in range(self.pages.layers):
            self.attention.run(self.q, self.k, self.v, self.positions, self.pages.refs[layer], self.out)
        return (time.perf_counter() - start) / self.pages.layers


class OrtGqa:
    """One com.microsoft.GroupQueryAttention node, its cache shared between past and present (nothing is copied)."""

    def __init__(self, tokens: int, tokens_new: int, *, int8: bool, layers: int) -> None:
        import onnx
        import onnxruntime as ort
        from onnx import TensorProto, helper

        cache_type = TensorProto.INT8 if int8 else TensorProto.FLOAT
        cache_shape = [1, KV_HEADS, tokens + tokens_new, HEAD_DIM]

        def value(name: str, kind: int, shape: list[int]) -> Any:
            return helper.make_tensor_value_info(name, kind, shape)

        hidden, kv_hidden = Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        inputs = [
            value("q", TensorProto.FLOAT, [1, tokens_new, hidden]),
            value("k", TensorProto.FLOAT, [1, tokens_new, kv_hidden]),
            value("v", TensorProto.FLOAT, [1, tokens_new, kv_hidden]),
            value("past_k", cache_type, cache_shape),
            value("past_v", cache_type, cache_shape),
            value("seqlens", TensorProto.INT32, [1]),
            value("total", TensorProto.INT32, []),
        ]
        names = [item.name for item in inputs]
        attributes: dict[str, Any] = {"num_heads": Q_HEADS, "kv_num_heads": KV_HEADS}
        scales = []
        if int8:
            names += [""] * 5 + ["scale", "scale"]
            attributes |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
            scales = [helper.make_tensor("scale", TensorProto.FLOAT, [1], [0.01])]
        node = helper.make_node(
            "GroupQueryAttention", names, ["out", "present_k", "present_v"], domain="com.microsoft", **attributes
        )
        outputs = [
            value("out", TensorProto.FLOAT, [1, tokens_new, hidden]),
            value("present_k", cache_type, cache_shape),
            value("present_v", cache_type, cache_shape),
        ]
        model = helper.make_model(
            helper.make_graph([node], "gqa", inputs, outputs, scales),
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
            ir_version=10,
        )
        onnx.checker.check_model(model)
        options = ort.SessionOptions()
        options.use_per_session_threads = False  # the pool that all contestants share
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(1)
        self.bindings = []
        for _ in range(layers):
            binding = self.session.io_binding()
            for name, shape in (("q", hidden), ("k", kv_hidden), ("v", kv_hidden)):
                binding.bind_cpu_input(name, rng.standard_normal((1, tokens_new, shape), np.float32))
            for name in ("k", "v"):
                floats = None if int8 else rng.standard_normal(cache_shape, np.float32)
                data = rng.integers(-127, 128, cache_shape, np.int8) if floats is None else floats
                shared = ort.OrtValue.ortvalue_from_numpy(data)
                binding.bind_ortvalue_input(f"past_{name}", shared)
                binding.bind_ortvalue_output(f"present_{name}", shared)
            binding.bind_cpu_input("seqlens", np.array([tokens + tokens_new - 1], np.int32))
            binding.bind_cpu_input("total", np.array(tokens + tokens_new, np.int32))
            out = np.empty((1, tokens_new, hidden), np.float32)
            binding.bind_ortvalue_output("out", ort.OrtValue.ortvalue_from_numpy(out))
            self.bindings.append(binding)

    def __call__(self) -> float:
        """Seconds per layer."""
        start = time.perf_counter()
        for binding in self.bindings:
            self.session.run_with_iobinding(binding)
        return (time.perf_counter() - start) / len(self.bindings)


def reading(data: NDArray[np.uint8], threads: int) -> Callable[[], float]:
    """Return what merely reads ``data`` and returns the seconds that this took."""
    kernels = load_kernels()
    pool = kernels.ThreadPool(threads, lend_threads())
    return lambda: kernels.read_seconds(pool, data)


def decode(tokens: int, rounds: int, threads: int) -> None:
    """One token of every layer at a context of ``tokens``."""
    pages = Pages(tokens, warm=True)
    read = reading(pages.arena, threads)
    contestants: dict[str, Callable[[], float]] = {
        "edgekv_int8": Ours(pages, 1, threads),
        "read": lambda: read() / LAYERS,
        "ort_gqa_int8": OrtGqa(tokens, 1, int8=True, layers=LAYERS),
        # fp32 takes four times the bytes; a third of the layers is still far beyond the last cache
        "ort_gqa_fp32": OrtGqa(tokens, 1, int8=False, layers=8 if tokens > 2048 else LAYERS),
    }
    medians = take_turns(contestants, rounds, reading(np.ones(EVICT_BYTES, np.uint8), threads))
    mine = medians["edgekv_int8"]
    emit(
        bench="attention_decode",
        context=tokens,
        layers=LAYERS,
        threads=threads,
        us_per_layer={name: round(seconds * 1e6, 1) for name, seconds in medians.items()},
        gb_per_s=round(pages.arena.nbytes / LAYERS / mine / 1e9, 1),
        over_read=round(mine / medians["read"], 3),
        over_ort_int8=round(mine / medians["ort_gqa_int8"], 3),
        over_ort_fp32=round(mine / medians["ort_gqa_fp32"], 3),
    )


def prefill(tokens: int, chunk: int, rounds: int, threads: int) -> None:
    """A chunk of new tokens at a context of ``tokens``."""
    contestants: dict[str, Callable[[], float]] = {
        "edgekv_int8": Ours(Pages(tokens, warm=True, layers=2), chunk, threads),
        "edgekv_fp16": Ours(Pages(tokens, warm=False, layers=2), chunk, threads),
        "ort_gqa_fp32": OrtGqa(tokens, chunk, int8=False, layers=2),
        "ort_gqa_int8": OrtGqa(tokens, chunk, int8=True, layers=2),
    }
    medians = take_turns(contestants, rounds, gc.collect)
    mine = medians["edgekv_int8"]
    emit(
        bench="attention_prefill",
        context=tokens,
        chunk=chunk,
        threads=threads,
        ms_per_layer={name: round(seconds * 1e3, 2) for name, seconds in medians.items()},
        over_fp16_pages=round(mine / medians["edgekv_fp16"], 3),
        over_ort_fp32=round(mine / medians["ort_gqa_fp32"], 3),
        over_ort_int8=round(mine / medians["ort_gqa_int8"], 3),
    )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--context", type=int, action="append", help="decode contexts (default 512, 2048, 8192)")
    arguments = parser.parse_args()
    share_threads(arguments.threads)
    emit(bench="attention_setup", isa=load_kernels().isa(), threads=arguments.threads, rounds=arguments.rounds)
    if arguments.only != "prefill":
        for tokens in arguments.context or [512, 2048, 8192]:
            decode(tokens, arguments.rounds, arguments.threads)
            gc.collect()
    if arguments.only != "decode":
        prefill(8192, 256, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
