"""Every argument of the public classes with values that make no sense: one error of the project, and the object goes on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv import Generator, MemoryManager
from edgekv.emulator import Device
from edgekv.errors import EdgeKVError
from edgekv.runtime.machine import HOST
from edgekv.runtime.options import RunOptions, SessionOptions
from edgekv.runtime.sampling import SamplingOptions

Bundle = Callable[..., Path]
SILLY: list[Any] = [
    None, math.nan, math.inf, -1, 0.7, 10**30, True, "", "nan", "\udcff", "-5%", "1e999", b"\xff", [], [None], [0.5], [-1],
    [10**9], ["a"], {}, {"a": 1}, object(), np.array([[1.5]]), np.float32("nan"), Path("x" * 300), 3 + 4j, len, "9" * 5000,
]  # fmt: skip
#: What makes a call right but for the argument that is silly; classes that are made, and methods of the two that live long.
GOOD: dict[str, dict[str, Any]] = {
    "stream": {"prompt": "It", "max_tokens": 2},
    "tokens": {"prompt": [5], "max_tokens": 2},
    "prefill": {"prompt": [5], "max_tokens": 2},
    "step": {"tokens": [5]},
    "score": {"tokens": [5]},
    "prepare": {"prompt_tokens": 5, "max_tokens": 2},
    "set_budget": {"kv_budget": "100%"},
    "on_pressure": {"level": "none"},
    "fork": {"options": RunOptions()},
    "go_back": {"sequence": [5]},
    "add_to_kv_cache": {
        "layer_idx": 0,
        "key": np.zeros((1, 2, 32)),
        "value": np.zeros((1, 2, 32)),
        "token_indices": [0],
    },
    "get_from_kv_cache": {"layer_idx": 0, "token_indices": [1]},
    "remove_pruned_tokens": {"token_indices": [1]},
    "compress_pages": {"n_pages": 1},
    "offload_pages": {"n_pages": 1},
    "locate": {"layer_idx": 0, "token_index": 1},
}
GOOD_TEXT: dict[str, dict[str, Any]] = {
    "encode": {"text": "It"},
    "encode_behind": {"tokens": [5], "text": " is"},
    "encode_chat": {"messages": [{"role": "user", "content": "Hi"}], "tools": None},
    "decode": {"tokens": [5]},
}


def calls(function: Callable[..., Any], good: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in inspect.signature(function).parameters:
        if name not in ("self", "progress", "link", "profile"):
            yield from ((name, {**good, name: value}) for value in SILLY)


def faults(function: Callable[..., Any], good: dict[str, Any]) -> list[str]:
    found = []
    for name, arguments in calls(function, good):
        try:
            result = function(**arguments)
            if inspect.isgenerator(result):
                list(result)
        except EdgeKVError as error:
            if "\n" in str(error):
                found.append(f"{name}={arguments[name]!r}: {error}")
        except Exception as error:
            found.append(f"{name}={arguments[name]!r}: {type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("kind", [RunOptions, SamplingOptions, MemoryManager])
def test_options_are_made_or_refused(kind: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert faults(kind, {}) == []


def test_the_options_of_a_session_are_made_or_refused(tmp_path: Path) -> None:
    assert faults(SessionOptions, {"path": tmp_path}) == []


def test_a_device_is_made_or_refused() -> None:
    assert (
        faults(
            lambda app_limit, seed: Device("laptop-16gb", app_limit=app_limit, seed=seed),
            {"app_limit": 10**9, "seed": 0},
        )
        == []
    )


@pytest.mark.parametrize("name", [name for name in GOOD if hasattr(Generator, name)])
def test_a_generator_refuses_and_goes_on(name: str, bundle: Bundle) -> None:
    with Generator.open(bundle("demo"), RunOptions(threads=2, context=64)) as generator:
        expected = list(generator.tokens([5, 6], max_tokens=3))
        assert faults(getattr(generator, name), GOOD[name]) == []
        assert list(generator.tokens([5, 6], max_tokens=3)) == expected


def test_a_bundle_is_opened_or_refused(bundle: Bundle) -> None:
    def open_and_close(folder: Any, options: Any, machine: Any) -> None:
        Generator.open(folder, options, machine).close()

    assert faults(open_and_close, {"folder": bundle("demo"), "options": RunOptions(), "machine": HOST}) == []


@pytest.mark.parametrize("name", GOOD_TEXT)
def test_a_tokenizer_takes_or_refuses(name: str, bundle: Bundle) -> None:
    with Generator.open(bundle("demo")) as generator:
        assert faults(getattr(generator.text, name), GOOD_TEXT[name]) == []


@pytest.mark.parametrize("name", [name for name in GOOD if hasattr(MemoryManager, name)])
def test_a_memory_manager_refuses_and_goes_on(name: str) -> None:
    with MemoryManager(max_memory_mb=4) as manager:
        manager.initialize_kv_cache({"num_layers": 2, "num_kv_heads": 2, "head_dim": 32})
        manager.add_to_kv_cache(layer_idx=1, key=np.ones((1, 2, 32)), value=np.ones((1, 2, 32)), token_indices=[7])
        assert faults(getattr(manager, name), GOOD[name]) == []
        assert manager.get_from_kv_cache(layer_idx=1, token_indices=[7])[0].mean() == 1
