"""Tools and formats: how calls are read from an answer as it comes, and how an answer is held to a form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from edgekv.bundle import read_manifest
from edgekv.runtime.text import Text
from edgekv.serve.calls import HERMES, LLAMA, MISTRAL, Called, CallReader, Way, way_of

from .conftest import Place, serving

WithTemplate = Callable[[str], Path]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time"}}
ASK: Any = [{"role": "user", "content": "What is the weather?"}]


def read(way: Way, parts: list[str], most: int = 99) -> list[str | Called]:
    """Return what a reader makes of an answer that comes in parts, with neighbouring text joined."""
    reader, found = CallReader(way, {"f", "g"}, most), list[str | Called]()
    for part in [*(said for text in parts for said in reader.feed(text)), *reader.finish()]:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part:
            found.append(part)
    return found


@pytest.mark.parametrize(
    ("way", "text", "found"),
    [
        (HERMES, "a < b", ["a < b"]),
        (HERMES, 'Yes.\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>', ["Yes.", Called("f", '{"a": "é"}')]),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>\n',
            [Called("f", "{}"), Called("g", "{}")],
        ),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}', [Called("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "argu', ['<tool_call>{"name": "f", "argu']),
        (HERMES, "<tool_call>no</tool_call> more", ["<tool_call>no</tool_call> more"]),
        (HERMES, "<tool_c", ["<tool_c"]),
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
            [Called("f", '{"a": 1}'), Called("g", "{}")],
        ),
        (MISTRAL, "[TOOL_CALLS] nothing", ["[TOOL_CALLS] nothing"]),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}}', [Called("f", '{"a": 1}')]),
        (LLAMA, '\n{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', [Called("f", "{}"), Called("g", "{}")]),
        (LLAMA, '{"name": "unknown", "parameters": {}}', ['{"name": "unknown", "parameters": {}}']),
        (LLAMA, '{"answer": 1}', ['{"answer": 1}']),
        (LLAMA, 'It is {"name": "f", "parameters": {}}', ['It is {"name": "f", "parameters": {}}']),
        (LLAMA, "  ", ["  "]),
    ],
)  # fmt: skip
def test_calls_are_read_from_an_answer_however_it_is_cut(way: Way, text: str, found: list[str | Called]) -> None:
    assert read(way, [text]) == found
    assert read(way, list(text)) == found
    for at in range(len(text)):
        assert read(way, [text[:at], text[at:]]) == found


def test_calls_beyond_the_most_are_left_out() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read(HERMES, [call * 3], most=1) == [Called("f", "{}")]


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    reader = CallReader(HERMES, {"f"}, 1)
    assert list(reader.feed("Hello <")) == ["Hello"]
    assert list(reader.feed("b> you")) == [" <b> you"]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("qwen3", HERMES),
        ("mistral-tools", MISTRAL),
        ("llama-3", LLAMA),
        ("gemma-3", None),
        ("phi-4", None),
        (None, None),
    ],
)
def test_a_template_tells_how_its_model_calls(
    with_template: WithTemplate, demo: Path, name: str | None, way: Way | None
) -> None:
    folder = demo if name is None else with_template(name)
    assert way_of(Text.open(folder, read_manifest(folder))) is way


def test_a_template_gets_what_a_request_gives_it(with_template: WithTemplate) -> None:
    with serving(with_template("qwen3"), parallel=1) as place:
        ask: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        create = place.client().chat.completions.create
        thinks = create(**ask).usage
        answers = create(**ask, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).usage
        assert thinks is not None
        assert answers is not None
        assert answers.prompt_tokens > thinks.prompt_tokens, "this template puts empty thoughts before the answer"
        with pytest.raises(openai.BadRequestError, match="messages is given to every template by the server itself"):
            create(**ask, extra_body={"chat_template_kwargs": {"messages": []}})


@pytest.mark.parametrize("name", ["qwen3", "mistral-tools", "llama-3"])
def test_a_call_is_forced_and_comes_whole_and_in_parts(with_template: WithTemplate, name: str) -> None:
    with serving(with_template(name), parallel=1) as place:
        client = place.client()
        ask: dict[str, Any] = {"model": "demo", "messages": ASK, "tools": [WEATHER, CLOCK], "max_tokens": 200}
        named: Any = {"type": "function", "function": {"name": "get_weather"}}
        choice = client.chat.completions.create(**ask, tool_choice=named).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "get_weather"
        arguments = json.loads(call.function.arguments)
        assert arguments["city"] in ("Paris", "Oslo")
        assert 1 <= arguments["days"] <= 9
        assert len(call.id) == 9, "Mistral's template wants it so"
        parts = list(client.chat.completions.create(**ask, tool_choice=named, stream=True))
        deltas = [delta for part in parts for delta in part.choices[0].delta.tool_calls or []]
        assert deltas[0].function is not None
        assert deltas[0].function.name == "get_weather"
        assert deltas[0].id
        assert "".join(delta.function.arguments or "" for delta in deltas if delta.function) == call.function.arguments
        assert parts[-1].choices[0].finish_reason == "tool_calls"
        one = client.chat.completions.create(**ask, tool_choice="required", parallel_tool_calls=False).choices[0]
        assert [type(call).__name__ for call in one.message.tool_calls or []] == [
            "ChatCompletionMessageFunctionToolCall"
        ]
        told: Any = [*ASK, choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        again = client.chat.completions.create(**(ask | {"messages": told, "max_tokens": 2}), tool_choice="none")
        assert again.choices[0].message.content is not None
        assert client.chat.completions.create(**(ask | {"max_tokens": 2})).choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match="none of the tools"):
            client.chat.completions.create(**ask, tool_choice={"type": "function", "function": {"name": "other"}})
        with pytest.raises(openai.BadRequestError, match="response_format does not go with tools"):
            client.chat.completions.create(**ask, response_format={"type": "json_object"})


def test_strict_functions_are_held_to_their_schema_also_where_the_model_decides(with_template: WithTemplate) -> None:
    strict: Any = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    with serving(with_template("qwen3"), parallel=1) as place:
        answer = place.client().chat.completions.create(model="demo", messages=ASK, tools=[strict], max_tokens=20)
        assert answer.choices[0].message.content
    refused = pytest.raises(openai.BadRequestError, match="strict functions need the tool_choice required")
    with serving(with_template("llama-3"), parallel=1) as place, refused:
        place.client().chat.completions.create(model="demo", messages=ASK, tools=[strict])


def test_an_answer_is_held_to_a_schema_and_ends_with_it(place: Place) -> None:
    client = place.client()
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green"]},
            "sizes": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2},
        },
        "required": ["colour", "sizes"],
        "additionalProperties": False,
    }  # fmt: skip
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for temperature in (0, 1.5):
        answer = client.chat.completions.create(
            model="demo", messages=ASK, response_format=wanted, max_tokens=200, temperature=temperature, seed=1
        )
        assert answer.choices[0].finish_reason == "stop"
        said = json.loads(answer.choices[0].message.content or "")
        assert said["colour"] in ("red", "green")
        assert len(said["sizes"]) == 2
    cut = client.chat.completions.create(
        model="demo", messages=ASK, response_format={"type": "json_object"}, max_tokens=5
    )
    assert (cut.choices[0].message.content or "").lstrip()[:1] == "{"
    assert cut.choices[0].finish_reason == "length"
    text = client.chat.completions.create(model="demo", messages=ASK, response_format={"type": "text"}, max_tokens=5)
    assert (
        text.choices[0].message.content
        == client.chat.completions.create(model="demo", messages=ASK, max_tokens=5).choices[0].message.content
    )


@pytest.mark.parametrize(
    ("schema", "said"),
    [({"type": "objct"}, "Invalid type: objct"), ({"type": "string", "pattern": "(?=a)"}, "look-around")],
)
def test_a_schema_that_is_not_understood_is_refused_in_the_words_of_the_library(
    place: Place, schema: Any, said: str
) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="the schema is not understood: .*" + said.replace("(", r"\(")):
        place.client().chat.completions.create(model="demo", messages=ASK, response_format=wanted)
