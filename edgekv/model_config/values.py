"""The keys of a configuration, typed: every error is one line that names the source, the key and what it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from edgekv.errors import ConfigError
from edgekv.schema import shown

T = TypeVar("T")

#: What a key that is left out reads as.
_ABSENT = object()
#: Larger numbers are no model: of layers, of anything else, and in settings.
MAX_LAYERS, MAX_COUNT, _MAX_NUMBER = 10_000, 2**31 - 1, 1e30
#: Where a configuration of several models in one keeps the one that writes text.
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator")


class Values:
    """One configuration: a mapping, or an object with the keys as attributes.

    ``defaults``: what a key that is left out means. Where there are some, keys that are not among them read as left out: the
    model type ignores them.
    """

    def __init__(self, config: object, source: str, defaults: Mapping[str, object] | None = None) -> None:
        self.config = config
        self.source = source
        self._defaults = defaults

    def states(self, key: str) -> bool:
        """Whether the configuration has the key; null counts."""
        return self._stated(key) is not _ABSENT

    def get(self, key: str) -> object:
        """Return the value of a key, its default, or None."""
        value = self._stated(key)
        return (self._defaults or {}).get(key) if value is _ABSENT else value

    def names(self) -> list[str]:
        """Return the keys of a mapping."""
        return [str(key) for key in self.config] if isinstance(self.config, Mapping) else []

    def count(self, *keys: str, default: int | None = None, most: int = MAX_COUNT) -> int:
        """Return the positive whole number of the first key that has a value.

        Raises:
            ConfigError: none has one and there is no default, or it is no positive whole number.
        """
        for key in keys:
            value = self.get(key)
            if value is None:
                continue
            if not _is_whole(value) or not 1 <= value <= most:
                raise self.refusal(key, f"it must be a positive whole number, at most {most}")
            return value
        if default is not None:
            return default
        if self.states(keys[0]):
            raise self.refusal(keys[0], "it must be a positive whole number")
        raise ConfigError(f"{self.source} lacks {keys[0]}; it must be the config.json of a Hugging Face decoder")

    def whole(self, key: str) -> int:
        """Return a whole number of any sign."""
        value = self.get(key)
        if not _is_whole(value) or abs(value) > MAX_COUNT:
            raise self.refusal(key, "it must be a whole number")
        return value

    def number(self, key: str, *, above: float = -math.inf) -> float:
        """Return a finite number."""
        value = self.get(key)
        if not _is_number(value) or not above < value <= _MAX_NUMBER:
            raise self.refusal(key, "it must be a number" + ("" if above == -math.inf else f" above {above:g}"))
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return true or false, or ``default`` where there is neither a value nor a default of the configuration's own."""
        value = self.get(key)
        if value is None and not self.states(key):
            return default
        if not isinstance(value, bool):
            raise self.refusal(key, "it must be true or false")
        return value

    def words(self, key: str) -> list[str] | None:
        """Return a list of words, or None."""
        return self._list(key, str, "a list of words")

    def wholes(self, key: str) -> list[int] | None:
        """Return a list of whole numbers, or None."""
        return self._list(key, int, "a list of whole numbers")

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Return a list of so many numbers above 0."""
        value = self.get(key)
        if (
            not isinstance(value, list | tuple)
            or len(value) != count
            or not all(_is_number(entry) and 0 < entry <= _MAX_NUMBER for entry in value)
        ):
            raise self.refusal(key, f"it must be a list of {count} numbers above 0")
        return tuple(float(entry) for entry in value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return a key that holds one token id, a list of them, or null."""
        value = self.get(key)
        if value is None:
            return ()
        return tuple(self.wholes(key) or ()) if isinstance(value, list | tuple) else (self.whole(key),)

    def part(self, key: str) -> Values | None:
        """Return the settings that a key holds, its default where it is null, or None."""
        value = self.get(key)
        if value is None:
            value = (self._defaults or {}).get(key)
        if value is None:
            return None
        if isinstance(self.config, Mapping) and not isinstance(value, Mapping):
            raise self.refusal(key, "it must hold settings of its own")
        return Values(value, f"{self.source}: {key}")

    def refusal(self, key: str, reason: str) -> ConfigError:
        """Return the error for a key, for the caller to raise."""
        how = "is" if self.states(key) else "is left out, which means"
        return ConfigError(f"{self.source}: {key} {how} {shown(self.get(key))}; {reason}")

    def _stated(self, key: str) -> object:
        if self._defaults is not None and key not in self._defaults:
            return _ABSENT
        if isinstance(self.config, Mapping):
            return self.config.get(key, _ABSENT)
        return getattr(self.config, key, _ABSENT)

    def _list(self, key: str, kind: type[T], what: str) -> list[T] | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or any(type(entry) is not kind for entry in value):
            raise self.refusal(key, f"it must be {what}")
        return list(value)


def text_part(values: Values) -> Values:
    """Return the configuration of the decoder that writes text, where it stands inside another one.

    Raises:
        ConfigError: there are several.
    """
    found = [key for key in _NESTED if values.get(key) is not None]
    if not found:
        return values
    if len(found) > 1:
        raise ConfigError(f"{values.source} has {' and '.join(found)}; give the one that is meant by itself")
    part = values.part(found[0])
    assert part is not None
    return text_part(part)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint.

    Raises:
        ConfigError: it cannot be read, or holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number of too many digits
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read as JSON ({reason}); download it again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} does not hold a JSON object; download it again")
    return data


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
