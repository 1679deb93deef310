"""What quality must be kept: named gates, or a file of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from edgekv.errors import FormatError, UsageError
from edgekv.schema import checked, one_of, plain_toml, read_whole

NAMED = ("strict", "standard", "weights")
IDENTITY = ("always", "promised", "never")


Limit = Annotated[float, Meta(ge=0, le=1e30)] | None


@dataclass(frozen=True)
class Limits:
    """Limits on a comparison with the full fp16 cache; None is no limit.

    ``perplexity_change`` bounds the relative change in both directions, ``perplexity_rise`` upwards.
    ``*_kld`` are upper bounds in nats: of the mean,
    the 99th percentile, the largest, and the largest mean over 32 neighbouring positions. ``top1``: least share of
    positions with the same most likely token. ``tasks``: least share of the full cache's score on every task.
    """

    perplexity_change: Limit = None
    perplexity_rise: Limit = None
    mean_kld: Limit = None
    p99_kld: Limit = None
    max_kld: Limit = None
    stretch_kld: Limit = None
    top1: Limit = None
    tasks: Limit = None


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
class GateFile:
    """What the TOML file of a gate holds: a :class:`Gate` without its name, which is the file's."""

    identity: str = "promised"
    exact: Limits = Limits()
    partial: Limits = Limits()

    def __post_init__(self) -> None:
        one_of(self.identity, "identity", IDENTITY)
        if self.identity == "never" and self.exact == Limits():
            raise FormatError("it limits nothing, so everything would pass; give [exact] limits or identity")


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
        return parse_gate(name, (resources.files("edgekv.verify") / "gates" / f"{name}.toml").read_bytes())
    path = Path(name)
    try:
        data = read_whole(path)
    except OSError as error:
        raise UsageError(
            f"there is no gate {name!r}, and no such file can be read ({error.strerror}); choose"
            f" {', '.join(NAMED[:-1])} or {NAMED[-1]}, or give a TOML file as in docs/verify.md"
        ) from error
    except FormatError as error:
        raise UsageError(f"{path} is no gate: {error}") from error
    return parse_gate(path.stem, data, where=str(path))


def parse_gate(name: str, data: bytes, *, where: str = "") -> Gate:
    """Read the TOML of a gate; see :func:`load_gate`."""
    where = where or f"the gate {name}"
    try:
        file = checked(plain_toml(data), GateFile)
    except FormatError as error:
        raise UsageError(f"{where}: {error}") from error
    return Gate(name, file.identity, file.exact, file.partial)
