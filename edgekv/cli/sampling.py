"""How a run chooses tokens: what its options say, then what the makers of the model say, then greedily; and which it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from edgekv import settings

if TYPE_CHECKING:
    from edgekv.bundle import SamplingSpec
    from edgekv.runtime.sampling import SamplingOptions

#: What can be set, by the names of Python.
SETTINGS: dict[str, settings.Setting[Any]] = {
    setting.name: setting
    for setting in (settings.TEMPERATURE, settings.TOP_K, settings.TOP_P, settings.REPETITION_PENALTY)
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; ``origin`` says of each of :data:`SETTINGS` who chose it: ``option``, ``model`` or ``default``."""

    options: SamplingOptions
    origin: Mapping[str, str]

    def with_option(self, name: str, value: float | int | None) -> Sampling:
        """Return it with one value that the user chose."""
        options = replace(self.options, **{name: value})  # type: ignore[arg-type]
        return Sampling(options, {**self.origin, name: "option"} if name in SETTINGS else self.origin)

    def facts(self) -> dict[str, Any]:
        """Return it for --json."""
        values = asdict(self.options)
        return {**{name: values[name] for name in SETTINGS}, "from": dict(self.origin)}

    def __str__(self) -> str:
        by_model = [name for name, who in self.origin.items() if who == "model"]
        if not by_model:
            return described(self.options)
        others = [_said(name) for name, who in self.origin.items() if who == "option"]
        own = f"; {' and '.join(others)} as the options say" if others else ""
        return f"{described(self.options)} (the model's own{own})"


def chosen(given: Mapping[str, float | int | None], model: SamplingSpec | None, seed: int | None) -> Sampling:
    """Return how a run chooses tokens.

    Args:
        given: what the options say, by the names of :data:`SETTINGS`; None: nothing.
        model: what the makers of the model say, where it is asked.
    """
    from edgekv.runtime.sampling import SamplingOptions

    values = asdict(SamplingOptions.of_model(model)) | {"seed": seed}
    said = {name: value for name, value in given.items() if value is not None}
    origin = {name: "option" if name in said else "model" if model is not None else "default" for name in SETTINGS}
    return Sampling(SamplingOptions(**(values | said)), origin)


def described(options: SamplingOptions | SamplingSpec) -> str:
    """Return in a few words how tokens are chosen."""
    parts = [f"temperature {options.temperature:g}" if options.temperature else "greedy"]
    if options.temperature and options.top_k:
        parts.append(f"top-k {options.top_k}")
    if options.temperature and options.top_p < 1:
        parts.append(f"top-p {options.top_p:g}")
    if options.repetition_penalty != 1:
        parts.append(f"repetition penalty {options.repetition_penalty:g}")
    return ", ".join(parts)


def _said(name: str) -> str:
    return name.replace("_", " ")
