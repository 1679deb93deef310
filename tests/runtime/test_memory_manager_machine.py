"""Random sequences of everything that a memory manager can do, against a plain dictionary."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgekv.errors import BudgetError, OutOfPages, TokenDropped, TokenNotFound, TokenPruned
from edgekv.runtime.memory_manager import MemoryManager
from edgekv.spec import PageSpec
from edgekv.tiers import Tier
from tests.runtime.pages.oracle import DictCache

LAYERS, HEADS, DIM = 2, 2, 8
#: Values are in [-1, 1]: half of the largest INT8 scale, plus fp16 rounding of value and scale.
TOLERANCE = 0.5 / 127 * 1.002 + 2 * 2.0**-11


class MemoryManagerMachine(RuleBasedStateMachine):
    """Never over budget, never a wrong value, never a lost or resurrected token."""

    @initialize(
        page_size=st.sampled_from([4, 8, 16]),
        frames=st.integers(LAYERS + 1, 14),
        threshold=st.sampled_from([50, 90, 100]),
        policy=st.sampled_from(["lru", "heavy", "window", "random"]),
        allow_drop=st.booleans(),
        quantise=st.booleans(),
    )
    def start(self, page_size: int, frames: int, threshold: int, policy: str, allow_drop: bool, quantise: bool) -> None:
        self.spec = PageSpec(LAYERS, HEADS, DIM, page_size)
        self.manager = MemoryManager(
            max_memory_mb=frames * self.spec.frame_bytes / 2**20,
            page_size=page_size,
            quantization_enabled=quantise,
            memory_threshold_percent=threshold,
            allow_drop=allow_drop,
            policy=policy,
        )
        self.manager.initialize_kv_cache({"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM})
        self.budget = frames * self.spec.frame_bytes
        self.allow_drop = allow_drop
        self.oracle = DictCache(LAYERS)
        self.random = np.random.default_rng(0)

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.manager.close()

    def note_drops(self) -> None:
        """Reclaim chooses what to drop; take its word once, and hold it to it from then on."""
        table = self.manager.cache.table
        for layer in range(LAYERS):
            for token in set(self.oracle.held[layer]) - self.oracle.dropped[layer]:
                slot = table.find(layer, np.array([token]))[0]
                if table.tier[layer, slot // self.spec.page_size] == Tier.DROPPED:
                    self.oracle.dropped[layer].add(token)

    @rule(
        layers=st.sampled_from([(0, 1), (0,), (1,)]),
        tokens=st.lists(st.integers(0, 300), min_size=1, max_size=40, unique=True),
    )
    def add(self, layers: tuple[int, ...], tokens: list[int]) -> None:
        for layer in layers:
            fresh = [token for token in tokens if token not in self.oracle.held[layer]]
            if not fresh:
                continue
            keys, values = self.random.uniform(-1, 1, (2, len(fresh), HEADS, DIM)).astype(np.float32)
            try:
                self.manager.add_to_kv_cache(layer_idx=layer, key=keys, value=values, token_indices=fresh)
            except OutOfPages:
                assert not self.allow_drop or self.pinned_fill()
                # Slots of a refused append may stay empty, but none of its tokens is there.
                held = int(self.manager.cache.table.n_slots[layer])
                self.oracle.slots[layer] += [None] * (held - len(self.oracle.slots[layer]))
                continue
            finally:
                self.note_drops()
            self.oracle.add(layer, fresh, keys, values)

    def pinned_fill(self) -> bool:
        """True when sinks, recent and open pages alone can fill the arena, so that nothing may be dropped."""
        return self.manager.cache.manager.arena.n_frames <= LAYERS * 5

    @rule(layer=st.integers(0, LAYERS - 1), data=st.data())
    def get(self, layer: int, data: st.DataObject) -> None:
        held = self.oracle.held[layer]
        if not held:
            return
        tokens = data.draw(st.lists(st.sampled_from(sorted(held)), min_size=1, max_size=20))
        gone = [token for token in tokens if token in self.oracle.dropped[layer]]
        if gone:
            with pytest.raises(TokenDropped, match=rf"token {gone[0]} "):
                self.manager.get_from_kv_cache(layer_idx=layer, token_indices=tokens)
            return
        try:
            keys, values = self.manager.get_from_kv_cache(layer_idx=layer, token_indices=tokens)
        except (OutOfPages, TokenDropped) as error:
            # Fetching one page may, where dropping is allowed, drop another one that was asked for too.
            self.note_drops()
            if isinstance(error, TokenDropped):
                named = int(re.findall(r"\d+", str(error))[0])
                assert named in self.oracle.dropped[layer]
            return
        self.note_drops()
        np.testing.assert_allclose(keys, np.stack([held[token][0] for token in tokens]), atol=self.tolerance(), rtol=0)
        np.testing.assert_allclose(
            values, np.stack([held[token][1] for token in tokens]), atol=self.tolerance(), rtol=0
        )

    def tolerance(self) -> float:
        """Each merge may quantise a token once more."""
        return TOLERANCE * (1 + self.manager.cache.manager.counters.pages_merged)

    @rule(layer=st.integers(0, LAYERS - 1), keep=st.integers(2, 8))
    def prune_most(self, layer: int, keep: int) -> None:
        """Leave every ``keep``-th token of a layer, so that pages are merged."""
        self.prune([token for index, token in enumerate(self.oracle.held[layer]) if index % keep] or [0])

    @rule(tokens=st.lists(st.integers(0, 300), min_size=1, max_size=60, unique=True))
    def prune(self, tokens: list[int]) -> None:
        known = [token for token in tokens if any(token in held for held in self.oracle.held)]
        unknown = [token for token in tokens if token not in known]
        never = [token for token in unknown if not any(token in p for p in self.manager.cache.table.pruned)]
        if never:
            with pytest.raises(TokenNotFound, match="nothing was changed"):
                self.manager.remove_pruned_tokens(tokens)
        assert self.manager.remove_pruned_tokens(known) == self.oracle.prune(known)
        for token in known[:3]:
            layer = next(i for i, pruned in enumerate(self.manager.cache.table.pruned) if token in pruned)
            with pytest.raises(TokenPruned, match=f"token {token} "):
                self.manager.get_from_kv_cache(layer_idx=layer, token_indices=[token])

    @rule(count=st.integers(1, 6))
    def compress(self, count: int) -> None:
        self.manager.compress_pages(count)

    @rule(count=st.integers(1, 6))
    def offload(self, count: int) -> None:
        self.manager.offload_pages(count)

    @precondition(lambda self: self.allow_drop)
    @rule(count=st.integers(1, 3))
    def drop(self, count: int) -> None:
        self.manager.cache.manager.drop(count)
        self.note_drops()

    @rule(n_slots=st.integers(0, 120))
    def truncate(self, n_slots: int) -> None:
        longest = max(map(len, self.oracle.slots))
        kept = self.manager.cache.truncate(n_slots)
        assert min(n_slots, longest) - self.spec.page_size < kept <= min(n_slots, longest)
        self.oracle.truncate(kept)

    @rule(frames=st.integers(1, 14))
    def set_budget(self, frames: int) -> None:
        before = self.manager.cache.manager.arena.n_frames
        try:
            self.manager.cache.manager.set_budget(frames * self.spec.frame_bytes)
        except (BudgetError, OutOfPages):
            assert self.manager.cache.manager.arena.n_frames == before
        else:
            assert self.manager.cache.manager.arena.n_frames <= max(frames, 0)
        self.note_drops()

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "oracle"):
            return
        cache = self.manager.cache
        cache.check()
        assert cache.use().arena_bytes <= self.budget
        for layer in range(LAYERS):
            count = int(cache.table.n_slots[layer])
            held, arrived = cache.table.tokens[layer, :count], cache.table.arrived[layer, :count]
            slots = np.flatnonzero(held != -1)
            came = np.where(arrived[slots] == -1, slots, arrived[slots])
            in_order = np.full(count, -1)
            in_order[came] = held[slots]
            assert [token if token is not None else -1 for token in self.oracle.slots[layer]] == in_order.tolist()
            assert (came >= slots).all(), "a token moved away from the start"
            if not self.allow_drop:
                assert not self.oracle.dropped[layer]


MemoryManagerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMemoryManagerAgainstADictionary = MemoryManagerMachine.TestCase
