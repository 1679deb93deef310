"""Every error that edgekv raises on purpose.

The command line prints an :class:`EdgeKVError` as one line and exits with its ``exit_code``:
2 when the request itself cannot be met (usage), 1 when something failed while running, 3 when a device gives other tokens.
Anything else is a bug and keeps its traceback. A message names what was asked, the limit,
and the way out.
"""

from __future__ import annotations


class EdgeKVError(Exception):
    """Base of the tree: something failed while running."""

    exit_code = 1


class UsageError(EdgeKVError, ValueError):
    """The request cannot be met as asked; nothing was changed."""

    exit_code = 2


class FormatError(UsageError):
    """The content of a file is not what its format asks for; see :mod:`edgekv.schema`."""


class CheckpointError(UsageError):
    """A checkpoint folder cannot be exported: unknown architecture, missing or damaged tensors."""


class ConfigError(CheckpointError):
    """A model configuration cannot be used: a model type or setting that edgekv does not decode, or a senseless value."""


class BundleError(UsageError):
    """A bundle cannot be used: not a bundle, a newer format, a file that differs from its hash."""


class ProfileError(UsageError):
    """A device profile cannot be used: unknown name, missing or impossible number."""


class BudgetError(UsageError):
    """The memory budget cannot hold what the run needs at the least."""


class PromptTooLong(UsageError):
    """The prompt and the tokens to generate exceed the context."""


class OutOfPages(EdgeKVError):
    """No page can be freed for new tokens. Nothing was changed."""


class TokenNotFound(EdgeKVError, KeyError):
    """Keys and values were asked for a token that the cache never held or has lost on purpose."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class TokenDropped(TokenNotFound):
    """The token was dropped by reclaim: its keys and values are gone."""


class TokenPruned(TokenNotFound):
    """The token was pruned by the caller: its keys and values are gone."""


class StoreError(EdgeKVError):
    """The backing store cannot be read or written."""


class StoreFull(StoreError):
    """The backing store has no room left. Nothing was changed: the pages are still in memory."""


class WriteLimit(StoreFull):
    """The day's writes to flash are used up. Nothing was changed: the pages are still in memory."""


class StoreLocked(StoreError):
    """Another process uses this store."""

    exit_code = 2


class CorruptPage(StoreError):
    """A record differs from its checksum. It was not used, and it was not deleted."""


class GateFailed(EdgeKVError):
    """`edgekv verify` measured a quality below the gate."""


class SessionError(StoreError):
    """A session cannot be read or written."""


class SessionMismatch(UsageError):
    """A session was made with something else: another checkpoint, tokenizer, geometry, page size or key."""


class EngineError(EdgeKVError):
    """The inference engine refused a graph or a run."""


class KeysOverflow(EngineError):
    """A token has keys or values beyond fp16's range, so that no page can hold them. The token was not added."""


class NotFinite(EngineError):
    """A run gave logits from which no token can be chosen: NaN or infinity."""


class EngineMissing(UsageError):
    """A package that this bundle or command needs is not installed."""


class TooBusy(EdgeKVError):
    """A service has as many requests waiting as it takes; a later one may be taken."""


class DeviceLost(EdgeKVError):
    """A device does not answer, or no longer."""


class TokensDiffer(EdgeKVError):
    """A device gives other tokens than this machine."""

    exit_code = 3
