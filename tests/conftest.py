"""Shared fixtures: bundles are exported once per session; the user's own folders are never touched."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

import edgekv as edgekv  # first: it keeps the engines that tests load from reporting home
from tests.checkpoints import make_checkpoint

Once = Callable[[str, Callable[[Path], object]], Path]


# A deadline would fail whoever waits for the processor.
hypothesis.settings.register_profile("edgekv", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("edgekv")


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Send cache and configuration to a temporary folder; what tests start has the memory that users have."""
    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    patch.setenv("XDG_STATE_HOME", str(home / "state"))
    for name in ("GLIBC_TUNABLES", "PYTHONMALLOC"):
        patch.delenv(name, raising=False)
    # Shells start what they run in the background deaf to Ctrl-C, and what is started from there is deaf, too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def calm() -> None:
    """Let no budget shrink because another program, or another test, makes the machine wait for memory: tests of that say so."""
    from edgekv.runtime.machine import Host
    from edgekv.runtime.system.pressure import Calm

    pytest.MonkeyPatch().setattr(Host, "pressure", lambda self: Calm())


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Return a function that has a folder of this name made once in a run of the suite: by one process, for all of them."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent / "shared" if "PYTEST_XDIST_WORKER" in os.environ else own / "shared"
    shared.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                making = shared / f"{name}.making"
                shutil.rmtree(making, ignore_errors=True)
                make(making)
                making.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def traces(once: Once) -> None:
    """Let all processes of the suite share what torch.onnx made of a segment: seconds for each structure."""
    from torch.onnx._internal.exporter import _registration as registration

    from edgekv.export.onnx import pieces

    # Its table of operators is made of their source at each export: a third of the time.
    library = vars(registration)["onnxscript_apis"]
    library.get_torchlib_ops = functools.cache(library.get_torchlib_ops)
    trace = pieces._export_segment

    @functools.cache
    def shared(*structure: Any) -> pieces.Piece:
        def make(folder: Path) -> None:
            folder.mkdir()
            (folder / "piece").write_bytes(pickle.dumps(trace(*structure)))

        key = hashlib.blake2b(repr(structure).encode(), digest_size=8).hexdigest()
        piece: pieces.Piece = pickle.loads((once(f"piece-{key}", make) / "piece").read_bytes())
        return piece

    pieces._export_segment = shared


@pytest.fixture(scope="session")
def put_shim(once: Once) -> Callable[[Path], None]:
    """Return a function that puts the interface to ExecuTorch into a cache folder, where a compiler made it once for all."""
    from edgekv.runtime.engines.executorch.build import NoShim, built_shim, package_folder

    def make(folder: Path) -> None:
        with built_shim(package_folder(), folder):
            pass

    def put(cache: Path) -> None:
        if (cache / "executorch").exists():
            return  # it may be loaded: nobody writes into it
        with contextlib.suppress(NoShim):  # without a compiler the engine goes its other way
            shutil.copytree(once("shim", make) / "executorch", cache / "executorch")

    return put


@pytest.fixture(scope="session")
def bundle(once: Once, traces: None, put_shim: Callable[[Path], None]) -> Callable[..., Path]:
    """Return a function that exports a source and gives the bundle's folder, to be read and not to be changed."""
    from edgekv.export import export_model
    from edgekv.runtime.generate import cache_home

    def get(
        source: str | Path,
        form: str = "split",
        weights: str = "fp32",
        page_size: int = 16,
        engine: str = "onnx",
        operators: str | None = None,
    ) -> Path:
        key = (str(source), form, weights, page_size, engine, operators)

        def make(folder: Path) -> None:
            export_model(
                source,
                folder,
                engine=engine,
                form=form,
                weights=weights,
                page_size=page_size,
                operators=operators,
                calibration="none",
            )

        folder = once(f"bundle-{hashlib.blake2b(repr(key).encode(), digest_size=8).hexdigest()}", make)
        if engine == "executorch":
            put_shim(cache_home())
        return folder

    return get


#: Each row is one way in which decoders differ.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen2-bias": ("qwen2", {}),
    "qwen3-qk-norm": ("qwen3", {"tie_word_embeddings": True}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "granite": (
        "granite",
        {
            "hidden_size": 96,
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.125,
        },
    ),
    "phi3": (
        "phi3",
        {
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 256,
            "sliding_window": 50,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.1 * i for i in range(12)],
                "long_factor": [2.0 + i for i in range(12)],
            },
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "tie_word_embeddings": False,  # tied, so small a model says one token again and again
            "query_pre_attn_scalar": 48,
            "sliding_window": 24,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
}
#: Further model types, one way each in which they are no Llama. Tests of every run take them through the modules that exporters
#: trace; what engines make of them is slow.
MODEL_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("olmo2", {"head": 0.5, "num_key_value_heads": 1}),
    "olmo3": (
        "olmo3",
        {
            "std": 0.05,
            "seed": 2,
            "head": 0.5,
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5e5,
                    "factor": 4.0,
                    "original_max_position_embeddings": 256,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "ernie4_5": ("ernie4_5", {"std": 0.06, "seed": 1, "head": 0.5}),
    "arcee": ("arcee", {"std": 0.06, "seed": 2}),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}},
    ),
    "exaone4": (
        "exaone4",
        {"std": 0.08, "head": 0.5, "num_hidden_layers": 4, "sliding_window": 12, "sliding_window_pattern": 2},
    ),
    "cohere2": (
        "cohere2",
        {
            "std": 0.06,
            "seed": 1,
            "tie_word_embeddings": False,
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "sliding_window_pattern": 2,
            "logit_scale": 0.25,
        },
    ),
    "starcoder2": ("starcoder2", {"std": 0.1, "hidden_act": "gelu_pytorch_tanh", "sliding_window": 20}),
    "stablelm": ("stablelm", {"std": 0.06, "use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"std": 0.06, "use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    "ministral": (
        "ministral",
        {
            "seed": 1,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "ministral3": (
        "ministral3",
        {
            "std": 0.06,
            "seed": 1,
            "head": 0.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "gemma": ("gemma", {"tie_word_embeddings": False}),
    "gemma2": (
        "gemma2",
        {
            "tie_word_embeddings": False,
            "query_pre_attn_scalar": 48,
            "sliding_window": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
    ),
    "glm4": ("glm4", {"std": 0.06, "seed": 2}),
}
#: Of the further types, those with operators that the others do not have.
OWN_OPERATORS = ("gemma2", "starcoder2")
#: Those that every run takes through an engine, in both forms: a window, and layers of two kinds.
ALWAYS = ("mistral-window", "gemma3")
#: Those that slow runs add: the plain one, biases, and operators that the others do not have.
OFTEN = ("llama", "qwen2-bias", *OWN_OPERATORS)


@pytest.fixture(scope="session")
def checkpoint(once: Once) -> Callable[[str], Path]:
    """Return a function that makes the checkpoint of a variant, to be read and not to be changed."""

    def get(variant: str) -> Path:
        family, changes = (VARIANTS | MODEL_TYPES)[variant]
        return once(variant, lambda folder: make_checkpoint(folder, family, **{"std": 0.04, **changes}))

    return get
