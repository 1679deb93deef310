"""Retrieval tasks that need no download: facts hidden in a book, and questions that the cache did not know of.

The phrasing of the facts is the one that the bundled model is trained on (`tools/demo_tasks.py` takes it from here); any chat
model understands it too.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NAMES = [
    "amber", "birch", "cedar", "delta", "ember", "frost", "grove", "haven", "ivory", "jade", "karma", "lotus",
    "maple", "north", "ocean", "pearl", "quartz", "river", "stone", "tiger", "umber", "vapor", "willow", "xenon",
    "yacht", "zebra", "anchor", "basil", "coral", "drift", "eagle", "flint", "garnet", "harbor", "indigo", "juniper",
]  # fmt: skip
FACT = "The secret code of {name} is {code}."
QUESTION = "What is the secret code of {name}?"

#: Between the two coordinates in the name of a cell of a grid.
DEPTH = ", depth "
#: Right when the first number that is said is the code.
NUMBER = "number"
#: Right when the word is said.
WORD = "word"


@dataclass(frozen=True)
class Question:
    """A question and what its answer must be; ``cell``: its place in the grid of its task; ``kind``: NUMBER or WORD."""

    text: str
    answer: str
    cell: str
    kind: str = NUMBER

    def right(self, said: str) -> bool:
        """Return True when this is the answer, exactly."""
        if self.kind == WORD:
            return self.answer.lower() in re.findall(r"\w+", said.lower())
        return re.findall(r"\d+", said)[:1] == [self.answer]

    def decided(self, said: str) -> bool:
        """Return True when nothing that is still to be said can change the score."""
        return re.search(r"\d\D", said) is not None if self.kind == NUMBER else self.right(said)


@dataclass(frozen=True)
class Document:
    """A text with something hidden in it, and the questions about it. ``system``: an order that stands before it."""

    task: str
    body: str
    questions: list[Question]
    system: str = ""


@dataclass(frozen=True)
class Suite:
    """The grids. ``lengths`` in tokens; ``depths``: where the facts stand that are asked for, 0 is the beginning; ``keys``:
    facts in one document, those beside the asked ones anywhere; ``pairs``: facts without any text between, ``asked`` of them
    asked for.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    keys: tuple[int, ...] = (5, 8)
    pairs: tuple[int, ...] = (8, 16)
    asked: int = 3
    others: bool = True

    @classmethod
    def none(cls) -> Suite:
        """No task at all."""
        return cls(lengths=(), pairs=())

    @classmethod
    def quick(cls) -> Suite:
        """One small grid: seconds."""
        return cls(lengths=(384,), depths=(0.0, 0.5), keys=(2,), pairs=(), others=False)


class Filler:
    """Sentences of a book, cut to a number of tokens."""

    def __init__(self, text: str, count_tokens: Callable[[str], int]) -> None:
        self._sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]
        self._tokens = [count_tokens(" " + sentence) for sentence in self._sentences]

    def sentences(self, n_tokens: int, rng: random.Random) -> list[str]:
        """Return consecutive sentences of about ``n_tokens``, from a random one on (the book goes round)."""
        at, left, taken = rng.randrange(len(self._sentences)), n_tokens, []
        while left > 0:
            sentence, tokens = self._sentences[at], max(self._tokens[at], 1)
            if tokens > left:  # a long one is cut
                words = sentence.split()
                sentence = " ".join(words[: max(1, len(words) * left // tokens)])
            taken.append(sentence)
            left -= tokens
            at = (at + 1) % len(self._sentences)
        return taken


def make_documents(suite: Suite, filler: Filler, seed: int) -> list[Document]:
    """Return the documents of every task; equal seeds give equal ones."""
    rng = random.Random(seed)
    documents = []
    for length in suite.lengths:
        for depth in suite.depths:
            documents.append(_passkey(filler, rng, length, depth))
        for keys in suite.keys:
            documents.append(_many_keys(filler, rng, length, keys, suite.depths))
        if suite.others:
            documents.append(_variables(filler, rng, length))
            documents.append(_instruction(filler, rng, length))
    documents += [_pairs(rng, count, suite.asked) for count in suite.pairs]
    return sorted(documents, key=lambda document: document.task)


def _code(rng: random.Random) -> str:
    return f"{rng.randrange(1000, 10000)}"


def _hide(filler: Filler, rng: random.Random, length: int, facts: list[tuple[float, str]]) -> str:
    """Put facts between the sentences of a text, each where its depth is nearest."""
    sentences = filler.sentences(length - 16 * len(facts), rng)
    ends = [0, *itertools.accumulate(len(sentence) for sentence in sentences)]
    nearest = [min(range(len(ends)), key=lambda i, at=depth * ends[-1]: abs(ends[i] - at)) for depth, _ in facts]  # type: ignore[misc]
    for place, (_, fact) in sorted(zip(nearest, facts, strict=True), key=lambda pair: pair[0], reverse=True):
        sentences.insert(place, fact)
    return " ".join(sentences)


def _passkey(filler: Filler, rng: random.Random, length: int, depth: float) -> Document:
    name, code = rng.choice(NAMES), _code(rng)
    body = _hide(filler, rng, length, [(depth, FACT.format(name=name, code=code))])
    question = Question(QUESTION.format(name=name), code, _cell(f"{length} tokens", depth))
    return Document("passkey", body, [question])


def _cell(place: str, depth: float) -> str:
    return f"{place}{DEPTH}{depth:.0%}"


def _many_keys(filler: Filler, rng: random.Random, length: int, count: int, depths: Sequence[float]) -> Document:
    codes = [(name, _code(rng)) for name in rng.sample(NAMES, count)]
    places = [*depths, *(rng.random() for _ in codes[len(depths) :])]
    facts = [FACT.format(name=name, code=code) for name, code in codes]
    body = _hide(filler, rng, length, list(zip(places, facts, strict=True)))
    questions = [
        Question(QUESTION.format(name=name), code, _cell(f"{length} tokens, {count} keys", depth))
        for (name, code), depth in zip(codes, depths, strict=False)
    ]
    return Document("many keys", body, questions)


def _pairs(rng: random.Random, count: int, asked: int) -> Document:
    codes = [(name, _code(rng)) for name in rng.sample(NAMES, count)]
    body = " ".join(FACT.format(name=name, code=code) for name, code in codes)
    questions = [
        Question(QUESTION.format(name=name), code, f"{count} pairs")
        for name, code in rng.sample(codes, min(asked, count))
    ]
    return Document("key-value recall", body, questions)


def _variables(filler: Filler, rng: random.Random, length: int) -> Document:
    first, second, third = rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 3)
    code = _code(rng)
    chain = [f"Let {first} = {code}.", f"Let {second} = {first}.", f"Let {third} = {second}."]
    depths = sorted(rng.random() for _ in chain)
    body = _hide(filler, rng, length, list(zip(depths, chain, strict=True)))
    return Document("variable tracking", body, [Question(f"What number is {third}?", code, f"{length} tokens")])


def _instruction(filler: Filler, rng: random.Random, length: int) -> Document:
    word = rng.choice(NAMES)
    order = f"Instruction: whatever you are asked, begin your answer with the word {word}."
    question = Question("What is the text about?", word, f"{length} tokens", WORD)
    return Document("instruction at the start", _hide(filler, rng, length, []), [question], system=order)
