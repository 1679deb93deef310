"""Reads and writes the sessions of edgekv without edgekv: docs/flash_format.md as a program.

NumPy, SQLite and xxHash (the package ``xxhash``); ``cryptography`` for encrypted sessions. A test holds it against edgekv.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import struct
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Array = NDArray[Any]
MAGIC = b"EKVPAGE1"
HEADER = struct.Struct("<8sQQIHHI")  # magic, checksum, record, page, layer, kind, payload bytes; then 28 bytes
HEADER_BYTES = 64
SEALED, OPEN_KEYS, OPEN_VALUES = 0, 1, 2
TABLE = "CREATE TABLE item(name TEXT PRIMARY KEY, value BLOB, xxh3 BLOB) WITHOUT ROWID"


@dataclass(frozen=True)
class Shape:
    """Of the pages of a model."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    page_size: int

    @property
    def elements(self) -> int:
        """Keys in a page; there are as many values."""
        return self.n_kv_heads * self.head_dim * self.page_size

    @property
    def payload_bytes(self) -> int:
        """Bytes of a sealed page."""
        return 2 * self.elements + 2 * self.n_kv_heads * (self.head_dim + self.page_size)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return -(-(HEADER_BYTES + self.payload_bytes) // 4096) * 4096


@dataclass
class SealedPage:
    """One page of one layer, as codes and scales."""

    key_codes: Array  # [n_kv_heads, head_dim, page_size] int8
    key_scales: Array  # [n_kv_heads, head_dim] float16
    value_codes: Array  # [n_kv_heads, page_size, head_dim] int8
    value_scales: Array  # [n_kv_heads, page_size] float16

    @classmethod
    def quantise(cls, keys: Array, values: Array) -> SealedPage:
        """Make a page of float16 keys and values, both [page_size, n_kv_heads, head_dim]."""
        key_codes, key_scales = _quantise(keys.astype(np.float32), axis=0)
        value_codes, value_scales = _quantise(values.astype(np.float32), axis=2)
        return cls(key_codes.transpose(1, 2, 0), key_scales, value_codes.transpose(1, 0, 2), value_scales.T)

    def pack(self) -> bytes:
        """Return the payload of a record."""
        heads, dim, size = self.key_codes.shape
        keys = self.key_codes.reshape(heads, dim // 4, 4, size).swapaxes(2, 3)
        values = self.value_codes.reshape(heads, size // 4, 4, dim).swapaxes(2, 3)
        return keys.tobytes() + values.tobytes() + self.key_scales.tobytes() + self.value_scales.tobytes()

    @classmethod
    def unpack(cls, payload: bytes, shape: Shape) -> SealedPage:
        """Read the payload of a record."""
        heads, dim, size, n = shape.n_kv_heads, shape.head_dim, shape.page_size, shape.elements
        keys = np.frombuffer(payload, np.int8, n).reshape(heads, dim // 4, size, 4).swapaxes(2, 3)
        values = np.frombuffer(payload, np.int8, n, n).reshape(heads, size // 4, dim, 4).swapaxes(2, 3)
        key_scales = np.frombuffer(payload, "<f2", heads * dim, 2 * n).reshape(heads, dim)
        value_scales = np.frombuffer(payload, "<f2", heads * size, 2 * n + 2 * heads * dim).reshape(heads, size)
        return cls(keys.reshape(heads, dim, size), key_scales, values.reshape(heads, size, dim), value_scales)


def _quantise(x: Array, axis: int) -> tuple[Array, Array]:
    exact = np.max(np.abs(x), axis=axis) / np.float32(127)
    scale = exact.astype(np.float16)
    scale = np.where(scale.astype(np.float32) < exact, np.nextafter(scale, np.float16(np.inf)), scale)
    scale = np.maximum(scale, np.float16(2.0**-24))
    return np.rint(x / np.expand_dims(scale.astype(np.float32), axis)).astype(np.int8), scale


@dataclass
class Session:
    """What a session holds.

    ``pages``: per sealed page its layers; no layers where every token of the page was pruned. ``open_keys``, ``open_values``:
    [n_layers, n_kv_heads, page_size, head_dim] float16 of the page that is not full; None: not stored.
    """

    key: dict[str, Any]
    shape: Shape
    tokens: list[int] = field(default_factory=list)
    n_kv: int = 0
    steps: list[int] = field(default_factory=list)
    pruned: list[int] = field(default_factory=list)
    pages: list[list[SealedPage]] = field(default_factory=list)
    open_keys: Array | None = None
    open_values: Array | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def compatibility_key(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the keys and values of a bundle depend on."""
    model = manifest["model"]
    capped = [model["softcap"]] if model.get("softcap") else []
    ropes = [model[name] for name in ("rope", "sliding_rope") if model.get(name) is not None]

    def short(numbers: list[float]) -> str:
        return hashlib.sha256(np.array(numbers, "<f8").tobytes()).hexdigest()[:16]

    return {
        "checkpoint": manifest["source_sha256"],
        "weights": manifest["weights"],
        "tokenizer": manifest["tokenizer_sha256"],
        "geometry": f"{model['n_layers']} layers, {model['n_q_heads']}/{model['n_kv_heads']} heads of {model['head_dim']}",
        "rope": short([number for rope in ropes for number in (*rope["inv_freq"], rope["attention_scaling"])]),
        "attention": short([*model["windows"], model["softmax_scale"], *capped]),
        "page_size": manifest["page_size"],
        "codec": 1,
    }


def shape_of(manifest: dict[str, Any]) -> Shape:
    """The shape of the pages of a bundle."""
    model = manifest["model"]
    return Shape(model["n_layers"], model["n_kv_heads"], model["head_dim"], manifest["page_size"])


class Cipher:
    """AES-256-GCM with a key made of a secret and a salt; without a secret everything stays as it is."""

    def __init__(self, secret: bytes | None, salt: bytes) -> None:
        self._aes = None
        if secret is not None:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            self._aes = AESGCM(hashlib.scrypt(secret, salt=salt, n=16384, r=8, p=1, dklen=32))

    def seal(self, plain: bytes, place: bytes) -> tuple[bytes, bytes, bytes]:
        """Return nonce, ciphertext and tag; the nonce and the tag of plain bytes are empty."""
        if self._aes is None:
            return b"", plain, b""
        nonce = os.urandom(12)
        both = self._aes.encrypt(nonce, plain, place)
        return nonce, both[:-16], both[-16:]

    def open(self, nonce: bytes, ciphertext: bytes, tag: bytes, place: bytes) -> bytes:
        """Decrypt; who has another key, or finds it in another place, gets an exception."""
        return ciphertext if self._aes is None else self._aes.decrypt(nonce, ciphertext + tag, place)

    def seal_row(self, value: bytes, name: str) -> bytes:
        """Encrypt a row of the index."""
        return b"".join(self.seal(value, name.encode()))

    def open_row(self, value: bytes, name: str) -> bytes:
        """Decrypt a row of the index."""
        return value if self._aes is None else self.open(value[:12], value[12:-16], value[-16:], name.encode())


# -- reading ---------------------------------------------------------------------------------------------------------


def read_session(folder: Path, secret: bytes | None = None) -> Session:
    """Read a session that no process has open; what is damaged is an error."""
    with closing(sqlite3.connect(f"{(folder / 'index.sqlite').as_uri()}?mode=ro", uri=True)) as database:
        rows = {name: (value, check) for name, value, check in database.execute("SELECT name, value, xxh3 FROM item")}
    for name, (value, check) in rows.items():
        assert check == _row_check(name, value), f"row {name} is damaged"
    meta = json.loads(rows["meta"][0])
    assert meta["format"] == 2
    assert meta["encrypted"] == (secret is not None)
    cipher = Cipher(secret, bytes.fromhex(meta.get("salt", "")))
    shape = Shape(**meta["pages"])

    def row(name: str) -> bytes:
        return cipher.open_row(rows[name][0], name)

    def record(number: int, check: int, page: int, layer: int, kind: int) -> bytes:
        file = folder / f"pages-{number >> 32:08d}.bin"
        with file.open("rb") as stream:
            stream.seek((number & 0xFFFFFFFF) * shape.record_bytes)
            data = stream.read(shape.record_bytes)
        head = (MAGIC, check, number, page, layer, kind, shape.payload_bytes)
        assert data[: HEADER.size] == HEADER.pack(*head), f"record {number} is another one"
        stop = HEADER_BYTES + shape.payload_bytes
        assert check == xxhash.xxh3_64_intdigest(data[16:stop]), f"record {number} is damaged"
        return cipher.open(data[36:48], data[HEADER_BYTES:stop], data[48:64], data[16:36])

    tail = json.loads(row("tail"))
    session = Session(meta["key"], shape, notes=json.loads(row("notes")))
    size, layers, chain = shape.page_size, shape.n_layers, b""
    for page in range(tail["n_pages"]):
        packed = row(f"page {page}")
        tokens = np.frombuffer(packed, "<i4", size)
        chain = _chain(chain, tokens)
        assert packed[-16:] == chain, f"page {page} is of another history"
        session.tokens += tokens.tolist()
        held = layers if len(packed) > 4 * size + 16 else 0
        numbers = np.frombuffer(packed, "<i8", held, 4 * size).tolist()
        checks = np.frombuffer(packed, "<u8", held, 4 * size + 8 * held).tolist()
        session.pages.append(
            [
                SealedPage.unpack(record(number, check, page, layer, SEALED), shape)
                for layer, (number, check) in enumerate(zip(numbers, checks, strict=True))
            ]
        )
    assert tail["chain"] == chain.hex()
    session.tokens += tail["tokens"]
    session.n_kv, session.steps, session.pruned = tail["n_kv"], tail["steps"], tail["pruned"]
    if tail["records"]:
        places = [(layer, kind) for layer in range(layers) for kind in (OPEN_KEYS, OPEN_VALUES)]
        halves = [
            np.frombuffer(record(number, check, tail["n_pages"], layer, kind), "<f2", shape.elements)
            for number, check, (layer, kind) in zip(tail["records"], tail["checks"], places, strict=True)
        ]
        heads, dim = shape.n_kv_heads, shape.head_dim
        session.open_keys = np.stack(halves[0::2]).reshape(layers, heads, dim, size).swapaxes(2, 3)
        session.open_values = np.stack(halves[1::2]).reshape(layers, heads, size, dim)
    return session


# -- writing ---------------------------------------------------------------------------------------------------------


def write_session(folder: Path, session: Session, secret: bytes | None = None) -> None:
    """Write a new session: first the records, then the index that refers to them."""
    shape, size, salt = session.shape, session.shape.page_size, os.urandom(16)
    cipher = Cipher(secret, salt)
    folder.mkdir(mode=0o700)
    rows: dict[str, bytes] = {}
    chain, n_sealed = b"", len(session.pages) * size
    with _create(folder / "pages-00000001.bin") as stream:

        def write(page: int, layer: int, kind: int, payload: bytes) -> tuple[int, int]:
            number = 1 << 32 | stream.tell() // shape.record_bytes
            place = struct.pack("<QIHHI", number, page, layer, kind, shape.payload_bytes)
            nonce, payload, tag = cipher.seal(payload.ljust(shape.payload_bytes, b"\0"), place)
            checked = place + nonce.ljust(12, b"\0") + tag.ljust(16, b"\0") + payload
            check = xxhash.xxh3_64_intdigest(checked)
            stream.write((MAGIC + struct.pack("<Q", check) + checked).ljust(shape.record_bytes, b"\0"))
            return number, check

        for page, layers in enumerate(session.pages):
            tokens = np.array(session.tokens[page * size : page * size + size], "<i4")
            chain = _chain(chain, tokens)
            written = [write(page, layer, SEALED, one.pack()) for layer, one in enumerate(layers)]
            numbers, checks = np.array([n for n, _ in written], "<i8"), np.array([c for _, c in written], "<u8")
            rows[f"page {page}"] = tokens.tobytes() + numbers.tobytes() + checks.tobytes() + chain
        opened = []
        if session.open_keys is not None and session.open_values is not None:
            for layer, (keys, values) in enumerate(zip(session.open_keys, session.open_values, strict=True)):
                opened.append(write(len(session.pages), layer, OPEN_KEYS, keys.swapaxes(1, 2).tobytes()))
                opened.append(write(len(session.pages), layer, OPEN_VALUES, values.tobytes()))
        stream.flush()
        os.fsync(stream.fileno())
    tail = {
        "n_pages": len(session.pages),
        "tokens": session.tokens[n_sealed:],
        "n_kv": session.n_kv,
        "records": [number for number, _ in opened],
        "checks": [check for _, check in opened],
        "chain": chain.hex(),
        "pruned": session.pruned,
        "steps": session.steps,
    }
    rows |= {"tail": json.dumps(tail).encode(), "notes": json.dumps(session.notes).encode()}
    rows = {name: cipher.seal_row(value, name) for name, value in rows.items()}
    meta = {
        "format": 2,
        "key": session.key,
        "pages": vars(shape),
        "created": time.time(),
        "encrypted": secret is not None,
        "salt": salt.hex() if secret is not None else "",
        "probe": cipher.seal_row(b"", "probe").hex(),
    }
    rows["meta"] = json.dumps(meta).encode()
    _create(folder / "index.sqlite").close()
    with closing(sqlite3.connect(folder / "index.sqlite")) as database:
        database.execute(TABLE)
        database.executemany(
            "INSERT INTO item VALUES (?, ?, ?)",
            [(name, value, _row_check(name, value)) for name, value in rows.items()],
        )
        database.commit()


def _create(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _row_check(name: str, value: bytes) -> bytes:
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(name.encode() + b"\0" + value))


def _chain(before: bytes, tokens: Array) -> bytes:
    return hashlib.blake2b(before + tokens.tobytes(), digest_size=16).digest()
