"""Text to tokens and back: the tokenizer, chat templates, and streaming that never splits a character."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekv.bundle import Manifest
from edgekv.errors import BundleError, UsageError
from edgekv.settings import PROMPT, STOP, texts, token_row

if TYPE_CHECKING:
    from .chat_template import ChatTemplate

#: What a decoder prints for bytes that are not (yet) a character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: A token that stands for one byte, in tokenizers that spell rare characters so.
_BYTE = re.compile("<0x[0-9A-F]{2}>")
#: What the characters are that a stop string is looked for in: text, or of the name of a special token.
_TEXT, _NAME, _INSIDE = range(3)
#: Texts that the beginning of a tokenized text can be hidden behind.
_ANCHORS = ("\n", "a", ".")


class Text:
    """The tokenizer and chat template of a bundle.

    Args:
        special_tokens: what the chat template calls ``bos_token`` and the like.
        n_tokens: of the model, where it has more than the tokenizer; their text is empty.

    Raises:
        BundleError: the tokenizer or the template cannot be read.
    """

    def __init__(
        self,
        tokenizer: Path,
        chat_template: Path | None = None,
        special_tokens: Mapping[str, str] | None = None,
        n_tokens: int = 0,
    ) -> None:
        from tokenizers import Tokenizer  # who brings tokens does without it in memory

        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
            template = chat_template.read_text(encoding="utf-8") if chat_template else None
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"cannot read {tokenizer}: {error}; export the bundle again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(
            self._tokenizer.model, "dropout", None
        ):  # for training: one text would be cut into other tokens each time
            self._tokenizer.model.dropout = None
        # The cache of words outlives its tokenizer (tokenizers 0.23: some 45 KiB for a prompt of 1,000 characters), and text is
        # encoded as fast without it.
        resize = getattr(self._tokenizer.model, "_resize_cache", None)
        if resize is not None:
            resize(0)
        self._n_tokens = max(n_tokens, self._tokenizer.get_vocab_size())
        self._template_source = template
        self._special_tokens = dict(special_tokens or {})
        added = self._tokenizer.get_added_tokens_decoder()
        #: Tokens that are not part of the text, and what they are called.
        self.special: dict[int, str] = {number: token.content for number, token in added.items() if token.special}

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> Text:
        """Read the tokenizer and chat template of a bundle.

        Raises:
            BundleError: one of them cannot be read.
        """
        template = folder / manifest.chat_template if manifest.chat_template else None
        text = cls(folder / manifest.tokenizer, template, manifest.special_tokens, manifest.model.vocab_size)
        if manifest.special_tokens is None:  # a bundle of before: the config's ids say which tokens they are
            model = manifest.model
            ids = {"bos_token": model.bos_token_id, "eos_token": next(iter(model.eos_token_ids), None)}
            names = {name: text._tokenizer.id_to_token(number) for name, number in ids.items() if number is not None}
            text._special_tokens = {name: content for name, content in names.items() if content is not None}
        return text

    @property
    def chats(self) -> bool:
        """Is there a chat template with turns of its own? One that only writes Question and Answer is no such."""
        return self._template_source is not None and "Question: " not in self._template_source

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt, with the special tokens that the tokenizer adds.

        Raises:
            UsageError: it is no text, or not one that UTF-8 can spell.
        """
        ids: list[int] = self._tokenizer.encode(PROMPT.check(text)).ids
        return ids

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, as the tokenizer spells it: a text has no fewer tokens than its length over this."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def encode_behind(self, tokens: Sequence[int], text: str) -> list[int]:
        """Return the tokens of a text that goes on where ``tokens`` end: no special tokens are added, and no space.

        Raises:
            UsageError: as for :meth:`encode` and :meth:`decode`.
        """
        before = self._check(tokens)[-16:]
        plain = self._encode_part(text)
        ways = [plain]
        for anchor in _ANCHORS:
            known, both = self._encode_part(anchor), self._encode_part(anchor + text)
            if both[: len(known)] == known:
                ways.append(both[len(known) :])
        spelled = functools.partial(self._tokenizer.decode, skip_special_tokens=False)
        return next((way for way in ways if spelled(before + way) == spelled(before) + text), plain)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones. Bytes that are no character become replacement characters.

        Raises:
            UsageError: one is no token of the model.
        """
        tokens = self._check(tokens)
        text = self._decode_plain(tokens)
        if REPLACEMENT not in text:
            return text
        # Some tokenizers give up a whole run of byte tokens for a single bad one.
        decoding = _Decoding(self)
        return "".join([*map(decoding.push, tokens), decoding.flush()])

    def _decode_plain(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens as the tokenizer's own decoder gives it, without special ones."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **more: Any
    ) -> list[int]:
        """Return the tokens of a conversation, ready for the assistant's answer.

        Args:
            messages: ``{"role": "user" | "assistant" | "system", "content": ...}`` in order.
            tools: JSON schemas of functions that the assistant may call, for templates that know tools.
            more: what else the template may ask for, such as ``enable_thinking``.

        Raises:
            UsageError: the bundle has no chat template, or the template refuses the conversation.
        """
        if self._template_source is None:
            raise UsageError("this bundle has no chat template; use --prompt instead of --chat")
        return self._encode_part(self._template.render(messages, tools, **more))

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        from .chat_template import ChatTemplate  # brings 7 MB that plain prompts need not have in memory

        assert self._template_source is not None
        return ChatTemplate(self._template_source, self._special_tokens)

    @functools.cached_property
    def _anchor(self) -> int:
        """An ordinary token: what a decoder does to the first token of a text, it does to this one instead."""
        ids = [token for token in self._encode_part("a") if token not in self.special]
        return ids[-1] if ids else next(n for n in range(self._tokenizer.get_vocab_size()) if n not in self.special)

    def _is_byte(self, token: int) -> bool:
        """Return whether a token stands for one byte of a character."""
        content = self._tokenizer.id_to_token(token)
        return content is not None and _BYTE.fullmatch(content) is not None

    def _encode_part(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(PROMPT.check(text), add_special_tokens=False).ids
        return ids

    def _check(self, tokens: Sequence[int]) -> list[int]:
        return token_row(tokens, most=self._n_tokens - 1)


class _Decoding:
    """Turns tokens into text one by one; what it gave is the text of the whole, at every moment."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._window: list[int] = []  # the last tokens whose text was given, and those after them
        self._settled = 0  # how many of the window these are
        self._given = ""  # what was given of the window's text
        self.uncertain = ""  # what comes behind it if no further token does

    def push(self, token: int) -> str:
        """Return the text that is certain now and was not given yet."""
        if token in self._text.special:
            return ""
        self._window.append(token)
        now = self._text._decode_plain(self._window)
        certain = now.rstrip(REPLACEMENT)  # the rest may be part of a character
        if len(certain) < len(now):
            out = self._give(certain) if certain.startswith(self._given) else ""
            self.uncertain = now[len(self._given) :]
            return out
        out, self.uncertain = self._give(now), ""
        # Some tokens are needed again to decode the next ones behind them: a first token may lose its space. Bytes may not
        # be, since the next could make them invalid.
        self._window = [self._text._anchor] if self._text._is_byte(token) else self._window[self._settled :]
        self._settled = len(self._window)
        self._given = self._text._decode_plain(self._window)
        return out

    def flush(self) -> str:
        """Return the rest, at the end."""
        self.uncertain = ""
        return self._give(self._text._decode_plain(self._window))

    def _give(self, text: str) -> str:
        out, self._given = text[len(self._given) :], text
        return out


