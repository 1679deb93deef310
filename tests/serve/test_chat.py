"""The OpenAI API as its official client sees it."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from edgekv import Generator
from edgekv.runtime.options import RunOptions
from edgekv.tiers import KVMode

from .conftest import Place, serving

HELLO: Any = [{"role": "user", "content": "Hello"}]


def alone(bundle: Path, prompt: str, n: int) -> str:
    """Return what a run of its own says."""
    with Generator.open(bundle, RunOptions(kv=KVMode.INT8, context=1024, threads=1)) as generator:
        return "".join(generator.stream(prompt, max_tokens=n))


def test_a_chat_is_answered_at_once_and_as_a_stream_with_the_same_text(place: Place) -> None:
    client = place.client()
    whole = client.chat.completions.create(model="demo", messages=HELLO, max_tokens=12)
    parts = list(client.chat.completions.create(model="demo", messages=HELLO, max_tokens=12, stream=True))
    said = "".join(part.choices[0].delta.content or "" for part in parts)
    assert said == whole.choices[0].message.content
    assert said
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts][-2:] == [None, "length"]
    assert whole.choices[0].finish_reason == "length"
    assert len({part.id for part in parts}) == 1
    assert {part.system_fingerprint for part in parts} == {whole.system_fingerprint}
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12


def test_a_conversation_is_told_in_parts_and_in_all_roles(place: Place) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Yes", "refusal": None, "annotations": []},
        {"role": "user", "content": "And?"},
    ]
    answer = place.client().chat.completions.create(
        model="other", messages=messages, max_tokens=4, user="me", store=False
    )
    assert answer.model == "demo"
    assert answer.choices[0].message.content is not None


def test_a_completion_gives_what_a_run_gives(place: Place, demo: Path) -> None:
    client = place.client()
    whole = client.completions.create(model="demo", prompt="It was", max_tokens=20)
    assert whole.choices[0].text == alone(demo, "It was", 20)
    tokens = place.service.text.encode("It was")
    assert (
        client.completions.create(model="demo", prompt=tokens, max_tokens=20).choices[0].text == whole.choices[0].text
    )
    parts = client.completions.create(model="demo", prompt=["It was"], max_tokens=20, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_a_stop_string_ends_the_answer_before_it(place: Place) -> None:
    client = place.client()
    whole = client.completions.create(model="demo", prompt="It was", max_tokens=40).choices[0].text
    stop = whole.split()[3]
    cut = client.completions.create(model="demo", prompt="It was", max_tokens=40, stop=[stop, "never said"])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_log_probabilities_come_in_the_form_of_each_api(place: Place) -> None:
    client = place.client()
    answer = client.chat.completions.create(model="demo", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert len(content) == 5
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token, "it is greedy"
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert math.isclose(sum(math.exp(other.logprob) for other in token.top_logprobs), 1, abs_tol=1)
        assert token.bytes == list(token.token.encode())
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    streamed = list(
        client.chat.completions.create(model="demo", messages=HELLO, max_tokens=5, logprobs=True, stream=True)
    )
    logs = [part.choices[0].logprobs for part in streamed if part.choices[0].logprobs is not None]
    assert [token.token for log in logs for token in log.content or []] == [token.token for token in content]
    older = client.completions.create(model="demo", prompt="It was", max_tokens=5, logprobs=2).choices[0]
    assert older.logprobs is not None
    assert "".join(older.logprobs.tokens or []) == older.text
    assert all(len(likely) == 2 for likely in older.logprobs.top_logprobs or [])
    likely = client.completions.create(model="demo", prompt="It was", max_tokens=1, logprobs=1)
    never = {str(token): -100 for token in range(384) if token != 70}
    rare = client.completions.create(model="demo", prompt="It was", max_tokens=1, logprobs=1, logit_bias=never)
    assert rare.choices[0].logprobs is not None
    assert likely.choices[0].logprobs is not None
    (first,), (both,) = likely.choices[0].logprobs.top_logprobs or [], rare.choices[0].logprobs.top_logprobs or []
    assert both == {
        **first,
        (rare.choices[0].logprobs.tokens or [""])[0]: (rare.choices[0].logprobs.token_logprobs or [0])[0],
    }
    assert len(both) == 2, "the token of the answer is always told"
    words = older.logprobs.tokens or []
    assert older.logprobs.text_offset == [len("".join(words[:at])) for at in range(5)]


def test_usage_comes_last_in_a_stream_that_asks_for_it_and_says_what_was_in_the_cache(place: Place) -> None:
    client = place.client()
    messages: Any = [{"role": "user", "content": "Once upon a time there was a river. " * 20}]
    ask: dict[str, Any] = {"model": "demo", "messages": messages, "max_tokens": 3}
    list(client.chat.completions.create(**ask, stream=True))
    parts = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].choices == []
    assert all(part.usage is None for part in parts[:-1])
    usage = parts[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 3
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens > (usage.prompt_tokens_details.cached_tokens or 0) > 0


def test_equal_seeds_give_equal_text_and_penalties_and_biases_change_it(place: Place) -> None:
    client = place.client()

    def said(**more: Any) -> str:
        return str(client.completions.create(model="demo", prompt="It was", max_tokens=24, **more).choices[0].text)

    warm: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "extra_body": {"top_k": 50}}
    assert said(**warm, seed=1) == said(**warm, seed=1) != said(**warm, seed=2)
    assert said(presence_penalty=2, frequency_penalty=2) != said()
    assert said(extra_body={"repetition_penalty": 3.0}) != said()
    assert said(temperature=1, top_p=0) == said(), "nothing but the likeliest token is left"
    token = place.service.text.encode(" river")[-1]
    assert client.completions.create(model="demo", prompt="It was", max_tokens=2, logit_bias={str(token): 100}).choices[
        0
    ].text == place.service.text.decode([token, token])


def test_the_models_are_listed_under_each_name(place: Place) -> None:
    client = place.client()
    assert [model.id for model in client.models.list()] == ["demo", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; this is demo, other"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="demo", input="text")


@pytest.mark.timeout(300)
def test_many_clients_at_once_each_get_what_a_run_of_their_own_gives(demo: Path) -> None:
    prompts = [
        f"{opening} {number}" for number in range(4) for opening in ("It was", "The river", "Once upon", "Nobody")
    ]
    with serving(demo, parallel=3, context=1024) as place, ThreadPoolExecutor(16) as threads:
        client = place.client()

        def ask(prompt: str) -> str:
            return client.completions.create(model="demo", prompt=prompt, max_tokens=24).choices[0].text

        said = list(threads.map(ask, prompts))
    with Generator.open(demo, RunOptions(kv=KVMode.INT8, context=1024, threads=1)) as generator:
        assert said == ["".join(generator.stream(prompt, max_tokens=24)) for prompt in prompts]
