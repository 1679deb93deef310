"""docs/models.md: the model types that are exported, what each computes, and the ways on which tests hold it to transformers.

Made from the pages in ``architectures.py`` and from the tests' own tables; `python -m tests.export.models_page` writes it.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from edgekv.contract import ENGINES, FORMS, WEIGHTS
from edgekv.errors import ConfigError
from edgekv.export.gguf.config import ARCHITECTURES as GGUF
from edgekv.model_config import ARCHITECTURES, TEXT_PARTS, read_model_config
from edgekv.model_config.architectures import Architecture
from tests.conftest import MODEL_TYPES, VARIANTS
from tests.export.test_parity import IMAGE_READERS, MORE
from tests.fields import put_tables
from tests.model_config.test_decoder import CHANGES, full
from tests.test_engines import cases

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
#: What the models of a type are called.
NAMES = {
    "llama": "Llama 2 and 3, SmolLM 1 and 2",
    "mistral": "Mistral 7B, Mistral Nemo",
    "qwen2": "Qwen 2 and 2.5",
    "qwen3": "Qwen 3 (dense)",
    "smollm3": "SmolLM 3",
    "granite": "Granite 3 and 4 (dense)",
    "phi3": "Phi-3, Phi-3.5-mini, Phi-4-mini",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (270M, 1B)",
    "gemma3": "Gemma 3 (4B and larger), text alone",
    "seed_oss": "Seed-OSS",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "ernie4_5": "ERNIE 4.5 (dense)",
    "arcee": "Arcee AFM",
    "hunyuan_v1_dense": "Hunyuan (dense)",
    "exaone4": "EXAONE 4",
    "glm4": "GLM-4",
    "cohere2": "Command R7B",
    "starcoder2": "StarCoder 2",
    "stablelm": "StableLM",
    "ministral": "Ministral 8B (2410)",
    "ministral3": "Ministral 3, up to its original context",
    "mistral3": "Mistral Small 3.1 and 3.2, text alone",
}
_WINDOWS = {
    "every": "all layers",
    "any": "layers by `layer_types`",
    "late": "layers by `layer_types`",
    "unrotated": "layers by `layer_types`",
    "pattern": "layers by `layer_types` or a period",
}
_NORMS = {"behind": "norms behind attention and MLP", "around": "norms on both sides", "shared": "attention beside MLP"}
_NORM_KINDS = {"layer": "LayerNorm", "biased": "LayerNorm with bias"}
_QK_NORMS = {"heads": "q/k norm", "whole": "q/k norm over all heads", "turned": "q/k norm behind RoPE"}
#: Keys of which a type may refuse a value that makes sense in others.
_CHOICES = ("hidden_act", "hidden_activation", "use_bidirectional_attention", "qk_layernorm")
#: What is refused for every model type.
REFUSED = (
    ("`--engine executorch --weights fp16`", "XNNPACK would compute in float32"),
    (
        "`--engine executorch --operators edgekv` with the inline form, or weights other than int4",
        "it is for these alone",
    ),
    ("`--engine executorch --weights int4` where a width is no multiple of 32", "groups of 32 columns share a scale"),
    ("`--weights fp16` where a tensor holds numbers beyond float16", "it would differ by more than a hundredth"),
    ("heads of more than 256 channels, or of a number that is no multiple of 4", "the kernels have room for no more"),
    ("`quantization_config`", "the checkpoint is quantised already; export the original"),
    (
        "`is_encoder_decoder`, `per_layer_config`, `transformers_weights`",
        "decoders whose layers are alike, in safetensors",
    ),
    (
        "rope types other than `default`, `linear`, `llama3`, `yarn`, `longrope`, unless the table says so",
        "angles that change",
    ),
)


def computes(page: Architecture) -> str:
    """Return what of a model type is no Llama, in words."""
    caps = {"attn_logit_softcapping": "capped scores", "final_logit_softcapping": "capped logits"}
    words = [
        f"windows ({_WINDOWS[page.windows]})" if page.windows in _WINDOWS else "",
        _NORMS.get(page.norms, ""),
        _NORM_KINDS.get(page.norm_kind, ""),
        _QK_NORMS.get(page.qk_norms, ""),
        "" if page.gated else "MLP without a gate",
        "GELU" if any("gelu" in str(page.defaults.get(key)) for key in _CHOICES) else "",
        "neighbouring channels turned" if page.interleaved_rope else "",
        "part of a head turned" if page.partial_rotary else "",
        "a rope of their own for layers with a window" if page.sliding_rope else "",
        "no RoPE in layers without a window" if page.unrotated_full else "",
        "no RoPE in some layers" if "no_rope_layers" in page.defaults else "",
        "multipliers" if "residual_multiplier" in page.defaults else "",
        "embedding times the root of the width" if page.scaled_embedding else "",
        *(word for key, word in caps.items() if page.defaults.get(key) is not None),
    ]
    return ", ".join(word for word in words if word) or " "


def refuses(kind: str) -> str:
    """Return the values of the tests' tables that a model type refuses and others take, by key."""
    page, found = ARCHITECTURES[kind], []
    for key in _CHOICES:
        refused = []
        values = [value for value in CHANGES[key] if value != "nonsense"]
        for value in values if key in page.defaults else ():
            try:
                read_model_config({**full(kind), key: value})
            except ConfigError:
                refused.append(f"`{value}`".lower())
        if refused:
            found.append(f"`{key}` {', '.join(refused)}")
    ropes = [kind for kind in ("linear", "llama3", "yarn", "longrope") if kind not in page.rope_types]
    return "; ".join([*found, *([f"rope type {', '.join(ropes)}"] if ropes else [])]) or " "


