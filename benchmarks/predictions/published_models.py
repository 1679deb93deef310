"""Models of the published rows: their shapes, and how many bytes their weights take in each format."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgekv.device_profiles.geometry import Geometry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent / "published_data"

#: Bits per weight, scales included: of the layers, and of the output head, which most formats keep larger. GGUF: llama.cpp's
#: README of llama-quantize; its mixtures keep the head in Q6_K. GPTQ and AWQ (W4A16): groups of 128, head in fp16. SpinQuant
#: and QLoRA of ExecuTorch: groups of 32, head in 8 bits. q4f16_1 (MLC) and 4-bit (MLX, MNN): groups of 32 and 64.
FORMATS: dict[str, tuple[float, float]] = {
    "Q1_0": (1.125, 1.125),
    "Q2_K": (3.0, 6.56),
    "Q3_K": (3.8, 6.56),
    "Q4_0_4_4": (4.5, 6.56),
    "Q4_0": (4.5, 6.56),
    "Q4_K": (4.83, 6.56),
    "Q5_K": (5.65, 6.56),
    "Q5_0": (5.5, 6.56),
    "Q6_K": (6.56, 6.56),
    "Q8_0": (8.5, 8.5),
    "16-bit": (16.0, 16.0),
    "W4A16": (4.15, 16.0),
    "MXFP4": (4.25, 16.0),
    "SpinQuant": (4.5, 8.0),
    "QLoRA": (4.5, 8.0),
    "q3f16": (3.5, 3.5),
    "q4f16": (4.5, 4.5),
    "8-bit": (8.5, 8.5),
    "4-bit": (4.5, 4.5),
    "3-bit": (3.5, 4.5),
    "2-bit": (2.25, 4.5),
}
_PATTERNS = {
    "Q4_0_4_4": r"q4_0_[48]_[48]",
    "Q4_K": r"q4_k",
    "Q4_0": r"q4_0",
    "Q1_0": r"q1_0",
    "Q2_K": r"q2_k",
    "Q3_K": r"q3_k",
    "Q5_K": r"q5_k",
    "Q5_0": r"q5_0",
    "Q6_K": r"q6_k",
    "Q8_0": r"q8_0",
    "q4f16": r"q4f16",
    "q3f16": r"q3f16",
    "SpinQuant": r"spinquant",
    "QLoRA": r"qlora|qat\+lora",
    "W4A16": r"w4a16|gptq|awq",
    "MXFP4": r"mxfp4|gpt[- ]?oss",
    "16-bit": r"\bf16|bf16|fp16|unquantised|unquantized",
    "8-bit": r"8[- ]?bit|int8",
    "4-bit": r"4[- ]?bit|int4|\bw4\b",
    "2-bit": r"2[- ]?bit|\bw2\b|bitnet",
}
#: Formats of checkpoints that name the matrices they leave in 16 bits (``sixteen_bit`` in models.toml); files of llama.cpp,
#: MLC, MLX and ExecuTorch pack every matrix.
_SELECTIVE = ("W4A16", "MXFP4")
_SIXTEEN = 2.0


@dataclass(frozen=True)
class Model:
    """A shape, the pattern that found it, and the parts that stay in 16 bits: ``attention``, ``shared experts``."""

    shape: Geometry
    name: str
    sixteen_bit: frozenset[str] = frozenset()


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights: those in the format that a token reads, those in 16 bits beside them, and all that are stored."""

    packed: float
    plain: float
    stored: float

    @property
    def read(self) -> float:
        """What one token reads."""
        return self.packed + self.plain

    def scaled(self, factor: float) -> WeightBytes:
        """Return them times a factor."""
        return WeightBytes(self.packed * factor, self.plain * factor, self.stored * factor)


def find_model(name: str) -> Model | None:
    """Return the first entry of models.toml whose pattern is found in the name."""
    for pattern, model in _models():
        if pattern.search(name):
            return model
    return None


@cache
def _models() -> list[tuple[re.Pattern[str], Model]]:
    entries = tomllib.loads((HERE / "models.toml").read_text(encoding="utf-8"))["model"]
    return [
        (
            re.compile(entry["pattern"], re.IGNORECASE),
            Model(Geometry.from_config(entry["config"]), entry["pattern"], frozenset(entry.get("sixteen_bit", ()))),
        )
        for entry in entries
    ]


def typical_shape(parameters: float) -> Geometry:
    """Return a decoder of so many weights in the proportions of common ones: 12 h^2 per layer, h / 128 layers."""
    hidden = round((parameters * 128 / 12) ** (1 / 3) / 64) * 64
    layers = max(1, round(parameters / (12 * hidden**2)))
    heads = max(1, hidden // 128)
    mlp = int(parameters / layers - 4 * hidden * 128 * heads)
    return Geometry(layers, hidden, heads, heads, 128, 1, 1 << 17, mlp, mlp, (0,) * layers)


def weight_bytes(
    shape: Geometry, weights: str, sixteen_bit: Collection[str] = (), file_bytes: float | None = None
) -> WeightBytes:
    """Return what a token reads; a stated file size corrects the nominal bits, whether it stores the embedding apart or not."""
    layer_bits, head_bits = FORMATS[weights]
    kept = set(sixteen_bit) if weights in _SELECTIVE else set()
    apart = shape.mixing_weights if "attention" in kept else 0
    if "shared experts" in kept:
        apart += shape.n_layers * shape.mlp_shared_weights
    active, every = (
        (shape.mixing_weights + shape.n_layers * mlp - apart) * layer_bits / 8
        for mlp in (shape.mlp_active_weights, shape.mlp_weights)
    )
    head = shape.head_weights * head_bits / 8
    plain = _SIXTEEN * apart + (head if head_bits == 16 else 0.0)
    read = WeightBytes(active + head + _SIXTEEN * apart - plain, plain, every + _SIXTEEN * apart + head)
    if file_bytes is None:
        return read
    embedding = shape.head_weights * min(layer_bits, head_bits) / 8
    stored = [read.stored, read.stored + embedding, read.stored + head]
    factor = min((file_bytes / size for size in stored), key=lambda ratio: abs(ratio - 1))
    return read.scaled(min(max(factor, 0.75), 1.35))


def format_of(name: str, engine: str, bits: int) -> str:
    """Return the format of a row: what its model's name says, else what its engine uses for so many bits."""
    for known, pattern in _PATTERNS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return known
    if "ollama" in engine.lower():
        return "Q4_K"  # the default of its tags
    if bits == 4 and ("vllm" in engine.lower() or "embedl" in engine.lower()):
        return "W4A16"
    return {16: "16-bit", 8: "8-bit", 3: "3-bit", 2: "2-bit", 1: "Q1_0"}.get(bits, "4-bit")
