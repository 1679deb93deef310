"""One pool of threads, several callers."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.runtime.kernels.test_attention_kernels import ISAS, NATIVE, Case, needs_native

ROOT = Path(__file__).resolve().parents[3]


@needs_native
def test_several_threads_may_share_a_pool() -> None:
    assert NATIVE is not None
    case = Case(n_kv_heads=8, n_pages=64, seed=13)
    want, _ = case.result(ISAS[0])
    pool = NATIVE.ThreadPool(2)

    def repeat(_: int) -> bool:
        attention = NATIVE.Attention(pool, 16, 8, 64, 32, case.scale)
        out = np.empty_like(case.q)
        for _ in range(50):
            attention.run(case.q, case.k, case.v, case.positions, case.refs, out)
            if not np.array_equal(out, want):
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(repeat, range(4)))


@needs_native
def test_a_pool_on_the_threads_of_onnx_runtime_gives_the_same_bits() -> None:
    """In a process of its own: ONNX Runtime's global pool can be set once."""
    code = """
import numpy as np
from edgekv.runtime.engines.onnx.options import lend_threads, share_threads
from tests.runtime.kernels.test_attention_kernels import NATIVE, Case

assert not lend_threads(), "there is no pool to lend from"
share_threads(2)
share_threads(3)  # the first one stays
executor = lend_threads()
assert executor, "ONNX Runtime lends no threads"
case = Case(n_kv_heads=8, n_pages=64, seed=13)
results = []
for pool in (NATIVE.ThreadPool(2), NATIVE.ThreadPool(2, executor)):
    attention = NATIVE.Attention(pool, 16, 8, 64, 32, case.scale)
    out = np.empty_like(case.q)
    for _ in range(50):
        attention.run(case.q, case.k, case.v, case.positions, case.refs, out)
    results.append(out)
assert np.array_equal(*results)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@needs_native
def test_a_pool_does_its_work_alone_where_the_lender_cannot() -> None:
    """An executor that refuses: the calling thread does everything."""
    assert NATIVE is not None
    refusals = []
    signature = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

    def refuse(task: int, context: int, count: int) -> bool:
        refusals.append(count)
        return False

    executor = signature(refuse)
    case = Case(n_kv_heads=8, n_pages=64, seed=13)
    want, _ = case.result(ISAS[0])
    attention = NATIVE.Attention(
        NATIVE.ThreadPool(2, ctypes.cast(executor, ctypes.c_void_p).value or 0), 16, 8, 64, 32, case.scale
    )
    out = np.empty_like(case.q)
    attention.run(case.q, case.k, case.v, case.positions, case.refs, out)
    assert refusals
    assert np.array_equal(out, want)
