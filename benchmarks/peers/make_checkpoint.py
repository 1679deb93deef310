"""Make the checkpoint that every contestant runs: Llama-shaped, 0.33 B parameters, random weights, a real BPE tokenizer.

Speed and memory do not depend on what the weights say, so nothing has to be downloaded.

Usage: make_checkpoint.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32_000


def make_model() -> Any:
    """Return the model in bfloat16; the embedding is spread a little, so that the largest logit stands out."""
    torch.manual_seed(1234)
    config: Any = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        rope_theta=500_000.0,
        attention_bias=False,
        mlp_bias=False,
        initializer_range=0.02,
        dtype="bfloat16",
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2.0)
    return model.to(torch.bfloat16)


def make_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer, trained on Python's standard library (converters want real merges)."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library = Path(os.__file__).parent
    files = sorted([*library.glob("*.py"), *library.glob("*/*.py")])[:900]
    tokenizer.train_from_iterator((file.read_text(encoding="utf-8", errors="ignore") for file in files), trainer)
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|eos|>"
    )
    wrapped.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return wrapped


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(folder)
    make_model().save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    main()
