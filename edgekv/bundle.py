"""What an exported folder holds: graphs, weights, tokenizer, and a manifest that names and hashes them all.

``manifest.json`` is written last, so that a folder with a manifest is a whole bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgekv
from edgekv.contract import CONTRACT_VERSION
from edgekv.errors import BundleError
from edgekv.spec import ModelSpec

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class EmbeddingSpec:
    """Where the runtime looks up the embedding rows of the split form.

    ``dtype``: ``float32``/``float16``: rows [vocab, hidden] at ``offset`` of ``file``. ``int8``: codes
    [vocab, hidden] uint8, value (code - 128) * scale. ``int4``: codes [vocab, hidden / 2] uint8, low nibble
    first, value (code - 8) * scale. Both have one float32 scale per 32 channels at ``scales_offset``
    [vocab, hidden / 32]. That is what MatMulNBits reads: when the embedding is tied, ``file`` and the offsets are
    those of the output head. ``dtype`` may differ from the weights of the export.
    """

    file: str
    dtype: str
    offset: int
    scales_offset: int = 0


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``. ``files`` maps each file's name to its bytes and sha256.

    ``operators`` is one of :data:`edgekv.contract.OPERATORS` for ExecuTorch, None for other engines.
    """

    engine: str
    form: str
    weights: str
    page_size: int
    model: ModelSpec
    graphs: tuple[str, ...]
    source_sha256: str
    tokenizer_sha256: str
    embedding: EmbeddingSpec | None = None
    chat_template: str | None = None
    operators: str | None = None
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    contract_version: int = CONTRACT_VERSION
    edgekv_version: str = edgekv.__version__

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain data."""
        return dataclasses.asdict(self)


def file_sha256(path: Path) -> str:
    """Hash a file without holding it in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest, progress: Callable[[str], None] = lambda name: None) -> Manifest:
    """Hash every file of ``folder`` and write the manifest, atomically and last.

    Args:
        progress: called with the name of each file before it is hashed.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = path.relative_to(folder).as_posix()
        progress(name)
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = dataclasses.replace(manifest, files=files)
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a bundle. File contents are not checked here; see :func:`check_files`.

    Raises:
        BundleError: no bundle, a newer format, or a damaged manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}; make one with: edgekv export SOURCE --out {folder}"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
        if version > FORMAT_VERSION:
            raise BundleError(
                f"{folder} has bundle format {version}, this edgekv ({edgekv.__version__}) reads up to {FORMAT_VERSION};"
                " upgrade edgekv or export again"
            )
        embedding = data["embedding"]
        return Manifest(
            **{
                **data,
                "model": ModelSpec.from_json(data["model"]),
                "graphs": tuple(data["graphs"]),
                "embedding": EmbeddingSpec(**embedding) if embedding else None,
            }
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is damaged ({error!r}); export the bundle again") from error


def check_files(folder: Path, manifest: Manifest, *, stamp: Path | None = None) -> None:
    """Check that every file of the bundle is the one that was exported.

    Args:
        stamp: remembers size and mtime of files that passed, so that gigabytes are hashed once and not at
            each start. None hashes all.

    Raises:
        BundleError: a file is missing, or differs from its hash.
    """
    seen = {}
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{folder}: {name} is missing; copy the whole bundle again, or export it again")
        status = path.stat()
        if status.st_size != expected["bytes"]:
            raise BundleError(
                f"{folder}: {name} has {status.st_size} bytes, the manifest says {expected['bytes']};"
                " copy the bundle again, or export it again"
            )
        seen[name] = [status.st_size, status.st_mtime_ns, expected["sha256"]]
    if stamp is not None and _read_stamp(stamp) == seen:
        return
    for name, expected in manifest.files.items():
        if file_sha256(folder / name) != expected["sha256"]:
            raise BundleError(f"{folder}: {name} differs from its sha256; copy the bundle again, or export it again")
    if stamp is not None:
        try:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(json.dumps(seen), encoding="utf-8")
        except OSError:
            pass  # a read-only home only costs the hashing next time


def _read_stamp(stamp: Path) -> Any:
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
