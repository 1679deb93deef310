"""Plays a scenario on a device: turns, kills and new starts, errors; whatever happens, a result comes out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from edgekv.bundle import read_manifest
from edgekv.errors import EngineError, OutOfPages, StoreError, UsageError
from edgekv.runtime.text import Text
from edgekv.scratch import ScratchFolder

from ..device import Device
from ..memory import AppKilled
from .bundle_app import App, BundleApp, plan_facts
from .result import Result, TurnResult, device_facts, totals
from .scenario import Scenario, Turn
from .shape_app import Shape, WeightlessApp

#: Called with tokens generated so far, and how many there may be.
Progress = Callable[[int, int], None]


def emulate(
    bundle: Path,
    device: Device,
    scenario: Scenario,
    *,
    seed: int = 0,
    session: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Play a scenario with a bundle: the real runtime and model on an emulated device.

    Args:
        session: folder of the app's session; without it a session of the scenario lives in a temporary folder.

    Raises:
        UsageError: the scenario cannot be played at all: no budget is left, the bundle is none, the turns exceed the context.
    """
    context = _context(bundle, scenario)
    with ScratchFolder(None, "edgekv-") as scratch:
        if session is None and scenario.app.session:
            session = scratch.path / "session"
        app = BundleApp(bundle, device, scenario.app, seed=seed, context=context, session=session, scratch=scratch.path)
        return play(app, device, scenario, progress, scratch=str(scratch.path))


def emulate_shape(
    shape: Shape, device: Device, scenario: Scenario, *, seed: int = 0, progress: Progress = lambda done, total: None
) -> Result:
    """Play a scenario with a model that is only its shape; see :mod:`edgekv.emulator.play.shape_app`.

    Raises:
        UsageError: the scenario cannot be played at all: no budget is left, a turn has a text.
    """
    needed = sum((turn.prompt_tokens or 0) + turn.max_tokens for turn in scenario.turns)
    context = scenario.app.context or needed
    with ScratchFolder(None, "edgekv-") as scratch:
        app = WeightlessApp(shape, device, scenario.app, seed=seed, context=context, scratch=scratch.path)
        return play(app, device, scenario, progress, scratch=str(scratch.path))


def play(
    app: App,
    device: Device,
    scenario: Scenario,
    progress: Progress = lambda done, total: None,
    *,
    scratch: str | None = None,
) -> Result:
    """Play a scenario with any app; the name of a ``scratch`` folder is left out of what is reported."""
    for event in scenario.events:
        device.schedule(event)
    result = Result(scenario, device_facts(device), app.facts(), {})
    player = _Player(app, device, scenario, scratch)
    total = sum(turn.max_tokens for turn in scenario.turns)
    try:
        for turn in scenario.turns:
            done = sum(earlier.answer_tokens for earlier in result.turns)
            result.turns.append(player.take(turn, functools.partial(_heard, progress, done, total)))
        result.pages = app.pages()
    finally:
        device.end_step()
        app.stop()
        device.end()
    progress(total, total)
    result.budget = plan_facts(app.plan())
    result.totals = totals(device, result.turns)
    result.log = [asdict(entry) for entry in device.timeline.entries]
    result.samples = device.timeline.columns()
    return result


def _heard(progress: Progress, done: int, total: int, count: int) -> None:
    progress(done + count, total)


class _Player:
    """Talks to an app that may die at any moment, and starts it again."""

    def __init__(self, app: App, device: Device, scenario: Scenario, scratch: str | None) -> None:
        self._app = app
        self._device = device
        self._settings = scenario.app
        self._scratch = scratch
        self._runs = False
        self._lives = 0

    def take(self, turn: Turn, progress: Callable[[int], None]) -> TurnResult:
        """Take one turn; kills and errors are part of what comes out."""
        device = self._device
        result = TurnResult(device.now())
        asked, asked_s = False, device.now() + turn.pause_s
        while True:
            try:
                self._start()
                if not asked:
                    device.rest_until(asked_s)
                    result.began_s = device.now()
                    result.prompt_tokens = self._app.ask(turn)
                    asked = True
                self._answer(result, progress)
                break
            except AppKilled as killed:
                result.kills += 1
                self._on_killed(str(killed))
                if result.kills > self._settings.restarts:
                    result.error = f"killed {result.kills} times: {killed}"
                    break
            except (StoreError, OutOfPages, EngineError) as error:
                result.error = str(error).replace(f"{self._scratch}/", "")
                device.timeline.log(device.now(), "error", result.error)
                break
        if turn.prompt is not None and self._runs:
            result.text = self._app.said()
        return result

    def _start(self) -> None:
        if self._runs:
            return
        if self._lives:
            self._device.rest(self._settings.restart_s)
        self._app.start()
        self._runs = True
        if self._lives:
            self._device.timeline.log(self._device.now(), "restart", "the app runs again")
        self._lives += 1

    def _on_killed(self, reason: str) -> None:
        self._device.timeline.log(self._device.now(), "killed", reason)
        self._app.stop()
        self._device.end()
        self._runs = False
        self._lives = max(self._lives, 1)

    def _answer(self, result: TurnResult, progress: Callable[[int], None]) -> None:
        app, device = self._app, self._device
        before, last_s = app.computed_tokens, None
        try:
            for count in app.answer():
                if result.ttft_s is None:
                    result.ttft_s = device.now() - result.began_s
                if last_s is not None:
                    result.decode_s += device.now() - last_s
                    result.decoded_tokens += 1
                last_s, result.answer_tokens = device.now(), count
                progress(count)
        finally:
            result.computed_tokens += app.computed_tokens - before


def _context(bundle: Path, scenario: Scenario) -> int:
    """Return the tokens of the whole conversation, or what the scenario says.

    Raises:
        UsageError: that is more than the model was made for.
    """
    if scenario.app.context is not None:
        return scenario.app.context
    manifest = read_manifest(bundle)
    model = manifest.model
    text = Text.open(bundle, manifest) if any(turn.prompt is not None for turn in scenario.turns) else None
    total = 0
    for turn in scenario.turns:
        prompt = len(text.encode(turn.prompt)) if text is not None and turn.prompt is not None else turn.prompt_tokens
        total += (prompt or 0) + turn.max_tokens
    if total > model.max_context:
        raise UsageError(
            f"the turns need {total} tokens together, and the model was made for {model.max_context}; ask for less"
        )
    return total
