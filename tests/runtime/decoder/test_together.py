"""Whether several rows at once save time, on an engine whose time is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from edgekv.bundle import read_manifest
from edgekv.runtime.decoder.together import rows_pay
from edgekv.runtime.engines.executorch.blocks import allocate


class Engine:
    """Takes so many seconds for the rows of a layer."""

    def __init__(self, model: Any, seconds: Callable[[int], float]) -> None:
        self._model, self._seconds = model, seconds

    def prepare(self, n_tokens: int) -> Any:
        return allocate(self._model, n_tokens)

    def run(self, index: int, buffers: Any) -> None:
        time.sleep(self._seconds(len(buffers.attention)))

    def head(self, residual: Any, attention: Any) -> Any:
        return residual


@pytest.mark.parametrize(
    ("seconds", "pay"),
    [
        (lambda rows: 0.01, True),  # memory is what is waited for
        (lambda rows: 0.01 if rows == 1 else 0.1, False),  # a block of many rows is computed for few
        (lambda rows: 0.05 if rows == 2 else 0.01, False),  # two are dear, three are not
    ],
)
def test_rows_pay_where_two_and_all_of_them_take_less_time_than_one_by_one(
    bundle: Callable[..., Any], seconds: Callable[[int], float], pay: bool
) -> None:
    model = read_manifest(bundle("demo")).model
    engine: Any = Engine(model, seconds)
    assert rows_pay(engine, model, 3) is pay
