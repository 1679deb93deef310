"""Without weights the runtime does what it does with them: the same pages are selected, moved and read, in the same requests."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.bundle import Manifest
from edgekv.device_profiles import load
from edgekv.device_profiles.geometry import Geometry
from edgekv.emulator import Device, Event
from edgekv.emulator.play.blank import BLANK_EMBEDDING, BLANK_ROPE, BlankAttention, BlankSummaries
from edgekv.emulator.play.play import emulate_shape
from edgekv.emulator.play.preference import Preference
from edgekv.emulator.play.scenario import AppSettings, Scenario, Turn
from edgekv.emulator.play.shape_app import Shape, WeightlessApp, read_shape
from edgekv.errors import EdgeKVError
from edgekv.runtime import prepare
from edgekv.runtime.attention import select
from edgekv.runtime.engines.base import StepBuffers
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.kernels.interface import Float, Kernels
from edgekv.runtime.machine import Host
from edgekv.runtime.options import RunOptions
from edgekv.runtime.pages.bounds import Summaries, summary_bytes
from edgekv.runtime.pages.cache import KVCache
from edgekv.runtime.prepare import Segments, prepare_cache
from edgekv.runtime.storage.medium import SystemMedium
from edgekv.runtime.storage.ring import LEAST_PIECES_SELECTIVE
from edgekv.runtime.turns import Turns
from edgekv.tiers import KVMode

PHONE = load("android-low-4gb")
KERNELS = load_kernels()


@dataclasses.dataclass(frozen=True)
class Run:
    """A shape, a budget and a sequence: all that decides which pages go where."""

    windows: tuple[int, ...]
    n_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    prompt: int
    answer: int
    chunk: int
    kv: str
    room: float
    attend: str
    policy: str
    allow_drop: bool
    seed: int

    @property
    def context(self) -> int:
        return self.prompt + self.answer

    @property
    def budget(self) -> int:
        """What the run needs at the least, and a share of what it needs to stay in RAM."""
        spec, n_pages = self.shape.pages, -(-self.context // self.page_size)
        ring = LEAST_PIECES_SELECTIVE * KERNELS.RUN_PAGES * spec.record_bytes
        least = (spec.n_layers + 1) * spec.frame_bytes + ring + summary_bytes(spec, n_pages)
        whole = n_pages * spec.n_layers * spec.frame_bytes
        return least + round(self.room * max(whole - least, 0))

    @property
    def shape(self) -> Shape:
        heads, dim = self.n_kv_heads * self.group, self.head_dim
        geometry = Geometry(
            len(self.windows), heads * dim, heads, self.n_kv_heads, dim, 100, 4096, 3 * dim * dim, 3 * dim * dim,
            self.windows,
        )  # fmt: skip
        return Shape(geometry, "random", page_size=self.page_size)


attends = st.one_of(
    st.sampled_from(["exact", "selective"]),
    st.integers(1, 40).map(lambda pages: f"selective:{pages}"),
    st.integers(1, 100).map(lambda share: f"selective:{share}%"),
)
runs = st.builds(
    Run,
    windows=st.lists(st.sampled_from([0, 0, 0, 5, 24, 64]), min_size=1, max_size=4).map(tuple),
    n_kv_heads=st.sampled_from([1, 2, 2]),
    group=st.integers(1, 2),
    head_dim=st.sampled_from([4, 64, 128, 128]),
    page_size=st.sampled_from([4, 8, 8, 16, 32]),
    prompt=st.one_of(st.integers(1, 600), st.integers(400, 600), st.integers(400, 600)),
    answer=st.integers(1, 24),
    chunk=st.sampled_from([8, 20, 64, 256]),
    kv=st.sampled_from(["auto", "auto", "int8", "fp16"]),
    room=st.one_of(st.floats(0, 0.3), st.floats(0, 0.1), st.floats(-0.05, 1.1)),
    attend=attends,
    policy=st.sampled_from(["lru", "heavy", "window", "random"]),
    allow_drop=st.sampled_from([False, False, False, True]),
    seed=st.integers(0, 1000),
)


class CountingMedium(SystemMedium):
    """The file system, and how often it was asked to write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """Write and count."""
        self.writes += 1
        return super().write(file, data, offset)


class CountingHost(Host):
    """This machine."""

    def __init__(self, medium: CountingMedium) -> None:
        self._medium = medium

    def open_medium(self) -> CountingMedium:
        """Return where writes are counted."""
        return self._medium


