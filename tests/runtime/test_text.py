"""Text in and out: every kind of tokenizer, streamed and whole, with special tokens anywhere."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edgekv.errors import BundleError
from edgekv.runtime.text import REPLACEMENT, Text, TextStream
from tests.cases import seldom
from tests.tokenizer_kinds import KINDS, SPECIAL, make_tokenizer, token_id

#: The kinds that every run takes through long searches: those of nearly all models.
OFTEN = seldom(KINDS, but=("byte_level", "llama_2"))
WRITING = st.text(st.sampled_from("Hi there.n't 'THE END▁東é😎\n\t�") | st.characters(codec="utf-8"), max_size=24)


@functools.cache
def opened(kind: str, *, ends: bool = False) -> tuple[Text, Tokenizer]:
    tokenizer = make_tokenizer(kind, ends=ends)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        return Text(Path(folder) / "tokenizer.json"), tokenizer


def streamed(text: Text, tokens: list[int], stop: str | list[str] = ()) -> list[str]:  # type: ignore[assignment]
    stream = TextStream(text, stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("kind", OFTEN)
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(WRITING | st.sampled_from(SPECIAL), max_size=5))
def test_streaming_equals_decoding_the_whole_with_special_tokens_anywhere(kind: str, parts: list[str]) -> None:
    text, tokenizer = opened(kind)
    tokens = [token for part in parts for token in tokenizer.encode(part).ids]
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    pieces = streamed(text, tokens)
    assert "".join(pieces) == text.decode(tokens)
    if REPLACEMENT not in whole:
        assert text.decode(tokens) == whole
        assert all(REPLACEMENT not in piece for piece in pieces), "no character is split"


@pytest.mark.parametrize("kind", seldom(KINDS, but=("llama_2",), mark=pytest.mark.exhaustive))
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_streaming_equals_decoding_the_whole_for_any_tokens(kind: str, data: st.DataObject) -> None:
    text, tokenizer = opened(kind)
    tokens = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=24))
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    got = "".join(streamed(text, tokens))
    assert got == text.decode(tokens)
    if REPLACEMENT not in whole:
        assert got == whole


@pytest.mark.parametrize("kind", OFTEN)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_prefix_of_the_tokens_has_a_prefix_of_the_text(kind: str, data: st.DataObject) -> None:
    """Text comes as soon as it is certain: at most the last character of it is held back."""
    text, tokenizer = opened(kind)
    tokens = tokenizer.encode(data.draw(WRITING)).ids
    stream, got = TextStream(text), ""
    for count, token in enumerate(tokens, 1):
        got += stream.push(token)
        now = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        if REPLACEMENT not in now:
            assert got == now


@pytest.mark.parametrize("kind", ["llama_2", "metaspace", "unigram"])
def test_a_skipped_special_token_takes_no_space_with_it(kind: str) -> None:
    text, tokenizer = opened(kind)
    hi, there = tokenizer.encode("Hi", add_special_tokens=False).ids, tokenizer.encode("there").ids
    for name in SPECIAL:
        assert "".join(streamed(text, [*hi, token_id(tokenizer, name), *there])) == "Hi there"


def test_good_characters_before_bad_bytes_stay() -> None:
    """The decoder of SentencePiece gives up a whole run of bytes for one that is wrong; a stream has printed it by then."""
    text, tokenizer = opened("llama_2")
    tokens = [token_id(tokenizer, f"<0x{byte:02X}>") for byte in [*"東".encode(), 0xFF]]
    assert streamed(text, tokens) == ["", "", "東", "", REPLACEMENT]
    assert text.decode(tokens) == "東" + REPLACEMENT


@pytest.mark.parametrize("kind", OFTEN)
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(WRITING | st.sampled_from(SPECIAL), max_size=5), stop=st.text("THE END.", min_size=1, max_size=3))
def test_what_is_streamed_is_the_text_up_to_the_stop_string(kind: str, parts: list[str], stop: str) -> None:
    text, tokenizer = opened(kind)
    tokens = [token for part in parts for token in tokenizer.encode(part).ids]
    whole = text.decode(tokens)
    assert "".join(streamed(text, tokens, stop)) == whole.partition(stop)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_may_name_a_special_token(kind: str) -> None:
    text, tokenizer = opened(kind)
    before = tokenizer.encode("it isn't over").ids
    tokens = [*before, token_id(tokenizer, "<|im_end|>"), *tokenizer.encode("the end").ids]
    stream = TextStream(text, "<|im_end|>")
    got = "".join(stream.push(token) for token in tokens[: len(before) + 1])
    assert stream.stopped
    assert (got, stream.n_before, stream.rest) == (text.decode(before), len(before), "")
    assert text.decode(before) in "".join(streamed(text, tokens, ["<|im_start|>"])), "another one does not stop it"


def test_a_stop_string_may_span_text_and_special_tokens() -> None:
    text, tokenizer = opened("byte_level")
    tokens = tokenizer.encode("over.<|im_end|>\n<|im_start|>the end").ids
    assert "".join(streamed(text, tokens, ["<|im_end|>\n<|im_start|>"])) == "over."
    assert "".join(streamed(text, tokens, ["r.\n"])) == "ove", "and text with a special token inside"


def test_a_part_of_a_special_tokens_name_stops_nothing() -> None:
    text, tokenizer = opened("byte_level")
    tokens = tokenizer.encode("Hi<|im_end|> there").ids
    assert "".join(streamed(text, tokens, ["end", "im_end|", "|", "Hi<|"])) == "Hi there"


def test_a_single_string_is_one_stop_string() -> None:
    text, tokenizer = opened("byte_level")
    tokens = tokenizer.encode("the ship was the Pequod of old").ids
    assert "".join(streamed(text, tokens, "Pequod")) == "the ship was the "


@pytest.mark.parametrize("kind", ["byte_level", "llama_2", "gemma", "metaspace"])
@settings(max_examples=100, deadline=None)
@given(first=WRITING, middle=WRITING, stop=st.sampled_from(["THE END", "er", "東", "<|im_end|>", "isn"]))
def test_tokens_before_the_stop_and_the_rest_are_the_text_that_was_given(
    kind: str, first: str, middle: str, stop: str
) -> None:
    text, tokenizer = opened(kind)
    tokens = tokenizer.encode(f"{first}<|im_start|>{middle}{stop} and on").ids
    stream, got = TextStream(text, stop), ""
    for token in tokens:
        got += stream.push(token)
        if stream.stopped:
            break
    if not stream.stopped:
        return
    kept = tokens[: stream.n_before]
    assert text.decode(kept) + stream.rest == got
    again = kept + (text.encode_behind(kept, stream.rest) if stream.rest else [])
    assert text.decode(again) == got, "a session that ends here ends where the text does"


def test_bytes_that_are_no_character_are_kept_before_a_stop() -> None:
    text, tokenizer = opened("llama_2")
    tokens = [token_id(tokenizer, f"<0x{byte:02X}>") for byte in (0xFF, 0x80)] + tokenizer.encode("over").ids
    stream = TextStream(text, "ver")
    got = "".join(stream.push(token) for token in tokens)
    assert got == 2 * REPLACEMENT + " o"
    assert stream.n_before >= 2
    assert text.decode(tokens[: stream.n_before]) + stream.rest == got


def test_what_only_began_like_a_stop_string_is_printed_at_the_end() -> None:
    text, tokenizer = opened("byte_level")
    stream = TextStream(text, stop=["THE END"])
    out = "".join(stream.push(token) for token in tokenizer.encode("this is THE EN").ids)
    assert "THE" not in out
    assert out + stream.flush() == "this is THE EN"


@pytest.mark.parametrize("kind", ["byte_level", "llama_2", "gemma", "metaspace"])
@pytest.mark.parametrize("more", ["ing", " over", "\n\nThe", "東京", "é", "."])
def test_a_text_that_goes_on_gets_no_special_tokens_and_no_space(kind: str, more: str) -> None:
    text, tokenizer = opened(kind, ends=True)
    tokens = tokenizer.encode("Hi there", add_special_tokens=False).ids
    added = text.encode_behind(tokens, more)
    assert token_id(tokenizer, "</s>") not in added
    assert tokenizer.decode(tokens + added, skip_special_tokens=False) == "Hi there" + more


def test_truncation_and_padding_in_a_tokenizer_are_off(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("byte_level")
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=128)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "An operating system runs programs larger than memory. " * 3
    assert Text(tmp_path / "tokenizer.json").encode(text) == opened("byte_level")[1].encode(text).ids


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"cannot read .*tokenizer\.json"):
        Text(tmp_path / "tokenizer.json")
