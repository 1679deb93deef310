"""The contestants: who runs, with which weights and cache, at which contexts, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTEXTS = (512, 2048, 4096, 8192)


@dataclass(frozen=True)
class Configuration:
    """One contestant.

    Attributes:
        script: the module of :mod:`benchmarks.speed` that measures it.
        python: of the environment that it needs, in the peers' folder; "" is our own.
        model: file or folder in the peers' folder.
        rounds: how often it runs at each context, at the most; contexts that are missing are not run.
        float_kv: its cache holds floats.
        in_bars: it counts among the peers that the bars name.
    """

    name: str
    script: str
    python: str
    model: str
    kv: str
    rounds: dict[int, int]
    float_kv: bool = False
    in_bars: bool = True

    def missing(self, peers: Path) -> str:
        """Return what is not there, "" if it can run."""
        for part in (self.python, self.model):
            if part and not (peers / part).exists():
                return str(peers / part)
        return ""

    def command(self, peers: Path, context: int, *, threads: int, own_python: str) -> list[str]:
        """Return the command of one measurement."""
        return [
            str(peers / self.python) if self.python else own_python,
            "-m",
            f"benchmarks.speed.{self.script}",
            str(peers / self.model),
            *("--name", self.name, "--kv", self.kv, "--context", str(context), "--threads", str(threads)),
        ]


EVERY = {512: 3, 2048: 3, 8192: 2}
_GENAI, _LLAMA = ("measure_genai", "genai/bin/python"), ("measure_llamacpp", "llamacpp/bin/python")
_OPENVINO, _MNN = ("measure_openvino", "openvino/bin/python"), ("measure_mnn", "mnn/bin/python")

OURS = "edgekv int4, INT8 pages"
OURS_FP16 = "edgekv int4, fp16 pages"
OURS_EXECUTORCH = "edgekv int4, INT8 pages, ExecuTorch"
OURS_XNNPACK = "edgekv int4, INT8 pages, ExecuTorch with XNNPACK"
#: ExecuTorch's own way to run a decoder: custom_sdpa, the cache in the graph.
EXECUTORCH_OWN = {"fp32": "ExecuTorch custom_sdpa, fp32 cache", "int8": "ExecuTorch custom_sdpa, INT8 cache"}
BUNDLE = "edgekv-int4.edgekv"
BUNDLE_EXECUTORCH, BUNDLE_XNNPACK = "edgekv-int4-operators.edgekv", "edgekv-int4-executorch.edgekv"
#: Each bundle, and how it is exported.
BUNDLES = {
    BUNDLE: ("--engine", "onnx"),
    BUNDLE_EXECUTORCH: ("--engine", "executorch", "--operators", "edgekv"),
    BUNDLE_XNNPACK: ("--engine", "executorch", "--operators", "xnnpack"),
}
CHECKPOINT = "ckpt"

CONFIGURATIONS = (
    Configuration(OURS, "measure_edgekv", "", BUNDLE, "int8", EVERY),
    Configuration(OURS_EXECUTORCH, "measure_edgekv", "", BUNDLE_EXECUTORCH, "int8", {**EVERY, 4096: 2}, in_bars=False),
    Configuration(OURS_XNNPACK, "measure_edgekv", "", BUNDLE_XNNPACK, "int8", {512: 2, 2048: 2}, in_bars=False),
    *(
        Configuration(name, "measure_executorch_own", "", f"executorch/{kv}.pte", kv, {512: 2, 4096: 1}, in_bars=False)
        for kv, name in EXECUTORCH_OWN.items()
    ),
    Configuration("llama.cpp Q4_0, fp16 cache", *_LLAMA, "models/q4_0.gguf", "fp16", EVERY, float_kv=True),
    Configuration("onnxruntime-genai int4, fp32 cache", *_GENAI, "models/genai-int4-f32", "fp32", EVERY, float_kv=True),
    Configuration(OURS_FP16, "measure_edgekv", "", BUNDLE, "fp16", {2048: 3}, float_kv=True),
    Configuration(
        "onnxruntime-genai int4, INT8 cache", *_GENAI, "models/genai-int4-int8", "int8", {512: 3, 2048: 3, 8192: 1}
    ),
    Configuration("onnxruntime-genai int4, INT4 cache", *_GENAI, "models/genai-int4-int4", "int4", {512: 3, 2048: 2}),
    Configuration("llama.cpp Q4_0, INT8 cache", *_LLAMA, "models/q4_0.gguf", "int8", {512: 3, 2048: 2, 8192: 1}),
    # Shown beside the peers that the bars name: it computes prompts faster than all of them, and than edgekv.
    Configuration(
        "OpenVINO GenAI int4, fp16 cache",
        *_OPENVINO,
        "models/openvino-int4",
        "fp16",
        {512: 3, 2048: 3, 8192: 1},
        float_kv=True,
        in_bars=False,
    ),
    Configuration(
        "OpenVINO GenAI int4, INT8 cache",
        *_OPENVINO,
        "models/openvino-int4",
        "int8",
        {512: 3, 2048: 3, 8192: 1},
        in_bars=False,
    ),
    Configuration("MNN int4, fp32 cache", *_MNN, "models/mnn-int4", "fp32", {512: 3, 2048: 2, 8192: 1}, float_kv=True),
    Configuration("MNN int4, INT8 cache", *_MNN, "models/mnn-int4", "int8", {512: 3, 2048: 2, 8192: 1}),
    Configuration(
        "transformers bf16",
        "measure_transformers",
        "genai/bin/python",
        CHECKPOINT,
        "bf16",
        {512: 1, 2048: 1},
        float_kv=True,
        in_bars=False,
    ),
)