class _Walked:
    """Rows that nobody has to walk any more."""

    def walked(self, layer: int) -> None:
        """Done."""


class SteeredAttention:
    """The real attention; what a page received is not what random keys say, but what the weightless run drew."""

    def __init__(self, real: Any, blank: BlankAttention) -> None:
        self._real, self._blank = real, blank
        self.isa, self.buffer_bytes = real.isa, real.buffer_bytes

    def __getattr__(self, name: str) -> Callable[..., Any]:
        real, blank = getattr(self._real, name), getattr(self._blank, name)

        def both(*args: Any, **named: Any) -> Any:
            result = real(*args, **named)
            if name == "stream":  # the real rows were walked
                args = (_Walked(), *args[1:])
            blank(*args, **named)
            return result

        return both


class SteeredKernels:
    """The real kernels, with attention that is steered."""

    def __init__(self, preference: Preference) -> None:
        self._preference = preference

    def __getattr__(self, name: str) -> Any:
        return getattr(KERNELS, name)

    def Attention(self, *args: Any, **named: Any) -> SteeredAttention:
        return SteeredAttention(KERNELS.Attention(*args, **named), BlankAttention(self._preference, args[4]))


class Engine:
    """Segments that answer with noise."""

    description, executor = "noise", 0

    def __init__(self, run: Run, preference: Preference) -> None:
        self._run, self._preference = run, preference
        self._noise = np.random.default_rng(run.seed)

    def prepare(self, n_tokens: int) -> StepBuffers:
        run, flat = self._run, np.zeros((n_tokens, 0), np.float32)

        def noise(heads: int) -> Float:
            return self._noise.standard_normal((n_tokens, heads, run.head_dim), np.float32)

        q, k, v = noise(run.n_kv_heads * run.group), noise(run.n_kv_heads), noise(run.n_kv_heads)
        return StepBuffers((flat, flat), (flat,), (flat,), q, k, v, np.empty_like(q))

    def run(self, index: int, buffers: StepBuffers) -> None:
        self._preference.layer = index

    def head(self, residual: Float, attention: Float) -> Float:
        return residual


def outcome(cache: KVCache, writes: int, error: str | None) -> dict[str, Any]:
    """Return all that a run left behind."""
    table = cache.table
    store = cache.manager.store
    return {
        "error": error,
        "tiers": table.tier.tolist(),
        "records": table.record.tolist(),
        "used": table.last_used.tolist(),
        "moved": cache.manager.counters,
        "flash": store.counters if store is not None else None,
        "writes": writes,
        "free": (cache.manager.arena.free_frames, cache.manager.arena.half_free_frames),
    }


