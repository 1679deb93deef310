"""The memory manager as its users know it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekv import MemoryManager
from edgekv.errors import BudgetError, OutOfPages, TokenDropped, TokenNotFound, TokenPruned, UsageError

CONFIG = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 32}
#: fp16 page: 2 heads x 16 tokens x 32 channels x 2 (keys, values) x 2 bytes = 4 KiB; a frame is a little more.
FRAME = 4480


def tokens(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    keys, values = np.random.default_rng(seed).standard_normal((2, n, 2, 32)).astype(np.float32)
    return keys, values


@pytest.fixture
def small() -> Iterator[MemoryManager]:
    with MemoryManager(max_memory_mb=8 * FRAME / 2**20) as manager:
        manager.initialize_kv_cache(CONFIG)
        yield manager


def test_what_was_added_comes_back_in_the_order_asked_for(small: MemoryManager) -> None:
    keys, values = tokens(20)
    small.add_to_kv_cache(layer_idx=1, key=keys, value=values, token_indices=range(20))
    k, v = small.get_from_kv_cache(layer_idx=1, token_indices=[7, 0, 19])
    np.testing.assert_allclose(k, keys[[7, 0, 19]], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(v, values[[7, 0, 19]], rtol=1e-3, atol=1e-3)


def test_more_tokens_than_memory_are_compressed_then_offloaded_and_still_come_back(small: MemoryManager) -> None:
    keys, values = tokens(512)
    for position in range(0, 512, 8):
        span = slice(position, position + 8)
        for layer in range(2):
            small.add_to_kv_cache(
                layer_idx=layer, key=keys[span], value=values[span], token_indices=range(position, position + 8)
            )
        assert small.get_stats()["bytes_in_memory"] <= 8 * FRAME
    stats = small.get_stats()
    assert stats["pages_compressed"] > 0
    assert stats["pages_offloaded"] > 0
    assert stats["pages_dropped"] == 0
    k, v = small.get_from_kv_cache(layer_idx=0, token_indices=range(512))
    assert np.abs(k - keys).max() < np.abs(keys).max() / 127
    assert np.abs(v - values).max() < np.abs(values).max() / 127
    assert small.get_stats()["pages_fetched"] > 0


def test_a_fetched_page_is_bit_identical_to_what_left(small: MemoryManager) -> None:
    keys, values = tokens(64)
    small.add_to_kv_cache(layer_idx=0, key=keys, value=values, token_indices=range(64))
    small.compress_pages(4)
    before = small.get_from_kv_cache(layer_idx=0, token_indices=range(64))
    assert small.offload_pages(4) > 0
    after = small.get_from_kv_cache(layer_idx=0, token_indices=range(64))
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])


def test_a_page_that_is_on_flash_already_leaves_memory_without_a_write(small: MemoryManager) -> None:
    keys, values = tokens(64)
    small.add_to_kv_cache(layer_idx=0, key=keys, value=values, token_indices=range(64))
    small.compress_pages(4)
    small.offload_pages(4)
    written = small.get_stats()["bytes_written"]
    small.get_from_kv_cache(layer_idx=0, token_indices=range(64))
    small.offload_pages(4)
    assert small.get_stats()["bytes_written"] == written


def test_pruning_the_last_token_of_a_page_frees_it_in_every_tier(small: MemoryManager) -> None:
    keys, values = tokens(64)
    small.add_to_kv_cache(layer_idx=0, key=keys, value=values, token_indices=range(64))
    small.compress_pages(2)
    small.offload_pages(1)
    tiers = {small.locate(layer_idx=0, token_index=page * 16)["tier"] for page in range(4)}
    assert tiers == {"HOT", "WARM", "COLD"}
    assert small.remove_pruned_tokens(range(63)) == 63
    assert sum(small.get_stats()["pages_by_tier"].values()) == 1
    small.remove_pruned_tokens([63])
    assert small.get_stats()["bytes_in_memory"] == 0
    with pytest.raises(TokenPruned, match="token 5 was pruned"):
        small.get_from_kv_cache(layer_idx=0, token_indices=[5])


def test_a_pruned_token_can_be_added_again_with_new_values(small: MemoryManager) -> None:
    keys, values = tokens(8)
    small.add_to_kv_cache(layer_idx=0, key=keys, value=values, token_indices=range(8))
    small.remove_pruned_tokens([3])
    small.add_to_kv_cache(layer_idx=0, key=keys[:1] + 1, value=values[:1], token_indices=[3])
    k, _ = small.get_from_kv_cache(layer_idx=0, token_indices=[3])
    np.testing.assert_allclose(k, keys[:1] + 1, rtol=1e-3, atol=1e-3)


def test_a_dropped_token_is_a_clear_error_that_names_it() -> None:
    with MemoryManager(max_memory_mb=8 * FRAME / 2**20, quantization_enabled=False, allow_drop=True) as manager:
        manager.initialize_kv_cache(CONFIG)
        keys, values = tokens(512)
        manager.add_to_kv_cache(layer_idx=0, key=keys, value=values, token_indices=range(512))
        assert manager.get_stats()["pages_dropped"] > 0
        gone = next(t for t in range(512) if manager.locate(layer_idx=0, token_index=t)["tier"] == "DROPPED")
        with pytest.raises(TokenDropped, match=f"token {gone} was dropped"):
            manager.get_from_kv_cache(layer_idx=0, token_indices=[gone])
        assert manager.locate(layer_idx=0, token_index=0)["tier"] == "HOT", (
            "the first page is an attention sink: pinned"
        )


def test_without_a_way_out_adding_fails_and_changes_nothing() -> None:
    with MemoryManager(max_memory_mb=4 * FRAME / 2**20, quantization_enabled=False) as manager:
        manager.initialize_kv_cache(CONFIG)
        keys, values = tokens(128)
        manager.add_to_kv_cache(layer_idx=0, key=keys[:40], value=values[:40], token_indices=range(40))
        before = manager.get_stats()
        with pytest.raises(OutOfPages, match="raise the budget"):
            manager.add_to_kv_cache(layer_idx=0, key=keys[40:], value=values[40:], token_indices=range(40, 128))
        assert manager.get_stats() == before
        k, _ = manager.get_from_kv_cache(layer_idx=0, token_indices=range(40))
        np.testing.assert_allclose(k, keys[:40], rtol=1e-3, atol=1e-3)
        manager.add_to_kv_cache(layer_idx=0, key=keys[40:44], value=values[40:44], token_indices=range(40, 44))
        k, _ = manager.get_from_kv_cache(layer_idx=0, token_indices=range(44))
        np.testing.assert_allclose(k, keys[:44], rtol=1e-3, atol=1e-3)


def test_torch_tensors_are_taken_as_they_are(small: MemoryManager) -> None:
    torch = pytest.importorskip("torch")
    keys = torch.randn(4, 2, 32, dtype=torch.bfloat16, requires_grad=True)
    small.add_to_kv_cache(layer_idx=0, key=keys, value=keys, token_indices=range(4))
    k, _ = small.get_from_kv_cache(layer_idx=0, token_indices=range(4))
    np.testing.assert_allclose(k, keys.detach().float().numpy(), rtol=1e-3)


def test_a_hugging_face_configuration_gives_the_shape(small: MemoryManager) -> None:
    class Config:
        num_hidden_layers = 3
        num_attention_heads = 8
        num_key_value_heads = 2
        hidden_size = 256

    manager = MemoryManager(max_memory_mb=1)
    manager.initialize_kv_cache(Config())
    assert (manager.cache.spec.n_layers, manager.cache.spec.n_kv_heads, manager.cache.spec.head_dim) == (3, 2, 32)
    manager.close()


def test_a_configuration_of_text_and_images_gives_the_shape_of_its_decoder() -> None:
    """As Gemma 3 4B has it: what is left out is not written down anywhere in the file."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    with MemoryManager(max_memory_mb=64) as manager:
        manager.initialize_kv_cache(
            {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
        )
        assert (manager.cache.spec.n_layers, manager.cache.spec.n_kv_heads, manager.cache.spec.head_dim) == (34, 4, 256)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 2**31 - 1, "num_kv_heads": 2, "head_dim": 32}, "num_layers is 2147483647"),
        (
            {"num_layers": "4", "num_kv_heads": 2, "head_dim": 32},
            "num_layers is '4'; it must be a positive whole number",
        ),
        ({"num_layers": 4, "num_kv_heads": 2, "head_dim": 512}, "head_dim 512 is above 256"),
        ({"num_layers": 4, "num_kv_heads": 2, "head_dim": 30}, "must be multiples of 4"),
        ({"num_layers": 4, "head_dim": 32}, "none of num_attention_heads"),
        (None, "none of"),
        (7, "none of"),
        ("llama", "none of"),
    ],
)
def test_a_configuration_without_a_shape_is_refused_and_the_cache_stays(
    small: MemoryManager, config: object, message: str
) -> None:
    before = small.cache
    with pytest.raises(UsageError, match=message):
        small.initialize_kv_cache(config)
    assert small.cache is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_idx": 9}, "layer_idx must be a whole number from 0 to [0-9]+, not 9"),
        ({"token_indices": [0, 0, 1, 2]}, "names a token twice"),
        ({"token_indices": [-1, 0, 1, 2]}, "not -1"),
        ({"token_indices": [0, 0.7, 1, 2]}, "token_indices must be a whole number .*, not 0.7"),
        ({"layer_idx": True}, "layer_idx must be"),
        ({"key": "keys"}, "key must be an array of real numbers, not 'keys'"),
        ({"value": np.full((1, 2, 16), 1j)}, "value must be an array of real numbers, not array"),
        ({"value": np.full((1, 2, 16), "1")}, "value must be an array of real numbers, not array"),
        ({"value": [[1.0, 2.0], [3.0]]}, "value must be an array of real numbers, not "),
        ({"key": np.zeros((4, 1, 32))}, r"key has shape \(4, 1, 32\)"),
        ({"value": np.full((4, 2, 32), np.nan)}, "not finite"),
    ],
)
def test_a_wrong_argument_is_refused_and_nothing_is_added(
    small: MemoryManager, arguments: dict[str, object], message: str
) -> None:
    zeros = np.zeros((4, 2, 32))
    good: dict[str, object] = {"layer_idx": 0, "key": zeros, "value": zeros, "token_indices": range(4)}
    with pytest.raises(UsageError, match=message):
        small.add_to_kv_cache(**{**good, **arguments})  # type: ignore[arg-type]
    assert small.get_stats()["tokens"] == 0


