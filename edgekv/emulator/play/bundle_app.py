"""The app of a scenario: a conversation with the runtime, which is killed and starts again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from edgekv.bundle import read_manifest
from edgekv.errors import EdgeKVError
from edgekv.runtime.generate import Generator
from edgekv.runtime.options import RunOptions, SessionOptions
from edgekv.runtime.pages.budget import BudgetPlan
from edgekv.tiers import KVMode

from ..device import Device
from .result import PageMap, page_map
from .scenario import AppSettings, Turn


class App(Protocol):
    """What a scenario talks to. ``ask``, then ``answer`` until it ends; after a kill ``start`` and ``answer`` again."""

    #: Tokens of prompts that were computed so far, those again that a kill took included.
    computed_tokens: int

    def start(self) -> None:
        """Load the model; what a session kept is there again."""
        ...

    def ask(self, turn: Turn) -> int:
        """Add a prompt to the conversation and return how many tokens it has."""
        ...

    def answer(self) -> Iterator[int]:
        """Answer the last prompt; yields the tokens of the answer so far, each time one was added."""
        ...

    def said(self) -> str | None:
        """Return the text of the last answer; None where there is no text."""
        ...

    def stop(self) -> None:
        """End, in order or after a kill."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what the report says of the model."""
        ...

    def plan(self) -> BudgetPlan | None:
        """Return how the budget is divided, once that is known."""
        ...

    def pages(self) -> PageMap | None:
        """Return where the pages are now."""
        ...


class BundleApp:
    """An :class:`App` on a bundle: the real model, cache, files and sessions.

    Args:
        session: its folder; None keeps nothing. scratch: a folder for pages that do not fit.
        context: tokens of the whole conversation at the most.
    """

    def __init__(
        self,
        bundle: Path,
        device: Device,
        settings: AppSettings,
        *,
        seed: int,
        context: int,
        session: Path | None,
        scratch: Path,
    ) -> None:
        self._bundle = bundle
        self._device = device
        self._manifest = read_manifest(bundle)
        self._random = random.Random(seed)
        self._options = RunOptions(
            kv_budget=settings.kv_budget,
            kv=KVMode(settings.kv),
            context=context,
            policy=settings.policy,
            attend=settings.attend,
            allow_drop=settings.allow_drop,
            offload=None if settings.allow_drop or session is not None else scratch / "offload",
            prefill_chunk=settings.prefill_chunk,
            prefixes=False,
            session=SessionOptions(session, settings.checkpoint_tokens) if session is not None else None,
        )
        self._generator: Generator | None = None
        self._plan: BudgetPlan | None = None
        self._request: list[int] = []
        self._answer: list[int] = []
        self._max_tokens = 0
        self.computed_tokens = 0

    def start(self) -> None:
        """Open the bundle."""
        self._generator = self._device.open(self._bundle, self._options)

    def ask(self, turn: Turn) -> int:
        """Add a prompt: text through the tokenizer, or tokens by the seed, none of them special."""
        assert self._generator is not None
        if turn.prompt is not None:
            tokens = self._generator.text.encode(turn.prompt)
        else:
            special = {*self._manifest.model.eos_token_ids, self._manifest.model.bos_token_id}
            usual = [token for token in range(self._manifest.model.vocab_size) if token not in special]
            tokens = self._random.choices(usual, k=turn.prompt_tokens or 1)
        self._request, self._answer = [*self._request, *self._answer, *tokens], []
        self._max_tokens = turn.max_tokens
        return len(tokens)

    def answer(self) -> Iterator[int]:
        """Generate; a session that was killed in the middle of this answer goes on with it."""
        generator = self._generator
        assert generator is not None
        self._answer = []
        held = generator.session.tokens if generator.session is not None else []
        if held[: len(self._request)] == self._request:
            self._answer = held[len(self._request) :][: self._max_tokens]
        left = self._max_tokens - len(self._answer)
        before = generator.stats.prefill_tokens
        if left:
            for token in generator.tokens([*self._request, *self._answer], max_tokens=left):
                self._answer.append(token)
                self._plan = generator.budget
                self.computed_tokens += generator.stats.prefill_tokens - before
                before = generator.stats.prefill_tokens
                yield len(self._answer)

    def said(self) -> str | None:
        """Decode the last answer."""
        return self._generator.text.decode(self._answer) if self._generator is not None else None

    def stop(self) -> None:
        """Close the generator; after a kill nothing of its session is written."""
        generator, self._generator = self._generator, None
        if generator is not None:
            try:
                generator.close()
            except EdgeKVError as error:
                self._device.timeline.log(self._device.now(), "error", str(error))

    def facts(self) -> dict[str, Any]:
        """Return shape, engine and weights."""
        manifest = self._manifest
        return {
            "architecture": manifest.model.architecture,
            "n_layers": manifest.model.n_layers,
            "engine": manifest.engine,
            "form": manifest.form,
            "weights": manifest.weights,
            "weights_bytes": manifest.weights_bytes(),
            "page_size": manifest.page_size,
            "source_sha256": manifest.source_sha256,
            "context": self._options.context,
        }

    def plan(self) -> BudgetPlan | None:
        """Return how the budget is divided."""
        return self._plan

    def pages(self) -> PageMap | None:
        """Return the pages of the cache."""
        cache = self._generator.cache if self._generator is not None else None
        return page_map(cache) if cache is not None else None


def plan_facts(plan: BudgetPlan | None) -> dict[str, Any]:
    """Return a plan as plain data."""
    return asdict(plan) if plan is not None else {}