class TextStream:
    """Turns tokens into text piece by piece; holds back incomplete characters and possible stop strings.

    A stop string may name special tokens, which are no part of the text that is given; what is given never contains a
    stop string. A part of a special token's name stops nothing.

    Args:
        before: tokens in the middle of whose text this one goes on; what they end with may need the first ones pushed.

    Attributes:
        stopped: a stop string was found; the text before it was given.
        n_before: of the tokens that were pushed, how many lie before the stop string.
        rest: the text between those tokens and the stop string, where it begins inside a token.
    """

    def __init__(self, text: Text, stop: str | Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._special = text.special
        self._stop = [s for s in texts(stop, STOP) if s]
        self._decoding = _Decoding(text)
        for token in before[-16:]:
            self._decoding.push(token)
        self._read = ""  # text and names of special tokens, from the end of a token on
        self._kinds: list[int] = []  # of each of its characters: text, the first of a name, or a later one
        self._given = 0  # how many of its characters were given
        self._ends = [(0, 0, "")]  # after so many tokens: so many of its characters are certain, and these are not
        self._n_tokens = 0
        self.stopped = False
        self.n_before = 0
        self.rest = ""

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now (often empty)."""
        self._n_tokens += 1
        name = self._special.get(token)
        self._add(self._decoding.push(token) if name is None else name, shown=name is None)
        self._ends.append((self._n_tokens, len(self._read), self._decoding.uncertain))
        return self._release(final=False)

    def flush(self) -> str:
        """Return what was held back, at the end."""
        if self.stopped:
            return ""
        self._add(self._decoding.flush(), shown=True)
        return self._release(final=True)

    def _add(self, piece: str, *, shown: bool) -> None:
        self._read += piece
        self._kinds += [_TEXT] * len(piece) if shown else [_NAME, *[_INSIDE] * (len(piece) - 1)]

    def _release(self, *, final: bool) -> str:
        found, held = [], [len(self._read)]
        for text, places in self._readings() if self._stop else ():
            for s in self._stop:
                found += self._find(text, places, s)[:1]
                if not final:
                    held += self._find_begun(text, places, s)[:1]
        if found:
            self.stopped = True
            text = self._read[: min(found)]
            ends = [(tokens, at + len(more)) for tokens, at, more in self._ends if text.startswith(more, at)]
            self.n_before, end = max((tokens, at) for tokens, at in ends if at <= len(text))
            self.rest = self._visible(end, min(found))
            return self._give(min(found))
        return self._give(min(held))

    def _readings(self) -> list[tuple[str, Sequence[int]]]:
        """Return in what a stop string is looked for, with the place of each character and that of the end: what is not
        given yet, with the names of special tokens, and without.
        """
        stop = len(self._read)
        everything = range(self._given, stop + 1)
        text = [at for at in everything if at == stop or self._kinds[at] == _TEXT]
        readings: list[tuple[str, Sequence[int]]] = [(self._read[self._given :], everything)]
        if len(text) < len(everything):
            readings.append(("".join(self._read[at] for at in text[:-1]), text))
        return readings

    def _find(self, text: str, places: Sequence[int], stop: str) -> list[int]:
        """Return where a stop string stands."""
        starts = (match.start() for match in re.finditer(f"(?={re.escape(stop)})", text))
        return [places[at] for at in starts if self._splits(places[at]) and self._splits(places[at + len(stop)])]

    def _find_begun(self, text: str, places: Sequence[int], stop: str) -> list[int]:
        """Return where the text ends with the beginning of a stop string, the longest first."""
        begun = (len(text) - n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
        return [places[at] for at in begun if self._splits(places[at])]

    def _splits(self, place: int) -> bool:
        """Return whether the text can be cut at a place: not inside the name of a special token."""
        return place == len(self._read) or self._kinds[place] != _INSIDE

    def _visible(self, start: int, stop: int) -> str:
        return "".join(self._read[at] for at in range(start, stop) if self._kinds[at] == _TEXT)

    def _give(self, stop: int) -> str:
        out, self._given = self._visible(self._given, stop), stop
        # Forget what lies before the last token that was given whole.
        index, start = max((i, at) for i, (_, at, more) in enumerate(self._ends) if at <= stop and not more)
        self._ends = [(tokens, at - start, more) for tokens, at, more in self._ends[index:]]
        self._read, self._kinds, self._given = self._read[start:], self._kinds[start:], stop - start
        return out
