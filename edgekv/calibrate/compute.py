"""Rates of this machine's cores: reading memory, multiplying matrices with ONNX Runtime, attending with our kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from edgekv.ort import onnxruntime as ort
from edgekv.runtime.engines.onnx.options import set_up
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.kernels.interface import KIND_HOT, KIND_WARM, PAGE_REF
from edgekv.spec import PageSpec

from .onnx_chain import matmul_chain

#: More than any last-level cache of a phone, board or laptop; a server's may be larger still.
READ_BYTES = 256 * 1024 * 1024
#: A chain of products like a model's: 24 matrices of 2048 x 2048.
WIDTH, PRODUCTS, CHUNK = 2048, 24, 256
#: The cache that attention is measured on, when no bundle says otherwise: 4096 tokens, 16 layers.
KV_TOKENS, KV_SPEC, Q_HEADS = 4096, PageSpec(16, 8, 64, 32), 16
REPEATS = 5


def read_bandwidth(threads: int) -> float:
    """Return the bytes/s at which so many threads merely read memory."""
    kernels = load_kernels()
    pool = kernels.ThreadPool(threads)
    array = np.ones(READ_BYTES, np.uint8)
    kernels.read_seconds(pool, array)
    return READ_BYTES / min(kernels.read_seconds(pool, array) for _ in range(REPEATS))


def matrix_rates(bits: int, threads: int) -> tuple[float, float]:
    """Return the bytes/s at which one token reads weights of so many bits, and the ops/s of a chunk of 256 tokens."""
    layers = PRODUCTS if bits < 32 else PRODUCTS // 4
    options = set_up(bits == 4, threads, own_process=False).options
    session = ort.InferenceSession(matmul_chain(WIDTH, layers, bits), options, providers=["CPUExecutionProvider"])

    def seconds(rows: int) -> float:
        x = np.ones((rows, WIDTH), np.float32)
        return _median(lambda: session.run(None, {"x0": x}))

    scales = 0.0 if bits == 32 else 1.0
    read = layers * WIDTH * WIDTH * (bits + scales) / 8
    return read / seconds(1), 2.0 * CHUNK * layers * WIDTH * WIDTH / seconds(CHUNK)


def attention_rates(
    threads: int, spec: PageSpec = KV_SPEC, n_q_heads: int = Q_HEADS, *, kind: int = KIND_WARM
) -> tuple[float, float]:
    """Return the bytes/s at which a token reads pages, and the ops/s of a chunk that attends to them.

    Args:
        kind: of the pages: KIND_WARM (INT8) or KIND_HOT (fp16).
    """
    kernels = load_kernels()
    n_pages, layers = KV_TOKENS // spec.page_size, spec.n_layers
    page_bytes, stride = (
        (spec.hot_bytes, spec.frame_bytes) if kind == KIND_HOT else (spec.warm_bytes, spec.warm_slot_bytes)
    )
    rng = np.random.default_rng(0)
    memory = np.empty(layers * n_pages * stride + 64, np.uint8)
    arena = memory[-memory.ctypes.data % 64 :][: layers * n_pages * stride].reshape(-1, stride)
    arena[:] = rng.integers(0, 256, stride, np.uint8)
    arena[:, 0 if kind == KIND_HOT else 2 * spec.elements : page_bytes].view(np.float16)[:] = 0.01
    refs = np.zeros((layers, n_pages), PAGE_REF)
    addresses = np.arange(layers * n_pages, dtype=np.uint64) * np.uint64(stride) + np.uint64(arena.ctypes.data)
    refs["data"] = rng.permutation(addresses).reshape(layers, n_pages)
    refs["mask"] = np.uint64(2**64 - 1)
    refs["position"] = np.arange(n_pages) * spec.page_size
    refs["n_slots"], refs["kind"] = spec.page_size, kind
    attention = kernels.Attention(
        kernels.ThreadPool(threads), n_q_heads, spec.n_kv_heads, spec.head_dim, spec.page_size, spec.head_dim**-0.5,
        max_tokens=CHUNK,
    )  # fmt: skip

    def seconds(n_tokens: int, n_layers: int) -> float:
        q = rng.standard_normal((n_tokens, n_q_heads, spec.head_dim), np.float32)
        k = rng.standard_normal((n_tokens, spec.n_kv_heads, spec.head_dim), np.float32)
        out, positions = np.empty_like(q), np.arange(n_tokens) + KV_TOKENS

        def attend() -> None:
            for layer in range(n_layers):
                attention.run(q, k, k, positions, refs[layer], out)

        return _median(attend)

    read = layers * n_pages * page_bytes / seconds(1, layers)
    pairs = CHUNK * KV_TOKENS + CHUNK * (CHUNK + 1) / 2
    few = min(4, layers)
    return read, 4.0 * few * n_q_heads * spec.head_dim * pairs / seconds(CHUNK, few)


def _median(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
