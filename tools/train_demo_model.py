"""Train the bundled demo model (a small Llama) from scratch on a CPU, or evaluate an exported one.

    python -m tools.train_demo_model --books BOOKS --out export/demo_model --work WORK --minutes 75
    python -m tools.train_demo_model --books BOOKS --evaluate export/demo_model

Training takes a wall-clock budget: sequence lengths and learning rate follow the share of it that has passed.  WORK
receives a checkpoint every few minutes; ``--resume`` goes on from it.  See docs/demo_model.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from .demo_tasks import (
    BOS_ID,
    BOS_TOKEN,
    EOS_ID,
    EOS_TOKEN,
    TaskSampler,
    encode_books,
    evaluate,
    name_words,
    read_books,
    split_book,
    train_tokenizer,
)

TOKENS_PER_STEP = 4096  # at short lengths; at long ones SAMPLES_PER_STEP counts
SAMPLES_PER_STEP = {2048: 4, 4096: 2}
CONTEXT_LENGTH = 8192
POSITION_REACH = 4608  # jumps in the position numbers reach this far: the longest training length and some more
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\\nAnswer: ' + message['content'].strip() + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ '\\nQuestion: ' + message['content'].strip() }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the names follow the Llama config."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 448
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-5


@dataclass(frozen=True)
class Stage:
    """Part of the run, up to share ``until`` of the budget: what ``lengths`` (tokens -> share) and ``tasks`` to draw.

    ``jumps`` is the share of samples whose position numbers jump (see TaskSampler.positions).
    """

    until: float
    lengths: dict[int, float]
    tasks: dict[str, float]
    jumps: float


STAGES = (
    Stage(0.12, {128: 1.0}, {"text": 0.2, "copying": 0.5, "retrieval": 0.3}, 0.5),
    Stage(0.25, {256: 0.7, 128: 0.3}, {"text": 0.3, "copying": 0.3, "retrieval": 0.4}, 0.5),
    Stage(0.40, {512: 0.8, 256: 0.2}, {"text": 0.45, "copying": 0.15, "retrieval": 0.4}, 0.5),
    Stage(0.60, {512: 0.8, 256: 0.2}, {"text": 0.65, "copying": 0.05, "retrieval": 0.3}, 0.5),
    # Retrieval is learned by now, at 4096 tokens too; what is left is mostly text, at cheap lengths.
    Stage(0.80, {512: 0.8, 1024: 0.2}, {"text": 0.86, "copying": 0.02, "retrieval": 0.12}, 0.2),
    Stage(0.90, {1024: 0.5, 2048: 0.3, 512: 0.2}, {"text": 0.86, "copying": 0.02, "retrieval": 0.12}, 0.2),
    Stage(1.00, {4096: 0.3, 2048: 0.2, 512: 0.5}, {"text": 0.86, "copying": 0.02, "retrieval": 0.12}, 0.1),
)
WARMUP_STEPS = 100
DECAY_FROM = 0.5  # share of the budget after which the learning rate falls linearly to zero


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.group = shape.num_attention_heads // shape.num_key_value_heads
        query_size = shape.num_attention_heads * shape.head_dim
        key_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, time, hidden]; cos, sin: [batch, time, 1, head_dim / 2]; returns [batch, time, hidden]."""
        batch, time_steps, _ = x.shape

        def heads(t: Tensor, rotate: bool) -> Tensor:
            t = t.view(batch, time_steps, -1, self.head_dim)
            if rotate:
                a, b = t.chunk(2, -1)
                t = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
            return t.transpose(1, 2)

        q, k = heads(self.q_proj(x), True), heads(self.k_proj(x), True)
        v = heads(self.v_proj(x), False)
        # Repeating the key/value heads keeps the fast CPU kernel.
        k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, time_steps, -1))
        return result


