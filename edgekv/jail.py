"""A real memory limit around a real process: a cgroup where this user may make one, else an rlimit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import EdgeKVError, UsageError
from edgekv.host import group_paths
from edgekv.sizes import format_bytes

CGROUPS = Path("/sys/fs/cgroup")
#: Ways to limit a process, the strictest first.
KINDS = ("cgroup v2", "cgroup v1", "rlimit")


@dataclass(frozen=True)
class LimitedRun:
    """What became of a process in a jail. ``kind``: cgroup v2, cgroup v1 or rlimit; ``peak_bytes`` 0 where nobody counted."""

    kind: str
    limit_bytes: int
    returncode: int
    peak_bytes: int

    @property
    def killed(self) -> bool:
        """Whether the system ended the process for its memory, as far as its end tells."""
        return self.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)

    def __str__(self) -> str:
        """Say it in a line."""
        peak = f", peak {format_bytes(self.peak_bytes)}" if self.peak_bytes else ""
        end = "killed by the system" if self.killed else f"ended with {self.returncode}"
        return f"jail: {self.kind}, limit {format_bytes(self.limit_bytes)}{peak}, {end}"


def run_limited(command: list[str], limit_bytes: int, *, kinds: Sequence[str] = KINDS) -> LimitedRun:
    """Run a command with so much memory; its output goes where ours goes.

    A cgroup counts what the process and its children hold, page cache included, and kills at the limit, without swap. An rlimit
    bounds anonymous memory only (RLIMIT_DATA), and the process meets failing allocations.

    Args:
        kinds: of limits, in the order in which they are tried.

    Raises:
        UsageError: this system has none of them.
    """
    groups = {"cgroup v2": _version_2, "cgroup v1": _version_1}
    for kind in kinds:
        if kind not in groups:
            if sys.platform == "win32":
                break
            return LimitedRun(
                kind, limit_bytes, subprocess.run(command, preexec_fn=_limiter(limit_bytes)).returncode, 0
            )
        with contextlib.ExitStack() as stack:
            try:
                group, peak = stack.enter_context(groups[kind](limit_bytes))
            except OSError:
                continue
            ended = subprocess.run(command, preexec_fn=_joiner(group))
            return LimitedRun(kind, limit_bytes, ended.returncode, peak())
    raise UsageError(f"this system has no {' and no '.join(kinds)} that this user may set; run without --jail")


def check(sentence: LimitedRun) -> None:
    """Pass on how the process ended.

    Raises:
        EdgeKVError: the system killed it. SystemExit: it ended with an error of its own.
    """
    if sentence.killed:
        raise EdgeKVError(f"{sentence}: the run needs more memory than the device grants an app; lower --kv-budget")
    if sentence.returncode:
        raise SystemExit(sentence.returncode)


def _limiter(limit_bytes: int) -> Callable[[], None]:
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _joiner(group: Path) -> Callable[[], None]:
    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    return join


@contextmanager
def _version_2(limit_bytes: int) -> Iterator[tuple[Path, Callable[[], int]]]:
    if not (CGROUPS / "cgroup.controllers").exists():
        raise OSError("no cgroup v2")
    with _group(delegated(CGROUPS, _own_path(version=2))) as group:
        (group / "memory.max").write_text(str(limit_bytes))
        with contextlib.suppress(OSError):
            (group / "memory.swap.max").write_text("0")
        yield group, lambda: _number(group / "memory.peak")


def delegated(root: Path, own: str) -> Path:
    """Return the group nearest to our own, or above it, below which this user may make one with a memory limit.

    A group that holds processes gives its children no controllers, so that it is hardly ever our own: with systemd it is the
    slice around it.

    Raises:
        OSError: there is none.
    """
    group = root / own.lstrip("/")
    for above in (group, *group.parents):
        given = (above / "cgroup.subtree_control").read_text(encoding="ascii").split()
        if "memory" in given and os.access(above, os.W_OK) and os.access(above / "cgroup.procs", os.W_OK):
            return above
        if above == root:
            break
    raise OSError("no group with a memory controller was given to this user")


@contextmanager
def _version_1(limit_bytes: int) -> Iterator[tuple[Path, Callable[[], int]]]:
    parent = CGROUPS / "memory"
    own = parent / _own_path(version=1).lstrip("/")
    with _group(own if own.is_dir() else parent) as group:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        with contextlib.suppress(OSError):
            (group / "memory.swappiness").write_text("0")
        yield group, lambda: _number(group / "memory.max_usage_in_bytes")


@contextmanager
def _group(parent: Path) -> Iterator[Path]:
    group = parent / f"edgekv-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        group.rmdir()


def _own_path(*, version: int) -> str:
    """Return the path of this process's group in the hierarchy of that version that counts memory."""
    fits = (path for number, names, path in group_paths() if ("memory" in names if version == 1 else number == "0"))
    return next(fits, "/")


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
