"""How to run a bundle, and where files go that may be deleted at any time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from edgekv.errors import PromptTooLong, StoreError, UsageError
from edgekv.runtime.layered import LayeredStore
from edgekv.runtime.medium import SYSTEM, Medium
from edgekv.runtime.objects import PATIENCE_S, is_url
from edgekv.runtime.remote import ObjectStore
from edgekv.runtime.select import AttendOptions, parse_attend
from edgekv.runtime.session import SessionOptions
from edgekv.runtime.session_cipher import Cipher
from edgekv.runtime.session_store import SessionStore
from edgekv.runtime.store import FlashStore, PageStore
from edgekv.runtime.wear import WearLedger
from edgekv.spec import PageSpec
from edgekv.types import KVMode, PressureMode, parse_bytes


@dataclass(frozen=True)
class RunOptions:
    """How to run a bundle.

    ``kv_budget``: bytes, ``"64MiB"``, ``"25%"`` of the fp16 cache of the context, or None for no limit.
    ``context``: tokens in the sequence at the most; None takes what the prompt and ``max_tokens`` need.
    ``offload``: folder or object store (``s3://bucket/prefix``) for pages that do not fit; None uses a private file in the
    cache folder of the user. ``flash_limit``: bytes of pages that stay on flash before the object store takes the rest.
    ``allow_drop``: forget pages that do not fit, instead of writing them to flash (unless ``offload`` names a
    folder); changes results, and says how much.
    ``max_write_per_day``: bytes, or ``"2GB"``, that all runs with this offload folder may write to flash in a day (UTC).
    ``own_process``: nothing else in this process runs on ONNX Runtime, so that all its sessions may share one pool of
    threads; decoding is then up to a quarter faster, and sessions of others must set ``use_per_session_threads=False``.
    ``pressure``: ``auto`` gives memory back when the system runs short of it; see :mod:`edgekv.runtime.governor`.
    ``attend``: ``exact``, or ``selective`` and its forms: see :func:`edgekv.runtime.select.parse_attend`.
    """

    kv_budget: int | str | None = None
    kv: KVMode = KVMode.AUTO
    context: int | None = None
    policy: str = "lru"
    offload: Path | str | None = None
    flash_limit: int | str | None = None
    offload_patience_s: float = PATIENCE_S
    allow_drop: bool = False
    max_write_per_day: int | str | None = None
    threads: int = field(default_factory=lambda: default_threads())
    prefill_chunk: int = 256
    attend: str = "exact"
    session: SessionOptions | None = None
    prefixes: bool = True
    encrypt_offload: bool = False
    own_process: bool = False
    pressure: PressureMode = PressureMode.AUTO


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
    """Open the flash tier of one run, or the object store below it, and return it with the folder to clean up, if any.

    Raises:
        StoreLocked, StoreError: folder or object store cannot be used. EngineMissing: no package for it, or for encryption.
        UsageError: the options contradict each other.
    """
    if not is_url(options.offload):
        if options.flash_limit is not None:
            raise UsageError(
                "--flash-limit says what stays on flash before the object store; give --offload URL with it"
            )
        return _open_flash(options, spec, Path(options.offload) if options.offload is not None else None, medium)
    cipher = Cipher.ephemeral() if options.encrypt_offload else None
    remote = ObjectStore(str(options.offload), spec, cipher=cipher, patience_s=options.offload_patience_s)
    if options.flash_limit is None:
        return remote, None
    limit = options.flash_limit if isinstance(options.flash_limit, int) else parse_bytes(options.flash_limit)
    try:
        flash, scratch = _open_flash(options, spec, None, medium)
    except StoreError:
        remote.close()
        raise
    return LayeredStore(flash, remote, limit // spec.record_bytes), scratch


def _open_flash(
    options: RunOptions, spec: PageSpec, chosen: Path | None, medium: Medium
) -> tuple[PageStore, tempfile.TemporaryDirectory[str] | None]:
    folder, scratch = chosen or cache_home() / "offload", None
    beside = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if chosen is None or options.encrypt_offload:
            scratch = tempfile.TemporaryDirectory(dir=folder, prefix="run-")
            folder = Path(scratch.name)
    except OSError as error:
        raise StoreError(
            f"cannot write the offload folder {folder}: {error.strerror}; choose another with --offload DIR"
        ) from error
    wear = WearLedger(beside, daily_limit(options.max_write_per_day))
    try:
        if options.encrypt_offload:
            # The records of a session that is never kept: same files, and the key is in no file.
            return SessionStore(folder, spec, Cipher.ephemeral(), spill=folder, medium=medium, wear=wear), scratch
        return FlashStore(folder, spec, medium, wear), scratch
    except BaseException:
        wear.close()
        raise


def daily_limit(size: int | str | None) -> int | None:
    """Return a number of bytes per day; None is no limit.

    Raises:
        UsageError: it is not a size.
    """
    return parse_bytes(size) if isinstance(size, str) else size
