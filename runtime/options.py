"""How to run a bundle."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekv import settings
from edgekv.errors import PromptTooLong, UsageError
from edgekv.schema import shown
from edgekv.tiers import KVMode, PressureMode

from .storage.cipher import check_secret
from .storage.objects import PATIENCE_S
from .storage.open import OffloadOptions
from .system.process import cache_home, default_threads


@dataclass(frozen=True)
class SessionOptions:
    """Where a session is and how often it is saved.

    ``checkpoint_tokens``, ``checkpoint_seconds``: save after so many new tokens or seconds, 0 is never; it is saved at the
    end of each answer and when it is closed in any case. ``secret``: encrypt with these bytes, 16 at the least.
    ``max_bytes_per_day``: of pages written; beyond it the session is not saved, and says so.

    Raises:
        UsageError: a value has another type or is out of the range in :mod:`edgekv.settings`.
    """

    path: Path
    checkpoint_tokens: int = 64
    checkpoint_seconds: float = 0.0
    secret: bytes | None = None
    max_bytes_per_day: int | None = None

    def __post_init__(self) -> None:
        settings.check_all(self, _SESSION, optional=("max_bytes_per_day",))
        if self.secret is not None:
            check_secret(self.secret, "secret")


_SESSION: dict[str, settings.Setting[Any]] = {
    "path": settings.SESSION,
    "checkpoint_tokens": settings.CHECKPOINT_TOKENS,
    "checkpoint_seconds": settings.CHECKPOINT_SECONDS,
    "max_bytes_per_day": settings.MAX_WRITE_PER_DAY,
}


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
    ``threads``: of this generator; those that run on ExecuTorch share the number of the first that is open in the process.
    ``own_process``: nothing else in this process runs on ONNX Runtime, so that all its sessions may share one pool of
    threads; decoding is then up to a quarter faster, and sessions of others must set ``use_per_session_threads=False``.
    ``pressure``: ``auto`` gives memory back when the system runs short of it; see :mod:`edgekv.runtime.governor`.
    ``attend``: ``exact``, or ``selective`` and its forms: see :func:`edgekv.settings.parse_attend`.

    Types and ranges are those of :mod:`edgekv.settings`, the same as on the command line.

    Raises:
        UsageError: a value has another type or is out of range; the message names it.
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

    def __post_init__(self) -> None:
        settings.check_all(self, _RUN, optional=("kv_budget", "context", "offload", "flash_limit", "max_write_per_day"))
        if self.session is not None and not isinstance(self.session, SessionOptions):
            raise UsageError(f"session must be SessionOptions or None, not {shown(self.session)}")

    @property
    def storage(self) -> OffloadOptions:
        """Where pages go that leave RAM."""
        return OffloadOptions(
            self.offload, self.flash_limit, self.offload_patience_s, self.max_write_per_day, self.encrypt_offload
        )


_RUN: dict[str, settings.Setting[Any]] = {
    setting.name: setting
    for setting in (
        settings.KV_BUDGET, settings.KV, settings.CONTEXT, settings.POLICY, settings.ATTEND, settings.OFFLOAD,
        settings.FLASH_LIMIT, settings.OFFLOAD_PATIENCE_S, settings.ALLOW_DROP, settings.MAX_WRITE_PER_DAY,
        settings.THREADS, settings.PREFILL_CHUNK, settings.PREFIXES, settings.ENCRYPT_OFFLOAD, settings.OWN_PROCESS,
        settings.PRESSURE,
    )
}  # fmt: skip


def verified_stamp(bundle: Path) -> Path:
    """Return the file that says that the files of a bundle were found whole."""
    return cache_home() / "verified" / f"{bundle.resolve().as_posix().strip('/').replace('/', '-')}.json"


def planned_context(options: RunOptions, max_context: int, prompt_tokens: int, max_tokens: int) -> int:
    """Return the tokens that a cache must be able to hold: a prompt and as much of an answer as fits.

    Raises:
        PromptTooLong: the prompt leaves no room, or the context is more than the model was made for.
    """
    limit = options.context or max_context
    if limit > max_context:
        raise PromptTooLong(f"--context {limit} is above what the model was made for, {max_context}")
    needed = prompt_tokens + answer_room(limit, prompt_tokens, max_tokens)
    return options.context or needed


def answer_room(context: int, prompt_tokens: int, max_tokens: int) -> int:
    """Return how many tokens of an answer fit behind a prompt, ``max_tokens`` at the most.

    Raises:
        PromptTooLong: not one of them does.
    """
    room = context - prompt_tokens
    if room < min(max_tokens, 1):
        raise PromptTooLong(
            f"a prompt of {prompt_tokens} tokens {'does not fit' if room < 0 else 'leaves no room for an answer in'} the context"
            f" of {context}; shorten the prompt or raise --context"
        )
    return min(max_tokens, room)


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
