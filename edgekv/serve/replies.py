"""From what the runtime tells of an answer to what the client gets: whole, or as the parts of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

from edgekv.runtime.serving.request import Finished, Piece, TokenFacts
from edgekv.runtime.text import REPLACEMENT, Text

from .calls import Called, new_id
from .errors import ApiError
from .face import Answering, Face
from .questions import Prepared
from .wire import (
    Call,
    ChatChoice,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    Likely,
    Reply,
    Said,
    TokenLogprob,
    Usage,
)

#: What stands for a token that cannot come, as OpenAI has it: JSON has no infinity.
_NEVER = -9999.0


class _Forms:
    """One answer: what is the same in each of its parts, and its tokens as clients see them."""

    kind: str
    prefix: str

    def __init__(self, face: Face, answering: Answering, prepared: Prepared) -> None:
        self.face = face
        self.answering = answering
        self.prepared = prepared
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def reply(self, object_: str, **rest: Any) -> dict[str, Any]:
        """Return a whole answer or a part of one."""
        same: Reply = {
            "id": self.id,
            "object": object_,
            "created": self.created,
            "model": self.face.name,
            "system_fingerprint": self.face.fingerprint,
        }
        return {**same, **rest}

    @property
    def text(self) -> Text:
        """The tokenizer."""
        return self.face.service.text

    def word(self, token: int) -> str:
        """Return what a token adds to a text, or its name."""
        name = self.text.special.get(token)
        if name is not None:
            return name
        once = self.text.decode([token])  # at the beginning of a text, some tokenizers leave out a space
        return self.text.decode([token, token])[len(once) :]

    def likely(self, token: int, logprob: float) -> Likely:
        """Return a token and how likely it is."""
        word = self.word(token)
        return {
            "token": word,
            "logprob": max(logprob, _NEVER),
            "bytes": None if REPLACEMENT in word else list(word.encode()),
        }


class ChatAnswer(_Forms):
    """An answer in a conversation."""

    kind = "chat.completion"
    prefix = "chatcmpl"

    async def whole(self) -> dict[str, Any]:
        """Return the answer when it is over.

        Raises:
            ApiError: see :meth:`Answering.events`.
        """
        said = ""
        calls: list[Call] = []
        facts: list[TokenFacts] = []
        async for event in self.answering.events():
            if isinstance(event, Piece):
                facts += event.tokens
            for part in self._parts(event):
                if isinstance(part, str):
                    said += part
                else:
                    calls.append(_call(part))
            if isinstance(event, Finished):
                message: Said = {"role": "assistant", "content": said or None if calls else said, "refusal": None}
                if calls:
                    message["tool_calls"] = calls
                choice: ChatChoice = {
                    "index": 0, "message": message, "logprobs": self._logprobs(facts), "finish_reason": self._reason(event),
                }  # fmt: skip
                return self.reply(self.kind, choices=[choice], usage=usage(event))
        raise AssertionError("an answer ends with Finished, or an error")

    async def parts(self) -> AsyncIterator[dict[str, Any] | None]:
        """Give the parts of the answer as they come; None when nothing came for a while.

        Raises:
            ApiError: see :meth:`Answering.events`.
        """
        yield self._part({"role": "assistant", "content": "", "refusal": None})
        index = 0
        async for event in self.answering.events():
            if event is None:
                yield None
            logprobs = self._logprobs(list(event.tokens)) if isinstance(event, Piece) else None
            parts = list(self._parts(event))
            if logprobs is not None and not (parts and isinstance(parts[0], str)):
                parts = ["", *parts]
            for part in parts:
                if isinstance(part, str):
                    yield self._part({"content": part}, logprobs)
                    logprobs = None
                else:
                    for said in _call_in_parts(part, index):
                        yield self._part(said)
                    index += 1
            if isinstance(event, Finished):
                yield self._part({}, reason=self._reason(event))
                yield self.reply(f"{self.kind}.chunk", choices=[], usage=usage(event))

    def _parts(self, event: Any) -> Iterator[str | Called]:
        """Give what an event adds to the answer."""
        calls, mark = self.prepared.calls, self.prepared.mark
        if isinstance(event, Piece):
            if calls is None:
                if event.text:
                    yield event.text
                return
            marked = mark is not None and any(fact.token == mark[0] for fact in event.tokens)
            yield from (part for part in calls.feed(event.text + (mark[1] if mark and marked else "")) if part)
        elif isinstance(event, Finished) and calls is not None:
            yield from (part for part in calls.finish() if part)

    def _part(
        self,
        delta: Said,
        logprobs: ChatLogprobs | None = None,
        reason: Literal["stop", "length", "tool_calls"] | None = None,
    ) -> dict[str, Any]:
        choice: ChatChoice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.reply(f"{self.kind}.chunk", choices=[choice])

    def _reason(self, end: Finished) -> Literal["stop", "length", "tool_calls"]:
        called = self.prepared.calls is not None and self.prepared.calls.count
        return "length" if end.reason == "length" else "tool_calls" if called else "stop"

    def _logprobs(self, facts: list[TokenFacts]) -> ChatLogprobs | None:
        if self.prepared.request.logprobs is None:
            return None
        content: list[TokenLogprob] = [
            {
                **self.likely(fact.token, fact.logprob or 0.0),
                "top_logprobs": [self.likely(token, logprob) for token, logprob in fact.likeliest],
            }
            for fact in facts
        ]
        return {"content": content, "refusal": None}


class CompletionAnswer(_Forms):
    """A text that goes on."""

    kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, face: Face, answering: Answering, prepared: Prepared) -> None:
        super().__init__(face, answering, prepared)
        self._offset = 0

    async def whole(self) -> dict[str, Any]:
        """Return the answer when it is over.

        Raises:
            ApiError: see :meth:`Answering.events`.
        """
        said = ""
        facts: list[TokenFacts] = []
        async for event in self.answering.events():
            if isinstance(event, Piece):
                said += event.text
                facts += event.tokens
            elif isinstance(event, Finished):
                return self.reply(self.kind, choices=[self._choice(said, facts, event)], usage=usage(event))
        raise AssertionError("an answer ends with Finished, or an error")

    async def parts(self) -> AsyncIterator[dict[str, Any] | None]:
        """Give the parts of the answer as they come; None when nothing came for a while.

        Raises:
            ApiError: see :meth:`Answering.events`.
        """
        async for event in self.answering.events():
            if isinstance(event, Piece):
                if event.text or self.prepared.request.logprobs is not None:
                    yield self.reply(self.kind, choices=[self._choice(event.text, list(event.tokens), None)])
            elif isinstance(event, Finished):
                yield self.reply(self.kind, choices=[self._choice("", [], event)])
                yield self.reply(self.kind, choices=[], usage=usage(event))
            else:
                yield None

    def _choice(self, text: str, facts: list[TokenFacts], end: Finished | None) -> CompletionChoice:
        reason: Literal["stop", "length"] | None = (
            None if end is None else "length" if end.reason == "length" else "stop"
        )
        return {"index": 0, "text": text, "logprobs": self._logprobs(facts), "finish_reason": reason}

    def _logprobs(self, facts: list[TokenFacts]) -> CompletionLogprobs | None:
        if self.prepared.request.logprobs is None or not facts:
            return None
        words = [self.word(fact.token) for fact in facts]
        offsets = []
        for word in words:
            offsets.append(self._offset)
            self._offset += len(word)
        return {
            "tokens": words,
            "token_logprobs": [max(fact.logprob or 0.0, _NEVER) for fact in facts],
            "top_logprobs": [
                {
                    self.word(token): max(logprob, _NEVER)
                    for token, logprob in (
                        *fact.likeliest,
                        (fact.token, fact.logprob or 0.0),
                    )  # also where it is less likely
                }
                for fact in facts
            ],
            "text_offset": offsets,
        }


async def event_stream(parts: AsyncIterator[dict[str, Any] | None], *, with_usage: bool) -> AsyncIterator[str]:
    """Give the lines of a stream of server-sent events (Source: WHATWG HTML, 9.2); an error is the last of them.

    The last part holds the usage and no choices; it is for those who asked for it.
    """
    try:
        async for part in parts:
            if part is None:
                yield ": still here\n\n"
            elif part["choices"] or with_usage:
                yield _event({"usage": None, **part} if with_usage else part)
    except ApiError as error:
        yield _event(error.body())
        return
    yield "data: [DONE]\n\n"


def usage(end: Finished) -> Usage:
    """Return the tokens of an answer."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
    }


#: Characters at which some clients end a line, though the format of events does not; inside JSON they may be spelled.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def _event(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text.translate(_LINE_ENDS)}\n\n"


def _call(called: Called) -> Call:
    return {"id": new_id(), "type": "function", "function": {"name": called.name, "arguments": called.arguments}}


def _call_in_parts(called: Called, index: int) -> Iterator[Said]:
    """Give a call as streams have it: who is called, and then with what."""
    yield {
        "tool_calls": [
            {"index": index, "id": new_id(), "type": "function", "function": {"name": called.name, "arguments": ""}}
        ]
    }
    yield {"tool_calls": [{"index": index, "function": {"arguments": called.arguments}}]}
