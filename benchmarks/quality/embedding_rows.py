"""What rows of an output head cost as embedding: perplexity of the bundled model on the held-out texts.

    python -m benchmarks.quality.embedding_rows

A tied embedding of an ExecuTorch bundle is looked up in the output head. Products run in float32 on the weights that a bundle
stores, so that what differs is the embedding alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgekv.export.executorch.weights import quantise
from edgekv.export.onnx.matmul_nbits import quantise as quantise_blocks

MODEL = Path(__file__).resolve().parents[2] / "export" / "demo_model"
TEXTS = Path(__file__).parent / "held_out"
TOKENS, CONTEXT = 8192, 1024


def load(weights: str) -> PreTrainedModel:
    """Return the model with its products on quantised weights, and an embedding of its own."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed_tokens" not in name:
            parameter.data.copy_(quantise(parameter.data, weights).dequantise())
    return model


def layouts(table: torch.Tensor, weights: str) -> dict[str, torch.Tensor]:
    """Return the embedding as each layout stores it, decoded."""
    blocks = quantise_blocks(table.numpy(), 8, symmetric=True)
    values = (torch.from_numpy(blocks.codes).float() - 128) * torch.from_numpy(blocks.scales).unsqueeze(2)
    return {
        "float32": table,
        "int8, a scale per 32 channels": values.reshape(table.shape),
        f"{weights}, the head's own rows": quantise(table, weights).dequantise(),
    }


def perplexity(model: PreTrainedModel, texts: list[list[int]]) -> float:
    """Return the perplexity over all texts, cut into pieces of the context."""
    loss, count = 0.0, 0
    for tokens in texts:
        for start in range(0, len(tokens) - 1, CONTEXT):
            piece = torch.tensor(tokens[start : start + CONTEXT + 1])
            logits = model(piece[None, :-1]).logits[0]
            loss += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
            count += len(piece) - 1
    return math.exp(loss / count)


@torch.no_grad()
def main() -> None:
    """Print a line for each kind of weights and layout of the embedding."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    texts = [tokenizer.encode(path.read_text(encoding="utf-8")).ids[:TOKENS] for path in sorted(TEXTS.glob("*.txt"))]
    for weights in ("int4", "int8"):
        model = load(weights)
        table = model.get_input_embeddings().weight.detach().clone()
        for name, rows in layouts(table, weights).items():
            model.get_input_embeddings().weight.copy_(rows)
            print(f"{weights}, embedding {name}: {perplexity(model, texts):.4f}", flush=True)


if __name__ == "__main__":
    main()
