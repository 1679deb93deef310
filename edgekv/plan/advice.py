"""The setting that a plan recommends, as commands to run."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

from edgekv.contract import WEIGHTS
from edgekv.device_profiles import DeviceProfile
from edgekv.device_profiles.work import BITS_PER_WEIGHT, weights_bytes

from .model import PlannedModel
from .planner import Plan, Workload, make_plan

#: Exact attention is recommended down to this speed, or this share of the selective speed: it changes no results.
READING_TOKENS_PER_S, WORTH_IT = 5.0, 0.5
SELECTIVE = 0.25


@dataclass(frozen=True)
class Advice:
    """A plan and how to get it; ``commands`` is empty when no setting fits."""

    plan: Plan
    why: str
    commands: tuple[str, ...]


def advise(model: PlannedModel, device: DeviceProfile, workload: Workload) -> Advice:
    """Return the best setting for a workload: exact in RAM, exact from flash, selective, smaller weights, shorter."""
    exact = make_plan(model, device, dataclasses.replace(workload, wanted=None))
    if exact.fits:
        return _of_those_that_fit(exact, device)
    for weights in WEIGHTS:  # the smallest first, which are the fastest too
        size = weights_bytes(model.geometry, BITS_PER_WEIGHT[model.engine][weights])
        if size < model.weights_bytes:
            smaller = dataclasses.replace(model, weights=weights, weights_bytes=size, exported=False)
            plan = make_plan(smaller, device, exact.workload)
            if plan.fits:
                advice = _of_those_that_fit(plan, device)
                return dataclasses.replace(advice, why=f"{weights} weights fit; {advice.why}")
    if 0 < exact.largest_exact < workload.context:
        context = exact.largest_exact
        prompt = min(workload.prompt, context * workload.prompt // workload.context)
        plan = make_plan(model, device, dataclasses.replace(exact.workload, context=context, prompt=prompt))
        if plan.fits:
            return Advice(plan, f"a context of {context} tokens fits", _commands(plan))
    return Advice(exact, "no weights and no context fit: a smaller model, or a device with more memory", ())


def _of_those_that_fit(exact: Plan, device: DeviceProfile) -> Advice:
    if exact.resident:
        return Advice(exact, "keys and values stay in RAM", _commands(exact))
    selective = make_plan(exact.model, device, dataclasses.replace(exact.workload, wanted=SELECTIVE))
    speed = exact.decode_tokens_per_s
    if not selective.fits or speed >= READING_TOKENS_PER_S or speed >= WORTH_IT * selective.decode_tokens_per_s:
        return Advice(exact, "flash is fast enough to read what is not in RAM for every token", _commands(exact))
    why = (
        f"reading all of it from flash gives {speed:.2g} tokens/s; a quarter of the pages per token is faster, changes results,"
        " and says by how much at most"
    )
    return Advice(selective, why, _commands(selective))


def _commands(plan: Plan) -> tuple[str, ...]:
    model, lines = plan.model, []
    bundle = model.source
    if not model.exported:
        source = Path(model.source)
        name = (source.parent if source.suffix == ".json" else source).resolve().name
        bundle = f"{name}.edgekv"
        engine = "" if model.engine.startswith("onnx") else f" --engine {model.engine}"
        origin = str(source.parent if source.suffix == ".json" else source)
        lines.append(
            f"edgekv export {shlex.quote(origin)} --weights {model.weights}{engine} --out {shlex.quote(bundle)}"
        )
    attend = f" --attend selective:{plan.workload.wanted:.0%}" if plan.workload.wanted is not None else ""
    lines.append(
        f"edgekv run {shlex.quote(bundle)} --profile {plan.profile} --context {plan.workload.context}{attend} --chat"
    )
    return tuple(lines)
