"""One page outside RAM, as bytes: the same record on flash, in a session and in an object store.

A record is (little endian), padded to ``PageSpec.record_bytes``::

    offset  bytes  field
    0       8      magic b"EKVPAGE1"
    8       8      xxh3-64 checksum of everything after it up to the end of the payload
    16      8      record number: a record that was moved or swapped is not believed
    24      8      tag: which page this is, page | layer << 32 | kind << 48
    32      4      payload bytes
    36      28     zero; of an encrypted record: 12 bytes nonce and 16 bytes tag of AES-256-GCM
    64      ...    payload: the WARM page as it lay in RAM, or the keys or the values of an open HOT page; or ciphertext

docs/flash_format.md says it for programs that are not ours.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from edgekv.spec import RECORD_CHECKED_FROM, RECORD_HEAD_BYTES, RECORD_HEADER_BYTES

from ..kernels.choose import load_kernels
from .cipher import NONCE_BYTES, TAG_BYTES, Cipher

MAGIC = b"EKVPAGE1"
#: Kinds of records in a tag, beside a sealed page (0): the fp16 keys of an open one, and its values.
OPEN_KEYS, OPEN_VALUES = 1 << 48, 2 << 48
_HEADER = struct.Struct("<8sQQQI")
_HEADER_DTYPE = np.dtype(
    [("magic", "S8"), ("checksum", "<u8"), ("record", "<u8"), ("tag", "<u8"), ("payload_bytes", "<u4")]
)
assert _HEADER.size == RECORD_HEAD_BYTES == RECORD_HEADER_BYTES - NONCE_BYTES - TAG_BYTES

Bytes = NDArray[np.uint8]


def pack_record(row: Bytes, record: int, tag: int, page: Bytes, payload_bytes: int, cipher: Cipher | None) -> None:
    """Write one record into ``row`` [record_bytes] uint8, which holds zeros.

    Args:
        page: [<= payload_bytes] uint8. cipher: encrypts the payload, bound to its place.
    """
    stop = RECORD_HEADER_BYTES + payload_bytes
    row[RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + page.size] = page
    _HEADER.pack_into(row, 0, MAGIC, 0, record, tag, payload_bytes)
    if cipher is not None:
        encrypted = cipher.encrypt(
            row[RECORD_HEADER_BYTES:stop].tobytes(), row[RECORD_CHECKED_FROM:RECORD_HEAD_BYTES].tobytes()
        )
        parts = np.frombuffer(encrypted, np.uint8)
        row[RECORD_HEAD_BYTES:RECORD_HEADER_BYTES] = np.concatenate([parts[:NONCE_BYTES], parts[-TAG_BYTES:]])
        row[RECORD_HEADER_BYTES:stop] = parts[NONCE_BYTES:-TAG_BYTES]
    struct.pack_into("<Q", row, 8, xxhash.xxh3_64_intdigest(row[RECORD_CHECKED_FROM:stop].data))


@dataclass(frozen=True)
class Wanted:
    """Records that are to be read, and what identifies each; made once, read many times."""

    records: list[int]
    tags: list[int]
    payload_bytes: int

    @functools.cached_property
    def places(self) -> NDArray[np.int64]:
        """The records as [n] int64."""
        return np.array(self.records, np.int64)

    @functools.cached_property
    def heads(self) -> Bytes:
        """What the records begin with [n, RECORD_HEAD_BYTES] uint8, the checksum left out."""
        return _heads(self.records, self.tags, self.payload_bytes)

    def shifted(self, base: int) -> Wanted:
        """Return the same records as a store names them whose numbers lie ``base`` lower."""
        return Wanted([record - base for record in self.records], self.tags, self.payload_bytes)

    def split(self, where: Callable[[int], int]) -> list[tuple[int, Wanted, slice]]:
        """Cut into runs of records of which ``where`` says the same; returns what it says, the records, and their rows."""
        parts = []
        first = 0
        for place, run in itertools.groupby(map(where, self.records)):
            rows = slice(first, first + len(list(run)))
            whole = rows == slice(0, len(self.records))
            part = self if whole else Wanted(self.records[rows], self.tags[rows], self.payload_bytes)
            parts.append((place, part, rows))
            first = rows.stop
        return parts


def open_record(row: Bytes, record: int, tag: int, payload_bytes: int, cipher: Cipher | None) -> bool:
    """Check one record and decrypt it in place; returns whether it is what :func:`pack_record` wrote there."""
    good = bool(check_records(row[None], [record], [tag], payload_bytes)[0])
    return good and (cipher is None or decrypt(row, payload_bytes, cipher))


def is_short(payload_bytes: int) -> bool:
    """Return whether a record is too short for the kernels' checksum, which starts above 240 bytes."""
    return RECORD_HEADER_BYTES + payload_bytes - RECORD_CHECKED_FROM <= 240


def check_records(rows: Bytes, records: list[int], tags: list[int], payload_bytes: int) -> NDArray[np.bool_]:
    """Return which of ``rows`` [n, record_bytes] uint8 are what :func:`pack_record` wrote, [n] bool."""
    heads = _heads(records, tags, payload_bytes)
    stop = RECORD_HEADER_BYTES + payload_bytes
    sums = np.empty(len(rows), np.uint64)
    if is_short(payload_bytes):
        sums[:] = [xxhash.xxh3_64_intdigest(row[RECORD_CHECKED_FROM:stop].data) for row in rows]
    else:
        load_kernels().checksums(rows, RECORD_CHECKED_FROM, stop, sums)
    heads[:, 8:RECORD_CHECKED_FROM] = sums[:, None].view(np.uint8)
    good: NDArray[np.bool_] = np.all(rows[:, :RECORD_HEAD_BYTES] == heads, axis=1)
    return good


def _heads(records: list[int], tags: list[int], payload_bytes: int) -> Bytes:
    heads = np.empty(len(records), _HEADER_DTYPE)
    for name, value in zip(_HEADER_DTYPE.names or (), (MAGIC, 0, records, tags, payload_bytes), strict=True):
        heads[name] = value
    return heads.view(np.uint8).reshape(len(records), RECORD_HEAD_BYTES)


def decrypt(row: Bytes, payload_bytes: int, cipher: Cipher) -> bool:
    """Decrypt one checked record in place; returns whether the key and the place are those it was encrypted with."""
    stop = RECORD_HEADER_BYTES + payload_bytes
    nonce, tag_bytes = (
        row[RECORD_HEAD_BYTES : RECORD_HEAD_BYTES + NONCE_BYTES],
        row[RECORD_HEAD_BYTES + NONCE_BYTES : RECORD_HEADER_BYTES],
    )
    encrypted = nonce.tobytes() + row[RECORD_HEADER_BYTES:stop].tobytes() + tag_bytes.tobytes()
    plain = cipher.decrypt(encrypted, row[RECORD_CHECKED_FROM:RECORD_HEAD_BYTES].tobytes())
    if plain is None:
        return False
    row[RECORD_HEADER_BYTES:stop] = np.frombuffer(plain, np.uint8)
    return True


def checksum_of(row: Bytes) -> int:
    """Return the checksum that a record carries."""
    return int(row[8:16].view(np.uint64)[0])


def neighbours(records: list[int]) -> Iterator[tuple[int, int]]:
    """Cut records into runs [start, stop) that lie side by side on flash: one system call each."""
    start = 0
    for stop in range(1, len(records) + 1):
        if stop == len(records) or records[stop] != records[stop - 1] + 1:
            yield start, stop
            start = stop
