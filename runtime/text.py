"""Text to tokens and back: the tokenizer, chat templates, and streaming that never splits a character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekv.errors import BundleError, UsageError

#: What a decoder prints for bytes that are not (yet) a character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Text:
    """The tokenizer and chat template of a bundle.

    Raises:
        BundleError: the tokenizer cannot be read.
    """

    def __init__(self, tokenizer: Path, chat_template: Path | None = None) -> None:
        from tokenizers import Tokenizer  # who brings tokens does without it in memory

        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"cannot read {tokenizer}: {error}; export the bundle again") from error
        self._template = chat_template.read_text(encoding="utf-8") if chat_template else None

    @property
    def chats(self) -> bool:
        """Is there a chat template with turns of its own? One that only writes Question and Answer is no such."""
        return self._template is not None and "Question: " not in self._template

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt, with the special tokens that the tokenizer adds."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the tokens of a conversation, ready for the assistant's answer.

        Args:
            messages: ``{"role": "user" | "assistant" | "system", "content": ...}`` in order.

        Raises:
            UsageError: the bundle has no chat template, or the template refuses the conversation.
        """
        if self._template is None:
            raise UsageError("this bundle has no chat template; use --prompt instead of --chat")
        import jinja2.sandbox  # 7 MB that plain prompts need not have in memory

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        names: dict[str, Any] = {
            "bos_token": next((t for t in ("<|begin_of_text|>", "<s>", "<|im_start|>") if t in special), ""),
            "eos_token": next((t for t in ("<|eot_id|>", "</s>", "<|im_end|>") if t in special), ""),
        }
        try:
            text = environment.from_string(self._template).render(
                messages=list(messages), add_generation_prompt=True, **names
            )
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template of this bundle refuses the conversation: {error}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class TextStream:
    """Turns tokens into text piece by piece; holds back incomplete characters and possible stop strings."""

    def __init__(self, text: Text, stop: Sequence[str] = ()) -> None:
        self._text = text
        self._stop = [s for s in stop if s]
        self._tokens: list[int] = []
        self._start = 0  # first token of the window that is decoded again
        self._read = 0  # tokens whose text is in ``_pending`` or was handed out
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now (often empty)."""
        self._tokens.append(token)
        # Decode with some context before the new tokens: leading spaces and merges depend on it.
        before = self._text.decode(self._tokens[self._start : self._read])
        now = self._text.decode(self._tokens[self._start :])
        if now.endswith(REPLACEMENT) and len(self._tokens) - self._read < 8:
            return ""  # part of a character; no character needs more than four byte tokens
        self._pending += now[len(before) :]
        self._start, self._read = self._read, len(self._tokens)
        return self._release(final=False)

    def flush(self) -> str:
        """Return what was held back, at the end."""
        if self.stopped:
            return ""
        before = self._text.decode(self._tokens[self._start : self._read])
        self._pending += self._text.decode(self._tokens[self._start :])[len(before) :]
        self._start, self._read = self._read, len(self._tokens)
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        found = [index for s in self._stop if (index := self._pending.find(s)) >= 0]
        if found:
            self.stopped = True
            out, self._pending = self._pending[: min(found)], ""
            return out
        hold = 0
        if not final:
            for s in self._stop:
                for length in range(min(len(s) - 1, len(self._pending)), hold, -1):
                    if self._pending.endswith(s[:length]):
                        hold = length
                        break
        cut = len(self._pending) - hold
        out, self._pending = self._pending[:cut], self._pending[cut:]
        return out