class Mlp(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, time, hidden]; returns the same shape."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, time, hidden]; cos, sin: [batch, time, 1, head_dim / 2]; returns [batch, time, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class DemoModel(nn.Module):
    """Llama, written out small for speed; its parameter names are those of transformers, less the ``model.``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        residual_std = 0.04 / math.sqrt(2 * shape.num_hidden_layers)
        for name, p in self.layers.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=residual_std if "o_proj" in name or "down_proj" in name else 0.04)
        self.frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids, positions: [batch, time]; returns logits [batch, time, vocabulary]."""
        angles = positions[:, :, None, None].float() * self.frequencies
        cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def make_batch(sampler: TaskSampler, length: int, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """Draw samples of one length: ids and weights [batch, length + 1], positions [batch, length]."""
    count = SAMPLES_PER_STEP.get(length, max(1, TOKENS_PER_STEP // length))
    ids, weights, positions = [], [], []
    for _ in range(count):
        sample_ids, sample_weights = sampler.mixed(length + 1, stage.tasks)
        ids.append(sample_ids)
        weights.append(sample_weights)
        jump = length < 4096 and sampler.rng.random() < stage.jumps
        positions.append(sampler.positions(length, POSITION_REACH) if jump else list(range(length)))
    weight = torch.tensor(weights)
    # Every sample counts the same, whatever its task.
    return torch.tensor(ids), weight / weight[:, 1:].sum(1, keepdim=True), torch.tensor(positions)


def weighted_loss(model: DemoModel, ids: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    """ids, weights: [batch, length + 1]; positions: [batch, length]; returns the mean over samples (a scalar)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1], positions)
    token_loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (token_loss * weights[:, 1:].flatten()).sum() / ids.shape[0]


def optimizers_of(model: DemoModel, lr: float) -> list[torch.optim.Optimizer]:
    """Return what trains the matrices, and what trains the rest."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    # Muon learns the matrices in fewer steps than AdamW; "match_rms_adamw" lets both share one learning rate.
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_step(
    model: DemoModel,
    optimizers: list[torch.optim.Optimizer],
    lr: float,
    loss_of: Callable[..., Tensor],
    *batch: Tensor,
) -> float:
    """Take one step at a learning rate, with the gradient cut to a norm of one; returns the loss before it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
    loss = loss_of(model, *batch)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.item())


def exact_share(model: nn.Module, sampler: TaskSampler, prompt_tokens: int, fact_count: int, samples: int) -> float:
    """Share of questions whose whole answer is the arg max at every step, which is what greedy decoding gives."""
    hits = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(samples):
            prompt = sampler.retrieval_prompt(prompt_tokens, fact_count)
            ids = torch.tensor([prompt.prompt_ids + prompt.answer_ids])
            best = model(ids, torch.arange(ids.shape[1])[None])[0].argmax(-1)
            answer_start = len(prompt.prompt_ids)
            hits += bool((best[answer_start - 1 : -1] == ids[0, answer_start:]).all())
    return hits / samples


def export(model: DemoModel, tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder that transformers loads: config, bf16 weights, tokenizer, chat template."""
    out.mkdir(parents=True, exist_ok=True)
    shape = model.shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_LENGTH,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "bfloat16",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID, "do_sample": False}
    tables = {"config": config, "tokenizer_config": tokenizer_config, "generation_config": generation_config}
    for name, table in tables.items():
        (out / f"{name}.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json"))
    weights = {f"model.{name}": p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    # Written aside and renamed, so that a reader never meets half a file.
    save_file(weights, str(out / "model.safetensors.part"), metadata={"format": "pt"})
    os.replace(out / "model.safetensors.part", out / "model.safetensors")


def train(args: argparse.Namespace) -> None:
    """Train for ``args.minutes`` of wall-clock time, resumable, and export to ``args.out``."""
    torch.manual_seed(args.seed)
    shape = Shape()
    parts = [split_book(text) for text in read_books(args.books).values()]
    train_texts, held_out_texts = [a for a, _ in parts], [b for _, b in parts]
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer_path = args.work / "tokenizer.json"
    if args.resume:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        tokenizer = train_tokenizer(train_texts, shape.vocab_size)
        tokenizer.save(str(tokenizer_path))
    words = name_words(train_texts)
    books = encode_books(tokenizer, train_texts)
    sampler = TaskSampler(tokenizer, books, words, args.seed)
    held_out = [token for book in encode_books(tokenizer, held_out_texts) for token in book]
    print(f"{sum(map(len, books)) / 1e6:.2f} M training tokens, {len(held_out)} held-out tokens", flush=True)

    model = DemoModel(shape)
    optimizers = optimizers_of(model, args.lr)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    step, tokens, spent_s = 0, 0, 0.0
    checkpoint_path = args.work / "checkpoint.pt"
    if args.resume:
        state: dict[str, Any] = torch.load(checkpoint_path, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, spent_s = state["step"], state["tokens"], state["spent_s"]
        sampler.rng = random.Random(args.seed + step)

    loss_of = torch.compile(weighted_loss, dynamic=False) if args.compile else weighted_loss
    budget_s = args.minutes * 60.0
    started, last_report, last_save = time.monotonic() - spent_s, time.monotonic(), time.monotonic()
    tokens_before, losses = tokens, []
    while (spent_s := time.monotonic() - started) < budget_s:
        share = spent_s / budget_s
        stage = next(s for s in STAGES if share < s.until)
        length = sampler.rng.choices(list(stage.lengths), weights=list(stage.lengths.values()))[0]
        lr = args.lr * min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, (1.0 - share) / (1.0 - DECAY_FROM))
        ids, weights, positions = make_batch(sampler, length, stage)
        losses.append(train_step(model, optimizers, lr, loss_of, ids, weights, positions))
        step, tokens = step + 1, tokens + ids.shape[0] * length
        now = time.monotonic()
        if now - last_report > args.report_s:
            rate = (tokens - tokens_before) / (now - last_report)
            longest = max(stage.lengths)
            scores = {n: exact_share(model, sampler, n, 4, 16) for n in sorted({256, longest})}
            print(
                f"{spent_s / 60:5.1f} min  step {step}  {tokens / 1e6:.2f} M tokens  {rate:.0f} tokens/s  lr {lr:.1e}  "
                f"length {longest}  loss {sum(losses) / len(losses):.3f}  exact {scores}",
                flush=True,
            )
            losses, tokens_before, last_report = [], tokens, time.monotonic()
        if now - last_save > args.save_s:
            save_checkpoint(checkpoint_path, model, optimizers, step, tokens, time.monotonic() - started)
            last_save = time.monotonic()
    save_checkpoint(checkpoint_path, model, optimizers, step, tokens, spent_s)
    export(model, tokenizer, args.out)
    print(f"exported to {args.out} after {step} steps, {tokens / 1e6:.2f} M tokens", flush=True)


def save_checkpoint(
    path: Path, model: DemoModel, optimizers: list[torch.optim.Optimizer], step: int, tokens: int, spent_s: float
) -> None:
    """Write everything that ``--resume`` needs."""
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "step": step,
        "tokens": tokens,
        "spent_s": spent_s,
    }
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def main() -> None:
    """Parse the command line; train or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt books")
    parser.add_argument("--out", type=Path, help="folder to export the trained model to")
    parser.add_argument("--work", type=Path, default=Path("demo_training"), help="folder for checkpoints")
    parser.add_argument("--minutes", type=float, default=75.0, help="wall-clock budget of the training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    parser.add_argument("--report-s", type=float, default=30.0, help="seconds between progress lines")
    parser.add_argument("--save-s", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--evaluate", type=Path, help="evaluate this exported folder instead of training")
    parser.add_argument("--samples", type=int, default=50, help="retrieval prompts per length (with --evaluate)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate is not None:
        evaluate(args.evaluate, args.books, args.samples, args.seed)
        return
    if args.out is None:
        parser.error("--out is required")
    train(args)


if __name__ == "__main__":
    main()
