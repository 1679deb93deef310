"""One pool of threads, several callers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tests.runtime.test_kernels_attention import ISAS, NATIVE, Case, needs_native


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
