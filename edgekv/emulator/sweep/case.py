"""One case of a sweep: what is asked of it, its key and its row."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgekv
from edgekv.device_profiles import DeviceProfile, load
from edgekv.errors import EdgeKVError, UsageError
from edgekv.settings import ATTEND, KV_BUDGET, POLICY, Setting

from ..device import Device
from ..play.play import emulate_shape
from ..play.scenario import AppSettings, Scenario, Turn
from ..play.shape_app import Shape

Row = dict[str, Any]

#: Of which model a row is; tables of the first versions do not say so.
MODEL = ("model", "engine", "weights", "page_size")
#: What is reported of a case, after its settings. ``error`` says why a case cannot run or ended early.
OUTCOME = (
    "error", "ttft_s", "decode_tokens_per_s", "decode_p99_s", "hit_rate", "peak_bytes", "kills", "bytes_read", "bytes_written",
    "wear_share", "seconds", "speed_left",
)  # fmt: skip
_SETTINGS = ("context", "policy", "kv_budget", "attend", "max_tokens", "seed")
#: The columns of a table, in order.
COLUMNS = ("key", *MODEL, "profile", *_SETTINGS, *OUTCOME)

#: The folders of this package whose code makes the numbers; "": the vocabulary that they share.
_CODE = ("", "device_profiles", "runtime", "emulator")


@dataclass(frozen=True)
class Case:
    """One run: a prompt that fills ``context`` but for ``max_tokens``, and an answer of so many."""

    device: DeviceProfile
    context: int
    policy: str
    kv_budget: str
    attend: str
    max_tokens: int
    seed: int

    def settings(self) -> Row:
        """Return it as columns of its row."""
        return {"profile": self.device.name, **{name: getattr(self, name) for name in _SETTINGS}}

    def key(self, shape: Shape) -> str:
        """Return what tells this case from every other: by what model, device and code are, not by how they are called."""
        parts = (self.settings(), self.device.to_json(), dataclasses.asdict(shape), edgekv.__version__, _code_digest())
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _code_digest() -> str:
    """Return what the code that makes the numbers is told by: between two releases it changes without its version."""
    root, digest = Path(edgekv.__file__).parent, hashlib.sha256()
    for folder in _CODE:
        for path in sorted((root / folder).glob("**/*.py" if folder else "*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def all_cases(
    profiles: Sequence[str],
    contexts: Sequence[int],
    policies: Sequence[str],
    budgets: Sequence[str],
    attends: Sequence[str],
    *,
    max_tokens: int,
    seed: int,
) -> list[Case]:
    """Return every combination; what is named twice is there once.

    Raises:
        UsageError: a context leaves no room for a prompt, a policy, budget or share of pages is none, or two profiles that
            differ have one name.
        ProfileError: there is no such profile.
    """
    devices: dict[str, DeviceProfile] = {}
    for profile in profiles:
        found = load(profile)
        same = devices.setdefault(found.name, found)
        if same.to_json() != found.to_json():
            raise UsageError(f"{same.path} and {found.path} are two profiles of one name; give one of them another")
    choices: list[tuple[Sequence[str], Setting[Any]]] = [
        (policies, POLICY), (attends, ATTEND), ([budget for budget in budgets if budget != "device"], KV_BUDGET),
    ]  # fmt: skip
    for words, setting in choices:
        for word in words:
            setting.read(word)
    if min(contexts) <= max_tokens:
        raise UsageError(f"a context of {min(contexts)} leaves no prompt beside {max_tokens} tokens to generate")
    combined = dict.fromkeys(itertools.product(devices, contexts, policies, budgets, attends))
    return [
        Case(devices[name], context, policy, budget, attend, max_tokens, seed)
        for name, context, policy, budget, attend in combined
    ]


def run_case(shape: Shape, case: Case) -> Row:
    """Run one case and return its row; a case that is impossible, or fails, has an ``error`` and no numbers.

    Raises:
        EdgeKVError: this machine has no room for it: that says nothing of the case.
    """
    row: Row = {"key": case.key(shape), **_model(shape), **case.settings(), **dict.fromkeys(OUTCOME)}
    app = AppSettings(
        kv_budget=None if case.kv_budget == "device" else case.kv_budget,
        context=case.context,
        policy=case.policy,
        attend=case.attend,
    )
    turn = Turn(prompt_tokens=case.context - case.max_tokens, max_tokens=case.max_tokens)
    try:
        result = emulate_shape(shape, Device(case.device, seed=case.seed), Scenario((turn,), app=app), seed=case.seed)
    except EdgeKVError as error:
        return {**row, "error": str(error)}
    except MemoryError as error:
        raise EdgeKVError("the system gives a case no more memory; give fewer --workers") from error
    except OSError as error:
        raise EdgeKVError(f"a case cannot use {error.filename}: {error.strerror}; make room there") from error
    except Exception as error:  # a fault of ours in one case is in its row: the others go on
        return {**row, "error": f"{type(error).__name__}: {error}"}
    numbers = {name: result.totals[name] for name in OUTCOME if name in result.totals}
    return {**row, **numbers, "error": result.turns[0].error, "ttft_s": result.turns[0].ttft_s}


def _model(shape: Shape) -> Row:
    name = f"{shape.architecture} {shape.model.parameters / 1e9:.3g} B"
    return dict(zip(MODEL, (name, shape.engine, shape.weights, shape.page_size), strict=True))
