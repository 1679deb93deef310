"""Answers that keep to a grammar: llguidance says which tokens may come next."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from edgekv.errors import UsageError
from edgekv.runtime.engines.base import Float

_log = logging.getLogger(__name__)
#: Between the parts of JSON; without a limit, a model can go on with blanks for ever.
_BLANKS = r"[\x20\x0A\x0D\x09]{0,20}"


class Grammars:
    """The tokenizer of a bundle, as grammars need it.

    Raises:
        UsageError: llguidance does not understand the tokenizer.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_tokens: Sequence[int]) -> None:
        try:
            self._tokenizer = LLTokenizer(str(tokenizer), n_vocab=vocab_size, eos_token=list(eos_tokens))
        except Exception as error:  # it raises what its Rust code returns
            raise UsageError(f"answers of this bundle cannot be held to a grammar: {_line(str(error))}") from error

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """Return what holds an answer to a JSON schema.

        Raises:
            UsageError: it is no schema, or one that llguidance does not understand; in its words.
        """
        try:
            json.dumps(schema, allow_nan=False)
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _BLANKS})
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the schema is not understood: {_line(str(error))}") from error
        return self._grammar(grammar)

    def lark(self, grammar: str) -> Grammar:
        """Return what holds an answer to a grammar in llguidance's Lark.

        Raises:
            UsageError: as for :meth:`json_schema`.
        """
        return self._grammar(LLMatcher.grammar_from_lark(grammar))

    def _grammar(self, grammar: str) -> Grammar:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"the schema is not understood: {_line(matcher.get_error())}")
        return Grammar(matcher)


class Grammar:
    """Holds one answer to a grammar; a :class:`~edgekv.runtime.serving.request.Constraint`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def restrict(self, logits: Float) -> None:
        """Set the logits [vocab_size] of tokens that do not keep to the grammar to minus infinity, in place.

        Raises:
            UsageError: the grammar cannot be gone on with: it has become too complex, or refers to itself alone.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(mask, bitorder="little", count=len(logits))
        logits[allowed == 0] = -np.inf

    def accept(self, token: int) -> bool:
        """Take note of the token that came; returns whether nothing may come behind it.

        Raises:
            UsageError: the grammar cannot be gone on with: it has become too complex, or refers to itself alone.
        """
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            _log.warning("an answer cannot be held to its grammar: %s", _line(self._matcher.get_error()))
            raise UsageError(
                "the answer cannot be held to this schema or these tools: the grammar is too complex, or refers to itself alone;"
                " simplify it"
            )


def _line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 400 else f"{words[:397]}..."
