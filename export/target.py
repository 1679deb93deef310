"""Which engine, operators and weights a bundle for another device gets: those that suit its processor and fit its memory.

What was measured on machines like the device decides (:mod:`.choose_engine`), elsewhere what the profile says of both engines:
a token is as fast as its weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekv.contract import ENGINES, WEIGHTS, default_weights
from edgekv.device_profiles import DeviceProfile, kv_budget
from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.schema import CONFIDENCES
from edgekv.device_profiles.work import BITS_PER_WEIGHT, weights_bytes
from edgekv.errors import BudgetError, UsageError
from edgekv.host import MACHINES
from edgekv.spec import RUNTIME_OVERHEAD_BYTES

from .choose_engine import NOT_INSTALLED, EngineChoice, beats_xnnpack, default_engine, executorch_installed, measured


@dataclass(frozen=True)
class TargetChoice:
    """What a bundle for a device is made of, and one line that says why."""

    engine: str
    operators: str | None
    weights: str
    reason: str


def processor_of(device: DeviceProfile) -> str:
    """Return the machine class of a device.

    Raises:
        UsageError: its profile does not say.
    """
    if device.processor is None:
        raise UsageError(
            f"the profile {device.name} does not say what processor the device has; add a line such as"
            f' processor = "arm64, dotprod" to {device.path} (one of: {"; ".join(MACHINES)})'
        )
    return device.processor


def choose_for(
    device: DeviceProfile,
    geometry: Geometry,
    form: str,
    *,
    engine: str | None = None,
    operators: str | None = None,
    weights: str | None = None,
) -> TargetChoice:
    """Choose what is not given.

    Raises:
        BudgetError: weights leave no memory for keys and values. UsageError: see :func:`processor_of`.
    """
    processor = processor_of(device)
    default = default_weights(geometry.parameters)
    kinds = [weights] if weights is not None else WEIGHTS[WEIGHTS.index(default) :: -1]
    for kind in kinds:
        found = (
            EngineChoice(engine or "executorch", "as asked", operators)
            if engine is not None or operators is not None
            else _engine_for(device, processor, form, kind)
        )
        size = weights_bytes(geometry, BITS_PER_WEIGHT[found.engine][kind])
        try:
            kv_budget(device, size, RUNTIME_OVERHEAD_BYTES)
        except BudgetError:
            if kind == kinds[-1]:
                raise
            continue
        if found.engine == "executorch" and found.operators is None:
            ours = form == "split" and kind == "int4" and beats_xnnpack(processor)
            found = EngineChoice(found.engine, found.reason, "edgekv" if ours else "xnnpack")
        fits = "" if weights is not None or kind == default else f"; {default} weights do not fit its memory"
        with_ = f" with {found.operators} operators" if found.operators is not None else ""
        said = f"for {device.name} ({processor}): {found.engine}{with_}, {kind} weights: {found.reason}{fits}"
        return TargetChoice(found.engine, found.operators, kind, said)
    raise AssertionError("the last kind of weights returns or raises")


def _engine_for(device: DeviceProfile, processor: str, form: str, weights: str) -> EngineChoice:
    if form == "inline" or measured(processor, weights):
        return default_engine(form, weights, processor)
    reads = {
        engine: device.rates(engine, weights).weight_read_bytes_per_s for engine in ENGINES if engine in device.compute
    }
    rates = {engine: read.value / BITS_PER_WEIGHT[engine][weights] for engine, read in reads.items()}
    if len(rates) < len(ENGINES):
        return EngineChoice("onnx", "runs everywhere, and the profile has not both engines")
    fastest, slower = sorted(rates, key=lambda engine: -rates[engine])
    ratio = rates[fastest] / rates[slower]
    if ratio == 1:
        return EngineChoice("onnx", "runs everywhere, and the profile says that executorch is no faster")
    trust = max((read.confidence for read in reads.values()), key=list(CONFIDENCES).index)
    said = f"the profile says that it reads a token's weights in {1 / ratio:.0%} of the time of {slower} (confidence {trust})"
    if fastest == "executorch" and not executorch_installed():
        return EngineChoice("onnx", f"executorch is faster ({said}) but {NOT_INSTALLED}")
    return EngineChoice(fastest, said)
