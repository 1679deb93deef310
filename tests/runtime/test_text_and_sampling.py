"""Text in and out, and the choice of tokens."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.errors import BundleError, UsageError
from edgekv.runtime.sampling import Sampler, SamplingOptions
from edgekv.runtime.text import Text, TextStream

DEMO = Path(str(resources.files("edgekv.export"))) / "demo_model"
TEXT = Text(DEMO / "tokenizer.json")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_streamed_text_equals_the_whole_and_never_splits_a_character(text: str) -> None:
    tokens = TEXT.encode(text)
    stream = TextStream(TEXT)
    pieces = [stream.push(token) for token in tokens] + [stream.flush()]
    assert "".join(pieces) == TEXT.decode(tokens)
    if "\ufffd" not in TEXT.decode(tokens):
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_stop_string_ends_the_text_even_when_it_comes_in_pieces() -> None:
    stream = TextStream(TEXT, stop=["THE END", "never"])
    out = ""
    for token in TEXT.encode("it was over. THE END of it all"):
        out += stream.push(token)
        if stream.stopped:
            break
    assert stream.stopped
    assert out + stream.flush() == "it was over. "


def test_what_only_began_like_a_stop_string_is_printed_at_the_end() -> None:
    stream = TextStream(TEXT, stop=["THE END"])
    out = "".join(stream.push(token) for token in TEXT.encode("this is THE EN"))
    assert "THE" not in out
    assert out + stream.flush() == "this is THE EN"


def test_a_bundle_without_a_chat_template_says_so() -> None:
    with pytest.raises(UsageError, match="no chat template; use --prompt"):
        TEXT.encode_chat([{"role": "user", "content": "hello"}])


def test_a_template_that_refuses_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception('only one user message') }}")
    text = Text(DEMO / "tokenizer.json", tmp_path / "t.jinja")
    with pytest.raises(UsageError, match="only one user message"):
        text.encode_chat([{"role": "user", "content": "hello"}])


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"cannot read .*tokenizer\.json"):
        Text(tmp_path / "tokenizer.json")


LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def draws(options: SamplingOptions, count: int = 4000) -> np.ndarray:
    sampler = Sampler(options)
    return np.bincount([sampler.choose(LOGITS, []) for _ in range(count)], minlength=4) / count


def test_greedy_takes_the_best() -> None:
    assert Sampler(SamplingOptions()).choose(LOGITS, []) == 0


def test_temperature_one_draws_from_the_distribution() -> None:
    np.testing.assert_allclose(draws(SamplingOptions(temperature=1.0)), [0.5, 0.25, 0.15, 0.1], atol=0.03)


def test_top_k_keeps_k_tokens() -> None:
    np.testing.assert_allclose(draws(SamplingOptions(temperature=1.0, top_k=2)), [2 / 3, 1 / 3, 0, 0], atol=0.03)


def test_top_p_keeps_the_token_that_crosses_the_limit_and_no_more() -> None:
    np.testing.assert_allclose(draws(SamplingOptions(temperature=1.0, top_p=0.7)), [2 / 3, 1 / 3, 0, 0], atol=0.03)


def test_equal_seeds_give_equal_tokens_and_others_do_not() -> None:
    def run(seed: int) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler.choose(LOGITS, []) for _ in range(50)]

    assert run(1) == run(1) != run(2)


def test_a_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0))
    assert sampler.choose(np.array([1.0, 0.9], np.float32), [0]) == 1
    assert sampler.choose(np.array([-0.9, -1.0], np.float32), [0]) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", -2), ("repetition_penalty", 0)]
)
def test_a_senseless_option_is_refused(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=field.replace("_", "-")):
        SamplingOptions(**{field: value})  # type: ignore[arg-type]
