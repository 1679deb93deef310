"""From the data of a TOML file to a checked profile. Every refusal is one line: file, field, fix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from edgekv.errors import ProfileError, UsageError
from edgekv.host import MACHINES
from edgekv.schema import did_you_mean, printable, shown
from edgekv.sizes import format_bytes, parse_bytes

from .schema import (
    CONFIDENCES,
    ENGINES,
    KINDS,
    LARGEST,
    NAME,
    WEIGHTS,
    Compute,
    DeviceProfile,
    Flash,
    Memory,
    Quantity,
    Rule,
    Thermal,
    rules,
)

_TOP = ("name", "title", "kind", "processor", "extends", "memory", "compute", "flash", "thermal")
_PARTS = ("value", "source", "confidence")


def parse_profile(data: Mapping[str, Any], path: Path) -> DeviceProfile:
    """Check the data of one profile file and build the profile.

    Args:
        data: the file as :mod:`tomllib` reads it, merged with the profile that it extends.
        path: the file, for the messages.

    Raises:
        ProfileError: a field is missing, unknown or impossible; the message names file, field and fix.
    """
    reader = _Reader(path)
    reader.known(data, "", _TOP)
    compute = reader.table(data, "compute")
    reader.known(compute, "compute", ENGINES)
    if not compute:
        reader.fail("compute", "has no engine", f"add a table [compute.executorch] or one of {', '.join(ENGINES)}")
    profile = DeviceProfile(
        name=reader.name(data),
        title=reader.text(data, "title", "", 'add title = "Raspberry Pi 5, 8 GB, microSD"'),
        kind=reader.choice(data, "kind", "kind", KINDS),
        memory=Memory(**reader.section(reader.table(data, "memory"), "memory", Memory)),
        compute={engine: reader.engine(compute, engine) for engine in ENGINES if engine in compute},
        flash=Flash(**reader.section(reader.table(data, "flash"), "flash", Flash)),
        thermal=Thermal(**reader.section(reader.table(data, "thermal"), "thermal", Thermal)),
        path=path,
        processor=reader.choice(data, "processor", "processor", MACHINES) if "processor" in data else None,
    )
    reader.check(profile.memory)
    return profile


class _Reader:
    """Reads fields; knows the file's name for the messages."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, where: str, problem: str, fix: str) -> NoReturn:
        raise ProfileError(f"{self.path}: {printable(where)} {problem}; {fix}")

    def known(self, data: Mapping[str, Any], where: str, names: Iterable[str]) -> None:
        """Refuse a key that is not in ``names``."""
        names = tuple(names)
        for key in data:
            if key not in names:
                self.fail(f"{where}.{key}" if where else key, "is not a field", did_you_mean(key, names))

    def table(self, data: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
        """Return a table of the file."""
        where = f"{where}.{key}" if where else key
        if key not in data:
            self.fail(f"[{where}]", "is missing", f"add the table [{where}]")
        if not isinstance(data[key], dict):
            self.fail(where, f"is {shown(data[key])}, not a table", f"write it as [{where}]")
        table: dict[str, Any] = data[key]
        return table

    def text(self, data: Mapping[str, Any], key: str, where: str, fix: str) -> str:
        """Return a text that is not empty."""
        where = f"{where}.{key}" if where else key
        if key not in data:
            self.fail(where, "is missing", fix)
        value = data[key]
        if not isinstance(value, str) or not value.strip():
            self.fail(where, f"is {shown(value)}, not a text", fix)
        return value

    def choice(self, data: Mapping[str, Any], key: str, where: str, choices: Iterable[str]) -> str:
        """Return one of the allowed words."""
        words = tuple(choices)
        if key not in data:
            self.fail(where, "is missing", f"add {key} = one of {', '.join(words)}")
        if data[key] not in words:
            self.fail(where, f"is {shown(data[key])}", did_you_mean(str(data[key]), words))
        return str(data[key])

    def name(self, data: Mapping[str, Any]) -> str:
        """Return the profile's name, which is also the file's."""
        stem = self.path.stem
        name = self.text(data, "name", "", f'add name = "{stem}"')
        if not NAME.fullmatch(name):
            self.fail("name", f"is {shown(name)}", "use lower-case letters, digits and single hyphens")
        if name != stem:
            self.fail("name", f"is {shown(name)} in a file named {self.path.name}", "rename one of the two")
        return name

    def engine(self, compute: Mapping[str, Any], engine: str) -> Compute:
        """Read [compute.ENGINE] and its tables per weight type."""
        table, where = self.table(compute, engine, "compute"), f"compute.{engine}"
        base = {key: value for key, value in table.items() if key not in WEIGHTS}
        by_weights = {}
        for weights in WEIGHTS:
            if weights in table:
                override = self.table(table, weights, where)
                by_weights[weights] = self.section(override, f"{where}.{weights}", Compute, partial=True)
        return Compute(**self.section(base, where, Compute, also=WEIGHTS), by_weights=by_weights)

    def section(
        self, data: Mapping[str, Any], where: str, cls: type, *, partial: bool = False, also: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Read the fields of one schema class; ``also`` are tables that an unknown key may have meant."""
        fields = rules(cls)
        self.known(data, where, (*fields, *also))
        values: dict[str, Any] = {}
        for key, rule in fields.items():
            if rule.choices:
                values[key] = self.choice(data, key, f"{where}.{key}", rule.choices)
            elif key in data:
                values[key] = self.quantity(data[key], f"{where}.{key}", key, rule)
            elif not partial:
                self.fail(f"{where}.{key}", "is missing", f"add {_written(key, rule.example)} to [{where}]")
        return values

    def quantity(self, entry: Any, where: str, key: str, rule: Rule) -> Quantity[Any]:
        """Read ``{ value, source, confidence }``."""
        if not isinstance(entry, dict):
            self.fail(where, "states no source and confidence", f"write {_written(key, _as_toml(entry))}")
        self.known(entry, where, _PARTS)
        if "value" not in entry:
            self.fail(f"{where}.value", "is missing", f"write {_written(key, rule.example)}")
        value = self.number(entry["value"], where, rule)
        source = self.text(entry, "source", where, "say where the number is from, or how it was derived")
        confidence = entry.get("confidence")
        if not isinstance(confidence, str) or confidence not in CONFIDENCES:
            problem = "is missing" if confidence is None else f"is {shown(confidence)}"
            meanings = ", ".join(f'"{word}" ({meaning})' for word, meaning in CONFIDENCES.items())
            self.fail(f"{where}.confidence", problem, f"use {meanings}")
        return Quantity(value, rule.unit, source, confidence)

    def number(self, value: Any, where: str, rule: Rule) -> int | float:
        """Read a number, or a size such as ``"7GB"`` or ``"10GB/s"``, within the rule's limits."""
        fix = f"write a number of {rule.unit} such as {rule.example}"
        if isinstance(value, str) and rule.unit in ("bytes", "bytes/s"):
            size = value[:-2] if rule.unit == "bytes/s" and value.endswith("/s") else value
            try:
                value = parse_bytes(size)
            except UsageError:
                self.fail(where, f"is {_as_toml(value)}, not a size above zero", fix)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == math.inf:
            self.fail(where, f"is {shown(value)}, not a number", fix)
        if abs(value) > LARGEST:
            self.fail(where, f"is {shown(value)}, more than any device has", fix)
        if value < rule.low or value > rule.high or (value == rule.low and not rule.low_included):
            self.fail(where, f"is {value:g}", f"it must be {rule.limits} ({rule.unit})")
        if not rule.integer:
            return float(value)
        if value != int(value):
            self.fail(where, f"is {value:g}, not a whole number", fix)
        return int(value)

    def check(self, memory: Memory) -> None:
        """Refuse numbers that contradict each other."""
        limit, ram, page = memory.app_limit_bytes.value, memory.ram_bytes.value, memory.os_page_bytes.value
        if limit > ram:
            self.fail(
                "memory.app_limit_bytes",
                f"is {format_bytes(limit)}, above memory.ram_bytes ({format_bytes(ram)})",
                "lower it, or correct ram_bytes",
            )
        if page & (page - 1):
            self.fail("memory.os_page_bytes", f"is {page}, not a power of two", 'write "4KiB" or "16KiB"')


def _as_toml(value: object) -> str:
    return shown(value).replace("'", '"') if isinstance(value, str) else shown(value)


def _written(key: str, value: str) -> str:
    """Return an entry as it is written in the file."""
    return f'{key} = {{ value = {value}, source = "...", confidence = "low" }}'
