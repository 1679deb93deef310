"""Chat templates: the same text as transformers, and any failure in one line."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from edgekv.errors import UsageError
from edgekv.runtime.chat_template import ChatTemplate
from edgekv.runtime.text import Text

TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "chat_templates").glob("*.jinja"))}
TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "image_token": "<image>",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "When is high tide? <é & 'quotes'>",
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]},
    },
}
CALL = {"type": "function", "id": "abcdef123", "function": {"name": "tide", "arguments": {"port": "Saint-Malo é <&>"}}}
USER = {"role": "user", "content": " What's the tide? <|im_end|> & 'é' \n"}
ANSWER = {"role": "assistant", "content": '<think>\nhm\n</think>\n\nHigh at "noon".\n'}
SYSTEM = {"role": "system", "content": "You keep the lighthouse. /no_think"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "with a system message": [SYSTEM, USER],
    "several turns": [USER, ANSWER, {"role": "user", "content": "And then?"}],
    "everything": [SYSTEM, USER, ANSWER, USER, ANSWER, USER],
    "thoughts apart": [USER, {"role": "assistant", "content": "Noon.", "thinking": "hm"}, USER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}]}],
    "a tool call": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "12:04", "tool_call_id": "abcdef123", "name": "tide"},
    ],
    "two users": [USER, USER],
    "nothing": [],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """transformers' own tokenizer, which renders the templates."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_written_as_transformers_writes_it(
    name: str, conversation: str, tools: list[dict[str, Any]] | None, tokenizer: Any
) -> None:
    source, messages = TEMPLATES[name].read_text(encoding="utf-8"), CONVERSATIONS[conversation]
    template = ChatTemplate(source, TOKENS)
    try:
        expected = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=source, add_generation_prompt=True, tokenize=False
        )
    except Exception:
        with pytest.raises(UsageError) as caught:
            template.render(messages, tools)
        assert "\n" not in str(caught.value)
    else:
        assert template.render(messages, tools) == expected


def test_what_else_a_template_asks_for_can_be_given(tokenizer: Any) -> None:
    source = TEMPLATES["qwen3"].read_text(encoding="utf-8")
    expected = tokenizer.apply_chat_template(
        [USER], chat_template=source, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert ChatTemplate(source, TOKENS).render([USER], enable_thinking=False) == expected
    assert "<think>\n\n</think>" in expected


def test_the_date_is_todays() -> None:
    today = datetime.datetime.now().strftime("%d %b %Y")
    assert f"Today Date: {today}" in ChatTemplate(TEMPLATES["llama-3"].read_text(encoding="utf-8"), {}).render([USER])


BROKEN = {
    "a refusal": ("{{ raise_exception('only\none user message') }}", "only one user message"),
    "bad syntax": ("{% for m in messages %}", "Unexpected end of template"),
    "an unknown tag": ("{% frobnicate %}", "unknown tag 'frobnicate'"),
    "a missing variable": ("{{ missing.role }}", "'missing' is undefined"),
    "a wrong type": ("{{ messages + 1 }}", "TypeError: can only concatenate list"),
    "a division": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "an endless recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "a range without end": ("{% for i in range(1000000000) %}{% endfor %}", "OverflowError: Range too big"),
    "a way out of the sandbox": ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__'"),
    "a name for the way out": ("{% set ns = namespace(__class__=1) %}", "__class__"),
    "a change of the messages": ("{{ messages.append(1) }}", "unsafe"),
    "a wrong date": ("{{ strftime_now(1) }}", "TypeError"),
    "no JSON": ("{{ messages | map('upper') | tojson }}", "TypeError"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_any_failure_of_a_template_is_one_line(case: str) -> None:
    source, message = BROKEN[case]
    with pytest.raises(UsageError) as caught:
        ChatTemplate(source, TOKENS).render([USER])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "chat template of this bundle" in str(caught.value)


def test_messages_that_are_no_plain_data_are_refused() -> None:
    with pytest.raises(UsageError, match="not JSON serializable"):
        ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": object()}])


def test_a_bundle_without_a_chat_template_says_so() -> None:
    from tests.runtime.test_text import opened

    text: Text = opened("byte_level")[0]
    with pytest.raises(UsageError, match="no chat template; use --prompt"):
        text.encode_chat([USER])