def taken_through() -> dict[tuple[str, str, str], set[str]]:
    """Return the weights that tests take through each (model type, engine, form)."""
    families = {variant: family for variant, (family, _) in (VARIANTS | MODEL_TYPES | MORE).items()}
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for case in cases():
        engine, form, weights, _, variant = case.values
        found[families[variant], engine, form].add(weights)
    for family, _ in MORE.values():
        found[family, "onnx", "split"].add("fp32")
    for kind in IMAGE_READERS:
        found[kind, "onnx", "split"].add("fp32")
    return found


def matrix() -> str:
    """Return model types against engines and forms; a cell lists weights."""
    ways = [(engine, form) for engine in ENGINES for form in FORMS]
    head = ["model type", *(f"{engine}, {form}" for engine, form in ways), "GGUF"]
    rows, weights = [], taken_through()
    for kind in NAMES:
        cells = []
        for engine, form in ways:
            own = weights[kind, engine, form]
            cells.append("all" if own == set(WEIGHTS) else ", ".join(name for name in WEIGHTS if name in own) or " ")
        rows.append([f"`{kind}`", *cells, "yes" if kind in GGUF.values() else " "])
    return _table(head, rows)


def types() -> str:
    """Return what each model type is called, computes and refuses."""
    rows = []
    for kind, name in NAMES.items():
        if kind in TEXT_PARTS:
            parts = " or ".join(f"`{part}`" for part in TEXT_PARTS[kind])
            rows.append([f"`{kind}`", name, f"its decoder is {parts}", " "])
        else:
            rows.append([f"`{kind}`", name, computes(ARCHITECTURES[kind]), refuses(kind)])
    return _table(["model type", "models", "besides what a Llama computes", "refused"], rows)


def refused() -> str:
    """Return what is refused whatever the model type."""
    return _table(["refused", "why"], [list(row) for row in REFUSED])


def render(page: str) -> str:
    """Return the page with its tables made anew."""
    return put_tables(page, {"types": types(), "matrix": matrix(), "refused": refused()})


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---").replace("|--- |", "|---|")


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
