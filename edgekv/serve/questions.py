"""From the body of a request to a request of the runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from edgekv.errors import PromptTooLong
from edgekv.runtime.sampling import SamplingOptions
from edgekv.runtime.serving.request import Constraint, Request
from edgekv.runtime.system.process import return_free_memory

from .calls import HERMES, LLAMA, CallReader, Way, forced, strictly
from .errors import ApiError
from .face import Face
from .wire import ChatQuestion, CompletionQuestion, Content, Message, NamedTool, Question

#: Tokens of a text that goes on, where a request does not say; OpenAI's default.
COMPLETION_TOKENS = 16
#: Roles that templates know by another name.
_ROLES = {"developer": "system"}


@dataclass(frozen=True)
class Prepared:
    """A request, and what reads the calls of tools out of its answer; ``mark``: the special token that begins one."""

    request: Request
    calls: CallReader | None = None
    mark: tuple[int, str] | None = None


def completion(face: Face, body: CompletionQuestion, owner: bytes) -> Prepared:
    """Return the request for a text that goes on.

    Raises:
        UsageError: it cannot be met.
    """
    if isinstance(body.prompt, list) and not (body.prompt and isinstance(body.prompt[0], str)):
        tokens = [token for token in body.prompt if isinstance(token, int)]
    else:
        prompt = str(body.prompt if isinstance(body.prompt, str) else body.prompt[0])
        _check_characters(face, len(prompt))
        tokens = _measured(face, face.service.text.encode(prompt))
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return Prepared(_request(face, body, tokens, most, body.logprobs, _stops(body), None, owner))


def chat(face: Face, body: ChatQuestion, owner: bytes) -> Prepared:
    """Return the request for the next message of a conversation.

    Raises:
        ApiError: it cannot be met: the template does not know tools. UsageError: the schema is not understood.
    """
    text, tools = face.service.text, body.tools if body.tool_choice != "none" else None
    way = _way(face) if tools else None
    functions = [tool.function.model_dump(exclude_none=True) for tool in tools or ()]
    described = [{"type": "function", "function": function} for function in functions] or None
    messages = [_message(message) for message in body.messages]
    _check_characters(face, sum(len(message["content"]) for message in messages))
    tokens = _measured(face, text.encode_chat(messages, described, **body.chat_template_kwargs or {}))
    stops, calls, mark = _stops(body), None, None
    constraint: Constraint | None = None
    if way is not None:
        several = body.parallel_tool_calls is not False and way is not LLAMA
        calls = CallReader(way, {function["name"] for function in functions}, len(functions) * 1000 if several else 1)
        numbers = {name: number for number, name in text.special.items()}
        mark = (numbers[way.begin], way.begin) if way.begin in numbers else None
        constraint = _held_to_calls(face, body, way, functions, numbers, several=several)
        if not several and way is HERMES:
            stops = (*stops, way.end)
    if body.response_format is not None and body.response_format.type != "text":
        if tools:
            raise ApiError(
                400,
                "response_format does not go with tools: a call is no such answer; give tool_choice none",
                param="response_format",
            )
        constraint = face.grammars.json_schema(body.response_format.wanted)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Prepared(_request(face, body, tokens, body.most_tokens, logprobs, stops, constraint, owner), calls, mark)


def _check_characters(face: Face, count: int) -> None:
    """Refuse, before it is cut into tokens, a text that is too long however that is done: cutting takes memory and time.

    Raises:
        PromptTooLong: the message says by how much.
    """
    context, longest = face.service.context, face.service.text.longest_token
    if count > context * longest:
        raise PromptTooLong(
            f"{count} characters do not fit the context of {context} tokens, none of which has more than {longest}; shorten the"
            " prompt"
        )


def _measured(face: Face, tokens: list[int]) -> list[int]:
    """Return tokens; the memory of many more than fit is given back, before they are refused."""
    if len(tokens) > face.service.context:
        return_free_memory()
    return tokens


def _way(face: Face) -> Way:
    if face.way is None:
        raise ApiError(
            400,
            f"the chat template of {face.name} does not know tools, or has them called in a way that is not understood;"
            " ask without tools",
            param="tools",
        )
    return face.way


def _held_to_calls(
    face: Face, body: ChatQuestion, way: Way, functions: list[dict[str, Any]], numbers: dict[str, int], *, several: bool
) -> Constraint | None:
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function["name"] == choice.function.name]
        if not functions:
            raise ApiError(
                400,
                f"tool_choice names {choice.function.name[:100]!r}, which is none of the tools",
                param="tool_choice",
            )
    if choice == "required" or isinstance(choice, NamedTool):
        return face.grammars.lark(forced(way, functions, numbers, several=several and choice == "required"))
    if any(function.get("strict") for function in functions):
        return face.grammars.lark(strictly(way, functions, numbers))
    return None


def _request(
    face: Face,
    body: Question,
    tokens: list[int],
    max_tokens: int | None,
    logprobs: int | None,
    stops: tuple[str, ...],
    constraint: Constraint | None,
    owner: bytes,
) -> Request:
    default = face.options.sampling if isinstance(body, ChatQuestion) else face.options.plain_sampling
    top_p = default.top_p if body.top_p is None else max(body.top_p, 1e-9)  # 0 takes the likeliest token alone
    sampling = SamplingOptions(
        default.temperature if body.temperature is None else body.temperature,
        default.top_k if body.top_k is None else body.top_k,
        top_p,
        default.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty,
        default.seed if body.seed is None else body.seed,
    )
    return Request(
        tuple(tokens), max_tokens, sampling, stops, logprobs, body.presence_penalty or 0.0, body.frequency_penalty or 0.0,
        _bias(body, face.service.manifest.model.vocab_size), constraint, owner,
    )  # fmt: skip


def _stops(body: Question) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _bias(body: Question, vocab_size: int) -> dict[int, float]:
    bias = {}
    for name, value in (body.logit_bias or {}).items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < vocab_size):
            raise ApiError(
                400,
                f"logit_bias: {name[:40]!r} is no token; tokens are numbers from 0 to {vocab_size - 1}",
                param="logit_bias",
            )
        bias[int(name)] = value
    return bias


def _message(message: Message) -> dict[str, Any]:
    """Return a message as templates read it: one text, and the arguments of calls as data."""
    plain: dict[str, Any] = {"role": _ROLES.get(message.role, message.role), "content": _joined(message.content)}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, key)) is not None:
            plain[key] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _joined(content: Content | None) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content or ())


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the arguments of a call in tool_calls are not valid JSON", param="messages") from error
    if not isinstance(arguments, dict):
        raise ApiError(400, "the arguments of a call in tool_calls must be a JSON object", param="messages")
    return arguments
