"""The inline program means what the decoder and its seam mean, whatever the sizes and whatever lies where no token is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("executorch.exir", reason="the extra `executorch` is not installed")
pytest.importorskip("torchao", reason="the extra `executorch` is not installed")

from edgekv.bundle import read_manifest
from edgekv.contract import EXECUTORCH_PREFILL_ROWS, INLINE_CACHE
from edgekv.errors import EngineError
from edgekv.export.checkpoint import EMBEDDING, open_checkpoint
from edgekv.export.decoder import build_segment, load_parameter
from edgekv.runtime.decoder.rope import Rope
from edgekv.runtime.engines.executorch.inline import ExecutorchInline
from edgekv.runtime.generate import cache_home
from edgekv.seam import PageView, paged_attention
from tests.checkpoints import make_checkpoint

from .cached_layer import Shape, make_layer

pytestmark = pytest.mark.slow  # the program takes a minute or two to export

PAGE, WINDOW, CONTEXT = 16, 20, 256
SHAPE = Shape(n_kv_heads=2, head_dim=32, page_size=PAGE)
Feeds = dict[str, Any]


class Reference:
    """The decoder in eager torch, with edgekv.seam between its segments."""

    def __init__(self, source: Path) -> None:
        self.checkpoint = open_checkpoint(source)
        self.model = self.checkpoint.config.model
        self.table = self.checkpoint.tensor(EMBEDDING)
        self.segments = [self._segment(index) for index in range(self.model.n_layers + 1)]

    def _segment(self, index: int) -> torch.nn.Module:
        module = build_segment(self.checkpoint.config, index).to_empty(device="cpu").requires_grad_(False)
        for name, parameter in module.named_parameters():
            parameter.data.copy_(load_parameter(self.checkpoint, index, name))
        return module

    def run(self, feeds: Feeds, views: list[list[PageView]]) -> Feeds:
        """Return the outputs of the contract; ``views``: pages, and recent tokens as the last one, of each layer."""
        positions: NDArray[np.int64] = feeds["position_ids"]
        results: Feeds = {}
        cos, sin = (np.empty((len(positions), self.model.rope.rotary_dim // 2), np.float32) for _ in range(2))
        Rope((self.model.rope,)).fill(positions, (cos,), (sin,))
        residual = self.table[feeds["input_ids"]]
        given: tuple[torch.Tensor, ...] = (residual, torch.from_numpy(cos), torch.from_numpy(sin))
        for layer, window in enumerate(self.model.windows):
            *stream, q, k, v = self.segments[layer](*given)
            residual = stream[0] if stream else residual
            query, keys, values = (part.numpy() for part in (q, k, v))
            out, mass = paged_attention(
                query,
                keys,
                values,
                views[layer],
                positions,
                scale=self.model.softmax_scale,
                softcap=self.model.softcap,
                window=window,
            )
            results |= {f"new_keys.{layer}": keys, f"new_values.{layer}": values}
            results[f"page_mass.{layer}"] = mass[:-1]
            given = (residual, torch.from_numpy(out), *given[-2:])
        rows = feeds["logits_rows"]
        results["logits"] = self.segments[-1](given[0][rows], given[1][rows]).numpy()
        return results


@dataclass
class Program:
    """The program of a decoder whose second layer has a window, and its reference."""

    engine: ExecutorchInline
    reference: Reference


@pytest.fixture(scope="module")
def program(bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Program:
    source = make_checkpoint(
        tmp_path_factory.mktemp("windows") / "qwen2", "qwen2", num_hidden_layers=2, max_position_embeddings=CONTEXT,
        use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1,
    )  # fmt: skip
    folder = bundle(source, "inline", engine="executorch", page_size=PAGE)
    manifest = read_manifest(folder)
    assert manifest.model.windows == (0, WINDOW)
    return Program(ExecutorchInline(folder, manifest, 2, cache_home()), Reference(source))


def make_step(
    seed: int, n_new: int, rows: list[int], layers: list[tuple[int, int, float]]
) -> tuple[Feeds, list[list[PageView]]]:
    """Make the inputs of a step; ``layers``: pages, recent tokens and share of live slots of each."""
    rng = np.random.default_rng(seed)
    past = max(n_pages * PAGE + n_recent for n_pages, n_recent, _ in layers) + int(rng.integers(0, 20))
    feeds: Feeds = {
        "input_ids": rng.integers(0, 384, n_new),
        "position_ids": np.arange(past, past + n_new),
        "logits_rows": np.array(rows, np.int64),
    }
    views = []
    for layer, sizes in enumerate(layers):
        cache, pages = make_layer(rng, SHAPE, *sizes, past)
        feeds |= {f"{name}.{layer}": value for name, value in cache.items()}
        views.append(pages)
    return feeds, views


LAYER = st.tuples(st.integers(0, 5), st.integers(0, 40), st.sampled_from([0.0, 0.1, 0.7, 1.0]))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    n_new=st.integers(1, 9) | st.just(EXECUTORCH_PREFILL_ROWS),
    share=st.lists(st.floats(0, 0.999), max_size=3),
    layers=st.tuples(LAYER, LAYER),
)
def test_the_program_computes_what_the_decoder_does(
    program: Program, seed: int, n_new: int, share: list[float], layers: tuple[tuple[int, int, float], ...]
) -> None:
    feeds, views = make_step(seed, n_new, [int(part * n_new) for part in share], list(layers))
    results, expected = program.engine.run(feeds), program.reference.run(feeds, views)
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert results[name].shape == value.shape, name
        np.testing.assert_allclose(results[name], value, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("n_new", [1, 5])
def test_the_order_of_pages_does_not_matter(program: Program, n_new: int) -> None:
    feeds, _ = make_step(1, n_new, [0], [(5, 7, 0.8), (4, 0, 0.8)])
    order = np.array([3, 0, 4, 2, 1])
    mixed = {f"{name}.0": feeds[f"{name}.0"][order] for name in INLINE_CACHE[:5]}
    results = {name: value.copy() for name, value in program.engine.run(feeds).items()}
    others = program.engine.run({**feeds, **mixed})
    np.testing.assert_allclose(others["page_mass.0"], results["page_mass.0"][order], atol=1e-6)
    for name in results.keys() - {"page_mass.0"}:
        np.testing.assert_allclose(others[name], results[name], atol=1e-4, err_msg=name)


def test_a_token_has_the_same_keys_whether_its_logits_are_wanted_or_not(program: Program) -> None:
    layers = [(5, 7, 0.8), (4, 3, 0.8)]
    results = [
        {name: value.copy() for name, value in program.engine.run(make_step(4, 1, rows, layers)[0]).items()}
        for rows in ([0], [], [0, 0])
    ]
    assert [len(result["logits"]) for result in results] == [1, 0, 2]
    for name in results[0].keys() - {"logits"}:
        assert results[0][name].tobytes() == results[1][name].tobytes() == results[2][name].tobytes()


def test_the_whole_context_fits_as_pages_and_as_recent_tokens_and_no_more(program: Program) -> None:
    pages = CONTEXT // PAGE
    feeds, views = make_step(2, 3, [2], [(pages, 0, 1.0), (0, CONTEXT, 1.0)])
    results, expected = program.engine.run(feeds), program.reference.run(feeds, views)
    np.testing.assert_allclose(results["logits"], expected["logits"], atol=1e-4)
    for layers in ([(pages + 1, 0, 1.0), (0, 0, 1.0)], [(0, 0, 1.0), (0, CONTEXT + 1, 1.0)]):
        feeds, _ = make_step(3, 1, [0], layers)
        with pytest.raises(EngineError, match=r"takes input (key_pages.0|recent_keys.1) as (int8|float16) \["):
            program.engine.run(feeds)
