"""Parts of a run without contents: the runtime on them moves pages, reads ahead and counts as ever, and nothing is held.

Every decision is the runtime's own. What it decides about is drawn (:mod:`edgekv.emulator.play.preference`), what it moves has no
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgekv.runtime.decoder.embedding import Embedding
from edgekv.runtime.decoder.rope import Rope
from edgekv.runtime.engines.base import StepBuffers
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.kernels.interface import Bytes, Float, Int64, Kernels, PagedAttention, Pool, Refs
from edgekv.runtime.pages.arena import Arena
from edgekv.runtime.pages.bounds import Summaries
from edgekv.runtime.storage.flash import FlashStore
from edgekv.runtime.storage.medium import Medium
from edgekv.runtime.storage.page_file import PageFile
from edgekv.runtime.storage.record import neighbours
from edgekv.spec import PageSpec

from .preference import Preference

#: One byte that stands for all of a file.
_BLANK = np.zeros(1, np.uint8)


class BlankArena(Arena):
    """An :class:`Arena` of any size that takes the memory of one frame: all pages lie on each other."""

    def __init__(self, spec: PageSpec, budget_bytes: int) -> None:
        super().__init__(spec, spec.frame_bytes)
        self.n_frames = budget_bytes // spec.frame_bytes
        self._free = list(range(self.n_frames - 1, -1, -1))

    def page(self, offset: int, size_bytes: int) -> Bytes:
        """Return bytes that mean nothing."""
        return self.buffer[:size_bytes]

    def release(self) -> None:
        """Nothing was taken."""


class BlankFile(PageFile):
    """A page file without contents: records are given out as ever, on a medium that moves nothing."""

    def read(self, records: list[int], tags: list[int], out: Bytes) -> list[bool]:
        """Read records, and say of each that it may be used."""
        for start, stop in neighbours(records):
            self._kind.medium.read(self.direct, out[start:stop].reshape(-1).data, records[start] * self._size)
        return [True] * len(records)

    def _write_block(self, records: list[int], tags: list[int], pages: list[Bytes]) -> list[int]:
        for start, stop in neighbours(records):
            self._pwrite(np.broadcast_to(_BLANK, (stop - start) * self._size).data, records[start] * self._size)
        return [0] * len(records)


class BlankStore(FlashStore):
    """A flash store on a file without contents.

    Args:
        kept: records that it holds from the start.
    """

    file_type = BlankFile

    def __init__(self, folder: Path, spec: PageSpec, medium: Medium, kept: list[int]) -> None:
        super().__init__(folder, spec, medium)
        self.file.keep(set(kept))

    def try_read(self, records: list[int], tags: list[int], out: Bytes) -> list[bool]:
        """Read records and return for each that it may be used, as a session's store does."""
        self.read(records, tags, out)
        return [True] * len(records)


class BlankAttention:
    """Attention that looks at no page and says how much of it each would have received."""

    isa, buffer_bytes = "none", 0

    def __init__(self, preference: Preference, page_size: int) -> None:
        self._preference = preference
        self._page_size = page_size
        self._attended: NDArray[np.bool_] = np.empty(0, bool)
        self._from = 0

    def run(
        self, q: Float, new_k: Float, new_v: Float, positions: Int64, refs: Refs, out: Float, window: int = 0,
        page_mass: Float | None = None, log_sum_exp: Float | None = None,
    ) -> None:  # fmt: skip
        """Attend to pages that are all in memory."""
        self.begin(q, new_k, new_v, positions, window, len(refs))
        self.pages(refs, 0, len(refs))
        self.finish(out, page_mass, log_sum_exp)

    def begin(
        self, q: Float, new_k: Float, new_v: Float, positions: Int64, window: int, n_pages: int, want_mass: bool = False
    ) -> None:
        """Start a step whose pages come in pieces."""
        self._attended = np.zeros(n_pages, bool)
        self._from = int(positions[0]) - window + 1 if window else 0

    def pages(self, refs: Refs, start: int, stop: int) -> None:
        """Attend to a piece."""
        part = refs[start:stop]
        self._attended[start:stop] = (part["data"] != 0) & (part["position"] + self._page_size > self._from)

    def finish(self, out: Float, page_mass: Float | None = None, log_sum_exp: Float | None = None) -> None:
        """End the step."""
        if page_mass is not None:
            page_mass[:] = self._preference.mass(self._attended)
        if log_sum_exp is not None:
            log_sum_exp[:] = 0

    def stream(
        self, rows: Any, layer: int, q: Float, new_k: Float, new_v: Float, positions: Int64, refs: Refs, out: Float,
        window: int = 0, page_mass: Float | None = None,
    ) -> int:  # fmt: skip
        """Attend to pages some of which would come from a stream."""
        rows.walked(layer)
        self.begin(q, new_k, new_v, positions, window, len(refs))
        self._attended[:] = refs["position"] + self._page_size > self._from
        self.finish(out, page_mass)
        return -1


