"""The page arena: one allocation at the size of the budget, cut into frames.

A frame holds one HOT page or two WARM pages (an INT8 page with its scales is a little over half an fp16 page).
The arena hands out byte offsets and knows nothing of layers or tokens; only the cache decides what lies where.
It is an anonymous mapping, so frames that were never used cost no RAM and a shrunken arena gives RAM back.
"""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import OutOfPages
from edgekv.spec import PageSpec

from ..system.buffers import LEAST_HUGE_BYTES, anonymous


class Arena:
    """Frames for the resident set.

    Invariant (``check``): every frame is free, or split with one or two halves taken, or taken whole;
    ``free + split + whole == n_frames``.
    """

    def __init__(self, spec: PageSpec, budget_bytes: int) -> None:
        self.spec = spec
        self.n_frames = budget_bytes // spec.frame_bytes
        size = max(self.n_frames * spec.frame_bytes, mmap.PAGESIZE)
        # Attention walks the arena from end to end: with 4 KiB pages a quarter of its time goes to address lookup.
        self._map = anonymous(size, huge=size >= LEAST_HUGE_BYTES)
        self.buffer: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        #: Address of the first byte, for kernels.
        self.address = int(self.buffer.ctypes.data)
        # A stack whose top is the lowest frame: low frames are reused first, so that the tail stays untouched.
        self._free = list(range(self.n_frames - 1, -1, -1))
        #: Frames with exactly one WARM page, and the offset of their free half.
        self._half_free: dict[int, int] = {}
        self._whole: set[int] = set()
        self._full_split: set[int] = set()

    @property
    def free_frames(self) -> int:
        """Frames that hold nothing."""
        return len(self._free)

    @property
    def half_free_frames(self) -> int:
        """Frames that hold exactly one WARM page."""
        return len(self._half_free)

    @property
    def used_bytes(self) -> int:
        """Bytes of the frames that hold at least one page."""
        return (self.n_frames - len(self._free)) * self.spec.frame_bytes

    def page(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """Return the bytes at ``offset`` as a view [size_bytes] uint8."""
        return self.buffer[offset : offset + size_bytes]

    def take_frame(self) -> int:
        """Take a free frame for a HOT page and return its offset.

        Raises:
            OutOfPages: no frame is free. Nothing changed.
        """
        if not self._free:
            raise OutOfPages(f"all {self.n_frames} frames of the arena are taken")
        frame = self._free.pop()
        self._whole.add(frame)
        return frame * self.spec.frame_bytes

    def give_frame(self, offset: int) -> None:
        """Give back a frame that held a HOT page."""
        frame = offset // self.spec.frame_bytes
        if frame >= self.n_frames:
            return
        self._whole.remove(frame)
        self._free.append(frame)

    def take_half(self) -> int:
        """Take room for a WARM page and return its offset; half-used frames are filled first.

        Raises:
            OutOfPages: no room is left. Nothing changed.
        """
        if self._half_free:
            frame, offset = self._half_free.popitem()
            self._full_split.add(frame)
            return offset
        if not self._free:
            raise OutOfPages(f"all {self.n_frames} frames of the arena are taken")
        frame = self._free.pop()
        offset = frame * self.spec.frame_bytes
        self._half_free[frame] = offset + self.spec.warm_slot_bytes
        return offset

    def give_half(self, offset: int) -> None:
        """Give back the room of a WARM page."""
        frame = offset // self.spec.frame_bytes
        if frame >= self.n_frames:
            return
        if frame in self._half_free:
            del self._half_free[frame]
            self._free.append(frame)
        else:
            self._full_split.remove(frame)
            self._half_free[frame] = offset

    def half_page(self) -> int:
        """Return the offset of the WARM page in a half-used frame; moved to another such frame, it frees its own.

        Raises:
            OutOfPages: fewer than two frames are half used.
        """
        if len(self._half_free) < 2:
            raise OutOfPages("no two frames are half used")
        return self._sibling(next(iter(self._half_free)))

    def _sibling(self, frame: int) -> int:
        start = frame * self.spec.frame_bytes
        return start if self._half_free[frame] != start else start + self.spec.warm_slot_bytes

    def shrink(self, n_frames: int) -> None:
        """Take all frames from ``n_frames`` up out of use; what gives back their room later is ignored.

        The caller moves the pages that lie there, and then calls :meth:`release`.
        """
        self._free = sorted((frame for frame in self._free if frame < n_frames), reverse=True)
        self._half_free = {frame: offset for frame, offset in self._half_free.items() if frame < n_frames}
        self._whole = {frame for frame in self._whole if frame < n_frames}
        self._full_split = {frame for frame in self._full_split if frame < n_frames}
        self.n_frames = n_frames

    def release(self) -> None:
        """Return the RAM of the frames out of use to the OS."""
        start = self.n_frames * self.spec.frame_bytes
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if first < len(self._map) and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, len(self._map) - first)

    def grow(self, n_frames: int) -> None:
        """Put frames that :meth:`shrink` took out of use back, up to ``n_frames`` in all."""
        self._free = sorted([*self._free, *range(self.n_frames, n_frames)], reverse=True)
        self.n_frames = n_frames

    def check(self) -> None:
        """Assert the invariant of the class."""
        groups = [set(self._free), set(self._half_free), self._whole, self._full_split]
        assert sum(map(len, groups)) == len(set().union(*groups)) == self.n_frames
        assert len(self._free) == len(set(self._free))
