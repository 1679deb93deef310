"""Chat templates, rendered in the environment that they are written for: that of transformers, to the letter.

Source: transformers, utils/chat_template_utils.py. A template is somebody else's code, so it runs in jinja2's sandbox and sees
plain data only.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edgekv.errors import UsageError

#: What a message may call the thoughts before its answer; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A template, compiled when it is first rendered."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **more: Any
    ) -> str:
        """Return the text of a conversation, ready for the assistant's answer.

        Args:
            messages: objects of plain data, such as ``{"role": "user", "content": "Hello"}``.
            tools: JSON schemas of the functions that the assistant may call.
            more: what else the template may ask for, such as ``enable_thinking``.

        Raises:
            UsageError: the template refuses the conversation, or fails, in one line.
        """
        try:
            plain, tools, more = json.loads(json.dumps([list(messages), tools, more]))
            if not plain:
                raise ValueError("there is no message")
            template = _environment().from_string(self.source)
            return template.render(
                messages=[_message(message) for message in plain],
                tools=tools,
                documents=None,
                **{"add_generation_prompt": True, **self._special_tokens, **more},
            )
        except Exception as error:  # a template is code: it may raise anything
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(
                f"the chat template of this bundle does not render the conversation: {kind}{reason[:300]}"
            ) from error


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is None, and give thoughts every name that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    thoughts = next((message[name] for name in _REASONING if name in message), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant said, for training; here it only prints it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """``dict`` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace`` that refuses names through which a template could leave the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have an attribute {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes what HTML would; a model reads JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
