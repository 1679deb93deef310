"""How a GGUF file's makers let it choose tokens: the keys ``general.sampling.*``.

llama.cpp's converter copies them from generation_config.json, so what is left out means what it means there.
Source of the keys: gguf-py/gguf/constants.py and metadata.py of llama.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from edgekv.bundle import SamplingSpec
from edgekv.errors import CheckpointError, UsageError
from edgekv.schema import shown
from edgekv.settings import REPETITION_PENALTY, TEMPERATURE, TOP_K, TOP_P, Setting

from ..config import SAMPLING_DEFAULTS
from .config import shortest
from .file import GgufFile

T = TypeVar("T")
_PREFIX = "general.sampling."
#: The values that change nothing, of keys that edgekv does not do.
_CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "min_p": (0,), "xtc_probability": (0,), "mirostat": (0,), "penalty_last_n": (-1,), "sequence": (),
}  # fmt: skip
#: Keys that say how another does what it does, by that other.
_PARTS = {"xtc_threshold": "xtc_probability", "mirostat_tau": "mirostat", "mirostat_eta": "mirostat"}


def read_gguf_sampling(file: GgufFile) -> SamplingSpec | None:
    """Return how the model is sampled; None: greedily.

    Raises:
        CheckpointError: a setting is out of its range; the message names it.
    """
    given = _given(file)

    def read(key: str, setting: Setting[T]) -> T:
        value = given.get(key, SAMPLING_DEFAULTS[setting.name])
        try:
            return setting.check(value)
        except UsageError as error:
            raise CheckpointError(
                f"{file.path}: {_PREFIX}{key} is {shown(value)}; it must be {setting.wanted}; convert the model to GGUF again"
            ) from error

    repeats = given.get("penalty_last_n") != 0
    spec = SamplingSpec(repetition_penalty=read("penalty_repeat", REPETITION_PENALTY) if repeats else 1.0)
    if given.keys() & {"temp", "top_k", "top_p"} and (temperature := read("temp", TEMPERATURE)):
        if given.get("top_k") == -1:
            given["top_k"] = 0  # all of them
        spec = replace(spec, temperature=temperature, top_k=read("top_k", TOP_K), top_p=read("top_p", TOP_P))
    return None if spec == SamplingSpec() else spec


def not_applied(file: GgufFile) -> dict[str, Any]:
    """Return what the file asks for that edgekv does not do, and that would change an answer, with its value."""
    given, spec = _given(file), read_gguf_sampling(file) or SamplingSpec()
    left = {name for name, nothing in _CHANGES_NOTHING.items() if name in given and given[name] not in nothing}
    if not spec.temperature:
        left &= {"penalty_last_n"}
    if spec.repetition_penalty == 1:
        left -= {"penalty_last_n"}
    left |= {name for name, whole in _PARTS.items() if name in given and whole in left}
    return {f"{_PREFIX}{name}": given[name] for name in given if name in left}


def _given(file: GgufFile) -> dict[str, Any]:
    return {
        key.removeprefix(_PREFIX): shortest(value) if isinstance(value, float) else value
        for key, value in file.metadata.items()
        if key.startswith(_PREFIX)
    }
