"""Train the bundled demo model further on samples of its full length, so that long context helps its text.

    python -m tools.lengthen_demo_model --books BOOKS --model export/demo_model --out OUT --steps 1000 --lr 1.5e-3

``train_demo_model.py`` reaches 4096 tokens mostly by jumps in the position numbers of short samples. That teaches retrieval, but
the text of such a model is worse with 4096 tokens in view than with 1024. See docs/demo_model.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F

from .demo_tasks import TaskSampler, encode_books, name_words, read_books, split_book
from .train_demo_model import (
    DemoModel,
    Shape,
    Stage,
    exact_share,
    export,
    make_batch,
    optimizers_of,
    train_step,
    weighted_loss,
)

STAGE = Stage(1.0, {4096: 0.8, 2048: 0.1, 1024: 0.1}, {"text": 0.86, "copying": 0.02, "retrieval": 0.12}, jumps=0.0)
WARMUP_STEPS = 30
LONG, SHORT, SCORED = 4096, 1024, 256


def held_out_losses(model: DemoModel, books: list[list[int]]) -> tuple[float, float]:
    """Return nats per token of the last 256 tokens of held-out windows, with 4096 and with 1024 tokens in view."""
    losses: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for book in books:
            for start in range(0, len(book) - LONG - 1, 1024):
                window = torch.tensor(book[start : start + LONG + 1])[None]
                for length, found in zip((LONG, SHORT), losses, strict=True):
                    ids = window[:, -length - 1 :]
                    logits = model(ids[:, :-1], torch.arange(length)[None]).float()
                    found.append(F.cross_entropy(logits[0, -SCORED:], ids[0, -SCORED:]).item())
    return sum(losses[0]) / len(losses[0]), sum(losses[1]) / len(losses[1])


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt books")
    parser.add_argument("--model", type=Path, required=True, help="exported folder to begin with")
    parser.add_argument("--out", type=Path, required=True, help="folder to export to")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate; falls linearly to zero")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    parts = [split_book(text) for text in read_books(args.books).values()]
    texts, held_out = [a for a, _ in parts], [b for _, b in parts]
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    sampler = TaskSampler(tokenizer, encode_books(tokenizer, texts), name_words(texts), args.seed)
    held_out_books = encode_books(tokenizer, held_out)
    model = DemoModel(Shape())
    weights = load_file(str(args.model / "model.safetensors"))
    model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in weights.items()})
    optimizers = optimizers_of(model, args.lr)
    started, losses = time.monotonic(), []
    for step in range(args.steps):
        lr = args.lr * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / args.steps)
        length = sampler.rng.choices(list(STAGE.lengths), weights=list(STAGE.lengths.values()))[0]
        batch = make_batch(sampler, length, STAGE)
        losses.append(train_step(model, optimizers, lr, weighted_loss, *batch))
        if step % 20 == 19:
            print(
                f"{time.monotonic() - started:6.0f} s  step {step + 1}  loss {sum(losses[-20:]) / 20:.3f}", flush=True
            )
    export(model, tokenizer, args.out)
    long, short = held_out_losses(model, held_out_books)
    scores = {tokens: exact_share(model, sampler, tokens, 4, 32) for tokens in (256, 1024, 4096)}
    print(f"exported to {args.out}; held-out nats per token {long:.4f} ({SHORT} in view: {short:.4f}); exact {scores}")


if __name__ == "__main__":
    main()
