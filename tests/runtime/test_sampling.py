"""The choice of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from edgekv.errors import UsageError
from edgekv.runtime.sampling import Sampler, SamplingOptions

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def draws(options: SamplingOptions, count: int = 4000) -> np.ndarray:
    sampler = Sampler(options)
    return np.bincount([sampler.choose(LOGITS, range(at)) for at in range(count)], minlength=4) / count


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
        return [sampler.choose(LOGITS, range(at)) for at in range(50)]

    assert run(1) == run(1) != run(2)


def test_without_a_seed_each_run_draws_other_numbers_and_says_which() -> None:
    def run(seed: int | None) -> tuple[list[int], int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler.choose(LOGITS, range(at)) for at in range(50)], sampler.seed

    first, seed = run(None)
    assert run(None)[0] != first
    assert run(seed) == (first, seed)


def test_a_sequence_that_is_resumed_draws_the_numbers_of_the_one_that_never_stopped() -> None:
    options = SamplingOptions(temperature=1.0, seed=7)
    whole = Sampler(options)
    expected = [whole.choose(LOGITS, range(at)) for at in range(40)]
    resumed = Sampler(options)
    rest = [resumed.choose(LOGITS, range(at)) for at in range(20, 40)]
    assert expected[20:] == rest != expected[:20], "and does not use the first ones again"


def test_a_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0))
    assert sampler.choose(np.array([1.0, 0.9], np.float32), [0]) == 1
    assert sampler.choose(np.array([-0.9, -1.0], np.float32), [0]) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 1 << 64),
    ],
)
def test_a_senseless_option_is_refused(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^{field} must be "):
        SamplingOptions(**{field: value})  # type: ignore[arg-type]
