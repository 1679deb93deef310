"""A stand-in for a model: keys and values that are a function of the tokens before them, in a cache on a session.

Fast enough to try thousands of damages, and exact: what a cache holds after a restore must have the bits of a cache that
was filled with the same tokens and never left memory.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.bundle import Manifest
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.pages.cache import KVCache
from edgekv.runtime.pages.policy import CacheOptions
from edgekv.runtime.sessions.session import Session
from edgekv.runtime.sessions.steps import Steps
from edgekv.spec import ModelSpec, RopeSpec

MODEL = ModelSpec("toy", 2, 32, 4, 2, 8, 64, 1000, 4096, RopeSpec((1.0, 0.1, 0.01, 0.001)), 0.35, (0, 0))
PAGE_SIZE = 8
MANIFEST = Manifest("onnx", "split", "fp32", PAGE_SIZE, MODEL, (), "1" * 64, "2" * 64)
SPEC = MODEL.pages(PAGE_SIZE)


def some_tokens(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 1000, count).tolist()
    return tokens


def open_session(path: Path, secret: bytes | None = None, *, save: bool = True) -> Session:
    return Session.open(SessionOptions(path, secret=secret), MANIFEST, save=save)


class Chat:
    """Tokens and their cache; ``start`` is what a run would do with a prompt."""

    def __init__(self, session: Session | None, frames: int = 64) -> None:
        self.session = session
        options = CacheOptions(budget_bytes=frames * SPEC.frame_bytes)
        self.cache = KVCache(SPEC, options, load_kernels(), session.store if session is not None else None)
        self.tokens: list[int] = []

    def start(self, prompt: Sequence[int]) -> int:
        """Restore what the session has of a prompt, compute the rest; returns how much was restored."""
        assert self.session is not None
        count = self.session.restore(self.cache, [*prompt, -1]).count  # the last token is never restored
        self.tokens = list(prompt[:count])
        self.extend(prompt[count:])
        return count

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            new = keys_and_values(tuple(self.tokens))
            for layer in range(SPEC.n_layers):
                self.cache.append(layer, new[layer, 0], new[layer, 1], np.array([len(self.tokens) - 1]))

    def cut(self, count: int) -> None:
        """Go back to ``count`` tokens or a little less, as a changed history does."""
        del self.tokens[self.cache.truncate(count) :]

    def save(self, *, whole: bool = True) -> None:
        assert self.session is not None
        steps = Steps(PAGE_SIZE, range(len(self.tokens)), len(self.tokens))
        assert self.session.checkpoint(self.cache, self.tokens, [], steps, whole=whole)

    def check(self) -> None:
        """Every token has the bits that a cache in memory gives it."""
        self.cache.check()
        assert set(self.cache.table.n_slots.tolist()) == {len(self.tokens)}
        which = np.arange(len(self.tokens))
        for layer, expected in enumerate(in_memory(tuple(self.tokens))):
            for mine, right in zip(self.cache.read(layer, which), expected, strict=True):
                np.testing.assert_array_equal(mine, right)


@functools.cache
def keys_and_values(tokens: tuple[int, ...]) -> NDArray[np.float32]:
    """Of the last token, given all of them: [layers, 2, 1, heads, head_dim]."""
    digest = hashlib.blake2b(repr(tokens).encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    return rng.standard_normal((SPEC.n_layers, 2, 1, SPEC.n_kv_heads, SPEC.head_dim)).astype(np.float32)


@functools.cache
def in_memory(tokens: tuple[int, ...]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """What a cache that never left memory holds of these tokens."""
    fresh = Chat(None)
    fresh.extend(tokens)
    return [fresh.cache.read(layer, np.arange(len(tokens))) for layer in range(SPEC.n_layers)]
