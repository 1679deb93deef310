"""A client with no code of OpenAI's: that of Hugging Face, which speaks the same API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from .conftest import Place

HELLO: Any = [{"role": "user", "content": "Hello, who is there?"}]


@pytest.fixture
def client(place: Place) -> Any:  # its types know literal options alone
    return InferenceClient(base_url=f"{place.url}/v1", api_key="none")


def test_an_answer_comes_whole_and_in_parts(client: Any) -> None:
    whole = client.chat_completion(HELLO, model="demo", max_tokens=12, seed=1)
    parts = list(
        client.chat_completion(HELLO, model="demo", max_tokens=12, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 12


def test_an_answer_is_of_the_schema_that_was_asked_for(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["age"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = client.chat_completion(
        HELLO, model="demo", max_tokens=200, response_format=wanted, temperature=0.7, seed=3
    )
    assert isinstance(json.loads(answer.choices[0].message.content or "")["age"], int)


def test_tokens_come_with_their_probabilities(client: Any) -> None:
    answer = client.chat_completion(HELLO, model="demo", max_tokens=3, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    assert [len(token.top_logprobs) for token in answer.choices[0].logprobs.content] == [2, 2, 2]


def test_an_error_says_why(client: Any) -> None:
    with pytest.raises(HfHubHTTPError, match="logit_bias: '99999' is no token"):
        client.chat_completion(HELLO, model="demo", logit_bias=[0], extra_body={"logit_bias": {"99999": 1}})
