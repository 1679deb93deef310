"""What docs/flash_format.md takes from the code: tables, the schema of the index, and an example in bytes.

`python -m tests.outside.format_page` writes them.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgekv.bundle import Manifest
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.pages.cache import KVCache
from edgekv.runtime.pages.policy import CacheOptions
from edgekv.runtime.sessions.folder import session_key
from edgekv.runtime.sessions.index import INDEX, Meta, Tail
from edgekv.runtime.sessions.session import Session
from edgekv.runtime.sessions.steps import Steps
from edgekv.runtime.storage import cipher, record, wear
from edgekv.spec import RECORD_ALIGN_BYTES, RECORD_HEADER_BYTES, ModelSpec, RopeSpec
from tests.fields import field_table, put_tables

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flash_format.md"
MODEL = ModelSpec("example", 1, 4, 1, 1, 4, 4, 100, 64, RopeSpec((1.0, 0.01)), 0.5, (0,))
MANIFEST = Manifest("onnx", "split", "fp32", 4, MODEL, (), "1" * 64, "2" * 64)
TOKENS, N_KV = [11, 12, 13, 14, 15, 16], 5
#: What the fields of a record's header hold.
HEADER = {
    "magic": "the bytes `" + record.MAGIC.decode() + "`",
    "checksum": "xxh3-64 of bytes 16 up to the end of the payload",
    "record": "the number of this record: one that was moved or swapped is not believed",
    "tag": "which page this is: `page + (layer << 32) + (kind << 48)`",
    "payload_bytes": "`payload_bytes`, see below",
}
KEY = {
    "checkpoint": "`source_sha256` of the manifest",
    "weights": "`weights` of the manifest",
    "tokenizer": "`tokenizer_sha256` of the manifest",
    "geometry": "the text `{n_layers} layers, {n_q_heads}/{n_kv_heads} heads of {head_dim}`",
    "rope": "hash of `model.rope.inv_freq`, then `model.rope.attention_scaling`; then of `model.sliding_rope`, if it is set",
    "attention": "hash of `model.windows`, then `model.softmax_scale`; then `model.softcap`, if it is not 0",
    "page_size": "`page_size` of the manifest, a number",
    "codec": f"the number {session_key(MANIFEST)['codec']}: the version of the INT8 codec",
}


def tables() -> dict[str, str]:
    index, made = example()
    return {
        "record": header_table(),
        "index": f"```sql\n{index}\n```",
        "meta": field_table(Meta),
        "key": key_table(),
        "tail": field_table(Tail, leave_out=("starts",)),
        "wear": field_table(wear.Line),
        "constants": constants(),
        "example": made,
    }


def header_table() -> str:
    rows = ["| offset | bytes | type | field |", "|---|---|---|---|"]
    fields = record._HEADER_DTYPE.fields
    assert fields is not None
    assert set(fields) == set(HEADER)
    for name, (kind, offset, *_) in fields.items():
        words = f"bytes[{kind.itemsize}]" if kind.kind == "S" else f"uint{8 * kind.itemsize}"
        rows.append(f"| {offset} | {kind.itemsize} | {words} | {HEADER[name]} |")
    nonce, tag, head = cipher.NONCE_BYTES, cipher.TAG_BYTES, RECORD_HEADER_BYTES
    rows.append(f"| {head - nonce - tag} | {nonce} | bytes[{nonce}] | zero; the nonce of an encrypted record |")
    rows.append(f"| {head - tag} | {tag} | bytes[{tag}] | zero; the tag of an encrypted record |")
    rows.append(f"| {head} | payload_bytes | | the payload |")
    rows.append(f"| {head} + payload_bytes | | | zeros up to a multiple of {RECORD_ALIGN_BYTES} |")
    return "\n".join(rows)


def key_table() -> str:
    key = session_key(MANIFEST)
    assert set(key) == set(KEY)
    return "\n".join(["| field | content |", "|---|---|", *(f"| `{name}` | {KEY[name]} |" for name in key)])


def constants() -> str:
    scrypt = ", ".join(f"{name} = {value}" for name, value in cipher.SCRYPT.items())
    rows = {
        "key": f"scrypt(secret, salt, {scrypt})",
        "salt": f"{cipher.SALT_BYTES} random bytes, one salt a session: `salt` of `meta`",
        "cipher": "AES-256-GCM",
        "nonce": f"{cipher.NONCE_BYTES} random bytes, another one each time that something is encrypted",
        "tag": f"{cipher.TAG_BYTES} bytes",
        "associated data of a row": "the name of the row, UTF-8",
        "associated data of a record": "bytes 16 to 35 of its header: number, tag, payload_bytes",
        "associated data of `probe`": "the five bytes `probe`",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def example() -> tuple[str, str]:
    """Let edgekv write a small session; returns the schema of its index, and the session in bytes."""
    spec = MODEL.pages(MANIFEST.page_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.kv"
        session = Session.open(SessionOptions(path), MANIFEST)
        cache = KVCache(spec, CacheOptions(budget_bytes=8 * spec.frame_bytes), load_kernels(), session.store)
        token, channel = np.arange(1, N_KV + 1)[:, None, None], np.arange(1, 5)[None, None, :]
        keys, values = (token * channel / 8).astype(np.float32), (channel - token / 4).astype(np.float32)
        cache.append(0, keys, values, np.arange(N_KV))
        session.checkpoint(cache, TOKENS[:N_KV], TOKENS[N_KV:], Steps(4, [0], N_KV), whole=True)
        session.close()
        with closing(sqlite3.connect(path / INDEX)) as database:
            schema: str = database.execute("SELECT sql FROM sqlite_master").fetchone()[0]
            rows = {row[0]: row[1:] for row in database.execute("SELECT name, value, xxh3 FROM item")}
        pages = (path / "pages-00000001.bin").read_bytes()
    key = json.dumps(session_key(replace(MANIFEST)), indent=1)
    size = spec.record_bytes
    parts = [
        f"`key` of `meta`:\n\n```json\n{key}\n```",
        f"Row `page 0`, whose checksum is `{rows['page 0'][1].hex(' ')}`:\n\n```\n{dump(rows['page 0'][0])}\n```",
        f"Row `tail`:\n\n```json\n{rows['tail'][0].decode()}\n```",
        f"`pages-00000001.bin`, {len(pages)} bytes; what is left out is zero:\n\n```\n"
        + "\n...\n".join(dump(pages[at : at + 112], at) for at in range(0, len(pages), size))
        + "\n```",
    ]
    return schema, "\n\n".join(parts)


def dump(data: bytes, base: int = 0) -> str:
    rows = (data[at : at + 16] for at in range(0, len(data), 16))
    return "\n".join(f"{base + 16 * at:05x}  {row.hex(' ')}" for at, row in enumerate(rows))


def render(page: str) -> str:
    return put_tables(page, tables())


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
