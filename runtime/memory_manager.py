"""The memory manager as a library: a paged, budgeted cache of keys and values for any decoder.

    manager = MemoryManager(max_memory_mb=512)
    manager.initialize_kv_cache({"num_layers": 24, "num_kv_heads": 8, "head_dim": 64})
    manager.add_to_kv_cache(layer_idx=0, key=k, value=v, token_indices=[0, 1, 2])
    keys, values = manager.get_from_kv_cache(layer_idx=0, token_indices=[1, 2])

It is the page manager of the runtime, with names for people. It takes NumPy arrays and torch tensors, without
importing torch.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import UsageError
from edgekv.model_config import read_cache_shape
from edgekv.schema import shown
from edgekv.scratch import ScratchFolder
from edgekv.settings import (
    ALLOW_DROP,
    MAX_MEMORY_MB,
    MAX_WRITE_PER_DAY,
    MEMORY_THRESHOLD_PERCENT,
    N_PAGES,
    OFFLOAD_DIR,
    PAGE_SIZE,
    QUANTIZATION_ENABLED,
    TOKEN_INDEX,
    Whole,
    whole_numbers,
)
from edgekv.spec import PageSpec

from .kernels.choose import load_kernels
from .pages.cache import KVCache
from .pages.policy import CacheOptions, make_policy
from .storage.flash import FlashStore
from .storage.interface import PageStore
from .storage.open import OffloadOptions, open_offload
from .system.lifetime import when_gone

Float = NDArray[np.float32]
P = ParamSpec("P")
T = TypeVar("T")


def _one_thread(method: Callable[Concatenate[MemoryManager, P], T]) -> Callable[Concatenate[MemoryManager, P], T]:
    """Make a method refuse a second thread, before it touches anything."""

    @functools.wraps(method)
    def alone(self: MemoryManager, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if not self._lock.acquire(blocking=False):
            raise UsageError("another thread is using this memory manager; let them take turns, or give each its own")
        try:
            return method(self, *args, **kwargs)
        finally:
            self._lock.release()

    return alone


class MemoryManager:
    """Keys and values of one sequence inside ``max_memory_mb``; one thread at a time may use it (a second one gets a UsageError).

    Args:
        max_memory_mb: the budget for pages in RAM, in MiB; allocated once.
        page_size: tokens per page, a multiple of 4 up to 128.
        quantization_enabled: compress pages to INT8 when memory runs short. Without it pages leave RAM only
            through ``compress_pages`` or dropping.
        memory_threshold_percent: share of the budget above which pages are compressed, then offloaded, then,
            only with ``allow_drop``, dropped.
        offload_dir: folder for pages that do not fit; None uses a private temporary file.
        allow_drop: let pages be forgotten when nothing else helps. Reading their tokens is a clear error.
        policy: who goes first: ``lru``, ``heavy``, ``window`` or ``random``.
        max_write_per_day: bytes, or ``"2GB"``, that all who use ``offload_dir`` may write there in a day.

    Raises:
        UsageError: an argument has another type or is out of the range in :mod:`edgekv.settings`.
    """

    def __init__(
        self,
        max_memory_mb: float = 512,
        page_size: int = 16,
        quantization_enabled: bool = True,
        memory_threshold_percent: float = 90,
        *,
        offload_dir: str | Path | None = None,
        allow_drop: bool = False,
        policy: str = "lru",
        max_write_per_day: int | str | None = None,
    ) -> None:
        self._lock = threading.RLock()
        self.page_size = PAGE_SIZE.check(page_size)
        self._options = CacheOptions(
            budget_bytes=int(MAX_MEMORY_MB.check(max_memory_mb) * 1024 * 1024),
            compress_at_seal=False,
            compress=QUANTIZATION_ENABLED.check(quantization_enabled),
            allow_drop=ALLOW_DROP.check(allow_drop),
            threshold=MEMORY_THRESHOLD_PERCENT.check(memory_threshold_percent) / 100,
            policy=make_policy(policy),
            merge_layers=None,
        )
        if max_write_per_day is not None and offload_dir is None:
            raise UsageError("max_write_per_day counts what goes to a folder over time; give offload_dir with it")
        self._offload_dir = OFFLOAD_DIR.optional(offload_dir)
        self._max_write_per_day = MAX_WRITE_PER_DAY.optional(max_write_per_day)
        self._cache: KVCache | None = None
        self._store: PageStore | None = None

    @_one_thread
    def initialize_kv_cache(self, model_config: Mapping[str, Any] | object) -> None:
        """Allocate the cache for a model; what the manager held before is gone.

        Args:
            model_config: a Hugging Face configuration, as an object or as what its config.json holds, also of a model that
                sees or hears besides; or a mapping with ``num_layers``, ``num_kv_heads`` and ``head_dim``.

        Raises:
            UsageError: the configuration lacks a number, or keys and values of the model are not of one size; the message
                names the key. BudgetError: the budget is too small for this shape.
            StoreError: the offload folder cannot be used.
        """
        shape = read_cache_shape(model_config)
        spec = PageSpec(shape.n_layers, shape.n_kv_heads, shape.head_dim, self.page_size)
        self.close()
        if self._options.compress:
            self._store = self._open_store(spec)
            self._forgotten = when_gone(self, self._store.close)
        try:
            self._cache = KVCache(spec, self._options, load_kernels(), self._store)
        except BaseException:
            self.close()
            raise

    def _open_store(self, spec: PageSpec) -> PageStore:
        if self._offload_dir is None:
            scratch = ScratchFolder(None, "edgekv-")
            return FlashStore(scratch.path, spec, scratch=scratch)
        return open_offload(OffloadOptions(self._offload_dir, max_write_per_day=self._max_write_per_day), spec)

    @property
    def cache(self) -> KVCache:
        """The page manager underneath.

        Raises:
            UsageError: ``initialize_kv_cache`` was not called.
        """
        if self._cache is None:
            raise UsageError("the cache has no shape yet; call initialize_kv_cache(model_config) first")
        return self._cache

    @_one_thread
    def add_to_kv_cache(self, *, layer_idx: int, key: Any, value: Any, token_indices: Sequence[int]) -> None:
        """Add tokens to one layer.

        Args:
            layer_idx: 0 .. number of layers - 1.
            key, value: [len(token_indices), n_kv_heads, head_dim], array or tensor, any float dtype; kept as fp16.
            token_indices: which tokens these are: any numbers >= 0 that the layer does not hold yet.

        Raises:
            UsageError: a wrong layer, shape or token. KeysOverflow: a value is beyond fp16. OutOfPages, StoreError: no room. In
                each case nothing was added.
        """
        cache = self.cache
        tokens = self._tokens(token_indices)
        self._check_layer(layer_idx)
        shape = (tokens.size, cache.spec.n_kv_heads, cache.spec.head_dim)
        keys, values = _as_float32(key, "key", shape), _as_float32(value, "value", shape)
        if np.unique(tokens).size != tokens.size:
            raise UsageError("token_indices names a token twice")
        known = cache.table.holds(layer_idx, tokens)
        if known.any():
            raise UsageError(
                f"token {int(tokens[known][0])} is in layer {layer_idx} already; a cached token never changes"
            )
        cache.manager.step += 1
        cache.append(layer_idx, keys, values, tokens)

    @_one_thread
    def get_from_kv_cache(self, *, layer_idx: int, token_indices: Sequence[int]) -> tuple[Float, Float]:
        """Return keys and values of tokens; pages are fetched and dequantised as needed.

        Returns:
            keys and values [len(token_indices), n_kv_heads, head_dim] float32, in the order asked for.

        Raises:
            TokenDropped, TokenPruned, TokenNotFound: the error names the token. CorruptPage, StoreError: its page
                cannot be read.
        """
        self._check_layer(layer_idx)
        self.cache.manager.step += 1
        return self.cache.read(layer_idx, self._tokens(token_indices))

    @_one_thread
    def remove_pruned_tokens(self, token_indices: Sequence[int]) -> int:
        """Remove tokens from all layers; a page whose tokens are all gone is freed at once, in every tier.

        Returns:
            how many tokens were removed, counted per layer.

        Raises:
            TokenNotFound: a token was never added. Nothing changed.
        """
        return self.cache.prune(self._tokens(token_indices))

    @_one_thread
    def compress_pages(self, n_pages: int = 1) -> int:
        """Compress up to ``n_pages`` full fp16 pages to INT8 now; returns how many."""
        return self.cache.manager.compress(N_PAGES.check(n_pages))

    @_one_thread
    def offload_pages(self, n_pages: int = 1) -> int:
        """Move up to ``n_pages`` INT8 pages to the offload folder now; returns how many."""
        return self.cache.manager.offload(N_PAGES.check(n_pages))

    @_one_thread
    def locate(self, *, layer_idx: int, token_index: int) -> dict[str, Any]:
        """Say where a token is: page, slot, tier, and which tokens share its page.

        Raises:
            TokenPruned, TokenNotFound: it is nowhere.
        """
        self._check_layer(layer_idx)
        table, size = self.cache.table, self.page_size
        tokens = self._tokens([TOKEN_INDEX.check(token_index)])
        slot = int(table.find(layer_idx, tokens)[0])
        held = table.tokens[layer_idx, slot // size * size : (slot // size + 1) * size]
        tier = int(table.tier[layer_idx, slot // size])
        return {
            "page": slot // size,
            "slot": slot % size,
            "tier": _TIER_NAMES[tier],
            "tokens": [int(token) for token in held if token >= 0],
        }

    @_one_thread
    def get_stats(self) -> dict[str, Any]:
        """Return tokens, budget, bytes and pages by tier, and what was moved so far, as plain data."""
        stats = {**asdict(self.cache.use()), **asdict(self.cache.manager.counters)}
        stats["bytes_in_memory"] = stats["arena_bytes"]
        stats["bytes_written"] = self._store.counters.bytes_written if self._store else 0
        stats["bytes_read"] = self._store.counters.bytes_read if self._store else 0
        return stats

    @_one_thread
    def close(self) -> None:
        """Free the cache and its files. The manager can be initialised again."""
        self._cache = None
        if self._store is not None:
            self._forgotten()
            self._store = None

    def __enter__(self) -> MemoryManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_layer(self, layer: int) -> None:
        Whole("layer_idx", 0, self.cache.spec.n_layers - 1).check(layer)

    @staticmethod
    def _tokens(token_indices: Sequence[int]) -> NDArray[np.int64]:
        return whole_numbers(token_indices, "token_indices", most=2**31 - 1)


_TIER_NAMES = ("HOT", "WARM", "COLD", "REMOTE", "DROPPED", "FREE")


def _as_float32(array: Any, name: str, shape: tuple[int, int, int]) -> Float:
    if hasattr(array, "detach"):  # a torch tensor; bfloat16 has no NumPy twin, so it becomes float first
        array = array.detach().cpu().float().numpy()
    try:
        given = np.asarray(array)
        if given.dtype.kind in "bcmMOSU":  # NumPy would drop an imaginary part, and read a text as a number
            raise TypeError(given.dtype)
        result = np.ascontiguousarray(given, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} must be an array of real numbers, not {shown(array)}") from error
    if result.shape != shape:
        raise UsageError(f"{name} has shape {result.shape}; expected {shape}: tokens, KV heads, head size")
    if not np.isfinite(result).all():
        raise UsageError(f"{name} holds a value that is not finite")
    return result
