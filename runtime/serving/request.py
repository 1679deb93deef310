"""What is asked of a service, and what it tells while it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from edgekv.errors import EdgeKVError

from ..engines.base import Float
from ..sampling import SamplingOptions

#: ``stop``: the model ended its text, or a stop string came. ``length``: ``max_tokens`` came, or the end of the context.
FinishReason = Literal["stop", "length", "cancelled"]


class Constraint(Protocol):
    """Says which tokens may come next, such as those that keep to a grammar. Used by one answer."""

    def restrict(self, logits: Float) -> None:
        """Set the logits [vocab_size] of all tokens that may not come next to minus infinity, in place."""
        ...

    def accept(self, token: int) -> bool:
        """Take note of the token that came; returns whether nothing may come behind it."""
        ...


@dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    Attributes:
        tokens: of the prompt; an empty one begins with the token that begins a text.
        max_tokens: of the answer; None: as many as fit the context.
        stop: the text ends before any of these; see :meth:`Generator.stream`.
        logprobs: with each token its log-probability and those of so many of the likeliest; None: neither.
        presence_penalty, frequency_penalty: taken from the logits of tokens of the answer so far, once each and once for every
            time that they came (the OpenAI API's definition).
        logit_bias: added to the logits of these tokens.
        owner: requests of different owners share no pages.
    """

    tokens: tuple[int, ...]
    max_tokens: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: Constraint | None = None
    owner: bytes = b""


@dataclass(frozen=True)
class TokenFacts:
    """A token of an answer; ``logprob`` is the natural logarithm of its probability, before temperature and all else.

    ``likeliest``: (token, log-probability), the likeliest first.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Reading:
    """A part of the prompt was read: ``done`` of ``total`` tokens are in the cache, ``reused`` of them were there before."""

    done: int
    total: int
    reused: int


@dataclass(frozen=True)
class Piece:
    """A part of the answer: its text is certain (and may be empty), and belongs to these tokens or earlier ones."""

    text: str
    tokens: tuple[TokenFacts, ...]


@dataclass(frozen=True)
class Finished:
    """The answer is over.

    Attributes:
        prompt_tokens, cached_tokens: of the prompt, and how many of them did not have to be computed.
        completion_tokens: that were generated, without one that ends the text.
        seed: of the sampling; None where it was greedy.
    """

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seed: int | None = None


@dataclass(frozen=True)
class Failed:
    """The answer ends with an error; what came before it is right."""

    error: EdgeKVError


Event = Reading | Piece | Finished | Failed
#: Takes what is told of a request, on the thread of the service; the last is Finished or Failed. It must not wait.
Deliver = Callable[[Event], None]
