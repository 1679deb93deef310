"""Copies files to a device: only what is not there, going on where an earlier copy ended."""

from __future__ import annotations

import hashlib
import posixpath
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekv.bundle import MANIFEST, Manifest, file_sha256
from edgekv.errors import EdgeKVError

from .device import Device

#: Bytes that go to the client at once; between two of them the bar moves and Ctrl-C is heard.
CHUNK_BYTES = 1 << 18
#: A file whose end is not what was sent is sent so often.
_TRIES = 2

#: Called with (name, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Item:
    """A file to copy: from where, its name in the folder there, and a folder there that would make it needless."""

    source: Path
    name: str
    size: int
    sha256: str
    instead: str | None = None


@dataclass(frozen=True)
class Missing:
    """A file that is not there, but for its first ``begun`` bytes; ``wrong``: its part is no beginning of it."""

    item: Item
    begun: int
    wrong: bool

    @property
    def left(self) -> int:
        """Bytes to send."""
        return self.item.size - self.begun


@dataclass(frozen=True)
class Plan:
    """What is to be copied into a folder, and where the rest lies: (name, folder)."""

    folder: str
    missing: tuple[Missing, ...]
    there: tuple[tuple[str, str], ...]

    @property
    def left(self) -> int:
        """Bytes to send."""
        return sum(one.left for one in self.missing)


def bundle_items(bundle: Path, manifest: Manifest) -> list[Item]:
    """Return the files of a bundle, the manifest last."""
    items = [Item(bundle / name, name, facts["bytes"], facts["sha256"]) for name, facts in manifest.files.items()]
    path = bundle / MANIFEST
    return [*items, Item(path, MANIFEST, path.stat().st_size, file_sha256(path))]


def wheel_items(wheels: Sequence[Path], folder: str) -> list[Item]:
    """Return wheels as files of a folder there, where each is a folder once it is unpacked."""
    items = []
    for path in wheels:
        digest = file_sha256(path)
        name = f"{'-'.join(path.stem.split('-')[:2])}-{digest[:12]}"
        items.append(Item(path, f"{name}.whl", path.stat().st_size, digest, posixpath.join(folder, name)))
    return items


def unpacked_bytes(wheel: Path) -> int:
    """Return the bytes of a wheel's files."""
    with zipfile.ZipFile(wheel) as files:
        return sum(entry.file_size for entry in files.infolist())


def plan_copy(device: Device, items: Sequence[Item], folder: str, *older: str) -> Plan:
    """Ask a device what it has; nothing is changed there.

    Args:
        folder: where the files go.
        older: further folders that may have some of them.
    """
    asked = [[item.name, item.size, item.sha256, item.instead] for item in items]
    missing: list[Missing] = []
    there: list[tuple[str, str]] = []
    for item, found in zip(items, device.ask("missing", folders=[folder, *older], items=asked), strict=True):
        if isinstance(found, str):
            there.append((item.name, found))
            continue
        size, digest = found
        right = size <= item.size and (size == 0 or _begins_with(item.source, size, digest))
        missing.append(Missing(item, size if right else 0, not right))
    return Plan(folder, tuple(missing), tuple(there))


def copy(device: Device, plan: Plan, progress: Progress) -> int:
    """Copy what a plan says, and return the bytes that were sent.

    Raises:
        EdgeKVError: a file cannot be written there, or differs whenever it is sent.
        DeviceLost: the connection ended; what was sent stays there for the next try.
    """
    older = [list(one) for one in plan.there if one[1] != plan.folder and not one[1].startswith(plan.folder + "/")]
    drop = [one.item.name for one in plan.missing if one.wrong]
    device.ask("prepare", folder=plan.folder, names=[one.item.name for one in plan.missing], older=older, drop=drop)
    sent, total = 0, plan.left

    for one in plan.missing:

        def count(size: int, name: str = one.item.name) -> None:
            nonlocal sent
            sent += size
            progress(name, min(sent, total), total)

        _send(device, one, posixpath.join(plan.folder, one.item.name), count)
    return sent


def _send(device: Device, one: Missing, path: str, count: Callable[[int], None]) -> None:
    item, begun = one.item, one.begun
    for _ in range(_TRIES):
        if begun < item.size or item.size == 0:
            device.append(f"{path}.part", _chunks(item.source, begun, count))
        if device.ask("finish", path=path, size=item.size, digest=item.sha256):
            return
        begun, digest = device.ask("begun", path=path)
        if begun and not _begins_with(item.source, begun, digest):
            break
    raise EdgeKVError(
        f"{device.name}: {path} does not become what was sent; is its drive full (`df`), or was {item.source} changed?"
    )


def _chunks(path: Path, begin: int, count: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(begin)
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
            count(len(chunk))


def _begins_with(path: Path, size: int, digest: str) -> bool:
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while size > 0 and (chunk := stream.read(min(size, 1 << 20))):
            found.update(chunk)
            size -= len(chunk)
    return size == 0 and found.hexdigest() == digest
