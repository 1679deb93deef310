"""Every form of a bundle on a device: the tokens of the plain run, and a time that grows with what is read."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.emulator import Device, Link
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.tiers import KVMode

PROMPT = [*range(2, 250), *range(3, 200)]
needs_executorch = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("executorch", "torchao")),
    reason="the extra `executorch` is not installed",
)


@pytest.mark.parametrize(
    ("engine", "form"),
    [
        pytest.param("onnx", "inline", marks=pytest.mark.slow),
        pytest.param("executorch", "split", marks=[needs_executorch, pytest.mark.slow]),
        pytest.param("executorch", "inline", marks=[needs_executorch, pytest.mark.slow]),
    ],
)
def test_a_device_changes_time_and_no_token_of_any_engine_and_form(
    engine: str, form: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = bundle("demo", engine=engine, form=form)
    options = RunOptions(prefixes=False, context=512, kv=KVMode.INT8, offload=tmp_path)
    with Generator.open(folder, options) as plain:
        expected = list(plain.tokens(PROMPT, max_tokens=12))
    seconds, tokens = [], []
    for app_limit in ("2GB", "1.2GB"):  # what one grants more than the other does not change what is computed
        with Device("android-low-4gb", app_limit=app_limit) as device, device.open(folder, options) as generator:
            tokens.append(list(generator.tokens(PROMPT, max_tokens=12)))
            seconds.append(generator.report().decode_seconds)
    assert tokens == [expected, expected]
    assert seconds[0] == seconds[1] > 0
    with Device("android-low-4gb") as device, device.open(folder, options) as generator:
        list(generator.tokens(PROMPT[:60], max_tokens=12))
        assert 0 < generator.report().decode_seconds < seconds[0]


def test_pages_in_an_object_store_take_the_time_of_the_way_to_it(tiny: Path) -> None:
    def emulated(offload: str | Path | None, link: Link | None = None) -> tuple[list[int], float, int]:
        with (
            Device("android-low-4gb", link=link) as phone,
            phone.open(tiny, kv_budget="30%", context=512, offload=offload) as generator,
        ):
            tokens = list(generator.tokens(PROMPT, max_tokens=12))
            report = generator.report()
            return tokens, report.decode_seconds, report.remote_bytes_read

    flash, near, far = emulated(None), emulated("memory://", Link()), emulated("memory://", Link(0.3, 1e6, 1e6))
    assert flash[0] == near[0] == far[0]
    assert flash[2] == 0 < near[2] == far[2]
    assert flash[1] < near[1] < far[1]
    assert far[1] > far[2] / 1e6  # all bytes over a link of 1 MB/s, at the least
    assert emulated("memory://", Link()) == near
