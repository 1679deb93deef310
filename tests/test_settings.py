"""The border that every value passes: the same on the command line, in the environment and in Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv import MemoryManager, settings
from edgekv.errors import UsageError
from edgekv.runtime.options import RunOptions, SessionOptions
from edgekv.runtime.pages.policy import make_policy
from edgekv.runtime.sampling import SamplingOptions
from edgekv.settings import Budget, Flag, Interval, Place, Real, Setting, Size, Target, Whole, Words, parse_attend

ALL: list[Setting[Any]] = [value for value in vars(settings).values() if isinstance(value, Setting)]
SILLY = [
    None, math.nan, math.inf, -math.inf, -0.0, -1, 0, 0.7, 1e-310, 1e308, 10**30, -(10**30), True, False, "", " ", "nan", "inf",
    "-1", "1e999", "0x10", "1_0", "٣", "9" * 5000, "\0", "\udcff", "%", "nan%", "inf%", "-5%", "1TB", "1.5GiB", "0B",
    "9999999999TB", b"1", b"\xff", [], [1], {}, object(), np.float32("nan"), np.int64(3), np.array([1, 2]), np.array(2.5),
    Path("x"), Path("y" * 300), 3 + 4j, float, "lru", "auto",
]  # fmt: skip
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers()),
    st.sampled_from(SILLY), st.floats().map(str), st.integers().map(str), st.floats().map(lambda x: f"{x}%"),
)  # fmt: skip


def within(setting: Setting[Any], found: object) -> bool:
    if isinstance(setting, Whole):
        return type(found) is int and setting.least <= found <= setting.most
    if isinstance(setting, Real):
        return type(found) is float and math.isfinite(found) and setting.least <= found <= setting.most
    if isinstance(found, Interval):
        return (found.tokens > 0) != (0 < found.seconds <= 86_400)
    if isinstance(setting, Size):
        return type(found) is int and 0 < found <= 2**60
    if isinstance(setting, Budget):
        return (float(found[:-1]) / 100 if isinstance(found, str) else int(str(found))) > 0
    if isinstance(setting, Words):
        return isinstance(found, str) and found.encode("utf-8") is not None
    if isinstance(setting, Place):
        return isinstance(found, Path)
    if isinstance(setting, Target):
        return isinstance(found, (str, Path))
    if isinstance(setting, Flag):
        return type(found) is bool
    return True


def refused(error: UsageError, said: str) -> None:
    text = str(error)
    assert text.startswith(f"{said} must be "), text
    assert ", not " in text
    assert "\n" not in text


@given(st.sampled_from(ALL), ANYTHING)
def test_any_value_is_of_the_type_and_in_the_range_or_is_refused_by_name(setting: Setting[Any], value: object) -> None:
    try:
        found = setting.check(value)
    except UsageError as error:
        refused(error, setting.name)
    else:
        assert within(setting, found)


@given(st.sampled_from(ALL), st.one_of(st.text(), st.sampled_from([x for x in SILLY if isinstance(x, str)])))
def test_any_text_is_read_or_is_refused_by_the_name_of_the_option(setting: Setting[Any], text: str) -> None:
    try:
        found = setting.read(text, "--option")
    except UsageError as error:
        refused(error, "--option")
    else:
        assert within(setting, found)
        if not isinstance(setting, (Whole, Real)):
            assert setting.check(text) == found


@given(st.sampled_from([s for s in ALL if isinstance(s, (Whole, Real))]), st.one_of(st.integers(), st.floats()))
def test_a_number_is_taken_as_a_text_when_it_is_taken_as_a_value(setting: Setting[Any], number: float) -> None:
    def outcome(call: Any, value: object) -> object:
        try:
            return call(value)
        except UsageError:
            return None

    if isinstance(number, int) or isinstance(setting, Real):
        assert outcome(setting.check, number) == outcome(setting.read, repr(number))


@pytest.mark.parametrize(
    ("text", "size"),
    [("1TB", 10**12), ("1TiB", 2**40), ("1.5GiB", 3 * 2**29), ("64 MiB", 2**26), ("2gb", 2 * 10**9), ("4096", 4096)],
)
def test_sizes_are_read_in_the_units_that_people_write(text: str, size: int) -> None:
    assert settings.FLASH_LIMIT.read(text) == settings.KV_BUDGET.check(text) == size


@pytest.mark.parametrize(
    ("text", "interval"), [("64", Interval(64, 0)), (" 30s ", Interval(0, 30)), ("1.5s", Interval(0, 1.5))]
)
def test_an_interval_is_tokens_or_seconds(text: str, interval: Interval) -> None:
    assert settings.CHECKPOINT_EVERY.read(text) == interval


@pytest.mark.parametrize(
    "text", ["0", "0s", "-1", "2.5", "s", "nans", "1e9", "9" * 5000, "\N{ARABIC-INDIC DIGIT THREE}"]
)
def test_an_interval_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="a number of tokens such as 64, or of seconds such as 30s"):
        settings.CHECKPOINT_EVERY.read(text)


@pytest.mark.parametrize("target", ["ftp://x/y", "://", "s3:/ /x://"])
def test_the_kind_of_an_object_store_is_known_before_the_run(target: str) -> None:
    with pytest.raises(UsageError, match="s3://, gs://, az://, file://, memory://"):
        settings.OFFLOAD.check(target)


def test_an_environment_variable_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKV_PREFIX_BYTES", "lots")
    with pytest.raises(UsageError, match=r"^EDGEKV_PREFIX_BYTES must be a size .*, not 'lots'$"):
        settings.PREFIX_BYTES.environment("EDGEKV_PREFIX_BYTES")
    monkeypatch.setenv("EDGEKV_PREFIX_BYTES", "")
    assert settings.PREFIX_BYTES.environment("EDGEKV_PREFIX_BYTES") is None


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (RunOptions, "kv_budget", "inf%"),
        (RunOptions, "kv_budget", 0),
        (RunOptions, "kv", "int4"),
        (RunOptions, "context", 0.7),
        (RunOptions, "policy", "fifo"),
        (RunOptions, "offload", ""),
        (RunOptions, "flash_limit", "1XB"),
        (RunOptions, "allow_drop", "yes"),
        (RunOptions, "max_write_per_day", -1),
        (RunOptions, "threads", 300),
        (RunOptions, "threads", "4"),
        (RunOptions, "prefill_chunk", 0),
        (RunOptions, "session", "chat.kv"),
        (RunOptions, "offload_patience_s", math.inf),
        (RunOptions, "pressure", "maybe"),
        (SamplingOptions, "temperature", math.nan),
        (SamplingOptions, "temperature", math.inf),
        (SamplingOptions, "repetition_penalty", math.nan),
        (SamplingOptions, "repetition_penalty", 1e-310),
        (SamplingOptions, "top_p", 0),
        (SamplingOptions, "top_k", 2.5),
        (SamplingOptions, "seed", -1),
        (MemoryManager, "max_memory_mb", math.nan),
        (MemoryManager, "page_size", 16.0),
        (MemoryManager, "memory_threshold_percent", 101),
        (MemoryManager, "quantization_enabled", 1),
        (MemoryManager, "policy", "fifo"),
        (MemoryManager, "allow_drop", None),
    ],
)
def test_options_of_python_are_refused_by_the_name_of_their_field(options: Any, field: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"^{field} must be .*, not "):
        options(**{field: value})


def test_options_keep_a_value_in_the_type_of_its_setting(tmp_path: Path) -> None:
    options = RunOptions(kv="int8", threads=np.int64(2), context=np.int32(64), kv_budget="1.5MiB")  # type: ignore[arg-type]
    assert (options.kv.value, options.threads, options.context, options.kv_budget) == ("int8", 2, 64, 3 * 2**19)
    assert RunOptions(kv_budget=" 12.50% ").kv_budget == "12.5%"
    assert SessionOptions(str(tmp_path)).path == tmp_path  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["selective:inf%", "selective:nan", "selective:-1", "selective:1e999", "selective:0%"])
def test_a_share_of_pages_is_finite_and_above_zero(text: str) -> None:
    with pytest.raises(UsageError, match="attend must be exact, selective"):
        parse_attend(text)


def test_every_word_of_the_policy_setting_is_a_policy() -> None:
    assert [make_policy(word).name for word in settings.POLICY.words] == list(settings.POLICY.words)


@pytest.mark.parametrize("tokens", [[0.7], [True], ["1"], "12", [-1], [2**40], [1, [2]], 1.5, [None], np.array([1.0])])
def test_token_indices_are_whole_numbers(tokens: Any) -> None:
    with pytest.raises(UsageError, match=r"^token_indices must be a whole number from 0 to \d+, not "):
        settings.whole_numbers(tokens, "token_indices", most=2**31 - 1)


def test_whole_numbers_of_any_integer_type_are_taken() -> None:
    for values in ([1, 2], (np.int32(1), 2), np.array([1, 2], np.uint8), range(1, 3)):
        assert settings.whole_numbers(values, "x", most=5).tolist() == [1, 2]
    assert settings.whole_numbers([], "x", most=5).tolist() == []
    assert settings.whole_numbers(3, "x", most=5).tolist() == [3]
