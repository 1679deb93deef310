"""What happens when the owner of files, threads and memory is forgotten instead of closed, and when its process forks."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable

_of_the_parent: weakref.WeakSet[object] = weakref.WeakSet()


def when_gone(owner: object, end: Callable[[], object]) -> weakref.finalize[..., object]:
    """Let ``end`` be called once: when ``owner`` is collected, or at the exit of the process.

    A forked child does not call it: files and threads are those of its parent. Calling what this returns calls ``end`` now,
    ``detach`` of it takes the matter into one's own hands.

    Args:
        end: must not hold ``owner``, which would then never be collected.
    """
    process = os.getpid()
    return weakref.finalize(owner, lambda: end() if os.getpid() == process else None)


def leave_to_parent(owner: object) -> None:
    """Let no forked child destroy ``owner``: the destructors of engines wait for threads that only the parent has."""
    _of_the_parent.add(owner)


def _leave() -> None:
    for owner in list(_of_the_parent):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave)
