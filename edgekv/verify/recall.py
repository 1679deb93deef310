"""Running the retrieval tasks: the document is read first, the question comes when its pages are already compressed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekv.errors import BudgetError, UsageError
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.text import Text
from edgekv.settings import parse_attend

from .baselines import LEAST_WINDOW, Baseline, least_arena_bytes
from .controls import Control
from .lanes import ANSWER_ROOM, Lane, ShortLane, reference_options, resident_options
from .tasks import Document, Filler, Suite, make_documents

#: A task that the full cache does worse than this says nothing about a cache.
MEASURABLE = 0.2
#: A share that is too small a budget for a short document is raised by this factor until it is enough.
RAISE = 1.2
#: Fewest pages that selective attention with a share gets: as many to choose as are always taken (the first, the open one, two
#: recent ones). A quarter of a document of 16 pages would be those alone, and say nothing about the choice.
LEAST_CHOICE = 8
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
    questions = [_prompt(text, document, question.text) for question in document.questions]
    other = _prompt(text, document, OTHER_QUESTION)
    common = min(_common(tokens, other) for tokens in questions)
    return Prompts(questions[0][:common], questions)


def _prompt(text: Text, document: Document, question: str) -> list[int]:
    system, body = document.system, document.body
    if text.chats:
        user = {"role": "user", "content": f"{body}\n\n{question}"}
        if not system:
            return text.encode_chat([user])
        with contextlib.suppress(UsageError):  # some templates refuse a system message, others leave it out
            tokens = text.encode_chat([{"role": "system", "content": system}, user])
            if system in text.decode(tokens):
                return tokens
        return text.encode_chat([{**user, "content": f"{system}\n\n{body}\n\n{question}"}])
    return text.encode(f"{system} {body}\nQuestion: {question}\nAnswer:".lstrip())


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
                for question, tokens in zip(document.questions, prompts.questions, strict=True):
                    right, asked = cells.get(question.cell, (0, 0))
                    answer = self._answer(lane, tokens, question.decided)
                    cells[question.cell] = (right + question.right(answer), asked + 1)
                lane.close()
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
    """Opens caches for documents of any length with the same share of the fp16 cache as the configuration has.

    Shares that mean nothing on a short document are raised: ``raised`` says up to which length [tokens].
    """

    def __init__(self, parent: Generator, options: RunOptions, share: float | None, control: Control | None) -> None:
        self._parent, self._options, self._share, self._control = parent, options, share, control
        self.raised = 0
        self._spec = parent.manifest.model.pages(parent.manifest.page_size)

    def reference(self, context: int) -> Lane:
        """Open the full fp16 cache."""
        return Lane(self._parent, reference_options(self._options), context)

    def configuration(self, context: int) -> Lane:
        """Open the configuration; a share that is too small for a short document is raised until it is enough."""
        options = dataclasses.replace(self._options, attend=self._attend(context))
        part = self._share
        while part is not None and part < 1.0:
            budget = int(part * self._spec.fp16_cache_bytes(context))
            lane = Lane(self._parent, dataclasses.replace(options, kv_budget=budget), context, control=self._control)
            with contextlib.suppress(BudgetError):
                if lane.plan.arena_bytes >= least_arena_bytes(self._parent):
                    return lane
                lane.close()
            part *= RAISE
            self.raised = max(self.raised, context)
        return Lane(self._parent, dataclasses.replace(options, kv_budget=None), context, control=self._control)

    def _attend(self, context: int) -> str:
        """Return ``--attend`` for a document: with a share of its pages, LEAST_CHOICE pages at the least."""
        share = parse_attend(self._options.attend).share
        if share is None or share * context >= LEAST_CHOICE * self._spec.page_size:
            return self._options.attend
        self.raised = max(self.raised, context)
        return f"selective:{LEAST_CHOICE}"

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


@dataclass(frozen=True)
class Answers:
    """What :func:`run_tasks` found.

    ``full``: the scores of the full cache; ``others``: those of the configuration and of each baseline, where they can be
    measured; ``raised``: documents up to this length [tokens] had more than the configuration's share.
    """

    full: list[TaskScore]
    others: list[list[TaskScore]]
    raised: int


def run_tasks(
    parent: Generator,
    options: RunOptions,
    baselines: list[Baseline],
    suite: Suite,
    text: str,
    share: float | None,
    seed: int,
    control: Control | None,
    advance: Callable[[str, int, int], None],
) -> Answers:
    """Run every task with the full cache, the configuration and the baselines.

    Args:
        share: of the fp16 cache of each document that the configuration has as its budget; None: no budget.
        control: a fault to put into the configuration.
    """
    examiner, lanes = Examiner(parent, suite, text, seed), TaskLanes(parent, options, share, control)
    done, total = 0, examiner.total * (2 + len(baselines))

    def count() -> None:
        nonlocal done
        done += 1
        advance("asking questions", done, total)

    full = [examiner.ask(name, lanes.reference, None, count) for name in examiner.names]
    openers: list[Callable[[int], Lane]] = [lanes.configuration]
    openers += [lambda context, b=baseline: lanes.baseline(b, context) for baseline in baselines]  # type: ignore[misc]
    measurable = [score for score in full if score.measurable]
    scores = [[examiner.ask(score.name, opener, score, count) for score in measurable] for opener in openers]
    return Answers(full, scores, lanes.raised)
