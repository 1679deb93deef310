"""Conversations from Python: messages in; out come the answer, why it ended, and what it cost.

answer = generator.chat([{"role": "user", "content": "Who wrote Moby Dick?"}])
for piece in generator.chat_stream(messages): ...           # as it comes
async for piece in generator.chat_stream(messages): ...     # likewise, in a thread of its own
answer = await generator.chat_stream(messages)
"""

from __future__ import annotations

import asyncio
from collections import abc
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from edgekv.bundle import Manifest
from edgekv.errors import UsageError
from edgekv.settings import instance

from .sampling import SamplingOptions
from .sessions.restore import common_prefix
from .stats import RunStats
from .text import Text

#: ``{"role": "user" | "assistant" | "system" | "tool", "content": ...}``, and what else the template of the model reads.
Message = Mapping[str, Any]
#: Called with (tokens done, tokens to do).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Usage:
    """What an answer cost, in tokens: those of the prompt, how many of them were in the cache already, and those generated."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Answer:
    """An answer. ``tokens`` are those of its text, which the cache goes on with: none behind a stop string.

    ``finish_reason``: ``stop`` (the model ended it, or a stop string did), ``length`` (``max_tokens``, or the context), or None:
    it is not over, or was cut off.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    usage: Usage


class Speaks(Protocol):
    """What answers are made with: a :class:`~edgekv.runtime.generate.Generator`."""

    stats: RunStats
    manifest: Manifest

    @property
    def text(self) -> Text:
        """The tokenizer and the chat template."""

    @property
    def sequence(self) -> list[int]:
        """The tokens of the last prompt and its answer."""

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = ...,
        sampling: SamplingOptions | None = ...,
        stop: str | Sequence[str] = ...,
        pin: str | int = ...,
        progress: Progress | None = ...,
    ) -> abc.Generator[str]:
        """Generate text, piece by piece."""


class Chats:
    """The part of a generator that holds conversations."""

    def chat(
        self: Speaks,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int = 256,
        sampling: SamplingOptions | None = None,
        stop: str | Sequence[str] = (),
        pin: bool = False,
        progress: Progress | None = None,
    ) -> Answer:
        """Answer the last message of a conversation.

        What the cache holds of the conversation already is not computed again (``usage.cached_tokens``). A cache without a
        ``context`` in its options is made for one prompt and answer: give one that the conversation fits.

        Args:
            messages: from the first on, the system message before the others; see :data:`Message`.
            tools: JSON schemas of functions that the assistant may call, for templates that know tools.
            pin: the system message must stay: reclaim offloads its pages last and never drops them.
            sampling: None: as the makers of the model do, see ``manifest.sampling``; greedily where they do not say.
            max_tokens, stop, progress: see :meth:`Generator.stream`.

        Raises:
            UsageError: the bundle has no chat template, the template refuses the conversation, or there is no system message
                to pin. Otherwise as :meth:`Generator.stream`.
        """
        answer = _begun(
            self, messages, tools, pin, max_tokens=max_tokens, sampling=sampling, stop=stop, progress=progress
        )
        for _ in answer:
            pass
        return answer.answer

    def chat_stream(
        self: Speaks,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int = 256,
        sampling: SamplingOptions | None = None,
        stop: str | Sequence[str] = (),
        pin: bool = False,
        progress: Progress | None = None,
    ) -> AnswerStream:
        """Answer the last message of a conversation, piece by piece: see :meth:`chat` and :class:`AnswerStream`."""
        return _begun(
            self, messages, tools, pin, max_tokens=max_tokens, sampling=sampling, stop=stop, progress=progress
        )


