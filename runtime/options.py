"""How to run a bundle, and where files go that may be deleted at any time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from edgekv.errors import PromptTooLong, StoreError, UsageError
from edgekv.runtime.medium import SYSTEM, Medium
from edgekv.runtime.select import AttendOptions, parse_attend
from edgekv.runtime.session import SessionOptions
from edgekv.runtime.session_cipher import Cipher
from edgekv.runtime.session_store import SessionStore
from edgekv.runtime.store import FlashStore, PageStore
from edgekv.spec import PageSpec
from edgekv.types import KVMode


@dataclass(frozen=True)
class RunOptions:
    """How to run a bundle.

    ``kv_budget``: bytes, ``"64MiB"``, ``"25%"`` of the fp16 cache of the context, or None for no limit.
    ``context``: tokens in the sequence at the most; None takes what the prompt and ``max_tokens`` need.
    ``offload``: folder for pages that do not fit; None uses a private file in the cache folder of the user.
    ``allow_drop``: forget pages that do not fit, instead of writing them to flash (unless ``offload`` names a
    folder); changes results, and says how much.
    ``attend``: ``exact``, or ``selective`` and its forms: see :func:`edgekv.runtime.select.parse_attend`.
    """

    kv_budget: int | str | None = None
    kv: KVMode = KVMode.AUTO
    context: int | None = None
    policy: str = "lru"
    offload: Path | None = None
    allow_drop: bool = False
    threads: int = field(default_factory=lambda: default_threads())
    prefill_chunk: int = 256
    attend: str = "exact"
    session: SessionOptions | None = None
    prefixes: bool = True
    encrypt_offload: bool = False


def attend_options(options: RunOptions, form: str) -> AttendOptions:
    """Return which pages a step attends to.

    Raises:
        UsageError: it is not understood, or the form of the bundle cannot do it.
    """
    attend = parse_attend(options.attend)
    if attend.selective and form == "inline":
        raise UsageError(
            "the inline form takes every page in one call: export with --form split for --attend selective"
        )
    return attend


def default_threads() -> int:
    """Cores that this process may use, 4 at the most: decode is bound by memory, and little cores slow big ones."""
    with contextlib.suppress(AttributeError):
        return min(4, len(os.sched_getaffinity(0)))
    return min(4, os.cpu_count() or 1)


def cache_home() -> Path:
    """Folder for files that may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekv"


def verified_stamp(bundle: Path) -> Path:
    """Return the file that says that the files of a bundle were found whole."""
    return cache_home() / "verified" / f"{bundle.resolve().as_posix().strip('/').replace('/', '-')}.json"


def planned_context(options: RunOptions, max_context: int, prompt_tokens: int, max_tokens: int) -> int:
    """Return the tokens that a cache must be able to hold.

    Raises:
        PromptTooLong: more than the context, or than the model was made for.
    """
    limit = options.context or max_context
    if limit > max_context:
        raise PromptTooLong(f"--context {limit} is above what the model was made for, {max_context}")
    if prompt_tokens + max_tokens > limit:
        raise PromptTooLong(
            f"a prompt of {prompt_tokens} tokens and {max_tokens} to generate do not fit the context of {limit};"
            " shorten the prompt, lower --max-tokens" + (" or raise --context" if limit < max_context else "")
        )
    return options.context or prompt_tokens + max_tokens


def check_length(options: RunOptions, max_context: int, n_tokens: int) -> None:
    """Refuse a sequence that has grown beyond its context.

    Raises:
        PromptTooLong: the message says by how much.
    """
    limit = options.context or max_context
    if n_tokens > limit:
        raise PromptTooLong(
            f"{n_tokens} tokens do not fit the context of {limit}; shorten the prompt or raise --context"
        )


def open_offload(
    options: RunOptions, spec: PageSpec, medium: Medium = SYSTEM
) -> tuple[PageStore, tempfile.TemporaryDirectory[str] | None]:
    """Open the flash tier of one run, and return it with the folder to clean up afterwards, if there is one.

    Raises:
        StoreLocked, StoreError: the folder cannot be used. EngineMissing: no package for the encryption.
    """
    folder, scratch = options.offload or cache_home() / "offload", None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if options.offload is None or options.encrypt_offload:
            scratch = tempfile.TemporaryDirectory(dir=folder, prefix="run-")
            folder = Path(scratch.name)
    except OSError as error:
        raise StoreError(
            f"cannot write the offload folder {folder}: {error.strerror}; choose another with --offload DIR"
        ) from error
    if options.encrypt_offload:
        # The records of a session that is never kept: same files, and the key is in no file.
        return SessionStore(folder, spec, Cipher.ephemeral(), spill=folder, medium=medium), scratch
    return FlashStore(folder, spec, medium), scratch
