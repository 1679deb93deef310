"""What quality must be kept: named gates, or a file of the user's own."""

from __future__ import annotations

import difflib
import math
import sys
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from edgekv.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAMED = ("strict", "standard")
IDENTITY = ("always", "promised", "never")


@dataclass(frozen=True)
class Limits:
    """Limits on a comparison with the full fp16 cache; None is no limit.

    ``perplexity_change`` bounds the relative change in both directions, ``perplexity_rise`` upwards.
    ``*_kld`` are upper bounds in nats: of the mean,
    the 99th percentile, the largest, and the largest mean over 32 neighbouring positions. ``top1``: least share of
    positions with the same most likely token. ``tasks``: least share of the full cache's score on every task.
    """

    perplexity_change: float | None = None
    perplexity_rise: float | None = None
    mean_kld: float | None = None
    p99_kld: float | None = None
    max_kld: float | None = None
    stretch_kld: float | None = None
    top1: float | None = None
    tasks: float | None = None


@dataclass(frozen=True)
class Gate:
    """Limits for runs that attend to every token (``exact``) and for those that leave some out (``partial``).

    ``identity``: must the logits be bit-identical to those of the same tier, resident, without budget or flash?
    ``promised``: where edgekv promises it (nothing dropped, INT8 from the seal or fp16 throughout); ``always``; ``never``.
    """

    name: str
    identity: str
    exact: Limits
    partial: Limits


@dataclass(frozen=True)
class Finding:
    """One limit, held against one measurement."""

    what: str
    relation: str
    allowed: float
    measured: float
    passed: bool

    def __str__(self) -> str:
        return f"{self.what} is {self.measured:.4g}, the gate asks for {self.relation} {self.allowed:.4g}"


def at_most(what: str, allowed: float, measured: float) -> Finding:
    """Hold an upper bound; NaN does not pass."""
    return Finding(what, "at most", allowed, measured, measured <= allowed)


def at_least(what: str, allowed: float, measured: float) -> Finding:
    """Hold a lower bound; NaN does not pass."""
    return Finding(what, "at least", allowed, measured, measured >= allowed)


def load_gate(name: str) -> Gate:
    """Return a named gate, or read one from a TOML file.

    Raises:
        UsageError: no such gate or file, or a field that is unknown or no number.
    """
    if name in NAMED:
        text = (resources.files("edgekv.verify") / "gates" / f"{name}.toml").read_text(encoding="utf-8")
        return parse_gate(name, text)
    path = Path(name)
    try:
        return parse_gate(path.stem, path.read_text(encoding="utf-8"), where=str(path))
    except OSError as error:
        raise UsageError(
            f"there is no gate {name!r}, and no such file can be read ({error.strerror}); choose {' or '.join(NAMED)}, or give"
            " a TOML file as in docs/verify.md"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not TOML: it is not UTF-8 text") from error


def parse_gate(name: str, text: str, *, where: str = "") -> Gate:
    """Read the text of a gate; see :func:`load_gate`."""
    where = where or f"the gate {name}"
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {error}") from error
    unknown = sorted(set(data) - {"identity", "exact", "partial"})
    if unknown:
        raise UsageError(
            f"{where}: unknown field {unknown[0]!r}; a gate has identity, [exact] and [partial], and limits stand under the"
            " last two"
        )
    identity = data.get("identity", "promised")
    if identity not in IDENTITY:
        raise UsageError(f"{where}: identity must be one of {', '.join(IDENTITY)}, not {identity!r}")
    exact, partial = (_limits(where, part, data.get(part, {})) for part in ("exact", "partial"))
    if identity == "never" and exact == Limits():
        raise UsageError(f"{where} limits nothing, so everything would pass; give [exact] limits or identity")
    return Gate(name, identity, exact, partial)


def _limits(where: str, part: str, data: Any) -> Limits:
    if not isinstance(data, dict):
        raise UsageError(f"{where}: [{part}] must be a table of limits")
    known = [field.name for field in fields(Limits)]
    for key, value in data.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"{where}: unknown limit {part}.{key}{meant} (there are {', '.join(known)})")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise UsageError(f"{where}: {part}.{key} must be a number of at least 0, not {value!r}")
    return Limits(**{key: float(value) for key, value in data.items()})
