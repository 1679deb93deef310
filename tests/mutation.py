"""Documents with one fault: a value, a key, a byte. What hypothesis draws from, for every file format."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

#: What people, bad disks and strangers put where something else belongs.
SILLY: list[Any] = [
    None, True, False, "", "x", "../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "a\0b", "\ud800", "ö" * 300,
    "nan%", "inf%", "1e999%", "-5%", "60%", "nan", "0", "-1", "9" * 400, "1TB", "7 GB/s",
    -1, 0, 1, 2, 3, 7, 255, 4096, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, -(2**63),
    0.0, -0.0, 0.5, 1.5, 1e-320, 1e300, float("nan"), float("inf"),
    [], [[]], [0], [None], [1] * 50, {}, {"a": 1}, {"": None},
]  # fmt: skip

Place = tuple[Any, ...]


def places(data: Any, at: Place = ()) -> Iterator[Place]:
    """Yield the way to every value of a tree."""
    yield at
    if isinstance(data, (dict, list)):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from places(data[key], (*at, key))


@st.composite
def faulty(draw: st.DrawFn, data: Any) -> Any:
    """Return ``data`` with one value replaced, removed, added, doubled, or with one number a little off."""
    tree = copy.deepcopy(data)
    *way, last = draw(st.sampled_from([place for place in places(tree) if place]))
    parent = tree
    for key in way:
        parent = parent[key]
    kind = draw(st.sampled_from(["replace", "off by", "remove", "add"]))
    if kind == "replace" or (
        kind == "off by" and (isinstance(parent[last], bool) or not isinstance(parent[last], (int, float)))
    ):
        parent[last] = draw(st.sampled_from(SILLY) | st.integers() | st.floats() | st.text(max_size=9))
    elif kind == "off by":
        parent[last] = parent[last] * draw(st.sampled_from([-1, 2, 0.5, 1000, 2**20])) + draw(
            st.sampled_from([-1, 0, 1])
        )
    elif kind == "remove":
        del parent[last]
    elif isinstance(parent, dict):
        parent[draw(st.text(max_size=6))] = draw(st.sampled_from(SILLY))
    else:
        parent.insert(last, draw(st.sampled_from([*SILLY, parent[last]])))
    return tree


@st.composite
def faulty_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Return ``data`` cut short, with bytes changed, removed or put in."""
    place = draw(st.integers(0, max(len(data) - 1, 0)))
    kind = draw(st.sampled_from(["cut", "flip", "remove", "insert"]))
    if kind == "cut":
        return data[:place]
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :] if data else b""
    if kind == "remove":
        return data[:place] + data[place + draw(st.integers(1, 40)) :]
    return data[:place] + draw(st.binary(min_size=1, max_size=9) | st.just(b"[" * 100_000)) + data[place:]


def faulty_json(data: Any) -> st.SearchStrategy[bytes]:
    """Return a strategy for a JSON document with one fault: in its values, or in its bytes."""
    written = json.dumps(data).encode()
    return faulty(data).map(lambda tree: json.dumps(tree).encode()) | faulty_bytes(written)
