"""The setting that a plan recommends, as commands to run."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

from edgekv.contract import WEIGHTS
from edgekv.device_profiles import DeviceProfile, load, names
from edgekv.device_profiles.work import BITS_PER_WEIGHT, weights_bytes
from edgekv.tiers import KVMode

from .model import PlannedModel
from .planner import Plan, Workload, make_plan

#: Exact attention is recommended down to this speed, or this share of the selective speed: it changes no results.
READING_TOKENS_PER_S, WORTH_IT = 5.0, 0.5
SELECTIVE = 0.25
#: What a model without a chat template is given to go on with.
PROMPT = '--prompt "Once upon a time"'


@dataclass(frozen=True)
class Advice:
    """A plan and how to get it; ``commands`` is empty when no setting fits, or no checkpoint is known to export."""

    plan: Plan
    why: str
    commands: tuple[str, ...]


def advise(model: PlannedModel, device: DeviceProfile, workload: Workload) -> Advice:
    """Return the best setting for a workload: exact in RAM, exact from flash, selective, smaller weights, shorter."""
    workload = dataclasses.replace(workload, wanted=None)
    limit = model.geometry.max_context
    if workload.context > limit:
        advice = advise(model, device, workload.shortened(limit))
        return dataclasses.replace(advice, why=f"the model was made for {limit} tokens; {advice.why}")
    exact = make_plan(model, device, workload)
    if exact.fits:
        return _of_those_that_fit(exact, device, workload)
    for weights in WEIGHTS:  # the smallest first, which are the fastest too
        size = weights_bytes(model.geometry, BITS_PER_WEIGHT[model.engine][weights])
        if size < model.weights_bytes:
            smaller = dataclasses.replace(model, weights=weights, weights_bytes=size, exported=False)
            plan = make_plan(smaller, device, workload)
            if plan.fits:
                advice = _of_those_that_fit(plan, device, workload)
                again = "" if model.origin is not None else f", export the checkpoint again with --weights {weights}"
                return dataclasses.replace(advice, why=f"{weights} weights fit{again}; {advice.why}")
    if 0 < exact.largest_exact < workload.context:
        plan = make_plan(model, device, workload.shortened(exact.largest_exact))
        if plan.fits:
            return Advice(plan, f"a context of {exact.largest_exact} tokens fits", _commands(plan, device))
    return Advice(exact, "no weights and no context fit: a smaller model, or a device with more memory", ())


def _of_those_that_fit(exact: Plan, device: DeviceProfile, workload: Workload) -> Advice:
    commands, speed = _commands(exact, device), exact.decode_tokens_per_s
    if exact.resident:
        as_int8 = " as INT8, which are faster than fp16" if exact.workload.kv == KVMode.INT8 else ""
        return Advice(exact, f"keys and values stay in RAM{as_int8}", commands)
    if exact.model.form == "inline":
        return Advice(exact, "what is not in RAM is read from flash for every token", commands)
    selective = make_plan(exact.model, device, dataclasses.replace(workload, wanted=SELECTIVE))
    if not selective.fits or speed >= READING_TOKENS_PER_S or speed >= WORTH_IT * selective.decode_tokens_per_s:
        return Advice(exact, "flash is fast enough to read what is not in RAM for every token", commands)
    why = (
        f"reading all of it from flash gives {speed:.2g} tokens/s; a quarter of the pages per token is faster, changes results,"
        " and says by how much at most"
    )
    return Advice(selective, why, _commands(selective, device))


def _commands(plan: Plan, device: DeviceProfile) -> tuple[str, ...]:
    model, workload, lines = plan.model, plan.workload, []
    bundle = model.source
    if not model.exported:
        if model.origin is None:
            return ()
        bundle = f"{Path(model.origin).resolve().name}.edgekv"
        origin = shlex.quote(model.origin)
        context = next((f"--context {most} " for most in model.contexts if most >= workload.context), "")
        lines.append(
            f"edgekv export {origin} --weights {model.weights} --engine {model.engine} {context}--out {shlex.quote(bundle)}"
        )
    # A profile that was given as a file is not found by its name.
    profile = str(device.path) if device.name not in names() or load(device.name) != device else device.name
    options = f"--profile {shlex.quote(profile)} --context {workload.context}"
    if workload.kv not in (None, KVMode.AUTO):
        options += f" --kv {workload.kv.value}"
    if workload.wanted is not None:
        options += f" --attend selective:{100 * workload.wanted:g}%"
    lines.append(f"edgekv run {shlex.quote(bundle)} {options} {'--chat' if model.chats else PROMPT}")
    return tuple(lines)
