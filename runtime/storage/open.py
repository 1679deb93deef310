"""Opens the flash tier of a run, or the object store below it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import StoreError, UsageError
from edgekv.scratch import ScratchFolder
from edgekv.settings import FLASH_LIMIT, MAX_WRITE_PER_DAY
from edgekv.spec import PageSpec

from ..system.files import make_folder
from ..system.process import cache_home
from .cipher import Cipher
from .flash import FlashStore, unusable
from .interface import PageStore
from .layered import LayeredStore
from .medium import SYSTEM, Medium
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


def open_offload(
    options: OffloadOptions, spec: PageSpec, medium: Medium = SYSTEM
) -> tuple[PageStore, ScratchFolder | None]:
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
    limit = FLASH_LIMIT.check(options.flash_limit)
    try:
        flash, scratch = _open_flash(options, spec, None, medium)
    except StoreError:
        remote.close()
        raise
    return LayeredStore(flash, remote, limit // spec.record_bytes), scratch


def _open_flash(
    options: OffloadOptions, spec: PageSpec, chosen: Path | None, medium: Medium
) -> tuple[PageStore, ScratchFolder | None]:
    folder, scratch = chosen or cache_home() / "offload", None
    beside = folder
    try:
        make_folder(folder)
        if chosen is None:
            scratch = ScratchFolder(folder, "run-")
            folder = scratch.path
    except OSError as error:
        raise unusable(folder, error) from error
    wear = WearLedger(beside, MAX_WRITE_PER_DAY.optional(options.max_write_per_day))
    try:
        cipher = Cipher.ephemeral() if options.encrypt_offload else None  # the key is in no file
        return FlashStore(folder, spec, medium, wear, cipher), scratch
    except BaseException:
        wear.close()
        raise