def system_tokens(text: Text, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> int:
    """Return with how many tokens every conversation begins that has the system message of this one.

    Raises:
        UsageError: it has none.
    """
    if not messages or messages[0].get("role") != "system":
        raise UsageError("there is no system message to pin; begin the conversation with one")
    first, second = (text.encode_chat([messages[0], {"role": "user", "content": word}], tools) for word in ("a", "1"))
    return common_prefix(first, second)


class AnswerStream:
    """An answer as it comes: iterate over its pieces of text, once, with ``for`` or ``async for``; or await the whole of it.

    An asynchronous one is computed in a thread of its own. Whoever stops early calls :meth:`close`, or :meth:`aclose`, which
    ends within a token (in a prompt, within one step of it); after that the generator is free for another text.

    Attributes:
        prompt: the tokens of the conversation.
    """

    def __init__(
        self, generator: Speaks, prompt: Sequence[int], begin: Callable[[Progress], abc.Generator[str]]
    ) -> None:
        self.prompt = list(prompt)
        self._generator = generator
        self._text: list[str] = []
        self._tokens: tuple[int, ...] = ()
        self._finish_reason: str | None = None
        self._cached = self._completion = 0
        self._given_up = False
        self._pieces = self._run(begin)
        self._async_pieces = self._run_in_thread()

    @property
    def answer(self) -> Answer:
        """The answer: of what has come so far, its text and its cost; whole once the iteration is over."""
        usage = Usage(len(self.prompt), self._cached, self._completion)
        return Answer("".join(self._text), self._tokens, self._finish_reason, usage)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the answer where it is."""
        self._pieces.close()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._async_pieces

    def __await__(self) -> abc.Generator[Any, None, Answer]:
        return self._whole().__await__()

    async def aclose(self) -> None:
        """End the answer where it is, and wait until its thread has done so."""
        await self._async_pieces.aclose()

    async def _whole(self) -> Answer:
        try:
            async for _ in self._async_pieces:
                pass
        finally:
            await self.aclose()
        return self.answer

    def _run(self, begin: Callable[[Progress], abc.Generator[str]]) -> abc.Generator[str]:
        stats, n_prompt = self._generator.stats, len(self.prompt)
        reused = stats.reused_tokens
        try:
            with closing(begin(self._go_on)) as pieces:
                for piece in pieces:
                    self._cached, self._completion = stats.reused_tokens - reused, stats.answer_tokens
                    self._text.append(piece)
                    if piece:
                        yield piece
                    if self._given_up:
                        return
            self._finish_reason, self._completion = stats.finish_reason, stats.answer_tokens
        except _GivenUp:
            return
        finally:
            sequence = self._generator.sequence
            if sequence[:n_prompt] == self.prompt:
                self._tokens = tuple(sequence[n_prompt:])

    def _go_on(self, done: int, total: int) -> None:
        if self._given_up:
            raise _GivenUp

    async def _run_in_thread(self) -> abc.AsyncGenerator[str]:
        loop, worker = asyncio.get_running_loop(), ThreadPoolExecutor(1, "edgekv-answer")
        try:
            while (piece := await loop.run_in_executor(worker, next, self._pieces, None)) is not None:
                yield piece
        finally:
            self._given_up = True
            try:  # behind the step that is under way, which a cancelled task does not wait for
                await asyncio.shield(loop.run_in_executor(worker, self._pieces.close))
            finally:
                worker.shutdown(wait=False)


class _GivenUp(Exception):
    """Nobody waits for the answer any more."""


def _begun(
    generator: Speaks,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    pin: bool,
    *,
    max_tokens: int,
    sampling: SamplingOptions | None,
    stop: str | Sequence[str],
    progress: Progress | None,
) -> AnswerStream:
    prompt = generator.text.encode_chat(messages, tools)
    if sampling is None:
        sampling = SamplingOptions.of_model(generator.manifest.sampling)
    pinned = system_tokens(generator.text, messages, tools) if instance(pin, bool, "pin") else 0

    def begin(go_on: Progress) -> abc.Generator[str]:
        def advance(done: int, total: int) -> None:
            go_on(done, total)
            if progress is not None:
                progress(done, total)

        return generator.stream(
            prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, pin=pinned, progress=advance
        )

    return AnswerStream(generator, prompt, begin)
