"""Published tokens per second, row by row, and what each row asked of its device.

``published/rows.csv`` holds the rows with their sources, ``published/models.toml`` the shapes of the models. A row becomes a
:class:`Row`: which device and engine it belongs to, how many bytes a token read, and whether they fitted the device's RAM.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from edgekv.device_profiles import load
from edgekv.device_profiles.geometry import Geometry
from edgekv.device_profiles.work import StepWork, step_work

from .published_models import FORMATS, HERE, Model, WeightBytes, find_model, format_of, typical_shape, weight_bytes

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
#: Families whose kernels are not those of Llama and what is shaped like it (Qwen, Mistral, Phi, SmolLM, ...).
_FAMILIES = ("gemma", "smallthinker", "olmoe", "deepseek-v2", "mpt", "chatglm", "gpt[- ]?oss", "mixtral")
#: Bytes that Linux needs on a board without a desktop, and the share of the RAM that it reports (sbc-bench: 0.97).
_IDLE_BYTES, _VISIBLE = 0.5e9, 0.97
#: The figures of Jetson AI Lab: `vllm bench serve`, 50 random prompts of 2048 tokens and answers of 128, one at a time, after a
#: warm-up with the same ones, at 0.8 of the memory; tokens of the answers over the time of everything, that until the first
#: token included (jetson-ai-lab.com/tutorials/genai-benchmarking).
_SERVED = "jetson-ai-lab/blob/main/src/data/benchmarks.json"
_SERVED_PROMPT, _SERVED_ANSWER, _SERVED_REQUESTS, _SERVER_MEMORY = 2048, 128, 50, 0.8
_SERVERS = {"Jetson AGX Orin": "jetson-agx-orin-64gb"}
_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class Row:
    """One published measurement. ``limit_bytes``: RAM for the process, if known.

    ``prompt_share``: tokens of a prompt whose computing is in the time of each decoded token, as it is in the figures of a
    server that divides the tokens of an answer by the time of the whole request.
    """

    device: str
    engine: str
    model: str
    base: str
    family: str
    format: str
    shape: Geometry
    weights: WeightBytes
    context: int
    prompt: int
    decode: float | None
    prefill: float | None
    limit_bytes: float | None
    prompt_share: float = 0.0

    @property
    def pair(self) -> tuple[str, str]:
        """The device and the engine: what a fit belongs to."""
        return self.device, self.engine

    @property
    def kv_token_bytes(self) -> float:
        """Bytes that a token leaves in an fp16 cache, the default of nearly every engine."""
        return _kv_token_bytes(self.shape)

    @property
    def paged(self) -> bool:
        """Whether weights and cache exceed the RAM, so that they come from flash again for every token."""
        touched = self.weights.read + self.kv_token_bytes * self.prompt
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
        read = self.weights.read if n_tokens == 1 else counted.weight_bytes * FORMATS[self.format][0] / 8
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
    found, file_bytes = find_model(model), _file_bytes(model)
    weights = format_of(model, record["engine"], int(_number(record["weight_bits"]) or 4))
    active = re.search(r"([0-9.]+)b active", model.lower())
    parameters = float(active[1]) if active else _number(record["params_b"])
    if found is None:
        if parameters is None and file_bytes is None:
            return "the size of the model is not stated"
        size = parameters * 1e9 if parameters else file_bytes * 8 / FORMATS[weights][0]  # type: ignore[operator]
        found = Model(typical_shape(size), _base(model))
    stored = weight_bytes(found.shape, weights, found.sixteen_bit, file_bytes)
    device, prompt = _device(record["device"], record["soc"]), int(_number(record["prompt_tokens"]) or 512)
    served = _SERVED in record["source"]
    return Row(
        device=device,
        engine=_engine(record["engine"]),
        model=model,
        base=found.name,
        family=_family(found),
        format=weights,
        shape=found.shape,
        weights=stored,
        context=_SERVED_PROMPT + _SERVED_ANSWER // 2 if served else _context(_number(record["context"])),
        prompt=prompt,
        decode=_number(record["decode_tok_s"]),
        prefill=_number(record["prefill_tok_s"]),
        limit_bytes=_limit(record["device"], model),
        prompt_share=_prompt_share(device, found.shape, stored) if served else 0.0,
    )


def _context(stated: float | None) -> int:
    """Return the tokens that a decoded token attends to, as a mean: tg128 counts 128 tokens from an empty cache.

    Where nothing is said, a short chat.
    """
    return int(stated / 2 if stated and stated <= 512 else stated or 128)


def _prompt_share(device: str, shape: Geometry, weights: WeightBytes) -> float:
    """Return the tokens of a prompt that a server computes per decoded token.

    The warm-up before asks the same prompts, so that vLLM's prefix cache has them all, unless they do not fit: then, taken in
    turns, least recently used is what comes next, and every one is computed again.
    """
    profile = _SERVERS.get(device)
    embedding = 2.0 * shape.head_weights
    memory = _SERVER_MEMORY * load(profile).memory.ram_bytes.value - weights.stored - embedding if profile else math.inf
    cached = _SERVED_REQUESTS * (_SERVED_PROMPT + _SERVED_ANSWER) * _kv_token_bytes(shape)
    return 0.0 if cached <= memory else _SERVED_PROMPT / _SERVED_ANSWER


def _kv_token_bytes(shape: Geometry) -> float:
    return 4.0 * shape.n_kv_layers * shape.n_kv_heads * shape.head_dim


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


def _file_bytes(model: str) -> float | None:
    match = re.search(r"\[(?:file |pte )?([0-9.]+) ?(gib|gb|mib|mb)", model, re.IGNORECASE)
    if match is None:
        return None
    return float(match[1]) * {"gib": _GIB, "gb": 1e9, "mib": _MIB, "mb": 1e6}[match[2].lower()]


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


def _family(model: Model) -> str:
    for name in _FAMILIES:
        if name in model.name.lower():
            return name
    return "qwen experts" if "a3b" in model.name else "llama"


def _limit(device: str, model: str) -> float | None:
    limited = re.search(r"limited to ([0-9.]+) ?G", model)
    if limited:
        return float(limited[1]) * _GIB
    board = re.search(r"(?:Raspberry|Pi) .*?\b([0-9]+) ?GB", device)
    return float(board[1]) * _GIB * _VISIBLE - _IDLE_BYTES if board else None


def _number(text: str | None) -> float | None:
    return float(text) if text else None