def really(run: Run, folder: Path) -> dict[str, Any] | str:
    """Run on this machine: real kernels, real pages, a real file."""
    preference = Preference(len(run.windows), -(-run.context // run.page_size), run.seed)

    class Steered(Summaries):
        def scores(self, layer: int, q: Float, n_pages: int, scale: float) -> tuple[Float, Float, Float]:
            bounds, _, _ = super().scores(layer, q, n_pages, scale)
            nothing, likely, slack = BlankSummaries.scores(blank, layer, q, n_pages, scale)
            return np.where(np.isinf(bounds[:1]), np.float32(np.inf), nothing), likely, slack

    blank = BlankSummaries(preference, len(run.windows), 1)
    model = run.shape.decoder
    manifest = cast(Manifest, type("M", (), {"model": model, "page_size": run.page_size, "form": "split"}))
    options = RunOptions(
        kv_budget=run.budget, kv=KVMode(run.kv), context=run.context, policy=run.policy, attend=run.attend,
        allow_drop=run.allow_drop, offload=None if run.allow_drop else folder, prefill_chunk=run.chunk, threads=1,
    )  # fmt: skip
    dense, medium = Segments(Engine(run, preference), BLANK_EMBEDDING), CountingMedium()
    host = CountingHost(medium)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "Summaries", Steered)
        patch.setattr(prepare, "Rope", lambda spec: BLANK_ROPE)
        try:
            prepared = prepare_cache(
                manifest, dense, cast(Kernels, SteeredKernels(preference)), options, host, context=run.context,
                kept=None, turns=Turns(), abandon=lambda: None,
            )  # fmt: skip
        except EdgeKVError as error:
            return type(error).__name__
    ended: str | None = None
    try:
        for start, stop in steps(run):
            positions = np.arange(start, stop, dtype=np.int64)
            prepared.forward.step(positions, positions, "last" if stop >= run.prompt else "none")
    except EdgeKVError as error:
        ended = type(error).__name__
    found = outcome(prepared.cache, medium.writes, ended)
    prepared.close()
    return found


def steps(run: Run) -> Iterator[tuple[int, int]]:
    """Cut the sequence as a generator does: the prompt in chunks, then all but the last token of the answer."""
    for start in range(0, run.prompt, run.chunk):
        yield start, min(start + run.chunk, run.prompt)
    for start in range(run.prompt, run.context - 1):
        yield start, start + 1


def weightless(run: Run, folder: Path) -> dict[str, Any] | str:
    """Run the shape alone, on an emulated device."""
    app_settings = AppSettings(
        kv_budget=run.budget, kv=run.kv, context=run.context, policy=run.policy, attend=run.attend,
        allow_drop=run.allow_drop, prefill_chunk=run.chunk,
    )  # fmt: skip
    device = Device(PHONE)
    try:
        app = WeightlessApp(run.shape, device, app_settings, seed=run.seed, context=run.context, scratch=folder)
    except EdgeKVError as error:
        return type(error).__name__
    app.start()
    app.ask(Turn(prompt_tokens=run.prompt, max_tokens=run.answer))
    ended: str | None = None
    try:
        for _ in app.answer():
            pass
    except EdgeKVError as error:
        ended = type(error).__name__
    cache = app.cache
    assert cache is not None
    found = outcome(cache, device.medium.writes, ended)
    app.stop()
    return found


def watched(patch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Return a list that every attention adds to: the layer, and the pages that it attended to."""
    seen: list[tuple[int, list[int]]] = []
    finish = BlankAttention.finish

    def noted(self: Any, *args: Any, **named: Any) -> None:
        seen.append((self._preference.layer, np.flatnonzero(self._attended).tolist()))
        finish(self, *args, **named)

    patch.setattr(BlankAttention, "finish", noted)
    return seen


def assert_alike(run: Run) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        seen = watched(patch)
        real = really(run, Path(folder) / "real")
        selected = seen.copy()
        seen.clear()
        assert weightless(run, Path(folder)) == real
        assert seen == selected


@given(run=runs)
@settings(max_examples=50, deadline=None)
def test_a_run_without_weights_selects_moves_and_reads_exactly_what_a_real_one_does(run: Run) -> None:
    assert_alike(run)


@pytest.mark.slow
@given(run=runs)
@settings(max_examples=500, deadline=None)
def test_five_hundred_runs_without_weights_are_exactly_like_real_ones(run: Run) -> None:
    assert_alike(run)


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize("budget", [None, "40%", "25%"])
@pytest.mark.parametrize("attend", ["selective", "selective:8", "selective:25%"])
def test_selective_attention_runs_without_weights(attend: str, budget: str | None, session: bool, config: Path) -> None:
    app = AppSettings(attend=attend, kv_budget=budget, session=session)
    result = emulate_shape(
        read_shape(config), Device(PHONE), Scenario((Turn(prompt_tokens=1500, max_tokens=20),), app=app)
    )
    assert result.turns[0].error is None
    assert result.turns[0].answer_tokens == 20
    assert (result.totals["bytes_read"] > result.model["weights_bytes"]) == (budget is not None)


def test_a_session_without_weights_reads_its_pages_again_and_writes_them_once(config: Path) -> None:
    app, turn = AppSettings(session=True, kv_budget="30%"), Turn(prompt_tokens=1500, max_tokens=100)
    shape = read_shape(config)
    whole = emulate_shape(shape, Device(PHONE), Scenario((turn,), app=app))
    kill = Event(whole.totals["seconds"] * 0.9, "kill")
    killed = emulate_shape(shape, Device(PHONE), Scenario((turn,), app=app, events=(kill,)))
    assert killed.turns[0].kills == 1
    assert killed.turns[0].answer_tokens == 100
    assert killed.turns[0].computed_tokens < whole.turns[0].computed_tokens + app.checkpoint_tokens
    written = whole.totals["bytes_written"]
    assert written <= killed.totals["bytes_written"] < 1.2 * written