def test_a_token_that_was_never_added_is_named(small: MemoryManager) -> None:
    with pytest.raises(TokenNotFound, match="token 7 is not in the cache of layer 0"):
        small.get_from_kv_cache(layer_idx=0, token_indices=[7])


def test_a_budget_below_one_page_per_layer_is_refused_with_the_least_that_works() -> None:
    manager = MemoryManager(max_memory_mb=0.001)
    with pytest.raises(BudgetError, match=r"2 layers need one open page each.*13\.1 KiB"):
        manager.initialize_kv_cache(CONFIG)


def test_two_managers_cannot_share_an_offload_folder(tmp_path: Path) -> None:
    with MemoryManager(max_memory_mb=1, offload_dir=tmp_path) as first:
        first.initialize_kv_cache(CONFIG)
        second = MemoryManager(max_memory_mb=1, offload_dir=tmp_path)
        with pytest.raises(Exception, match="another process uses the offload folder"):
            second.initialize_kv_cache(CONFIG)


def test_a_manager_refuses_a_second_thread_in_the_middle_of_a_call() -> None:
    with MemoryManager(max_memory_mb=4) as manager:
        manager.initialize_kv_cache({"num_layers": 2, "num_kv_heads": 2, "head_dim": 32})
        zeros, errors = np.zeros((64, 2, 32), np.float32), []
        start = threading.Barrier(4)

        def work(layer: int, first: int) -> None:
            start.wait()
            for at in range(first, first + 640, 64):
                try:
                    manager.add_to_kv_cache(layer_idx=layer, key=zeros, value=zeros, token_indices=range(at, at + 64))
                except UsageError as error:
                    errors.append(error)

        threads = [threading.Thread(target=work, args=(n % 2, 640 * n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert manager.cache.table.n_slots.sum() == 64 * (40 - len(errors))
