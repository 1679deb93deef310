"""Running the retrieval tasks: the document is read first, the question comes when its pages are already compressed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekv.errors import BudgetError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.text import Text
from edgekv.verify.baselines import LEAST_WINDOW, Baseline, least_arena_bytes
from edgekv.verify.lanes import ANSWER_ROOM, Lane, ShortLane, reference_options, resident_options
from edgekv.verify.tasks import Document, Filler, Suite, make_documents

#: A task that the full cache does worse than this says nothing about a cache.
MEASURABLE = 0.2
#: A share that is too small a budget for a short document is raised by this factor until it is enough.
RAISE = 1.2
#: In place of a question, to see where the question begins in the tokens of a prompt.
OTHER_QUESTION = "\N{SECTION SIGN}"


@dataclass(frozen=True)
class TaskScore:
    """Right answers of one task. ``of_full``: share of what the full cache gets right; ``cells``: right and asked, per place."""

    name: str
    right: int
    asked: int
    of_full: float
    measurable: bool
    cells: dict[str, tuple[int, int]]

    @property
    def score(self) -> float:
        """Share of right answers."""
        return self.right / self.asked if self.asked else 0.0


@dataclass(frozen=True)
class Prompts:
    """A document in tokens: what is read before any question is known, and the whole prompt of each question."""

    document: list[int]
    questions: list[list[int]]

    @property
    def context(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(tokens) for tokens in self.questions) + ANSWER_ROOM


def make_prompts(text: Text, document: Document) -> Prompts:
    """Put a document and its questions in the words that the model knows: its chat template, or plain questions."""
    questions = [_prompt(text, document.body, question.text) for question in document.questions]
    other = _prompt(text, document.body, OTHER_QUESTION)
    common = min(_common(tokens, other) for tokens in questions)
    return Prompts(questions[0][:common], questions)


def _prompt(text: Text, body: str, question: str) -> list[int]:
    if text.chats:
        return text.encode_chat([{"role": "user", "content": f"{body}\n\n{question}"}])
    return text.encode(f"{body}\nQuestion: {question}\nAnswer:")


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Examiner:
    """Asks the questions of every task, with any number of ways to open a cache of a given length."""

    def __init__(self, parent: Generator, suite: Suite, text: str, seed: int) -> None:
        filler = Filler(text, lambda sentence: len(parent.text.encode(sentence)))
        made = [(d, make_prompts(parent.text, d)) for d in make_documents(suite, filler, seed)]
        self._documents = [(d, p) for d, p in made if p.context <= parent.manifest.model.max_context]
        self._text = parent.text
        self._ends = parent.manifest.model.eos_token_ids
        self.names = sorted({document.task for document, _ in self._documents})
        self.total = len(self._documents)

    def ask(
        self, name: str, open_lane: Callable[[int], Lane], full: TaskScore | None, advance: Callable[[], None]
    ) -> TaskScore:
        """Score one task. ``full`` is the score of the full cache, None when this is it."""
        cells: dict[str, tuple[int, int]] = {}
        for document, prompts in self._documents:
            if document.task == name:
                lane = open_lane(prompts.context)
                lane.prefill(prompts.document)
                answers = [
                    question.right(self._answer(lane, tokens, question.decided))
                    for question, tokens in zip(document.questions, prompts.questions, strict=True)
                ]
                lane.close()
                right, asked = cells.get(document.cell, (0, 0))
                cells[document.cell] = (right + sum(answers), asked + len(answers))
                advance()
        right, asked = (sum(column) for column in zip(*cells.values(), strict=True))
        if full is None:
            return TaskScore(name, right, asked, 1.0, right >= MEASURABLE * asked, cells)
        return TaskScore(name, right, asked, right / full.right, True, cells)

    def _answer(self, lane: Lane, prompt: list[int], decided: Callable[[str], bool]) -> str:
        logits = lane.prefill(prompt)
        said: list[int] = []
        words = ""
        while True:
            token = int(np.argmax(logits))
            if token in self._ends:
                return words
            said.append(token)
            words = self._text.decode(said)
            if decided(words) or len(said) == ANSWER_ROOM:
                return words
            logits = lane.step(token)


class TaskLanes:
    """Opens caches for documents of any length with the same share of the fp16 cache as the configuration has."""

    def __init__(self, parent: Generator, options: RunOptions, share: float | None) -> None:
        self._parent, self._options, self._share = parent, options, share
        self._spec = parent.manifest.model.pages(parent.manifest.page_size)

    def reference(self, context: int) -> Lane:
        """Open the full fp16 cache."""
        return Lane(self._parent, reference_options(self._options), context)

    def configuration(self, context: int) -> Lane:
        """Open the configuration; a share that is too small for a short document is raised until it is enough."""
        part = self._share
        while part is not None and part < 1.0:
            budget = int(part * self._spec.fp16_cache_bytes(context))
            lane = Lane(self._parent, dataclasses.replace(self._options, kv_budget=budget), context)
            with contextlib.suppress(BudgetError):
                if lane.plan.arena_bytes >= least_arena_bytes(self._parent):
                    return lane
                lane.close()
            part *= RAISE
        return Lane(self._parent, dataclasses.replace(self._options, kv_budget=None), context)

    def baseline(self, baseline: Baseline, context: int) -> Lane:
        """Open a baseline in the bytes that the configuration has for this length."""
        probe = self.configuration(context)
        budget = probe.plan.budget_bytes
        probe.close()
        lane = baseline.open(self._parent, self._options, context, budget)
        if isinstance(lane, Lane):
            return lane
        if baseline.policy is None:
            return ShortLane(self._parent, reference_options(self._options), LEAST_WINDOW)
        return Lane(self._parent, resident_options(self._options), context)


def run_tasks(
    parent: Generator,
    options: RunOptions,
    baselines: list[Baseline],
    suite: Suite,
    text: str,
    share: float | None,
    seed: int,
    advance: Callable[[str, int, int], None],
) -> tuple[list[TaskScore], list[list[TaskScore]]]:
    """Run every task with the full cache, the configuration and the baselines.

    Args:
        share: of the fp16 cache of each document that the configuration has as its budget; None: no budget.

    Returns:
        the scores of the full cache; and those of the configuration and of each baseline, where they can be measured.
    """
    examiner, lanes = Examiner(parent, suite, text, seed), TaskLanes(parent, options, share)
    done, total = 0, examiner.total * (2 + len(baselines))

    def count() -> None:
        nonlocal done
        done += 1
        advance("asking questions", done, total)

    full = [examiner.ask(name, lanes.reference, None, count) for name in examiner.names]
    openers: list[Callable[[int], Lane]] = [lanes.configuration]
    openers += [lambda context, b=baseline: lanes.baseline(b, context) for baseline in baselines]  # type: ignore[misc]
    measurable = [score for score in full if score.measurable]
    return full, [[examiner.ask(score.name, opener, score, count) for score in measurable] for opener in openers]
