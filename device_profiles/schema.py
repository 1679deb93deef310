"""What a device profile holds. The rules beside the fields drive the parser and the table in docs/profiles.md."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

from edgekv.errors import ProfileError
from edgekv.sizes import format_bytes

Number = TypeVar("Number", int, float)

#: The name of a profile, which is also its file's.
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
KINDS = ("phone", "board", "jetson", "laptop")
#: onnx-cuda is ONNX Runtime with the CUDA execution provider; the other two compute on the CPU.
ENGINES = ("executorch", "onnx", "onnx-cuda")
WEIGHTS = ("int4", "int8", "fp16", "fp32")
KILLS = ("jetsam", "lmkd", "oom", "swap")
CONFIDENCES = {
    "high": "measured on this device",
    "medium": "a vendor's specification, or derived from measurements",
    "low": "an estimate",
}


@dataclass(frozen=True)
class Quantity(Generic[Number]):
    """One number of a profile: its unit, where it comes from, and how far to trust it."""

    value: Number
    unit: str
    source: str
    confidence: str

    def __str__(self) -> str:
        """Print the value in the unit that reads best."""
        value = self.value
        if self.unit == "bytes":
            return format_bytes(value)
        if self.unit == "bytes/s":
            return f"{value / 1e9:.3g} GB/s" if value >= 1e9 else f"{value / 1e6:.3g} MB/s"
        if self.unit == "ops/s":
            return f"{value / 1e9:,.4g} GOP/s"
        if self.unit == "s" and 0 < value < 1:
            return f"{value * 1e3:.3g} ms"
        if self.unit == "share":
            return f"{value:.0%}"
        return f"{value:,g} {self.unit}"


#: No number of a profile is larger, in whatever unit: what is computed from it stays finite, and bytes fit 64 bits.
LARGEST = 1e18


@dataclass(frozen=True)
class Rule:
    """What the value of a field must be; ``example`` is how the fix in an error message writes it."""

    about: str
    unit: str = ""
    example: str = ""
    low: float = 0.0
    low_included: bool = False
    high: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def integer(self) -> bool:
        """Whether the value is a whole number."""
        return self.unit in ("bytes", "threads", "requests", "requests/s")

    @property
    def limits(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return ", ".join(self.choices)
        lower = f"{self.low:g} or more" if self.low_included else f"above {self.low:g}"
        return lower if self.high == math.inf else f"{lower}, at most {self.high:g}"


def rules(section: type) -> dict[str, Rule]:
    """Return the rule of every field that a table of the TOML file may set."""
    hints = get_type_hints(section, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


@dataclass(frozen=True)
class Memory:
    """What the process may use, and what happens beyond it."""

    ram_bytes: Annotated[Quantity[int], Rule("RAM that the operating system reports.", "bytes", '"8GB"')]
    app_limit_bytes: Annotated[
        Quantity[int],
        Rule("RAM that one app gets before it is killed or paged; at most `ram_bytes`.", "bytes", '"4GB"'),
    ]
    os_page_bytes: Annotated[
        Quantity[int],
        Rule(
            "Page of the operating system, a power of two; flash I/O is aligned to it.",
            "bytes",
            '"16KiB"',
            low=512,
            low_included=True,
        ),
    ]
    headroom_share: Annotated[
        Quantity[float],
        Rule("Share of `app_limit_bytes` that stays unused.", "share", "0.1", low_included=True, high=0.9),
    ]
    kill: Annotated[
        str,
        Rule(
            "Beyond the limit: `jetsam`, `lmkd` and `oom` kill the process (iOS, Android, Linux); "
            "`swap` pages, so that every token reads from flash.",
            choices=KILLS,
        ),
    ]


@dataclass(frozen=True)
class Compute:
    """Speed of one engine.

    :func:`edgekv.device_profiles.speed.step_seconds` says how a step's time is computed from it.
    """

    threads: Annotated[Quantity[int], Rule("Threads that the other numbers hold for.", "threads", "4")]
    weight_read_bytes_per_s: Annotated[
        Quantity[float],
        Rule("Weight bytes read in decode: file size x tokens/s, with unpacking. Not STREAM.", "bytes/s", '"10GB/s"'),
    ]
    kv_read_bytes_per_s: Annotated[
        Quantity[float],
        Rule(
            "Bytes of INT8 pages read by attention in decode. Slower than weights on most CPUs.", "bytes/s", '"5GB/s"'
        ),
    ]
    kv_fp16_read_bytes_per_s: Annotated[
        Quantity[float], Rule("Bytes of fp16 pages read by attention in decode.", "bytes/s", '"5GB/s"')
    ]
    gemm_ops_per_s: Annotated[
        Quantity[float],
        Rule(
            "Matrix multiplication in prefill, 2 operations per weight and token. INT8 unless overridden.",
            "ops/s",
            "180e9",
        ),
    ]
    attention_ops_per_s: Annotated[
        Quantity[float],
        Rule("Attention of a chunk, 4 operations per query head, channel, query and key.", "ops/s", "50e9"),
    ]
    overhead_s: Annotated[
        Quantity[float], Rule("Fixed time per step, whatever the model.", "s", "0.0005", low_included=True)
    ]
    page_fetch_s: Annotated[
        Quantity[float],
        Rule(
            "Time of the host per page that comes from flash, beyond the kernel's: checksum, what goes by the byte.",
            "s",
            "0.00001",
            low_included=True,
        ),
    ]
    piece_fetch_s: Annotated[
        Quantity[float],
        Rule("Time of the host per piece of pages: system call, waiting, hand-over.", "s", "0.0001", low_included=True),
    ]
    by_weights: Mapping[str, Mapping[str, Quantity[Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Flash:
    """The drive that holds cold pages. One request takes ``t0 + size / bandwidth``."""

    read_t0_s: Annotated[
        Quantity[float], Rule("Time of a read before its first byte.", "s", "0.0001", low_included=True)
    ]
    read_bytes_per_s: Annotated[Quantity[float], Rule("Read bandwidth of large requests.", "bytes/s", '"800MB/s"')]
    write_t0_s: Annotated[
        Quantity[float], Rule("Time of a write before its first byte.", "s", "0.0002", low_included=True)
    ]
    write_bytes_per_s: Annotated[Quantity[float], Rule("Sustained write bandwidth.", "bytes/s", '"400MB/s"')]
    queue_depth: Annotated[
        Quantity[int], Rule("Requests that it works on at a time; their `t0` overlap.", "requests", "32")
    ]
    iops_limit: Annotated[Quantity[int], Rule("Most requests per second, at any queue depth.", "requests/s", "4000")]
    write_buffer_bytes: Annotated[
        Quantity[int],
        Rule(
            "Burst that is accepted after `write_t0_s` alone and drains at `write_bytes_per_s`; 0 for none.",
            "bytes",
            '"4MiB"',
            low_included=True,
        ),
    ]
    endurance_tbw: Annotated[Quantity[float], Rule("Terabytes (10^12) written before wear-out.", "TB", "117")]
    write_amplification: Annotated[
        Quantity[float],
        Rule(
            "Bytes programmed for a byte written in large, aligned requests, beyond what `endurance_tbw` assumes.",
            "ratio",
            "1.5",
            low=1.0,
            low_included=True,
        ),
    ]


@dataclass(frozen=True)
class Thermal:
    """Sustained load: ``speed(t) = floor + (1 - floor) exp(-t / time_constant)`` on compute and bandwidth."""

    floor_share: Annotated[
        Quantity[float],
        Rule("Share of the cold speed that is left in the end; 1 when cooled.", "share", "0.5", high=1.0),
    ]
    time_constant_s: Annotated[
        Quantity[float], Rule("Time constant of the decay, and of cooling when idle.", "s", "65")
    ]


@dataclass(frozen=True)
class DeviceProfile:
    """One device. ``path`` is the file it came from; ``processor``: its machine class, where the profile says it."""

    name: str
    title: str
    kind: str
    memory: Memory
    compute: Mapping[str, Compute]
    flash: Flash
    thermal: Thermal
    path: Path = field(compare=False)
    processor: str | None = None

    def rates(self, engine: str, weights: str) -> Compute:
        """Return the speed of an engine with one weight type, overrides applied.

        Raises:
            ProfileError: the profile has no numbers for this engine, or there is no such weight type.
        """
        if weights not in WEIGHTS:
            raise ProfileError(f"unknown weight type {weights!r}; use one of {', '.join(WEIGHTS)}")
        if engine not in self.compute:
            raise ProfileError(
                f"profile {self.name} has no numbers for engine {engine!r}; it has {', '.join(self.compute)}. "
                f'Write a profile with extends = "{self.name}" and a table [compute.{engine}]'
            )
        base = self.compute[engine]
        overrides: dict[str, Any] = {**base.by_weights.get(weights, {})}
        return dataclasses.replace(base, by_weights={}, **overrides)

    def entries(self) -> dict[str, Quantity[Any] | str]:
        """Return every field by its dotted path, in the order of the schema."""
        flat: dict[str, Quantity[Any] | str] = {"title": self.title, "kind": self.kind}
        if self.processor is not None:
            flat["processor"] = self.processor
        flat.update(_flatten("memory", self.memory))
        for engine, compute in self.compute.items():
            flat.update(_flatten(f"compute.{engine}", compute))
            for weights, overrides in compute.by_weights.items():
                flat.update({f"compute.{engine}.{weights}.{key}": entry for key, entry in overrides.items()})
        flat.update(_flatten("flash", self.flash))
        flat.update(_flatten("thermal", self.thermal))
        return flat

    def to_json(self) -> dict[str, Any]:
        """Return the profile as plain data, without its path."""
        data = dataclasses.asdict(self)
        del data["path"]
        return data


def _flatten(prefix: str, section: Any) -> dict[str, Quantity[Any] | str]:
    return {f"{prefix}.{key}": getattr(section, key) for key in rules(type(section))}
