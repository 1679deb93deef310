"""Tiny random Hugging Face checkpoints, complete folders, one function for all families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

TEXT = (
    "An operating system runs programs larger than memory: it gives them pages, a page table, a resident set,"
    " and a disk to fault from. Naïve café, 東京, Привет, \N{SMILING FACE WITH SUNGLASSES}.\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_checkpoint(
    folder: Path, family: str = "llama", *, seed: int = 0, std: float = 0.05, head: float = 1.0, **changes: Any
) -> Path:
    """Write a random checkpoint of ``family`` into ``folder``; ``changes`` go to its config.

    The weights are wide enough (``std``) that greedy tokens are no near-ties; an untied head is multiplied by ``head``. Returns
    the folder.
    """
    settings: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "initializer_range": std,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
        **changes,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in name:
                # Gemma stores what is added to 1.
                parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.5) - float(family.startswith("gemma")))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
        if not settings["tie_word_embeddings"]:
            model.lm_head.weight *= head
    model.save_pretrained(folder)
    make_tokenizer(settings["vocab_size"]).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}), encoding="utf-8")
    return folder


def make_image_reader(folder: Path, prefix: str, family: str = "gemma3", **changes: Any) -> PreTrainedModel:
    """Write a random model that reads images, its decoder's tensors under ``prefix``; returns it.

    Args:
        changes: go to the decoder's configuration.
    """
    text = {
        "vocab_size": 384,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 12,
        "sliding_window_pattern": 3,
        **changes,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        **({"model_type": "pixtral"} if family == "mistral3" else {}),
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        text_config=text, vision_config=vision, eos_token_id=[1, 257], image_token_index=380
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    folder.mkdir()
    config.save_pretrained(folder)
    tensors = {
        name.replace("model.language_model.", prefix): tensor.clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(384).save(str(folder / "tokenizer.json"))
    return model


def make_outlier_checkpoint(folder: Path, *, factor: float = 30.0) -> Path:
    """Write a random Qwen2-style checkpoint with a key channel per head whose bias is ``factor`` times as large.

    Source: Qwen2.5 checkpoints have such key biases; INT8 with one key scale per token loses their other channels.
    Queries are scaled up, so that attention is no mere average. Returns the folder.
    """
    make_checkpoint(folder, "qwen2", std=0.08)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if name.endswith("k_proj.bias"):
            tensor.normal_(0, 0.5, generator=generator).view(-1, 32)[:, 14] *= factor
        if name.endswith("q_proj.weight"):
            tensor *= 2.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer whose ids all lie below ``vocab_size``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def load_reference(folder: Path) -> PreTrainedModel:
    """Load a checkpoint with transformers, in float32, as the oracle."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()