class BlankKernels:
    """The kernels, computing nothing."""

    RUN_PAGES = load_kernels().RUN_PAGES

    def __init__(self, preference: Preference) -> None:
        self._preference = preference

    def ThreadPool(self, n_threads: int, executor: int = 0) -> Pool | None:
        """There is nothing to share among threads."""
        return None

    def Attention(
        self, pool: Any, n_q_heads: int, n_kv_heads: int, head_dim: int, page_size: int, scale: float, **rest: Any
    ) -> PagedAttention:
        """Return attention that looks at nothing."""
        return BlankAttention(self._preference, page_size)

    def pack_warm(
        self, hot_page: Bytes | int, out: Bytes | int, n_kv_heads: int, head_dim: int, page_size: int, n_slots: int = -1
    ) -> None:
        """Quantise nothing."""

    def write_hot(self, page: Bytes | int, slot: int, k: Float, v: Float, page_size: int) -> bool:
        """Write nothing, and lose nothing."""
        return True


class BlankSummaries(Summaries):
    """What selective attention goes by, drawn: all sealed pages are known, and none has a bound."""

    def __init__(self, preference: Preference, n_layers: int, n_pages: int) -> None:
        self.known = np.ones((n_layers, n_pages), bool)
        self._preference = preference

    def add(self, layer: int, pages: NDArray[np.int64], refs: NDArray[np.void]) -> None:
        """There is nothing to see in a page."""

    def forget(self, layer: int, page: int) -> None:
        """Nothing was known."""

    def scores(self, layer: int, q: Float, n_pages: int, scale: float) -> tuple[Float, Float, Float]:
        """Draw the scores of one query, the same for every head."""
        nothing = np.zeros((1, n_pages), np.float32)
        return nothing, self._preference.scores(n_pages)[None], nothing[:, 0]


class BlankEngine:
    """The dense parts of a model without weights; it says whose turn it is."""

    description, executor = "no engine", 0

    def __init__(self, preference: Preference) -> None:
        self._preference = preference

    def prepare(self, n_tokens: int) -> StepBuffers:
        """Return buffers for tokens that have no channels."""
        flat, heads = np.empty((n_tokens, 0), np.float32), np.empty((n_tokens, 0, 0), np.float32)
        return StepBuffers((flat, flat), (flat,), (flat,), heads, heads, heads, heads)

    def run(self, index: int, buffers: StepBuffers) -> None:
        """Come to the next layer."""
        self._preference.layer = index

    def head(self, residual: Float, attention: Float) -> Float:
        """Return logits over no words."""
        return residual


class _Nowhere:
    """The embedding and the rotation of tokens that have no channels."""

    def look_up(self, tokens: Int64, out: Float) -> None:
        """There is no row."""

    def fill(self, positions: Int64, cos: Sequence[Float], sin: Sequence[Float]) -> None:
        """There is no angle."""


BLANK_EMBEDDING, BLANK_ROPE = cast(Embedding, _Nowhere()), cast(Rope, _Nowhere())


def blank_kernels(preference: Preference) -> Kernels:
    """Return kernels that compute nothing, and prefer what ``preference`` says."""
    return cast(Kernels, BlankKernels(preference))
