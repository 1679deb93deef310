"""Opens the flash tier of a run, or the object store below it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import UsageError
from edgekv.files import make_folder
from edgekv.scratch import ScratchFolder
from edgekv.settings import FLASH_LIMIT, MAX_WRITE_PER_DAY
from edgekv.spec import PageSpec

from ..system.process import cache_home
from .cipher import Cipher
from .flash import FlashStore, unusable
from .interface import PageStore
from .layered import LayeredStore
from .medium import Medium
from .objects import PATIENCE_S, is_url
from .remote import ObjectStore
from .wear import WearLedger


@dataclass(frozen=True)
class OffloadOptions:
    """Where pages go that leave RAM; the fields of the same names of :class:`~edgekv.runtime.options.RunOptions`."""

    offload: Path | str | None = None
    flash_limit: int | str | None = None
    offload_patience_s: float = PATIENCE_S
    max_write_per_day: int | str | None = None
    encrypt_offload: bool = False


def check_offload(options: OffloadOptions) -> None:
    """Refuse, before anything is opened, options that contradict each other.

    Raises:
        UsageError: the message says which.
    """
    if options.flash_limit is not None and not is_url(options.offload):
        raise UsageError("--flash-limit says what stays on flash before the object store; give --offload URL with it")


def open_offload(options: OffloadOptions, spec: PageSpec, medium: Medium | None = None) -> PageStore:
    """Open the flash tier of one run, on a medium that it closes, or the object store below it.

    Raises:
        StoreLocked, StoreError: folder or object store cannot be used. EngineMissing: no package for it, or for encryption.
        UsageError: the options contradict each other.
    """
    check_offload(options)
    if not is_url(options.offload):
        return _open_flash(options, spec, Path(options.offload) if options.offload is not None else None, medium)
    cipher = Cipher.ephemeral() if options.encrypt_offload else None
    remote = ObjectStore(str(options.offload), spec, cipher=cipher, patience_s=options.offload_patience_s)
    if options.flash_limit is None:
        return remote
    try:
        flash = _open_flash(options, spec, None, medium)
    except BaseException:
        remote.close()
        raise
    return LayeredStore(flash, remote, FLASH_LIMIT.check(options.flash_limit) // spec.record_bytes)


def _open_flash(options: OffloadOptions, spec: PageSpec, chosen: Path | None, medium: Medium | None) -> PageStore:
    beside = chosen or cache_home() / "offload"
    cipher = Cipher.ephemeral() if options.encrypt_offload else None  # the key is in no file
    with contextlib.ExitStack() as undo:
        scratch = None
        try:
            make_folder(beside)
            if chosen is None:
                scratch = undo.enter_context(ScratchFolder(beside, "run-"))
        except OSError as error:
            raise unusable(beside, error) from error
        wear = undo.enter_context(WearLedger(beside, MAX_WRITE_PER_DAY.optional(options.max_write_per_day)))
        store = FlashStore(scratch.path if scratch else beside, spec, medium, wear, cipher, scratch)
        undo.pop_all()
        return store
