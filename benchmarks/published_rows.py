"""Published tokens per second, row by row, and what each row asked of its device.

``published/rows.csv`` holds the rows with their sources, ``published/models.toml`` the shapes of the models. A row becomes a
:class:`Row`: which device and engine it belongs to, how many bytes a token read, and whether they fitted the device's RAM.
"""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.work import StepWork, step_work

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent / "published"

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
    "SpinQuant": (4.5, 8.0),
    "QLoRA": (4.5, 8.0),
    "q3f16": (3.5, 3.5),
    "q4f16": (4.5, 4.5),
    "8-bit": (8.5, 8.5),
    "4-bit": (4.5, 4.5),
    "3-bit": (3.5, 4.5),
    "2-bit": (2.25, 4.5),
}
_FORMAT_PATTERNS = {
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
    "16-bit": r"\bf16|bf16|fp16|unquantised|unquantized",
    "8-bit": r"8[- ]?bit|int8",
    "4-bit": r"4[- ]?bit|int4|\bw4\b",
    "2-bit": r"2[- ]?bit|\bw2\b|bitnet",
}
#: Engines: the first pattern found names the engine; threads stay, since they change its speed.
_ENGINES = (
    (r"executorch", "ExecuTorch CPU"),
    (r"t-mac", "T-MAC"),
    (r"powerinfer", "PowerInfer"),
    (r"powerserve", "PowerServe NPU"),
    (r"genie npu", "Genie NPU"),
    (r"genie-ai", "genie-ai-runtime"),
    (r"qualcomm npe", "NPE NPU"),
    (r"llamafile-[0-9.]+", None),
    (r"llama[.]cpp.*hexagon", "llama.cpp Hexagon"),
    (r"llama[.]cpp.*metal", "llama.cpp Metal"),
    (r"llama[.]cpp.*cuda", "llama.cpp CUDA"),
    (r"llama[.]cpp.*(gpu|vulkan|opencl|adreno)", "llama.cpp GPU"),
    (r"llama[.]cpp", "llama.cpp"),
    (r"ollama", "ollama"),
    (r"mlc", "MLC"),
    (r"mlx", "MLX"),
    (r"mnn.*gpu|mnn.*metal|mnn.*opencl", "MNN GPU"),
    (r"mnn", "MNN"),
    (r"litert.*gpu", "LiteRT-LM GPU"),
    (r"litert.*npu", "LiteRT-LM NPU"),
    (r"litert", "LiteRT-LM CPU"),
    (r"vllm", "vLLM"),
    (r"embedl", "embedl"),
    (r"coreml|core ml", "CoreML"),
)
#: Bytes that Linux needs on a board without a desktop, and the share of the RAM that it reports (sbc-bench: 0.97).
_IDLE_BYTES, _VISIBLE = 0.5e9, 0.97
_GB, _GIB, _MIB = 1e9, 2**30, 2**20


@dataclass(frozen=True)
class Row:
    """One published measurement. ``weight_bytes``: read by one token; ``limit_bytes``: RAM for the process, if known."""

    device: str
    engine: str
    model: str
    base: str
    family: str
    format: str
    shape: Geometry
    weight_bytes: float
    context: int
    prompt: int
    decode: float | None
    prefill: float | None
    limit_bytes: float | None

    @property
    def pair(self) -> tuple[str, str]:
        """The device and the engine: what a fit belongs to."""
        return self.device, self.engine

    @property
    def kv_token_bytes(self) -> float:
        """Bytes that a token leaves in an fp16 cache, the default of nearly every engine."""
        return 4.0 * self.shape.n_layers * self.shape.n_kv_heads * self.shape.head_dim

    @property
    def paged(self) -> bool:
        """Whether weights and cache exceed the RAM, so that they come from flash again for every token."""
        touched = self.weight_bytes + self.kv_token_bytes * self.prompt
        return self.limit_bytes is not None and touched > self.limit_bytes

    def decode_work(self) -> StepWork:
        """Return the work of one decoded token."""
        return self._work(1, self.context, 1)

    def prefill_work(self) -> StepWork:
        """Return the work of the whole prompt, computed in one chunk; logits of its last token."""
        return self._work(self.prompt, 0, 1)

    def _work(self, n_tokens: int, context: int, logits: int) -> StepWork:
        counted = step_work(
            self.shape,
            n_tokens=n_tokens,
            context=context,
            bits_per_weight=8.0,
            kv_bytes_per_token=self.kv_token_bytes,
            logits=logits,
        )
        read = self.weight_bytes if n_tokens == 1 else counted.weight_bytes * FORMATS[self.format][0] / 8
        return StepWork(read, counted.ops, counted.kv_bytes, counted.attention_ops)


def read_rows(path: Path = HERE / "rows.csv") -> tuple[list[Row], list[tuple[str, str]]]:
    """Read a file of rows; returns those that can be predicted, and the others as (device and model, why not)."""
    rows, left_out = [], []
    with path.open(encoding="utf-8", newline="") as stream:
        for record in csv.DictReader(stream):
            made = _row(record)
            if isinstance(made, Row):
                rows.append(made)
            else:
                left_out.append((f"{record['device']}: {record['model']}", made))
    return rows, left_out


