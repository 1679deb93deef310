"""Runs an inline bundle without edgekv: docs/contract.md as a program. NumPy and ONNX Runtime.

What it computes has the bits of ``edgekv run``, and so have the sessions that it saves (:mod:`session_files`).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from session_files import Array, SealedPage, Session, compatibility_key, shape_of

PREFILL_STEP = 256


class Driver:
    """A bundle and the cache of one sequence, which a session may have begun.

    Args:
        options: of ONNX Runtime.
    """

    def __init__(self, bundle: Path, session: Session | None = None, options: Any = None) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        assert (manifest["engine"], manifest["form"], manifest["contract_version"]) == ("onnx", "inline", 2)
        self.shape, self.windows = shape_of(manifest), manifest["model"]["windows"]
        self._graph = ort.InferenceSession(bundle / manifest["graphs"][0], options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._graph.get_outputs()]
        key = compatibility_key(manifest)
        self.session = session or Session(key, self.shape)
        assert self.session.key == key, "the session is of another model"
        self._ends = list(itertools.accumulate(n for n, count in _pairs(self.session.steps) for n in [n] * count))
        self._pruned = {at for start, stop in _pairs(self.session.pruned) for at in range(start, stop)}
        self._keys, self._values = self._open_page()

    def _open_page(self) -> tuple[list[Array], list[Array]]:
        """Return the keys and the values of the open page, per layer [R, n_kv_heads, head_dim] float16."""
        session, shape = self.session, self.shape
        sealed = len(session.pages) * shape.page_size
        inside = session.n_kv - sealed
        if session.open_keys is not None and session.open_values is not None:
            keys, values = (
                [part[:, :inside].swapaxes(0, 1) for part in parts]
                for parts in (session.open_keys, session.open_values)
            )
            return keys, values
        if not self._pruned.issuperset(range(sealed, session.n_kv)):  # not stored: its tokens are computed again
            session.n_kv, inside = sealed, 0
        nothing = np.zeros((inside, shape.n_kv_heads, shape.head_dim), np.float16)
        return [nothing] * shape.n_layers, [nothing] * shape.n_layers

    def read(self, tokens: list[int]) -> Array:
        """Add tokens to the sequence and compute all that have no keys and values; return the logits after the last one."""
        session = self.session
        session.tokens += tokens
        logits = np.empty(0, np.float32)
        while session.n_kv < len(session.tokens):
            again = next((end for end in self._ends if end > session.n_kv), None)
            stop = min(again or (session.n_kv // PREFILL_STEP + 1) * PREFILL_STEP, len(session.tokens))
            start = session.n_kv
            logits = self._compute(stop)
            if stop not in self._ends:
                self._ends = [end for end in self._ends if end <= start] + [stop]
        return logits

    def generate(self, logits: Array, count: int) -> list[int]:
        """Choose ``count`` tokens greedily; the last one gets no keys and values yet."""
        chosen: list[int] = []
        for left in reversed(range(count)):
            chosen.append(int(np.argmax(logits)))
            if left:
                logits = self.read(chosen[-1:])
        self.session.tokens += chosen[-1:]
        return chosen

    def save(self) -> Session:
        """Return the session, with the page that is not full."""
        session, shape = self.session, self.shape
        whole = (shape.n_layers, shape.n_kv_heads, shape.page_size, shape.head_dim)
        keys, values = np.zeros(whole, np.float16), np.zeros(whole, np.float16)
        inside = session.n_kv % shape.page_size
        for layer in range(shape.n_layers):
            keys[layer, :, :inside] = self._keys[layer].swapaxes(0, 1)
            values[layer, :, :inside] = self._values[layer].swapaxes(0, 1)
        session.open_keys, session.open_values = (keys, values) if inside else (None, None)
        lengths = [stop - start for start, stop in itertools.pairwise([0, *self._ends])]
        session.steps = [number for n, run in itertools.groupby(lengths) for number in (n, len(list(run)))]
        return session

    def _compute(self, stop: int) -> Array:
        """Compute the tokens up to position ``stop`` in one call; return the logits after the last of them [vocab]."""
        session, start, size = self.session, self.session.n_kv, self.shape.page_size
        feeds: dict[str, Array] = {
            "input_ids": np.array(session.tokens[start:stop], np.int64),
            "position_ids": np.arange(start, stop),
            "logits_rows": np.array([stop - start - 1]),
        }
        for layer in range(self.shape.n_layers):
            feeds |= self._cache(layer)
        got = dict(zip(self._outputs, self._graph.run(self._outputs, feeds), strict=True))
        sealed: list[list[SealedPage]] = []
        for layer in range(self.shape.n_layers):
            keys = np.concatenate([self._keys[layer], _half(got[f"new_keys.{layer}"])])
            values = np.concatenate([self._values[layer], _half(got[f"new_values.{layer}"])])
            count = len(keys) // size * size
            pages = [slice(at, at + size) for at in range(0, count, size)]
            sealed.append([SealedPage.quantise(keys[page], values[page]) for page in pages])
            self._keys[layer], self._values[layer] = keys[count:], values[count:]
        session.pages += [list(layers) for layers in zip(*sealed, strict=True)]
        session.n_kv = stop
        logits: Array = got["logits"][0]
        return logits

    def _cache(self, layer: int) -> dict[str, Array]:
        """Return the inputs that hold the cache of a layer: the pages that somebody still sees, and the open page whole."""
        heads, dim, size = self.shape.n_kv_heads, self.shape.head_dim, self.shape.page_size
        sealed, n_kv, window = len(self.session.pages) * size, self.session.n_kv, self.windows[layer]
        first = max(0, n_kv - window + 1) // size if window else 0
        held = [(at, page[layer]) for at, page in enumerate(self.session.pages) if page and at >= first]
        opened = -(-(n_kv - sealed) // size) * size  # slots of the open page: all of them or none
        if self._pruned.issuperset(range(sealed, n_kv)):
            opened = 0

        def stacked(parts: list[Array], kind: type, *shape: int) -> Array:
            return np.ascontiguousarray(np.array(parts, kind).reshape(len(held), *shape))

        def whole(recent: Array) -> Array:
            slots = np.zeros((opened, heads, dim), np.float16)
            slots[: len(recent)] = recent[:opened]
            return slots

        return {
            f"key_pages.{layer}": stacked([page.key_codes for _, page in held], np.int8, heads, dim, size),
            f"key_scales.{layer}": stacked([page.key_scales for _, page in held], np.float16, heads, dim),
            f"value_pages.{layer}": stacked([page.value_codes for _, page in held], np.int8, heads, size, dim),
            f"value_scales.{layer}": stacked([page.value_scales for _, page in held], np.float16, heads, size),
            f"page_positions.{layer}": stacked([self._positions(at * size, size) for at, _ in held], np.int64, size),
            f"recent_keys.{layer}": whole(self._keys[layer]),
            f"recent_values.{layer}": whole(self._values[layer]),
            f"recent_positions.{layer}": self._positions(sealed, opened),
        }

    def _positions(self, start: int, count: int) -> Array:
        there = (at if at < self.session.n_kv and at not in self._pruned else -1 for at in range(start, start + count))
        return np.fromiter(there, np.int64, count)


def _pairs(numbers: list[int]) -> Any:
    return zip(numbers[::2], numbers[1::2], strict=True)


def _half(x: Array) -> Array:
    return np.clip(x, -65504, 65504).astype(np.float16)
