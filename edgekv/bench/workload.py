"""What is measured: prompts and generated tokens, at depths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgekv.errors import UsageError
from edgekv.settings import MOST_TOKENS, Setting, Whole


class Numbers(tuple[int, ...]):
    """Some whole numbers; a type of its own, since `tuple` on a command line is an option with several values."""

    __slots__ = ()


@dataclass(frozen=True)
class Several(Setting[Numbers]):
    """Some whole numbers, each once, in the order in which they were given; a text has commas between them."""

    least: int
    most: int

    @property
    def wanted(self) -> str:  # noqa: D102
        return f"whole numbers from {self.least} to {self.most} with commas between, such as 512,2048"

    @property
    def metavar(self) -> str:  # noqa: D102
        return "N,N"

    def _from_value(self, value: object) -> Numbers | None:
        one = Whole(self.name, self.least, self.most)
        if isinstance(value, str):
            found = [one._from_text(word) for word in value.split(",")]
        elif isinstance(value, Sequence) and not isinstance(value, bytes):
            found = [one._from_value(number) for number in value]
        else:
            return None
        known = [number for number in found if number is not None]
        return Numbers(dict.fromkeys(known)) if known and len(known) == len(found) else None


#: 0 leaves its kind out, or is an empty cache.
PROMPTS = Several("prompts", 0, MOST_TOKENS)
GENERATED = Several("generated", 0, MOST_TOKENS)
DEPTHS = Several("depths", 0, MOST_TOKENS)
REPEAT = Whole("repeat", 1, 1000)


@dataclass(frozen=True)
class Case:
    """Tokens of a prompt (``pp``) or generated ones (``tg``), behind ``depth`` tokens in the cache."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int

    @property
    def name(self) -> str:
        """As people write it since llama-bench: ``pp512``, ``tg64 @ d4096``."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    def check_room(self, most: int) -> None:
        """Refuse what does not fit a context of ``most`` tokens.

        Raises:
            UsageError: the message names the option and the largest value.
        """
        if self.depth + self.tokens <= most:
            return
        if self.tokens > most:
            option = "--prompt-tokens" if self.kind == "pp" else "--generate"
            raise UsageError(f"{option} {self.tokens} is above what the model was made for, {most} tokens; lower it")
        raise UsageError(
            f"--depth {self.depth} leaves no room for {self.kind}{self.tokens}: the model was made for {most} tokens; lower it to"
            f" {most - self.tokens} or less"
        )


@dataclass(frozen=True)
class Workload:
    """What is measured: each prompt and each number of generated tokens at each depth, ``repeat`` times.

    Raises:
        UsageError: a value has another type or is out of range, or nothing is left to measure.
    """

    prompts: tuple[int, ...] = (512,)
    generated: tuple[int, ...] = (64,)
    depths: tuple[int, ...] = (0,)
    repeat: int = 5

    def __post_init__(self) -> None:
        for name, setting in (("prompts", PROMPTS), ("generated", GENERATED), ("depths", DEPTHS), ("repeat", REPEAT)):
            object.__setattr__(self, name, setting.check(getattr(self, name), name))
        if not self.cases():
            raise UsageError("there is nothing to measure: give --prompt-tokens or --generate a number above 0")

    def cases(self) -> list[Case]:
        """Return what is measured, depth by depth."""
        return [case for depth in self.depths for case in self.at(depth)]

    def at(self, depth: int) -> list[Case]:
        """Return what is measured at a depth."""
        prompts = [Case("pp", tokens, depth) for tokens in self.prompts if tokens]
        return prompts + [Case("tg", tokens, depth) for tokens in self.generated if tokens]

    def order(self) -> list[Case]:
        """Return the cases of all repetitions: at each depth in turn, there and back."""
        ways = (self.depths, self.depths[::-1])
        return [case for at in range(self.repeat) for depth in ways[at % 2] for case in self.at(depth)]