def _row(record: dict[str, str]) -> Row | str:
    model = record["model"]
    why_not = _excluded(model, record)
    if why_not:
        return why_not
    weights = _format(model, record)
    found = _shape(model)
    shape, base = found if found is not None else (None, _base(model))
    file_bytes = _file_bytes(model)
    active = re.search(r"([0-9.]+)b active", model.lower())
    parameters = float(active[1]) if active else _number(record["params_b"])
    if shape is None:
        if parameters is None and file_bytes is None:
            return "the size of the model is not stated"
        shape = typical_shape(parameters * 1e9 if parameters else file_bytes * 8 / FORMATS[weights][0])  # type: ignore[operator]
    context = _number(record["context"])
    return Row(
        device=_device(record["device"], record["soc"]),
        engine=_engine(record["engine"]),
        model=model,
        base=base,
        family=_family(base),
        format=weights,
        shape=shape,
        weight_bytes=_weight_bytes(shape, weights, file_bytes),
        # tg128 counts 128 tokens from an empty cache: half of it on average. Where nothing is said, a short chat.
        context=int(context / 2 if context and context <= 512 else context or 128),
        prompt=int(_number(record["prompt_tokens"]) or 512),
        decode=_number(record["decode_tok_s"]),
        prefill=_number(record["prefill_tok_s"]),
        limit_bytes=_limit(record["device"], model),
    )


def _excluded(model: str, record: dict[str, str]) -> str:
    text = f"{model} {record['device']} {record['engine']}".lower()
    if "sustained" in text and "10 min" in text:
        return "a hot device: the thermal model's, not the speed model's"
    if "limited to" in text and "mmap" not in text:
        return "the engine streams experts into limited memory"
    if "flashhead" in text:
        return "an approximate output head"
    if "swap" in text:
        return "swapping, by an unknown amount"
    return ""


@cache
def _models() -> list[tuple[re.Pattern[str], Geometry]]:
    entries = tomllib.loads((HERE / "models.toml").read_text(encoding="utf-8"))["model"]
    return [(re.compile(entry["pattern"], re.IGNORECASE), Geometry.from_config(entry["config"])) for entry in entries]


def _shape(model: str) -> tuple[Geometry, str] | None:
    for pattern, shape in _models():
        if pattern.search(model):
            return shape, pattern.pattern
    return None


def typical_shape(parameters: float) -> Geometry:
    """Return a decoder of so many weights in the proportions of common ones: 12 h^2 per layer, h / 128 layers."""
    hidden = round((parameters * 128 / 12) ** (1 / 3) / 64) * 64
    layers = max(1, round(parameters / (12 * hidden**2)))
    heads = max(1, hidden // 128)
    mlp = int(parameters / layers - 4 * hidden * 128 * heads)
    return Geometry(layers, hidden, heads, heads, 128, 1, 1 << 17, mlp, mlp, (0,) * layers)


def _weight_bytes(shape: Geometry, weights: str, file_bytes: float | None) -> float:
    """Return what a token reads; a stated file size corrects the nominal bits, whether it stores the embedding apart or not."""
    layer_bits, head_bits = FORMATS[weights]
    layers = shape.n_layers * (shape.attention_weights + shape.mlp_weights) * layer_bits / 8
    active = shape.n_layers * (shape.attention_weights + shape.mlp_active_weights) * layer_bits / 8
    head = shape.head_weights * head_bits / 8
    if file_bytes is None:
        return active + head
    stored = [layers + head, layers + head + shape.head_weights * min(layer_bits, head_bits) / 8, layers + 2 * head]
    factor = min((file_bytes / size for size in stored), key=lambda ratio: abs(ratio - 1))
    return (active + head) * min(max(factor, 0.75), 1.35)


def _file_bytes(model: str) -> float | None:
    match = re.search(r"\[(?:file |pte )?([0-9.]+) ?(gib|gb|mib|mb)", model, re.IGNORECASE)
    if match is None:
        return None
    return float(match[1]) * {"gib": _GIB, "gb": _GB, "mib": _MIB, "mb": 1e6}[match[2].lower()]


def _format(model: str, record: dict[str, str]) -> str:
    for name, pattern in _FORMAT_PATTERNS.items():
        if re.search(pattern, model, re.IGNORECASE):
            return name
    if "ollama" in record["engine"]:
        return "Q4_K"  # the default of its tags
    bits = int(_number(record["weight_bits"]) or 4)
    engine = record["engine"].lower()
    if bits == 4 and ("vllm" in engine or "embedl" in engine):
        return "W4A16"
    return {16: "16-bit", 8: "8-bit", 3: "3-bit", 2: "2-bit", 1: "Q1_0"}.get(bits, "4-bit")


def _device(text: str, soc: str) -> str:
    if text.startswith("phone") and soc:
        return f"phone, {soc}"
    plain = re.sub(r"\(.*?\)|\b[0-9]+ ?GB\b|\+ ?$", "", text)
    return re.sub(r"\s+", " ", plain.replace("IGX Orin iGPU", "Jetson AGX Orin")).strip()


def _engine(text: str) -> str:
    for pattern, name in _ENGINES:
        match = re.search(pattern, text, re.IGNORECASE)
        if match:
            threads = re.search(r"\b([0-9]+)T\b", text)
            return (name or match[0]) + (f" {threads[0]}" if threads else "")
    return re.sub(r"\(.*?\)", "", text).strip()


def _base(model: str) -> str:
    return re.sub(r"\[.*?\]|\(.*?\)", "", model).strip().lower()


def _family(base: str) -> str:
    match = re.search(r"gemma|smallthinker|olmoe|deepseek-v2|qwen.*a3b|mpt|chatglm", base)
    return match[0] if match else "llama"


def _limit(device: str, model: str) -> float | None:
    limited = re.search(r"limited to ([0-9.]+) ?G", model)
    if limited:
        return float(limited[1]) * _GIB
    board = re.search(r"(?:Raspberry|Pi) .*?\b([0-9]+) ?GB", device)
    return float(board[1]) * _GIB * _VISIBLE - _IDLE_BYTES if board else None


def _number(text: str | None) -> float | None:
    return float(text) if text else None
