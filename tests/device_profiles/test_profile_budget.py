"""The memory that a device leaves for the KV cache."""

from __future__ import annotations

import pytest

from edgekv.device_profiles import kv_budget, load
from edgekv.errors import BudgetError, UsageError

GB = 1_000_000_000


def test_the_budget_is_the_app_limit_less_weights_runtime_and_headroom() -> None:
    budget = kv_budget(load("galaxy-s24-8gb"), weights_bytes=2 * GB, runtime_overhead_bytes=GB // 2)
    assert budget.headroom_bytes == 400_000_000
    assert budget.kv_bytes == 4 * GB - 2 * GB - GB // 2 - 400_000_000
    assert isinstance(budget.kv_bytes, int)


def test_the_parts_sum_to_the_budget_and_print_as_a_sum() -> None:
    budget = kv_budget(load("galaxy-s24-8gb"), weights_bytes=2 * GB, runtime_overhead_bytes=GB // 2)
    *parts, (label, left) = budget.parts()
    assert label == "KV cache"
    assert sum(size for _, size in parts) == left == budget.kv_bytes
    assert str(budget) == (
        "app limit 3.7 GiB - weights 1.9 GiB - runtime 476.8 MiB - headroom 381.5 MiB = KV cache 1.0 GiB"
    )


def test_one_byte_left_is_a_budget_and_none_is_an_error_with_the_parts_and_the_way_out() -> None:
    profile = load("galaxy-s24-8gb")
    assert kv_budget(profile, weights_bytes=3_600_000_000 - 1, runtime_overhead_bytes=0).kv_bytes == 1
    with pytest.raises(BudgetError) as caught:
        kv_budget(profile, weights_bytes=3_600_000_000, runtime_overhead_bytes=0)
    message = str(caught.value)
    assert message.startswith("galaxy-s24-8gb has no memory left for the KV cache: app limit 3.7 GiB - weights 3.4 GiB")
    assert "use smaller weights (--weights int4)" in message
    with pytest.raises(BudgetError, match="= KV cache -"):
        kv_budget(profile, weights_bytes=8 * GB, runtime_overhead_bytes=0)


def test_a_negative_size_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="weights_bytes must not be negative, but is -1"):
        kv_budget(load("galaxy-s24-8gb"), weights_bytes=-1, runtime_overhead_bytes=0)
    with pytest.raises(UsageError, match="runtime_overhead_bytes must not be negative"):
        kv_budget(load("galaxy-s24-8gb"), weights_bytes=0, runtime_overhead_bytes=-1)
